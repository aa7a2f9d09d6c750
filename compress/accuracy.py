"""Accuracy held in somebody's own tests: a model, text, limits, and a baseline that lies beside the test.

The baseline is small JSON for reviewers: every metric's value of the model and of the original, the text by hash, and
the metric sample by sample, which is how a failure can show the examples that suffered. Relative limits are relative
to the original where one is named, else to the baseline's own values. The original's values come from the baseline;
it is opened again only when a metric compares answers (KL, top-1, cosine), so a test usually runs one model.

Nothing writes a baseline unasked: a missing or outdated one is a failure that says the command. An update that misses
its limits writes nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RecipeError
from .evaluate.gate import UPPER, Gate, Verdict, judge, show

if TYPE_CHECKING:
    from .data import Source
    from .evaluate import Score

VERSION = 1
EXAMPLES = 3
SIZES = ("parameters", "bytes")


@dataclass(frozen=True)
class Asked:
    """What a test asks.

    Attributes:
        model: a checkpoint directory, a hub id or an artifact.
        source: the data, read as a recipe's held-out data is.
        gates: at least one limit.
        original: what relative limits are relative to, None for the baseline.
        metrics: measured besides those of the gates.
        base: the test's folder, or the recipe's: relative paths are tried from the working directory, then from here.
        threads: CPU threads, None for torch's own setting.
        offline: never ask a hub.
    """

    model: str
    source: Source
    gates: tuple[Gate, ...]
    original: str | None = None
    metrics: tuple[str, ...] = ()
    base: Path | None = None
    threads: int | None = None
    offline: bool = False

    @property
    def measured(self) -> list[str]:
        """Names of the metrics, each once."""
        names = [*self.metrics, *(gate.metric for gate in self.gates)]
        return [name for name in dict.fromkeys(names) if name not in SIZES]


@dataclass(frozen=True)
class Block:
    """Measurements of one model.

    Attributes:
        values: parameters, bytes and every metric by name.
        scores: the metrics with their intervals and samples; empty if read from a baseline that has none.
    """

    values: dict[str, float]
    scores: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What a test found.

    Attributes:
        values: of the model: parameters, bytes and every metric by name.
        failure: what to tell people, None if every limit holds.
        written: whether the baseline was written.
    """

    values: dict[str, float]
    failure: str | None
    written: bool


def limits(**by_kind: Mapping[str, float | str] | None) -> tuple[Gate, ...]:
    """Gates from `max={"perplexity": 12}, max_increase={"perplexity": "2%"}` and the like.

    Raises:
        RecipeError: an unknown metric, a limit that is no number, or one that could never catch a loss.
    """
    from pydantic import ValidationError

    found = []
    for kind, wanted in by_kind.items():
        for metric, limit in (wanted or {}).items():
            if metric == "latency_ms":
                raise RecipeError(f"accuracy_gate: {kind}", "latency_ms", "accuracy", "Gate it in a recipe.")
            try:
                found.append(Gate(metric, **{kind: limit}))  # type: ignore[arg-type]
            except ValidationError as error:
                said = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise RecipeError(f"accuracy_gate: {kind}[{metric!r}]", said) from error
    return tuple(found)


def by_recipe(
    model: str, recipe: str, gates: tuple[Gate, ...], base: Path, threads: int | None = None, offline: bool = False
) -> Asked:
    """Text, metrics, gates and original of a recipe."""
    from .recipe import load_recipe

    beside = base / recipe
    loaded = load_recipe(beside if not Path(recipe).is_file() and beside.is_file() else recipe)
    if loaded.data.heldout is None:
        raise RecipeError(loaded.place("data"), "no held-out text", "data.heldout")
    wanted = tuple(gate for gate in loaded.gate if gate.metric != "latency_ms") + gates
    return Asked(model, loaded.data.heldout, wanted, loaded.model, loaded.metrics, loaded.base, threads, offline)


