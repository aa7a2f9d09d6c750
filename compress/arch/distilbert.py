"""DistilBERT: a BERT with other names, without token types and pooler."""

from . import ANY, Architecture, Axis, Branch, Norm, Own, Param, layer_norm, linear

HEADS = "heads{i} * head_dim"
LAYER = "@transformer.layer.{i}"

ARCHITECTURE = Architecture(
    model_type="distilbert",
    config=(
        ("vocab_size", "vocab"),
        ("max_position_embeddings", "positions"),
        ("dim", "hidden"),
        ("n_heads", "heads"),
        ("dim", "heads * head_dim"),  # the config has no head_dim: heads cannot leave a stock DistilBERT
        ("hidden_dim", "ffn"),
    ),
    axes=(Axis("ffn"),),
    blocks="@transformer.layer",
    depth="n_layers",
    embeddings=("@embeddings.word_embeddings", "@embeddings.position_embeddings"),
    params=(
        Param("@embeddings.word_embeddings.weight", "vocab, hidden"),
        Param("@embeddings.position_embeddings.weight", "positions, hidden"),
        *layer_norm("@embeddings.LayerNorm"),
        *linear(f"{LAYER}.attention.q_lin", HEADS, "hidden"),
        *linear(f"{LAYER}.attention.k_lin", HEADS, "hidden"),
        *linear(f"{LAYER}.attention.v_lin", HEADS, "hidden"),
        *linear(f"{LAYER}.attention.out_lin", "hidden", HEADS),
        *layer_norm(f"{LAYER}.sa_layer_norm"),
        *linear(f"{LAYER}.ffn.lin1", "ffn{i}", "hidden"),
        *linear(f"{LAYER}.ffn.lin2", "hidden", "ffn{i}"),
        *layer_norm(f"{LAYER}.output_layer_norm"),
    ),
    branches=(
        Branch(
            norm=f"{LAYER}.sa_layer_norm",
            reads=(f"{LAYER}.attention.q_lin", f"{LAYER}.attention.k_lin", f"{LAYER}.attention.v_lin"),
            writes=f"{LAYER}.attention.out_lin",
            inner=HEADS,
        ),
        Branch(
            norm=f"{LAYER}.output_layer_norm",
            reads=(f"{LAYER}.ffn.lin1",),
            writes=f"{LAYER}.ffn.lin2",
            inner="ffn{i}",
        ),
    ),
    norm=Norm("layer", eps=""),
    stream="post-norm",
    heads={
        "feature-extraction": (),
        "fill-mask": (
            *linear("vocab_transform", "hidden", "hidden"),
            *layer_norm("vocab_layer_norm"),
            Param(
                "vocab_projector.weight",
                "vocab, hidden",
                shared_when="tie_word_embeddings",
                shared_with="@embeddings.word_embeddings.weight",
            ),
            Param("vocab_projector.bias", "vocab"),
        ),
        "text-classification": (
            *linear("pre_classifier", "hidden", "hidden"),
            *linear("classifier", "labels", "hidden"),
        ),
        "token-classification": linear("classifier", "labels", "hidden"),
    },
    settings={
        "activation": ANY,
        "dropout": ANY,
        "attention_dropout": ANY,
        "qa_dropout": ANY,
        "seq_classif_dropout": ANY,
        "sinusoidal_pos_embds": ANY,  # how the table was filled; it is stored like any other
        "tie_weights_": ANY,
    },
    activation="activation",
    causal=False,
    own=Own("ffn"),
)
