"""A decoder with its cache as inputs and outputs: one graph for prefill and for every token after it.

The tracer sees a model without a cache (core.py leaves attention open); here every placeholder becomes one
GroupQueryAttention, ONNX Runtime's own operator, which appends to the cache, masks causally and by window, and caps.
Against the tracer's own form of a DynamicCache (Concat, Transpose, Attention) that is fewer nodes a layer, and the
caller may hand in a buffer longer than the past that is also the output: then nothing is copied. It wants heads of a
multiple of 8; others get the standard Attention with its cache and an explicit mask.

    input_ids, position_ids  [batch, sequence]              attention_mask  [batch, past + sequence]
    past_key_values.{i}.key, .value  [batch, kv_heads, past, head_dim]
    logits  [batch, sequence, vocab]                        present.{i}.key, .value

Padding may lie anywhere in attention_mask: it becomes a finite bias, because a row of nothing but padding must not
turn into NaN, which the next layer would carry to real rows as 0 · NaN. Rotations stay outside the operator: inside,
it takes a prompt's positions to be consecutive, and left padding is not. The operator takes several new tokens on top
of a past for one sequence at a time only; a prompt, and single tokens, for any number.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import RecipeError

from . import runtime
from .build import fill
from .graph import trace
from .graph.core import DOMAIN, TRACED, Core, attentions
from .graph.ops import CONTRIB, Ops
from .mixture.choice import Precision, Word

HIDDEN = -1e30
"""What is added to a score that padding must not have: finite, and nothing is left of it after softmax."""
GROUPED = 8
"""GroupQueryAttention wants heads of a multiple of this."""
LINEAR = frozenset(["MatMul", "Add", "Mul", "Split", "Slice", "Clip"])
"""Operators whose result keeps `[batch, sequence, width]`."""


def names(depth: int, before: bool) -> list[str]:
    """The cache's inputs (`before`) or outputs, key and value by layer."""
    stem = "past_key_values" if before else "present"
    return [f"{stem}.{i}.{kind}" for i in range(depth) for kind in ("key", "value")]


def cached(
    checkpoint: Checkpoint, opset: int, word: Word = "auto", precision: Precision = "float32"
) -> tuple[ir.Model, dict[str, Any]]:
    """The graph, without metadata, and what artifact.json says of a mixture's experts.

    Args:
        checkpoint: not changed.
        opset: of the default domain.
        word: how experts run.
        precision: of experts.

    Raises:
        RecipeError: a block computes its attention where it cannot be seen, or in a form without a cached operator.
        PreflightError: ONNX Runtime is too old for windows.
    """
    module, depth = checkpoint.model(torch.float32), checkpoint.layout.depth
    module.config.use_cache = False
    ids = torch.arange(14).reshape(2, 7) % 7
    model = trace.trace(Core(module, False), [ids, ids.clone()], ["input_ids", "position_ids"], ["logits"], TRACED)
    model.graph.opset_imports[""] = opset
    routed = fill(checkpoint, model, word, precision)
    placeholders = attentions(model.graph)
    if len(placeholders) != depth:
        raise RecipeError("export: onnx-decoder", f"{len(placeholders)} attentions in {depth} blocks", "one in each")
    CommonSubexpressionEliminationPass()(model)
    _interface(model, placeholders)
    RemoveUnusedNodesPass()(model)
    return model, routed


class Front:
    """What every layer's attention needs beside q, k, v, made once."""

    def __init__(self, mask: ir.Value, ids: ir.Value):
        self.ops, self._mask, self._ids = Ops("cache"), mask, ids
        self._masks: dict[int, ir.Value] = {}

    @cached_property
    def lengths(self) -> tuple[ir.Value, ir.Value]:
        """Int32: total − 1 for every sequence, and total."""
        ops = self.ops
        total = ops("Cast", ops.size(self._mask, 1), to=ir.DataType.INT32)
        last = ops("Sub", total, ops.constant([1], np.int32))
        return ops("Expand", last, ops.size(self._mask, 0)), ops.squeeze(total)

    @cached_property
    def bias(self) -> ir.Value:
        """0 or, at padding, `HIDDEN`, `[batch, 1, sequence, total]`."""
        ops = self.ops
        empty = ops("Cast", ops("Equal", self._mask, ops.constant(0)), to=ir.DataType.FLOAT)
        bias = ops("Unsqueeze", ops("Mul", empty, ops.constant(HIDDEN, np.float32)), ops.constant([1, 2]))
        rows = ops.size(self._ids, 1)
        return ops("Expand", bias, ops("Concat", ops.constant([1, 1]), rows, ops.constant([1]), axis=0))

    def mask(self, window: int) -> ir.Value:
        """The same with what lies ahead, and what lies `window` or more behind, hidden too."""
        if window not in self._masks:
            ops = self.ops
            column = ops.range(ops.size(self._mask, 1))
            row = ops.range(ops.size(self._ids, 1))
            past = ops("Sub", ops.size(self._mask, 1), ops.size(self._ids, 1))
            behind = ops("Sub", ops.unsqueeze(ops("Add", row, past), 1), column)
            hidden = ops("Less", behind, ops.constant(0))
            if window:
                hidden = ops("Or", hidden, ops("GreaterOrEqual", behind, ops.constant(window)))
            extra = ops("Mul", ops("Cast", hidden, to=ir.DataType.FLOAT), ops.constant(HIDDEN, np.float32))
            self._masks[window] = ops("Add", self.bias, extra)
        return self._masks[window]


