"""The exporter `onnx`: an encoder's features or a decoder's scores as one ONNX file, held against float64.

Float32, or one of four small precisions on top of it (small/precision.py): ONNX Runtime's CPU has no bfloat16 MatMul
and rewrites float16 to float32. What is written either passes parity (parity.py) or does not exist. A small file is
first a float32 file that passes, and how much it may lose then is the recipe's gate to say:

    precision: int8           a scale a token: fast, and no answer depends on its neighbours in the call
    precision: int8-dynamic   ONNX Runtime's quantize_dynamic: a scale a call, so answers move with their neighbours
    precision: int8-block     weights in blocks of 32 with a scale each; the most exact, slower on many tokens
    precision: int4-block     likewise in four bits; the smallest file
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import RecipeError, TersorError
from tersor.compress.exporter import Exporter
from tersor.compress.layout import Layout
from tersor.compress.pass_ import STRICT, Forecast
from tersor.compress.tokens import Input, Tokens

from .client import Client
from .graph.segments import CLASSES
from .images import ImageClient
from .mixture.choice import Word, form_of, note_of

TASKS = (
    "feature-extraction",
    "text-generation",
    "fill-mask",
    "text-classification",
    "token-classification",
    "image-classification",
)


@dataclass(frozen=True, config=STRICT)
class Onnx(Exporter):
    """Write features, classes or scores as one ONNX file, for packed or padded rows.

    Attributes:
        inputs: `packed` takes several sequences a row (segment numbers in `attention_mask`) and removes padding inside
            the graph; `padded` one a row, otherwise the same; `packed-static` is for runtimes without dynamic shapes.
        precision: of products and tables, see above; products that it would hurt stay in float32 and are listed.
        opset: ONNX opset; 23 opens in ONNX Runtime 1.23 too, 24 is 5 to 12 % faster; the newest if not set.
        experts: how a mixture's experts run: `slices` of standard operators, ONNX Runtime's own `operator`, the
            `whole` FFN masked; `auto` goes by a rule, `measure` by a clock on this machine (mixture/choice.py).
        classes: bounds of the length classes in which attention runs, rising; 32, 64, 128 and 256 if not set.
        width: tokens in a row of `packed-static`.
        rows: rows in a call of `packed-static`.
    """

    inputs: Literal["padded", "packed", "packed-static"] = "packed"
    precision: Literal["float32", "int8", "int8-dynamic", "int8-block", "int4-block"] = "float32"
    opset: Annotated[int, Field(ge=23, le=24)] | None = None
    experts: Word = "auto"
    classes: list[Annotated[int, Field(gt=0)]] | None = None
    width: Literal[128, 256, 512] = 256
    rows: Annotated[int, Field(ge=1, le=1024)] = 4

    def requires(self, layout: Layout) -> Forecast:
        """Check task and architecture; the peak is a float32 and a float64 copy beside the graph's weights.

        Raises:
            RecipeError: the task has no exported form, or the architecture takes no positions.
        """
        if layout.task not in TASKS:
            raise RecipeError("export: onnx", f"task {layout.task!r}", " or ".join(TASKS))
        if self.classes is not None and (self.inputs == "packed-static" or layout.arch.inputs == "pixels"):
            where = "images" if layout.arch.inputs == "pixels" else f"inputs {self.inputs}"
            raise RecipeError("export: onnx: classes", f"{self.classes} with {where}", "none", "Leave `classes` out.")
        if layout.arch.inputs == "pixels" and layout.task in TASKS:
            return self._requires_images(layout)
        if layout.task == "text-classification" and layout.arch.causal:
            raise RecipeError("export: onnx", "a causal classifier, which reads the last token", "an encoder")
        if self.classes is not None and sorted(set(self.classes)) != self.classes:
            raise RecipeError("export: onnx: classes", str(self.classes), "lengths that rise, each once")
        if not layout.arch.position_ids:
            raise RecipeError(
                "export: onnx: inputs",
                f"{layout.arch.model_type}, which takes no position_ids",
                "an architecture that does",
            )
        notes: tuple[str, ...] = ()
        if layout.arch.experts is not None:
            if self.precision not in ("float32", "int8"):
                found = f"{self.precision} of a mixture of experts"
                raise RecipeError("export: onnx: precision", found, "float32 or int8")
            static = self.inputs == "packed-static"
            notes = note_of(self.experts, form_of(self.experts, self.precision, layout, static), layout, static)
        said = f"onnx: {self.precision}, {self.inputs} input"
        return Forecast(layout, memory=layout.parameters * 16, notes=(said, *notes))

    def _requires_images(self, layout: Layout) -> Forecast:
        if layout.task != "image-classification":
            raise RecipeError("export: onnx", f"{layout.task} of images", "image-classification")
        if self.precision != "float32":
            raise RecipeError("export: onnx: precision", f"{self.precision} of a model of images", "float32")
        return Forecast(layout, memory=layout.parameters * 16, notes=("onnx: float32, images of one size",))

    def write(self, checkpoint: Checkpoint, directory: Path, samples: Sequence[Input]) -> dict[str, Any]:
        """Write the artifact into the empty `directory` and hold it against the checkpoint (see `Exporter`)."""
        self.requires(checkpoint.layout)
        try:
            return self._write(checkpoint, directory, samples)
        except TersorError:
            _empty(directory)
            raise

    def _write(self, checkpoint: Checkpoint, directory: Path, samples: Sequence[Input]) -> dict[str, Any]:
        from . import artifact, images, parity, readme, runtime
        from .build import build
        from .graph import trace
        from .small import int8, precision

        opset = runtime.opset(self.opset)
        if self.precision == "int8":
            runtime.require("int8", "export: onnx: precision")
        if checkpoint.layout.arch.inputs == "pixels":
            return images.write(checkpoint, directory, [Tokens.of(image).ids for image in samples], opset)
        static = (self.rows, self.width) if self.inputs == "packed-static" else None
        word: Word = "auto" if self.precision == "int8" else self.experts
        model, facts = build(checkpoint, self.inputs, opset, static, word, classes=self.classes or CLASSES)
        trace.save(model, directory)
        artifact.write_side_files(checkpoint, directory)
        readme.write(directory, facts)
        artifact.write_manifest(directory, facts)
        client = Client(directory, threads=1)
        figures = parity.hold(checkpoint, client, samples)
        if self.precision != "float32":
            way = precision.PRECISIONS[self.precision]
            kept = int8.choose(model, client, parity.sample(client.artifact, samples), way.keep, way.error)
            named = precision.by_parameter(checkpoint, int8.products(model.graph), kept)
            if "experts" in facts:
                model, facts = build(
                    checkpoint, self.inputs, opset, static, self.experts, "int8", self.classes or CLASSES
                )
            small = way.quantize(model, [*kept, *facts.get("experts", {}).get("routers", ())])
            trace.save(small, directory)
            facts = {**facts, "precision": self.precision, "kept_float32": named, "keep_above": way.keep}
            facts["parity_float32"] = figures
            artifact.write_manifest(directory, facts)
            figures = parity.hold_small(checkpoint, Client(directory, threads=1), samples, way.apart)
        return artifact.write_manifest(directory, {**facts, "parity": figures})

    def open(self, directory: Path, threads: int | None = None) -> Client | ImageClient:
        """A scorer that runs the artifact.

        Raises:
            PreflightError: the directory is no whole artifact.
        """
        from .artifact import Artifact

        if "shape" in Artifact.open(directory).manifest["limits"]:
            return ImageClient(directory, threads)
        return Client(directory, threads)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
