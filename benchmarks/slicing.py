"""Perplexity, cost and speed against real parameters: slice beside SliceGPT, MoDeGPT and its own parts.

    python benchmarks/slicing.py CHECKPOINT TEXT [HELDOUT] [--remove 0.1 0.2 0.3] [--methods …] [--latency] [--rows F]
    python benchmarks/slicing.py --rows F [--plot FILE.svg]

Protocol: the text in windows of 256 tokens; of the first 60 % the first 128 calibrate, of the rest the first 96 are
scored, or the first 96 of HELDOUT (weights as stored, computed in float32). Texts are plain or .jsonl. Every row at the
same real parameters: `remove` counts the model as it is loaded, tied tensors once. Each row is a process of its own.
CPU seconds are summed over threads (wall clock says little on a shared machine), the search's apart; memory is the peak
above that of the loaded model. With --latency also how many times faster than the dense model a prompt of 256 tokens
and one more token are, in torch and in ONNX Runtime (slicing_speed.py). The baselines have no stock form
(baselines/slicegpt.py, modegpt.py), so they have no ONNX file either. Rows are appended to --rows, so that a long table
may be made in several runs; without a CHECKPOINT the table and the plot are of what lies there.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines.modegpt import measured, modegpt
from baselines.slicegpt import Classic, classic_parameters, same_shapes
from slicing_speed import speed_ups
from tersor.compress.calibration.batches import batches
from tersor.compress.calibration.loss import judge
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.layout import Layout
from tersor.compress.pass_ import Context
from tersor.compress.passes.slice import Slice
from tersor.compress.slicing.basis import principal, sensitivity
from tersor.compress.slicing.budget import candidates
from tersor.compress.slicing.cutter import Cutter

NO_FIT = 1e12
"""A ridge under which no weight moves."""
TEMPERATURES, RIDGES = (0.1, 0.3, 1.0, 1e9), (1e-2, 1.0)
"""Of MoDeGPT: the best on the held-out text is reported."""

Row = dict[str, Any]


def windows(checkpoint: Checkpoint, text: Path, other: Path | None = None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Calibration and held-out windows."""
    rows = in_windows(checkpoint, text)
    edge = len(rows) if other else int(len(rows) * 0.6)
    heldout = in_windows(checkpoint, other) if other else rows[edge:]
    return list(rows[:edge][:128]), list(heldout[:96])


