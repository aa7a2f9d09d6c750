"""Architectures of tersor's own: a stock one whose FFN, which has no gate, is routed experts beside a shared one.

They have no file each: `bert_routed` is what `routed` makes of `bert`, for every architecture that says where experts
stand in its block (`own`). Their forward is compress/moe/own.py's.
"""

from __future__ import annotations

from dataclasses import replace

from . import ANY, SUFFIX, Architecture, Branch, Experts, Param

CHOICE = ("num_experts_per_tok", "num_null_experts", "null_score")
"""Attributes that say how many experts a token takes."""


def routed(base: Architecture) -> Architecture:
    """The architecture with experts in place of its FFN."""
    assert base.own is not None
    dense = base.branches[-1]
    gone = (*dense.reads, dense.writes)
    stated = {attribute for attribute, product in base.config if product == "ffn"}
    name = f"{base.blocks}.{{i}}.{base.own.ffn}"
    up, down = f"{name}.experts.up_proj", f"{name}.experts.down_proj"
    params = (
        Param(f"{name}.router.weight", "experts{i}, hidden"),
        Param(f"{name}.router.bias", "experts{i}"),
        Param(up, "experts{i}, ffn{i}, hidden"),
        Param(f"{name}.experts.up_bias", "experts{i}, ffn{i}"),
        Param(down, "experts{i}, hidden, ffn{i}"),
        Param(f"{name}.shared.up_proj.weight", "shared_ffn{i}, hidden", when="shared_width"),
        Param(f"{name}.shared.up_proj.bias", "shared_ffn{i}", when="shared_width"),
        Param(f"{name}.shared.down_proj.weight", "hidden, shared_ffn{i}", when="shared_width"),
        Param(f"{name}.bias", "hidden"),
    )
    return replace(
        base,
        model_type=f"{base.model_type}{SUFFIX}",
        config=(
            *((attribute, product) for attribute, product in base.config if attribute not in stated),
            ("num_experts", "experts"),
            ("expert_width", "ffn"),
            ("shared_width", "shared_ffn"),
        ),
        axes=(),
        coupled=(),
        defaults={name: of for name, of in base.defaults.items() if name not in stated},
        params=(*(p for p in base.params if p.name.rpartition(".")[0] not in gone), *params),
        branches=(
            *base.branches[:-1],
            Branch(norm=dense.norm, reads=(f"{name}.router", up), writes=down, inner="ffn{i}"),
        ),
        experts=Experts(
            router=f"{name}.router.weight", gate_up=up, down=down, count="num_experts", weights="one", gated=False
        ),
        settings={**base.settings, **dict.fromkeys((*stated, *CHOICE), ANY)},
    )
