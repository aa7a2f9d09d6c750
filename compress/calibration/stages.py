"""Stages: a block's branches in the order in which they change the stream, whatever the architecture.

A stage reads the stream once and writes to it once. Branches that run in parallel (Phi) are one stage with
two writers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..axes import Dim, family, parse_dims, positions
from ..layout import Layout


@dataclass(frozen=True)
class Writer:
    """A module that adds to the stream.

    Attributes:
        module: its full name.
        inner: the dimension it reads, by axis names.
        post_norm: a norm between it and the addition, or empty.
    """

    module: str
    inner: Dim
    post_norm: str = ""

    def axis(self, layout: Layout) -> str:
        """The axis of its units that the config lets shrink (`ffn3`, `kv_heads0`), alone or with hidden, or empty."""
        for section in self.inner.sections:
            for axis in section:
                found = layout.arch.axis(family(axis))
                if (found is not None and found.shrinkable) or ("hidden", family(axis)) in layout.arch.coupled:
                    return axis
        return ""

    def groups(self, layout: Layout, axis: str) -> torch.Tensor:
        """int64 `[units, width]`: which of its inputs belong to each unit of `axis`."""
        units = [torch.tensor([u]) for u in range(layout.sizes[axis])]
        return torch.stack([positions(self.inner, axis, unit, layout.sizes) for unit in units])


@dataclass(frozen=True)
class Stage:
    """One step of the stream.

    Attributes:
        block: its number.
        norm: the norm it reads through (pre-norm) or ends with (post-norm); empty if there is none.
        reads: modules that read the stream.
        writers: modules that write to it.
        after: the module whose input is the stream (pre-norm) or the sum (post-norm) after the stage; empty
            if that is the block's output.
    """

    block: int
    norm: str
    reads: tuple[str, ...]
    writers: tuple[Writer, ...]
    after: str

    @property
    def post(self) -> bool:
        """Whether the writers' output is not what is added."""
        return any(writer.post_norm for writer in self.writers)


def stages(layout: Layout, block: int) -> list[Stage]:
    """The stages of a block."""
    branches = layout.branches(block)
    steps = [branches] if layout.arch.parallel else [[branch] for branch in branches]
    found = []
    for number, step in enumerate(steps):
        following = steps[number + 1][0].norm if number + 1 < len(steps) else ""
        found.append(
            Stage(
                block,
                step[0].norm,
                tuple(read for branch in step for read in branch.reads),
                tuple(Writer(b.writes, parse_dims(b.inner)[0], b.post_norm) for b in step),
                step[0].norm if layout.arch.stream == "post-norm" else following,
            )
        )
    return found
