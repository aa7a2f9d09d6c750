"""Tokens a second of the artifact with a cache against torch eager's generate, in turns.

    python benchmarks/decode.py [--threads 2 1] [--tokens 32] [--rounds 5] [--prompt 32] [--layers 12]

Two models: a random Llama in the shape of a 125M one (hidden 768, 12 layers, 12 heads, FFN 2048, vocabulary 32000) and
the decoder that ships. Each round runs torch, the float32 artifact and the int8 artifact one after the other on the
same prompt, prefill included; a ratio is taken within a round, and the median of ratios is printed, so that what else
the machine does weighs on both sides.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tersor.compress.checkpoint import Checkpoint, named_parameters
from tersor.compress.evaluate.torch_scorer import torch_threads
from tersor.compress.layout import Layout
from tersor.compress.pretrained import locate
from tersor.export.decoder import OnnxDecoder
from tersor.export.generate import Generator


def random_llama(layers: int) -> Checkpoint:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=layers, num_attention_heads=12, num_key_value_heads=12,
        intermediate_size=2048, vocab_size=32000, max_position_embeddings=2048, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    return Checkpoint(Layout.of(config, "text-generation", "float32"), named_parameters(model))


def by_torch(checkpoint: Checkpoint, threads: int) -> Callable[[np.ndarray, int], np.ndarray]:
    model = checkpoint.model(torch.float32)
    model.generation_config.eos_token_id = None

    def run(prompt: np.ndarray, count: int) -> np.ndarray:
        ids = torch.from_numpy(prompt)[None]
        with torch_threads(threads), torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True,
                pad_token_id=0,
            )  # fmt: skip
        return np.asarray(out[0, len(prompt) :])

    return run


def by_artifact(directory: Path, threads: int) -> Callable[[np.ndarray, int], np.ndarray]:
    generator = Generator(directory, threads)
    generator.ends = frozenset()
    return lambda prompt, count: np.asarray(generator.generate(prompt, count))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--prompt", type=int, default=32)
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--models", nargs="+", default=["llama-125m", "embedded"])
    chosen = options.parse_args()
    print(f"{'model':11} {'threads':>7} {'runner':>12} {'tokens/s':>9} {'x torch':>8} {'MB':>6}  same tokens")
    for name in chosen.models:
        embedded = name == "embedded"
        where = "package:tersor.recipes/quickstart/model"
        checkpoint = Checkpoint.load(locate(where)) if embedded else random_llama(chosen.layers)
        with tempfile.TemporaryDirectory() as folder:
            places = {p: Path(folder) / p for p in ("float32", "int8")}
            for precision, place in places.items():
                place.mkdir()
                OnnxDecoder(precision=precision).write(checkpoint, place, [])  # type: ignore[arg-type]
            for threads in chosen.threads:
                compare(name, checkpoint, places, threads, chosen)


def compare(
    name: str, checkpoint: Checkpoint, places: dict[str, Path], threads: int, chosen: argparse.Namespace
) -> None:
    runners = {"torch": by_torch(checkpoint, threads)}
    runners |= {f"onnx {p}": by_artifact(place, threads) for p, place in places.items()}
    draw = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {runner: [] for runner in runners}
    same: dict[str, list[bool]] = {runner: [] for runner in runners}
    for number in range(chosen.rounds + 1):
        prompt = draw.integers(3, checkpoint.layout.sizes["vocab"], chosen.prompt)
        answers = {}
        for runner, run in runners.items():
            start = time.perf_counter()
            answers[runner] = run(prompt, chosen.tokens)
            if number:  # the first round warms up
                seconds[runner].append(time.perf_counter() - start)
        for runner, answer in answers.items():
            same[runner].append(np.array_equal(answer, answers["torch"]))
    for runner, taken in seconds.items():
        ratio = median(t / own for t, own in zip(seconds["torch"], taken, strict=True))
        place = places.get(runner.removeprefix("onnx "))
        size = checkpoint.layout.bytes if place is None else sum(f.stat().st_size for f in place.glob("model.onnx*"))
        speed, agreed = chosen.tokens / median(taken), sum(same[runner])
        print(
            f"{name:11} {threads:7} {runner:>12} {speed:9.1f} {ratio:8.2f} {size / 1e6:6.0f}  "
            f"{agreed} of {len(same[runner])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
