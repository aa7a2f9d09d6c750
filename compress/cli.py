"""The command line. Every verb mirrors a function of `tersor.compress`; heavy imports wait until a verb runs.

Exit codes: 0 done · 2 recipe or usage · 3 gate missed · 4 parity missed · 5 preflight (memory, disk, a broken file,
a missing extra) · 1 crash · 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import TersorError
from .progress import remember_interrupts

if TYPE_CHECKING:
    from .recipe import Recipe

INTERRUPTED = 130

app = typer.Typer(
    name="tersor",
    help="Makes transformer checkpoints small and fast: recipes of passes, accuracy gates, packed ONNX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that ships (quickstart).")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="A checkpoint directory or a hub id, instead of the recipe's.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: passes.0.with.remove=0.3")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never ask a hub.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads [default: all cores].")]


def _recipe(reference: str, model: str | None, overrides: Sequence[str] | None) -> Recipe:
    from .recipe import load_recipe

    named = [f"model={json.dumps(model, ensure_ascii=False)}"] if model else []
    return load_recipe(reference, [*(overrides or ()), *named])


@app.command()
def validate(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Check a recipe; reads no weights."""
    from .reporting import terminal

    loaded = _recipe(recipe, None, overrides)
    checked = _check_layout(loaded)
    terminal.answer(
        {"recipe": loaded.name, "digest": loaded.digest, "valid": True, "model_checked": checked},
        as_json,
        lambda v: print(f"{v['recipe']}: valid" + ("" if checked else " (its model is not here to check it against)")),
    )


def _check_layout(recipe: Recipe) -> bool:
    """Plan against the model's config where that lies on this machine; a model elsewhere is not fetched for it."""
    from .errors import PreflightError
    from .run import How, resolve

    if recipe.model is None:
        return False
    try:
        resolve(recipe, How(offline=True))
    except PreflightError:
        return False
    return True


