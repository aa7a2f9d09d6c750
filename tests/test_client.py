"""The client: answers in arrival order, refusals by name, threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.compress.errors import PreflightError, RecipeError
from tersor.export.client import Client
from tersor.export.onnx import Onnx


@pytest.fixture(scope="module")
def artifacts(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoder packed and padded, decoder packed."""
    made = {}
    for name, model_type, inputs in (
        ("encoder", "bert", "packed"),
        ("padded", "bert", "padded"),
        ("decoder", "llama", "packed"),
        ("static", "bert", "packed-static"),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        Onnx(inputs=inputs).write(tiny(model_type), made[name], [])  # type: ignore[arg-type]
    return made


def sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 100, n) for n in lengths]


@pytest.mark.parametrize("name", ["encoder", "padded", "decoder", "static"])
@pytest.mark.parametrize("budget", [1, 16, 1024])
def test_answers_come_in_arrival_order_whatever_the_calls(
    name: str, budget: int, artifacts: dict[str, Path]
) -> None:
    client = Client(artifacts[name], threads=1, tokens_per_call=budget)
    ids = sequences([5, 1, 30, 2, 17, 9, 64, 3])
    got = client(ids)
    shapes = [(len(i), 100) if name == "decoder" else (48,) for i in ids]
    assert [g.shape for g in got] == shapes
    for one, answer in zip(ids, got, strict=True):
        assert np.abs(client([one])[0] - answer).max() < 2e-5
    order = [3, 7, 0, 6, 2, 1, 5, 4]
    for number, answer in zip(order, client([ids[n] for n in order]), strict=True):
        assert np.abs(answer - got[number]).max() < 2e-5
    assert np.abs(got[0][-1] - got[4][-1]).max() > 1e-3


def test_a_stream_answers_in_order_and_reads_no_further_than_its_call(artifacts: dict[str, Path]) -> None:
    client = Client(artifacts["encoder"], threads=1, tokens_per_call=16)
    ids, read = sequences([5, 9, 7, 3, 16, 2, 40, 1]), 0

    def supply() -> Iterator[np.ndarray]:
        nonlocal read
        for one in ids:
            read += 1
            yield one

    answers = client.stream(supply())
    first = next(answers)
    assert read == 3  # the third is what no longer fits
    for got, want in zip([first, *answers], client(ids), strict=True):
        assert np.abs(got - want).max() < 2e-5
    assert list(client.stream(iter(()))) == []
    with pytest.raises(RecipeError, match="sequence 2: found no tokens"):
        list(client.stream([ids[0], ids[1], np.array([], np.int64)]))


def test_no_sequences_no_answers(artifacts: dict[str, Path]) -> None:
    assert Client(artifacts["encoder"], threads=1)([]) == []


def test_every_sequence_is_in_one_call_that_keeps_to_its_budget(artifacts: dict[str, Path]) -> None:
    lengths = [5, 1, 30, 2, 17, 9, 64, 3]
    for name in ("encoder", "padded", "static"):
        client = Client(artifacts[name], threads=1, tokens_per_call=32)
        calls = list(client.plan(lengths))
        assert sorted(n for rows in calls for row in rows for n in row) == list(range(len(lengths)))
        for rows in calls:
            tokens = sum(lengths[n] for row in rows for n in row)
            assert tokens <= 32 or name == "static" or [n for row in rows for n in row] == [6]
    assert [len(calls) for calls in (list(Client(artifacts["static"], threads=1).plan([60] * 21)),)] == [2]


