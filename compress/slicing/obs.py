"""Which units of a layer can go: backward elimination by the optimal brain surgeon, in groups.

With inner activations a (second moments C = Σ aᵀa) and the output a W, removing group g and refitting the
rest costs

    tr( W_gᵀ ((C⁻¹)_gg)⁻¹ W_g )      and changes      W ← W − (C⁻¹)_·g ((C⁻¹)_gg)⁻¹ W_g

so the cheapest group goes, the inverse is updated by one block of Gaussian elimination, and so on. The order is
nested: its first n entries are the answer for every n, so one elimination serves every budget that is tried. Outputs
are weighed by a metric F (how much the loss feels each direction of the stream): W F^½ takes the place of W.

A unit is one row of W for an MLP and a head's rows (a key-value group's, under grouped queries) for attention.
Source: Hassibi and Stork 1993; in groups as in ZipLM (Kurtic et al., arXiv 2302.04089). Float64 throughout.
"""

from __future__ import annotations

import torch


def root(metric: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semidefinite float64 matrix."""
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def elimination_order(
    moments: torch.Tensor,
    weight: torch.Tensor,
    groups: torch.Tensor,
    count: int,
    metric: torch.Tensor | None = None,
    ridge: float = 1e-2,
) -> torch.Tensor:
    """The first `count` groups to remove, cheapest first.

    Args:
        moments: C, float64 `[n, n]`.
        weight: W `[n, out]`, of the module that reads the units.
        groups: int64 `[units, width]`, the rows of W that each unit owns.
        count: how many to remove, fewer than there are.
        metric: F, float64 `[out, out]`; the identity if None.
        ridge: added to C as a share of its mean diagonal.

    Returns:
        int64 `[count]`, indices of groups.
    """
    rows = groups.reshape(-1)
    weight = weight.double() if metric is None else weight.double() @ root(metric)
    damped = moments.double() + ridge * max(float(moments.diagonal().mean()), 1e-300) * torch.eye(len(moments))
    inverse = torch.linalg.inv(damped)[rows][:, rows]
    remove = _singles if groups.shape[1] == 1 else _groups
    return torch.tensor(remove(inverse, weight[rows], groups.shape[1], count), dtype=torch.long)


def _groups(inverse: torch.Tensor, weight: torch.Tensor, width: int, count: int) -> list[int]:
    """One group a step, everything updated at once."""
    order: list[int] = []
    while len(order) < count:
        cost = costs(inverse, weight, width)
        cost[order] = torch.inf
        chosen = int(cost.argmin())
        order.append(chosen)
        block = slice(chosen * width, (chosen + 1) * width)
        gain = torch.linalg.solve(inverse[block, block], inverse[block])
        weight = weight.addmm(gain.T, weight[block], alpha=-1)
        inverse = inverse.addmm(inverse[:, block], gain, alpha=-1)
        weight[block], inverse[block, block] = 0, torch.eye(width, dtype=torch.float64)
    return order


def _singles(inverse: torch.Tensor, weight: torch.Tensor, _width: int, count: int, most: int = 64) -> list[int]:
    """One unit a step; updates wait until `most` of them can be done by one matrix product.

    A step needs of the inverse only its diagonal and one row, and of the weights only their norms and one row.
    """
    names = torch.arange(len(weight))
    order: list[int] = []
    while len(order) < count:
        steps = min(most, count - len(order))
        gains, columns = inverse.new_zeros(steps, len(weight)), inverse.new_zeros(len(weight), steps)
        taken = weight.new_zeros(steps, weight.shape[1])
        diagonal, norms = inverse.diagonal().clone(), weight.pow(2).sum(1)
        gone = torch.zeros(len(weight), dtype=torch.bool)
        for step in range(steps):
            cost = norms.clamp_min(0) / diagonal.clamp_min(1e-300)
            cost[gone] = torch.inf
            chosen = int(cost.argmin())
            order.append(int(names[chosen]))
            gone[chosen] = True
            columns[:, step] = inverse[:, chosen] - columns[:, :step] @ gains[:step, chosen]
            gains[step] = columns[:, step] / columns[chosen, step]
            taken[step] = weight[chosen] - gains[:step, chosen] @ taken[:step]
            shared = weight @ taken[step] - gains[:step].T @ (taken[:step] @ taken[step])
            norms += gains[step] * (gains[step] * taken[step].pow(2).sum() - 2 * shared)
            diagonal -= gains[step] * columns[:, step]
        inverse = inverse.addmm_(columns, gains, alpha=-1)[~gone][:, ~gone]
        weight, names = weight.addmm_(gains.T, taken, alpha=-1)[~gone], names[~gone]
    return order


def costs(inverse: torch.Tensor, weight: torch.Tensor, width: int) -> torch.Tensor:
    """What removing each group alone costs; float64 `[units]`."""
    units = len(weight) // width
    own = inverse.reshape(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    grouped = weight.reshape(units, width, -1)
    return (grouped * torch.linalg.solve(own, grouped)).sum((1, 2))


def survivors(order: torch.Tensor, units: int, keep: int) -> torch.Tensor:
    """The `keep` units that are left when the first ones of `order` are removed; int64, ascending."""
    gone = torch.zeros(units, dtype=torch.bool)
    gone[order[: units - keep]] = True
    return (~gone).nonzero().flatten()
