"""`moe` where the FFN has no gate: tersor's own classes, exact with every expert, refused by plain transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import RecipeError
from tersor.compress.passes.moe import Moe
from tersor.compress.recipe import load_recipe
from tersor.compress.run import How, apply
from tersor.compress.verify import verify
from tersor.export.onnx import Onnx

CASES = [
    ("gpt2", "text-generation"),
    ("opt", "text-generation"),
    ("bert", "feature-extraction"),
    ("roberta", "fill-mask"),
    ("distilbert", "feature-extraction"),
]
each = pytest.mark.parametrize(("name", "task"), CASES, ids=[name for name, _ in CASES])
FORMS = [*((*case, "slices") for case in CASES), (*CASES[0], "whole")]


@pytest.fixture(scope="module")
def converted(converted, samples):
    """As elsewhere, on more text."""
    return partial(converted, text=samples(200, 32))


@each
@pytest.mark.parametrize("shared", [0, 1])
def test_all_experts_are_the_dense_model(name, task, shared, tiny, tmp_path, converted, output):
    checkpoint = tiny(name, task)
    exact, single = output(checkpoint, torch.float64), output(checkpoint)
    forecast = Moe(experts=4, active=4, shared=shared, refit=False).requires(checkpoint.layout)
    converted(checkpoint, active=4, shared=shared, refit=False)
    assert checkpoint.layout.parameters == forecast.layout.parameters
    checkpoint.save(tmp_path)
    again = Checkpoint.load(tmp_path)
    assert again.layout.task == task
    assert type(again.model()).__name__.startswith("Routed")
    error = (output(again) - exact).abs().max()
    assert error <= max(2 * (single - exact).abs().max(), 1e-6 * exact.abs().max())
    converted(fewer := tiny(name, task), active=2, shared=shared, refit=False)
    assert (output(fewer) - exact).abs().max() > 1e-2


@each
def test_the_refit_helps(name, task, tiny, converted, output):
    def left(**options) -> float:
        checkpoint = tiny(name, task)
        wanted = output(checkpoint)
        converted(checkpoint, **options)
        return float((output(checkpoint) - wanted).square().mean())

    assert left() < left(refit=False)


def test_every_method_runs_without_a_gate(tiny, converted):
    for partition in ("random", "kmeans", "activation-rate", "co-activation"):
        converted(tiny("bert", "feature-extraction"), partition=partition, router="ridge")
    details = converted(tiny("bert", "feature-extraction"), distill_steps=5, compare=True)
    assert details["loss"].keys() == {"dense", "oracle", "pruned", "experts"}
    assert details["loss"]["experts"] > 1e-4  # against the dense model, not itself
    assert all(point["loss"] > 1e-4 for point in details["loss_by_k"])


@pytest.mark.parametrize(("name", "task", "form"), FORMS)
def test_it_ships_as_onnx(name, task, form, tiny, tmp_path, converted, samples):
    checkpoint = tiny(name, task)
    converted(checkpoint)
    facts = Onnx(experts=form).write(checkpoint, tmp_path, samples())
    assert facts["experts"]["form"] == form
    assert facts["packing"] == "packed"
    for figures in facts["parity"].values():
        assert figures["error"] <= figures["limit"]


def test_eight_bits_leave_the_routers(tiny, tmp_path, converted, samples):
    checkpoint = tiny("bert", "feature-extraction")
    converted(checkpoint)
    facts = Onnx(precision="int8", experts="slices").write(checkpoint, tmp_path, samples())
    assert facts["experts"]["form"] == "slices-int8"
    assert len(facts["experts"]["routers"]) == checkpoint.layout.depth


def test_plain_transformers_refuses_the_directory(tiny, tmp_path, converted):
    """Without tersor nobody opens it as the dense model that it is not."""
    import subprocess
    import sys

    checkpoint = tiny("gpt2", "text-generation")
    converted(checkpoint)
    checkpoint.save(Path(tmp_path))
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "gpt2_routed" in done.stderr


def test_a_run_knows_its_own_class_again(save_tiny, small_recipe, tmp_path):
    """The next step, the export and `verify` open what was saved, and none is told the task."""
    steps = """
passes:
  - use: moe
    with: {experts: 4, active: 2, compare: false}
  - use: recover
    with: {steps: 2, batch: 2}
"""
    recipe = load_recipe(small_recipe(steps, save_tiny("gpt2")))
    run = apply(recipe, How(output=tmp_path / "run", offline=True, threads=1)).directory
    refused = "stock transformers refuses a class of tersor's own"
    assert {finding.what: finding.holds for finding in verify(run)}[refused]
    config = run / "model/config.json"
    config.write_text(config.read_text("utf-8").replace("RoutedGPT2LMHeadModel", "RoutedLMHeadModel"), "utf-8")
    with pytest.raises(RecipeError, match="found 'RoutedLMHeadModel', expected a transformers class"):
        verify(run)


def test_no_stock_class_takes_it(tiny):
    with pytest.raises(RecipeError, match="No stock class has experts without a gate"):
        Moe(experts=4, active=2, target="qwen2_moe").requires(tiny("bert", "feature-extraction").layout)
