"""recover: a compressed checkpoint learns to answer like the original again.

    minimise  (1−α)·(−log p(text)) + α·T²·KL(original ‖ model) + β·relative error of hidden states

over the calibration text, with all weights free or with low-rank changes of the blocks' matrices (LoRA, Hu et al.,
arXiv 2106.09685) that are merged in the end. The original's whole distribution says more a token than the token does,
so a small text suffices (benchmarks/recover.py measures how far it goes). What earlier passes promised is kept: sizes
because shapes do not change, neutral gains and zeros because they do not move (compress/train/promises.py).

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
from ..errors import PreflightError, RecipeError
from ..evaluate.gate import Gate
from ..layout import Layout
from ..pass_ import STRICT, Context, Forecast, Pass
from ..tokens import Input, Tokens
from ..train.options import Training, needs_extra

WIDTH = 512
"""Tokens of a row that the forecast of memory assumes."""
POINTS = 200
"""Most losses that the journal keeps."""


@dataclass(frozen=True, config=STRICT)
class Recover(Training, Pass):
    """Train a compressed checkpoint towards the original.

    Attributes:
        distill: α, the share of the loss that is the divergence from the original's answers; the rest is the text's
            likelihood, which only language models have.
        temperature: T of the divergence.
        hidden: β, the weight of the hidden states' error; only where no pass has changed their width or number.
        lora: rank of the changes, or none for all weights.
        continued: so many sequences are drawn from the original, each going on from a piece of the calibration text,
            and learned from beside it: a small text alone is soon known by heart.
        width: tokens of a row, at least those of the longest calibration sequence.
        stop: a gate on a tenth of the calibration data, which is then left out of the training; asked after each
            checkpoint, and met it ends the training.
    """

    needs_calibration: ClassVar[bool] = True

    distill: Annotated[float, Field(ge=0, le=1)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    hidden: Annotated[float, Field(ge=0)] = 0.0
    lora: Annotated[int, Field(gt=0)] | None = None
    continued: Annotated[int, Field(ge=0)] = 0
    width: Annotated[int, Field(gt=1)] | None = None
    stop: Gate | None = None

    def requires(self, layout: Layout) -> Forecast:
        """Refuse losses that the task does not have, and predict memory and disk."""
        needs_extra("recover")
        if self.distill < 1 and layout.task != "text-generation":
            raise RecipeError("distill", f"{self.distill:g} for {layout.task}", "1, since the data brings no labels")
        if self.continued and layout.task != "text-generation":
            raise RecipeError("continued", f"{self.continued} for {layout.task}", "0: only language models go on")
        trained = layout.parameters if self.lora is None else low_rank(layout, self.lora)
        state = 12 * trained * (max(2, self.average) + 1)
        note = f"{trained:,} of {layout.parameters:,} parameters trained, {self.steps} steps of {self.batch} rows"
        return Forecast(layout, memory(layout, self, trained), (note,), disk=state)

    def apply(self, checkpoint: Checkpoint, context: Context) -> None:
        """Train, merge, cast."""
        from ..train import Distillation, LanguageModel, train
        from ..train.generated import continued
        from ..train.promises import held, sizes

        began = time.perf_counter()
        if not context.calibration:
            raise PreflightError("recover", "no calibration data", "text to train on")
        original = context.original
        if original is None:
            raise PreflightError("recover", "no original", "the checkpoint that the run started from")
        layout, keeps = checkpoint.layout, held(checkpoint)
        judged, learned = self._parts(context)
        teacher = original.model()
        if self.continued:
            length = max(map(len, learned))
            drawn = continued(
                teacher, learned, self.continued, length, seed=context.seed, folder=context.folder, track=context.track
            )
            learned = [*learned, *drawn]
        model: nn.Module = copy.deepcopy(checkpoint.model()).requires_grad_(True)
        data = rows(model, layout, learned, self.width)
        keeps.hold(model)
        if self.lora is not None:
            model = adapted(model, layout, self.lora, keeps.frozen | keeps.zeros, context.seed)
        objective = (
            Distillation(teacher, self.distill, self.temperature, self.hidden)
            if self.distill or self.hidden
            else LanguageModel()
        )
        done = train(
            model,
            data,
            objective,
            self,
            folder=context.folder,
            seed=context.seed,
            stop=self._stop(checkpoint, original, judged),
            track=context.track,
            label="recover",
        )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        checkpoint.become(layout, merged(model))
        every = max(1, len(done.losses) // POINTS)
        context.details.update(
            steps=done.steps,
            stopped=done.stopped,
            averaged=done.averaged,
            rows=len(data),
            tokens=int(sum((row["targets"] != -100).sum() for row in data.items)),
            packed=data.apart,
            trained=trained,
            held=sizes(checkpoint.tensors, keeps.frozen),
            zeros_kept=sorted(keeps.zeros),
            loss=[loss for _, loss in done.losses[::every]],
            loss_every=every,
            seconds={"train": time.perf_counter() - began},
        )

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
        self, checkpoint: Checkpoint, original: Checkpoint, judged: Sequence[Input]
    ) -> Callable[[nn.Module], bool] | None:
        if self.stop is None:
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


def rows(model: nn.Module, layout: Layout, sequences: Sequence[Input], width: int | None) -> Any:
    """The calibration data as rows for a model of this task."""
    from ..train import images, text

    nothing = [0] * len(sequences)  # distillation reads no labels
    if layout.arch.inputs == "pixels":
        return images([Tokens.of(image).ids for image in sequences], nothing)
    labels = nothing if layout.task == "text-classification" else None
    causal = layout.task == "text-generation"
    longest = max(map(len, sequences))
    return text(
        model,
        sequences,
        width=max(width or longest, longest),
        causal=causal,
        first_position=layout.first_position,
        labels=labels,
    )


def matrices(layout: Layout) -> list[str]:
    """Weights of the blocks' branches by name: what LoRA changes."""
    modules = [m for b in range(layout.depth) for branch in layout.branches(b) for m in (*branch.reads, branch.writes)]
    return [f"{m}.weight" for m in dict.fromkeys(modules) if f"{m}.weight" in layout.tensors]


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


def memory(layout: Layout, options: Recover, trained: int) -> int:
    """Bytes beside the stored weights: model and original in float32, gradient and two moments, activations, logits."""
    tokens = options.batch * (options.width or min(WIDTH, layout.longest or WIDTH))
    wide, inner = layout.families.get("hidden", 0), sum(layout.inner_size(b) for b in branches(layout))
    kept = {"none": 12 * wide + 6 * inner, "selective": 5 * wide + 3 * inner, "full": wide}
    activations = 4 * tokens * layout.depth * kept[options.activation_checkpointing]
    logits = 4 * 6 * tokens * layout.families.get("vocab", 0) if layout.task in ("text-generation", "fill-mask") else 0
    return 8 * layout.parameters + 12 * trained + activations + logits


def branches(layout: Layout) -> list[Any]:
    """A block's branches, none without blocks."""
    return layout.branches(0) if layout.depth else []
