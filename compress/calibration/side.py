"""A model on its way through its blocks: the calibration tokens' streams, and what each step of a block sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..layout import Layout
from ..walk import Arguments, Seen, Walk
from .batches import Batch
from .stages import Stage
from .streams import Streams


@dataclass
class Side:
    """A model on its way through its blocks.

    Attributes:
        walk: the model.
        streams: a batch's stream before the current block, `[batch, length, hidden]` each.
        arguments: of every block, a batch each.
    """

    walk: Walk
    streams: list[torch.Tensor] | Streams = field(default_factory=list)
    arguments: list[list[Arguments]] = field(default_factory=list)

    @classmethod
    def at_start(cls, model: Any, layout: Layout, data: Sequence[Batch], files: Path | None = None) -> Side:
        """A model in front of its first block; its streams in memory, or in `files` (see `Streams`)."""
        side = cls(Walk(model, layout), Streams(files) if files else [])
        for batch in data:
            start = side.walk.start(**batch.inputs)
            side.streams.append(start.stream)
            side.arguments.append(start.arguments)
        return side

    def fork(self) -> Side:
        """The same model from the same place, on streams of its own."""
        return Side(self.walk, list(self.streams), self.arguments)

    def observe(self, stage: Stage, number: int, inputs: Iterable[str], outputs: Iterable[str] = ()) -> Seen:
        """What modules of the stage's block see of batch `number`; the block runs no further than that."""
        stream = self.streams[number]
        seen = self.walk.observe(stage.block, stream, self.arguments[number][stage.block], inputs, outputs)
        for found in (seen.inputs, seen.outputs):  # OPT flattens batch and length in the middle of a block
            found.update({name: t.reshape(*stream.shape[:2], -1) for name, t in found.items()})
        return seen

    def behind(self, stage: Stage, number: int) -> torch.Tensor:
        """The stream (pre-norm) or the sum (post-norm) behind the stage."""
        if stage.after:
            return self.observe(stage, number, [stage.after]).inputs[stage.after]
        return self.walk.block(stage.block, self.streams[number], self.arguments[number][stage.block])

    def skippable(self, stage: Stage) -> bool:
        """Whether the rest of the block can be run without the stage: it fills one direct child of the block."""
        walk = self.walk
        part = walk.part(stage.block, stage.writers[0].module)
        within = f"{walk.path}.{stage.block}.{part}."
        holds_norm = stage.norm.startswith(within)
        post = walk.layout.arch.stream == "post-norm"
        return bool(part) and not stage.post and len(stage.writers) == 1 and holds_norm == post

    @contextmanager
    def without(self, stage: Stage) -> Iterator[None]:
        """The stage's block without the stage, for streams that are already behind it."""
        part = self.walk.part(stage.block, stage.writers[0].module)
        post = self.walk.layout.arch.stream == "post-norm"
        with self.walk.muted(stage.block, part, self.streams[0], self.arguments[0][stage.block], post):
            yield

    def normalised(self, stage: Stage, behind: torch.Tensor) -> torch.Tensor:
        """The stream after the stage from what `behind` returned."""
        if self.walk.layout.arch.stream == "pre-norm":
            return behind
        found: torch.Tensor = self.walk.model.get_submodule(stage.norm)(behind)
        return found

    def move(self, stage: Stage) -> None:
        """Move all streams behind a stage."""
        for number in range(len(self.streams)):
            self.streams[number] = self.normalised(stage, self.behind(stage, number))

    def advance(self, block: int) -> None:
        """Through a block, all batches."""
        for number, stream in enumerate(self.streams):
            self.streams[number] = self.walk.block(block, stream, self.arguments[number][block])
