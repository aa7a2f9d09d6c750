"""How much of the loss that a slice cost recovery brings back, and in how much CPU time.

    python benchmarks/recover.py [--threads 1] [--set passes.0.with.remove=0.3 …] [--compare]

Runs the passes of recipes/recover.yaml on its calibration text and scores after each on the held-out text, in nats a
token. The share that is back is (sliced − recovered) / (sliced − original). CPU seconds are of the process, all its
threads together. With --compare, other losses and low-rank changes start from the same slice and take as many steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time

import torch
from tersor.compress import load_recipe
from tersor.compress.calibration.batches import batches
from tersor.compress.calibration.loss import judge
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.pass_ import Context
from tersor.compress.pretrained import locate
from tersor.compress.reading import Reader

VARIANTS = {
    "the calibration text as it is": {"redrawn": 0.0},
    "the calibration text and 384 sequences that the original goes on with": {"redrawn": 0.0, "continued": 384},
    "half the likelihood of the text": {"redrawn": 0.0, "distill": 0.5},
    "the likelihood alone": {"redrawn": 0.0, "distill": 0.0},
    "temperature 2": {"temperature": 2.0},
    "average of the last 4 checkpoints": {"average": 4},
    "LoRA of rank 16": {"lora": 16, "learning_rate": 5e-3},
    "float32 arithmetic": {"precision": "float32"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="change the recipe")
    parser.add_argument(
        "--compare", nargs="*", metavar="NAME", help="other ways too: all, or those whose name holds NAME"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = load_recipe("recover", options.set)
    original = Checkpoint.load(locate(str(recipe.model)))
    reader = Reader.of(original)
    text = [
        s.ids for s in reader.read(recipe.data.calibration, seed=recipe.seed, base=recipe.base, place="calibration")
    ]
    heldout = [s.ids for s in reader.read(recipe.data.heldout, seed=None, base=recipe.base, place="heldout")]

    def loss(checkpoint: Checkpoint) -> float:
        return judge(checkpoint.model(), None, checkpoint.layout, batches(heldout, checkpoint.layout))

    checkpoint = Checkpoint(original.layout, dict(original.tensors))
    *before, last = recipe.passes
    for number, step in enumerate(before):
        details: dict = {}
        step.options.apply(
            checkpoint, Context(text, seed=recipe.seed * 1000 + number, details=details, original=original)
        )
        checkpoint.checks += step.options.checks(details)
    dense, sliced = loss(original), loss(checkpoint)
    removed = 1 - checkpoint.layout.parameters / original.layout.parameters
    print(f"{original.layout.parameters:,} parameters, {removed:.1%} removed, {sum(map(len, text)):,} tokens of text")
    print(
        f"held-out nats a token: original {dense:.4f}, sliced {sliced:.4f} (perplexity {math.exp(dense):.2f}, ", end=""
    )
    print(f"{math.exp(sliced):.2f}); {options.threads} threads\n")
    print(
        "| recovery | steps | nats a token | perplexity | back | CPU seconds | seconds |\n|---|---|---|---|---|---|---|"
    )
    ways = {"as in the recipe": {}}
    if options.compare is not None:
        ways |= {n: w for n, w in VARIANTS.items() if not options.compare or any(part in n for part in options.compare)}
    for name, changes in ways.items():
        copy = Checkpoint(checkpoint.layout, dict(checkpoint.tensors), checks=list(checkpoint.checks))
        way = dataclasses.replace(last.options, **changes)
        cpu, wall = time.process_time(), time.perf_counter()
        way.apply(copy, Context(text, seed=recipe.seed * 1000 + len(before), original=original))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        assert not copy.failing_checks()
        after = loss(copy)
        share = (sliced - after) / (sliced - dense)
        row = f"{way.steps} | {after:.4f} | {math.exp(after):.2f} | {share:.0%} | {cpu:.0f} | {wall:.0f}"
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
