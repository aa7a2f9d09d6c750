"""GraniteMoeShared: a Granite whose FFN is routed experts, weighted by a softmax over the chosen, and a shared one."""

from dataclasses import replace

from . import ANY, Axis, Branch, Param
from .granite import ARCHITECTURE as GRANITE
from .llama import ARCHITECTURE as LLAMA
from .mixtral import ARCHITECTURE as MIXTRAL
from .qwen2_moe import EIGHT, EXPERTS, ROUTED_BRANCH

FFN = "@layers.{i}.block_sparse_moe"
WIDTH = "shared_intermediate_size"
SHARED = "@layers.{i}.shared_mlp"

ARCHITECTURE = replace(
    GRANITE,
    model_type="granitemoeshared",
    config=(*MIXTRAL.config, (WIDTH, "shared_ffn")),
    axes=(Axis("hidden", EIGHT), Axis("ffn", EIGHT), Axis("shared_ffn"), Axis("kv_heads")),
    params=(
        *(p for p in LLAMA.params if ".mlp." not in p.name),
        Param(f"{FFN}.router.weight", "experts{i}, hidden"),
        Param(f"{FFN}.experts.gate_up_proj", "experts{i}, ffn{i} + ffn{i}, hidden"),
        Param(f"{FFN}.experts.down_proj", "experts{i}, hidden, ffn{i}"),
        Param(f"{SHARED}.input_linear.weight", "shared_ffn{i} + shared_ffn{i}, hidden", when=WIDTH),
        Param(f"{SHARED}.output_linear.weight", "hidden, shared_ffn{i}", when=WIDTH),
    ),
    branches=(
        LLAMA.branches[0],
        replace(
            ROUTED_BRANCH,
            reads=(f"{FFN}.router", f"{FFN}.experts.gate_up_proj"),
            writes=f"{FFN}.experts.down_proj",
        ),
        Branch(
            norm=ROUTED_BRANCH.norm,
            reads=(f"{SHARED}.input_linear",),
            writes=f"{SHARED}.output_linear",
            inner="shared_ffn{i}",
        ),
    ),
    experts=replace(
        EXPERTS,
        router=f"{FFN}.router.weight",
        gate_up=f"{FFN}.experts.gate_up_proj",
        down=f"{FFN}.experts.down_proj",
        count="num_local_experts",
        weights="softmax of chosen",
    ),
    settings={
        **GRANITE.settings,
        "num_experts_per_tok": ANY,
        "output_router_logits": ANY,
        "router_aux_loss_coef": ANY,
    },
)
