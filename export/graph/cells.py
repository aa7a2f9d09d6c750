"""Every cell runs, under a dense mask: shapes are those of the rows, and every operator is a standard one.

    allowed(i, j) = number_i = number_j  ∧  (j ≤ i if causal)  ∧  (position_i − position_j < window if any)

Padding sees padding only, so no softmax row is empty.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from tersor.compress.evaluate.pooling import Pooling

from .front import POISON, Attention, Clock, Front, normalized, positions_from, time_of
from .ops import Ops


class Cells(Front):
    """Rows as they are, under a dense mask, see the module. Arguments as of `segments.Segments`."""

    def __init__(self, ops: Ops, mask: ir.Value, ids: ir.Value, clock: Clock):
        self._mask, self._masks = mask, dict[tuple[bool, int], ir.Value]()
        self._shape, self._columns = ops("Shape", mask), ops.range(ops.size(mask, 1))
        here, there = ops.unsqueeze(mask, 2), ops.unsqueeze(mask, 1)
        self._same = ops("Equal", here, there)
        columns = ops("Expand", self._columns, self._shape)
        inside = ops("Where", self._same, ops.unsqueeze(columns, 1), ops.constant(1 << 30))
        self._start = ops("ReduceMin", inside, ops.constant([2]), keepdims=0)
        time, origin, runs = time_of(ops, mask, ids, clock)
        first = ops("GatherElements", origin, self._start, axis=1)
        later = ops("Greater", mask, ops.constant(1))
        self._grid = ops("Sub", time, ops("Where", later, first, ops.constant(0)))
        position = positions_from(ops, self._grid, runs, clock)
        self._real = ops("Greater", mask, ops.constant(0))
        self.positions = ops.reshape(ops("Where", self._real, position, ops.constant(clock.first)), -1)
        before = ops("GreaterOrEqual", ops.unsqueeze(columns, 2), ops.unsqueeze(columns, 1))
        falls = ops("And", ops("Less", here, there), ops("Greater", here, ops.constant(0)))
        falls = ops("Cast", ops("And", falls, before), to=ir.DataType.INT64)
        poison = ops("Mul", ops("ReduceMax", falls, ops.constant([2]), keepdims=0), ops.constant(POISON))
        cells = ops.range(ops("Shape", ops.reshape(mask, -1)))
        self.ids_at = ops("Add", cells, ops.reshape(poison, -1))

    def attend(
        self, ops: Ops, q: ir.Value, k: ir.Value, v: ir.Value, causal: bool, window: int, attention: Attention
    ) -> ir.Value:
        """See `Front`."""
        grids = [ops("Reshape", x, ops("Concat", self._shape, ops.constant([-1]), axis=0)) for x in (q, k, v)]
        return attention(ops, grids, self._seen(ops, causal, window), None)

    def _seen(self, ops: Ops, causal: bool, window: int) -> ir.Value:
        """The dense mask."""
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
        return normalized(ops, mean) if pooling.normalize else mean
