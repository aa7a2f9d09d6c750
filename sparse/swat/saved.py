"""What a layer keeps of its input until the backward pass: how few bytes, and how to get the masked input back.

    Whole       the input itself, masked later: where encoding saves nothing, or its producer stores it anyway
    Encoded     bits and values (encoding.py)
    Recomputed  nothing of its own: act(h), norm(h) or act(norm(h)) from the h that is kept for their own gradient
    Rows        a random subset of tokens, for gradients that are unbiased rather than truncated

Each is tensors, which go through `save_for_backward` so that autograd and its hooks see them, and a plan without
tensors that rebuilds the input from them. A tensor read by several layers (q, k and v) is kept once: `once` leaves
what it kept on the tensor for the next one. The gate is per tensor, as in the paper; nothing is known of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .encoding import decode, encode
from .threshold import masked

Tensors = tuple[torch.Tensor, ...]
KEPT, SOURCE, MAKER = "_tersor_kept", "_tersor_source", "_tersor_maker"
"""Attributes of a tensor: what a layer kept of it, the pre-activation it comes from, the activation that made it."""


class Plan(Protocol):
    """How saved tensors become the input again."""

    def rebuild(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The input as the weight gradient reads it."""


@dataclass(frozen=True)
class Whole:
    """Tensors: the input, the threshold."""

    dtype: torch.dtype

    def rebuild(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The input, masked."""
        return masked(*tensors).to(self.dtype)


@dataclass(frozen=True)
class Encoded:
    """Tensors: bits, values."""

    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool

    def rebuild(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The input with zeros where nothing was kept, rounded to the dtype of the values."""
        return decode((tensors[0], tensors[1]), self.shape, self.dtype, self.channels_last)


@dataclass(frozen=True)
class Recomputed:
    """Tensors: the pre-activation, the threshold."""

    activation: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype

    def rebuild(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The activation's output again, masked."""
        return masked(self.activation(tensors[0]), tensors[1]).to(self.dtype)


@dataclass(frozen=True)
class Rows:
    """Tensors: the rows drawn or all of them, and the places drawn along the leading dimensions made one (int64).

    Attributes:
        scale: one over the share drawn.
        dtype: of the product.
        drawn: whether the first tensor holds the rows drawn alone.
        activation: what the rows still have to go through, if they are a pre-activation's.
    """

    scale: float
    dtype: torch.dtype
    drawn: bool = True
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None

    def rebuild(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The rows drawn, `[k, …]`."""
        rows = tensors[0] if self.drawn else tensors[0].index_select(0, tensors[1])
        return (rows if self.activation is None else self.activation(rows)).to(self.dtype)


@dataclass(frozen=True)
class Source:
    """What an activation or a norm leaves on its output: the input it keeps for its own gradient, and itself."""

    pre: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]

    def through(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> Source:
        """What the next activation leaves: the same input, both functions."""
        first = self.activation
        return Source(self.pre, lambda x: activation(first(x)))


Kept = tuple[Plan, Tensors]


def stored_by_producer(x: torch.Tensor) -> bool:
    """Whether the operation that made `x` keeps its result for its own gradient (tanh, softmax, exp)."""
    result = getattr(x.grad_fn, "_saved_result", None)
    return isinstance(result, torch.Tensor) and result.data_ptr() == x.data_ptr()


def once(x: torch.Tensor, key: tuple[Any, ...], make: Callable[[], Kept]) -> Kept:
    """What `make` returns, made once for this tensor in its present version and left on it."""
    found: dict[tuple[Any, ...], Kept] = x.__dict__.setdefault(KEPT, {})
    key = (*key, x._version)
    if key not in found:
        found[key] = make()
    return found[key]


def keep_values(
    x: torch.Tensor,
    share: float,
    least: Callable[[], torch.Tensor],
    values: torch.dtype | None,
    compute: torch.dtype | None = None,
    spare: bool = False,
) -> Kept:
    """Keep the largest values of `x`.

    Args:
        x: a layer's input.
        share: dropped; 0 keeps `x` itself.
        least: the threshold, asked for only if no layer has kept `x` yet.
        values: dtype of stored values; None keeps that of the product.
        compute: dtype of the product, where autocast makes it another than that of x.
        spare: drop nothing where that saves no byte: whatever is not `Encoded` stays whole.
    """

    def make() -> Kept:
        source: Source | None = getattr(x, SOURCE, None)
        dtype, nothing = compute or x.dtype, x.new_zeros(())
        if source is not None:
            return Recomputed(source.activation, dtype), (source.pre, nothing if spare else least())
        limit = least()
        encoded = None if share == 0 or stored_by_producer(x) else encode(x, limit, values or dtype)
        if encoded is None:
            return Whole(dtype), (x.detach(), nothing if spare else limit)
        last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return Encoded(x.shape, dtype, last), encoded

    return once(x, ("values", share, values, compute), make)


def keep_rows(x: torch.Tensor, rows: torch.Tensor, leading: int, compute: torch.dtype | None = None) -> Kept:
    """Keep rows of `x` drawn at random.

    Args:
        x: a layer's input.
        rows: int64 `[k]`, places along the first `leading` dimensions made one.
        leading: how many dimensions count tokens: all but the last of a Linear's input, the first of a Conv's.
        compute: dtype of the product, where autocast makes it another than that of x.
    """

    def make() -> Kept:
        total, dtype = x.shape[:leading].numel(), compute or x.dtype
        source: Source | None = getattr(x, SOURCE, None)
        whole = (x.detach() if source is None else source.pre).reshape(total, *x.shape[leading:])
        if whole.nbytes - len(rows) * whole[:1].nbytes <= rows.nbytes:  # places would cost more than is left out
            zero, plan = x.new_zeros(()), Whole(dtype) if source is None else Recomputed(source.activation, dtype)
            return plan, (x.detach() if source is None else source.pre, zero)
        scale = total / len(rows)
        if source is not None:
            return Rows(scale, dtype, False, source.activation), (whole, rows)
        if stored_by_producer(x):
            return Rows(scale, dtype, False), (whole, rows)
        return Rows(scale, dtype), (whole.index_select(0, rows).to(dtype), rows)

    return once(x, ("rows", rows.data_ptr(), len(rows), compute), make)
