"""What lies between the stock interface and the core: which cells are tokens, their positions, their neighbours.

Interface: `input_ids`, `attention_mask` (and `token_type_ids` where the architecture has them), int64
`[batch, sequence]`. In `attention_mask` 0 is padding and k ≥ 1 the number of the segment in its row (Krell et al.,
2107.02027), so a plain 0/1 mask is the ordinary case. Numbers must rise along a row; where they fall, the first
Gather gets an index that no row has and the call fails, rather than answer for segments that lie in pieces.

    position(i)   = clock(i)                         in segment 1
                    clock(i) − clock(first of k)     in segment k ≥ 2

The clock is what the stock model counts under a plain mask: columns, tokens that the mask shows (OPT), or ids that
are not the padding id (RoBERTa); the architecture says which. Left padding and holes are therefore stock-exact
instead of silently moved. Resetting `position_ids` under an all-ones mask, the usual shortcut, leaks across segments.

`Segments` runs the core on the real tokens only; `Cells` runs it on every cell, with fixed shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import onnx_ir as ir

from .ops import Ops
from .pooling import Pooling

CLASSES = (32, 64, 128, 256)
POISON = 1 << 40
ROW = 1 << 32
"""Segment numbers lie below this, so row · ROW + number is one key."""


@dataclass(frozen=True)
class Clock:
    """What position ids count, and the id that they start from."""

    counts: Literal["columns", "mask", "ids"] = "columns"
    first: int = 0
    """Position id of a sequence's first token; with `ids` one above the padding id, by transformers' convention."""


class Front(ABC):
    """One way to lay rows before the core, N lines of its stream at a time.

    Attributes:
        ids_at: int64 `[N]`, flat places of the lines' tokens, poisoned where numbers fall.
        positions: int64 `[N]`.
    """

    ids_at: ir.Value
    positions: ir.Value

    @abstractmethod
    def fold(self, ops: Ops, x: ir.Value) -> list[ir.Value]:
        """`[N, n]` as batches `[sequences, length, n]` inside which attention happens."""

    @abstractmethod
    def unfold(self, ops: Ops, parts: list[ir.Value]) -> ir.Value:
        """The inverse of `fold`."""

    @abstractmethod
    def mask(self, ops: Ops, part: int, causal: bool, window: int) -> ir.Value | None:
        """Who sees whom in a batch, bool `[sequences, 1, length, length]`; None if causality or lengths say it."""

    @abstractmethod
    def lengths(self, part: int) -> ir.Value | None:
        """Tokens of each sequence in a batch, if padding at the end is all there is to hide."""

    @abstractmethod
    def spread(self, ops: Ops, answer: ir.Value, width: int) -> ir.Value:
        """`[N, width]` as `[batch, sequence, width]`, zero at padding."""

    @abstractmethod
    def grid(self, ops: Ops, lines: ir.Value, width: int) -> ir.Value:
        """`[…, width]` by cell as `[batch, sequence, width]`."""

    @abstractmethod
    def pool(self, ops: Ops, states: ir.Value, pooling: Pooling) -> ir.Value:
        """One embedding a segment."""


class Segments(Front):
    """Padding removed inside the graph.

        NonZero of the mask     → the T real tokens, row by row
        a new (row, number)     → a segment starts; S segments with starts and lengths
        every linear, norm      on [T, hidden]
        attention               segments in length classes (≤ 32, ≤ 64, …), gathered to [S_c, longest_c, hidden] and
                                back by one index
        pooling                 by segment

    The work is that of the tokens there are, in any arrangement. An empty class holds one token, since Attention
    refuses an empty batch. ONNX Runtime fuses Add + LayerNormalization into SkipLayerNormalization, which is slow on
    a CPU, wherever it can prove two shapes equal; the number of tokens comes out of NonZero, so it can prove nothing.

    Args:
        ops: where to write.
        mask: int64 `[batch, sequence]`.
        ids: likewise, for a clock that counts ids.
        clock: see `Clock`.
        key_lengths: whether Attention takes lengths of keys (opset 24): 5 to 12 % faster than a mask made of them.
        bounds: of the length classes, rising; one more takes the rest.
    """

    def __init__(
        self,
        ops: Ops,
        mask: ir.Value,
        ids: ir.Value,
        clock: Clock,
        key_lengths: bool = True,
        bounds: tuple[int, ...] = CLASSES,
    ):
        self._mask, self._key_lengths = mask, key_lengths
        self._masks: dict[tuple[int, bool, int], ir.Value] = {}
        width, flat = ops.size(mask, 1), ops.reshape(mask, -1)
        self._index = ops.nonzero(flat)
        number = ops("Gather", flat, self._index)
        row = ops("Div", self._index, width)
        key = ops("Add", ops("Mul", row, ops.constant([ROW])), number)
        before = ops("Concat", ops.constant([-1]), ops.slice(key, 0, -1), axis=0)
        new = ops("Not", ops("Equal", key, before))
        self._segment, self._starts = ops.count(new), ops.nonzero(new)
        total = ops.size(self._index)
        self._lengths = ops("Sub", ops("Concat", ops.slice(self._starts, 1), total, axis=0), self._starts)
        self.ids_at = ops("Where", ops("Less", key, before), ops.constant([POISON]), self._index)
        time, origin, runs = _time(ops, mask, ids, clock)
        ticks = ops("Gather", ops.reshape(time, -1), self._index)
        origins = ops("Gather", ops.reshape(origin, -1), self._index)
        first = ops("Gather", ops("Gather", origins, self._starts), self._segment)
        later = ops("Greater", number, ops.constant([1]))
        position = ops("Sub", ticks, ops("Where", later, first, ops.constant([0])))
        if runs is not None:
            runs = ops("Gather", ops.reshape(runs, -1), self._index)
        self.positions = _from(ops, position, runs, clock)
        self._classify(ops, total, bounds)

    def _classify(self, ops: Ops, total: ir.Value, bounds: tuple[int, ...]) -> None:
        last, edges = ops("Sub", total, ops.constant([1])), [0, *bounds, 1 << 40]
        self._views: list[tuple[ir.Value, ir.Value]] = []
        base, places = ops.constant([0]), None
        for low, high in pairwise(edges):
            over = ops("Greater", self._lengths, ops.constant([low]))
            member = ops("And", over, ops("LessOrEqual", self._lengths, ops.constant([high])))
            chosen = ops.nonzero(member)
            empty = ops("Cast", ops("Equal", ops.size(chosen), ops.constant([0])), to=ir.DataType.INT64)
            filler = ops("ConstantOfShape", empty, value=ir.tensor(np.zeros(1, np.int64)))
            first = ops("Concat", ops("Gather", self._starts, chosen), filler, axis=0)
            their = ops(
                "Concat", ops("Gather", self._lengths, chosen), ops("Add", filler, ops.constant([1])), axis=0
            )
            longest = ops("ReduceMax", their, keepdims=1)
            view = ops("Min", ops("Add", ops.unsqueeze(first, 1), ops.unsqueeze(ops.range(longest), 0)), last)
            self._views.append((view, their))
            place = ops("Add", base, ops("Mul", ops.count(member), longest))
            places = place if places is None else ops("Where", member, place, places)
            base = ops("Add", base, ops("Mul", ops.size(their), longest))
        assert places is not None
        offset = ops("Sub", ops.range(total), ops("Gather", self._starts, self._segment))
        self._back = ops("Add", ops("Gather", places, self._segment), offset)

    def fold(self, ops: Ops, x: ir.Value) -> list[ir.Value]:
        """See `Front`; behind the end of a sequence lie other sequences' lines."""
        return [ops("Gather", x, view) for view, _ in self._views]

    def unfold(self, ops: Ops, parts: list[ir.Value]) -> ir.Value:
        """See `Front`."""
        flat = [ops.merge(part) for part in parts]
        return ops("Gather", ops("Concat", *flat, axis=0) if len(flat) > 1 else flat[0], self._back)

    def lengths(self, part: int) -> ir.Value | None:
        """See `Front`."""
        return self._views[part][1] if self._key_lengths else None

    def mask(self, ops: Ops, part: int, causal: bool, window: int) -> ir.Value | None:
        """See `Front`; a window is a distance of positions, which differs from one of lines where there are holes."""
        if not window and (causal or self._key_lengths):
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
        if window:
            at = ops("Gather", self.positions, view)
            distance = ops("Sub", ops.unsqueeze(at, 2), ops.unsqueeze(at, 1))
            near = ops("Less", distance if causal else ops("Abs", distance), ops.constant([window]))
            seen = ops("And", seen, near)
        self._masks[key] = ops.unsqueeze(seen, 1)
        return self._masks[key]

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
        return _normalized(ops, embedding) if pooling.normalize else embedding


