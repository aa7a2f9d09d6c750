"""Latency: wall time of one call, the median of several, all scorers interleaved in one run.

Interleaving makes a slow minute of the machine hit everyone alike, so that ratios hold where single numbers
drift.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

from ..data import Sample
from .scorer import Scorer

CALLS = (1, 8, 128, 512)
"""Tokens of the calls that are timed by size."""


def latency(
    scorers: Mapping[str, Scorer], samples: Sequence[Sample], threads: int, repeats: int = 9
) -> dict[str, float]:
    """Milliseconds that one call on all the samples takes, by name of the scorer; the median of `repeats`.

    Args:
        scorers: what is timed; one that states `threads` must state these.
        samples: of one call, the same for all.
        threads: intra-op threads. Set for torch during the measurement; others were opened with them.
        repeats: timed calls a scorer, after one that is not timed.

    Raises:
        ValueError: a scorer was opened with other threads, so a comparison would mean nothing.
    """
    for name, scorer in scorers.items():
        own = getattr(scorer, "threads", None)
        if own not in (None, threads):
            raise ValueError(f"{name} runs on {own} threads, the measurement on {threads}")
    asked = [sample.input for sample in samples]
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    with _threads(threads):
        for scorer in scorers.values():
            scorer(asked)
        names = list(scorers)
        for turn in range(repeats):
            shift = turn % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                start = time.perf_counter()
                scorers[name](asked)
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) * 1e3 for name, times in seconds.items()}


def by_tokens(scorers: Mapping[str, Scorer], samples: Sequence[Sample], threads: int) -> list[dict[str, Any]]:
    """`tokens` of a call and `milliseconds` by name for each of `CALLS` that the samples hold; none for images.

    What pays in large calls may cost in small ones.
    """
    if samples[0].ids.ndim != 1:
        return []
    held = sum(len(sample.ids) for sample in samples)
    calls = {tokens: of_tokens(samples, tokens) for tokens in CALLS if tokens <= held}
    return [{"tokens": n, "milliseconds": latency(scorers, call, threads)} for n, call in calls.items()]


def of_tokens(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first samples of a text that have `count` tokens together, the last one cut; fewer if there are no more."""
    found: list[Sample] = []
    for sample in samples:
        left = count - sum(len(taken.ids) for taken in found)
        if left <= 0:
            break
        types = None if sample.types is None else sample.types[:left]
        found.append(Sample(ids=sample.ids[:left], bytes=0, text="", types=types))
    return found


def _threads(threads: int) -> AbstractContextManager[None]:
    if "torch" not in sys.modules:
        return nullcontext()
    from .torch_scorer import torch_threads

    return torch_threads(threads)
