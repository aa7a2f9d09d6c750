"""Metrics over a corpus against formulas written out by hand, and scikit-learn and scipy where they are installed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from tersor.compress.data import Sample
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.evaluate import METRICS, check_metrics, evaluate
from tersor.compress.evaluate.defaults import default_metrics
from tersor.compress.evaluate.reductions import bootstrap, macro_f1, pearson, ranks, spearman


class Answers:
    """A scorer that answers by the first id of a sequence."""

    parameters, bytes = 10, 40

    def __init__(self, output: str, answers: Sequence[np.ndarray]):
        self.output, self.answers = output, [np.asarray(a, np.float32) for a in answers]

    def __call__(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.answers[int(s[0])] for s in sequences]


def classified(labels: Sequence[float | None]) -> list[Sample]:
    return [Sample(np.array([n, 5]), 3, "abc", label) for n, label in enumerate(labels)]


def one_hot(classes: Sequence[int], count: int) -> list[np.ndarray]:
    return list(np.eye(count)[list(classes)])


def test_accuracy_and_macro_f1_by_hand() -> None:
    true, found = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 2]
    scores = evaluate(Answers("classes", one_hot(found, 4)), classified(true), ["accuracy", "macro_f1"])
    assert scores["accuracy"].value == pytest.approx(4 / 6)
    assert scores["accuracy"].each == (1, 1, 0, 1, 0, 1)
    # class 0: 2 of 3 found, 3 guesses; class 1: 1 of 2, 2 guesses; class 2 is right; class 3 occurs nowhere
    assert scores["macro_f1"].value == pytest.approx((4 / 6 + 2 / 4 + 1) / 3)
    assert scores["macro_f1"].low < scores["macro_f1"].value < scores["macro_f1"].high


def test_shuffled_labels_lose_both() -> None:
    draw = np.random.default_rng(0)
    true = draw.integers(0, 4, 400)
    names = ["accuracy", "macro_f1"]
    right = evaluate(Answers("classes", one_hot(true, 4)), classified(true.tolist()), names)
    assert [right[n].value for n in names] == [1.0, 1.0]
    shuffled = evaluate(Answers("classes", one_hot(true, 4)), classified(draw.permutation(true).tolist()), names)
    assert all(0.15 < shuffled[n].value < 0.35 for n in names)


def test_macro_f1_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(1)
    for count in (3, 4, 7):
        rows = draw.integers(0, count, (40, 2)).astype(float)
        rows[rows == 1] = 0  # a class that occurs nowhere
        expected = metrics.f1_score(rows[:, 1], rows[:, 0], average="macro", zero_division=0)
        assert macro_f1(rows) == pytest.approx(expected, abs=1e-12)
        assert macro_f1(rows) != pytest.approx(metrics.f1_score(rows[:, 1], rows[:, 0], average="micro"), abs=1e-6)


def test_equal_values_share_their_rank() -> None:
    assert ranks(np.array([10, 20, 20, 5, 20])).tolist() == [2, 4, 4, 1, 4]
    # d = 0, 0.5, −0.5 with ties in one column: Pearson's r of ranks (1, 2, 3) and (1, 2.5, 2.5)
    assert spearman(np.array([[1.0, 0.1], [2, 0.7], [3, 0.7]])) == pytest.approx(1.5 / math.sqrt(2 * 1.5))
    assert spearman(np.array([[1.0, 1], [2, 8], [3, 27]])) == pytest.approx(1)
    assert pearson(np.array([[1.0, 1], [2, 8], [3, 27]])) < 0.97  # the twin: not a straight line


def test_correlations_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(2)
    for decimals in (0, 1, 8):
        rows = np.round(draw.normal(size=(60, 2)) + draw.normal(size=(60, 1)), decimals)
        assert spearman(rows) == pytest.approx(stats.spearmanr(*rows.T).statistic, abs=1e-12)
        assert pearson(rows) == pytest.approx(stats.pearsonr(*rows.T).statistic, abs=1e-12)


def test_pairs_are_scored_by_the_cosine_of_their_embeddings() -> None:
    angles = np.linspace(0.1, 1.5, 6)
    answers = [row for a in angles for row in ([1.0, 0.0], [3 * math.cos(a), 3 * math.sin(a)])]
    scores = [5.0, 4.0, 4.0, 2.0, 1.0, 0.0]
    samples = [
        Sample(np.array([2 * n, 7]), 1, "a", score, others=(Sample(np.array([2 * n + 1]), 1, "b"),))
        for n, score in enumerate(scores)
    ]
    scorer = Answers("embedding", answers)
    found = evaluate(scorer, samples, ["spearman", "pearson", "cosine"], scorer)
    assert found["pearson"].value == pytest.approx(np.corrcoef(np.cos(angles), scores)[0, 1])
    assert found["spearman"].value == pytest.approx(np.corrcoef(np.arange(6), ranks(-np.array(scores)))[0, 1])
    assert found["cosine"].value == pytest.approx(1)  # with itself, both sentences of every pair
    turned = [Sample(s.ids, 1, "a", 5 - s.label, others=s.others) for s in samples]
    assert evaluate(Answers("embedding", answers), turned, ["spearman"])["spearman"].value == pytest.approx(
        -found["spearman"].value
    )


def test_the_bootstrap_is_seeded_and_covers() -> None:
    draw = np.random.default_rng(3)
    rows = draw.normal(size=(200, 2)) + draw.normal(size=(200, 1))
    low, high = bootstrap(rows, pearson)
    assert (low, high) == bootstrap(rows, pearson)
    z = math.atanh(pearson(rows))  # Fisher's interval, which holds for normal data
    expected = [math.tanh(z - 1.96 / math.sqrt(197)), math.tanh(z + 1.96 / math.sqrt(197))]
    assert [low, high] == pytest.approx(expected, abs=0.03)
    assert bootstrap(np.array([[1.0, 1], [1, 1], [1, 1], [1, 1]]), pearson) == (None, None)


def test_masked_tokens_alone_are_scored() -> None:
    targets = np.array([-1, 2, -1, 0])
    out = np.log(np.array([[0.1, 0.1, 0.8], [0.2, 0.3, 0.5], [0.9, 0.05, 0.05], [0.25, 0.5, 0.25]]))
    sample = Sample(np.array([0, 9, 1, 9]), 4, "text", targets=targets)
    scorer = Answers("token_logits", [out])
    found = evaluate(scorer, [sample], ["masked_loss", "kl", "top1"], Answers("token_logits", [out[::-1]]))
    assert found["masked_loss"].value == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2, rel=1e-6)
    assert found["top1"].value == 0.0  # rows 1 and 3 say 2 and 1, the other model's say 0 and 2
    assert evaluate(scorer, [sample], ["top1", "kl"], scorer)["top1"].value == 1.0


def test_a_choice_is_the_likeliest_and_length_counts() -> None:
    """Two choices behind one context: a short one at 2 nats, a long one of 3 tokens at 1 nat each."""
    base = np.full((4, 3), -30.0)
    short, long = base.copy(), base.copy()
    short[0, 1], short[0, 2] = -2, math.log(1 - math.exp(-2))
    for row in range(3):
        long[row, 1], long[row, 2] = -1, math.log(1 - math.exp(-1))
    first = Sample(np.array([0, 1]), 2, "ab", 0.0, np.array([1, -1]))
    other = Sample(np.array([1, 1, 1, 1]), 12, "b" * 12, targets=np.array([1, 1, 1, -1]))
    scorer = Answers("logits", [short[:2], long])
    names = ["choice_accuracy", "choice_accuracy_per_byte"]

    def values(label: float) -> list[float]:
        sample = Sample(first.ids, 2, "ab", label, first.targets, (other,))
        return [evaluate(scorer, [sample], [n])[n].value for n in names]

    assert values(0.0) == [1.0, 0.0]  # 2 nats against 3; 1 a byte against 0.25
    assert values(1.0) == [0.0, 1.0]


def test_what_samples_lack_is_said() -> None:
    scorer = Answers("classes", one_hot([0, 1], 2))
    with pytest.raises(RecipeError, match="accuracy: found samples without what it reads, expected data with `label`"):
        evaluate(scorer, classified([None, None]), ["accuracy"])
    with pytest.raises(RecipeError, match="`label`, a score, and for embeddings `pair`"):
        evaluate(Answers("embedding", one_hot([0, 1], 2)), classified([1, 2]), ["spearman"])
    with pytest.raises(RecipeError, match="`choices` and `label`"):
        evaluate(Answers("logits", [np.zeros((2, 9))] * 2), classified([1, 0]), ["choice_accuracy"])
    with pytest.raises(RecipeError, match="macro_f1: found a single sample"):
        evaluate(Answers("classes", one_hot([0], 2)), classified([0]), ["macro_f1"])
    pairs = [Sample(np.array([n]), 1, "a", 3.0, others=(Sample(np.array([n]), 1, "b"),)) for n in range(2)]
    with pytest.raises(RecipeError, match="spearman: found samples that are all alike"):
        evaluate(Answers("embedding", [[1, 0], [0, 1]]), pairs, ["spearman"])


def test_numbers_that_are_not_finite_are_refused() -> None:
    broken = [np.array([math.nan, 1.0]), np.array([0.0, 1.0])]
    for name in ("accuracy", "macro_f1"):
        with pytest.raises(PreflightError, match=f"{name}: found nan on sample 1"):
            evaluate(Answers("classes", broken), classified([0, 1]), [name])


def test_every_metric_says_what_it_reads() -> None:
    with pytest.raises(RecipeError, match="which reads embedding or number"):
        check_metrics(["spearman"], "classes")
    assert {name for name, metric in METRICS.items() if metric.needs} == {
        "accuracy", "token_accuracy", "macro_f1", "spearman", "pearson", "choice_accuracy", "choice_accuracy_per_byte",
    }  # fmt: skip
    for output in ("logits", "embedding", "classes"):
        labelled, plain = default_metrics(output, classified([1.0])), default_metrics(output, classified([None]))
        assert any(METRICS[name].needs for name in labelled)
        assert not any(METRICS[name].needs for name in plain)
        assert check_metrics([*labelled, *plain], output)
    assert default_metrics("logits", []) == ()
