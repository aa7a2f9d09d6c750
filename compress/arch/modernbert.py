"""ModernBERT: pre-norm LayerNorm encoder with RoPE, gated FFN, and windows in two blocks of three.

The first block's attention reads the stream as the embedding's norm leaves it. q, k, v lie in one tensor, and so do
the gate and the values of the FFN.
"""

from . import ANY, Architecture, Axis, Branch, Norm, Param, layer_norm, linear

HEADS = "heads{i} * head_dim"
LAYER = "@layers.{i}"
HEAD = (*linear("head.dense", "hidden", "hidden", "classifier_bias"), *layer_norm("head.norm", "norm_bias"))

ARCHITECTURE = Architecture(
    model_type="modernbert",
    config=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("num_attention_heads", "heads"),
        (
            "hidden_size",
            "heads * head_dim",
        ),  # the config has no head_dim: heads cannot leave a stock ModernBERT
        ("intermediate_size", "ffn"),
    ),
    axes=(Axis("ffn"),),
    blocks="@layers",
    depth="num_hidden_layers",
    embeddings=("@embeddings.tok_embeddings",),
    params=(
        Param("@embeddings.tok_embeddings.weight", "vocab, hidden"),
        *layer_norm("@embeddings.norm", "norm_bias"),
        *layer_norm(f"{LAYER}.attn_norm", "norm_bias", except_in=(0,)),
        *linear(f"{LAYER}.attn.Wqkv", f"{HEADS} + {HEADS} + {HEADS}", "hidden", "attention_bias"),
        *linear(f"{LAYER}.attn.Wo", "hidden", HEADS, "attention_bias"),
        *layer_norm(f"{LAYER}.mlp_norm", "norm_bias"),
        *linear(f"{LAYER}.mlp.Wi", "ffn{i} + ffn{i}", "hidden", "mlp_bias"),
        *linear(f"{LAYER}.mlp.Wo", "hidden", "ffn{i}", "mlp_bias"),
        *layer_norm("@final_norm", "norm_bias"),
    ),
    branches=(
        Branch(
            norm=f"{LAYER}.attn_norm",
            reads=(f"{LAYER}.attn.Wqkv",),
            writes=f"{LAYER}.attn.Wo",
            inner=HEADS,
            except_in=(0,),
        ),
        Branch(norm=f"{LAYER}.mlp_norm", reads=(f"{LAYER}.mlp.Wi",), writes=f"{LAYER}.mlp.Wo", inner="ffn{i}"),
    ),
    norm=Norm("layer", eps="norm_eps"),
    stream="pre-norm",
    final_norm="@final_norm",
    heads={
        "feature-extraction": (),
        "fill-mask": (
            *HEAD,
            Param(
                "decoder.weight",
                "vocab, hidden",
                shared_when="tie_word_embeddings",
                shared_with="@embeddings.tok_embeddings.weight",
            ),
            Param("decoder.bias", "vocab", when="decoder_bias"),
        ),
        "text-classification": (*HEAD, *linear("classifier", "labels", "hidden")),
        "token-classification": (*HEAD, *linear("classifier", "labels", "hidden")),
    },
    reads_stream=("head.dense",),
    settings={
        "hidden_activation": ANY,
        "classifier_activation": ANY,
        "classifier_pooling": ANY,
        "classifier_bias": ANY,
        "classifier_dropout": ANY,
        "norm_bias": ANY,
        "attention_bias": ANY,
        "mlp_bias": ANY,
        "decoder_bias": ANY,
        "attention_dropout": ANY,
        "embedding_dropout": ANY,
        "mlp_dropout": ANY,
        "initializer_cutoff_factor": ANY,
        "layer_types": ANY,
        "local_attention": ANY,
        "global_attn_every_n_layers": ANY,
        "rope_parameters": ANY,
        "rope_scaling": ANY,
        "global_rope_theta": ANY,
        "local_rope_theta": ANY,
        "deterministic_flash_attn": ANY,
        "reference_compile": ANY,
        "repad_logits_with_grad": ANY,
        "sparse_prediction": ANY,
        "sparse_pred_ignore_index": ANY,
        "cls_token_id": ANY,
        "layer_norm_eps": ANY,  # in some files beside norm_eps, which transformers reads
        "position_embedding_type": ANY,  # likewise: positions are rotary whatever it says
    },
    activation="hidden_activation",
    causal=False,
)
