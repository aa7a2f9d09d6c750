"""A small text that is never twice the same: in each round some tokens are others that the original might have said.

A student that reads a small text round after round learns that text. Its teacher's answers are right on any text, so
the text may vary: each token is replaced, with the same probability, by one that the original drew for this place
while it read the text as it is. That costs one pass of the original over the text, where sequences that it goes on
with (generated.py) cost one a token. Known relatives corrupt text at random (BERT's masking, token dropout) and ask for
the token that was there; here the places hold likely words and what is learned is the original's answer to what stands
there. Measured: benchmarks/recover.py --compare.

What stands in a row follows from the seed, the row and the round, so that a resumed training reads what an
uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from .losses import IGNORED, logits, run
from .rows import Rows

DRAWS = 8
"""Words that the original offers for a place."""
BATCH = 4
"""Rows of a forward: logits take as many bytes as all the rest."""
NONE = -1


@dataclass(eq=False)
class Redrawn(Rows):
    """Rows of causal text in which some tokens are redrawn.

    Attributes:
        others: int32 `[DRAWS, width]` a row: what may stand in a token's place, −1 where only the token itself may.
        share: of the tokens that are replaced.
        seed: of which.
    """

    others: Sequence[np.ndarray] = field(default_factory=list)
    share: float = 0.5
    seed: int = 0

    def at(self, index: int, number: int) -> dict[str, Any]:
        """Row `index` as round `number` reads it; what is asked after a token is the token that follows there."""
        row, others = self.items[index], self.others[index]
        choose = np.random.default_rng((self.seed, number, index))
        drawn = others[choose.integers(len(others), size=others.shape[1]), np.arange(others.shape[1])]
        taken = (choose.random(others.shape[1]) < self.share) & (drawn != NONE)
        ids = np.where(taken, drawn, row["input_ids"])
        asked = row["targets"] != IGNORED
        return {**row, "input_ids": ids, "targets": np.where(asked, np.roll(ids, -1), IGNORED)}


def redrawn(
    teacher: nn.Module,
    data: Rows,
    share: float,
    seed: int = 0,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _label: items,
) -> Redrawn:
    """Rows that hold other tokens in each round.

    Args:
        teacher: a causal language model; offers the words, drawn at temperature 1 from its whole vocabulary.
        data: rows of its text.
        share: of the tokens that are replaced.
        seed: of the draws and of the places.
        track: wraps the forwards in a progress bar.
    """
    generator, others = torch.Generator().manual_seed(seed), list[np.ndarray]()
    with torch.inference_mode():
        for first in track(range(0, len(data), BATCH), "redraw the text"):
            batch = data.collate(data.items[first : first + BATCH])
            asked = batch["targets"].ne(IGNORED)
            found = torch.full((DRAWS, *asked.shape), NONE)
            answers = torch.softmax(logits(run(teacher, batch))[asked], -1)
            found[:, asked] = torch.multinomial(answers, DRAWS, replacement=True, generator=generator).t()
            found = found.roll(1, -1)  # an answer is a word for the next place; the last place of a row asks nothing
            others += list(found.permute(1, 0, 2).int().numpy())
    return Redrawn(data.items, data.apart, data.causal, data.attention, others, share, seed)
