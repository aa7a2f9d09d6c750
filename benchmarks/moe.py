"""Dense to mixture of experts: what a token's quality costs at a share of the FFN, and what the share buys in time.

    python benchmarks/moe.py quality CHECKPOINT TEXT [--experts 16] [--active 0.25 0.5 0.75] [--seeds 3] [--windows 128]
        [--only ours oracle …] [--recover STEPS] [--rate 2e-3] [--redrawn 0.25] [--plot FILE]
    python benchmarks/moe.py speed [--width 768] [--ffn 3072] [--experts 8] [--active 2] [--threads 1 2]
    python benchmarks/moe.py model CHECKPOINT [--experts 16] [--active 4] [--threads 1 2]
    python benchmarks/moe.py forms [--precision float32|int8|blocks]
    python benchmarks/moe.py steps

Quality: the text in windows of 256 tokens; of the first 60 %, 128 (drawn anew for each seed) calibrate, of the rest
96 are scored, in float32. `excess` is the loss in nats a token above the dense model's; of an encoder, one minus the
cosine with the dense model's mean-pooled answer. Every method sees the same tokens and works on the same number of FFN
units. The published methods are run in their training-free form; what no class holds is simulated
(compress/moe/trial.py), ours is read back from the saved class. Seconds are processor time, of a simulated method with
its scoring.

    energy          the units of largest mean square for every token (no router)
    OBS + fit       units by backward elimination, down projection refitted: what `slice` does to an FFN (no router)
    LLaMA-MoE       random parts, linear router
    MoEfication     k-means of the gate's rows, a trained MLP as router
    CMoE            parts by activation rate, half of them shared, analytic router
    ours            what `moe` does by default: without its refit, with it, with 1000 steps of distillation before, and
                    where the FFN has no gate as many experts as are worth it, on average the same number (`dynamic`);
                    with --recover, so many steps of training from end to end behind the distilled one, at --rate on
                    text of which the dense model draws the share --redrawn anew
    MLP router      ours with the refit and MoEfication's router: what a linear one gives up
    oracle          ours with the refit and a router that knows the importances

Speed: one FFN in ONNX Runtime in its forms, interleaved, medians of ratios to the dense float32 FFN. Model: the whole
checkpoint, dense and converted, both exported; times as fast as dense, by tokens in the call, and each block's load.
Forms and steps: what two rules rest on, when to export experts as one FFN (export/mixture/choice.py) and when to train
them as one (compress/moe/whole.py).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from tersor.compress.calibration.batches import batches
from tersor.compress.calibration.loss import judge
from tersor.compress.calibration.side import Side
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.moe import whole
from tersor.compress.moe.convert import Method, convert
from tersor.compress.moe.cut import Cut
from tersor.compress.moe.trial import Trial
from tersor.compress.pass_ import Context
from tersor.compress.passes.moe import Moe
from tersor.compress.passes.recover import Recover
from tersor.compress.paths import resolve_path
from tersor.compress.pretrained import quiet
from tersor.export.client import Client
from tersor.export.graph.ops import CONTRIB, Ops
from tersor.export.mixture import choice, experts
from tersor.export.onnx import Onnx

METHODS = {  # name → (method, share of the active parts that is shared)
    "energy": (Method("energy", refit=False), 1.0),
    "OBS + fit": (Method("surgeon"), 1.0),
    "LLaMA-MoE": (Method("random", "ridge", refit=False), 0.0),
    "MoEfication": (Method("kmeans", "mlp", refit=False), 0.0),
    "CMoE": (Method("activation-rate", "analytic", refit=False), 0.5),
    "MLP router": (Method(router="mlp"), 0.25),
    "oracle": (Method(router="oracle"), 0.25),
}
OURS = {
    "ours, no refit": {"refit": False},
    "ours": {},
    "ours + distillation": {"distill_steps": 1000},
    "ours, dynamic": {"dynamic": True},
    "ours + recover": {"distill_steps": 1000},
}
TRAINED = "ours + recover"
PUBLISHED = ("energy", "LLaMA-MoE", "MoEfication", "CMoE")


def windows(
    checkpoint: Checkpoint, text: Path, seed: int, count: int = 128, length: int = 256
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`count` calibration windows drawn by the seed, and three quarters as many held-out ones."""
    assert checkpoint.tokenizer is not None
    said = text.read_text("utf-8")
    if text.suffix == ".jsonl":
        said = "\n".join(json.loads(line)["text"] for line in said.splitlines())
    ids = checkpoint.tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
    rows = np.array(ids[: len(ids) // length * length]).reshape(-1, length)
    edge = int(len(rows) * 0.6)
    drawn = np.random.default_rng(seed).permutation(edge)[:count]
    return [rows[i] for i in sorted(drawn)], list(rows[edge:][: count * 3 // 4])


def quality(given: argparse.Namespace) -> None:
    found: dict[float, dict[str, list[float]]] = {share: {} for share in given.active}
    spent: dict[tuple[float, str], list[float]] = {}
    for seed in range(given.seeds):
        checkpoint = Checkpoint.load(given.checkpoint)
        layout, model = checkpoint.layout, checkpoint.model()
        calibration, heldout = windows(checkpoint, given.text, seed, given.windows)
        data, judged = batches(calibration, layout), batches(heldout, layout)
        dense = judge(model, model, layout, judged)
        gated = len(layout.branches(0)[-1].reads) == 2
        for share, rows in found.items():
            active = round(given.experts * share)
            for name, (method, common) in METHODS.items():
                if given.only and name not in given.only:
                    continue
                cut = Cut(layout.families["ffn"], given.experts, active, int(active * common))
                began = time.process_time()
                with torch.no_grad():
                    side = Side.at_start(model, layout, data)
                blocks = convert(side, layout, cut, method, data, seed, lambda items, _: items)
                trial = Trial(model, layout, judged)
                rows.setdefault(name, []).append(trial.follow(blocks) - dense)
                spent.setdefault((share, name), []).append(time.process_time() - began)
            for name, more in OURS.items():
                trained = name == TRAINED
                if (given.only and name not in given.only) or (gated and "dynamic" in more) or trained > given.recover:
                    continue
                options = Moe(experts=given.experts, active=active, compare=False, **more)
                made, began = Checkpoint(layout, dict(checkpoint.tensors), checkpoint.tokenizer), time.process_time()
                options.apply(made, Context(calibration, seed=seed))
                if trained:
                    learning = Recover(steps=given.recover, batch=8, learning_rate=given.rate, redrawn=given.redrawn)
                    learning.apply(made, Context(calibration, seed=seed, original=checkpoint))
                spent.setdefault((share, name), []).append(time.process_time() - began)
                with tempfile.TemporaryDirectory() as beside:
                    made.save(Path(beside))
                    again = Checkpoint.load(Path(beside), layout.task)
                rows.setdefault(name, []).append(judge(again.model(), model, again.layout, judged) - dense)
            print_row(share, rows, dense, {name: spent[share, name] for name in rows})
    if given.plot:
        plot(found, given.plot, f"{given.checkpoint.name}, {given.experts} parts")


def plot(found: dict[float, dict[str, list[float]]], path: Path, title: str) -> None:
    """Excess by active share, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in next(iter(found.values())):
        means = [statistics.mean(rows[name]) for rows in found.values()]
        axes.plot(list(found), means, "o-" if "ours" in name else "o--", label=name, linewidth=1)
    axes.set(xlabel="active share of the FFN", ylabel="excess", yscale="log", title=title)
    axes.legend(fontsize="small")
    figure.savefig(path)


def print_load(details: list[dict[str, list[float]]]) -> None:
    """Busiest and idlest expert of each block, share of the tokens that choose it."""
    shares = [sorted(block.values()) for block in details]
    print("\n| block | " + " | ".join(map(str, range(len(shares)))) + " |\n| --- |" + " ---: |" * len(shares))
    for name, place in (("idlest", 0), ("middle", len(shares[0]) // 2), ("busiest", -1)):
        print(f"| {name} expert | " + " | ".join(f"{block[place]:.2f}" for block in shares) + " |")


def print_row(share: float, rows: dict[str, list[float]], dense: float, spent: dict[str, list[float]]) -> None:
    """One share: excess and processor seconds of all methods, mean and range over the seeds so far."""
    published = min((statistics.mean(rows[name]) for name in PUBLISHED if name in rows), default=math.nan)
    count = len(next(iter(rows.values())))
    print(f"\n{share:.0%} active, dense loss {dense:.4f}, {count} seeds\n")
    print("| method | excess | range | against the best published | seconds |\n| --- | ---: | ---: | ---: | ---: |")
    for name, values in rows.items():
        mean = statistics.mean(values)
        span, seconds = f"{min(values):.4f} … {max(values):.4f}", statistics.mean(spent[name])
        print(f"| {name} | {mean:.4f} | {span} | {mean / published:.2f} × | {seconds:.0f} |", flush=True)


# --- speed ------------------------------------------------------------------------------------------------------------


def dense_ffn(gate_up: np.ndarray, down: np.ndarray, how: experts.Arithmetic) -> ir.Model:
    """The FFN that the experts were cut from."""
    _, both, width = gate_up.shape
    x = ir.Value(name="x", shape=ir.Shape(["tokens", width]), type=ir.TensorType(ir.DataType.FLOAT))
    gate, up = (gate_up[:, rows].reshape(-1, width) for rows in (slice(0, both // 2), slice(both // 2, both)))
    ops = Ops("dense")
    lines = how.read(ops, x)
    inner = ops("Mul", experts.activated(ops, how.whole(ops, lines, gate), "silu"), how.whole(ops, lines, up))
    answer = how.whole(ops, how.read(ops, inner), down.swapaxes(0, 1).reshape(width, -1))
    answer.type, answer.shape = x.type, x.shape
    graph = ir.Graph([x], [answer], nodes=[], opset_imports={"": 23, CONTRIB: 1})
    ops.register(graph)
    graph.extend(ops.nodes)
    return ir.Model(graph, ir_version=10)


def routed_node(width: int, ffn: int, parts: int, active: int) -> ir.Node:
    draw = np.random.default_rng(0)
    shapes = {"gate_up": (parts, 2 * ffn // parts, width), "down": (parts, width, ffn // parts)}
    stacks = [
        ir.Value(name=n, const_value=ir.tensor((draw.standard_normal(s) / s[2] ** 0.5).astype(np.float32)))
        for n, s in shapes.items()
    ]
    inputs = [ir.Value(name=name) for name in ("x", "index", "weights")]
    attributes = {"activation": "silu", "chosen": active}
    return ir.node("Experts", [*inputs, *stacks], attributes, domain=experts.DOMAIN)


def speed(width: int, ffn: int, parts: int, active: int, threads: Sequence[int]) -> None:
    node = routed_node(width, ffn, parts, active)
    stacks = [experts.stored(value) for value in node.inputs[3:]]
    models = {f"dense {name}": dense_ffn(*stacks, how) for name, how in experts.ARITHMETIC.items()}
    forms = ("slices", "moe", "slices-int8", "slices-blocks", "qmoe")
    models |= {form: choice.alone(node, form) for form in forms}
    for count in threads:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = count, 3
        sessions = {
            name: onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
            for name, model in models.items()
        }
        print(f"\n{active} of {parts} experts, {width} × {ffn}, threads: {count}; times as fast as dense float32\n")
        print("| tokens | " + " | ".join(sessions) + " |\n| ---: |" + " ---: |" * len(sessions))
        for tokens in choice.TOKENS:
            feed = choice.drawn(node, tokens)
            times: dict[str, list[float]] = {name: [] for name in sessions}
            for number in range({1: 200, 8: 150, 128: 25, 512: 11}[tokens] + 1):
                for name, session in sessions.items():
                    given = feed if "dense" not in name else {"x": feed["x"]}
                    began = time.perf_counter()
                    session.run(None, given)
                    if number:
                        times[name].append(time.perf_counter() - began)
            base = times["dense float32"]
            ratios = (statistics.median(a / b for a, b in zip(base, own, strict=True)) for own in times.values())
            print(f"| {tokens} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)


SHAPES = [
    *((256, 512, 16, 4), (256, 1024, 16, 4), (256, 1024, 16, 8), (256, 1024, 8, 2), (256, 1024, 8, 4)),
    *((512, 1024, 16, 4), (512, 2048, 16, 4), (512, 2048, 16, 8), (512, 2048, 8, 6), (768, 3072, 16, 4)),
    *((768, 3072, 8, 2), (768, 3072, 8, 4), (1024, 2752, 32, 8), (1024, 2752, 16, 12), (1024, 4096, 8, 2)),
]
"""Hidden width, FFN width, experts, chosen ones: from where choosing costs more than it saves to where it pays."""


STEPS = [
    *((64, 344, 43, 5), (64, 344, 43, 10), (64, 344, 43, 21), (256, 512, 64, 16), (256, 512, 32, 8), (256, 512, 16, 2)),
    *((256, 512, 16, 4), (256, 512, 16, 8), (768, 3072, 64, 16), (768, 3072, 16, 4)),
    *((768, 3072, 8, 2), (768, 3072, 8, 4)),
]
"""The same for training."""


def forms(precision: choice.Precision) -> None:
    """What the rule of mixture/choice.py rests on: skipping experts against computing all of them."""
    best: experts.Form = "qmoe" if precision == "blocks" else f"slices{choice.SUFFIX[precision]}"  # type: ignore[assignment]
    base: experts.Form = f"whole{choice.SUFFIX[precision]}"  # type: ignore[assignment]
    print(f"{best}, times as fast as {base}, one thread\n")
    print("| width, ffn, experts, chosen | weights passed over | " + " | ".join(map(str, choice.TOKENS)) + " | rule |")
    print("| --- | ---: |" + " ---: |" * len(choice.TOKENS) + " --- |")
    for width, ffn, parts, active in SHAPES:
        graph = ir.Graph([], [], nodes=[routed_node(width, ffn, parts, active)])
        _, ratios = choice.measured(graph, [base, best])
        saved = round(3 * width * ffn / parts * (1 - active / parts))
        word = best if active / parts <= choice.MOST[precision] and saved >= choice.PAYS[precision] else base
        figures = " | ".join(f"{ratio:.2f}" for ratio in ratios[best].values())
        print(f"| {width}, {ffn}, {parts}, {active} | {saved:,} | {figures} | {word} |", flush=True)


def steps() -> None:
    """What the rule of compress/moe/whole.py rests on: experts trained as one masked FFN against transformers' way."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    print("a training step's processor seconds, transformers' grouped products by one masked FFN's; one thread\n")
    print("| hidden, ffn, experts, chosen | float32 | bfloat16 | rule |\n| --- | ---: | ---: | --- |")
    ids = torch.randint(0, 512, (8, 256), generator=torch.Generator().manual_seed(0))
    for hidden, ffn, parts, active in STEPS:
        torch.manual_seed(0)
        config = Qwen2MoeConfig(
            **{"hidden_size": hidden, "moe_intermediate_size": ffn // parts, "shared_expert_intermediate_size": 8},
            **{"num_experts": parts, "num_experts_per_tok": active, "num_hidden_layers": 2, "vocab_size": 512},
            **{"num_attention_heads": 4, "num_key_value_heads": 4},
        )
        grouped, masked = (Qwen2MoeForCausalLM(copy.deepcopy(config)) for _ in range(2))
        whole.use(masked)
        ratios, rules = [], []
        for in_bfloat16 in (False, True):
            found = []
            for number in range(6):
                spent = []
                for trained in (grouped, masked):
                    began = time.process_time()
                    with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
                        loss = trained(input_ids=ids, labels=ids).loss
                    loss.backward()
                    trained.zero_grad()
                    spent.append(time.process_time() - began)
                if number:
                    found.append(spent[0] / spent[1])
            ratios.append(f"{statistics.median(found):.2f}")
            rules.append("masked" if whole.pays(parts, active, ffn // parts, in_bfloat16) else "grouped")
        print(f"| {hidden}, {ffn}, {parts}, {active} | {' | '.join(ratios)} | {', '.join(rules)} |", flush=True)


def random_llama() -> Checkpoint:
    """A Llama of four blocks with the FFN of `speed`, not trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=12,
        vocab_size=4096, max_position_embeddings=512,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, quiet():
        LlamaForCausalLM(config).save_pretrained(directory)
        made = Checkpoint.load(Path(directory))
        return Checkpoint(made.layout, {name: tensor.clone() for name, tensor in made.tensors.items()})


def model(directory: Path | None, parts: int, active: int, threads: Sequence[int]) -> None:
    """The whole model, exported dense and converted (fitted to drawn ids: speed does not depend on what it says)."""
    draw = np.random.default_rng(0)
    checkpoint = Checkpoint.load(directory) if directory else random_llama()
    vocab = checkpoint.layout.families["vocab"]
    text = [draw.integers(0, vocab, 128) for _ in range(32)]
    mixed, context = Checkpoint(checkpoint.layout, dict(checkpoint.tensors)), Context(text)
    Moe(experts=parts, active=active, compare=False, refit=False).apply(mixed, context)
    print_load(context.details["load"])
    with tempfile.TemporaryDirectory() as beside:
        paths = {name: Path(beside, name) for name in ("dense", "experts", "dense int8", "experts int8")}
        for name, path in paths.items():
            path.mkdir()
            source = checkpoint if "dense" in name else mixed
            Onnx(precision="int8" if "int8" in name else "float32").write(source, path, text[:4])
        for count in threads:
            clients = {name: Client(path, threads=count, tokens_per_call=1 << 20) for name, path in paths.items()}
            name = directory.name if directory else "4 random blocks of 768 × 3072"
            print(f"\n{name}, {active} of {parts} experts, threads: {count}; times as fast as dense\n")
            print("| tokens | " + " | ".join(clients) + " |\n| ---: |" + " ---: |" * len(clients))
            for tokens in choice.TOKENS:
                ids = [draw.integers(0, vocab, min(tokens, 128)) for _ in range(-(-tokens // 128))]
                times: dict[str, list[float]] = {name: [] for name in clients}
                for number in range({1: 40, 8: 30, 128: 11, 512: 7}[tokens] + 1):
                    for name, client in clients.items():
                        began = time.perf_counter()
                        client(ids)
                        if number:
                            times[name].append(time.perf_counter() - began)
                pairs = ((times["dense"], own) for own in times.values())
                ratios = [statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in pairs]
                print(f"| {tokens} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)


def named(reference: str) -> Path:
    """A path, or one in an installed package."""
    return resolve_path(reference, None, reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind")
    one = kinds.add_parser("quality")
    one.add_argument("checkpoint", type=named, help="a directory, or package:NAME/FOLDER")
    one.add_argument("text", type=named, help="plain or .jsonl; a file, or package:NAME/FILE")
    one.add_argument("--experts", type=int, default=16)
    one.add_argument("--active", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--windows", type=int, default=128)
    one.add_argument("--only", nargs="+", choices=[*METHODS, *OURS], default=[])
    one.add_argument("--recover", type=int, default=0)
    one.add_argument("--rate", type=float, default=2e-3)
    one.add_argument("--redrawn", type=float, default=0.25)
    one.add_argument("--plot", type=Path)
    other = kinds.add_parser("speed")
    for name, value in (("width", 768), ("ffn", 3072), ("experts", 8), ("active", 2)):
        other.add_argument(f"--{name}", type=int, default=value)
    other.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    third = kinds.add_parser("model")
    third.add_argument("checkpoint", type=named, nargs="?", help="a random Llama, 768 wide, if not given")
    for name, value in (("experts", 16), ("active", 4)):
        third.add_argument(f"--{name}", type=int, default=value)
    third.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    rule = kinds.add_parser("forms")
    rule.add_argument("--precision", choices=list(choice.PAYS), default="float32")
    kinds.add_parser("steps")
    given = parser.parse_args()
    if given.kind == "steps":
        torch.set_num_threads(1)
        steps()
    elif given.kind == "forms":
        forms(given.precision)
    elif given.kind == "quality":
        torch.set_num_threads(1)
        quality(given)
    elif given.kind == "model":
        model(given.checkpoint, given.experts, given.active, given.threads)
    else:
        asked = given if given.kind else other.parse_args([])
        speed(asked.width, asked.ffn, asked.experts, asked.active, asked.threads)


if __name__ == "__main__":
    main()
