"""Activation checkpointing: which activations a forward keeps for backward, and which are computed again.

`full` keeps the input of each block and runs the block again (Chen et al., arXiv 1604.06174): about a third more
arithmetic. `selective` keeps what matrix products and attention return and computes the rest again (norms,
activations, masks, rotary products): nearly free in time (Korthikanti et al., arXiv 2205.05198; the same list as
torchtitan's). Both are transformers' own per-block hooks with torch's checkpointing inside, and gradients are
bit-identical to keeping everything.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from ..errors import RecipeError

aten = torch.ops.aten
KEPT = frozenset(
    op.default
    for op in (
        aten.mm,
        aten.addmm,
        aten.bmm,
        aten.baddbmm,
        aten.convolution,
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    )
)


def policy(_context: Any, op: Any, *_args: Any, **_named: Any) -> CheckpointPolicy:
    """Keep the dear, compute the cheap again."""
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(model: nn.Module, how: Literal["none", "selective", "full"]) -> None:
    """Switch a transformers model's activation checkpointing on.

    Raises:
        RecipeError: the model cannot.
    """
    if how == "none":
        return
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the second before transformers 5.23
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise RecipeError("activation_checkpointing", f"{how!r} for {type(model).__name__}", "none for this model")
    named: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        named["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    enable(named)
