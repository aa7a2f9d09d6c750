"""Granite: a Llama with four multipliers in its config: on embeddings, attention scores, branches and logits."""

from dataclasses import replace

from . import ANY, Axis, Rotary
from .llama import ARCHITECTURE as LLAMA

ARCHITECTURE = replace(
    LLAMA,
    model_type="granite",
    axes=(Axis("hidden"), Axis("ffn"), Axis("kv_heads")),
    rotary=Rotary(scaled=False),
    branch_scale="residual_multiplier",
    settings={
        **{name: values for name, values in LLAMA.settings.items() if name != "pretraining_tp"},
        "embedding_multiplier": ANY,
        "attention_multiplier": ANY,
        "residual_multiplier": ANY,
        "logits_scaling": ANY,
    },
)
