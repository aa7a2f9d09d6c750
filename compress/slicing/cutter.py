"""A checkpoint measured once and cut to any sizes: fuse, choose, rotate, refit, as many times as a search asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..calibration.batches import Batch, batches, sample
from ..calibration.loss import judge
from ..calibration.side import Side
from ..checkpoint import Checkpoint, named_parameters
from ..deferred import Later, Store, at_once, own, when_used
from ..layout import Layout
from ..pass_ import Context
from ..tokens import Input
from .basis import sensitivity, weighted_basis
from .budget import Sizes, head_axis, whole_heads
from .fuse import cut, embeddings, fuse, restate, rotate, stream_scale
from .heads import narrowed_rope
from .kept import Kept
from .obs import survivors
from .refit import Refit
from .shrink import removal_orders, without

SENSITIVITY_TOKENS = 8_192
"""Tokens whose gradients are taken, or 8 a direction: a backward costs two forwards, and the metric is floored."""
UNIT_TOKENS = 8_192
"""Tokens that say which units go, or 16 a unit: enough to rank them; the fits that follow see all."""
BACKWARD_TOKENS = 256
"""Tokens of one backward through a model that does not fit: its activations do not either."""
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
        store: where the weights of a model come to rest that does not fit in memory as a whole; None if it does.
        kept: what outlives a kill.
    """

    layout: Layout
    tensors: Mapping[str, torch.Tensor]
    ridge: float
    basis: torch.Tensor | None = None
    orders: dict[str, torch.Tensor] = field(default_factory=dict)
    models: dict[bool, tuple[Layout, dict[str, torch.Tensor], Any]] = field(default_factory=dict)
    store: Store | None = None
    kept: Kept = field(default_factory=Kept)

    @classmethod
    def measured(cls, checkpoint: Checkpoint, options: Sequence[Sizes], context: Context, ridge: float) -> Cutter:
        """Measure what the options need: the stream's directions and the units' removal orders."""
        store = Store(checkpoint.dtype, _folder(context, "weights")) if checkpoint.lean else None
        cutter = cls(checkpoint.layout, checkpoint.tensors, ridge, store=store, kept=Kept(context.folder))
        if (known := cutter.kept.tensors("measured")) is not None:
            cutter.basis = known.pop("basis", None)
            cutter.orders = known
            return cutter
        layout, tensors, model = cutter.dense(fused=False)
        some = sample(context.calibration, max(SENSITIVITY_TOKENS, 8 * layout.families["hidden"]), context.seed)
        small = batches(some, layout, BACKWARD_TOKENS) if store else batches(some, layout)
        shrunk = {axis for sizes in options for axis in sizes} - {"hidden"}
        zeros = Zeros(_folder(context, "metrics") if store else None, apart=bool(shrunk))
        found = sensitivity(model, layout, context.track(small, "sensitivity"), context.seed, zeros=zeros)
        if any("hidden" in sizes for sizes in options):
            total = torch.zeros_like(found.moments)
            for metric in {id(m): m for m in found.metrics.values()}.values():
                total += metric
            cutter.basis = weighted_basis(found.moments, total)
        keep = {axis: min(sizes[axis] for sizes in options if axis in sizes) for axis in shrunk}
        files = cutter.files(context, "units")
        widest = max(layout.inner_size(branch) for branch in layout.branches(0))
        data = batches(sample(context.calibration, max(UNIT_TOKENS, 16 * widest), context.seed), layout)
        cutter.orders = removal_orders(model, layout, tensors, data, keep, found.metrics, context.track, files)
        basis = {} if cutter.basis is None else {"basis": cutter.basis}
        cutter.kept.keep_tensors("measured", {**basis, **cutter.orders})
        return cutter

    @property
    def later(self) -> Later:
        """When weights are made."""
        return when_used(self.store) if self.store else at_once

    def dense(self, fused: bool) -> tuple[Layout, dict[str, torch.Tensor], Any]:
        """Layout, tensors and module of the dense model, as it is or with its norms fused."""
        if fused not in self.models:
            layout, tensors = self.layout, dict(self.tensors)
            if fused:
                layout, tensors = fuse(layout, tensors, self.later)
            self.models[fused] = layout, tensors, Checkpoint(layout, tensors, lean=self.store is not None).model()
        return self.models[fused]

    def cut(
        self, sizes: Sizes, data: Sequence[Batch], context: Context, state: Kept | None = None
    ) -> tuple[Layout, dict[str, torch.Tensor], list[dict[str, Any]]]:
        """The model at `sizes`, refitted on `data`; from where `state` stands.

        Returns:
            layout, float32 tensors, and what each fit left unexplained.
        """
        layout, tensors, model = self.dense(fused="hidden" in sizes)
        after, basis = restate(self.layout, sizes), None
        if "head_dim" in sizes:
            kept = survivors(self.orders["head_dim"], self.layout.families["head_dim"], sizes["head_dim"])
            after.config.rope_parameters = narrowed_rope(layout, model, kept)
        sources = without(layout, tensors, self.orders, sizes, self.later)
        start = sources
        if "hidden" in sizes:
            assert self.basis is not None
            basis = cut(layout, tensors, self.basis, sizes["hidden"])
            start = rotate(layout, sources, basis, after, self.later)
        compressed = Checkpoint(after, self.copied(start), lean=self.store is not None).model()
        with torch.no_grad():
            dense = Side.at_start(model, layout, data, self.files(context, "dense"))
            small = Side.at_start(compressed, after, data, self.files(context, "small"))
        scale = 1.0 if basis is None else stream_scale(self.layout, after)
        refit = Refit(dense, small, sources, data, basis, self.ridge, scale)
        refit.run(context.track, state)
        return after, named_parameters(compressed), refit.details

    def search(
        self, options: Sequence[Sizes], fitted: list[Input], judged: list[Input], context: Context
    ) -> tuple[Sizes, list[dict[str, Any]]]:
        """The option of the smallest loss on `judged` when refitted on `fitted`.

        The loss has one valley along the widths of the stream, so it is walked down from the middle; fewer heads, then
        narrower ones, are tried only while they help, from the best width so far.

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

        best: Sizes | None = None
        whole = whole_heads(self.layout, options)
        for axis in ("", head_axis(self.layout), "head_dim"):
            line = [option for option in options if axis in option] if axis else whole
            for size in sorted({option.get(axis, 0) for option in line}, reverse=True):
                group = [option for option in line if option.get(axis, 0) == size]
                middle = self._width(best) if best else self._width(group[len(group) // 2])
                found = descend(group, loss, min(range(len(group)), key=lambda n: abs(self._width(group[n]) - middle)))
                if best is not None and found is not best and loss(found) >= loss(best):
                    break
                best = found
        assert best is not None
        return best, tried

    def files(self, context: Context, name: str) -> Path | None:
        """Where streams live: in memory if the model does."""
        folder = _folder(context, "streams") if self.store else None
        return folder / name if folder else None

    def copied(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Float32 copies that share storage where the originals do; of a model that does not fit, they are made late,
        all but the embeddings, of which every batch would make the whole for a few rows.
        """
        seen: dict[int, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if id(tensor) in seen:
                continue
            if self.store is None or tensor.ndim < 2:
                seen[id(tensor)] = tensor.detach().float().clone()
            else:
                seen[id(tensor)] = made = own(name, tensor, self.store)
                if name in embeddings(self.layout):
                    made.settle()
        return {name: seen[id(tensor)] for name, tensor in tensors.items()}

    def _width(self, sizes: Sizes) -> int:
        return sizes.get("hidden", self.layout.families["hidden"])


def _folder(context: Context, name: str) -> Path | None:
    if context.folder is None:
        return None
    (context.folder / name).mkdir(parents=True, exist_ok=True)
    return context.folder / name


@dataclass(frozen=True)
class Zeros:
    """Makes matrices of zeros, float64 `[d, d]`: in memory, or in a folder's files.

    Attributes:
        folder: of the files, or None.
        apart: one for every name; otherwise all names share one.
    """

    folder: Path | None
    apart: bool = True
    shared: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, name: str, d: int) -> torch.Tensor:
        """The matrix of a name."""
        if not self.apart:
            self.shared.extend([] if self.shared else [torch.zeros(d, d, dtype=torch.float64)])
            return self.shared[0]
        if self.folder is None:
            return torch.zeros(d, d, dtype=torch.float64)
        (self.folder / name).unlink(missing_ok=True)
        return torch.from_file(str(self.folder / name), shared=True, size=d * d, dtype=torch.float64).view(d, d)


def descend(options: Sequence[Sizes], loss: Callable[[Sizes], float], start: int) -> Sizes:
    """The bottom of the valley of `loss` over a line of options, walked from option number `start`."""
    at = start
    while True:
        near = [n for n in (at - 1, at, at + 1) if 0 <= n < len(options)]
        lowest = min(near, key=lambda n: loss(options[n]))
        if lowest == at:
            return options[at]
        at = lowest
