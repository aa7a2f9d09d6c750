"""Ridge least squares for a *change* of weights, from sums over tokens.

    minimise  Σ w ‖t − a (W₀ + Δ)‖² + λ ‖Δ‖²,     λ = ridge · mean diagonal of Σ w aᵀa

The ridge pulls towards W₀, not towards zero: where nothing was compressed t = a W₀, so Δ = 0 exactly. Only
AᵀA, AᵀT and TᵀT are kept, in float64: activations never are, and the normal equations square the condition
number.
"""

from __future__ import annotations

import torch

BLOCK = 128
"""Columns of AᵀA that are summed at a time, each from its diagonal on: what lies below is a mirror image. Where
columns are zero together, blocks are best what is zero together."""

SPARSE = 0.5
"""Share of regressors that are not zero, below which the tokens where a block of columns is zero are passed over."""


class Regression:
    """Sums for one fit of `t [n, out]` from `a [n, inp]`.

    Args:
        inp: number of regressors.
        out: number of targets.
        intercept: fit a constant too (it is not regularised).
        block: columns that are summed at a time.

    Attributes:
        left_before: share of Σ w ‖t‖² that the weights given to `solve` left unexplained.
        left_after: share that those it returned do.
    """

    def __init__(self, inp: int, out: int, intercept: bool = False, block: int = BLOCK):
        size = inp + intercept
        self.intercept, self.block = intercept, block
        self.left_before = self.left_after = 1.0
        self._sums = torch.zeros(size, size, dtype=torch.float64)
        self.cross = torch.zeros(size, out, dtype=torch.float64)
        self.square = 0.0
        self.tokens = 0

    @property
    def gram(self) -> torch.Tensor:
        """AᵀA, float64 `[inp, inp]`."""
        for start in range(0, len(self._sums), self.block):
            stop = start + self.block
            self._sums[stop:, start:stop] = self._sums[start:stop, stop:].T
        return self._sums

    def add(self, a: torch.Tensor, t: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Count tokens in: regressors `[n, inp]`, targets `[n, out]`, weights `[n]`."""
        a, t = a.double(), t.double()
        if self.intercept:
            a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        weighted = a if weight is None else a * weight.double()[:, None]
        if a.count_nonzero() < SPARSE * a.numel():
            self._add_used(a, weighted, t)
        else:
            for start in range(0, a.shape[1], self.block):
                stop = start + self.block
                self._sums[start:stop, start:] += a[:, start:stop].T @ weighted[:, start:]
            self.cross += weighted.T @ t
        square = t.pow(2).sum(1)
        self.square += float(square.sum() if weight is None else square @ weight.double())
        self.tokens += len(a)

    def _add_used(self, a: torch.Tensor, weighted: torch.Tensor, t: torch.Tensor) -> None:
        """The same sums, each block of columns on the tokens where it is not zero (experts: where one was chosen)."""
        for start in range(0, a.shape[1], self.block):
            stop = start + self.block
            used = a[:, start:stop].any(1).nonzero()[:, 0]
            rows = weighted[used, start:]
            self._sums[start:stop, start:] += a[used, start:stop].T @ rows
            self.cross[start:stop] += rows[:, : self.block].T @ t[used]

    def start(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight [inp, out]` with a zero constant where one is fitted; float64."""
        weight = weight.double()
        return torch.cat([weight, weight.new_zeros(1, weight.shape[1])]) if self.intercept else weight

    def solve(self, weight: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The best weights near `weight`.

        Args:
            weight: W₀ `[inp, out]`.
            ridge: λ as a share of the mean diagonal.

        Returns:
            float64 `[inp, out]`, and the constant `[out]` if one was asked for.
        """
        before = self.start(weight)
        gram = self.gram
        explained = gram @ before
        right = self.cross - explained
        diagonal = gram.diagonal()
        sums, pull = diagonal.clone(), ridge * float(diagonal.mean())
        penalised = len(before) - self.intercept
        diagonal[:penalised] += pull  # in place: wide fits are large
        change = symmetric_solve(gram, right)
        diagonal.copy_(sums)
        after = before + change
        left = self.square - 2 * float((before * self.cross).sum()) + float((before * explained).sum())
        gained = float((change * right).sum()) + pull * float(change[:penalised].square().sum())  # AᵀA Δ = right − λΔ
        self.left_before, self.left_after = (max(e, 0.0) / max(self.square, 1e-300) for e in (left, left - gained))
        return (after[:-1], after[-1]) if self.intercept else (after, None)


def symmetric_solve(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solve a symmetric positive (semi)definite system; the smallest solution where it is singular."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        return torch.linalg.pinv(system, hermitian=True) @ right
    return torch.cholesky_solve(right, factor)
