"""The recipe of docs/on_device.md through `tersor apply`, on less text: gates, artifacts, tokens, the report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tersor.compress import How, Recipe, apply, load_recipe
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import GateMissed
from tersor.compress.verify import verify
from tersor.export.generate import Generator

PAGE = Path(__file__).parent.parent / "docs" / "on_device.md"
LESS = ["data.heldout.samples=4", "data.heldout.length=64"]
LIGHT = ["data.calibration.samples=8", "data.calibration.length=128", "passes.0.with.remove=0.1"]


def recipe(folder: Path, *changes: str, model: Path | None = None, passes: bool = True) -> Recipe:
    text = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.S)[0]
    if not passes:
        text = re.sub(r"passes:.*?(?=^gate)", "", text, flags=re.S | re.M)
    path = folder / "recipe.yaml"
    path.write_text(text, "utf-8")
    named = [] if model is None else [f"model={json.dumps(str(model))}"]
    return load_recipe(str(path), [*LESS, *named, *changes])


@pytest.mark.parametrize("kind", ["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def test_both_artifacts_of_a_sliced_decoder_are_gated_and_generate(
    tmp_path: Path, save_tiny: Callable[..., Path], kind: str
) -> None:
    model = save_tiny("llama", head_dim=8, max_position_embeddings=128) if kind == "tiny" else None
    loaded = recipe(tmp_path, *LIGHT, "gate.max_increase=40%", model=model)
    outcome = apply(loaded, How(tmp_path / "run", threads=1))
    run = outcome.directory
    plain, small = outcome.metrics["artifacts"]
    assert [plain["name"], small["name"]] == ["onnx-decoder", "onnx-decoder-2"]
    assert all(a["verdicts"][0]["metric"] == "perplexity" for a in (plain, small))
    assert plain["perplexity"] == pytest.approx(outcome.metrics["checkpoint"]["perplexity"], rel=1e-5)
    assert small["perplexity"] == pytest.approx(plain["perplexity"], rel=0.05)
    assert small["perplexity"] != plain["perplexity"]
    assert small["bytes"] < (0.35 if kind == "embedded" else 0.9) * plain["bytes"]
    assert "cosine 0.99" in (run / "report.md").read_text("utf-8")
    assert [f.what for f in verify(run) if not f.holds] == []

    generator, checkpoint = Generator(run / "onnx-decoder", threads=1), Checkpoint.load(run / "model")
    generator.ends = frozenset()
    prompt = generator.tokenize("import os\n\ndef main(")
    with torch.no_grad():
        out = checkpoint.model(torch.float32).generate(
            torch.from_numpy(prompt)[None], max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    tokens = generator.generate(prompt, 64)
    assert len(tokens) == 64
    assert np.array_equal(tokens, out[0, len(prompt) :].numpy())


def test_a_gate_that_int8_misses_ends_the_run(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    """The float32 artifact meets it: KL to the original is nothing but rounding there."""
    limit = 'gate={"metric": "kl", "max": 1e-6}'
    loaded = recipe(tmp_path, limit, model=save_tiny("llama", head_dim=8), passes=False)
    with pytest.raises(GateMissed, match="onnx-decoder-2: gate: kl"):
        apply(loaded, How(tmp_path / "run", threads=1))
    kept = tmp_path / "run" / "failed"
    assert (kept / "onnx-decoder-2" / "model.onnx").is_file()
    assert not (tmp_path / "run" / "onnx-decoder").exists()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    assert [a["verdicts"][0]["passed"] for a in metrics["artifacts"]] == [True, False]
