"""Qwen2: a Llama whose q, k, v always have a bias and o never, optionally windowed in its upper layers."""

from dataclasses import replace

from . import ANY, Axis
from .llama import ARCHITECTURE as LLAMA

QKV_BIAS = ("q_proj.bias", "k_proj.bias", "v_proj.bias")

ARCHITECTURE = replace(
    LLAMA,
    model_type="qwen2",
    axes=(Axis("hidden"), Axis("ffn"), Axis("kv_heads")),
    params=tuple(replace(p, when="") for p in LLAMA.params if not p.name.endswith("bias") or p.name.endswith(QKV_BIAS)),
    settings={
        "hidden_act": ANY,
        "attention_dropout": ANY,
        "rope_parameters": ANY,
        "rope_scaling": ANY,
        "rope_theta": ANY,
        "use_mrope": (False,),
        "use_sliding_window": ANY,
        "sliding_window": ANY,
        "max_window_layers": ANY,
        "layer_types": ANY,
    },
)
