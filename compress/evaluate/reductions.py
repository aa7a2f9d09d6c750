"""Metrics over a whole corpus: what is no mean over samples, with an interval by the bootstrap.

Each sample leaves one row of numbers (a predicted and a true class, a cosine and a score); the value is a function of
all rows. Its interval draws the samples again, with replacement, from a seeded generator and takes the 2.5 % and
97.5 % quantiles of the values (the percentile bootstrap, Efron 1979). Draws that leave no value, such as labels that
are all alike, are passed over.

Macro-F1 is scikit-learn's with `zero_division=0`: the mean of 2·TP / (2·TP + FP + FN) over the classes that occur among
labels or predictions. Spearman's ρ is Pearson's r of ranks, equal values sharing the mean of theirs, as in scipy.
All in float64: the rows are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..data import Sample
from .scorer import Output

Needs = Literal["", "label", "score", "choices", "tags"]
DRAWS = 1000
SEED = 0


@dataclass(frozen=True)
class Reduction:
    """A metric that is no mean over samples: a function of one row of numbers from each.

    Attributes:
        name: the recipe's word.
        outputs: the kinds of answer it reads.
        better: whether lower or higher values are better.
        unit: for people.
        row: (answers to all parts, sample) → the numbers that count, as many for each sample.
        reduce: float64 `[samples, numbers]` → the value; NaN where it has none (all labels alike).
        needs: what the data must bring beside text or images.
        needs_reference: whether it compares with the original's answer; none does.
    """

    name: str
    outputs: tuple[Output, ...]
    better: Literal["lower", "higher"]
    unit: str
    row: Callable[[Sequence[np.ndarray], Sample], Sequence[float]]
    reduce: Callable[[np.ndarray], float]
    needs: Needs = "label"
    needs_reference: bool = False


def bootstrap(rows: np.ndarray, reduce: Callable[[np.ndarray], float]) -> tuple[float | None, float | None]:
    """The 95 % interval of `reduce(rows)`; None where fewer than half of the draws have a value."""
    generator = np.random.default_rng(SEED)
    drawn = (reduce(rows[generator.integers(0, len(rows), len(rows))]) for _ in range(DRAWS))
    values = [value for value in drawn if math.isfinite(value)]
    if len(values) < DRAWS / 2:
        return None, None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two vectors, in float64; NaN if one is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norms) if norms else math.nan


def predicted(out: np.ndarray) -> float:
    """The largest entry's number, the first of equals; NaN if one is not finite."""
    return float(out.argmax()) if np.isfinite(out).all() else math.nan


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, float64 `[n]`; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return found


def pearson(rows: np.ndarray) -> float:
    """Pearson's r of two columns; NaN if one is constant."""
    if (rows == rows[0]).all(axis=0).any():  # exact: the centred column of equal values need not be zero
        return math.nan
    centred = rows - rows.mean(axis=0)
    a, b = centred.T
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def spearman(rows: np.ndarray) -> float:
    """Spearman's ρ of two columns; NaN if one is constant."""
    return pearson(np.stack([ranks(rows[:, 0]), ranks(rows[:, 1])], axis=1))


def macro_f1(rows: np.ndarray) -> float:
    """Mean F1 over the classes that occur; rows are (predicted, true)."""
    found, true = rows.astype(np.int64).T
    size = int(max(found.max(), true.max())) + 1
    hits = np.bincount(true[found == true], minlength=size)
    total = np.bincount(found, minlength=size) + np.bincount(true, minlength=size)  # 2 TP + FP + FN
    occurs = total > 0
    return float((2 * hits[occurs] / total[occurs]).mean())


def _classes(answers: Sequence[np.ndarray], sample: Sample) -> Sequence[float]:
    return predicted(answers[0]), float(sample.label or 0)


def _similarity(answers: Sequence[np.ndarray], sample: Sample) -> Sequence[float]:
    """Two embeddings' cosine, or the number that the model gives."""
    found = cosine(answers[0], answers[1]) if len(answers) > 1 else float(answers[0][0])
    return found, float(sample.label or 0)


REDUCTIONS = (
    Reduction("macro_f1", ("classes",), "higher", "mean over classes", _classes, macro_f1),
    Reduction("spearman", ("embedding", "number"), "higher", "rank correlation", _similarity, spearman, "score"),
    Reduction("pearson", ("embedding", "number"), "higher", "correlation", _similarity, pearson, "score"),
)
