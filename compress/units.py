"""A source's units of text: the lines of a text file, the records of a table, the files of a folder.

A span takes a share of the units and so means the same text for every tokenizer. Shares that touch, `0%-60%`
and `60%-100%`, have no unit in common. The files of a folder are sorted by relative path; hidden ones are
left out, and a table among them gives its records.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from .errors import PreflightError, RecipeError
from .tables import DATASETS, KINDS, Record, dataset, decode, records

T = TypeVar("T")

RECORDS = frozenset(KINDS)
TEXT = frozenset(
    f".{kind}"
    for kind in (
        *("c", "cc", "cpp", "css", "go", "h", "hpp", "html", "java", "jl", "js", "kt", "md", "py", "r", "rb"),
        *("rs", "rst", "scala", "sh", "sql", "swift", "tex", "toml", "ts", "txt", "yaml", "yml"),
    )
)
IMAGES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*-\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True)
class Part:
    """Which text of a source is used.

    Attributes:
        path: file or folder.
        field: of a record, holds the text.
        span: share of the units, all if None.
        place: what the source is called in errors.
        reference: the path as the recipe has it.
        columns: of a .csv or .tsv without a heading.
        delimiter: of a .csv or .tsv; by the file's ending if None.
        split: of a dataset.
        subset: of a dataset, its configuration.
    """

    path: Path
    field: str
    span: str | None
    place: str
    reference: str = ""
    columns: tuple[str, ...] = ()
    delimiter: str | None = None
    split: str | None = None
    subset: str | None = None

    @property
    def is_dataset(self) -> bool:
        """Whether the `datasets` library reads it."""
        return self.reference.startswith(DATASETS)

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
    """The files that hold the text, in order; none of a dataset, whose files are the library's.

    Raises:
        PreflightError: the path does not exist, or is a folder without text.
        RecipeError: a file of a kind that is not read; an empty span of a folder.
    """
    path, place = part.path, f"{part.place}.path: {part.path}"
    if part.is_dataset:
        return []
    if path.is_dir():
        texts = sorted(_walk(path, TEXT | RECORDS), key=lambda file: file.relative_to(path).as_posix())
        if not texts and any(_walk(path, IMAGES)):
            return [file for files in classes(part).values() for file in files]
        if not texts:
            raise PreflightError(place, "a folder without text", "files like .txt, .jsonl, .py")
        return part.cut(texts, "files")
    if not path.exists():
        raise PreflightError(place, "no such file or folder", "text to read")
    if path.suffix.lower() not in TEXT | RECORDS:
        raise RecipeError(place, f"a file of kind {path.suffix!r}", f".txt, {', '.join(KINDS)} or a folder")
    return [path]


def units(part: Part, offline: bool = False) -> list[str]:
    """The texts of the units in the span.

    Raises:
        PreflightError: see `files` and `tables.records`; a file is empty or not UTF-8.
        RecipeError: see `files`; a record has no such field; the span is empty.
    """
    if part.is_dataset or _has_records(part.path):
        texts = [record.text(part.field) for record in rows(part, offline)]
    elif part.path.is_dir():
        texts = [text for file in files(part) for text in _texts(file, part)]
    else:
        (file,) = files(part)
        texts = part.cut(re.findall(r"[^\n]*\n|[^\n]+", decode(file)), "lines")
    if not any(text.strip() for text in texts):
        raise PreflightError(f"{part.place}.path: {part.path}", "nothing but blanks", "text")
    return texts


def rows(part: Part, offline: bool = False) -> list[Record]:
    """The records in the span of a table or a dataset.

    Raises:
        PreflightError: see `files`, `tables.records` and `tables.dataset`.
        RecipeError: likewise; the source has no records; the span is empty.
    """
    if part.is_dataset:
        return part.cut(dataset(part, offline), "records")
    (file, *more) = files(part)
    if more or not _has_records(part.path):
        kind = "a folder" if part.path.is_dir() else f"a file of kind {part.path.suffix!r}"
        raise RecipeError(f"{part.place}.path: {part.path}", kind, f"records: {', '.join(KINDS)} or a dataset")
    return part.cut(records(file, part), "records")


def _texts(file: Path, part: Part) -> list[str]:
    return [record.text(part.field) for record in records(file, part)] if _has_records(file) else [decode(file)]


def _has_records(path: Path) -> bool:
    return path.suffix.lower() in RECORDS and not path.is_dir()


def classes(part: Part) -> dict[str, list[Path]]:
    """The images of a folder by class, the name of the sub-folder, both sorted; of each class the span's share.

    Raises:
        PreflightError: no such folder, or no images in its sub-folders.
        RecipeError: images or text where a class' images should be; an empty span.
    """
    path, place = part.path, f"{part.place}.path: {part.path}"
    if not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        raise PreflightError(place, found, "a folder with a sub-folder of images for each class")
    if texts := sorted(_walk(path, TEXT | RECORDS)):
        raise RecipeError(place, f"text among the images ({texts[0].name})", "images alone", "Move it elsewhere.")
    found_by: dict[str, list[Path]] = {}
    for image in sorted(_walk(path, IMAGES), key=lambda file: file.relative_to(path).as_posix()):
        inner = image.relative_to(path).parts
        if len(inner) == 1:
            raise RecipeError(place, f"an image outside the classes ({image.name})", "each in its class' folder")
        found_by.setdefault(inner[0], []).append(image)
    if not found_by:
        raise PreflightError(place, "a folder without images", "a sub-folder of images for each class")
    return {name: part.cut(images, f"images of {name}") for name, images in found_by.items()}


def _walk(path: Path, kinds: frozenset[str]) -> Iterator[Path]:
    """Files of these kinds, hidden ones left out."""
    for directory, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith((".", "__pycache__"))]
        wanted = (name for name in names if Path(name).suffix.lower() in kinds)
        yield from (Path(directory) / name for name in wanted if not name.startswith("."))
