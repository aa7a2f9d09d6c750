"""What a conversion says of itself: figures for the journal and the report, and what a user should know of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import PreflightError
from .block import Block
from .cut import Cut
from .router import KEPT

SPARSE = 0.01
"""Share of zeros from which on somebody is taken to have put them there."""


def described(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was measured on the calibration tokens, by block, as the report draws it."""
    fit = ("left_before", "left_after", "oracle_agreement")
    return {
        "active_per_layer": [block["active"] for block in blocks],
        "fit_per_layer": {n.replace("_", " "): [block[n] for block in blocks] for n in fit if n in blocks[0]},
        "load_per_layer": {
            "busiest": [max(block["load"]) for block in blocks],
            "idlest": [min(block["load"]) for block in blocks],
        },
        "load": [{f"expert {n}": share for n, share in enumerate(block["load"])} for block in blocks],
        "router": [{name: block[name] for name in ("scale", "kept", "weight_error")} for block in blocks],
    }


def warned(
    blocks: Sequence[Mapping[str, Any]], cut: Cut, dtype: str, zeros: float, loss: Mapping[str, float] | None
) -> list[str]:
    """What a user should know of a conversion, a line each.

    Args:
        blocks: details of the converted blocks.
        cut: how they were cut.
        dtype: in which routers are stored.
        zeros: share of the down projections that the refit filled.
        loss: what the result loses (`experts`) and what pruning would (`pruned`); None where nothing was compared.
    """
    found = []
    idle = {number: idle_parts(block) for number, block in enumerate(blocks)}
    if any(idle.values()):
        said = "; ".join(f"block {number}: {parts}" for number, parts in idle.items() if parts)
        found.append(f"experts that no calibration token chooses ({said})")
    if zeros > SPARSE:
        found.append(f"the refit fills the zeros of the down projections ({zeros:.0%}): prune weights behind `moe`")
    lost = [number for number, block in enumerate(blocks) if block["kept"] < KEPT]
    if lost:
        found.append(f"the router of blocks {lost} keeps fewer than {KEPT:.1%} of its choices in {dtype}")
    if loss and loss["pruned"] <= loss["experts"]:
        found.append(
            f"FFNs pruned to {cut.active / cut.experts:.0%} of their units lose no more (a loss of "
            f"{loss['pruned']:.4g} against {loss['experts']:.4g}) and need no router: use `slice` on ffn"
        )
    return found


def zeros_of(checkpoint: Checkpoint) -> float:
    """Share of zeros in the down projections of a dense checkpoint."""
    layout = checkpoint.layout
    downs = [checkpoint.tensors[f"{layout.branches(block)[-1].writes}.weight"] for block in range(layout.depth)]
    return 1 - sum(int(down.count_nonzero()) for down in downs) / sum(down.numel() for down in downs)


def idle_parts(details: Mapping[str, Any]) -> list[int]:
    """Routed parts of a block, by its details, that no calibration token uses."""
    return [part for part, share in enumerate(details["load"]) if share == 0]


def refuse_idle(block: Block, number: int) -> None:
    """Refuse a part that no calibration token uses.

    Raises:
        PreflightError: names the block and the part.
    """
    idle = idle_parts(block.details)
    if idle:
        raise PreflightError(
            f"moe: block {number}",
            f"experts {idle} that no calibration token chooses",
            "every expert in use",
            "Use fewer experts, more active ones, or more calibration text.",
        )
