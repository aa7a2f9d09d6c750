"""Bytes that autograd holds between the forward and the backward pass.

Counted where they are held: every tensor that any operation saves goes through autograd's own hooks, and each storage
counts once, whole, however many operations or views share it. Parameters and buffers are left out: they are there
anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class SavedBytes:
    """What was saved inside the context.

    Attributes:
        storages: bytes by address; addresses are unique while the graph lives.
        left_out: addresses of parameters and buffers.
    """

    left_out: frozenset[int]
    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all distinct storages."""
        return sum(self.storages.values())


@contextmanager
def saved_bytes(model: nn.Module, *inputs: torch.Tensor) -> Iterator[SavedBytes]:
    """Measure the forward pass run inside; keep its output alive until the context ends.

    Args:
        model: whose parameters and buffers do not count.
        inputs: tensors that the caller holds anyway and that do not count either (a batch).
    """
    held = [*model.parameters(), *model.buffers(), *inputs]
    found = SavedBytes(frozenset(t.untyped_storage().data_ptr() for t in held))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in found.left_out:
            found.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
