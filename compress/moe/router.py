"""Which parts a token needs: routers, how a stock class weights what they choose, and how small logits may be.

A part's importance on a token is √Σ (h_u ‖down_u‖)² over its units; its square is the energy e that is lost where the
part is not chosen. The router that ships is linear, because every stock class can hold it. It starts from the ridge
regression of all importances on the FFN's input and ends where the energy that it catches is likely to be largest:

    ridge       W = argmin Σ ‖x W − importance‖² + λ‖W‖²,     λ = RIDGE · mean diagonal of Σ xᵀx
    listwise    W = argmin − Σ_tokens Σ_best e_part · log softmax(x W)_part     over each token's `chosen` largest

The second is convex, weights a token by what is at stake on it, and leaves alone what is chosen by nobody (`STEPS` of
Adam from the first; ListNet's cross-entropy, Cao et al. 2007, with energies for relevances).

Selection depends on the order of the logits alone. Scaled down far enough, the weight that a class gives a chosen
expert (a softmax, a sigmoid) is nearly a known constant, which is folded into the weights; too far, and probabilities
tie in float32. `smallest_scale` finds the smallest power of two at which the class still chooses as it should. What
ties there scores alike, so that either choice is right (export/mixture/parity.py holds artifacts to that).

For comparison, and in no stock class: `mlp` (MoEfication), `analytic` (CMoE: each part's most typical unit, gate times
up), and `oracle`, the true importance, which bounds what any router can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from ..arch import Weights
from .activations import Ffn, Tokens
from .cut import Cut

RIDGE = 1e-2
"""Of the regression, as a share of the mean diagonal."""
STEPS = 300
"""Of Adam, at a rate that falls from `RATE`, on `BATCH` tokens each."""
RATE = 0.05
BATCH = 4096
BEGUN = 8192
"""Tokens of the regression that the listwise fit starts from."""
KEPT = 0.999
"""Share of its selections that a stored router must repeat in its class."""
SOUGHT = 0.9998
"""The share that is asked of the calibration tokens, so that others keep `KEPT`."""
SCALES = range(-24, 3)
"""Exponents of two that are tried."""
RATED = 10
"""Units that a token marks as its most active (CMoE's K)."""
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x `[n, hidden]`, h `[n, ffn]` in the partition's order) → scores `[n, routed]`."""


def importance(h: torch.Tensor, norms: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Importance of the routed parts, `[n, routed]`, from h `[n, ffn]` and norms `[ffn]` in the partition's order."""
    start = cut.shared * cut.part
    energy = (h[:, start:] * norms[start:]).square()
    return energy.reshape(len(h), cut.routed, cut.part).sum(2).sqrt()


def ridge(tokens: Tokens, cut: Cut) -> torch.Tensor:
    """The closed-form router, float64 `[routed, hidden]`; tokens are those of the partitioned FFN."""
    gram, cross = torch.zeros(()), torch.zeros(())
    norms = tokens.ffn.norms
    for x, h in tokens:
        gram = gram + x.double().T @ x.double()
        cross = cross + x.double().T @ importance(h, norms, cut).double()
    return torch.linalg.solve(_damped(gram), cross).T


def regression(x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same on tokens `[n, hidden]`, as a function of their importances `[n, routed]`."""
    x = x.double()
    factor = torch.linalg.cholesky(_damped(x.T @ x))
    return lambda importances: torch.cholesky_solve(x.T @ importances.double(), factor).T


def _damped(gram: torch.Tensor) -> torch.Tensor:
    return gram + RIDGE * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram), dtype=torch.float64)


def listwise(tokens: Tokens, cut: Cut) -> torch.Tensor:
    """The router that is fitted to the order of the parts, float64 `[routed, hidden]`."""
    if not 0 < cut.chosen < cut.routed:
        return ridge(tokens, cut)
    x = torch.cat([x for x, _ in tokens])
    importances = torch.cat([importance(h, tokens.ffn.norms, cut) for _, h in tokens])
    some = slice(None, None, max(1, len(x) // BEGUN))
    return fitted(x, importances, cut.chosen, regression(x[some])(importances[some]))


def fitted(x: torch.Tensor, importances: torch.Tensor, count: int, start: torch.Tensor) -> torch.Tensor:
    """The listwise fit.

    Args:
        x: tokens `[n, hidden]`.
        importances: `[n, routed]`.
        count: parts that are chosen.
        start: float64 `[routed, hidden]`, of any scale.

    Returns:
        float64 `[routed, hidden]`.
    """
    wanted = torch.where(choose(importances, count), importances.square(), 0)
    wanted = wanted / wanted.sum(1).mean().clamp_min(1e-30)
    logits = (x @ (start - start.mean(0)).T.float()).std().clamp_min(1e-30)

    def loss(logits: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        return -(energy * functional.log_softmax(logits, dim=1)).sum(1).mean()

    return descended((start - start.mean(0)).float() / logits, x, (wanted,), loss).double()


def descended(
    start: torch.Tensor,
    x: torch.Tensor,
    beside: Sequence[torch.Tensor],
    loss: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Where `STEPS` of Adam lead from a router.

    Args:
        start: float32 `[routed, hidden]`.
        x: tokens `[n, hidden]`.
        beside: what the loss reads beside logits, `[n, …]` each.
        loss: (logits, *beside) of a batch of tokens → a scalar.
    """
    size = x.std().clamp_min(1e-30)
    weight = (start * size).requires_grad_()
    optimizer = torch.optim.Adam([weight], RATE)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    order = order[: max(BATCH, len(x) // BATCH * BATCH)]  # what is left over would weigh more
    parts = list(zip(*(each[order].split(BATCH) for each in (x, *beside)), strict=True))
    with torch.enable_grad():
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            seen, *rest = parts[step % len(parts)]
            value = loss(seen @ (weight / size).T, *rest)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return weight.detach() / size


def centre(tokens: Tokens, cut: Cut) -> torch.Tensor:
    """The mean direction of each part's gate rows, float64 `[routed, hidden]`."""
    rows = functional.normalize(tokens.ffn.gate[cut.shared * cut.part :].double(), dim=1)
    return rows.reshape(cut.routed, cut.part, -1).mean(1)


LINEAR: dict[str, Callable[[Tokens, Cut], torch.Tensor]] = {"listwise": listwise, "ridge": ridge, "centre": centre}
"""Routers that a stock class can hold."""


def normalised(router: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """The router with the experts' mean taken out, which changes no order, and logits of unit deviation."""
    router = router - router.mean(0, keepdim=True)
    square, count = 0.0, 0
    for x, _ in tokens:
        logits = x.double() @ router.T
        square, count = square + float(logits.square().sum()), count + logits.numel()
    return router / max((square / max(count, 1)) ** 0.5, 1e-30)


def choose(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` parts with the largest scores, bool `[n, routed]`."""
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(count, dim=1).indices, True)


def weigh(logits: torch.Tensor, count: int, weights: Weights) -> torch.Tensor:
    """What a stock class multiplies each part by, `[n, routed]`, 0 where it is not chosen; in float32, as it does."""
    logits = logits.float()
    if weights == "one":
        return choose(logits, count).float()
    found = ranked(logits, weights).topk(count, dim=1)
    values = found.values
    if weights == "softmax of chosen":
        values = values.softmax(1)
    if weights == "softmax, normalised":
        values = values / values.sum(1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, found.indices, values)


def ranked(logits: torch.Tensor, weights: Weights) -> torch.Tensor:
    """What a stock class takes the largest of, `[n, routed]`."""
    if weights in ("softmax", "softmax, normalised"):
        return logits.softmax(1)
    return logits.sigmoid() if weights == "sigmoid" else logits


def constant(cut: Cut, weights: Weights) -> float:
    """The weight of a chosen part when all logits are zero."""
    chosen = dict.fromkeys(("softmax, normalised", "softmax of chosen"), 1 / cut.chosen)
    return {"softmax": 1 / cut.routed, **chosen, "sigmoid": 0.5, "one": 1.0}[weights]


def kept(
    router: torch.Tensor, scale: float, x: torch.Tensor, count: int, weights: Weights, dtype: torch.dtype
) -> float:
    """Share of a router's selections that the class repeats with its logits scaled, on tokens `[n, hidden]`."""
    stored = (router * scale).to(dtype)
    wanted = choose(x.double() @ stored.double().T, count)
    found = weigh(x.float() @ stored.float().T, count, weights) > 0
    return float((wanted & found).sum() / wanted.sum())


def smallest_scale(router: torch.Tensor, x: torch.Tensor, weights: Weights, dtype: torch.dtype) -> tuple[float, float]:
    """The smallest power of two that keeps `SOUGHT` of the selections, whatever number is chosen.

    Args:
        router: `[routed, hidden]`, logits of unit deviation.
        x: tokens `[n, hidden]`.
        weights: of the class.
        dtype: in which the router is stored.

    Returns:
        the scale, and the share of the selections that it keeps.
    """
    stored = router.to(dtype)  # a power of two changes no digit of it, but in float16, where `kept` sees what is lost
    wanted, logits = places(x.double() @ stored.double().T), x.float() @ stored.float().T
    best = (1.0, 0.0)
    for exponent in SCALES:
        both = torch.maximum(wanted, places(ranked(logits * 2.0**exponent, weights)))  # chosen by both from here on
        kept_by = both.flatten().bincount(minlength=len(router)).cumsum(0)[:-1]
        share = float((kept_by / torch.arange(1, len(router))).mean()) / len(x)
        if share >= SOUGHT:
            return 2.0**exponent, share
        if share > best[1]:
            best = 2.0**exponent, share
    return best


def places(scores: torch.Tensor) -> torch.Tensor:
    """The place of each part in the order of a token's scores, largest first: int64 `[n, routed]`."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def oracle(tokens: Tokens, cut: Cut, seed: int) -> Score:
    """The true importance."""
    norms = tokens.ffn.norms
    return lambda _x, h: importance(h, norms, cut)


def marked(tokens: Tokens) -> torch.Tensor:
    """Whether a unit is among a token's `RATED` largest, tokens and rows normalised (CMoE): bool `[n, ffn]`."""
    ffn = tokens.ffn
    rows = _normalised_rows(ffn)
    found = []
    for x, _ in tokens:
        h = ffn.with_rows(functional.normalize(x, dim=1), *rows)
        found.append(torch.zeros(h.shape, dtype=torch.bool).scatter_(1, h.abs().topk(RATED, dim=1).indices, True))
    return torch.cat(found)


def analytic(tokens: Tokens, cut: Cut, seed: int) -> Score:
    """CMoE: |act(gate x) · up x| of each part's unit that is nearest to the part's mean activation."""
    ffn, start = tokens.ffn, cut.shared * cut.part
    columns = marked(tokens)[:, start:].float().T.reshape(cut.routed, cut.part, -1)
    distance = (columns - columns.mean(1, keepdim=True)).abs().sum(2)
    typical = start + torch.arange(cut.routed) * cut.part + distance.argmin(1)
    gate, up = _normalised_rows(ffn)
    rows = gate[typical], None if up is None else up[typical]
    return lambda x, _h: ffn.with_rows(x, *rows).abs()


def _normalised_rows(ffn: Ffn) -> tuple[torch.Tensor, torch.Tensor | None]:
    return functional.normalize(ffn.gate, dim=1), None if ffn.up is None else functional.normalize(ffn.up, dim=1)


def mlp(tokens: Tokens, cut: Cut, seed: int, steps: int = 250, width: int = 64) -> Score:
    """MoEfication: a small network trained on the importances."""
    x = torch.cat([x for x, _ in tokens])
    wanted = torch.cat([importance(h, tokens.ffn.norms, cut) for _, h in tokens])
    wanted, deviation = wanted / wanted.mean(), x.std()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], width), nn.GELU(), nn.Linear(width, cut.routed))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(steps):
            batch = torch.randint(0, len(x), (512,))
            loss = (net(x[batch] / deviation) - wanted[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.requires_grad_(False)
    return lambda x, _h: net(x / deviation)


def scored(router: torch.Tensor) -> Score:
    """A linear router as scores."""
    stored = router.float()
    return lambda x, _h: x @ stored.T


SCORES: dict[str, Callable[[Tokens, Cut, int], Score]] = {
    "listwise": lambda tokens, cut, _seed: scored(listwise(tokens, cut)),
    "ridge": lambda tokens, cut, _seed: scored(ridge(tokens, cut)),
    "centre": lambda tokens, cut, _seed: scored(centre(tokens, cut)),
    "mlp": mlp,
    "analytic": analytic,
    "oracle": oracle,
}
"""(tokens of the partitioned FFN, cut, seed) → scores."""
