"""Calibration and held-out text: from a file, a folder or a dataset to token sequences, the same on every machine.

Causal models read windows: every document (a text file, a record, a file of a folder) follows a bos token
where the tokenizer has one, all are joined, and the stream is cut into pieces of `length` tokens; the
remainder is dropped. Encoders read one sequence a unit (units.py: a line, a record, a file), with the
tokenizer's special tokens, truncated to `length`.

A window's text is what its predicted tokens (all but the first) stand for: from the end of the first token to
the end of the last, by the tokenizer's own offsets. A token thus owns every character since the one before
it, also what normalisation drops, and the bytes of all tokens add up to the bytes of the text, which bits per
byte rests on.

What brings labels, pairs, choices or images is read by reading.py; here is the source they share.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from .errors import PreflightError, RecipeError
from .pass_ import STRICT
from .paths import resolve_path
from .tables import DATASETS
from .tokens import Input, Tokens
from .units import RECORDS, Part, bounds, files, units

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Name = Annotated[str, Field(min_length=1)]
UNASKED, UNNAMED = -1, -2
"""Targets of a token that does not count, and of one that counts though nothing says what it should have named."""
MOST_TEXT = 64_000_000  # characters of a stream: about a minute and 3 GB in the tokenizer


@dataclass(frozen=True, config=STRICT)
class Source:
    """Where data comes from and how much of it is used.

    Attributes:
        path: a .txt (or other text) file, a table (.jsonl, .csv, .tsv, .parquet), a folder of such, a folder with a
            sub-folder of images for each class, `package:NAME/inner/path`, or `datasets:ID` (a folder of
            `save_to_disk` or a hub id).
        field: the record's field that holds the text, or of a question the context before its choices.
        samples: how many sequences to take; fewer if there are fewer.
        length: tokens of a window (causal) or the most tokens of a sequence (encoders).
        span: share of the units (lines, records, files, images of a class) to use, e.g. `0%-60%`; all if None.
        label: the field that holds the class, the score, or the number of the right choice from 0.
        pair: the two fields that hold the texts of a pair; instead of `field`. A model of features reads them apart,
            a classifier in one sequence.
        choices: the fields that hold a question's answers; or one field that holds a list of them.
        columns: names of the columns of a .csv or .tsv without a heading.
        delimiter: of a .csv or .tsv, if not a comma or a tab as its ending says. With a tab, quotes are plain text.
        split: of a dataset, e.g. `validation`.
        subset: the dataset's configuration, where it has several.
    """

    path: str
    field: str = "text"
    samples: Annotated[int, Field(gt=0)] = 128
    length: Annotated[int, Field(gt=1)] = 512
    span: str | None = None
    label: Name | None = None
    pair: tuple[Name, Name] | None = None
    choices: Annotated[tuple[Name, ...], Field(min_length=1)] = ()
    columns: Annotated[tuple[Name, ...], Field(min_length=1)] = ()
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    split: Name | None = None
    subset: Name | None = None

    @field_validator("span")
    @classmethod
    def _span_is_a_share(cls, span: str | None) -> str | None:
        bounds(span)
        return span

    @model_validator(mode="after")
    def _options_fit(self) -> Source:
        if self.pair and self.choices:
            raise ValueError("pair and choices exclude each other")
        if self.choices and not self.label:
            raise ValueError("choices need label, the field with the number of the right one")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("columns name one twice")
        is_dataset = self.path.startswith(DATASETS)
        for name in ("split", "subset"):
            if getattr(self, name) and not is_dataset:
                raise ValueError(f"{name} is of a dataset, `path: {DATASETS}ID`")
        for name in ("columns", "delimiter"):
            if getattr(self, name) and (is_dataset or Path(self.path).suffix.lower() not in (".csv", ".tsv")):
                raise ValueError(f"{name} is of a .csv or .tsv")
        return self

    @property
    def labelled(self) -> bool:
        """Whether the records bring more than text."""
        return bool(self.label or self.pair or self.choices)

    def part(self, base: Path | None, place: str) -> Part:
        """The source with its path resolved."""
        is_dataset = self.path.startswith(DATASETS)
        path = _dataset_path(self.path, base) if is_dataset else resolve_path(self.path, base, f"{place}.path")
        reference = f"{DATASETS}{path}" if is_dataset else self.path
        return Part(
            path, self.field, self.span, place, reference, self.columns, self.delimiter, self.split, self.subset
        )


def _dataset_path(reference: str, base: Path | None) -> Path:
    """A dataset's folder where there is one, else its id as a path."""
    name = Path(reference.removeprefix(DATASETS)).expanduser()
    beside = base / name if base is not None else name
    return beside if not name.exists() and beside.is_dir() else name


