"""What is measured when nobody names a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data import Sample

DEFAULT_METRICS = {
    "logits": ("perplexity", "bits_per_byte", "kl", "top1"),
    "embedding": ("cosine",),
    "token_logits": ("masked_loss", "kl", "top1"),
    "classes": ("kl", "top1"),
    "number": ("kl",),
    "token_classes": ("kl", "top1"),
}
"""What is measured when the recipe names no metric, by what the model answers."""
LABELLED_METRICS = {
    "classes": ("accuracy", "macro_f1"),
    "number": ("spearman", "pearson"),
    "embedding": ("spearman", "pearson"),
    "token_classes": ("token_accuracy",),
}
"""What is measured besides when the data brings labels."""


def default_metrics(output: str, samples: Sequence[Sample]) -> tuple[str, ...]:
    """What is measured when nobody names a metric: the usual ones, and those that read what the samples bring."""
    if not samples:
        return ()
    tagged = output == "token_classes" and samples[0].targets is not None and samples[0].targets.max() >= 0
    labelled = samples[0].label is not None or tagged
    if output == "logits" and labelled:  # choices: a mean over right and wrong answers would say nothing
        return ("choice_accuracy", "choice_accuracy_per_byte", "kl", "top1")
    return DEFAULT_METRICS[output] + (LABELLED_METRICS.get(output, ()) if labelled else ())
