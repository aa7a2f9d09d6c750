"""Records of a table: a .jsonl, a .csv or .tsv, a .parquet, or a dataset of the `datasets` library.

Every record knows where it stands, so that a wrong value is reported with its file and line. A .csv has a heading row
and commas, quoted as spreadsheets do; a .tsv has tabs and no quoting, as the public benchmarks have it. `columns`
names the columns of a file that has no heading; then what follows the last named one is passed over.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import PreflightError, RecipeError

if TYPE_CHECKING:
    from .units import Part

KINDS = (".jsonl", ".csv", ".tsv", ".parquet")
DATASETS = "datasets:"
LONGEST_FIELD = 1 << 24  # characters of one .csv cell


@dataclass(frozen=True)
class Record:
    """One row.

    Attributes:
        values: by field.
        place: where it stands: `file:line`, or `file, row n` where there are no lines.
        source: what its source is called in errors, e.g. `data.heldout`.
    """

    values: dict[str, Any]
    place: str
    source: str

    def text(self, field: str, option: str = "field") -> str:
        """The text in a field.

        Raises:
            RecipeError: there is no such field, or it holds no text.
        """
        value = self.values.get(field)
        if isinstance(value, str):
            return value
        lacks = f"no field {field!r}" if field not in self.values else f"a field {field!r} that is no text"
        texts = sorted(name for name, value in self.values.items() if isinstance(value, str))
        has = f"one of its texts: {', '.join(texts)}" if texts else "a record with text"
        raise RecipeError(self.place, lacks, has, f"Set {self.source}.{option}.")

    def value(self, field: str, option: str) -> Any:
        """Whatever a field holds.

        Raises:
            RecipeError: there is no such field, or it is empty.
        """
        found = self.values.get(field)
        if found is None or found == "":
            lacks = f"no field {field!r}" if field not in self.values else f"an empty field {field!r}"
            raise RecipeError(
                self.place, lacks, f"one of {', '.join(sorted(self.values))}", f"Set {self.source}.{option}."
            )
        return found


def records(path: Path, part: Part) -> list[Record]:
    """All records of a file, in order; blank lines are none.

    Raises:
        PreflightError: the file is not what its ending says, or pyarrow is missing.
        RecipeError: a column is named twice, or there are fewer than named.
    """
    kind = path.suffix.lower()
    if kind == ".jsonl":
        return list(_jsonl(path, part))
    if kind == ".parquet":
        return _parquet(path, part)
    return list(_csv(path, part, part.delimiter or ("\t" if kind == ".tsv" else ",")))


def decode(path: Path) -> str:
    """A file's text.

    Raises:
        PreflightError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"a byte that is not UTF-8 (0x{error.object[error.start]:02x} at {error.start})"
        raise PreflightError(str(path), found, "UTF-8 text", "Convert the file.") from error
    except OSError as error:
        raise PreflightError(str(path), f"a file that cannot be read ({error.strerror})", "text") from error


def _jsonl(path: Path, part: Part) -> Iterator[Record]:
    for number, line in enumerate(decode(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PreflightError(place, f"a line that is not JSON ({error})", "one object a line") from error
        if not isinstance(record, dict):
            raise PreflightError(place, f"a JSON {type(record).__name__}", "one object a line")
        yield Record(record, place, part.place)


def _csv(path: Path, part: Part, delimiter: str) -> Iterator[Record]:
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        reader = csv.reader(io.StringIO(decode(path), newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        names = list(part.columns)
        last = 0
        for row in reader:
            place, last = f"{path}:{last + 1}", reader.line_num
            if not any(cell.strip() for cell in row):
                continue
            if not names:
                names = row
                if len(set(names)) < len(names):
                    twice = next(name for name in names if names.count(name) > 1)
                    raise RecipeError(
                        place, f"two columns {twice!r}", "a heading row", f"Name them with {part.place}.columns."
                    )
                continue
            if len(row) < len(names) or (len(row) > len(names) and not part.columns):
                raise PreflightError(
                    place, f"{len(row)} cells", f"{len(names)}: {', '.join(names)}", "Are delimiter and quotes right?"
                )
            yield Record(dict(zip(names, row, strict=False)), place, part.place)
    except csv.Error as error:
        raise PreflightError(f"{path}:{last + 1}", f"a row that does not parse ({error})", "a table") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, part: Part) -> list[Record]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise PreflightError(str(path), "no pyarrow", "it, to read .parquet", "pip install 'tersor[data]'") from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        said = str(error).splitlines()[0][:200]
        raise PreflightError(str(path), f"a file that is no parquet ({said})", "a whole .parquet") from error
    return [Record(row, f"{path}, row {number}", part.place) for number, row in enumerate(rows, 1)]


def dataset(part: Part, offline: bool) -> list[Record]:
    """The records of `datasets:ID`, or of `datasets:FOLDER` as `save_to_disk` writes it.

    Raises:
        PreflightError: the library is missing, or the dataset cannot be had.
        RecipeError: the dataset has splits and none is named, or not that one.
    """
    name = part.reference.removeprefix(DATASETS)
    place = f"{part.place}.path: {part.reference}"
    try:
        import datasets
    except ImportError as error:
        raise PreflightError(place, "no datasets library", "it", "pip install 'tersor[data]'") from error
    try:
        found = _local(datasets, Path(name), part) if Path(name).is_dir() else _fetched(datasets, name, part, offline)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())[:200]
        raise PreflightError(
            place, f"a dataset that cannot be had ({said})", "a cached, local or reachable one"
        ) from error
    if isinstance(found, dict):
        given = f"no split {part.split!r}" if part.split else "a dataset in splits and none named"
        if part.split not in found:
            raise RecipeError(place, given, f"one of {', '.join(found)}", f"Set {part.place}.split.")
        found = found[part.split]
    return [Record(dict(row), f"{part.reference}, row {number}", part.place) for number, row in enumerate(found, 1)]


def _local(datasets: Any, folder: Path, part: Part) -> Any:
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json"))
    return datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder), part.subset)


def _fetched(datasets: Any, name: str, part: Part, offline: bool) -> Any:
    """From the cache or the hub; the switch that keeps the library at home is put back."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline or bool(os.environ.get("HF_HUB_OFFLINE"))
    try:
        return datasets.load_dataset(name, part.subset, split=part.split)
    finally:
        datasets.config.HF_HUB_OFFLINE = before
