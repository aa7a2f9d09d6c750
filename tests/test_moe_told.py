"""`moe`: what it refuses before weights are read, and what it says of what it did."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.pass_ import Context
from tersor.compress.passes.moe import Moe


def samples(count: int = 24, length: int = 16, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 100, length) for _ in range(count)]


def converted(checkpoint: Checkpoint, tokens: list[np.ndarray] | None = None, **options) -> dict:
    context = Context(tokens or samples())
    Moe(**{"experts": 4, "active": 2, "compare": False, **options}).apply(checkpoint, context)
    return context.details


@pytest.fixture
def dense(tiny):
    """`dense(model_type, variant="", **config)`: a tiny checkpoint."""
    return lambda name, variant="", **config: tiny(name, "text-generation", variant=variant, **config)


def planted(checkpoint: Checkpoint, experts: int) -> Checkpoint:
    """FFNs whose units are large together by group, in a scrambled order."""
    generator = torch.Generator().manual_seed(4)
    for name, tensor in list(checkpoint.tensors.items()):
        if name.endswith("gate_proj.weight"):
            group = torch.randperm(len(tensor), generator=generator) % experts
            centres = 3 * torch.randn(experts, tensor.shape[1], generator=generator) / tensor.shape[1] ** 0.5
            checkpoint.tensors[name] = centres[group] + 0.1 * tensor
    return checkpoint


@pytest.mark.parametrize(
    ("source", "config", "options", "said"),
    [
        ("llama", {}, {"experts": 5}, r"5 for an FFN of 64 units, expected a divisor of 64. Near by: 2, 4, 8"),
        ("llama", {}, {"active": 5}, "5 of 4 experts"),
        ("llama", {}, {"shared": 2}, "2 of 2 active experts"),
        ("qwen2_moe", {}, {}, "a mixture of experts already"),
        ("gpt2", {}, {"target": "mixtral"}, "whose FFN has no gate"),
        ("phi", {}, {}, "whose FFN cannot be cut"),
        ("llama", {"mlp_bias": True}, {}, "an FFN without biases"),
        ("qwen3", {}, {"target": "qwen2_moe"}, "qwen2_moe has no place for model.layers.0.self_attn"),
        ("llama", {}, {"target": "mixtral", "shared": 1}, "mixtral has no place for 1 shared experts"),
        ("mistral", {"sliding_window": 4}, {"target": "glm4_moe", "shared": 1}, "no place for attention windows of 4"),
        ("granite", {}, {"target": "qwen2_moe"}, "multipliers"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(dense, source, config, options, said):
    layout = dense(source, **config).layout
    with pytest.raises(RecipeError, match=said):
        Moe(**{"experts": 4, "active": 2, **options}).requires(layout)


def test_distillation_without_a_refit_is_refused(dense):
    with pytest.raises(RecipeError, match="distill_steps"):
        Moe(4, 2, refit=False, distill_steps=10).requires(dense("llama").layout)


def test_a_dead_expert_is_refused(dense):
    checkpoint = dense("llama")
    for name in list(checkpoint.tensors):
        if name.endswith("up_proj.weight"):
            checkpoint.tensors[name] = checkpoint.tensors[name].clone()
            checkpoint.tensors[name][2:] = 0
    with pytest.raises(PreflightError, match=r"block 0: found experts \[.*\] that no calibration token chooses"):
        converted(checkpoint, experts=32, active=1, shared=0)


def test_the_plan_is_what_comes_out(dense):
    checkpoint = dense("llama", intermediate_size=60)
    forecast = Moe(experts=4, active=3).requires(checkpoint.layout)
    assert forecast.notes[-1] == "a token uses 45 of 60 FFN units (75%)"
    converted(checkpoint, active=3)
    assert checkpoint.layout.parameters == forecast.layout.parameters


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_the_details_say_what_each_number_of_experts_costs(dense):
    checkpoint = planted(dense("llama", intermediate_size=128), 8)
    details = converted(checkpoint, samples(100, 32), experts=8, active=4, compare=True)
    loss, curve = details["loss"], details["loss_by_k"]
    assert loss.keys() == {"dense", "oracle", "pruned", "experts"}
    assert [point["k"] for point in curve] == list(range(1, details["experts"] + 1))
    own = next(point for point in curve if point["k"] == details["active"])
    assert own["loss"] == pytest.approx(loss["experts"])
    assert own["active_share"] == 0.5
    assert all(len(layer) == details["experts"] for layer in details["load"])
    assert sum(details["load"][0].values()) == pytest.approx(details["active"])
    json.dumps(details)


def test_where_pruning_is_as_good_the_details_say_so(dense):
    """Random experts of an FFN whose units are all alike win nothing over units that are always there."""
    checkpoint = dense("llama", intermediate_size=128)
    details = converted(checkpoint, samples(60, 32), experts=8, active=6, shared=0, partition="random", compare=True)
    said = [line for line in details["warnings"] if "use `slice` on ffn" in line]
    assert bool(said) == (details["loss"]["pruned"] <= details["loss"]["experts"])
    assert said


def test_a_trial_is_the_loss_of_the_stored_class(dense):
    from tersor.compress.calibration.batches import batches
    from tersor.compress.calibration.loss import judge
    from tersor.compress.calibration.side import Side
    from tersor.compress.moe.convert import Method, convert
    from tersor.compress.moe.cut import Cut
    from tersor.compress.moe.trial import Trial

    checkpoint = dense("granite")
    layout, model = checkpoint.layout, checkpoint.model()
    data, judged = batches(samples(), layout), batches(samples(8, 20, seed=3), layout)
    with torch.no_grad():
        side = Side.at_start(model, layout, data)
    method = Method(weights="softmax of chosen")
    simulated = Trial(model, layout, judged).follow(
        convert(side, layout, Cut(64, 4, 2, 1), method, data, 0, lambda items, _: items)
    )
    converted(checkpoint)
    stored = judge(checkpoint.model(), None, checkpoint.layout, judged)
    assert simulated == pytest.approx(stored, rel=1e-5)
    assert abs(judge(model, None, layout, judged) - stored) > 1e-3


def test_promises_hold_and_are_missed(dense):
    checkpoint = dense("llama")
    details = json.loads(json.dumps(converted(checkpoint)))
    check = Moe(4, 2).checks(details)[0]
    assert check.holds(checkpoint.config, checkpoint.tensors) is None
    checkpoint.config.num_experts_per_tok = 3
    assert "active is 3, not 1" in str(check.holds(checkpoint.config, checkpoint.tensors))


@pytest.mark.slow
def test_the_recipe_runs(tmp_path):
    from tersor.compress.recipe import load_recipe
    from tersor.compress.run import How, apply

    recipe = load_recipe("moe", ["data.calibration.samples=12", "data.heldout.samples=6", "data.calibration.length=64"])
    outcome = apply(recipe, How(output=tmp_path / "run", offline=True, threads=1, enforce=False))
    assert json.loads((tmp_path / "run/model/config.json").read_text("utf-8"))["model_type"] == "qwen2_moe"
    assert "loss by k" in (tmp_path / "run/report.html").read_text("utf-8")
    assert outcome.metrics["checkpoint"]["perplexity"] > outcome.metrics["original"]["perplexity"]
