"""Phi (1, 1.5, 2): LayerNorm decoder whose attention and FFN read one norm and add to the stream together."""

from . import ANY, Architecture, Axis, Branch, Norm, Param, causal_heads, layer_norm, linear
from .llama import KEYS, MIXED, QUERIES, VALUES

ATTENTION = "@layers.{i}.self_attn"
MLP = "@layers.{i}.mlp"
NORM = "@layers.{i}.input_layernorm"

ARCHITECTURE = Architecture(
    model_type="phi",
    config=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("intermediate_size", "ffn"),
        ("num_key_value_heads", "kv_heads"),
        ("num_attention_heads", "kv_heads * queries"),
        ("head_dim", "head_dim"),
        ("head_dim", "value_dim"),
    ),
    axes=(Axis("hidden"), Axis("ffn"), Axis("kv_heads")),
    coupled=(("head_dim", "value_dim"),),
    defaults={"head_dim": lambda config: config.hidden_size // config.num_attention_heads},
    blocks="@layers",
    depth="num_hidden_layers",
    embeddings=("@embed_tokens",),
    params=(
        Param("@embed_tokens.weight", "vocab, hidden"),
        *layer_norm(NORM),
        *linear(f"{ATTENTION}.q_proj", QUERIES, "hidden"),
        *linear(f"{ATTENTION}.k_proj", KEYS, "hidden"),
        *linear(f"{ATTENTION}.v_proj", VALUES, "hidden"),
        *linear(f"{ATTENTION}.dense", "hidden", MIXED),
        *linear(f"{MLP}.fc1", "ffn{i}", "hidden"),
        *linear(f"{MLP}.fc2", "hidden", "ffn{i}"),
        *layer_norm("@final_layernorm"),
    ),
    branches=(
        Branch(
            norm=NORM,
            reads=(f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj", f"{ATTENTION}.v_proj"),
            writes=f"{ATTENTION}.dense",
            inner=MIXED,
        ),
        Branch(norm=NORM, reads=(f"{MLP}.fc1",), writes=f"{MLP}.fc2", inner="ffn{i}"),
    ),
    parallel=True,
    norm=Norm("layer", eps="layer_norm_eps"),
    stream="pre-norm",
    final_norm="@final_layernorm",
    heads=causal_heads("@embed_tokens.weight", Param("lm_head.bias", "vocab")),
    reads_stream=("lm_head",),
    settings={
        "hidden_act": ANY,
        "attention_dropout": ANY,
        "resid_pdrop": ANY,
        "embd_pdrop": ANY,
        "partial_rotary_factor": ANY,
        "rope_parameters": ANY,
        "rope_scaling": ANY,
        "rope_theta": ANY,
        "qk_layernorm": (False,),  # its norms are as wide as hidden / heads, whatever head_dim says
    },
)
