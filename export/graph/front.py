"""What lies between the stock interface and the core: which cells are tokens, their positions, their neighbours.

Interface: `input_ids`, `attention_mask` (and `token_type_ids` where the architecture has them), int64
`[batch, sequence]`. In `attention_mask` 0 is padding and k ≥ 1 the number of the segment in its row (Krell et al.,
2107.02027), so a plain 0/1 mask is the ordinary case. Numbers must rise along a row; where they fall, the first
Gather gets an index that no row has and the call fails, rather than answer for segments that lie in pieces. Where every
block looks at all that came before, −k is allowed too: a segment that goes on from the last positive one before it in
its row, so that several answers share one context (compress/evaluate/tree.py).

    position(i)   = clock(i)                         in segment 1
                    clock(i) − clock(first of k)     in segment k ≥ 2
                    the same + what comes next in the segment that it goes on from, in segment −k

The clock is what the stock model counts under a plain mask: columns, tokens that the mask shows (OPT), or ids that
are not the padding id (RoBERTa); the architecture says which. Left padding and holes are therefore stock-exact
instead of silently moved. Resetting `position_ids` under an all-ones mask, the usual shortcut, leaks across segments.

segments.py runs the core on the real tokens only; cells.py runs it on every cell, with fixed shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from tersor.compress.evaluate.pooling import Pooling

from .ops import Ops

POISON = 1 << 40
"""An index that no row has."""


Attention = Callable[[Ops, list[ir.Value], "ir.Value | None", "ir.Value | None"], ir.Value]
"""Attention in one batch: q, k and v `[sequences, length, n]`; who sees whom, bool `[sequences, 1, length, length]`, or
None if causality and the tokens of each sequence, `[sequences]` or None, say it. The answer is flat,
`[sequences · length, n]`."""


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
    def attend(
        self, ops: Ops, q: ir.Value, k: ir.Value, v: ir.Value, causal: bool, window: int, attention: Attention
    ) -> ir.Value:
        """Attention of each line to those of its sequence; q, k, v and the answer `[N, n]`, heads side by side.

        Causal: a token sees itself and what came before; with a window above 0 so many positions of it.
        """

    @abstractmethod
    def spread(self, ops: Ops, answer: ir.Value, width: int) -> ir.Value:
        """`[N, width]` as `[batch, sequence, width]`, zero at padding."""

    @abstractmethod
    def grid(self, ops: Ops, lines: ir.Value, width: int) -> ir.Value:
        """`[…, width]` by cell as `[batch, sequence, width]`."""

    @abstractmethod
    def pool(self, ops: Ops, states: ir.Value, pooling: Pooling) -> ir.Value:
        """One embedding a segment."""


def time_of(
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
        runs = ops("Cast", ops("Not", ops("Equal", mask, ops.constant(0))), to=ir.DataType.INT64)
    else:
        runs = ops("Cast", ops("Not", ops("Equal", ids, ops.constant(clock.first - 1))), to=ir.DataType.INT64)
    count = ops("CumSum", runs, ops.constant(1))
    time, origin = ops("Sub", count, ops.constant(1)), ops("Sub", count, runs)
    return time, origin, runs if clock.counts == "ids" else None


def positions_from(ops: Ops, position: ir.Value, runs: ir.Value | None, clock: Clock) -> ir.Value:
    """Position ids from counts: shifted by the first, and where the clock stands still the padding id itself."""
    if runs is not None:
        position = ops("Sub", ops("Mul", ops("Add", position, ops.constant(1)), runs), ops.constant(1))
    return ops("Add", position, ops.constant(clock.first)) if clock.first else position


def normalized(ops: Ops, x: ir.Value) -> ir.Value:
    """Each last-axis vector over its Euclidean norm."""
    norm = ops("ReduceL2", x, ops.constant([-1]), keepdims=1)
    return ops("Div", x, ops("Max", norm, ops.constant(1e-12, np.float32)))
