"""A source's units of text: the lines of a text file, the records of a .jsonl, the files of a folder.

A span takes a share of the units and so means the same text for every tokenizer. Shares that touch, `0%-60%`
and `60%-100%`, have no unit in common. The files of a folder are sorted by relative path; hidden ones are
left out, and a .jsonl among them gives its records.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from .errors import PreflightError, RecipeError

T = TypeVar("T")

RECORDS = ".jsonl"
TEXT = frozenset(
    f".{kind}"
    for kind in (
        *("c", "cc", "cpp", "css", "go", "h", "hpp", "html", "java", "jl", "js", "kt", "md", "py", "r", "rb"),
        *("rs", "rst", "scala", "sh", "sql", "swift", "tex", "toml", "ts", "txt", "yaml", "yml"),
    )
)
SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*-\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True)
class Part:
    """Which text of a source is used.

    Attributes:
        path: file or folder.
        field: of a .jsonl record, holds the text.
        span: share of the units, all if None.
        place: what the source is called in errors.
    """

    path: Path
    field: str
    span: str | None
    place: str

    def cut(self, units: list[T], kind: str) -> list[T]:
        """The units in the span.

        Raises:
            RecipeError: there are none.
        """
        low, high = bounds(self.span)
        kept = units[int(low * len(units)) : int(high * len(units))]
        if units and not kept:
            found = f"{self.span} of {len(units)} {kind}, which is none of them"
            raise RecipeError(f"{self.place}.span", found, "at least one", "Widen the span.")
        return kept


def bounds(span: str | None) -> tuple[Fraction, Fraction]:
    """A span's ends as shares, exact.

    Raises:
        ValueError: it is not two rising percentages up to 100.
    """
    if span is None:
        return Fraction(0), Fraction(1)
    match = SPAN.fullmatch(span)
    low, high = (Fraction(end) / 100 for end in match.groups()) if match else (Fraction(0), Fraction(0))
    if not low < high <= 1:
        raise ValueError(f"{span!r} is no share of the text like '0%-60%'")
    return low, high


def files(part: Part) -> list[Path]:
    """The files that hold the text, in order.

    Raises:
        PreflightError: the path does not exist, or is a folder without text.
        RecipeError: a file of a kind that is not read; an empty span of a folder.
    """
    path, place = part.path, f"{part.place}.path: {part.path}"
    if path.is_dir():
        return part.cut(_folder(path, place), "files")
    if not path.exists():
        raise PreflightError(place, "no such file or folder", "text to read")
    if path.suffix.lower() not in TEXT | {RECORDS}:
        raise RecipeError(place, f"a file of kind {path.suffix!r}", ".txt, .jsonl or a folder")
    return [path]


def units(part: Part) -> list[str]:
    """The texts of the units in the span.

    Raises:
        PreflightError: see `files`; a file is empty, not UTF-8, or not one JSON object a line.
        RecipeError: see `files`; a record has no such field; the span is empty.
    """
    found = files(part)
    if part.path.is_dir():
        texts = [
            text
            for file in found
            for text in (_records(file, part) if _has_records(file) else [_decode(file)])
        ]
    elif _has_records(part.path):
        texts = part.cut(list(_records(part.path, part)), "records")
    else:
        texts = part.cut(re.findall(r"[^\n]*\n|[^\n]+", _decode(part.path)), "lines")
    if not any(text.strip() for text in texts):
        raise PreflightError(f"{part.place}.path: {part.path}", "nothing but blanks", "text")
    return texts


def _has_records(path: Path) -> bool:
    return path.suffix.lower() == RECORDS


def _folder(path: Path, place: str) -> list[Path]:
    found: list[Path] = []
    for directory, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith((".", "__pycache__"))]
        wanted = (name for name in names if Path(name).suffix.lower() in TEXT | {RECORDS})
        found += [Path(directory) / name for name in wanted if not name.startswith(".")]
    if not found:
        raise PreflightError(place, "a folder without text", "files like .txt, .jsonl, .py")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"a byte that is not UTF-8 (0x{error.object[error.start]:02x} at {error.start})"
        raise PreflightError(str(path), found, "UTF-8 text", "Convert the file.") from error
    except OSError as error:
        raise PreflightError(str(path), f"a file that cannot be read ({error.strerror})", "text") from error


def _records(path: Path, part: Part) -> Iterator[str]:
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if line.strip():
            yield _field(line, f"{path}:{number}", part)


def _field(line: str, place: str, part: Part) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PreflightError(place, f"a line that is not JSON ({error})", "one object a line") from error
    if not isinstance(record, dict):
        raise PreflightError(place, f"a JSON {type(record).__name__}", "one object a line")
    text = record.get(part.field)
    if isinstance(text, str):
        return text
    lacks = (
        f"no field {part.field!r}" if part.field not in record else f"a field {part.field!r} that is no text"
    )
    texts = sorted(str(name) for name, value in record.items() if isinstance(value, str))
    has = f"one of its texts: {', '.join(texts)}" if texts else "a record with text"
    raise RecipeError(place, lacks, has, f"Set {part.place}.field.")
