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
from tersor.compress.evaluate import Output, output_of
from tersor.compress.evaluate.tree import Tree, trees
from tersor.compress.packing import pack
from tersor.compress.tokens import Input, Tokens

from .artifact import Artifact
from .rows import check, checked

Text = str | tuple[str, str]


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
        width = int(self.artifact.manifest["outputs"][0]["shape"][-1])
        self.output: Output = output_of(str(self.artifact.manifest["task"]), width)
        self.parameters = int(self.artifact.manifest.get("parameters", 0))
        self.bytes = self.artifact.bytes
        self._tokenizers: dict[bool, Any] = {}

    def __call__(self, sequences: Sequence[Input]) -> list[np.ndarray]:
        """Answer token sequences (int `[n_i]`, or `Tokens` with types): float32 logits `[n_i, vocab]`, an embedding
        `[hidden]`, classes `[labels]` or `[n_i, labels]` each.

        Raises:
            RecipeError: a sequence is empty or too long, an id lies outside the vocabulary, or a token type is none of
                the model's; says which.
        """
        return self.ask(sequences, self._main)

    @property
    def _main(self) -> str:
        return "sentence_embedding" if self.output == "embedding" else "logits"

    def stream(self, sequences: Iterable[Input]) -> Iterator[np.ndarray]:
        """Answer an endless supply, in its order, a call at a time: nothing is read before its call is due, so a slow
        consumer holds the supply back.

        Raises:
            RecipeError: as when calling the client; sequences are numbered from the start.
        """
        held: list[Tokens] = []
        used = 0
        for number, sequence in enumerate(sequences):
            tokens = checked(sequence, self.artifact, f"sequence {number}")
            if held and used + len(tokens) > self.tokens_per_call:
                yield from self(held)
                held, used = [], 0
            held.append(tokens)
            used += len(tokens)
        if held:
            yield from self(held)

    def ask(self, sequences: Sequence[Input], output: str) -> list[np.ndarray]:
        """Like calling the client, for the output of this name (`last_hidden_state`: `[n_i, hidden]`)."""
        tokens = [checked(s, self.artifact, f"sequence {number}") for number, s in enumerate(sequences)]
        if self.artifact.trees:
            shared = trees([one.ids for one in tokens])
            answers = zip(shared, self._each(shared, output), strict=True)
            return [one for tree, answer in answers for one in tree.split(answer)]
        return self._each(tokens, output)

    def _each(self, items: Sequence[Tokens | Tree], output: str) -> list[np.ndarray]:
        answers: dict[int, np.ndarray] = {}
        for rows in self.plan(list(map(len, items))):
            flat = [number for row in rows for number in row]
            answers.update(zip(flat, self.run(rows, items, [output])[output], strict=True))
        return [answers[number] for number in range(len(items))]

    def rows(self, ids: np.ndarray, segments: np.ndarray, types: np.ndarray | None = None) -> list[np.ndarray]:
        """Answer rows that the caller packed: one answer a segment, row by row.

        Args:
            ids: whole numbers `[rows, width]`.
            segments: 0 at padding, 1, 2, … by segment, rising along a row.
            types: of the tokens, `[rows, width]`; 0 everywhere if None.

        Raises:
            RecipeError: see `rows.check`; says row and segment.
        """
        spans = check(ids, segments, self.artifact.vocab, self.artifact.max_length, types, self.artifact.token_types)
        lines = [Tokens(row, None if types is None else types[r]) for r, row in enumerate(ids)]
        return self([lines[row][start:end] for row, start, end in spans])

    def texts(self, texts: Sequence[Text], truncate: bool = False) -> list[np.ndarray]:
        """Answer texts by the artifact's own tokenizer, special tokens included.

        Args:
            texts: any number, in any order; a pair of texts is one sequence, as a cross-encoder reads it.
            truncate: cut texts that are too long instead of refusing them; of a pair the longer one first.
        """
        return self(self.tokenize(texts, truncate))

    def tokenize(self, texts: Sequence[Text], truncate: bool = False) -> list[Tokens]:
        """Tokens of texts or pairs.

        Raises:
            PreflightError: the artifact carries no tokenizer.json.
        """
        if truncate not in self._tokenizers:
            from tokenizers import Tokenizer

            path = self.artifact.directory / "tokenizer.json"
            if not path.is_file():
                raise PreflightError(
                    str(path), "no such file", "a tokenizer", "Pass token ids instead of texts."
                )
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()
            if truncate and self.artifact.max_length is not None:
                tokenizer.enable_truncation(self.artifact.max_length)
            tokenizer.no_padding()
            self._tokenizers[truncate] = tokenizer
        encoded = self._tokenizers[truncate].encode_batch(list(texts))
        typed = self.artifact.token_types > 1
        return [Tokens(np.array(e.ids, np.int64), np.array(e.type_ids, np.int64) if typed else None) for e in encoded]

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
        self, rows: Sequence[Sequence[int]], sequences: Sequence[Input | Tree]
    ) -> tuple[dict[str, np.ndarray], list[tuple[int, int, int, int]]]:
        """Inputs of one call, and where each sequence lies: (row, place in the row, start, end)."""
        height, width = self.artifact.static or (
            len(rows),
            max(sum(len(sequences[n]) for n in row) for row in rows),
        )
        ids, segments, types = (np.zeros((height, width), np.int64) for _ in range(3))
        spans = []
        for r, row in enumerate(rows):
            start, last = 0, 0
            for k, number in enumerate(row):
                one = sequences[number]
                end = start + len(one)
                if isinstance(one, Tree):
                    ids[r, start:end], segments[r, start:end] = one.ids, one.numbers(last + 1)
                else:
                    tokens = Tokens.of(one)
                    ids[r, start:end], segments[r, start:end] = tokens.ids, last + 1
                    types[r, start:end] = 0 if tokens.types is None else tokens.types
                last = abs(int(segments[r, end - 1]))
                spans.append((r, k, start, end))
                start = end
        made = {"input_ids": ids, "attention_mask": segments, "token_type_ids": types}
        return {name: made[name] for name in self.artifact.inputs}, spans

    def run(
        self, rows: Sequence[Sequence[int]], sequences: Sequence[Input | Tree], outputs: Sequence[str] | None = None
    ) -> dict[str, list[np.ndarray]]:
        """`rows` of sequence numbers, `sequences` by number. Answers by output name, in the rows' order."""
        names = list(outputs or self.outputs)
        answers: dict[str, list[np.ndarray]] = {name: [] for name in names}
        static = self.artifact.static
        height = static[0] if static is not None else len(rows)
        for first in range(0, len(rows), height):
            feed, spans = self.feed(rows[first : first + height], sequences)
            for name, result in zip(names, self.session.run(names, feed), strict=True):
                if not self.artifact.per_sequence(name):
                    answers[name] += [result[r, start:end] for r, _, start, end in spans]
                elif static is not None:
                    answers[name] += [result[r, k] for r, k, _, _ in spans]
                else:
                    answers[name] += list(result)
        return answers
