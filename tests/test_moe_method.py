"""`moe`: what each part of the method wins: groups, router, refit, training; each statement with a twin that fails."""

from __future__ import annotations

import pytest
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.pass_ import Context


@pytest.fixture
def loss(output):
    return lambda checkpoint, wanted: float((output(checkpoint) - wanted).square().mean())


def test_each_part_of_the_method_helps(tiny, converted, loss, output, planted, samples):
    def made(**options) -> float:
        checkpoint = planted(tiny("llama", intermediate_size=128), 8)
        wanted = output(checkpoint)
        converted(checkpoint, samples(200, 32), experts=8, active=2, **options)
        return loss(checkpoint, wanted)

    ours, plain = made(), made(refit=False)
    assert ours < 0.9 * plain
    assert ours < 0.6 * made(partition="random")
    assert plain < 0.5 * made(refit=False, partition="random")
    assert plain < 0.95 * made(refit=False, partition="kmeans")
    assert plain < 0.75 * made(refit=False, partition="activation-rate")


def test_a_fitted_router_agrees_more_with_the_oracle(tiny, converted, samples):
    """On groups that no direction of their gates tells apart."""

    def agreement(router: str) -> float:
        options = {"experts": 8, "shared": 0, "partition": "random", "router": router}
        details = converted(tiny("llama", intermediate_size=128), samples(200, 32), **options)
        return min(details["fit_per_layer"]["oracle agreement"])

    assert agreement("listwise") > 1.1 * agreement("centre") > 1.1 * 2 / 8
    assert agreement("ridge") > 1.1 * agreement("centre")


# --- groups -----------------------------------------------------------------------------------------------------------


def test_balanced_groups_are_nearly_the_best(tiny):
    from tersor.compress.moe.assignment import balanced

    scipy = pytest.importorskip("scipy.optimize")
    cost = torch.rand(96, 8, generator=torch.Generator().manual_seed(1)).double()
    start = torch.arange(96) % 8
    found = balanced(cost)
    assert found.bincount().tolist() == [12] * 8
    rows, columns = scipy.linear_sum_assignment(cost.repeat_interleave(12, dim=1).numpy())
    best = float(cost.repeat_interleave(12, dim=1)[rows, columns].sum())
    reached = float(cost.gather(1, found[:, None]).sum())
    assert best <= reached <= 1.02 * best
    assert float(cost.gather(1, start[:, None]).sum()) > 2 * best


@pytest.mark.parametrize(("size", "count"), [(96, 8), (63, 7), (40, 2)])
def test_no_two_groups_gain_by_an_exchange(size, count):
    from tersor.compress.moe.assignment import balanced

    cost = -torch.rand(size, count, generator=torch.Generator().manual_seed(2)).double()

    def gain(groups: torch.Tensor) -> float:
        """The most that swapping one member each wins for any two groups."""
        own = cost.gather(1, groups[:, None])
        change = cost[:, groups] - own  # member i where member j is
        return -float((change + change.T).min())

    assert gain(balanced(cost)) < 1e-12
    assert gain(torch.arange(size) % count) > 0.1


def test_everyone_meets_everyone_once():
    from tersor.compress.moe.assignment import tournament

    for count in (2, 5, 8):
        rounds = tournament(count)
        assert all(len(set(r.flatten().tolist())) == r.numel() for r in rounds)
        met = sorted(tuple(sorted(pair)) for r in rounds for pair in r.tolist())
        assert met == [(a, b) for a in range(count) for b in range(a + 1, count)]


def test_co_activation_finds_planted_groups(tiny, planted, samples):
    from tersor.compress.calibration.batches import batches
    from tersor.compress.calibration.side import Side
    from tersor.compress.moe.activations import Ffn, Tokens, before_ffn
    from tersor.compress.moe.cut import Cut
    from tersor.compress.moe.partition import PARTITIONS

    checkpoint = planted(tiny("llama", intermediate_size=128), 8)
    data = batches(samples(40), checkpoint.layout)
    with torch.no_grad():
        side = Side.at_start(checkpoint.model(), checkpoint.layout, data)
        tokens = Tokens(Ffn.of(side.walk, 0), before_ffn(side, 0), data)
        gate = tokens.ffn.gate

        def alike(name: str) -> float:
            order = PARTITIONS[name](tokens, Cut(128, 8, 2, 0), 0)
            rows = torch.nn.functional.normalize(gate[order], dim=1).reshape(8, 16, -1)
            return float((rows @ rows.mT).mean())

        assert sorted(PARTITIONS["co-activation"](tokens, Cut(128, 8, 4, 2), 0).tolist()) == list(range(128))
        assert alike("co-activation") > 0.8 * alike("kmeans")
        assert alike("random") < 0.5 * alike("kmeans")


