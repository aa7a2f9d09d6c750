"""GPT-2: LayerNorm decoder with learned positions; weights lie transposed (Conv1D), q, k, v in one tensor."""

from . import ANY, Architecture, Axis, Branch, Norm, Own, Param, causal_heads, layer_norm

HEADS = "heads{i} * head_dim"
LAYER = "@h.{i}"


def conv1d(name: str, inp: str, out: str) -> tuple[Param, Param]:
    """Weight `[in, out]` and bias of transformers' Conv1D."""
    return Param(f"{name}.weight", f"{inp}, {out}"), Param(f"{name}.bias", out)


ARCHITECTURE = Architecture(
    model_type="gpt2",
    config=(
        ("vocab_size", "vocab"),
        ("n_positions", "positions"),
        ("n_embd", "hidden"),
        ("n_head", "heads"),
        (
            "n_embd",
            "heads * head_dim",
        ),  # the config has no head_dim: hidden and heads change together or not at all
        ("n_inner", "ffn"),
    ),
    axes=(Axis("ffn"),),
    coupled=(("hidden", "heads"), ("hidden", "head_dim")),
    defaults={"n_inner": lambda config: 4 * config.n_embd},
    blocks="@h",
    depth="n_layer",
    embeddings=("@wte", "@wpe"),
    params=(
        Param("@wte.weight", "vocab, hidden"),
        Param("@wpe.weight", "positions, hidden"),
        *layer_norm(f"{LAYER}.ln_1"),
        *conv1d(f"{LAYER}.attn.c_attn", "hidden", f"{HEADS} + {HEADS} + {HEADS}"),
        *conv1d(f"{LAYER}.attn.c_proj", HEADS, "hidden"),
        *layer_norm(f"{LAYER}.ln_2"),
        *conv1d(f"{LAYER}.mlp.c_fc", "hidden", "ffn{i}"),
        *conv1d(f"{LAYER}.mlp.c_proj", "ffn{i}", "hidden"),
        *layer_norm("@ln_f"),
    ),
    branches=(
        Branch(
            norm=f"{LAYER}.ln_1",
            reads=(f"{LAYER}.attn.c_attn",),
            writes=f"{LAYER}.attn.c_proj",
            inner=HEADS,
        ),
        Branch(norm=f"{LAYER}.ln_2", reads=(f"{LAYER}.mlp.c_fc",), writes=f"{LAYER}.mlp.c_proj", inner="ffn{i}"),
    ),
    norm=Norm("layer", eps="layer_norm_epsilon"),
    stream="pre-norm",
    final_norm="@ln_f",
    heads=causal_heads("@wte.weight"),
    reads_stream=("lm_head",),
    settings={
        "activation_function": ANY,
        "attn_pdrop": ANY,
        "embd_pdrop": ANY,
        "resid_pdrop": ANY,
        "summary_activation": ANY,
        "summary_first_dropout": ANY,
        "summary_proj_to_labels": ANY,
        "summary_type": ANY,
        "summary_use_proj": ANY,
        "scale_attn_weights": ANY,
        "scale_attn_by_inverse_layer_idx": ANY,
        "reorder_and_upcast_attn": ANY,
        "n_ctx": ANY,  # an older name beside n_positions
        "add_cross_attention": (False,),
    },
    activation="activation_function",
    own=Own("mlp"),
)
