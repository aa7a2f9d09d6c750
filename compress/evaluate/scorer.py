"""The protocol that torch and ONNX Runtime both satisfy: token sequences or images in, rows of numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from ..tokens import Input

Output = Literal["logits", "embedding", "token_logits", "classes", "number", "token_classes"]

OUTPUTS: dict[str, Output] = {
    "text-generation": "logits",
    "feature-extraction": "embedding",
    "fill-mask": "token_logits",
    "text-classification": "classes",
    "token-classification": "token_classes",
    "image-classification": "classes",
}
"""What a model of a task answers, by optimum's task name: the tasks that can be measured."""


def output_of(task: str, labels: int) -> Output:
    """What a model of a task with so many labels answers: a classifier with one label gives a number, as
    cross-encoders for search and similarity do.
    """
    return "number" if task == "text-classification" and labels == 1 else OUTPUTS[task]


class Scorer(Protocol):
    """Something that runs a model on token sequences or images.

    Attributes:
        output: what a call returns for each sequence.
        parameters: real parameters of the model, each storage once.
        bytes: size of the weights (checkpoint) or of the files (artifact).
    """

    output: Output
    parameters: int
    bytes: int

    def __call__(self, sequences: Sequence[Input]) -> list[np.ndarray]:
        """Score sequences (token ids, int64 `[n_i]` each, or `Tokens` with types) or images (float32
        `[channels, height, width]`) in any order.

        Returns:
            in the order given, float32: `logits` (of the next token) or `token_logits` (of the token itself)
            `[n_i, vocab]`, an `embedding` `[hidden]`, `classes` `[labels]`, a `number` `[1]` or `token_classes`
            `[n_i, labels]`, before any softmax or sigmoid.
        """
        ...
