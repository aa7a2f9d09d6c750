"""Report: all that happened in a run, as data (metrics.json), Markdown, a page (page.py) and a table in the terminal.

Everything is taken from the journal and the plan, so a resumed run reports exactly what an uninterrupted one does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..plan import Plan

Entry = Mapping[str, Any]
SIZES = ("parameters", "bytes", "latency_ms")
UNSCALED = ("kl", "top1", "cosine")
"""Metrics that compare with the original: their change in percent says nothing."""


def options_of(step: Any) -> dict[str, Any]:
    """A pass' or exporter's options as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(step), default=str))
    return values


def verdict_as_dict(verdict: Any) -> dict[str, Any]:
    """A gate's verdict as JSON values."""
    return {
        "metric": verdict.gate.metric,
        "value": verdict.value,
        "original": verdict.original,
        "limit": verdict.limit,
        "passed": verdict.passed,
        "text": verdict.text,
    }


def _find(journal: Sequence[Entry], step: str) -> Entry | None:
    return next((e for e in journal if e["step"] == step), None)


def collect(journal: Sequence[Entry], plan: Plan, failed: bool) -> dict[str, Any]:
    """What metrics.json holds: `original`, `steps`, `checkpoint`, `artifacts`, `verdict`.

    Each block carries parameters, bytes and every metric by name; `intervals` holds 95 % bounds.
    """
    latency = _find(journal, "latency") or {"milliseconds": {}, "threads": None}
    milliseconds = latency["milliseconds"]

    def block(step: str, timed: str = "") -> dict[str, Any]:
        entry = _find(journal, step)
        if entry is None:
            return {}
        scores = dict(entry["scores"])
        if timed in milliseconds:
            scores["latency_ms"] = milliseconds[timed]
        gate = _find(journal, f"{step}:gate")
        if gate is not None:
            scores["verdicts"] = gate["verdicts"]
        return scores

    steps = [
        {
            "step": p.name,
            "use": p.use,
            **{k: entry[k] for k in ("options", "seconds", "peak_memory")},
            **block(p.name, p.name),
        }
        for p in plan.passes
        if (entry := _find(journal, p.name))
    ]
    last = plan.passes[-1].name if plan.passes else "0-unchanged"
    artifacts = [
        {"name": e.name, **block(e.name, e.name), "parity": (_find(journal, e.name) or {})["artifact"].get("parity")}
        for e in plan.exports
        if _find(journal, e.name)
    ]
    return {
        "recipe": plan.recipe.name,
        "original": block("original", "original"),
        "steps": steps,
        "checkpoint": block(last, "checkpoint" if plan.passes else "original"),
        "artifacts": artifacts,
        "latency": {key: latency.get(key) for key in ("threads", "sequences", "tokens", "calls")},
        "verdict": "fail" if failed else "pass",
    }


