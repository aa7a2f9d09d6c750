"""One orthogonal basis for the whole residual stream, ordered by what the loss would miss.

S, the sum over every norm input of the uncentred second moments of *unit-RMS* tokens, says where the normalised stream
lies: what the norms hand on is the direction of a token, so a token with a large norm counts no more than a small one.
A, the same sum over the loss' gradients with respect to those directions, says what the loss feels. The k directions
that lose least, when the rest is predicted from them by least squares, span A^½ V, V the first eigenvectors of
A^½ S A^½; with A = I that is PCA. The gradients are those of the negative log-likelihood of outputs drawn from the
model itself (the true Fisher information, no labels), or of a random projection of the embedding.

One basis instead of SliceGPT's two a block leaves no shortcut matrices behind, so the result is a stock
config. Measured on stories260K (untied, k = 48 of 64, with least squares): perplexity 15.9 by PCA, 14.7 so.
Float64: small eigenvalues are differences of large sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration.batches import Batch, finite
from ..calibration.loss import pooled
from ..layout import Layout
from ..walk import captured
from .fuse import norms
from .obs import root

FLOOR = 0.1
"""Share of the mean sensitivity that every direction has at least: the gradients are a sample."""

RANK = 1e-9
"""Share of the largest moment below which the stream does not hold a direction. A stream that spans no more than k
directions is kept whole, whatever the loss feels of them: so a planted low rank is recovered exactly."""


@dataclass(frozen=True)
class Sensitivity:
    """What the stream holds and what the loss feels.

    Attributes:
        moments: S, float64 `[d, d]`.
        metrics: A at each norm's input, float64 `[d, d]`, by the norm's name.
    """

    moments: torch.Tensor
    metrics: dict[str, torch.Tensor]


def principal(moments: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric float64 `[d, d]` in columns, largest eigenvalue first, signs fixed."""
    vectors = torch.linalg.eigh(moments)[1].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def floored(metric: torch.Tensor) -> torch.Tensor:
    """The metric scaled to a mean diagonal of one, no direction of it below `FLOOR`."""
    scale = float(metric.diagonal().mean())
    identity = torch.eye(len(metric), dtype=torch.float64)
    return metric / scale + FLOOR * identity if scale > 0 else identity


def weighted_basis(moments: torch.Tensor, metric: torch.Tensor | None = None) -> torch.Tensor:
    """Float64 `[d, d]`, orthonormal columns whose first k span the best subspace of k dimensions, for every k.

    Args:
        moments: S.
        metric: A; the identity if None.
    """
    if metric is None:
        return principal(moments)
    values, axes = torch.linalg.eigh(moments)
    held = values > RANK * values[-1]
    inside, outside = axes[:, held], axes[:, ~held]
    half = root(floored(inside.T @ metric @ inside))
    chosen = half @ principal(half @ (inside.T @ moments @ inside) @ half)
    # QR keeps nested spans: its first k columns span the first k of `chosen`.
    return torch.cat([inside @ torch.linalg.qr(chosen)[0], outside], dim=1)


def draw_loss(output: Any, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """A scalar whose gradient has the model's Fisher information as second moment (see the module's text)."""
    if getattr(output, "logits", None) is not None:
        logits = output.logits if output.logits.ndim < 3 else batch.tokens(output.logits)
        logs = logits.float().log_softmax(-1).reshape(-1, logits.shape[-1])
        below = logs.detach().exp().cumsum(-1)  # torch.multinomial takes ten times as long
        drawn = torch.searchsorted(below, below[:, -1:] * torch.rand(len(logs), 1, generator=generator))
        return -logs.gather(1, drawn.clamp_max(logs.shape[-1] - 1)).sum()
    embedding = pooled(output, batch)
    return (embedding * torch.randn(embedding.shape, generator=generator)).sum()


def sensitivity(
    model: Any,
    layout: Layout,
    data: Iterable[Batch],
    seed: int = 0,
    gradients: bool = True,
    zeros: Callable[[str, int], torch.Tensor] = lambda _, d: torch.zeros(d, d, dtype=torch.float64),
) -> Sensitivity:
    """Moments and metrics of a model on calibration data.

    Args:
        model: a module with the layout's names, float32, fused or not (gains act behind the stream).
        layout: its layout.
        data: batches.
        seed: of the outputs drawn.
        gradients: also measure the metrics, one backward a batch.
        zeros: makes a metric, by the norm's name and d: one for every norm may be too much for memory.
    """
    d, points = layout.families["hidden"], norms(layout)
    centre = layout.arch.norm.kind == "layer"
    moments = torch.zeros(d, d, dtype=torch.float64)
    metrics = {point: zeros(point, d) for point in points if gradients}
    generator = torch.Generator().manual_seed(seed)
    for batch in data:
        with captured(model, inputs=points) as seen, torch.set_grad_enabled(gradients), differentiable(model):
            output = model(**batch.inputs)
            streams = [finite(seen.inputs[point], point) for point in points]
            slopes = torch.autograd.grad(draw_loss(output, batch, generator), streams) if gradients else ()
        for number, point in enumerate(points):
            x = batch.tokens(streams[number].detach()).double()
            x = x - x.mean(-1, keepdim=True) if centre else x
            size = x.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
            unit = x / size
            moments += unit.T @ unit
            if gradients:
                slope = batch.tokens(slopes[number]).double() * size
                metrics[point] += slope.T @ slope
    return Sensitivity(moments, metrics)


class differentiable:  # noqa: N801  (used as a word: `with differentiable(model)`)
    """Let gradients reach the stream of a model whose parameters need none."""

    def __init__(self, model: Any):
        self.model = model

    def __enter__(self) -> None:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output

        self.hook = self.model.get_input_embeddings().register_forward_hook(hook)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()
