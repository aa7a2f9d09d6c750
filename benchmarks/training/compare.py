"""Methods of sparse training on one task, paired by seed: scores against dense, counted FLOPs, losses."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines.sparse_training import Masks
from tersor.sparse.meters import measure
from tersor.sparse.meters.flops import saved_work
from tersor.sparse.swat import SparseTraining, Sparsity, swat

from .tasks import Task

RAMP = 0.1
"""Share of the steps over which ours lets weight sparsity grow: a longer one buys less than as many FLOPs in steps."""
POINTS = 100
"""Of a loss curve."""


@dataclass
class Method:
    """How it is trained: SWAT's options, or a baseline; steps are those of the task unless FLOPs are to be equal.

    `bfloat16` None: as the task. `runs` by seed.
    """

    name: str
    words: dict[str, Any] | None = None
    baseline: str = ""
    share: float = 0.0
    equal: str = ""
    bfloat16: bool | None = None
    runs: dict[int, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Score, FLOPs counted over all steps, and the loss in `POINTS` equal parts of them."""

    score: float
    counted: float
    steps: int
    losses: list[float]


def methods(bfloat16: bool = False) -> list[Method]:
    """Dense, ours, and what it is held against.

    Exact mode and the paper's recipe differ by ramp, exempt layers, and by what an activation or a norm keeps anyway.
    Structured mode drops units and, unless all rows stay, as large a share of the rows that weight gradients read:
    tokens of a text, images of a batch.
    """
    other = Method("dense float32", bfloat16=False) if bfloat16 else Method("dense bfloat16", bfloat16=True)
    found = [Method("dense"), other]
    for s in (0.8, 0.9):
        both = {"weights": s, "activations": s}
        paper = {**both, "ramp": "none", "drop": "all", "exempt": ("first",)}
        found.append(Method(f"ours, exact {s:.0%}", {**both, "ramp_share": RAMP}))
        ours = f"ours, exact {s:.0%}"
        more = 1 - (1 - s) / 2  # dropped activations cost least, and what they save buys steps
        found.append(Method(f"{ours}, activations {more:.0%} =", {**paper, "activations": more}, equal=ours))
        found.append(Method(f"paper's recipe {s:.0%}", paper))
        found.append(Method(f"paper's recipe {s:.0%} =", paper, equal=ours))
        for baseline in ("prune", "SET", "RigL"):
            found.append(Method(f"{baseline} {s:.0%} =", baseline=baseline, share=s, equal=ours))
    found += [Method("ours, sampled 80%", {"mode": "sampled", "weights": 0.0, "activations": 0.8})]
    for s in (0.7, 0.8):
        units = {"mode": "structured", "weights": s}
        found.append(Method(f"ours, structured {s:.0%}", {**units, "activations": s}))
        found.append(Method(f"ours, structured {s:.0%}, all rows", {**units, "activations": 0.0}))
    return found


def rate(done: int, steps: int) -> float:
    """Share of the highest learning rate: it rises over the first twentieth and falls as a cosine to 0."""
    return min(1.0, 20 * (done + 1) / steps) * 0.5 * (1 + math.cos(math.pi * done / steps))


