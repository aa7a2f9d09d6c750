"""Calibration and held-out text: from a file or a folder to token sequences, the same on every machine.

Causal models read windows: every document (a text file, a record, a file of a folder) follows a bos token
where the tokenizer has one, all are joined, and the stream is cut into pieces of `length` tokens; the
remainder is dropped. Encoders read one sequence a unit (units.py: a line, a record, a file), with the
tokenizer's special tokens, truncated to `length`.

A window's text is what its predicted tokens (all but the first) stand for: from the end of the first token to
the end of the last, by the tokenizer's own offsets. A token thus owns every character since the one before
it, also what normalisation drops, and the bytes of all tokens add up to the bytes of the text, which bits per
byte rests on.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from .errors import PreflightError, RecipeError
from .pass_ import STRICT
from .paths import resolve_path
from .units import RECORDS, Part, bounds, files, units

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_TEXT = 64_000_000  # characters of a stream: about a minute and 3 GB in the tokenizer


@dataclass(frozen=True, config=STRICT)
class Source:
    """Where text comes from and how much of it is used.

    Attributes:
        path: a .txt (or other text) file, a .jsonl, a folder of such, or `package:NAME/inner/path`.
        field: the .jsonl field that holds the text.
        samples: how many sequences to take; fewer if there are fewer.
        length: tokens of a window (causal) or the most tokens of a sequence (encoders).
        span: share of the units (lines, records, files) to use, e.g. `0%-60%`; all if None.
    """

    path: str
    field: str = "text"
    samples: Annotated[int, Field(gt=0)] = 128
    length: Annotated[int, Field(gt=1)] = 512
    span: str | None = None

    @field_validator("span")
    @classmethod
    def _span_is_a_share(cls, span: str | None) -> str | None:
        bounds(span)
        return span

    def part(self, base: Path | None, place: str) -> Part:
        """The source with its path resolved."""
        return Part(resolve_path(self.path, base, f"{place}.path"), self.field, self.span, place)


@plain_dataclass(frozen=True, eq=False)
class Sample:
    """One token sequence.

    Attributes:
        ids: int64 `[n]`.
        bytes: UTF-8 bytes of `text`.
        text: what is scored: for a window the text of its predicted tokens, else that of all tokens.
    """

    ids: np.ndarray
    bytes: int
    text: str


def read_samples(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    windows: bool,
    seed: int | None,
    base: Path | None,
    place: str = "data",
) -> list[Sample]:
    """The source's samples, in the order of the text.

    Of more than `source.samples`, evenly spaced ones are taken if `seed` is None (held-out text), else a
    seeded choice without replacement (calibration). Fewer are no error: compare the length of the answer.

    Args:
        source: where from and how much.
        tokenizer: of the checkpoint.
        windows: cut a stream into windows (causal models), or one sequence a unit (encoders).
        seed: seed of the choice, or None.
        base: folder that relative paths may start from.
        place: what the source is called in errors, e.g. `data.heldout`.

    Raises:
        RecipeError: the source does not have what the recipe names (field, span, text for one window).
        PreflightError: a file is missing, blank, not UTF-8, not JSON, too long; or there is no tokenizer.
    """
    if tokenizer is None:
        raise PreflightError(place, "a checkpoint without a tokenizer", "one with a tokenizer to read text")
    part = source.part(base, place)
    texts = units(part)
    if not windows:
        return _sequences(texts, source, tokenizer, seed)
    characters = sum(map(len, texts))
    if characters > MOST_TEXT:
        raise PreflightError(
            f"{place}.path: {part.path}",
            f"{characters / 1e6:,.0f} million characters",
            f"at most {MOST_TEXT / 1e6:,.0f} million, since all are tokenised",
            f"Take a share of them with {place}.span.",
        )
    lines = part.path.is_file() and part.path.suffix.lower() != RECORDS
    documents = ["".join(texts)] if lines else texts
    ids, ends = _stream(documents, tokenizer)
    total = len(ids) // source.length
    if not total:
        raise RecipeError(
            f"{place}.path: {part.path}",
            f"{len(ids)} tokens",
            f"at least one window of {source.length}",
            f"Lower {place}.length.",
        )
    text = "".join(documents)
    cuts = (slice(i * source.length, (i + 1) * source.length) for i in _choose(total, source.samples, seed))
    return [_window(ids[cut], None if ends is None else text[ends[cut][0] : ends[cut][-1]], tokenizer) for cut in cuts]


def overlap(a: Source, b: Source, base: Path | None) -> bool:
    """Whether two sources share text: a file that both read, or a copy of it, in shares that meet.

    Raises:
        TersorError: see `units.files`.
    """
    first, second = (_shares(source, base) for source in (a, b))
    both = ((first[a], second[b]) for a, b in _pairs(first, second))
    return any(max(low, from_) < min(high, to) for (low, high), (from_, to) in both)


def _shares(source: Source, base: Path | None) -> dict[Path, tuple[Fraction, Fraction]]:
    part = source.part(base, "data")
    whole = part.path.is_dir()  # a folder's span has chosen among its files
    return {file: bounds(None if whole else source.span) for file in files(part)}


def _pairs(first: Iterable[Path], second: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    """Files of both sides with the same bytes."""
    by_size: dict[int, list[Path]] = {}
    for file in first:
        by_size.setdefault(file.stat().st_size, []).append(file)
    for other in second:
        for file in by_size.get(other.stat().st_size, ()):
            if file == other or filecmp.cmp(file, other, shallow=False):
                yield file, other


def _choose(total: int, wanted: int, seed: int | None) -> list[int]:
    if total <= wanted:
        return list(range(total))
    if seed is None:
        return [i * total // wanted for i in range(wanted)]
    return [int(i) for i in np.sort(np.random.default_rng(seed).choice(total, wanted, replace=False))]


def _sequences(
    texts: Sequence[str], source: Source, tokenizer: PreTrainedTokenizerBase, seed: int | None
) -> list[Sample]:
    kept = [text.strip("\r\n") for text in texts if text.strip()]
    samples = []
    for index in _choose(len(kept), source.samples, seed):
        text = kept[index]
        encoded = tokenizer(text, truncation=True, max_length=source.length, return_offsets_mapping=tokenizer.is_fast)
        if tokenizer.is_fast and len(encoded["input_ids"]) == source.length:
            text = text[: max(end for _, end in encoded["offset_mapping"])]
        samples.append(Sample(np.asarray(encoded["input_ids"], np.int64), len(text.encode()), text))
    return samples


def _window(ids: np.ndarray, text: str | None, tokenizer: PreTrainedTokenizerBase) -> Sample:
    if text is None:
        text = str(tokenizer.decode(ids[1:].tolist(), skip_special_tokens=True))
    return Sample(ids.copy(), len(text.encode()), text)


def _stream(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray | None]:
    """All documents' ids, and where each token ends in their joined text (None: the tokenizer cannot say)."""
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    ids, ends, start = [], [], 0
    for document in documents:
        encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        ids.append(np.array([*bos, *encoded["input_ids"]], np.int64))
        if tokenizer.is_fast:
            end = np.array([end for _, end in encoded["offset_mapping"]], np.int64)
            end = np.maximum.accumulate(end)  # a token that stands for nothing may say (0, 0)
            end[-1:] = len(document)  # what is dropped behind the last token is the last token's
            ends.append(np.concatenate([np.zeros(len(bos), np.int64), end]) + start)
        start += len(document)
    return np.concatenate(ids), np.concatenate(ends) if tokenizer.is_fast else None
