"""A checkpoint as an ONNX model in memory, with the facts that go into artifact.json."""

from __future__ import annotations

from typing import Any, Literal

import onnx_ir as ir
import torch

from tersor.compress.checkpoint import Checkpoint

from . import trace
from .core import core
from .pooling import Pooling
from .rows import Rows
from .segments import stitch


def build(
    checkpoint: Checkpoint, inputs: Literal["padded", "packed"], opset: int
) -> tuple[ir.Model, dict[str, Any]]:
    """The stripped model and its description.

    Raises:
        RecipeError: the pooling or an attention argument is not understood.
    """
    layout = checkpoint.layout
    pooling = Pooling.of(checkpoint.side_files) if layout.task == "feature-extraction" else None
    model = checkpoint.model(torch.float32)
    model.config.use_cache = False
    if inputs == "packed":
        traced = core(model, layout.arch.token_types, layout.depth, opset, layout.first_position)
        stitch(traced, pooling)
        return traced, facts(checkpoint, traced, pooling, inputs, opset)
    rows = Rows(model, pooling, layout.arch.token_types, inputs == "packed", layout.first_position)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if layout.arch.token_types else [])]
    outputs = ["logits"] if pooling is None else ["last_hidden_state", "sentence_embedding"]
    traced = trace.trace(rows, examples(layout.sizes["vocab"], len(names)), names, outputs, opset)
    if pooling is not None:
        traced.graph.outputs[1].shape = ir.Shape(["sequences", layout.sizes["hidden"]])
    return traced, facts(checkpoint, traced, pooling, inputs, opset)


def examples(vocab: int, count: int) -> list[torch.Tensor]:
    """Inputs to trace with: two rows of seven tokens."""
    ids = torch.arange(14).reshape(2, 7) % vocab
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 0]])
    return [ids, segments, torch.zeros_like(ids)][:count]


def facts(
    checkpoint: Checkpoint, model: ir.Model, pooling: Pooling | None, inputs: str, opset: int
) -> dict[str, Any]:
    """What artifact.json says of the model, but for files and parity."""
    layout = checkpoint.layout

    def described(values: list[ir.Value]) -> list[dict[str, Any]]:
        found = []
        for value in values:
            assert value.shape is not None
            assert value.dtype is not None
            shape = [d if isinstance(d, int) else str(d.value) for d in value.shape]
            found.append({"name": value.name, "dtype": value.dtype.name.lower(), "shape": shape})
        return found

    return {
        "model": trace.MODEL_FILE,
        "model_type": layout.arch.model_type,
        "task": layout.task,
        "opset": opset,
        "precision": "float32",
        "packing": inputs,
        "inputs": described(list(model.graph.inputs)),
        "outputs": described(list(model.graph.outputs)),
        "limits": {
            "vocab": layout.sizes["vocab"],
            "max_length": layout.longest,
        },
        "pooling": None if pooling is None else pooling.as_json(),
        "parameters": layout.parameters,
        "produced_by": {"torch": torch.__version__},
    }
