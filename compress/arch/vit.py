"""ViT: pre-norm LayerNorm encoder over image patches, learned positions, a class token in front."""

from typing import Any

from . import ANY, Architecture, Axis, Branch, Norm, Param, layer_norm, linear

HEADS = "heads{i} * head_dim"
LAYER = "@layers.{i}"


def side(value: Any, number: int) -> int:
    """Height (0) or width (1) of a size that the config states as one number or as a pair."""
    return int(value[number]) if isinstance(value, (list, tuple)) else int(value)


def patches(config: Any) -> int:
    """Patches in an image of the config's size."""
    rows, columns = (side(config.image_size, n) // side(config.patch_size, n) for n in (0, 1))
    return rows * columns


ARCHITECTURE = Architecture(
    model_type="vit",
    config=(
        ("num_channels", "channels"),
        ("hidden_size", "hidden"),
        ("num_attention_heads", "heads"),
        ("head_dim", "head_dim"),
        ("intermediate_size", "ffn"),
        ("pooler_output_size", "pooled"),
    ),
    axes=(Axis("ffn"), Axis("heads"), Axis("hidden")),
    defaults={"head_dim": lambda config: config.hidden_size // config.num_attention_heads},
    computed={
        "patches": patches,
        "patch_height": lambda config: side(config.patch_size, 0),
        "patch_width": lambda config: side(config.patch_size, 1),
    },
    blocks="@layers",
    depth="num_hidden_layers",
    embeddings=(
        "@embeddings.patch_embeddings.projection",
        "@embeddings.cls_token",
        "@embeddings.position_embeddings",
    ),
    params=(
        Param("@embeddings.cls_token", "1, 1, hidden"),
        Param("@embeddings.position_embeddings", "1, 1 + patches, hidden"),
        Param("@embeddings.patch_embeddings.projection.weight", "hidden, channels, patch_height, patch_width"),
        Param("@embeddings.patch_embeddings.projection.bias", "hidden"),
        *layer_norm(f"{LAYER}.layernorm_before"),
        *linear(f"{LAYER}.attention.q_proj", HEADS, "hidden", "qkv_bias"),
        *linear(f"{LAYER}.attention.k_proj", HEADS, "hidden", "qkv_bias"),
        *linear(f"{LAYER}.attention.v_proj", HEADS, "hidden", "qkv_bias"),
        *linear(f"{LAYER}.attention.o_proj", "hidden", HEADS),
        *layer_norm(f"{LAYER}.layernorm_after"),
        *linear(f"{LAYER}.mlp.fc1", "ffn{i}", "hidden"),
        *linear(f"{LAYER}.mlp.fc2", "hidden", "ffn{i}"),
        *layer_norm("@layernorm"),
    ),
    branches=(
        Branch(
            norm=f"{LAYER}.layernorm_before",
            reads=(
                f"{LAYER}.attention.q_proj",
                f"{LAYER}.attention.k_proj",
                f"{LAYER}.attention.v_proj",
            ),
            writes=f"{LAYER}.attention.o_proj",
            inner=HEADS,
        ),
        Branch(
            norm=f"{LAYER}.layernorm_after",
            reads=(f"{LAYER}.mlp.fc1",),
            writes=f"{LAYER}.mlp.fc2",
            inner="ffn{i}",
        ),
    ),
    norm=Norm("layer", eps="layer_norm_eps"),
    stream="pre-norm",
    final_norm="@layernorm",
    heads={
        "feature-extraction": linear("@pooler.dense", "pooled", "hidden"),
        "image-classification": linear("classifier", "labels", "hidden"),
    },
    reads_stream=("@pooler.dense", "classifier"),
    settings={
        "hidden_act": ANY,
        "hidden_dropout_prob": ANY,
        "attention_probs_dropout_prob": ANY,
        "encoder_stride": ANY,
        "image_size": ANY,
        "patch_size": ANY,
        "qkv_bias": ANY,
        "pooler_act": ANY,
    },
    inputs="pixels",
    position_ids=False,
    causal=False,
)
