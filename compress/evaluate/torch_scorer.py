"""A checkpoint as a scorer: torch, float32 arithmetic on the weights as stored.

Sequences are sorted by length and run in right-padded batches under a token budget, so that little is
computed for padding; answers come back in the order given. Right padding with a mask leaves real tokens
alone: causal attention never looks at it, encoders mask it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import RecipeError
from .pooling import Pooling
from .scorer import OUTPUTS, Output

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

TOKENS = 1024  # of a batch, padding included: 512 to 1024 ran fastest a token on a 5M decoder and on MiniLM


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run with this many intra-op threads (None: leave them) and restore what was."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of sequences in batches, longest first, at most `tokens` each with padding, or one sequence."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    found: list[list[int]] = []
    for index in order:
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def positions(checkpoint: Checkpoint) -> int | None:
    """The longest sequence that the model has positions for, None if the config sets no limit."""
    return checkpoint.layout.longest


class TorchScorer:
    """Satisfies `Scorer`.

    Attributes:
        output: logits for `text-generation`, embedding for `feature-extraction`.
        parameters: real parameters, each storage once.
        bytes: of the stored weights.
        threads: intra-op threads during a call, None for torch's own setting.
        pooling: how token vectors become an embedding.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None):
        task = checkpoint.layout.task
        if task not in OUTPUTS:
            raise RecipeError("task", repr(task), f"one that can be measured: {', '.join(sorted(OUTPUTS))}")
        self.output: Output = OUTPUTS[task]
        self.parameters = checkpoint.layout.parameters
        self.bytes = checkpoint.layout.bytes
        self.threads = threads
        self.pooling = Pooling.of(checkpoint.side_files)
        self._model = checkpoint.model(torch.float32)
        if self._model.main_input_name != "input_ids":
            raise RecipeError(
                "model", f"one that reads {self._model.main_input_name}", "a model of text to measure"
            )
        self._limit = positions(checkpoint)
        self._vocabulary = int(checkpoint.config.vocab_size)

    def __call__(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As `Scorer` says.

        Raises:
            RecipeError: a sequence is empty, longer than the model's positions, or of another vocabulary.
        """
        lengths = [len(sequence) for sequence in sequences]
        if lengths and min(lengths) == 0:
            raise RecipeError("data", "a sequence without tokens", "at least one token")
        if self._limit and max(lengths, default=0) > self._limit:
            raise RecipeError(
                "data: length", str(max(lengths)), f"at most {self._limit}, the model's positions"
            )
        largest = max((int(sequence.max()) for sequence in sequences), default=0)
        if largest >= self._vocabulary:
            raise RecipeError(
                "data",
                f"token {largest}",
                f"ids below {self._vocabulary}",
                "The tokenizer is of another model.",
            )
        answers: list[np.ndarray | None] = [None] * len(sequences)
        with torch_threads(self.threads), torch.inference_mode():
            for batch in batches(lengths, TOKENS):
                for index, answer in zip(batch, self._batch([sequences[i] for i in batch]), strict=True):
                    answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def _batch(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        width = max(map(len, sequences))
        ids, mask = (torch.zeros((len(sequences), width), dtype=torch.int64) for _ in range(2))
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
        if self.output == "logits":
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            return [logits[row, : len(sequence)].numpy().copy() for row, sequence in enumerate(sequences)]
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        return list(self.pooling.pool(hidden, mask).float().numpy().copy())
