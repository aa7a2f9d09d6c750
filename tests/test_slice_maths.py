"""The maths behind slice: each formula against a slow, obvious way to the same number."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tersor.compress.calibration.batches import Batch, batches, sample
from tersor.compress.calibration.lstsq import Regression
from tersor.compress.errors import RecipeError
from tersor.compress.slicing.basis import draw_loss, principal, weighted_basis
from tersor.compress.slicing.budget import candidates, free_words
from tersor.compress.slicing.cutter import descend
from tersor.compress.slicing.fuse import restate, zero_sum
from tersor.compress.slicing.obs import elimination_order, survivors


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_ridge_pulls_towards_the_weights_that_are_there():
    a, weight = draw(50, 6), draw(6, 3, seed=1)
    fit = Regression(6, 3)
    fit.add(a, a @ weight)
    found, _ = fit.solve(weight, ridge=10.0)
    assert torch.allclose(found, weight, atol=1e-10)
    pulled_to_zero, _ = fit.solve(torch.zeros_like(weight), ridge=10.0)  # the twin: a ridge towards zero
    assert (pulled_to_zero - weight).abs().max() > 0.1


def test_the_fit_in_batches_is_the_weighted_ridge_on_all_rows():
    a, t, w, start = draw(80, 5), draw(80, 2, seed=1), draw(80, seed=2).abs(), draw(5, 2, seed=3)
    fit = Regression(5, 2)
    for rows in (slice(0, 30), slice(30, 80)):
        fit.add(a[rows], t[rows], w[rows])
    found, _ = fit.solve(start, ridge=0.1)
    penalty = 0.1 * (a.T @ (w[:, None] * a)).diagonal().mean()
    rows = torch.cat([w.sqrt()[:, None] * a, penalty.sqrt() * torch.eye(5)])
    right = torch.cat([w.sqrt()[:, None] * (t - a @ start), torch.zeros(5, 2)])
    assert torch.allclose(found, start + torch.linalg.lstsq(rows, right).solution, atol=1e-9)
    before, left = (
        float((w[:, None] * (t - a @ weight) ** 2).sum() / (w[:, None] * t**2).sum()) for weight in (start, found)
    )
    assert (fit.left_before, fit.left_after) == pytest.approx((before, left), rel=1e-9)
    assert left < before


def test_sums_are_whole_although_half_of_them_is_computed():
    a, w = draw(40, 300), draw(40, seed=1).abs()
    fit = Regression(300, 1)
    for rows in (slice(0, 25), slice(25, 40)):
        fit.add(a[rows], a[rows, :1], w[rows])
        assert torch.allclose(fit.gram, fit.gram.T, atol=1e-12)
    assert torch.allclose(fit.gram, a.T @ (w[:, None] * a), atol=1e-10)


def test_zeros_that_are_passed_over_change_no_sum(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    chosen = (torch.rand(300, 5, generator=generator) < 0.3).repeat_interleave(60, dim=1)
    a, t = torch.randn(300, 300, generator=generator) * chosen, torch.randn(300, 7, generator=generator)
    weight, target = torch.rand(300, generator=generator), torch.randn(300, 7, generator=generator)

    def sums(share: float, targets: torch.Tensor, block: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr("tersor.compress.calibration.lstsq.SPARSE", share)
        fit = Regression(300, 7, intercept=True, block=block)
        fit.add(a, targets, weight)
        return fit.gram.clone(), fit.cross

    (gram, cross), (dense_gram, dense_cross) = sums(1.0, t), sums(0.0, t)
    assert torch.allclose(gram, dense_gram, rtol=0, atol=1e-12 * float(dense_gram.abs().max()))
    assert torch.allclose(cross, dense_cross, rtol=0, atol=1e-12 * float(dense_cross.abs().max()))
    assert torch.allclose(sums(1.0, t, block=128)[0], gram)
    assert not torch.allclose(sums(1.0, target)[1], cross)


def test_outputs_are_drawn_as_the_model_says():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0]).expand(1, 40_000, 4).clone()
    entropy = float(torch.distributions.Categorical(logits=logits[0, 0]).entropy())
    batch = Batch([np.zeros(40_000, dtype=np.int64)])
    found = float(draw_loss(SimpleNamespace(logits=logits), batch, torch.Generator().manual_seed(0))) / 40_000
    assert found == pytest.approx(entropy, rel=0.02)
    likeliest = float(-logits[0, 0].log_softmax(-1).max())  # the twin: the likeliest output instead of a drawn one
    assert likeliest != pytest.approx(entropy, rel=0.02)


def test_a_constant_is_fitted_without_a_pull():
    a = draw(200, 3)
    fit = Regression(3, 1, intercept=True)
    fit.add(a, a @ torch.ones(3, 1, dtype=torch.float64) + 7.0)
    found, constant = fit.solve(torch.ones(3, 1), ridge=1e-2)
    assert constant is not None
    assert constant.item() == pytest.approx(7.0, abs=1e-9)
    assert torch.allclose(found, torch.ones(3, 1, dtype=torch.float64), atol=1e-9)


def left_over(moments: torch.Tensor, weight: torch.Tensor, keep: list[int], damp: float) -> float:
    """The damped output error when only `keep` stays and is refitted, the obvious way."""
    h = moments + damp * torch.eye(len(moments))
    refit = torch.linalg.solve(h[keep][:, keep], h[keep] @ weight)
    change = weight.clone()
    change[keep] -= refit
    return float((change * (h @ change)).sum())


@pytest.mark.parametrize("width", [1, 2])
def test_elimination_takes_the_cheapest_group_each_time(width):
    n, count = 12, 4
    a, weight = draw(60, n) @ draw(n, n, seed=1), draw(n, 5, seed=2)
    moments, groups = a.T @ a, torch.arange(n).reshape(-1, width)
    damp = 1e-2 * float(moments.diagonal().mean())
    order = elimination_order(moments, weight, groups, count).tolist()
    alive = list(range(n // width))
    for chosen in order:
        left = {g: groups[[x for x in alive if x != g]].flatten().tolist() for g in alive}
        cost = {g: left_over(moments, weight, left[g], damp) for g in alive}
        assert chosen == min(cost, key=cost.__getitem__)
        alive.remove(chosen)
    assert survivors(torch.tensor(order), n // width, n // width - count).tolist() == alive


def test_elimination_in_blocks_is_elimination_one_by_one():
    n = 150
    a, weight = draw(400, n) @ draw(n, n, seed=1), draw(n, 7, seed=2)
    order = elimination_order(a.T @ a, weight, torch.arange(n)[:, None], 100)
    for few in (1, 63, 64, 65):
        assert torch.equal(elimination_order(a.T @ a, weight, torch.arange(n)[:, None], few), order[:few])
    inverse = torch.linalg.inv(a.T @ a + 1e-2 * (a.T @ a).diagonal().mean() * torch.eye(n))
    norms = weight.pow(2).sum(1)
    assert order.tolist() != (norms / inverse.diagonal()).argsort()[:100].tolist()  # the twin: no updates


def test_a_metric_decides_which_unit_matters():
    moments, weight = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    groups = torch.arange(2)[:, None]
    for first, second in ((1.0, 9.0), (9.0, 1.0)):
        metric = torch.diag(torch.tensor([first, second], dtype=torch.float64))
        assert elimination_order(moments, weight, groups, 1, metric).item() == int(first > second)


def test_the_weighted_basis_loses_least_after_least_squares():
    d, k = 10, 4
    x, g = draw(300, d) @ draw(d, d, seed=1), draw(300, d, seed=2) @ draw(d, d, seed=3)
    moments, metric = x.T @ x, g.T @ g
    metric = metric / metric.diagonal().mean() + 0.1 * torch.eye(d)

    def lost(q: torch.Tensor) -> float:
        schur = moments - moments @ q @ torch.linalg.solve(q.T @ moments @ q, q.T @ moments)
        return float((metric * schur).sum())

    best = weighted_basis(moments, g.T @ g)
    assert torch.allclose(best.T @ best, torch.eye(d, dtype=torch.float64), atol=1e-9)
    assert lost(best[:, :k]) < lost(principal(moments)[:, :k])
    for seed in range(20):
        near = torch.linalg.qr(best[:, :k] + 0.05 * draw(d, k, seed=10 + seed))[0]
        assert lost(best[:, :k]) <= lost(near) + 1e-9


def test_a_stream_of_low_rank_is_kept_whole_whatever_the_metric():
    x = draw(100, 3) @ draw(3, 8, seed=1)
    metric = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64) ** 4)
    q = weighted_basis(x.T @ x, metric)[:, :3]
    assert torch.allclose(x @ q @ q.T, x, atol=1e-8)


def test_helmert_columns_are_orthonormal_and_sum_to_zero():
    u = zero_sum(7)
    assert torch.allclose(u.T @ u, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert u.sum(0).abs().max() < 1e-12


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "phi", "gemma"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("remove", [0.1, 0.25, 0.4])
def test_every_candidate_delivers_the_request_where_the_ffn_may_absorb(tiny, model_type, tied, remove):
    layout = tiny(model_type, tie_word_embeddings=tied).layout
    axes = ["hidden", "ffn"]
    for sizes in candidates(layout, remove, axes):
        after = restate(layout, sizes)
        unit = layout.parameters - restate(layout, {"ffn": layout.families["ffn"] - 1}).parameters
        missed = abs(after.parameters - layout.parameters * (1 - remove))
        assert missed <= max(0.005 * layout.parameters, unit)
        assert after.parameters < layout.parameters


def test_sizes_stay_multiples_of_what_the_recipe_says(tiny):
    for sizes in candidates(tiny("mistral").layout, 0.25, ["hidden", "ffn"], round_to=8):
        assert all(size % 8 == 0 for size in sizes.values())


def test_no_sizes_is_an_error_that_names_the_axes(tiny):
    with pytest.raises(RecipeError, match="ffn"):
        candidates(tiny("llama").layout, 0.95, ["ffn"])


def test_words_follow_from_what_the_config_can_hold(tiny):
    assert free_words(tiny("llama").layout) == ["hidden", "ffn", "heads"]
    assert free_words(tiny("bert", "feature-extraction").layout) == ["ffn"]
    assert free_words(tiny("llama", "feature-extraction").layout) == ["ffn", "heads"]


def test_descent_finds_the_bottom_of_a_valley_from_anywhere():
    options = [{"hidden": n} for n in range(8)]
    for start in range(8):
        tried: list[int] = []

        def loss(option: dict, tried: list[int] = tried) -> float:
            tried.append(option["hidden"])
            return (option["hidden"] - 5.2) ** 2

        assert descend(options, loss, start) == {"hidden": 5}


def test_a_sample_is_seeded_whole_sequences_in_order(tiny):
    sequences = [np.full(10, n) for n in range(20)]
    taken = sample(sequences, 45, seed=3)
    assert len(taken) == 5
    assert [s[0] for s in taken] == sorted(s[0] for s in taken)
    assert np.array_equal(taken, sample(sequences, 45, seed=3))
    assert not np.array_equal(taken, sample(sequences, 45, seed=4))
    assert sum(len(b.inputs["input_ids"]) for b in batches(sequences, tiny("llama").layout, tokens=25)) == 20
