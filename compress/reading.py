"""From a source to the samples that a model of some task is asked.

    text-generation       windows of text; or questions with choices, each choice a sequence behind its context
    feature-extraction    texts; or pairs of texts with a score
    text-classification   texts (or two in one sequence) with a class; or with a score, where the model has one label
    token-classification  texts; or lists of words with a class each
    fill-mask             texts, 15 % of the tokens of each behind the mask token
    image-classification  a folder of images for each class

Masks: the tokens to hide are drawn by a generator seeded with the text's own ids and the source's seed, so a text is
masked alike wherever it stands and whoever is measured. All of them become the mask token (BERT's training left a
fifth of them visible; for a measurement that would only blur it). Special tokens stay.

Tags: the words are joined by spaces, and a word's class is asked of its first token alone, as in the field's usual
evaluation; of text without tags every token's answer counts.

Choices: the context, a space unless one stands there already, and the choice are tokenised together, and the choice's
tokens are those that end inside it, so a token across the seam is the choice's. A row that is too long loses its
context's beginning. Bytes are those of the choice's text, by which the length-normalised accuracy divides, as
lm-evaluation-harness' `acc_norm` does.
"""

from __future__ import annotations

import json
import string
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import UNASKED, UNNAMED, Sample, Source, choose, read_samples
from .errors import PreflightError, RecipeError
from .evaluate.scorer import Output, output_of
from .images import Preparation, numbers
from .tables import Record
from .units import classes, rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .checkpoint import Checkpoint
    from .layout import Layout

MASKED = 0.15
ALLOWED = {
    "logits": ("choices", "label"),
    "embedding": ("pair", "label"),
    "classes": ("pair", "label"),
    "number": ("pair", "label"),
    "token_classes": ("label",),
}
"""What a source may name beside its text, by what the model answers."""


