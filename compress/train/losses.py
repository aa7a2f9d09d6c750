"""Losses: what a model is trained for, as sums over answers.

A batch holds the model's arguments and `targets` (int64): the right answer to every output row, `IGNORED` where none
is asked. For text `[rows, width]`, with the *next* token at each place (causal models) or the token itself; for
classes `[batch]`. Losses are summed over answers and divided by their number once, over all micro-batches and
processes of a step, so that neither accumulation nor packing nor padding changes the weight of an answer.

    language model, classification   −log p(target)
    distillation                     (1−α)·that + α·T²·KL(original ‖ model) + β·Σ‖h−h₀‖²/Σ‖h₀‖²

KL on logits softened by T: Hinton et al. (arXiv 1503.02531), whose T² keeps the gradient's size. The hidden term is
relative, layer by layer, so that β means the same in every layer and model; it needs equal shapes. Both logits are
taken in float32: a log-softmax over a vocabulary loses its tail in bfloat16.

The divergence makes its gradient, softmax(student) − softmax(original), in the forward pass, a few rows at a time:
float32 copies of a whole batch's logits never exist, and what does stays in cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from ..errors import RecipeError

IGNORED = -100
PIECE = 1 << 17
"""Logits that the divergence looks at together: their float32 copies stay in a core's cache."""
OURS = ("targets",)
"""Keys of a batch that the model does not see."""

Batch = Mapping[str, torch.Tensor]


class Objective(Protocol):
    """What is minimised."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss summed over the batch's answers (a scalar that gradients flow through)."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what the objective owns."""
        ...


def answers(batch: Batch) -> torch.Tensor:
    """How many answers a batch asks for (int64 scalar)."""
    return batch["targets"].ne(IGNORED).sum()


def run(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """The model's output for a batch."""
    return model(**{name: value for name, value in batch.items() if name not in OURS}, **more)


def without_cache(model: nn.Module) -> None:
    """No keys and values for later tokens: with a cache, transformers does not look at position ids for masks."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "use_cache", False):
        config.use_cache = False


def logits(output: Any) -> torch.Tensor:
    """The output's logits in float32, classes last."""
    found: torch.Tensor = output.logits.float()
    return found


def negative_log_likelihood(found: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−Σ log p(target) for logits `[…, classes]` and targets `[…]`."""
    return functional.cross_entropy(found.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True)
class LanguageModel:
    """Negative log-likelihood of every target token, in nats."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Summed over tokens."""
        return negative_log_likelihood(logits(run(model, batch)), batch["targets"])

    def to(self, device: torch.device) -> None:
        """Nothing to move."""


@dataclass(frozen=True)
class Classification(LanguageModel):
    """Negative log-likelihood of the right class, in nats: logits `[batch, classes]`, targets `[batch]`."""


@dataclass(frozen=True)
class Distillation:
    """The original's answers, and the right ones beside them.

    Attributes:
        teacher: the original; frozen and in eval mode. It reads the same batch.
        soft: α, the share of the KL divergence against the likelihood of the targets. 1 needs no labels.
        temperature: T of the KL divergence.
        hidden: β, the weight of the hidden states' relative squared error; 0 leaves them free.

    Models without logits (embeddings) are held to the original's token states by the same relative error.
    """

    teacher: nn.Module
    soft: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        without_cache(self.teacher.requires_grad_(False).eval())

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Summed over answers.

        Raises:
            RecipeError: hidden states that are compared differ in number or width.
        """
        more = {"output_hidden_states": True} if self.hidden else {}
        with torch.no_grad():
            wanted = run(self.teacher, batch, **more)
        output = run(model, batch, **more)
        real = batch["targets"].ne(IGNORED)
        if getattr(output, "logits", None) is None:
            return real.sum() * relative_error(output.last_hidden_state, wanted.last_hidden_state, real)
        total = torch.zeros((), device=real.device)
        if self.soft > 0:
            total = total + self.soft * divergence(output.logits, wanted.logits, self.temperature, real)
        if self.soft < 1:
            total = total + (1 - self.soft) * negative_log_likelihood(logits(output), batch["targets"])
        if self.hidden:
            total = total + self.hidden * real.sum() * self._states(output, wanted, real)
        return total

    def _states(self, output: Any, wanted: Any, real: torch.Tensor) -> torch.Tensor:
        """Mean over layers of the relative error; the embeddings count as a layer."""
        ours, theirs = output.hidden_states, wanted.hidden_states
        if [h.shape for h in ours] != [h.shape for h in theirs]:
            raise RecipeError(
                "hidden",
                f"{len(ours)} states of width {ours[0].shape[-1]} against {len(theirs)} of {theirs[0].shape[-1]}",
                "hidden states of one shape",
                "Distil the logits alone: hidden: 0.",
            )
        seen = real if real.ndim == ours[0].ndim - 1 else None
        return torch.stack([relative_error(a, b, seen) for a, b in zip(ours, theirs, strict=True)]).mean()

    def to(self, device: torch.device) -> None:
        """Move the teacher."""
        self.teacher.to(device)


def divergence(
    found: torch.Tensor, wanted: torch.Tensor, temperature: float = 1.0, real: torch.Tensor | None = None
) -> torch.Tensor:
    """T²·Σ KL(wanted ‖ found) in nats (float32 scalar); of single numbers, half the squared distance.

    Args:
        found: logits `[…, classes]`, floating; gradients flow through these alone.
        wanted: logits of the same shape.
        temperature: T.
        real: bool `[…]`, which rows count; None for all.
    """
    if found.shape[-1] == 1:
        squares = (found.float() - wanted.float()).square().squeeze(-1)
        return 0.5 * (squares if real is None else squares[real]).sum()
    real = real if real is not None else torch.ones(found.shape[:-1], dtype=torch.bool, device=found.device)
    total: torch.Tensor = Divergence.apply(found, wanted, real, temperature)
    return total


class Divergence(torch.autograd.Function):
    """T²·Σ KL over rows of logits, and its gradient, T·(softmax(found / T) − softmax(wanted / T))."""

    @staticmethod
    def forward(ctx: Any, found: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor, t: float) -> torch.Tensor:
        """The sum over rows that are real; the gradient is kept in the dtype of `found`."""
        ours, theirs, counts = found.flatten(0, -2), wanted.flatten(0, -2), real.flatten()
        gradient = torch.empty_like(ours) if ctx.needs_input_grad[0] else None
        total, rows = torch.zeros((), device=found.device), max(1, PIECE // ours.shape[-1])
        for first in range(0, len(ours), rows):
            part = slice(first, first + rows)
            q, p = (torch.log_softmax(each[part].float() / t, -1) for each in (ours, theirs))
            share = p.exp()
            total += t**2 * p.sub_(q).mul_(share).sum(-1)[counts[part]].sum()
            if gradient is not None:
                gradient[part] = q.exp_().sub_(share).mul_(t * counts[part, None])
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(found))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Of `found` alone."""
        return ctx.saved_tensors[0] * gradients[0], None, None, None


def relative_error(found: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Σ‖found − wanted‖² / Σ‖wanted‖² over real tokens."""
    if real is not None:
        found, wanted = found[real], wanted[real]
    wanted = wanted.float()
    return (found.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
