"""Layer-local distillation: a block's experts and router trained to add what the dense model has behind them.

    minimise  mean ‖R − (act(x Gᵀ) ∘ (x Uᵀ) ∘ g(x)) Dᵀ‖² / mean ‖R‖²     over gate G, up U, down D and router W

with R as in the refit (convert.py), on the calibration tokens that already lie in memory. Adam with a cosine from
`RATE` to zero; no other block runs, so a step costs one FFN forward and backward on `BATCH` tokens. The refit that
follows solves D once more on all tokens.

g(x) is one for the `chosen` largest logits, which has no gradient; the router gets that of a sigmoid around the
middle between the last logit that is chosen and the first that is not (straight through, Bengio et al.,
arXiv 1308.3432). It moves more slowly than the experts, which would chase a choice that flees them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .activations import Ffn, Tokens
from .block import Block
from .router import choose

RATE = 5e-3
"""Of Adam, in units of a matrix' root mean square."""
ROUTER_RATE = 2e-3
"""The router's, in the same units."""
BATCH = 512
"""Tokens of a step."""
SOFTNESS = 0.3
"""Width of the sigmoid that lends the choice a gradient; logits have unit deviation."""


def distilled(
    block: Block, tokens: Tokens, wanted: Sequence[torch.Tensor], steps: int, seed: int, raw: torch.Tensor | None
) -> tuple[Ffn, torch.Tensor | None]:
    """FFN and router after `steps` steps.

    Args:
        block: routed; its gate may depend on x alone.
        tokens: what its FFN reads.
        wanted: the streams that should be behind it, a batch each.
        steps: of Adam; 0 changes nothing.
        seed: of the order of tokens.
        raw: the router `[routed, hidden]`, logits of unit deviation; None leaves the block's gate as it is.
    """
    if steps == 0:
        return block.ffn, raw
    ffn = block.ffn
    x = torch.cat([x for x, _ in tokens])
    pairs = zip(tokens.before, wanted, tokens.data, strict=True)
    target = torch.cat([batch.tokens(behind - before) for before, behind, batch in pairs]) / ffn.scale
    target = target if ffn.shift is None else target - ffn.shift
    size = float(target.square().mean())
    generator = torch.Generator().manual_seed(seed)
    rates = {"gate": RATE, "up": RATE, "down": RATE, "router": ROUTER_RATE}
    start = {"gate": ffn.gate, "up": ffn.up, "down": ffn.down, "router": raw}
    learned = {name: w.float().clone().requires_grad_(True) for name, w in start.items() if w is not None}
    optimizer = torch.optim.Adam(
        [{"params": [w], "lr": rates[name] * root_mean_square(w)} for name, w in learned.items()], betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    with torch.enable_grad():
        for _ in range(steps):
            drawn = x[index := torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)]
            h = ffn.with_rows(drawn, learned["gate"], learned.get("up"))
            if raw is None:
                masked = block.masked(drawn, h)
            else:
                masked = block.cut.masked(h, straight_through(drawn @ learned["router"].T, block.cut.chosen))
            loss = (masked @ learned["down"].T - target[index]).square().mean() / size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    made = {name: weight.detach() for name, weight in learned.items()}
    after = replace(ffn, gate=made["gate"], up=made.get("up"), down=made["down"])
    return after, made["router"].double() if raw is not None else None


def root_mean_square(weight: torch.Tensor) -> float:
    """Never zero."""
    return max(float(weight.detach().square().mean().sqrt()), 1e-12)


def straight_through(logits: torch.Tensor, count: int) -> torch.Tensor:
    """One for the `count` largest of `[n, routed]`, with the gradient of a sigmoid around the edge of the choice."""
    edge = logits.detach().topk(count + 1, dim=1).values[:, -2:].mean(1, keepdim=True)
    soft = torch.sigmoid((logits - edge) / SOFTNESS)
    return choose(logits, count).float() + soft - soft.detach()
