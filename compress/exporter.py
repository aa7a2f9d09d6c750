"""The interface of an exporter: a checkpoint becomes an artifact, a directory that runs without tersor.

compress defines it, export implements it; exporters are found by name through the entry-point group
`tersor.exporters`. Like a pass, an exporter is a frozen pydantic dataclass whose fields are the recipe's options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .evaluate import Scorer
    from .layout import Layout
    from .pass_ import Forecast
    from .tokens import Input


class Exporter(ABC):
    """Base of all exporters."""

    @abstractmethod
    def requires(self, layout: Layout) -> Forecast:
        """Check that the layout can be exported with these options; predict memory.

        Raises:
            RecipeError: it cannot.
        """

    @abstractmethod
    def write(self, checkpoint: Checkpoint, directory: Path, samples: Sequence[Input]) -> dict[str, Any]:
        """Write the artifact into the empty `directory` and hold it against the checkpoint.

        Args:
            checkpoint: what to export; not changed.
            directory: exists and is empty; the caller renames it into place when all is well.
            samples: real token sequences (int64 `[n_i]`, or `Tokens` with types) or images for the parity check.

        Returns:
            what artifact.json holds (inputs, outputs, opset, hashes, parity).

        Raises:
            ParityMissed: the graph disagrees with the checkpoint.
        """

    @abstractmethod
    def open(self, directory: Path, threads: int | None = None) -> Scorer:
        """A scorer that runs the artifact."""
