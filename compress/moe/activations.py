"""An FFN and what it sees on the calibration tokens of one block: h = act(gate x) ∘ (up x), y = down h; or, where there
is no gate, h = act(up x + b), y = down h + c, for which x has a last coordinate that is one.

Attention runs once a block and side; everything behind it is computed here from the stream in front of the FFN's
norm, so that partition, router and refit may each pass over the tokens without running the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..arch import Branch
from ..calibration.batches import Batch, finite
from ..calibration.side import Side
from ..deferred import plain
from ..layout import Layout
from ..walk import Walk

HELD = 1 << 30
"""Bytes of one block's inner activations that are kept instead of being computed for each pass over the tokens."""


def ffn_branch(layout: Layout, block: int) -> Branch | None:
    """The block's branch of `ffn` units that can become experts; None if it has none.

    It reads through a gate and an up projection, or through one projection where the architecture says where experts
    without a gate would stand.
    """
    last, arch = layout.branches(block)[-1], layout.arch
    if last.inner != f"ffn{block}" or not last.norm or last.post_norm or arch.parallel or arch.experts is not None:
        return None
    gated = len(last.reads) == 2 and arch.stream == "pre-norm"
    return last if gated or (len(last.reads) == 1 and arch.own is not None) else None


@dataclass(frozen=True)
class Ffn:
    """One block's FFN in a torch model.

    Attributes:
        norm: the module in front of it, or behind the addition.
        gate: float32 `[ffn, hidden]`, or where there is none up with its bias, `[ffn, hidden + 1]`.
        up: float32 `[ffn, hidden]`; None without a gate.
        down: float32 `[hidden, ffn]`.
        act: the activation.
        scale: what the block multiplies the output by before it is added to the stream.
        shift: c, float32 `[hidden]`; None with a gate.
        post: whether the norm is behind the addition.
    """

    norm: nn.Module
    gate: torch.Tensor
    up: torch.Tensor | None
    down: torch.Tensor
    act: Callable[[torch.Tensor], torch.Tensor]
    scale: float
    shift: torch.Tensor | None = None
    post: bool = False

    @classmethod
    def of(cls, walk: Walk, block: int) -> Ffn:
        """The FFN of a walked model's block."""
        from transformers.activations import ACT2FN

        layout, branch = walk.layout, ffn_branch(walk.layout, block)
        assert branch is not None
        reads = [_matrix(walk, name, writes=False) for name in branch.reads]
        down = _matrix(walk, branch.writes, writes=True)
        scale = float(getattr(layout.config, layout.arch.branch_scale, 1.0))
        act = ACT2FN[getattr(layout.config, layout.arch.activation)]
        norm, post = walk.model.get_submodule(branch.norm), layout.arch.stream == "post-norm"
        if len(reads) == 2:
            return cls(norm, reads[0], reads[1], down, act, scale, None, post)
        inner, outer = _bias(walk, branch.reads[0], len(reads[0])), _bias(walk, branch.writes, len(down))
        return cls(norm, torch.cat([reads[0], inner[:, None]], dim=1), None, down, act, scale, outer, post)

    def read(self, before: torch.Tensor) -> torch.Tensor:
        """What the FFN reads of a stream `[…, hidden]`."""
        x: torch.Tensor = before if self.post else self.norm(before)
        return x if self.shift is None else torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """Activations `[n, ffn]` of tokens `[n, hidden]`."""
        return self.with_rows(x, self.gate, self.up)

    def with_rows(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        """Activations of units with these rows."""
        opened = self.act(x @ gate.T)
        return opened if up is None else opened * (x @ up.T)

    def reordered(self, order: torch.Tensor) -> Ffn:
        """The same FFN with its units in another order."""
        up = None if self.up is None else self.up[order]
        return replace(self, gate=self.gate[order], up=up, down=self.down[:, order])

    def outer(self, masked: torch.Tensor) -> torch.Tensor:
        """What activations `[n, ffn]` add to the stream, `[n, hidden]`."""
        y = masked @ self.down.T
        return self.scale * (y if self.shift is None else y + self.shift)

    def behind(self, total: torch.Tensor) -> torch.Tensor:
        """The stream behind the block from the sum."""
        found: torch.Tensor = self.norm(total) if self.post else total
        return found

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

    def _compute(self, number: int, every: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.data[number].tokens(self.ffn.read(self.before[number]))[::every]
        return x, finite(self.ffn.inner(x), "the FFN")

    @property
    def count(self) -> int:
        """How many tokens."""
        each = (batch.tokens(stream[..., :1]) for stream, batch in zip(self.before, self.data, strict=True))
        return sum(len(tokens) for tokens in each)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self._held) if self._held is not None else map(self._compute, range(len(self.data)))

    def some(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same, of every n-th token, so that they are hardly more than `count`."""
        every = max(1, self.count // count)
        if self._held is not None:
            return ((x[::every], h[::every]) for x, h in self._held)
        return (self._compute(number, every) for number in range(len(self.data)))

    def reorder(self, order: torch.Tensor) -> None:
        """Put the FFN's units into another order."""
        self.ffn = self.ffn.reordered(order)
        if self._held is not None:
            for number, (x, h) in enumerate(self._held):
                self._held[number] = x, h[:, order]


def before_ffn(side: Side, block: int) -> list[torch.Tensor]:
    """The streams behind the block's attention, `[batch, length, hidden]` each."""
    branch = ffn_branch(side.walk.layout, block)
    assert branch is not None
    module = branch.reads[0] if side.walk.layout.arch.stream == "post-norm" else branch.norm
    found = []
    for stream, arguments in zip(side.streams, side.arguments, strict=True):
        seen = side.walk.observe(block, stream, arguments[block], [module])
        found.append(seen.inputs[module].reshape(stream.shape))  # OPT flattens batch and length within a block
    return found


def _matrix(walk: Walk, module: str, writes: bool) -> torch.Tensor:
    """A module's weight as `[out, in]`, whichever way it lies."""
    weight = plain(walk.model.get_parameter(f"{module}.weight").detach())
    rows = walk.layout.tensors[f"{module}.weight"].dims[0].sections
    return weight if (rows == (("hidden",),)) == writes else weight.T


def _bias(walk: Walk, module: str, size: int) -> torch.Tensor:
    name = f"{module}.bias"
    return walk.model.get_parameter(name).detach() if name in walk.layout.tensors else torch.zeros(size)
