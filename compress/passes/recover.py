"""recover: a compressed checkpoint learns to answer like the original again.

It learns from the original's answers (compress/train/learning.py) with all weights free or with low-rank changes of the
blocks' matrices (LoRA, Hu et al., arXiv 2106.09685) that are merged in the end. The original's whole distribution says
more a token than the token does, so a small text suffices (benchmarks/recover.py measures how far it goes). What
earlier passes promised is kept: sizes because shapes do not change, neutral gains and zeros because they do not move
(compress/train/promises.py).

Training is in float32 whatever the stored dtype, and is cast once at the end. A killed run continues from the last
checkpoint of the training and ends with the same bytes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from ..checkpoint import Check, Checkpoint, named_parameters
from ..errors import RecipeError
from ..evaluate.gate import Gate
from ..layout import Layout
from ..pass_ import STRICT, Context, Forecast, Pass
from ..tokens import Input, Tokens
from ..train.learning import Learning

LOADED = 64
"""Sequences on which the load of experts is counted."""


@dataclass(frozen=True, config=STRICT)
class Recover(Learning, Pass):
    """Train a compressed checkpoint towards the original.

    Attributes:
        lora: rank of the changes, or none for all weights; routers and routed experts stay as they are.
        stop: a gate on a tenth of the calibration data, which is then left out of the training; asked after each
            checkpoint, and met it ends the training.
    """

    needs_calibration: ClassVar[bool] = True

    lora: Annotated[int, Field(gt=0)] | None = None
    stop: Gate | None = None

    def requires(self, layout: Layout) -> Forecast:
        """Refuse losses that the task does not have, and predict memory and disk."""
        trained = layout.parameters if self.lora is None else low_rank(layout, self.lora)
        note = f"{trained:,} of {layout.parameters:,} parameters trained, {self.steps} steps of {self.batch} rows"
        return self.forecast("recover", layout, trained, [note])

    def apply(self, checkpoint: Checkpoint, context: Context) -> None:
        """Train, merge, cast."""
        began, before = time.perf_counter(), load(checkpoint, context)
        judged, learned = self._parts(context)
        lesson, layout = self.lesson("recover", checkpoint, context, learned), checkpoint.layout
        if self.lora is not None:
            without = lesson.keeps.frozen | lesson.keeps.zeros
            lesson.model = adapted(lesson.model, layout, self.lora, without, context.seed)
        done = lesson.train(self, context, "recover", stop=self._stop(checkpoint, context.original, judged))
        trained = sum(p.numel() for p in lesson.model.parameters() if p.requires_grad)
        checkpoint.become(layout, merged(lesson.model))
        context.details.update(
            lesson.record(done, checkpoint.tensors),
            trained=trained,
            seconds={"train": time.perf_counter() - began},
        )
        if before:
            told = {"before": before, "after": load(checkpoint, context)}
            flat = {f"{name} {when}": shares for when, each in told.items() for name, shares in each.items()}
            context.details["load_per_layer"] = flat

    def checks(self, details: Mapping[str, Any]) -> list[Check]:
        """Nothing of its own: it keeps what others promised."""
        return []

    def _parts(self, context: Context) -> tuple[list[Input], list[Input]]:
        """A tenth for the gate, if there is one, and what is learned from."""
        if self.stop is None:
            return [], context.calibration
        order = np.random.default_rng(context.seed).permutation(len(context.calibration))
        tenth = set(order[: max(1, len(order) // 10)].tolist())
        judged = [s for n, s in enumerate(context.calibration) if n in tenth]
        return judged, [s for n, s in enumerate(context.calibration) if n not in tenth] or judged

    def _stop(
        self, checkpoint: Checkpoint, original: Checkpoint | None, judged: Sequence[Input]
    ) -> Callable[[nn.Module], bool] | None:
        if self.stop is None or original is None:
            return None
        from ..data import Sample
        from ..evaluate import evaluate
        from ..evaluate.gate import judge
        from ..evaluate.torch_scorer import TorchScorer

        gate, reference = self.stop, TorchScorer(original)
        parts = map(Tokens.of, judged)
        samples = [Sample(ids=part.ids, bytes=0, text="", types=part.types) for part in parts]

        def scores(scorer: TorchScorer) -> dict[str, float]:
            found = evaluate(scorer, samples, [gate.metric], reference)
            return {name: score.value for name, score in found.items()}

        before = scores(reference)

        def met(model: nn.Module) -> bool:
            trial = Checkpoint(checkpoint.layout, {}, side_files=checkpoint.side_files)
            trial.become(checkpoint.layout, merged(copy.deepcopy(model)))
            return judge(gate, scores(TorchScorer(trial)), before).passed

        return met


def load(checkpoint: Checkpoint, context: Context) -> dict[str, list[float]]:
    """Of a mixture of experts: each block's largest and smallest share of tokens that choose one expert."""
    from ..calibration.batches import batches
    from ..moe.routing import loads

    if checkpoint.layout.arch.experts is None:
        return {}
    found = loads(checkpoint.model(), checkpoint.layout, batches(context.calibration[:LOADED], checkpoint.layout))
    return {"busiest": [max(shares) for shares in found], "idlest": [min(shares) for shares in found]}


def matrices(layout: Layout) -> list[str]:
    """Weights of the blocks' branches by name: what LoRA changes.

    Of experts at most the shared ones are matrices, and a router is so small (moe/router.py) that a change of the
    usual size would choose for it.
    """
    modules = [m for b in range(layout.depth) for branch in layout.branches(b) for m in (*branch.reads, branch.writes)]
    names = [f"{m}.weight" for m in dict.fromkeys(modules)]
    experts = layout.arch.experts
    routers = {layout.full(experts.router, b) for b in range(layout.depth)} if experts else set()
    return [name for name in names if name in layout.tensors and name not in routers]


def low_rank(layout: Layout, rank: int) -> int:
    """Parameters of changes of this rank."""
    return sum(rank * sum(layout.tensors[name].shape) for name in matrices(layout))


def adapted(model: nn.Module, layout: Layout, rank: int, without: frozenset[str], seed: int) -> nn.Module:
    """The model with low-rank changes beside the blocks' matrices; only these are trained."""
    from peft import LoraConfig, get_peft_model

    names = [name.removesuffix(".weight") for name in matrices(layout) if name not in without]
    if not names:
        raise RecipeError("lora", f"no matrix of {layout.arch.model_type} that may change", "train all: no lora")
    conv = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in names)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, bias="none", fan_in_fan_out=conv)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found: nn.Module = get_peft_model(model, config)
    return found


def merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors by the names that the layout has, low-rank changes added in."""
    merge = getattr(model, "merge_and_unload", None)
    return named_parameters(merge() if merge is not None else model)