class Cells(Front):
    """Every cell runs, under a dense mask: shapes are those of the rows, and every operator is a standard one.

        allowed(i, j) = number_i = number_j  ∧  (j ≤ i if causal)  ∧  (position_i − position_j < window if any)

    Padding sees padding only, so no softmax row is empty. Arguments as of `Segments`.
    """

    def __init__(self, ops: Ops, mask: ir.Value, ids: ir.Value, clock: Clock):
        self._mask, self._masks = mask, dict[tuple[bool, int], ir.Value]()
        self._shape, self._columns = ops("Shape", mask), ops.range(ops.size(mask, 1))
        here, there = ops.unsqueeze(mask, 2), ops.unsqueeze(mask, 1)
        self._same = ops("Equal", here, there)
        columns = ops("Expand", self._columns, self._shape)
        inside = ops("Where", self._same, ops.unsqueeze(columns, 1), ops.constant(1 << 30))
        self._start = ops("ReduceMin", inside, ops.constant([2]), keepdims=0)
        time, origin, runs = _time(ops, mask, ids, clock)
        first = ops("GatherElements", origin, self._start, axis=1)
        later = ops("Greater", mask, ops.constant(1))
        self._grid = ops("Sub", time, ops("Where", later, first, ops.constant(0)))
        position = _from(ops, self._grid, runs, clock)
        self._real = ops("Greater", mask, ops.constant(0))
        self.positions = ops.reshape(ops("Where", self._real, position, ops.constant(clock.first)), -1)
        before = ops("GreaterOrEqual", ops.unsqueeze(columns, 2), ops.unsqueeze(columns, 1))
        falls = ops("And", ops("Less", here, there), ops("Greater", here, ops.constant(0)))
        falls = ops("Cast", ops("And", falls, before), to=ir.DataType.INT64)
        poison = ops("Mul", ops("ReduceMax", falls, ops.constant([2]), keepdims=0), ops.constant(POISON))
        cells = ops.range(ops("Shape", ops.reshape(mask, -1)))
        self.ids_at = ops("Add", cells, ops.reshape(poison, -1))

    def fold(self, ops: Ops, x: ir.Value) -> list[ir.Value]:
        """See `Front`."""
        return [ops("Reshape", x, ops("Concat", self._shape, ops.constant([-1]), axis=0))]

    def unfold(self, ops: Ops, parts: list[ir.Value]) -> ir.Value:
        """See `Front`."""
        return ops.merge(parts[0])

    def lengths(self, part: int) -> ir.Value | None:
        """See `Front`."""
        return None

    def mask(self, ops: Ops, part: int, causal: bool, window: int) -> ir.Value | None:
        """See `Front`."""
        key = (causal, window)
        if key not in self._masks:
            seen = self._same
            if causal:
                order = ops(
                    "GreaterOrEqual", ops.unsqueeze(self._columns, 1), ops.unsqueeze(self._columns, 0)
                )
                seen = ops("And", seen, order)
            if window:
                distance = ops("Sub", ops.unsqueeze(self._grid, 2), ops.unsqueeze(self._grid, 1))
                near = ops("Less", distance if causal else ops("Abs", distance), ops.constant(window))
                seen = ops("And", seen, near)
            self._masks[key] = ops.unsqueeze(seen, 1)
        return self._masks[key]

    def grid(self, ops: Ops, lines: ir.Value, width: int) -> ir.Value:
        """See `Front`."""
        return ops("Reshape", lines, ops("Concat", self._shape, ops.constant([width]), axis=0))

    def spread(self, ops: Ops, answer: ir.Value, width: int) -> ir.Value:
        """See `Front`."""
        shown = ops.unsqueeze(self._real, 2)
        return ops("Where", shown, self.grid(ops, answer, width), ops.constant(0, np.float32))

    def pool(self, ops: Ops, states: ir.Value, pooling: Pooling) -> ir.Value:
        """Embeddings `[batch, sequence, width]`: entry k − 1 is segment k's, zero where there is none."""
        grid = ops("Reshape", states, ops("Concat", self._shape, ops.constant([-1]), axis=0))
        numbers = ops.unsqueeze(ops("Add", self._columns, ops.constant(1)), 1)
        own = ops("Equal", numbers, ops.unsqueeze(self._mask, 1))
        if pooling.mode == "cls":
            at_start = ops("Equal", self._columns, self._start)
            own = ops("And", own, ops.unsqueeze(at_start, 1))
        weight = ops("Cast", own, to=ir.DataType.FLOAT)
        count = ops("ReduceSum", weight, ops.constant([2]), keepdims=1)
        mean = ops("Div", ops("MatMul", weight, grid), ops("Max", count, ops.constant(1, np.float32)))
        return _normalized(ops, mean) if pooling.normalize else mean


