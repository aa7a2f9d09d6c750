"""From a dense model to blocks of experts, one block after the other, errors corrected as they arise.

The refit: with the routing fixed, the down projections of all parts of a block are one linear map from masked
activations, so they are solved at once, in the routing's presence, against what the dense model has there:

    minimise  Σ ‖R − (h ∘ g(x)) (W + Δ)‖² + λ‖Δ‖²,     R = dense stream behind the block − own stream before the FFN

h and x are those of the compressed stream, g(x) are the weights that the stock class will give (0 where a part is not
chosen), W is the dense down projection and λ a share of the mean diagonal; with every part active Δ = 0. So a block
also mends what the blocks in front of it did. Sums in float64 (calibration/lstsq.py); streams in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..calibration.batches import Batch
from ..calibration.lstsq import Regression
from ..calibration.side import Side
from ..layout import Layout
from . import dynamic
from . import router as routers
from .activations import Ffn, Tokens, before_ffn
from .block import Block
from .cut import Cut
from .distill import distilled
from .partition import PARTITIONS
from .progress import Progress

Track = Callable[[Iterable[Any], str], Iterable[Any]]
NARROW = 64
"""Columns of the refit that are summed at a time at least, however small a part is."""
CHECKED = 8192
"""Tokens on which the scale of a router is chosen."""


@dataclass(frozen=True)
class Method:
    """How a block is converted.

    Attributes:
        partition: a name of `PARTITIONS`.
        router: a name of `routers.SCORES`; only those of `routers.LINEAR` can be stored.
        refit: whether the down projections are solved again under the routing.
        ridge: λ of the refit as a share of the mean diagonal.
        steps: of layer-local distillation before the refit (distill.py).
        weights: how the stock class weights what is chosen; None for exactly one (a comparison, never stored).
        dtype: in which the router will be stored.
    """

    partition: str = "caught"
    router: str = "listwise"
    refit: bool = True
    ridge: float = 0.1
    steps: int = 0
    weights: routers.Weights | None = None
    dtype: torch.dtype = torch.float32


def convert(
    side: Side,
    layout: Layout,
    cut: Cut,
    method: Method,
    data: Sequence[Batch],
    seed: int,
    track: Track,
    label: str = "experts",
    progress: Progress | None = None,
) -> Iterator[Block]:
    """Convert block by block; the model behind `side` stays as it is.

    Args:
        side: the dense model in front of its first block; it is moved.
        layout: of the model.
        cut: how its FFNs are cut.
        method: how.
        data: calibration batches.
        seed: of the partition.
        track: progress.
        label: of the progress bar.
        progress: where an earlier conversion stood, and this one will; only blocks behind that are converted. It is
            told of a block when the next one is asked for, so whoever iterates adds a block's tensors before.
    """
    allotments: list[dynamic.Allotment] = []
    if cut.most:
        with torch.no_grad():
            allotments = dynamic.allotted(side.fork(), cut, method.partition, data, seed)
    small = side.fork() if method.refit else side
    sides = [side] if small is side else [side, small]
    first = progress.resume(sides) if progress else 0
    for number in track(range(first, layout.depth), label):
        with torch.no_grad():
            yield _block(side, small, number, cut, method, data, seed, allotments[number] if allotments else None)
        if progress:
            progress.block_done(number, sides)


def _block(
    side: Side,
    small: Side,
    number: int,
    cut: Cut,
    method: Method,
    data: Sequence[Batch],
    seed: int,
    allotment: dynamic.Allotment | None,
) -> Block:
    """Convert one block, and move both sides behind it.

    Args:
        side: the dense model in front of the block.
        small: the compressed one; the same as `side` without a refit, which then is the dense one throughout.
        number: of the block.
        cut: how its FFN is cut.
        method: how.
        data: calibration batches.
        seed: of the partition.
        allotment: its share of the budget with `dynamic`.
    """
    before = before_ffn(side, number)
    ffn = Ffn.of(side.walk, number)
    tokens = Tokens(ffn, before, data)
    order = allotment.order if allotment else PARTITIONS[method.partition](tokens, cut, seed + number)
    wanted = [added(stream, batch, ffn.outer(h)) for stream, batch, (_, h) in zip(before, data, tokens, strict=True)]
    side.streams = [ffn.behind(total) for total in wanted]
    if small is side:
        tokens.reorder(order)
    else:
        del tokens
        before = before_ffn(small, number)
        tokens = Tokens(ffn.reordered(order), before, data)
    block = routed(tokens, cut, method, seed) if allotment is None else worthwhile(tokens, cut, method, allotment)
    if small is not side:
        if method.steps:
            start = None  # a budget's bias, and a router without a choice, are not trained
            if allotment is None and block.router is not None and cut.chosen < cut.routed:
                start = routers.normalised(block.router, tokens)
            ffn, learned = distilled(block, tokens, wanted, method.steps, seed + number, start)
            tokens = Tokens(ffn, before, data)
            block = replace(block, ffn=ffn) if learned is None else held(learned, tokens, cut, method)
        block = refitted(block, tokens, wanted, method.ridge)
        small.streams = moved(block, tokens)
    block.details.update(observed(block, tokens, allotment))
    return block


def moved(block: Block, tokens: Tokens) -> list[torch.Tensor]:
    """The streams behind a converted block, a batch each."""
    steps = zip(tokens.before, tokens.data, tokens, strict=True)
    totals = (added(stream, batch, block.ffn.outer(block.masked(x, h))) for stream, batch, (x, h) in steps)
    return [block.ffn.behind(total) for total in totals]


def added(stream: torch.Tensor, batch: Batch, what: torch.Tensor) -> torch.Tensor:
    """The stream `[batch, length, hidden]` plus `[tokens, hidden]` at its real tokens."""
    if batch.real is None:
        return stream + what.reshape(stream.shape)
    found = stream.clone()
    found[batch.real] += what
    return found


def routed(tokens: Tokens, cut: Cut, method: Method, seed: int) -> Block:
    """The block with its gate, before any refit."""
    if method.weights is None or method.router not in routers.LINEAR:
        if cut.chosen == 0:
            return Block(tokens.ffn, lambda x, _h: x.new_zeros(len(x), cut.routed), cut, None)
        score = routers.SCORES[method.router](tokens, cut, seed)
        return Block(tokens.ffn, lambda x, h: routers.choose(score(x, h), cut.chosen).float(), cut, None)
    return held(routers.LINEAR[method.router](tokens, cut), tokens, cut, method)


def held(router: torch.Tensor, tokens: Tokens, cut: Cut, method: Method) -> Block:
    """The block with a linear router `[routed, hidden]` as its class will hold it."""
    assert method.weights is not None
    raw = routers.normalised(router, tokens)
    weights, factor = method.weights, 1 / routers.constant(cut, method.weights)
    if cut.chosen == cut.routed:  # nothing to choose: the constant is exact
        scale, share = 0.0, 1.0
    elif weights == "one":
        scale, share = 1.0, 1.0
    else:
        x = torch.cat([x for x, _ in tokens])[:: max(1, tokens.count // CHECKED)]
        scale = routers.smallest_scale(raw, x, weights, method.dtype)[0]
        share = routers.kept(raw, scale, x, cut.chosen, weights, method.dtype)
    rounded = (raw * scale).to(method.dtype)
    stored = rounded.float()
    block = Block(
        tokens.ffn, lambda x, _h: routers.weigh(x @ stored.T, cut.chosen, weights) * factor, cut, rounded.double()
    )
    block.details.update(scale=scale, kept=share)
    return block


def worthwhile(tokens: Tokens, cut: Cut, method: Method, allotment: dynamic.Allotment) -> Block:
    """The block with a gate that chooses what is worth it, before any refit."""
    if method.router == "oracle":
        norms, price = tokens.ffn.norms, allotment.price
        return Block(tokens.ffn, lambda _x, h: (routers.importance(h, norms, cut).square() > price).float(), cut, None)
    router = dynamic.router(tokens, cut, allotment, method.dtype)
    stored = router.float()
    block = Block(tokens.ffn, lambda x, _h: dynamic.chosen(x @ stored.T, cut).float(), cut, router.double())
    block.details.update(scale=1.0, kept=1.0)
    return block


def refitted(block: Block, tokens: Tokens, wanted: Sequence[torch.Tensor], ridge: float) -> Block:
    """The block with its down projections solved for `wanted`, the streams behind it, a batch each."""
    ffn = block.ffn
    shift = torch.zeros(len(ffn.down)) if ffn.shift is None else ffn.shift
    width, hidden = ffn.down.shape[1], ffn.down.shape[0]
    fit = Regression(width, hidden, intercept=ffn.shift is not None, block=max(block.cut.part, NARROW))
    for stream, target, batch, (x, h) in zip(tokens.before, wanted, tokens.data, tokens, strict=True):
        fit.add(block.masked(x, h), batch.tokens(target - stream) / ffn.scale - shift)
    found, constant = fit.solve(ffn.down.T, ridge)
    block.details.update(left_before=fit.left_before, left_after=fit.left_after)
    solved = None if constant is None else (shift + constant).float()
    return replace(block, ffn=replace(ffn, down=found.T.float(), shift=solved))


def observed(block: Block, tokens: Tokens, allotment: dynamic.Allotment | None = None) -> dict[str, Any]:
    """Load of each routed part (share of tokens), agreement with the oracle, and how far weights are from one."""
    cut = block.cut
    load, agree, wanted, off, count = torch.zeros(cut.routed, dtype=torch.float64), 0, 0, 0.0, 0
    norms = tokens.ffn.norms
    for x, h in tokens:
        gates = block.gate(x, h)
        on = gates > 0
        importance = routers.importance(h, norms, cut)
        best = importance.square() > allotment.price if allotment else routers.choose(importance, cut.chosen)
        load += on.sum(0, dtype=torch.float64)
        agree, wanted = agree + int((on & best).sum()), wanted + int(best.sum())
        off = max(off, float((gates[on] - 1).abs().max())) if bool(on.any()) else off
        count += len(x)
    return {
        "load": (load / count).tolist(),
        "active": (cut.shared + float(load.sum()) / count) / cut.experts,
        "oracle_agreement": agree / max(wanted, 1),
        "weight_error": off,
    }
