"""Weights that are made when they are used: models larger than memory, without another forward.

A `Deferred` looks like a float32 tensor and holds a recipe for its value: read from a memory-mapped file, multiplied by
a norm's gain, rotated. Every operation that meets one makes the value, uses it and forgets it. Autograd keeps the
recipe, not the value, so a backward pass needs one weight at a time too. Compare accelerate's offloading hooks, which
load and free modules: an exception in a forward (walk.py leaves forwards early) skips the freeing, and what they load
must exist as a file before.

Values are float32 wherever they are used; where they come to rest (`settle`) they are cast once to the stored dtype.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

Make = Callable[[], torch.Tensor]


@dataclass
class Cell:
    """Where a deferred value comes from; shared by all tensors that are the same parameter.

    Attributes:
        make: the value, float32.
        rest: the value in its stored dtype once it has come to rest, else None.
    """

    make: Make
    rest: torch.Tensor | None = None


@dataclass(frozen=True)
class Store:
    """Where deferred values come to rest.

    Attributes:
        dtype: stored dtype.
        folder: values are written here and mapped back; None keeps them in memory.
    """

    dtype: torch.dtype
    folder: Path | None = None

    def put(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """The value in the stored dtype, on disk if there is a folder.

        Args:
            name: of the parameter; another value under the same name replaces it.
            value: any floating dtype.
        """
        value = value.detach().to(self.dtype).contiguous()
        if self.folder is None:
            return value
        from safetensors.torch import save_file

        beside = self.folder / f"{name}.part"
        save_file({"value": value}, beside)
        beside.replace(self.folder / f"{name}.safetensors")
        return self.get(name)

    def get(self, name: str) -> torch.Tensor:
        """What was put under the name on disk, mapped into memory."""
        from safetensors import safe_open

        assert self.folder is not None
        with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
            found: torch.Tensor = file.get_tensor("value")
        return found


class Deferred(torch.Tensor):
    """A float32 tensor whose value is made at every use.

    Attributes:
        cell: where the value comes from.
        known_as: the parameter's name.
        store: where it comes to rest when it is written to.
    """

    cell: Cell
    known_as: str
    store: Store

    @staticmethod
    def __new__(cls, shape: Sequence[int], cell: Cell, name: str, store: Store) -> Deferred:
        """A tensor of `shape`, float32."""
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.float32, requires_grad=False)
        assert isinstance(made, Deferred)
        made.cell, made.known_as, made.store = cell, name, store
        return made

    def value(self) -> torch.Tensor:
        """The value as an ordinary float32 tensor."""
        return _value(self.cell)

    def settle(self) -> torch.Tensor:
        """The value in the stored dtype, made once and kept from now on."""
        if self.cell.rest is None:
            self.write(self.cell.make())
        assert self.cell.rest is not None
        return self.cell.rest

    def write(self, value: torch.Tensor) -> None:
        """Replace the value."""
        self.cell.rest = self.store.put(self.known_as, value)
        self.cell.make = _gone

    def recall(self) -> None:
        """Take the value that an earlier process left at rest."""
        self.cell.rest, self.cell.make = self.store.get(self.known_as), _gone

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Deferred({self.known_as}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Deferred):
            if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
                return Deferred(first.shape, first.cell, first.known_as, first.store)
            if func is torch.ops.aten.t.default:  # of a Linear: autograd would keep what is made here
                cell = first.cell
                return Deferred(first.shape[::-1], Cell(lambda: _value(cell).t()), first.known_as, first.store)
            if func is torch.ops.aten.copy_.default:
                first.write(plain(args[1]).expand(first.shape))
                return first
        args, kwargs = tree_map_only(Deferred, plain, (args, kwargs))
        return func(*args, **kwargs)


Later = Callable[[str, Sequence[int], Make], torch.Tensor]
"""(name, shape, make) → the float32 tensor that `make` computes, now or at every use."""


def at_once(_name: str, _shape: Sequence[int], make: Make) -> torch.Tensor:
    """Make it now: a `Later` for models that fit."""
    return make()


def when_used(store: Store) -> Later:
    """Make it at every use: a `Later` for models that do not fit."""
    return lambda name, shape, make: Deferred(shape, Cell(make), name, store)


def lent(name: str, tensor: torch.Tensor, store: Store) -> Deferred:
    """A float32 view of a tensor of any dtype, which is not changed by what is written to the view."""
    if isinstance(tensor, Deferred):
        return tensor
    return Deferred(tensor.shape, Cell(_gone, tensor), name, store)


def own(name: str, tensor: torch.Tensor, store: Store) -> Deferred:
    """Like `tensor`, with a cell of its own: writing to one does not change the other."""
    return Deferred(tensor.shape, Cell(lambda: plain(tensor)), name, store)


def trim() -> None:
    """Hand memory that nothing holds any more back to the system, where the C library keeps it (glibc does: of a
    block's matrices of float64, up to 32 MB each, hundreds of MB).
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or the value of a deferred one, made once for all its uses."""
    return tensor.value() if isinstance(tensor, Deferred) else tensor


def _value(cell: Cell) -> torch.Tensor:
    found = cell.make() if cell.rest is None else cell.rest
    return found.detach().to(torch.float32)


def _gone() -> torch.Tensor:
    raise AssertionError("a value that has come to rest is not made again")
