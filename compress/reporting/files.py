"""The files of a report: metrics.json, report.md and report.html, each in one step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..preflight import size
from ..rundir import to_json, write_atomic
from . import report
from .page import render

if TYPE_CHECKING:
    from ..plan import Plan


def write_report(directory: Path, plan: Plan, metrics: Mapping[str, Any], journal: Sequence[report.Entry]) -> None:
    """Write metrics.json, report.md and report.html."""
    lock = json.loads((directory / "lock.json").read_text("utf-8"))
    write_atomic(directory / "metrics.json", to_json(metrics))
    text = report.environment().get_template("report.md").render(
        plan=plan,
        metrics=metrics,
        table=report.markdown_table(report.rows(metrics)),
        calls=report.markdown_table(report.calls(metrics)) if metrics["latency"].get("calls") else "",
        gates=report.gates(journal),
        precisions=report.precisions(journal),
        steps=[e for e in journal if "seconds" in e],
        lock=lock,
        size=size,
        recipe=(directory / "recipe.yaml").read_text("utf-8"),
    )
    write_atomic(directory / "report.md", text)
    write_atomic(directory / "report.html", render(directory, plan, metrics, journal))
