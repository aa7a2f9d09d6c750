"""The JSON Schema of recipes: for editors, which complete and check as one types, and for our error messages.

Under `with` stand the options of the pass that `use` names, as `if use = slice then with = {…}`. Titles and
descriptions are the classes' docstrings, the `Attributes:` sections included.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError

from ..data import Source
from ..errors import RecipeError
from ..evaluate.gate import Gate
from ..evaluate.metrics import ALWAYS, METRICS
from ..registry import EXPORTERS, PASSES, Group, find_exporter, find_pass, names
from .complaints import value_at
from .recipe import Data, Recipe
from .schema_words import Schema, branches
from .steps import ExportStep, PassStep, adapter
from .yaml_file import Loc

STEPS: dict[str, tuple[type, Group, Callable[[str], type]]] = {
    "passes": (PassStep, PASSES, find_pass),
    "export": (ExportStep, EXPORTERS, find_exporter),
}


def json_schema() -> Schema:
    """The whole schema (draft 2020-12), with the options of every pass and exporter that is installed.

    A pass whose package does not import keeps its name; its description says what is wrong.
    """
    schema = copy.deepcopy(_recipe())
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "tersor recipe"
    schema["properties"]["metrics"]["items"]["enum"] = list(METRICS)
    schema["$defs"]["Gate"]["properties"]["metric"]["enum"] = [*METRICS, *ALWAYS]
    for step, group, find in STEPS.values():
        known = names(group)
        part = schema["$defs"][step.__name__]
        part["properties"]["use"]["enum"] = known
        part["allOf"] = []
        for name in known:
            options, required = _named_options(name, find, schema)
            then: Schema = {"properties": {"with": options}}
            if required:
                then["required"] = ["with"]
            part["allOf"].append({"if": {"properties": {"use": {"const": name}}}, "then": then})
    return schema


def schema_at(loc: Loc, tree: Any) -> Schema:
    """The schema of what may stand at `loc` of a recipe that reads `tree`; empty if unknown."""
    root = node = _recipe()
    for index, part in enumerate(loc):
        node = _inner(node, part, root)
        if part == "with" and index == 2:
            root = node = _options_at(loc, tree)
    node = _resolved(node, root, deep=2)
    if len(loc) == 2 and loc[0] in STEPS:
        node["properties"]["with"] = _options_at(loc, tree)
    return node


def _options_at(loc: Loc, tree: Any) -> Schema:
    use = value_at(tree, (*loc[:2], "use"))
    if loc[0] not in STEPS or not isinstance(use, str):
        return {}
    try:
        return options_schema(STEPS[str(loc[0])][2](use))
    except RecipeError:  # the fault is `use`, and is told there
        return {}


def options_schema(kind: type) -> Schema:
    """The schema of an options class, described by its docstring; empty for types JSON does not know."""
    try:
        schema = adapter(kind).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticUserError):
        return {}
    return _described(schema, kind)


def documentation(kind: type) -> tuple[str, dict[str, str]]:
    """A class's docstring as its text and the lines of its `Attributes:` section by name."""
    text, _, section = inspect.cleandoc(kind.__doc__ or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        match = re.fullmatch(r"    (\w+): (.*)", line)
        if match:
            name = match[1]
            found[name] = match[2]
        elif name and line.startswith("     "):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return " ".join(text.split()), found


@cache
def _recipe() -> Schema:
    """The schema without any pass; not to be changed."""
    schema = Recipe.model_json_schema(by_alias=True)
    for kind in (Data, PassStep, ExportStep, Gate, Source):
        _described(schema["$defs"][kind.__name__], kind)
    for holder in (schema, *(schema["$defs"][step.__name__] for step, _, _ in STEPS.values())):
        gates = holder["properties"]["gate"]
        holder["properties"]["gate"] = {
            "anyOf": [gates.pop("items"), {"type": "array", "items": {"$ref": "#/$defs/Gate"}}],
            **{key: value for key, value in gates.items() if key != "type"},
        }
    return _described(schema, Recipe)


def _described(schema: Schema, kind: type) -> Schema:
    text, fields = documentation(kind)
    if text:
        schema["description"] = text
    aliases = {"options": "with"} if kind in (PassStep, ExportStep) else {}
    for field, words in fields.items():
        part = schema.get("properties", {}).get(aliases.get(field, field))
        if part is not None:
            part["description"] = words
    return schema


def _named_options(name: str, find: Callable[[str], type], schema: Schema) -> tuple[Schema, bool]:
    """The options of one pass, their definitions moved into `schema`; whether one of them is required."""
    try:
        options = options_schema(find(name))
    except RecipeError as error:
        return {"description": f"{name} cannot be used: {error.found}. {error.remedy}"}, False
    moved = {key: f"{name}.{key}" for key in options.get("$defs", {})}

    def renamed(node: Any) -> Any:
        if isinstance(node, list):
            return [renamed(part) for part in node]
        if not isinstance(node, dict):
            return node
        new = {key: renamed(part) for key, part in node.items()}
        if isinstance(new.get("$ref"), str):
            inner = new["$ref"].removeprefix("#/$defs/")
            new["$ref"] = f"#/$defs/{moved.get(inner, inner)}"
        return new

    for key, part in options.pop("$defs", {}).items():
        schema["$defs"][moved[key]] = renamed(part)
    return renamed(options), bool(options.get("required"))


def _resolved(node: Schema, root: Schema, deep: int = 1) -> Schema:
    """The schema without references on its first `deep` levels."""
    node = dict(node)
    while "$ref" in node:
        target = root.get("$defs", {}).get(str(node.pop("$ref")).removeprefix("#/$defs/"), {})
        node = {**target, **node}
    if deep and "anyOf" in node:
        node["anyOf"] = [_resolved(branch, root, deep) for branch in node["anyOf"]]
    if deep and "properties" in node:
        node["properties"] = {key: _resolved(part, root, deep - 1) for key, part in node["properties"].items()}
    if deep and isinstance(node.get("items"), dict):
        node["items"] = _resolved(node["items"], root, deep - 1)
    return node


def _inner(node: Schema, part: str | int, root: Schema) -> Schema:
    for schema in branches(_resolved(node, root)):
        if isinstance(part, int) and "items" in schema:
            return dict(schema["items"])
        if part in schema.get("properties", {}):
            return dict(schema["properties"][part])
        if isinstance(schema.get("additionalProperties"), dict):
            return dict(schema["additionalProperties"])
    return {}
