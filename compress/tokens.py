"""A sequence as a model reads it: token ids and, where a model tells a pair's texts apart, the text each token is of.

Whatever takes sequences (scorers, the client, packing, calibration) takes `Tokens`, or plain ids where there are no
types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Tokens:
    """One sequence.

    Attributes:
        ids: int64 `[n]`.
        types: int64 `[n]`, BERT's `token_type_ids`: 0 at the first text of a pair and 1 at the second; None for 0
            everywhere, and for models that read none.

    Raises:
        ValueError: not one type a token.
    """

    ids: np.ndarray
    types: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.types is not None and self.types.shape != self.ids.shape:
            raise ValueError(f"types {list(self.types.shape)} for ids {list(self.ids.shape)}")

    def __len__(self) -> int:
        """How many tokens."""
        return len(self.ids)

    def __getitem__(self, part: slice) -> Tokens:
        """A piece of the sequence."""
        return Tokens(self.ids[part], None if self.types is None else self.types[part])

    @property
    def kinds(self) -> np.ndarray:
        """The types, int64 `[n]`, zeros where there are none."""
        return np.zeros(len(self.ids), np.int64) if self.types is None else self.types

    @classmethod
    def of(cls, sequence: Input) -> Tokens:
        """The sequence, or plain ids as one."""
        return sequence if isinstance(sequence, Tokens) else cls(np.asarray(sequence))


Input = np.ndarray | Tokens
"""What a scorer is asked: a sequence, ids alone (int64 `[n]`), or an image (float32 `[channels, height, width]`)."""


def stacked(sequences: Sequence[Tokens], width: int) -> np.ndarray | None:
    """Types in rows `[sequences, width]`, 0 behind each; None where no sequence has any."""
    if all(sequence.types is None for sequence in sequences):
        return None
    rows = np.zeros((len(sequences), width), np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence.kinds
    return rows
