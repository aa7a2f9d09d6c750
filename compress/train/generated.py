"""Text of a language model's own, to learn from where there is little: pieces of a text that it continues.

A student that is distilled on a small text learns that text; the teacher's answers are right on any text. Sequences
drawn from the teacher itself are as many as time allows and are distributed as what it learned (LLM-QAT, Liu et al.,
arXiv 2305.17888, which starts from nothing; a start from the calibration text keeps its mixture of subjects). Drawn at
temperature 1 from the whole vocabulary: any truncation would hide the tail that the student must match too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pretrained import quiet
from ..rundir import write_atomic
from ..tokens import Input, Tokens

PROMPT = 16
"""Tokens of the text that a sequence starts with."""
BATCH = 128
FILE = "generated.npy"


def continued(
    model: Any,
    sequences: Sequence[Input],
    count: int,
    length: int,
    *,
    seed: int = 0,
    folder: Path | None = None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _label: items,
) -> list[np.ndarray]:
    """Sequences of the model's own.

    Args:
        model: a causal language model with transformers' `generate`.
        sequences: int64 `[n_i]`, of which pieces are continued.
        count: how many to draw.
        length: tokens of each, the piece included.
        seed: of the pieces and the draws.
        folder: where they are kept, so that a resumed training need not draw them again.
        track: wraps the batches in a progress bar.

    Returns:
        int64 `[length]` each.
    """
    kept = folder / FILE if folder is not None else None
    if kept is not None and kept.is_file():
        return list(np.load(kept))
    choose = np.random.default_rng(seed)
    start = min(PROMPT, length - 1, *(len(s) for s in sequences))
    found: list[np.ndarray] = []
    with torch.random.fork_rng(), quiet(), torch.inference_mode():
        torch.manual_seed(seed)
        for first in track(range(0, count, BATCH), "continue the text"):
            pieces = []
            for _ in range(min(BATCH, count - first)):
                sequence = Tokens.of(sequences[int(choose.integers(len(sequences)))]).ids
                place = int(choose.integers(len(sequence) - start + 1))
                pieces.append(sequence[place : place + start])
            ids = torch.as_tensor(np.stack(pieces))
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length - start,
                min_new_tokens=length - start,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                use_cache=True,
            )
            found += list(made.numpy())
    if kept is not None:
        import io

        buffer = io.BytesIO()
        np.save(buffer, np.stack(found))
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, buffer.getvalue())
    return found
