"""Exact mode against its definition: gradients bit for bit those of autograd on masked tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.sparse.meters import saved_bytes
from tersor.sparse.swat import SparseTraining, Sparsity
from tersor.sparse.swat.encoding import (
    decode,
    encode,
    from_bits,
    from_bits_anywhere,
    set_bits,
    to_bits,
    to_bits_anywhere,
)
from tersor.sparse.swat.functions import Conv2d, Linear, Part, Product
from tersor.sparse.swat.saved import Encoded, Rows, keep_rows, keep_values
from tersor.sparse.swat.threshold import SAMPLE, masked, threshold
from torch import nn
from torch.nn import functional

CASES = {
    "linear": (Linear(), (96, 40), (24, 40)),
    "linear on three dimensions": (Linear(), (4, 25, 40), (24, 40)),
    "linear on four dimensions": (Linear(), (2, 3, 25, 40), (24, 40)),
    "Conv1D of GPT-2": (Linear(transposed=True), (4, 25, 40), (40, 24)),
    "convolution": (Conv2d(padding=(1, 1)), (3, 8, 12, 12), (16, 8, 3, 3)),
    "stride": (Conv2d(stride=(2, 2), padding=(3, 3)), (3, 8, 13, 12), (16, 8, 7, 7)),
    "stride and padding that differ by side": (Conv2d((2, 1), (0, 2)), (3, 8, 13, 12), (16, 8, 3, 5)),
    "groups": (Conv2d(padding=(1, 1), groups=4), (3, 8, 12, 12), (16, 2, 3, 3)),
    "dilation": (Conv2d(padding=(2, 2), dilation=(2, 2)), (3, 8, 12, 12), (16, 8, 3, 3)),
}


def tensors(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    op, shape, weight = CASES[name]
    g = torch.Generator().manual_seed(len(name))
    x, w = torch.randn(shape, generator=g).to(dtype), torch.randn(weight, generator=g).to(dtype)
    b = torch.randn(weight[1] if getattr(op, "transposed", False) else weight[0], generator=g).to(dtype)
    return op, x, w, b


def plain(op, x, w, b):
    """The layer as torch runs it."""
    if isinstance(op, Linear):
        return functional.linear(x, w.t() if op.transposed else w, b)
    return functional.conv2d(x, w, b, op.stride, op.padding, op.dilation, op.groups)


def reference(op, x, w, b, xs, ws):
    """dx, dw, db by autograd on the masked tensors, as algorithm 1 has them."""
    ws, xs = ws.clone().requires_grad_(), xs.clone().requires_grad_()
    b = b.clone().requires_grad_()
    y = plain(op, xs, ws, b)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    found = torch.autograd.grad(y, (xs, ws, b), g)
    with torch.no_grad():
        return plain(op, x, ws, b), g, found


def ours(op, x, w, b, g, share, values=None):
    """The same through `Product`, with a threshold for each of x and w."""
    x, w, b = (t.clone().requires_grad_() for t in (x, w, b))
    least = threshold(w, share)
    plan, kept = keep_values(x, share, lambda: threshold(x, share), values)
    y = Product.apply(x, w, b, op, Part(least), plan, kept, None)
    return y, torch.autograd.grad(y, (x, w, b), g), plan


@pytest.mark.parametrize("values", [None, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_bit_identical_to_the_masked_reference(name, values):
    op, x, w, b = tensors(name)
    xs, ws = masked(x, threshold(x, 0.8)), masked(w, threshold(w, 0.8))
    if values is not None:
        xs = xs.to(values).float()
    y, g, expected = reference(op, x, w, b, xs, ws)
    got, found, plan = ours(op, x, w, b, g, 0.8, values)
    assert isinstance(plan, Encoded)
    assert torch.equal(got, y)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["linear", "convolution"])
def test_in_bf16_too(name):
    op, x, w, b = tensors(name, torch.bfloat16)
    xs, ws = masked(x, threshold(x, 0.8)), masked(w, threshold(w, 0.8))
    y, g, expected = reference(op, x, w, b, xs, ws)
    got, found, _ = ours(op, x, w, b, g, 0.8)
    assert torch.equal(got, y)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_reference_that_differs_a_little_is_not_equal(name):
    """The twin: another threshold, no rounding, or no mask, and the comparison above fails."""
    op, x, w, b = tensors(name)
    xs, ws = masked(x, threshold(x, 0.8)), masked(w, threshold(w, 0.8))
    _, g, right = reference(op, x, w, b, xs, ws)
    _, found, _ = ours(op, x, w, b, g, 0.8, torch.bfloat16)
    assert not torch.equal(found[1], right[1]), "values were rounded to bfloat16, the reference was not"
    assert torch.equal(found[0], right[0]), "dx has nothing to do with what is saved"
    for wrong_x, wrong_w in ((x, ws), (masked(x, threshold(x, 0.79)), ws)):
        assert not torch.equal(ours(op, x, w, b, g, 0.8)[1][1], reference(op, x, w, b, wrong_x, wrong_w)[2][1])
    assert not torch.equal(ours(op, x, w, b, g, 0.8)[1][0], reference(op, x, w, b, xs, w)[2][0])


def test_channels_last_stays_channels_last_and_exact():
    op, x, w, b = tensors("convolution")
    x = x.contiguous(memory_format=torch.channels_last)
    xs, ws = masked(x, threshold(x, 0.8)), masked(w, threshold(w, 0.8))
    _, g, expected = reference(op, x, w, b, xs, ws)
    _, found, plan = ours(op, x, w, b, g, 0.8)
    assert plan.channels_last
    assert torch.equal(found[1], expected[1])


def test_every_weight_has_a_gradient_dropped_ones_too():
    op, x, w, b = tensors("linear")
    _, (_, dw, _), _ = ours(op, x, w, b, torch.ones(96, 24), 0.8)
    dropped = w.abs() < threshold(w, 0.8)
    assert int((dw[dropped] != 0).sum()) > 0.9 * int(dropped.sum())


def test_all_tokens_drawn_is_the_dense_gradient():
    op, x, w, b = tensors("linear on three dimensions")
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    g = torch.randn(4, 25, 24, generator=torch.Generator().manual_seed(1))
    plan, kept = keep_rows(x, torch.arange(100), 2)
    found = torch.autograd.grad(Product.apply(x, w, b, op, Part(), plan, kept, None), (x, w, b), g)
    expected = torch.autograd.grad(plain(op, x, w, b), (x, w, b), g)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["linear on three dimensions", "stride"])
def test_drawn_tokens_give_the_gradient_on_average(name):
    """Over a partition of the tokens into draws of equal size, the mean of the estimates is the dense gradient."""
    op, x, w, b = tensors(name)
    x, w, b = (t.double().requires_grad_() for t in (x, w, b))
    y = plain(op, x, w, b)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(y, w, g)[0]
    leading = op.leading(x)
    total = x.shape[:leading].numel()
    order, size = torch.randperm(total, generator=torch.Generator().manual_seed(2)), total // (4 if total > 4 else 3)
    estimates = []
    for draw in order.split(size):
        plan, kept = keep_rows(x, draw.sort().values, leading)
        estimates.append(torch.autograd.grad(Product.apply(x, w, b, op, Part(), plan, kept, None), w, g)[0])
    assert torch.allclose(torch.stack(estimates).mean(0), expected)
    assert not torch.allclose(estimates[0], expected), "one draw is an estimate, not the gradient"


@pytest.mark.parametrize("transposed", [False, True])
def test_live_rows_and_columns_are_the_masked_layer(transposed):
    op = Linear(transposed)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(30, 12, generator=g).double(), torch.randn(20, 12, generator=g).double()
    rows, columns = torch.tensor([1, 4, 7, 19]), torch.tensor([0, 2, 3, 8, 11])
    mask = torch.zeros_like(w).index_put_(torch.meshgrid(rows, columns, indexing="ij"), torch.ones(()).double())
    stored = w.t().contiguous() if transposed else w
    part = Part(None, columns, rows) if transposed else Part(None, rows, columns)
    stored, xs = stored.requires_grad_(), x[:, columns].requires_grad_()
    plan, kept = keep_rows(xs, torch.arange(30), 1)
    y = Product.apply(xs, stored, None, op, part, plan, kept, None)
    dense_x, dense_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    expected = functional.linear(dense_x, dense_w * mask)
    assert torch.allclose(y, expected[:, rows])
    dx, dw = torch.autograd.grad(y.pow(2).sum(), (xs, stored))
    edx, edw = torch.autograd.grad(expected.pow(2).sum(), (dense_x, dense_w))
    assert torch.allclose(dw.t() if transposed else dw, edw)
    assert torch.allclose(dx, edx[:, columns])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(0, 10_000), st.floats(0, 0.99))
def test_decode_undoes_encode(count, seed, share):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    least = threshold(x, share)
    found = encode(x, least)
    if found is None:
        assert count == 0 or (x.abs() >= least).float().mean() > 0.9 - 8 / count
    else:
        assert torch.equal(decode(found, x.shape, x.dtype), masked(x, least))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_bits_are_the_same_through_numpy_and_through_torch(values):
    mask = torch.tensor(values, dtype=torch.bool)
    assert torch.equal(to_bits(mask), to_bits_anywhere(mask))
    assert torch.equal(from_bits(to_bits(mask), len(values)), mask)
    assert torch.equal(from_bits_anywhere(to_bits(mask), len(values)), mask)
    assert set_bits(to_bits(mask), len(values)).tolist() == [n for n, v in enumerate(values) if v]


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9])
def test_a_sampled_threshold_misses_the_density_by_little(share):
    x = torch.randn(64, 128, 256, generator=torch.Generator().manual_seed(3))
    density = float((x.abs() >= threshold(x, share)).float().mean())
    assert abs(density - (1 - share)) <= 4 * (share * (1 - share) / SAMPLE) ** 0.5
    exact = float((x.abs() >= threshold(x, share, None)).double().mean())
    assert abs(exact - (1 - share)) <= 1e-6


def test_zeros_are_never_kept():
    x = torch.relu(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    least = threshold(x, 0.2)
    assert int((x.abs() >= least).sum()) == int((x > 0).sum())


def test_rows_need_no_copy_of_a_pre_activation():
    from tersor.sparse.swat.saved import SOURCE, Source

    h = torch.randn(40, 8)
    x = functional.gelu(h)
    x.__dict__[SOURCE] = Source(h, functional.gelu)
    rows = torch.tensor([3, 30])
    plan, kept = keep_rows(x, rows, 1)
    assert isinstance(plan, Rows)
    assert kept[0].data_ptr() == h.data_ptr()
    assert torch.equal(plan.rebuild(*kept), x[rows])


def normed() -> tuple[nn.Module, torch.Tensor]:
    """Norms in front of every kind of reader: an activation and a layer, a layer alone, another activation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.SiLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, bias=False), nn.Flatten(1), nn.LayerNorm(64),
            nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4),
        )  # fmt: skip
        return model.train(), torch.randn(16, 3, 12, 12)


