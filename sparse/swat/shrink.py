"""Channels and units that became zero leave a plain model: smaller modules, the same function.

    with swat(model, mode="structured", weights=0.7, activations=0.7, steps=1000) as training: ...
    removed = shrink(model)          # {"0": 44, "3": 44}: of 64 filters of the first convolution, 20 are left

Where one layer of an `nn.Sequential` reads another's channels, with nothing but BatchNorm, activations and dropout
between them, a channel that nobody reads (its column of the reading layer is zero) can go: its filter, its norm, its
column. Outputs stay what they were but for the order of sums. Checkpoints of transformers are the pass `compact`'s
(sparse/passes/compact.py), since a stock config has to state their sizes; a ResNet's channels inside a block are stated
by none, so there the exported graph alone becomes smaller, or this model in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .groups import Group, from_sequences
from .targets import operation

SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.BatchNorm1d: ("num_features",),
    nn.BatchNorm2d: ("num_features",),
}
"""What a module calls the first two dimensions of its weight."""


@torch.no_grad()
def shrink(model: nn.Module) -> dict[str, int]:
    """Remove channels that nobody reads from every `nn.Sequential` in the model, in place.

    Returns:
        How many left, by the name of the layer that made them; layers that keep all are not in it. At least one channel
        always stays.
    """
    removed = {}
    for group in from_sequences(model):
        keep = read(model, group)
        if bool(keep.all()):
            continue
        if not bool(keep.any()):
            keep[0] = True
        for name, owners in group.members.items():
            module = model.get_submodule(name)
            for dim, owner in enumerate(owners):
                if owner is not None:
                    narrow(module, dim, keep.nonzero().reshape(-1))
        removed[group.name] = int((~keep).sum())
    return removed


def read(model: nn.Module, group: Group) -> torch.Tensor:
    """Which units any layer reads: bool `[size]`."""
    found = torch.zeros(group.size, dtype=torch.bool)
    for name, owners in group.members.items():
        module: Any = model.get_submodule(name)
        if operation(module) is not None and len(owners) > 1 and owners[1] is not None:
            columns = module.weight.movedim(1, 0).flatten(1).ne(0).any(1).cpu()
            found |= torch.zeros_like(found).index_put_((owners[1],), columns, accumulate=False)
    return found


def narrow(module: Any, dim: int, keep: torch.Tensor) -> None:
    """Keep some rows (dim 0, with bias and running statistics) or columns (dim 1) of a module."""
    tensors = ["weight"] if dim == 1 else ["weight", "bias", "running_mean", "running_var"]
    for name in tensors:
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        smaller = tensor.detach().index_select(dim, keep.to(tensor.device)).clone()
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
        setattr(module, name, smaller)
    kind = next(k for k in SIZES if isinstance(module, k))
    setattr(module, SIZES[kind][dim], len(keep))
