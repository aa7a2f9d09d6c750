"""Groups of units that a linear router can tell apart: partition and router in turns.

Units that open together need not be large where a linear router sees it coming. With the router fixed, what is
caught when unit u lies in group g is a sum over the tokens on which g is chosen, so the best groups of equal size are
an assignment; with the groups fixed, the router is a ridge regression:

    caught[u, g] = Σ_tokens [g chosen] (h_u ‖down_u‖)²,     caught[u, shared] = Σ_tokens (h_u ‖down_u‖)²

The shared groups take part in it, so they get the units that lose most by being chosen, not the largest ones. Turns
are taken until the share that is caught falls, `TURNS` at most, on `TOKENS` tokens; the best turn counts in which every
routed group is chosen at least `IDLE` times as often as on average: what is caught alone would gather small units where
nobody goes. Where no turn gives that, units hardly depend on the token, and they are dealt out by size. (CMoE assigns
once, to activation patterns and without a router.)
"""

from __future__ import annotations

import torch

from . import router as routers
from .activations import Tokens
from .assignment import balanced
from .cut import Cut

TURNS = 8
"""Of partition and router, at most."""
TOKENS = 8192
"""Tokens that groups are made from, about."""
IDLE = 0.1
"""Share of the average load below which a group counts as one where nobody goes."""


def regrouped(tokens: Tokens, cut: Cut, order: torch.Tensor) -> torch.Tensor:
    """A better partition, int64 `[ffn]`: the shared units, then each routed part's.

    Args:
        tokens: of the dense block.
        cut: how it is cut.
        order: the partition to start from.
    """
    if not 0 < cut.chosen < cut.routed:
        return order
    norms = tokens.ffn.norms
    seen = [(x, (h * norms).square()) for x, h in tokens.some(TOKENS)]
    x, energy = (torch.cat(part) for part in zip(*seen, strict=True))
    del seen
    total, router = energy.sum(0, dtype=torch.float64), routers.regression(x)
    groups = torch.empty_like(order)
    groups[order] = torch.arange(cut.width) // cut.part
    best, found, used = -1.0, groups, False
    for _ in range(TURNS):
        parts = torch.zeros(cut.width, cut.experts).scatter_(1, groups[:, None], 1.0)
        energies = energy @ parts
        routed = energies[:, cut.shared :]
        on = routers.choose(x @ router(routed.sqrt()).T.float(), cut.chosen)
        caught = float((routed * on).sum() + energies[:, : cut.shared].sum())
        busy = float(on.sum(0).min()) >= IDLE * len(x) * cut.chosen / cut.routed
        if caught <= best or (used and not busy):
            break
        best, found, used = caught, groups, busy
        gain = (energy.T @ on.float()).double()
        cost = -torch.cat([total[:, None].expand(-1, cut.shared), gain], dim=1) / total.mean().clamp_min(1e-300)
        groups = balanced(cost)
    return found.argsort(stable=True) if used else dealt(total, cut)


def dealt(total: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Units dealt out by size, so that no routed part is large or small on every token: int64 `[ffn]`."""
    order = total.argsort(descending=True, stable=True)
    start = cut.shared * cut.part
    return torch.cat([order[:start], order[start:].unflatten(0, (cut.part, cut.routed)).T.flatten()])
