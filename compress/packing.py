"""Packing: several sequences in one row, and the plan of who shares a row with whom.

The planner works on the histogram of lengths, not on sequences, so that sixteen million lengths cost as much
as sixteen thousand. Lengths are placed from long to short, each into the rows whose free space is the
smallest that takes it (best fit decreasing), as many copies a row as go in: rows with one filling are one
entry with a count. A plan names every sequence once and is then materialised by numpy, a slice a pattern.
Krell et al. (arXiv 2107.02027) pack histograms too; their longest-pack-first places one copy a row at a time,
and their shortest-pack-first wants few sequences a row at the price of the last cells. On their Wikipedia
histogram, 16.3 million lengths at 512, this fills 99.95 % in 5 ms, theirs 99.81 % and 99.60 %.

`Stream` packs without knowing what comes: best fit among a few open rows, the fullest closed when none has
room.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np

from .tokens import Input, Tokens

Pattern = tuple[int, tuple[int, ...]]
"""(how many rows, the lengths in each)."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences side by side in rows.

    Attributes:
        ids: int64 `[rows, width]`, `pad_id` behind the last sequence of a row.
        segments: int64 `[rows, width]`: 1, 2, … by sequence within the row, 0 at padding.
        positions: int64 `[rows, width]`: 0, 1, … within each sequence, 0 at padding.
        rows: indices of the sequences in each row, in their order there.
        types: int64 `[rows, width]`, 0 at padding; None where no sequence has any.
    """

    ids: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    rows: tuple[tuple[int, ...], ...]
    types: np.ndarray | None = None

    @classmethod
    def of(
        cls, sequences: Sequence[Input], rows: Sequence[Sequence[int]], width: int, pad_id: int = 0
    ) -> PackedBatch:
        """Lay out sequences (int64 `[n_i]`, or with types) as `rows` says.

        Raises:
            ValueError: a row is over `width`, a sequence is empty, or one is not in exactly one row.
        """
        if sorted(chain.from_iterable(rows)) != list(range(len(sequences))):
            raise ValueError("every sequence belongs in exactly one row")
        tokens = [Tokens.of(sequence) for sequence in sequences]
        ids = np.full((len(rows), width), pad_id, np.int64)
        segments, positions = np.zeros_like(ids), np.zeros_like(ids)
        types = np.zeros_like(ids) if any(one.types is not None for one in tokens) else None
        for row, members in enumerate(rows):
            lengths = np.array([len(tokens[index]) for index in members], np.int64)
            ends = lengths.cumsum()
            if not len(members) or lengths.min() == 0 or ends[-1] > width:
                raise ValueError(f"row {row} holds sequences of {lengths.tolist()} tokens, width is {width}")
            used = int(ends[-1])
            ids[row, :used] = np.concatenate([tokens[index].ids for index in members])
            if types is not None:
                types[row, :used] = np.concatenate([tokens[index].kinds for index in members])
            segments[row, :used] = np.repeat(np.arange(1, len(members) + 1), lengths)
            positions[row, :used] = np.arange(used) - np.repeat(ends - lengths, lengths)
        return cls(ids, segments, positions, tuple(tuple(map(int, members)) for members in rows), types)

    @property
    def order(self) -> list[int]:
        """Indices in row-major order: answer i of a graph's per-sequence output is sequence `order[i]`'s."""
        return list(chain.from_iterable(self.rows))

    @property
    def fill(self) -> float:
        """Share of the cells that hold a token."""
        return float(np.count_nonzero(self.segments)) / max(1, self.segments.size)

    def split(self, output: np.ndarray) -> list[np.ndarray]:
        """A per-token output `[rows, width, …]` as one view `[n_i, …]` a sequence, in their order."""
        if output.shape[:2] != self.ids.shape:
            raise ValueError(f"output {list(output.shape)} is not of rows {list(self.ids.shape)}")
        found: dict[int, np.ndarray] = {}
        for row, members in enumerate(self.rows):
            bounds = np.searchsorted(self.segments[row, : self._used(row)], np.arange(1, len(members) + 2))
            for place, index in enumerate(members):
                found[index] = output[row, bounds[place] : bounds[place + 1]]
        return [found[index] for index in range(len(found))]

    def arrange(self, output: np.ndarray) -> np.ndarray:
        """A per-sequence output `[sequences, …]` in row-major order, put in the sequences' order."""
        order = np.array(self.order, np.int64)
        if len(output) != len(order):
            raise ValueError(f"{len(output)} answers for {len(order)} sequences")
        arranged = np.empty_like(output)
        arranged[order] = output
        return arranged

    def _used(self, row: int) -> int:
        return int(np.count_nonzero(self.segments[row]))


