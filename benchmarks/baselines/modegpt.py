"""MoDeGPT's decomposition (Lin et al., arXiv 2408.09632), training-free, as a baseline for slice.

Inside each block of a Llama-like decoder without biases, from second moments C of the dense model's activations:

    type I, MLP        units with the largest ridge leverage [C (C + λI)⁻¹]_ii stay, W_down ← (SᵀCS)⁻¹ SᵀC W_down
    type II, q and k   rotary pairs with the largest ‖C_q^½[:, pair]‖ · ‖C_k^½[:, pair]‖ stay, by group of heads
    type III, v and o  by group U S Vᵀ = C^½ W_v, then U' S' V'ᵀ = S Vᵀ W_o: W_v ← C^-½ U U'_r, W_o ← S'_r V'_r

A block keeps the share that softmax(−(1 − cos(input, output)) / ε) over the blocks leaves it, the same in its three
modules. Pairs differ from head to head and widths from block to block, which no stock config holds: so the result is
the dense shape with zeros in it, which computes the same, and parameters are counted as if the zeros were not there.
Where the paper's text leaves room (λ relative to C, ε) the best of a few values on the *held-out* text is reported,
in the baseline's favour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tersor.compress.calibration.batches import Batch
from tersor.compress.calibration.side import Side
from tersor.compress.calibration.stages import stages
from tersor.compress.layout import Layout
from tersor.compress.walk import captured

Tensors = dict[str, torch.Tensor]


@dataclass
class Block:
    """Names and second moments of one block: `q k v o gate up down`, C of what v reads, of what down reads, mean
    squares of queries and keys by head and rotary pair, and 1 − cos(input, output).
    """

    names: dict[str, str]
    x: torch.Tensor
    inner: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    influence: float


@torch.no_grad()
def measured(model: Any, layout: Layout, data: list[Batch]) -> list[Block]:
    """One pass of the dense model over the calibration data."""
    side, found = Side.at_start(model, layout, data), []
    width = layout.families["head_dim"]
    for block in range(layout.depth):
        attention, ffn = stages(layout, block)
        modules = [*attention.reads, attention.writers[0].module, *ffn.reads, ffn.writers[0].module]
        names = dict(zip(("q", "k", "v", "o", "gate", "up", "down"), modules, strict=True))
        sums: dict[str, Any] = dict.fromkeys(("x", "inner", "q", "k", "cosine"), 0.0)
        for number, batch in enumerate(data):
            with captured(model, [names["v"], names["down"]], [names["q"], names["k"]]) as seen:
                after = side.walk.block(block, side.streams[number], side.arguments[number][block])
            for key, module in (("x", "v"), ("inner", "down")):
                tokens = batch.tokens(seen.inputs[names[module]]).double()
                sums[key] = sums[key] + tokens.T @ tokens
            for key in "qk":
                pairs = batch.tokens(seen.outputs[names[key]]).double().unflatten(-1, (-1, 2, width // 2))
                sums[key] = sums[key] + pairs.pow(2).sum((0, 2))  # [heads, pairs]: no rotation changes it
            cosine = torch.cosine_similarity(batch.tokens(side.streams[number]), batch.tokens(after), dim=-1)
            sums["cosine"] = sums["cosine"] + float((1 - cosine).mean()) / len(data)
            side.streams[number] = after
        found.append(Block(names, sums["x"], sums["inner"], sums["q"], sums["k"], sums["cosine"]))
    return found


def kept_shares(blocks: list[Block], remove: float, temperature: float) -> torch.Tensor:
    """The share that each block keeps when the blocks lose `remove` on average; float64 `[blocks]`."""
    influence = torch.tensor([block.influence for block in blocks], dtype=torch.float64)
    return (1 - remove * len(blocks) * torch.softmax(-influence / temperature, 0)).clamp(0.05, 1.0)


def modegpt(
    layout: Layout, tensors: Tensors, blocks: list[Block], parameters: int, temperature: float, ridge: float
) -> tuple[Tensors, int]:
    """The dense tensors with what MoDeGPT removes set to zero, and the parameters that are left.

    Args:
        layout: of the dense model.
        tensors: its tensors; not changed.
        blocks: what `measured` returned.
        parameters: how many to arrive at; FFN units take up what whole pairs leave over.
        temperature: ε.
        ridge: λ as a share of C's mean diagonal.
    """
    sizes, d = layout.families, layout.families["hidden"]
    groups, queries, width, ffn = sizes["kv_heads"], sizes["queries"], sizes["head_dim"], sizes["ffn"]
    inside = sum(tensors[f"{m}.weight"].numel() for block in blocks for m in block.names.values())
    shares = kept_shares(blocks, (layout.parameters - parameters) / inside, temperature)
    pairs = (shares * width / 2).round().clamp_min(1).int().tolist()
    ranks = (shares * width).round().clamp_min(1).int().tolist()
    head = groups * (queries + 1) * d
    spare = parameters - (layout.parameters - inside) - head * sum(2 * p + r for p, r in zip(pairs, ranks, strict=True))
    units = (shares / shares.sum() * spare / (3 * d)).round().clamp(1, ffn).int().tolist()
    made, left = dict(tensors), layout.parameters - inside
    for block, p, r, n in zip(blocks, pairs, ranks, units, strict=True):
        weight = {key: tensors[f"{name}.weight"].double() for key, name in block.names.items()}
        weight["gate"], weight["up"], weight["down"] = nystrom(block, weight, n, ridge)
        weight["q"], weight["k"] = column_row(block, weight, p, groups, queries)
        weight["v"], weight["o"] = joint_svd(block, weight, r, groups, queries)
        made.update({f"{name}.weight": weight[key].float() for key, name in block.names.items()})
        left += head * (2 * p + r) + 3 * d * n
    return made, left


def nystrom(block: Block, weight: Tensors, units: int, ridge: float) -> tuple[torch.Tensor, ...]:
    """Type I: gate, up and down with all but `units` units zero."""
    c, n = block.inner, len(block.inner)
    damping = ridge * float(c.diagonal().mean())
    leverage = torch.linalg.solve(c + damping * torch.eye(n, dtype=torch.float64), c).diagonal()
    keep = leverage.topk(units).indices
    gate, up, down = (torch.zeros_like(weight[key]) for key in ("gate", "up", "down"))
    gate[keep], up[keep] = weight["gate"][keep], weight["up"][keep]
    jitter = 1e-9 * float(c.diagonal().mean()) * torch.eye(units, dtype=torch.float64)
    down[:, keep] = torch.linalg.solve(c[keep][:, keep] + jitter, c[keep] @ weight["down"].T).T
    return gate, up, down


def column_row(block: Block, weight: Tensors, pairs: int, groups: int, queries: int) -> tuple[torch.Tensor, ...]:
    """Type II: q and k with all but `pairs` rotary pairs of every group zero."""
    score = (block.q.view(groups, queries, -1) * block.k[:, None]).sum(1).sqrt()
    mask = torch.zeros_like(score).scatter(1, score.topk(pairs).indices, 1.0).repeat(1, 2)  # [groups, width]
    q = weight["q"].view(groups, queries, mask.shape[1], -1) * mask[:, None, :, None]
    k = weight["k"].view(groups, mask.shape[1], -1) * mask[..., None]
    return q.reshape(weight["q"].shape), k.reshape(weight["k"].shape)


def joint_svd(block: Block, weight: Tensors, rank: int, groups: int, queries: int) -> tuple[torch.Tensor, ...]:
    """Type III: v and o of every group at `rank`, the rest zero."""
    values, axes = torch.linalg.eigh(block.x)
    root = (axes * values.clamp_min(0).sqrt()) @ axes.T
    v = weight["v"].view(groups, -1, weight["v"].shape[1])
    o = weight["o"].view(weight["o"].shape[0], groups, queries, -1)
    new_v, new_o = torch.zeros_like(v), torch.zeros_like(o)
    for group in range(groups):
        _, s, right = torch.linalg.svd(root @ v[group].T, full_matrices=False)
        out = o[:, group].permute(2, 1, 0).flatten(1)  # [width, queries · d]
        turn, scale, rows = torch.linalg.svd((s[:, None] * right) @ out, full_matrices=False)
        # C^-½ U = W_v V S⁻¹, which needs no inverse of C
        new_v[group, :rank] = ((v[group].T @ right.T / s.clamp_min(1e-12 * s[0])) @ turn[:, :rank]).T
        joined = (scale[:rank, None] * rows[:rank]).unflatten(1, (queries, -1))
        new_o[:, group, :, :rank] = joined.permute(2, 1, 0)
    return new_v.reshape(weight["v"].shape), new_o.reshape(weight["o"].shape)
