"""Mistral: a Llama without biases, with an optional sliding window; its config takes any hidden size."""

from dataclasses import replace

from . import ANY, Axis
from .llama import ARCHITECTURE as LLAMA

ARCHITECTURE = replace(
    LLAMA,
    model_type="mistral",
    axes=(Axis("hidden"), Axis("ffn"), Axis("kv_heads")),
    params=tuple(p for p in LLAMA.params if not p.name.endswith("bias")),
    settings={
        "hidden_act": ANY,
        "attention_dropout": ANY,
        "rope_parameters": ANY,
        "rope_scaling": ANY,
        "rope_theta": ANY,
        "sliding_window": ANY,
    },
)
