"""Groups of equal size with a small total cost.

Groups of equal size are an assignment problem, for which others build an n × n matrix and solve it in n³ (CMoE,
arXiv 2502.04416: 740 MB for a layer of 7B). Here each group gets a price at which demand is even, members choose, and
then every pair of groups is split anew until nothing moves, which is exact for the pair: the members of both are sorted
by the difference of their costs, and the cheaper half goes to each side. All of it costs n · groups · log n a sweep;
pairs that share no group are split at once, as in a tournament.
"""

from __future__ import annotations

import math

import torch

SWEEPS = 30
ROUNDS = 5
"""Of prices at each temperature: what is left uneven, the pairs mend."""
EQUAL = 1e-9
"""A gain, as a share of the costs' size, that is rounding."""


def balanced(cost: torch.Tensor) -> torch.Tensor:
    """Groups of equal size with a small total cost.

    Args:
        cost: `[n, groups]` of having a member in a group; n is a multiple of groups.

    Returns:
        int64 `[n]`; no two groups can exchange members to lower the cost.
    """
    count, cost = cost.shape[1], cost.double()
    if count == 1:
        return torch.zeros(len(cost), dtype=torch.int64)
    members = rounded(priced(cost)).argsort(stable=True).view(count, -1)
    size, least = members.shape[1], EQUAL * float(cost.abs().sum())
    by_group = cost.T.contiguous()
    dirty = torch.ones(count, dtype=torch.bool)
    for _ in range(SWEEPS):
        moved = torch.zeros(count, dtype=torch.bool)
        for pairs in tournament(count):
            touched = (dirty | moved)[pairs].any(1)
            a, b = pairs[touched].T
            both = torch.cat([members[a], members[b]], dim=1)
            difference = by_group[a[:, None], both] - by_group[b[:, None], both]
            order = difference.argsort(dim=1, stable=True)
            gain = difference[:, :size].sum(1) - difference.gather(1, order)[:, :size].sum(1)
            better = gain > least
            a, b, split = a[better], b[better], both.gather(1, order)[better]
            members[a], members[b] = split[:, :size], split[:, size:]
            moved[a] = moved[b] = True
        dirty = moved
        if not dirty.any():
            break
    groups = torch.empty(len(cost), dtype=torch.int64)
    groups[members] = torch.arange(count)[:, None].expand_as(members)
    return groups


def tournament(count: int) -> list[torch.Tensor]:
    """Rounds in which each of `count` meets each other one once, no one twice in a round: int64 `[pairs, 2]`."""
    even = count + count % 2  # who meets the odd one out rests
    circle, rounds = list(range(1, even)), []
    for _ in range(even - 1):
        line = [0, *circle]
        met = [(a, b) for a, b in zip(line[: even // 2], reversed(line[even // 2 :]), strict=True) if max(a, b) < count]
        rounds.append(torch.tensor(met, dtype=torch.int64).view(-1, 2))
        circle = [*circle[-1:], *circle[:-1]]
    return rounds


def priced(cost: torch.Tensor) -> torch.Tensor:
    """The costs plus a price on each group at which demand is nearly even: entropic transport, annealed (Cuturi 2013).

    Both are float64 `[n, groups]`.
    """
    price = torch.zeros(cost.shape[1], dtype=torch.float64)
    share = math.log(len(cost) / cost.shape[1])
    spread = float(cost.std()) or 1.0
    for temperature in (spread / 2**step for step in range(1, 8)):
        for _ in range(ROUNDS):
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
