"""Which units go together: shared ones, and balanced groups of the rest.

    contribution   of unit u on a token: |h_u| · ‖down_u‖
    shared         the units with the largest mean contribution
    co-activation  units are alike if they are among a token's largest contributions on the same tokens: centred
                   indicator columns `[tokens]`, projected at random to `SKETCH` dimensions while tokens stream by,
                   then k-means with groups of equal size (assignment.py)
    kmeans         k-means on the gate's rows, which say when a unit opens (MoEfication, 2110.01786)
    caught         from there, in turns with a router (regroup.py)

Not parts to choose from but units to keep, where all active parts are shared: `energy`, and `surgeon`, which is what
the slicing pass does to an FFN.

For comparison: `random` (LLaMA-MoE, arXiv 2406.16554), `activation-rate` (CMoE: shared by rate, one assignment to the
most active units' columns).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from ..slicing.obs import elimination_order, survivors
from .activations import Tokens
from .assignment import balanced
from .cut import Cut
from .regroup import TOKENS, regrouped
from .router import marked

SKETCH = 192
"""Dimensions that stand for the tokens."""
MARKED = 8
"""A token marks one in this many units: its largest contributions."""
ROUNDS = 20
"""Of k-means, at most."""

Partition = Callable[[Tokens, Cut, int], torch.Tensor]


def contribution(tokens: Tokens) -> torch.Tensor:
    """Mean contribution of each unit, float64 `[ffn]`."""
    norms = tokens.ffn.norms
    total, count = torch.zeros(len(norms), dtype=torch.float64), 0
    for _, h in tokens:
        total += (h.abs() * norms).sum(0, dtype=torch.float64)
        count += len(h)
    return total / count


def grouped(features: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Balanced k-means of rows `[n, m]`: int64 `[n]` group numbers, n / count members each."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator)
    centres = features[order[:count]].clone()
    groups = torch.full_like(order, -1)
    for _ in range(ROUNDS):
        before, groups = groups, balanced(torch.cdist(features, centres).square())
        if torch.equal(before, groups):
            break
        centres = torch.stack([features[groups == group].mean(0) for group in range(count)])
    return groups


def ordered(shared: torch.Tensor, rest: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """All units: the shared ones, then group by group."""
    return torch.cat([shared.sort().values, rest[groups.argsort(stable=True)]])


def split_shared(score: torch.Tensor, cut: Cut) -> tuple[torch.Tensor, torch.Tensor]:
    """The units with the largest score, for the shared parts, and the others, ascending."""
    shared = score.argsort(descending=True, stable=True)[: cut.shared * cut.part]
    rest = torch.ones(cut.width, dtype=torch.bool)
    rest[shared] = False
    return shared, rest.nonzero().flatten()


def co_activation(tokens: Tokens, cut: Cut, seed: int) -> torch.Tensor:
    """Shared by contribution, the rest by who is large together."""
    norms, generator = tokens.ffn.norms, torch.Generator().manual_seed(seed)
    marked = max(1, cut.width // MARKED)
    sketch = torch.zeros(cut.width, SKETCH, dtype=torch.float64)
    rate = torch.zeros(cut.width, dtype=torch.float64)
    mean = torch.zeros(SKETCH, dtype=torch.float64)
    total, count = torch.zeros(cut.width, dtype=torch.float64), 0
    for _, h in tokens.some(TOKENS):
        size = h.abs() * norms
        marks = torch.zeros_like(size).scatter_(1, size.topk(marked, dim=1).indices, 1.0)
        signs = torch.randn(len(h), SKETCH, generator=generator) / SKETCH**0.5
        sketch += (marks.T @ signs).double()
        mean += signs.sum(0, dtype=torch.float64)
        rate += marks.sum(0, dtype=torch.float64)
        total += size.sum(0, dtype=torch.float64)
        count += len(h)
    share = rate / count
    deviation = (count * share * (1 - share)).clamp_min(1e-12).sqrt()
    features = (sketch - share[:, None] * mean) / deviation[:, None]
    shared, rest = split_shared(total, cut)
    return ordered(shared, rest, grouped(features[rest].float(), cut.routed, seed))


def caught(tokens: Tokens, cut: Cut, seed: int) -> torch.Tensor:
    """By the gate's rows, then in turns with a router."""
    no_gate = tokens.ffn.up is None  # then all rows share what sets the bias, which tells no unit from another
    return regrouped(tokens, cut, by_kmeans(tokens, cut, seed, centred=no_gate))


def by_random(tokens: Tokens, cut: Cut, seed: int) -> torch.Tensor:
    """Shared by contribution, the rest at random."""
    shared, rest = split_shared(contribution(tokens), cut)
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    return torch.cat([shared.sort().values, rest[order]])


def by_kmeans(tokens: Tokens, cut: Cut, seed: int, centred: bool = False) -> torch.Tensor:
    """Shared by contribution, the rest by the direction of the gate's rows, or of their difference from the mean."""
    shared, rest = split_shared(contribution(tokens), cut)
    rows = tokens.ffn.gate[rest]
    rows = functional.normalize(rows - rows.mean(0) if centred else rows, dim=1)
    return ordered(shared, rest, grouped(rows, cut.routed, seed))


def by_rate(tokens: Tokens, cut: Cut, seed: int) -> torch.Tensor:
    """CMoE: how often a unit is among a token's most active (`router.marked`); `seed` decides nothing."""
    columns = marked(tokens)
    rate = columns.sum(0, dtype=torch.float64)
    shared, rest = split_shared(rate, cut)
    centres = rest[rate[rest].argsort(descending=True, stable=True)[: cut.routed]]
    both = columns[:, rest].float().T @ columns[:, centres].float()
    distance = rate[rest, None] + rate[centres] - 2 * both  # Hamming: L1 of indicator columns
    return ordered(shared, rest, balanced(distance))


def by_energy(tokens: Tokens, cut: Cut, seed: int) -> torch.Tensor:
    """Units by the mean square of their contribution, largest first: pruning by energy keeps the shared parts."""
    norms = tokens.ffn.norms
    energy = torch.zeros(cut.width, dtype=torch.float64)
    for _, h in tokens:
        energy += (h * norms).square().sum(0, dtype=torch.float64)
    return energy.argsort(descending=True, stable=True)


def by_surgeon(tokens: Tokens, cut: Cut, seed: int) -> torch.Tensor:
    """Units in the reverse of the order in which backward elimination removes them (slicing/obs.py)."""
    moments = torch.zeros(cut.width, cut.width, dtype=torch.float64)
    for _, h in tokens:
        h64 = h.double()
        moments += h64.T @ h64
    gone = cut.width - cut.active * cut.part
    order = elimination_order(moments, tokens.ffn.down.T, torch.arange(cut.width)[:, None], gone)
    return torch.cat([survivors(order, cut.width, cut.width - gone), order.flip(0)])


PARTITIONS: dict[str, Partition] = {
    "caught": caught,
    "co-activation": co_activation,
    "random": by_random,
    "kmeans": by_kmeans,
    "activation-rate": by_rate,
    "energy": by_energy,
    "surgeon": by_surgeon,
}
"""(tokens of the dense block, cut, seed) → int64 `[ffn]`: the shared units, then each routed part's."""
