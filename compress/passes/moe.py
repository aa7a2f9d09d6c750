"""moe: the FFNs of a dense model become experts that a router chooses by token, in a stock class of transformers.

Each FFN is cut into `experts` equal parts; `active` of them work on a token, of which `shared` on every one and
the others chosen by a linear router. No gradient passes through the model: units go together whose energy a linear
router catches together (moe/regroup.py), the router is a convex fit to which parts matter (moe/router.py), and the down
projections are solved again under the routing, block by block, against the dense model (moe/convert.py). Without
`refit` and with every expert active the result is the dense model. What comes out opens with plain transformers
(moe/targets.py). FFNs without a gate (BERT, GPT-2, OPT) have no stock class to go to: theirs is tersor's own
(moe/own.py), which plain transformers refuses, and what ships is the ONNX export; there tokens and blocks may use as
many experts as are worth it, under one budget (`dynamic`, moe/dynamic.py).

The number of parameters stays (but for the router and padding to widths that transformers' kernels take): what falls
is the work for a token. A killed conversion goes on with the block it was at (moe/progress.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from ..calibration.batches import BATCH_TOKENS, Batch, batches
from ..calibration.loss import judge
from ..calibration.side import Side
from ..checkpoint import Check, Checkpoint
from ..deferred import Store, trim
from ..errors import PreflightError, RecipeError
from ..layout import Layout
from ..moe.activations import HELD, ffn_branch
from ..moe.convert import Method, convert
from ..moe.cut import Cut
from ..moe.progress import Progress
from ..moe.record import described, refuse_idle, warned, zeros_of
from ..moe.targets import Target, ffn_names, find_target, restated, stored
from ..moe.trial import bounds, by_count, by_threshold
from ..pass_ import STRICT, Context, Forecast, Pass
from ..plan import lean_weight
from ..slicing.kept import Kept
from .slice import too_few_tokens

Count = Annotated[int, Field(gt=0)]
CALIBRATED = 32_768
"""Tokens of calibration that the forecast of memory assumes."""
CURVE = 8
"""Numbers of experts, at most about, whose loss is measured."""
THRESHOLDS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
"""Logits above which a token chooses, whose loss is measured where `dynamic`."""


@dataclass(frozen=True, config=STRICT)
class Moe(Pass):
    """Turn every FFN into experts, of which a token uses a few.

    Attributes:
        experts: equal parts that an FFN is cut into; a divisor of its width.
        active: parts that a token uses, shared ones included.
        shared: parts that every token uses; by default a quarter of the active ones where the class holds any.
        dynamic: tokens and blocks use as many parts as are worth it, `active` of them on average; only where the FFN
            has no gate, since no stock class can.
        most: parts that a token may use with `dynamic`, shared ones included; by default twice as many as `active`.
        target: the stock class of the result; `auto` takes the first that holds the model.
        partition: which units go together: `caught`, those whose energy a linear router catches together; the others
            are there to be compared with, `kmeans` being where it starts.
        router: how parts are chosen: `listwise`, fitted to their order; `ridge`, to their size, in closed form;
            `centre`, the mean direction of a part's gate rows, is there to be compared with.
        refit: solve the down projections again under the routing.
        ridge: strength of the refit's pull towards the dense weights, as a share of the mean second moment; weaker, it
            learns the calibration text by heart where that has few tokens a unit.
        distill_steps: of training a block's experts and router to add what the dense model has behind them, before the
            refit; a few hundred take seconds a block.
        compare: leave a tenth of the calibration data out of the fits and measure on it what each number of experts
            costs, what the best conceivable router would, and what pruning to the same number of units would. Takes
            two more conversions.
    """

    needs_calibration: ClassVar[bool] = True

    experts: Annotated[int, Field(ge=2)]
    active: Count
    shared: Annotated[int, Field(ge=0)] | None = None
    dynamic: bool = False
    most: Count | None = None
    target: Literal["auto", "qwen2_moe", "glm4_moe", "qwen3_moe", "mixtral", "granite_moe_shared"] = "auto"
    partition: Literal["caught", "co-activation", "random", "kmeans", "activation-rate"] = "caught"
    router: Literal["listwise", "ridge", "centre"] = "listwise"
    refit: bool = True
    ridge: Annotated[float, Field(gt=0)] = 0.1
    distill_steps: Annotated[int, Field(ge=0)] = 0
    compare: bool = True

    def requires(self, layout: Layout) -> Forecast:
        """Find the class that can hold the result, and predict shapes and memory."""
        self._refuse()
        cut, target = self._cut(layout)
        after = restated(layout, cut, target)
        units = self.active * cut.part
        width = cut.part if target.own else cut.padded
        notes = [
            f"{target.model_type}: {cut.routed} experts of {width} units"
            + (f" ({cut.part} and zeros)" if width > cut.part else "")
            + f", {cut.chosen} chosen by token"
            + (f" on average, {cut.most} at most" if cut.most else "")
            + (f", {cut.shared} shared" if cut.shared else ""),
            f"a token uses {units} of {cut.width} FFN units ({units / cut.width:.0%})"
            + (f" on average, at most {(cut.shared + cut.most) * cut.part}" if cut.most else ""),
        ]
        if target.own:
            notes.append("no stock class has experts without a gate: tersor opens it, its ONNX export runs anywhere")
        work = working_memory(layout, self.refit)
        memory = 4 * layout.parameters + 4 * after.parameters + work
        disk = after.bytes + 2 * 2 * streams(layout)  # of both models, in two turns
        return Forecast(after, memory, tuple(notes), disk=disk, lean=work + 2 * lean_weight(layout))

    def apply(self, checkpoint: Checkpoint, context: Context) -> None:
        """Convert block by block."""
        began, layout = time.perf_counter(), checkpoint.layout
        if not context.calibration:
            raise PreflightError("moe", "no calibration data", "text to calibrate on")
        cut, target = self._cut(layout)
        after = restated(layout, cut, target)
        fitted, judged = self._divided(context, layout)
        method = self._method(after, checkpoint.dtype)
        progress = Progress(Store(checkpoint.dtype, weights_folder(context)), Kept(context.folder))
        model = checkpoint.model()
        with torch.no_grad():
            side = Side.at_start(model, layout, fitted)
        for block in convert(side, layout, cut, method, fitted, context.seed, context.track, progress=progress):
            number = len(progress.details)
            if not cut.most:  # a budget may leave an expert out, and `warned` says so
                refuse_idle(block, number)
            progress.add(stored(block, after, target, number), block.details)
            if checkpoint.lean:
                trim()
        converted = time.perf_counter()
        losses = {}
        if judged and cut.chosen < cut.routed:
            losses = {"dense": judge(model, model, layout, judged)}
            losses |= bounds(model, layout, cut, method, fitted, judged, context.seed, context.track)
        original = None if layout.task == "text-generation" else model  # text judges a language model, not its like
        del model, side
        short = too_few_tokens(layout, context.calibration) if self.refit else []
        zeros = zeros_of(checkpoint) if self.refit else 0.0
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in ffn_names(layout)}
        checkpoint.become(after, kept | progress.tensors)
        compared = self._compared(checkpoint, original, cut, target, judged, losses) if losses else {}
        context.details.update(
            compared,
            target=target.model_type,
            task=layout.task,
            experts=cut.routed,
            active=cut.most or cut.chosen,
            shared=cut.shared,
            active_share=cut.active / cut.experts,
            k_at_load="a threshold" if cut.most else "free" if target.free else "fixed",
            **described(progress.details),
            warnings=[*short, *warned(progress.details, cut, layout.dtype, zeros, compared.get("loss"))],
            seconds={"convert": converted - began, "compare": time.perf_counter() - converted},
        )

    def checks(self, details: Mapping[str, Any]) -> list[Check]:
        """The routing is what was chosen."""
        wanted = {str(name): int(details[name]) for name in ("experts", "active")}
        task = str(details["task"])

        def holds(config: Any, _: Mapping[str, torch.Tensor]) -> str | None:
            arch = Layout.of(config, task).arch
            if arch.experts is None:
                return "there are no experts"
            found = {"experts": getattr(config, arch.experts.count), "active": getattr(config, arch.experts.active)}
            wrong = [f"{name} is {found[name]}, not {count}" for name, count in wanted.items() if found[name] != count]
            return ", ".join(wrong) or None

        return [Check(f"{wanted['active']} of {wanted['experts']} experts are chosen", holds)]

    def _refuse(self) -> None:
        """Say which options do not go together, whatever the model.

        Raises:
            RecipeError: they do not.
        """
        if self.distill_steps and not self.refit:
            raise RecipeError("moe: distill_steps", "distillation with refit: false", "refit: true, which ends it")
        if self.distill_steps and self.active == self.experts:
            raise RecipeError("moe: distill_steps", "every expert active: nothing to learn", "fewer active ones, or 0")
        if self.most is not None and not self.dynamic:
            raise RecipeError("moe: most", f"{self.most} without dynamic", "dynamic: true, or none")
        if self.dynamic and self.active == self.experts:
            raise RecipeError("moe: dynamic", "every expert active", "fewer active ones")
        if self.most is not None and not self.active <= self.most <= self.experts:
            raise RecipeError(
                "moe: most",
                f"{self.most} experts where {self.active} are active on average",
                f"{self.active} to {self.experts}",
            )

    def _cut(self, layout: Layout) -> tuple[Cut, Target]:
        """How the FFNs are cut, and into which class.

        Raises:
            RecipeError: no FFN that can be cut, numbers that do not fit it, or no class that holds the result.
        """
        if layout.arch.experts is not None:
            raise RecipeError("moe", f"a mixture of experts already ({layout.arch.model_type})", "a dense model")
        if not layout.depth or any(ffn_branch(layout, block) is None for block in range(layout.depth)):
            found = f"{layout.arch.model_type}, whose FFN cannot be cut"
            raise RecipeError("moe", found, "llama, qwen2, gpt2, bert, …")
        most = (self.most or min(2 * self.active, self.experts)) if self.dynamic else 0

        def cut(shared: int) -> tuple[Cut, Target]:
            found = Cut(layout.families["ffn"], self.experts, self.active, shared, most and most - shared)
            found.refuse()
            return found, find_target(layout, found, self.target)

        if self.shared is not None:
            return cut(self.shared)
        try:
            return cut(min(max(1, self.active // 4), self.active - 1))
        except RecipeError:  # a class without shared experts, or numbers that none would mend
            return cut(0)

    def _method(self, after: Layout, dtype: torch.dtype) -> Method:
        """How blocks are converted, into the class of layout `after` and its stored dtype."""
        assert after.arch.experts is not None
        return Method(
            partition=self.partition,
            router=self.router,
            refit=self.refit,
            ridge=self.ridge,
            steps=self.distill_steps,
            weights=after.arch.experts.weights,
            dtype=dtype,
        )

    def _divided(self, context: Context, layout: Layout) -> tuple[list[Batch], list[Batch]]:
        """Batches to fit to, and those to measure on."""
        count = len(context.calibration)
        if not self.compare or count < 2:
            return batches(context.calibration, layout), []
        order = np.random.default_rng(context.seed).permutation(count)
        tenth = set(order[: max(1, count // 10)].tolist())
        parts = ([s for n, s in enumerate(context.calibration) if (n in tenth) == kept] for kept in (False, True))
        fitted, judged = (batches(part, layout) for part in parts)
        return fitted, judged

    def _compared(
        self,
        checkpoint: Checkpoint,
        original: Any,
        cut: Cut,
        target: Target,
        judged: list[Batch],
        losses: dict[str, float],
    ) -> dict[str, Any]:
        """For the details: the loss of the stored class beside its bounds, and by number of chosen experts."""
        model, layout = checkpoint.model(), checkpoint.layout
        found: dict[str, Any] = {"loss": losses | {"experts": judge(model, original, layout, judged)}}
        if cut.most:
            curve = by_threshold(model, original, layout, judged, cut, THRESHOLDS)
            found["loss_by_threshold"] = [{**point, "excess": point["loss"] - losses["dense"]} for point in curve]
        elif target.free:
            step = -(-cut.routed // CURVE)
            counts = sorted({*range(step, cut.routed + 1, step), cut.chosen, cut.routed})
            found["loss_by_k"] = [
                {"k": k, "active_share": (cut.shared + k) / cut.experts, "loss": loss, "excess": loss - losses["dense"]}
                for k, loss in zip(counts, by_count(model, original, layout, judged, counts), strict=True)
            ]
        return found


def working_memory(layout: Layout, refit: bool) -> int:
    """Bytes beside the weights, for up to `CALIBRATED` tokens: streams, activations, a block's weights and its fit."""
    wide, width = layout.families["hidden"], layout.families["ffn"]
    block = 4 * 6 * wide * width
    fit = 8 * (3 * width * width + 4 * width * wide) if refit else 0
    logits = 12 * BATCH_TOKENS * layout.families.get("vocab", 0) if layout.task == "text-generation" else 0
    return 5 * streams(layout) + max(block + fit + 2 * HELD, logits)


def streams(layout: Layout) -> int:
    """Bytes of one model's streams, for `CALIBRATED` tokens."""
    return 4 * layout.families["hidden"] * CALIBRATED


def weights_folder(context: Context) -> Path | None:
    """Where finished blocks come to rest; None keeps them in memory."""
    folder = context.folder and context.folder / "weights"
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    return folder
