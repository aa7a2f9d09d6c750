"""Named axes: what every dimension of every tensor of a checkpoint is called.

A dimension is a sum of sections, a section is a product of axes in row-major order:

    "ffn{i}"                                   an FFN's units in block i
    "kv_heads{i} * queries * head_dim"         the rows of a q_proj under grouped-query attention
    "ffn{i} + ffn{i}"                          a fused gate_up_proj
    "2 + positions"                            a table whose first two rows mean something else

so one `keep` on one axis shrinks every tensor that has it, whatever the architecture fuses, groups or transposes.
Notation as in einops (Rogozhnikov, ICLR 2022), with names that live longer than one expression.

Projections work in float64 and cast back once, at the end of the pass that asked for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: sections laid side by side, each a product of axis names."""

    sections: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Dim:
        """`"a * b + c"` → sections (a, b) and (c,)."""
        return cls(tuple(tuple(axis.strip() for axis in part.split("*")) for part in text.split("+")))

    def size(self, sizes: Sizes) -> int:
        """Length of the dimension under `sizes`."""
        return sum(math.prod(size_of(axis, sizes) for axis in section) for section in self.sections)

    def has(self, axis: str) -> bool:
        """Whether `axis` is a factor of any section."""
        return any(axis in section for section in self.sections)

    def at(self, block: int | None) -> Dim:
        """The dimension in block `block`: `ffn{i}` becomes `ffn3`."""
        if block is None:
            return self
        return Dim(tuple(tuple(a.replace("{i}", str(block)) for a in s) for s in self.sections))

    def __str__(self) -> str:
        return " + ".join(" * ".join(section) for section in self.sections)


def parse_dims(text: str) -> tuple[Dim, ...]:
    """`"ffn{i}, hidden"` → the two dimensions of a Linear's weight; `""` → none, a scalar."""
    return tuple(Dim.parse(part) for part in text.split(",")) if text else ()


def family(axis: str) -> str:
    """The axis without its block number: `ffn3` and `ffn{i}` → `ffn`."""
    return axis.replace("{i}", "").rstrip("0123456789")


def size_of(axis: str, sizes: Sizes) -> int:
    """Length of an axis; a number stands for itself."""
    return int(axis) if axis.isdigit() else sizes[axis]


def positions(dim: Dim, axis: str, keep: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Indices along `dim` that survive when only `keep` (int64 `[n]`) of `axis` does, in `keep`'s order."""
    import torch

    kept, offset = [], 0
    for section in dim.sections:
        shape = [size_of(a, sizes) for a in section]
        index = torch.arange(offset, offset + math.prod(shape)).reshape(shape)
        if axis in section:
            index = index.index_select(section.index(axis), keep)
        kept.append(index.reshape(-1))
        offset += math.prod(shape)
    return torch.cat(kept)


def shrink(tensor: torch.Tensor, dims: Sequence[Dim], axis: str, keep: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """`tensor` with only the indices `keep` of `axis`, on every dimension that has it.

    A `keep` that is a permutation of the whole axis permutes.
    """
    for number, dim in enumerate(dims):
        if dim.has(axis):
            tensor = tensor.index_select(number, positions(dim, axis, keep, sizes))
    return tensor


def project(tensor: torch.Tensor, dims: Sequence[Dim], axis: str, basis: torch.Tensor) -> torch.Tensor:
    """Coordinates of `tensor` in `basis` (float64 `[n, k]`, orthonormal columns) along `axis`; float64.

    Raises:
        ValueError: `axis` is only a factor of a dimension, where a rotation would mix heads.
    """
    tensor = tensor.double()
    for number, dim in enumerate(dims):
        if not dim.has(axis):
            continue
        if dim.sections != ((axis,),):
            raise ValueError(f"cannot rotate {axis} inside the dimension {dim}")
        tensor = (tensor.movedim(number, -1) @ basis).movedim(-1, number)
    return tensor
