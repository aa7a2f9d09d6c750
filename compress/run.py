"""Run: the straight line from a recipe to a gated checkpoint and its artifacts.

    original → (pass → checks → save → score → gate)* → (export → parity → score → gate)* → publish → report

Each arrow ends in a line of the journal, so a run killed anywhere continues from its last finished step and ends with
the same bytes. `model/` and `onnx/` appear only when every gate has been met; otherwise the result lies in `failed/`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import preflight
from .errors import GateMissed, ParityMissed, PreflightError, TersorError
from .inputs import random_inputs
from .pass_ import Context, Unchanged
from .plan import Plan, PlannedStep, make_plan
from .progress import Progress
from .recipe import Recipe
from .reporting import report
from .reporting.files import write_report
from .rundir import RunDirectory, hash_tree, next_free, to_json, write_atomic, written_beside

if TYPE_CHECKING:
    from .checkpoint import Check, Checkpoint
    from .data import Sample
    from .evaluate import Scorer
    from .evaluate.gate import Gate, Verdict


TIMED_TOKENS = 1024
TIMED_IMAGES = 8
PLAN_TOLERANCE = 0.01
"""Share of the original's parameters by which a pass that chooses its own sizes may leave the plan: ± 0.5 points
around the request, on either side."""


@dataclass(frozen=True)
class How:
    """How a run is carried out; never part of the recipe.

    Attributes:
        output: the run directory, or None for `runs/NAME`, the next free one.
        resume: continue what lies in `output`.
        offline: never ask a hub.
        threads: CPU threads for torch and ONNX Runtime, or None for the machine's cores.
        enforce: whether a missed gate ends the run (a smoke run only reports it).
        max_memory: bytes the run may use, or None for what is available: a checkpoint that needs more stays in its
            files, and every weight is made when it is used.
        progress: where to say what happens.
    """

    output: Path | None = None
    resume: bool = False
    offline: bool = False
    threads: int | None = None
    enforce: bool = True
    max_memory: int | None = None
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        directory: the run directory.
        metrics: what metrics.json holds.
    """

    directory: Path
    metrics: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every gate was met."""
        return bool(self.metrics["verdict"] == "pass")


def resolve(recipe: Recipe, how: How) -> tuple[Path, Plan]:
    """The checkpoint's directory and the plan; reads config.json and no weights.

    Raises:
        TersorError: the model is not there, or the recipe cannot work on it.
    """
    from .errors import RecipeError
    from .pretrained import locate, read_config

    if recipe.model is None:
        raise RecipeError(recipe.place("model"), "no model", "a directory or a hub id", "Or name one with --model.")
    try:
        source = locate(recipe.model, how.offline, recipe.base)
    except TersorError as error:
        raise error.at(recipe.place("model")) from error
    return source, make_plan(recipe, read_config(source, recipe.task))


def apply(recipe: Recipe, how: How | None = None) -> Outcome:
    """Carry out a recipe.

    Returns:
        the outcome of a run whose gates were all met (or are not enforced).

    Raises:
        TersorError: see `errors` for the kinds; after `GateMissed` and `ParityMissed` the report is in the run
            directory and the result in its `failed/`.
    """
    how = how or How()
    source, plan = resolve(recipe, how)
    output = how.output or next_free(Path("runs") / recipe.name)
    lean = preflight.check(plan, output, how.max_memory)
    with RunDirectory(output) as directory, preflight.threads(how.threads):
        directory.open(preflight.lock(recipe, source), how.resume)
        write_atomic(output / "recipe.yaml", recipe.to_yaml())
        write_atomic(output / "plan.json", to_json(plan.as_dict()))
        return _Run(plan, how, source, directory, lean).go()


class _Run:
    """The steps of one run, in the order of `go`."""

    def __init__(self, plan: Plan, how: How, source: Path, directory: RunDirectory, lean: bool):
        from .checkpoint import Checkpoint
        from .evaluate.defaults import default_metrics
        from .evaluate.torch_scorer import TorchScorer

        self.plan, self.how, self.source, self.directory, self.lean = plan, how, source, directory, lean
        self.recipe, self.progress = plan.recipe, how.progress
        with self.progress.step(f"read {self.recipe.model}"):
            self.original: Checkpoint = Checkpoint.load(source, self.recipe.task, lean)
            self.calibration = self._read("calibration", self.recipe.seed)
            self.heldout = self._read("heldout", None)
        self.reference: Scorer = TorchScorer(self.original, how.threads)
        self.metrics = self.recipe.metrics or default_metrics(self.reference.output, self.heldout)
        self.verdicts: list[dict[str, Any]] = []

    def go(self) -> Outcome:
        """From the original to the report."""
        self._score_original()
        failure: TersorError | None = None
        try:
            checkpoint = self._passes()
            self._exports(checkpoint)
            self._time(checkpoint)
        except (GateMissed, ParityMissed) as error:
            failure = error
        self._publish(failed=failure is not None)
        metrics = report.collect(self.directory.journal, self.plan, failed=failure is not None)
        write_report(self.directory.path, self.plan, metrics, self.directory.journal)
        if failure is not None:
            failure.directory = self.directory.path
            raise failure
        shutil.rmtree(self.directory.path / ".steps", ignore_errors=True)
        return Outcome(self.directory.path, metrics)

    def _read(self, part: str, seed: int | None) -> list[Sample]:
        from .reading import Reader

        data = getattr(self.recipe.data, part)
        if data is None:
            return []
        place = self.recipe.place("data", part)
        samples = Reader.of(self.original).read(
            data, seed=seed, base=self.recipe.base, place=place, offline=self.how.offline
        )
        if self.original.layout.arch.inputs == "pixels":
            return samples
        vocab = self.original.layout.families["vocab"]
        highest = max(int(part.ids.max()) for sample in samples for part in sample.parts)
        if highest >= vocab:
            raise PreflightError(
                f"{self.recipe.model}: tokenizer",
                f"token {highest}",
                f"ids under {vocab}, the model's vocabulary",
                "The tokenizer belongs to another model.",
            )
        return samples

    def _score_original(self) -> None:
        if self.directory.entry("original") is None:
            with self.progress.step("score the original"):
                started = time.perf_counter()
                scores = self._scores(self.reference)
                self.directory.finish_step(
                    {"step": "original", "scores": scores, "seconds": time.perf_counter() - started}
                )

    def _scores(self, scorer: Scorer) -> dict[str, Any]:
        """Size and metrics of a scorer, as plain values with their intervals beside."""
        from .evaluate import evaluate

        scores: dict[str, Any] = {"parameters": scorer.parameters, "bytes": scorer.bytes}
        if self.metrics and self.heldout:
            found = evaluate(scorer, self.heldout, self.metrics, self.reference, track=self.progress.track)
            scores |= {name: score.value for name, score in found.items()}
            scores["intervals"] = {name: [score.low, score.high] for name, score in found.items()}
        return scores

    def _passes(self) -> Checkpoint:
        """Every pass in turn. What goes on is what was saved: each result is read back from its folder."""
        from .checkpoint import Checkpoint

        checkpoint = Checkpoint(
            self.original.layout,
            dict(self.original.tensors),
            self.original.tokenizer,
            dict(self.original.side_files),
            lean=self.original.lean,
        )
        if self.plan.start.dtype != self.original.layout.dtype:
            checkpoint.become(self.plan.start, checkpoint.tensors)
        steps = self.plan.passes or (self._unchanged(),)
        done = sum(self.directory.entry(step.name) is not None for step in steps)
        promises: list[Check] = []
        for number, step in enumerate(steps):
            checkpoint.checks = promises
            entry = self.directory.entry(step.name)
            if entry is None:
                with self.progress.step(f"{step.use} ({step.name})"):
                    checkpoint, entry = self._apply(number, step, checkpoint)
            elif number == done - 1:
                checkpoint = Checkpoint.load(self._where(step.name), self.recipe.task, self.lean)
            promises = [*promises, *step.options.checks(entry["details"])]
            gates = self.recipe.passes[number].gate if self.plan.passes else ()
            self._gate(step.name, entry["scores"], gates + (self.recipe.gate if number == len(steps) - 1 else ()))
        return checkpoint

    def _unchanged(self) -> PlannedStep:
        """The step of a recipe without passes: it hands out the checkpoint and holds it to the gates."""
        return PlannedStep("0-unchanged", "pass", "unchanged", Unchanged(), self.plan.start, 0, ())

    def _apply(self, number: int, step: PlannedStep, checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, Any]]:
        """One pass: change, check, save, read back, score; its line in the journal."""
        from .checkpoint import Checkpoint
        from .evaluate.torch_scorer import TorchScorer

        started = time.perf_counter()
        context = Context(
            [part.input for sample in self.calibration for part in sample.parts],
            seed=self.recipe.seed * 1000 + number,
            track=self.progress.track,
            original=self.original,
            folder=self.directory.step(f"{step.name}.state"),
        )
        # Asked again: an earlier pass may have chosen other sizes than planned.
        forecast = step.options.requires(checkpoint.layout)
        step.options.apply(checkpoint, context)
        off = abs(checkpoint.layout.parameters - forecast.layout.parameters) / self.original.layout.parameters
        if forecast.exact and off > PLAN_TOLERANCE:
            raise AssertionError(f"{step.name}: {off:.2%} of the parameters beside the plan")
        for warning in context.details.get("warnings", ()):
            self.progress.say(f"[yellow]![/yellow] {step.name}: {warning}")
        checkpoint.checks = [*checkpoint.checks, *step.options.checks(context.details)]
        if broken := checkpoint.failing_checks():
            raise PreflightError(step.name, f"a broken promise: {'; '.join(broken)}", "passes that keep each other's")
        seconds = time.perf_counter() - started
        with written_beside(self.directory.step(step.name)) as beside:
            checkpoint.save(beside)
        saved = Checkpoint.load(self.directory.step(step.name), self.recipe.task, self.lean)
        entry = {
            "step": step.name,
            "use": step.use,
            "options": report.options_of(step.options),
            "seconds": seconds,
            "peak_memory": preflight.peak_memory(),
            "details": context.details,
            "scores": self._scores(TorchScorer(saved, self.how.threads)),
        }
        self.directory.finish_step(entry)
        shutil.rmtree(self.directory.step(f"{step.name}.state"), ignore_errors=True)
        return saved, entry

    def _where(self, step: str) -> Path:
        """A finished step's folder: among the steps, or where `_publish` has moved it already."""
        name = step if any(step == export.name for export in self.plan.exports) else "model"
        root = self.directory.path
        places = (self.directory.step(step), root / name, root / "failed" / name)
        return next((place for place in places if place.is_dir()), places[0])

    def _gate(self, step: str, scores: Mapping[str, Any], gates: Sequence[Gate], scorer: Scorer | None = None) -> None:
        """Judge `gates`; a missed one ends the run unless gates are only reported."""
        from .evaluate.gate import judge

        original = self.directory.entry("original")
        assert original is not None
        ours, theirs = dict(scores), dict(original["scores"])
        if scorer is not None and any(gate.metric == "latency_ms" for gate in gates):
            timed = self._latency({"original": self.reference, step: scorer})
            ours["latency_ms"], theirs["latency_ms"] = timed[step], timed["original"]
        verdicts: list[Verdict] = [judge(gate, ours, theirs) for gate in gates]
        if self.directory.entry(f"{step}:gate") is None and verdicts:
            self.directory.finish_step(
                {"step": f"{step}:gate", "verdicts": [report.verdict_as_dict(v) for v in verdicts]}
            )
        missed = [v.text for v in verdicts if not v.passed]
        if missed and self.how.enforce:
            raise GateMissed(f"{step}: gate", "; ".join(missed), "", f"The result is in {self.directory.path}/failed.")

    def _exports(self, checkpoint: Checkpoint) -> None:
        samples = [s.input for s in self.heldout] or random_inputs(checkpoint, self.recipe.seed)
        for number, step in enumerate(self.plan.exports):
            entry = self.directory.entry(step.name)
            if entry is None:
                with self.progress.step(f"export {step.name}"):
                    entry = self._export(step, checkpoint, samples)
            scorer = step.options.open(self._where(step.name), self.how.threads)
            self._gate(step.name, entry["scores"], self.recipe.gate + self.recipe.export[number].gate, scorer)

    def _export(self, step: PlannedStep, checkpoint: Checkpoint, samples: Sequence[Any]) -> dict[str, Any]:
        started = time.perf_counter()
        target = self.directory.step(step.name)
        with written_beside(target) as beside:
            artifact = step.options.write(checkpoint, beside, samples)
        entry = {
            "step": step.name,
            "use": step.use,
            "options": report.options_of(step.options),
            "seconds": time.perf_counter() - started,
            "peak_memory": preflight.peak_memory(),
            "artifact": artifact,
            "scores": self._scores(step.options.open(target, self.how.threads)),
        }
        self.directory.finish_step(entry)
        return entry

    def _time(self, checkpoint: Checkpoint) -> None:
        """Latency of everything, interleaved in one measurement; of steps in between by their ratio to the original."""
        from .checkpoint import Checkpoint
        from .evaluate import by_tokens
        from .evaluate.torch_scorer import TorchScorer

        if self.directory.entry("latency") is not None or self.lean:  # weights made at every use time their making
            return
        with self.progress.step("measure latency"):
            scorers: dict[str, Scorer] = {"original": self.reference}
            if self.plan.passes:
                scorers["checkpoint"] = TorchScorer(checkpoint, self.how.threads)
            for step in self.plan.exports:
                scorers[step.name] = step.options.open(self._where(step.name), self.how.threads)
            found = self._latency(scorers)
            for step in self.plan.passes[:-1]:  # one at a time beside the original, so that two models are enough
                between = TorchScorer(Checkpoint.load(self._where(step.name), self.recipe.task), self.how.threads)
                pair = self._latency({"original": self.reference, step.name: between})
                found[step.name] = found["original"] * pair[step.name] / pair["original"]
            self.directory.finish_step(
                {
                    "step": "latency",
                    "milliseconds": found,
                    "threads": preflight.thread_count(self.how.threads),
                    "sequences": len(self._timed()),
                    "tokens": sum(len(s.ids) for s in self._timed() if s.ids.ndim == 1),
                    "calls": by_tokens(scorers, self._timed(), preflight.thread_count(self.how.threads)),
                }
            )

    def _latency(self, scorers: dict[str, Scorer]) -> dict[str, float]:
        from .evaluate import latency

        return latency(scorers, self._timed(), threads=preflight.thread_count(self.how.threads))

    def _timed(self) -> list[Sample]:
        """The sequences that are timed together: about `TIMED_TOKENS` of the held-out text, or `TIMED_IMAGES`."""
        from .data import Sample

        drawn = () if self.heldout else random_inputs(self.original, self.recipe.seed)
        samples = self.heldout or [Sample(ids=ids, bytes=0, text="") for ids in drawn]
        if samples[0].ids.ndim == 3:
            return samples[:TIMED_IMAGES]
        total = 0
        for count, sample in enumerate(samples):
            total += len(sample.ids)
            if count and total > TIMED_TOKENS:
                return samples[:count]
        return samples

    def _publish(self, failed: bool) -> None:
        """Move the last checkpoint and the artifacts to where people look for them."""
        target = self.directory.path / "failed" if failed else self.directory.path
        target.mkdir(exist_ok=True)
        names = [step.name for step in self.plan.passes] or ["0-unchanged"]
        finished = [name for name in names if self.directory.entry(name)]
        moves = {"model": finished[-1]} if finished else {}
        moves |= {step.name: step.name for step in self.plan.exports if self.directory.entry(step.name)}
        for name, step in moves.items():
            source = self.directory.step(step)
            if source.is_dir():
                if name == "model":
                    write_atomic(source / "README.md", report.model_card(self.plan, self.directory.journal))
                source.replace(target / name)
        if self.directory.entry("published") is None:
            hashes = {name: hash_tree(target / name) for name in moves}
            self.directory.finish_step({"step": "published", "failed": failed, "hashes": hashes})
