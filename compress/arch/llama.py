"""Llama: pre-norm RMSNorm decoder, grouped-query attention with RoPE, gated FFN."""

from . import ANY, Architecture, Axis, Branch, Norm, Param, Rotary, causal_heads

QUERIES = "kv_heads{i} * queries * head_dim"
KEYS = "kv_heads{i} * head_dim"
VALUES = "kv_heads{i} * value_dim"
MIXED = "kv_heads{i} * queries * value_dim"

ARCHITECTURE = Architecture(
    model_type="llama",
    config=(
        ("vocab_size", "vocab"),
        ("hidden_size", "hidden"),
        ("intermediate_size", "ffn"),
        ("num_key_value_heads", "kv_heads"),
        ("num_attention_heads", "kv_heads * queries"),
        ("head_dim", "head_dim"),
        ("head_dim", "value_dim"),  # one number for both: they change together
    ),
    axes=(
        Axis("hidden", multiple_of="num_attention_heads"),  # LlamaConfig.validate_architecture
        Axis("ffn"),
        Axis("kv_heads"),
    ),
    coupled=(("head_dim", "value_dim"),),
    defaults={"head_dim": lambda config: config.hidden_size // config.num_attention_heads},
    blocks="@layers",
    depth="num_hidden_layers",
    embeddings=("@embed_tokens",),
    params=(
        Param("@embed_tokens.weight", "vocab, hidden"),
        Param("@layers.{i}.input_layernorm.weight", "hidden"),
        Param("@layers.{i}.self_attn.q_proj.weight", f"{QUERIES}, hidden"),
        Param("@layers.{i}.self_attn.k_proj.weight", f"{KEYS}, hidden"),
        Param("@layers.{i}.self_attn.v_proj.weight", f"{VALUES}, hidden"),
        Param("@layers.{i}.self_attn.o_proj.weight", f"hidden, {MIXED}"),
        Param("@layers.{i}.self_attn.q_proj.bias", QUERIES, when="attention_bias"),
        Param("@layers.{i}.self_attn.k_proj.bias", KEYS, when="attention_bias"),
        Param("@layers.{i}.self_attn.v_proj.bias", VALUES, when="attention_bias"),
        Param("@layers.{i}.self_attn.o_proj.bias", "hidden", when="attention_bias"),
        Param("@layers.{i}.post_attention_layernorm.weight", "hidden"),
        Param("@layers.{i}.mlp.gate_proj.weight", "ffn{i}, hidden"),
        Param("@layers.{i}.mlp.up_proj.weight", "ffn{i}, hidden"),
        Param("@layers.{i}.mlp.down_proj.weight", "hidden, ffn{i}"),
        Param("@layers.{i}.mlp.gate_proj.bias", "ffn{i}", when="mlp_bias"),
        Param("@layers.{i}.mlp.up_proj.bias", "ffn{i}", when="mlp_bias"),
        Param("@layers.{i}.mlp.down_proj.bias", "hidden", when="mlp_bias"),
        Param("@norm.weight", "hidden"),
    ),
    branches=(
        Branch(
            norm="@layers.{i}.input_layernorm",
            reads=(
                "@layers.{i}.self_attn.q_proj",
                "@layers.{i}.self_attn.k_proj",
                "@layers.{i}.self_attn.v_proj",
            ),
            writes="@layers.{i}.self_attn.o_proj",
            inner=MIXED,
        ),
        Branch(
            norm="@layers.{i}.post_attention_layernorm",
            reads=("@layers.{i}.mlp.gate_proj", "@layers.{i}.mlp.up_proj"),
            writes="@layers.{i}.mlp.down_proj",
            inner="ffn{i}",
        ),
    ),
    norm=Norm("rms", eps="rms_norm_eps"),
    rotary=Rotary(),
    stream="pre-norm",
    final_norm="@norm",
    heads=causal_heads("@embed_tokens.weight"),
    reads_stream=("lm_head",),
    settings={
        "hidden_act": ANY,
        "attention_bias": (False, True),
        "mlp_bias": (False, True),
        "attention_dropout": ANY,
        "rope_parameters": ANY,
        "rope_scaling": ANY,
        "rope_theta": ANY,
        "pretraining_tp": (1,),
    },
)
