"""What is measured: one function a metric, from a model's answer on one sample to a sum and a weight.

A metric's value is finish(Σ sums / Σ weights), so that long samples count by their length and an interval
follows from the per-sample pairs (score.py). What is no mean over samples (rank correlation, macro-F1) is a
`Reduction` instead, in reductions.py.

A model answers with rows: of logits, one a token; of class scores, one a sequence. `scored` says which of them
count and what they should have named, so that the same lines serve the next token, a masked token, the tokens
of an answer among several, and a class.

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
from typing import Any, Literal

import numpy as np

from ..data import UNASKED, Sample
from ..errors import RecipeError
from .reductions import REDUCTIONS, Needs, Reduction, cosine, predicted
from .scorer import Output

Pair = tuple[float, float]
CHOICES: tuple[Output, ...] = ("logits", "token_logits", "classes", "token_classes")
"""Answers that choose among several."""
ROWS = 64  # tokens at a time: with usual vocabularies the temporaries stay in the cache


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: the recipe's word.
        outputs: the kinds of answer it reads.
        better: whether lower or higher values are better.
        needs_reference: whether it compares with the original's answer.
        unit: for people.
        sample: (answer, the original's answer or None, sample) → (sum, weight).
        finish: the mean → the value; monotone.
        needs: what the data must bring beside text or images.
        whole: `sample` takes the answers to all parts of a sample as a list, not one at a time.
    """

    name: str
    outputs: tuple[Output, ...]
    better: Literal["lower", "higher"]
    needs_reference: bool
    unit: str
    sample: Callable[[Any, Any, Sample], Pair]
    finish: Callable[[float], float] = float
    needs: Needs = ""
    whole: bool = False


