"""report.html: the run as one page that opens anywhere, offline: styles and plots are inside, and nothing is asked for.

What the page shows is metrics.json, the journal, the plan and lock.json, and nothing else, so the same run directory
gives the same bytes. Details that a pass left in the journal are shown by their shape: numbers as they are; as plots
lists of numbers (`per_layer` and the like), columns over a column `step`, records `NAME_by_COLUMN` over that column
(beside the details' own `NAME`, where that is numbers), and records of many numbers as a field of shades; records as
tables too, and the rest as JSON to unfold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..preflight import size
from . import figures, report

if TYPE_CHECKING:
    from ..plan import Plan
    from ..recipe import ExportStep, PassStep

SHORTEST = 3  # values that make a plot
SERIES = 6  # lines in one plot
SPREAD = 100  # how much larger one line may be than another before that is a flat one


def render(directory: Path, plan: Plan, metrics: Mapping[str, Any], journal: Sequence[report.Entry]) -> str:
    """The page of a run that has ended.

    Args:
        directory: the run's, for lock.json and recipe.yaml.
        plan: what was planned.
        metrics: as in metrics.json.
        journal: its lines.
    """
    lock = json.loads((directory / "lock.json").read_text("utf-8"))
    blocks = measured(metrics)
    return str(
        report.environment(html=True)
        .get_template("report.html")
        .render(
            plan=plan,
            metrics=metrics,
            summary=report.rows(metrics),
            stages=_stage_table(metrics, blocks),
            asked=list(_asked(plan)),
            gates=report.gates(journal),
            precisions=report.precisions(journal),
            figures=list(_figures(metrics, blocks)),
            steps=[_step(entry, number, plan) for number, entry in enumerate(_done(journal))],
            lock=lock,
            command=_command(journal),
            recipe=(directory / "recipe.yaml").read_text("utf-8"),
        )
    )


def measured(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Everything that was scored, in order: the original, each step, each artifact. The last step is the checkpoint."""
    blocks: dict[str, Mapping[str, Any]] = {"original": metrics["original"]}
    for step in metrics["steps"]:
        blocks[step["step"]] = step
    if metrics["steps"] and metrics["checkpoint"]:
        last = metrics["steps"][-1]["step"]
        blocks[last] = {**blocks[last], **metrics["checkpoint"]}
    return blocks | {artifact["name"]: artifact for artifact in metrics["artifacts"]}


def _asked(plan: Plan) -> Iterator[str]:
    """What the recipe asks for, a line each."""
    recipe = plan.recipe
    steps: tuple[PassStep | ExportStep, ...] = (*recipe.passes, *recipe.export)
    for step in steps:
        options = report.options_of(step.options)
        given = ", ".join(f"{key}: {_scalar(value)}" for key, value in options.items() if value is not None)
        yield f"{step.use}{f' with {given}' if given else ''}"
        for gate in step.gate:
            yield f"{step.use} may pass if {gate.metric} {_limit(gate)}"
    for gate in recipe.gate:
        yield f"checkpoint and artifacts are published if {gate.metric} {_limit(gate)}"


def _limit(gate: Any) -> str:
    from ..evaluate.gate import show

    given = getattr(gate, gate.kind)
    given = given if isinstance(given, str) else show(given)
    words = {"max": "is at most", "min": "is at least", "max_increase": "is over the original by at most"}
    return f"{words.get(gate.kind, 'is under the original by at most')} {given}"


