"""Whether a graph with a cache computes what its checkpoint computes, by the rule of parity.py.

The reference is each sequence alone through the stock model in float64. The graph sees the same sequences alone,
together with padding on the right, together with padding on the left and then token by token, and alone in two
halves; every logit of every real token counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tersor.compress.errors import ParityMissed

from . import parity
from .generate import positions
from .mixture.parity import Reference, parted, revealing

if TYPE_CHECKING:
    from tersor.compress.checkpoint import Checkpoint
    from tersor.compress.tokens import Input

    from .generate import Generator

STEPS = 3
"""Single tokens taken on top of a cache."""
COSINE = 0.9
"""Mean cosine of logits under which an int8 graph is taken for broken rather than coarse."""


def _run(
    generator: Generator, ids: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and the cache after `ids [batch, s]`, under `mask [batch, past + s]`."""
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)[:, -ids.shape[1] :]}
    logits, *present = generator.session.run(["logits", *generator.present], {**feed, **past})
    return logits, dict(zip(generator.past, present, strict=True))


def _padded(ids: Sequence[np.ndarray], left: bool) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, ids))
    edges = [((width - len(i), 0) if left else (0, width - len(i))) for i in ids]
    tokens = np.stack([np.pad(i, edge) for i, edge in zip(ids, edges, strict=True)])
    mask = np.stack([np.pad(np.ones_like(i), edge) for i, edge in zip(ids, edges, strict=True)])
    return tokens, mask


def _together(generator: Generator, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    tokens, mask = _padded(ids, left=False)
    logits, _ = _run(generator, tokens, mask, generator.empty(len(ids)))
    return [logits[row, : len(i)] for row, i in enumerate(ids)]


def _stepwise(generator: Generator, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Left padding, then the last `STEPS` tokens of every sequence one by one."""
    tokens, mask = _padded([i[:-STEPS] for i in ids], left=True)
    logits, past = _run(generator, tokens, mask, generator.empty(len(ids)))
    parts = [[logits[row][mask[row] > 0]] for row in range(len(ids))]
    for step in range(-STEPS, 0):
        mask = np.concatenate([mask, np.ones((len(ids), 1), np.int64)], 1)
        logits, past = _run(generator, np.array([[i[step]] for i in ids]), mask, past)
        for row, part in enumerate(parts):
            part.append(logits[row])
    return [np.concatenate(part) for part in parts]


def _halves(generator: Generator, ids: np.ndarray) -> np.ndarray:
    middle, mask = len(ids) // 2, np.ones((1, len(ids)), np.int64)
    first, past = _run(generator, ids[None, :middle], mask[:, :middle], generator.empty())
    second, _ = _run(generator, ids[None, middle:], mask, past)
    return np.concatenate([first[0], second[0]])


def calls(generator: Generator, ids: Sequence[np.ndarray]) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Numbers of sequences with the graph's logits for each, arrangement by arrangement."""
    everyone = list(range(len(ids)))
    longer = [n for n in everyone if len(ids[n]) > STEPS]
    yield everyone, _together(generator, ids)
    for n in everyone[::4]:
        yield [n], _together(generator, [ids[n]])
    if longer:
        yield longer, _stepwise(generator, [ids[n] for n in longer])
        yield longer[:1], _stepwise(generator, [ids[longer[0]]])
        yield longer[-2:], [_halves(generator, ids[n]) for n in longer[-2:]]


def hold(checkpoint: Checkpoint, generator: Generator, samples: Sequence[Input]) -> dict[str, Any]:
    """Measure and judge a float32 graph; returns the figures for artifact.json.

    Raises:
        ParityMissed: a logit is further from float64 than the rule allows.
    """
    tokens = parity.sample(generator.artifact, samples)
    stock, depth = Reference(checkpoint, tokens), checkpoint.layout.depth
    errors, torch_error, scale = [], 0.0, 0.0
    for numbers, answers in calls(revealing(generator), [one.ids for one in tokens]):
        parts = [parted(answer, generator.artifact.vocab, depth) for answer in answers]
        got = [logits for logits, _ in parts]
        pairs = [stock(n, choices) for n, (_, choices) in zip(numbers, parts, strict=True)]
        want, single = ([pair[side] for pair in pairs] for side in (0, 1))
        errors.append(parity.distance(got, want))
        torch_error = max(torch_error, parity.distance(single, want))
        scale = max(scale, *(float(np.abs(one).max()) for one in want))
    return parity.insist({"logits": parity.Figures.of(errors, torch_error, scale, len(tokens), stock.followed)})


def hold_int8(checkpoint: Checkpoint, generator: Generator, samples: Sequence[Input]) -> dict[str, Any]:
    """Judge an int8 graph; how much it may lose is the recipe's gate to say, here only that it is not broken.

    Raises:
        ParityMissed: logits that have little to do with float64.
    """
    tokens = parity.sample(generator.artifact, samples)
    exact = parity.reference(checkpoint, tokens, torch.float64)
    pairs = [
        (got.astype(np.float64), exact[n])
        for numbers, answers in calls(generator, [one.ids for one in tokens])
        for n, got in zip(numbers, answers, strict=True)
    ]
    cosine = np.concatenate(
        [(a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30) for a, b in pairs]
    )
    if not cosine.mean() >= COSINE:
        raise ParityMissed(
            "parity of logits in int8",
            f"a mean cosine of {cosine.mean():.4f} to float64",
            f"at least {COSINE}",
            "Export float32.",
        )
    rule = f"mean cosine to fp64 >= {COSINE}"
    return {"logits": {"rule": rule, "cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}}
