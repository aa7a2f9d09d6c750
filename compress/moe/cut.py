"""Cut: how many parts an FFN has and how many of them a token uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import RecipeError

ROWS = 8
"""Widths of experts are padded with zeros to a multiple: transformers' grouped products refuse others."""


@dataclass(frozen=True)
class Cut:
    """An FFN of `width` units in `experts` equal parts, of which a token uses `active`; `shared` are always used.

    With `most`, `active` is an average, and a token chooses up to `most` routed parts (dynamic.py).
    """

    width: int
    experts: int
    active: int
    shared: int
    most: int = 0

    @property
    def part(self) -> int:
        """Units of a part."""
        return self.width // self.experts

    @property
    def padded(self) -> int:
        """Units of a part as it is stored."""
        return -(-self.part // ROWS) * ROWS

    @property
    def routed(self) -> int:
        """Parts that the router chooses from."""
        return self.experts - self.shared

    @property
    def chosen(self) -> int:
        """Parts that the router chooses; 0 where the active ones are fixed, which prunes."""
        return self.active - self.shared

    def masked(self, h: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Activations `[n, ffn]` in the partition's order, the routed parts' by their gates `[n, routed]`."""
        start = self.shared * self.part
        routed = h[:, start:].unflatten(1, (self.routed, self.part)) * gates[:, :, None]
        return torch.cat([h[:, :start], routed.flatten(1)], dim=1)

    def refuse(self) -> None:
        """Say what is wrong with the numbers of a recipe.

        Raises:
            RecipeError: they do not fit together.
        """
        if self.width % self.experts:
            near = [n for n in range(2, self.width) if self.width % n == 0 and self.width // n >= 2]
            close = sorted(near, key=lambda n: abs(n - self.experts))[:4]
            raise RecipeError(
                "moe: experts",
                f"{self.experts} for an FFN of {self.width} units",
                f"a divisor of {self.width}",
                f"Near by: {', '.join(map(str, sorted(close)))}." if close else "",
            )
        if self.active > self.experts:
            raise RecipeError("moe: active", f"{self.active} of {self.experts} experts", f"at most {self.experts}")
        if self.shared >= self.active:
            raise RecipeError(
                "moe: shared",
                f"{self.shared} of {self.active} active experts",
                f"at most {self.active - 1}",
                "One at least is left to the router.",
            )
