"""Qwen3-MoE: a Qwen3 whose FFN is routed experts."""

from dataclasses import replace

from . import Axis
from .llama import ARCHITECTURE as LLAMA
from .qwen2_moe import ARCHITECTURE as QWEN2_MOE
from .qwen2_moe import EIGHT, EXPERTS, ROUTED, ROUTED_BRANCH
from .qwen3 import ARCHITECTURE as QWEN3

ARCHITECTURE = replace(
    QWEN3,
    model_type="qwen3_moe",
    config=tuple(e for e in QWEN2_MOE.config if e[0] != "shared_expert_intermediate_size"),
    axes=(Axis("hidden", EIGHT), Axis("ffn", EIGHT), Axis("kv_heads")),
    params=(*(p for p in QWEN3.params if ".mlp." not in p.name), *ROUTED),
    branches=(LLAMA.branches[0], ROUTED_BRANCH),
    experts=EXPERTS,
    settings={**{name: values for name, values in QWEN2_MOE.settings.items() if name != "qkv_bias"}, **QWEN3.settings},
)
