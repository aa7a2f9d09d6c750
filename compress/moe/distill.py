"""Layer-local distillation: a block's experts trained to add what the dense model has behind them.

    minimise  mean ‖R − (act(x Gᵀ) ∘ (x Uᵀ) ∘ g(x)) Dᵀ‖² / mean ‖R‖²     over gate G, up U and down D

with the routing g fixed and R as in the refit (convert.py), on the calibration tokens that already lie in memory. Adam
with a cosine from `RATE` to zero; no other block runs, so a step costs one FFN forward and backward on `BATCH` tokens.
The refit that follows solves D once more on all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .activations import Tokens
from .block import Block

RATE = 2e-3
BATCH = 512


def distilled(block: Block, tokens: Tokens, wanted: Sequence[torch.Tensor], steps: int, seed: int) -> Block:
    """The block after `steps` steps.

    Args:
        block: routed; its gate may depend on x alone.
        tokens: what its FFN reads.
        wanted: the streams that should be behind it, a batch each.
        steps: of Adam; 0 changes nothing.
        seed: of the order of tokens.
    """
    if steps == 0:
        return block
    ffn = block.ffn
    x = torch.cat([x for x, _ in tokens])
    pairs = zip(tokens.before, wanted, tokens.data, strict=True)
    target = torch.cat([batch.tokens(behind - before) for before, behind, batch in pairs]) / ffn.scale
    target = target if ffn.shift is None else target - ffn.shift
    size = float(target.square().mean())
    generator = torch.Generator().manual_seed(seed)
    weights = [weight.clone().requires_grad_(True) for weight in (ffn.gate, ffn.up, ffn.down) if weight is not None]
    unit = [max(float(weight.detach().square().mean().sqrt()), 1e-12) for weight in weights]
    optimizer = torch.optim.Adam([{"params": [w], "lr": RATE * u} for w, u in zip(weights, unit, strict=True)])
    rates = [group["lr"] for group in optimizer.param_groups]
    with torch.enable_grad():
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            drawn = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)
            gate, *up, down = weights
            h = ffn.with_rows(x[drawn], gate, up[0] if up else None)
            loss = (block.masked(x[drawn], h) @ down.T - target[drawn]).square().mean() / size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    gate, *up, down = (weight.detach() for weight in weights)
    return replace(block, ffn=replace(ffn, gate=gate, up=up[0] if up else None, down=down))
