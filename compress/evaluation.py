"""The `eval` verb: one checkpoint or artifact, measured alone or beside an original, and judged by a recipe's gates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import preflight
from .errors import RecipeError
from .evaluate.defaults import default_metrics
from .reporting import report

if TYPE_CHECKING:
    from .data import Source
    from .evaluate import Scorer
    from .reading import Reader
    from .recipe import Recipe


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        model: a checkpoint directory, a hub id, or an artifact's folder.
        against: the original, likewise, or None.
        metrics: names; empty for the usual ones.
        threads: CPU threads, None for all cores.
        offline: never ask a hub.
    """

    model: str
    against: str | None = None
    metrics: tuple[str, ...] = ()
    threads: int | None = None
    offline: bool = False

    def by_data(self, path: str, samples: int, length: int, options: Sequence[str] = ()) -> dict[str, Any]:
        """Measure on a file, a folder or a dataset; `options` are those of `data.heldout`: `label=score`, ..."""
        from .recipe import source_options

        return self._answer(source_options(path, samples, length, options), None, self.metrics, ())

    def by_recipe(self, recipe: Recipe) -> dict[str, Any]:
        """Measure on a recipe's held-out text, by its metrics and gates; its model is the original."""
        if recipe.data.heldout is None:
            raise RecipeError(recipe.place("data"), "no held-out text", "data.heldout")
        asked = Question(self.model, self.against or recipe.model, threads=self.threads, offline=self.offline)
        metrics = self.metrics or recipe.metrics
        return asked._answer(recipe.data.heldout, recipe.base, metrics, recipe.gate)

    def _answer(
        self, source: Source, base: Path | None, metrics: Sequence[str], gates: Sequence[Any]
    ) -> dict[str, Any]:
        from .evaluate import METRICS
        from .evaluate.gate import judge

        with preflight.threads(self.threads):
            scorer, reader = self._open(self.model)
            original = self._open(self.against)[0] if self.against else None
            samples = reader.read(source, seed=None, base=base, place="data", offline=self.offline)
            usual = default_metrics(scorer.output, samples)
            wanted = metrics or [name for name in usual if original or not METRICS[name].needs_reference]
            found = {"model": self._block(scorer, samples, wanted, original)}
            if original is not None:
                found["original"] = self._block(original, samples, wanted, original)
            if gates:
                if original is None:
                    raise RecipeError("tersor eval", "gates without an original", "--against")
                verdicts = [judge(gate, found["model"], found["original"]) for gate in gates]
                found["model"]["verdicts"] = [report.verdict_as_dict(v) for v in verdicts]
            return found

    def _block(
        self, scorer: Scorer, samples: Sequence[Any], metrics: Sequence[str], original: Scorer | None
    ) -> dict[str, Any]:
        from .evaluate import evaluate

        scores = evaluate(scorer, samples, metrics, original)
        return {
            "parameters": scorer.parameters,
            "bytes": scorer.bytes,
            **{name: score.value for name, score in scores.items()},
            "intervals": {name: [score.low, score.high] for name, score in scores.items()},
        }

    def _open(self, reference: str) -> tuple[Scorer, Reader]:
        from .pretrained import locate

        return open_scorer(locate(reference, self.offline), self.threads)


def open_scorer(path: Path, threads: int | None = None) -> tuple[Scorer, Reader]:
    """A scorer and what reads data for it, from the directory of a checkpoint or an artifact."""
    from .checkpoint import Checkpoint
    from .evaluate.torch_scorer import TorchScorer
    from .reading import Reader
    from .recipe import exporter_options

    described = path / "artifact.json"
    if described.is_file():
        options: Any = exporter_options(json.loads(described.read_text("utf-8"))["exporter"])
        return options.open(path, threads), Reader.at(path)
    checkpoint = Checkpoint.load(path)
    return TorchScorer(checkpoint, threads), Reader.of(checkpoint)