def hold(asked: Asked, path: Path, update: bool, command: str) -> Finding:
    """Measure the model and hold it to its limits.

    Args:
        asked: the question.
        path: the baseline's file.
        update: write the baseline if the limits hold.
        command: what writes it, for the failure.

    Raises:
        TersorError: the question cannot be answered: no such model, no such text, no limit.
    """
    if not asked.gates:
        raise RecipeError("accuracy_gate", "no limit", "max, min, max_increase or max_drop of a metric")
    shown = os.path.relpath(path)
    if not update and not path.is_file():
        return Finding({}, f"no baseline at {shown}\nMeasure one and have it reviewed: {command}", False)
    data = _describe(asked)
    before = {} if update else _read(path, asked, data)
    if "stale" in before:
        return Finding({}, f"{shown}: {before['stale']}\nMeasure again and have it reviewed: {command}", False)
    ours, original, samples = _measure(asked, update)
    baseline = Block(before.get("values", {}))
    if original is None and asked.original is not None:
        original = Block({name: m["original"] for name, m in before["metrics"].items()} | before["original_sizes"])
    reference = original or (ours if update else baseline)
    verdicts = [judge(gate, ours.values, reference.values) for gate in asked.gates]
    if all(verdict.passed for verdict in verdicts):
        if update:
            _write(path, asked, data, ours, original)
        return Finding(ours.values, None, update)
    each = before.get("each", {}) or {name: score.each for name, score in (original.scores if original else {}).items()}
    since = "the baseline" if before else "the original"
    text = _failure(asked, verdicts, ours, original, baseline, data)
    text += _worst(verdicts, ours, each, [_text(sample) for sample in samples], since)
    return Finding(ours.values, f"{text}\n\nIf the change is meant: {command}", False)


def source_of(data: Any) -> Source:
    """A source from a path, or from the keys of a recipe's `heldout`.

    Raises:
        RecipeError: an unknown key or a wrong value.
    """
    from pydantic import TypeAdapter, ValidationError

    from .data import Source

    try:
        found: Source = TypeAdapter(Source).validate_json(json.dumps(dict(data)))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"accuracy_gate: data.{'.'.join(map(str, first['loc']))}", first["msg"]) from error
    return found


def _describe(asked: Asked) -> dict[str, Any]:
    """The data by all that decides what is measured."""
    from .preflight import hash_source

    told = json.loads(json.dumps(asdict(asked.source)))
    kept = {key: value for key, value in told.items() if value is not None}
    return kept | {"sha256": hash_source(asked.source, asked.base)}


def _measure(asked: Asked, update: bool) -> tuple[Block, Block | None, Sequence[Any]]:
    """The model, the original if it had to run, and the samples."""
    from .evaluate import METRICS, check_metrics, evaluate
    from .evaluation import open_scorer
    from .pretrained import locate

    check_metrics(asked.measured, place="accuracy_gate")
    scorer, reader = open_scorer(locate(asked.model, asked.offline, asked.base), asked.threads)
    compared = any(METRICS[name].needs_reference for name in asked.measured)
    reference = None
    if asked.original is not None and (update or compared):
        reference, _ = open_scorer(locate(asked.original, asked.offline, asked.base), asked.threads)
    samples = reader.read(
        asked.source, seed=None, base=asked.base, place="accuracy_gate", offline=asked.offline
    )

    def block(of: Any) -> Block:
        scores = evaluate(of, samples, asked.measured, reference)
        values: dict[str, float] = {"parameters": of.parameters, "bytes": of.bytes}
        return Block(values | {name: score.value for name, score in scores.items()}, scores)

    return block(scorer), None if reference is None else block(reference), samples