def run(task: Task, method: Method, seed: int, budget: float | None) -> Run:
    """Train; with a budget of FLOPs, for as many steps as it pays for."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.model()
        x, y = task.batch(seed, 0)
        exempt = (method.words or {}).get("exempt", ("first", "last"))
        probe = SparseTraining(model, Sparsity(ramp="none", exempt=exempt), 1)
        probe.attach()
        whole = measure(lambda: task.loss(model(x), y).backward(), probe).dense
        probe.detach()
        works = {name: layer.work for name, layer in probe.layers.items()}
        model.zero_grad()
        sparse = whole - 3 * method.share * sum(works.values())
        steps, start = task.steps, 0
        if budget is not None and method.baseline == "prune":  # half of the FLOPs for each phase
            start = max(1, round(budget / 2 / whole))
            steps = start + round(budget / 2 / sparse)
        elif budget is not None and method.baseline:
            steps = round(budget / sparse)
        elif budget is not None:
            reduced = whole - sum(works.values()) * (2 * method.words["weights"] + method.words["activations"])
            steps = round(budget / reduced)
        optimizer = torch.optim.Adam(model.parameters(), lr=task.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rate(done, steps))
        bfloat16 = task.bfloat16 if method.bfloat16 is None else method.bfloat16
        masks, counted, losses = None, 0.0, []
        if method.baseline:
            grow = {"prune": None, "SET": "random", "RigL": "gradient"}[method.baseline]
            layers = {name: layer.module for name, layer in probe.layers.items()}
            masks = Masks(layers, optimizer, method.share, steps, seed, grow, start)
        context = swat(model, steps=steps, seed=seed, **method.words) if method.words else contextlib.nullcontext()
        with context as training:
            for step in range(steps):
                x, y = task.batch(seed, step)
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    loss = task.loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                if masks:
                    masks.before_step()
                optimizer.step()
                schedule.step()
                counted += whole
                if masks:
                    counted -= 3 * (1 - masks.density()) * sum(works.values())
                    masks.after_step()
                if training is not None:
                    counted -= saved_work(training)
                    training.step()
                losses.append(float(loss.detach()))
        means = [float(part.mean()) for part in np.array_split(losses, min(POINTS, steps))]
        return Run(task.score(model.eval(), seed), counted, steps, means)


def compare(task: Task, seeds: int, only: list[str] | None, results: Path | None) -> list[Method]:
    """Train with every method and seed that `results` does not hold yet, and print the table."""
    chosen = [m for m in methods(task.bfloat16) if m.name == "dense" or only is None or m.name in wanted(task, only)]
    made, known = {m.name: m for m in chosen}, Results(results, task)
    for seed in range(seeds):
        for method in chosen:
            budget = made[method.equal].runs[seed].counted if method.equal else None
            method.runs[seed] = known.get(method, seed) or known.put(method, seed, run(task, method, seed, budget))
    unit, dtype = "%" if task.higher else "nats", "bfloat16" if task.bfloat16 else "float32"
    print(f"\n{task.name}: {task.steps} steps, rate {task.rate:g}, {seeds} paired seeds, products in {dtype}\n")
    print(f"| method | steps | {unit} | − dense, mean [95 %] | counted FLOPs of dense |\n|---|---|---|---|---|")
    for method in chosen:
        mean, gap, spread, share = summary(method, chosen[0])
        difference = f"{gap:+.2f}" + (f" ± {spread:.2f}" if seeds > 1 else "")
        if not task.higher:
            difference = f"{gap:+.3f}" + (f" ± {spread:.3f}" if seeds > 1 else "")
        cells = [method.name, method.runs[0].steps, f"{mean:.2f}" if task.higher else f"{mean:.3f}"]
        cells += ["" if method is chosen[0] else difference, f"{share:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return chosen


def wanted(task: Task, only: list[str]) -> set[str]:
    """Names that hold one of the words, and of those that have another's FLOPs, that other."""
    found = [m for m in methods(task.bfloat16) if any(word in m.name for word in only)]
    return {m.name for m in found} | {m.equal for m in found}


def summary(method: Method, dense: Method) -> tuple[float, float, float, float]:
    """Mean score, mean difference from dense, half of its 95 % interval (Student's t), share of dense's FLOPs."""
    from scipy.stats import t

    gaps = [run.score - dense.runs[seed].score for seed, run in method.runs.items()]
    count = len(gaps)
    spread = t.ppf(0.975, count - 1) * statistics.stdev(gaps) / math.sqrt(count) if count > 1 else math.nan
    share = statistics.mean(run.counted / dense.runs[seed].counted for seed, run in method.runs.items())
    return statistics.mean(run.score for run in method.runs.values()), statistics.mean(gaps), spread, share


class Results:
    """Runs in a file of JSON lines: a run that lies there is not trained again."""

    def __init__(self, path: Path | None, task: Task):
        self.path, self.task = path, [task.name, task.steps, task.rate, task.bfloat16]
        self.known: dict[tuple[str, int], Run] = {}
        for line in path.read_text("utf-8").splitlines() if path is not None and path.is_file() else []:
            entry = json.loads(line)
            if entry["task"] == self.task:
                self.known[entry["method"], entry["seed"]] = Run(**entry["run"])

    def get(self, method: Method, seed: int) -> Run | None:
        """The run, if there is one."""
        return self.known.get((method.name, seed))

    def put(self, method: Method, seed: int, found: Run) -> Run:
        """Keep the run and return it."""
        print(f"{self.task[0]}, {method.name}, seed {seed}: {found.score:.4g}", file=sys.stderr, flush=True)
        if self.path is not None:
            entry = {"task": self.task, "method": method.name, "seed": seed, "run": asdict(found)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return found


def plot(task: Task, chosen: list[Method], path: Path) -> None:
    """Loss over counted FLOPs, the mean of all seeds; scores against dense with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8))
    for number, method in enumerate(chosen):
        _, gap, spread, share = summary(method, chosen[0])
        losses = np.mean([run.losses for run in method.runs.values()], axis=0)
        (line,) = left.plot(np.linspace(0, share, len(losses) + 1)[1:], losses, label=method.name, linewidth=1)
        if number:
            interval = None if math.isnan(spread) else spread
            right.errorbar(gap, -number, xerr=interval, fmt="o", color=line.get_color(), markersize=4, capsize=2)
    left.set(title=task.name, xlabel="counted FLOPs of the dense run", ylabel="training loss", yscale="log")
    left.legend(fontsize=6)
    right.axvline(0, color="#8896a5", linewidth=1)
    right.set_yticks(range(-len(chosen) + 1, 0), [m.name for m in reversed(chosen[1:])], fontsize=7)
    right.set(xlabel=f"{'points' if task.higher else 'nats a byte'} held out, minus dense")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
