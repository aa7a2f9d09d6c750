"""The pass: what a recipe asks for is what is left, through compact, save and resume."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from tersor.compress.errors import RecipeError
from tersor.compress.pass_ import Context

pytest.importorskip("accelerate", reason="training needs the extra `train`")
pytest.importorskip("peft", reason="training needs the extra `train`")

from tersor.sparse.passes.compact import Compact
from tersor.sparse.passes.swat import Swat


def sequences(count: int = 24) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(4, 100, 16) for _ in range(count)]


def images(count: int = 12) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.standard_normal((3, 16, 16)).astype(np.float32) for _ in range(count)]


def applied(step: Swat, checkpoint, data, folder=None, **details):
    from tersor.compress.checkpoint import Checkpoint

    original = Checkpoint(checkpoint.layout, dict(checkpoint.tensors))
    context = Context(data, seed=3, original=original, folder=folder, details=details)
    step.apply(checkpoint, context)
    return context.details


SHORT = {"steps": 12, "batch": 4, "period": 3, "save_every": 5, "learning_rate": 1e-3}


def test_exact_leaves_the_share_asked_for_and_says_that_nothing_runs_faster(tiny):
    checkpoint = tiny("llama")
    step = Swat(weights=0.6, activations=0.7, **SHORT)
    details = applied(step, checkpoint, sequences())
    for name in details["layers"]:
        assert float((checkpoint.tensors[f"{name}.weight"] == 0).double().mean()) == pytest.approx(0.6, abs=2e-3)
    assert bool((checkpoint.tensors["lm_head.weight"] != 0).all())
    assert "nothing runs faster" in details["warnings"][0]
    assert 0 < details["encoded_share"] < 1
    assert details["flops"]["counted"] < details["flops"]["realised"] == details["flops"]["dense"]
    assert details["saved_bytes"]["sparse"] < details["saved_bytes"]["dense"]
    assert min(details["step_seconds"][name] for name in ("dense", "sparse")) > 0
    assert len(details["loss"]["loss"]) == 12
    assert all(values[0] == 1.0 for name, values in details["density_by_layer"].items() if name != "step")
    compared = details["loss_with_and_without_masks"]
    assert compared["step"] == list(range(1, 13))
    assert compared["sparse"][0] == compared["dense"][0], "the ramp starts dense"
    assert compared["sparse"][-1] != compared["dense"][-1]
    assert max(details["bytes_kept_for_backward"]["bytes"]) < 4 * details["saved_bytes"]["dense"]
    (check,) = step.checks(details)
    assert check.holds(checkpoint.config, checkpoint.tensors) is None
    name = next(iter(details["nonzero"]))
    assert check.holds(checkpoint.config, {**checkpoint.tensors, name: torch.ones(48, 48)}).startswith(name)


@pytest.mark.parametrize(("model_type", "on"), [("llama", ("ffn", "heads")), ("bert", ("ffn",)), ("vit", ("ffn",))])
def test_structured_then_compact_is_the_same_model_made_smaller(model_type, on, tiny):
    checkpoint = tiny(model_type)
    data = images() if model_type == "vit" else sequences()
    ffn = checkpoint.layout.families["ffn"]
    step = Swat(mode="structured", weights=0.5, activations=0.5, on=on, **SHORT)
    details = applied(step, checkpoint, data)
    assert {details["live"][f"ffn{i}"] for i in range(checkpoint.layout.depth)} == {ffn // 2}
    assert details["flops"]["realised"] < details["flops"]["dense"]
    inputs = (
        {"pixel_values": torch.from_numpy(np.stack(data[:2]))}
        if model_type == "vit"
        else {"input_ids": torch.from_numpy(np.stack(data[:2]))}
    )
    with torch.no_grad():
        before = checkpoint.model()(**inputs)[0]
        Compact(on=on).apply(checkpoint, Context([]))
        after = checkpoint.model()(**inputs)[0]
    assert checkpoint.layout.families["ffn"] == ffn // 2
    assert float((after - before).abs().max()) <= 2e-5 * float(before.abs().max())
    (check,) = step.checks(details)
    assert check.holds(checkpoint.config, checkpoint.tensors) is None, "what has left is dropped too"


def test_the_check_notices_a_unit_that_lives_again(tiny):
    checkpoint = tiny("llama")
    step = Swat(mode="structured", weights=0.5, activations=0.5, **SHORT)
    details = applied(step, checkpoint, sequences())
    (check,) = step.checks(details)
    assert check.holds(checkpoint.config, checkpoint.tensors) is None
    name = "model.layers.1.mlp.down_proj.weight"
    again = checkpoint.tensors[name].clone()
    again[0, again.abs().sum(0) == 0] = 1.0
    for gate in ("gate_proj", "up_proj"):
        writer = f"model.layers.1.mlp.{gate}.weight"
        checkpoint.tensors[writer] = checkpoint.tensors[writer] + 1.0
    assert "ffn1 has more than 32 live units" in check.holds(checkpoint.config, {**checkpoint.tensors, name: again})


@pytest.mark.parametrize("mode", ["exact", "structured"])
def test_killed_anywhere_it_ends_with_the_same_bits(mode, tiny, tmp_path, monkeypatch):
    step = Swat(mode=mode, weights=0.5, activations=0.5, **SHORT)
    whole = tiny("llama")
    details = applied(step, whole, sequences(), tmp_path / "whole")
    curves = [name for name, value in details.items() if isinstance(value, dict) and "step" in value]
    assert len(curves) == 4

    from tersor.sparse.swat.training import SparseTraining

    counted = SparseTraining.step
    for last in (5, 11):

        def killed(training, last=last):
            if training.number == last:
                raise KeyboardInterrupt
            counted(training)

        folder = tmp_path / f"killed-{last}"
        monkeypatch.setattr(SparseTraining, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            applied(step, tiny("llama"), sequences(), folder)
        monkeypatch.setattr(SparseTraining, "step", counted)
        resumed = tiny("llama")
        again = applied(step, resumed, sequences(), folder)
        assert all(again[name] == details[name] for name in curves)
        assert all(torch.equal(whole.tensors[name], t) for name, t in resumed.tensors.items()), last
    finished = tiny("llama")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = applied(step, finished, sequences(), tmp_path / "again")
    assert all(again[name] == details[name] for name in curves)
    assert all(torch.equal(whole.tensors[name], t) for name, t in finished.tensors.items()), "nothing left to train"


def test_a_promise_of_an_earlier_pass_is_kept(tiny):
    from tersor.compress.checkpoint import Check

    checkpoint = tiny("llama")
    name = "model.norm.weight"
    checkpoint.tensors[name] = torch.ones_like(checkpoint.tensors[name])
    checkpoint.checks.append(Check("neutral", lambda _, t: None if bool((t[name] == 1).all()) else "moved"))
    applied(Swat(weights=0.5, **SHORT), checkpoint, sequences())
    assert checkpoint.failing_checks() == []


@pytest.mark.parametrize(
    ("options", "model_type", "message"),
    [
        ({"exempt": ("re:nothing",)}, "llama", "exempt: found 're:nothing', which matches no layer"),
        ({"mode": "structured", "on": ("heads",)}, "bert", "on: found heads, expected ffn"),
        ({"mode": "structured"}, "resnet", "mode 'sampled'"),
        ({"distill": 0.5}, "bert", "distill: found 0.5 for feature-extraction"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(options, model_type, message, tiny):
    with pytest.raises(RecipeError, match=message):
        Swat(**options).requires(tiny(model_type).layout)


def test_the_forecast_keeps_the_shapes(tiny):
    layout = tiny("llama").layout
    forecast = Swat(mode="structured").requires(layout)
    assert forecast.layout is layout
    assert forecast.memory > 0
    assert "compact" in forecast.notes[-1]


@pytest.mark.parametrize("distribution", ["uniform", "momentum"])
def test_measuring_a_step_moves_nothing_that_is_kept(distribution, tiny):
    from tersor.sparse.passes.swat import meters
    from tersor.sparse.swat.options import Sparsity
    from tersor.sparse.swat.training import SparseTraining

    model = tiny("resnet").model().requires_grad_(True)
    pixels = torch.tensor(np.stack(images(4)))
    training = SparseTraining(model, Sparsity(weights=0.5, activations=0.5, distribution=distribution), 10)

    def step() -> torch.Tensor:
        return model(pixels).logits.square().sum()

    def kept() -> dict[str, torch.Tensor]:
        found = {f"training {n}": t for n, t in training.state_dict().items()} | dict(model.state_dict())
        return {name: tensor.clone() for name, tensor in found.items()}

    before = kept()
    meters(training, step, model)
    after = kept()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    step_alone = model.train()(pixels).logits
    assert step_alone.requires_grad
    assert any(not torch.equal(before[name], tensor) for name, tensor in kept().items())  # a step does move them
