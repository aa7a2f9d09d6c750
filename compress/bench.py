"""The `bench` verb: how long a call takes, for checkpoints, artifacts and runs, on inputs of several sizes.

Ids and pixels are drawn, for a model's speed does not depend on what it reads; the same for all, and all take turns
(evaluate/latency.py). Text models are timed on one sequence of each length and on sixteen of mixed lengths, where
padding costs and packing does not; models of images on one and on eight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import preflight
from .errors import PreflightError, RecipeError

if TYPE_CHECKING:
    from .evaluate import Scorer
    from .reading import Reader

TOKENS = (16, 64, 256)
MIXED, SHORTEST, LONGEST = 16, 8, 64
"""The mixed call: sequences, and the range of their lengths."""
IMAGES = (1, 8)


def bench(
    reference: str,
    against: str | None = None,
    *,
    tokens: Sequence[int] = (),
    threads: int | None = None,
    repeats: int = 9,
    offline: bool = False,
) -> dict[str, Any]:
    """Median milliseconds of a call.

    Args:
        reference: a checkpoint directory, a hub id, an artifact's folder or a run directory, of which the checkpoint
            and every artifact are timed.
        against: likewise; what ratios refer to. Without it they refer to the first of `reference`.
        tokens: lengths of the single sequences; empty for `TOKENS`, as far as the model has positions.
        threads: CPU threads, None for all cores.
        repeats: timed calls of each, after one that is not timed.
        offline: never ask a hub.

    Returns:
        `threads`; `baseline`, a name; `calls` with `sequences`, `tokens` (None for images) and `milliseconds` by name.

    Raises:
        RecipeError: models of several tasks, or a length that one of them has no positions for.
        PreflightError: nothing lies there.
    """
    from .data import Sample
    from .evaluate import latency
    from .evaluation import open_scorer

    count = preflight.thread_count(threads)
    folders = _folders([r for r in (against, reference) if r is not None], offline)
    opened = {name: open_scorer(path, count) for name, path in folders.items()}
    scorers = {name: scorer for name, (scorer, _) in opened.items()}
    calls = _calls(scorers, [reader for _, reader in opened.values()], tokens)
    found = []
    for inputs in calls:
        timed = latency(scorers, [Sample(ids, 0, "") for ids in inputs], count, repeats)
        total = sum(map(len, inputs)) if inputs[0].ndim == 1 else None
        found.append({"sequences": len(inputs), "tokens": total, "milliseconds": timed})
    return {"threads": count, "baseline": next(iter(folders)), "calls": found}


def _folders(references: Sequence[str], offline: bool) -> dict[str, Path]:
    """What is timed, by name: of a run its checkpoint and its artifacts."""
    from .compare import Side

    found: dict[str, Path] = {}
    for reference in references:
        side = Side.of(reference, offline)
        folders = [side.path]
        if side.kind == "run":
            artifacts = sorted(p.parent for p in side.path.glob("**/artifact.json"))
            folders = [*([side.model] if side.model else []), *artifacts]
            if not folders:
                raise PreflightError(reference, "a run that left no model", "one with model/ or an artifact")
        for folder in folders:
            name = reference if folder == side.path else f"{reference.rstrip('/')}/{folder.relative_to(side.path)}"
            while name in found:  # the same beside itself shows what the machine's noise is
                name += " again"
            found[name] = folder
    return found


def _calls(
    scorers: Mapping[str, Scorer], readers: Sequence[Reader], tokens: Sequence[int]
) -> list[list[np.ndarray]]:
    outputs = {scorer.output for scorer in scorers.values()}
    kinds = {reader.layout.arch.inputs for reader in readers}
    if len(outputs | kinds) > 2:
        raise RecipeError("tersor bench", " beside ".join(sorted(outputs)), "models of one task")
    draw = np.random.default_rng(0)
    if kinds == {"pixels"}:
        return [[_image(readers, draw) for _ in range(n)] for n in IMAGES]
    vocab = min(reader.layout.families["vocab"] for reader in readers)
    limits = [reader.layout.longest for reader in readers if reader.layout.longest]
    limit = min(limits, default=max(*TOKENS, *tokens, LONGEST))
    if tokens and not 1 <= min(tokens) <= max(tokens) <= limit:
        wrong = max(tokens) if max(tokens) > limit else min(tokens)
        raise RecipeError("tersor bench: tokens", str(wrong), f"1 to {limit}, the model's positions")
    single = tuple(tokens) or tuple(n for n in TOKENS if n <= limit) or (limit,)
    lengths = [[n] for n in single]
    lengths.append(draw.integers(min(SHORTEST, limit), min(LONGEST, limit) + 1, MIXED).tolist())
    return [[draw.integers(0, vocab, n) for n in row] for row in lengths]


def _image(readers: Sequence[Reader], draw: np.random.Generator) -> np.ndarray:
    from .inputs import image_size

    shapes = {(r.layout.families["channels"], *image_size(r.layout.config, r.side_files)) for r in readers}
    if len(shapes) > 1:
        found = " beside ".join(str(list(shape)) for shape in sorted(shapes))
        raise RecipeError("tersor bench", f"images of {found}", "models of one image size")
    return draw.standard_normal(shapes.pop(), np.float32)
