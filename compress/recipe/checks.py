"""What is wrong with a recipe whatever the model: limits nothing measures, text that is missing or shared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..data import overlap
from ..errors import PreflightError, RecipeError
from ..evaluate.metrics import ALWAYS, METRICS
from ..units import files
from ..words import nearest, one_of, shown
from .yaml_file import Loc

if TYPE_CHECKING:
    from ..evaluate.gate import Gate
    from .recipe import Recipe

Fault = tuple[Loc, str, str, str]


def wrong(recipe: Recipe) -> Iterator[Fault]:
    """Each fault as (path, found, expected, remedy), in the order of the schema."""
    yield from _text(recipe)
    yield from _metrics(recipe)
    yield from _gates(recipe)


def _text(recipe: Recipe) -> Iterator[Fault]:
    data = recipe.data
    for number, step in enumerate(recipe.passes):
        if step.options.needs_calibration and data.calibration is None:
            yield (
                ("passes", number, "use"),
                f"{step.use}, which reads calibration text, and no data.calibration",
                "text to calibrate on",
                "Add `data: {calibration: {path: …}}`.",
            )
    listed = 0
    for part in ("calibration", "heldout"):
        try:
            source = getattr(data, part)
            listed += bool(source is not None and files(source.part(recipe.base, f"data.{part}")))
        except PreflightError:  # it is not on this machine; the run says so when it reads it
            pass
        except RecipeError as error:
            yield ("data", part, "path"), error.found, error.expected, error.remedy
    if listed == 2 and data.calibration and data.heldout and overlap(data.calibration, data.heldout, recipe.base):
        yield (
            ("data", "heldout"),
            "text that calibration reads too",
            "text that no pass has seen",
            "Give each its own file, or its own span of one file (`0%-50%`, `50%-100%`).",
        )


def _metrics(recipe: Recipe) -> Iterator[Fault]:
    seen: set[str] = set()
    for number, name in enumerate(recipe.metrics):
        loc = ("metrics", number)
        if name in ALWAYS:
            yield loc, shown(name), one_of(METRICS), "It is always measured: remove it here."
        elif name not in METRICS:
            yield loc, shown(name), one_of(METRICS), nearest(name, METRICS)
        elif name in seen:
            yield loc, f"a second {name!r}", "each metric once", "Remove one."
        seen.add(name)
    if recipe.metrics and recipe.data.heldout is None:
        yield ("metrics",), "metrics without text", "data.heldout", "Add `data: {heldout: {path: …}}`."


def _gates(recipe: Recipe) -> Iterator[Fault]:
    gates: list[tuple[Loc, Gate]] = [(("gate", n), gate) for n, gate in enumerate(recipe.gate)]
    for part in ("passes", "export"):
        for number, step in enumerate(getattr(recipe, part)):
            gates += [((part, number, "gate", n), gate) for n, gate in enumerate(step.gate)]
    for loc, gate in gates:
        if gate.metric in ALWAYS:
            continue
        if recipe.data.heldout is None:
            yield (
                loc,
                f"a gate on {gate.metric} without text",
                "data.heldout",
                "Add `data: {heldout: {path: …}}`.",
            )
        elif recipe.metrics and gate.metric not in recipe.metrics:
            measured = one_of([*recipe.metrics, *ALWAYS])
            yield (
                loc,
                f"a gate on {gate.metric}, which is not measured",
                measured,
                f"Add {gate.metric} to metrics.",
            )
