"""Sequences, and rows that a caller packed, checked before a graph sees them, each fault by its name and place.

A graph itself fails on segments in pieces, without saying where, and is stock-exact for padding before the first
segment, which is seldom what somebody who packs means; here both are refused.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from tersor.compress.errors import RecipeError
from tersor.compress.tokens import Input, Tokens

if TYPE_CHECKING:
    from .artifact import Artifact

Span = tuple[int, int, int]
"""(row, start, end) of a segment."""


def checked(sequence: Input, artifact: Artifact, place: str) -> Tokens:
    """One sequence as int64.

    Raises:
        RecipeError: it is empty, too long, no row of whole numbers, or holds an id or a token type that the artifact
            does not have; names `place`.
    """
    given = Tokens.of(sequence)
    ids, limit = given.ids, artifact.max_length
    if ids.size == 0:
        raise RecipeError(place, "no tokens", "at least one token")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RecipeError(place, f"{ids.dtype} of shape {ids.shape}", "whole numbers in one dimension")
    if limit is not None and len(ids) > limit:
        raise RecipeError(place, f"{len(ids)} tokens", f"at most {limit}", "Cut it, or split it.")
    _refuse_ids(ids, artifact.vocab, place)
    if given.types is not None:
        _refuse_types(given.types, artifact.token_types, place)
    return Tokens(ids.astype(np.int64), None if given.types is None else given.types.astype(np.int64))


def check(
    ids: np.ndarray,
    segments: np.ndarray,
    vocab: int,
    longest: int | None = None,
    types: np.ndarray | None = None,
    kinds: int = 1,
) -> list[Span]:
    """The segments of packed rows, row by row in the order in which they begin.

    Args:
        ids: whole numbers `[rows, width]`.
        segments: likewise; 0 is padding, otherwise the number of the segment, rising along a row.
        vocab: ids lie below this; at padding any will do.
        longest: most tokens of a segment, None where nothing bounds it.
        types: of the tokens, as `ids`.
        kinds: types lie below this; at padding any will do.

    Raises:
        RecipeError: other shapes or dtypes, an empty row, padding before the first segment, a segment in pieces,
            numbers that fall, a segment over `longest`, an id outside the vocabulary, a token type that the model does
            not have; names row and segment.
    """
    given = {"input_ids": ids, "attention_mask": segments} | ({} if types is None else {"token_type_ids": types})
    for name, array in given.items():
        if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape != ids.shape:
            what = f"{array.dtype} of shape {list(array.shape)}"
            raise RecipeError(name, what, f"whole numbers [rows, width], {list(ids.shape)} as input_ids")
    found: list[Span] = []
    for row, (tokens, numbers) in enumerate(zip(ids, segments, strict=True)):
        for start, end in _segments(tokens, numbers, f"row {row}", vocab, longest):
            if types is not None:
                _refuse_types(types[row, start:end], kinds, f"row {row}, segment {numbers[start]}")
            found.append((row, start, end))
    return found


def _refuse_ids(ids: np.ndarray, vocab: int, place: str) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab)]
    if len(wrong):
        raise RecipeError(place, f"token id {wrong[0]}", f"ids from 0 to {vocab - 1}")


def _refuse_types(types: np.ndarray, kinds: int, place: str) -> None:
    if types.dtype.kind not in "iu":
        raise RecipeError(place, f"token types as {types.dtype}", "whole numbers")
    wrong = types[(types < 0) | (types >= kinds)]
    if len(wrong):
        has = f"types from 0 to {kinds - 1}" if kinds > 1 else "no types: the model reads none"
        raise RecipeError(place, f"token type {wrong[0]}", has)


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
        _refuse_ids(tokens[start:end], vocab, where)
        seen.append(number)
        spans.append((start, end))
    return spans
