"""Qwen3: a Llama with an RMSNorm on each query and key head, whose width is stated apart from hidden."""

from dataclasses import replace

from . import ANY, Axis, Param
from .llama import ARCHITECTURE as LLAMA
from .qwen2 import ARCHITECTURE as QWEN2

ARCHITECTURE = replace(
    LLAMA,
    model_type="qwen3",
    rotary=None,  # a norm over each head
    axes=(Axis("hidden"), Axis("ffn"), Axis("kv_heads")),
    params=(
        *(p for p in LLAMA.params if ".mlp." not in p.name or not p.name.endswith("bias")),
        Param("@layers.{i}.self_attn.q_norm.weight", "head_dim"),
        Param("@layers.{i}.self_attn.k_norm.weight", "head_dim"),
    ),
    settings={**QWEN2.settings, "attention_bias": ANY},
)
