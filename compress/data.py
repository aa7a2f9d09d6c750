"""Calibration and held-out text: from a file or a folder to token sequences, the same on every machine.

A source is cut into *units*: the lines of a text file, the records of a .jsonl, the files of a folder sorted by
relative path. `span` takes a share of the units, whatever the tokenizer, so that one file can serve calibration
(`0%-60%`) and held-out text (`60%-100%`) without a shared line.

Causal models read windows: every document (a whole text file, a record, a file of a folder) follows a bos token where
the tokenizer has one, all are joined, and the stream is cut into pieces of `length` tokens; the remainder is dropped.
Encoders read one sequence a unit, with the tokenizer's special tokens, truncated to `length`.

A window's text is what its predicted tokens (all but the first) stand for: from the end of the first token to the end
of the last, by the tokenizer's own offsets. A token therefore owns all characters since the one before it, also those
that normalisation drops, and the bytes of all tokens add up to the bytes of the text: bits per byte needs no decoding.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from .errors import PreflightError, RecipeError
from .pass_ import STRICT
from .paths import resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORDS = ".jsonl"
TEXT = frozenset(
    ".c .cc .cpp .css .go .h .hpp .html .java .js .jl .kt .md .py .r .rb .rs .rst .scala .sh .sql .swift .tex .toml "
    ".ts .txt .yaml .yml".split()
)
SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*-\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, config=STRICT)
class Source:
    """Where text comes from and how much of it is used.

    Attributes:
        path: a .txt (or other text) file, a .jsonl, a folder of such, or `package:NAME/inner/path`.
        field: the .jsonl field that holds the text.
        samples: how many sequences to take; fewer if there are fewer.
        length: tokens of a window (causal) or the most tokens of a sequence (encoders).
        span: share of the units to use, e.g. `0%-60%`; all if None.
    """

    path: str
    field: str = "text"
    samples: Annotated[int, Field(gt=0)] = 128
    length: Annotated[int, Field(gt=1)] = 512
    span: str | None = None

    @field_validator("span")
    @classmethod
    def _span_is_a_range(cls, span: str | None) -> str | None:
        _bounds(span)
        return span


@plain_dataclass(frozen=True, eq=False)
class Sample:
    """One token sequence.

    Attributes:
        ids: int64 `[n]`.
        bytes: UTF-8 bytes of `text`.
        text: the scored text: for a window what its predicted tokens stand for, else what the tokens stand for.
    """

    ids: np.ndarray
    bytes: int
    text: str


@plain_dataclass(frozen=True)
class _Unit:
    place: str
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

    Of more than `source.samples`, evenly spaced ones are taken if `seed` is None (held-out text), else a seeded choice
    without replacement (calibration). Fewer are no error: compare the length of the answer.

    Args:
        source: where from and how much.
        tokenizer: of the checkpoint.
        windows: cut a stream into windows (causal models), or one sequence a unit (encoders).
        seed: seed of the choice, or None.
        base: folder that relative paths may start from.
        place: what the source is called in errors, e.g. `data.heldout`.

    Raises:
        RecipeError: the recipe names what the source does not have (field, span, text for one sample).
        PreflightError: a file is missing, empty, not UTF-8, not JSON; or there is no tokenizer.
    """
    if tokenizer is None:
        raise PreflightError(
            f"{place}: {source.path}", "a checkpoint without a tokenizer", "one with a tokenizer"
        )
    path = resolve_path(source.path, base, f"{place}.path")
    units = _units(path, source, place)
    samples = (
        _windows(units, path, source, tokenizer, place, seed)
        if windows
        else _sequences(units, source, tokenizer, seed)
    )
    if not samples:
        raise RecipeError(
            f"{place}: {source.path}", "no sample", "at least one", "Give more text or a shorter length."
        )
    return samples


def overlap(a: Source, b: Source, base: Path | None) -> bool:
    """Whether two sources share text: a file in both, with shares that meet.

    Raises:
        PreflightError: a path does not exist.
    """
    first, second = (_shares(source, base) for source in (a, b))
    both = first.keys() & second.keys()
    return any(max(first[f][0], second[f][0]) < min(first[f][1], second[f][1]) for f in both)


def files(source: Source, base: Path | None, place: str = "data") -> list[Path]:
    """The files that a source reads, sorted.

    Raises:
        PreflightError: the path does not exist, or is a folder without text.
        RecipeError: a file of a kind that is not read.
    """
    path = resolve_path(source.path, base, f"{place}.path")
    if path.is_dir():
        return _cut(_folder(path, place), source, place)
    _check_file(path, place)
    return [path]


def _bounds(span: str | None) -> tuple[Fraction, Fraction]:
    if span is None:
        return Fraction(0), Fraction(1)
    match = SPAN.fullmatch(span)
    low, high = (Fraction(part) / 100 for part in match.groups()) if match else (Fraction(0), Fraction(0))
    if not low < high <= 1:
        raise ValueError(f"span {span!r} is no share of the text like '0%-60%'")
    return low, high


def _cut(units: list[Any], source: Source, place: str) -> list[Any]:
    low, high = _bounds(source.span)
    kept = units[int(low * len(units)) : int(high * len(units))]
    if not kept:
        raise RecipeError(
            f"{place}.span",
            f"{source.span} of {len(units)} lines, records or files is none of them",
            "",
            "Widen the span.",
        )
    return kept


def _shares(source: Source, base: Path | None) -> dict[Path, tuple[Fraction, Fraction]]:
    found = files(source, base)
    path = resolve_path(source.path, base, "data.path")
    share = (Fraction(0), Fraction(1)) if path.is_dir() else _bounds(source.span)
    return {file.resolve(): share for file in found}


