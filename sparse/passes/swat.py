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

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from tersor.compress.axes import family
from tersor.compress.checkpoint import Check, Checkpoint, named_parameters
from tersor.compress.errors import RecipeError
from tersor.compress.layout import Layout
from tersor.compress.pass_ import STRICT, Context, Forecast, Pass
from tersor.compress.train.learning import Learning

from ..swat.options import Sparsity
from .compact import compactable, dead_units

if TYPE_CHECKING:
    from ..swat.callback import SwatCallback
    from ..swat.record import Record
    from ..swat.training import SparseTraining


@dataclass(frozen=True, config=STRICT)
class Swat(Learning, Sparsity, Pass):
    """Train with sparse weights and activations."""

    needs_calibration: ClassVar[bool] = True

    def requires(self, layout: Layout) -> Forecast:
        """Refuse what this task or architecture does not have, and predict memory and disk."""
        names = [name.removesuffix(".weight") for name, t in layout.tensors.items() if len(t.dims) in (2, 4)]
        self._known(names)
        notes = [f"{self.mode}: weights {self.weights:.0%}, activations {self.activations:.0%} dropped"]
        if self.mode == "structured":
            self._structured(layout)
            notes.append("units become zero; `compact` behind this pass takes them out of the shapes")
        elif self.weights:
            notes.append("zeros anywhere in the weights: shapes, speed and memory of the result stay as they are")
        return self.forecast("swat", layout, layout.parameters, notes)

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
        from ..swat.callback import SwatCallback
        from ..swat.record import Record

        began = time.perf_counter()
        lesson, layout = self.lesson("swat", checkpoint, context, context.calibration), checkpoint.layout
        model, data = lesson.model, lesson.data
        callback = SwatCallback(self, seed=context.seed, harden=False)
        record = Record(callback, lesson.objective, data.collate([data[0]]), self.steps)
        lesson.objective = record.watched
        done = lesson.train(self, context, "swat", callbacks=[callback, record])
        training = self._finished(model, callback, record, context)
        figures = meters(training, lambda: record.objective(model, record.batch), model)
        training.harden()
        checkpoint.become(layout, named_parameters(model))
        context.details.update(
            mode=self.mode,
            task=layout.task,
            **lesson.record(done, checkpoint.tensors),
            **record.curves(),
            layers={name: round(share, 4) for name, share in training.shares.items()},
            **figures,
            **self._left(checkpoint, training),
            seconds={"train": time.perf_counter() - began},
        )

    def _finished(
        self, model: torch.nn.Module, callback: SwatCallback, record: Record, context: Context
    ) -> SparseTraining:
        """Sparse training as its last step left it: also where a resumed run found nothing left to train."""
        if callback.training is not None:
            return callback.training
        from tersor.compress.train.state import checkpoints

        from ..swat.callback import load
        from ..swat.training import SparseTraining

        assert context.folder is not None, "without a folder there is no state to find finished"
        training = SparseTraining(model, self, self.steps, seed=context.seed)
        last = checkpoints(Path(context.folder))[-1]
        load(training, last)
        record.load(last)
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


def meters(training: SparseTraining, loss: Any, model: torch.nn.Module) -> dict[str, Any]:
    """FLOPs, saved bytes and seconds of one row's step, dense and as trained in the last step.

    What such steps move is put back: running means of norms, thresholds, gradient averages.
    """
    from ..meters import measure, saved_bytes

    state, buffers = training.state_dict(), [buffer.clone() for buffer in model.buffers()]

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
        seconds = paced(training, lambda: loss().backward())
    finally:
        training.detach()
        training.load_state_dict(state)
        for buffer, was in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(was)
        model.zero_grad(set_to_none=True)
        model.eval()
    return {
        "flops": {"dense": flops.dense, "counted": flops.counted, "realised": flops.realised},
        "saved_bytes": {"dense": dense, "sparse": sparse},
        "step_seconds": seconds,
    }


def paced(training: SparseTraining, step: Callable[[], Any], rounds: int = 5) -> dict[str, float]:
    """Median seconds of `step` without and with the masks, in turns, after one round that is not timed."""
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for turn in range(rounds + 1):
        for name, put in (("dense", training.detach), ("sparse", training.attach)):
            put()
            began = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}