# --- training ---------------------------------------------------------------------------------------------------------


def test_distillation_helps_and_no_steps_change_nothing(tiny, converted, loss, output, planted, samples):
    def made(**options) -> tuple[float, float, Checkpoint]:
        checkpoint = planted(tiny("llama", intermediate_size=128), 8)
        wanted = output(checkpoint)
        details = converted(checkpoint, samples(200, 32), experts=8, active=2, **options)
        return sum(details["fit_per_layer"]["left after"]), loss(checkpoint, wanted), checkpoint

    (left, plain, one), (_, zero, other) = made(), made(distill_steps=0)
    assert zero == plain
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    less, better, third = made(distill_steps=150)
    assert less < 0.96 * left
    assert better < plain
    router = "model.layers.0.mlp.gate.weight"
    direction = torch.nn.functional.cosine_similarity(one.tensors[router], third.tensors[router], dim=1)
    assert direction.max() < 0.9999
    assert direction.min() > 0.5


def test_the_gradient_of_a_choice_is_that_of_its_edge():
    from tersor.compress.moe.distill import straight_through

    logits = torch.tensor([[3.0, 0.6, 0.4, -3.0]], requires_grad=True)
    gates = straight_through(logits, 2)
    assert gates.detach().round(decimals=6).tolist() == [[1, 1, 0, 0]]
    (gates @ torch.tensor([1.0, 1.0, 1.0, 1.0])).sum().backward()
    sure, near, almost, never = logits.grad[0].tolist()
    assert near == pytest.approx(almost)
    assert near > 100 * sure
    assert near > 100 * never


def test_recover_trains_router_and_experts_in_the_stock_class(tiny, converted, loss, output, planted, samples):
    """From end to end: the result is nearer to the dense model, its router still tiny, and the load is told."""
    from tersor.compress.passes.recover import Recover

    original = planted(tiny("llama", intermediate_size=128), 8)
    wanted, text = output(original), samples(640, 32)
    checkpoint = Checkpoint(original.layout, dict(original.tensors))
    details = converted(checkpoint, text, experts=8, active=2)
    router = "model.layers.0.mlp.gate.weight"
    before, moved = loss(checkpoint, wanted), checkpoint.tensors[router].clone()
    context = Context(text, original=original)
    Recover(steps=40, batch=16, learning_rate=1e-3).apply(checkpoint, context)
    assert loss(checkpoint, wanted) < 0.95 * before
    assert not torch.equal(checkpoint.tensors[router], moved)
    assert checkpoint.tensors[router].abs().max() < 4 * moved.abs().max()
    load = context.details["load_per_layer"]
    assert load.keys() == {f"{name} {when}" for name in ("busiest", "idlest") for when in ("before", "after")}
    assert load["busiest before"] == pytest.approx(details["load_per_layer"]["busiest"], abs=0.1)


@pytest.mark.parametrize(
    ("source", "learning"), [("llama", ("q_proj", "shared_expert.up_proj")), ("gpt2", ("c_attn",))]
)
def test_low_rank_recovery_leaves_routers_and_routed_experts(source, learning, tiny, converted, samples):
    from tersor.compress.passes.recover import Recover

    original, text = tiny(source), samples(32, 32)
    checkpoint = Checkpoint(original.layout, dict(original.tensors))
    converted(checkpoint, text)
    before = dict(checkpoint.tensors)
    Recover(steps=2, batch=4, lora=2).apply(checkpoint, Context(text, original=original))
    changed = {name for name in before if not torch.equal(before[name], checkpoint.tensors[name])}
    assert all(any(name.endswith(f"{module}.weight") for name in changed) for module in learning)
    experts = checkpoint.layout.arch.experts
    kept = {checkpoint.layout.full(n, b) for n in (experts.router, experts.gate_up, experts.down) for b in range(2)}
    assert kept <= before.keys() - changed
