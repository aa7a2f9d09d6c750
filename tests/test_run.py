"""From a recipe to a published, gated run: in process, on tiny random models, with real text and real ONNX Runtime."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tersor.compress import How, apply, load_recipe
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import GateMissed, PreflightError, RecipeError
from tersor.compress.rundir import RunDirectory, hash_tree
from tersor.compress.verify import verify

STEPS = """
passes:
  - use: slice
    with: {{remove: 0.15, split: 0.5}}
    gate: {{metric: top1, min: {gate}}}
gate: {{metric: perplexity, max: 1000000}}
export:
  - use: onnx
    with: {{inputs: packed}}
"""


@pytest.fixture
def recipe(small_recipe: Callable[..., Path]) -> Callable[..., Path]:
    def write(model: Path | None = None, gate: float = 0.0) -> Path:
        return small_recipe(STEPS.format(gate=gate), model)

    return write


def test_the_run_directory_holds_what_was_promised(recipe, tmp_path):
    outcome = apply(load_recipe(recipe()), How(tmp_path / "run", threads=1))
    run = outcome.directory
    assert outcome.passed
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".")) == [
        "journal.jsonl", "lock.json", "metrics.json", "model", "onnx", "plan.json", "recipe.yaml",
        "report.html", "report.md",
    ]  # fmt: skip
    assert not (run / ".steps").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["verdict"] == "pass"
    for block in (metrics["original"], metrics["checkpoint"], *metrics["artifacts"]):
        assert {"parameters", "bytes", "latency_ms", "perplexity", "bits_per_byte", "kl", "top1"} <= block.keys()
    assert metrics["original"]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["checkpoint"]["kl"] > 1e-3
    assert metrics["artifacts"][0]["perplexity"] == pytest.approx(metrics["checkpoint"]["perplexity"], rel=1e-4)
    report = (run / "report.md").read_text()
    assert "| parameters |" in report
    assert "slice" in (run / "model" / "README.md").read_text()


def test_the_plan_predicts_what_is_delivered(recipe, tmp_path):
    loaded = load_recipe(recipe())
    outcome = apply(loaded, How(tmp_path / "run", threads=1))
    plan = json.loads((outcome.directory / "plan.json").read_text())
    saved = Checkpoint.load(outcome.directory / "model")
    original = plan["original"]["parameters"]
    assert saved.layout.parameters == outcome.metrics["checkpoint"]["parameters"]
    assert plan["result"]["parameters"] == pytest.approx(saved.layout.parameters, abs=0.01 * original)
    assert 1 - saved.layout.parameters / original == pytest.approx(0.15, abs=0.005)


def test_the_same_recipe_gives_the_same_bytes(recipe, tmp_path):
    loaded = load_recipe(recipe())
    one, two = (apply(loaded, How(tmp_path / name, threads=1)).directory for name in ("one", "two"))
    for part in ("model", "onnx"):
        assert hash_tree(one / part) == hash_tree(two / part)
    other = apply(load_recipe(recipe(), ["passes.0.with.remove=0.3"]), How(tmp_path / "other", threads=1)).directory
    assert hash_tree(one / "model") != hash_tree(other / "model")


def test_verify_opens_the_results_with_stock_tools_and_sees_a_changed_byte(recipe, tmp_path):
    run = apply(load_recipe(recipe()), How(tmp_path / "run", threads=1)).directory
    findings = verify(run)
    assert [(f.what, f.detail) for f in findings if not f.holds] == []
    assert len(findings) >= 4
    weights = run / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0x40
    weights.write_bytes(bytes(content))
    broken = [f.what for f in verify(run) if not f.holds]
    assert "files as the run wrote them" in broken
    assert any("ONNX Runtime" in what for what in broken)


def test_a_missed_gate_ends_the_run_and_keeps_the_result_apart(recipe, tmp_path):
    run = tmp_path / "run"
    loaded = load_recipe(recipe(gate=0.999))
    with pytest.raises(GateMissed, match=r"1-slice: gate: top1 .* is under 0.999") as caught:
        apply(loaded, How(run, threads=1))
    assert caught.value.exit_code == 3
    assert not (run / "model").exists()
    assert not (run / "onnx").exists()
    assert Checkpoint.load(run / "failed" / "model").layout.parameters > 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["verdict"] == "fail"
    assert metrics["steps"][0]["verdicts"][0]["passed"] is False
    assert "FAILED" in (run / "report.md").read_text()
    with pytest.raises(GateMissed):  # resuming a failed run does not turn it into a success
        apply(loaded, How(run, resume=True, threads=1))
    assert not (run / "model").exists()


def test_a_gate_is_applied_again_to_the_artifact(recipe, tmp_path, save_tiny):
    """A bound on bytes that the checkpoint keeps and the float32 artifact of a bfloat16 checkpoint cannot."""
    run = tmp_path / "run"
    path = recipe(save_tiny("llama", dtype="bfloat16"))
    text = path.read_text()
    path.write_text(text.replace("{metric: perplexity, max: 1000000}", "{metric: bytes, max_increase: 0%}"))
    with pytest.raises(GateMissed, match="onnx: gate: bytes"):
        apply(load_recipe(path), How(run, threads=1))
    assert (run / "failed" / "onnx" / "model.onnx").exists()
    assert not (run / "onnx").exists()


def test_dtype_of_the_recipe_is_the_dtype_of_the_result(recipe, tmp_path):
    path = recipe()
    path.write_text(path.read_text().replace("model:", "dtype: bfloat16\nmodel:"))
    run = apply(load_recipe(path), How(tmp_path / "run", threads=1)).directory
    assert Checkpoint.load(run / "model").layout.dtype == "bfloat16"
    assert json.loads((run / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_with_a_run_is_refused_and_resumed_only_with_the_same_inputs(recipe, tmp_path):
    loaded = load_recipe(recipe())
    run = apply(loaded, How(tmp_path / "run", threads=1)).directory
    before = hash_tree(run / "model")
    with pytest.raises(RecipeError, match=r"a run is there already.*--resume"):
        apply(loaded, How(run, threads=1))
    assert apply(loaded, How(run, resume=True, threads=1)).passed
    assert hash_tree(run / "model") == before
    other = load_recipe(recipe(), ["passes.0.with.remove=0.3"])
    with pytest.raises(RecipeError, match="another recipe than this run was started with"):
        apply(other, How(run, resume=True, threads=1))


def test_a_folder_with_strangers_is_refused(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match=r"a folder with other files \(thesis.tex\)"):
        apply(load_recipe(recipe()), How(run, threads=1))
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".")) == ["thesis.tex"]


def test_a_second_run_into_one_folder_is_refused(recipe, tmp_path):
    with RunDirectory(tmp_path / "run") as first:
        first.open({"recipe": "", "weights": {}, "data": {}}, resume=False)
        with pytest.raises(PreflightError, match="another run in progress there"):
            apply(load_recipe(recipe()), How(tmp_path / "run", threads=1))


def test_too_little_memory_is_refused_from_the_config_alone(recipe, tmp_path):
    model = tmp_path / "huge"
    model.mkdir()
    huge = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200, "num_attention_heads": 64}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 256, **huge}
    config["dtype"] = "bfloat16"
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PreflightError, match=r"memory: found .* available, expected .* TB \(see tersor plan\)"):
        apply(load_recipe(recipe(model)), How(tmp_path / "run", threads=1))
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_passes_hands_out_the_checkpoint_as_it_is(recipe, tmp_path, save_tiny):
    model = save_tiny("bert", vocab_size=128)
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(f"{line.strip()}" for line in inspect.getsource(textwrap).splitlines() if line.strip()))
    path = tmp_path / "plain.yaml"
    path.write_text(
        f"recipe: 1\nmodel: {model}\ndata: {{heldout: {{path: {text}, samples: 20, length: 32}}}}\n"
        "metrics: [cosine]\ngate: {metric: cosine, min: 0.999999}\nexport: [{use: onnx, with: {inputs: packed}}]\n"
    )
    outcome = apply(load_recipe(path), How(tmp_path / "run", threads=1))
    assert outcome.metrics["artifacts"][0]["cosine"] == pytest.approx(1, abs=1e-6)
    before, after = Checkpoint.load(model), Checkpoint.load(outcome.directory / "model")
    assert all(np.array_equal(t.numpy(), after.tensors[n].numpy()) for n, t in before.tensors.items())


def test_a_metric_for_another_kind_of_model_is_refused_by_the_plan(recipe, tmp_path, save_tiny):
    path = recipe()
    path.write_text(path.read_text().replace("passes:", "metrics: [perplexity, cosine, top1]\npasses:"))
    with pytest.raises(RecipeError, match=r"small.yaml:7:23: metrics.1: found 'cosine', which reads embedding"):
        apply(load_recipe(path), How(tmp_path / "run", threads=1))
