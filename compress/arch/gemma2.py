"""Gemma 2: a Gemma with a norm behind each branch too, soft caps on scores and logits, every other block windowed."""

from dataclasses import replace

from . import ANY, Axis, Param, Rotary
from .gemma import ARCHITECTURE as GEMMA

LAYER = "@layers.{i}"
ATTENTION, MLP = GEMMA.branches

ARCHITECTURE = replace(
    GEMMA,
    model_type="gemma2",
    axes=(
        Axis("hidden", multiple_of="num_attention_heads"),  # Gemma2Config.validate_architecture
        Axis("ffn"),
        Axis("kv_heads"),
    ),
    params=(
        *GEMMA.params,
        Param(f"{LAYER}.pre_feedforward_layernorm.weight", "hidden"),
        Param(f"{LAYER}.post_feedforward_layernorm.weight", "hidden"),
    ),
    branches=(
        replace(ATTENTION, post_norm=f"{LAYER}.post_attention_layernorm"),
        replace(
            MLP,
            norm=f"{LAYER}.pre_feedforward_layernorm",
            post_norm=f"{LAYER}.post_feedforward_layernorm",
        ),
    ),
    rotary=Rotary(scaled=False),
    activation="hidden_activation",
    settings={
        **{name: values for name, values in GEMMA.settings.items() if name != "hidden_activation"},
        "hidden_activation": ANY,
        "hidden_act": ANY,  # in some files beside hidden_activation; transformers reads the latter
        "query_pre_attn_scalar": ANY,
        "attn_logit_softcapping": ANY,
        "final_logit_softcapping": ANY,
        "sliding_window": ANY,
        "sliding_window_size": ANY,  # an older name beside sliding_window
        "layer_types": ANY,
        "cache_implementation": ANY,
    },
)
