"""The autograd functions of sparse training (SWAT, arXiv 2001.01969, algorithm 1).

With w_s the weight and x_s the saved input, both reduced:

    y = op(x, w_s)            the input of the forward pass is whole
    dx = op'(dy, w_s)
    dw = op'(dy, x_s)         of every weight, dropped ones too, so that they can return
    db = Σ dy

In exact mode both are masked by one threshold each. In sampled mode x_s are k of T tokens and dw is scaled by T/k,
which leaves its expectation as it was. In structured mode w_s holds the rows and columns of the live units alone, so
that every product is a smaller dense one. The masked weight is made again in the backward pass: kept, it would cost as
many bytes as the mask saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .encoding import from_bits, positive, to_bits, where
from .saved import Plan, Rows, Source, Tensors
from .threshold import masked

Wanted = tuple[bool, bool, bool]
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Linear:
    """y = x wᵀ for x `[…, in]`, w `[out, in]`; with `transposed`, w is `[in, out]` (GPT-2's Conv1D)."""

    transposed: bool = False

    def leading(self, x: torch.Tensor) -> int:
        """Dimensions of x that count tokens."""
        return x.ndim - 1

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[…, out]`."""
        return functional.linear(x, weight.t() if self.transposed else weight, bias)

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor | None, shape: torch.Size, weight: torch.Tensor, wanted: Wanted
    ) -> Gradients:
        """Those of x, weight and bias that are wanted; `x` is needed for the weight's alone."""
        flat_dy, dx, dw = dy.reshape(-1, dy.shape[-1]), None, None
        if wanted[0]:
            dx = flat_dy.mm(weight.t() if self.transposed else weight).view(shape)
        if wanted[1] and x is not None:
            flat_x = x.reshape(-1, x.shape[-1])
            dw = flat_x.t().mm(flat_dy) if self.transposed else flat_dy.t().mm(flat_x)
        return dx, dw, flat_dy.sum(0) if wanted[2] else None

    def work(self, x: torch.Tensor, weight: torch.Tensor) -> int:
        """Floating-point operations of one product, dense: 2 a multiply-add."""
        return 2 * math.prod(x.shape[:-1]) * weight.numel()


@dataclass(frozen=True)
class Conv2d:
    """A convolution of x `[batch, in, height, width]` with w `[out, in / groups, kh, kw]`."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def leading(self, x: torch.Tensor) -> int:
        """Dimensions of x that count tokens: images."""
        return 1

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[batch, out, height', width']`."""
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor | None, shape: torch.Size, weight: torch.Tensor, wanted: Wanted
    ) -> Gradients:
        """Those of x, weight and bias that are wanted; `x` is needed for the weight's alone."""
        if x is None:  # only its sizes are read
            x = dy.new_empty(1).expand(shape)
        found: Gradients = torch.ops.aten.convolution_backward(
            dy,
            x,
            weight,
            [weight.shape[0]],
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0, 0),
            self.groups,
            wanted,
        )
        return found

    def work(self, x: torch.Tensor, weight: torch.Tensor) -> int:
        """Floating-point operations of one product, dense: 2 a multiply-add."""
        height, width = (
            (size + 2 * pad - dil * (kernel - 1) - 1) // stride + 1
            for size, pad, dil, kernel, stride in zip(
                x.shape[2:], self.padding, self.dilation, weight.shape[2:], self.stride, strict=True
            )
        )
        return 2 * x.shape[0] * height * width * weight.numel()


Op = Linear | Conv2d


@dataclass(frozen=True)
class Part:
    """The part of a weight that takes part: its threshold, or the live places of its first two dimensions."""

    least: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as it is multiplied."""
        if self.least is not None:
            return masked(weight, self.least)
        for dim, places in enumerate((self.rows, self.columns)):
            if places is not None:
                weight = weight.index_select(dim, places)
        return weight

    def whole(self, gradient: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A gradient of the part as one of the whole weight."""
        for dim, places in ((1, self.columns), (0, self.rows)):
            if places is not None:
                wide = gradient.new_zeros((*gradient.shape[:dim], shape[dim], *gradient.shape[dim + 1 :]))
                gradient = wide.index_copy_(dim, places, gradient)
        return gradient


class Product(torch.autograd.Function):
    """One Linear or Conv2d with reduced weight and reduced saved input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        op: Op,
        part: Part,
        plan: Plan | None,
        kept: Tensors,
        watch: Callable[[torch.Tensor], None] | None,
    ) -> torch.Tensor:
        """The layer's output. `plan` None: the weight needs no gradient. `watch` is shown the weight's gradient."""
        extra = [t for t in (part.least, part.rows, part.columns) if t is not None]
        ctx.save_for_backward(weight, *kept, *extra)
        ctx.op, ctx.plan, ctx.count, ctx.watch, ctx.shape = op, plan, len(kept), watch, x.shape
        ctx.has = tuple(t is not None for t in (part.least, part.rows, part.columns))
        return op.forward(x, part.of(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """dx, dw, db."""
        dy, op, plan = gradients[0], ctx.op, ctx.plan
        weight, *rest = ctx.saved_tensors
        kept, extra = rest[: ctx.count], iter(rest[ctx.count :])
        part = Part(*(next(extra) if has else None for has in ctx.has))
        reduced = part.of(weight)
        wants: Wanted = ctx.needs_input_grad[:3]
        if wants[1] and isinstance(plan, Rows):
            dx, _, db = op.gradients(dy, None, ctx.shape, reduced, (wants[0], False, wants[2]))
            rows = plan.rebuild(*kept)
            chosen = dy.reshape(-1, *dy.shape[op.leading(dy) :]).index_select(0, kept[1])
            dw = op.gradients(chosen, rows, rows.shape, reduced, (False, True, False))[1] * plan.scale
        else:
            dx, dw, db = op.gradients(dy, plan.rebuild(*kept) if wants[1] else None, ctx.shape, reduced, wants)
        if dw is not None:
            dw = part.whole(dw, weight.shape)
            if ctx.watch is not None:
                ctx.watch(dw)
        return dx, dw, db, None, None, None, None, None


class Relu(torch.autograd.Function):
    """ReLU that keeps one bit a value instead of its output."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
        """max(h, 0)."""
        y = torch.relu(h)
        ctx.save_for_backward(to_bits(positive(y).reshape(-1)))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        """Dy where the output was above zero."""
        (dy,) = gradients
        mask = from_bits(ctx.saved_tensors[0], dy.numel())
        return where(mask.view(dy.shape), dy)


class Activation(torch.autograd.Function):
    """Any elementwise activation; keeps its input once, whatever its own graph would keep, and runs again for dh."""

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
        source: Source | None,
    ) -> torch.Tensor:
        """activation(h). With a `source` of h, what that comes from is kept in its place."""
        ctx.save_for_backward(h if source is None else source.pre)
        ctx.activation, ctx.before = activation, None if source is None else source.activation
        return activation(h)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Dy · activation′(h)."""
        h = ctx.saved_tensors[0].detach()
        h = h if ctx.before is None else ctx.before(h)
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            (dh,) = torch.autograd.grad(ctx.activation(h), h, gradients[0])
        return dh, None, None
