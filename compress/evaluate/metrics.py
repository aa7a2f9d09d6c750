"""What is measured: one function a metric, from a model's answer on one sample to a sum and a weight.

A metric's value is finish(Σ sums / Σ weights), so that long samples count by their length and an interval
follows from the per-sample pairs (score.py).

Dtypes: softmax terms are computed in float32, sums over the vocabulary and over tokens in float64. With the
maximum subtracted first, each term errs by about 6e-8 of itself and the float64 sum adds nothing: 3e-8 nats a
token against float64 throughout (4096 words), at a quarter of its time. Logits arrive as float32, so nothing
is lost before.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..data import Sample
from ..errors import RecipeError
from .scorer import Output

Pair = tuple[float, float]
ROWS = 64  # tokens at a time: with usual vocabularies the temporaries stay in the cache


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: the recipe's word.
        output: the kind of answer it reads.
        better: whether lower or higher values are better.
        needs_reference: whether it compares with the original's answer.
        unit: for people.
        sample: (answer, the original's answer or None, sample) → (sum, weight).
        finish: the mean → the value; monotone.
    """

    name: str
    output: Output
    better: Literal["lower", "higher"]
    needs_reference: bool
    unit: str
    sample: Callable[[np.ndarray, np.ndarray | None, Sample], Pair]
    finish: Callable[[float], float] = float


def log_normalizer(logits: np.ndarray) -> np.ndarray:
    """Log Σ exp over the last axis: float32 `[n, vocab]` → float64 `[n]`."""
    peak = logits.max(axis=1, keepdims=True)
    terms = logits - peak
    np.exp(terms, out=terms)
    total: np.ndarray = peak[:, 0].astype(np.float64) + np.log(terms.sum(axis=1, dtype=np.float64))
    return total


def negative_log_likelihood(logits: np.ndarray, ids: np.ndarray) -> float:
    """Nats that a causal model pays for ids[1:]. Logits float32 `[n, vocab]`, ids int64 `[n]`."""
    total = 0.0
    for start in range(0, len(ids) - 1, ROWS):
        rows = logits[start : min(start + ROWS, len(ids) - 1)]
        chosen = rows[np.arange(len(rows)), ids[start + 1 : start + 1 + len(rows)]]
        total += float((log_normalizer(rows) - chosen).sum())
    return total


def divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Σ over positions of KL(reference ‖ model), nats. Both float32 `[n, vocab]`."""
    total = 0.0
    for start in range(0, len(logits), ROWS):
        ours, theirs = logits[start : start + ROWS], reference[start : start + ROWS]
        own, their = log_normalizer(ours), log_normalizer(theirs)
        weights = np.exp(theirs - their[:, None].astype(np.float32))
        difference = np.multiply(weights, theirs - ours).sum(axis=1, dtype=np.float64)
        total += float((difference / weights.sum(axis=1, dtype=np.float64) - (their - own)).sum())
    return total


def _perplexity(out: np.ndarray, _: np.ndarray | None, sample: Sample) -> Pair:
    return negative_log_likelihood(out, sample.ids), len(sample.ids) - 1


def _bits_per_byte(out: np.ndarray, _: np.ndarray | None, sample: Sample) -> Pair:
    return negative_log_likelihood(out, sample.ids) / math.log(2), sample.bytes


def _kl(out: np.ndarray, reference: np.ndarray | None, sample: Sample) -> Pair:
    assert reference is not None
    return divergence(out[:-1], reference[:-1]), len(sample.ids) - 1


def _top1(out: np.ndarray, reference: np.ndarray | None, sample: Sample) -> Pair:
    assert reference is not None
    ours, theirs = out[:-1].argmax(axis=1), reference[:-1].argmax(axis=1)
    peaks = out[np.arange(len(ours)), ours], reference[np.arange(len(theirs)), theirs]
    if not np.isfinite(peaks).all():  # argmax would call NaN the largest, and two broken models agree
        return math.nan, 1.0
    return float((ours == theirs).sum()), len(sample.ids) - 1


def _cosine(out: np.ndarray, reference: np.ndarray | None, _: Sample) -> Pair:
    assert reference is not None
    a, b = out.astype(np.float64), reference.astype(np.float64)
    return float(a @ b / math.sqrt((a @ a) * (b @ b))), 1.0


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "perplexity", "logits", "lower", False, "", _perplexity, lambda nats: math.exp(min(nats, 700.0))
        ),
        Metric("bits_per_byte", "logits", "lower", False, "bits a byte", _bits_per_byte),
        Metric("kl", "logits", "lower", True, "nats a token", _kl),
        Metric("top1", "logits", "higher", True, "share of tokens", _top1),
        Metric("cosine", "embedding", "higher", True, "", _cosine),
    )
}

ALWAYS = {"parameters": "", "bytes": "bytes", "latency_ms": "ms"}
"""Measured of everything, lower is better: name → unit."""


def nearest(name: str, known: Sequence[str]) -> str:
    """`Did you mean …?`, or nothing."""
    found = difflib.get_close_matches(name, known, 1)
    return f"Did you mean {found[0]}?" if found else ""


def check_metrics(names: Sequence[str], output: Output | None = None, place: str = "metrics") -> list[Metric]:
    """The metrics of these names, which must read the output (any if None).

    Raises:
        RecipeError: an unknown name, or a metric for another kind of model.
    """
    for name in names:
        if name not in METRICS:
            raise RecipeError(place, repr(name), f"one of {', '.join(METRICS)}", nearest(name, list(METRICS)))
        if output is not None and METRICS[name].output != output:
            fit = ", ".join(m.name for m in METRICS.values() if m.output == output)
            raise RecipeError(
                place,
                f"{name!r}, which reads {METRICS[name].output}",
                f"metrics for a model that gives {output}: {fit}",
            )
    return [METRICS[name] for name in names]