def _check_file(path: Path, place: str) -> None:
    if not path.exists():
        raise PreflightError(f"{place}.path: {path}", "no such file or folder", "text to read")
    if path.suffix.lower() not in TEXT | {RECORDS}:
        raise RecipeError(
            f"{place}.path: {path}",
            f"a file of kind {path.suffix or 'without a suffix'!r}",
            ".txt, .jsonl or a folder",
        )


def _folder(path: Path, place: str) -> list[Path]:
    found = []
    for directory, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__pycache__")))
        wanted = (
            name
            for name in names
            if Path(name).suffix.lower() in TEXT | {RECORDS} and not name.startswith(".")
        )
        found += [Path(directory) / name for name in wanted]
    if not found:
        raise PreflightError(f"{place}.path: {path}", "a folder without text", "files like .txt, .jsonl, .py")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _units(path: Path, source: Source, place: str) -> list[_Unit]:
    if path.is_dir():
        return [
            unit for file in _cut(_folder(path, place), source, place) for unit in _read(file, source, place)
        ]
    _check_file(path, place)
    if path.suffix.lower() == RECORDS:
        units = list(_records(path, source, place))
    else:
        lines = re.findall(r"[^\n]*\n|[^\n]+", _decode(path, place))
        units = [_Unit(f"{path}:{number}", line) for number, line in enumerate(lines, 1)]
    if not any(unit.text.strip() for unit in units):
        raise PreflightError(f"{place}.path: {path}", "an empty file", "text")
    return _cut(units, source, place)


def _read(file: Path, source: Source, place: str) -> Iterator[_Unit]:
    if file.suffix.lower() == RECORDS:
        yield from _records(file, source, place)
    else:
        yield _Unit(str(file), _decode(file, place))


def _decode(path: Path, place: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PreflightError(
            f"{place}.path: {path}", f"byte {error.start} is not UTF-8", "", "Convert the file."
        ) from error
    except OSError as error:
        raise PreflightError(
            f"{place}.path: {path}", f"a file that cannot be read ({error.strerror})"
        ) from error


def _records(path: Path, source: Source, place: str) -> Iterator[_Unit]:
    for number, line in enumerate(_decode(path, place).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise PreflightError(
                f"{path}:{number}", f"a line that is not JSON ({error})", "one object a line"
            ) from error
        if not isinstance(record, dict):
            raise PreflightError(f"{path}:{number}", f"a {type(record).__name__}", "one object a line")
        text = record.get(source.field)
        if not isinstance(text, str):
            found = (
                f"no field {source.field!r}"
                if source.field not in record
                else f"{source.field!r} that is no text"
            )
            has = ", ".join(sorted(record)) or "nothing"
            raise RecipeError(
                f"{path}:{number}", found, f"text in every record (this one has {has})", f"See {place}.field."
            )
        yield _Unit(f"{path}:{number}", text)


def _choose(total: int, wanted: int, seed: int | None) -> np.ndarray:
    if total <= wanted:
        return np.arange(total)
    if seed is None:
        return np.arange(wanted) * total // wanted
    return np.sort(np.random.default_rng(seed).choice(total, wanted, replace=False))


def _sequences(
    units: Sequence[_Unit], source: Source, tokenizer: PreTrainedTokenizerBase, seed: int | None
) -> list[Sample]:
    texts = [unit.text.strip("\r\n") for unit in units if unit.text.strip()]
    samples = []
    for index in _choose(len(texts), source.samples, seed):
        text = texts[index]
        encoded = tokenizer(
            text, truncation=True, max_length=source.length, return_offsets_mapping=tokenizer.is_fast
        )
        if tokenizer.is_fast and len(encoded["input_ids"]) == source.length:
            text = text[: max(end for _, end in encoded["offset_mapping"])]
        samples.append(Sample(np.asarray(encoded["input_ids"], np.int64), len(text.encode()), text))
    return samples


def _windows(
    units: Sequence[_Unit],
    path: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    seed: int | None,
) -> list[Sample]:
    whole = path.is_file() and path.suffix.lower() != RECORDS
    documents = (
        ["".join(unit.text for unit in units)] if whole else [unit.text for unit in units if unit.text]
    )
    ids, ends = _stream(documents, tokenizer)
    total = len(ids) // source.length
    if not total:
        raise RecipeError(
            f"{place}: {source.path}",
            f"{len(ids)} tokens",
            f"at least one window of {source.length}",
            "Lower the length.",
        )
    text = "".join(documents)
    samples = []
    for index in _choose(total, source.samples, seed):
        at = slice(int(index) * source.length, (int(index) + 1) * source.length)
        window = ids[at].copy()
        if ends is None:
            scored = str(tokenizer.decode(window[1:], skip_special_tokens=True))
        else:
            scored = text[ends[at][0] : ends[at][-1]]
        samples.append(Sample(window, len(scored.encode()), scored))
    return samples


def _stream(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray | None]:
    """All documents' ids, and the position in their joined text where each token ends (None: no offsets known)."""
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    ids, ends, start = [], [], 0
    for document in documents:
        encoded = tokenizer(
            document, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
        )
        ids.append(np.array(bos + encoded["input_ids"], np.int64))
        if tokenizer.is_fast:
            end = np.array([end for _, end in encoded["offset_mapping"]], np.int64)
            end = np.maximum.accumulate(end) if len(end) else end
            end[-1:] = len(document)  # what is dropped behind the last token is the last token's
            ends.append(np.concatenate([np.zeros(len(bos), np.int64), end]) + start)
        start += len(document)
    return np.concatenate(ids), np.concatenate(ends) if tokenizer.is_fast else None
