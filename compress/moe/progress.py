"""Where a conversion stands, on disk, so that a killed one goes on with the block it was at.

    weights/NAME     tensors of finished blocks, as they will be stored
    block.json       the last block of which all else is there, what was measured up to it, and which of two turns holds
    0.0.3 …          streams of the dense and the compressed model by batch, behind that block, in files by turn

Written at most every `slicing.kept.EVERY` seconds. Blocks behind the last state are converted again, from the same
streams, so a resumed conversion ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..calibration.side import Side
from ..deferred import Store
from ..slicing.kept import Kept


@dataclass
class Progress:
    """What is done, and what the next block starts from.

    Attributes:
        store: where tensors come to rest.
        kept: what outlives a kill; nothing without a folder.
        tensors: of finished blocks, by name.
        details: of finished blocks.
    """

    store: Store
    kept: Kept
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    details: list[dict[str, Any]] = field(default_factory=list)

    def add(self, tensors: Mapping[str, torch.Tensor], details: dict[str, Any]) -> None:
        """A converted block, as its class stores it."""
        self.tensors |= {name: self.store.put(name, tensor) for name, tensor in tensors.items()}
        self.details.append(details)

    def block_done(self, number: int, sides: Sequence[Side]) -> None:
        """Keep where the conversion stands behind block `number`, if the last time is long enough ago."""
        if not self.kept.due:
            return
        for name, stream in _streams(sides):
            self.kept.keep_tensors(f"{self.kept.turn}.{name}", {"stream": stream})
        state = {"number": number, "turn": self.kept.turn, "names": list(self.tensors), "details": self.details}
        self.kept.keep("block", state)
        self.kept.turn_over()

    def resume(self, sides: Sequence[Side]) -> int:
        """Put the sides where they stood; returns the number of the next block."""
        found = self.kept.value("block")
        if found is None:
            return 0
        for side, streams in zip(sides, _read(self.kept, found["turn"], sides), strict=True):
            side.streams = streams
        self.tensors = {name: self.store.get(name) for name in found["names"]}
        self.details = found["details"]
        self.kept.turn = 1 - int(found["turn"])
        return int(found["number"]) + 1


def _streams(sides: Sequence[Side]) -> Iterator[tuple[str, torch.Tensor]]:
    for place, side in enumerate(sides):
        yield from ((f"{place}.{number}", stream) for number, stream in enumerate(side.streams))


def _read(kept: Kept, turn: int, sides: Sequence[Side]) -> list[list[torch.Tensor]]:
    every: list[list[torch.Tensor]] = [[] for _ in sides]
    for name, _ in _streams(sides):
        found = kept.tensors(f"{turn}.{name}")
        assert found is not None
        every[int(name.split(".")[0])].append(found["stream"])
    return every
