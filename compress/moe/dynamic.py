"""Dynamic k: tokens and blocks choose as many parts as are worth it, under one budget for all of them.

A part is worth its work on a token where its energy (router.py) is above the price: one number for all blocks, in
shares of the energy that a block's parts have together on the median token (single tokens of enormous activations move
a mean), chosen so that a router that knew every energy would choose the budget,

    Σ over blocks, tokens and parts of [energy > price · median energy of a block's tokens] = blocks · tokens · chosen

What that router chooses in a block is the block's allotment. The router that ships is fitted to the question itself,
by logistic regression on "is it worth it", weighted by what a wrong answer costs, |energy / price − 1|, and its bias is
then moved until the calibration tokens, as the compressed model gives them, choose the allotment: the budget is met
whatever the router gets wrong. A class holds it as a number in the config that all blocks share, the logit above which
an expert is chosen (`null_score`, own.py); it is 0 here, and whoever raises it spends less.

D2DMoE (arXiv 2310.04361) cuts the predicted norms of each layer at a share of the token's largest, without a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..calibration.batches import Batch
from ..calibration.side import Side
from . import router as routers
from .activations import Ffn, Tokens, before_ffn
from .cut import Cut
from .partition import PARTITIONS

DEAREST = 20.0
"""The largest weight of an answer, in prices: single tokens of enormous activations would decide alone."""


@dataclass(frozen=True)
class Allotment:
    """What a block gets of the budget.

    Attributes:
        order: its partition, int64 `[ffn]`.
        price: the energy above which a part is worth choosing.
        count: routed parts that a token chooses on average.
    """

    order: torch.Tensor
    price: float
    count: float


def allotted(side: Side, cut: Cut, partition: str, data: Sequence[Batch], seed: int) -> list[Allotment]:
    """Divide the budget `cut.chosen` among all blocks of the dense model.

    Args:
        side: the dense model in front of its first block; it is moved.
        cut: how its FFNs are cut.
        partition: a name of `PARTITIONS`.
        data: calibration batches.
        seed: of the partition.
    """
    orders, energies, typical = [], [], []
    for number in range(side.walk.layout.depth):
        before = before_ffn(side, number)
        tokens = Tokens(Ffn.of(side.walk, number), before, data)
        orders.append(PARTITIONS[partition](tokens, cut, seed + number))
        tokens.reorder(orders[-1])
        energy = torch.cat([routers.importance(h, tokens.ffn.norms, cut).square() for _, h in tokens])
        typical.append(float(energy.sum(1).median()) or 1.0)
        energies.append((energy / typical[-1]).topk(cut.most, dim=1).values)
        del tokens
        side.advance(number)
    every = torch.cat([energy.flatten() for energy in energies])
    price = threshold(every, cut.chosen * sum(map(len, energies)))
    shares = [float((energy > price).sum() / len(energy)) for energy in energies]
    return [Allotment(*found) for found in zip(orders, (price * middle for middle in typical), shares, strict=True)]


def threshold(values: torch.Tensor, count: int) -> float:
    """A number that `count` of the values `[n]` exceed."""
    if count >= len(values):
        return -math.inf
    near = values.topk(count + 1).values[-2:].double() if count else values.max().double().expand(2)
    return float(near.mean())


def router(tokens: Tokens, cut: Cut, allotment: Allotment, dtype: torch.dtype) -> torch.Tensor:
    """The router that chooses a block's allotment where its logits are above zero.

    Args:
        tokens: of the partitioned FFN; what it reads ends with a one, which the bias belongs to.
        cut: how it is cut.
        allotment: the block's.
        dtype: in which it will be stored.

    Returns:
        `[routed, hidden + 1]` in `dtype`.
    """
    x = torch.cat([x for x, _ in tokens])
    energy = torch.cat([routers.importance(h, tokens.ffn.norms, cut).square() for _, h in tokens])
    stored = fitted(x, energy / allotment.price).to(dtype)
    logits = (x @ stored.float().T).topk(cut.most, dim=1).values
    stored[:, -1] -= threshold(logits.flatten(), round(allotment.count * len(x)))
    return stored


def fitted(x: torch.Tensor, worth: torch.Tensor) -> torch.Tensor:
    """The weighted logistic regression.

    Args:
        x: tokens `[n, hidden + 1]`.
        worth: energy over price `[n, routed]`.

    Returns:
        float32 `[routed, hidden + 1]`.
    """
    cost = (worth - 1).abs().clamp(max=DEAREST)
    cost = cost / cost.mean().clamp_min(1e-30)
    some = slice(None, None, max(1, len(x) // routers.BEGUN))
    start = routers.regression(x[some])(worth[some].clamp_min(1e-6).log().clamp(-6, 6))

    def loss(logits: torch.Tensor, worth: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
        wanted = (worth > 1).float()
        return (cost * functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).mean()

    return routers.descended(start.float(), x, (worth, cost), loss)


def chosen(logits: torch.Tensor, cut: Cut) -> torch.Tensor:
    """What such a router chooses: logits above zero, the `most` largest of them; bool `[n, routed]`."""
    return routers.choose(logits, cut.most) & (logits > 0)