def _interface(model: ir.Model, placeholders: list[ir.Node]) -> None:
    graph = model.graph
    mask = _value("attention_mask", ir.DataType.INT64, ["batch", "total"])
    front, first = Front(mask, next(v for v in graph.inputs if v.name == "input_ids")), graph[0]
    graph.inputs.insert(1, mask)
    for number, node in enumerate(placeholders):
        _fill(graph, node, number, front)
    front.ops.register(graph)
    graph.insert_before(first, front.ops.nodes)
    graph.opset_imports.pop(DOMAIN, None)
    graph.opset_imports[CONTRIB] = 1


def _value(name: str, dtype: ir.DataType, dims: list[str | int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))


def _fill(graph: ir.Graph, node: ir.Node, number: int, front: Front) -> None:
    read = {name: attribute.value for name, attribute in node.attributes.items()}
    heads, kv_heads, size = int(read["heads"]), int(read["kv_heads"]), int(read["size"])
    if not read["causal"] or read["value_size"] != size:
        found = "attention that is not causal" if not read["causal"] else "values of another width than keys"
        raise RecipeError("export: onnx-decoder", found, "causal attention with heads of one width")
    ops = Ops(f"attention{number}")
    rows = [
        _rows(ops, x, n, n * size)
        for x, n in zip(node.inputs, (heads, kv_heads, kv_heads), strict=True)
        if x is not None
    ]
    past, present = (
        [
            _value(f"{stem}.{number}.{kind}", ir.DataType.FLOAT, ["batch", kv_heads, length, size])
            for kind in ("key", "value")
        ]
        for stem, length in (("past_key_values", "past"), ("present", "total"))
    )
    window, shared = int(read["window"]), {"scale": float(read["scale"]), "softcap": float(read["softcap"])}
    if window:
        runtime.require("a window in a graph with a cache", "export: onnx-decoder")
    if size % GROUPED == 0:
        made = ir.node(
            "GroupQueryAttention",
            [*rows, *past, *front.lengths, None, None, None, front.bias],
            {**shared, "num_heads": heads, "kv_num_heads": kv_heads, "local_window_size": window or -1},
            domain=CONTRIB,
            num_outputs=3,
        )
    else:
        made = ir.node(
            "Attention",
            [*rows, front.mask(window), *past],
            {**shared, "q_num_heads": heads, "kv_num_heads": kv_heads},
            num_outputs=3,
        )
    made.name, answer = f"{ops.prefix}_node", made.outputs[0]
    answer.name = f"{ops.prefix}_answer"
    for value, described in zip(made.outputs[1:], present, strict=True):
        value.name, value.shape, value.type = described.name, described.shape, described.type
    ops.nodes.append(made)
    for use in list(node.outputs[0].uses()):
        if use.node.op_type != "Reshape":
            use.node.replace_input_with(use.idx, ops("Reshape", answer, ops.constant([0, 0, heads, size])))
        elif _rank(use.node.inputs[1]) == 3:  # it merges the heads, which is done
            use.node.outputs[0].replace_all_uses_with(answer)
        else:
            use.node.replace_input_with(use.idx, answer)
    ops.register(graph)
    graph.insert_before(node, ops.nodes)
    graph.inputs.extend(past)
    graph.outputs.extend(made.outputs[1:])


def _rank(shape: ir.Value | None) -> int:
    """How many dimensions a shape has, of those that the tracer writes; 0 if unknown."""
    if shape is None:
        return 0
    if shape.const_value is not None:
        return int(shape.const_value.size)
    maker = shape.producer()
    return len(maker.inputs) if maker is not None and maker.op_type == "Concat" else 0


def _rows(ops: Ops, x: ir.Value, heads: int, width: int) -> ir.Value:
    """`[batch, heads, sequence, d]` as `[batch, sequence, heads · d]`, without steps that led there if they show."""
    node = x.producer()
    source = None if node is None else node.inputs[0]
    if node is not None and source is not None:
        if _is_split(node):
            split = source.producer()
            before = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
            maker = None if before is None else before.producer()
            if before is not None and maker is not None and maker.op_type in LINEAR:
                return before
        if node.op_type == "RotaryEmbedding" and not node.domain:
            attributes = {name: attribute.value for name, attribute in node.attributes.items()} | {"num_heads": heads}
            return ops("RotaryEmbedding", _rows(ops, source, heads, -1), *node.inputs[1:], **attributes)
    split4 = _split(ops, x, heads)
    if width > 0:
        return ops.reshape(split4, 0, 0, width)
    flat = ops("Concat", ops("Shape", split4, start=0, end=2), ops.constant([-1]), axis=0)
    return ops("Reshape", split4, flat)


def _split(ops: Ops, x: ir.Value, heads: int) -> ir.Value:
    """`[batch, heads, sequence, d]` as `[batch, sequence, heads, d]`.

    A rotation of a part of each head, which the tracer writes on the former, goes through rows too.
    """
    node = x.producer()
    if node is not None and _is_split(node):
        assert node.inputs[0] is not None
        return node.inputs[0]
    if node is not None and node.op_type == "Concat" and node.attributes["axis"].as_int() in (-1, 3):
        return ops("Concat", *(_split(ops, part, heads) for part in node.inputs if part is not None), axis=-1)
    if node is not None and node.op_type == "RotaryEmbedding" and not node.domain:
        return ops("Reshape", _rows(ops, x, heads, -1), ops.constant([0, 0, heads, -1]))
    return ops("Transpose", x, perm=[0, 2, 1, 3])


def _is_split(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]
