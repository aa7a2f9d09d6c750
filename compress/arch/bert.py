"""BERT: post-norm LayerNorm encoder, absolute positions, plain FFN. MiniLM and most sentence encoders are this."""

from . import ANY, Architecture, Axis, Branch, Norm, Own, Param, layer_norm, linear

HEADS = "heads{i} * head_dim"
LAYER = "@encoder.layer.{i}"


POOLER = linear("@pooler.dense", "hidden", "hidden")


def masked_lm(dense: str, norm: str, out: str, bias: str) -> tuple[Param, ...]:
    """A masked-LM head: dense, norm, and an output that shares the word embeddings and a bias named twice."""
    tied, words = "tie_word_embeddings", "@embeddings.word_embeddings.weight"
    return (
        *linear(dense, "hidden", "hidden"),
        *layer_norm(norm),
        Param(bias, "vocab"),
        Param(f"{out}.weight", "vocab, hidden", shared_when=tied, shared_with=words),
        Param(f"{out}.bias", "vocab", shared_when=tied, shared_with=bias),
    )


ARCHITECTURE = Architecture(
    model_type="bert",
    config=(
        ("vocab_size", "vocab"),
        ("max_position_embeddings", "positions"),
        ("type_vocab_size", "token_types"),
        ("hidden_size", "hidden"),
        ("num_attention_heads", "heads"),
        ("hidden_size", "heads * head_dim"),  # the config has no head_dim: heads cannot leave a stock BERT
        ("intermediate_size", "ffn"),
    ),
    axes=(Axis("ffn"),),
    blocks="@encoder.layer",
    depth="num_hidden_layers",
    embeddings=(
        "@embeddings.word_embeddings",
        "@embeddings.position_embeddings",
        "@embeddings.token_type_embeddings",
    ),
    params=(
        Param("@embeddings.word_embeddings.weight", "vocab, hidden"),
        Param("@embeddings.position_embeddings.weight", "positions, hidden"),
        Param("@embeddings.token_type_embeddings.weight", "token_types, hidden"),
        *layer_norm("@embeddings.LayerNorm"),
        *linear(f"{LAYER}.attention.self.query", HEADS, "hidden"),
        *linear(f"{LAYER}.attention.self.key", HEADS, "hidden"),
        *linear(f"{LAYER}.attention.self.value", HEADS, "hidden"),
        *linear(f"{LAYER}.attention.output.dense", "hidden", HEADS),
        *layer_norm(f"{LAYER}.attention.output.LayerNorm"),
        *linear(f"{LAYER}.intermediate.dense", "ffn{i}", "hidden"),
        *linear(f"{LAYER}.output.dense", "hidden", "ffn{i}"),
        *layer_norm(f"{LAYER}.output.LayerNorm"),
    ),
    branches=(
        Branch(
            norm=f"{LAYER}.attention.output.LayerNorm",
            reads=(
                f"{LAYER}.attention.self.query",
                f"{LAYER}.attention.self.key",
                f"{LAYER}.attention.self.value",
            ),
            writes=f"{LAYER}.attention.output.dense",
            inner=HEADS,
        ),
        Branch(
            norm=f"{LAYER}.output.LayerNorm",
            reads=(f"{LAYER}.intermediate.dense",),
            writes=f"{LAYER}.output.dense",
            inner="ffn{i}",
        ),
    ),
    norm=Norm("layer", eps="layer_norm_eps"),
    stream="post-norm",
    heads={
        "feature-extraction": POOLER,
        "fill-mask": masked_lm(
            dense="cls.predictions.transform.dense",
            norm="cls.predictions.transform.LayerNorm",
            out="cls.predictions.decoder",
            bias="cls.predictions.bias",
        ),
        "text-classification": (*POOLER, *linear("classifier", "labels", "hidden")),
        "token-classification": linear("classifier", "labels", "hidden"),
    },
    settings={
        "hidden_act": ANY,
        "hidden_dropout_prob": ANY,
        "attention_probs_dropout_prob": ANY,
        "classifier_dropout": ANY,
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    token_types=True,
    causal=False,
    own=Own("intermediate", passed=("output.dense",)),
)
