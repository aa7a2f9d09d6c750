"""Precisions by name: how a float32 graph's products and tables become small, and which products stay as they are.

    int8           a scale a token and a column (int8.py): fast, and no answer depends on its neighbours
    int8-dynamic   ONNX Runtime's quantize_dynamic, the usual form: one scale for all activations of a product and one
                   a weight, so an answer moves with its neighbours in the call; to compare with
    int8-block     weights in blocks of 32 with a scale each (nbits.py, ONNX Runtime's MatMulNBits): the most exact
    int4-block     likewise in four bits, the smallest file; embedding tables keep eight

None needs calibration data. A product stays in float32 if on real tokens its result would move by more than a share
‖ŷ − y‖ / ‖y‖ of itself, because outliers drown the rest; the artifact lists these. How much the whole may lose is the
recipe's gate to say, on the artifact itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from . import int8, nbits

if TYPE_CHECKING:
    from tersor.compress.checkpoint import Checkpoint

DYNAMIC = ("MatMul", "Gemm", "Gather")
"""What quantize_dynamic may touch: it takes the standard Attention for its own and breaks it."""


@dataclass(frozen=True)
class Precision:
    """One way to make a graph small.

    Attributes:
        error: (lines of the stream `[t, k]`, weight `[k, n]`) → ‖ŷ − y‖ / ‖y‖ of their product.
        quantize: (model, names of results whose products stay) → the model in small, perhaps the same object.
        keep: error above which a product stays in float32, several times what rounding alone costs.
        apart: whether an answer is free of its neighbours.
    """

    error: Callable[[np.ndarray, np.ndarray], float]
    quantize: Callable[[ir.Model, Sequence[str]], ir.Model]
    keep: float
    apart: bool = True


def relative(moved: np.ndarray, exact: np.ndarray) -> float:
    """‖ŷ − y‖ / ‖y‖."""
    return float(np.linalg.norm(moved - exact)) / max(float(np.linalg.norm(exact)), 1e-30)


def dynamic_error(x: np.ndarray, weight: np.ndarray) -> float:
    """Of stock dynamic quantisation: uint8 activations between their extremes, int8 weights with one scale."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = max((high - low) / 255, 1e-10)
    zero = round(-low / step)
    lines = (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
    scale = max(float(np.abs(weight).max()) / 127, 1e-10)
    return relative(lines @ (np.round(weight / scale) * scale), x @ weight)


def block_error(x: np.ndarray, weight: np.ndarray, bits: int) -> float:
    """Of weights in blocks; the kernel's eight-bit activations, over the same blocks, cost far less."""
    return relative(x @ nbits.restored(weight.T, bits).T, x @ weight)


def _per_token(model: ir.Model, keep: Sequence[str]) -> ir.Model:
    int8.quantize(model, keep)
    return model


def _blocks(bits: int, model: ir.Model, keep: Sequence[str]) -> ir.Model:
    nbits.quantize(model, bits, keep)
    return model


def _dynamic(model: ir.Model, keep: Sequence[str]) -> ir.Model:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from ..graph import trace

    spared = [str(node.name) for node in model.graph if node.outputs and node.outputs[0].name in keep]
    with tempfile.TemporaryDirectory() as folder, trace.quiet():
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        ir.save(model, source, external_data="float32.onnx.data")
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=list(DYNAMIC),
            weight_type=QuantType.QInt8,
            nodes_to_exclude=spared,
            use_external_data_format=True,
        )
        small = ir.load(target)
        ir.external_data.load_to_model(small)  # the folder goes
    trace.strip(small)
    return small


PRECISIONS = {
    "int8": Precision(int8.error, _per_token, 0.1),
    "int8-dynamic": Precision(dynamic_error, _dynamic, 0.1, apart=False),
    "int8-block": Precision(partial(block_error, bits=8), partial(_blocks, 8), 0.1),
    "int4-block": Precision(partial(block_error, bits=4), partial(_blocks, 4), 0.2),
}


def by_parameter(checkpoint: Checkpoint, found: Iterable[int8.Product], errors: dict[str, float]) -> dict[str, float]:
    """Errors by the weight's name in the checkpoint instead of the result's in the graph, which says nothing.

    Args:
        checkpoint: from which the graph was made.
        found: its products.
        errors: by the name of the product's result; a weight that is none of the checkpoint's keeps it.
    """
    named = {}
    for product in found:
        if product.name not in errors:
            continue
        name = next((n for n in _equal(checkpoint, product.weight) if n not in named), product.name)
        named[name] = errors[product.name]
    return named


def _equal(checkpoint: Checkpoint, weight: np.ndarray) -> list[str]:
    names = []
    for name, tensor in checkpoint.tensors.items():
        if tensor.ndim == 2 and tuple(tensor.shape) in (weight.shape, weight.shape[::-1]):
            stored = tensor.float().numpy()
            if np.array_equal(stored.T, weight) or np.array_equal(stored, weight):
                names.append(name)
    return names
