"""What passes that learn from the original have in common: options, forecast, the model made ready, what is journalled.

    minimise  (1−α)·(−log p(text)) + α·T²·KL(original ‖ model) + β·relative error of hidden states

over the calibration text and, if asked, over sequences that the original draws itself (generated.py). `recover` and
`swat` inherit these options; a pass of another package may. Nothing here imports accelerate until a pass runs, so that
a recipe can be read without the extra `train`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..errors import PreflightError, RecipeError
from ..layout import Layout
from ..pass_ import STRICT, Context, Forecast
from ..tokens import Input, Tokens
from .options import Training, needs_extra

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..checkpoint import Checkpoint
    from .loop import Trained
    from .losses import Objective
    from .promises import Held
    from .rows import Rows

WIDTH = 512
"""Tokens of a row that the forecast of memory assumes."""
SHORT = 512
"""Longest sequences for which plain attention trains faster than torch's fused one in bfloat16 on CPUs.

There the fused one's backward pass is the largest part of a step of a small model; probabilities of so few tokens fit.
"""
POINTS = 200
"""Most points of a curve that the journal keeps."""


@dataclass(frozen=True, config=STRICT)
class Learning(Training):
    """How a model learns from the original.

    Attributes:
        distill: α, the share of the loss that is the divergence from the original's answers; the rest is the text's
            likelihood, which only language models have.
        temperature: T of the divergence.
        hidden: β, the weight of the hidden states' error; only where no pass has changed their width or number.
        continued: so many sequences are drawn from the original, each going on from a piece of the calibration text,
            and learned from beside it: a small text alone is soon known by heart.
        redrawn: share of the text's tokens that are, anew in each round through the text, others that the original
            drew for their places: against the same, for one pass of the original over the text.
        width: tokens of a row, at least those of the longest calibration sequence.
    """

    distill: Annotated[float, Field(ge=0, le=1)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    hidden: Annotated[float, Field(ge=0)] = 0.0
    continued: Annotated[int, Field(ge=0)] = 0
    redrawn: Annotated[float, Field(ge=0, lt=1)] = 0.0
    width: Annotated[int, Field(gt=1)] | None = None

    def forecast(self, name: str, layout: Layout, trained: int, notes: Iterable[str]) -> Forecast:
        """Memory and disk for so many trained parameters; the shapes stay.

        Raises:
            RecipeError: a loss that the task does not have.
            PreflightError: the extra `train` is missing.
        """
        needs_extra(name)
        if self.distill < 1 and layout.task != "text-generation":
            raise RecipeError("distill", f"{self.distill:g} for {layout.task}", "1, since the data brings no labels")
        if self.continued and layout.task != "text-generation":
            raise RecipeError("continued", f"{self.continued} for {layout.task}", "0: only language models go on")
        if self.redrawn and layout.task != "text-generation":
            raise RecipeError("redrawn", f"{self.redrawn:g} for {layout.task}", "0: only language models draw words")
        if self.redrawn and self.distill < 1:
            raise RecipeError("redrawn", f"{self.redrawn:g} with distill {self.distill:g}", "0, or distill: 1")
        state = 12 * trained * (max(2, self.average) + 1)
        return Forecast(layout, self.memory(layout, trained), tuple(notes), disk=state)

    def memory(self, layout: Layout, trained: int) -> int:
        """Bytes beside the stored weights: model and original in float32, gradient and two moments, activations."""
        tokens = self.batch * (self.width or min(WIDTH, layout.longest or WIDTH))
        branches = layout.branches(0) if layout.depth else []
        wide, inner = layout.families.get("hidden", 0), sum(layout.inner_size(b) for b in branches)
        if layout.arch.experts is not None:  # their branch is one expert wide
            from ..moe import whole

            chosen = int(getattr(layout.config, layout.arch.experts.active))
            computed = layout.families["experts"] if whole.masked(layout, self.in_bfloat16) else chosen
            inner += (computed - 1) * layout.families["ffn"]
        kept = {"none": 12 * wide + 6 * inner, "selective": 5 * wide + 3 * inner, "full": wide}
        activations = 4 * tokens * layout.depth * kept[self.activation_checkpointing]
        reads_logits = layout.task in ("text-generation", "fill-mask")
        logits = 4 * 6 * tokens * layout.families.get("vocab", 0) if reads_logits else 0
        return 8 * layout.parameters + 12 * trained + activations + logits

    def lesson(self, name: str, checkpoint: Checkpoint, context: Context, text: Sequence[Input]) -> Lesson:
        """The checkpoint's model with its promises held, rows of `text` and the loss.

        Raises:
            PreflightError: no calibration data, no original, or a promise that training cannot keep.
        """
        from .losses import Distillation, LanguageModel
        from .promises import held

        if not text:
            raise PreflightError(name, "no calibration data", "text to train on")
        if context.original is None and (self.distill or self.hidden or self.continued or self.redrawn):
            raise PreflightError(name, "no original", "the checkpoint that the run started from", "Or distill: 0.")
        layout, keeps = checkpoint.layout, held(checkpoint)
        teacher = context.original.model() if context.original is not None else None
        if self.continued:
            from .generated import continued

            longest = max(map(len, text))
            drawn = continued(
                teacher, text, self.continued, longest, seed=context.seed, folder=context.folder, track=context.track
            )
            text = [*text, *drawn]
        model: Any = copy.deepcopy(checkpoint.model()).requires_grad_(True)
        self._arrange(model, layout, max(map(len, text)))
        if teacher is not None and context.original is not None:
            self._arrange(teacher, context.original.layout, max(map(len, text)))
        data = rows(model, layout, text, self.width)
        if self.redrawn:
            from torch import autocast, bfloat16

            from .redrawn import redrawn

            assert teacher is not None
            with autocast("cpu", bfloat16, enabled=self.in_bfloat16):
                data = redrawn(teacher, data, self.redrawn, context.seed, context.track)
        keeps.hold(model)
        objective: Objective = LanguageModel()
        if teacher is not None and (self.distill or self.hidden):
            objective = Distillation(teacher, self.distill, self.temperature, self.hidden)
        return Lesson(model, data, objective, keeps)

    def _arrange(self, model: Any, layout: Layout, longest: int) -> None:
        """Plain attention where torch's fused one is slower, and experts in the form that trains fastest."""
        import torch

        from ..moe import whole

        if self.in_bfloat16 and not torch.cuda.is_available() and longest <= SHORT:
            model.set_attn_implementation("eager")
        if whole.masked(layout, self.in_bfloat16):
            whole.use(model)


