"""A gated FFN and what it sees: h = act(gate x) ∘ (up x), y = down h, on the calibration tokens of one block.

Attention runs once a block and side; everything behind it is computed here from the stream in front of the FFN's
norm, so that partition, router and refit may each pass over the tokens without running the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..arch import Branch
from ..calibration.batches import Batch, finite
from ..calibration.side import Side
from ..layout import Layout
from ..walk import Walk

HELD = 1 << 30
"""Bytes of one block's inner activations that are kept instead of being computed for each pass over the tokens."""


def gated_branch(layout: Layout, block: int) -> Branch | None:
    """The block's branch with a gate, an up and a down projection of `ffn`; None if it has none."""
    last = layout.branches(block)[-1]
    gated = len(last.reads) == 2 and last.inner == f"ffn{block}" and last.norm and not last.post_norm
    fits = layout.arch.stream == "pre-norm" and not layout.arch.parallel and layout.arch.experts is None
    return last if gated and fits else None


@dataclass(frozen=True)
class Ffn:
    """One block's FFN in a torch model.

    Attributes:
        norm: the module in front of it.
        gate, up: float32 `[ffn, hidden]`.
        down: float32 `[hidden, ffn]`.
        act: the activation.
        scale: what the block multiplies the output by before it is added to the stream.
    """

    norm: nn.Module
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    act: Callable[[torch.Tensor], torch.Tensor]
    scale: float

    @classmethod
    def of(cls, walk: Walk, block: int) -> Ffn:
        """The FFN of a walked model's block."""
        from transformers.activations import ACT2FN

        layout, branch = walk.layout, gated_branch(walk.layout, block)
        assert branch is not None
        names = (*branch.reads, branch.writes)
        gate, up, down = (walk.model.get_parameter(f"{name}.weight").detach() for name in names)
        scale = float(getattr(layout.config, layout.arch.branch_scale, 1.0))
        act = ACT2FN[getattr(layout.config, layout.arch.activation)]
        return cls(walk.model.get_submodule(branch.norm), gate, up, down, act, scale)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """Activations `[n, ffn]` of normalised tokens `[n, hidden]`."""
        return self.act(x @ self.gate.T) * (x @ self.up.T)

    @property
    def norms(self) -> torch.Tensor:
        """How much one unit of h adds to the stream: ‖column of down‖, float32 `[ffn]`."""
        return self.down.norm(dim=0)


class Tokens:
    """What a block's FFN reads and computes, batch by batch: iterate for (x `[n, hidden]`, h `[n, ffn]`), padding
    left out.

    Args:
        ffn: of the block.
        before: the stream in front of the FFN's norm, a batch each.
        data: the batches.
    """

    def __init__(self, ffn: Ffn, before: Sequence[torch.Tensor], data: Sequence[Batch]):
        self.ffn, self.before, self.data = ffn, before, data
        count = sum(stream[..., 0].numel() for stream in before)
        self._held: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        if 4 * count * (ffn.gate.shape[0] + ffn.gate.shape[1]) <= HELD:
            self._held = [self._compute(number) for number in range(len(data))]

    def _compute(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.data[number].tokens(self.ffn.norm(self.before[number]))
        return x, finite(self.ffn.inner(x), "the FFN")

    @property
    def count(self) -> int:
        """How many tokens."""
        each = (batch.tokens(stream[..., :1]) for stream, batch in zip(self.before, self.data, strict=True))
        return sum(len(tokens) for tokens in each)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self._held) if self._held is not None else map(self._compute, range(len(self.data)))


def before_ffn(side: Side, block: int) -> list[torch.Tensor]:
    """The streams behind the block's attention."""
    branch = gated_branch(side.walk.layout, block)
    assert branch is not None
    found = []
    for stream, arguments in zip(side.streams, side.arguments, strict=True):
        seen = side.walk.observe(block, stream, arguments[block], [branch.norm])
        found.append(seen.inputs[branch.norm])
    return found
