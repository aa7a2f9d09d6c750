"""The `compare` verb: two checkpoints, artifacts or run directories beside each other.

Without text, runs speak through their metrics.json, nothing is measured again, and other things show their parameters
and bytes. With text (`--data` or a recipe), both sides are measured on it, a run by its model/, and A is the original
that KL, top-1 agreement and cosine refer to. Where both sides have weights, configs and tensors are compared too:
the change of a tensor is ‖B − A‖ / ‖A‖ (Frobenius, in float64), tied tensors counted once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import preflight
from .errors import PreflightError, RecipeError
from .reporting import report

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .data import Source
    from .recipe import Recipe

TOP = 10
UNWRITTEN = ("transformers_version", "_name_or_path", "architectures", "torch_dtype")


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: as the user wrote it.
        path: the directory.
        kind: `run`, `artifact` or `checkpoint`.
    """

    name: str
    path: Path
    kind: str

    @classmethod
    def of(cls, reference: str, offline: bool) -> Side:
        """What lies there.

        Raises:
            PreflightError: nothing does, or a run that has not ended.
        """
        from .pretrained import locate

        path = locate(reference, offline)
        if (path / "artifact.json").is_file():
            return cls(reference, path, "artifact")
        if (path / "config.json").is_file():
            return cls(reference, path, "checkpoint")
        if (path / "metrics.json").is_file():
            return cls(reference, path, "run")
        if (path / "journal.jsonl").is_file():
            raise PreflightError(reference, "a run that has not ended", "a finished one", "Continue it with --resume.")
        raise PreflightError(reference, "no config.json, artifact.json or metrics.json", "a model or a run")

    @property
    def model(self) -> Path | None:
        """The folder of what can be measured; None if a run left no checkpoint."""
        if self.kind != "run":
            return self.path
        return next((p for p in (self.path / "model", self.path / "failed" / "model") if p.is_dir()), None)

    @property
    def weights(self) -> Path | None:
        """The checkpoint's folder, if there is one."""
        return None if self.kind == "artifact" else self.model


