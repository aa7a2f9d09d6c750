"""Calibration sequences as batches of one forward: alike in length, padding known and left out of every sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import PreflightError
from ..layout import Layout
from ..tokens import Input, Tokens, stacked

BATCH_TOKENS = 4096
"""Tokens of one forward: enough for the matrix products to run at full speed."""


class Batch:
    """Sequences of one forward.

    Attributes:
        inputs: keyword arguments of the model.
        real: bool `[batch, length]`, False where padded; None if nothing is.
    """

    def __init__(self, sequences: Sequence[Input], pixels: bool = False):
        self.real: torch.Tensor | None = None
        tokens = [Tokens.of(s) for s in sequences]
        if pixels:
            images = np.stack([one.ids for one in tokens])
            self.inputs = {"pixel_values": torch.as_tensor(images, dtype=torch.float32)}
            return
        lengths = torch.tensor([len(s) for s in tokens])
        width = int(lengths.max())
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        for row, sequence in zip(ids, tokens, strict=True):
            row[: len(sequence)] = torch.as_tensor(np.asarray(sequence.ids, dtype=np.int64))
        real = torch.arange(width)[None] < lengths[:, None]
        self.inputs = {"input_ids": ids}
        if (types := stacked(tokens, width)) is not None:
            self.inputs["token_type_ids"] = torch.from_numpy(types)
        if not bool(real.all()):
            self.real = real
            self.inputs["attention_mask"] = real.long()

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[batch, length, n]` → `[tokens, n]` without padding; some forwards have flattened it already."""
        flat = hidden.flatten(0, -2)
        return flat if self.real is None else flat[self.real.flatten()]


def batches(sequences: Sequence[Input], layout: Layout, tokens: int = BATCH_TOKENS) -> list[Batch]:
    """Sequences in batches of about `tokens` tokens (pixels: of 16 images), alike in length."""
    if layout.arch.inputs == "pixels":
        return [Batch(sequences[i : i + 16], pixels=True) for i in range(0, len(sequences), 16)]
    groups: list[list[Input]] = [[]]
    for sequence in sorted(sequences, key=len):
        if groups[-1] and (len(groups[-1]) + 1) * len(sequence) > tokens:
            groups.append([])
        groups[-1].append(sequence)
    return [Batch(group) for group in groups if group]


def sample(sequences: Sequence[Input], tokens: int, seed: int) -> list[Input]:
    """Sequences drawn without replacement until they hold about `tokens` tokens, in their original order."""
    taken, held = [], 0
    for number in np.random.default_rng(seed).permutation(len(sequences)).tolist():
        if held >= tokens:
            break
        taken.append(number)
        held += len(sequences[number])
    return [sequences[number] for number in sorted(taken)]


def finite(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor, or a refusal that names the layer.

    Raises:
        PreflightError: a value is NaN or infinite.
    """
    if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):  # a sum may overflow; it costs less
        raise PreflightError(
            where, "activations that are NaN or infinite", "finite ones", "The source model overflows here."
        )
    return tensor
