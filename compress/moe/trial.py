"""What a conversion costs, on text that it was not fitted to, and what others would have cost there.

A trial follows a conversion block by block on streams of its own, so no second set of weights is held. It is how
routers that no stock class can hold are measured, and how the report comes by its bounds:

    oracle     the same cut with a router that knows every part's true importance: what a better router could win
    pruned     as many units, the same for every token, by backward elimination and refitted: what needs no router
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..calibration.batches import Batch
from ..calibration.loss import judge
from ..calibration.side import Side
from ..layout import Layout
from .activations import Tokens, before_ffn
from .block import Block
from .convert import Method, Track, convert, moved
from .cut import Cut
from .own import RoutedFfn
from .routing import loads


class Trial:
    """The loss of a model whose FFNs are converted one after the other, in nats a token.

    Args:
        model: the dense model, as a torch module; its tokens' logits are judged as `calibration.loss.judge` does.
        layout: of it.
        data: batches that nothing is fitted to.
    """

    @torch.no_grad()
    def __init__(self, model: Any, layout: Layout, data: Sequence[Batch]):
        self.model, self.layout, self.data = model, layout, data
        self.side = Side.at_start(model, layout, data)
        self.number = 0

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        """Through the next block, as it was converted."""
        self.side.streams = moved(block, Tokens(block.ffn, before_ffn(self.side, self.number), self.data))
        self.number += 1

    def follow(self, blocks: Iterable[Block]) -> float:
        """Through all blocks; their loss."""
        for block in blocks:
            self.advance(block)
        return self.loss()

    def loss(self) -> float:
        """Behind the last block."""
        streams = iter(self.side.streams)
        finish = self.side.walk.finish
        return judge(lambda **inputs: finish(next(streams), **inputs), self.model, self.layout, self.data)


def bounds(
    model: Any,
    layout: Layout,
    cut: Cut,
    method: Method,
    fitted: Sequence[Batch],
    judged: Sequence[Batch],
    seed: int,
    track: Track,
) -> dict[str, float]:
    """Losses of `oracle` and `pruned` beside a conversion by `method` (see the module)."""
    kept = replace(cut, shared=cut.active, most=0)
    others = {
        "oracle": (cut, replace(method, router="oracle")),
        "pruned": (kept, replace(method, partition="surgeon", weights=None)),
    }
    found = {}
    for name, (how, by) in others.items():
        with torch.no_grad():
            side = Side.at_start(model, layout, fitted)
        blocks = convert(side, layout, how, by, fitted, seed, track, name)
        found[name] = Trial(model, layout, judged).follow(blocks)
    return found


@torch.no_grad()
def by_count(
    model: Any, original: Any, layout: Layout, data: Sequence[Batch], counts: Iterable[int]
) -> list[float]:
    """Losses of a converted model in its class when it chooses another number of experts; see `judge`."""
    routers = [module for module in model.modules() if isinstance(getattr(module, "top_k", None), int)]
    before, found = [router.top_k for router in routers], []
    for count in counts:
        for router in routers:
            router.top_k = count
        found.append(judge(model, original, layout, data))
    for router, count in zip(routers, before, strict=True):
        router.top_k = count
    return found


@torch.no_grad()
def by_threshold(
    model: Any, original: Any, layout: Layout, data: Sequence[Batch], cut: Cut, thresholds: Iterable[float]
) -> list[dict[str, float]]:
    """Losses of a converted model in tersor's own class when it chooses above another logit, and what that spends."""
    ffns = [module for module in model.modules() if isinstance(module, RoutedFfn)]
    found = []
    for threshold in thresholds:
        for ffn in ffns:
            ffn.null_score = threshold
        chosen = sum(map(sum, loads(model, layout, data))) / len(ffns)
        share = (cut.shared + chosen) / cut.experts
        found.append({"threshold": threshold, "active_share": share, "loss": judge(model, original, layout, data)})
    for ffn in ffns:
        ffn.null_score = layout.config.null_score
    return found
