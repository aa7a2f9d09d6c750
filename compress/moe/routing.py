"""What the routers of a torch model choose: recorded, put in, and counted.

Every class chooses by one `topk` of `[tokens, experts]` a block, which is where choices are seen and replaced, whatever
the class does before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ..calibration.batches import Batch
from ..layout import Layout

TOPK = (torch.topk, torch.Tensor.topk)
ROUNDING = 2.0**-22
"""Of the largest score: what two float32 evaluations of one score may differ by."""


class Routing(TorchFunctionMode):
    """While it is entered, the choices of a forward are recorded, or are those that were given.

    Args:
        experts: to choose from.
        chosen: by a token.
        given: int64 `[blocks, tokens, chosen]`, or None to let the model choose.
        nulls: null experts behind them, which are all one to whoever chooses (own.py).

    Attributes:
        choices: int64 `[tokens, chosen]` a block; `experts` stands for any null one.
        scores: what was chosen by, `[tokens, experts + nulls]` a block.
    """

    def __init__(self, experts: int, chosen: int, given: np.ndarray | None = None, nulls: int = 0):
        super().__init__()
        self.shape, self.given, self.experts = (experts + nulls, chosen), given, experts
        self.choices: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any call; only a router's is looked at."""
        found = func(*args, **(kwargs or {}))
        if func not in TOPK or args[0].ndim != 2 or (args[0].shape[1], found[1].shape[1]) != self.shape:
            return found
        scores, index = args[0], found[1]
        if self.given is not None:
            index = torch.from_numpy(self.given[len(self.choices)])
            found = scores.gather(1, index), index
        self.scores.append(scores)
        self.choices.append(index.clamp(max=self.experts))
        return found

    @classmethod
    def of(cls, layout: Layout, given: np.ndarray | None = None) -> Routing:
        """For a model of this layout."""
        experts = layout.arch.experts
        assert experts is not None
        nulls = int(getattr(layout.config, "num_null_experts", 0))
        return cls(layout.families["experts"], int(getattr(layout.config, experts.active)), given, nulls)


def differences(exact: Routing, single: Routing, real: torch.Tensor | None = None) -> tuple[float, float]:
    """What two forwards in float64 and float32 that made the same choices say of them.

    Args:
        exact: of the one in float64.
        single: of the one in float32.
        real: bool `[tokens]`, which tokens are judged; by default all.

    Returns:
        by how much, at most, something left out scores above something chosen, and how much rounding explains:
        max(2 · max|scores fp32 − scores fp64|, 2⁻²² · max score).
    """
    kept = slice(None) if real is None else real
    gap = error = scale = 0.0
    for block, choices in enumerate(exact.choices):
        scores, index = exact.scores[block][kept], choices[kept]
        left_out = scores.scatter(1, index, -torch.inf).amax(1)
        gap = max(gap, float((left_out - scores.gather(1, index).amin(1)).max()))
        error = max(error, float((scores - single.scores[block][kept].double()).abs().max()))
        scale = max(scale, float(scores.abs().max()))
    return gap, max(2 * error, ROUNDING * scale)


@torch.no_grad()
def loads(model: Any, layout: Layout, data: Sequence[Batch]) -> list[list[float]]:
    """Share of the tokens that choose each expert, by block."""
    experts = layout.families["experts"]
    total, count = torch.zeros(layout.depth, experts, dtype=torch.float64), 0
    for batch in data:
        with Routing.of(layout) as routing:
            model(**batch.inputs)
        for block, choices in enumerate(routing.choices):
            kept = choices if batch.real is None else choices[batch.real.flatten()]
            total[block] += kept.flatten().bincount(minlength=experts)[:experts]
        count += len(kept)
    found: list[list[float]] = (total / max(count, 1)).tolist()
    return found
