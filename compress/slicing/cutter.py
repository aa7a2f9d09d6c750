"""A checkpoint measured once and cut to any sizes: fuse, choose, rotate, refit, as many times as a search asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..calibration.batches import Batch, batches, sample
from ..calibration.loss import judge
from ..checkpoint import Checkpoint, named_parameters
from ..layout import Layout
from ..pass_ import Context
from .basis import sensitivity, weighted_basis
from .budget import Sizes, head_axis
from .fuse import cut, fuse, restate, rotate
from .refit import Refit, Side
from .shrink import removal_orders, without

SENSITIVITY_TOKENS = 16_384
"""Tokens whose gradients are taken: a backward costs two forwards, and the metric is floored anyway."""
SEARCH_TOKENS = 16_384
"""Tokens that the models compared in a search are fitted on: enough to rank them."""


@dataclass
class Cutter:
    """What was measured on the dense model.

    Attributes:
        layout: of the dense model.
        tensors: its parameters; not changed.
        ridge: of the fits.
        basis: float64 `[d, d]`, most important direction first; None if hidden never changes.
        orders: removal orders of units by numbered axis.
        models: dense float32 modules, plain and fused, as they were needed.
    """

    layout: Layout
    tensors: Mapping[str, torch.Tensor]
    ridge: float
    basis: torch.Tensor | None = None
    orders: dict[str, torch.Tensor] = field(default_factory=dict)
    models: dict[bool, tuple[Layout, dict[str, torch.Tensor], Any]] = field(default_factory=dict)

    @classmethod
    def measured(cls, checkpoint: Checkpoint, options: Sequence[Sizes], context: Context, ridge: float) -> Cutter:
        """Measure what the options need: the stream's directions and the units' removal orders."""
        cutter = cls(checkpoint.layout, checkpoint.tensors, ridge)
        layout, tensors, model = cutter.dense(fused=False)
        data = batches(context.calibration, layout)
        some = sample(context.calibration, max(SENSITIVITY_TOKENS, 8 * layout.families["hidden"]), context.seed)
        found = sensitivity(model, layout, context.track(batches(some, layout), "sensitivity"), context.seed)
        if any("hidden" in sizes for sizes in options):
            cutter.basis = weighted_basis(found.moments, torch.stack(list(found.metrics.values())).sum(0))
        shrunk = {axis for sizes in options for axis in sizes} - {"hidden"}
        keep = {axis: min(sizes[axis] for sizes in options if axis in sizes) for axis in shrunk}
        cutter.orders = removal_orders(model, layout, tensors, data, keep, found.metrics, context.track)
        return cutter

    def dense(self, fused: bool) -> tuple[Layout, dict[str, torch.Tensor], Any]:
        """Layout, tensors and module of the dense model, as it is or with its norms fused."""
        if fused not in self.models:
            layout, tensors = fuse(self.layout, self.tensors) if fused else (self.layout, dict(self.tensors))
            self.models[fused] = layout, tensors, Checkpoint(layout, tensors).model()
        return self.models[fused]

    def cut(
        self, sizes: Sizes, data: Sequence[Batch], context: Context
    ) -> tuple[Layout, dict[str, torch.Tensor], list[dict[str, Any]]]:
        """The model at `sizes`, refitted on `data`.

        Returns:
            layout, float32 tensors, and what each fit left unexplained.
        """
        layout, tensors, model = self.dense(fused="hidden" in sizes)
        after, basis = restate(self.layout, sizes), None
        sources = without(layout, tensors, self.orders, sizes)
        small = sources
        if "hidden" in sizes:
            assert self.basis is not None
            basis = cut(layout, tensors, self.basis, sizes["hidden"])
            small = rotate(layout, sources, basis, after)
        compressed = Checkpoint(after, copied(small)).model()
        with torch.no_grad():
            sides = [Side.at_start(m, shape, data) for m, shape in ((model, layout), (compressed, after))]
        refit = Refit(sides[0], sides[1], sources, data, basis, self.ridge)
        refit.run(context.track)
        return after, named_parameters(compressed), refit.details

    def search(
        self, options: Sequence[Sizes], fitted: list[np.ndarray], judged: list[np.ndarray], context: Context
    ) -> tuple[Sizes, list[dict[str, Any]]]:
        """The option of the smallest loss on `judged` when refitted on `fitted`.

        The loss has one valley along the widths of the stream, so it is walked down from the middle; fewer heads are
        tried only while they help, from the best width so far.

        Returns:
            the option, and every one that was tried with its loss.
        """
        some = sample(fitted, SEARCH_TOKENS, context.seed)
        fit, check = batches(some, self.layout), batches(judged, self.layout)
        original = self.dense(fused=False)[2]
        tried: list[dict[str, Any]] = []

        def loss(option: Sizes) -> float:
            known = next((entry["loss"] for entry in tried if entry["sizes"] == option), None)
            if known is None:
                after, tensors, _ = self.cut(option, fit, replace(context, details={}))
                known = judge(Checkpoint(after, tensors).model(), original, self.layout, check)
                tried.append({"sizes": option, "loss": known})
            return float(known)

        axis, best = head_axis(self.layout), None
        for heads in sorted({option.get(axis, 0) for option in options}, key=lambda n: (n > 0, -n)):
            group = [option for option in options if option.get(axis, 0) == heads]
            middle = self._width(best) if best else self._width(group[len(group) // 2])
            found = descend(group, loss, min(range(len(group)), key=lambda n: abs(self._width(group[n]) - middle)))
            if best is not None and loss(found) >= loss(best):
                break
            best = found
        assert best is not None
        return best, tried

    def _width(self, sizes: Sizes) -> int:
        return sizes.get("hidden", self.layout.families["hidden"])


def descend(options: Sequence[Sizes], loss: Callable[[Sizes], float], start: int) -> Sizes:
    """The bottom of the valley of `loss` over a line of options, walked from option number `start`."""
    at = start
    while True:
        near = [n for n in (at - 1, at, at + 1) if 0 <= n < len(options)]
        lowest = min(near, key=lambda n: loss(options[n]))
        if lowest == at:
            return options[at]
        at = lowest


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 copies that share storage where the originals do."""
    seen: dict[int, torch.Tensor] = {}
    return {name: seen.setdefault(id(t), t.detach().float().clone()) for name, t in tensors.items()}
