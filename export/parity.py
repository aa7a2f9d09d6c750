"""Whether an artifact computes what its checkpoint computes.

A fixed tolerance rejects correct graphs: on a small trained Llama ONNX Runtime is 1.7e-5 from torch while torch itself
is 2.0e-5 from float64. So float64 is the judge, and float32 torch says what float32 can do here:

    max|ORT − fp64| ≤ max(2 · max|torch fp32 − fp64|, 1e-6 · scale)

with scale = max|fp64| for logits, and the largest norm of a row for embeddings and states, whose elements shrink with
the width. The reference is the stock model on every sequence alone; the artifact sees the same sequences alone, padded
together and, if it takes packed input, several to a row, at lengths that were not used in tracing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tersor.compress.errors import ParityMissed
from tersor.compress.packing import pack
from tersor.compress.tokens import Input, Tokens

if TYPE_CHECKING:
    from tersor.compress.checkpoint import Checkpoint

    from .artifact import Artifact
    from .client import Client

LENGTHS = (1, 2, 3, 17, 40, 71)
"""Lengths of the drawn sequences."""
LONGEST = 160
"""Real samples are cut here: float64 attention on long rows buys no further certainty."""
REAL = 6
CONTEXT, ANSWERS = 23, (7, 3, 11)
"""Lengths of a context and the answers that share it."""
COSINE = 0.8
"""Mean cosine under which a small file is taken for broken rather than coarse."""
DRIFT = 0.01
"""How far, of the scale, a neighbour may move such an answer: float32 noise that tips a rounding, no shared scale."""


@dataclass(frozen=True)
class Figures:
    """What was measured: largest distances from float64, and the limit that the rule gives."""

    error: float
    torch_error: float
    limit: float
    sequences: int
    calls: int
    followed: int = 0
    """Choices of experts in which the reference followed the artifact (mixture/parity.py)."""

    @classmethod
    def of(
        cls, errors: Sequence[float], torch_error: float, scale: float, sequences: int, followed: int = 0
    ) -> Figures:
        """By the rule, from the errors of all calls. One that is not a number counts as the worst."""
        worst = float("nan") if any(np.isnan(errors)) else max(errors)
        return cls(worst, torch_error, max(2 * torch_error, 1e-6 * scale), sequences, len(errors), followed)

    @property
    def holds(self) -> bool:
        """Whether the artifact may ship. False for NaN."""
        return self.error <= self.limit

    def as_json(self) -> dict[str, Any]:
        """For artifact.json."""
        return {
            "rule": "max|ORT - fp64| <= max(2 max|torch fp32 - fp64|, 1e-6 scale)",
            "error": self.error,
            "torch_error": self.torch_error,
            "limit": self.limit,
            "sequences": self.sequences,
            "calls": self.calls,
            **({"choices_followed": self.followed} if self.followed else {}),
        }


def insist(found: Mapping[str, Figures]) -> dict[str, Any]:
    """Figures by output for artifact.json.

    Raises:
        ParityMissed: an output is further from float64 than the rule allows.
    """
    for name, figures in found.items():
        if not figures.holds:
            raise ParityMissed(
                f"parity of {name}",
                f"{figures.error:.2g} from float64",
                f"at most {figures.limit:.2g} (torch float32 is at {figures.torch_error:.2g})",
                "The graph and the checkpoint disagree; nothing was written.",
            )
    return {name: figures.as_json() for name, figures in found.items()}


def sequences(samples: Sequence[Input], vocab: int, longest: int, types: int = 1, seed: int = 0) -> list[Tokens]:
    """Real samples, cut, and drawn ids and types at lengths that a tracer would not choose."""
    draw = np.random.default_rng(seed)
    real = [Tokens.of(s)[: min(LONGEST, longest)] for s in samples if len(s)][:REAL]
    drawn = [draw.integers(0, vocab, min(n, longest), dtype=np.int64) for n in LENGTHS]
    told = np.random.default_rng(seed + 1)
    mixed = [*real, *(Tokens(ids, told.integers(0, types, len(ids)) if types > 1 else None) for ids in drawn)]
    return [mixed[i] for i in draw.permutation(len(mixed))]


def reference(checkpoint: Checkpoint, tokens: Sequence[Tokens], dtype: torch.dtype) -> list[np.ndarray]:
    """The stock model's main output on each sequence alone: `[n_i, width]` logits or states."""
    model = checkpoint.model(dtype)
    with torch.no_grad():
        outs = (model(**asked(one)) for one in tokens)
        return [(o.logits if hasattr(o, "logits") else o.last_hidden_state)[0].numpy() for o in outs]


def asked(one: Tokens) -> dict[str, torch.Tensor]:
    """The stock model's inputs for one sequence, `[1, n]` each."""
    named = {"input_ids": one.ids} | ({} if one.types is None else {"token_type_ids": one.types})
    return {name: torch.from_numpy(value)[None] for name, value in named.items()}


def arrangements(lengths: Sequence[int], client: Client) -> Iterator[list[list[int]]]:
    """Ways to lay sequences 0 … n−1 into the rows of one call."""
    count, static = len(lengths), client.artifact.static
    for i in range(0, count, 4):
        yield [[i]]
    yield [[i] for i in range(count)]
    if static is not None:
        yield pack(lengths, static[1])
    elif client.artifact.packed:
        yield [list(range(count))]
        yield [list(range(count))[::2], list(range(count))[1::2]]


def _scale(values: Sequence[np.ndarray], by_norm: bool) -> float:
    return max(float(np.linalg.norm(v, axis=-1).max() if by_norm else np.abs(v).max()) for v in values)


