"""The options of sparse training: one frozen dataclass, the same words in a recipe, a callback and a plain loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from tersor.compress.pass_ import STRICT

Share = Annotated[float, Field(ge=0, lt=1)]
"""Share that is dropped: 0 drops nothing, 1 would leave nothing."""

FIRST, LAST = "first", "last"


@dataclass(frozen=True, config=STRICT)
class Sparsity:
    """What is dropped, where and when.

    Attributes:
        mode: `exact` masks values one by one and stores what is left; `sampled` computes weight gradients from random
            tokens; `structured` takes whole units out of every GEMM and samples tokens too.
        weights: share of each layer's weights (structured: of each block's units) that is dropped.
        activations: share of each layer's input that is dropped before it is saved for the backward pass (sampled
            and structured: the share of tokens that the weight gradient leaves out; to a convolution, a token is
            an image of the batch, of which few are drawn from a small batch: 0 keeps them all).
        distribution: how weight sparsity spreads over layers: `uniform`; `erk`, more of it in large layers;
            `momentum`, less of it where gradients are large.
        ramp: `cubic` lets weight sparsity grow as 1 − (1 − t)³; `none` starts with all of it. Activations have no
            ramp: memory should fall from the first step.
        ramp_share: of all steps, over which it grows. A tenth counts few FLOPs more than no ramp at all.
        period: steps between new thresholds, units and layer densities.
        drop: of exact mode, whose inputs lose values: `stored`, those kept for their layer alone, while what an
            activation or a norm keeps for its own gradient is read whole, in the same bytes; `all`, as published.
        values: dtype in which kept activations are stored; `input`, that of the activation.
        exempt: layers that stay dense: names, `re:` patterns, `first` (the layer that reads the input; none where an
            embedding does), `last`.
        on: what structured mode takes out: `ffn` (units), `heads`, `channels` (of convolutions).
    """

    mode: Literal["exact", "sampled", "structured"] = "exact"
    weights: Share = 0.8
    activations: Share = 0.8
    distribution: Literal["uniform", "erk", "momentum"] = "uniform"
    ramp: Literal["none", "cubic"] = "cubic"
    ramp_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    period: Annotated[int, Field(gt=0)] = 10
    drop: Literal["stored", "all"] = "stored"
    values: Literal["input", "bfloat16"] = "input"
    exempt: tuple[str, ...] = (FIRST, LAST)
    on: tuple[Literal["ffn", "heads", "channels"], ...] = ("ffn", "channels")

    def __post_init__(self) -> None:
        """Refuse combinations that mean nothing."""
        if self.weights == 0 and self.activations == 0:
            raise ValueError("weights and activations are both 0; drop a share of one of them")
        if self.mode == "structured" and self.weights == 0:
            raise ValueError("weights is 0 in structured mode; use mode 'sampled', which keeps all units")
        if self.mode == "structured" and self.distribution != "uniform":
            raise ValueError(f"distribution {self.distribution!r}: in structured mode, one size for all blocks")

    def share(self, step: int, steps: int) -> float:
        """Weight sparsity at optimizer step `step` of `steps` (Zhu and Gupta 2017, eq. 1, from 0)."""
        if self.ramp == "none":
            return self.weights
        passed = min(1.0, step / max(1.0, self.ramp_share * steps))
        return float(self.weights * (1 - (1 - passed) ** 3))
