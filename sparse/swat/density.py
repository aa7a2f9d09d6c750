"""How a sparsity spreads over layers. Whatever the rule, all layers together drop the share asked for.

    uniform   every layer the same
    erk       density ∝ (in + out + kh + kw) / (in · out · kh · kw) (Evci et al. 2020, RigL, after Mocanu et al. 2018):
              large layers give more
    momentum  density ∝ mean |gradient| of the layer, averaged over time (Dettmers and Zettlemoyer 2019; SWAT-M)

A density that would pass 1 is 1, and the others share the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def erk(shape: Sequence[int]) -> float:
    """The raw density of a weight of this shape."""
    product = 1
    for size in shape:
        product *= size
    return sum(shape) / product


def spread(share: float, sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """Sparsity by layer.

    Args:
        share: of all weights together that is dropped, in [0, 1).
        sizes: number of weights by layer.
        weights: what density is proportional to, by layer; not negative, not all zero.

    Returns:
        Sparsities in [0, 1) whose mean, weighted by `sizes`, is `share`.
    """
    full: set[str] = set()
    budget = (1 - share) * sum(sizes.values())
    while True:
        open_ = [name for name in sizes if name not in full]
        left = budget - sum(sizes[name] for name in full)
        total = sum(weights[name] * sizes[name] for name in open_)
        if not open_ or total <= 0:
            even = left / max(1, sum(sizes[name] for name in open_))
            return {name: 0.0 if name in full else max(0.0, 1 - even) for name in sizes}
        scale = left / total
        over = {name for name in open_ if scale * weights[name] >= 1}
        if not over:
            return {name: 0.0 if name in full else 1 - scale * weights[name] for name in sizes}
        full |= over
