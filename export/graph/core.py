"""The model on one row of tokens, with attention left open.

The core is what a model does to `[1, tokens]` ids when all that concerns sequences is somebody else's: positions come
in as an input, and every attention is one node `tersor::Attention(q, k, v)` that carries only what the layer knows
(causality, window, scale, soft cap). stitch.py fills these nodes in and puts a front before them. Only one dimension is
dynamic, so tracing is quick and the graph holds no shape arithmetic.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from tersor.compress.errors import RecipeError
from torch import nn

from ..mixture import experts
from . import trace

ATTENTION = "tersor_core"
DOMAIN = "tersor"
TRACED = 23
"""Opset of the tracer: it knows RMSNormalization and RotaryEmbedding in 23 only, and 24 means the same by them."""
IGNORED = (
    "deterministic",
    "dropout",
    "position_ids",
    "use_cache",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
)


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """A layer that hands its attention an argument we do not know computes something else than we would.

    Raises:
        RecipeError: names the argument.
    """
    for name, value in arguments.items():
        if value is not None and name not in IGNORED:
            raise RecipeError(
                "export", f"attention with {name}", "plain, causal, windowed or capped attention"
            )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """A placeholder node for q `[1, heads, tokens, d]`, giving `[1, tokens, heads, d]`."""
    refuse_unknown(rest)
    attributes: dict[str, Any] = {
        "causal": int(bool(getattr(module, "is_causal", False))),
        "window": sliding_window or 0,
        "scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        "softcap": float(softcap or 0.0),
        "heads": query.shape[1],
        "kv_heads": key.shape[1],
        "size": query.shape[3],
        "value_size": value.shape[3],
    }
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    mixed = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Attention", [query, key, value], attributes, dtype=query.dtype, shape=shape, version=1
    )
    return mixed, None


class Core(nn.Module):
    """A transformers module as a function of ids, positions and token types, each `[1, tokens]`."""

    def __init__(self, model: nn.Module, token_types: bool):
        from transformers import AttentionInterface

        super().__init__()
        AttentionInterface.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        experts.prepare(model)
        self.model, self.token_types = model, token_types

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits `[1, tokens, vocab]` or states `[1, tokens, hidden]`."""
        extra = {"token_type_ids": token_type_ids} if self.token_types else {}
        out = self.model(input_ids=input_ids, position_ids=position_ids, **extra)
        answer: torch.Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
        return answer


class Head(nn.Module):
    """A sequence classifier behind its base model: a function of each sequence's first state, `[sequences, 1, hidden]`.

    The classifier's own forward runs; its base model hands out the given states. A head that reads more than the first
    state computes something else, which parity refuses.
    """

    def __init__(self, model: nn.Module, base: str):
        super().__init__()
        self.model, self.base = model, base

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        """Logits `[sequences, labels]`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        base = self.model.get_submodule(self.base)
        pooler = getattr(base, "pooler", None)
        answer = BaseModelOutputWithPooling(
            last_hidden_state=first, pooler_output=None if pooler is None else pooler(first)
        )
        base.forward = lambda *_, **__: answer
        try:
            logits: torch.Tensor = self.model(input_ids=torch.zeros(first.shape[:2], dtype=torch.long)).logits
        finally:
            del base.forward
        return logits


def head(model: nn.Module, base: str, hidden: int, opset: int) -> ir.Model:
    """Trace a classifier's head; input `first` `[sequences, 1, hidden]`, output `classes` `[sequences, labels]`."""
    example = torch.linspace(-1, 1, 3 * hidden).reshape(3, 1, hidden)
    traced = trace.trace(Head(model, base), [example], ["first"], ["classes"], TRACED, axes={0: "sequences"})
    traced.graph.opset_imports[""] = opset
    return traced


def core(model: nn.Module, token_types: bool, depth: int, opset: int) -> ir.Model:
    """Trace the core; its inputs are `input_ids`, `position_ids` and, if asked, `token_type_ids`.

    Raises:
        RecipeError: the model has other than one attention a block, so it computes it somewhere we do not see.
    """
    names = ["input_ids", "position_ids", *(["token_type_ids"] if token_types else [])]
    examples = [torch.arange(7)[None] % (2 if n == "token_type_ids" else 7) for n in names]
    traced = trace.trace(Core(model, token_types), examples, names, ["answer"], TRACED, axes={1: "tokens"})
    traced.graph.opset_imports[""] = opset
    found = len(attentions(traced.graph))
    if found != depth:
        raise RecipeError("export: onnx", f"{found} attentions in {depth} blocks", "one in each")
    return traced


def attentions(graph: ir.Graph) -> list[ir.Node]:
    """The placeholders of `attend`, in order."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == "Attention"]
