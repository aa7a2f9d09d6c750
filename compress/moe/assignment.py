"""Groups of equal size with a small total cost.

Groups of equal size are an assignment problem, for which others build an n × n matrix and solve it in n³ (CMoE,
arXiv 2502.04416: 740 MB for a layer of 7B). Here each group gets a price at which demand is even, members choose, and
then every pair of groups is split anew until nothing moves, which is exact for the pair: the members of both are sorted
by the difference of their costs, and the cheaper half goes to each side. All of it costs n · groups · log n.
"""

from __future__ import annotations

import math

import torch

SWEEPS = 30


def balanced(cost: torch.Tensor) -> torch.Tensor:
    """Groups of equal size with a small total cost.

    Args:
        cost: `[n, groups]` of having a member in a group; n is a multiple of groups.

    Returns:
        int64 `[n]`; no two groups can exchange members to lower the cost.
    """
    groups, count = rounded(priced(cost.double())), cost.shape[1]
    dirty = torch.ones(count, dtype=torch.bool)
    for _ in range(SWEEPS):
        moved = torch.zeros(count, dtype=torch.bool)
        for a in range(count):
            for b in range(a + 1, count):
                if not (dirty[a] or dirty[b] or moved[a] or moved[b]):
                    continue
                both = ((groups == a) | (groups == b)).nonzero().flatten()
                order = both[(cost[both, a] - cost[both, b]).argsort(stable=True)]
                split = torch.full_like(both, b)
                split[: len(both) // 2] = a
                if cost[order, split].sum() < cost[both, groups[both]].sum() * (1 - 1e-7):
                    groups[order] = split
                    moved[[a, b]] = True
        dirty = moved
        if not dirty.any():
            break
    return groups


def priced(cost: torch.Tensor) -> torch.Tensor:
    """The costs plus a price on each group at which demand is nearly even: entropic transport, annealed (Cuturi 2013).

    Both are float64 `[n, groups]`.
    """
    price = torch.zeros(cost.shape[1], dtype=torch.float64)
    share = math.log(len(cost) / cost.shape[1])
    spread = float(cost.std()) or 1.0
    for temperature in (spread / 2**step for step in range(1, 8)):
        for _ in range(20):
            demand = torch.log_softmax(-(cost + price) / temperature, dim=1).logsumexp(0)
            price = price + temperature * (demand - share)
    return cost + price


def rounded(cost: torch.Tensor) -> torch.Tensor:
    """Every member into the cheapest group that has room, those first whose second choice is dearest; int64 `[n]`."""
    room = [len(cost) // cost.shape[1]] * cost.shape[1]
    two = cost.topk(2, dim=1, largest=False).values
    choices = cost.argsort(dim=1).tolist()
    groups = [0] * len(cost)
    for member in (two[:, 0] - two[:, 1]).argsort(stable=True).tolist():
        group = next(group for group in choices[member] if room[group])
        groups[member] = group
        room[group] -= 1
    return torch.tensor(groups)
