"""OPT: LayerNorm decoder with learned positions, two rows of whose table lie before position 0; ReLU.

Understood in the form of every size but 350m, which puts its norms behind the additions and projects its embeddings.
"""

from . import ANY, Architecture, Axis, Branch, Norm, Own, Param, causal_heads, layer_norm, linear

HEADS = "heads{i} * head_dim"
LAYER = "@decoder.layers.{i}"
BIAS = "enable_bias"

ARCHITECTURE = Architecture(
    model_type="opt",
    config=(
        ("vocab_size", "vocab"),
        ("max_position_embeddings", "positions"),
        ("hidden_size", "hidden"),
        ("word_embed_proj_dim", "hidden"),
        ("num_attention_heads", "heads"),
        ("hidden_size", "heads * head_dim"),  # the config has no head_dim: hidden and heads change together
        ("ffn_dim", "ffn"),
    ),
    axes=(Axis("ffn"),),
    coupled=(("hidden", "heads"), ("hidden", "head_dim")),
    blocks="@decoder.layers",
    depth="num_hidden_layers",
    embeddings=("@decoder.embed_tokens", "@decoder.embed_positions"),
    params=(
        Param("@decoder.embed_tokens.weight", "vocab, hidden"),
        Param("@decoder.embed_positions.weight", "2 + positions, hidden"),
        *layer_norm(f"{LAYER}.self_attn_layer_norm"),
        *linear(f"{LAYER}.self_attn.q_proj", HEADS, "hidden", BIAS),
        *linear(f"{LAYER}.self_attn.k_proj", HEADS, "hidden", BIAS),
        *linear(f"{LAYER}.self_attn.v_proj", HEADS, "hidden", BIAS),
        *linear(f"{LAYER}.self_attn.out_proj", "hidden", HEADS, BIAS),
        *layer_norm(f"{LAYER}.final_layer_norm"),
        *linear(f"{LAYER}.fc1", "ffn{i}", "hidden", BIAS),
        *linear(f"{LAYER}.fc2", "hidden", "ffn{i}", BIAS),
        *layer_norm("@decoder.final_layer_norm"),
    ),
    branches=(
        Branch(
            norm=f"{LAYER}.self_attn_layer_norm",
            reads=(
                f"{LAYER}.self_attn.q_proj",
                f"{LAYER}.self_attn.k_proj",
                f"{LAYER}.self_attn.v_proj",
            ),
            writes=f"{LAYER}.self_attn.out_proj",
            inner=HEADS,
        ),
        Branch(norm=f"{LAYER}.final_layer_norm", reads=(f"{LAYER}.fc1",), writes=f"{LAYER}.fc2", inner="ffn{i}"),
    ),
    norm=Norm("layer", eps=""),
    stream="pre-norm",
    final_norm="@decoder.final_layer_norm",
    heads=causal_heads("@decoder.embed_tokens.weight"),
    reads_stream=("lm_head",),
    settings={
        "activation_function": ANY,
        "dropout": ANY,
        "attention_dropout": ANY,
        "activation_dropout": ANY,
        "layerdrop": ANY,
        "init_std": ANY,
        "enable_bias": ANY,
        "do_layer_norm_before": (True,),
        "layer_norm_elementwise_affine": (True,),
        "_remove_final_layer_norm": (False,),
    },
    activation="activation_function",
    positions_count="mask",
    own=Own("fc1", passed=("activation_fn", "fc2")),
)
