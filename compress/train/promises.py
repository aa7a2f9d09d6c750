"""Promises: which weights may move so that what earlier passes promised stays true.

A check (compress/checkpoint.py) says whether a promise holds and not what it is about. So it is asked: every tensor is
moved, and if a check breaks, each tensor alone. One that breaks it even when only its non-zero values move is frozen;
one that breaks it only when its zeros move keeps its zeros (their gradient is set to zero, under which Adam and SGD
leave them exactly where they are). Any pass' promises are kept in this way, also those of other packages' passes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..checkpoint import Check, Checkpoint
from ..errors import PreflightError


@dataclass(frozen=True)
class Held:
    """What must not move.

    Attributes:
        frozen: names of tensors that stay as they are.
        zeros: names of tensors whose zeros stay.
    """

    frozen: frozenset[str] = frozenset()
    zeros: frozenset[str] = frozenset()

    def hold(self, model: nn.Module) -> None:
        """Freeze and mask the model's parameters; what may move requires gradients from here on."""
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self.frozen:
                parameter.requires_grad_(False)
            elif name in self.zeros:
                alive = parameter.detach().ne(0)
                parameter.register_hook(lambda gradient, alive=alive: gradient * alive.to(gradient.device))


def held(checkpoint: Checkpoint) -> Held:
    """What the checkpoint's checks hold in place.

    Raises:
        PreflightError: a check breaks although no tensor breaks it alone.
    """
    tensors = checkpoint.tensors
    aliases: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            aliases.setdefault(id(tensor), []).append(name)

    def broken(names: list[list[str]], zeros: bool, among: list[Check]) -> list[Check]:
        tried = dict(tensors)
        for group in names:
            tried |= dict.fromkeys(group, moved(tensors[group[0]], group[0], zeros))
        return [check for check in among if check.holds(checkpoint.config, tried)]

    groups = list(aliases.values())
    concerned = broken(groups, True, checkpoint.checks)
    if not concerned:
        return Held()
    frozen: set[str] = set()
    kept: set[str] = set()
    for group in groups:
        if broken([group], True, concerned):
            (frozen if broken([group], False, concerned) else kept).update(group)
    free = [g for g in groups if g[0] not in frozen]
    for zeros in (False, True):
        trial = [g for g in free if (g[0] in kept) != zeros]
        if wrong := broken(trial, zeros, concerned):
            raise PreflightError(
                "train", f"a promise that training would break: {wrong[0].name}", "one that it can keep"
            )
    return Held(frozenset(frozen), frozenset(kept))


def moved(tensor: torch.Tensor, name: str, zeros: bool) -> torch.Tensor:
    """The tensor with every value changed, by an amount of its own; its zeros only if asked."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    factor = 1.25 + 0.5 * torch.rand(tensor.shape, generator=generator)
    found = tensor.float() * factor
    if zeros:
        found = torch.where(tensor == 0, factor, found)
    return found.to(tensor.dtype)


def sizes(tensors: Mapping[str, torch.Tensor], names: frozenset[str]) -> int:
    """Values in the named tensors, each storage once."""
    return sum(t.numel() for t in {id(tensors[n]): tensors[n] for n in names}.values())
