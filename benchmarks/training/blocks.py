"""One block of a network, dense and sparse: seconds, bytes, and what is left of it in ONNX Runtime."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tersor.sparse.meters import measure, saved_bytes
from tersor.sparse.swat import SparseTraining, Sparsity, swat
from tersor.sparse.swat.groups import Group
from torch import nn


def linear() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(768, 3072)), torch.randn(2048, 768)


def feed_forward() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)), torch.randn(1024, 768)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTLayer

    config = ViTConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa")
    return ViTLayer(config), torch.randn(4, 256, 768)


def convolutions() -> tuple[nn.Module, torch.Tensor]:
    parts = [(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(3)]
    modules = [module for part in parts for module in part]
    return nn.Sequential(*modules, nn.Conv2d(64, 64, 3, padding=1)), torch.randn(16, 64, 32, 32)


BLOCKS = {
    "Linear 768→3072": linear,
    "MLP 768→3072→768": feed_forward,
    "transformer block": transformer,
    "3 × conv-BN-ReLU, conv": convolutions,
}


def groups(model: nn.Module) -> list[Group] | None:
    """Units of blocks that are no model of their own: of a lone Linear, of a ViT layer."""
    units = torch.arange(3072)
    if isinstance(model, nn.Sequential):
        return [Group("0", 3072, {"0": (units, None)})] if len(model) == 1 else None
    heads = torch.arange(12).repeat_interleave(64)
    attention = {f"attention.{name}": (heads, None) for name in ("q_proj", "k_proj", "v_proj")}
    return [
        Group("ffn", 3072, {"mlp.fc1": (units, None), "mlp.fc2": (None, units)}),
        Group("heads", 12, {**attention, "attention.o_proj": (None, heads)}),
    ]


def block_step(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Forward and backward, as in the middle of a network: the input needs a gradient."""

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        x.grad = None
        y = model(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        return y

    return step


def cases(dtype: torch.dtype) -> dict[str, dict[str, Any] | None]:
    found: dict[str, dict[str, Any] | None] = {"dense": None}
    if dtype == torch.float32:
        found["exact 80%"] = {"weights": 0.8, "activations": 0.8}
        found["sampled 80%"] = {"mode": "sampled", "weights": 0.0, "activations": 0.8}
    for share in (0.5, 0.7, 0.8, 0.9):
        found[f"structured {share:.0%}"] = {"mode": "structured", "weights": share, "activations": share}
    return found


def attached(model: nn.Module, words: dict[str, Any] | None) -> Any:
    if words is None:
        return contextlib.nullcontext()
    training = SparseTraining(
        model, Sparsity(ramp="none", exempt=(), **words), 1, groups(model) if "mode" in words else None
    )

    @contextlib.contextmanager
    def put() -> Any:
        training.attach()
        try:
            yield training
        finally:
            training.detach()

    return put


def speed(rounds: int) -> dict[str, dict[str, float]]:
    """Print milliseconds of a dense step, how often a sparse one fits into it, and the share of products that ran."""
    print("| block | dtype | dense, ms | " + " | ".join(list(cases(torch.float32))[1:]) + " |")
    print("|---|---|---|" + "---|" * (len(cases(torch.float32)) - 1))
    found: dict[str, dict[str, float]] = {}
    for name, make in BLOCKS.items():
        for dtype in (torch.float32, torch.bfloat16):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model, x = make()
            model, x = model.to(dtype).train(), x.to(dtype).requires_grad_()
            step, sparse, spent, ran = block_step(model, x), {}, {}, {}
            for case, words in cases(dtype).items():
                sparse[case], spent[case] = attached(model, words), []
                with sparse[case]() if words else sparse[case]:
                    step()
                    ran[case] = measure(step).realised
            for _ in range(rounds):
                for case, words in cases(dtype).items():
                    with sparse[case]() if words else sparse[case]:
                        began = time.process_time()
                        step()
                        spent[case].append(time.process_time() - began)
            label = str(dtype).removeprefix("torch.")
            cells, ratios = [], {}
            for case in list(cases(torch.float32))[1:]:
                if case not in spent:
                    cells.append("–")
                    continue
                pairs = zip(spent["dense"], spent[case], strict=True)
                ratios[case] = statistics.median(a / b for a, b in pairs)
                cells.append(f"{ratios[case]:.2f}× ({ran[case] / ran['dense']:.0%})")
            found[f"{name}, {label}"] = ratios
            took = statistics.median(spent["dense"]) * 1e3
            print(f"| {name} | {label} | {took:.0f} | " + " | ".join(cells) + " |", flush=True)
    print("\n× dense of the same dtype; in brackets, the share of dense FLOPs that ran.")
    return found


def memory() -> dict[str, dict[str, float]]:
    """Print the bytes that autograd holds, as a share of dense."""
    rows: dict[str, dict[str, Any] | None] = {"dense": None}
    for share in (0.5, 0.7, 0.8, 0.9):
        rows[f"exact {share:.0%}"] = {"activations": share}
    for share in (0.8, 0.9):
        rows[f"exact {share:.0%}, bfloat16 values"] = {"activations": share, "values": "bfloat16"}
    rows["sampled 80%"] = {"mode": "sampled", "activations": 0.8}
    rows["structured 80%"] = {"mode": "structured", "weights": 0.8, "activations": 0.8}
    print("| block | dense, MB | " + " | ".join(list(rows)[1:]) + " |\n|---|---|" + "---|" * (len(rows) - 1))
    shares: dict[str, dict[str, float]] = {}
    for name, make in BLOCKS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x = make()
        model.train()
        held: dict[str, int] = {}
        for case, words in rows.items():
            sparse = attached(model, words)
            with sparse() if words else sparse:
                for _ in range(2):  # the first tells activations who reads them
                    with saved_bytes(model) as found:
                        y = model((x * 1.0).requires_grad_())
                    del y
            held[case] = found.total
        shares[name] = {case: total / held["dense"] for case, total in held.items()}
        cells = " | ".join(f"{share:.1%}" for share in list(shares[name].values())[1:])
        print(f"| {name} | {held['dense'] / 1e6:.1f} | {cells} |", flush=True)
    return shares


def bars(title: str, found: dict[str, dict[str, float]], path: Path) -> None:
    """A group of bars a block, a colour a method; the line is dense."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(case for row in found.values() for case in row if case != "dense"))
    figure, axes = pyplot.subplots(figsize=(9, 4))
    for number, case in enumerate(methods):
        places = np.arange(len(found)) + (number - len(methods) / 2) * 0.8 / len(methods)
        axes.bar(places, [row.get(case, 0.0) for row in found.values()], 0.8 / len(methods), label=case, align="edge")
    axes.axhline(1, color="#8896a5", linewidth=1)
    axes.set_xticks(range(len(found)), [name.replace(", ", "\n") for name in found], fontsize=7)
    axes.set(title=title)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def onnx(rounds: int) -> None:
    """An MLP after structured training in ONNX Runtime: dense, with its zeros, and without them."""
    import tempfile

    import onnxruntime
    from tersor.export.graph import trace, zeros

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = feed_forward()
        x = x[None, :256]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    print("| MLP 768→3072→768, 256 tokens | ms | × dense | largest difference |\n|---|---|---|---|")

    def session(remove: bool) -> Any:
        graph = trace.trace(model, [x.repeat(2, 1, 1)], ["x"], ["y"], 23, axes={0: "batch"})
        if remove:
            zeros.shrink(graph)
        with tempfile.TemporaryDirectory() as folder:
            trace.save(graph, Path(folder))
            return onnxruntime.InferenceSession(Path(folder) / trace.MODEL_FILE, options, ["CPUExecutionProvider"])

    rows, truth = {"dense": session(False)}, {"dense": model(x).detach().numpy()}
    for share in (0.5, 0.8, 0.9):
        with swat(model, mode="structured", weights=share, activations=share, ramp="none", exempt=(), steps=1):
            pass
        rows |= {f"{share:.0%} zeros": session(False), f"{share:.0%} compacted": session(True)}
        truth |= dict.fromkeys((f"{share:.0%} zeros", f"{share:.0%} compacted"), model(x).detach().numpy())
    spent: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run_session in rows.items():
            began = time.process_time()
            y = run_session.run(None, {"x": x.numpy()})[0]
            spent[name].append(time.process_time() - began)
            truth[f"{name} error"] = np.abs(y - truth[name]).max()
    for name, times in spent.items():
        ratio = statistics.median(a / b for a, b in zip(spent["dense"], times, strict=True))
        print(f"| {name} | {statistics.median(times) * 1e3:.1f} | {ratio:.2f} | {truth[f'{name} error']:.1g} |")
