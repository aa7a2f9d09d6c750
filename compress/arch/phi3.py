"""Phi-3: a Llama without biases whose q, k, v lie in one tensor, and gate and up in another."""

from dataclasses import replace

from . import ANY, Axis, Branch, Param
from .llama import ARCHITECTURE as LLAMA
from .llama import KEYS, MIXED, QUERIES, VALUES

ATTENTION = "@layers.{i}.self_attn"
MLP = "@layers.{i}.mlp"

ARCHITECTURE = replace(
    LLAMA,
    model_type="phi3",
    rotary=None,  # the config counts frequencies by hidden over the number of heads
    axes=(Axis("hidden"), Axis("ffn"), Axis("kv_heads")),
    params=(
        Param("@embed_tokens.weight", "vocab, hidden"),
        Param("@layers.{i}.input_layernorm.weight", "hidden"),
        Param(f"{ATTENTION}.qkv_proj.weight", f"{QUERIES} + {KEYS} + {VALUES}, hidden"),
        Param(f"{ATTENTION}.o_proj.weight", f"hidden, {MIXED}"),
        Param("@layers.{i}.post_attention_layernorm.weight", "hidden"),
        Param(f"{MLP}.gate_up_proj.weight", "ffn{i} + ffn{i}, hidden"),
        Param(f"{MLP}.down_proj.weight", "hidden, ffn{i}"),
        Param("@norm.weight", "hidden"),
    ),
    branches=(
        Branch(
            norm="@layers.{i}.input_layernorm",
            reads=(f"{ATTENTION}.qkv_proj",),
            writes=f"{ATTENTION}.o_proj",
            inner=MIXED,
        ),
        Branch(
            norm="@layers.{i}.post_attention_layernorm",
            reads=(f"{MLP}.gate_up_proj",),
            writes=f"{MLP}.down_proj",
            inner="ffn{i}",
        ),
    ),
    settings={
        "hidden_act": ANY,
        "attention_dropout": ANY,
        "resid_pdrop": ANY,
        "embd_pdrop": ANY,
        "original_max_position_embeddings": ANY,
        "partial_rotary_factor": ANY,
        "rope_parameters": ANY,
        "rope_scaling": ANY,
        "rope_theta": ANY,
        "sliding_window": ANY,
        "attention_bias": (False,),
    },
)
