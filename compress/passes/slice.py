"""slice: a smaller dense model that stays a stock config, without training.

What may become smaller: the residual stream (`hidden`: one rotation of it, cut to k directions), the MLPs'
units (`ffn`), attention heads, with grouped queries by groups (`heads`), and their width (`head_dim`). What remains
is refitted by least squares, stage by stage (compress/slicing/refit.py), so that the compressed stream follows the
dense one. Compare SliceGPT (arXiv 2401.15024), which cuts the stream alone, refits nothing, and leaves a private
format.

`remove` is the share of the *real* parameters of the model as it is loaded: tied tensors counted once,
embeddings and head included. Where it is taken from is chosen by the loss on a tenth of the calibration data,
which is left out of the fits meanwhile; or fixed by `split`. A tied RMSNorm model stays tied.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import lcm
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from ..calibration.batches import BATCH_TOKENS, batches
from ..checkpoint import Check, Checkpoint
from ..errors import PreflightError, RecipeError
from ..layout import Layout
from ..pass_ import STRICT, Context, Forecast, Pass
from ..plan import lean_weight
from ..slicing.budget import TOLERANCE, Sizes, axes_of, candidates, free_words, head_axis, whole_heads
from ..slicing.cutter import BACKWARD_TOKENS, Cutter
from ..slicing.fuse import norms, restate, rotatable, tied_heads
from ..slicing.refit import HELD
from ..tokens import Input

Share = Annotated[float, Field(gt=0, lt=1)]

TOKENS_PER_REGRESSOR = 200
"""Calibration tokens that a fit needs per regressor: below, it learns the sample (measured on stories260K)."""

TOKENS = 1 << 16
"""Calibration tokens that the forecast of memory assumes; more take 8 bytes times hidden each."""


@dataclass(frozen=True, config=STRICT)
class Slice(Pass):
    """Cut the stream, the MLPs and the heads of a model, and refit what is left.

    Attributes:
        remove: share of all real parameters to remove, between 0 and 1.
        on: what may shrink; by default all of `hidden`, `ffn` and `heads` that the architecture's stock config
            allows. `head_dim` makes heads narrower: rotary pairs of queries and keys and directions of values.
        round_to: sizes of hidden and ffn that change stay multiples of this.
        split: the share of the cut that `hidden` takes, between 0 and 1; by default the loss on a tenth of
            the calibration data chooses.
        ridge: strength of the pull towards the projected weights, as a share of the mean second moment.
    """

    needs_calibration: ClassVar[bool] = True

    remove: Share
    on: list[Literal["hidden", "ffn", "heads", "head_dim"]] | None = None
    round_to: Annotated[int, Field(gt=0)] = 1
    split: Annotated[float, Field(ge=0, le=1)] | None = None
    ridge: Annotated[float, Field(gt=0)] = 1e-2

    def requires(self, layout: Layout) -> Forecast:
        """Find sizes that remove what is asked for, and predict shapes and memory."""
        options = self._options(layout)
        whole = whole_heads(layout, options)
        typical = self._fixed(layout, options) or whole[len(whole) // 2]
        after = restate(layout, typical)
        chosen = [typical] if self._fixed(layout, options) else options
        far = max(abs(restate(layout, option).parameters - after.parameters) for option in chosen)
        exact = far <= 2 * TOLERANCE * layout.parameters
        notes, lean = self._notes(layout, options, typical), lean_memory(layout)
        state = after.bytes + 16 * layout.families["hidden"] * TOKENS  # see slicing/kept.py
        return Forecast(after, memory(layout, after), notes, exact, disk=state, lean=lean)

    def apply(self, checkpoint: Checkpoint, context: Context) -> None:
        """Measure, choose sizes, cut and refit."""
        began, layout = time.perf_counter(), checkpoint.layout
        if not context.calibration:
            raise PreflightError("slice", "no calibration data", "text to calibrate on")
        options = self._options(layout)
        cutter = Cutter.measured(checkpoint, options, context, self.ridge)
        measured = time.perf_counter()
        chosen, losses = cutter.kept.value("chosen") or self._choose(cutter, options, context)
        cutter.kept.keep("chosen", [chosen, losses])
        searched = time.perf_counter()
        after, tensors, fits = cutter.cut(chosen, batches(context.calibration, layout), context, cutter.kept)
        checkpoint.become(after, tensors)
        context.details.update(
            requested=self.remove,
            delivered=1 - after.parameters / layout.parameters,
            parameters_before=layout.parameters,
            parameters_after=after.parameters,
            sizes={axis: after.families[axis] for axis in chosen},
            task=layout.task,
            tried=losses,
            fits=fits,
            warnings=too_few_tokens(after, context.calibration),
            seconds={
                "measure": measured - began,
                "search": searched - measured,
                "cut": time.perf_counter() - searched,
            },
        )

    def checks(self, details: Mapping[str, Any]) -> list[Check]:
        """The sizes are those chosen, and the stream's norms have no gain where it was rotated."""
        sizes = {str(axis): int(size) for axis, size in details["sizes"].items()}
        task = str(details["task"])
        said = ", ".join(f"{axis} is {size}" for axis, size in sizes.items())
        found = [Check(said, lambda config, _: wrong_sizes(Layout.of(config, task), sizes))]
        if "hidden" in sizes:
            neutral = "every norm of the stream has a neutral gain"
            found.append(Check(neutral, lambda config, tensors: wrong_gain(Layout.of(config, task), tensors)))
        return found

    def _options(self, layout: Layout) -> list[Sizes]:
        if layout.arch.experts is not None:
            raise RecipeError(
                "slice", f"a mixture of experts ({layout.arch.model_type})", "a dense model", "Slice before `moe`."
            )
        words = free_words(layout) if self.on is None else self.on
        if "hidden" in words:
            rotatable(layout)
        return candidates(layout, self.remove, axes_of(layout, words), self.round_to)

    def _fixed(self, layout: Layout, options: list[Sizes]) -> Sizes | None:
        """The option that the recipe or the lack of others fixes."""
        if self.split is None:
            return options[0] if len(options) == 1 else None
        goal = self.split * self.remove
        return min(whole_heads(layout, options), key=lambda option: abs(hidden_share(layout, option) - goal))

    def _choose(self, cutter: Cutter, options: list[Sizes], context: Context) -> tuple[Sizes, list[Any]]:
        fixed = self._fixed(cutter.layout, options)
        if fixed is not None:
            return fixed, []
        order = np.random.default_rng(context.seed).permutation(len(context.calibration))
        tenth = set(order[: max(1, len(order) // 10)].tolist())
        judged = [s for n, s in enumerate(context.calibration) if n in tenth]
        fitted = [s for n, s in enumerate(context.calibration) if n not in tenth] or judged
        return cutter.search(options, fitted, judged, context)

    def _notes(self, layout: Layout, options: list[Sizes], typical: Sizes) -> tuple[str, ...]:
        def line(sizes: Sizes) -> str:
            count = restate(layout, sizes).parameters
            shape = ", ".join(f"{axis} {layout.families[axis]} → {size}" for axis, size in sizes.items())
            return f"{shape}: {count:,} parameters ({count / layout.parameters - 1:+.1%})"

        notes = (
            [line(typical)]
            if len(options) == 1 or self.split is not None
            else [
                f"the loss on a tenth of the calibration data chooses among {len(options)}:",
                *(line(option) for option in options),
            ]
        )
        if list(options[0]) == ["hidden"]:
            notes += hidden_grid(layout, options[0]["hidden"], self.round_to)
        return tuple(notes)


def hidden_share(layout: Layout, sizes: Sizes) -> float:
    """The share of all parameters that the stream's cut alone removes.

    Where heads leave too, the size may be one that no config with all heads holds: then the share of the width.
    """
    only = {axis: size for axis, size in sizes.items() if axis == "hidden"}
    if only and {head_axis(layout), "heads"} & sizes.keys():
        return 1 - only["hidden"] / layout.families["hidden"]
    return 1 - restate(layout, only).parameters / layout.parameters if only else 0.0


def hidden_grid(layout: Layout, chosen: int, round_to: int) -> list[str]:
    """Lines for the plan: the hidden sizes around the chosen one with their parameter counts."""
    step = lcm(layout.grid("hidden"), round_to)
    near = [k for k in range(chosen + 2 * step, chosen - 3 * step, -step) if 0 < k < layout.families["hidden"]]
    counts = {k: restate(layout, {"hidden": k}).parameters for k in near}
    points = ", ".join(f"{k}: {n:,} ({n / layout.parameters - 1:+.1%})" for k, n in counts.items())
    return [f"hidden moves in steps of {step}: {points}"]


def memory(before: Layout, after: Layout) -> int:
    """Bytes beside the stored weights, for up to `TOKENS` of calibration: float32 models, metrics, two streams."""
    d, depth = before.families["hidden"], before.depth
    models = 4 * (3 * before.parameters + 2 * after.parameters)
    return models + 8 * d * d * (2 * depth + 8) + 8 * d * TOKENS + HELD


def lean_memory(layout: Layout) -> int:
    """Bytes when weights, streams and metrics stay in files: the largest weight, the widest fit, a batch's work."""
    d, widest = layout.families["hidden"], max(layout.inner_size(b) for b in layout.branches(0))
    fits = 8 * (4 * widest * max(widest, d) + 8 * d * d)
    work = 4 * BATCH_TOKENS * 4 * widest
    backward = 4 * BACKWARD_TOKENS * layout.depth * (8 * d + 5 * widest)
    largest = 2 * lean_weight(layout)
    return max(largest + work, fits + work, largest + backward) + HELD


def too_few_tokens(layout: Layout, calibration: Sequence[Input]) -> list[str]:
    """A warning if the widest fit has too few tokens to learn more than the sample."""
    widest = max([layout.families["hidden"], *(layout.inner_size(b) for b in layout.branches(0))])
    tokens, needed = sum(len(s) for s in calibration), TOKENS_PER_REGRESSOR * widest
    if tokens >= needed or layout.arch.inputs == "pixels":
        return []
    return [f"{tokens:,} calibration tokens; the widest fit ({widest} regressors) wants about {needed:,}"]


def wrong_sizes(layout: Layout, sizes: Mapping[str, int]) -> str | None:
    """What differs between the layout's sizes and those the pass left."""
    found = layout.families
    wrong = [f"{axis} is {found[axis]}, not {size}" for axis, size in sizes.items() if found[axis] != size]
    return ", ".join(wrong) or None


def wrong_gain(layout: Layout, tensors: Mapping[str, Any]) -> str | None:
    """The first norm of the stream whose gain is not neutral; the one in front of a tied head may have any."""
    neutral = 1 - layout.arch.norm.gain_offset
    final = layout.full(layout.arch.final_norm)
    for name in norms(layout):
        if name == final and tied_heads(layout):
            continue
        if not bool((tensors[f"{name}.weight"] == neutral).all()):
            return f"{name}.weight is not {neutral:g} everywhere"
    return None
