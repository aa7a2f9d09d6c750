"""`moe`: what it refuses before weights are read, and what it says of what it did."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.passes.moe import Moe


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
        ("llama", {}, {"target": "mixtral", "shared": 1}, "for 1 shared experts.*It fits qwen2_moe, glm4_moe, granite"),
        ("mistral", {"sliding_window": 4}, {"target": "glm4_moe", "shared": 1}, "no place for attention windows of 4"),
        ("granite", {}, {"target": "qwen2_moe"}, "multipliers"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(tiny, source, config, options, said):
    layout = tiny(source, **config).layout
    with pytest.raises(RecipeError, match=said):
        Moe(**{"experts": 4, "active": 2, **options}).requires(layout)


def test_distillation_without_a_refit_is_refused(tiny):
    with pytest.raises(RecipeError, match="distill_steps"):
        Moe(4, 2, refit=False, distill_steps=10).requires(tiny("llama").layout)


def test_distillation_with_nothing_to_learn_is_refused(tiny):
    with pytest.raises(RecipeError, match="nothing to learn"):
        Moe(4, 4, distill_steps=10).requires(tiny("llama").layout)
    assert Moe(4, 3, distill_steps=10).requires(tiny("llama").layout)


def test_a_dead_expert_is_refused(tiny, converted):
    checkpoint = tiny("llama")
    for name in list(checkpoint.tensors):
        if name.endswith("up_proj.weight"):
            checkpoint.tensors[name] = checkpoint.tensors[name].clone()
            checkpoint.tensors[name][2:] = 0
    with pytest.raises(PreflightError, match=r"block 0: found experts \[.*\] that no calibration token chooses"):
        converted(checkpoint, experts=32, active=1, shared=0)


def test_a_refit_that_fills_zeros_says_so(tiny, converted):
    def said(checkpoint: Checkpoint, **options) -> list[str]:
        return [line for line in converted(checkpoint, **options)["warnings"] if "fills the zeros" in line]

    def sparse() -> Checkpoint:
        checkpoint = tiny("llama")
        for name in list(checkpoint.tensors):
            if name.endswith("down_proj.weight"):
                checkpoint.tensors[name] = checkpoint.tensors[name].clone()
                checkpoint.tensors[name][:, ::2] = 0
        return checkpoint

    assert said(sparse()) == ["the refit fills the zeros of the down projections (50%): prune weights behind `moe`"]
    assert not said(sparse(), refit=False)
    assert not said(tiny("llama"))


def test_the_plan_is_what_comes_out(tiny, converted):
    checkpoint = tiny("llama", intermediate_size=60)
    forecast = Moe(experts=4, active=3).requires(checkpoint.layout)
    assert forecast.notes[0] == "qwen2_moe: 3 experts of 16 units (15 and zeros), 2 chosen by token, 1 shared"
    assert forecast.notes[-1] == "a token uses 45 of 60 FFN units (75%)"
    converted(checkpoint, active=3)
    assert checkpoint.layout.parameters == forecast.layout.parameters


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_the_details_say_what_each_number_of_experts_costs(tiny, converted, planted, samples):
    checkpoint = planted(tiny("llama", intermediate_size=128), 8)
    details = converted(checkpoint, samples(100, 32), experts=8, active=4, compare=True)
    loss, curve = details["loss"], details["loss_by_k"]
    assert loss.keys() == {"dense", "oracle", "pruned", "experts"}
    assert [point["k"] for point in curve] == list(range(1, details["experts"] + 1))
    own = next(point for point in curve if point["k"] == details["active"])
    assert own["loss"] == pytest.approx(loss["experts"])
    assert own["active_share"] == 0.5
    assert all(len(layer) == details["experts"] for layer in details["load"])
    assert sum(details["load"][0].values()) == pytest.approx(details["active"])


def spoken(checkpoint: Checkpoint, count: int = 60, length: int = 32) -> list[np.ndarray]:
    """Text drawn from the model itself: on random text every loss is that of guessing."""
    model, generator = checkpoint.model(), torch.Generator().manual_seed(1)
    ids = torch.randint(4, 100, (count, 1), generator=generator)
    with torch.no_grad():
        for _ in range(length - 1):
            following = torch.multinomial(model(ids).logits[:, -1].softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, following], dim=1)
    return list(ids.numpy())


def test_where_pruning_is_as_good_the_details_say_so(tiny, converted, planted):
    """Units dealt out at random win nothing over units that are always there; those that belong together do."""

    def compared(**options) -> tuple[dict, list[str]]:
        checkpoint = planted(tiny("llama", intermediate_size=128), 8)
        text = spoken(checkpoint)
        details = converted(checkpoint, text, experts=8, active=2, shared=0, compare=True, **options)
        return details["loss"], [line for line in details["warnings"] if "use `slice` on ffn" in line]

    loss, said = compared(partition="random")
    assert loss["dense"] < loss["oracle"] < loss["pruned"] < loss["experts"]
    assert f"25% of their units lose no more (a loss of {loss['pruned']:.4g} against {loss['experts']:.4g})" in said[0]
    loss, said = compared()
    assert loss["dense"] < loss["experts"] < loss["dense"] + 0.5 * (loss["pruned"] - loss["dense"])
    assert not said


@pytest.mark.parametrize(
    ("source", "target", "shared", "weights"),
    [
        ("llama", "qwen2_moe", 1, "softmax"),
        ("llama", "mixtral", 0, "softmax, normalised"),
        ("granite", "granite_moe_shared", 1, "softmax of chosen"),
        ("qwen3", "glm4_moe", 1, "sigmoid"),
    ],
)
def test_a_trial_is_the_loss_of_the_stored_class(source, target, shared, weights, tiny, converted, samples):
    from tersor.compress.calibration.batches import batches
    from tersor.compress.calibration.loss import judge
    from tersor.compress.calibration.side import Side
    from tersor.compress.moe.convert import Method, convert
    from tersor.compress.moe.cut import Cut
    from tersor.compress.moe.trial import Trial

    checkpoint = tiny(source)
    layout, model = checkpoint.layout, checkpoint.model()
    data, judged = batches(samples(), layout), batches(samples(8, 20, seed=3), layout)
    with torch.no_grad():
        side = Side.at_start(model, layout, data)
    method, width = Method(weights=weights), layout.families["ffn"]
    simulated = Trial(model, layout, judged).follow(
        convert(side, layout, Cut(width, 4, 2, shared), method, data, 0, lambda items, _: items)
    )
    converted(checkpoint, target=target, shared=shared)
    stored = judge(checkpoint.model(), None, checkpoint.layout, judged)
    assert simulated == pytest.approx(stored, rel=1e-5)
    assert abs(judge(model, None, layout, judged) - stored) > 1e-3


def test_promises_hold_and_are_missed(tiny, converted):
    checkpoint = tiny("llama")
    details = converted(checkpoint)
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
