"""The protocol that torch and ONNX Runtime both satisfy: token sequences in, logits or embeddings out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

Output = Literal["logits", "embedding"]

OUTPUTS: dict[str, Output] = {"text-generation": "logits", "feature-extraction": "embedding"}
"""What a model of a task answers, by optimum's task name: the tasks that can be measured."""


class Scorer(Protocol):
    """Something that runs a model on token sequences.

    Attributes:
        output: what a call returns for each sequence.
        parameters: real parameters of the model, each storage once.
        bytes: size of the weights (checkpoint) or of the files (artifact).
    """

    output: Output
    parameters: int
    bytes: int

    def __call__(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Score sequences (int64 `[n_i]` token ids each) in any order.

        Returns:
            in the order given, float32: logits `[n_i, vocab]`, or an embedding `[hidden]`.
        """
        ...
