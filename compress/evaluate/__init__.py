"""Measuring a checkpoint or an artifact beside the original, and holding it to gates.

One protocol, `Scorer`, is satisfied by torch (torch_scorer.py) and by an artifact's client
(tersor.export.client), so that one evaluator serves both and what ships is what was measured.

Read: scorer.py (the protocol) → metrics.py (what is measured, one function a metric) → reductions.py
(what is no mean over samples) → score.py (`evaluate`)
→ gate.py.
"""

from .gate import Gate, Verdict, judge
from .latency import by_tokens, latency
from .metrics import ALWAYS, METRICS, Metric, check_metrics
from .reductions import Reduction
from .score import Score, evaluate
from .scorer import OUTPUTS, Output, Scorer, output_of

__all__ = [
    "ALWAYS",
    "METRICS",
    "OUTPUTS",
    "Gate",
    "Metric",
    "Output",
    "Reduction",
    "Score",
    "Scorer",
    "Verdict",
    "by_tokens",
    "check_metrics",
    "evaluate",
    "judge",
    "latency",
    "output_of",
]
