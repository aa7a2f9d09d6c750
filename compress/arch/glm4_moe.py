"""GLM-4-MoE: routed experts weighted by their sigmoid, and shared ones of the same width side by side.

The width of the experts states the shared ones' too, so it is fixed here; so are the groups of experts, of which
there is one, and the dense blocks in front, of which there is none.
"""

from dataclasses import replace

from . import ANY, Axis, Param
from .llama import ARCHITECTURE as LLAMA
from .qwen2 import QKV_BIAS
from .qwen2_moe import ARCHITECTURE as QWEN2_MOE
from .qwen2_moe import ATTENTION, EIGHT, EXPERTS, FFN, ROUTED, ROUTED_BRANCH, ROUTING, shared_expert

SHARED, SHARED_BRANCH = shared_expert(f"{FFN}.shared_experts", "shared * ffn{i}")

ARCHITECTURE = replace(
    LLAMA,
    model_type="glm4_moe",
    rotary=None,
    config=(
        *(e for e in QWEN2_MOE.config if e[0] not in ("num_experts", "shared_expert_intermediate_size")),
        ("n_routed_experts", "experts"),
        ("n_shared_experts", "shared"),
    ),
    axes=(Axis("hidden", EIGHT), Axis("kv_heads")),
    params=(
        *ATTENTION,
        *(p for p in LLAMA.params if p.name.endswith(QKV_BIAS)),
        Param("@layers.{i}.self_attn.q_norm.weight", "head_dim", when="use_qk_norm"),
        Param("@layers.{i}.self_attn.k_norm.weight", "head_dim", when="use_qk_norm"),
        *ROUTED,
        Param(f"{FFN}.gate.e_score_correction_bias", "experts{i}", kind="buffer", dtype="float32"),
        *SHARED,
    ),
    branches=(LLAMA.branches[0], ROUTED_BRANCH, SHARED_BRANCH),
    experts=replace(EXPERTS, count="n_routed_experts", weights="sigmoid"),
    settings={
        **{name: values for name, values in LLAMA.settings.items() if name not in ("mlp_bias", "pretraining_tp")},
        **{name: values for name, values in ROUTING.items() if name != "router_aux_loss_coef"},
        "num_local_experts": ANY,
        "partial_rotary_factor": ANY,
        "use_qk_norm": (False, True),
        "routed_scaling_factor": ANY,
        "n_group": (1,),
        "topk_group": (1,),
        "first_k_dense_replace": (0,),
        "num_nextn_predict_layers": ANY,  # of speculative decoding; transformers leaves their weights out
        "num_mtp_layers": ANY,
    },
)