def metric_names(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics that were measured, in the order of the recipe."""
    return list(metrics["original"].get("intervals", {}))


def columns(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The columns of the summary: heading → block."""
    shown: dict[str, Mapping[str, Any]] = {"original": metrics["original"]}
    if metrics["steps"] and metrics["checkpoint"]:
        shown["compressed"] = metrics["checkpoint"]
    for artifact in metrics["artifacts"]:
        shown[artifact["name"].replace("onnx", "ONNX")] = artifact
    return shown


def rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """The summary table as text: a heading row, then a row a measurement."""
    shown = columns(metrics)
    timed = metrics["latency"]
    threads = f"{timed['threads']} thread{'s' if timed['threads'] != 1 else ''}"
    labels = {
        "parameters": "parameters",
        "bytes": "bytes",
        **{name: name.replace("_", " ") for name in metric_names(metrics)},
        "latency_ms": f"latency, ms ({timed['tokens']} tokens, {threads})",
    }
    table = [["", *shown]]
    for key, label in labels.items():
        if any(key in block for block in shown.values()):
            table.append([label, *(_cell(key, block, metrics["original"]) for block in shown.values())])
    if any(block.get("parity") for block in shown.values()):
        table.append(["parity: error, allowed", *(_parity(block.get("parity")) for block in shown.values())])
    return table


def calls(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Latency by tokens of a call as text: a heading row, then a row a call; empty where none was timed."""
    names = {"original": "original", "checkpoint": "compressed"}
    names |= {a["name"]: heading for heading, a in columns(metrics).items() if "name" in a}
    found = metrics["latency"].get("calls") or []
    heads = list(found[0]["milliseconds"]) if found else []
    table = [["tokens of a call, ms", *(names[name] for name in heads)]] if found else []
    for call in found:
        blocks = {name: {"latency_ms": call["milliseconds"][name]} for name in heads}
        table.append([str(call["tokens"]), *(_cell("latency_ms", blocks[n], blocks["original"]) for n in heads)])
    return table


def _cell(key: str, block: Mapping[str, Any], original: Mapping[str, Any]) -> str:
    value = block.get(key)
    if value is None:
        return "–"
    text = f"{value:,}" if key in ("parameters", "bytes") else f"{value:.4g}"
    base = original.get(key)
    if block is original or not base or key in UNSCALED or value == base:
        return text
    if key == "latency_ms":
        return f"{text} ({base / value:.2f}× faster)" if value < base else f"{text} ({value / base:.2f}× slower)"
    return f"{text} ({100 * (value / base - 1):+.1f} %)"


def _parity(parity: Mapping[str, Any] | None) -> str:
    """The output that is nearest to its limit; of int8, which its gate judges, the one that lies farthest off."""
    if not parity:
        return "–"
    if any("error" not in p for p in parity.values()):
        return f"cosine {min(p['cosine_mean'] for p in parity.values()):.4f}"
    worst = max(parity.values(), key=lambda p: p["error"] / p["limit"])
    return f"{worst['error']:.1e}, {worst['limit']:.1e}"


def precisions(journal: Sequence[Entry]) -> list[str]:
    """A line for each artifact that is not float32: which products stayed, and why."""
    lines = []
    for entry in journal:
        artifact = entry.get("artifact") or {}
        if "kept_float32" not in artifact:
            continue
        kept, precision = artifact["kept_float32"], artifact["precision"]
        if not kept:
            lines.append(f"{entry['step']}: {precision} in every product.")
            continue
        listed = ", ".join(f"{name} ({error:.0%})" for name, error in kept.items())
        why = f"{precision} would move their results by more than {artifact['keep_above']:.0%}"
        lines.append(f"{entry['step']}: {precision}, but for what stays in float32 because {why}: {listed}.")
    return lines


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, numbers to the right."""
    head, *body = table
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def environment(html: bool = False) -> Any:
    """Where the templates live; values are escaped for `html`."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("tersor.compress.reporting", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=html,
    )


def gates(journal: Sequence[Entry]) -> list[dict[str, Any]]:
    """Every verdict with the step it was spoken after."""
    return [
        {"step": entry["step"].removesuffix(":gate"), **verdict}
        for entry in journal
        for verdict in entry.get("verdicts", ())
    ]


def model_card(plan: Plan, journal: Sequence[Entry]) -> str:
    """The README.md of the compressed checkpoint: what was done to what. No times: the same run, the same bytes."""
    metrics = collect(journal, plan, failed=False)
    original, result = metrics["original"], metrics["checkpoint"]
    scores = [["", "original", "this model"]]
    for key in ("parameters", "bytes", *metric_names(metrics)):
        if key in original and key in result:
            scores.append([key.replace("_", " "), _cell(key, original, original), _cell(key, result, original)])
    return str(
        environment().get_template("model_card.md").render(
            plan=plan,
            table=markdown_table(scores),
            steps=[{"use": e["use"], "options": e["options"]} for e in journal if "details" in e],
        )
    )
