"""Fewer units in every block: which go (obs.py, heads.py, on the dense model's activations), and the tensors without
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..axes import Dim, family, shrink
from ..calibration.batches import Batch, finite
from ..calibration.side import Side
from ..calibration.stages import Stage, Writer, stages
from ..deferred import Later, at_once
from ..layout import Layout
from ..walk import captured
from .fuse import along
from .heads import WIDTHS, pair_order, pair_scores, turned_heads, value_basis
from .obs import elimination_order, survivors

Track = Callable[[Iterable[Any], str], Iterable[Any]]


def next_norm(layout: Layout, stage: Stage) -> str:
    """The norm whose input is the stream behind the stage."""
    if stage.after or layout.arch.stream == "post-norm":
        return stage.after
    if stage.block + 1 < layout.depth:
        return stages(layout, stage.block + 1)[0].norm
    return layout.full(layout.arch.final_norm)


@torch.no_grad()
def removal_orders(
    model: Any,
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    data: Sequence[Batch],
    keep: Mapping[str, int],
    metrics: Mapping[str, torch.Tensor],
    track: Track,
    files: Path | None = None,
) -> dict[str, torch.Tensor]:
    """In which order the units of each block may go, cheapest first.

    Args:
        model: the dense model, float32.
        layout: its layout.
        tensors: its parameters.
        data: batches.
        keep: axis family → the smallest number of units that any budget keeps.
        metrics: the loss' sensitivity at each norm's input (basis.py).
        track: progress.
        files: where the streams live, see calibration/streams.py.

    Returns:
        int64 orders by numbered axis (`ffn3`), long enough for `keep`. Where heads become narrower also `head_dim` and
        `value_dim`, whole, and by `values3` the basis of a block's values (heads.py).
    """
    if not keep:
        return {}
    side, orders, narrow = Side.at_start(model, layout, data, files), {}, "value_dim" in keep
    scores = torch.zeros(layout.families["head_dim"] // 2, dtype=torch.float64) if narrow else torch.zeros(0)
    for block in track(range(layout.depth), "units"):
        all_writers = [(stage, writer) for stage in stages(layout, block) for writer in stage.writers]
        mixes = [w.module for _, w in all_writers if narrow and w.inner.has("value_dim")]
        writers = [(s, w) for s, w in all_writers if family(w.axis(layout)) in keep or w.module in mixes]
        heads = [read for stage, w in writers if w.module in mixes for read in stage.reads]
        moments, squares = inner_moments(side, block, writers, data, heads)
        for stage, writer in writers:
            axis, name = writer.axis(layout), f"{writer.module}.weight"
            weight, _ = along(tensors[name], layout, name, "hidden")
            metric = None if stage.post else metrics.get(next_norm(layout, stage))
            if writer.module in mixes:
                scores += pair_scores(layout, block, squares)
                orders[f"values{block}"] = value_basis(layout, writer, moments[writer.module], weight, metric)
            if family(axis) in keep:
                count = layout.sizes[axis] - keep[family(axis)]
                groups = writer.groups(layout, axis)
                orders[axis] = elimination_order(moments[writer.module], weight, groups, count, metric)
    if narrow:
        orders |= {"head_dim": pair_order(scores), "value_dim": torch.arange(layout.families["value_dim"]).flip(0)}
    return orders


def inner_moments(
    side: Side, block: int, writers: Sequence[tuple[Stage, Writer]], data: Sequence[Batch], outputs: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Second moments of what each writer reads, tokens of a large stream weighing less; moves behind the block.

    Returns:
        float64 `[n, n]` by module, and of the modules `outputs` the sums of squares, float64 `[out]`.
    """
    names = {w.module for _, w in writers} | {stage.norm for stage, _ in writers if stage.norm}
    total: dict[str, Any] = {w.module: 0.0 for _, w in writers}
    squares: dict[str, Any] = dict.fromkeys(outputs, 0.0)
    for number, batch in enumerate(data):
        with captured(side.walk.model, names, outputs) as seen:
            after = side.walk.block(block, side.streams[number], side.arguments[number][block])
        for stage, writer in writers:
            inner = batch.tokens(finite(seen.inputs[writer.module], writer.module)).double()
            stream = batch.tokens(seen.inputs[stage.norm]).double() if stage.norm else torch.ones(len(inner), 1)
            weighted = inner / stream.pow(2).mean(-1, keepdim=True).clamp_min(1e-30)
            total[writer.module] = total[writer.module] + inner.T @ weighted
        for module in outputs:
            squares[module] = squares[module] + batch.tokens(seen.outputs[module]).double().pow(2).sum(0)
        side.streams[number] = after  # last: what the norms saw may be the stream itself
    return total, squares


def without(
    layout: Layout,
    tensors: Mapping[str, torch.Tensor],
    orders: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    later: Later = at_once,
) -> dict[str, torch.Tensor]:
    """The tensors with `sizes` units left on every axis that has an order; names and order of parameters unchanged."""
    kept = {
        axis: survivors(order, layout.sizes[axis], sizes[family(axis)])
        for axis, order in orders.items()
        if family(axis) in sizes
    }
    left = dict(tensors)
    if "value_dim" in sizes:
        for name, shape in layout.tensors.items():
            if any(dim.has(axis) for dim in shape.dims for axis in WIDTHS):
                basis = orders[f"values{block_of(shape.dims)}"]
                turn = partial(turned_heads, left[name], shape.dims, layout, basis, sizes["head_dim"])
                left[name] = later(name, left[name].shape, turn)
    for name, shape in layout.tensors.items():
        here = {axis: keep for axis, keep in kept.items() if any(dim.has(axis) for dim in shape.dims)}
        if here:
            counts = {**layout.sizes, **{axis: len(keep) for axis, keep in here.items()}}
            small = [dim.size(counts) for dim in shape.dims]
            left[name] = later(name, small, partial(_kept, left[name], shape.dims, here, layout))
    return left


def block_of(dims: tuple[Dim, ...]) -> int:
    """The block whose numbered axes a tensor has."""
    return next(int(axis[len(family(axis)) :]) for d in dims for s in d.sections for axis in s if axis != family(axis))


def _kept(tensor: torch.Tensor, dims: tuple[Dim, ...], kept: Mapping[str, Any], layout: Layout) -> torch.Tensor:
    sizes = dict(layout.sizes)
    for axis, keep in kept.items():  # one dimension may have several of them
        tensor = shrink(tensor, dims, axis, keep, sizes)
        sizes[axis] = len(keep)
    return tensor