@dataclass(frozen=True)
class Reader:
    """What the reading of data must know of a model.

    Attributes:
        layout: of the model.
        tokenizer: its own, None if it has none.
        side_files: its small files by name; for images, how they are prepared.
    """

    layout: Layout
    tokenizer: PreTrainedTokenizerBase | None
    side_files: Mapping[str, bytes]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Reader:
        """The reader of a checkpoint."""
        return cls(checkpoint.layout, checkpoint.tokenizer, checkpoint.side_files)

    @classmethod
    def at(cls, directory: Path) -> Reader:
        """The reader of an artifact's directory."""
        from .pretrained import load_tokenizer, read_config, read_side_files

        task = json.loads((directory / "artifact.json").read_text("utf-8"))["task"]
        return cls(read_config(directory, task), load_tokenizer(directory), read_side_files(directory))

    @property
    def output(self) -> Output:
        """What the model answers."""
        return output_of(self.layout.task, self.layout.sizes["labels"])

    def read(
        self, source: Source, *, seed: int | None, base: Path | None, place: str = "data", offline: bool = False
    ) -> list[Sample]:
        """The source's samples.

        Args:
            source: where from and how much.
            seed: of the choice among more samples than wanted; None takes evenly spaced ones.
            base: folder that relative paths may start from.
            place: what the source is called in errors, e.g. `data.heldout`.
            offline: never ask a hub for a dataset.

        Raises:
            RecipeError: the source does not have what it names, or names what the model does not read.
            PreflightError: a file is missing or broken, or the model lacks a tokenizer or image processor.
        """
        if self.layout.arch.inputs == "pixels":
            return self._images(source, seed, base, place)
        self._refuse(source, ALLOWED.get(self.output, ()), place)
        if source.labelled and self.tokenizer is None:
            raise PreflightError(place, "a checkpoint without a tokenizer", "one with a tokenizer to read text")
        if not source.labelled:
            windows = self.output == "logits"
            samples = read_samples(
                source, self.tokenizer, windows=windows, seed=seed, base=base, place=place, offline=offline
            )
            if self.output == "token_classes":
                return [replace(s, targets=np.full(len(s.ids), UNNAMED)) for s in samples]
            return [self._masked(s, seed or 0, place) for s in samples] if self.output == "token_logits" else samples
        part = source.part(base, place)
        records = rows(part, offline)
        if not records:
            raise PreflightError(f"{place}.path: {part.path}", "no records", "at least one")
        make = {
            "logits": self._question,
            "embedding": self._pair,
            "classes": self._labelled,
            "number": self._labelled,
            "token_classes": self._tagged,
        }[self.output]
        return [make(records[i], source) for i in choose(len(records), source.samples, seed)]

    def _refuse(self, source: Source, allowed: tuple[str, ...], place: str) -> None:
        for name in ("label", "pair", "choices"):
            if getattr(source, name) and name not in allowed:
                which = f"for a model of {self.layout.task}"
                raise RecipeError(f"{place}.{name}", f"{name} {which}", " or ".join(allowed) or "text alone")
        if self.output == "logits" and source.label and not source.choices:
            raise RecipeError(f"{place}.label", "a label without choices", "choices, the fields that hold the answers")
        if self.output == "embedding" and bool(source.label) != bool(source.pair):
            lone, other = ("label", "pair") if source.label else ("pair", "label")
            raise RecipeError(f"{place}.{lone}", f"{lone} without {other}", "both: two texts and their score")

    # --- text

    def _sample(self, source: Source, *texts: str) -> Sample:
        """A text, or two in one sequence: what the tokenizer puts between them tells them apart, and token types do
        where the model reads them.
        """
        assert self.tokenizer is not None
        encoded = self.tokenizer(*texts, truncation=True, max_length=source.length)
        types = np.asarray(encoded.get("token_type_ids", ()), np.int64)
        told = types if types.any() and self.layout.arch.token_types else None
        ids = np.asarray(encoded["input_ids"], np.int64)
        return Sample(ids, len("".join(texts).encode()), " | ".join(texts), types=told)

    def _pair(self, record: Record, source: Source) -> Sample:
        assert source.pair is not None
        first, second = (self._sample(source, record.text(field, "pair")) for field in source.pair)
        assert source.label is not None
        return replace(first, label=score(record, source.label), others=(second,))

    def _labelled(self, record: Record, source: Source) -> Sample:
        texts = [record.text(field, "pair") for field in source.pair] if source.pair else [record.text(source.field)]
        sample = self._sample(source, *texts)
        if source.label is None:
            return sample
        if self.output == "number":
            return replace(sample, label=score(record, source.label))
        return replace(sample, label=float(self._class(record.value(source.label, "label"), record.place)))

    def _class(self, value: Any, place: str) -> int:
        labels, count = self._labels(), self.layout.families["labels"]
        if isinstance(value, str) and value in labels:
            return labels[value]
        number = whole(value)
        if number is None or not 0 <= number < count:
            known = ", ".join(list(labels)[:10])
            raise RecipeError(place, f"label {value!r}", f"a class of the model: 0 to {count - 1}, or {known}")
        return number

    def _tagged(self, record: Record, source: Source) -> Sample:
        tokenizer = self.tokenizer
        assert tokenizer is not None
        assert source.label is not None
        if not tokenizer.is_fast:
            raise PreflightError("data: label", "a tokenizer without offsets", "a fast tokenizer")
        words, tags = record.value(source.field, "field"), record.value(source.label, "label")
        for field, value in ((source.field, words), (source.label, tags)):
            if not isinstance(value, (list, tuple)) or len(value) != len(words):
                wanted = "a list of words and one of their classes"
                raise RecipeError(record.place, f"{field} {str(value)[:60]!r}", wanted)
        if not all(isinstance(word, str) and word.strip() for word in words):
            raise RecipeError(record.place, f"{source.field} {str(words)[:60]!r}", "words")
        text = " ".join(words)
        encoded = tokenizer(text, truncation=True, max_length=source.length, return_offsets_mapping=True)
        ends = np.array([end for _, end in encoded["offset_mapping"]])
        targets, start = np.full(len(ends), UNASKED), 0
        for word, tag in zip(words, tags, strict=True):
            first = int(np.argmax(ends > start))
            if ends[first] > start and targets[first] == UNASKED:  # else it was cut off
                targets[first] = self._class(tag, record.place)
            start += len(word) + 1
        return Sample(np.asarray(encoded["input_ids"], np.int64), len(text.encode()), text, targets=targets)

    def _labels(self) -> dict[str, int]:
        return {str(name): int(number) for name, number in (self.layout.config.label2id or {}).items()}

    def _masked(self, sample: Sample, seed: int, place: str) -> Sample:
        tokenizer = self.tokenizer
        if tokenizer is None or tokenizer.mask_token_id is None:
            raise PreflightError(place, "a tokenizer without a mask token", "one with, to hide tokens behind")
        free = np.flatnonzero(~np.isin(sample.ids, tokenizer.all_special_ids))
        wanted = min(len(free), max(1, round(MASKED * len(free))))
        generator = np.random.default_rng([seed, zlib.crc32(sample.ids.tobytes())])
        hidden = generator.choice(free, wanted, replace=False) if len(free) else free
        ids, targets = sample.ids.copy(), np.full(len(sample.ids), -1, np.int64)
        targets[hidden] = ids[hidden]
        ids[hidden] = tokenizer.mask_token_id
        return replace(sample, ids=ids, targets=targets)

    # --- questions

    def _question(self, record: Record, source: Source) -> Sample:
        context = record.text(source.field)
        answers = self._answers(record, source)
        assert source.label is not None
        value = record.value(source.label, "label")
        letter = string.ascii_uppercase.find(value) if isinstance(value, str) and len(value) == 1 else -1
        number = letter if letter >= 0 else whole(value)
        if number is None or not 0 <= number < len(answers):
            raise RecipeError(record.place, f"label {value!r}", f"the right choice's number, 0 to {len(answers) - 1}")
        first, *others = (self._choice(context, answer, source, record.place) for answer in answers)
        return replace(first, label=float(number), others=tuple(others))

    def _answers(self, record: Record, source: Source) -> list[str]:
        if len(source.choices) > 1:
            found = [record.text(field, "choices") for field in source.choices]
        else:
            listed = record.value(source.choices[0], "choices")
            texts = isinstance(listed, (list, tuple)) and all(isinstance(text, str) for text in listed)
            if not texts or len(listed) < 2:
                found_here = f"{source.choices[0]} {str(listed)[:60]!r}"
                raise RecipeError(record.place, found_here, "a list of two texts or more")
            found = list(listed)
        if empty := [number for number, text in enumerate(found) if not text.strip()]:
            raise RecipeError(record.place, f"choice {empty[0]} without text", "text")
        return found

    def _choice(self, context: str, answer: str, source: Source, place: str) -> Sample:
        tokenizer = self.tokenizer
        assert tokenizer is not None
        if not tokenizer.is_fast:
            raise PreflightError("data: choices", "a tokenizer without offsets", "a fast tokenizer")
        seam = "" if not context or context[-1].isspace() or answer[0].isspace() else " "
        start = len(context.rstrip())  # white space at the seam is the choice's, as most tokenizers have it
        text = context + seam + answer
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        ids = np.array([*bos, *encoded["input_ids"]], np.int64)
        ends = np.array([-1] * len(bos) + [end for _, end in encoded["offset_mapping"]])
        first = int(np.argmax(ends > start)) if (ends > start).any() else len(ids)
        if first in (0, len(ids)):
            what = "no token before the choice" if first == 0 else "a choice without tokens"
            raise RecipeError(place, what, "a context and a choice", "A model says nothing of a first token.")
        surplus = len(ids) - source.length
        if surplus > 0:
            if first - surplus < max(1, len(bos)):
                raise RecipeError(place, f"a choice of {len(ids) - first} tokens", f"fewer than {source.length}")
            ids, first = np.concatenate([ids[: len(bos)], ids[len(bos) + surplus :]]), first - surplus
        targets = np.full(len(ids), -1, np.int64)
        targets[first - 1 : -1] = ids[first:]
        return Sample(ids, len(answer.encode()), answer, targets=targets)

    # --- images

    def _images(self, source: Source, seed: int | None, base: Path | None, place: str) -> list[Sample]:
        self._refuse(source, (), place)
        part = source.part(base, place)
        where = f"{place}.path: {part.path}"
        found = classes(part)
        known = numbers(list(found), self._labels(), self.layout.families["labels"], where)
        listed = [(path, known[name]) for name, paths in found.items() for path in paths]
        prepare = Preparation(self.side_files)
        samples = []
        for i in choose(len(listed), source.samples, seed):
            path, number = listed[i]
            pixels = prepare(path)
            self._fits(pixels, path)
            samples.append(Sample(pixels, path.stat().st_size, f"{path.parent.name}/{path.name}", float(number)))
        return samples

    def _fits(self, pixels: np.ndarray, path: Path) -> None:
        size = getattr(self.layout.config, "image_size", None)
        sides = (size, size) if isinstance(size, int) else tuple(size or pixels.shape[1:])
        expected = (self.layout.families["channels"], *sides)
        if pixels.shape != expected:
            found = f"{list(pixels.shape)} after preparation"
            raise RecipeError(str(path), found, f"{list(expected)}", "Is preprocessor_config.json the model's?")


def whole(value: Any) -> int | None:
    """A whole number, also written as text; None if it is none."""
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        return None
    return int(value)


def score(record: Record, field: str) -> float:
    """A record's number.

    Raises:
        RecipeError: the field holds none, or one that is not finite.
    """
    value = record.value(field, "label")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise RecipeError(record.place, f"{field} {str(value)[:60]!r}", "a number, the score")
    return number
