"""What fewer parameters are worth in time: a prompt and one more token, torch and ONNX Runtime, sliced beside dense.

    python benchmarks/slicing_speed.py [--hidden 1024] [--layers 6] [--remove 0.2 0.3] [--threads 1] [--rounds 7]

Random Llamas: speed is a matter of shapes. Prompt: 256 tokens; token: one more after 256, with the cache. Each round
runs dense and sliced one after the other, a ratio is taken within a round, and the median is printed. Beside it what
counting promises: the ratio of floating-point operations for the prompt, of bytes read for a token; and how much of
that the clock kept, (speed-up − 1) / (ratio − 1).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tersor.compress.checkpoint import Checkpoint, named_parameters
from tersor.compress.evaluate.torch_scorer import torch_threads
from tersor.compress.layout import Layout
from tersor.compress.passes.slice import Slice
from tersor.compress.slicing.fuse import restate

PROMPT = 256
Call = Callable[[], Any]


def torch_calls(model: Any) -> dict[str, Call]:
    """A prompt, and one more token on top of it."""
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    def prefill() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    def decode() -> None:
        with torch.inference_mode():
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

    return {"torch prefill": prefill, "torch decode": decode}


def onnx_calls(checkpoint: Checkpoint, folder: Path, threads: int) -> dict[str, Call]:
    """The same by the artifact of `onnx-decoder`; one file for both."""
    import onnxruntime
    from tersor.export import runtime
    from tersor.export.cached import cached
    from tersor.export.graph import trace

    folder.mkdir()
    trace.save(cached(checkpoint, runtime.opset(23), "auto")[0], folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / trace.MODEL_FILE), options, ["CPUExecutionProvider"])
    ids = np.arange(PROMPT)[None] % checkpoint.layout.sizes["vocab"]
    pasts = [i for i in session.get_inputs() if i.name.startswith("past")]
    width = [(1, i.shape[1], 0, i.shape[3]) for i in pasts]
    empty = {i.name: np.zeros(shape, np.float32) for i, shape in zip(pasts, width, strict=True)}
    first = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(PROMPT)[None], **empty}
    _, *cache = session.run(None, first)
    mask, position = np.ones((1, PROMPT + 1), np.int64), np.full((1, 1), PROMPT)
    past = dict(zip(empty, cache, strict=True))
    after = {"input_ids": ids[:, :1], "attention_mask": mask, "position_ids": position, **past}
    return {"onnx prefill": lambda: session.run(None, first), "onnx decode": lambda: session.run(None, after)}


def speed_ups(dense: Checkpoint, other: Any, threads: int = 1, rounds: int = 7) -> dict[str, float]:
    """How many times faster `other` is, by runner and phase; a bare module has no ONNX file."""
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads):
        stock = isinstance(other, Checkpoint)
        calls = [torch_calls(dense.model()), torch_calls(other.model() if stock else other)]
        if stock:
            for number, checkpoint in enumerate((dense, other)):
                calls[number] |= onnx_calls(checkpoint, Path(folder) / str(number), threads)
        return {name: ratio(calls[0][name], calls[1][name], rounds) for name in calls[1]}


def ratio(slow: Call, fast: Call, rounds: int) -> float:
    """The median over rounds of the ratio of their times; short calls are repeated to 20 ms."""
    slow(), fast()
    once = time.perf_counter()
    slow()
    times = max(1, int(0.02 / max(time.perf_counter() - once, 1e-6)))

    def seconds(call: Call) -> float:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - start

    return median(seconds(slow) / seconds(fast) for _ in range(rounds))


def random_llama(hidden: int, layers: int) -> Checkpoint:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, intermediate_size=hidden * 11 // 4, vocab_size=8192,
        max_position_embeddings=1024, head_dim=64,
    )  # fmt: skip
    return of_shape(Layout.of(config, "text-generation", "float32"))


def of_shape(layout: Layout) -> Checkpoint:
    """Random weights in a layout."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Checkpoint(layout, named_parameters(LlamaForCausalLM(layout.config).eval().requires_grad_(False)))


def counted(layout: Layout) -> tuple[float, float]:
    """Floating-point operations of the prompt, and bytes that a token after it reads."""
    sizes = layout.families
    products = layout.parameters - sizes["vocab"] * sizes["hidden"]  # a table is looked up, not multiplied
    heads, wide = sizes["kv_heads"] * sizes["queries"], sizes["head_dim"]
    attention = 4 * layout.depth * heads * wide * PROMPT * PROMPT
    cache = 2 * layout.depth * sizes["kv_heads"] * wide * PROMPT
    return 2 * products * PROMPT + attention, 4 * (products + cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--remove", type=float, nargs="+", default=[0.2, 0.3])
    parser.add_argument("--split", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    dense = random_llama(asked.hidden, asked.layers)
    print("| sizes | real reduction | runner | speed-up | counted | kept |\n|" + " --- |" * 6, flush=True)
    for remove in asked.remove:
        after = Slice(remove=remove, on=["hidden", "ffn"], split=asked.split).requires(dense.layout).layout
        names = [n for n in ("hidden", "ffn") if after.families[n] != dense.layout.families[n]]
        sizes = {name: after.families[name] for name in names}
        small = of_shape(restate(dense.layout, sizes))
        share = 1 - small.layout.parameters / dense.layout.parameters
        promised = [b / a for a, b in zip(counted(small.layout), counted(dense.layout), strict=True)]
        for name, faster in speed_ups(dense, small, asked.threads, asked.rounds).items():
            most = promised["decode" in name]
            said = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
            kept = (faster - 1) / (most - 1)
            print(f"| {said} | {share:.1%} | {name} | {faster:.2f}× | {most:.2f}× | {kept:.0%} |", flush=True)


if __name__ == "__main__":
    main()
