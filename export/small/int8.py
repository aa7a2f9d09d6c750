"""Int8 whose answer for a token depends on that token alone.

Stock dynamic quantisation takes one scale for the whole activation tensor, so a sentence's embedding changes with its
neighbours in the batch (by up to 0.12 on all-MiniLM-L6-v2; onnxruntime #5672, #10111). Here every line x of the stream
has its own, from stock operators:

    s = max|x| / 127        q = round(x / s) + 128, uint8        x W ≈ s · (q − 128) W₈ · w

with W₈ int8 and one scale w a column, max|W_j| / 90. Signed weights against unsigned activations is the kernel that
ONNX Runtime runs fastest. On CPUs with AVX2 but no VNNI it adds pairs of products in 16 bits, silently saturating:
with weights up to ±127, 3 % of all-MiniLM-L6-v2's sums did, and moved products by 2.7 % (rounding alone: 1.6 %). At
±90 one sum in 20,000 does, and the mean cosine rises from .9963 to .9970; at ±64 none can, and it is .9962.

Lines that come from a GELU or ReLU never go under a known floor −f (0 or −0.17), so that s = (max x + f) / 255 and
q = round(x / s) + z, z = round(f / s), use all 255 levels for what is above it: half the error, for one more term,
s z times the column sums of w W₈. (The kernel takes one zero for all lines, so z cannot be its zero.)

Embedding tables are int8 with one scale a row. Products whose result would move too much on real tokens, because a
line's largest entry drowns the rest, stay in float32 and are listed (precision.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..graph.ops import CONTRIB, Ops

if TYPE_CHECKING:
    from tersor.compress.tokens import Tokens

    from ..client import Client

LEVELS = 90
"""Largest weight in int8, see above."""
FLOORS = {"Gelu": 0.17, "Relu": 0.0}
"""How far under 0 an activation reaches at most: lines that it makes are quantised from there."""
SMALLEST = 1 << 10
"""Elements under which a table or a weight is not worth it."""


@dataclass(frozen=True)
class Product:
    """A MatMul of the stream with a stored weight `[k, n]`."""

    node: ir.Node
    weight: np.ndarray

    @property
    def name(self) -> str:
        """The name of its result in the graph."""
        return str(self.node.outputs[0].name)


def products(graph: ir.Graph) -> list[Product]:
    """Every MatMul with a stored two-dimensional weight."""
    found = []
    for node in graph:
        weight = (
            node.inputs[1].const_value if node.op_type == "MatMul" and node.inputs[1] is not None else None
        )
        if weight is not None and len(weight.shape) == 2 and weight.size >= SMALLEST:
            found.append(Product(node, weight.numpy()))
    return found


def columns(weight: np.ndarray, levels: int = LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """Int8 of `[k, n]`, at most ± `levels`, and one float32 scale a column."""
    scale = np.maximum(np.abs(weight).max(0) / levels, 1e-10).astype(np.float32)
    return np.clip(np.round(weight / scale), -levels, levels).astype(np.int8), scale


def lines(x: np.ndarray) -> np.ndarray:
    """What is left of float32 lines `[t, k]` after quantisation, as float32."""
    scale = np.maximum(np.abs(x).max(1, keepdims=True) / 127, 1e-10)
    return (np.clip(np.round(x / scale), -128, 127) * scale).astype(np.float32)


def error(x: np.ndarray, weight: np.ndarray) -> float:
    """‖ŷ − y‖ / ‖y‖ of one product on real lines `[t, k]`."""
    exact = x @ weight
    moved = float(np.linalg.norm(lines(x) @ restored(weight) - exact))
    return moved / max(float(np.linalg.norm(exact)), 1e-30)


def choose(
    model: ir.Model,
    client: Client,
    tokens: Sequence[Tokens],
    keep: float = 0.1,
    error: Callable[[np.ndarray, np.ndarray], float] = error,
) -> dict[str, float]:
    """Products that quantisation would move by more than `keep` on real tokens, with that error.

    Args:
        model: float32, the one that `client` runs.
        client: for the layout of inputs.
        tokens: sequences.
        keep: the largest share ‖ŷ − y‖ / ‖y‖ by which a result may move.
        error: that share, for lines `[t, k]` and a weight `[k, n]`.
    """
    import onnxruntime

    found = products(model.graph)
    inputs = {str(p.node.inputs[0].name): p.node.inputs[0] for p in found if p.node.inputs[0] is not None}
    outputs = list(model.graph.outputs)
    seen = [v for v in inputs.values() if not any(v is o for o in outputs)]
    path = client.artifact.directory / "probe.onnx"
    model.graph.outputs.extend(seen)
    try:
        ir.save(model, path, external_data="probe.onnx.data")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    finally:
        del model.graph.outputs[len(outputs) :]
        for leftover in (path, path.with_name("probe.onnx.data")):
            leftover.unlink(missing_ok=True)
    rows = next(iter(client.plan(list(map(len, tokens)))))
    values = dict(zip(inputs, session.run(list(inputs), client.feed(rows, tokens)[0]), strict=True))
    errors = {}
    for p in found:
        x = values[str(p.node.inputs[0].name)]  # type: ignore[union-attr]
        errors[p.name] = error(x.reshape(-1, p.weight.shape[0]), p.weight)
    return {name: value for name, value in errors.items() if value > keep}


def quantize(model: ir.Model, keep: Sequence[str]) -> None:
    """Put int8 in place of every product and large table, in place, but for the products named in `keep`."""
    graph, done = model.graph, dict[str, tuple[ir.Value, ir.Value, ir.Value | None]]()
    for number, product in enumerate(products(graph)):
        if product.name in keep:
            continue
        ops, node = Ops(f"int8_{number}"), product.node
        x = node.inputs[0]
        assert x is not None
        floor = _floor(x)
        if x.name not in done:
            done[str(x.name)] = quantized_lines(ops, ops.reshape(x, -1, product.weight.shape[0]), floor)
        q, scale, shift = done[str(x.name)]
        y = ops("Mul", multiplied(ops, q, product.weight, 128 if floor is None else 0), scale)
        if shift is not None:
            y = ops("Sub", y, ops("Mul", shift, ops.constant_array(restored(product.weight).sum(0))))
        for use in node.outputs[0].uses():  # what comes is `[N, n]`, where `[1, N, n]` may have been split
            if use.node.op_type == "Split" and use.node.attributes["axis"].as_int() == 2:
                use.node.attributes["axis"] = ir.AttrInt64("axis", -1)
        for use in node.outputs[0].uses():
            _apart(graph, ops, use)
        node.outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)
        _replace(graph, node, ops)
    for number, node in enumerate([n for n in graph if n.op_type == "Gather"]):
        table = node.inputs[0].const_value if node.inputs[0] is not None else None
        if (
            table is None
            or len(table.shape) != 2
            or table.size < SMALLEST
            or table.dtype != ir.DataType.FLOAT
        ):
            continue
        ops = Ops(f"table_{number}")
        small, per_row = columns(table.numpy().T, levels=127)
        rows = ops("Cast", ops("Gather", ops.constant_array(small.T), node.inputs[1]), to=ir.DataType.FLOAT)
        y = ops("Mul", rows, ops("Gather", ops.constant_array(per_row[:, None]), node.inputs[1]))
        node.outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)
        _replace(graph, node, ops)
    graph.opset_imports[CONTRIB] = 1
    used = {id(x) for node in ir.traversal.RecursiveGraphIterator(graph) for x in node.inputs}
    for name in [n for n, value in graph.initializers.items() if id(value) not in used]:
        graph.initializers.pop(name)


def _apart(graph: ir.Graph, ops: Ops, use: Any) -> None:
    """Keep ONNX Runtime from fusing a bias with the GELU behind it, which is slower than the two apart: its pattern
    wants the bias in one dimension.
    """
    node, before = use.node, any(n.op_type == "Gelu" for n in use.node.outputs[0].consumers())
    bias = node.inputs[1 - use.idx] if node.op_type == "Add" else None
    if before and bias is not None and bias.const_value is not None and len(bias.const_value.shape) == 1:
        node.replace_input_with(1 - use.idx, ops.constant_array(bias.const_value.numpy()[None]))


def restored(weight: np.ndarray) -> np.ndarray:
    """What is left of a weight `[k, n]`, float32."""
    small, scale = columns(weight)
    return small * scale


def _floor(x: ir.Value) -> float | None:
    """How far under 0 a stream reaches at most, None if nobody knows."""
    node = x.producer()
    while node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return None if node is None else FLOORS.get(node.op_type)


def multiplied(ops: Ops, q: ir.Value, weight: np.ndarray, zero: int = 128) -> ir.Value:
    """Quantised lines, whose 0 is at `zero`, by a weight `[k, n]`, whose eight-bit form `ops` keeps; not yet scaled."""
    small, per_column = columns(weight)
    return ops(
        "MatMulIntegerToFloat",
        *(q, ops.constant_array(small), ops.constant(1, np.float32), ops.constant_array(per_column)),
        *(ops.constant(zero, np.uint8), ops.constant_array(np.zeros(len(per_column), np.int8))),
        domain=CONTRIB,
    )


def quantized_lines(
    ops: Ops, x: ir.Value, floor: float | None = None
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Uint8 of the lines of `x` `[N, k]`, their scales `[N, 1]`, and where they have a floor under 0 what each of their
    numbers is too high by, in units of `x`, `[N, 1]`.
    """
    size = ops("Abs", x) if floor is None else x
    largest = ops("ReduceMax", size, ops.constant([1]), keepdims=0)
    if floor:
        largest = ops("Add", largest, ops.constant(floor, np.float32))
    scale = ops("Mul", largest, ops.constant(1 / (127 if floor is None else 255), np.float32))
    scale = ops("Max", scale, ops.constant(1e-10, np.float32))
    if floor:
        zero = ops("Cast", ops("Round", ops("Div", ops.constant(floor, np.float32), scale)), to=ir.DataType.UINT8)
        shift = ops("Mul", ops("Cast", zero, to=ir.DataType.FLOAT), scale)
        return ops("QuantizeLinear", x, scale, zero, axis=0), ops.unsqueeze(scale, 1), ops.unsqueeze(shift, 1)
    middle = np.array([128 if floor is None else 0], np.uint8)
    zero = ops("ConstantOfShape", ops("Shape", scale), value=ir.tensor(middle))
    return ops("QuantizeLinear", x, scale, zero, axis=0), ops.unsqueeze(scale, 1), None


def _replace(graph: ir.Graph, node: ir.Node, ops: Ops) -> None:
    ops.register(graph)
    graph.insert_before(node, ops.nodes)
    graph.remove(node, safe=True)
