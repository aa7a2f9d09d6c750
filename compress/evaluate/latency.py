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

from ..data import Sample
from .scorer import Scorer


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


def _threads(threads: int) -> AbstractContextManager[None]:
    if "torch" not in sys.modules:
        return nullcontext()
    from .torch_scorer import torch_threads

    return torch_threads(threads)