def _time(
    ops: Ops, mask: ir.Value, ids: ir.Value, clock: Clock
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """The clock at every cell from 0, int64 `[batch, sequence]`; what a segment that starts there subtracts; and,
    where ids count, 1 at cells that it counts.
    """
    shape = ops("Shape", mask)
    if clock.counts == "columns":
        time = ops("Expand", ops.range(ops.size(mask, 1)), shape)
        return time, time, None
    if clock.counts == "mask":
        runs = ops("Cast", ops("Greater", mask, ops.constant(0)), to=ir.DataType.INT64)
    else:
        runs = ops("Cast", ops("Not", ops("Equal", ids, ops.constant(clock.first - 1))), to=ir.DataType.INT64)
    count = ops("CumSum", runs, ops.constant(1))
    time, origin = ops("Sub", count, ops.constant(1)), ops("Sub", count, runs)
    return time, origin, runs if clock.counts == "ids" else None


def _from(ops: Ops, position: ir.Value, runs: ir.Value | None, clock: Clock) -> ir.Value:
    """Position ids from counts: shifted by the first, and where the clock stands still the padding id itself."""
    if runs is not None:
        position = ops("Sub", ops("Mul", ops("Add", position, ops.constant(1)), runs), ops.constant(1))
    return ops("Add", position, ops.constant(clock.first)) if clock.first else position


def _normalized(ops: Ops, x: ir.Value) -> ir.Value:
    norm = ops("ReduceL2", x, ops.constant([-1]), keepdims=1)
    return ops("Div", x, ops("Max", norm, ops.constant(1e-12, np.float32)))
