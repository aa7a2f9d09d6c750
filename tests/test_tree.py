"""Answers over one shared context in one row are the answers alone; without the mask they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.compress.data import Sample
from tersor.compress.evaluate import evaluate
from tersor.compress.evaluate import torch_scorer as module
from tersor.compress.evaluate.torch_scorer import TorchScorer
from tersor.compress.evaluate.tree import Tree, sees_everything, trees


def question(context: int, answers: list[int], seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    shared = draw.integers(4, 90, context)
    return [np.concatenate([shared, [10 + n], draw.integers(4, 90, length - 1)]) for n, length in enumerate(answers)]


def alone(scorer: TorchScorer, sequences: list[np.ndarray]) -> list[np.ndarray]:
    return [scorer([sequence])[0] for sequence in sequences]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "qwen2", "phi", "mixtral"])
def test_a_tree_equals_each_alone_and_a_plain_row_does_not(
    model_type: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = TorchScorer(tiny(model_type))
    sequences = [*question(12, [5, 3, 8, 1]), *question(20, [2, 7], seed=1), np.arange(4, 30)]
    assert [len(t.sequences) for t in trees(sequences)] == [4, 2, 1]
    want, got = alone(scorer, sequences), scorer(sequences)
    largest = max(float(np.abs(w).max()) for w in want)
    assert [g.shape for g in got] == [w.shape for w in want]
    assert max(float(np.abs(g - w).max()) for g, w in zip(got, want, strict=True)) <= 2e-6 * max(1.0, largest)
    # the twin: causal alone, an answer sees those before it
    monkeypatch.setattr(Tree, "mask", property(lambda tree: np.tri(len(tree), dtype=bool)))
    leaking = scorer(sequences)
    assert np.abs(leaking[0] - want[0]).max() <= 2e-6 * max(1.0, largest)
    assert np.abs(leaking[1] - want[1]).max() > 1e-2


def test_positions_that_run_on_would_be_wrong(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, sequences = TorchScorer(tiny("llama")), question(12, [5, 3])
    want = alone(scorer, sequences)
    monkeypatch.setattr(Tree, "positions", property(lambda tree: np.arange(len(tree))))
    assert np.abs(scorer(sequences)[1] - want[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("model_type", "variant", "whole"),
    [("mistral", "windowed", False), ("mistral", "", True), ("qwen2", "windowed", False), ("gemma2", "", False)],
)
def test_a_model_with_a_window_is_asked_one_by_one(model_type: str, variant: str, whole: bool, tiny: Any) -> None:
    checkpoint = tiny(model_type, variant=variant)
    assert sees_everything(checkpoint.config) == whole
    scorer, sequences = TorchScorer(checkpoint), question(12, [5, 3])
    for got, want in zip(scorer(sequences), alone(scorer, sequences), strict=True):
        assert np.abs(got - want).max() < 2e-5


def test_the_evaluator_asks_a_questions_context_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, samples = TorchScorer(tiny("llama")), []
    for seed in range(6):
        parts = []
        for ids in question(16, [4, 4, 6], seed):
            targets = np.full(len(ids), -1, np.int64)
            targets[15:-1] = ids[16:]
            parts.append(Sample(ids, len(ids) - 16, "", targets=targets))
        samples.append(replace(parts[0], label=float(seed % 3), others=tuple(parts[1:])))
    fed: list[int] = []
    model = scorer._model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **asked: fed.append(asked["input_ids"].numel()) or forward(**asked))
    one = evaluate(scorer, samples, ["choice_accuracy", "choice_accuracy_per_byte"])
    shared = sum(fed)
    fed.clear()
    monkeypatch.setattr(module, "trees", lambda sequences: [Tree((s,), len(s)) for s in sequences])
    assert evaluate(scorer, samples, ["choice_accuracy", "choice_accuracy_per_byte"]) == one
    assert shared < 0.6 * sum(fed)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), max_size=12))
def test_trees_lose_nothing_and_reorder_nothing(lists: list[list[int]]) -> None:
    """Words of two letters, so that much is shared; a row's own ids stand for its answer."""
    sequences = [np.array(one, np.int64) for one in lists]
    found = trees(sequences)
    given = [s for tree in found for s in tree.split(tree.ids)]
    assert [s.tolist() for s in given] == lists
    for tree in found:
        assert len(tree) == len(tree.ids) == len(tree.positions) <= sum(map(len, tree.sequences))
        for sequence, places in zip(tree.sequences, tree.split(tree.positions), strict=True):
            assert places.tolist() == list(range(len(sequence)))
            assert 2 * tree.shared >= len(sequence)
        for end, row in zip(tree.positions, tree.mask, strict=True):
            assert tree.positions[row].tolist() == list(range(end + 1))
