"""How a converted model whose FFN has no gate is written into tersor's own class (own.py)."""

from __future__ import annotations

import copy

import torch

from ..arch import SUFFIX
from ..layout import Layout
from .block import Block
from .cut import Cut
from .own import config_class


def restated(layout: Layout, cut: Cut) -> Layout:
    """The layout of the converted model."""
    kept = {name: value for name, value in layout.config.to_dict().items() if name not in ("model_type", "dtype")}
    made = config_class(f"{layout.arch.model_type}{SUFFIX}").from_dict(copy.deepcopy(kept))
    made.num_experts, made.num_experts_per_tok = cut.routed, cut.most or cut.chosen
    made.num_null_experts = cut.most
    made.expert_width, made.shared_width = cut.part, cut.shared * cut.part
    made.dtype = layout.config.dtype
    return Layout.of(made, layout.task, layout.dtype)


def stored(block: Block, layout: Layout, number: int) -> dict[str, torch.Tensor]:
    """The tensors of converted block `number`; `layout` is the class's."""
    cut, ffn, experts = block.cut, block.ffn, layout.arch.experts
    assert experts is not None
    assert block.router is not None
    assert ffn.shift is not None
    own = experts.router.removesuffix(".router.weight")
    start, size = cut.shared * cut.part, (cut.routed, cut.part)
    up, bias = ffn.gate[:, :-1], ffn.gate[:, -1]
    made = {
        experts.router: block.router[:, :-1],
        f"{own}.router.bias": block.router[:, -1],
        experts.gate_up: up[start:].unflatten(0, size),
        f"{own}.experts.up_bias": bias[start:].unflatten(0, size),
        experts.down: ffn.down[:, start:].unflatten(1, size).movedim(1, 0),
        f"{own}.shared.up_proj.weight": up[:start],
        f"{own}.shared.up_proj.bias": bias[:start],
        f"{own}.shared.down_proj.weight": ffn.down[:, :start],
        f"{own}.bias": ffn.shift,
    }
    full = {layout.full(name, number): tensor.contiguous() for name, tensor in made.items()}
    return {name: tensor for name, tensor in full.items() if name in layout.tensors}
