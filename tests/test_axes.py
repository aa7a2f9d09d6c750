"""Named axes: parsing, positions, shrinking and projecting, against plain indexing written out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tersor.compress.axes import Dim, family, parse_dims, positions, project, shrink

SIZES = {"hidden": 6, "ffn": 4, "kv_heads": 3, "queries": 2, "head_dim": 2}


def test_parse_and_print():
    dims = parse_dims("kv_heads{i} * queries * head_dim + ffn{i}, hidden")
    assert [str(d) for d in dims] == ["kv_heads{i} * queries * head_dim + ffn{i}", "hidden"]
    assert str(dims[0].at(3)) == "kv_heads3 * queries * head_dim + ffn3"
    assert dims[0].at(None) is dims[0]
    assert dims[0].has("ffn{i}")
    assert not dims[0].has("ffn")


def test_family():
    assert [family(a) for a in ("ffn3", "ffn{i}", "ffn", "kv_heads12")] == ["ffn", "ffn", "ffn", "kv_heads"]


def test_size_is_a_sum_of_products():
    assert Dim.parse("kv_heads * queries * head_dim + ffn + ffn").size(SIZES) == 12 + 4 + 4


def test_positions_of_a_group_take_its_queries_along():
    dim = Dim.parse("kv_heads * queries * head_dim")
    assert positions(dim, "kv_heads", torch.tensor([2, 0]), SIZES).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    assert positions(dim, "queries", torch.tensor([1]), SIZES).tolist() == [2, 3, 6, 7, 10, 11]


def test_positions_in_fused_sections():
    dim = Dim.parse("ffn + ffn")
    assert positions(dim, "ffn", torch.tensor([1, 3]), SIZES).tolist() == [1, 3, 5, 7]
    mixed = Dim.parse("kv_heads * queries * head_dim + kv_heads * head_dim")
    assert positions(mixed, "kv_heads", torch.tensor([1]), SIZES).tolist() == [4, 5, 6, 7, 14, 15]
    assert positions(mixed, "queries", torch.tensor([1]), SIZES).tolist() == [
        2,
        3,
        6,
        7,
        10,
        11,
        *range(12, 18),
    ]


def test_shrink_leaves_other_axes_alone():
    weight = torch.arange(24.0).reshape(4, 6)
    kept = shrink(weight, parse_dims("ffn, hidden"), "ffn", torch.tensor([0, 3]), SIZES)
    assert torch.equal(kept, weight[[0, 3]])
    assert shrink(weight, parse_dims("ffn, hidden"), "kv_heads", torch.tensor([0]), SIZES) is weight


def test_shrink_acts_on_every_dimension_that_has_the_axis():
    square = torch.arange(36.0).reshape(6, 6)
    assert torch.equal(
        shrink(square, parse_dims("hidden, hidden"), "hidden", torch.tensor([1, 4]), SIZES),
        square[[1, 4]][:, [1, 4]],
    )


@given(st.permutations(range(3)), st.permutations(range(3)))
def test_two_permutations_are_their_product(one, two):
    dims, weight = parse_dims("kv_heads * queries * head_dim, hidden"), torch.arange(72.0).reshape(12, 6)
    first, second = torch.tensor(one), torch.tensor(two)
    twice = shrink(shrink(weight, dims, "kv_heads", first, SIZES), dims, "kv_heads", second, SIZES)
    assert torch.equal(twice, shrink(weight, dims, "kv_heads", first[second], SIZES))


def test_project_is_the_basis_on_every_side_and_float64():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 6, generator=generator)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0][:, :4]
    found = project(weight, parse_dims("hidden, hidden"), "hidden", basis)
    assert found.dtype == torch.float64
    assert torch.allclose(found, basis.T @ weight.double() @ basis, atol=1e-14)
    conv = torch.randn(4, 6, 3, generator=generator)
    dims = parse_dims("ffn, hidden, head_dim")
    assert torch.allclose(
        project(conv, dims, "hidden", basis), torch.einsum("fdk,de->fek", conv.double(), basis), atol=1e-14
    )


def test_a_factor_does_not_rotate():
    with pytest.raises(ValueError, match="cannot rotate kv_heads inside the dimension kv_heads \\* head_dim"):
        project(
            torch.zeros(6, 6), parse_dims("kv_heads * head_dim, hidden"), "kv_heads", torch.eye(3).double()
        )
