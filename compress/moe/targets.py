"""The stock classes that can hold a converted model, and how it is written into them.

    class              a chosen part's weight, logits ~ 0      made one by                          k at load
    qwen2_moe          1 / routed (softmax)                    × routed in down                     free
    glm4_moe           1 / 2 (sigmoid)                         routed_scaling_factor = 2            free
    qwen3_moe          1 / routed (softmax)                    × routed in down                     free
    mixtral            1 / chosen (softmax, normalised)        × chosen in down                     fixed
    granite_moe_shared 1 / chosen (softmax of chosen)          × chosen in down                     fixed

qwen2_moe gates its shared expert by a sigmoid: its weight is zero, so it gives 1 / 2, and down is doubled. A class
holds a model if every tensor beside the FFN has its place there and none is left empty, and the forward treats windows
and multipliers alike: `why_not` says what is in the way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..arch import SUFFIX
from ..errors import RecipeError
from ..layout import Layout, model_class
from . import own_target
from .activations import ffn_branch
from .block import Block
from .cut import Cut
from .router import constant

CARRIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type",
)  # fmt: skip
"""Config attributes that mean the same in all classes."""
MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")


@dataclass(frozen=True)
class Shared:
    """What a class' shared expert, the last branch of a block, is like.

    Attributes:
        needed: whether it must have units.
        gated: whether it reads through one module more, whose sigmoid weights it; zero, it gives one half.
    """

    needed: bool = False
    gated: bool = False


@dataclass(frozen=True)
class Target:
    """A stock class.

    Attributes:
        model_type: its name in transformers.
        settings: (layout of the source, cut) → attributes beyond `CARRIED`.
        free: whether `num_experts_per_tok` may be changed at load.
        shared: its shared expert; None if it has none.
        window: which windows of the source it can hold: one that `all` blocks have, or `each` block's own.
        folded: whether a chosen part's weight is made one by the down projection, not by the config.
        zeros: parameters and buffers that stay zero.
        multipliers: whether it multiplies embeddings, branches, scores and logits as the source does.
        own: whether it is tersor's own class for FFNs without a gate (own.py), and no stock one.
    """

    model_type: str
    settings: Callable[[Layout, Cut], dict[str, Any]]
    free: bool
    shared: Shared | None = None
    window: str = ""
    folded: bool = True
    zeros: tuple[str, ...] = ()
    multipliers: bool = False
    own: bool = False


def windows(config: Any) -> set[int]:
    """The windows of a config's blocks; 0 where a block sees everything."""
    size = getattr(config, "sliding_window", None) or 0
    types = getattr(config, "layer_types", None)
    if not size or not types:
        return {size}
    return {size if kind == "sliding_attention" else 0 for kind in types}


def _windowed(config: Any) -> dict[str, Any]:
    found = windows(config)
    if found == {0}:
        return {"use_sliding_window": False, "layer_types": ["full_attention"] * config.num_hidden_layers}
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {"use_sliding_window": True, "sliding_window": max(found), "layer_types": list(types)}


def _routed(cut: Cut) -> dict[str, Any]:
    return {"moe_intermediate_size": cut.padded, "intermediate_size": cut.width, "norm_topk_prob": False}


