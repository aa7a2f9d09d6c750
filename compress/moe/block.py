"""Block: one converted FFN, before it is written into a stock class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .activations import Ffn
from .cut import Cut
from .router import Score


@dataclass(frozen=True)
class Block:
    """A converted block.

    Attributes:
        ffn: units in the order of the partition, down projection refitted.
        gate: (x, h) → what each routed part is multiplied by, `[n, routed]`, 0 where it is not chosen.
        cut: how it is cut.
        router: float64 `[routed, hidden]`, scaled as it is stored; None where the gate is none that can be stored.
        details: what was measured on the calibration tokens.
    """

    ffn: Ffn
    gate: Score
    cut: Cut
    router: torch.Tensor | None
    details: dict[str, Any] = field(default_factory=dict)

    def masked(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What the down projection reads: h ∘ g(x), float32 `[n, ffn]`."""
        return self.cut.masked(h, self.gate(x, h))
