"""`verify` on a mixture of experts: torch follows the artifact where two experts score alike, and only there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tersor.compress import How, apply, load_recipe
from tersor.compress.verify import verify

AGREES = "onnx: stock ONNX Runtime agrees with the checkpoint"
ROUTER = "model.layers.{}.mlp.gate.weight"


@pytest.fixture(scope="module")
def finished(tiny, write_recipe, tmp_path_factory) -> Path:
    """Of a model whose first two experts differ while their routers differ by the last digit, exported as it is."""
    folder, original = tmp_path_factory.mktemp("near"), tiny("qwen2_moe")
    for block in range(2):
        router = original.tensors[ROUTER.format(block)]
        router[1] = torch.nextafter(router[0], torch.full_like(router[0], 9.0))
    original.save(folder / "model")
    recipe = load_recipe(write_recipe(folder, folder / "model", "export: [{use: onnx}]\n"))
    return apply(recipe, How(folder / "run", threads=1)).directory


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def limit(detail: str) -> float:
    return float(detail.split(", ")[1].split(maxsplit=1)[0])


def test_where_experts_score_alike_either_choice_is_right(run):
    findings = {finding.what: finding for finding in verify(run)}
    assert all(finding.holds for finding in findings.values())
    assert limit(findings[AGREES].detail) < 1e-4
    path = run / "onnx" / "artifact.json"
    described = json.loads(path.read_text("utf-8"))
    assert described["experts"].pop("choices")
    path.write_text(json.dumps(described), "utf-8")
    blind = {finding.what: finding for finding in verify(run)}[AGREES]  # float64 chooses otherwise than one of the two
    assert not blind.holds or limit(blind.detail) > 1e-3


def test_a_choice_that_no_rounding_explains_is_found(run):
    weights = run / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors[ROUTER.format(0)] = tensors[ROUTER.format(0)].roll(1, 0)
    save_file(tensors, weights, {"format": "pt"})
    found = {finding.what: finding for finding in verify(run)}[AGREES]
    assert not found.holds
    assert "an expert is chosen that scores" in found.detail
