"""compact: zeros become smaller shapes, exactly.

A unit of an axis inside a residual branch (an FFN unit, an attention group) is dead in one of two ways:

    nobody listens   every column of the branch's writer that belongs to it is zero
    nothing is said  every row of every reader that belongs to it, biases too, is zero, and the branch maps
                     zero to zero: attention does (its values are zero), an FFN does if act(0) = 0

Removing it leaves the function as it was; only the order of the remaining sums may change, which is float noise.
A stock config has one size for all blocks, so the smallest count over the blocks leaves everywhere; what stays
behind is counted in the journal. Masks that other tools leave as zeros (whole rows, not scattered weights) shrink
here without any calibration. torch-pruning traces the graph to find what must shrink together; here the named axes
say so. No arithmetic is done on weights, so dtypes do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass
from tersor.compress.axes import Dim, family, shrink, size_of
from tersor.compress.checkpoint import Check, Checkpoint
from tersor.compress.errors import RecipeError
from tersor.compress.layout import Layout
from tersor.compress.pass_ import STRICT, Context, Forecast, Pass

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, config=STRICT)
class Compact(Pass):
    """Remove units whose weights are exactly zero; outputs stay what they were.

    Attributes:
        on: what may leave: `ffn` (units), `shared_ffn` (a shared expert's), `heads` (attention heads, with grouped
            queries by groups).
    """

    on: tuple[Literal["ffn", "shared_ffn", "heads"], ...] = ("ffn",)

    def requires(self, layout: Layout) -> Forecast:
        """Refuse axes that cannot leave; the shapes stay, because only the weights know the zeros."""
        known = compactable(layout)
        for word in self.on:
            if word not in known:
                raise RecipeError(
                    "compact: on",
                    repr(word),
                    " or ".join(known) or "another architecture",
                    f"A stock {layout.arch.model_type} config keeps {word} fixed.",
                )
        note = "zero units are known when the weights are read: none is counted here"
        return Forecast(layout, notes=(note,), exact=False)

    def apply(self, checkpoint: Checkpoint, context: Context) -> None:
        """Shrink every axis asked for, one after the other."""
        before = checkpoint.layout.parameters
        sizes, removed, left = {}, {}, {}
        for name in (compactable(checkpoint.layout)[word] for word in self.on):
            dead = dead_units(checkpoint.layout, checkpoint.tensors, name)
            count = removable(checkpoint.layout, name, min(len(d) for d in dead.values()))
            remove(checkpoint, {axis: d[:count] for axis, d in dead.items()}, name, count)
            sizes[name], removed[name] = checkpoint.layout.families[name], count
            left[name] = {axis: len(d) - count for axis, d in dead.items() if len(d) > count}
        context.details.update(
            sizes=sizes,
            removed=removed,
            zero_units_left=left,
            task=checkpoint.layout.task,
            parameters_before=before,
            parameters_after=checkpoint.layout.parameters,
        )

    def checks(self, details: Mapping[str, Any]) -> list[Check]:
        """No axis is larger than the pass left it."""
        sizes = {str(name): int(size) for name, size in details["sizes"].items()}
        task = str(details["task"])

        def grown(config: Any, _: Tensors) -> str | None:
            found = Layout.of(config, task).families
            wrong = [f"{n} is {found[n]}, more than {size}" for n, size in sizes.items() if found[n] > size]
            return ", ".join(wrong) or None

        return [Check(", ".join(f"{n} is at most {size}" for n, size in sizes.items()), grown)]


def compactable(layout: Layout) -> dict[str, str]:
    """The recipe's word → the family of axes that may shrink and that only the inside of a branch sees."""
    inner = {family(a) for b in layout.arch.branches for s in Dim.parse(b.inner).sections for a in s}
    free = [a.name for a in layout.arch.axes if a.shrinkable and a.name in inner]
    return {"heads" if name == "kv_heads" else name: name for name in free}


def dead_units(layout: Layout, tensors: Tensors, name: str) -> dict[str, torch.Tensor]:
    """Dead units (int64, ascending) of every axis of the family, by axis."""
    found = {}
    for block in range(layout.depth):
        for branch in layout.branches(block):
            inner = Dim.parse(branch.inner)
            for axis in {a for s in inner.sections for a in s if family(a) == name}:
                unheard = ~used(layout, tensors, layout.stored(branch.writes)[:1], axis)
                dead = unheard | (~said(layout, tensors, branch.reads, axis) if keeps_zero(layout, inner) else False)
                found[axis] = dead.nonzero().reshape(-1)
    return found


def said(layout: Layout, tensors: Tensors, reads: tuple[str, ...], axis: str) -> torch.Tensor:
    """Whether any reader computes anything for each unit of the axis: bool `[size]`."""
    return used(layout, tensors, [name for module in reads for name in layout.stored(module)], axis)


def used(layout: Layout, tensors: Tensors, names: list[str], axis: str) -> torch.Tensor:
    """Whether any weight of the named tensors that belongs to each unit of the axis is not zero: bool `[size]`."""
    found = torch.zeros(layout.sizes[axis], dtype=torch.bool)
    for name in names:
        live = tensors[name] != 0
        for number, dim in enumerate(layout.tensors[name].dims):
            if not dim.has(axis):
                continue
            rows = live.movedim(number, 0).reshape(live.shape[number], -1).any(1)
            widths = [Dim((section,)).size(layout.sizes) for section in dim.sections]
            for section, part in zip(dim.sections, rows.split(widths), strict=True):
                if axis in section:
                    shaped = part.reshape([size_of(a, layout.sizes) for a in section])
                    found |= shaped.movedim(section.index(axis), 0).reshape(len(found), -1).any(1)
    return found


def keeps_zero(layout: Layout, inner: Dim) -> bool:
    """Whether zero rows in the readers give zeros in front of the writer.

    Attention weighs values, and zero values stay zero; an FFN's activation may move zero (sigmoid does).
    """
    if len(inner.sections) > 1 or len(inner.sections[0]) > 1:  # groups × head width: attention
        return True
    from transformers.activations import ACT2FN

    activation = ACT2FN[getattr(layout.config, layout.arch.activation)]
    return float(activation(torch.zeros(1))) == 0.0


def removable(layout: Layout, name: str, most: int) -> int:
    """The largest count up to `most` whose removal a stock config can state; at least one unit stays."""
    size = layout.families[name]
    for count in range(min(most, size - 1), 0, -1):
        try:
            layout.resized({name: size - count})
        except RecipeError:
            continue
        return count
    return 0


def remove(checkpoint: Checkpoint, dead: Mapping[str, torch.Tensor], name: str, count: int) -> None:
    """Take `dead` (the same count for each axis of the family) out of every tensor that has its axis."""
    if count == 0:
        return
    layout = checkpoint.layout
    tensors = dict(checkpoint.tensors)
    for axis, units in dead.items():
        live = torch.ones(layout.sizes[axis], dtype=torch.bool)
        live[units] = False
        keep = live.nonzero().reshape(-1)
        for key, tensor in layout.tensors.items():
            tensors[key] = shrink(tensors[key], tensor.dims, axis, keep, layout.sizes)
    checkpoint.become(layout.resized({name: layout.families[name] - count}), tensors)
