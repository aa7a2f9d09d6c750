"""`tersor compare`: from records, by measuring, and what differs between two checkpoints."""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tersor.compress import How, apply, load_recipe
from tersor.compress.cli import main
from tersor.compress.compare import compare, rows, tensor_rows
from tersor.compress.data import Source
from tersor.compress.errors import PreflightError, RecipeError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(inspect.getsource(textwrap), "utf-8")
    return path


@pytest.fixture
def two(save_tiny: Callable[..., Path]) -> tuple[Path, Path]:
    """A checkpoint, and a copy of which one tensor was doubled and another moved by a hundredth."""
    a, b = save_tiny("llama"), save_tiny("llama")
    tensors = load_file(b / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 1.01
    save_file(tensors, b / "model.safetensors", metadata={"format": "pt"})
    return a, b


def test_tensors_by_relative_change(two):
    found = compare(str(two[0]), str(two[1]))
    first, second, third, *_ = found["tensors"]
    assert (first["name"], first["change"]) == ("model.layers.1.mlp.up_proj.weight", pytest.approx(1.0))
    assert second["name"] == "model.layers.0.self_attn.q_proj.weight"
    assert second["change"] == pytest.approx(0.01, rel=1e-4)
    assert third["change"] == 0
    assert len(found["tensors"]) == 10 < found["compared"]
    assert found["config"] == []
    assert [row[0] for row in tensor_rows(found)] == ["tensor", first["name"], second["name"]]


def test_a_thing_equals_itself(two, text):
    found = compare(str(two[0]), str(two[0]), source=Source(path=str(text), samples=4, length=32), threads=1)
    assert tensor_rows(found) == []
    assert {row[3] for row in rows(found)[1:]} == {"="}
    assert found["b"]["blocks"][""]["kl"] == pytest.approx(0, abs=1e-9)


def test_measured_on_text_and_configs_key_by_key(two, text, save_tiny):
    found = compare(str(two[0]), str(two[1]), source=Source(path=str(text), samples=4, length=32), threads=1)
    ours, theirs = (found[side]["blocks"][""] for side in "ab")
    assert ours["perplexity"] != theirs["perplexity"]
    assert theirs["kl"] > 0
    assert theirs["intervals"]["perplexity"][0] < theirs["perplexity"]
    other = save_tiny("llama", intermediate_size=40)
    found = compare(str(two[0]), str(other))
    assert [key for key, *_ in found["config"]] == ["intermediate_size"]
    assert found["config"][0][2] == 40
    assert found["tensors"][0]["change"] is None
    assert "another shape" in tensor_rows(found)[1]


def test_other_tasks_and_missing_things_are_refused(two, text, save_tiny, tmp_path):
    source, encoder = Source(path=str(text), samples=4, length=32), save_tiny("bert", "feature-extraction")
    with pytest.raises(RecipeError, match="two models of one task"):
        compare(str(two[0]), str(encoder), source=source, threads=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PreflightError, match=r"no config.json, artifact.json or metrics.json"):
        compare(str(two[0]), str(tmp_path / "empty"))


def test_runs_speak_through_their_metrics(two, text, tmp_path, monkeypatch, capsys):
    runs = []
    for number, model in enumerate(two):
        recipe = tmp_path / f"r{number}.yaml"
        recipe.write_text(
            f"recipe: 1\nmodel: {model}\ndata: {{heldout: {{path: {text}, samples: 6, length: 32}}}}\n"
            "metrics: [perplexity, kl]\nexport: [{use: onnx, with: {inputs: padded}}]\n"
        )
        runs.append(apply(load_recipe(recipe), How(tmp_path / f"run{number}", threads=1)).directory)
    monkeypatch.setattr("tersor.compress.compare._measured", None)  # a call would not survive this
    found = compare(*map(str, runs))
    stored = json.loads((runs[1] / "metrics.json").read_text())
    assert found["b"]["blocks"][""]["perplexity"] == stored["checkpoint"]["perplexity"]
    assert found["b"]["blocks"]["onnx"]["bytes"] == stored["artifacts"][0]["bytes"]
    assert "onnx: latency ms" in [row[0] for row in rows(found)]
    assert found["tensors"][0]["name"] == "model.layers.1.mlp.up_proj.weight"

    monkeypatch.setattr(sys, "argv", ["tersor", "compare", str(runs[0] / "model"), str(runs[1] / "onnx"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    mixed = json.loads(capsys.readouterr().out)
    assert (mixed["a"]["kind"], mixed["b"]["kind"]) == ("checkpoint", "artifact")
    assert mixed["b"]["blocks"][""]["bytes"] == stored["artifacts"][0]["bytes"]
    assert "tensors" not in mixed

    monkeypatch.setattr(sys, "argv", ["tersor", "compare", *map(str, runs)])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    for word in ("parameters", "perplexity", "onnx: bytes", "up_proj", "of"):
        assert word in said
