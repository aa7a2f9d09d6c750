"""A front before a core, attention filled in between, answers laid out behind: one graph with the stock interface."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tersor.compress.evaluate.pooling import Pooling

from .. import runtime
from .cells import Cells
from .core import DOMAIN, attentions
from .front import Clock, Front
from .ops import Ops
from .segments import CLASSES, Segments

PLAIN = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "MatMul", "Gather", "LayerNormalization", "RMSNormalization"),
        *("Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "Sqrt", "Pow", "Cast", "Identity"),
    )
)
"""Operators that treat `[N, n]` as they treat `[1, N, n]`."""


def stitch(
    core: ir.Model,
    pooling: Pooling | None,
    clock: Clock,
    inputs: str,
    head: ir.Model | None = None,
    bounds: tuple[int, ...] = CLASSES,
) -> bool:
    """Make the stock interface around a core, in place; whether it knows trees: packed rows of a model whose every
    block looks at all that came before.

    Args:
        core: from `core.core`.
        pooling: for features; None for logits.
        clock: how the stock model counts positions.
        inputs: `packed`; `padded`, where every number above 0 is the one sequence; or `packed-static`.
        head: from `core.head`, for classes; emptied.
        bounds: of the length classes, see `Segments`.
    """
    graph, ops = core.graph, Ops("front")
    names = ["input_ids", "attention_mask", *(v.name for v in graph.inputs if v.name == "token_type_ids")]
    values = {n: _input(n) for n in names if n is not None}
    windowed = any(node.attributes["window"].value for node in attentions(graph))
    causal = all(node.attributes["causal"].value for node in attentions(graph))
    trees = inputs == "packed" and causal and not windowed
    key_lengths = graph.opset_imports[""] >= 24
    masked = windowed or not (causal or key_lengths)
    mask, ids = values["attention_mask"], values["input_ids"]
    if inputs == "padded":
        shown = ops("Not", ops("Equal", mask, ops.constant(0)))
        mask = ops("Cast", shown, to=ir.DataType.INT64)
    front: Front
    if inputs == "packed-static":
        front = Cells(ops, mask, ids, clock)
    else:
        front = Segments(ops, mask, ids, clock, key_lengths, bounds, trees, masked)
    flat = is_plain(graph)
    for value in list(graph.inputs):
        source = front.positions
        if value.name != "position_ids":
            source = ops("Gather", ops.reshape(values[str(value.name)], -1), front.ids_at)
        whole = ops.unsqueeze(source, 0)
        for use in list(value.uses()):
            as_index = flat and use.node.op_type == "Gather" and use.idx == 1
            use.node.replace_input_with(use.idx, source if as_index else whole)
    ops.register(graph)
    graph.insert_before(graph[0], ops.nodes)
    for number, node in enumerate(attentions(graph)):
        fill(graph, node, front, Ops(f"attention{number}"), flat)
    _answer(graph, front, pooling, inputs, head)
    graph.inputs.clear()
    graph.inputs.extend(values.values())
    graph.opset_imports.pop(DOMAIN, None)
    RemoveUnusedNodesPass()(core)
    return trees


def _input(name: str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))


def _answer(
    graph: ir.Graph, front: Front, pooling: Pooling | None, inputs: str, head: ir.Model | None
) -> None:
    ops, answer, shape = Ops("answer"), graph.outputs[0], graph.outputs[0].shape
    assert shape is not None
    width = int(shape[-1])  # type: ignore[arg-type]
    answer.shape, answer.type = None, None  # it may have lost its leading 1
    graph.outputs.clear()
    lines = ops.reshape(answer, -1, width)
    static = inputs == "packed-static"
    each = ["batch", "sequence"] if static else ["sequences"]
    outputs: list[tuple[str, ir.Value, list[str | int]]] = []
    if head is not None:
        first = ops.unsqueeze(ops.reshape(front.pool(ops, lines, Pooling("cls")), -1, width), 1)
        classes, labels = _inline(graph, ops, head, first)
        if static:
            classes = front.grid(ops, classes, labels)
        outputs.append(("logits", classes, [*each, labels]))
    else:
        name = "logits" if pooling is None else "last_hidden_state"
        outputs.append((name, front.spread(ops, lines, width), ["batch", "sequence", width]))
    if pooling is not None:
        outputs.append(("sentence_embedding", front.pool(ops, lines, pooling), [*each, width]))
    for name, value, dims in outputs:
        value.name, value.shape, value.type = name, ir.Shape(dims), ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(value)
    ops.register(graph)
    graph.extend(ops.nodes)


def _inline(graph: ir.Graph, ops: Ops, inner: ir.Model, value: ir.Value) -> tuple[ir.Value, int]:
    """Move the nodes of a model with one input and one output to where `ops` writes; its output and last dimension."""
    output, shape = inner.graph.outputs[0], inner.graph.outputs[0].shape
    assert shape is not None
    inner.graph.inputs[0].replace_all_uses_with(value)
    inner.graph.outputs.clear()
    for name, weight in list(inner.graph.initializers.items()):
        inner.graph.initializers.pop(name)
        weight.name = f"head_{name}"
        graph.register_initializer(weight)
    nodes = list(inner.graph)
    inner.graph.remove(nodes)
    for node in nodes:
        node.name = f"head_{node.name}"
        for made in node.outputs:
            made.name = f"head_{made.name}"
    ops.nodes += nodes
    return output, int(shape[-1])  # type: ignore[arg-type]


def fill(graph: ir.Graph, node: ir.Node, front: Front, ops: Ops, flat: bool) -> None:
    """Replace a placeholder by attention inside each of the front's batches; `flat` if the stream is `[N, hidden]`."""
    read = {name: attribute.value for name, attribute in node.attributes.items()}
    causal, window = bool(read["causal"]), int(read["window"])
    heads, kv_heads = int(read["heads"]), int(read["kv_heads"])
    sizes = (heads * read["size"], kv_heads * read["size"], kv_heads * read["value_size"])
    q, k, v = (
        lines(ops, x, n, size)
        for x, n, size in zip(node.inputs, (heads, kv_heads, kv_heads), sizes, strict=True)
        if x is not None
    )
    if read["softcap"]:
        runtime.require("soft-capped attention", "export: onnx")

    def attention(ops: Ops, batch: list[ir.Value], mask: ir.Value | None, lengths: ir.Value | None) -> ir.Value:
        mixed = ops(
            "Attention",
            *(*batch, mask, None, None, lengths),
            q_num_heads=heads,
            kv_num_heads=kv_heads,
            scale=read["scale"],
            softcap=read["softcap"],
            is_causal=int(causal and mask is None),
        )
        return ops.reshape(mixed, -1, heads * int(read["value_size"]))

    answer = front.attend(ops, q, k, v, causal, window, attention)
    for use in list(node.outputs[0].uses()):
        if _merges_heads(use.node):
            use.node.outputs[0].replace_all_uses_with(answer if flat else ops.unsqueeze(answer, 0))
        else:
            split = ops.reshape(answer, 1, -1, heads, int(read["value_size"]))
            use.node.replace_input_with(use.idx, split)
    ops.register(graph)
    graph.insert_before(node, ops.nodes)


