"""Parity where experts are chosen: the reference computes on the choices that the artifact made.

Two experts whose scores differ by less than rounding are chosen one way by the artifact and the other way by float64.
Both are right and their answers differ. So float64 and float32 torch follow the artifact's choices, token by token,
and the choices are judged on their own: what was chosen must score within rounding of what was left out,

    max score left out − min score chosen  ≤  max(2 · max|scores fp32 − scores fp64|, 2⁻²² · max score)
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from tersor.compress.errors import ParityMissed
from tersor.compress.evaluate.tree import Tree, trees
from tersor.compress.moe.routing import Routing, differences
from tersor.compress.tokens import Tokens

from .. import parity

if TYPE_CHECKING:
    from tersor.compress.checkpoint import Checkpoint

    from ..client import Client
    from ..generate import Generator

Answers = tuple[np.ndarray, np.ndarray]


class Reference:
    """The stock model's main output on each sequence alone, in float64 and float32, on an artifact's choices.

    Args:
        checkpoint: not changed.
        tokens: sequences by number.

    Attributes:
        followed: choices that float64 would have made otherwise, of those asked about.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: Sequence[Tokens]):
        self.layout, self.tokens = checkpoint.layout, tokens
        self.models = [checkpoint.model(dtype) for dtype in (torch.float64, torch.float32)]
        self.followed = 0
        self._own: dict[int, np.ndarray] = {}
        self._known: dict[tuple[int, bytes], Answers] = {}

    def __call__(self, number: int, choices: np.ndarray | None = None) -> Answers:
        """Float64 and float32 outputs `[n, width]` of a sequence.

        Args:
            number: of the sequence.
            choices: `[blocks, n, chosen]`; None to let float64 choose.

        Raises:
            ParityMissed: choices that no rounding explains.
        """
        own = self._own.get(number)
        if choices is not None and own is None:
            self(number)
            own = self._own[number]
        if choices is not None and own is not None:
            choices = np.sort(choices.astype(np.int64), axis=2)
            self.followed += int((choices != own).any(2).sum())
            choices = None if np.array_equal(choices, own) else choices
        key = number, b"" if choices is None else choices.tobytes()
        if key not in self._known:
            self._known[key] = self._computed(number, choices)
        return self._known[key]

    def _computed(self, number: int, choices: np.ndarray | None) -> Answers:
        found, seen = [], []
        for model in self.models:
            if self.layout.arch.experts is None:
                found.append(self._run(model, number))
                continue
            with Routing.of(self.layout, choices) as routing:
                found.append(self._run(model, number))
            seen.append(routing)
            if choices is None:
                choices = np.stack([np.sort(index.numpy(), axis=1) for index in routing.choices])
                self._own[number] = choices
        if seen:
            judge(*seen)
        return found[0], found[1]

    def _run(self, model: torch.nn.Module, number: int) -> np.ndarray:
        with torch.no_grad():
            out = model(**parity.asked(self.tokens[number]))
        answer: np.ndarray = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[0].numpy()
        return answer


def judge(exact: Routing, single: Routing) -> None:
    """Hold the choices of two forwards that made the same ones against their scores.

    Raises:
        ParityMissed: what was chosen scores too far below what was not.
    """
    gap, limit = differences(exact, single)
    if not gap <= limit:
        raise ParityMissed(
            "choices of experts",
            f"one that scores {gap:.2g} below one left out",
            f"at most {limit:.2g}, which is rounding",
            "The graph and the checkpoint choose differently; nothing was written.",
        )


def probe(path: Path, names: Sequence[str]) -> Any:
    """An ONNX Runtime session of a graph that also answers the values `names`."""
    import onnxruntime

    model = ir.load(path)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(values[name] for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    with tempfile.TemporaryDirectory() as beside:
        ir.save(model, Path(beside) / path.name, external_data=f"{path.name}.data")
        return onnxruntime.InferenceSession(Path(beside) / path.name, options, providers=["CPUExecutionProvider"])


class Chosen:
    """What a packed or padded artifact chooses."""

    def __init__(self, client: Client):
        self.client = client
        self.names = list(client.artifact.manifest.get("experts", {}).get("choices", ()))
        self.session = probe(client.artifact.model_path, self.names) if self.names else None

    def calls(self, tokens: Sequence[Tokens]) -> Iterator[list[np.ndarray | None]]:
        """In each call of `parity.calls`: `[blocks, n, chosen]` for every sequence, in the call's order."""
        for rows in parity.arrangements(list(map(len, tokens)), self.client):
            yield self(rows, tokens)
        if self.client.artifact.trees:
            shared, found = trees([one.ids for one in tokens]), dict[int, np.ndarray | None]()
            for rows in self.client.plan(list(map(len, shared))):
                found.update(zip((number for row in rows for number in row), self(rows, shared), strict=True))
            yield [part for number, tree in enumerate(shared) for part in _split(tree, found[number])]

    def __call__(self, rows: Sequence[Sequence[int]], tokens: Sequence[Tokens | Tree]) -> list[np.ndarray | None]:
        """`[blocks, n, chosen]` for every sequence of `rows`, in their order; None without experts."""
        flat = [number for row in rows for number in row]
        if self.session is None:
            return [None] * len(flat)
        static, found = self.client.artifact.static, []
        height = static[0] if static is not None else len(rows)
        for first in range(0, len(rows), height):
            feed, _ = self.client.feed(rows[first : first + height], tokens)
            choices = np.stack(self.session.run(self.names, feed))
            real = feed["attention_mask"].ravel() != 0
            found.append(choices[:, real] if choices.shape[1] == real.size else choices)
        return list(np.split(np.concatenate(found, 1), np.cumsum([len(tokens[n]) for n in flat])[:-1], axis=1))


def _split(tree: Tree, choices: np.ndarray | None) -> list[np.ndarray | None]:
    if choices is None:
        return [None] * len(tree.sequences)
    return [part.swapaxes(0, 1) for part in tree.split(choices.swapaxes(0, 1))]


class Behind:
    """A decoder's session whose logits carry the choices behind them, `[batch, sequence, vocab + blocks · chosen]`.

    Args:
        session: answers.
        probe: says what it chose.
        names: of the choices.
    """

    def __init__(self, session: Any, probe: Any, names: Sequence[str]):
        self.session, self.probe, self.names = session, probe, list(names)

    def run(self, names: Sequence[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Logits first in `names`."""
        logits, *present = self.session.run(names, feed)
        choices = self.probe.run(self.names, feed)
        shaped = [index.reshape(*logits.shape[:2], -1).astype(np.float32) for index in choices]
        return [np.concatenate([logits, *shaped], axis=2), *present]


def revealing(generator: Generator) -> Generator:
    """A generator that shows its choices behind its logits; itself where it has no experts."""
    names = generator.artifact.manifest.get("experts", {}).get("choices", ())
    if not names:
        return generator
    found = copy.copy(generator)
    found.session = Behind(generator.session, probe(generator.artifact.model_path, names), names)
    return found


def parted(answer: np.ndarray, vocab: int, blocks: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits `[n, vocab]` and choices `[blocks, n, chosen]` of what such a generator answers; None if it has none."""
    logits, choices = answer[:, :vocab], answer[:, vocab:]
    if not choices.shape[1]:
        return logits, None
    return logits, choices.reshape(len(answer), blocks, -1).swapaxes(0, 1).astype(np.int64)
