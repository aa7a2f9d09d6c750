"""One orthogonal basis for the whole residual stream, ordered by how much of the normalised stream it has.

Eigenvectors of the sum, over every norm input, of the uncentred second moments of *unit-RMS* tokens: what
the norms hand on is the direction of a token, so a token with a large norm counts no more than a small one.
One basis instead of SliceGPT's two a block leaves no shortcut matrices behind, so the result is a stock
config. Moments and eigenvectors in float64: the small eigenvalues are differences of large sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .errors import PreflightError
from .fuse import norms
from .layout import Layout
from .walk import Walk, captured


def unit_moments(tokens: torch.Tensor) -> torch.Tensor:
    """Σ x xᵀ / mean(x²) over tokens `[n, d]`; float64 `[d, d]`."""
    x = tokens.double()
    x = x / x.pow(2).mean(-1, keepdim=True).add(1e-12).sqrt()
    return x.T @ x


def principal(moments: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric float64 `[d, d]` in columns, largest eigenvalue first, signs fixed."""
    vectors = torch.linalg.eigh(moments)[1].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


class Batch:
    """Sequences of one forward.

    Attributes:
        inputs: keyword arguments of the model.
        real: bool `[batch, length]`, False where padded; None if nothing is.
    """

    def __init__(self, sequences: Sequence[np.ndarray]):
        lengths = torch.tensor([len(s) for s in sequences])
        width = int(lengths.max())
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.as_tensor(np.asarray(sequence, dtype=np.int64))
        real = torch.arange(width)[None] < lengths[:, None]
        self.inputs: dict[str, torch.Tensor] = {"input_ids": ids}
        self.real = None if bool(real.all()) else real
        if self.real is not None:
            self.inputs["attention_mask"] = real.long()

    def tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[batch, length, n]` → `[tokens, n]` without padding."""
        return hidden.flatten(0, 1) if self.real is None else hidden[self.real]


def batches(sequences: Sequence[np.ndarray], tokens: int = 4096) -> list[Batch]:
    """Sequences in batches of about `tokens` tokens, alike in length."""
    ordered = sorted(sequences, key=len)
    groups: list[list[np.ndarray]] = [[]]
    for sequence in ordered:
        if groups[-1] and (len(groups[-1]) + 1) * len(sequence) > tokens:
            groups.append([])
        groups[-1].append(sequence)
    return [Batch(group) for group in groups if group]


def finite(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor, or a refusal that names the layer.

    Raises:
        PreflightError: a value is NaN or infinite.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise PreflightError(
            where, "activations that are NaN or infinite", "finite ones", "The source model overflows here."
        )
    return tensor


@torch.no_grad()
def stream_basis(model: Any, layout: Layout, data: Iterable[Batch]) -> torch.Tensor:
    """The global basis of a model on calibration data.

    Args:
        model: a module with the layout's names, float32, fused or not (gains act behind the stream).
        layout: its layout.
        data: batches.

    Returns:
        float64 `[d, d]`, orthonormal columns, most important first.
    """
    total = torch.zeros(layout.families["hidden"], layout.families["hidden"], dtype=torch.float64)
    points = norms(layout)
    walk = Walk(model, layout)
    for batch in data:
        with captured(walk.model, inputs=points) as seen:
            model(**batch.inputs, use_cache=False)
        for point in points:
            total += unit_moments(batch.tokens(finite(seen[point], point)))
    return principal(total)
