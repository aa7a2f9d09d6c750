"""The pytest plugin: a fixture that holds a checkpoint or an artifact to accuracy limits in your own suite.

    def test_model(accuracy_gate):
        accuracy_gate("runs/x/onnx", data="text/heldout.txt", max_increase={"perplexity": "2%"})

Loaded by pytest itself through the entry point `tersor`; imports nothing but pytest until the fixture is called.
`-p no:tersor` switches it off. The measuring lives in accuracy.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

FOLDER = "accuracy"
WRITTEN = "tersor accuracy baseline"
Limits = Mapping[str, "float | str"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--accuracy-update`."""
    parser.getgroup("tersor").addoption(
        "--accuracy-update",
        action="store_true",
        help="accuracy_gate: measure and write the baselines of the tests that run.",
    )


@pytest.fixture
def accuracy_gate(request: pytest.FixtureRequest) -> AccuracyGate:
    """Hold a checkpoint or an artifact to accuracy limits, with a baseline in accuracy/ beside the test."""
    return AccuracyGate(request)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name the baselines that were written, for the commit."""
    if not config.getoption("--accuracy-update"):
        return
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    files = {file for report in reports for key, file in report.user_properties if key == WRITTEN}
    for file in sorted(files):
        terminalreporter.write_line(f"accuracy baseline written, to be reviewed: {file}")


class AccuracyGate:
    """What the fixture gives."""

    def __init__(self, request: pytest.FixtureRequest):
        self._request = request
        self._calls = 0

    def __call__(
        self,
        model: str | Path,
        *,
        data: str | Path | Mapping[str, Any] | None = None,
        recipe: str | Path | None = None,
        original: str | Path | None = None,
        max: Limits | None = None,
        min: Limits | None = None,
        max_increase: Limits | None = None,
        max_drop: Limits | None = None,
        metrics: tuple[str, ...] | list[str] = (),
        samples: int = 128,
        length: int = 256,
        threads: int | None = None,
        offline: bool = False,
    ) -> dict[str, float]:
        """Fail the test if the model is outside a limit.

        Paths are tried from the working directory, then from the test's folder.

        Args:
            model: a checkpoint directory, a hub id or an artifact.
            data: what to measure on: a file or folder of text, or a mapping with the keys of a recipe's `heldout`.
                Either this or `recipe`.
            recipe: take held-out text, metrics, gates and the original from a recipe.
            original: what `max_increase` and `max_drop` are relative to; without it, the baseline.
            max: by metric, what the value may not be over.
            min: by metric, what it may not be under.
            max_increase: by metric, how far over the original: a number in the metric's unit, or `"2%"`.
            max_drop: by metric, how far under it.
            metrics: recorded in the baseline besides those with limits.
            samples: how many samples of `data`, if that is a path.
            length: tokens a sample, likewise.
            threads: CPU threads.
            offline: never ask a hub, as HF_HUB_OFFLINE=1 in the environment says for all tests.

        Returns:
            parameters, bytes and every metric by name.
        """
        __tracebackhide__ = True
        from .accuracy import Asked, by_recipe, hold, limits, source_of
        from .errors import TersorError

        node = self._request.node
        if (data is None) == (recipe is None):
            pytest.fail("accuracy_gate takes either data= or recipe=", pytrace=False)
        try:
            gates = limits(max=max, min=min, max_increase=max_increase, max_drop=max_drop)
            if recipe is not None:
                asked = by_recipe(str(model), str(recipe), gates, node.path.parent, threads, offline)
            else:
                plain = {"path": str(data), "samples": samples, "length": length}
                source = source_of(data if isinstance(data, Mapping) else plain)
                before = None if original is None else str(original)
                asked = Asked(str(model), source, gates, before, tuple(metrics), node.path.parent, threads, offline)
            command = f"pytest {node.nodeid!r} --accuracy-update".replace("'", '"')
            path = self._path()
            found = hold(asked, path, node.config.getoption("--accuracy-update"), command)
        except TersorError as error:
            pytest.fail(f"accuracy_gate: {error}", pytrace=False)
        if found.failure is not None:
            pytest.fail(f"accuracy_gate: {found.failure}", pytrace=False)
        if found.written:
            node.user_properties.append((WRITTEN, os.path.relpath(path)))
        return found.values

    def _path(self) -> Path:
        """`accuracy/MODULE.TEST.json` beside the test; the second call of a test gets a `-2`."""
        node = self._request.node
        self._calls += 1
        name = re.sub(r"[^\w.-]+", "_", f"{node.path.stem}.{node.name}").strip("_")
        number = f"-{self._calls}" if self._calls > 1 else ""
        found: Path = node.path.parent / FOLDER / f"{name}{number}.json"
        return found
