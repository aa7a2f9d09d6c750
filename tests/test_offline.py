"""Who says offline is obeyed everywhere: a hub on this machine counts what it is asked; its twin without is asked."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tersor.compress.compare import compare
from tersor.compress.data import Source
from tersor.compress.errors import PreflightError
from tersor.compress.evaluation import Question

COMPARE = "from tersor.compress.cli import main; main()"


class Hub:
    """Answers 404 to everything and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(404)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def asked_by(self, folder: Path, code: list[str], **environment: str) -> list[str]:
        """What it is asked by a fresh interpreter, in which no test has said offline."""
        self.asked.clear()
        inherited = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and not k.lower().endswith("_proxy")}
        here = {"HF_ENDPOINT": self.address, "HF_HOME": str(folder / "cache"), "PYTEST_ADDOPTS": ""}
        command = [sys.executable, *code]
        done = subprocess.run(
            command, cwd=folder, env={**inherited, **here, **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode not in (0, 1) or "cannot be" in done.stdout, done.stdout + done.stderr
        return list(self.asked)


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    Thread(target=made.server.serve_forever, daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def model(save_tiny: Callable[..., Path]) -> str:
    return str(save_tiny("llama"))


def test_compare_asks_no_hub_for_a_model(hub: Hub, tmp_path: Path, model: str) -> None:
    code = ["-c", COMPARE, "compare", model, "somebody/some-model"]
    assert hub.asked_by(tmp_path, [*code, "--offline"]) == []
    assert hub.asked_by(tmp_path, code, HF_HUB_OFFLINE="1") == []
    assert any("somebody/some-model" in path for path in hub.asked_by(tmp_path, code))


@pytest.mark.slow
def test_compare_asks_no_hub_for_a_dataset(hub: Hub, tmp_path: Path, model: str) -> None:
    pytest.importorskip("datasets")
    code = ["-c", COMPARE, "compare", model, model, "--data", "datasets:somebody/some-data"]
    assert hub.asked_by(tmp_path, [*code, "--offline"]) == []
    assert any("somebody/some-data" in path for path in hub.asked_by(tmp_path, code))


@pytest.mark.parametrize("data", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["model", "data"])
def test_the_plugin_asks_no_hub(hub: Hub, tmp_path: Path, model: str, data: bool) -> None:
    if data:
        pytest.importorskip("datasets")
    (tmp_path / "text.txt").write_text(inspect.getsource(textwrap), "utf-8")
    named = (model, "datasets:somebody/some-data") if data else ("somebody/some-model", "text.txt")
    test = tmp_path / "test_toy.py"
    code = ["-m", "pytest", "-p", "no:cacheprovider", "--accuracy-update", str(test)]

    def write(offline: bool) -> None:
        call = f"accuracy_gate({named[0]!r}, data={named[1]!r}, max={{'perplexity': 1e9}}, offline={offline})"
        test.write_text(f"def test_model(accuracy_gate):\n    {call}\n")

    write(offline=True)
    assert hub.asked_by(tmp_path, code) == []
    write(offline=False)
    assert hub.asked_by(tmp_path, code, HF_HUB_OFFLINE="1") == []
    assert any("somebody/some-" in path for path in hub.asked_by(tmp_path, code))


def test_a_dataset_that_is_not_here_is_said(model: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(PreflightError, match="a dataset that cannot be had"):
        compare(model, model, source=Source("datasets:somebody/some-data"), threads=1, offline=True)
    with pytest.raises(PreflightError, match="a dataset that cannot be had"):
        Question(model, offline=True).by_data("datasets:somebody/some-data", 4, 16)
