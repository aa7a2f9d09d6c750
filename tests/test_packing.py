"""Nothing is lost, nothing is reordered within a split, no row is over its width; and the plans are full."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.compress.packing import PackedBatch, Stream, fill, pack, plan_histogram

WIDTH = 24
lengths_lists = st.lists(st.integers(1, WIDTH), max_size=60)
untimed = settings(deadline=None, max_examples=1000, derandomize=True)
histograms = st.lists(st.integers(0, 30), max_size=WIDTH)


def sequences_of(lengths: list[int]) -> list[np.ndarray]:
    """Sequences whose every token is a different number."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(start, end, dtype=np.int64) + 1 for start, end in pairwise(ends)]


@untimed
@given(lengths_lists)
def test_every_sequence_is_in_one_row_and_no_row_is_over_width(lengths: list[int]) -> None:
    rows = pack(lengths, WIDTH)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= WIDTH for row in rows)
    assert all(row == sorted(row) for row in rows)


@untimed
@given(lengths_lists, st.integers(-5, 5))
def test_a_split_gives_back_what_went_in(lengths: list[int], pad: int) -> None:
    sequences = sequences_of(lengths)
    batch = PackedBatch.of(sequences, pack(lengths, WIDTH), WIDTH, pad)
    assert [s.tolist() for s in batch.split(batch.ids)] == [s.tolist() for s in sequences]
    assert all(s.tolist() == list(range(len(s))) for s in batch.split(batch.positions))
    assert (batch.ids[batch.segments == 0] == pad).all()
    assert (batch.positions[batch.segments == 0] == 0).all()
    stacked = np.stack([batch.ids, -batch.ids], axis=-1)
    assert [s[:, 1].tolist() for s in batch.split(stacked)] == [(-s).tolist() for s in sequences]


@untimed
@given(lengths_lists)
def test_pooled_answers_are_put_in_order(lengths: list[int]) -> None:
    sequences = sequences_of(lengths)
    batch = PackedBatch.of(sequences, pack(lengths, WIDTH), WIDTH)
    # what a graph does: one answer a segment, row by row
    found = [
        batch.ids[r][batch.segments[r] == k].sum()
        for r, row in enumerate(batch.rows)
        for k in range(1, len(row) + 1)
    ]
    assert batch.arrange(np.array(found, np.int64)).tolist() == [int(s.sum()) for s in sequences]


