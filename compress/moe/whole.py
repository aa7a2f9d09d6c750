"""All experts of a block as one FFN, masked: how CPUs train fastest where tokens use many experts, or small ones.

    y = (act(x Gᵀ) ∘ (x Uᵀ) ∘ w) Dᵀ,     w = the weight of each unit's expert, 0 where that is not chosen

transformers sorts tokens by expert and multiplies expert by expert. Sorting, small products and their gradients can
cost more than the units that are passed over; `benchmarks/moe.py steps` prints where, and `pays` is the rule from it.
Values and gradients are the same up to the order of sums, the router's among them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..layout import Layout

NAME = "tersor_whole"
SMALL, MIDDLING = 16, 64
"""Units of experts whose products cost little beside what surrounds them, and of those where they begin to."""
FEW, MANY = 0.2, 0.5
"""Share of the experts that a token chooses from which on all are computed, by their size."""


def pays(experts: int, chosen: int, width: int, in_bfloat16: bool) -> bool:
    """Whether to compute all experts, of `width` units, where a token chooses so many."""
    share = chosen / experts
    return share >= (FEW if in_bfloat16 or width <= SMALL else MANY if width <= MIDDLING else math.inf)


def masked(layout: Layout, in_bfloat16: bool) -> bool:
    """Whether a model of this layout trains so on this machine."""
    experts = layout.arch.experts
    if experts is None or layout.arch.own is not None or torch.cuda.is_available():
        return False
    chosen = int(getattr(layout.config, experts.active))
    return pays(layout.families["experts"], chosen, layout.families["ffn"], in_bfloat16)


def use(model: Any) -> None:
    """Have a torch model compute its experts this way."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, computed)
    model.set_experts_implementation(NAME)


def computed(module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the experts of transformers' `module` give.

    Args:
        module: with gate and up projection stacked and no biases, as the classes of compress/arch have them.
        x: tokens `[n, hidden]`.
        index: int64 `[n, chosen]`.
        weights: of the chosen experts, `[n, chosen]`.

    Returns:
        `[n, hidden]` in x's dtype.
    """
    count, both, hidden = module.gate_up_proj.shape
    mask = weights.new_zeros(len(x), count).scatter(1, index, weights)
    read = torch.nn.functional.linear(x, module.gate_up_proj.reshape(-1, hidden))
    gate, up = read.view(-1, count, 2, both // 2).unbind(2)
    inner = module.act_fn(gate) * up * mask[:, :, None]
    down = module.down_proj.transpose(1, 2).reshape(-1, hidden)
    return (inner.reshape(len(x), -1).to(x.dtype) @ down).to(x.dtype)
