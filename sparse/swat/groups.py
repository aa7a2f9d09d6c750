"""Units that can only leave together: the rows that make them, the norm between, the columns that read them.

Transformers take their groups from the named axes that slicing shrinks by (compress/axes.py). Plain models take them
from `nn.Sequential`: two layers with nothing between them but BatchNorm, activations and dropout share the channels
between them; a child that holds just a convolution, its norm and its activation (ResNetConvLayer) counts as those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tersor.compress.axes import Dim, family, size_of
from tersor.compress.errors import RecipeError, TersorError
from tersor.compress.layout import Layout
from torch import nn

from .targets import activations, operation

Owners = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Coupled units.

    Attributes:
        name: the axis (`ffn3`), or the layer that makes the units.
        size: how many there are.
        members: module name → for each of the first two dimensions of its weight, the unit that every place belongs to
            (int64; −1: to none), or None where the dimension has no units. A BatchNorm has one dimension.
    """

    name: str
    size: int
    members: Mapping[str, Owners]

    def live_places(self, module: str, dim: int, live: torch.Tensor) -> torch.Tensor | None:
        """Places along `dim` of the module's weight that stay (int64, ascending) while `live` (bool `[size]`) does."""
        owner = self.members[module][dim] if dim < len(self.members[module]) else None
        if owner is None:
            return None
        return (live[owner.clamp_min(0)] | (owner < 0)).nonzero().reshape(-1)

    @torch.no_grad()
    def scores(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float64 `[size]`: the product over members of the norm of a unit's weights.

        A unit counts as much as what it makes times how much of it is heard; rescaling one against the other, which
        leaves a ReLU unit's function alone, leaves this alone too.
        """
        total = torch.zeros(self.size, dtype=torch.float64)
        for name, owners in self.members.items():
            weight = weights[name].detach()
            for dim, owner in enumerate(owners):
                if owner is None:
                    continue
                along = weight.float().pow(2).movedim(dim, 0).reshape(weight.shape[dim], -1).sum(1).double()
                mine = owner >= 0
                total += torch.zeros_like(total).index_add_(0, owner[mine], along[mine]).clamp_min(1e-300).log()
        return total.mul(0.5).exp()


def owners(dim: Dim, axis: str, sizes: Mapping[str, int]) -> torch.Tensor | None:
    """The unit of `axis` that each place of a dimension belongs to: int64, −1 for none; None without the axis."""
    if not dim.has(axis):
        return None
    found = []
    for section in dim.sections:
        shape = [size_of(a, sizes) for a in section]
        if axis not in section:
            found.append(torch.full((math.prod(shape),), -1))
            continue
        at = section.index(axis)
        units = torch.arange(sizes[axis]).view([-1 if n == at else 1 for n in range(len(shape))])
        found.append(units.expand(shape).reshape(-1))
    return torch.cat(found)


def from_layout(layout: Layout, words: Iterable[str]) -> Iterator[Group]:
    """Groups of the axes inside a transformer's branches, one a block and word."""
    for word in words:
        wanted = {"ffn": ("ffn",), "heads": ("kv_heads", "heads")}.get(word, ())
        for axis in dict.fromkeys(
            a
            for block in range(layout.depth)
            for branch in layout.branches(block)
            for section in Dim.parse(branch.inner).sections
            for a in section
            if family(a) in wanted
        ):
            members: dict[str, Owners] = {}
            for name, tensor in layout.tensors.items():
                found = tuple(owners(dim, axis, layout.sizes) for dim in tensor.dims[:2])
                if any(f is not None for f in found) and name.endswith(".weight"):
                    members[name.removesuffix(".weight")] = found
            yield Group(axis, layout.sizes[axis], members)


def from_sequences(model: nn.Module) -> Iterator[Group]:
    """Groups of the channels between neighbours in every `nn.Sequential`."""
    elementwise = activations(model)
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        chain = list(_leaves(path, module))
        maker: tuple[str, Any] | None = None
        between: list[str] = []
        for name, leaf in chain:
            if operation(leaf) is not None and getattr(leaf, "groups", 1) == 1:
                if maker is not None and _follows(leaf, maker[1]):
                    units = torch.arange(maker[1].weight.shape[0])
                    norms: dict[str, Owners] = {n: (units,) for n in between}
                    yield Group(maker[0], len(units), {maker[0]: (units, None), **norms, name: (None, units)})
                maker, between = (name, leaf), []
            elif isinstance(leaf, (nn.BatchNorm1d, nn.BatchNorm2d)):
                between.append(name)
            elif name not in elementwise and not isinstance(leaf, (nn.Dropout, nn.Identity)):
                maker = None


def _follows(reader: Any, maker: Any) -> bool:
    """Whether the reader's columns are the maker's rows."""
    return type(reader) is type(maker) and reader.weight.shape[1] == maker.weight.shape[0]


def _leaves(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a Sequential in the order in which they run; what cannot be looked into comes whole."""
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        kinds = [type(c) for c in child.children()]
        unit = len(kinds) in (2, 3) and issubclass(kinds[0], nn.Conv2d) and issubclass(kinds[1], nn.BatchNorm2d)
        if isinstance(child, nn.Sequential) or unit:
            yield from _leaves(full, child)
        else:
            yield full, child


def groups_of(model: nn.Module, words: Iterable[str]) -> list[Group]:
    """The groups that structured mode may take units from.

    Raises:
        RecipeError: the model has none.
    """
    words = tuple(words)
    found: list[Group] = []
    for path, module in model.named_modules():
        if (layout := layout_of(module)) is not None:
            within = f"{path}." if path else ""
            for group in from_layout(layout, words):
                members = {f"{within}{name}": owners for name, owners in group.members.items()}
                found.append(Group(f"{within}{group.name}", group.size, members))
            break  # what lies inside is part of it
    if "channels" in words:
        found += from_sequences(model)
    if not found:
        raise RecipeError(
            "swat: on",
            f"{', '.join(words)}, of which this model has none that tersor knows",
            "layers in a Sequential, or a transformer that tersor knows",
            "Hand over `groups`, or use mode 'sampled'.",
        )
    return found


def layout_of(model: nn.Module) -> Layout | None:
    """The layout of a transformers model whose architecture tersor knows, else None."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    config: Any = model.config
    from tersor.compress.checkpoint import named_parameters

    shapes = {name: tuple(t.shape) for name, t in named_parameters(model).items()}
    for task in ("text-generation", "image-classification", "text-classification", "feature-extraction"):
        try:
            layout = Layout.of(config, task)
            if {n: s for n, s in layout.shapes().items() if n in shapes} and set(layout.shapes()) <= set(shapes):
                return layout
        except TersorError:
            continue
    return None