def _read(path: Path, asked: Asked, data: Mapping[str, Any]) -> dict[str, Any]:
    """The baseline, or `{"stale": why}` if it answers another question."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if found["baseline"] != VERSION:
            return {"stale": f"baseline version {found['baseline']}, this tersor writes {VERSION}"}
        keys = dict.fromkeys(key for key in (*found["data"], *data) if key != "path")
        changed = [key for key in keys if found["data"].get(key) != data.get(key)]
        missing = [name for name in asked.measured if name not in found["metrics"]]
        values = {name: m["value"] for name, m in found["metrics"].items()} | found["sizes"]
        unlike = asked.original is not None and found["original"] is None
        found.setdefault("original_sizes", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {"stale": f"no baseline of tersor's ({type(error).__name__}: {error})"}
    if changed:
        what = "the data" if changed == ["sha256"] else ", ".join(changed)
        return {"stale": f"{what} changed since the baseline ({data['path']}), so its numbers say nothing"}
    if missing or unlike:
        return {"stale": f"holds no {missing[0] if missing else 'original'}"}
    return {**found, "values": values}


def _write(path: Path, asked: Asked, data: Mapping[str, Any], ours: Block, original: Block | None) -> None:
    """One line a value, so that a reviewer's diff shows what moved."""
    from .rundir import write_atomic

    metrics = {}
    for name, score in ours.scores.items():
        metrics[name] = {"value": score.value, "interval": [score.low, score.high]}
        if original is not None:
            metrics[name]["original"] = original.values[name]
    sizes = {name: ours.values[name] for name in SIZES}
    record: dict[str, Any] = {"baseline": VERSION, "model": asked.model, "original": asked.original}
    record |= {"limits": [f"{g.metric} {g.kind} {getattr(g, g.kind)}" for g in asked.gates]}
    record |= {"data": data, "sizes": sizes}
    if original is not None:
        record["original_sizes"] = {name: original.values[name] for name in SIZES}
    each = {name: [_rounded(x) for x in score.each] for name, score in ours.scores.items()}
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items()]
    for key, block in (("metrics", metrics), ("each", each)):
        inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in block.items())
        lines.append(f' "{key}": {{\n{inner}\n }}')
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _failure(
    asked: Asked,
    verdicts: Sequence[Verdict],
    ours: Block,
    original: Block | None,
    baseline: Block,
    data: Mapping[str, Any],
) -> str:
    """The headline and a table, a row a limit."""
    rows: list[tuple[str, ...]] = [("", "metric", "original", "baseline", "now", "limit")]
    for verdict in verdicts:
        name = verdict.gate.metric
        before = (block.values.get(name) if block else None for block in (original, baseline))
        sign = "≤" if verdict.gate.kind in UPPER else "≥"
        rows.append(
            (
                "met" if verdict.passed else "MISSED",
                name,
                *("–" if value is None else show(value, 5) for value in before),
                _now(ours, name),
                f"{sign} {show(verdict.limit, 5)}{_tolerance(verdict.gate, 'original' if original else 'baseline')}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    table = "\n".join("  " + "  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows)
    missed = [verdict.gate.metric for verdict in verdicts if not verdict.passed]
    head = f"{asked.model} misses its limit{'s' if len(missed) > 1 else ''} on {', '.join(missed)}"
    return f"{head}\n\n{table}\n\n  data: {data['path']}, at most {data['samples']} samples of {data['length']} tokens"


def _now(ours: Block, name: str) -> str:
    score = ours.scores.get(name)
    interval = "" if score is None or score.low is None or score.high is None else (
        f" (95 %: {show(score.low)} … {show(score.high)})"
    )
    return show(ours.values[name], 5) + interval


def _tolerance(gate: Gate, against: str) -> str:
    given = getattr(gate, gate.kind)
    if not gate.relative:
        return ""
    amount = given.strip().removeprefix("+") if isinstance(given, str) else show(given)
    sign = "+" if gate.kind == "max_increase" else "−"
    return f" ({against} {sign} {amount})"


def _worst(
    verdicts: Sequence[Verdict],
    ours: Block,
    before: Mapping[str, Sequence[float | None]],
    texts: Sequence[str],
    since: str,
) -> str:
    """The samples on which a missed metric fell most, with their text."""
    found = ""
    for name in dict.fromkeys(v.gate.metric for v in verdicts if not v.passed and v.gate.metric in ours.scores):
        now, then = ours.scores[name].each, before.get(name, ())
        sign = 1 if next(v.gate.kind for v in verdicts if v.gate.metric == name) in UPPER else -1
        if len(then) == len(now):
            losses = [(sign * (b - a), i) for i, (a, b) in enumerate(zip(then, now, strict=True)) if a is not None]
            heading = f"{name} fell most since {since} on:" if sign < 0 else f"{name} rose most since {since} on:"
        else:
            losses, heading = [(sign * b, i) for i, b in enumerate(now)], f"{name} is worst on:"
        worst = sorted(((loss, i) for loss, i in losses if math.isfinite(loss)), reverse=True)[:EXAMPLES]
        if worst:
            found += f"\n\n  {heading}"
        for _, i in worst:
            change = f"{show(then[i] or 0.0)} → " if len(then) == len(now) else ""
            found += f"\n    sample {i + 1}: {change}{show(now[i])}  {_shown(texts[i])}"
    return found


def _text(sample: Any) -> str:
    """What was scored; both texts of a pair, all choices of a question."""
    return " | ".join(part.text for part in getattr(sample, "parts", (sample,)))


def _shown(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return json.dumps(line if len(line) <= width else line[: width - 1] + "…", ensure_ascii=False)
