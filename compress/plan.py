"""Plan: recipe × layout, checked step by step before any weight is read.

Predicts parameters, stored bytes and peak memory from the config alone, and refuses what cannot work with the place
in the recipe that asks for it.

Peak memory of a run is the larger of its two kinds of moment: a pass at work (stored weights before and after, plus
what the pass says it needs) and a measurement (original and result as float32 modules side by side, plus logits).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import RecipeError, TersorError
from .layout import LEAN_SHARD, Layout
from .recipe import Recipe

if TYPE_CHECKING:
    from .evaluate import Gate

PROCESS = 450 << 20
"""Bytes of an interpreter with torch, transformers and ONNX Runtime loaded (resident, measured)."""
SCORING = 64 << 20
"""Bytes of activations and buffers while scoring, beside the logits."""


@dataclass(frozen=True)
class PlannedStep:
    """One step of the run.

    Attributes:
        name: unique in the run, e.g. `1-slice`; names its folder and its journal line.
        kind: `pass` or `export`.
        use: the word in the recipe.
        options: the pass or exporter.
        layout: shapes after the step.
        memory: predicted peak of the process in bytes while the step runs.
        notes: lines for people.
        disk: bytes of state that the step keeps while it runs.
        lean: the same when weights stay in their files; None if the step cannot work so.
    """

    name: str
    kind: str
    use: str
    options: Any
    layout: Layout
    memory: int
    notes: tuple[str, ...]
    disk: int = 0
    lean: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "step": self.name,
            "kind": self.kind,
            "use": self.use,
            "parameters": self.layout.parameters,
            "bytes": self.layout.bytes,
            "peak_memory": self.memory,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Plan:
    """What a run will do and what it will need."""

    recipe: Recipe
    layout: Layout
    passes: tuple[PlannedStep, ...]
    exports: tuple[PlannedStep, ...]

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """All steps in order."""
        return self.passes + self.exports

    @property
    def final(self) -> Layout:
        """Shapes of the result."""
        return self.passes[-1].layout if self.passes else self.start

    @property
    def start(self) -> Layout:
        """Shapes that the first pass meets: the original's, in the recipe's dtype."""
        return replace(self.layout, dtype=self.recipe.dtype or self.layout.dtype)

    @property
    def peak_memory(self) -> int:
        """Predicted peak of the process, in bytes."""
        return max([step.memory for step in self.steps], default=scoring_memory(self.layout, self.layout, self.recipe))

    @property
    def lean_memory(self) -> int | None:
        """Predicted peak of the process when weights stay in their files, in bytes; None if a step needs them whole."""
        steps = [step.lean for step in self.steps]
        if None in steps:
            return None
        return max([*filter(None, steps), lean_scoring_memory(self.layout, self.recipe)])

    @property
    def disk(self) -> int:
        """Bytes the run directory needs at its fullest: every pass' result, the model, the artifacts in float32."""
        artifacts = sum(step.layout.parameters * 4 for step in self.exports)
        state = max((step.disk for step in self.passes), default=0)
        return sum(step.layout.bytes for step in self.passes) + self.final.bytes + state + 2 * artifacts

    def as_dict(self) -> dict[str, Any]:
        """JSON form (plan.json)."""
        return {
            "recipe": self.recipe.name,
            "architecture": self.layout.arch.model_type,
            "task": self.layout.task,
            "dtype": self.layout.dtype,
            "original": {"parameters": self.layout.parameters, "bytes": self.layout.bytes},
            "steps": [step.as_dict() for step in self.steps],
            "result": {"parameters": self.final.parameters, "bytes": self.final.bytes},
            "peak_memory": self.peak_memory,
            "lean_memory": self.lean_memory,
            "disk": self.disk,
        }


def scoring_memory(original: Layout, result: Layout, recipe: Recipe) -> int:
    """Peak bytes while result and original are scored side by side in float32."""
    heldout = recipe.data.heldout
    tokens = 16 * (heldout.length if heldout else 128)
    logits = 6 * tokens * result.families.get("vocab", 0) * 4 if result.task == "text-generation" else 0
    return PROCESS + SCORING + 4 * (original.parameters + result.parameters) + original.bytes + result.bytes + logits