def compare(
    a: str,
    b: str,
    *,
    source: Source | None = None,
    recipe: Recipe | None = None,
    metrics: Sequence[str] = (),
    threads: int | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Two things beside each other.

    Args:
        a: a checkpoint directory, a hub id, an artifact's folder or a run directory; the original for metrics that
            compare answers.
        b: likewise.
        source: text to measure both on.
        recipe: or a recipe whose held-out text and metrics are used.
        metrics: names; empty for the recipe's or the usual ones.
        threads: CPU threads.
        offline: never ask a hub.

    Returns:
        `a` and `b` with their blocks of measurements, `config` as `[key, a, b]`, `tensors` as dicts of name, change
        (None where shapes differ) and shapes, the largest changes first, and how many were `compared`.

    Raises:
        TersorError: something is not there or cannot be measured.
    """
    sides = [Side.of(reference, offline) for reference in (a, b)]
    base = None
    if recipe is not None:
        source, base, metrics = recipe.data.heldout, recipe.base, metrics or recipe.metrics
        if source is None:
            raise RecipeError(recipe.place("data"), "no held-out text", "data.heldout")
    with preflight.threads(threads):
        if source is not None:
            blocks = _measured(sides, source, base, metrics, threads, offline)
        else:
            blocks = [_recorded(side, threads) for side in sides]
        found: dict[str, Any] = {
            key: {"name": side.name, "kind": side.kind, "blocks": block}
            for key, side, block in zip("ab", sides, blocks, strict=True)
        }
        folders = [side.weights for side in sides]
        if folders[0] is not None and folders[1] is not None:
            found |= differences(folders[0], folders[1])
    return found


def _recorded(side: Side, threads: int | None) -> dict[str, dict[str, Any]]:
    """Blocks by name, from a run's metrics.json; of anything else its size."""
    if side.kind != "run":
        return {"": _size(side.path, threads)}
    stored = json.loads((side.path / "metrics.json").read_text("utf-8"))
    blocks = {"": stored["checkpoint"], **{artifact["name"]: artifact for artifact in stored["artifacts"]}}
    return {name: _plain(block) for name, block in blocks.items() if block}


def _plain(block: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in block.items() if isinstance(value, (int, float))}
    return kept | {"intervals": block.get("intervals", {})}


def _size(path: Path, threads: int | None) -> dict[str, Any]:
    from .evaluation import open_scorer

    if (path / "artifact.json").is_file():
        scorer, _ = open_scorer(path, threads)
        return {"parameters": scorer.parameters, "bytes": scorer.bytes}
    from .pretrained import read_config

    layout = read_config(path)
    return {"parameters": layout.parameters, "bytes": layout.bytes}


def _measured(
    sides: Sequence[Side],
    source: Source,
    base: Path | None,
    metrics: Sequence[str],
    threads: int | None,
    offline: bool,
) -> list[dict[str, dict[str, Any]]]:
    from .evaluate import evaluate
    from .evaluate.defaults import default_metrics
    from .evaluation import open_scorer

    opened = []
    for side in sides:
        if side.model is None:
            raise PreflightError(side.name, "a run without a checkpoint", "one with model/ or failed/model/")
        opened.append(open_scorer(side.model, threads))
    (first, reader), (second, _) = opened
    if first.output != second.output:
        raise RecipeError("tersor compare", f"{first.output} beside {second.output}", "two models of one task")
    samples = reader.read(source, seed=None, base=base, place="data", offline=offline)
    wanted = tuple(metrics) or default_metrics(first.output, samples)
    blocks: list[dict[str, dict[str, Any]]] = []
    for scorer in (first, second):
        scores = evaluate(scorer, samples, wanted, first)
        block: dict[str, Any] = {"parameters": scorer.parameters, "bytes": scorer.bytes}
        block |= {name: score.value for name, score in scores.items()}
        blocks.append({"": block | {"intervals": {name: [s.low, s.high] for name, s in scores.items()}}})
    return blocks


def differences(a: Path, b: Path) -> dict[str, Any]:
    """What two checkpoint directories differ in: configs key by key, tensors by relative change."""
    from .checkpoint import Checkpoint

    configs = [json.loads((path / "config.json").read_text("utf-8")) for path in (a, b)]
    keys = [key for key in dict.fromkeys([*configs[0], *configs[1]]) if key not in UNWRITTEN]
    changed = [[key, *(c.get(key) for c in configs)] for key in keys if configs[0].get(key) != configs[1].get(key)]
    ours, theirs = Checkpoint.load(a), Checkpoint.load(b)
    tensors = _changes(ours, theirs)
    return {"config": changed, "tensors": tensors[:TOP], "compared": len(tensors)}


def _changes(a: Checkpoint, b: Checkpoint) -> list[dict[str, Any]]:
    """Every tensor of either, other shapes first, then by relative change."""
    import torch

    found, seen = [], set()
    for name in dict.fromkeys([*a.tensors, *b.tensors]):
        before, after = a.tensors.get(name), b.tensors.get(name)
        if (id(before), id(after)) in seen:
            continue
        seen.add((id(before), id(after)))
        shapes = [None if t is None else list(t.shape) for t in (before, after)]
        change = None
        if before is not None and after is not None and before.shape == after.shape:
            x, y = before.to(torch.float64), after.to(torch.float64)
            norm, moved = float(torch.linalg.vector_norm(x)), float(torch.linalg.vector_norm(y - x))
            change = moved / norm if norm else (0.0 if moved == 0 else None)
        found.append({"name": name, "change": change, "a": shapes[0], "b": shapes[1]})
    return sorted(found, key=lambda t: -math.inf if t["change"] is None else -t["change"])


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The table: a heading row, then a row a measurement of either side."""
    sides = [found["a"]["blocks"], found["b"]["blocks"]]
    table = [["", found["a"]["name"], found["b"]["name"], "difference"]]
    for part in dict.fromkeys([*sides[0], *sides[1]]):
        blocks = [side.get(part, {}) for side in sides]
        for key in dict.fromkeys(k for block in blocks for k in block if k != "intervals"):
            values = [block.get(key) for block in blocks]
            label = key.replace("_", " ")
            cells = [_cell(block, key) for block in blocks]
            table.append([f"{part}: {label}" if part else label, *cells, _difference(key, *values)])
    return table


def _cell(block: Mapping[str, Any], key: str) -> str:
    value = block.get(key)
    if value is None:
        return "–"
    if key in ("parameters", "bytes"):
        return f"{value:,}"
    low, high = block.get("intervals", {}).get(key) or (None, None)
    interval = "" if low is None else f" ({low:.4g} … {high:.4g})"
    return f"{value:.4g}{interval}"


def _difference(key: str, a: float | None, b: float | None) -> str:
    if a is None or b is None:
        return "–"
    if a == b:
        return "="
    absolute = f"{b - a:+,}" if key in ("parameters", "bytes") else f"{b - a:+.3g}"
    return absolute if key in report.UNSCALED or not a else f"{absolute} ({100 * (b / a - 1):+.1f} %)"


def tensor_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The tensors that differ most, as a table; empty if none does."""
    table = []
    for tensor in found.get("tensors", ()):
        if tensor["change"] == 0:
            continue
        shapes = [str(tensor[side]) if tensor[side] else "–" for side in "ab"]
        said = f"{tensor['change']:.3g}" if tensor["change"] is not None else "another shape"
        table.append([tensor["name"], said, *(shapes if shapes[0] != shapes[1] else [shapes[0], "="])])
    return [["tensor", "‖B − A‖ / ‖A‖", "A", "B"], *table] if table else []
