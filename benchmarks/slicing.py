"""Perplexity against real parameters: slice beside SliceGPT's algorithm and beside its own parts.

    python benchmarks/slicing.py CHECKPOINT TEXT [--remove 0.1 0.2 0.3] [--plot FILE.png]

Protocol: the text in windows of 256 tokens; of the first 60 % the first 128 calibrate, of the rest the first
96 are scored (weights as stored, computed in float32). Every row at the same real parameters: `remove` counts
the model as it is loaded, tied tensors once. The baseline is the algorithm of SliceGPT (arXiv 2401.15024) as
Microsoft's code has it: per-block uncentred PCA on the already compressed stream, shortcut matrices, the head
whole and untied. It lives here and not in the product: its result has no stock form, so it is run as the
dense model with its projections put in. Seconds are CPU time, summed over threads (wall clock says little on
a shared machine).
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tersor.compress.calibration.batches import batches
from tersor.compress.calibration.loss import judge
from tersor.compress.calibration.side import Side
from tersor.compress.calibration.stages import stages
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.layout import Layout
from tersor.compress.pass_ import Context
from tersor.compress.passes.slice import Slice
from tersor.compress.slicing.basis import principal, sensitivity
from tersor.compress.slicing.budget import Sizes, candidates, head_axis
from tersor.compress.slicing.cutter import Cutter
from tersor.compress.slicing.fuse import fuse

NO_FIT = 1e12
"""A ridge under which no weight moves."""


def windows(checkpoint: Checkpoint, text: Path, length: int = 256) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Calibration and held-out windows."""
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer(text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    rows = np.array(ids[: len(ids) // length * length]).reshape(-1, length)
    edge = int(len(rows) * 0.6)
    return list(rows[:edge][:128]), list(rows[edge:][:96])


def perplexity(model: Any, layout: Layout, heldout: list[np.ndarray]) -> float:
    return math.exp(judge(model, model, layout, batches(heldout, layout)))


def classic_parameters(layout: Layout, k: int) -> int:
    """Of SliceGPT's result: every stage at width k, two shortcuts a block, the head untied and whole."""
    d, depth = layout.families["hidden"], layout.depth
    vocab = layout.families["vocab"]
    last = layout.inner_size(layout.branches(depth - 1)[-1])
    inside = layout.resized({}, untie=True).parameters - 2 * vocab * d - d * (2 * depth + 1)
    return vocab * (k + d) + inside * k // d + last * (d - k) + (2 * depth - 1) * k * k + k * d


class Classic:
    """SliceGPT's algorithm on a fused model: one projection a stage, found on the stream as compressed so far."""

    def __init__(self, checkpoint: Checkpoint, calibration: list[np.ndarray]):
        self.layout, tensors = fuse(checkpoint.layout.resized({}, untie=True), untied(checkpoint))
        self.model = Checkpoint(self.layout, tensors).model()
        self.data = batches(calibration, self.layout)

    @torch.no_grad()
    def cut(self, k: int) -> list[torch.Tensor]:
        """Projections `[d, d]` of rank k: on the embedding, then behind every stage; the last is whole."""
        side = Side.at_start(self.model, self.layout, self.data)
        found = [self._project(side, k)]
        for block in range(self.layout.depth):
            with ExitStack() as passed:
                for stage in stages(self.layout, block):
                    side.move(stage)
                    whole = block == self.layout.depth - 1 and not stage.after
                    found.append(self._project(side, self.layout.families["hidden"] if whole else k))
                    if stage.after:
                        passed.enter_context(side.without(stage))
        return found

    def _project(self, side: Side, k: int) -> torch.Tensor:
        moments = sum(s.flatten(0, 1).double().T @ s.flatten(0, 1).double() for s in side.streams)
        q = principal(moments)[:, :k]
        projection = (q @ q.T).float()
        side.streams = [stream @ projection for stream in side.streams]
        return projection

    def score(self, projections: list[torch.Tensor], heldout: list[np.ndarray]) -> float:
        """Perplexity of the fused model with the projections put in."""
        seen: dict[str, torch.Tensor] = {}
        with ExitStack() as hooks:

            def hook(name: str, before: bool, function: Callable[..., Any]) -> None:
                module = self.model.get_submodule(name)
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                hooks.callback(register(function).remove)

            first = self.layout.full(self.layout.arch.embeddings[0])
            hook(first, False, lambda _m, _a, out: out @ projections[0])
            number = 0
            for block in range(self.layout.depth):
                for stage in stages(self.layout, block):
                    number += 1

                    def remember(_m: Any, args: Any, norm: str = stage.norm) -> None:
                        seen[norm] = args[0]

                    def put_in(
                        _m: Any, _a: Any, out: Any, norm: str = stage.norm, p: torch.Tensor = projections[number]
                    ) -> Any:
                        return (seen[norm] + out) @ p - seen[norm]

                    hook(stage.norm, True, remember)
                    hook(stage.writers[0].module, False, put_in)
            return perplexity(self.model, self.layout, heldout)


def untied(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}


def rows(directory: Path, text: Path, remove: float) -> list[dict[str, Any]]:
    """One row a method: its name, real reduction, sizes, perplexity, seconds."""
    dense = Checkpoint.load(directory)
    calibration, heldout = windows(dense, text)
    layout, context = dense.layout, Context(calibration)
    goal, found = layout.parameters * (1 - remove), []

    def add(name: str, parameters: int, sizes: str, value: float, seconds: float) -> None:
        row = {"method": name, "reduction": 1 - parameters / layout.parameters, "sizes": sizes}
        found.append({**row, "perplexity": value, "seconds": seconds})
        print(f"| {name} | {row['reduction']:.1%} | {sizes} | {value:.2f} | {seconds:.1f} |", flush=True)

    began = time.process_time()
    classic = Classic(dense, calibration)
    k = max(k for k in range(1, layout.families["hidden"]) if classic_parameters(layout, k) <= goal)
    projections = classic.cut(k)
    seconds = time.process_time() - began
    value = classic.score(projections, heldout)
    add("per-block PCA (SliceGPT's algorithm)", classic_parameters(layout, k), f"k {k}", value, seconds)

    def cut(name: str, options: list[Sizes], ridge: float, pca: bool = False) -> None:
        start = time.process_time()
        cutter = Cutter.measured(dense, options, context, ridge)
        if pca:
            plain = sensitivity(cutter.dense(False)[2], layout, batches(calibration, layout), gradients=False)
            cutter.basis = principal(plain.moments)
        after, tensors, _ = cutter.cut(options[0], batches(calibration, layout), context)
        spent = time.process_time() - start
        model = Checkpoint(after, tensors).model()
        said = ", ".join(f"{axis} {size}" for axis, size in options[0].items())
        add(name, after.parameters, said, perplexity(model, after, heldout), spent)

    hidden = candidates(layout, remove, ["hidden"])
    cut("one basis, unit-RMS PCA, no fits", hidden, NO_FIT, pca=True)
    cut("one basis, weighted by the loss, no fits", hidden, NO_FIT)
    cut("… + least squares (`on: [hidden]`)", hidden, 1e-2)
    cut("MLP units + least squares (`on: [ffn]`)", candidates(layout, remove, ["ffn"]), 1e-2)
    for name, on in (("hidden and ffn, split by the loss", ["hidden", "ffn"]), ("slice (default)", None)):
        if on is None and not head_axis(layout):
            continue
        copy, details = Checkpoint(layout, dict(dense.tensors)), {}
        Slice(remove=remove, on=on).apply(copy, Context(calibration, details=details))
        spent = details["seconds"]
        value = perplexity(copy.model(), copy.layout, heldout)
        said = ", ".join(f"{axis} {size}" for axis, size in details["sizes"].items())
        search = f" (search {spent['search']:.0f} s apart)" if spent["search"] > 0.1 else ""
        add(name + search, copy.layout.parameters, said, value, spent["measure"] + spent["cut"])
    return found


def plot(table: dict[float, list[dict[str, Any]]], dense: float, path: Path) -> None:
    """Perplexity over reduction, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(row["method"].split(" (search")[0] for found in table.values() for row in found):
        points = [row for found in table.values() for row in found if row["method"].startswith(method)]
        points.sort(key=lambda row: row["reduction"])
        axes.plot([r["reduction"] for r in points], [r["perplexity"] for r in points], marker="o", label=method)
    axes.axhline(dense, color="grey", linestyle=":", label="dense")
    axes.set(xlabel="share of real parameters removed", ylabel="perplexity", yscale="log")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--remove", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    dense = Checkpoint.load(options.checkpoint)
    _, heldout = windows(dense, options.text)
    base, count = perplexity(dense.model(), dense.layout, heldout), dense.layout.parameters
    print(f"dense: {count:,} parameters, perplexity {base:.3f}, {torch.get_num_threads()} threads\n")
    print("| method | real reduction | sizes | perplexity | CPU seconds |\n|---|---|---|---|---|")
    table = {remove: rows(options.checkpoint, options.text, remove) for remove in options.remove}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"\npeak memory of the process: {peak:,.0f} MiB")
    if options.plot:
        plot(table, base, options.plot)


if __name__ == "__main__":
    main()
