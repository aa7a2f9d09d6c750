"""Qwen2-MoE: a Qwen2 whose FFN is routed experts beside a shared one behind a sigmoid gate."""

from dataclasses import replace

from . import ANY, Axis, Branch, Experts, Param
from .llama import ARCHITECTURE as LLAMA
from .qwen2 import ARCHITECTURE as QWEN2
from .qwen2 import QKV_BIAS

EIGHT = "8"
"""transformers' grouped products of experts refuse rows that are no multiple of 16 bytes."""
FFN = "@layers.{i}.mlp"
ATTENTION = tuple(p for p in LLAMA.params if ".mlp." not in p.name and not p.name.endswith("bias"))
ROUTED = (
    Param(f"{FFN}.gate.weight", "experts{i}, hidden"),
    Param(f"{FFN}.experts.gate_up_proj", "experts{i}, ffn{i} + ffn{i}, hidden"),
    Param(f"{FFN}.experts.down_proj", "experts{i}, hidden, ffn{i}"),
)
EXPERTS = Experts(
    router=f"{FFN}.gate.weight",
    gate_up=f"{FFN}.experts.gate_up_proj",
    down=f"{FFN}.experts.down_proj",
    count="num_experts",
    weights="softmax",
)
ROUTED_BRANCH = Branch(
    norm="@layers.{i}.post_attention_layernorm",
    reads=(f"{FFN}.gate", f"{FFN}.experts.gate_up_proj"),
    writes=f"{FFN}.experts.down_proj",
    inner="ffn{i}",
)


def shared_expert(name: str, ffn: str, gate: str = "") -> tuple[tuple[Param, ...], Branch]:
    """Parameters and branch of the expert that works on every token.

    Args:
        name: of its module.
        ffn: its width, by axis names.
        gate: a module `[1, hidden]` whose sigmoid weights it; empty if none does.
    """
    writes = f"{name}.down_proj"
    reads: tuple[str, ...] = (f"{name}.gate_proj", f"{name}.up_proj")
    params = [*(Param(f"{r}.weight", f"{ffn}, hidden") for r in reads), Param(f"{writes}.weight", f"hidden, {ffn}")]
    if gate:
        params, reads = [*params, Param(f"{gate}.weight", "1, hidden")], (*reads, gate)
    return tuple(params), Branch(norm=ROUTED_BRANCH.norm, reads=reads, writes=writes, inner=ffn)


ROUTING = {
    "num_experts_per_tok": ANY,
    "norm_topk_prob": ANY,
    "output_router_logits": ANY,
    "router_aux_loss_coef": ANY,
    "intermediate_size": ANY,  # of dense blocks; there are none
}

SHARED, SHARED_BRANCH = shared_expert(f"{FFN}.shared_expert", "shared_ffn{i}", gate=f"{FFN}.shared_expert_gate")

ARCHITECTURE = replace(
    QWEN2,
    model_type="qwen2_moe",
    config=(
        *(equation for equation in LLAMA.config if equation[0] != "intermediate_size"),
        ("num_experts", "experts"),
        ("moe_intermediate_size", "ffn"),
        ("shared_expert_intermediate_size", "shared_ffn"),
    ),
    axes=(Axis("hidden", EIGHT), Axis("ffn", EIGHT), Axis("shared_ffn"), Axis("kv_heads")),
    params=(
        *ATTENTION,
        *(replace(p, when="qkv_bias") for p in LLAMA.params if p.name.endswith(QKV_BIAS)),
        *ROUTED,
        *SHARED,
    ),
    branches=(LLAMA.branches[0], ROUTED_BRANCH, SHARED_BRANCH),
    experts=EXPERTS,
    settings={
        **QWEN2.settings,
        **ROUTING,
        "num_local_experts": ANY,
        "qkv_bias": (False, True),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
)
