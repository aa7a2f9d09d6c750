"""The exporter `onnx`: an encoder's features or a decoder's scores as one ONNX file, held against float64.

Float32 throughout: ONNX Runtime's CPU has no bfloat16 MatMul and rewrites float16 to float32. What is written either
passes parity (parity.py) or does not exist.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import RecipeError, TersorError
from tersor.compress.exporter import Exporter
from tersor.compress.layout import Layout
from tersor.compress.pass_ import STRICT, Forecast

from .client import Client

TASKS = ("feature-extraction", "text-generation")


@dataclass(frozen=True, config=STRICT)
class Onnx(Exporter):
    """Options of `use: onnx`.

    Attributes:
        inputs: `packed` takes several sequences a row (segment numbers in `attention_mask`), `padded` one.
        opset: ONNX opset; 23 has the standard Attention, 24 gives it key lengths, which is faster than a mask.
    """

    inputs: Literal["padded", "packed"] = "packed"
    opset: int = Field(default=24, ge=23, le=24)

    def requires(self, layout: Layout) -> Forecast:
        """Check task and architecture; the peak is a float32 and a float64 copy beside the graph's weights.

        Raises:
            RecipeError: the task has no exported form, or the architecture takes no positions.
        """
        if layout.task not in TASKS:
            raise RecipeError("export: onnx", f"task {layout.task!r}", " or ".join(TASKS))
        if not layout.arch.position_ids:
            raise RecipeError(
                "export: onnx: inputs",
                f"{layout.arch.model_type}, which takes no position_ids",
                "an architecture that does",
            )
        return Forecast(layout, memory=layout.parameters * 16, notes=(f"onnx: float32, {self.inputs} input",))

    def write(self, checkpoint: Checkpoint, directory: Path, samples: Sequence[np.ndarray]) -> dict[str, Any]:
        """Write the artifact into the empty `directory` and hold it against the checkpoint (see `Exporter`)."""
        self.requires(checkpoint.layout)
        try:
            return self._write(checkpoint, directory, samples)
        except TersorError:
            _empty(directory)
            raise

    def _write(
        self, checkpoint: Checkpoint, directory: Path, samples: Sequence[np.ndarray]
    ) -> dict[str, Any]:
        from . import artifact, parity, trace
        from .build import build

        model, facts = build(checkpoint, self.inputs, self.opset)
        trace.save(model, directory)
        artifact.write_side_files(checkpoint, directory)
        artifact.write_readme(directory, facts)
        artifact.write_manifest(directory, facts)
        client = Client(directory, threads=1)
        figures = parity.hold(checkpoint, client, samples)
        return artifact.write_manifest(directory, {**facts, "parity": figures})

    def open(self, directory: Path, threads: int | None = None) -> Client:
        """A scorer that runs the artifact.

        Raises:
            PreflightError: the directory is no whole artifact.
        """
        return Client(directory, threads)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