@plain_dataclass(frozen=True, eq=False)
class Sample:
    """One token sequence or image, or several that are scored together: the texts of a pair, a question's choices.

    Attributes:
        ids: int64 `[n]`, or an image's pixels, float32 `[channels, height, width]`.
        bytes: UTF-8 bytes of `text`.
        text: what is scored: for a window the text of its predicted tokens, for a choice its own text, else that of
            all tokens; for an image its file.
        label: the class' number, the text's or pair's score, or the number of the right choice; None without labels.
        targets: int64 `[n]`: what each row of a model's answer should name, or `UNASKED`, or `UNNAMED`; None for the
            next token everywhere.
        others: the second text of a pair, the choices after the first.
        types: int64 `[n]`: the text of a pair that each token is of, see `Tokens`; None without.
    """

    ids: np.ndarray
    bytes: int
    text: str
    label: float | None = None
    targets: np.ndarray | None = None
    others: tuple[Sample, ...] = ()
    types: np.ndarray | None = None

    @property
    def input(self) -> Input:
        """What a model is asked for this part."""
        return self.ids if self.types is None else Tokens(self.ids, self.types)

    @property
    def parts(self) -> tuple[Sample, ...]:
        """All that a model is asked for this sample, itself first."""
        return (self, *self.others)


def read_samples(
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    windows: bool,
    seed: int | None,
    base: Path | None,
    place: str = "data",
    offline: bool = False,
) -> list[Sample]:
    """The source's samples of plain text, in the order of the text.

    Of more than `source.samples`, evenly spaced ones are taken if `seed` is None (held-out text), else a
    seeded choice without replacement (calibration). Fewer are no error: compare the length of the answer.

    Args:
        source: where from and how much.
        tokenizer: of the checkpoint.
        windows: cut a stream into windows (causal models), or one sequence a unit (encoders).
        seed: seed of the choice, or None.
        base: folder that relative paths may start from.
        place: what the source is called in errors, e.g. `data.heldout`.
        offline: never ask a hub for a dataset.

    Raises:
        RecipeError: the source does not have what the recipe names (field, span, text for one window).
        PreflightError: a file is missing, blank, not UTF-8, not JSON, too long; or there is no tokenizer.
    """
    if tokenizer is None:
        raise PreflightError(place, "a checkpoint without a tokenizer", "one with a tokenizer to read text")
    part = source.part(base, place)
    texts = units(part, offline)
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
    lines = part.path.is_file() and part.path.suffix.lower() not in RECORDS
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
    cuts = (slice(i * source.length, (i + 1) * source.length) for i in choose(total, source.samples, seed))
    return [_window(ids[cut], None if ends is None else text[ends[cut][0] : ends[cut][-1]], tokenizer) for cut in cuts]


def overlap(a: Source, b: Source, base: Path | None) -> bool:
    """Whether two sources share text: a file that both read, or a copy of it, in shares that meet. Datasets share it
    if they are the same, split and subset included.

    Raises:
        TersorError: see `units.files`.
    """
    if a.path.startswith(DATASETS) and (a.path, a.subset, a.split) == (b.path, b.subset, b.split):
        (low, high), (from_, to) = bounds(a.span), bounds(b.span)
        return max(low, from_) < min(high, to)
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


def choose(total: int, wanted: int, seed: int | None) -> list[int]:
    """Numbers of `wanted` units among `total`: evenly spaced, or a seeded choice; rising."""
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
    for index in choose(len(kept), source.samples, seed):
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
