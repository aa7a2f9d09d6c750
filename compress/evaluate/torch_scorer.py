"""A checkpoint as a scorer: torch, float32 arithmetic on the weights as stored.

Sequences are sorted by length and run in right-padded batches under a token budget, so that little is
computed for padding; answers come back in the order given. Right padding with a mask leaves real tokens
alone: causal attention never looks at it, encoders mask it. Answers to one question, which share its context, are one
row of a causal model (tree.py). Images run in batches of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from ..errors import RecipeError
from ..tokens import Input, Tokens, stacked
from .pooling import Pooling
from .scorer import OUTPUTS, Output, output_of
from .tree import Tree, sees_everything, trees

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

IMAGES = 1 << 21  # numbers of a batch of images: 13 of 224 × 224
Item = TypeVar("Item", Tokens, Tree)
TOKENS = 1024  # of a batch, padding included: 512 to 1024 ran fastest a token on a 5M decoder and on MiniLM


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run with this many intra-op threads (None: leave them) and restore what was."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of sequences in batches, longest first, at most `tokens` each with padding, or one sequence."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    found: list[list[int]] = []
    for index in order:
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def in_batches(items: Sequence[Item], answer: Callable[[list[Item]], list[np.ndarray]]) -> list[np.ndarray]:
    """The answers to items, asked in batches of `TOKENS`, in the items' order."""
    found: dict[int, np.ndarray] = {}
    for batch in batches(list(map(len, items)), TOKENS):
        found.update(zip(batch, answer([items[i] for i in batch]), strict=True))
    return [found[i] for i in range(len(items))]


def positions(checkpoint: Checkpoint) -> int | None:
    """The longest sequence that the model has positions for, None if the config sets no limit."""
    return checkpoint.layout.longest


class TorchScorer:
    """Satisfies `Scorer`.

    Attributes:
        output: what the model answers, see `output_of`.
        parameters: real parameters, each storage once.
        bytes: of the stored weights.
        threads: intra-op threads during a call, None for torch's own setting.
        pooling: how token vectors become an embedding.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None):
        task = checkpoint.layout.task
        if task not in OUTPUTS:
            raise RecipeError("task", repr(task), f"one that can be measured: {', '.join(sorted(OUTPUTS))}")
        self.output: Output = output_of(task, checkpoint.layout.sizes["labels"])
        self.parameters = checkpoint.layout.parameters
        self.bytes = checkpoint.layout.bytes
        self.threads = threads
        self.pooling = Pooling.of(checkpoint.side_files)
        self._model = checkpoint.model(torch.float32)
        self._pixels = checkpoint.layout.arch.inputs == "pixels"
        if self._pixels and self.output != "classes":
            raise RecipeError("task", f"{task!r} of images", "image-classification")
        layout = checkpoint.layout
        self._first = layout.first_position
        self._shares = self.output == "logits" and layout.arch.position_ids and sees_everything(layout.config)
        self._limit = positions(checkpoint)
        self._vocabulary = layout.families.get("vocab", 0)
        self._types = layout.families["token_types"] if layout.arch.token_types else 1

    def __call__(self, sequences: Sequence[Input]) -> list[np.ndarray]:
        """As `Scorer` says.

        Raises:
            RecipeError: a sequence is empty, longer than the model's positions, of another vocabulary or of token types
                that the model does not have; text for a model of images, or the other way round.
        """
        read = [Tokens.of(sequence) for sequence in sequences]
        wanted = 3 if self._pixels else 1
        for one in read:
            if one.ids.ndim != wanted:
                kinds = {1: "text", 3: "images"}
                raise RecipeError("data", kinds.get(one.ids.ndim, str(one.ids.shape)), kinds[wanted])
        with torch_threads(self.threads), torch.inference_mode():
            return self._see([one.ids for one in read]) if self._pixels else self._read(read)

    def _see(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        answers: list[np.ndarray] = []
        start = 0
        while start < len(images):
            shape = images[start].shape
            alike = (i for i in range(start, len(images)) if images[i].shape != shape)
            end = min(next(alike, len(images)), start + max(1, IMAGES // images[start].size))
            pixels = torch.from_numpy(np.stack(images[start:end]).astype(np.float32, copy=False))
            answers += list(self._model(pixel_values=pixels).logits.float().numpy().copy())
            start = end
        return answers

    def _read(self, sequences: Sequence[Tokens]) -> list[np.ndarray]:
        self._refuse(sequences)
        if not self._shares:
            return in_batches(sequences, self._batch)
        rows = trees([sequence.ids for sequence in sequences])
        answers = in_batches(rows, self._rows)
        return [one for row, answer in zip(rows, answers, strict=True) for one in row.split(answer)]

    def _rows(self, rows: Sequence[Tree]) -> list[np.ndarray]:
        """Logits of whole rows, `[len, vocab]` each."""
        if any(len(tree.sequences) > 1 for tree in rows):
            return self._branched(rows)
        return self._batch([Tokens(tree.ids) for tree in rows])

    def _refuse(self, sequences: Sequence[Tokens]) -> None:
        lengths = [len(sequence) for sequence in sequences]
        if lengths and min(lengths) == 0:
            raise RecipeError("data", "a sequence without tokens", "at least one token")
        if self._limit and max(lengths, default=0) > self._limit:
            raise RecipeError(
                "data: length", str(max(lengths)), f"at most {self._limit}, the model's positions"
            )
        largest = max((int(sequence.ids.max()) for sequence in sequences), default=0)
        if largest >= self._vocabulary:
            raise RecipeError(
                "data",
                f"token {largest}",
                f"ids below {self._vocabulary}",
                "The tokenizer is of another model.",
            )
        kind = max((int(sequence.kinds.max()) for sequence in sequences), default=0)
        if kind >= self._types:
            has = f"types below {self._types}" if self._types > 1 else "a model that reads token types"
            raise RecipeError("data", f"token type {kind}", has)

    def _branched(self, rows: Sequence[Tree]) -> list[np.ndarray]:
        width = max(map(len, rows))
        ids, places = (torch.zeros((len(rows), width), dtype=torch.int64) for _ in range(2))
        seen = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no softmax is empty
        for row, tree in enumerate(rows):
            ids[row, : len(tree)] = torch.from_numpy(tree.ids)
            places[row, : len(tree)] = torch.from_numpy(tree.positions)
            seen[row, : len(tree), : len(tree)] = torch.from_numpy(tree.mask)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
        asked = {"input_ids": ids, "position_ids": places + self._first, "attention_mask": mask, "use_cache": False}
        logits = self._model(**asked).logits.float()
        return [logits[row, : len(tree)].numpy() for row, tree in enumerate(rows)]

    def _batch(self, sequences: Sequence[Tokens]) -> list[np.ndarray]:
        width = max(map(len, sequences))
        ids, mask = (torch.zeros((len(sequences), width), dtype=torch.int64) for _ in range(2))
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence.ids)
            mask[row, : len(sequence)] = 1
        asked: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if (types := stacked(sequences, width)) is not None:
            asked["token_type_ids"] = torch.from_numpy(types)
        if self.output in ("classes", "number"):
            return list(self._model(**asked).logits.float().numpy().copy())
        if self.output != "embedding":
            extra = {"use_cache": False} if self.output == "logits" else {}
            logits = self._model(**asked, **extra).logits.float()
            return [logits[row, : len(sequence)].numpy().copy() for row, sequence in enumerate(sequences)]
        hidden = self._model(**asked).last_hidden_state
        return list(self.pooling.pool(hidden, mask).float().numpy().copy())
