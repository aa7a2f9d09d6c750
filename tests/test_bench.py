"""`tersor bench`: what is timed and on what. How long it takes is not asserted."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tersor.compress import bench as benching
from tersor.compress.bench import bench
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.cli import main
from tersor.compress.errors import PreflightError, RecipeError
from tersor.export.decoder import OnnxDecoder
from tersor.export.onnx import Onnx


def run_of(folder: Path, model: Path, **exporters: Any) -> Path:
    """A finished run as bench meets it: its published folders and its metrics."""
    folder.mkdir()
    model.rename(folder / "model")
    for name, exporter in exporters.items():
        (folder / name).mkdir()
        exporter.write(Checkpoint.load(folder / "model"), folder / name, [])
    (folder / "metrics.json").write_text("{}")
    return folder


def test_a_run_beside_its_original(save_tiny: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: Any):
    original = save_tiny("llama", head_dim=8)
    run = run_of(tmp_path / "run", save_tiny("llama", head_dim=8), onnx=Onnx(opset=23), decoder=OnnxDecoder())
    arguments = ["bench", str(run), "--against", str(original), "--repeats", "2", "--threads", "1"]

    def told(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tersor", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return str(capsys.readouterr().out)

    found = json.loads(told("--json", "--tokens", "3,9"))
    assert found["baseline"] == str(original)
    assert found["threads"] == 1
    names = [str(original), *(f"{run}/{part}" for part in ("model", "decoder", "onnx"))]
    assert [list(call["milliseconds"]) for call in found["calls"]] == [names] * 3
    assert [(call["sequences"], call["tokens"]) for call in found["calls"][:2]] == [(1, 3), (1, 9)]
    assert found["calls"][2]["sequences"] == 16
    assert all(ms > 0 for call in found["calls"] for ms in call["milliseconds"].values())
    shown = told()
    assert "64 tokens" in shown
    assert "tokens in 16 sequences" in shown
    assert "256 tokens" not in shown, "the model has 64 positions"


def test_all_are_asked_the_same_in_turns(save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real scorers, which here write down when and what they are asked."""
    from tersor.compress import evaluation

    asked: list[tuple[str, list[np.ndarray]]] = []
    real = evaluation.open_scorer

    def noted(path: Path, threads: int | None = None) -> Any:
        scorer, reader = real(path, threads)

        class Noted:
            output, parameters, bytes, threads = scorer.output, scorer.parameters, scorer.bytes, scorer.threads

            def __call__(self, sequences: Any) -> Any:
                asked.append((path.name, sequences))
                return scorer(sequences)

        return Noted(), reader

    monkeypatch.setattr(evaluation, "open_scorer", noted)
    a, b = save_tiny("llama"), save_tiny("llama")
    bench(str(a), str(b), tokens=[5], threads=1, repeats=2)
    assert [name for name, _ in asked[:6]] == [b.name, a.name, b.name, a.name, a.name, b.name]
    assert all(len(sequences) == 1 and len(sequences[0]) == 5 for _, sequences in asked[:6])
    assert all(np.array_equal(sequences[0], asked[0][1][0]) for _, sequences in asked[:6])
    mixed = asked[6][1]
    assert len({len(sequence) for sequence in mixed}) > 3


def test_a_slower_model_is_found_slower(save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that a model moves, not the machine's: one of more layers takes as many ticks more."""
    import torch

    ticks = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: ticks[0])
    real = torch.nn.functional.linear

    def counted(*arguments: Any) -> Any:
        ticks[0] += 1
        return real(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    two, four = save_tiny("llama"), save_tiny("llama", num_hidden_layers=4)
    call = bench(str(four), str(two), tokens=[5], threads=1, repeats=1)["calls"][0]
    fast, slow = call["milliseconds"][str(two)], call["milliseconds"][str(four)]
    assert slow / fast == pytest.approx((4 * 7 + 1) / (2 * 7 + 1))


def test_images(save_tiny: Callable[..., Path]) -> None:
    vit = save_tiny("vit")
    found = bench(str(vit), str(vit), threads=1, repeats=1)
    assert [(call["sequences"], call["tokens"]) for call in found["calls"]] == [(n, None) for n in benching.IMAGES]
    assert list(found["calls"][0]["milliseconds"]) == [str(vit), f"{vit} again"]


def test_what_cannot_be_is_refused(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    llama = str(save_tiny("llama"))
    with pytest.raises(RecipeError, match="65, expected 1 to 64"):
        bench(llama, tokens=[8, 65])
    with pytest.raises(RecipeError, match="models of one task"):
        bench(llama, str(save_tiny("bert", "feature-extraction")))
    with pytest.raises(PreflightError):
        bench(str(tmp_path / "nothing"))
