"""Padding removed inside the graph: the core runs on the real tokens only, whatever the rows look like.

Same interface as rows.py (0 is padding, k ≥ 1 the segment's number; segment 1 counts from column 0). In the graph:

    NonZero of the mask          → the T real tokens, row by row
    a new (row, number)          → a segment starts; S segments with starts and lengths
    every linear, norm, GELU     on [T, hidden]
    attention                    segments in length classes (≤ 32, ≤ 64, …): rows gathered to [S_c, longest_c, hidden],
                                 standard Attention with key lengths, gathered back by one index
    pooling                      by segment
    the answer                   scattered to [batch, sequence, …], zero at padding

The work is that of the tokens there are, in any arrangement. An empty class holds one token, since Attention refuses
an empty batch. Numbers must rise
along a row; where they fall, the first Gather gets an index that no vocabulary has and the call fails, rather than
answer for segments that lie in pieces.

ONNX Runtime fuses Add + LayerNormalization into SkipLayerNormalization, which is slow on a CPU, wherever it can prove
two shapes equal. Here the number of tokens comes out of NonZero, and it can prove nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .core import DOMAIN
from .ops import Ops
from .pooling import Pooling

CLASSES = (32, 64, 128, 256)
POISON = 1 << 40
ROW = 1 << 32
"""Segment numbers lie below this, so row · ROW + number is one key."""
PLAIN = frozenset(
    """Add Sub Mul Div MatMul Gather LayerNormalization RMSNormalization Gelu Relu Sigmoid Tanh Erf Sqrt Pow Cast
    Identity""".split()
)
"""Operators that treat `[T, n]` as they treat `[1, T, n]`."""


@dataclass(frozen=True)
class Class:
    """Segments of similar length: `view` `[S_c, L_c]` indexes their tokens, `lengths` `[S_c]` counts them."""

    view: ir.Value
    lengths: ir.Value


@dataclass(frozen=True)
class Tokens:
    """What the graph knows of its tokens.

    `index` `[T]` flat place; `positions` `[T]`; `segment` `[T]`; `starts`, `lengths` `[S]`; `classes`; `back` `[T]`
    place of each token in the classes laid end to end.
    """

    index: ir.Value
    positions: ir.Value
    segment: ir.Value
    starts: ir.Value
    lengths: ir.Value
    classes: list[Class]
    back: ir.Value


def unpad(ops: Ops, mask: ir.Value, bounds: tuple[int, ...]) -> Tokens:
    """Find tokens, segments and length classes in `mask` (int64 `[batch, sequence]`)."""
    width, flat = ops.size(mask, 1), ops.reshape(mask, -1)
    index = ops.nonzero(flat)
    number = ops("Gather", flat, index)
    row = ops("Div", index, width)
    column = ops("Sub", index, ops("Mul", row, width))
    key = ops("Add", ops("Mul", row, ops.constant([ROW])), number)
    before = ops("Concat", ops.constant([-1]), ops.slice(key, 0, -1), axis=0)
    new = ops("Not", ops("Equal", key, before))
    segment, starts = ops.count(new), ops.nonzero(new)
    total = ops.size(index)
    lengths = ops("Sub", ops("Concat", ops.slice(starts, 1), total, axis=0), starts)
    origin = ops("Gather", ops("Gather", column, starts), segment)
    later = ops("Greater", number, ops.constant([1]))
    positions = ops("Sub", column, ops("Where", later, origin, ops.constant([0])))
    falls = ops("Less", key, before)
    index = ops("Where", falls, ops.constant([POISON]), index)
    classes, back = classify(ops, starts, lengths, segment, total, bounds)
    return Tokens(index, positions, segment, starts, lengths, classes, back)


def classify(
    ops: Ops, starts: ir.Value, lengths: ir.Value, segment: ir.Value, total: ir.Value, bounds: tuple[int, ...]
) -> tuple[list[Class], ir.Value]:
    """Length classes up to each bound and one for the rest, and every token's place in them laid end to end."""
    last, edges = ops("Sub", total, ops.constant([1])), [0, *bounds, 1 << 40]
    classes, base, places = [], ops.constant([0]), None
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        over = ops("Greater", lengths, ops.constant([low]))
        member = ops("And", over, ops("LessOrEqual", lengths, ops.constant([high])))
        chosen = ops.nonzero(member)
        empty = ops("Cast", ops("Equal", ops.size(chosen), ops.constant([0])), to=ir.DataType.INT64)
        filler = ops("ConstantOfShape", empty, value=ir.tensor(np.zeros(1, np.int64)))
        first = ops("Concat", ops("Gather", starts, chosen), filler, axis=0)
        their = ops("Concat", ops("Gather", lengths, chosen), ops("Add", filler, ops.constant([1])), axis=0)
        longest = ops("ReduceMax", their, keepdims=1)
        view = ops("Min", ops("Add", ops.unsqueeze(first, 1), ops.unsqueeze(ops.range(longest), 0)), last)
        classes.append(Class(view, their))
        place = ops("Add", base, ops("Mul", ops.count(member), longest))
        places = place if places is None else ops("Where", member, place, places)
        base = ops("Add", base, ops("Mul", ops.size(their), longest))
    assert places is not None
    offset = ops("Sub", ops.range(total), ops("Gather", starts, segment))
    return classes, ops("Add", ops("Gather", places, segment), offset)


