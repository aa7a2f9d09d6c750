"""The model on rows that hold several sequences: standard operators and a dense mask, exact on any 0/1 mask.

Interface: `input_ids`, `attention_mask` (and `token_type_ids` where the architecture has them), int64
`[batch, sequence]`. In `attention_mask` 0 is padding and k ≥ 1 the number of the segment in its row (Krell et al.,
2107.02027), so a plain 0/1 mask is the ordinary case.

    allowed(i, j) = seg_i = seg_j  ∧  (j ≤ i if causal)  ∧  (i − j < window if the layer has one)
    position(i)   = i                      in segment 1
                    i − first column of k  in segment k ≥ 2

Segment 1 counts from column 0, as the stock model does under a plain mask: left padding and holes are therefore
stock-exact rather than silently moved. Padding attends to padding only, so no softmax row is empty.

The model's own forward runs, with one attention function put in through transformers' AttentionInterface: it takes
each layer's causality and window from the layer itself, so no architecture is named here. Resetting `position_ids`
under an all-ones mask, the usual shortcut, leaks across segments without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tersor.compress.errors import RecipeError

from .pooling import Pooling

ATTENTION = "tersor_rows"
IGNORED = (
    "dropout",
    "position_ids",
    "deterministic",
    "use_cache",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)
_SEGMENTS: ContextVar[torch.Tensor] = ContextVar("segments")


def allowed(segments: torch.Tensor, causal: bool, window: int | None) -> torch.Tensor:
    """Who may attend to whom: bool `[batch, 1, sequence, sequence]` from int64 segments `[batch, sequence]`."""
    mask = segments[:, :, None] == segments[:, None, :]
    columns = torch.arange(segments.shape[1])
    distance = columns[:, None] - columns[None, :]
    if causal:
        mask = mask & (distance >= 0)
    if window is not None:
        mask = mask & (distance < window)
        if not causal:
            mask = mask & (distance > -window)
    return mask[:, None]


def origins(segments: torch.Tensor) -> torch.Tensor:
    """First column of each token's own segment, int64 `[batch, sequence]`."""
    same = segments[:, :, None] == segments[:, None, :]
    columns = torch.arange(segments.shape[1])
    return torch.where(same, columns, segments.shape[1]).amin(-1)


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """A layer that hands its attention an argument we do not know computes something else than we would.

    Raises:
        RecipeError: names the argument.
    """
    for name, value in arguments.items():
        if value is not None and name not in IGNORED:
            raise RecipeError("export", f"attention with {name}", "plain, causal or windowed attention")


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' interface: q `[batch, heads, sequence, d]` → `[batch, sequence, heads, d]`."""
    refuse_unknown(rest)
    mask = allowed(_SEGMENTS.get(), bool(getattr(module, "is_causal", False)), sliding_window)
    grouped = query.shape[1] != key.shape[1]
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )
    return mixed.transpose(1, 2).contiguous(), None


@contextmanager
def _within(segments: torch.Tensor) -> Iterator[None]:
    token = _SEGMENTS.set(segments)
    try:
        yield
    finally:
        _SEGMENTS.reset(token)


class Rows(nn.Module):
    """A checkpoint's model on rows of segments.

    Args:
        model: the transformers module, in eval mode; its attention implementation is replaced.
        pooling: how to embed a sequence; None for a model with logits.
        token_types: whether a third input exists.
        packed: whether numbers above 1 open new segments; otherwise every non-zero entry is the one sequence.
        first_position: the position id of a sequence's first token (RoBERTa counts from behind the padding id).
    """

    def __init__(
        self, model: nn.Module, pooling: Pooling | None, token_types: bool, packed: bool, first_position: int = 0
    ):
        from transformers import AttentionInterface

        super().__init__()
        AttentionInterface.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        self.model, self.pooling, self.token_types, self.packed = model, pooling, token_types, packed
        self.first_position = first_position

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> Any:
        """Logits `[batch, sequence, vocab]`, or states `[batch, sequence, hidden]` and embeddings `[sequences, hidden]`.

        Zero at padding.
        """
        segments = attention_mask if self.packed else (attention_mask != 0).long()
        columns = torch.arange(segments.shape[1])
        origin = origins(segments) if self.packed else torch.zeros_like(segments)
        positions = torch.where(segments > 0, columns - torch.where(segments > 1, origin, 0), 0)
        extra = {"token_type_ids": token_type_ids} if self.token_types else {}
        with _within(segments):
            out = self.model(input_ids=input_ids, position_ids=positions + self.first_position, **extra)
        real = (segments > 0).unsqueeze(-1)
        if self.pooling is None:
            return torch.where(real, out.logits, 0.0)
        states = torch.where(real, out.last_hidden_state, 0.0)
        if self.packed:
            return states, pool(states, segments, (segments > 0) & (columns == origin), self.pooling)
        return states, pool_rows(states, segments, self.pooling)


def pool(states: torch.Tensor, segments: torch.Tensor, first: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One embedding a segment, `[sequences, hidden]`, row by row in the order in which segments begin.

    `first` (bool `[batch, sequence]`) marks each segment's first token.
    """
    batch, _, hidden = states.shape
    starts = first.reshape(-1).nonzero().squeeze(-1)
    flat = states.reshape(-1, hidden)
    if pooling.mode == "cls":
        embedding = flat[starts]
    else:
        number = (torch.arange(batch)[:, None] * (1 << 32) + segments).reshape(-1)
        member = (number[starts][:, None] == number[None, :]).to(states.dtype)
        embedding = member @ flat / member.sum(-1, keepdim=True)
    return F.normalize(embedding, dim=-1) if pooling.normalize else embedding


def pool_rows(states: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One embedding a row, `[batch, hidden]`; `states` are zero at padding."""
    if pooling.mode == "cls":
        first = mask.argmax(-1)
        embedding = states.gather(1, first[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)
    else:
        embedding = states.sum(1) / mask.sum(-1, keepdim=True).clamp(min=1).to(states.dtype)
    return F.normalize(embedding, dim=-1) if pooling.normalize else embedding
