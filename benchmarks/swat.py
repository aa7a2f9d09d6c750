"""Sparse training beside dense training and the field's methods: seconds, bytes, accuracy.

    python benchmarks/swat.py speed
    python benchmarks/swat.py memory
    python benchmarks/swat.py onnx
    python benchmarks/swat.py accuracy [--mnist FOLDER] [--cifar FILE.npz] [--seeds 5] [--plot FILE.png]
    python benchmarks/swat.py text [--seeds 3]

`speed` runs forward and backward of one block, a named dense baseline and each method in turn, and prints the median
of their ratios in CPU seconds of one thread (wall clock says little on a shared machine). `accuracy` trains on
scikit-learn's digits, and on MNIST's 10,000 test images (idx files, 8,000 to train) and a CIFAR-10 subset (x_train,
y_train, x_test, y_test) where they are given; seeds are paired: the same split, weights and batches for every method.
`text` trains a byte-level Llama on the text that ships. Methods marked = have as many counted FLOPs as SWAT in their
table, so other steps.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines.sparse_training import Masks
from tersor.sparse.meters import measure, saved_bytes
from tersor.sparse.meters.flops import saved_work
from tersor.sparse.swat import SparseTraining, Sparsity, swat
from tersor.sparse.swat.groups import Group
from torch import nn
from torch.nn import functional


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
        found["exact 80 %"] = {"weights": 0.8, "activations": 0.8}
        found["sampled 80 %"] = {"mode": "sampled", "weights": 0.0, "activations": 0.8}
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


def speed(rounds: int) -> None:
    print("| block | dtype | method | ms | × dense, same dtype | FLOPs realised |\n|---|---|---|---|---|---|")
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
            for case, times in spent.items():
                ratio = statistics.median(a / b for a, b in zip(spent["dense"], times, strict=True))
                share = ran[case] / ran["dense"]
                label = str(dtype).removeprefix("torch.")
                took = statistics.median(times) * 1e3
                print(f"| {name} | {label} | {case} | {took:.0f} | {ratio:.2f} | {share:.0%} |", flush=True)


def memory() -> None:
    print("| block | method | saved bytes of dense |\n|---|---|---|")
    for name, make in BLOCKS.items():
        model, x = make()
        model.train()
        rows: dict[str, dict[str, Any] | None] = {"dense": None}
        for share in (0.5, 0.7, 0.8, 0.9):
            rows[f"exact {share:.0%}, float32 values"] = {"activations": share}
            rows[f"exact {share:.0%}, bfloat16 values"] = {"activations": share, "values": "bfloat16"}
        rows["sampled 80 %"] = {"mode": "sampled", "activations": 0.8}
        rows["structured 80 %"] = {"mode": "structured", "weights": 0.8, "activations": 0.8}
        dense = 0
        for case, words in rows.items():
            sparse = attached(model, words)
            with sparse() if words else sparse:
                for _ in range(2):  # the first tells activations who reads them
                    with saved_bytes(model) as found:
                        y = model((x * 1.0).requires_grad_())
                    del y
            dense = dense or found.total
            print(f"| {name} | {case} | {found.total / dense:.1%} |")


def onnx(rounds: int) -> None:
    """An MLP after structured training in ONNX Runtime: dense, with its zeros, and without them."""
    import tempfile

    import onnxruntime
    from tersor.export import trace, zeros

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


@dataclass
class Task:
    """What is trained, by seed."""

    name: str
    steps: int
    model: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    score: Callable[[nn.Module, int], float]
    rate: float = 1e-3
    higher: bool = True
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = functional.cross_entropy


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
    exact = {s: f"SWAT exact {s:.0%}" for s in (0.8, 0.9)}
    found = [Method("dense float32"), Method("dense bfloat16", bfloat16=True)]
    found += [Method(name, {"weights": s, "activations": s}) for s, name in exact.items()]
    found += [Method("SWAT sampled 80 %", {"mode": "sampled", "weights": 0.0, "activations": 0.8})]
    for s in (0.7, 0.8):
        found.append(Method(f"SWAT structured {s:.0%}", {"mode": "structured", "weights": s, "activations": s}))
    for s, name in exact.items():
        paper = {"weights": s, "activations": s, "ramp": "none", "exempt": ("first",)}
        found.append(Method(f"paper's recipe {s:.0%} =", paper, equal=name))
        for baseline in ("prune", "SET", "RigL"):
            found.append(Method(f"{baseline} {s:.0%} =", baseline=baseline, share=s, equal=name))
    return found


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
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        masks, counted, losses = None, 0.0, []
        if method.baseline:
            grow = {"prune": None, "SET": "random", "RigL": "gradient"}[method.baseline]
            layers = {name: layer.module for name, layer in probe.layers.items()}
            masks = Masks(layers, optimizer, method.share, steps, seed, grow, start)
        context = swat(model, steps=steps, seed=seed, **method.words) if method.words else contextlib.nullcontext()
        with context as training:
            for step in range(steps):
                x, y = task.batch(seed, step)
                with torch.autocast("cpu", torch.bfloat16, enabled=method.bfloat16):
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

    chosen = [m for m in methods() if only is None or any(word in m.name for word in (*only, "dense float32"))]
    made = {m.name: m for m in chosen}
    unit = "%" if task.higher else "nats"
    print(f"\n{task.name}: {task.steps} steps, {seeds} paired seeds\n")
    print(f"| method | {unit} | − dense, mean [95 %] | counted FLOPs of dense |\n|---|---|---|---|", flush=True)
    for method in chosen:
        for seed in range(seeds):
            budget = made[method.equal].counted[seed] if method.equal else None
            score, counted, losses = run(task, method, seed, budget)
            method.scores.append(score)
            method.counted.append(counted)
            method.losses.append(losses)
        dense = chosen[0]
        gaps = [a - b for a, b in zip(method.scores, dense.scores, strict=True)]
        half = t.ppf(0.975, seeds - 1) * statistics.stdev(gaps) / math.sqrt(seeds) if seeds > 1 else math.nan
        share = statistics.mean(a / b for a, b in zip(method.counted, dense.counted, strict=True))
        mean = statistics.mean(method.scores)
        print(f"| {method.name} | {mean:.3g} | {statistics.mean(gaps):+.2f} ± {half:.2f} | {share:.2f} |", flush=True)
    return chosen


def classifier(
    name: str, x: torch.Tensor, y: torch.Tensor, test: int, steps: int, model: Callable[[], nn.Module], size: int = 64
) -> Task:
    """A task on images `x`; by seed, another `test` of them are kept back, unless they are the last ones."""

    def split(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        return order[test:], order[:test]

    def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        train = split(seed)[0]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        drawn = train[torch.randint(len(train), (size,), generator=generator)]
        return x[drawn], y[drawn]

    @torch.no_grad()
    def score(trained: nn.Module, seed: int) -> float:
        kept = split(seed)[1]
        right = [(trained(x[part]).argmax(1) == y[part]).float().sum() for part in kept.split(500)]
        return 100 * float(sum(right)) / len(kept)

    return Task(name, steps, model, batch, score)


def mlp(inputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 10),
    )  # fmt: skip


def digits() -> Task:
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    return classifier("digits", x, y, 450, 600, mlp(64))


def mnist(folder: Path) -> Task:
    def idx(pattern: str) -> np.ndarray:
        path = next(folder.glob(pattern))
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = [int.from_bytes(raw[4 + 4 * n : 8 + 4 * n], "big") for n in range(raw[3])]
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

    x = torch.tensor(idx("t10k-images*").astype(np.float32) / 255)
    return classifier("MNIST, 10,000 images", x, torch.tensor(idx("t10k-labels*")).long(), 2000, 1000, mlp(784))


def cifar(file: Path) -> Task:
    from transformers import ResNetConfig, ResNetForImageClassification

    with np.load(file) as data:
        x = np.concatenate([data["x_train"], data["x_test"]]).astype(np.float32) / 255
        y = np.concatenate([data["y_train"], data["y_test"]]).astype(np.int64)
    pixels = torch.tensor((x - x.mean((0, 1, 2))) / x.std((0, 1, 2))).permute(0, 3, 1, 2).contiguous()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = ResNetConfig(
                embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic", num_labels=10
            )
            self.net = ResNetForImageClassification(config)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images).logits

    return classifier("CIFAR-10 subset (JPEG)", pixels, torch.tensor(y), 2000, 400, Net)


def text(length: int = 128, rows: int = 16) -> Task:
    from tersor import recipes
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(next(iter(recipes.__path__))) / "quickstart" / "text"

    def read(name: str) -> torch.Tensor:
        lines = (folder / name).read_text("utf-8").splitlines()
        joined = "\n".join(json.loads(line)["text"] for line in lines).encode()
        return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()

    train, held = read("calibration.jsonl"), read("heldout.jsonl")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = LlamaConfig(
                vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=4, use_cache=False,
            )  # fmt: skip
            self.net = LlamaForCausalLM(config)
            self.config = config

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.net(ids).logits

    def windows(bytes_: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.stack([bytes_[s : s + length + 1] for s in starts.tolist()])
        return found[:, :-1], found[:, 1:]

    def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return windows(train, torch.randint(len(train) - length - 1, (rows,), generator=generator))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def score(model: nn.Module, seed: int) -> float:
        starts = torch.arange(0, len(held) - length - 1, length * 8)
        parts = [windows(held, part) for part in starts.split(64)]
        return statistics.mean(float(loss(model(ids), targets)) for ids, targets in parts)

    return Task("text, nats a byte", 500, Net, batch, score, 3e-3, False, loss)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", nargs="*", default=["speed", "memory", "onnx", "accuracy"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--without-digits", action="store_true")
    parser.add_argument("--only", nargs="+", help="words in the names of methods")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "speed" in options.table:
        speed(options.rounds)
    if "memory" in options.table:
        memory()
    if "onnx" in options.table:
        onnx(options.rounds)
    tasks = []
    if "accuracy" in options.table:
        tasks += [] if options.without_digits else [digits()]
        tasks += [mnist(options.mnist)] if options.mnist else []
        tasks += [cifar(options.cifar)] if options.cifar else []
    if "text" in options.table:
        tasks.append(text())
    for task in tasks:
        task.steps = options.steps or task.steps
        chosen = compare(task, options.seeds, options.only)
        if options.plot:
            word = task.name.split(",")[0].split()[0].lower()
            plot(task, chosen, options.plot.with_stem(f"{options.plot.stem}-{word}"))


if __name__ == "__main__":
    main()