def gradients(
    share: float, tell: bool, training: bool = True, drop: str = "all"
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Of two steps, with norms that tell what their output comes from or do not; and the buffers behind them."""
    model, x = normed()
    model.train(training)
    sparse = SparseTraining(model, Sparsity(weights=0.5, activations=share, drop=drop, ramp="none", exempt=()), 2)
    for norm in sparse._norms.values():
        norm.tells &= tell
    sparse.attach()
    for _ in range(2):  # the first tells activations who reads them
        model.zero_grad()
        model(x).square().mean().backward()
    return [p.grad for p in model.parameters()], dict(model.named_buffers())


@pytest.mark.parametrize("training", [True, False])
def test_what_a_norm_makes_again_is_what_was_kept(training):
    (found, moved), (expected, wanted) = gradients(0.8, True, training), gradients(0.8, False, training)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(moved[name], wanted[name]) for name in wanted), "running means move once a forward"


def test_another_threshold_gives_other_gradients():
    """The twin: what is made again is masked."""
    assert not torch.equal(gradients(0.8, True)[0][0], gradients(0.79, True)[0][0])


def test_where_dropping_saves_no_byte_nothing_is_dropped():
    """What norms and activations keep is read whole; an input that is kept for its layer alone is not."""

    def of(drop: str, activations: float) -> tuple[list[torch.Tensor], int]:
        model, x = normed()
        model[9] = nn.Sequential(nn.Flatten(1), Doubled())  # nobody keeps what it makes
        model[10] = nn.Identity()
        options = Sparsity(weights=0.5, activations=activations, drop=drop, ramp="none", exempt=())
        with saved_bytes(model, x) as found:
            training = SparseTraining(model, options, 1)
            training.attach()
            loss = model(x).square().mean()
        loss.backward()
        return [p.grad for name, p in model.named_parameters() if name in ("8.weight", "11.weight")], found.total

    (spared, bytes_spared), (published, bytes_published) = of("stored", 0.8), of("all", 0.8)
    (whole, _) = of("stored", 0.0)
    assert bytes_spared <= bytes_published
    assert torch.equal(spared[0], whole[0])
    assert not torch.equal(published[0], whole[0])
    assert torch.equal(spared[1], published[1])
    assert not torch.equal(spared[1], whole[1])


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x
