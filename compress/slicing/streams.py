"""The residual streams of a refit: in memory, or in files of which the system keeps in memory what it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch


class Streams:
    """A batch's stream `[batch, length, hidden]`, float32, by number.

    Args:
        files: a path without its end, if the streams live in files; `{files}.{number}`.
    """

    def __init__(self, files: Path | None = None):
        self.files = files
        self._held: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._held)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._held[number]

    def __setitem__(self, number: int, stream: torch.Tensor) -> None:
        if self.files is None:
            self._held[number] = stream
        else:
            self._held[number].copy_(stream)

    def append(self, stream: torch.Tensor) -> None:
        """One batch more."""
        if self.files is not None:
            path = f"{self.files}.{len(self._held)}"
            mapped = torch.from_file(path, shared=True, size=stream.numel(), dtype=stream.dtype)
            stream = mapped.view(stream.shape).copy_(stream)
        self._held.append(stream)