@pytest.fixture(scope="module")
def known(artifacts: dict[str, Path]) -> tuple[list[np.ndarray], np.ndarray]:
    """Twelve sequences and the embedding of each alone."""
    ids = sequences([1, 2, 3, 5, 8, 13, 21, 31, 33, 40, 63, 64])
    client = Client(artifacts["encoder"], threads=1)
    return ids, np.stack([client([i])[0] for i in ids])


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_arrangement_gives_each_sequence_its_own_answer(
    data: st.DataObject, artifacts: dict[str, Path], known: tuple[list[np.ndarray], np.ndarray]
) -> None:
    """Rows, gaps before, between and behind, numbers that skip: nothing lost, nothing reordered."""
    ids, alone = known
    global_client = CLIENTS.setdefault(str(artifacts["encoder"]), Client(artifacts["encoder"], threads=1))
    rows = data.draw(st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=6), min_size=1, max_size=4))
    laid = []
    for row in rows:
        tokens, numbers, number = (
            [],
            [],
            1,
        )  # a gap before segment 1 would move its positions, as in the stock model
        for place, sequence in enumerate(row):
            number += data.draw(st.integers(1, 3)) if place else 0
            gap = data.draw(st.integers(0, 3)) if place else 0
            tokens += [0] * gap + ids[sequence].tolist()
            numbers += [0] * gap + [number] * len(ids[sequence])
        laid.append((tokens, numbers))
    width = max(len(t) for t, _ in laid) + data.draw(st.integers(0, 3))
    feed = {
        "input_ids": np.array([t + [0] * (width - len(t)) for t, _ in laid], np.int64),
        "attention_mask": np.array([n + [0] * (width - len(n)) for _, n in laid], np.int64),
    }
    feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    (got,) = global_client.session.run(["sentence_embedding"], feed)
    want = alone[[sequence for row in rows for sequence in row]]
    assert got.shape == want.shape
    assert np.abs(got - want).max() < 2e-5


CLIENTS: dict[str, Client] = {}


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([], "sequence 1: found no tokens"),
        ([1] * 65, "sequence 1: found 65 tokens, expected at most 64"),
        ([1, 100], "sequence 1: found token id 100, expected ids from 0 to 99"),
        ([1, -1], "sequence 1: found token id -1"),
        ([0.5], "whole numbers"),
        ([[1, 2]], "one dimension"),
    ],
)
def test_what_cannot_run_is_refused_by_name(sequence: Any, message: str, artifacts: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=message):
        Client(artifacts["encoder"], threads=1)([np.array([1, 2]), np.array(sequence)])


def test_it_is_a_scorer(artifacts: dict[str, Path], tiny: Any) -> None:
    for name, output, model_type in (("encoder", "embedding", "bert"), ("decoder", "logits", "llama")):
        client = Onnx().open(artifacts[name], threads=1)
        assert client.output == output
        assert client.parameters == tiny(model_type).layout.parameters
        assert client.bytes == (artifacts[name] / "model.onnx").stat().st_size
        assert client(sequences([4]))[0].dtype == np.float32


def test_states_of_every_token_can_be_asked_for(artifacts: dict[str, Path]) -> None:
    client = Client(artifacts["encoder"], threads=1)
    ids = sequences([4, 9])
    states = client.ask(ids, "last_hidden_state")
    assert [s.shape for s in states] == [(4, 48), (9, 48)]
    assert np.abs(states[1].mean(0) - client(ids)[1]).max() < 2e-5


def test_texts_go_through_the_artifacts_own_tokenizer(artifacts: dict[str, Path], tokenizer: Any) -> None:
    client = Client(artifacts["encoder"], threads=1)
    texts = ["some words", "x", "other words, more of them"]
    want = client([np.array(tokenizer(t)["input_ids"]) for t in texts])
    for got, expected in zip(client.texts(texts), want, strict=True):
        assert np.array_equal(got, expected)
    with pytest.raises(RecipeError, match="at most 64"):
        client.texts(["x" * 100])
    assert np.array_equal(client.texts(["x" * 100], truncate=True)[0], client.texts(["x" * 64])[0])


def test_many_threads_share_a_client(artifacts: dict[str, Path]) -> None:
    client = Client(artifacts["encoder"], threads=1)
    batches = [sequences([7, 3, 12], seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(client, batches))
    for batch, answers in zip(batches, together, strict=True):
        for one, two in zip(client(batch), answers, strict=True):
            assert np.array_equal(one, two)


def test_a_broken_graph_is_one_clear_error(artifacts: dict[str, Path], tmp_path: Path) -> None:
    for file in artifacts["encoder"].iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(
                file.read_bytes()[:1000] if file.suffix == ".onnx" else file.read_bytes()
            )
    with pytest.raises(PreflightError, match="does not load"):
        Client(tmp_path)
    with pytest.raises(RecipeError, match="at least 1"):
        Client(artifacts["encoder"], tokens_per_call=0)