def _stage_table(metrics: Mapping[str, Any], blocks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row for each thing that was scored, metrics with their intervals."""
    names = report.metric_names(metrics)
    timed = any("latency_ms" in block for block in blocks.values())
    table = [["", "parameters", "size", *(["latency, ms"] if timed else []), *(n.replace("_", " ") for n in names)]]
    for name, block in blocks.items():
        cells = [name, f"{block['parameters']:,}", size(block["bytes"])]
        if timed:
            cells.append(f"{block['latency_ms']:.4g}" if "latency_ms" in block else "–")
        for metric in names:
            low, high = block.get("intervals", {}).get(metric) or (None, None)
            interval = "" if low is None else f" ({low:.4g} … {high:.4g})"
            cells.append(f"{block[metric]:.4g}{interval}" if metric in block else "–")
        table.append(cells)
    return table


def _figures(metrics: Mapping[str, Any], blocks: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    from ..evaluate import METRICS

    def bar(title: str, key: str, show: Any) -> str:
        values = {name: float(block[key]) for name, block in blocks.items() if key in block}
        return figures.bars(title, values, {name: show(value) for name, value in values.items()}, f"f-{key}")

    yield bar("parameters", "parameters", lambda n: f"{n:,.0f}")
    yield bar("size of the files", "bytes", size)
    if any("latency_ms" in block for block in blocks.values()):
        timed = metrics["latency"]
        threads = timed["threads"]
        title = f"latency of {timed['tokens']} tokens, {threads} thread{'' if threads == 1 else 's'}"
        yield bar(title, "latency_ms", lambda ms: f"{ms:.4g} ms")
    calls = metrics["latency"].get("calls")
    if calls and len(calls[0]["milliseconds"]) > 1:
        last = metrics["steps"][-1]["step"] if metrics["steps"] else "original"
        yield _calls(calls, {"checkpoint": last})
    for name in report.metric_names(metrics):
        values = {part: block[name] for part, block in blocks.items() if name in block}
        bounds = {part: block.get("intervals", {}).get(name, (None, None)) for part, block in blocks.items()}
        limits = {v["limit"] for b in blocks.values() for v in b.get("verdicts", ()) if v["metric"] == name}
        unit = METRICS[name].unit if name in METRICS else ""
        title = f"{name.replace('_', ' ')}{f', {unit}' if unit else ''}"
        yield figures.intervals(title, values, bounds, sorted(limits), f"f-{name}")


def _calls(calls: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """How many times as fast as the original, by tokens of a call; `names` are other ones of what was timed."""
    times = {name: [call["milliseconds"][name] for call in calls] for name in calls[0]["milliseconds"]}
    base = times.pop("original")
    series = {names.get(n, n): [b / own for b, own in zip(base, found, strict=True)] for n, found in times.items()}
    tokens = [str(call["tokens"]) for call in calls]
    title = "times as fast as the original, by tokens of a call"
    return figures.lines(title, series, "tokens", "f-calls", references={"original": 1.0}, names=tokens)


def _done(journal: Sequence[report.Entry]) -> list[report.Entry]:
    return [entry for entry in journal if "seconds" in entry]


def _step(entry: report.Entry, number: int, plan: Plan) -> dict[str, Any]:
    planned = next((step for step in plan.steps if step.name == entry["step"]), None)
    facts, plots, rest = _details(entry.get("details") or entry.get("artifact") or {}, f"s{number}")
    return {
        "name": entry["step"],
        "options": {k: _scalar(v) for k, v in entry.get("options", {}).items() if v is not None},
        "seconds": entry["seconds"],
        "memory": size(entry["peak_memory"]) if "peak_memory" in entry else "",
        "predicted": size(planned.memory) if planned else "",
        "notes": planned.notes if planned else (),
        "facts": facts,
        "plots": plots,
        "rest": rest,
    }


def _details(details: Mapping[str, Any], prefix: str) -> tuple[dict[str, str], list[str], dict[str, Any]]:
    """Numbers and words; plots; what is to unfold: rows of a table, or JSON as text."""
    facts: dict[str, str] = {}
    plots: list[str] = []
    rest: dict[str, Any] = {}
    for key, value in details.items():
        title, series = key.replace("_", " "), _series(key, value)
        ids = f"{prefix}-{len(plots)}"
        if columns := _over_steps(value):
            steps = columns.pop("step")
            plots.append(figures.lines(title, columns, "step", ids, steps))
            continue
        if found := _over_column(key, value):
            name, column, places, values = found
            beside = details.get(name, {})
            references = beside if isinstance(beside, dict) and _numbers(list(beside.values()), 1) else {}
            plots.append(figures.lines(title, {name: values}, column.replace("_", " "), ids, places, references))
        elif rows := _rows(value):
            words = {name.rpartition(" ")[0] for name in value[0]}  # "expert 0", "expert 1", …
            plots.append(figures.heat(title, rows, words.pop() if len(words) == 1 else "", "layer", ids))
        elif series:
            counted = "layer" if "layer" in key else "number"
            plots.append(figures.lines(title, series, counted, ids))
        elif _numbers(value):
            facts[title] = f"{_scalar(value[0])}, all {len(value)}"
            continue
        if _flat(value):
            facts[title] = _scalar(value)
        elif isinstance(value, list) and all(isinstance(part, dict) for part in value):
            heads = list(dict.fromkeys(name for record in value for name in record))
            rest[title] = [["", *heads]]
            rest[title] += [[str(n), *(_scalar(r.get(name, "")) for name in heads)] for n, r in enumerate(value)]
        elif not series or not (_numbers(value) or len(series) == len(value)):
            rest[title] = json.dumps(value, indent=1, ensure_ascii=False)
    return facts, plots, {title: part for title, part in rest.items() if len(part) > 1}


def _over_steps(value: Any) -> dict[str, list[float]]:
    """Columns over a column `step`, by name; none if it is something else or a column holds what cannot be drawn."""
    if not (isinstance(value, dict) and _numbers(value.get("step")) and len(value) > 1):
        return {}
    even = all(_numbers(part) and len(part) == len(value["step"]) for part in value.values())
    return {str(name): part for name, part in value.items()} if even else {}


def _over_column(key: str, value: Any) -> tuple[str, str, list[float], list[float]] | None:
    """Of records `NAME_by_COLUMN`: name, column, and the values of both; None if it is something else."""
    name, by, column = key.partition("_by_")
    if not (by and isinstance(value, list) and all(isinstance(record, dict) for record in value)):
        return None
    places, values = ([record.get(part) for record in value] for part in (column, name))
    return (name, column, places, values) if _numbers(places) and _numbers(values) else None


def _rows(value: Any) -> list[list[float]]:
    """Records of the same many numbers, as rows; empty if it is something else."""
    if not (isinstance(value, list) and value and all(isinstance(record, dict) for record in value)):
        return []
    rows = [list(record.values()) for record in value]
    alike = all(record.keys() == value[0].keys() for record in value)
    return rows if alike and len(rows[0]) > SERIES and all(map(_numbers, rows)) else []


def _flat(value: Any) -> bool:
    """Whether a line can say it: no list or dict, or a short one of such."""
    if isinstance(value, dict):
        return len(value) <= 12 and not any(isinstance(part, (list, dict)) for part in value.values())
    if isinstance(value, list):
        return len(value) < SHORTEST and not any(isinstance(part, (list, dict)) for part in value)
    return True


def _series(key: str, value: Any) -> dict[str, list[float]]:
    """Lists of numbers in it, by name; none if it is something else, or would be lines that say nothing."""
    if _numbers(value):
        return {key: value} if len(set(value)) > 1 else {}
    if isinstance(value, dict):
        found = {str(name): part for name, part in value.items() if _numbers(part)}
        return found if len(found) == len(value) <= SERIES else {}
    if isinstance(value, list) and len(value) >= SHORTEST and all(isinstance(record, dict) for record in value):
        columns = {name: [record.get(name) for record in value] for name in value[0]}
        numeric = {name: column for name, column in columns.items() if _numbers(column)}
        largest = [max(map(abs, column)) for column in numeric.values()]
        if any(size < max(largest) / SPREAD for size in largest):
            return {}
        return dict(list(numeric.items())[:SERIES])
    return {}


def _numbers(value: Any, least: int = SHORTEST) -> bool:
    """Whether it is a list of at least so many finite numbers."""
    return (
        isinstance(value, list)
        and len(value) >= least
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in value)
    )


def _scalar(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_scalar(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(_scalar, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _command(journal: Sequence[report.Entry]) -> str:
    threads = next((entry["threads"] for entry in journal if entry["step"] == "latency"), None)
    return f"tersor apply recipe.yaml --output again{f' --threads {threads}' if threads else ''}"
