"""Methods of sparse training on one task, paired by seed: scores against dense, counted FLOPs, losses."""

from __future__ import annotations

import contextlib
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines.sparse_training import Masks
from tersor.sparse.meters import measure
from tersor.sparse.meters.flops import saved_work
from tersor.sparse.swat import SparseTraining, Sparsity, swat

from .tasks import Task


@dataclass
class Method:
    """How it is trained: SWAT's options, or a baseline; steps are those of the task unless FLOPs are to be equal."""

    name: str
    words: dict[str, Any] | None = None
    baseline: str = ""
    share: float = 0.0
    equal: str = ""
    bfloat16: bool = False
    scores: list[float] = field(default_factory=list)
    counted: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)


def methods() -> list[Method]:
    """Dense, ours, and what it is held against; exact mode and the paper's recipe differ by ramp and exempt layers."""
    found = [Method("dense"), Method("dense bfloat16", bfloat16=True)]
    for s in (0.8, 0.9):
        both = {"weights": s, "activations": s}
        paper = {**both, "ramp": "none", "drop": "all", "exempt": ("first",)}
        found.append(Method(f"ours, exact {s:.0%}", both))
        found.append(Method(f"paper's recipe {s:.0%}", paper))
        found.append(Method(f"paper's recipe {s:.0%} =", paper, equal=f"ours, exact {s:.0%}"))
        for baseline in ("prune", "SET", "RigL"):
            found.append(Method(f"{baseline} {s:.0%} =", baseline=baseline, share=s, equal=f"ours, exact {s:.0%}"))
    found += [Method("ours, sampled 80%", {"mode": "sampled", "weights": 0.0, "activations": 0.8})]
    for s in (0.7, 0.8):
        found.append(Method(f"ours, structured {s:.0%}", {"mode": "structured", "weights": s, "activations": s}))
    return found


def rate(done: int, steps: int) -> float:
    """Share of the highest learning rate: it rises over the first twentieth and falls as a cosine to 0."""
    return min(1.0, 20 * (done + 1) / steps) * 0.5 * (1 + math.cos(math.pi * done / steps))


def run(task: Task, method: Method, seed: int, budget: float | None) -> tuple[float, float, list[float]]:
    """Score, counted FLOPs and losses; with a budget, as many steps as it pays for."""
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
        masks, counted, losses = None, 0.0, []
        if method.baseline:
            grow = {"prune": None, "SET": "random", "RigL": "gradient"}[method.baseline]
            layers = {name: layer.module for name, layer in probe.layers.items()}
            masks = Masks(layers, optimizer, method.share, steps, seed, grow, start)
        context = swat(model, steps=steps, seed=seed, **method.words) if method.words else contextlib.nullcontext()
        with context as training:
            for step in range(steps):
                x, y = task.batch(seed, step)
                with torch.autocast("cpu", torch.bfloat16, enabled=method.bfloat16 or task.bfloat16):
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
        return task.score(model.eval(), seed), counted, losses


def compare(task: Task, seeds: int, only: list[str] | None) -> list[Method]:
    from scipy.stats import t

    dense, *others = [m for m in methods() if not (m.bfloat16 and task.bfloat16)]
    chosen = [dense, *(m for m in others if only is None or any(word in m.name for word in only))]
    made = {m.name: m for m in chosen}
    unit = "%" if task.higher else "nats"
    dtype = "bfloat16" if task.bfloat16 else "float32"
    print(f"\n{task.name}: {task.steps} steps, {seeds} paired seeds, products in {dtype}\n")
    print(f"| method | {unit} | − dense, mean [95 %] | counted FLOPs of dense |\n|---|---|---|---|", flush=True)
    for method in chosen:
        for seed in range(seeds):
            budget = made[method.equal].counted[seed] if method.equal else None
            score, counted, losses = run(task, method, seed, budget)
            method.scores.append(score)
            method.counted.append(counted)
            method.losses.append(losses)
        gaps = [a - b for a, b in zip(method.scores, dense.scores, strict=True)]
        spread = ""
        if seeds > 1:
            spread = f" ± {t.ppf(0.975, seeds - 1) * statistics.stdev(gaps) / math.sqrt(seeds):.2f}"
        share = statistics.mean(a / b for a, b in zip(method.counted, dense.counted, strict=True))
        mean = statistics.mean(method.scores)
        print(f"| {method.name} | {mean:.3g} | {statistics.mean(gaps):+.2f}{spread} | {share:.2f} |", flush=True)
    return chosen


def plot(task: Task, chosen: list[Method], path: Path) -> None:
    """Loss over counted FLOPs, the mean of all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    whole = chosen[0].counted[0]
    for method in chosen:
        losses = np.mean(method.losses, axis=0) if len({len(x) for x in method.losses}) == 1 else method.losses[0]
        smooth = np.convolve(losses, np.ones(25) / 25, "valid")
        axes.plot(np.linspace(0, method.counted[0] / whole, len(smooth)), smooth, label=method.name, linewidth=1)
    axes.set(title=task.name, xlabel="counted FLOPs of the dense run", ylabel="training loss", yscale="log")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
