"""Answers over one shared context in one row are the answers alone, in torch and a packed artifact; otherwise not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.compress.data import Sample
from tersor.compress.errors import ParityMissed
from tersor.compress.evaluate import evaluate
from tersor.compress.evaluate import torch_scorer as module
from tersor.compress.evaluate.torch_scorer import TorchScorer
from tersor.compress.evaluate.tree import Tree, sees_everything, trees
from tersor.export.client import Client
from tersor.export.onnx import Onnx

MODELS = ["llama", "gpt2", "opt", "phi", "mixtral"]
NUMBERS = Tree.numbers
KNOWN: dict[bytes, np.ndarray] = {}
"""Answers of the artifact under test to short sequences alone."""


def question(context: int, answers: list[int], seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    shared = draw.integers(4, 90, context)
    return [np.concatenate([shared, [10 + n], draw.integers(4, 90, length - 1)]) for n, length in enumerate(answers)]


def choices(count: int = 6) -> list[Sample]:
    """Questions with three answers."""
    samples = []
    for seed in range(count):
        parts = []
        for ids in question(16, [4, 4, 6], seed):
            targets = np.full(len(ids), -1, np.int64)
            targets[15:-1] = ids[16:]
            parts.append(Sample(ids, len(ids) - 16, "", targets=targets))
        samples.append(replace(parts[0], label=float(seed % 3), others=tuple(parts[1:])))
    return samples


def alone(scorer: Any, sequences: list[np.ndarray]) -> list[np.ndarray]:
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
    scorer, samples = TorchScorer(tiny("llama")), choices()
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


# --- in an artifact ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifacts(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`artifacts(model_type, variant, **options) -> Client`, each exported once."""
    done: dict[Any, Client] = {}

    def make(model_type: str, variant: str = "", **options: Any) -> Client:
        key = (model_type, variant, *options.items())
        if key not in done:
            directory = tmp_path_factory.mktemp(model_type)
            Onnx(**options).write(tiny(model_type, variant=variant), directory, [])
            done[key] = Client(directory, threads=1)
        return done[key]

    return make


def apart(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    assert [g.shape for g in got] == [w.shape for w in want]
    return max(float(np.abs(g - w).max()) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("model_type", MODELS)
def test_a_tree_in_an_artifact_equals_each_alone_and_other_numbers_do_not(
    model_type: str, artifacts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = artifacts(model_type)
    assert client.artifact.trees
    sequences = [*question(12, [5, 3, 8, 1]), np.arange(4, 30), *question(20, [2, 7], seed=1)]
    assert [len(t.sequences) for t in trees(sequences)] == [4, 1, 2]
    want = alone(client, sequences)
    largest = max(1.0, *(float(np.abs(w).max()) for w in want))
    assert apart(client(sequences), want) <= 4e-6 * largest
    # twins: answers behind each other in one segment see each other; as segments of their own they see no context
    one = lambda tree, first: np.full(len(tree), first)  # noqa: E731
    for numbers in (one, lambda tree, first: np.abs(NUMBERS(tree, first))):
        monkeypatch.setattr(Tree, "numbers", numbers)
        assert apart(client(sequences), want) > 1e-2


def test_parity_notices_answers_that_see_each_other(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tree, "numbers", lambda tree, first: np.full(len(tree), first))
    with pytest.raises(ParityMissed, match="parity of logits"):
        Onnx().write(tiny("llama"), tmp_path, [])


def test_int8_answers_are_free_of_their_neighbours_too(artifacts: Any) -> None:
    client = artifacts("llama", precision="int8")
    sequences = question(12, [5, 3, 8, 1])
    assert apart(client(sequences), alone(client, sequences)) < 2e-5


@pytest.mark.parametrize(
    ("model_type", "variant", "options"),
    [("mistral", "windowed", {}), ("llama", "", {"inputs": "padded"}), ("llama", "", {"inputs": "packed-static"})],
)
def test_what_does_not_know_trees_is_asked_one_by_one(
    model_type: str, variant: str, options: Any, artifacts: Any
) -> None:
    client = artifacts(model_type, variant, **options)
    assert not client.artifact.trees
    sequences = question(12, [5, 3])
    assert apart(client(sequences), alone(client, sequences)) < 2e-5


@pytest.mark.parametrize("row", [[-1, -1, -1], [-1, 2, 2], [1, -3, -2], [2, -1, 0]])
def test_a_branch_without_a_root_before_it_fails_rather_than_answers(row: list[int], artifacts: Any) -> None:
    feed = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.array([row])}
    with pytest.raises(Exception, match=r"out of data bounds|out of bounds"):
        artifacts("llama").session.run(None, feed)


def test_a_root_in_another_row_is_none(artifacts: Any) -> None:
    feed = {"input_ids": np.array([[5, 6], [7, 8]]), "attention_mask": np.array([[1, 1], [-1, -1]])}
    with pytest.raises(Exception, match=r"out of data bounds"):
        artifacts("llama").session.run(None, feed)


def test_the_evaluator_asks_an_artifact_for_a_context_once(artifacts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, samples, fed = artifacts("llama"), choices(), []
    feed = Client.feed

    def counted(self: Client, rows: Any, sequences: Any) -> Any:
        made, spans = feed(self, rows, sequences)
        fed.append(made["input_ids"].size)
        return made, spans

    monkeypatch.setattr(Client, "feed", counted)
    names = ["choice_accuracy", "choice_accuracy_per_byte", "perplexity"]
    shared = evaluate(client, samples, names)
    few = sum(fed)
    fed.clear()
    monkeypatch.setattr("tersor.export.client.trees", lambda sequences: [Tree((s,), len(s)) for s in sequences])
    plain = evaluate(client, samples, names)
    assert shared["choice_accuracy"] == plain["choice_accuracy"]
    assert shared["perplexity"].value == pytest.approx(plain["perplexity"].value, rel=1e-5)
    assert few < 0.6 * sum(fed)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lists=st.lists(st.lists(st.integers(4, 5), min_size=1, max_size=8), min_size=1, max_size=8),
    budget=st.integers(1, 40),
)
def test_any_sequences_in_any_calls_answer_as_alone(lists: list[list[int]], budget: int, artifacts: Any) -> None:
    """Words of two letters, so that much is shared."""
    client = artifacts("llama")
    sequences = [np.array(one, np.int64) for one in lists]
    for one in sequences:
        if one.tobytes() not in KNOWN:
            KNOWN[one.tobytes()] = client([one])[0]
    before, client.tokens_per_call = client.tokens_per_call, budget
    try:
        assert apart(client(sequences), [KNOWN[one.tobytes()] for one in sequences]) < 2e-5
    finally:
        client.tokens_per_call = before


def test_the_manifest_and_readme_say_it(artifacts: Any) -> None:
    directory: Path = artifacts("llama").artifact.directory
    assert "goes on from the last positive" in (directory / "README.md").read_text("utf-8")
    assert "goes on" not in (artifacts("mistral", "windowed").artifact.directory / "README.md").read_text("utf-8")
