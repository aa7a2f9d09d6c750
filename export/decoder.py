"""The exporter `onnx-decoder`: a decoder with its cache, one graph for prefill and decode, under the stock names.

What optimum calls `text-generation-with-past`: ORTModelForCausalLM opens the directory, ONNX Runtime needs a loop of
five lines, `tersor.export.generate.Generator` streams. cached.py makes the graph, nbits.py its eight-bit weights,
cached_parity.py says whether it may ship.
"""

from __future__ import annotations

import json
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
from tersor.compress.tokens import Input

from .generate import Generator
from .mixture.choice import Word, form_of, note_of
from .onnx import _empty

README = """# {model_type} as ONNX, with cache

Written by tersor: task `text-generation`, opset {opset}, {precision}, {parameters:,} parameters. One graph for the
prompt and for every token after it: `input_ids`, `position_ids` int64 `[batch, sequence]`, `attention_mask` int64
`[batch, past + sequence]` (0 is padding, on either side), `past_key_values.{{i}}.key` and `.value` float32
`[batch, {kv_heads}, past, {head_dim}]` for {layers} layers; out come `logits` `[batch, sequence, {vocab}]` and
`present.{{i}}.key`, `.value`, the next call's past. {several}

Greedy, with numpy and ONNX Runtime alone:

```python
{code}
```

With tersor installed: `for piece in tersor.export.generate.Generator(directory).stream("text"): print(piece, end="")`.
optimum-onnx opens the directory as `ORTModelForCausalLM`. artifact.json holds the limits, the hashes of all files and
what was measured against float64.{config}
"""

SEVERAL = "Several new tokens on top of a past: one sequence a call."
CONFIG = """
`hidden_size` in config.json is heads × head_dim, from which clients reckon the cache's shape; the model's own
width is {hidden}."""

CODE = """import numpy as np, onnxruntime
session, ids, n, answer = onnxruntime.InferenceSession("{file}"), np.array([[{examples}]]), 0, []
past = {{i.name: np.zeros((1, {kv_heads}, 0, {head_dim}), np.float32) for i in session.get_inputs()[3:]}}
for _ in range(8):
    where = {{"attention_mask": np.ones((1, n + ids.size), np.int64), "position_ids": n + np.arange(ids.size)[None]}}
    logits, *cache = session.run(None, {{"input_ids": ids, **where, **past}}); n += ids.size
    past, ids = dict(zip(past, cache)), logits[:, -1:].argmax(-1); answer.append(int(ids[0, 0]))"""


@dataclass(frozen=True, config=STRICT)
class OnnxDecoder(Exporter):
    """Write a decoder with its cache as one ONNX file, for prompts and every token after.

    Attributes:
        precision: of weights; `int8` in blocks of 32 with a scale each, judged by the recipe's gate.
        opset: ONNX opset; 23 opens in ONNX Runtime 1.23 too.
        experts: how a mixture's experts run (mixture/choice.py).
    """

    precision: Literal["float32", "int8"] = "float32"
    opset: Annotated[int, Field(ge=23, le=24)] = 23
    experts: Word = "auto"

    def requires(self, layout: Layout) -> Forecast:
        """Check task and architecture; the peak is a float32 and a float64 copy beside the graph's weights.

        Raises:
            RecipeError: the model generates nothing, or takes no positions.
        """
        if layout.task != "text-generation":
            raise RecipeError("export: onnx-decoder", f"task {layout.task!r}", "text-generation")
        if not layout.arch.position_ids:
            raise RecipeError(
                "export: onnx-decoder", f"{layout.arch.model_type}, which takes no position_ids", "one that does"
            )
        notes: tuple[str, ...] = ()
        if layout.arch.experts is not None:
            form = form_of(self.experts, "blocks" if self.precision == "int8" else "float32", layout)
            notes = note_of(self.experts, form, layout)
        said = f"onnx-decoder: {self.precision}, with cache"
        return Forecast(layout, memory=layout.parameters * 16, notes=(said, *notes))

    def write(self, checkpoint: Checkpoint, directory: Path, samples: Sequence[Input]) -> dict[str, Any]:
        """Write the artifact into the empty `directory` and hold it against the checkpoint (see `Exporter`)."""
        self.requires(checkpoint.layout)
        try:
            return self._write(checkpoint, directory, samples)
        except TersorError:
            _empty(directory)
            raise

    def _write(self, checkpoint: Checkpoint, directory: Path, samples: Sequence[Input]) -> dict[str, Any]:
        from . import artifact, cached_parity, runtime
        from .cached import cached
        from .graph import trace
        from .small import nbits

        word: Word = "auto" if self.precision == "int8" else self.experts
        model, routed = cached(checkpoint, runtime.opset(self.opset), word)
        facts = {**self._facts(checkpoint, model), **routed}
        trace.save(model, directory)
        artifact.write_side_files(checkpoint, directory)
        config = _write_config(directory, facts)
        (directory / "README.md").write_text(readme(facts, config), "utf-8")
        artifact.write_manifest(directory, facts)
        figures = cached_parity.hold(checkpoint, Generator(directory, threads=1), samples)
        if self.precision == "int8":
            if routed:
                model, routed = cached(checkpoint, runtime.opset(self.opset), self.experts, "blocks")
                facts |= routed
            nbits.quantize(model, keep=facts.get("experts", {}).get("routers", ()))
            trace.save(model, directory)
            facts["parity_float32"] = figures
            artifact.write_manifest(directory, facts)
            figures = cached_parity.hold_int8(checkpoint, Generator(directory, threads=1), samples)
        return artifact.write_manifest(directory, {**facts, "parity": figures})

    def _facts(self, checkpoint: Checkpoint, model: Any) -> dict[str, Any]:
        from .build import facts
        from .cached import GROUPED

        past = next(v for v in model.graph.inputs if v.name == "past_key_values.0.key")
        _, kv_heads, _, size = list(past.shape)
        cache = {"layers": checkpoint.layout.depth, "kv_heads": kv_heads, "head_dim": size}
        plain = facts(checkpoint, model, None, "padded", self.opset, None)
        cache["in_place"] = size % GROUPED == 0
        return {"exporter": "onnx-decoder", **plain, "precision": self.precision, "cache": cache}

    def open(self, directory: Path, threads: int | None = None) -> Generator:
        """A scorer that runs the artifact, and generates.

        Raises:
            PreflightError: the directory is no whole artifact.
        """
        return Generator(directory, threads)


def _write_config(directory: Path, facts: dict[str, Any]) -> int | None:
    """Make config.json say the cache's shape to clients that divide; returns the true width where that changed it."""
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if heads is None or width is None or width == heads * facts["cache"]["head_dim"]:
        return None
    config["hidden_size"] = heads * facts["cache"]["head_dim"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    return int(width)


def snippet(facts: dict[str, Any]) -> str:
    """Greedy decoding in five lines of numpy and ONNX Runtime."""
    high = facts["limits"]["vocab"] - 1
    examples = ", ".join(str(min(n, high)) for n in (7, 8, 9))
    return CODE.format(file=facts["model"], examples=examples, **facts["cache"])


def readme(facts: dict[str, Any], width: int | None) -> str:
    """README.md of the artifact; `width` where config.json states another."""
    return README.format(
        **{name: facts[name] for name in ("model_type", "opset", "precision", "parameters")},
        **{name: facts["cache"][name] for name in ("kv_heads", "head_dim", "layers")},
        vocab=facts["limits"]["vocab"],
        several=SEVERAL if facts["cache"]["in_place"] else "",
        code=snippet(facts),
        config="" if width is None else CONFIG.format(hidden=width),
    )