class Attention:
    """Fills in the placeholders, all in one graph.

    From opset 24 Attention takes the lengths of keys, which is 5 to 12 % faster than a mask made of them.
    """

    def __init__(self, ops: Ops, tokens: Tokens, lengths: bool):
        self.ops, self.tokens, self.lengths = ops, tokens, lengths
        self._masks: dict[tuple[int, int, int], ir.Value] = {}

    def mask(self, number: int, causal: int, window: int) -> ir.Value:
        """Who sees whom in class `number`, bool `[S_c, 1, L_c, L_c]`; a window is a distance of positions."""
        key = (number, causal, window)
        if key in self._masks:
            return self._masks[key]
        ops, chosen = self.ops, self.tokens.classes[number]
        columns = ops.range(ops.size(chosen.view, 1))
        if causal:
            seen = ops("GreaterOrEqual", ops.unsqueeze(columns, 1), ops.unsqueeze(columns, 0))
        else:
            own = ops("Less", ops.unsqueeze(columns, 0), ops.unsqueeze(chosen.lengths, 1))
            square = ops("Concat", ops("Shape", chosen.view), ops.size(chosen.view, 1), axis=0)
            seen = ops("Expand", ops.unsqueeze(own, 1), square)
        if window:
            at = ops("Gather", self.tokens.positions, chosen.view)
            distance = ops("Sub", ops.unsqueeze(at, 2), ops.unsqueeze(at, 1))
            near = ops("Less", distance if causal else ops("Abs", distance), ops.constant([window]))
            seen = ops("And", seen, near)
        self._masks[key] = ops.unsqueeze(seen, 1)
        return self._masks[key]

    def rows(self, x: ir.Value, heads: int) -> ir.Value:
        """`[1, heads, T, d]` as `[T, heads · d]`, by undoing what led there where it can be seen."""
        ops, node = self.ops, x.producer()
        if node is not None and node.op_type == "Transpose" and _perm(node) == [0, 2, 1, 3]:
            split = node.inputs[0]
            inner = split.producer() if split is not None else None
            if inner is not None and inner.op_type == "Reshape" and inner.inputs[0] is not None:
                return ops.reshape(inner.inputs[0], -1, self._width(inner))
        if node is not None and node.op_type == "RotaryEmbedding" and node.inputs[0] is not None:
            flat = ops.unsqueeze(self.rows(node.inputs[0], heads), 0)
            attributes = {k: a.value for k, a in node.attributes.items()} | {"num_heads": heads}
            return ops.squeeze(ops("RotaryEmbedding", flat, *node.inputs[1:], **attributes))
        merged = ops("Transpose", x, perm=[0, 2, 1, 3])
        return ops.squeeze(ops("Reshape", merged, ops.constant([0, 0, -1])))

    @staticmethod
    def _width(reshape: ir.Node) -> int:
        shape = reshape.inputs[1]
        assert shape is not None
        assert shape.const_value is not None
        *_, heads, size = shape.const_value.numpy().tolist()
        return int(heads * size)

    def fill(self, node: ir.Node) -> ir.Value:
        """Attention's answer `[T, heads · d]` for a placeholder."""
        ops = self.ops
        causal, window = node.attributes["causal"].as_int(), node.attributes["window"].as_int()
        heads, kv_heads = node.attributes["heads"].as_int(), node.attributes["kv_heads"].as_int()
        scale = node.attributes["scale"].as_float()
        flat = [
            self.rows(x, n) for x, n in zip(node.inputs, (heads, kv_heads, kv_heads), strict=True) if x is not None
        ]
        parts = []
        for number, chosen in enumerate(self.tokens.classes):
            q, k, v = (ops("Gather", x, chosen.view) for x in flat)
            by_length = self.lengths and not causal and not window
            mask = None if by_length or (causal and not window) else self.mask(number, causal, window)
            out = ops(
                "Attention",
                *(q, k, v, mask, None, None, chosen.lengths if by_length else None),
                q_num_heads=heads,
                kv_num_heads=kv_heads,
                scale=scale,
                is_causal=int(causal and not window),
            )
            parts.append(ops("Reshape", out, ops("Concat", ops.constant([-1]), ops.size(out, 2), axis=0)))
        joined = ops("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
        return ops("Gather", joined, self.tokens.back)


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def fill(graph: ir.Graph, tokens: Tokens, flat: bool) -> None:
    """Replace every placeholder of the core; `flat` if its stream is `[T, hidden]`."""
    attention: Attention | None = None
    for number, node in enumerate([n for n in graph if n.domain == DOMAIN]):
        ops = Ops(f"attention{number}")
        if attention is None:
            attention = Attention(ops, tokens, lengths=graph.opset_imports[""] >= 24)
        attention.ops = ops
        answer = attention.fill(node)
        split = ops.unsqueeze(answer, 0)
        for use in list(node.outputs[0].uses()):
            follower = use.node
            if follower.op_type == "Reshape" and _is_merge(follower):
                follower.outputs[0].replace_all_uses_with(answer if flat else split)
            else:
                heads = node.attributes["heads"].as_int()
                follower.replace_input_with(use.idx, ops.reshape(answer, 1, -1, heads, _size(node)))
        ops.register(graph)
        graph.insert_before(node, ops.nodes)


def _is_merge(node: ir.Node) -> bool:
    shape = node.inputs[1]
    return shape is not None and shape.const_value is not None and shape.const_value.size == 3


def _size(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    assert shape is not None
    return int(shape[3])  # type: ignore[arg-type]


def is_plain(graph: ir.Graph) -> bool:
    """Whether the core's stream may lose its leading 1: only operators that do not mind touch it.

    The heads' Reshape and Transpose and the rotary embedding are between the stream and a placeholder and keep their
    shapes; the angles' inputs keep theirs too.
    """
    around = set()
    for node in graph:
        if node.domain == DOMAIN:
            around |= {id(n) for n in _behind(node)}
            around |= {id(use.node) for use in node.outputs[0].uses()}
    angles = {id(n) for n in graph if not _on_stream(n, graph)}
    return all(n.domain == DOMAIN or n.op_type in PLAIN or id(n) in around | angles for n in graph)


def _behind(node: ir.Node) -> list[ir.Node]:
    """The Reshapes, Transposes and rotations that feed a placeholder."""
    found, todo = [], [x.producer() for x in node.inputs if x is not None]
    while todo:
        one = todo.pop()
        if one is not None and one.op_type in ("Reshape", "Transpose", "RotaryEmbedding"):
            found.append(one)
            todo.append(one.inputs[0].producer() if one.inputs[0] is not None else None)
    return found


def _on_stream(node: ir.Node, graph: ir.Graph) -> bool:
    """Whether a node depends on anything but `position_ids` used for angles (not as a table's index)."""
    todo, seen = [node], set()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        for value in one.inputs:
            if value is None:
                continue
            if value is graph.inputs[0] or (value in graph.inputs and one.op_type == "Gather"):
                return True
            producer = value.producer()
            if producer is not None:
                todo.append(producer)
    return False


def stitch(core: ir.Model, pooling: Pooling | None, bounds: tuple[int, ...] = CLASSES) -> None:
    """Make the stock interface around a core, in place: unpadding in front, answers scattered behind.

    Args:
        core: from `core.core`; its answer has `width` columns.
        pooling: for features; None for logits.
        bounds: upper bounds of the length classes, rising; one more class takes the rest.
    """
    graph, before = core.graph, Ops("unpad")
    names = ["input_ids", "attention_mask", *(v.name for v in graph.inputs if v.name == "token_type_ids")]
    inputs = {n: _input(n) for n in names if n is not None}
    tokens = unpad(before, inputs["attention_mask"], bounds)
    flat = is_plain(graph)
    for value in list(graph.inputs):
        if value.name == "position_ids":
            source = tokens.positions
        else:
            source = before("Gather", before.reshape(inputs[str(value.name)], -1), tokens.index)
        whole = before.unsqueeze(source, 0)
        for use in list(value.uses()):
            as_table = flat and use.node.op_type == "Gather" and use.idx == 1
            use.node.replace_input_with(use.idx, source if as_table else whole)
    before.register(graph)
    graph.insert_before(graph[0], before.nodes)
    fill(graph, tokens, flat)
    behind = Ops("answer")
    answer, shape = graph.outputs[0], graph.outputs[0].shape
    assert shape is not None
    width = int(shape[-1])  # type: ignore[arg-type]
    graph.outputs.clear()
    states = behind.reshape(answer, -1, width)
    outputs = [(spread(behind, states, tokens, inputs["attention_mask"], width), ["batch", "sequence", width])]
    if pooling is not None:
        outputs.append((pool(behind, states, tokens, pooling), ["sequences", width]))
    output_names = ["logits"] if pooling is None else ["last_hidden_state", "sentence_embedding"]
    for (value, dims), name in zip(outputs, output_names, strict=True):
        value.name, value.shape, value.type = name, ir.Shape(dims), ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(value)
    behind.register(graph)
    graph.extend(behind.nodes)
    graph.inputs.clear()
    graph.inputs.extend(inputs.values())
    graph.opset_imports.pop(DOMAIN, None)
    RemoveUnusedNodesPass()(core)


def _input(name: str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))


def spread(ops: Ops, states: ir.Value, tokens: Tokens, mask: ir.Value, width: int) -> ir.Value:
    """`[T, width]` back to `[batch, sequence, width]`, zero at padding."""
    cells = ops("Shape", ops.reshape(mask, -1))
    shape = ops("Concat", cells, ops.constant([width]), axis=0)
    zeros = ops("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.float32)))
    filled = ops("ScatterND", zeros, ops.unsqueeze(tokens.index, 1), states)
    return ops("Reshape", filled, ops("Concat", ops("Shape", mask), ops.constant([width]), axis=0))


def pool(ops: Ops, states: ir.Value, tokens: Tokens, pooling: Pooling) -> ir.Value:
    """One embedding a segment, `[S, width]`."""
    if pooling.mode == "cls":
        embedding = ops("Gather", states, tokens.starts)
    else:
        numbers = ops.range(ops("Shape", tokens.starts))
        own = ops("Equal", ops.unsqueeze(numbers, 1), ops.unsqueeze(tokens.segment, 0))
        summed = ops("MatMul", ops("Cast", own, to=ir.DataType.FLOAT), states)
        embedding = ops("Div", summed, ops.unsqueeze(ops("Cast", tokens.lengths, to=ir.DataType.FLOAT), 1))
    if pooling.normalize:
        norm = ops("ReduceL2", embedding, ops.constant([1]), keepdims=1)
        embedding = ops("Div", embedding, ops("Max", norm, ops.constant(1e-12, np.float32)))
    return embedding
