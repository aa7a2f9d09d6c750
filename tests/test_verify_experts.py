"""`verify` on a mixture of experts: torch follows the artifact where two experts score alike, and only there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.compress import How, apply, load_recipe
from tersor.compress.verify import verify

AGREES = "onnx: stock ONNX Runtime agrees with the checkpoint"
ROUTER = "model.layers.{}.mlp.gate.weight"


@pytest.fixture
def run(tiny, small_recipe, tmp_path):
    """Of a model whose first two experts differ while their routers differ by the last digit, exported as it is."""
    original = tiny("qwen2_moe")
    for block in range(2):
        router = original.tensors[ROUTER.format(block)]
        router[1] = torch.nextafter(router[0], torch.full_like(router[0], 9.0))
    original.save(tmp_path / "near")
    recipe = load_recipe(small_recipe("export: [{use: onnx}]\n", tmp_path / "near"))
    return apply(recipe, How(tmp_path / "run", threads=1)).directory


def agreement(run) -> tuple[bool, str]:
    return next((finding.holds, finding.detail) for finding in verify(run) if finding.what == AGREES)


def judged(run) -> bool:
    """Whether the artifact passes a limit that means something."""
    holds, detail = agreement(run)
    return holds and float(detail.split(", ")[1].split()[0]) < 1e-4


def test_where_experts_score_alike_either_choice_is_right(run):
    assert all(finding.holds for finding in verify(run))
    assert judged(run)
    path = run / "onnx" / "artifact.json"
    described = json.loads(path.read_text("utf-8"))
    assert described["experts"].pop("choices")
    path.write_text(json.dumps(described), "utf-8")
    assert not judged(run)  # float64 chooses otherwise than the artifact, or than float32


def test_a_choice_that_no_rounding_explains_is_found(run):
    weights = run / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors[ROUTER.format(0)] = tensors[ROUTER.format(0)].roll(1, 0)
    save_file(tensors, weights, {"format": "pt"})
    holds, detail = agreement(run)
    assert not holds
    assert "an expert is chosen that scores" in detail
