"""Residual streams in files, of which the system keeps in memory what it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch


class Streams:
    """A batch's stream `[batch, length, hidden]`, float32, by number: a list whose entries lie in files.

    Args:
        files: a path without its end; `{files}.{number}`.
    """

    def __init__(self, files: Path):
        self.files = files
        self._mapped: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._mapped)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._mapped)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._mapped[number]

    def __setitem__(self, number: int, stream: torch.Tensor) -> None:
        self._mapped[number].copy_(stream)

    def append(self, stream: torch.Tensor) -> None:
        """One batch more."""
        path = f"{self.files}.{len(self._mapped)}"
        mapped = torch.from_file(path, shared=True, size=stream.numel(), dtype=stream.dtype)
        self._mapped.append(mapped.view(stream.shape).copy_(stream))
