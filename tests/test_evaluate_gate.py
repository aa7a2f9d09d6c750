"""Gates at, under and over a limit, in numbers and in percent; gates that could never catch a loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tersor.compress.errors import RecipeError
from tersor.compress.evaluate import Gate, Verdict, judge

ORIGINAL = {"perplexity": 9.18, "kl": 0.0, "top1": 0.5, "bytes": 1000.0, "latency_ms": 20.0}


def verdict(gate: Gate, value: float) -> Verdict:
    return judge(gate, {gate.metric: value}, ORIGINAL)


@pytest.mark.parametrize(
    ("gate", "limit", "worse"),
    [
        (Gate("perplexity", max=10), 10.0, 1),
        (Gate("perplexity", max_increase=0.5), 9.68, 1),
        (Gate("perplexity", max_increase="5%"), 9.18 * 1.05, 1),
        (Gate("perplexity", max_increase=" 5 % "), 9.18 * 1.05, 1),
        (Gate("perplexity", max_increase=0), 9.18, 1),
        (Gate("kl", max_increase=0.1), 0.1, 1),
        (Gate("bytes", max_increase="-25%"), 750.0, 1),
        (Gate("latency_ms", max_increase=-5), 15.0, 1),
        (Gate("top1", min=0.9), 0.9, -1),
        (Gate("top1", max_drop=0.1), 0.4, -1),
        (Gate("top1", max_drop="10%"), 0.45, -1),
        (Gate("top1", max_drop=-0.2), 0.7, -1),
    ],
)
def test_at_the_limit_passes_and_past_it_misses(gate: Gate, limit: float, worse: int) -> None:
    found = verdict(gate, limit)
    assert found.limit == pytest.approx(limit, abs=1e-12)
    assert verdict(gate, found.limit).passed
    assert verdict(gate, found.limit - worse * 1e-6).passed
    assert not verdict(gate, found.limit + worse * 1e-6).passed


def test_a_round_share_of_a_round_number_is_exact() -> None:
    for percent in range(1, 100):
        found = judge(Gate("bytes", max_increase=f"{percent}%"), {"bytes": 100 + percent}, {"bytes": 100})
        assert found.passed
        assert found.limit == 100 + percent


def test_the_verdict_reads_for_people() -> None:
    assert verdict(Gate("perplexity", max_increase="5%"), 9.91).text == (
        "perplexity 9.91 is over 9.64 (original 9.18 + 5 %)"
    )
    assert verdict(Gate("perplexity", max_increase="5%"), 9.5).text == (
        "perplexity 9.5 is within 9.64 (original 9.18 + 5 %)"
    )
    assert verdict(Gate("top1", max_drop=0.125), 0.3).text == "top1 0.3 is under 0.375 (original 0.5 − 0.125)"
    assert verdict(Gate("top1", min=0.25), 0.3).text == "top1 0.3 is at least 0.25"
    assert verdict(Gate("bytes", max=1234567), 9_876_543).text == "bytes 9,876,543 is over 1,234,567"
    assert (
        verdict(Gate("bytes", max_increase="-25%"), 700).text
        == "bytes 700 is within 750 (original 1,000 − 25 %)"
    )


def test_numbers_that_differ_are_shown_apart() -> None:
    assert verdict(Gate("perplexity", max=9.64), 9.6401).text == "perplexity 9.6401 is over 9.64"
    assert verdict(Gate("perplexity", max=9.64), math.nextafter(9.64, 10)).text.startswith(
        "perplexity 9.640000000000002 is over 9.64"
    )


@given(st.floats(0.1, 1e6), st.floats(0.1, 1e6), st.integers(0, 200))
def test_a_share_is_the_number_it_stands_for(value: float, original: float, percent: int) -> None:
    share = judge(
        Gate("perplexity", max_increase=f"{percent}%"), {"perplexity": value}, {"perplexity": original}
    )
    number = judge(
        Gate("perplexity", max_increase=original * percent / 100),
        {"perplexity": value},
        {"perplexity": original},
    )
    assert (share.limit, share.passed) == (number.limit, number.passed)


@pytest.mark.parametrize(
    "gate", [Gate("perplexity", max=10), Gate("top1", min=0.1), Gate("top1", max_drop=1)]
)
def test_nan_misses_every_gate(gate: Gate) -> None:
    assert not verdict(gate, math.nan).passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "perplexity"}, "exactly one of max, max_increase, min, max_drop, not none"),
        ({"metric": "perplexity", "max": 9, "max_increase": 1}, "not max and max_increase"),
        ({"metric": "perplexty", "max": 9}, r"Did you mean perplexity\?"),
        ({"metric": "perplexity", "max_increase": "8"}, "neither a number nor a share"),
        ({"metric": "perplexity", "max_increase": "8%%"}, "neither a number nor a share"),
        ({"metric": "perplexity", "max": math.inf}, "no finite number"),
        ({"metric": "perplexity", "max": "8%"}, "valid number"),
        ({"metric": "perplexity", "max": True}, "valid number"),
        (
            {"metric": "perplexity", "max_drop": 1},
            "could never catch a loss: lower is better. Use max or max_increase",
        ),
        ({"metric": "perplexity", "min": 1}, "could never catch a loss"),
        (
            {"metric": "top1", "max_increase": "5%"},
            "could never catch a loss: higher is better. Use min or max_drop",
        ),
        ({"metric": "bytes", "max_drop": "5%"}, "could never catch a loss"),
        ({"metric": "perplexity", "max_increse": "5%"}, "max_increse"),
    ],
)
def test_a_gate_refuses_what_it_cannot_mean(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Gate(**options)


def test_a_gate_on_what_was_not_measured_is_an_error() -> None:
    with pytest.raises(
        RecipeError, match="gate: kl: found a metric that was not measured, expected one of perplexity"
    ):
        judge(Gate("kl", max=1), {"perplexity": 9.0}, {"perplexity": 9.0})
    with pytest.raises(RecipeError, match="no value of the original for max_increase"):
        judge(Gate("kl", max_increase=1), {"kl": 0.5}, {})
    assert judge(Gate("kl", max=1), {"kl": 0.5}, {}).original is None


def test_a_share_of_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="5% of the original's 0, expected a number in the metric's unit"):
        judge(Gate("kl", max_increase="5%"), {"kl": 0.5}, ORIGINAL)


def test_a_gate_is_read_from_json_and_can_be_a_key() -> None:
    gate = TypeAdapter(Gate).validate_json('{"metric": "perplexity", "max_increase": "8%"}')
    assert gate == Gate("perplexity", max_increase="8%")
    assert {gate: 1}[Gate("perplexity", max_increase="8%")] == 1
