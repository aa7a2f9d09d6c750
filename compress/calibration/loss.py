"""What a pass judges its own choices by, on a share of the calibration data: never on held-out data.

Language models: the mean negative log-likelihood of the text. Others: how far the output is from the
original's (Kullback-Leibler divergence of logits, one minus cosine of pooled features, half the square of the
difference of a single number, which is the divergence of two normal distributions of variance 1 around them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from ..layout import Layout
from .batches import Batch


def pooled(output: Any, batch: Batch) -> torch.Tensor:
    """Mean of the last hidden state over real tokens, of unit length: `[batch, hidden]`."""
    hidden = output.last_hidden_state
    real = hidden.new_ones(hidden.shape[:2]) if batch.real is None else batch.real.to(hidden.dtype)
    return functional.normalize((hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True), dim=-1)


@torch.no_grad()
def judge(model: Any, original: Any, layout: Layout, data: Sequence[Batch]) -> float:
    """The loss of `model`, in nats (or one minus cosine), averaged over tokens or sequences.

    Args:
        model: to be judged.
        original: what it was; run only where outputs are compared.
        layout: of either.
        data: batches.
    """
    total, count = 0.0, 0
    for batch in data:
        output = model(**batch.inputs)
        if layout.task == "text-generation":
            ids = batch.inputs["input_ids"]
            targets = ids if batch.real is None else ids.masked_fill(~batch.real, -100)
            losses = functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum"
            )
            total, count = total + float(losses), count + int((targets[:, 1:] != -100).sum())
            continue
        before = original(**batch.inputs)
        if getattr(output, "logits", None) is not None:
            found, wanted = (batch.tokens(o.logits) if o.logits.ndim == 3 else o.logits for o in (output, before))
            if found.shape[-1] == 1:
                losses = 0.5 * (found - wanted).square().sum()
            else:
                ours, theirs = found.log_softmax(-1), wanted.log_softmax(-1)
                losses = functional.kl_div(ours, theirs, log_target=True, reduction="sum")
            total, count = total + float(losses), count + len(found)
        else:
            cosine = (pooled(output, batch) * pooled(before, batch)).sum(-1)
            total, count = total + float((1 - cosine).sum()), count + len(cosine)
    return total / max(count, 1)
