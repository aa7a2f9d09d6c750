"""One sparse layer, activation or norm: what stands in for a module's forward while training is sparse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from .functions import Activation, Op, Part, Product, Relu
from .saved import MAKER, SOURCE, Encoded, Kept, Source, keep_rows, keep_values
from .targets import NORMS, is_relu, keeps
from .threshold import threshold

WORTH = 1 / 8
"""Share of a ReLU's output that must go before a bit a value for the ReLU and one for the layer behind it pay."""

RowsOf = Callable[[int, torch.device], torch.Tensor]


@dataclass(eq=False)
class Layer:
    """A Linear or Conv2d.

    Attributes:
        module: whose forward it stands for.
        op: what that computes.
        rows: draws the tokens of this step, given their number; None in exact mode.
        values: dtype of stored values, None for the input's.
        spare: whether its input loses nothing where that saves no byte.
        share: of its weights that is dropped.
        activations: share of its input that is dropped.
        part: the part of its weight that takes part.
        limit: threshold of its input; None until the next forward finds it.
        gradient: mean |dw|, averaged over time; None until seen.
        work: FLOPs of one dense product in the last forward.
        watching: whether the next gradient is averaged into `gradient`.
        reads_gradient: whether the last input needed a gradient, so that dx was computed.
        whole: whether the last input lost nothing.
    """

    module: Any
    op: Op
    rows: RowsOf | None
    values: torch.dtype | None
    activations: float
    spare: bool = False
    share: float = 0.0
    part: Part = field(default_factory=Part)
    limit: torch.Tensor | None = None
    gradient: float | None = None
    work: int = 0
    watching: bool = False
    reads_gradient: bool = True
    whole: bool = False

    @property
    def dropped_gradient(self) -> float:
        """Share of the work of dw that is left out: of values or tokens, and of units in structured mode."""
        units = self.share if self.part.least is None else 0.0
        return 1 - (1 if self.whole else 1 - self.activations) * (1 - units)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        weight: torch.Tensor = self.module.weight
        bias: torch.Tensor | None = self.module.bias
        bias = self._live(bias)
        if not torch.is_grad_enabled():
            return self.op.forward(x, self.part.of(weight), bias)
        self.work, self.reads_gradient = self.op.work(x, weight), x.requires_grad
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            kept = self._keep(x, dtype) if weight.requires_grad else None
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        else:
            kept = self._keep(x, None) if weight.requires_grad else None
        plan, tensors = kept or (None, ())
        watch = self._watch if self.watching else None
        with torch.autocast(kind, enabled=False):
            found: torch.Tensor = Product.apply(x, weight, bias, self.op, self.part, plan, tensors, watch)
        return found

    def _live(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        out = self.part.columns if getattr(self.op, "transposed", False) else self.part.rows
        return bias if bias is None or out is None else bias.index_select(0, out)

    def _keep(self, x: torch.Tensor, dtype: torch.dtype | None) -> Kept:
        if (maker := getattr(x, MAKER, None)) is not None and self.activations >= WORTH:
            maker.read = True
        if self.rows is not None and self.activations > 0:
            leading = self.op.leading(x)
            total = x.shape[:leading].numel()
            return keep_rows(x, self.rows(total, x.device), leading, dtype)

        def least() -> torch.Tensor:
            if self.limit is None:
                self.limit = threshold(x, self.activations)
            return self.limit

        kept = keep_values(x, self.activations, least, self.values, dtype, self.spare)
        self.whole = self.spare and not isinstance(kept[0], Encoded)
        return kept

    def _watch(self, gradient: torch.Tensor) -> None:
        size = float(gradient.abs().mean())
        self.gradient = size if self.gradient is None else 0.9 * self.gradient + 0.1 * size
        self.watching = False


@dataclass(eq=False)
class ActivationLayer:
    """An elementwise activation that keeps as little as it can and tells the next layer how to do without a copy.

    Attributes:
        module: whose forward it stands for.
        read: whether a sparse layer was seen to read the output. Until then, and where others read it, a ReLU keeps its
            output as always: they would keep it anyway, and a bit beside it would be too much.
    """

    module: Any
    read: bool = False

    def __post_init__(self) -> None:
        """Find out what autograd keeps of it."""
        self._relu, self._keeps = is_relu(self.module), keeps(self.module)

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """The activation's output."""
        plain = type(self.module).forward.__get__(self.module)
        source: Source | None = getattr(h, SOURCE, None)
        found: torch.Tensor
        if not (torch.is_grad_enabled() and h.requires_grad):
            found = plain(h)
        elif self._relu and self.read:
            found = Relu.apply(h)
            if source is not None:
                found.__dict__[SOURCE] = source.through(torch.relu)
        elif self._relu:
            found = torch.relu(h)
            found.__dict__[MAKER] = self
        elif self._keeps == "result":
            found = plain(h)
        elif source is not None:
            found = Activation.apply(h, plain, source)
            found.__dict__[SOURCE] = source.through(plain)
        else:
            found = plain(h) if self._keeps == "input" else Activation.apply(h, plain, None)
            found.__dict__[SOURCE] = Source(h.detach(), plain)
        return found


@dataclass(eq=False)
class NormLayer:
    """A norm: of a group's channels it sees the live ones alone; the next layer makes its output again.

    Autograd keeps a norm's input for the norm's own gradient. Its output follows from that bit for bit, so whoever
    reads it need not keep it: a convolution behind BatchNorm and ReLU keeps nothing of its own.

    Attributes:
        module: whose forward it stands for.
        tells: whether the next layer is told what the output comes from.
        live: channels that stay (int64, ascending), None for all.
    """

    module: Any
    tells: bool = False
    live: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The norm's output, of the live channels."""
        norm, live = self.module, self.live
        if live is None:
            found: torch.Tensor = type(norm).forward(norm, x)
            # under autocast a norm may keep a cast copy of x instead of x
            if self.tells and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
                found.__dict__[SOURCE] = Source(x.detach(), self._again())
            return found
        mean, var = norm.running_mean, norm.running_var
        running = tuple(None if t is None else t.index_select(0, live) for t in (mean, var))
        affine = tuple(None if t is None else t.index_select(0, live) for t in (norm.weight, norm.bias))
        training = norm.training or mean is None
        found = functional.batch_norm(
            x, running[0], running[1], affine[0], affine[1], training, norm.momentum, norm.eps
        )
        if norm.training and mean is not None:
            mean.index_copy_(0, live, running[0])
            var.index_copy_(0, live, running[1])
            norm.num_batches_tracked.add_(1)
        return found

    def _again(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The norm as a function of its input alone, which moves no running mean."""
        norm = self.module
        if isinstance(norm, NORMS["rows"]):
            return type(norm).forward.__get__(norm)
        training = norm.training or norm.running_mean is None

        def batch(x: torch.Tensor) -> torch.Tensor:
            mean, var = (None, None) if training else (norm.running_mean, norm.running_var)
            return functional.batch_norm(x, mean, var, norm.weight, norm.bias, training, norm.momentum, norm.eps)

        return batch
