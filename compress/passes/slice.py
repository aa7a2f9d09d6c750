"""slice: a smaller dense model that stays a stock config, without training.

The residual stream is rotated into one orthogonal basis (compress/basis.py) after its norms are fused into
their consumers (compress/fuse.py), and cut to `hidden_size = k`.

`remove` is the share of the *real* parameters of the model as it is loaded: tied tensors counted once,
embeddings and head included. A tied head has to be untied (its input is another than the embedding's), and
that is counted too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..basis import batches, stream_basis
from ..checkpoint import Check, Checkpoint
from ..errors import RecipeError
from ..fuse import fuse, norms, restate, rotatable, rotate
from ..layout import Layout
from ..pass_ import STRICT, Context, Forecast, Pass

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class Slice(Pass):
    """Cut the width of the residual stream.

    Attributes:
        remove: share of all real parameters to remove, between 0 and 1.
    """

    needs_calibration: ClassVar[bool] = True

    remove: Share

    def requires(self, layout: Layout) -> Forecast:
        """Choose the hidden size and predict shapes and memory."""
        rotatable(layout)
        after, notes = choose_hidden(layout, self.remove)
        return Forecast(after, memory(layout, after), notes)

    def apply(self, checkpoint: Checkpoint, context: Context) -> None:
        """Rotate and cut."""
        layout = checkpoint.layout
        after, _ = choose_hidden(layout, self.remove)
        untied, fused = fuse(layout, checkpoint.tensors)
        model = Checkpoint(untied, fused).model()
        data = batches(context.calibration)
        basis = stream_basis(model, untied, context.track(data, "second moments"))
        k = after.families["hidden"]
        narrow, tensors = rotate(untied, fused, basis[:, :k])
        checkpoint.become(narrow, tensors)
        context.details.update(
            requested=self.remove,
            delivered=1 - narrow.parameters / layout.parameters,
            sizes={"hidden": k},
            task=layout.task,
            parameters_before=layout.parameters,
            parameters_after=narrow.parameters,
        )

    def checks(self, details: Mapping[str, Any]) -> list[Check]:
        """The sizes are those chosen and no norm of the stream has a gain."""
        sizes = {str(axis): int(size) for axis, size in details["sizes"].items()}
        task = str(details["task"])
        found = [Check(describe_sizes(sizes), lambda config, _: wrong_sizes(Layout.of(config, task), sizes))]
        if "hidden" in sizes:
            neutral = "every norm of the stream has a neutral gain"
            found.append(Check(neutral, lambda config, tensors: wrong_gain(Layout.of(config, task), tensors)))
        return found


def choose_hidden(layout: Layout, remove: float) -> tuple[Layout, tuple[str, ...]]:
    """The largest hidden size on the config's grid that removes at least the share asked for.

    Returns:
        the layout, and lines for the plan: the grid with its parameter counts.

    Raises:
        RecipeError: no size does.
    """
    total, step, d = layout.parameters, layout.grid("hidden"), layout.families["hidden"]
    sizes = list(range(d - d % step, 0, -step))
    counts = {k: restate(layout, {"hidden": k}).parameters for k in sizes}
    fits = [k for k in sizes if counts[k] <= total * (1 - remove)]
    if not fits:
        raise RecipeError(
            "slice: remove",
            str(remove),
            f"at most {1 - counts[sizes[-1]] / total:.3f}",
            f"hidden {sizes[-1]} is the smallest this config holds.",
        )
    k = fits[0]
    near = [s for s in sizes if abs(sizes.index(s) - sizes.index(k)) <= 2]
    grid = ", ".join(f"{s}: {counts[s]:,} ({counts[s] / total - 1:+.1%})" for s in near)
    notes = [f"hidden {d} → {k} (a multiple of {step}); around it {grid}"]
    if layout.resized({}).parameters != layout.resized({}, untie=True).parameters:
        notes.append("the tied head is untied: its weights are counted above")
    return restate(layout, {"hidden": k}), tuple(notes)


def memory(before: Layout, after: Layout) -> int:
    """Bytes beside the stored weights: working copies, the moments, activations of a batch."""
    d = before.families["hidden"]
    return (
        12 * before.resized({}, untie=True).parameters + 8 * after.parameters + 4 * 8 * d * d + 4096 * 64 * d
    )


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """`hidden is 48, ffn is 128`."""
    return ", ".join(f"{axis} is {size}" for axis, size in sizes.items())


def wrong_sizes(layout: Layout, sizes: Mapping[str, int]) -> str | None:
    """What differs between the layout's sizes and those the pass left."""
    found = layout.families
    wrong = [f"{axis} is {found[axis]}, not {size}" for axis, size in sizes.items() if found[axis] != size]
    return ", ".join(wrong) or None


def wrong_gain(layout: Layout, tensors: Mapping[str, Any]) -> str | None:
    """The first norm of the stream whose gain is not neutral."""
    neutral = 1 - layout.arch.norm.gain_offset
    for name in norms(layout):
        if not bool((tensors[f"{name}.weight"] == neutral).all()):
            return f"{name}.weight is not {neutral:g} everywhere"
    return None
