"""Weights of eight or four bits in blocks: ONNX Runtime's MatMulNBits, and embedding tables in the same form.

A weight's row (one output) is cut into blocks of 32 inputs; a block holds q = round(w / s) + 2ᵇ⁻¹ in b bits with one
float32 scale s = max|w| / (2ᵇ⁻¹ − 1), two values of four bits to a byte, the earlier one low. Tables have eight bits
whatever the products have. Activations are quantised by the kernel, as it goes, over the same blocks
(accuracy_level 4), so a token's answer depends on that token alone. The lookup of an embedding gathers blocks and
scales and multiplies them out; a tied head and its table are then one tensor, as they are in the checkpoint.

int8.py has a scale a column and a line, which is the faster kernel on many tokens; here 32 neighbours share a
maximum, and decoding, which only reads weights, pays nothing for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..graph.ops import CONTRIB, Ops

BLOCK = 32
INTEGER = 4
"""accuracy_level at which the kernel multiplies integers."""
SMALLEST = 1 << 10
"""Elements under which a table or a weight is not worth it."""


def blocks(rows: np.ndarray, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Uint8 `[n, ⌈k / 32⌉, 32]` below 2ᵇ and scales `[n, ⌈k / 32⌉]` of float32 rows `[n, k]`, padded by zeros."""
    count, width = rows.shape
    middle = 1 << (bits - 1)
    cut = np.pad(rows, ((0, 0), (0, -width % BLOCK))).reshape(count, -1, BLOCK)
    scale = np.maximum(np.abs(cut).max(2) / (middle - 1), 1e-10).astype(np.float32)
    return (np.round(cut / scale[:, :, None]) + middle).astype(np.uint8), scale


def restored(rows: np.ndarray, bits: int) -> np.ndarray:
    """What is left of float32 rows `[n, k]` after quantisation, as float32."""
    small, scale = blocks(rows, bits)
    whole: np.ndarray = (small.astype(np.float32) - (1 << (bits - 1))) * scale[:, :, None]
    return whole.reshape(len(rows), -1)[:, : rows.shape[1]]


@dataclass
class Store:
    """Quantised rows, once for every distinct content: the tracer copies a tied head to transpose it."""

    ops: Ops
    done: dict[str, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def __call__(self, rows: np.ndarray, bits: int = 8) -> tuple[ir.Value, ir.Value]:
        """Blocks and scales of float32 rows `[n, k]`."""
        rows = np.ascontiguousarray(rows)
        key = f"{bits}-{hashlib.sha256(rows.tobytes()).hexdigest()}"
        if key not in self.done:
            small, scale = blocks(rows, bits)
            if bits == 4:
                small = small[:, :, ::2] | (small[:, :, 1::2] << 4)
            self.done[key] = self.ops.constant_array(small), self.ops.constant_array(scale)
        return self.done[key]


def quantize(model: ir.Model, bits: int = 8, keep: Collection[str] = ()) -> None:
    """Give every product with a stored weight, and every float32 table, its small form, in place.

    Args:
        model: float32.
        bits: of a weight, 8 or 4.
        keep: names of results whose products stay.
    """
    graph = model.graph
    store = Store(Ops("blocks"))
    for number, node in enumerate(list(graph)):
        if node.outputs[0].name in keep:
            continue
        ops = Ops(f"bits{number}")
        if node.op_type == "Gather":
            table = _stored(node, 0)
            answer = None if table is None else _lookup(ops, store(table), node.inputs[1], table.shape[1])
        else:
            answer = _product(ops, store, node, bits)
        if answer is None:
            continue
        old = node.outputs[0]
        if old.is_graph_output():
            old.name, answer.name = f"{old.name}_float32", old.name
            answer.shape, answer.type = old.shape, old.type
        old.replace_all_uses_with(answer, replace_graph_outputs=True)
        ops.register(graph)
        graph.insert_before(node, ops.nodes)
        graph.remove(node, safe=True)
    store.ops.register(graph)
    graph.opset_imports[CONTRIB] = 1
    RemoveUnusedNodesPass()(model)


def _stored(node: ir.Node, index: int) -> np.ndarray | None:
    """The node's stored float32 matrix, if it has one that is worth it."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else value.const_value
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST:
        return None
    return tensor.numpy()


def _product(ops: Ops, store: Store, node: ir.Node, bits: int) -> ir.Value | None:
    weight = _stored(node, 1) if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or (node.op_type == "Gemm" and not _plain(node)):
        return None
    across = "transB" in node.attributes and bool(node.attributes["transB"].as_int())
    rows = weight if across else weight.T
    count, width = rows.shape
    options = {"K": width, "N": count, "bits": bits, "block_size": BLOCK, "accuracy_level": INTEGER}
    answer = ops("MatMulNBits", node.inputs[0], *store(rows, bits), domain=CONTRIB, **options)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return answer if bias is None else ops("Add", answer, bias)


def _plain(node: ir.Node) -> bool:
    read = {name: attribute.value for name, attribute in node.attributes.items()}
    return not read.get("transA", 0) and read.get("alpha", 1.0) == read.get("beta", 1.0) == 1.0


def _lookup(ops: Ops, stored: tuple[ir.Value, ir.Value], ids: ir.Value | None, width: int) -> ir.Value:
    small, scale = (ops("Gather", part, ids) for part in stored)
    shifted = ops("Sub", ops("Cast", small, to=ir.DataType.FLOAT), ops.constant(128, np.float32))
    spread = ops("Mul", shifted, ops("Unsqueeze", scale, ops.constant([-1])))
    rank = ops("Shape", ids)
    whole = ops("Reshape", spread, ops("Concat", rank, ops.constant([-1]), axis=0))
    if width % BLOCK == 0:
        return whole
    return ops("Slice", whole, ops.constant([0]), ops.constant([width]), ops.constant([-1]))
