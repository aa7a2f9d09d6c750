"""Padding removed inside the graph.

    NonZero of the mask     → the T real tokens, row by row
    a new (row, number)     → a segment starts; S segments with starts and lengths
    every linear, norm      on [T, hidden]
    attention               segments in length classes (≤ 32, ≤ 64, …), gathered to [S_c, longest_c, hidden] and
                            back by one index; at once where all are of one class
    pooling                 by segment
    answers of a tree       one class more: queries of the answer, keys of the context and the answer

The work is that of the tokens there are, in any arrangement. An empty class holds one token, since Attention
refuses an empty batch. ONNX Runtime fuses Add + LayerNormalization into SkipLayerNormalization, which is slow on
a CPU, wherever it can prove two shapes equal; the number of tokens comes out of NonZero, so it can prove nothing.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir
from tersor.compress.evaluate.pooling import Pooling

from .front import POISON, Attention, Clock, Front, normalized, positions_from, time_of
from .ops import Ops

CLASSES = (32, 64, 128, 256)
"""Bounds that serve all of the lengths that were measured (benchmarks/packing.py)."""
ROW = 1 << 32
"""Segment numbers lie below this, so row · ROW + number is one key."""


class Segments(Front):
    """Padding removed inside the graph, see the module.

    Args:
        ops: where to write.
        mask: int64 `[batch, sequence]`.
        ids: likewise, for a clock that counts ids.
        clock: see `Clock`.
        key_lengths: whether Attention takes lengths of keys (opset 24): 5 to 12 % faster than a mask made of them.
        bounds: of the length classes, rising; one more takes the rest.
        trees: whether negative numbers are segments that go on from the last positive one.
        masked: whether some block's attention needs masks of its own.
    """

    def __init__(
        self,
        ops: Ops,
        mask: ir.Value,
        ids: ir.Value,
        clock: Clock,
        key_lengths: bool,
        bounds: tuple[int, ...],
        trees: bool,
        masked: bool,
    ):
        self._mask, self._key_lengths, self._trees = mask, key_lengths, trees
        self._masks: dict[tuple[int, bool, int], ir.Value] = {}
        width, flat = ops.size(mask, 1), ops.reshape(mask, -1)
        self._index = ops.nonzero(flat)
        signed = ops("Gather", flat, self._index)
        number = ops("Abs", signed) if trees else signed
        row = ops("Div", self._index, width)
        key = ops("Add", ops("Mul", row, ops.constant([ROW])), number)
        before = ops("Concat", ops.constant([-1]), ops.slice(key, 0, -1), axis=0)
        new = ops("Not", ops("Equal", key, before))
        self._segment, self._starts = ops.count(new), ops.nonzero(new)
        total = ops.size(self._index)
        self._lengths = ops("Sub", ops("Concat", ops.slice(self._starts, 1), total, axis=0), self._starts)
        wrong = ops("Less", key, before)
        if trees:
            wrong = ops("Or", wrong, self._root(ops, ops("Less", signed, ops.constant([0])), row))
        self.ids_at = ops("Where", wrong, ops.constant([POISON]), self._index)
        time, origin, runs = time_of(ops, mask, ids, clock)
        ticks = ops("Gather", ops.reshape(time, -1), self._index)
        origins = ops("Gather", ops.reshape(origin, -1), self._index)
        first = ops("Gather", ops("Gather", origins, self._starts), self._segment)
        later = ops("Greater", number, ops.constant([1]))
        position = ops("Sub", ticks, ops("Where", later, first, ops.constant([0])))
        if trees:
            position = self._continued(ops, position)
        if runs is not None:
            runs = ops("Gather", ops.reshape(runs, -1), self._index)
        self.positions = positions_from(ops, position, runs, clock)
        self._classify(ops, total, bounds, masked)

    def _root(self, ops: Ops, branch: ir.Value, row: ir.Value) -> ir.Value:
        """Find the segment that each goes on from, itself for a positive one; bool `[T]`, where there is none."""
        self._branch = ops("Gather", branch, self._starts)
        positive = ops("Not", self._branch)
        rank = ops("Max", ops.count(positive), ops.constant([0]))
        self._roots = ops("Gather", ops.nonzero(positive), rank)
        rows = ops("Gather", row, self._starts)
        elsewhere = ops("Not", ops("Equal", ops("Gather", rows, self._roots), rows))
        behind = ops("Greater", self._roots, ops.range(ops.size(self._starts)))
        return ops("Gather", ops("Or", elsewhere, behind), self._segment)

    def _continued(self, ops: Ops, position: ir.Value) -> ir.Value:
        """Positions that go on where the root of a segment ends."""
        ends = ops("Sub", ops("Add", self._starts, self._lengths), ops.constant([1]))
        following = ops("Add", ops("Gather", position, ops("Gather", ends, self._roots)), ops.constant([1]))
        shift = ops("Where", self._branch, following, ops.constant([0]))
        return ops("Add", position, ops("Gather", shift, self._segment))

    def _classify(self, ops: Ops, total: ir.Value, bounds: tuple[int, ...], masked: bool) -> None:
        self._last, edges = ops("Sub", total, ops.constant([1])), [0, *bounds]
        offset = ops("Sub", ops.range(total), ops("Gather", self._starts, self._segment))
        count = len(edges) + self._trees
        self._branches = [self._trees and part == count - 1 for part in range(count)]

        def classes(ops: Ops) -> list[ir.Value]:
            return self._classes(ops, edges, offset)

        def whole(ops: Ops) -> list[ir.Value]:
            view = self._view(ops, self._starts, longest)
            back = ops("Add", ops("Mul", self._segment, longest), offset)
            none = [ops.constant([[0]]), ops.constant([1])]
            tree = [ops.constant([[0, 0]]), ops.constant([1]), ops.constant([1])]
            return [back, view, self._lengths, *none * (count - 1), *tree * self._trees]

        longest = ops("ReduceMax", ops("Concat", self._lengths, ops.constant([0]), axis=0), keepdims=1)
        self._alone = None if masked else self._one_class(ops, longest, ops.constant(edges))
        found = classes(ops) if self._alone is None else ops.either(self._alone, whole, classes)
        self._back, views, found = found[0], found[1 : 2 * count + 1], found[2 * count + 1 :]
        self._views = list(zip(views[::2], views[1::2], strict=True))
        if self._trees:
            self._keys, self._context, self._longest = found

    def _one_class(self, ops: Ops, longest: ir.Value, edges: ir.Value) -> ir.Value:
        """Whether all segments, one at least, are of one class, and none goes on from another."""
        lengths = self._lengths
        if self._trees:
            lengths = ops("Where", self._branch, ops.constant([0]), lengths)
        shortest = ops("ReduceMin", ops("Concat", lengths, ops.constant([1 << 40]), axis=0), keepdims=1)
        unlike = ops("Xor", ops("Greater", longest, edges), ops("Greater", shortest, edges))
        apart = ops("ReduceMax", ops("Cast", unlike, to=ir.DataType.INT64), keepdims=0)
        return ops("Equal", apart, ops.constant(0))

    def _classes(self, ops: Ops, edges: list[int], offset: ir.Value) -> list[ir.Value]:
        """Lines of the stream in the classes' answers `[T]`; the lines and the lengths of each class; for trees the
        lines of the keys, and the lengths of the contexts and the longest of them.
        """
        self._base, self._places = ops.constant([0]), ops.constant([0])
        found: list[ir.Value] = []
        for low, high in pairwise([*edges, 1 << 40]):
            over = ops("Greater", self._lengths, ops.constant([low]))
            member = ops("And", over, ops("LessOrEqual", self._lengths, ops.constant([high])))
            if self._trees:
                member = ops("And", member, ops("Not", self._branch))
            found += self._enter(ops, member)[2:]
        if self._trees:
            chosen, filler, own, lengths = self._enter(ops, self._branch)
            roots = ops("Gather", self._roots, chosen)
            first = ops("Concat", ops("Gather", self._starts, roots), filler, axis=0)
            context = ops("Concat", ops("Gather", self._lengths, roots), filler, axis=0)
            longest = ops("ReduceMax", context, keepdims=1)
            keys = ops("Concat", self._view(ops, first, longest), own, axis=1)
            found += [own, lengths, keys, context, longest]
        return [ops("Add", ops("Gather", self._places, self._segment), offset), *found]

    def _view(self, ops: Ops, starts: ir.Value, longest: ir.Value) -> ir.Value:
        """Lines of sequences `[sequences, longest]`."""
        lines = ops("Add", ops.unsqueeze(starts, 1), ops.unsqueeze(ops.range(longest), 0))
        return ops("Min", lines, self._last)

    def _enter(self, ops: Ops, member: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """A class of the segments of which `member` `[S]` is true: their numbers, what fills an empty class, their
        lines `[S_c, longest]` and their lengths.
        """
        chosen = ops.nonzero(member)
        empty = ops("Cast", ops("Equal", ops.size(chosen), ops.constant([0])), to=ir.DataType.INT64)
        filler = ops("ConstantOfShape", empty, value=ir.tensor(np.zeros(1, np.int64)))
        first = ops("Concat", ops("Gather", self._starts, chosen), filler, axis=0)
        their = ops("Concat", ops("Gather", self._lengths, chosen), ops("Add", filler, ops.constant([1])), axis=0)
        longest = ops("ReduceMax", their, keepdims=1)
        place = ops("Add", self._base, ops("Mul", ops.count(member), longest))
        self._places = ops("Where", member, place, self._places)
        self._base = ops("Add", self._base, ops("Mul", ops.size(their), longest))
        return chosen, filler, self._view(ops, first, longest), their

    def attend(
        self, ops: Ops, q: ir.Value, k: ir.Value, v: ir.Value, causal: bool, window: int, attention: Attention
    ) -> ir.Value:
        """See `Front`; behind the end of a sequence lie other sequences' lines."""
        parts = range(len(self._views))
        masks = [self._seen(ops, part, causal, window) for part in parts]

        def batch(ops: Ops, part: int) -> ir.Value:
            (view, lengths), mask = self._views[part], masks[part]
            keys = self._keys if self._branches[part] else view
            folded = [ops("Gather", x, at) for x, at in ((q, view), (k, keys), (v, keys))]
            told = self._key_lengths and not causal and mask is None
            return attention(ops, folded, mask, lengths if told else None)

        def classes(ops: Ops) -> list[ir.Value]:
            return [ops("Gather", ops("Concat", *(batch(ops, part) for part in parts), axis=0), self._back)]

        def whole(ops: Ops) -> list[ir.Value]:
            return [ops("Gather", batch(ops, 0), self._back)]

        return (classes(ops) if self._alone is None else ops.either(self._alone, whole, classes))[0]

    def _seen(self, ops: Ops, part: int, causal: bool, window: int) -> ir.Value | None:
        """Who sees whom in a class, None if causality or lengths say it; a window is a distance of positions, which
        differs from one of lines where there are holes.
        """
        branches = self._branches[part]
        if not window and not branches and (causal or self._key_lengths):
            return None
        key = (part, causal, window)
        if key in self._masks:
            return self._masks[key]
        view, lengths = self._views[part]
        columns = ops.range(ops.size(view, 1))
        if causal:
            seen = ops("GreaterOrEqual", ops.unsqueeze(columns, 1), ops.unsqueeze(columns, 0))
        else:
            own = ops("Less", ops.unsqueeze(columns, 0), ops.unsqueeze(lengths, 1))
            square = ops("Concat", ops("Shape", view), ops.size(view, 1), axis=0)
            seen = ops("Expand", ops.unsqueeze(own, 1), square)
        if branches:
            seen = self._with_context(ops, view, seen)
        if window:
            at = ops("Gather", self.positions, view)
            distance = ops("Sub", ops.unsqueeze(at, 2), ops.unsqueeze(at, 1))
            near = ops("Less", distance if causal else ops("Abs", distance), ops.constant([window]))
            seen = ops("And", seen, near)
        self._masks[key] = ops.unsqueeze(seen, 1)
        return self._masks[key]

    def _with_context(self, ops: Ops, view: ir.Value, seen: ir.Value) -> ir.Value:
        """Who sees whom among answers `[q, q]`, and the context before: `[sequences, q, context + q]`."""
        rows = ops("Shape", view)
        own = ops("Expand", seen, ops("Concat", rows, ops.size(view, 1), axis=0))
        columns = ops.range(self._longest)
        theirs = ops("Less", ops.unsqueeze(columns, 0), ops.unsqueeze(self._context, 1))
        context = ops("Expand", ops.unsqueeze(theirs, 1), ops("Concat", rows, self._longest, axis=0))
        return ops("Concat", context, own, axis=2)

    def grid(self, ops: Ops, lines: ir.Value, width: int) -> ir.Value:
        """See `Front`."""
        return ops("Reshape", lines, ops("Concat", ops("Shape", self._mask), ops.constant([width]), axis=0))

    def spread(self, ops: Ops, answer: ir.Value, width: int) -> ir.Value:
        """See `Front`."""
        cells = ops("Shape", ops.reshape(self._mask, -1))
        shape = ops("Concat", cells, ops.constant([width]), axis=0)
        zeros = ops("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.float32)))
        filled = ops("ScatterND", zeros, ops.unsqueeze(self._index, 1), answer)
        return self.grid(ops, filled, width)

    def pool(self, ops: Ops, states: ir.Value, pooling: Pooling) -> ir.Value:
        """Embeddings `[S, width]`, row by row in the order in which segments begin."""
        if pooling.mode == "cls":
            embedding = ops("Gather", states, self._starts)
        else:
            numbers = ops.range(ops("Shape", self._starts))
            own = ops("Equal", ops.unsqueeze(numbers, 1), ops.unsqueeze(self._segment, 0))
            summed = ops("MatMul", ops("Cast", own, to=ir.DataType.FLOAT), states)
            embedding = ops("Div", summed, ops.unsqueeze(ops("Cast", self._lengths, to=ir.DataType.FLOAT), 1))
        return normalized(ops, embedding) if pooling.normalize else embedding
