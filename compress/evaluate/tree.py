"""Several answers over one shared context, in one row: the context is computed once.

    row        c₁ … c_p  a₁ … a_m  b₁ … b_n
    positions  0 … p−1   p …       p …
    sees       a token sees the context and its own answer's tokens, up to itself

so a sequence c ‖ a gets the logits that it gets alone, for p + m + n tokens instead of 2p + m + n (tree attention, as
in SpecInfer, Miao et al., arXiv 2305.09781). Sequences are grouped where they follow one another and at least half of
each is shared: the choices of a question, since the evaluator asks them in turn. Only for models whose every block
looks at all that came before: a window counts places in the row, which here are no distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tree:
    """Sequences that share their first `shared` tokens.

    Attributes:
        sequences: int64 `[n_i]`, n_i ≥ `shared`.
        shared: tokens of the context, at least 1.
    """

    sequences: tuple[np.ndarray, ...]
    shared: int

    def __len__(self) -> int:
        """Tokens of the row."""
        return self.shared + sum(len(s) - self.shared for s in self.sequences)

    @property
    def ids(self) -> np.ndarray:
        """The row, int64 `[len]`."""
        return np.concatenate([self.sequences[0][: self.shared], *(s[self.shared :] for s in self.sequences)])

    @property
    def positions(self) -> np.ndarray:
        """Of each token in its own sequence, int64 `[len]`."""
        each = (np.arange(self.shared, len(s)) for s in self.sequences)
        return np.concatenate([np.arange(self.shared), *each])

    def numbers(self, first: int) -> np.ndarray:
        """Segment numbers for an artifact that knows trees, int64 `[len]`: `first` at the context, and the negative of
        the next ones at the answers, which go on from the last positive segment.
        """
        answers = [np.full(len(s) - self.shared, -first - 1 - n) for n, s in enumerate(self.sequences)]
        return np.concatenate([np.full(self.shared, first), *answers])

    @property
    def mask(self) -> np.ndarray:
        """Who sees whom, bool `[len, len]`."""
        answers = [np.full(len(s) - self.shared, number + 1) for number, s in enumerate(self.sequences)]
        owner = np.concatenate([np.zeros(self.shared, np.int64), *answers])
        before = np.tri(len(owner), dtype=bool)
        seen: np.ndarray = before & ((owner[:, None] == owner[None]) | (owner[None] == 0))
        return seen

    def split(self, answer: np.ndarray) -> list[np.ndarray]:
        """Of the row's answer `[len, …]`, each sequence's `[n_i, …]`."""
        if len(self.sequences) == 1:
            return [answer]
        found, start = [], self.shared
        for sequence in self.sequences:
            end = start + len(sequence) - self.shared
            found.append(np.concatenate([answer[: self.shared], answer[start:end]]))
            start = end
        return found


def trees(sequences: Sequence[np.ndarray]) -> list[Tree]:
    """All sequences in their order, those that follow one another and share half of each in one tree."""
    found: list[Tree] = []
    group: list[np.ndarray] = []
    shared = 0
    for sequence in sequences:
        common = min(shared, _common(group[0], sequence)) if group else 0
        if group and 2 * common >= max(len(sequence), *map(len, group)):
            group.append(sequence)
            shared = common
            continue
        if group:
            found.append(Tree(tuple(group), shared))
        group, shared = [sequence], len(sequence)
    return [*found, Tree(tuple(group), shared)] if group else found


def _common(a: np.ndarray, b: np.ndarray) -> int:
    width = min(len(a), len(b))
    differs = np.flatnonzero(a[:width] != b[:width])
    return int(differs[0]) if len(differs) else width


def sees_everything(config: Any) -> bool:
    """Whether every block attends to all earlier tokens, as far as the config says."""
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    return not getattr(config, "sliding_window", None) or not getattr(config, "use_sliding_window", True)
