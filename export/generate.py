"""A client that continues text with an artifact of `onnx-decoder`, a token or a piece of text at a time.

    generator = Generator("runs/x/onnx")
    for piece in generator.stream("def main(", max_new_tokens=64):
        print(piece, end="", flush=True)

The cache stays inside ONNX Runtime. Where the graph's attention takes it, one buffer as long as the whole answer is
bound as past and as present, and a step writes one column; else each step's present is the next one's past, unseen by
numpy. It also satisfies `Scorer`, by prefill alone, so that a gate judges the artifact that generates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.evaluate import Output
from tersor.compress.tokens import Input

from .artifact import Artifact
from .rows import checked

TOKENS = 1024
"""Of a scoring call, padding included."""
UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not yet a character."""


class Generator:
    """Continues one prompt at a time; satisfies `Scorer`. One thread at a time a call; calls share nothing.

    Args:
        directory: an artifact of `onnx-decoder`.
        threads: intra-op threads of ONNX Runtime; None lets it take one a core.

    Raises:
        PreflightError: the directory is no whole artifact, or has no cache.
    """

    def __init__(self, directory: Path | str, threads: int | None = None):
        import onnxruntime

        self.artifact = Artifact.open(Path(directory))
        cache = self.artifact.manifest.get("cache")
        if cache is None:
            raise PreflightError(str(directory), "an artifact without a cache", "one that onnx-decoder wrote")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        try:
            self.session = onnxruntime.InferenceSession(
                str(self.artifact.model_path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ORT raises its own types for one cause: the file is not a model it can run
            reason = str(error).splitlines()[0][:200]
            raise PreflightError(
                str(self.artifact.model_path), f"a graph that does not load: {reason}", "a whole file"
            ) from error
        self.output: Output = "logits"
        self.parameters = int(self.artifact.manifest.get("parameters", 0))
        self.bytes = self.artifact.bytes
        self.heads, self.size, self.shared = int(cache["kv_heads"]), int(cache["head_dim"]), bool(cache["in_place"])
        names = [o.name for o in self.session.get_outputs()]
        self.present = [n for n in names if n.startswith("present.")]
        self.past = [n.replace("present.", "past_key_values.", 1) for n in self.present]
        self.ends = _ends(self.artifact.directory)
        self._tokenizer: Any = None

    def empty(self, batch: int = 1, length: int = 0) -> dict[str, np.ndarray]:
        """A cache of zeros, by input name, `[batch, kv_heads, length, head_dim]` each."""
        return {name: np.zeros((batch, self.heads, length, self.size), np.float32) for name in self.past}

    def __call__(self, sequences: Sequence[Input]) -> list[np.ndarray]:
        """Logits `[n_i, vocab]`, float32, of token sequences (int `[n_i]`), in the order given.

        Raises:
            RecipeError: a sequence is empty or too long, or an id lies outside the vocabulary.
        """
        from tersor.compress.evaluate.torch_scorer import batches

        ids = [checked(s, self.artifact, f"sequence {i}").ids for i, s in enumerate(sequences)]
        answers: dict[int, np.ndarray] = {}
        for batch in batches([len(i) for i in ids], TOKENS):
            width = max(len(ids[i]) for i in batch)
            mask = np.array([[column < len(ids[i]) for column in range(width)] for i in batch], np.int64)
            tokens = np.zeros_like(mask)
            tokens[mask > 0] = np.concatenate([ids[i] for i in batch])
            feed = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions(mask)}
            (logits,) = self.session.run(["logits"], {**feed, **self.empty(len(batch))})
            answers.update({i: logits[row, : len(ids[i])] for row, i in enumerate(batch)})
        return [answers[i] for i in range(len(ids))]

    def tokens(
        self,
        prompt: Sequence[int] | np.ndarray,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """New token ids after a prompt of ids, up to and without an end token.

        Args:
            prompt: int `[n]`, at least one.
            max_new_tokens: at most so many.
            temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
            top_p: draw from the fewest tokens that hold this share of the probability.
            seed: of the draw.

        Raises:
            RecipeError: an argument out of range, or prompt and answer together exceed the model's positions.
        """
        ids = checked(np.asarray(prompt), self.artifact, "prompt").ids
        limit = self.artifact.max_length
        for name, value, holds, wanted in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("temperature", temperature, temperature >= 0, "0 or more"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ):
            if not holds:
                raise RecipeError(name, str(value), wanted)
        if limit is not None and len(ids) + max_new_tokens > limit:
            found = f"{len(ids)} tokens and {max_new_tokens} new ones"
            raise RecipeError("prompt", found, f"at most {limit} together", "Ask for fewer.")
        return self._tokens(ids, max_new_tokens, temperature, top_p, np.random.default_rng(seed))

    def _tokens(
        self, ids: np.ndarray, count: int, temperature: float, top_p: float, draw: np.random.Generator
    ) -> Iterator[int]:
        steps = (_Shared if self.shared else _Growing)(self, len(ids) + count)
        new = ids
        for _ in range(count):
            token = choose(steps(new), temperature, top_p, draw)
            if token in self.ends:
                return
            yield token
            new = np.array([token])

    def stream(self, prompt: str, max_new_tokens: int = 64, stop: Sequence[str] = (), **sampling: Any) -> Iterator[str]:
        """The continuation of a text, in pieces as they come.

        Args:
            prompt: any text.
            max_new_tokens: at most so many tokens.
            stop: end before the first of these strings.
            sampling: temperature, top_p, seed, as in `tokens`.
        """
        return self._pieces(self.tokens(self.tokenize(prompt), max_new_tokens, **sampling), tuple(stop))

    def _pieces(self, tokens: Iterable[int], stop: tuple[str, ...]) -> Iterator[str]:
        seen: list[int] = []
        sent, text = 0, ""
        for token in tokens:
            seen.append(token)
            text = self._decode(seen)
            ends = [at for at in (text.find(s) for s in stop) if at >= 0]
            if ends:
                yield text[sent : min(ends)]
                return
            safe = len(text.rstrip(UNFINISHED)) - _opening(text, stop)
            if safe > sent:
                yield text[sent:safe]
                sent = safe
        if len(text) > sent:
            yield text[sent:]

    def generate(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> str | np.ndarray:
        """The whole continuation: text after a text, token ids (int64) after ids. Arguments as in `stream`."""
        if isinstance(prompt, str):
            return "".join(self.stream(prompt, max_new_tokens, stop, **sampling))
        if stop:
            raise RecipeError("stop", "strings with a prompt of ids", "a prompt of text")
        return np.array(list(self.tokens(prompt, max_new_tokens, **sampling)), np.int64)

    def tokenize(self, text: str) -> np.ndarray:
        """Token ids, int64 `[n]`, special tokens included.

        Raises:
            PreflightError: the artifact carries no tokenizer.json.
        """
        return np.asarray(self._loaded().encode(text).ids, np.int64)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._loaded().decode(list(ids), skip_special_tokens=True)
        return text

    def _loaded(self) -> Any:
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            path = self.artifact.directory / "tokenizer.json"
            if not path.is_file():
                raise PreflightError(str(path), "no such file", "a tokenizer", "Pass token ids instead of text.")
            self._tokenizer = Tokenizer.from_file(str(path))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        return self._tokenizer


class _Growing:
    """Steps whose present is the next one's past, as ONNX Runtime's own values."""

    def __init__(self, of: Generator, _capacity: int):
        from onnxruntime import OrtValue

        self._of, self._length, self._make = of, 0, OrtValue.ortvalue_from_numpy
        self._past = {name: self._make(value) for name, value in of.empty().items()}

    def __call__(self, new: np.ndarray) -> np.ndarray:
        """Take new ids `[n]` in; logits `[vocab]` after the last."""
        feed = {n: self._make(v) for n, v in _feed(new, self._length).items()}
        self._length += len(new)
        logits, *present = self._of.session.run_with_ort_values(["logits", *self._of.present], {**feed, **self._past})
        self._past = dict(zip(self._of.past, present, strict=True))
        last: np.ndarray = logits.numpy()[0, -1]
        return last


class _Shared:
    """Steps over one buffer that is past and present at once."""

    def __init__(self, of: Generator, capacity: int):
        from onnxruntime import OrtValue

        self._of, self._length = of, 0
        self._binding = of.session.io_binding()
        self._binding.bind_output("logits")
        self._buffers = [OrtValue.ortvalue_from_numpy(v) for v in of.empty(length=capacity).values()]
        for past, present, buffer in zip(of.past, of.present, self._buffers, strict=True):
            self._binding.bind_ortvalue_input(past, buffer)
            self._binding.bind_ortvalue_output(present, buffer)

    def __call__(self, new: np.ndarray) -> np.ndarray:
        """Take new ids `[n]` in; logits `[vocab]` after the last."""
        for name, value in _feed(new, self._length).items():
            self._binding.bind_cpu_input(name, value)
        self._length += len(new)
        self._of.session.run_with_iobinding(self._binding)
        last: np.ndarray = self._binding.get_outputs()[0].numpy()[0, -1]
        self._binding.bind_output("logits")  # a prompt's logits are longer than a token's
        return last


def _feed(new: np.ndarray, length: int) -> dict[str, np.ndarray]:
    total = length + len(new)
    return {
        "input_ids": new[None],
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(length, total, dtype=np.int64)[None],
    }


def positions(mask: np.ndarray) -> np.ndarray:
    """Position ids of a 0/1 mask `[batch, sequence]`: tokens count from 0, padding does not."""
    counted: np.ndarray = np.maximum(mask.cumsum(1) - 1, 0)
    return counted


def choose(logits: np.ndarray, temperature: float, top_p: float, draw: np.random.Generator) -> int:
    """A token from logits `[vocab]`; in float64, because a sum of many small shares decides where top_p ends."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    share = np.exp(scaled - scaled.max())
    share /= share.sum()
    order = np.argsort(-share, kind="stable")
    kept = order[: int(np.searchsorted(share[order].cumsum(), top_p)) + 1]
    return int(draw.choice(kept, p=share[kept] / share[kept].sum()))


def _opening(text: str, stop: tuple[str, ...]) -> int:
    """How many last characters may be the beginning of a stop string."""
    lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(lengths, default=0)


def _ends(directory: Path) -> frozenset[int]:
    """End tokens: the generation config's, or the config's."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        found = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
