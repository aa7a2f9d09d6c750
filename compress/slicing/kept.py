"""What a cut keeps on disk, so that a killed one goes on with the block it was at (experts: moe/progress.py).

    chosen.json            sizes, and what the search tried
    measured.safetensors   the basis and the removal orders
    block.json             the last finished block, what the fits left unexplained, and which of two turns of files hold
    0.weights, 0.dense.3 … the refitted weights that lie nowhere else, and the streams of both models by batch

Written at most every `EVERY` seconds. What is read back is what was written, so a resumed cut ends with the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..deferred import Deferred
from ..pretrained import system_errors
from ..rundir import to_json, write_atomic

if TYPE_CHECKING:
    from .refit import Refit

EVERY = 30.0
"""Seconds between two states of a cut: writing one costs less than a percent of that."""


@dataclass
class Kept:
    """The state of one cut, or nothing at all without a folder.

    Attributes:
        folder: where it lies; None keeps nothing.
        written: when it was last written, on the monotonic clock.
        turn: the files that are written next: those of the other turn stay whole meanwhile.
    """

    folder: Path | None = None
    written: float = field(default_factory=time.monotonic)
    turn: int = 0

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def value(self, name: str) -> Any:
        """A JSON value kept before, or None."""
        path = self.folder / f"{name}.json" if self.folder else None
        return json.loads(path.read_text("utf-8")) if path and path.is_file() else None

    def keep(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        if self.folder:
            write_atomic(self.folder / f"{name}.json", to_json(value))

    def tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """Tensors kept before, or None."""
        from safetensors.torch import load_file

        path = self.folder / f"{name}.safetensors" if self.folder else None
        return load_file(path) if path and path.is_file() else None

    def keep_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep tensors; a reader finds the old ones or the new ones."""
        from safetensors.torch import save_file

        if self.folder:
            beside = self.folder / f"{name}.part"
            with system_errors(beside):
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside)
            beside.replace(self.folder / f"{name}.safetensors")

    @property
    def due(self) -> bool:
        """Whether the last state is long enough ago."""
        return self.folder is not None and time.monotonic() - self.written >= EVERY

    def turn_over(self) -> None:
        """A state is whole: the next goes to the other files."""
        self.turn, self.written = 1 - self.turn, time.monotonic()

    def block_done(self, number: int, refit: Refit) -> None:
        """Keep where a refit stands, if the last time is long enough ago."""
        if not self.due:
            return
        weights = refit.small.walk.model.state_dict()
        self.keep_tensors(f"{self.turn}.weights", _distinct(weights))
        for name, stream in _streams(refit):  # one at a time: writing copies
            self.keep_tensors(f"{self.turn}.{name}", {"stream": stream})
        rested = [name for name, t in weights.items() if isinstance(t, Deferred) and t.cell.rest is not None]
        self.keep("block", {"number": number, "turn": self.turn, "fits": refit.details, "rested": rested})
        self.turn_over()

    def resume(self, refit: Refit) -> int:
        """Put a refit where it stood; returns the number of its next block."""
        found = self.value("block")
        weights = self.tensors(f"{found['turn']}.weights") if found else None
        if weights is None:
            return 0
        for name, stream in _streams(refit):
            kept = self.tensors(f"{found['turn']}.{name}")
            assert kept is not None
            stream.copy_(kept["stream"])
        for name, tensor in refit.small.walk.model.state_dict().items():
            if isinstance(tensor, Deferred):
                if name in found["rested"]:
                    tensor.recall()
            elif name in weights:
                tensor.copy_(weights[name])
        refit.details[:] = found["fits"]
        self.turn = 1 - int(found["turn"])
        return int(found["number"]) + 1


def _streams(refit: Refit) -> Iterator[tuple[str, torch.Tensor]]:
    for name, side in (("dense", refit.dense), ("small", refit.small)):
        yield from ((f"{name}.{number}", stream) for number, stream in enumerate(side.streams))


def _distinct(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What lies in memory, one name for each storage: safetensors refuses two."""
    seen: dict[int, str] = {}
    plain = {name: t for name, t in tensors.items() if not isinstance(t, Deferred)}
    return {name: t for name, t in plain.items() if seen.setdefault(t.data_ptr(), name) == name}