def _qwen(cut: Cut) -> dict[str, Any]:
    return {**_routed(cut), "num_experts": cut.routed, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _qwen2_moe(layout: Layout, cut: Cut) -> dict[str, Any]:
    shared = max(cut.shared, 1) * cut.padded
    biased = has(layout, "q_proj.bias")
    return {
        **_windowed(layout.config),
        **_qwen(cut),
        "qkv_bias": biased,
        "shared_expert_intermediate_size": shared,
    }


def _qwen3_moe(layout: Layout, cut: Cut) -> dict[str, Any]:
    found = windows(layout.config)
    window = {"use_sliding_window": 0 not in found, "sliding_window": None if 0 in found else max(found)}
    return {**_qwen(cut), **window, "attention_bias": has(layout, "q_proj.bias")}


def _glm4_moe(layout: Layout, cut: Cut) -> dict[str, Any]:
    return {
        **_routed(cut),
        "attention_bias": has(layout, "q_proj.bias"),
        "use_qk_norm": has(layout, "q_norm.weight"),
        "partial_rotary_factor": 1.0,
        "n_routed_experts": cut.routed,
        "n_shared_experts": cut.shared,
        "routed_scaling_factor": 2.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    }


def _mixtral(layout: Layout, cut: Cut) -> dict[str, Any]:
    window = max(windows(layout.config)) or None
    return {"sliding_window": window, "num_local_experts": cut.routed, "intermediate_size": cut.padded}


def _granite(layout: Layout, cut: Cut) -> dict[str, Any]:
    neutral = {**dict.fromkeys(MULTIPLIERS, 1.0), "attention_multiplier": layout.families["head_dim"] ** -0.5}
    return {
        **{name: getattr(layout.config, name, value) for name, value in neutral.items()},
        "attention_bias": has(layout, "q_proj.bias"),
        "num_local_experts": cut.routed,
        "intermediate_size": cut.padded,
        "shared_intermediate_size": cut.shared * cut.padded,
    }


def has(layout: Layout, name: str) -> bool:
    """Whether a model has tensors whose names end so."""
    return any(tensor.endswith(name) for tensor in layout.tensors)


TARGETS: Mapping[str, Target] = {
    "qwen2_moe": Target("qwen2_moe", _qwen2_moe, free=True, shared=Shared(gated=True), window="each"),
    "glm4_moe": Target(
        "glm4_moe",
        _glm4_moe,
        free=True,
        shared=Shared(needed=True),
        folded=False,
        zeros=("@layers.{i}.mlp.gate.e_score_correction_bias",),
    ),
    "qwen3_moe": Target("qwen3_moe", _qwen3_moe, free=True, window="all"),
    "mixtral": Target("mixtral", _mixtral, free=False, window="all"),
    "granite_moe_shared": Target("granitemoeshared", _granite, free=False, shared=Shared(), multipliers=True),
}
"""In the order in which `auto` tries them."""


def restated(layout: Layout, cut: Cut, target: Target) -> Layout:
    """The layout of the converted model in a stock class."""
    from transformers import AutoConfig

    if target.own:
        return own_target.restated(layout, cut)
    config = layout.config
    carried = {name: getattr(config, name) for name in CARRIED if hasattr(config, name)}
    rope = copy.deepcopy(config.rope_parameters)
    settings = target.settings(layout, cut)
    if "partial_rotary_factor" in settings:
        rope["partial_rotary_factor"] = settings["partial_rotary_factor"]
    made = AutoConfig.for_model(
        target.model_type,
        **{**carried, **settings},
        rope_parameters=rope,
        head_dim=layout.families["head_dim"],
        num_experts_per_tok=cut.chosen,
    )
    made.dtype = config.dtype
    found = Layout.of(made, layout.task, layout.dtype)
    made.architectures = [model_class(made, layout.task).__name__]
    return found


def why_not(layout: Layout, cut: Cut, target: Target) -> str:
    """What keeps the class from holding the model; empty if nothing does."""
    if cut.shared and target.shared is None:
        return f"{cut.shared} shared experts"
    if not cut.shared and target.shared is not None and target.shared.needed:
        return "a model without shared experts"
    found = windows(layout.config)
    if found != {0} and (not target.window or (target.window == "all" and len(found) > 1)):
        return f"attention windows of {', '.join(str(w or 'all') for w in sorted(found))} tokens"
    if any(hasattr(layout.config, name) for name in MULTIPLIERS) and not target.multipliers:
        return "multipliers on embeddings, branches and logits"
    made = restated(layout, cut, target)
    theirs, ours = apart_from(made, experts_names(made, target)), apart_from(layout, ffn_names(layout))
    differing = ours.items() ^ theirs.items()
    if not differing:
        return ""
    name, shape = min(differing)
    return f"{name} {list(shape)}" if name in ours else f"a model without {name}"


def apart_from(layout: Layout, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors but the named ones."""
    return {name: shape for name, shape in layout.shapes().items() if name not in names}


def ffn_names(layout: Layout) -> set[str]:
    """The tensors of a dense model that its experts replace."""
    branches = (ffn_branch(layout, block) for block in range(layout.depth))
    return {
        tensor
        for branch in branches
        if branch
        for name in (*branch.reads, branch.writes)
        for tensor in layout.stored(name)
    }


def experts_names(layout: Layout, target: Target) -> set[str]:
    """The tensors that replace them."""
    experts = layout.arch.experts
    assert experts is not None
    templates = [experts.router, experts.gate_up, experts.down, *target.zeros, *shared_names(layout, target)]
    return {layout.full(template, block) for template in templates for block in range(layout.depth)}


def shared_names(layout: Layout, target: Target) -> list[str]:
    """Templates of the shared expert's parameters: what it reads through, down, and its own gate last if it has one."""
    if target.shared is None:
        return []
    branch = layout.arch.branches[-1]
    own, gate = (branch.reads[:-1], branch.reads[-1:]) if target.shared.gated else (branch.reads, ())
    return [f"{module}.weight" for module in (*own, branch.writes, *gate)]


def find_target(layout: Layout, cut: Cut, name: str) -> Target:
    """The class asked for, or with `auto` the first that holds the model; tersor's own where the FFN has no gate.

    Raises:
        RecipeError: it cannot; says why.
    """
    branch = ffn_branch(layout, 0)
    if branch is not None and len(branch.reads) == 1:
        if name != "auto":
            found = f"{layout.arch.model_type}, whose FFN has no gate"
            raise RecipeError(f"moe: target: {name}", found, "auto", "No stock class has experts without a gate.")
        return Target(f"{layout.arch.model_type}{SUFFIX}", lambda _layout, _cut: {}, free=True, own=True)
    if cut.most:
        found = f"{layout.arch.model_type}, whose FFN has a gate"
        why = "Stock classes give every token of every block as many experts."
        raise RecipeError("moe: dynamic", found, "dynamic: false", why)
    biases = [name for name in ffn_names(layout) if name.endswith(".bias")]
    if biases:
        raise RecipeError("moe", min(biases), "an FFN without biases", "No stock class has biased experts.")
    reasons = {}
    for word in TARGETS if name == "auto" else [name]:
        reasons[word] = why_not(layout, cut, TARGETS[word])
        if not reasons[word]:
            return TARGETS[word]
    said = "; ".join(f"{word} has no place for {why}" for word, why in reasons.items())
    others = [word for word in TARGETS if word not in reasons and not why_not(layout, cut, TARGETS[word])]
    found = f"a {layout.arch.model_type} that does not fit ({said})"
    remedy = f"It fits {', '.join(others)}." if others else ""
    raise RecipeError(f"moe: target: {name}", found, "a class that holds the model", remedy)


def parts(weight: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Rows `[ffn, hidden]` in the partition's order as `[experts, padded, hidden]`, zeros behind each part."""
    return functional.pad(weight.unflatten(0, (cut.experts, cut.part)), (0, 0, 0, cut.padded - cut.part))


def stored(block: Block, layout: Layout, target: Target, number: int) -> dict[str, torch.Tensor]:
    """The tensors of converted block `number` in its class; `layout` is the class's."""
    if target.own:
        return own_target.stored(block, layout, number)
    cut, ffn, experts = block.cut, block.ffn, layout.arch.experts
    assert experts is not None
    assert block.router is not None
    assert ffn.up is not None
    gate, up, down = (parts(weight, cut) for weight in (ffn.gate, ffn.up, ffn.down.T.double()))
    factor = 1 / constant(cut, experts.weights) if target.folded else 1.0
    made = {
        experts.router: block.router,
        experts.gate_up: torch.cat([gate, up], dim=1)[cut.shared :],
        experts.down: factor * down[cut.shared :].mT,
    }
    if target.shared is not None:
        gate, up, down = (part[: cut.shared].flatten(0, 1) for part in (gate, up, down))
        *reads, writes = shared_names(layout, target)[: -1 if target.shared.gated else None]
        made |= dict(zip(reads, [torch.cat([gate, up])] if len(reads) == 1 else [gate, up], strict=True))
        made[writes] = (2.0 if target.shared.gated else 1.0) * down.T
    found = {layout.full(name, number): tensor for name, tensor in made.items()}
    return {
        name: _filled(found.get(name), layout.tensors[name].shape)
        for name in (layout.full(t, number) for t in (*made, *target.zeros, *shared_names(layout, target)))
        if name in layout.tensors
    }


def _filled(tensor: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor; zeros where there is none, or where it has no units."""
    return tensor if tensor is not None and tensor.numel() else torch.zeros(shape)
