"""A client: sequences in any order in, answers in that order out.

It cuts the sequences into calls of about `tokens_per_call` tokens, lays each call out as the artifact wants it
(segments side by side in one row, or one sequence a row), runs ONNX Runtime, and puts every answer where its sequence
came from. It holds no state between calls, and ONNX Runtime's session is thread-safe: one client serves many threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.evaluate import OUTPUTS, Output
from tersor.compress.packing import pack

from .artifact import Artifact
from .rows import check


class Client:
    """Runs an artifact; satisfies `Scorer`.

    Args:
        directory: an artifact.
        threads: intra-op threads of ONNX Runtime; None lets it take one a core.
        tokens_per_call: upper bound of tokens in a call; a longer sequence has a call of its own.

    Raises:
        PreflightError: the directory is no whole artifact.
    """

    def __init__(self, directory: Path | str, threads: int | None = None, tokens_per_call: int = 1024):
        import onnxruntime

        if tokens_per_call < 1:
            raise RecipeError("tokens_per_call", str(tokens_per_call), "at least 1")
        self.artifact = Artifact.open(Path(directory))
        self.tokens_per_call = tokens_per_call
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            self.session = onnxruntime.InferenceSession(
                str(self.artifact.model_path), options, providers=["CPUExecutionProvider"]
            )
        except (
            Exception
        ) as error:  # ORT raises its own types for one cause: the file is not a model it can run
            reason = str(error).splitlines()[0][:200]
            raise PreflightError(
                str(self.artifact.model_path), f"a graph that does not load: {reason}", "a whole file"
            ) from error
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.output: Output = OUTPUTS[str(self.artifact.manifest["task"])]
        self.parameters = int(self.artifact.manifest.get("parameters", 0))
        self.bytes = self.artifact.bytes
        self._tokenizer: Any = None

    def __call__(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Answer token sequences (int `[n_i]`): float32 logits `[n_i, vocab]`, an embedding `[hidden]`, classes
        `[labels]` or `[n_i, labels]` each.

        Raises:
            RecipeError: a sequence is empty or too long, or an id lies outside the vocabulary; says which.
        """
        return self.ask(sequences, self._main)

    @property
    def _main(self) -> str:
        return "sentence_embedding" if self.output == "embedding" else "logits"

    def stream(self, sequences: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Answer an endless supply, in its order, a call at a time: nothing is read before its call is due, so a slow
        consumer holds the supply back.

        Raises:
            RecipeError: as when calling the client; sequences are numbered from the start.
        """
        held: list[np.ndarray] = []
        used = 0
        for number, sequence in enumerate(sequences):
            ids = self.checked(sequence, number)
            if held and used + len(ids) > self.tokens_per_call:
                yield from self(held)
                held, used = [], 0
            held.append(ids)
            used += len(ids)
        if held:
            yield from self(held)

    def ask(self, sequences: Sequence[np.ndarray], output: str) -> list[np.ndarray]:
        """Like calling the client, for the output of this name (`last_hidden_state`: `[n_i, hidden]`)."""
        ids = [self.checked(s, number) for number, s in enumerate(sequences)]
        answers: list[np.ndarray | None] = [None] * len(ids)
        for rows in self.plan([len(i) for i in ids]):
            flat = [number for row in rows for number in row]
            for number, answer in zip(flat, self.run(rows, ids, [output])[output], strict=True):
                answers[number] = answer
        return [a for a in answers if a is not None]

    def rows(self, ids: np.ndarray, segments: np.ndarray) -> list[np.ndarray]:
        """Answer rows that the caller packed: one answer a segment, row by row.

        Args:
            ids: whole numbers `[rows, width]`.
            segments: 0 at padding, 1, 2, … by segment, rising along a row.

        Raises:
            RecipeError: see `rows.check`; says row and segment.
        """
        spans = check(ids, segments, self.artifact.vocab, self.artifact.max_length)
        return self([ids[row, start:end] for row, start, end in spans])

    def texts(self, texts: Sequence[str], truncate: bool = False) -> list[np.ndarray]:
        """Answer texts by the artifact's own tokenizer, special tokens included.

        Args:
            texts: any number, in any order.
            truncate: cut texts that are too long instead of refusing them.
        """
        return self(self.tokenize(texts, truncate))

    def tokenize(self, texts: Sequence[str], truncate: bool = False) -> list[np.ndarray]:
        """Token ids, int64 `[n_i]`, of texts.

        Raises:
            PreflightError: the artifact carries no tokenizer.json.
        """
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            path = self.artifact.directory / "tokenizer.json"
            if not path.is_file():
                raise PreflightError(
                    str(path), "no such file", "a tokenizer", "Pass token ids instead of texts."
                )
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._tokenizer = tokenizer
        limit = self.artifact.max_length
        encoded = self._tokenizer.encode_batch(list(texts))
        if truncate and limit is not None:
            for encoding in encoded:
                encoding.truncate(limit)
        return [np.asarray(e.ids, np.int64) for e in encoded]

    def checked(self, sequence: np.ndarray | Sequence[int], number: int) -> np.ndarray:
        """The sequence as int64 `[n]`, or a refusal that names it."""
        ids, place = np.asarray(sequence), f"sequence {number}"
        if ids.size == 0:
            raise RecipeError(place, "no tokens", "at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RecipeError(place, f"{ids.dtype} of shape {ids.shape}", "whole numbers in one dimension")
        limit = self.artifact.max_length
        if limit is not None and len(ids) > limit:
            raise RecipeError(place, f"{len(ids)} tokens", f"at most {limit}", "Cut it, or split it.")
        if int(ids.min()) < 0 or int(ids.max()) >= self.artifact.vocab:
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise RecipeError(place, f"token id {wrong}", f"ids from 0 to {self.artifact.vocab - 1}")
        return ids.astype(np.int64)

    def plan(self, lengths: Sequence[int]) -> Iterator[list[list[int]]]:
        """Calls as lists of rows, each row a list of sequence numbers; every number once.

        Packed: one row a call, in arrival order; a row is as long as its sequences, so nothing is padded, and the graph
        does not care how they lie. Static: best-fit rows. Padded: one a row, in arrival order.
        """
        static = self.artifact.static
        if static is not None:
            rows = pack(lengths, static[1])
            yield from (rows[i : i + static[0]] for i in range(0, len(rows), static[0]))
            return
        call: list[int] = []
        used = 0
        for number, length in enumerate(lengths):
            if call and used + length > self.tokens_per_call:
                yield [call] if self.artifact.packed else [[n] for n in call]
                call, used = [], 0
            call.append(number)
            used += length
        if call:
            yield [call] if self.artifact.packed else [[n] for n in call]

    def feed(
        self, rows: Sequence[Sequence[int]], ids: Sequence[np.ndarray]
    ) -> tuple[dict[str, np.ndarray], list[tuple[int, int, int, int]]]:
        """Inputs of one call, and where each sequence lies: (row, place in the row, start, end)."""
        height, width = self.artifact.static or (
            len(rows),
            max(sum(len(ids[n]) for n in row) for row in rows),
        )
        tokens = np.zeros((height, width), np.int64)
        segments = np.zeros_like(tokens)
        spans = []
        for r, row in enumerate(rows):
            start = 0
            for k, number in enumerate(row):
                end = start + len(ids[number])
                tokens[r, start:end], segments[r, start:end] = ids[number], k + 1
                spans.append((r, k, start, end))
                start = end
        made = {"input_ids": tokens, "attention_mask": segments, "token_type_ids": np.zeros_like(tokens)}
        return {name: made[name] for name in self.artifact.inputs}, spans

    def run(
        self, rows: Sequence[Sequence[int]], ids: Sequence[np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, list[np.ndarray]]:
        """`rows` of sequence numbers, `ids` by number. Answers by output name, in the rows' order."""
        names = list(outputs or self.outputs)
        answers: dict[str, list[np.ndarray]] = {name: [] for name in names}
        static = self.artifact.static
        height = static[0] if static is not None else len(rows)
        for first in range(0, len(rows), height):
            feed, spans = self.feed(rows[first : first + height], ids)
            for name, result in zip(names, self.session.run(names, feed), strict=True):
                if not self.artifact.per_sequence(name):
                    answers[name] += [result[r, start:end] for r, _, start, end in spans]
                elif static is not None:
                    answers[name] += [result[r, k] for r, k, _, _ in spans]
                else:
                    answers[name] += list(result)
        return answers
