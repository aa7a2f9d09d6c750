"""Rows: what a training step reads. Several sequences may share a row without seeing each other.

A row of text is planned by compress/packing.py. How a model is told who shares it differs by architecture: most
decoders make a block-diagonal mask from position ids that start anew (and put their sliding windows over it); others
take a mask `[batch, 1, width, width]`, boolean for sdpa, additive for eager. `text` tries them in this order on the
model itself and takes the first under which packed answers equal those alone; a model that passes none gets a
sequence a row. Known trainers trust flash-attention's varlen kernels for this, which no CPU has, or let sequences
see each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ..packing import PackedBatch, pack
from ..tokens import Input, Tokens
from .losses import IGNORED, without_cache

Apart = Literal["positions", "mask", "padding"]
"""How sequences of a row are kept apart: by position ids, by a 4-D mask, or by having one each."""

TOLERANCE = 1e-4
"""Of the largest logit: a leak is of the order of the logits, float32 noise a thousandth of this."""


@dataclass(eq=False)
class Rows(Dataset):
    """Training examples: `len`, `[i]`, and `collate` to make a batch of several.

    Attributes:
        items: one dictionary of arrays a row; `targets` among them.
        apart: how sequences in a row are kept apart; empty where a row is one example.
        causal: whether a token sees only those before it.
        attention: the model's attention implementation, which decides a mask's dtype.
    """

    items: Sequence[dict[str, Any]]
    apart: Apart | Literal[""] = ""
    causal: bool = True
    attention: str = "sdpa"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def at(self, index: int, number: int) -> dict[str, Any]:
        """Row `index` as round `number` through the rows reads it."""
        return self[index]

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of one width as a batch: the model's arguments and `targets`."""
        batch = {name: torch.as_tensor(np.stack([row[name] for row in rows])) for name in rows[0]}
        segments = batch.pop("segments", None)
        if segments is None or self.apart in ("", "positions"):
            return batch
        if self.apart == "padding":
            return {**batch, "attention_mask": segments.ne(0).long()}
        return {**batch, "attention_mask": block_mask(segments, self.causal, self.attention)}


def block_mask(segments: torch.Tensor, causal: bool, attention: str = "sdpa") -> torch.Tensor:
    """Who may see whom, `[rows, 1, width, width]`, for segments `[rows, width]`.

    Boolean for sdpa; for eager float32, 0 or the lowest number. Padding sees padding: no row of a softmax is empty.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    if causal:
        same = same.tril()
    if attention == "sdpa":
        return same
    return torch.zeros(same.shape).masked_fill_(~same, torch.finfo(torch.float32).min)


def text(
    model: nn.Module,
    sequences: Sequence[Input],
    *,
    width: int | None = None,
    causal: bool = True,
    first_position: int = 0,
    apart: Apart | None = None,
    labels: Sequence[int] | None = None,
) -> Rows:
    """Rows of token sequences, packed where the model can keep them apart.

    Args:
        model: what will be trained; asked for its forward's arguments, and run on a few short rows.
        sequences: int64 `[n_i]`, or with types; of a causal model those under two tokens are left out.
        width: tokens of a row, by default those of the longest sequence.
        causal: targets are the next tokens; otherwise the tokens themselves.
        first_position: position id of a sequence's first token.
        apart: how to keep sequences apart, if it is known.
        labels: a class for each sequence; such a model answers once a row, so each sequence has its own.

    Raises:
        ValueError: no sequence, or one over `width`.
    """
    if labels is not None:
        return _classes(model, sequences, labels, width, first_position)
    kept = [Tokens.of(s) for s in sequences if len(s) > int(causal)]
    if not kept:
        raise ValueError("no sequence to train on")
    width = width or max(map(len, kept))
    takes = inspect.signature(model.forward).parameters
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", "sdpa"))
    lengths = [len(s) for s in kept]
    if apart is None:
        apart = chosen(model, kept, causal, first_position, attention)
    plan = [[i] for i in range(len(kept))] if apart == "padding" else pack(lengths, width)
    packed = PackedBatch.of(kept, plan, width)
    return Rows(_items(packed, causal, first_position, "position_ids" in takes), apart, causal, attention)


def _classes(
    model: nn.Module, sequences: Sequence[Input], labels: Sequence[int], width: int | None, first: int
) -> Rows:
    if len(sequences) != len(labels) or not len(labels):
        raise ValueError(f"{len(sequences)} sequences and {len(labels)} labels")
    packed = PackedBatch.of(sequences, [[i] for i in range(len(labels))], width or max(map(len, sequences)))
    positions = "position_ids" in inspect.signature(model.forward).parameters
    items = _items(packed, False, first, positions)
    return Rows(
        [{**row, "targets": np.int64(label)} for row, label in zip(items, labels, strict=True)], "padding", False
    )


def _items(packed: PackedBatch, causal: bool, first: int, positions: bool) -> list[dict[str, np.ndarray]]:
    targets = np.where(packed.segments > 0, packed.ids, IGNORED)
    if causal:
        follows = np.zeros(packed.ids.shape, bool)
        follows[:, :-1] = (packed.segments[:, :-1] == packed.segments[:, 1:]) & (packed.segments[:, 1:] > 0)
        following = np.roll(packed.ids, -1, axis=1)
        targets = np.where(follows, following, IGNORED)
    columns = {"input_ids": packed.ids, "targets": targets, "segments": packed.segments}
    if packed.types is not None:
        columns["token_type_ids"] = packed.types
    if positions:
        columns["position_ids"] = packed.positions + first
    return [{name: column[row] for name, column in columns.items()} for row in range(len(packed.ids))]


@torch.no_grad()
def chosen(
    model: nn.Module, sequences: Sequence[Input], causal: bool = True, first: int = 0, attention: str = "sdpa"
) -> Apart:
    """The first way under which packed answers are those alone, tried on the two longest sequences."""
    longest = sorted(sequences, key=len)[-2:]
    if len(longest) < 2:
        return "padding"
    takes = "position_ids" in inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    training = model.training
    without_cache(model.eval())
    try:
        alone = [
            answer(model, Rows(_items(PackedBatch.of([s], [[0]], len(s)), causal, first, takes)), device)[0]
            for s in longest
        ]
        both = PackedBatch.of(longest, [[0, 1]], sum(map(len, longest)) + 3)
        ways: tuple[Apart, ...] = ("positions", "mask") if takes else ()
        for way in ways:
            found = answer(model, Rows(_items(both, causal, first, takes), way, causal, attention), device)[0]
            start, same = 0, True
            for one in alone:
                part = found[start : start + len(one)]
                same &= bool((part - one).abs().max() <= TOLERANCE * one.abs().max())
                start += len(one)
            if same:
                return way
    finally:
        model.train(training)
    return "padding"


def answer(model: nn.Module, rows: Rows, device: torch.device) -> torch.Tensor:
    """The model's answer to all rows: logits, or token states where there are none."""
    batch = {name: value.to(device) for name, value in rows.collate(rows.items).items() if name != "targets"}
    output = model(**batch)
    found: torch.Tensor = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    return found.float()


def images(pixels: Sequence[np.ndarray], labels: Sequence[int]) -> Rows:
    """Rows of images, float32 `[channels, height, width]` of one size, with their classes."""
    if len(pixels) != len(labels):
        raise ValueError(f"{len(pixels)} images and {len(labels)} labels")
    items = [
        {"pixel_values": np.asarray(image, np.float32), "targets": np.int64(label)}
        for image, label in zip(pixels, labels, strict=True)
    ]
    return Rows(items)