def in_windows(checkpoint: Checkpoint, path: Path, length: int = 256) -> np.ndarray:
    """Tokens of a text or of a table's `text`, int64 `[n, length]`."""
    assert checkpoint.tokenizer is not None
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        text = "\n".join(json.loads(record)["text"] for record in text.splitlines())
    ids = checkpoint.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.array(ids[: len(ids) // length * length]).reshape(-1, length)


def perplexity(model: Any, layout: Layout, heldout: list[np.ndarray]) -> float:
    return math.exp(judge(model, model, layout, batches(heldout, layout)))


class Trial:
    """One checkpoint and text, one share to remove; a method a function that returns a row."""

    def __init__(self, directory: Path, texts: tuple[Path, Path | None], remove: float, latency: bool):
        self.dense, self.remove, self.latency = Checkpoint.load(directory), remove, latency
        self.layout = self.dense.layout
        self.calibration, self.heldout = windows(self.dense, *texts)
        self.spent = {"cpu": 0.0, "wall": 0.0, "memory": 0.0}

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count what happens inside."""
        begin, wall, memory = time.process_time(), time.perf_counter(), peak()
        yield
        self.spent["cpu"] += time.process_time() - begin
        self.spent["wall"] += time.perf_counter() - wall
        self.spent["memory"] = max(self.spent["memory"], peak() - memory)

    def row(self, parameters: int, sizes: str, value: float, **more: Any) -> Row:
        """What every row holds."""
        return {"reduction": 1 - parameters / self.layout.parameters, "sizes": sizes, "perplexity": value, **more}

    def stock(self, checkpoint: Checkpoint, sizes: dict[str, int], **more: Any) -> Row:
        """The row of a result that plain transformers loads."""
        said = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        value = perplexity(checkpoint.model(), checkpoint.layout, self.heldout)
        faster = speed_ups(self.dense, checkpoint) if self.latency else {}
        return self.row(checkpoint.layout.parameters, said, value, **faster, **more)

    def dense_row(self) -> Row:
        """What everything is held against."""
        return self.stock(self.dense, {})

    def slicegpt(self) -> Row:
        """The first baseline."""
        goal = self.layout.parameters * (1 - self.remove)
        with self.clock():
            classic = Classic(self.dense, self.calibration)
            k = max(k for k in range(1, self.layout.families["hidden"]) if classic_parameters(self.layout, k) <= goal)
            projections = classic.cut(k)
        value = classic.score(projections, lambda model: perplexity(model, classic.layout, self.heldout))
        faster = speed_ups(self.dense, same_shapes(self.layout, k)) if self.latency else {}
        return self.row(classic_parameters(self.layout, k), f"k {k}", value, **faster)

    def modegpt(self) -> Row:
        """The second, with the values of its two constants that suit the held-out text best."""
        goal, found = round(self.layout.parameters * (1 - self.remove)), []
        with self.clock():
            blocks = measured(self.dense.model(), self.layout, batches(self.calibration, self.layout))
        for temperature in TEMPERATURES:
            for ridge in RIDGES:
                began = time.process_time()
                tensors, left = modegpt(self.layout, self.dense.tensors, blocks, goal, temperature, ridge)
                seconds = time.process_time() - began
                value = perplexity(Checkpoint(self.layout, tensors).model(), self.layout, self.heldout)
                found.append((value, left, temperature, ridge, seconds))
        value, left, temperature, ridge, seconds = min(found)
        self.spent["cpu"] += seconds
        return self.row(left, f"ε {temperature:g}, λ {ridge:g}", value)

    def cut(self, axes: list[str], ridge: float, pca: bool = False) -> Row:
        """A part of slice: only these axes, the cut alone, or a basis by PCA."""
        options, context = candidates(self.layout, self.remove, axes), Context(self.calibration)
        with self.clock():
            cutter = Cutter.measured(self.dense, options, context, ridge)
            if pca:
                data = batches(self.calibration, self.layout)
                plain = sensitivity(cutter.dense(False)[2], self.layout, data, gradients=False)
                cutter.basis = principal(plain.moments)
            after, tensors, _ = cutter.cut(options[0], batches(self.calibration, self.layout), context)
        return self.stock(Checkpoint(after, tensors), options[0])

    def sliced(self, **options: Any) -> Row:
        """The pass itself."""
        copy, details = Checkpoint(self.layout, dict(self.dense.tensors)), {}
        before = time.process_time()
        with self.clock():
            Slice(remove=self.remove, **options).apply(copy, Context(self.calibration, details=details))
        seconds = details["seconds"]
        share = seconds["search"] / sum(seconds.values())
        spent = time.process_time() - before
        self.spent["cpu"] -= share * spent
        return self.stock(copy, details["sizes"], search=share * spent)


METHODS: dict[str, tuple[str, Callable[[Trial], Row]]] = {
    "slicegpt": ("SliceGPT: PCA by block, shortcuts", Trial.slicegpt),
    "modegpt": ("MoDeGPT, its best ε and λ", Trial.modegpt),
    "pca": ("one basis, unit-RMS PCA, no fits", lambda t: t.cut(["hidden"], NO_FIT, pca=True)),
    "basis": ("one basis, weighted by the loss, no fits", lambda t: t.cut(["hidden"], NO_FIT)),
    "hidden": ("… + least squares: `on: [hidden]`", lambda t: t.cut(["hidden"], 1e-2)),
    "ffn": ("MLP units + least squares: `on: [ffn]`", lambda t: t.cut(["ffn"], 1e-2)),
    "head_dim": ("narrower heads: `on: [head_dim]`", lambda t: t.sliced(on=["head_dim"])),
    "half": ("hidden and ffn, `split: 0.5`", lambda t: t.sliced(on=["hidden", "ffn"], split=0.5)),
    "slice": ("slice, as it comes", lambda t: t.sliced()),
}
DEFAULT = ["dense", *(name for name in METHODS if name != "head_dim")]
HEADINGS = {"torch prefill": "torch: prompt", "torch decode": "torch: token", "onnx prefill": "ONNX: prompt",
            "onnx decode": "ONNX: token"}  # fmt: skip


def peak() -> float:
    """The process' peak resident memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run(
    method: str, directory: Path, texts: tuple[Path, Path | None], remove: float, threads: int, latency: bool
) -> Row:
    """One row, in a process of its own."""
    torch.set_num_threads(threads)
    trial = Trial(directory, texts, remove, latency)
    row = METHODS[method][1](trial) if method in METHODS else trial.dense_row()
    return {"method": method, "remove": remove, **row, **trial.spent}


def line(row: Row, latency: bool) -> str:
    name = METHODS[row["method"]][0] if row["method"] in METHODS else "dense"
    search = f" + {row['search']:.0f}" if row.get("search", 0) > 0.1 else ""
    cells = [name, f"{row['reduction']:.1%}", row["sizes"], f"{row['perplexity']:.2f}"]
    cells += [f"{row['cpu']:.1f}{search}", f"{row['wall']:.1f}", f"{row['memory']:.0f}"]
    cells += [f"{row[key]:.2f}×" if key in row else "–" for key in HEADINGS] if latency else []
    return f"| {' | '.join(cells)} |"


def plot(rows: list[Row], path: Path) -> None:
    """Perplexity over real reduction, a line a method, drawn as the report draws; slice itself stands out."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter
    from tersor.compress.reporting.figures import LIMIT, MAIN, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        axes = figure.add_subplot(xlabel="% of real parameters removed", ylabel="perplexity", yscale="log")
        for number, (method, (name, _)) in enumerate(METHODS.items()):
            points = sorted((100 * r["reduction"], r["perplexity"]) for r in rows if r["method"] == method)
            look = {"color": MAIN, "linewidth": 2.5} if method == "slice" else {"color": f"C{number}", "linewidth": 1}
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name.replace("`", ""), **look)
        for row in (r for r in rows if r["method"] == "dense"):
            axes.axhline(row["perplexity"], color=LIMIT, linestyle=":", label="dense")
        axes.yaxis.set_major_locator(MaxNLocator(8))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("heldout", type=Path, nargs="?")
    parser.add_argument("--remove", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--methods", nargs="+", choices=["dense", *METHODS], default=DEFAULT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    if asked.checkpoint is None and (asked.rows is None or not asked.rows.is_file()):
        parser.error("nothing to measure: expected CHECKPOINT TEXT, or --rows FILE of an earlier run")
    if asked.checkpoint is not None and asked.text is None:
        parser.error("no TEXT beside CHECKPOINT")
    rows = [json.loads(text) for text in asked.rows.read_text("utf-8").splitlines()] if asked.checkpoint is None else []
    heads = ["method", "real reduction", "sizes", "perplexity", "CPU s (+ search)", "wall s", "MiB"]
    heads += list(HEADINGS.values()) if asked.latency else []
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    for row in rows:
        print(line(row, asked.latency))
    for remove in asked.remove if asked.checkpoint else ():
        for method in asked.methods:
            if method == "dense" and remove != asked.remove[0]:
                continue
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
                texts = (asked.text, asked.heldout)
                arguments = (method, asked.checkpoint, texts, remove, asked.threads, asked.latency)
                rows.append(child.submit(run, *arguments).result())
            print(line(rows[-1], asked.latency), flush=True)
            if asked.rows:
                with asked.rows.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    if asked.plot:
        plot(rows, asked.plot)


if __name__ == "__main__":
    main()