@app.command()
def plan(
    recipe: RecipeArgument,
    model: ModelOption = None,
    overrides: SetOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a recipe will do to a model: parameters, bytes, peak memory. Reads no weights."""
    from .reporting import terminal
    from .run import How, resolve

    _, made = resolve(_recipe(recipe, model, overrides), How(offline=offline))
    terminal.answer(made.as_dict(), as_json, terminal.plan)


@app.command(name="apply")
def apply_(
    recipe: RecipeArgument,
    model: ModelOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Run directory [default: runs/NAME, the next free].")
    ] = None,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Try the recipe in seconds on a shrunk random model.")] = False,
    offline: OfflineOption = False,
    threads: ThreadsOption = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Such as 4GB [default: what is available].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Carry out a recipe: passes, gates, export, report."""
    from rich.console import Console

    from . import run
    from .errors import RecipeError
    from .progress import Progress
    from .reporting import terminal

    if resume and output is None:
        raise RecipeError("--resume", "no --output", "the folder of the run to continue")
    progress = Progress(None if as_json else Console(stderr=True))
    limit = _size(max_memory)
    how = run.How(output, resume, offline, threads, enforce=not smoke, max_memory=limit, progress=progress)
    loaded = _recipe(recipe, model, overrides)
    try:
        outcome = _smoke(loaded, how) if smoke else run.apply(loaded, how)
    except TersorError as error:
        directory = error.directory
        if directory is not None:  # after a missed gate the measurements are what a user wants to see
            metrics = json.loads((directory / "metrics.json").read_text("utf-8"))
            terminal.answer(metrics, as_json, lambda m: terminal.outcome(m, directory))
        raise
    terminal.answer(outcome.metrics, as_json, lambda m: terminal.outcome(m, None if smoke else outcome.directory))


def _size(text: str | None) -> int | None:
    from .errors import RecipeError
    from .preflight import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError:
        raise RecipeError("--max-memory", repr(text), "a size such as 4GB or 800MB") from None


def _smoke(recipe: Recipe, how: Any) -> Any:
    from dataclasses import replace

    from . import run, smoke

    source, made = run.resolve(recipe, how)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "model"
        smoke.write_smoke_model(source, made.layout, small, recipe.seed)
        output = how.output or Path(folder) / "run"
        return run.apply(smoke.smoke_recipe(recipe, small), replace(how, output=output))


@app.command(name="eval")
def eval_(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, a hub id, or an artifact.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Take data, metrics and gates from this recipe.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="A file, a folder or a dataset; options by --set.")] = None,
    metrics: Annotated[str | None, typer.Option("--metrics", help="Comma-separated names.")] = None,
    against: Annotated[str | None, typer.Option("--against", help="The original: a checkpoint or an artifact.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1)] = 128,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a sample.")] = 256,
    overrides: SetOption = None,
    offline: OfflineOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint or an artifact on held-out text; with a recipe's gates, judge it."""
    from . import evaluation
    from .errors import GateMissed, RecipeError
    from .reporting import terminal

    if (recipe is None) == (data is None):
        raise RecipeError("tersor eval", "both or neither of --recipe and --data", "one of them")
    names = tuple(n.strip() for n in metrics.split(",")) if metrics else ()
    loaded = _recipe(recipe, None, overrides) if recipe else None
    asked = evaluation.Question(model, against, names, threads, offline)
    found = asked.by_recipe(loaded) if loaded else asked.by_data(str(data), samples, length, overrides or ())

    terminal.answer(found, as_json, lambda f: terminal.evaluation(model, f))
    missed = [v["text"] for v in found["model"].get("verdicts", ()) if not v["passed"]]
    if missed:
        raise GateMissed("gate", "; ".join(missed))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, an artifact or a run directory.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    recipe: Annotated[str | None, typer.Option("--recipe", help="Measure both on this recipe's held-out text.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Measure both on this file or folder of text.")] = None,
    metrics: Annotated[str | None, typer.Option("--metrics", help="Comma-separated names.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1)] = 128,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens a sample.")] = 256,
    offline: OfflineOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Two checkpoints, artifacts or runs beside each other: sizes, metrics, configs, tensors."""
    from . import compare as comparing
    from .errors import RecipeError
    from .reporting import terminal

    if recipe is not None and data is not None:
        raise RecipeError("tersor compare", "both --recipe and --data", "one of them or neither")
    names = tuple(n.strip() for n in metrics.split(",")) if metrics else ()
    source = None
    if data is not None:
        from .data import Source

        source = Source(path=data, samples=samples, length=length)
    loaded = _recipe(recipe, None, None) if recipe else None
    found = comparing.compare(a, b, source=source, recipe=loaded, metrics=names, threads=threads, offline=offline)
    terminal.answer(found, as_json, lambda f: terminal.comparison(a, b, f))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, an artifact or a run directory.")],
    against: Annotated[str | None, typer.Option("--against", help="What ratios refer to [default: DIR].")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="Lengths [default: 16,64,256].")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed calls of each.")] = 9,
    offline: OfflineOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time checkpoints, artifacts or runs in turns: the median of a call, by its size."""
    from . import bench as benching
    from .errors import RecipeError
    from .reporting import terminal

    lengths = [n.strip() for n in tokens.split(",")] if tokens is not None else []
    if wrong := [n for n in lengths if not n.isdecimal()]:
        raise RecipeError("--tokens", repr(wrong[0]), "whole numbers, comma-separated")
    found = benching.bench(
        model, against, tokens=list(map(int, lengths)), threads=threads, repeats=repeats, offline=offline
    )
    terminal.answer(found, as_json, terminal.timings)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory or a hub id.")],
    output: Annotated[Path, typer.Option("--output", help="The artifact's folder; must not exist.")],
    use: Annotated[str, typer.Option("--use", help="The exporter.")] = "onnx",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the exporter: inputs=padded")
    ] = None,
    task: Annotated[str | None, typer.Option("--task")] = None,
    offline: OfflineOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint as it is, and hold the artifact against it."""
    from . import preflight
    from .checkpoint import Checkpoint
    from .errors import RecipeError
    from .inputs import random_inputs
    from .pretrained import locate
    from .recipe import exporter_options
    from .reporting import terminal
    from .rundir import written_beside

    if output.exists():
        raise RecipeError(f"--output {output}", "something there already", "a folder that does not exist")
    exporter = exporter_options(use, overrides or ())
    checkpoint = Checkpoint.load(locate(model, offline), task)
    exporter.requires(checkpoint.layout)
    with preflight.threads(threads), written_beside(output) as beside:
        artifact = exporter.write(checkpoint, beside, random_inputs(checkpoint, 0))
    terminal.answer(artifact, as_json, lambda a: print(f"{output}: {a['parity']}" if a.get("parity") else str(output)))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory.")], as_json: JsonOption = False
) -> None:
    """Reopen a run's results with stock transformers and ONNX Runtime in fresh processes, and check its promises."""
    from .errors import ParityMissed
    from .reporting import terminal
    from .verify import verify as run_verify

    findings = run_verify(directory)
    terminal.answer([vars(f) for f in findings], as_json, lambda v: terminal.promises(directory, v))
    broken = [f"{f.what}: {f.detail}" for f in findings if not f.holds]
    if broken:
        raise ParityMissed(str(directory), "; ".join(broken))


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Say all about one pass or exporter.")] = None,
    table: Annotated[bool, typer.Option("--table", help="What works on which architecture, and why not.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the passes and exporters, or describe one with its options."""
    from . import catalogue
    from .reporting import terminal

    if table:
        from .coverage import table as coverage

        terminal.answer(coverage(), as_json, terminal.coverage)
    elif name is None:
        terminal.answer(catalogue.summary(), as_json, terminal.catalogue)
    else:
        terminal.answer(catalogue.describe(name), as_json, terminal.description)


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from .recipe import json_schema

    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has: versions, cores, memory, disk, extras."""
    from .doctor import examine
    from .reporting import terminal

    terminal.answer(examine(), as_json, terminal.machine)


def _message(error: BaseException) -> tuple[str, int] | None:
    """One line and an exit code for everything that is not a bug of ours."""
    if isinstance(error, TersorError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; finished steps are kept: tersor apply … --output DIR --resume", INTERRUPTED
    if isinstance(error, MemoryError):
        return "memory: the machine has no more. tersor plan says what a run needs", 5
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
    ):
        return f"{error.filename or 'disk'}: {error.strerror}. Nothing half-written is left; continue with --resume", 5
    return None


def main() -> None:
    """Entry point: errors a user can act on are one line, without a traceback."""
    remember_interrupts()
    try:
        code = app(standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, typer.Exit):
            sys.exit(error.exit_code)
        show = getattr(error, "show", None)  # typer carries a click of its own, whose exceptions it does not export
        if show is not None:
            show()
            sys.exit(2)
        known = _message(KeyboardInterrupt() if isinstance(error, typer.Abort) else error)
        if known is None:
            raise
        print(f"tersor: {known[0]}", file=sys.stderr)
        sys.exit(known[1])
    if code == INTERRUPTED:  # typer turns Ctrl-C into an exit code
        known = _message(KeyboardInterrupt())
        print(f"tersor: {known[0] if known else 'interrupted'}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
