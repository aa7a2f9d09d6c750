"""Narrower heads: fewer rotary pairs of queries and keys, fewer directions of values.

A stock config states one `head_dim` for the queries, keys and values of all heads, and RoPE one set of frequencies
for all blocks. So what leaves queries and keys are pairs (j, j + head_dim/2), the same in every head of every block;
those stay whose share of the scores, Σ E|q|² E|k|² over the heads, is largest (an invariant of the rotation). The
frequencies that stay go into the config as factors of `longrope`, f_j = 1 / (factor_j · θ^(2j/new)), which every
rotary embedding of transformers reads; and where the forward divides scores by √head_dim, queries carry √(new/old).

The values of a group of heads may be turned by any matrix that o_proj undoes. The directions that stay lose least
when o_proj is refitted, in the metric of the loss: `weighted_basis` of the mixed values' second moments, with
Σ W F Wᵀ over the group's rows W of o_proj. MoDeGPT (arXiv 2408.09632, types II and III) chooses pairs by head and
widths by block and by q/k and v/o apart, without the metric: cheaper in loss, and in no stock config. On the trained
models at hand a common pair costs more than what the same parameters cost elsewhere (benchmarks/slicing.py), so heads
become narrower only where a recipe says so. Float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..axes import Dim, size_of
from ..calibration.stages import Writer
from ..layout import Layout
from .basis import weighted_basis
from .obs import root

WIDTHS = ("head_dim", "value_dim")
"""The axes of a head's queries and keys, and of its values."""
STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE whose frequencies do not depend on the input's length."""


def fixed_widths(layout: Layout) -> str:
    """Why a stock config cannot hold narrower heads; empty if it can."""
    if layout.arch.rotary is None:
        return "heads whose width the config or a norm fixes"
    stated = layout.config.rope_parameters or {}
    kind = stated.get("rope_type", "default")
    if kind not in STATIC:
        return f"RoPE of type {kind}, whose frequencies depend on the input"
    if stated.get("partial_rotary_factor", 1.0) != 1.0 or layout.families["head_dim"] % 2:
        return "RoPE on a part of each head"
    return ""


def pair_scores(layout: Layout, block: int, squares: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Σ E|q|² E|k|² over a block's heads by rotary pair; float64 `[head_dim / 2]`.

    Args:
        layout: of the dense model.
        block: its number.
        squares: sums of squares of each output, float64 `[out]`, by module that reads the stream.
    """
    found = {}
    for module, sums in squares.items():
        (dim,) = layout.tensors[f"{module}.weight"].dims[:1]
        widths = [Dim((section,)).size(layout.sizes) for section in dim.sections]
        for section, part in zip(dim.sections, sums.split(widths), strict=True):
            if "head_dim" in section:
                pairs = part.reshape(layout.sizes[f"kv_heads{block}"], -1, 2, layout.sizes["head_dim"] // 2).sum(2)
                found["queries" in section] = pairs.sum(1)
    return (found[True] * found[False]).sum(0)


def pair_order(scores: torch.Tensor) -> torch.Tensor:
    """Indices of head_dim in the order in which they may leave, pair by pair; int64 `[head_dim]`."""
    pairs = scores.argsort(stable=True)
    return torch.stack([pairs, pairs + len(pairs)], dim=1).flatten()


def value_basis(
    layout: Layout, writer: Writer, moments: torch.Tensor, weight: torch.Tensor, metric: torch.Tensor | None
) -> torch.Tensor:
    """Directions of the values by group of heads, the most important first; float64 `[groups, value_dim, value_dim]`.

    Args:
        layout: of the dense model.
        writer: of the attention branch.
        moments: of what it reads, float64 `[n, n]`.
        weight: `[n, hidden]`.
        metric: F, float64 `[hidden, hidden]`; the identity if None.
    """
    groups, queries, width = (size_of(axis, layout.sizes) for axis in writer.inner.sections[0])
    own = moments.reshape(groups * queries, width, groups * queries, width)
    own = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1).reshape(groups, queries, width, width).sum(1)
    rows = weight.double() if metric is None else weight.double() @ root(metric)
    rows = rows.reshape(groups, queries, width, -1)
    felt = torch.einsum("gqwd,gqvd->gwv", rows, rows)
    return torch.stack([weighted_basis(own[group], felt[group]) for group in range(groups)])


def turned_heads(
    tensor: torch.Tensor, dims: tuple[Dim, ...], layout: Layout, basis: torch.Tensor, head_dim: int
) -> torch.Tensor:
    """A parameter of attention with its values in `basis` and its queries ready for heads of width `head_dim`."""
    arch = layout.arch
    assert arch.rotary is not None
    factor = math.sqrt(head_dim / layout.families["head_dim"]) if arch.rotary.scaled else 1.0
    values = tensor.double()
    for number, dim in enumerate(dims):
        if not any(dim.has(axis) for axis in WIDTHS):
            continue
        widths = [Dim((section,)).size(layout.sizes) for section in dim.sections]
        parts = list(values.movedim(number, -1).split(widths, dim=-1))
        for place, section in enumerate(dim.sections):
            if "value_dim" in section:
                shape = [size_of(axis, layout.sizes) for axis in section]
                heads = parts[place].unflatten(-1, (shape[0], -1, shape[-1]))
                parts[place] = torch.einsum("...gqw,gwv->...gqv", heads, basis).flatten(-3)
            elif "queries" in section:
                parts[place] = parts[place] * factor
        values = torch.cat(parts, dim=-1).movedim(-1, number)
    return values.float()


def narrowed_rope(layout: Layout, model: Any, kept: torch.Tensor) -> dict[str, Any]:
    """The config's RoPE parameters with only the frequencies of the pairs `kept` (int64, ascending).

    Args:
        layout: of the dense model.
        model: its module.
        kept: indices of head_dim, or of its first half.
    """
    assert layout.arch.rotary is not None
    rotary = model.get_submodule(layout.full(layout.arch.rotary.module))
    pairs = kept[kept < layout.families["head_dim"] // 2]
    frequencies = rotary.inv_freq.double()[pairs]
    theta = float(layout.config.rope_parameters["rope_theta"])
    ladder = theta ** (-torch.arange(len(pairs), dtype=torch.float64) / len(pairs))
    factors = (ladder / frequencies).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": float(rotary.attention_scaling),
        "original_max_position_embeddings": layout.config.max_position_embeddings,
    }
