"""swat: train with sparse weights and sparse saved activations (SWAT, arXiv 2001.01969), and leave the zeros behind.

    exact        one threshold a tensor, as published; weights end with zeros anywhere. Saves memory while training
    sampled      weight gradients from random tokens. Saves memory and a third of the arithmetic; weights stay dense
    structured   whole units leave every product. Saves memory and time while training, and `compact` behind it makes
                 the model smaller everywhere

Beside the published recipe: weights ramp, activations are stored encoded instead of as dense zeros, an activation
function and the layer behind it keep one tensor, tokens are drawn at random where the paper takes channels of the
largest activations (which locks in dead ones). ../swat/ has the parts, docs/swat.md the use without recipes.

The loss is that of `recover`: the divergence from the original's answers, the text's likelihood, or both.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from tersor.compress.axes import family
from tersor.compress.checkpoint import Check, Checkpoint, named_parameters
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.layout import Layout
from tersor.compress.pass_ import STRICT, Context, Forecast, Pass
from tersor.compress.passes.recover import Recover, memory, rows
from tersor.compress.train.options import Training, needs_extra

from ..swat.options import Sparsity
from .compact import compactable, dead_units

if TYPE_CHECKING:
    from ..swat.callback import SwatCallback
    from ..swat.training import SparseTraining

POINTS = 200
"""Most losses, and most steps of a curve, that the journal keeps."""


@dataclass(frozen=True, config=STRICT)
class Swat(Training, Sparsity, Pass):
    """Train with sparse weights and activations.

    Attributes:
        distill: share of the loss that is the divergence from the original's answers; the rest is the text's
            likelihood, which only language models have.
        temperature: of the divergence.
        width: tokens of a row, by default those of the longest calibration sequence.
    """

    needs_calibration: ClassVar[bool] = True

    distill: Annotated[float, Field(ge=0, le=1)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    width: Annotated[int, Field(gt=1)] | None = None

    def requires(self, layout: Layout) -> Forecast:
        """Refuse what this task or architecture does not have, and predict memory and disk."""
        needs_extra("swat")
        if self.distill < 1 and layout.task != "text-generation":
            raise RecipeError("distill", f"{self.distill:g} for {layout.task}", "1, since the data brings no labels")
        names = [name.removesuffix(".weight") for name, t in layout.tensors.items() if len(t.dims) in (2, 4)]
        self._known(names)
        notes = [f"{self.mode}: weights {self.weights:.0%}, activations {self.activations:.0%} dropped"]
        if self.mode == "structured":
            self._structured(layout)
            notes.append("units become zero; `compact` behind this pass takes them out of the shapes")
        elif self.weights:
            notes.append("zeros anywhere in the weights: shapes, speed and memory of the result stay as they are")
        state = 12 * layout.parameters * (max(2, self.average) + 1)
        alike = Recover(batch=self.batch, width=self.width, activation_checkpointing=self.activation_checkpointing)
        return Forecast(layout, memory(layout, alike, layout.parameters), tuple(notes), disk=state)

    def _known(self, names: list[str]) -> None:
        import re

        for word in self.exempt:
            if word in ("first", "last") or any(name == word or name.startswith(f"{word}.") for name in names):
                continue
            if not (word.startswith("re:") and any(re.search(word[3:], name) for name in names)):
                raise RecipeError("exempt", f"{word!r}, which matches no layer", f"a name like {names[-1]!r}")

    def _structured(self, layout: Layout) -> None:
        known = compactable(layout)
        if not any(word in known for word in self.on):
            expected = " or ".join(known) or "another architecture, or mode 'sampled'"
            raise RecipeError("on", ", ".join(self.on), expected, f"{layout.arch.model_type} keeps the rest fixed.")

    def apply(self, checkpoint: Checkpoint, context: Context) -> None:
        """Train, write zeros, cast."""
        from tersor.compress.train import Distillation, LanguageModel, train
        from tersor.compress.train.promises import held

        from ..swat.callback import SwatCallback

        began = time.perf_counter()
        if not context.calibration:
            raise PreflightError("swat", "no calibration data", "text to train on")
        if context.original is None and self.distill:
            raise PreflightError("swat", "no original", "the checkpoint that the run started from", "Or distill: 0.")
        layout, keeps = checkpoint.layout, held(checkpoint)
        model = copy.deepcopy(checkpoint.model()).requires_grad_(True)
        data = rows(model, layout, context.calibration, self.width)
        keeps.hold(model)
        callback = SwatCallback(self, seed=context.seed, harden=False)
        objective = (
            Distillation(context.original.model(), self.distill, self.temperature)
            if self.distill and context.original is not None
            else LanguageModel()
        )
        done = train(
            model,
            data,
            objective,
            self,
            folder=context.folder,
            seed=context.seed,
            callbacks=[callback],
            track=context.track,
            label="swat",
        )
        training = self._finished(model, callback, context)
        figures = meters(training, lambda: objective(model, data.collate([data[0]])), model)
        training.harden()
        checkpoint.become(layout, named_parameters(model))
        every = max(1, len(done.losses) // POINTS)
        context.details.update(
            mode=self.mode,
            task=layout.task,
            steps=done.steps,
            averaged=done.averaged,
            rows=len(data),
            losses=[[step, loss] for step, loss in done.losses[::every]],
            densities=curve(callback),
            layers={name: round(share, 4) for name, share in training.shares.items()},
            **figures,
            **self._left(checkpoint, training),
            seconds={"train": time.perf_counter() - began},
        )

    def _finished(self, model: torch.nn.Module, callback: SwatCallback, context: Context) -> SparseTraining:
        """Sparse training as its last step left it: also where a resumed run found nothing left to train."""
        if callback.training is not None:
            return callback.training
        from tersor.compress.train.state import checkpoints

        from ..swat.callback import load
        from ..swat.training import SparseTraining

        assert context.folder is not None, "without a folder there is no state to find finished"
        training = SparseTraining(model, self, self.steps, seed=context.seed)
        load(training, checkpoints(Path(context.folder))[-1])
        return training

    def _left(self, checkpoint: Checkpoint, training: SparseTraining) -> dict[str, Any]:
        """What the result keeps: live units by axis, or values that are not zero, and what that is worth."""
        if self.mode == "structured":
            live = {group.name: int(training.live[group.name].sum()) for group in training.groups}
            return {"live": live, "warnings": []}
        if self.weights == 0:
            return {"warnings": []}
        names = [f"{name}.weight" for name in training.layers]
        nonzero = {name: int(checkpoint.tensors[name].count_nonzero()) for name in names}
        total = sum(t.nbytes for t in {id(t): t for t in checkpoint.tensors.values()}.values())
        size = checkpoint.tensors[names[0]].itemsize
        saved = sum(checkpoint.tensors[n].nbytes - nonzero[n] * size - checkpoint.tensors[n].numel() / 8 for n in names)
        said = (
            "zeros lie anywhere in the weights: ONNX Runtime multiplies by them, so nothing runs faster; stored as "
            f"bits and values the file would take {1 - saved / total:.0%} of its bytes"
        )
        return {"nonzero": nonzero, "encoded_share": 1 - saved / total, "warnings": [said]}

    def checks(self, details: Mapping[str, Any]) -> list[Check]:
        """What is zero stays zero, or leaves."""
        task = str(details["task"])
        nonzero = {str(name): int(count) for name, count in details.get("nonzero", {}).items()}
        live = {str(axis): int(count) for axis, count in details.get("live", {}).items()}

        def more_values(_: Any, tensors: Mapping[str, torch.Tensor]) -> str | None:
            for name, count in nonzero.items():
                if name in tensors and int(tensors[name].count_nonzero()) > count:
                    return f"{name} has more than {count} values that are not zero"
            return None

        def more_units(config: Any, tensors: Mapping[str, torch.Tensor]) -> str | None:
            layout = Layout.of(config, task)
            for name in {family(axis) for axis in live}:
                for axis, dead in dead_units(layout, tensors, name).items():
                    if axis in live and layout.sizes[axis] - len(dead) > live[axis]:
                        return f"{axis} has more than {live[axis]} live units"
            return None

        found = [Check("pruned weights are zero", more_values)] if nonzero else []
        return [*found, Check("dropped units are zero", more_units)] if live else found


def curve(callback: SwatCallback) -> list[list[float]]:
    """(step, weight density of all sparse layers together), at most `POINTS` of them."""
    if callback.training is None:
        return []
    sizes = {name: layer.module.weight.numel() for name, layer in callback.training.layers.items()}
    total = sum(sizes.values())
    every = math.ceil(len(callback.history) / POINTS) or 1
    return [[s, 1 - sum(x * sizes[n] for n, x in shares.items()) / total] for s, shares in callback.history[::every]]


def meters(training: SparseTraining, loss: Any, model: torch.nn.Module) -> dict[str, Any]:
    """FLOPs and saved bytes of one row, dense and as trained in the last step."""
    from ..meters import measure, saved_bytes

    def kept() -> int:
        with saved_bytes(model) as found:
            held = loss()
        del held
        return found.total

    model.train()
    dense = kept()
    training.attach()
    try:
        flops = measure(lambda: loss().backward(), training)
        sparse = kept()
    finally:
        training.detach()
        model.zero_grad(set_to_none=True)
        model.eval()
    return {
        "flops": {"dense": flops.dense, "counted": flops.counted, "realised": flops.realised},
        "saved_bytes": {"dense": dense, "sparse": sparse},
    }