def pack(lengths: Sequence[int] | np.ndarray, width: int) -> list[list[int]]:
    """Rows of indices, each at most `width` tokens together, indices ascending within a row.

    Raises:
        ValueError: a length is below 1 or over `width`.
    """
    sizes = np.asarray(lengths, np.int64)
    if not len(sizes):
        return []
    if sizes.min() < 1 or sizes.max() > width:
        raise ValueError(f"lengths from {sizes.min()} to {sizes.max()} do not fit rows of 1 to {width}")
    counts = np.bincount(sizes, minlength=width + 1)[1:]
    # stable, and on 16 bits a radix sort
    order = np.argsort(sizes.astype(np.uint16) if width < 1 << 16 else sizes, kind="stable")
    next_of = np.concatenate([[0, 0], counts.cumsum()[:-1]])
    blocks = []
    for count, members in plan_histogram(counts, width):
        columns = []
        for length in dict.fromkeys(members):
            copies, start = members.count(length), int(next_of[length])
            columns.append(order[start : start + count * copies].reshape(count, copies))
            next_of[length] += count * copies
        blocks.append(np.sort(np.concatenate(columns, axis=1), axis=1))
    with _no_collection():
        return list(chain.from_iterable(block.tolist() for block in blocks))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector: it would walk a million young lists of numbers again and again."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


def plan_histogram(counts: Sequence[int] | np.ndarray, width: int) -> list[Pattern]:
    """Best fit decreasing on a histogram.

    Args:
        counts: entry i is the number of sequences of length i + 1; at most `width` entries.
        width: tokens of a row.

    Returns:
        patterns whose lengths, times their counts, are the histogram.

    Raises:
        ValueError: lengths over `width`.
    """
    numbers = [int(count) for count in counts]
    if any(numbers[width:]) or any(count < 0 for count in numbers):
        raise ValueError(f"the histogram has lengths over {width} or negative counts")
    free: list[list[Pattern]] = [[] for _ in range(width + 1)]  # by free space
    for length in range(min(width, len(numbers)), 0, -1):
        left = numbers[length - 1]
        free[width].append((left, ()))  # empty rows, as many as could be needed
        space = length
        while left:
            while not free[space]:
                space += 1
            rows, members = free[space].pop()
            copies = min(space // length, left)
            taken = min(rows, left // copies)
            if taken < rows:
                free[space].append((rows - taken, members))
            free[space - copies * length].append((taken, members + (length,) * copies))
            left -= taken * copies
        free[width].clear()
    return list(chain.from_iterable(free))


def fill(patterns: Iterable[Pattern], width: int) -> float:
    """Share of the rows' cells that a plan fills."""
    tokens = rows = 0
    for count, members in patterns:
        tokens, rows = tokens + count * sum(members), rows + count
    return tokens / (rows * width) if rows else 1.0


class Stream:
    """Packs sequences as they come, holding a few rows open.

    Attributes:
        width: tokens of a row.
        open_rows: rows held open; more fill better and answer later.
    """

    def __init__(self, width: int, open_rows: int = 16):
        if width < 1 or open_rows < 1:
            raise ValueError("width and open_rows are at least 1")
        self.width, self.open_rows = width, open_rows
        self._spaces: list[int] = []  # ascending, aligned with _rows
        self._rows: list[list[int]] = []

    def add(self, index: int, length: int) -> list[int] | None:
        """Place a sequence; returns a row that this closed, if any: a full one, or the fullest to make room.

        Raises:
            ValueError: the length is below 1 or over `width`.
        """
        if not 1 <= length <= self.width:
            raise ValueError(f"a sequence of {length} tokens does not fit rows of 1 to {self.width}")
        at = bisect_left(self._spaces, length)
        closed = None
        if at < len(self._spaces):
            space, row = self._spaces.pop(at), self._rows.pop(at)
        else:
            space, row = self.width, []
            if length < self.width and len(self._rows) == self.open_rows:
                self._spaces.pop(0)
                closed = self._rows.pop(0)
        row.append(index)
        if space == length:
            return row
        at = bisect_left(self._spaces, space - length)
        self._spaces.insert(at, space - length)
        self._rows.insert(at, row)
        return closed

    def flush(self) -> list[list[int]]:
        """Close all rows, the fullest first."""
        rows, self._rows, self._spaces = self._rows, [], []
        return rows
