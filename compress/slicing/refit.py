"""Least squares through a compressed model, one stage after the other, errors corrected as they arise.

The dense model and the compressed one run side by side on the calibration tokens. Before a stage of the
compressed model runs, what it reads is refitted to predict what the dense stage reads; after it, what it
writes is refitted so that its stream plus the stage predicts the dense stream. So every fit sees the errors
that were made in front of it, as in QEP (Arai and Ichikawa 2025) but for shapes instead of bits. With D, C
the dense and compressed normalised inputs, T the dense stream behind the stage in the basis, r the compressed
stream before it and A its inner activations:

    reads:    W ← W_dense Mᵀ,  M = argmin ‖D − C M‖²
    writes:   W = argmin Σ w ‖T − r − A W‖²,  w = 1 / mean(T²)

w makes a token count by its direction, which is all that the next norm passes on. Both fits pull towards the
projected weights (lstsq.py), so where nothing is cut nothing changes. In memory: two streams, one batch's
work, one fit's sums, and inner activations while they are few (HELD). Compare SliceGPT's code: no refit, each
layer runs forward twice, about four copies of all activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..calibration.batches import Batch, finite
from ..calibration.lstsq import Regression
from ..calibration.side import Side
from ..calibration.stages import Stage, stages
from ..deferred import trim
from ..layout import Layout
from .fuse import along, by_rows, lift, readers
from .kept import Kept

Track = Callable[[Iterable[Any], str], Iterable[Any]]

HELD = 1 << 28
"""Bytes of inner activations that may be held so that a stage of the compressed model runs once instead of twice."""


@dataclass
class Refit:
    """The refit of one compressed model.

    Attributes:
        dense: the fused dense model.
        small: the compressed model; its weights are changed in place.
        sources: the weights behind the compressed model's reads, at full hidden width, float32, by parameter
            name.
        data: batches.
        basis: float64 `[d, k]`, or None where hidden is not cut.
        ridge: see lstsq.py.
        scale: what the compressed stream is multiplied by (fuse.py).
        details: share of each target left unexplained before and after, by fit.
    """

    dense: Side
    small: Side
    sources: dict[str, torch.Tensor]
    data: Sequence[Batch]
    basis: torch.Tensor | None
    ridge: float
    scale: float = 1.0
    details: list[dict[str, Any]] = field(default_factory=list)
    moves: bool = False
    held: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def layout(self) -> Layout:
        """Of the compressed model."""
        return self.small.walk.layout

    @torch.no_grad()
    def run(self, track: Track, kept: Kept | None = None) -> None:
        """All blocks, then the head; from the block on that `kept` knows."""
        kept = kept or Kept()
        done = kept.resume(self)
        for block in track(range(self.layout.depth), "least squares"):
            if block >= done:
                self.block(stages(self.layout, block))
                kept.block_done(block, self)
                if not isinstance(self.dense.streams, list):  # what fits in memory need not be swept out of it
                    trim()
        self.head()

    def block(self, steps: list[Stage]) -> None:
        """One block. Where it runs by stages, each is run once by the dense model and twice by the other."""
        self.moves = all(self.small.skippable(stage) for stage in steps[:-1]) and not steps[-1].post
        with ExitStack() as passed:
            for stage in steps:
                self.reads(stage)
                self.writes(stage)
                if self.moves:
                    self.move(stage)
                    if stage is not steps[-1]:
                        passed.enter_context(self.dense.without(stage))
                        passed.enter_context(self.small.without(stage))
        if not self.moves:
            self.dense.advance(steps[0].block)
            self.small.advance(steps[0].block)

    def start(self) -> torch.Tensor:
        """The dense normalised input from the compressed one if nothing but the cut happened: `[k, d]`."""
        if self.basis is None:
            return torch.eye(self.layout.families["hidden"], dtype=torch.float64)
        return lift(self.layout, self.basis)

    def reads(self, stage: Stage) -> None:
        """Refit what the stage reads to what its dense twin reads."""
        first = stage.reads[0]
        inp, out = self.start().shape
        fit = Regression(inp, out, intercept=self._biased(stage.reads))
        for number, batch in enumerate(self.data):
            seen, wanted = (side.observe(stage, number, [first]).inputs[first] for side in (self.small, self.dense))
            fit.add(batch.tokens(seen), batch.tokens(finite(wanted, first)))
        self._take_reads(stage.reads, fit)

    def _take_reads(self, modules: Sequence[str], fit: Regression) -> None:
        found, constant = fit.solve(self.start(), self.ridge)
        self._note(modules[0], fit)
        for module in modules:
            name = f"{module}.weight"
            source, dims = self.sources[name], self.layout.tensors[name].dims

            def turned(part: torch.Tensor, name: str = name) -> torch.Tensor:
                weight, where = along(part, self.layout, name, "hidden")
                return (weight @ found.T).movedim(-1, where).float()

            def shift(part: torch.Tensor, by: torch.Tensor, name: str = name) -> torch.Tensor:
                return along(part, self.layout, name, "hidden")[0] @ by

            if constant is not None:
                bias = self.sources[f"{module}.bias"].double()
                self._put(f"{module}.bias", bias + by_rows(partial(shift, by=constant), source, dims))
            self._put(name, by_rows(turned, source, dims))

    def writes(self, stage: Stage) -> None:
        """Refit what the stage writes so that the stream behind it is the dense one."""
        modules = [writer.module for writer in stage.writers]
        weights = [along(self._get(f"{m}.weight"), self.layout, f"{m}.weight", "hidden") for m in modules]
        before = torch.cat([weight.reshape(-1, weight.shape[-1]) for weight, _ in weights])
        biased = [m for m in modules if f"{m}.bias" in self.layout.tensors]
        scale = float(getattr(self.layout.config, self.layout.arch.branch_scale, 1.0))
        fit = Regression(before.shape[0], before.shape[1], intercept=bool(biased))
        constant = sum((self._get(f"{m}.bias").double() for m in biased), torch.zeros(before.shape[1])).double()
        holds = self.moves and self._holds(before.shape[0])
        for number, batch in enumerate(self.data):
            inner, target, weight = self._written(stage, modules, number)
            if holds:
                self.held.append([inner[m] for m in modules])
            inner = torch.cat([batch.tokens(inner[m]) for m in modules], dim=-1).double()
            fit.add(inner, batch.tokens(target) / scale - constant, batch.tokens(weight[..., None])[:, 0])
        found, change = fit.solve(before, self.ridge)
        self._note(modules[0], fit)
        if change is not None:
            name = f"{biased[0]}.bias"
            self._put(name, self._get(name).double() + change)
        for module, (weight, where), part in zip(
            modules, weights, found.split([w.shape[0] for w, _ in weights]), strict=True
        ):
            self._put(f"{module}.weight", part.reshape(weight.shape).movedim(-1, where))

    def _written(self, stage: Stage, modules: list[str], number: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Inner activations by module, the target of the stage's output, and token weights."""
        if stage.post:  # a norm follows the writer: the target is what its dense twin hands to it
            inner = self.small.observe(stage, number, modules).inputs
            target = self.dense.observe(stage, number, [], modules).outputs[modules[0]]
            return inner, target.double(), _weight(target)
        behind = finite(self.dense.behind(stage, number), modules[0])
        if self.moves:
            self.dense.streams[number] = self.dense.normalised(stage, behind)
        target, weight = behind.double(), _weight(behind)
        if self.basis is not None:
            target = target @ self.basis * self.scale
        if self.layout.arch.stream == "post-norm":
            seen = self.small.observe(stage, number, [*modules, stage.after], modules)
            return seen.inputs, target - (seen.inputs[stage.after] - seen.outputs[modules[0]]), weight
        seen = self.small.observe(stage, number, [*modules, stage.norm or stage.reads[0]])
        return seen.inputs, target - seen.inputs[stage.norm or stage.reads[0]], weight

    def _holds(self, width: int) -> bool:
        """Whether what the writers read is small enough to be held until they are refitted."""
        count = sum(stream[..., 0].numel() for stream in self.small.streams)
        return self.layout.arch.stream == "pre-norm" and 4 * count * width <= HELD

    def move(self, stage: Stage) -> None:
        """The compressed streams behind a refitted stage: from what was held, else by running it again."""
        if not self.held:
            self.small.move(stage)
            return
        writers = [self.small.walk.model.get_submodule(writer.module) for writer in stage.writers]
        scale = float(getattr(self.layout.config, self.layout.arch.branch_scale, 1.0))
        for number, held in enumerate(self.held):
            out = sum(writer(inner) for writer, inner in zip(writers, held, strict=True))
            self.small.streams[number] = self.small.streams[number] + scale * out
        self.held.clear()

    def head(self) -> None:
        """Refit what reads the final norm; of a tied head the final norm's gain is all that is free."""
        arch = self.layout.arch
        final = self.layout.full(arch.final_norm) if arch.final_norm else ""
        modules = readers(self.layout, final) if final else []
        if not modules:
            return
        if any(self.layout.tensors[f"{m}.weight"].shared_with for m in modules):
            if self.basis is not None:
                self.tied_head(final, modules[0])
            return
        inp, out = self.start().shape
        fit = Regression(inp, out, intercept=self._biased(modules))
        for batch, zh, z in self._final(final):
            fit.add(batch.tokens(zh), batch.tokens(z))
        self._take_reads(modules, fit)

    def _final(self, final: str) -> Iterable[tuple[Batch, torch.Tensor, torch.Tensor]]:
        norms = [side.walk.model.get_submodule(final) for side in (self.small, self.dense)]
        for number, batch in enumerate(self.data):
            yield batch, norms[0](self.small.streams[number]), norms[1](self.dense.streams[number])

    def tied_head(self, final: str, module: str) -> None:
        """Refit the final gain g: E' (g ∘ C) to the dense logits, in the metric of the embedding E'."""
        name, offset = f"{final}.weight", self.layout.arch.norm.gain_offset
        gain = self._get(name).double() + offset
        small, dense = self._get(f"{module}.weight").double(), self.sources[f"{module}.weight"].double()
        inner, outer = small.T @ small, small.T @ dense
        gram, cross = torch.zeros_like(inner), torch.zeros_like(gain)
        self._put(name, torch.full_like(gain, 1 - offset))
        for batch, zh, z in self._final(final):
            c = batch.tokens(zh).double()
            gram += inner * (c.T @ c)
            cross += (c * (batch.tokens(z).double() @ outer.T)).sum(0)
        penalty = self.ridge * gram.diagonal().mean() * torch.eye(len(gain), dtype=torch.float64)
        self._put(name, gain + torch.linalg.solve(gram + penalty, cross - gram @ gain) - offset)

    def _biased(self, modules: Sequence[str]) -> bool:
        return all(f"{module}.bias" in self.layout.tensors for module in modules)

    def _get(self, name: str) -> torch.Tensor:
        return self.small.walk.model.get_parameter(name).data

    def _put(self, name: str, value: torch.Tensor) -> None:
        self._get(name).copy_(value)

    def _note(self, module: str, fit: Regression) -> None:
        self.details.append({"fit": module, "left_before": fit.left_before, "left_after": fit.left_after})


def _weight(target: torch.Tensor) -> torch.Tensor:
    """1 / mean(T²) of each token, float64."""
    norm = torch.linalg.vector_norm(target, dim=-1, dtype=torch.float64)
    return target.shape[-1] / norm.square().clamp_min(1e-30)
