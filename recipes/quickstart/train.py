"""How the quickstart model was trained: a Llama of 4,820,160 parameters on the standard library's sources.

    python -m tersor.recipes.quickstart.train --output FOLDER [--seconds 5400] [--autocast]

The model that ships came from 5400 seconds on two CPU cores with --autocast under CPython 3.11.7: 27M tokens,
three times the `train` modules (corpus.py has the split), 2.21 nats a token on `valid`. The tokenizer is the
same on every run (byte-level BPE of 4096 words, learned from `train` alone). The weights are not: the clock
ends the run, so the number of steps depends on the machine.

Weights and AdamW state are float32 and bfloat16 is stored. --autocast multiplies in bfloat16, which pays on
cores with AMX or AVX512-BF16 and is several times slower than float32 on others.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .corpus import modules, part

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

VOCABULARY, BEGIN, END = 4096, 0, 1  # ids 0 and 1 are <s> and </s>
LENGTH, BATCH = 256, 16
PEAK_RATE, WARMUP_STEPS, FLOOR = 2e-3, 200, 0.05
EVAL_WINDOWS = 48


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, so that no source is outside the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokens(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one int64 stream, each after <s>."""
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([np.array([BEGIN, *e.ids], dtype=np.int64) for e in encoded])


def new_model() -> LlamaForCausalLM:
    """Random weights: 8 blocks of width 192, six heads of 32 over three key-value heads, untied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def loss(model: LlamaForCausalLM, windows: np.ndarray, autocast: bool = False) -> torch.Tensor:
    """Mean nats a token over windows `[batch, LENGTH]`."""
    ids = torch.from_numpy(windows)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found: torch.Tensor = model(ids, labels=ids).loss
    return found


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: np.ndarray) -> float:
    """Mean nats a token over windows spread evenly through a stream."""
    starts = [i * (len(stream) - LENGTH - 1) // EVAL_WINDOWS for i in range(EVAL_WINDOWS)]
    model.eval()
    mean = sum(loss(model, stream[None, s : s + LENGTH]).item() for s in starts) / EVAL_WINDOWS
    model.train()
    return mean


def rate(step: int, elapsed: float) -> float:
    """Learning rate: linear warm-up by steps, cosine over the share of time gone, down to a twentieth."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * elapsed))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * cosine


def train(model: LlamaForCausalLM, stream: np.ndarray, seconds: float, autocast: bool) -> int:
    """AdamW on windows drawn uniformly until the time is up; returns the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    draw = np.random.default_rng(0)
    begin, step = time.monotonic(), 0
    while (elapsed := (time.monotonic() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, elapsed)
        starts = draw.integers(0, len(stream) - LENGTH - 1, BATCH)
        nats = loss(model, np.stack([stream[s : s + LENGTH] for s in starts]), autocast)
        nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            print(f"step {step}  {nats.item():.3f} nats a token  {elapsed:.0%} of the time", flush=True)
    return step


def main() -> None:
    """Train the quickstart's tokenizer and model; write a checkpoint directory."""
    from transformers import PreTrainedTokenizerFast

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--seconds", type=float, default=5400, help="training time (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    parser.add_argument("--autocast", action="store_true", help="multiply in bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)

    texts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for module in modules():
        texts[part(module.path)].append(module.text)
    tokenizer = train_tokenizer(texts["train"])
    random.Random(0).shuffle(texts["train"])
    learned, unseen = tokens(tokenizer, texts["train"]), tokens(tokenizer, texts["valid"])
    print(f"{len(learned)} tokens to learn from, {len(unseen)} of other modules to validate on", flush=True)

    model = new_model()
    steps = train(model, learned, options.seconds, options.autocast)
    nats = evaluate(model, unseen)
    print(f"{steps} steps, {steps * BATCH * LENGTH} tokens: {nats:.3f} nats a token on valid")
    model.to(torch.bfloat16).save_pretrained(options.output)  # type: ignore[arg-type]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(options.output)


if __name__ == "__main__":
    main()
