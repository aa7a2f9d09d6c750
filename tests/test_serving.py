"""The client as docs/serving.md promises it: a handler, threads, and rows that are checked by name."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.compress.errors import RecipeError
from tersor.export.client import Client
from tersor.export.onnx import Onnx
from tersor.export.rows import check

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
VOCAB, LONGEST = 100, 8


@pytest.fixture(scope="module")
def artifact(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("artifact")
    Onnx().write(tiny("bert"), directory, [])
    return directory


def test_the_documented_handler_answers_and_refuses(artifact: Path) -> None:
    from fastapi.testclient import TestClient

    found = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    assert found is not None
    lines = [line for line in found.group(1).splitlines() if line.strip()]
    assert len([line for line in lines if not line.startswith(("from", "import"))]) <= 10
    names: dict[str, Any] = {}
    exec(compile(found.group(1).replace("runs/minilm-packed/onnx", str(artifact)), "serving", "exec"), names)
    browser, texts = TestClient(names["app"]), ["some words", "x"]
    want = names["client"].texts(texts)
    assert np.abs(np.array(browser.post("/embed", json=texts).json()) - np.stack(want)).max() < 2e-5
    refused = browser.post("/embed", json=["x" * 100])
    assert refused.status_code == 422
    assert "sequence 0: found 100 tokens, expected at most 64" in refused.text


def test_threads_are_what_was_asked(artifact: Path) -> None:
    for threads in (1, 2):
        assert Client(artifact, threads=threads).session.get_session_options().intra_op_num_threads == threads


def test_requests_beside_each_other_keep_their_answers_and_errors(artifact: Path) -> None:
    client = Client(artifact, threads=1, tokens_per_call=16)
    asked = [["a b", "c" * n] if n != 7 else ["x" * 100] for n in range(1, 13)]

    def answer(texts: list[str]) -> Any:
        try:
            return client.texts(texts)
        except RecipeError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, asked))
    for texts, got in zip(asked, together, strict=True):
        want = answer(texts)
        assert np.array_equal(got, want) if not isinstance(want, str) else got == want
    assert isinstance(together[6], str)


def test_rows_of_the_callers_own_answer_by_segment(artifact: Path) -> None:
    client = Client(artifact, threads=1)
    ids = np.arange(4, 16).reshape(2, 6)
    got = client.rows(ids, np.array([[1, 1, 2, 2, 2, 0], [1, 0, 0, 4, 4, 4]]))
    want = client([ids[0, :2], ids[0, 2:5], ids[1, :1], ids[1, 3:]])
    assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))


ROWS = st.lists(
    st.lists(st.tuples(st.integers(1, LONGEST), st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)
"""Rows of segments: (tokens, padding behind, step of the number)."""


def lay(rows: list[list[tuple[int, int, int]]]) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
    width = max(sum(n + gap for n, gap, _ in row) for row in rows)
    ids, numbers = np.zeros((2, len(rows), width), np.int64)
    spans = []
    for r, row in enumerate(rows):
        start = number = 0
        for length, gap, step in row:
            number += step
            ids[r, start : start + length], numbers[r, start : start + length] = 1 + len(spans) % (VOCAB - 1), number
            spans.append((r, start, start + length))
            start += length + gap
    return ids, numbers, spans


@settings(deadline=None, max_examples=500, derandomize=True)
@given(ROWS)
def test_every_segment_of_any_arrangement_is_found_in_order(rows: list[list[tuple[int, int, int]]]) -> None:
    ids, numbers, spans = lay(rows)
    assert check(ids, numbers, VOCAB, LONGEST) == spans


@settings(deadline=None, max_examples=500, derandomize=True)
@given(ROWS, st.data())
def test_one_fault_anywhere_is_refused_by_name(rows: list[list[tuple[int, int, int]]], data: st.DataObject) -> None:
    ids, numbers, spans = lay(rows)
    r, start, end = data.draw(st.sampled_from(spans))
    number = int(numbers[r, start])
    fault = data.draw(st.sampled_from(["id", "left", "empty", "long", "pieces", "falls"]))
    where = f"row {r}, segment {number}: found "
    if fault == "id":
        ids[r, data.draw(st.integers(start, end - 1))] = wrong = data.draw(st.sampled_from([-1, VOCAB]))
        message = f"{where}token id {wrong}"
    elif fault == "left":
        ids, numbers = (np.pad(a, ((0, 0), (1, 0))) for a in (ids, numbers))
        message = "row 0: found padding before the first segment"
    elif fault == "empty":
        numbers[r] = 0
        message = f"row {r}: found no tokens"
    elif fault == "long":
        ids, numbers = (np.insert(a, [start] * LONGEST, a[:, [start]], axis=1) for a in (ids, numbers))
        numbers[: r] = numbers[r + 1 :] = 1  # whatever the other rows became
        ids, numbers, message = ids[r : r + 1], numbers[r : r + 1], f"row 0, segment {number}: found "
        message += f"{end - start + LONGEST} tokens, expected at most {LONGEST}"
    else:
        tail = np.zeros((len(rows), 2), np.int64)
        tail[r, 1] = number if fault == "pieces" else 0
        numbers = np.concatenate([numbers, tail], axis=1)
        ids = np.concatenate([ids, tail * 0], axis=1)
        message = f"{where}tokens in several pieces"
        if fault == "falls":
            numbers[r, -1], numbers[r, :1] = 1, 2
            numbers[r, :end] = np.where(numbers[r, :end] > 0, numbers[r, :end] + 1, 0)
            message = f"row {r}, segment "
    with pytest.raises(RecipeError, match=re.escape(message)):
        check(ids, numbers, VOCAB, LONGEST)


def test_other_shapes_and_dtypes_are_refused() -> None:
    ids = np.ones((2, 3), np.int64)
    for wrong in (np.ones((2, 4), np.int64), np.ones((2, 3)), np.ones(3, np.int64)):
        with pytest.raises(RecipeError, match="attention_mask: found"):
            check(ids, wrong, VOCAB)
    with pytest.raises(RecipeError, match="segment -1"):
        check(ids, -ids, VOCAB)
