"""Gates: limits on measured values, absolute or relative to the original."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass

from pydantic import field_validator, model_validator
from pydantic.dataclasses import dataclass

from ..errors import RecipeError
from ..pass_ import STRICT
from .metrics import ALWAYS, METRICS, nearest

PERCENT = re.compile(r"\s*([+-]?\d+(?:\.\d+)?)\s*%\s*")
UPPER, LOWER = ("max", "max_increase"), ("min", "max_drop")


def better(metric: str) -> str:
    """`lower` or `higher`."""
    return "lower" if metric in ALWAYS else METRICS[metric].better


@dataclass(frozen=True, config=STRICT)
class Gate:
    """A limit on a metric; exactly one of the four is given.

    Attributes:
        metric: a metric of the recipe, or `parameters`, `bytes`, `latency_ms`.
        max: the value may not be over it.
        min: the value may not be under it.
        max_increase: over the original by at most this much, in the metric's unit or as `8%` of the original.
        max_drop: under the original by at most this much. Negative numbers demand a gain.
    """

    metric: str
    max: float | None = None
    min: float | None = None
    max_increase: float | str | None = None
    max_drop: float | str | None = None

    @field_validator("metric")
    @classmethod
    def _metric_is_known(cls, name: str) -> str:
        known = [*METRICS, *ALWAYS]
        if name not in known:
            raise ValueError(
                f"{name!r} is no metric; there are {', '.join(known)}. {nearest(name, known)}".strip()
            )
        return name

    @field_validator("max", "min", "max_increase", "max_drop")
    @classmethod
    def _limit_is_a_number(cls, limit: float | str | None) -> float | str | None:
        if isinstance(limit, str) and not PERCENT.fullmatch(limit):
            raise ValueError(f"{limit!r} is neither a number nor a share of the original like '8%'")
        if isinstance(limit, (int, float)) and not math.isfinite(limit):
            raise ValueError(f"{limit} is no finite number")
        return limit

    @model_validator(mode="after")
    def _one_limit_that_can_fail(self) -> Gate:
        given = [name for name in (*UPPER, *LOWER) if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join((*UPPER, *LOWER))}, not {' and '.join(given) or 'none'}"
            )
        fitting = UPPER if better(self.metric) == "lower" else LOWER
        if given[0] not in fitting:
            raise ValueError(
                f"{given[0]} on {self.metric} could never catch a loss: {better(self.metric)} is better. "
                f"Use {' or '.join(fitting)}"
            )
        return self

    @property
    def kind(self) -> str:
        """Which of the four limits is given."""
        return next(name for name in (*UPPER, *LOWER) if getattr(self, name) is not None)

    @property
    def relative(self) -> bool:
        """Whether the original's value is needed."""
        return self.kind in ("max_increase", "max_drop")


@plain_dataclass(frozen=True)
class Verdict:
    """What a gate says.

    Attributes:
        gate: the gate.
        value: what was measured.
        original: the original's value, None if it was not measured.
        limit: the absolute number that the value is held to.
        passed: the value is at the limit or on its good side.
        text: one line for people.
    """

    gate: Gate
    value: float
    original: float | None
    limit: float
    passed: bool
    text: str


def judge(gate: Gate, scores: Mapping[str, float], original: Mapping[str, float]) -> Verdict:
    """Hold measured values to a gate. NaN fails.

    Raises:
        RecipeError: the metric was not measured, of the result or (relative gates) of the original.
    """
    name = gate.metric
    if name not in scores:
        raise RecipeError(
            f"gate: {name}",
            "a metric that was not measured",
            f"one of {', '.join(scores)}",
            "Add it to metrics.",
        )
    value, before = scores[name], original.get(name)
    limit, reason = _limit(gate, before)
    upper = gate.kind in UPPER
    passed = value <= limit if upper else value >= limit
    word = {
        (True, True): "within",
        (True, False): "over",
        (False, True): "at least",
        (False, False): "under",
    }[upper, passed]
    shown, shown_limit = _distinct(value, limit)
    return Verdict(gate, value, before, limit, passed, f"{name} {shown} is {word} {shown_limit}{reason}")


def _limit(gate: Gate, original: float | None) -> tuple[float, str]:
    given = getattr(gate, gate.kind)
    if not gate.relative:
        return float(given), ""
    if original is None or not math.isfinite(original):
        raise RecipeError(
            f"gate: {gate.metric}", f"no value of the original for {gate.kind}", "one", "Use max or min."
        )
    sign = 1.0 if gate.kind == "max_increase" else -1.0
    share = PERCENT.fullmatch(given) if isinstance(given, str) else None
    change = abs(original) * float(share[1]) / 100 if share else float(given)
    if share and original == 0 and float(share[1]) != 0:
        raise RecipeError(
            f"gate: {gate.metric}", f"{given} of the original's 0", "a number in the metric's unit"
        )
    amount = float(share[1]) if share else change
    shown = f"{show(abs(amount))} %" if share else show(abs(amount))
    return (
        original + sign * change,
        f" (original {show(original)} {'+' if sign * amount >= 0 else '−'} {shown})",
    )


def show(value: float, digits: int = 3) -> str:
    """A number for people: `digits` significant ones, thousands in full."""
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return f"{value:.{digits}g}"


def _distinct(value: float, limit: float) -> tuple[str, str]:
    """Both numbers with so many digits that they differ where they do."""
    pairs = ((show(value, digits), show(limit, digits)) for digits in range(3, 16))
    return next((pair for pair in pairs if pair[0] != pair[1] or value == limit), (repr(value), repr(limit)))
