"""A checkpoint larger than the memory it is given: time and memory of passes on a random Llama of 1.1B parameters.

    python benchmarks/large.py [--use slice] [--memory 3GB] [--layers 22] [--tokens 4096] [--cgroup /sys/fs/cgroup/NAME]

The model (hidden 2048, 22 layers, 32 heads on 4, FFN 5632, vocabulary 32000, bfloat16 in shards) is written once, then
changed by `tersor apply --max-memory` in a process of its own, whose anonymous and resident memory is sampled: sliced,
or made 4 of 16 experts with the refit (`moe`) or without it (`moe-plain`). With
--cgroup the kernel holds the process to the limit: an existing memory control group, v1 or v2, whose limit is set here.
Random weights say nothing of quality; this is about bytes and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tersor.compress.preflight import parse_size, size
from tersor.compress.pretrained import quiet

RECIPE = """\
recipe: 1
model: {model}
data:
  calibration: {{path: {text}, samples: {samples}, length: 256}}
passes:
  - {use}
"""
USES = {
    "slice": "{use: slice, with: {remove: 0.2, on: [hidden]}}",
    "moe": "{use: moe, with: {experts: 16, active: 4, compare: false}}",
    "moe-plain": "{use: moe, with: {experts: 16, active: 4, compare: false, refit: false}}",
}


def write_model(directory: Path, layers: int) -> int:
    """A random Llama with a tokenizer of bytes; returns its parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4,
        intermediate_size=5632, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with quiet():
        model.save_pretrained(directory, max_shard_size="500MB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return int(sum(p.numel() for p in model.parameters()))


def memory(pid: int) -> dict[str, int]:
    """Bytes of a process by kind; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except OSError:
        return {}
    parts = (line.split() for line in lines if line.startswith(("RssAnon", "VmHWM")))
    return {name.rstrip(":"): int(count) * 1024 for name, count, *_ in parts}


def limit(cgroup: Path, count: int) -> None:
    """Have the kernel hold what joins the group to `count` bytes."""
    name = "memory.max" if (cgroup / "memory.max").exists() else "memory.limit_in_bytes"
    (cgroup / name).write_text(str(count), "utf-8")


def main() -> None:
    """Write the model, slice it, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--use", choices=USES, default="slice")
    parser.add_argument("--memory", default="3GB")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cgroup", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        parameters = write_model(root / "model", arguments.layers)
        letters = np.random.default_rng(0).integers(97, 123, 4 * arguments.tokens).astype(np.uint8)
        (root / "text.txt").write_bytes(b"\n".join(bytes(line) for line in letters.reshape(-1, 256)))
        facts = {"model": root / "model", "text": root / "text.txt", "samples": arguments.tokens // 256}
        recipe = RECIPE.format(**facts, use=USES[arguments.use])
        (root / "large.yaml").write_text(recipe, "utf-8")
        command = [sys.executable, "-c", "from tersor.compress.cli import main; main()", "apply", root / "large.yaml"]
        command += ["--output", root / "run", "--max-memory", arguments.memory, "--threads", str(arguments.threads)]
        join = None
        if arguments.cgroup:
            limit(arguments.cgroup, parse_size(arguments.memory))
            join = arguments.cgroup / "cgroup.procs"
        began, peaks = time.perf_counter(), dict[str, int]()
        process = subprocess.Popen(
            command, preexec_fn=(lambda: join.write_text(str(os.getpid()))) if join else None  # noqa: PLW1509
        )
        while process.poll() is None:
            for name, count in memory(process.pid).items():
                peaks[name] = max(peaks.get(name, 0), count)
            time.sleep(0.2)
        seconds = time.perf_counter() - began
        if process.returncode:
            sys.exit(f"tersor apply ended with {process.returncode}; peaks: {peaks}")
        journal = (root / "run" / "journal.jsonl").read_text("utf-8").splitlines()
        step = next(entry for entry in map(json.loads, journal) if entry["step"].startswith("1-"))
        spent = {name: count for name, count in step["details"]["seconds"].items() if round(count)}
        print(f"parameters                   {parameters:,} -> {step['scores']['parameters']:,}")
        print(f"float32, stored              {size(4 * parameters)}, {size(2 * parameters)}")
        print(f"allowed                      {arguments.memory}{' (by the kernel)' if join else ''}")
        print(f"peak anonymous memory        {size(peaks['RssAnon'])}")
        print(f"peak resident, files mapped  {size(peaks['VmHWM'])}")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"whole run                    {seconds:.0f} s, {arguments.tokens:,} tokens, {arguments.threads} threads")
        print(f"processor time of it         {used.ru_utime + used.ru_stime:.0f} s")
        print(f"{', '.join(spent):28} {', '.join(f'{count:.0f} s' for count in spent.values())}")
        print(f"a layer                      {sum(spent.values()) / arguments.layers:.1f} s")


if __name__ == "__main__":
    main()