def lines(ops: Ops, x: ir.Value, heads: int, width: int) -> ir.Value:
    """`[1, heads, N, d]` as `[N, heads · d]`, without the Transpose that led there where it can be seen."""
    node = x.producer()
    source = None if node is None else node.inputs[0]
    if node is None or source is None:
        return ops.reshape(ops("Transpose", x, perm=[0, 2, 1, 3]), -1, width)
    if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]:
        return ops.reshape(source, -1, width)
    if node.op_type == "RotaryEmbedding" and not node.domain:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()} | {
            "num_heads": heads
        }
        whole = ops.unsqueeze(lines(ops, source, heads, width), 0)
        return ops.squeeze(ops("RotaryEmbedding", whole, *node.inputs[1:], **attributes))
    return ops.reshape(ops("Transpose", x, perm=[0, 2, 1, 3]), -1, width)


def _merges_heads(node: ir.Node) -> bool:
    shape = node.inputs[1] if node.op_type == "Reshape" else None
    return shape is not None and shape.const_value is not None and shape.const_value.size == 3


def is_plain(graph: ir.Graph) -> bool:
    """Whether the core's stream may lose its leading 1: only operators that do not mind touch it.

    What splits and rotates heads before a placeholder, and what makes the angles, keep their shapes.
    """
    spared: set[int] = set()
    for node in graph:
        if node.domain == DOMAIN:
            spared |= {id(n) for n in (node, *_before(node), *(use.node for use in node.outputs[0].uses()))}
    stream: set[int] = set()
    for node in graph:
        table = node.op_type == "Gather" and node.inputs[1] in graph.inputs
        ids = any(x is v for x in node.inputs for v in graph.inputs if v.name != "position_ids")
        if (
            table
            or ids
            or any(x is not None and id(x.producer()) in stream for x in node.inputs if x is not None)
        ):
            stream.add(id(node))
    return all(n.op_type in PLAIN for n in graph if id(n) in stream and id(n) not in spared)


def _before(node: ir.Node) -> list[ir.Node]:
    found, todo = [], [x.producer() for x in node.inputs if x is not None]
    while todo:
        one = todo.pop()
        if (
            one is not None
            and one.op_type in ("Reshape", "Transpose", "RotaryEmbedding")
            and one.inputs[0] is not None
        ):
            found.append(one)
            todo.append(one.inputs[0].producer())
    return found
