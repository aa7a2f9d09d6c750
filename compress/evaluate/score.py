"""Running metrics over samples, with an interval, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from ..data import Sample
from ..errors import PreflightError, RecipeError
from .metrics import Metric, check_metrics
from .scorer import Scorer

VALUES = 1 << 24  # numbers of the answers held at once: 64 MiB for a model, as much for its reference
TOKENS = 1 << 14  # of a chunk, so that a progress bar moves on small answers too


@dataclass(frozen=True)
class Score:
    """A measured value.

    Attributes:
        value: the metric over all samples.
        low: lower end of the 95 % interval, None from a single sample.
        high: upper end.
        samples: how many samples were scored.
        each: the metric of every sample alone, in their order; NaN where there is nothing to predict.
    """

    value: float
    low: float | None
    high: float | None
    samples: int
    each: tuple[float, ...] = field(default=(), repr=False, compare=False)


def evaluate(
    scorer: Scorer,
    samples: Sequence[Sample],
    metrics: Sequence[str],
    reference: Scorer | None = None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _label: items,
) -> dict[str, Score]:
    """Score `scorer` on the samples.

    A value is finish(R), R = Σ sums / Σ weights over samples. Its 95 % interval is the delta method's for a
    ratio: with residuals r_i = sum_i − R·weight_i, se(R) = sqrt(n/(n−1)·Σ r_i²) / Σ weights, R ± t·se with
    Student's t for n − 1 degrees of freedom, both ends through `finish`. It speaks of the choice of text:
    samples count as drawn independently, which neighbouring windows of one document are only roughly.

    Args:
        scorer: what is measured.
        samples: at least one.
        metrics: names; empty is allowed.
        reference: the original, for metrics that compare with it.
        track: wraps the chunks in a progress bar.

    Raises:
        RecipeError: an unknown metric, one for another kind of output, no reference, or nothing to predict.
        PreflightError: an answer that is not finite.
    """
    wanted = check_metrics(metrics, scorer.output)
    lacking = [metric.name for metric in wanted if metric.needs_reference and reference is None]
    if lacking:
        raise RecipeError("metrics", f"{lacking[0]!r} without an original to compare with", "a reference")
    compared = any(metric.needs_reference for metric in wanted)
    pairs = np.zeros((len(wanted), len(samples), 2))
    if wanted:
        for chunk in track(list(_chunks(scorer, samples)), "evaluate"):
            ids = [samples[i].ids for i in chunk]
            answers = scorer(ids)
            if not compared or reference is None:
                originals: Sequence[np.ndarray | None] = [None] * len(chunk)
            else:
                originals = answers if reference is scorer else reference(ids)
            for index, answer, original in zip(chunk, answers, originals, strict=True):
                for row, metric in enumerate(wanted):
                    pairs[row, index] = _measure(metric, answer, original, samples[index], index)
    return {metric.name: summarize(metric, pairs[row]) for row, metric in enumerate(wanted)}


def summarize(metric: Metric, pairs: np.ndarray) -> Score:
    """The score from float64 `[samples, 2]` sums and weights."""
    sums, weights = pairs[:, 0], pairs[:, 1]
    count, total = len(pairs), math.fsum(weights)
    if total <= 0:
        raise RecipeError(
            f"metrics: {metric.name}", "samples with nothing to predict", "more text or another metric"
        )
    ratio = math.fsum(sums) / total
    value = metric.finish(ratio)
    each = tuple(metric.finish(s / w) if w > 0 else math.nan for s, w in pairs.tolist())
    if count == 1:
        return Score(value, None, None, 1, each)
    residuals = sums - ratio * weights
    half = student(count - 1) * math.sqrt(count / (count - 1) * math.fsum(residuals**2)) / total
    low, high = sorted((metric.finish(ratio - half), metric.finish(ratio + half)))
    return Score(value, low, high, count, each)


def student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t."""
    if degrees == 1:
        return 12.706204736
    if degrees == 2:
        return 4.30265273
    z = NormalDist().inv_cdf(0.975)
    # Cornish-Fisher in powers of 1/degrees (Abramowitz and Stegun 26.7.5), within 0.5 % from 3 degrees on
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def _measure(
    metric: Metric, answer: np.ndarray, original: np.ndarray | None, sample: Sample, index: int
) -> tuple[float, float]:
    if original is not None and metric.needs_reference and answer.shape != original.shape:
        raise RecipeError(
            f"metrics: {metric.name}",
            f"answers {list(answer.shape)} beside the original's {list(original.shape)}",
            "one shape",
        )
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        pair = metric.sample(answer, original, sample)
    if not all(map(math.isfinite, pair)):
        raise PreflightError(
            f"metrics: {metric.name}",
            f"{pair[0]} on sample {index + 1}",
            "a finite number",
            "The model's answer holds NaN or infinity.",
        )
    return pair


def _chunks(scorer: Scorer, samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Indices of samples, longest first, so many at a time that VALUES and TOKENS hold, or one."""
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i].ids), i))
    if not order:
        return
    longest = samples[order[0]].ids
    values = scorer([longest])[0].size  # answers of the others are no larger
    step = max(1, min(VALUES // values, TOKENS // len(longest)))
    for start in range(0, len(order), step):
        yield order[start : start + step]