def scored(out: np.ndarray, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The rows that count, `[m, vocab]`, and what they should have named, int64 `[m]`.

    `out` is `[n, vocab]` or, of a sequence's classes, `[classes]`. Without a label a class has a target below 0.
    """
    if out.ndim == 1:
        return out[None], np.array([-1 if sample.label is None else int(sample.label)])
    if sample.targets is None:  # a causal model's next token
        return out[:-1], sample.ids[1:]
    places = np.flatnonzero(sample.targets != UNASKED)
    return out[places], sample.targets[places]


def log_normalizer(logits: np.ndarray) -> np.ndarray:
    """Log Σ exp over the last axis: float32 `[n, vocab]` → float64 `[n]`."""
    peak = logits.max(axis=1, keepdims=True)
    terms = logits - peak
    np.exp(terms, out=terms)
    total: np.ndarray = peak[:, 0].astype(np.float64) + np.log(terms.sum(axis=1, dtype=np.float64))
    return total


def negative_log_likelihood(rows: np.ndarray, targets: np.ndarray) -> float:
    """Nats that a model pays for `targets`, int64 `[m]`. Logits float32 `[m, vocab]`."""
    total = 0.0
    for start in range(0, len(targets), ROWS):
        some = rows[start : start + ROWS]
        chosen = some[np.arange(len(some)), targets[start : start + ROWS]]
        total += float((log_normalizer(some) - chosen).sum())
    return total


def divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Σ over positions of KL(reference ‖ model), nats. Both float32 `[n, vocab]`.

    A single number stands for a normal distribution of variance 1 around it, whose divergence is half the square of
    the difference: a softmax over one class would be 1 whatever the model says.
    """
    if logits.shape[1] == 1:
        return 0.5 * float(np.square(logits.astype(np.float64) - reference).sum())
    total = 0.0
    for start in range(0, len(logits), ROWS):
        ours, theirs = logits[start : start + ROWS], reference[start : start + ROWS]
        own, their = log_normalizer(ours), log_normalizer(theirs)
        weights = np.exp(theirs - their[:, None].astype(np.float32))
        difference = np.multiply(weights, theirs - ours).sum(axis=1, dtype=np.float64)
        total += float((difference / weights.sum(axis=1, dtype=np.float64) - (their - own)).sum())
    return total


def _perplexity(out: np.ndarray, _: np.ndarray | None, sample: Sample) -> Pair:
    rows, targets = scored(out, sample)
    return negative_log_likelihood(rows, targets), len(targets)


def _bits_per_byte(out: np.ndarray, _: np.ndarray | None, sample: Sample) -> Pair:
    return negative_log_likelihood(*scored(out, sample)) / math.log(2), sample.bytes


def _kl(out: np.ndarray, reference: np.ndarray | None, sample: Sample) -> Pair:
    assert reference is not None
    ours, theirs = scored(out, sample)[0], scored(reference, sample)[0]
    return divergence(ours, theirs), len(ours)


def _top1(out: np.ndarray, reference: np.ndarray | None, sample: Sample) -> Pair:
    assert reference is not None
    rows, originals = scored(out, sample)[0], scored(reference, sample)[0]
    ours, theirs = rows.argmax(axis=1), originals.argmax(axis=1)
    peaks = rows[np.arange(len(ours)), ours], originals[np.arange(len(theirs)), theirs]
    if not np.isfinite(peaks).all():  # argmax would call NaN the largest, and two broken models agree
        return math.nan, 1.0
    return float((ours == theirs).sum()), len(ours)


def _cosine(out: np.ndarray, reference: np.ndarray | None, _: Sample) -> Pair:
    assert reference is not None
    return cosine(out, reference), 1.0


def _accuracy(out: np.ndarray, _: np.ndarray | None, sample: Sample) -> Pair:
    found = predicted(out)
    return (float(found == sample.label) if math.isfinite(found) else math.nan), 1.0


def _token_accuracy(out: np.ndarray, _: np.ndarray | None, sample: Sample) -> Pair:
    rows, targets = scored(out, sample)
    return (float((rows.argmax(axis=1) == targets).sum()) if np.isfinite(rows).all() else math.nan), len(targets)


def _chosen(answers: Sequence[np.ndarray], sample: Sample, per_byte: bool) -> Pair:
    likelihoods = []
    for out, choice in zip(answers, sample.parts, strict=True):
        likelihoods.append(-negative_log_likelihood(*scored(out, choice)) / (choice.bytes if per_byte else 1))
    found = predicted(np.array(likelihoods))
    return (float(found == sample.label) if math.isfinite(found) else math.nan), 1.0


def _choice(answers: Sequence[np.ndarray], _: Any, sample: Sample) -> Pair:
    return _chosen(answers, sample, per_byte=False)


def _choice_per_byte(answers: Sequence[np.ndarray], _: Any, sample: Sample) -> Pair:
    return _chosen(answers, sample, per_byte=True)


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


SHARE = "share of samples"
_MEANS = (
    Metric("perplexity", ("logits",), "lower", False, "", _perplexity, _exp),
    Metric("bits_per_byte", ("logits",), "lower", False, "bits a byte", _bits_per_byte),
    Metric("kl", (*CHOICES, "number"), "lower", True, "nats a token or sample", _kl),
    Metric("top1", CHOICES, "higher", True, "share of tokens or samples", _top1),
    Metric("cosine", ("embedding",), "higher", True, "", _cosine),
    Metric("masked_loss", ("token_logits",), "lower", False, "nats a masked token", _perplexity),
    Metric("accuracy", ("classes",), "higher", False, SHARE, _accuracy, needs="label"),
    Metric("token_accuracy", ("token_classes",), "higher", False, "share of tokens", _token_accuracy, needs="tags"),
    Metric("choice_accuracy", ("logits",), "higher", False, SHARE, _choice, float, "choices", True),
    Metric("choice_accuracy_per_byte", ("logits",), "higher", False, SHARE, _choice_per_byte, float, "choices", True),
)
METRICS: dict[str, Metric | Reduction] = {metric.name: metric for metric in (*_MEANS, *REDUCTIONS)}

ALWAYS = {"parameters": "", "bytes": "bytes", "latency_ms": "ms"}
"""Measured of everything, lower is better: name → unit."""


def nearest(name: str, known: Sequence[str]) -> str:
    """`Did you mean …?`, or nothing."""
    found = difflib.get_close_matches(name, known, 1)
    return f"Did you mean {found[0]}?" if found else ""


def check_metrics(
    names: Sequence[str], output: Output | None = None, place: str = "metrics"
) -> list[Metric | Reduction]:
    """The metrics of these names, which must read the output (any if None).

    Raises:
        RecipeError: an unknown name, or a metric for another kind of model.
    """
    for name in names:
        if name not in METRICS:
            raise RecipeError(place, repr(name), f"one of {', '.join(METRICS)}", nearest(name, list(METRICS)))
        if output is not None and output not in METRICS[name].outputs:
            fit = ", ".join(m.name for m in METRICS.values() if output in m.outputs)
            raise RecipeError(
                place,
                f"{name!r}, which reads {' or '.join(METRICS[name].outputs)}",
                f"metrics for a model that gives {output}: {fit}",
            )
    return [METRICS[name] for name in names]
