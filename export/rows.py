"""Rows that a caller packed, checked before a graph sees them, each fault by its name and place.

The graph itself fails on segments in pieces, without saying where, and is stock-exact for padding before the first
segment, which is seldom what somebody who packs means; here both are refused.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from tersor.compress.errors import RecipeError

Span = tuple[int, int, int]
"""(row, start, end) of a segment."""


def check(ids: np.ndarray, segments: np.ndarray, vocab: int, longest: int | None = None) -> list[Span]:
    """The segments of packed rows, row by row in the order in which they begin.

    Args:
        ids: whole numbers `[rows, width]`.
        segments: likewise; 0 is padding, otherwise the number of the segment, rising along a row.
        vocab: ids lie below this; at padding any will do.
        longest: most tokens of a segment, None where nothing bounds it.

    Raises:
        RecipeError: other shapes or dtypes, an empty row, padding before the first segment, a segment in pieces,
            numbers that fall, a segment over `longest`, an id outside the vocabulary; names row and segment.
    """
    for name, array in (("input_ids", ids), ("attention_mask", segments)):
        if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape != ids.shape:
            given = f"{array.dtype} of shape {list(array.shape)}"
            raise RecipeError(name, given, f"whole numbers [rows, width], {list(ids.shape)} as input_ids")
    found: list[Span] = []
    for row, (tokens, numbers) in enumerate(zip(ids, segments, strict=True)):
        found += [(row, start, end) for start, end in _segments(tokens, numbers, f"row {row}", vocab, longest)]
    return found


def _segments(
    tokens: np.ndarray, numbers: np.ndarray, place: str, vocab: int, longest: int | None
) -> list[tuple[int, int]]:
    if not numbers.any():
        raise RecipeError(place, "no tokens", "at least one segment")
    if numbers.min() < 0:
        raise RecipeError(place, f"segment {numbers.min()}", "numbers from 0, which is padding")
    if not numbers[0]:
        raise RecipeError(place, "padding before the first segment", "padding behind it", "Move the tokens left.")
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    spans, seen = [], list[int]()
    for start, end in pairwise(edges):
        number = int(numbers[start])
        if not number:
            continue
        where = f"{place}, segment {number}"
        if number in seen:
            raise RecipeError(where, "tokens in several pieces", "tokens side by side")
        if seen and number < seen[-1]:
            raise RecipeError(where, f"a place behind segment {seen[-1]}", "numbers that rise along a row")
        if longest is not None and end - start > longest:
            raise RecipeError(where, f"{end - start} tokens", f"at most {longest}", "Cut it, or split it.")
        wrong = tokens[start:end][(tokens[start:end] < 0) | (tokens[start:end] >= vocab)]
        if len(wrong):
            raise RecipeError(where, f"token id {wrong[0]}", f"ids from 0 to {vocab - 1}")
        seen.append(number)
        spans.append((start, end))
    return spans
