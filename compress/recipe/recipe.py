"""Recipe: what to do, as frozen data. Model, text, passes, gates, exports, seed; not how it is run.

A recipe is read as plain YAML (yaml_file.py), changed by `--set` (overrides.py) and validated by pydantic in
strict JSON mode: lists become tuples and whole numbers become floats where a field wants them, nothing else
is converted. Each error comes back with the line and column it stems from (complaints.py). The options of a
pass are the fields of its class, found by name; no other pass is imported, and neither torch nor
transformers here.

Relative paths (`model`, `data.*.path`) are tried from the working directory, then from the recipe's own
folder (paths.py). They stay as written, so that a recipe and its digest are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from ..data import Source
from ..errors import RecipeError
from ..exporter import Exporter
from ..words import nearest, one_of, shown
from .complaints import MOST, RecipeFaultsError, as_written, nearest_mark, translate
from .overrides import override
from .steps import FORBID, ExportStep, Gates, PassStep
from .yaml_file import Document, Loc, Mark, dotted, read_yaml
from .yaml_text import to_yaml

FIRST_LINE = "Its first line is `recipe: 1`."


class Data(BaseModel):
    """The text of a recipe.

    Attributes:
        calibration: what passes may look at.
        heldout: what metrics and gates are measured on; no pass ever sees it.
    """

    model_config = FORBID

    calibration: Source | None = None
    heldout: Source | None = None


class Recipe(BaseModel):
    """What to do with a checkpoint.

    Attributes:
        recipe: version of the schema.
        name: what the run is called; the file's stem if not given.
        model: checkpoint directory, `package:NAME/dir`, or hub id; `--model` overrides.
        task: optimum's task name; taken from the checkpoint's config if not given.
        dtype: dtype of the saved checkpoint; its source's if not given.
        seed: seed of every choice.
        data: calibration and held-out text.
        metrics: what is measured besides parameters, bytes and latency.
        passes: what is done, in order.
        gate: limits on the final checkpoint and again on each artifact.
        export: what is written besides the checkpoint.
    """

    model_config = FORBID

    recipe: Literal[1]
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^/\\]+$")] = "recipe"
    model: Annotated[str, Field(min_length=1)] | None = None
    task: Annotated[str, Field(min_length=1)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: Data = Data()
    metrics: tuple[str, ...] = ()
    passes: tuple[PassStep, ...] = ()
    gate: Gates = ()
    export: tuple[ExportStep, ...] = ()

    _base: Path | None = PrivateAttr(default=None)
    _document: Document | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Recipes are equal by what they say, wherever it was read."""
        return isinstance(other, Recipe) and self.canonical() == other.canonical()

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def base(self) -> Path | None:
        """Folder of the file; where relative paths are tried after the working directory."""
        return self._base

    @property
    def places(self) -> Mapping[Loc, str]:
        """`file:line:column` (or `--set K=V`) of every value that was written, by path."""
        return {} if self._document is None else {loc: str(mark) for loc, mark in self._document.values.items()}

    def place(self, *loc: str | int) -> str:
        """Where an error about `loc` belongs: `recipe.yaml:9:20: passes.0.with.remove`.

        What was not written stands at the nearest thing around it that was.
        """
        if self._document is None:
            return f"recipe {self.name}: {dotted(loc)}"
        loc = as_written(loc, self._document.value)
        mark = nearest_mark(self._document.values, loc)
        return f"{mark}: {dotted(loc)}" if loc else str(mark)

    def canonical(self) -> dict[str, Any]:
        """The recipe as plain JSON, defaults filled in."""
        plain: dict[str, Any] = self.model_dump(mode="json", by_alias=True, serialize_as_any=True)
        return plain

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.canonical(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as resolved: overrides applied, defaults filled in. Loads back to the same digest."""
        return to_yaml(_without_nothing(self.canonical()))

    def check(self) -> None:
        """Refuse what needs no model to be seen wrong: unmeasured gates, missing or shared text.

        Raises:
            RecipeError: one line for each thing that is wrong.
        """
        from .checks import wrong

        faults = list(islice(wrong(self), 10 * MOST))
        if self._document is not None:
            tree, marks = self._document.value, self._document.values
            faults.sort(key=lambda fault: nearest_mark(marks, as_written(fault[0], tree)).order)
        if faults:
            raise RecipeFaultsError([RecipeError(self.place(*loc), *said) for loc, *said in faults])


def _without_nothing(value: Any) -> Any:
    """Without the optional things that are absent; a pass's own nulls stay."""
    if isinstance(value, list):
        return [_without_nothing(part) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {key: part if key == "with" else _without_nothing(part) for key, part in value.items()}
    return {key: part for key, part in kept.items() if part is not None and part not in ([], {})}


def shipped() -> dict[str, Path]:
    """Recipes that ship with tersor, by name."""
    folder = Path(str(resources.files("tersor.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(reference: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a .yaml file, or the shipped one of that name.

    Args:
        reference: a path, or a name from `shipped()`.
        overrides: `passes.0.with.remove=0.3` and the like, in order; the value is YAML.

    Raises:
        RecipeError: a line for each thing that is wrong: file, line, column, key, found, expected, remedy.
    """
    path, name = _find(reference)
    document = read_yaml(path, name)
    if document.value is None:
        raise RecipeError(name, "an empty file", "a recipe", FIRST_LINE)
    if not isinstance(document.value, dict):
        found = "a list" if isinstance(document.value, list) else "a single value"
        raise RecipeError(str(document.values[()]), found, "a mapping", FIRST_LINE)
    for text in overrides:
        override(document, text)
    recipe = _validated(document, _name(path))
    recipe._base = path.parent
    recipe.check()
    return recipe


def exporter_options(use: str, overrides: Sequence[str] = ()) -> Exporter:
    """The exporter of that name with its options as `inputs=padded` and the like say.

    Raises:
        RecipeError: unknown exporter, unknown option, or a value it does not take.
    """
    tree = {"recipe": 1, "export": [{"use": use, "with": {}}]}
    document = Document(tree, values={(): Mark("exporter")})
    for text in overrides:
        override(document, text, ("export", 0, "with"))
    return _validated(document, "export").export[0].options


def source_options(path: str, samples: int, length: int, overrides: Sequence[str] = ()) -> Source:
    """The data in a file, folder or dataset, with its options as `label=score`, `pair=[a, b]` and the like say.

    Raises:
        RecipeError: unknown option, or a value it does not take.
    """
    tree = {"recipe": 1, "data": {"heldout": {"path": path, "samples": samples, "length": length}}}
    document = Document(tree, values={(): Mark("data")})
    for text in overrides:
        override(document, text, ("data", "heldout"))
    found = _validated(document, "data").data.heldout
    assert found is not None
    return found


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors: see schema.py."""
    from . import schema

    return schema.json_schema()


def _validated(document: Document, name: str) -> Recipe:
    written = json.dumps({"name": name, **document.value})
    try:
        recipe = Recipe.model_validate_json(written, by_alias=True, by_name=False)
    except ValidationError as error:
        from .schema import schema_at

        raise translate(error.errors(), document, schema_at) from error
    recipe._document = document
    return recipe


def _name(path: Path) -> str:
    return path.stem.encode("utf-8", "replace").decode().replace("\\", "_")[:100]


def _find(reference: str | Path) -> tuple[Path, str]:
    """The file, and what messages call it."""
    text = str(reference)
    called = text if text.isprintable() and len(text) < 1000 else shown(text)
    known = shipped()
    if text in known:
        return known[text], f"{text}.yaml"
    try:
        path = Path(text).expanduser()
        is_path = path.suffix in {".yaml", ".yml"} or len(path.parts) != 1 or path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, `~nobody`, or with a NUL in it
        raise RecipeError(f"recipe {called}", f"no path ({error})", f"a .yaml file or {one_of(known)}") from error
    if is_path or isinstance(reference, Path):
        return path, called
    beside = [f"Did you mean {text}{end}?" for end in (".yaml", ".yml") if path.with_suffix(end).is_file()]
    raise RecipeError(
        f"recipe {called}",
        "no recipe of that name",
        f"a .yaml file or {one_of(known)}" if known else "a .yaml file",
        beside[0] if beside else nearest(text, known),
    )
