"""What each verb prints for a person; `--json` prints the same values for a script."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]


def answer(value: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print `value` as JSON, or through `show`."""
    if as_json:
        print(json.dumps(value, indent=1, ensure_ascii=False))
    else:
        show(value)


def table(rows: Sequence[Sequence[str]], title: str = "", prose: bool = False) -> None:
    """A table whose first row is the head; numbers stand right, and `prose` left."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    head, *body = rows
    made = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(head):
        made.add_column(name, justify="right" if number and len(head) > 2 and not prose else "left", overflow="fold")
    for row in body:
        made.add_row(*row)
    # A table cut to 80 columns in a log loses its figures; only a real terminal sets the width.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(made)


def plan(found: Found) -> None:
    """Every step's parameters, bytes and peak memory, then its notes."""
    from ..preflight import size

    original = found["original"]
    rows = [["step", "parameters", "bytes", "peak memory"]]
    rows.append(["original", f"{original['parameters']:,}", size(original["bytes"]), "–"])
    for step in found["steps"]:
        change = f" ({100 * (step['parameters'] / original['parameters'] - 1):+.1f} %)"
        change = "" if step["parameters"] == original["parameters"] else change
        rows.append([step["step"], f"{step['parameters']:,}{change}", size(step["bytes"]), size(step["peak_memory"])])
    table(rows, f"{found['recipe']}: {found['architecture']}, {found['task']}, {found['dtype']}")
    for step in found["steps"]:
        for note in step["notes"]:
            print(f"  {step['step']}: {note}")
    if found["lean_memory"]:
        print(f"  memory with --max-memory, weights left in their files: {size(found['lean_memory'])} at least")
    print(f"  disk: {size(found['disk'])}")


def outcome(metrics: Found, directory: Path | None) -> None:
    """A run's table, and where its results lie (None: nowhere, it was a trial)."""
    from .report import rows

    remark = ": FAILED" if metrics["verdict"] == "fail" else "" if directory else " (smoke: random weights)"
    table(rows(metrics), f"{metrics['recipe']}{remark}")
    if directory is not None:
        names = ["model"] * bool(metrics["steps"]) + [artifact["name"] for artifact in metrics["artifacts"]]
        for name in (*names, "report.html", "report.md"):
            if (directory / name).exists():
                print(f"  {directory / name}")


def evaluation(model: str, found: Found) -> None:
    """Metrics with their intervals, and what the gates say."""
    blocks = [b for b in ("original", "model") if b in found]
    rows = [["", *blocks, "95 % interval"]]
    for key in (k for k in found["model"] if k not in ("intervals", "verdicts")):
        low, high = found["model"].get("intervals", {}).get(key, (None, None))
        cells = [_number(found[b].get(key)) for b in blocks]
        rows.append([key.replace("_", " "), *cells, f"{low:.4g} … {high:.4g}" if low is not None else "–"])
    table(rows, model)
    for verdict in found["model"].get("verdicts", ()):
        print(f"  {'met' if verdict['passed'] else 'MISSED'}: {verdict['text']}")


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def comparison(a: str, b: str, found: Found) -> None:
    """Sizes and metrics of two, the config's differences, the tensors that changed most."""
    from .. import compare

    table(compare.rows(dict(found)), f"{a} beside {b}")
    if found.get("config"):
        table([["config", a, b], *([key, str(x), str(y)] for key, x, y in found["config"])])
    changed = compare.tensor_rows(dict(found))
    if changed:
        table(changed, f"most changed of {found['compared']} tensors")
    elif "tensors" in found:
        print("  the weights are the same")


def timings(found: Found) -> None:
    """A row a size of call, a column a model; the others beside the first."""
    first = found["baseline"]
    table_rows = [["ms a call", *found["calls"][0]["milliseconds"]]]
    for call in found["calls"]:
        each, count = call["milliseconds"], call["sequences"]
        what = f"{count} image{'s' * (count > 1)}" if call["tokens"] is None else f"{call['tokens']} tokens"
        if call["tokens"] is not None and count > 1:
            what += f" in {count} sequences"
        ratios = {name: f" ({each[first] / ms:.2f}×)" for name, ms in each.items() if name != first}
        table_rows.append([what, *(f"{ms:.2f}{ratios.get(name, '')}" for name, ms in each.items())])
    plural = "s" if found["threads"] != 1 else ""
    table(table_rows, f"median, {found['threads']} thread{plural}; ×: as fast as {first}")


def promises(directory: Path, found: Sequence[Found]) -> None:
    """What was checked of a run, and whether it holds."""
    rows = [["✓" if f["holds"] else "✗", f["what"], f["detail"]] for f in found]
    table([["", "promise", ""], *rows], str(directory))


def catalogue(found: Sequence[Found]) -> None:
    """Passes and exporters, a line each."""
    table([["name", "kind", "what it does"], *([e["name"], e["kind"], e["summary"]] for e in found)], prose=True)


def description(found: Found) -> None:
    """One pass or exporter with its options."""
    print(f"{found['name']} ({found['kind']})\n\n{found['text']}\n")
    options = [[o["name"], o["type"], o["default"], o["meaning"]] for o in found["options"]]
    table([["option", "type", "default", "meaning"], *options], prose=True)


def coverage(found: Mapping[str, Mapping[str, str]]) -> None:
    """Architectures × passes and forms of export, then the reason for every no."""
    heads = list(next(iter(found.values())))
    table([["architecture", *heads], *([a, *("no" if r[h] else "yes" for h in heads)] for a, r in found.items())])
    for architecture, row in found.items():
        for head, reason in row.items():
            if reason:
                print(f"  {architecture}, {head}: {reason}")


def machine(found: Found) -> None:
    """What `doctor` found."""
    table([["", ""], *([k, str(x)] for k, x in found.items())], "tersor doctor")
