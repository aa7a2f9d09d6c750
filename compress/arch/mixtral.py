"""Mixtral: a Mistral whose FFN is routed experts, weighted by a softmax over those that were chosen."""

from dataclasses import replace

from . import ANY, Axis
from .llama import ARCHITECTURE as LLAMA
from .mistral import ARCHITECTURE as MISTRAL
from .qwen2_moe import EIGHT, EXPERTS, ROUTED, ROUTED_BRANCH, ROUTING

ARCHITECTURE = replace(
    MISTRAL,
    model_type="mixtral",
    config=(*LLAMA.config, ("num_local_experts", "experts")),
    axes=(Axis("hidden", EIGHT), Axis("ffn", EIGHT), Axis("kv_heads")),
    params=(*(p for p in MISTRAL.params if ".mlp." not in p.name), *ROUTED),
    branches=(LLAMA.branches[0], ROUTED_BRANCH),
    experts=replace(EXPERTS, count="num_local_experts", weights="softmax, normalised"),
    settings={
        **MISTRAL.settings,
        **{name: values for name, values in ROUTING.items() if name not in ("norm_topk_prob", "intermediate_size")},
        "router_jitter_noise": ANY,  # of training
    },
)
