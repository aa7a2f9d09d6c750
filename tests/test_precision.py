"""Small precisions by name: what each costs, whom it depends on, what stays in float32, and that the gate judges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tersor.compress import How, apply, load_recipe
from tersor.compress.catalogue import describe
from tersor.compress.errors import GateMissed
from tersor.compress.evaluate.torch_scorer import TorchScorer
from tersor.compress.reporting import report
from tersor.export import runtime
from tersor.export.client import Client
from tersor.export.onnx import Onnx
from tersor.export.small import int8, nbits
from tersor.export.small.precision import PRECISIONS, dynamic_error

SPOILT = "encoder.layer.1.attention.output.dense.weight"
pytestmark = pytest.mark.skipif(not runtime.knows("int8"), reason="this ONNX Runtime has no int8 products of this form")


def spoilt(tiny: Any) -> Any:
    """One value column carries all the size, and its readers none of it: what remains is noise in int8."""
    checkpoint = tiny("bert")
    checkpoint.tensors["encoder.layer.1.attention.self.value.bias"][5] = 3000.0
    checkpoint.tensors[SPOILT][:, 5] = 0.0
    return checkpoint


@pytest.mark.parametrize(("model_type", "name"), [*(("bert", name) for name in PRECISIONS), ("llama", "int4-block")])
def test_a_small_artifact_is_near_and_free_of_neighbours_but_for_the_stock_form(
    model_type: str, name: Any, tiny: Any, tmp_path: Path
) -> None:
    checkpoint = tiny(model_type)
    manifest = Onnx(precision=name).write(checkpoint, tmp_path, [])
    assert manifest["precision"] == name
    figures = manifest["parity"]["logits" if model_type == "llama" else "sentence_embedding"]
    assert (0.85 if name == "int4-block" else 0.95) < figures["cosine_mean"] < 0.999999
    small = Client(tmp_path, threads=1)
    assert small.bytes < checkpoint.layout.bytes
    ids = [np.random.default_rng(n).integers(4, 100, n) for n in (9, 1, 6, 33)]
    together, alone = small(ids), [small([i])[0] for i in ids]
    moved = max(np.abs(a - b).max() for a, b in zip(together, alone, strict=True))
    assert (moved < 2e-5) == PRECISIONS[name].apart


def test_two_exports_by_quantize_dynamic_are_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Onnx(precision="int8-dynamic").write(tiny("bert"), tmp_path / folder, [])
    one, two = ((tmp_path / folder / "model.onnx").read_bytes() for folder in ("one", "two"))
    assert one == two
    assert str(tmp_path).encode() not in one


@pytest.mark.parametrize("name", ["int8", "int8-dynamic"])
def test_what_an_outlier_would_drown_stays_and_is_named_as_in_the_checkpoint(
    name: Any, tiny: Any, tmp_path: Path
) -> None:
    manifest = Onnx(precision=name).write(spoilt(tiny), tmp_path, [])
    assert manifest["kept_float32"][SPOILT] > manifest["keep_above"] == PRECISIONS[name].keep
    (line,) = report.precisions([{"step": "onnx", "artifact": manifest}])
    assert line.startswith(f"onnx: {name}, but for what stays in float32 because {name} would move their results by")
    assert f"{SPOILT} (" in line
    assert report.precisions([{"step": "onnx", "artifact": {**manifest, "kept_float32": {}}}]) == [
        f"onnx: {name} in every product."
    ]


def test_a_known_floor_halves_what_rounding_costs_behind_an_activation(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [np.random.default_rng(n).integers(4, 100, 20) for n in range(12)]
    checkpoint, found = tiny("bert"), {}
    for name, floors in (("known", int8.FLOORS), ("none", {}), ("wrong", {"Gelu": 0.0})):
        monkeypatch.setattr(int8, "FLOORS", floors)
        (tmp_path / name).mkdir()
        Onnx(precision="int8").write(checkpoint, tmp_path / name, [])
        found[name] = np.stack(Client(tmp_path / name, threads=1)(ids))
    want = np.stack(TorchScorer(checkpoint)(ids))
    known, none, wrong = (float(np.linalg.norm(found[name] - want)) for name in ("known", "none", "wrong"))
    assert known < none < wrong


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_come_back_within_half_a_step(bits: int) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    rows[0, :32] = 0
    small, scale = nbits.blocks(rows, bits)
    assert small.max() < 1 << bits
    error = np.abs(nbits.restored(rows, bits) - rows)
    steps = np.repeat(scale, nbits.BLOCK, axis=1)[:, :70]
    assert (error <= steps / 2 * 1.0001).all()
    # the twin: one scale a row is coarser for a row with one large entry
    rows[1, 0] = 100
    assert np.abs(nbits.restored(rows, bits) - rows)[1, 32:].max() < 100 / ((1 << bits) - 2) / 2


def test_one_scale_a_call_costs_what_its_loudest_entry_says() -> None:
    draw = np.random.default_rng(0)
    x, weight = draw.standard_normal((20, 64)).astype(np.float32), draw.standard_normal((64, 8)).astype(np.float32)
    quiet = dynamic_error(x, weight)
    weight[0] = 0
    x[3, 0] = 1000
    assert dynamic_error(x, weight) > 10 * quiet


RECIPE = """recipe: 1
model: model
data: {{heldout: {{path: text.txt, samples: 8, length: 32}}}}
metrics: [cosine]
gate: {{metric: cosine, min: {limit}}}
export:
  - {{use: onnx, with: {{precision: {name}}}}}
"""


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_gate_judges_the_artifact_and_the_report_says_what_stayed(name: Any, tiny: Any, tmp_path: Path) -> None:
    tiny("bert").save(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(f"line {n} of words" for n in range(8)), "utf-8")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE.format(limit=0.9, name=name), "utf-8")
    done = apply(load_recipe(recipe), How(tmp_path / "run", threads=1))
    assert 0.9 < done.metrics["artifacts"][0]["cosine"] < 0.999999
    text, page = ((tmp_path / "run" / f).read_text("utf-8") for f in ("report.md", "report.html"))
    assert f"onnx: {name} in every product." in text
    assert f"onnx: {name} in every product." in page
    assert "| cosine 0.9" in text
    if name == "int4-block":
        recipe.write_text(RECIPE.format(limit=0.9999999, name=name), "utf-8")
        with pytest.raises(GateMissed):
            apply(load_recipe(recipe), How(tmp_path / "strict", threads=1))


def test_the_command_line_names_every_precision() -> None:
    found = describe("onnx")
    assert next(o for o in found["options"] if o["name"] == "precision")["type"] == " | ".join(["float32", *PRECISIONS])
    assert all(f"precision: {name}" in found["text"] for name in PRECISIONS)
