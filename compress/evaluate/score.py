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
from .reductions import Reduction, bootstrap
from .scorer import Output, Scorer

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
        each: the metric of every sample alone, in their order; NaN where there is nothing to predict, or where a
            sample alone has no value (correlations).
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
    samples count as drawn independently, which neighbouring windows of one document are only roughly. Metrics
    that are no mean over samples have the bootstrap's interval (reductions.py). A mean adds up all parts of a
    sample: both sentences of a pair, every choice.

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
    for metric in wanted:
        check_needs(metric, samples, scorer.output)
    compared = any(metric.needs_reference for metric in wanted)
    rows: list[list[Sequence[float]]] = [[()] * len(samples) for _ in wanted]
    if wanted:
        for chunk in track(list(_chunks(scorer, samples)), "evaluate"):
            asked = [part.input for i in chunk for part in samples[i].parts]
            answers = scorer(asked)
            if not compared or reference is None:
                originals: Sequence[np.ndarray | None] = [None] * len(asked)
            else:
                originals = answers if reference is scorer else reference(asked)
            first = 0
            for index in chunk:
                last = first + len(samples[index].parts)
                for found, metric in zip(rows, wanted, strict=True):
                    found[index] = _measure(metric, answers[first:last], originals[first:last], samples[index], index)
                first = last
    scores = {}
    for found, metric in zip(rows, wanted, strict=True):
        numbers = np.array(found, np.float64).reshape(len(samples), -1) if samples else np.zeros((0, 2))
        scores[metric.name] = summarize(metric, numbers) if isinstance(metric, Metric) else _reduced(metric, numbers)
    return scores


NEEDS = {
    "label": "data with `label`",
    "score": "data with `label`, a score, and for embeddings `pair`, two fields of text",
    "choices": "data with `choices` and `label`, the number of the right one",
    "tags": "data whose `field` is a list of words and whose `label` is a list of their classes",
}


def check_needs(metric: Metric | Reduction, samples: Sequence[Sample], output: Output) -> None:
    """Refuse samples that lack what the metric reads.

    Raises:
        RecipeError: no label, no second text of a pair, no choices, no tags.
    """
    for sample in samples if metric.needs else ():
        has = {
            "label": sample.label is not None,
            "score": sample.label is not None and len(sample.parts) == (1 if output == "number" else 2),
            "choices": sample.label is not None and len(sample.parts) > 1,
            "tags": sample.targets is not None and bool((sample.targets >= 0).any()),
        }
        if not has[metric.needs]:
            raise RecipeError(f"metrics: {metric.name}", "samples without what it reads", NEEDS[metric.needs])


def _reduced(metric: Reduction, rows: np.ndarray) -> Score:
    value = metric.reduce(rows) if len(rows) > 1 else math.nan
    if not math.isfinite(value):
        what = "a single sample" if len(rows) == 1 else "samples that are all alike"
        raise RecipeError(f"metrics: {metric.name}", what, "labels and answers that differ")
    low, high = bootstrap(rows, metric.reduce)
    return Score(value, low, high, len(rows), (math.nan,) * len(rows))


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
    metric: Metric | Reduction,
    answers: Sequence[np.ndarray],
    originals: Sequence[np.ndarray | None],
    sample: Sample,
    index: int,
) -> Sequence[float]:
    """One sample's numbers: a sum and a weight, or a reduction's row."""
    for answer, original in zip(answers, originals, strict=True):
        if original is not None and metric.needs_reference and answer.shape != original.shape:
            raise RecipeError(
                f"metrics: {metric.name}",
                f"answers {list(answer.shape)} beside the original's {list(original.shape)}",
                "one shape",
            )
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if isinstance(metric, Reduction):
            numbers = metric.row(answers, sample)
        elif metric.whole:
            numbers = metric.sample(answers, originals, sample)
        else:
            each = map(metric.sample, answers, originals, sample.parts)
            numbers = [math.fsum(column) for column in zip(*each, strict=True)]
    if not all(map(math.isfinite, numbers)):
        raise PreflightError(
            f"metrics: {metric.name}",
            f"{numbers[0]} on sample {index + 1}",
            "a finite number",
            "The model's answer holds NaN or infinity.",
        )
    return numbers


def _chunks(scorer: Scorer, samples: Sequence[Sample]) -> Iterator[list[int]]:
    """Indices of samples, longest first, so many at a time that VALUES and TOKENS hold, or one."""
    sizes = [sum(part.ids.size for part in sample.parts) for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: (-sizes[i], i))
    if not order:
        return
    longest = samples[order[0]]
    answer = scorer([max((part.input for part in longest.parts), key=len)])[0].size  # the others' are no larger
    step = VALUES // max(answer * len(longest.parts), 1)
    step = min(step, TOKENS // sizes[order[0]] if longest.ids.ndim == 1 else VALUES // sizes[order[0]])
    for start in range(0, len(order), max(1, step)):
        yield order[start : start + max(1, step)]