def test_rows_are_laid_out_as_the_interface_says() -> None:
    sequences = [np.array([7, 8]), np.array([5]), np.array([1, 2, 3])]
    batch = PackedBatch.of(sequences, [[2, 1], [0]], width=5, pad_id=9)
    assert batch.ids.tolist() == [[1, 2, 3, 5, 9], [7, 8, 9, 9, 9]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 0], [1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 0, 0]]
    assert batch.order == [2, 1, 0]
    assert batch.fill == 0.6
    assert {batch.ids.dtype, batch.segments.dtype, batch.positions.dtype} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("rows", "width", "message"),
    [
        ([[0]], 5, "exactly one row"),
        ([[0, 1], [1]], 5, "exactly one row"),
        ([[0, 1, 2]], 5, r"row 0 holds sequences of \[2, 1, 3\]"),
        ([[0, 1], [2], []], 5, "row 2"),
    ],
)
def test_rows_that_lose_repeat_or_overflow_are_refused(
    rows: list[list[int]], width: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PackedBatch.of(sequences_of([2, 1, 3]), rows, width)


def test_outputs_of_other_shapes_are_refused() -> None:
    batch = PackedBatch.of(sequences_of([2, 1]), [[0, 1]], 3)
    with pytest.raises(ValueError, match="is not of rows"):
        batch.split(np.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match="3 answers for 2"):
        batch.arrange(np.zeros((3, 4)))


@untimed
@given(histograms)
def test_a_plan_uses_the_histogram_exactly(counts: list[int]) -> None:
    used: Counter[int] = Counter()
    for rows, members in plan_histogram(counts, WIDTH):
        assert rows > 0
        assert 0 < sum(members) <= WIDTH
        for length in members:
            used[length] += rows
    assert [used[length] for length in range(1, len(counts) + 1)] == counts


@untimed
@given(lengths_lists)
def test_pack_follows_its_plan(lengths: list[int]) -> None:
    counts = np.bincount(lengths, minlength=WIDTH + 1)[1:] if lengths else []
    assert len(pack(lengths, WIDTH)) == sum(rows for rows, _ in plan_histogram(counts, WIDTH))


@untimed
@given(st.lists(st.integers(1, WIDTH), min_size=1, max_size=200))
def test_no_two_rows_could_be_one(lengths: list[int]) -> None:
    sums = sorted(sum(lengths[i] for i in row) for row in pack(lengths, WIDTH))
    assert len(sums) < 2 or sums[0] + sums[1] > WIDTH


def test_lengths_that_do_not_fit_are_refused() -> None:
    for lengths in ([0, 3], [WIDTH + 1]):
        with pytest.raises(ValueError, match="do not fit rows"):
            pack(lengths, WIDTH)
    with pytest.raises(ValueError, match="lengths over"):
        plan_histogram([0] * WIDTH + [1], WIDTH)
    assert pack([], WIDTH) == []
    assert plan_histogram([], WIDTH) == []


def test_wide_rows_pack_too() -> None:
    rows = pack([70_000, 30_000, 100_000], 100_000)
    assert sorted(map(sorted, rows)) == [[0, 1], [2]]


@pytest.mark.parametrize("width", [128, 512])
def test_short_sentences_and_mixed_lengths_fill_their_rows(width: int) -> None:
    generator = np.random.default_rng(0)
    short = np.clip(generator.normal(25, 10, 20_000).round(), 3, width).astype(int)
    mixed = np.exp(generator.uniform(np.log(8), np.log(width), 20_000)).astype(int)
    for lengths in (short, mixed):
        assert lengths.sum() / (len(pack(lengths, width)) * width) > 0.995
    # the twin: packing in the order of arrival leaves more room
    stream = Stream(width, 1)
    arrival = [row for i, n in enumerate(mixed.tolist()) if (row := stream.add(i, n))] + stream.flush()
    assert mixed.sum() / (len(arrival) * width) < 0.9


@untimed
@given(lengths_lists, st.integers(1, 5))
def test_a_stream_loses_nothing_and_keeps_arrival_order(lengths: list[int], open_rows: int) -> None:
    stream = Stream(WIDTH, open_rows)
    rows = [row for index, length in enumerate(lengths) if (row := stream.add(index, length)) is not None]
    rest = stream.flush()
    assert len(rest) <= open_rows
    assert stream.flush() == []
    rows += rest
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= WIDTH for row in rows)
    assert all(row == sorted(row) for row in rows)


def test_a_stream_fills_well_with_sixteen_open_rows() -> None:
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(8), np.log(512), 20_000)).astype(int)
    stream = Stream(512, 16)
    rows = [
        row for i, n in enumerate(lengths.tolist()) if (row := stream.add(i, n)) is not None
    ] + stream.flush()
    assert lengths.sum() / (len(rows) * 512) > 0.98
    with pytest.raises(ValueError, match="does not fit"):
        stream.add(0, 513)


@pytest.mark.skipif(
    "TERSOR_SHARED" not in os.environ, reason="needs the published length histograms (TERSOR_SHARED)"
)
@pytest.mark.parametrize(("name", "width", "least"), [("wikipedia", 512, 0.999), ("squad_1_1", 384, 0.977)])
def test_published_histograms_fill(name: str, width: int, least: float) -> None:
    path = Path(os.environ["TERSOR_SHARED"]) / "data" / "packing_histograms" / f"{name}_histogram.json"
    counts = json.loads(path.read_text("utf-8"))
    plan = plan_histogram(counts, width)
    assert fill(plan, width) >= least
    assert sum(rows * sum(members) for rows, members in plan) == sum(
        (i + 1) * c for i, c in enumerate(counts)
    )
