"""Floating-point operations of a training step: counted and realised.

    dense      what the model would run: every product of forward, dx and dw, attention included
    counted    what the masks leave: a sparse layer's forward and dx times its weight density, its dw times the
               density of its saved input; exempt layers and attention whole. The figure that papers report
    realised   what ran: the shapes of all products, seen by torch's own counter as they were dispatched. Where
               masks are zeros in a dense product, this is the dense figure

Elementwise work is in none of them, as everywhere in the field. Seconds are measured, not derived:
benchmarks/swat.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..swat import SparseTraining


@dataclass(frozen=True)
class Flops:
    """Operations of one training step, 2 a multiply-add."""

    dense: int
    counted: int
    realised: int


def realised(step: Callable[[], Any]) -> int:
    """Operations of the products that `step` dispatches, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def measure(step: Callable[[], Any], training: SparseTraining | None = None) -> Flops:
    """Run `step` (forward and backward) once or twice and count.

    Args:
        step: must have no effect that matters but gradients.
        training: attached to the model that `step` trains; None for a dense model.
    """
    ran = realised(step)
    if training is None:
        return Flops(ran, ran, ran)
    works = {name: layer.work for name, layer in training.layers.items()}
    training.detach()
    try:
        dense = realised(step)
    finally:
        training.attach()
    return Flops(dense, dense - round(saved_work(training, works)), ran)


def saved_work(training: SparseTraining, works: dict[str, int] | None = None) -> float:
    """Operations of the last step that the masks leave out, by their densities."""
    total = 0.0
    for name, layer in training.layers.items():
        work = layer.work if works is None else works[name]
        forward_and_dx = layer.share * (2 if layer.reads_gradient else 1)
        dw = layer.dropped_gradient if layer.module.weight.requires_grad else 0.0
        total += work * (forward_and_dx + dw)
    return total
