"""Whether an artifact computes what its checkpoint computes.

A fixed tolerance rejects correct graphs: on a small trained Llama ONNX Runtime is 1.7e-5 from torch while torch itself
is 2.0e-5 from float64. So float64 is the judge, and float32 torch says what float32 can do here:

    max|ORT − fp64| ≤ max(2 · max|torch fp32 − fp64|, 1e-6 · scale)

with scale = max|fp64| for logits, and the largest norm of a row for embeddings and states, whose elements shrink with
the width. The reference is the stock model on every sequence alone; the artifact sees the same sequences alone, padded
together and, if it takes packed input, several to a row, at lengths that were not used in tracing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tersor.compress.errors import ParityMissed

if TYPE_CHECKING:
    from tersor.compress.checkpoint import Checkpoint

    from .client import Client

LENGTHS = (1, 2, 3, 17, 40, 71)
"""Lengths of the drawn sequences."""
LONGEST = 160
"""Real samples are cut here: float64 attention on long rows buys no further certainty."""
REAL = 6


@dataclass(frozen=True)
class Figures:
    """What was measured: largest distances from float64, and the limit that the rule gives."""

    error: float
    torch_error: float
    limit: float
    sequences: int
    calls: int

    @property
    def holds(self) -> bool:
        """Whether the artifact may ship. False for NaN."""
        return self.error <= self.limit

    def as_json(self) -> dict[str, Any]:
        """For artifact.json."""
        return {
            "rule": "max|ORT - fp64| <= max(2 max|torch fp32 - fp64|, 1e-6 scale)",
            "error": self.error,
            "torch_error": self.torch_error,
            "limit": self.limit,
            "sequences": self.sequences,
            "calls": self.calls,
        }


def sequences(samples: Sequence[np.ndarray], vocab: int, longest: int, seed: int = 0) -> list[np.ndarray]:
    """Real samples, cut, and drawn ids at lengths that a tracer would not choose; int64 `[n_i]` each."""
    draw = np.random.default_rng(seed)
    real = [np.asarray(s, np.int64)[: min(LONGEST, longest)] for s in samples if len(s)][:REAL]
    drawn = [draw.integers(0, vocab, min(n, longest), dtype=np.int64) for n in LENGTHS]
    mixed = [*real, *drawn]
    return [mixed[i] for i in draw.permutation(len(mixed))]


def reference(checkpoint: Checkpoint, ids: Sequence[np.ndarray], dtype: torch.dtype) -> list[np.ndarray]:
    """The stock model's main output on each sequence alone: `[n_i, width]` logits or states."""
    model, first = checkpoint.model(dtype), checkpoint.layout.first_position
    with torch.no_grad():
        # A model that derives positions from its padding id would take a drawn id of that value for padding.
        extra = ({"position_ids": torch.arange(first, first + len(i))[None]} if first else {} for i in ids)
        outs = (model(input_ids=torch.from_numpy(i)[None], **e) for i, e in zip(ids, extra, strict=True))
        return [(o.logits if hasattr(o, "logits") else o.last_hidden_state)[0].numpy() for o in outs]


def arrangements(count: int, packed: bool) -> Iterator[list[list[int]]]:
    """Ways to lay sequences 0 … count−1 into the rows of one call."""
    for i in range(0, count, 4):
        yield [[i]]
    yield [[i] for i in range(count)]
    if packed:
        yield [list(range(count))]
        yield [list(range(count))[::2], list(range(count))[1::2]]


def _scale(values: Sequence[np.ndarray], by_norm: bool) -> float:
    return max(float(np.linalg.norm(v, axis=-1).max() if by_norm else np.abs(v).max()) for v in values)


def _distance(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(x.astype(np.float64) - y).max()) for x, y in zip(a, b, strict=True))


def measure(checkpoint: Checkpoint, client: Client, samples: Sequence[np.ndarray]) -> dict[str, Figures]:
    """Figures by output name."""
    ids = sequences(samples, client.artifact.vocab, client.artifact.max_length or LONGEST)
    exact, single = (reference(checkpoint, ids, d) for d in (torch.float64, torch.float32))
    calls = [(rows, client.run(rows, ids)) for rows in arrangements(len(ids), client.artifact.packed)]
    found = {}
    for name in calls[0][1]:
        if name == "sentence_embedding":
            pooling = client.artifact.pooling
            want, plain = ([pooled(v, pooling) for v in values] for values in (exact, single))
        else:
            want, plain = exact, single
        errors = [_distance(got[name], [want[i] for row in rows for i in row]) for rows, got in calls]
        torch_error = _distance(plain, want)
        limit = max(2 * torch_error, 1e-6 * _scale(want, by_norm=name != "logits"))
        worst = float("nan") if any(np.isnan(errors)) else max(errors)
        found[name] = Figures(worst, torch_error, limit, len(ids), len(calls))
    return found


def pooled(states: np.ndarray, pooling: dict[str, Any]) -> np.ndarray:
    """A sequence's embedding from its states `[n, hidden]`, written independently of the exported graph."""
    vector: np.ndarray = states[0] if pooling["mode"] == "cls" else states.mean(0)
    return vector / max(float(np.linalg.norm(vector)), 1e-12) if pooling["normalize"] else vector


def hold(checkpoint: Checkpoint, client: Client, samples: Sequence[np.ndarray]) -> dict[str, Any]:
    """Measure and judge; returns the figures for artifact.json.

    Raises:
        ParityMissed: an output is further from float64 than the rule allows.
    """
    found = measure(checkpoint, client, samples)
    for name, figures in found.items():
        if not figures.holds:
            raise ParityMissed(
                f"parity of {name}",
                f"{figures.error:.2g} from float64",
                f"at most {figures.limit:.2g} (torch float32 is at {figures.torch_error:.2g})",
                "The graph and the checkpoint disagree; nothing was written.",
            )
    return {name: figures.as_json() for name, figures in found.items()}
