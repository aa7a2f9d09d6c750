"""What SWAT is held against: sparse weights without sparse activations, by the papers' own rules.

    prune   train dense, drop the smallest weights of each layer once, train on with the mask (Han et al. 2015)
    SET     random masks; every `period` steps the smallest weights leave and random ones come (Mocanu et al. 2018)
    RigL    the same, but those with the largest dense gradient come (Evci et al. 2020)

The share exchanged starts at 0.3 and falls as a cosine to 0 at three quarters of the steps (RigL, appendix). New
weights start at zero with fresh optimizer moments. Masks are zeros in dense tensors here: FLOPs are counted, not saved.
"""

from __future__ import annotations

import math

import torch
from torch import nn


class Masks:
    """Static or exchanged masks on the weights of some layers.

    Args:
        layers: by name; the same ones that SWAT makes sparse.
        optimizer: Adam over the model's parameters.
        grow: None keeps the masks, `random` is SET, `gradient` is RigL.
        start: step at which masks begin; magnitude pruning starts late.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        share: float,
        steps: int,
        seed: int,
        grow: str | None,
        start: int = 0,
        period: int = 20,
    ):
        self.weights = {name: module.weight for name, module in layers.items()}
        self.optimizer, self.share, self.steps, self.grow = optimizer, share, steps, grow
        self.start, self.period, self.number = start, period, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.masks: dict[str, torch.Tensor] = {}
        if start == 0:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        for name, weight in self.weights.items():
            score = weight.abs() if self.start else torch.rand(weight.shape, generator=self.generator)
            self.masks[name] = self._largest(score, round((1 - self.share) * weight.numel()))
            weight.mul_(self.masks[name])

    @staticmethod
    def _largest(score: torch.Tensor, count: int) -> torch.Tensor:
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[score.flatten().topk(count).indices] = True
        return mask.view(score.shape)

    @torch.no_grad()
    def before_step(self) -> None:
        """Between the backward pass and the optimizer's step."""
        exchange = (
            self.grow is not None
            and self.number > 0
            and self.number % self.period == 0
            and self.number < 0.75 * self.steps
        )
        for name, weight in self.weights.items():
            if not self.masks:
                break
            if exchange:
                self._exchange(name, weight)
            weight.grad.mul_(self.masks[name])

    @torch.no_grad()
    def after_step(self) -> None:
        """Behind the optimizer's step."""
        self.number += 1
        if not self.masks and self.number == self.start:
            self._begin()
        for name, mask in self.masks.items():
            self.weights[name].mul_(mask)

    def _exchange(self, name: str, weight: torch.Tensor) -> None:
        mask = self.masks[name]
        rate = 0.15 * (1 + math.cos(math.pi * self.number / (0.75 * self.steps)))
        count = int(rate * int(mask.sum()))
        kept = self._largest(torch.where(mask, weight.abs(), -1.0), int(mask.sum()) - count)
        gain = weight.grad.abs() if self.grow == "gradient" else torch.rand(weight.shape, generator=self.generator)
        grown = self._largest(torch.where(kept, -1.0, gain), count)
        self.masks[name] = kept | grown
        new = grown & ~mask
        weight[new] = 0
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in self.optimizer.state[weight]:
                self.optimizer.state[weight][moment][new] = 0
        weight.mul_(self.masks[name])

    def density(self) -> float:
        """Of the weights in the present step."""
        return 1 - self.share if self.masks else 1.0
