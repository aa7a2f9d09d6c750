"""Gemma: a Llama that stores gain − 1, multiplies its embeddings by √hidden, and always ties its head."""

from dataclasses import replace

from . import ANY, Axis, Norm
from .llama import ARCHITECTURE as LLAMA

ARCHITECTURE = replace(
    LLAMA,
    model_type="gemma",
    axes=(Axis("hidden"), Axis("ffn"), Axis("kv_heads")),
    params=tuple(p for p in LLAMA.params if ".mlp." not in p.name or not p.name.endswith("bias")),
    norm=Norm("rms", eps="rms_norm_eps", gain_offset=1.0),
    embedding_scale="sqrt(hidden)",
    settings={
        "hidden_act": ANY,
        "hidden_activation": (None,),  # an older name that transformers' Gemma no longer reads
        "attention_bias": ANY,
        "attention_dropout": ANY,
        "rope_parameters": ANY,
        "rope_scaling": ANY,
        "rope_theta": ANY,
        "use_bidirectional_attention": (None, False),
    },
)