def distance(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """Largest difference of an element."""
    return max(float(np.abs(x.astype(np.float64) - y).max()) for x, y in zip(a, b, strict=True))


def sample(artifact: Artifact, samples: Sequence[Input]) -> list[Tokens]:
    """The sequences on which an artifact is judged; if it knows trees, three at the end share a context."""
    longest = artifact.max_length or LONGEST
    found = sequences(samples, artifact.vocab, longest, artifact.token_types)
    if not artifact.trees:
        return found
    draw = np.random.default_rng(2)
    context = draw.integers(0, artifact.vocab, max(1, min(CONTEXT, longest - max(ANSWERS))))
    answers = (draw.integers(0, artifact.vocab, n) for n in ANSWERS)
    return [*found, *(Tokens(np.concatenate([context, answer])[:longest]) for answer in answers)]


def calls(client: Client, tokens: Sequence[Tokens]) -> Iterator[tuple[list[int], dict[str, list[np.ndarray]]]]:
    """Numbers of sequences with the graph's answers by output, arrangement by arrangement."""
    for rows in arrangements(list(map(len, tokens)), client):
        yield [i for row in rows for i in row], client.run(rows, tokens)
    if client.artifact.trees:
        yield list(range(len(tokens))), {name: client.ask(tokens, name) for name in client.outputs}


def by_output(name: str, values: Sequence[np.ndarray], pooling: dict[str, Any]) -> list[np.ndarray]:
    """What an output should be, from each sequence's logits or states `[n_i, width]`."""
    return [pooled(v, pooling) for v in values] if name == "sentence_embedding" else list(values)


def measure(checkpoint: Checkpoint, client: Client, samples: Sequence[Input]) -> dict[str, Figures]:
    """Figures by output name."""
    from .mixture.parity import Chosen, Reference

    ids = sample(client.artifact, samples)
    done, stock = list(calls(client, ids)), Reference(checkpoint, ids)
    wants = [
        [stock(i, choices) for i, choices in zip(numbers, chosen, strict=True)]
        for (numbers, _), chosen in zip(done, Chosen(client).calls(ids), strict=True)
    ]
    found = {}
    for name in client.outputs:
        errors, torch_error, scale = [], 0.0, 0.0
        for (_, got), answers in zip(done, wants, strict=True):
            want, plain = (by_output(name, v, client.artifact.pooling) for v in zip(*answers, strict=True))
            errors.append(distance(got[name], want))
            torch_error = max(torch_error, distance(plain, want))
            scale = max(scale, _scale(want, by_norm=name != "logits"))
        found[name] = Figures.of(errors, torch_error, scale, len(ids), stock.followed)
    return found


def _cosines(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    pairs = zip(a, b, strict=True)
    rows = [(np.atleast_2d(x.astype(np.float64)), np.atleast_2d(y.astype(np.float64))) for x, y in pairs]
    norms = [np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1) for x, y in rows]
    return np.concatenate(
        [(x * y).sum(1) / np.maximum(n, 1e-30) for (x, y), n in zip(rows, norms, strict=True)]
    )


def hold_small(
    checkpoint: Checkpoint, client: Client, samples: Sequence[Input], apart: bool = True
) -> dict[str, Any]:
    """Judge a quantised graph; how much it may lose is the recipe's gate to say, here only that it is not broken.

    Args:
        checkpoint: from which the graph was made.
        client: runs the graph.
        samples: real token sequences.
        apart: whether an answer must be free of its neighbours; otherwise what they do to it is only measured.

    Raises:
        ParityMissed: answers that have little to do with float64, or that depend on their neighbours.
    """
    ids = sample(client.artifact, samples)
    exact = reference(checkpoint, ids, torch.float64)
    done = list(calls(client, ids))
    alone = client.run([[i] for i in range(len(ids))], ids)
    found = {}
    for name in alone:
        want = by_output(name, exact, client.artifact.pooling)
        cosine = np.concatenate([_cosines(got[name], [want[i] for i in numbers]) for numbers, got in done])
        drift = max(distance(got[name], [alone[name][i] for i in numbers]) for numbers, got in done)
        scale = _scale(want, by_norm=name != "logits")
        found[name] = {
            "rule": f"mean cosine to fp64 >= {COSINE}" + f", packed against alone <= {DRIFT} scale" * apart,
            "cosine_mean": float(cosine.mean()),
            "cosine_min": float(cosine.min()),
            "packed_against_alone": drift,
            "scale": scale,
        }
        if not (cosine.mean() >= COSINE and (drift <= DRIFT * scale or not apart)):
            raise ParityMissed(
                f"parity of {name} in {client.artifact.manifest['precision']}",
                f"mean cosine {cosine.mean():.4f}, packed against alone {drift:.2g}",
                f"at least {COSINE} and at most {DRIFT * scale:.2g}",
                "Export float32, or leave more of the model in it.",
            )
    return found


def pooled(states: np.ndarray, pooling: dict[str, Any]) -> np.ndarray:
    """A sequence's embedding from its states `[n, hidden]`, written independently of the exported graph."""
    vector: np.ndarray = states[0] if pooling["mode"] == "cls" else states.mean(0)
    return vector / max(float(np.linalg.norm(vector)), 1e-12) if pooling["normalize"] else vector


def hold(checkpoint: Checkpoint, client: Client, samples: Sequence[Input]) -> dict[str, Any]:
    """Measure and judge; returns the figures for artifact.json.

    Raises:
        ParityMissed: an output is further from float64 than the rule allows.
    """
    return insist(measure(checkpoint, client, samples))
