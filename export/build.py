"""A checkpoint as an ONNX model in memory, with the facts that go into artifact.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.evaluate.pooling import Pooling

from .graph import trace, zeros
from .graph.core import core, head
from .graph.front import Clock
from .graph.segments import CLASSES
from .graph.stitch import stitch
from .mixture import choice, experts


def build(
    checkpoint: Checkpoint,
    inputs: str,
    opset: int,
    static: tuple[int, int] | None = None,
    form: choice.Word = "auto",
    precision: choice.Precision = "float32",
    classes: Sequence[int] = CLASSES,
) -> tuple[ir.Model, dict[str, Any]]:
    """The model, without metadata, and its description.

    Args:
        checkpoint: not changed.
        inputs: see `stitch.stitch`.
        opset: of the default domain.
        static: rows and width of every call; for `packed-static`.
        form: of a mixture's experts.
        precision: of a mixture's experts.
        classes: bounds of the length classes; those that no sequence exceeds are left out.

    Raises:
        RecipeError: the pooling or an attention argument is not understood.
    """
    layout = checkpoint.layout
    pooling = Pooling.of(checkpoint.side_files) if layout.task == "feature-extraction" else None
    module = checkpoint.model(torch.float32)
    module.config.use_cache = False
    classifies = layout.task == "text-classification"
    base = layout.prefix.rstrip(".")
    inner = module.get_submodule(base) if classifies else module
    model = core(inner, layout.arch.token_types, layout.depth, opset)
    routed = fill(checkpoint, model, form, precision, static is not None)
    behind = head(module, base, layout.sizes["hidden"], opset) if classifies else None
    clock = Clock(layout.arch.positions_count, layout.first_position)
    bounds = tuple(bound for bound in classes if layout.longest is None or bound < layout.longest)
    trees = stitch(model, pooling, clock, inputs, behind, bounds)
    if static is not None:
        fix(model, static)
    apart = {} if static else {"classes": list(bounds)}
    removed = {} if routed else {"zeros": zeros.shrink(model)}
    said = facts(checkpoint, model, pooling, inputs, opset, static)
    return model, {**said, "trees": trees, **apart, **routed, **removed}


def fill(
    checkpoint: Checkpoint,
    model: ir.Model,
    word: choice.Word,
    precision: choice.Precision,
    static: bool = False,
) -> dict[str, Any]:
    """Give a mixture's experts their form, in place; what artifact.json says of them, nothing if there are none."""
    nodes = experts.placeholders(model.graph)
    if not nodes:
        return {}
    form = choice.form_of(word, precision, checkpoint.layout, static)
    speed: choice.Speeds = {}
    if word == "measure":
        forms = choice.candidates(precision, checkpoint.layout)
        form, speed = choice.measured(model.graph, forms)
    said: dict[str, Any] = {
        "form": form,
        "layers": len(nodes),
        "experts": checkpoint.layout.families["experts"],
        "chosen": experts.chosen(nodes[0]),
        "routers": experts.routers(model.graph),
        "choices": [str(node.inputs[1].name) for node in nodes if node.inputs[1] is not None],
    }
    if speed:
        said["speed_over_whole"] = speed
    if notes := choice.note_of(word, form, checkpoint.layout, static):
        said["note"] = notes[0]
    experts.fill(model.graph, form)
    return {"experts": said}


def fix(model: ir.Model, shape: tuple[int, int]) -> None:
    """Give all inputs one shape, `[rows, width]`, and fold what follows from it, in place."""
    from onnx_ir.passes.common import ShapeInferencePass
    from onnxscript.optimizer import optimize_ir

    for value in model.graph.inputs:
        value.shape = ir.Shape(shape)
    for value in model.graph.outputs:
        assert value.shape is not None
        value.shape = ir.Shape([*shape, *list(value.shape)[2:]])
    for _ in range(3):  # what folds gives shapes, and shapes let more fold
        ShapeInferencePass()(model)
        optimize_ir(model)
    trace.strip(model)


def facts(
    checkpoint: Checkpoint,
    model: ir.Model,
    pooling: Pooling | None,
    inputs: str,
    opset: int,
    static: tuple[int, int] | None,
) -> dict[str, Any]:
    """What artifact.json says of the model, but for files and parity."""
    layout = checkpoint.layout
    bounds = [n for n in (layout.longest, static and static[1]) if n is not None]
    types = layout.sizes["token_types"] if layout.arch.token_types else None
    return {
        "model": trace.MODEL_FILE,
        "model_type": layout.arch.model_type,
        "task": layout.task,
        "opset": opset,
        "precision": "float32",
        "packing": inputs,
        "inputs": [_described(v) for v in model.graph.inputs],
        "outputs": [_described(v) for v in model.graph.outputs],
        "limits": {"vocab": layout.sizes["vocab"], "max_length": min(bounds, default=None), "token_types": types},
        "static": None if static is None else {"rows": static[0], "width": static[1]},
        "pooling": None if pooling is None else pooling.as_json(),
        "parameters": layout.parameters,
        "produced_by": {"torch": torch.__version__},
    }


def _described(value: ir.Value) -> dict[str, Any]:
    assert value.shape is not None
    assert value.dtype is not None
    shape = [d if isinstance(d, int) else str(d.value) for d in value.shape]
    return {"name": value.name, "dtype": value.dtype.name.lower(), "shape": shape}