def lean_scoring_memory(layout: Layout, recipe: Recipe) -> int:
    """Peak bytes while two models are scored whose weights are made when they are used."""
    heldout = recipe.data.heldout
    if heldout is None:
        return PROCESS
    logits = 6 * 16 * heldout.length * layout.families.get("vocab", 0) * 4 if layout.task == "text-generation" else 0
    return PROCESS + SCORING + 3 * lean_weight(layout) + logits


def lean_weight(layout: Layout) -> int:
    """Bytes of the largest weight in float64."""
    return 8 * max(math.prod(shape) for shape in layout.shapes().values())


def _check_metrics(recipe: Recipe, layout: Layout) -> None:
    """Metrics and gates must read what the model answers and what the held-out data brings."""
    from .evaluate import ALWAYS, OUTPUTS, check_metrics, output_of
    from .evaluate.score import NEEDS

    if layout.task not in OUTPUTS:
        return
    output = output_of(layout.task, layout.sizes["labels"])
    data = recipe.data.heldout
    brings = {"": True}
    if data is not None:
        label = bool(data.label) or layout.arch.inputs == "pixels"  # the folders of images are the labels
        brings |= {"label": label, "tags": label, "choices": label and bool(data.choices)}
        brings["score"] = label and (output == "number" or bool(data.pair))
    for number, name in enumerate(recipe.metrics):
        (metric,) = check_metrics([name], output, recipe.place("metrics", number))
        if not brings.get(metric.needs, False):
            raise RecipeError(recipe.place("metrics", number), f"{name!r} on data without", NEEDS[metric.needs])
    gates: list[tuple[tuple[str | int, ...], Gate]] = [(("gate",), gate) for gate in recipe.gate]
    gates += [(("passes", n, "gate"), gate) for n, step in enumerate(recipe.passes) for gate in step.gate]
    gates += [(("export", n, "gate"), gate) for n, step in enumerate(recipe.export) for gate in step.gate]
    for loc, gate in gates:
        if gate.metric not in ALWAYS:
            check_metrics([gate.metric], output, recipe.place(*loc))


def make_plan(recipe: Recipe, layout: Layout) -> Plan:
    """Check every step of `recipe` against the shapes it will meet.

    Raises:
        RecipeError: a step cannot work; says at which line of the recipe.
    """
    original = layout
    _check_metrics(recipe, layout)
    layout = Plan(recipe, original, (), ()).start
    passes: list[PlannedStep] = []
    for number, step in enumerate(recipe.passes):
        try:
            forecast = step.options.requires(layout)
        except TersorError as error:
            raise error.at(recipe.place("passes", number)) from error
        working = PROCESS + original.bytes + layout.bytes + forecast.layout.bytes + forecast.memory
        memory = max(working, scoring_memory(original, forecast.layout, recipe))
        lean = None if forecast.lean is None else PROCESS + max(forecast.lean, 2 * LEAN_SHARD)
        passes.append(
            PlannedStep(
                f"{number + 1}-{step.use}",
                "pass",
                step.use,
                step.options,
                forecast.layout,
                memory,
                forecast.notes,
                forecast.disk,
                lean,
            )
        )
        layout = forecast.layout
    exports: list[PlannedStep] = []
    for number, export in enumerate(recipe.export):
        try:
            forecast = export.options.requires(layout)
        except TersorError as error:
            raise error.at(recipe.place("export", number)) from error
        memory = max(PROCESS + layout.bytes + forecast.memory, scoring_memory(original, layout, recipe))
        used = [e.use for e in exports].count(export.use)
        name = export.use if not used else f"{export.use}-{used + 1}"
        exports.append(PlannedStep(name, "export", export.use, export.options, layout, memory, forecast.notes))
    return Plan(recipe, original, tuple(passes), tuple(exports))
