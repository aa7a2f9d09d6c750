"""The run directory: what a run writes, so that nothing appears half-written and a killed run can go on.

Everything large is written into a sibling folder and renamed into place; a step counts as finished when its line is
in journal.jsonl, which is appended and synced after the rename. A lock held by the kernel, gone with the process,
keeps a second run out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .errors import PreflightError, RecipeError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """Readable JSON with a stable order."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below `directory`, by relative path."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): hash_file(p) for p in files}


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place when the block ends well, and vanishes otherwise."""
    beside = target.with_name(f".{target.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        shutil.rmtree(target, ignore_errors=True)
        beside.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class RunDirectory:
    """An open run directory, locked for this process. Use as a context manager."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: TextIO | None = None
        self.journal: list[dict[str, Any]] = []

    def open(self, lock: dict[str, Any], resume: bool) -> None:
        """Take the directory for a run whose inputs are `lock` (recipe, weights and data by hash, versions).

        Raises:
            PreflightError: another run holds it, or it cannot be written.
            RecipeError: it holds a run and `resume` is off, or one with other inputs.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115  held until `close`
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PreflightError(str(self.path), "another run in progress there", "a folder of its own") from error
        except OSError as error:
            raise PreflightError(
                str(self.path), f"a folder that cannot be written ({error.strerror})", "a writable --output"
            ) from error
        before = self.path / "lock.json"
        if not before.exists():
            strangers = sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))
            if strangers:
                raise RecipeError(
                    f"--output {self.path}", f"a folder with other files ({strangers[0]})", "a new or empty one"
                )
            write_atomic(before, to_json(lock))
        elif not resume:
            raise RecipeError(
                f"--output {self.path}",
                "a run is there already",
                "",
                "Continue it with --resume, or name another folder.",
            )
        else:
            self._same(json.loads(before.read_text("utf-8")), lock)
        self._read_journal()

    def _same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for key in ("recipe", "weights", "data"):
            if before.get(key) != now[key]:
                raise RecipeError(
                    f"--resume {self.path}",
                    f"another {key} than this run was started with",
                    "the same",
                    "Start a new run in another folder.",
                )

    def _read_journal(self) -> None:
        path = self.path / "journal.jsonl"
        if not path.exists():
            return
        lines = path.read_text("utf-8").split("\n")
        # A kill in mid-write leaves a last line without its newline: that step did not finish.
        self.journal = [json.loads(line) for line in lines[:-1] if line]
        if lines[-1]:
            write_atomic(path, "".join(f"{line}\n" for line in lines[:-1]))

    def entry(self, step: str) -> dict[str, Any] | None:
        """The journal's line for a finished step."""
        return next((e for e in self.journal if e["step"] == step), None)

    def finish_step(self, entry: dict[str, Any]) -> None:
        """Append a line to the journal; from here on the step is done."""
        with open(self.path / "journal.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.journal.append(entry)

    def step(self, name: str) -> Path:
        """Where a step keeps its result until the run ends."""
        return self.path / ".steps" / name

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def next_free(base: Path) -> Path:
    """`base`, or `base-2`, `base-3`, … if it is taken."""
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path