@plain_dataclass(eq=False)
class Lesson:
    """Everything that `train` takes.

    Attributes:
        model: float32; parameters that may move require gradients.
        data: rows of text or images.
        objective: the loss.
        keeps: what earlier passes promised.
    """

    model: nn.Module
    data: Rows
    objective: Objective
    keeps: Held

    def train(self, options: Learning, context: Context, label: str, **more: Any) -> Trained:
        """Train the model in place; a context's folder makes it resumable."""
        from .loop import train

        return train(
            self.model,
            self.data,
            self.objective,
            options,
            folder=context.folder,
            seed=context.seed,
            track=context.track,
            label=label,
            **more,
        )

    def record(self, done: Trained, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the journal says of it."""
        from .promises import sizes

        every = max(1, len(done.losses) // POINTS)
        steps, losses = zip(*done.losses[::every], strict=True) if done.losses else ((), ())
        return {
            "steps": done.steps,
            "stopped": done.stopped,
            "averaged": done.averaged,
            "rows": len(self.data),
            "tokens": int(sum((row["targets"] != -100).sum() for row in self.data.items)),
            "packed": self.data.apart,
            "held": sizes(tensors, self.keeps.frozen),
            "zeros_kept": sorted(self.keeps.zeros),
            "loss": {"step": list(steps), "loss": list(losses)},
        }


def rows(model: nn.Module, layout: Layout, sequences: Sequence[Input], width: int | None) -> Rows:
    """The calibration data as rows for a model of this task."""
    from .rows import images, text

    nothing = [0] * len(sequences)  # distillation reads no labels
    if layout.arch.inputs == "pixels":
        return images([Tokens.of(image).ids for image in sequences], nothing)
    longest = max(map(len, sequences))
    return text(
        model,
        sequences,
        width=max(width or longest, longest),
        causal=layout.task == "text-generation",
        first_position=layout.first_position,
        labels=nothing if layout.task == "text-classification" else None,
    )
