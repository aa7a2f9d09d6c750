"""Catalogue: every pass and exporter with its options, read from the classes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .errors import RecipeError
from .registry import EXPORTERS, PASSES, Group, find_exporter, find_pass, names
from .words import nearest, one_of

FINDERS: tuple[tuple[str, Group, Callable[[str], type]], ...] = (
    ("pass", PASSES, find_pass),
    ("exporter", EXPORTERS, find_exporter),
)


def summary() -> list[dict[str, str]]:
    """Name, kind and first sentence of each; of one that does not import, why."""
    listed = []
    for kind, group, find in FINDERS:
        for name in names(group):
            try:
                text = (inspect.getdoc(find(name)) or "").split("\n\n")[0].replace("\n", " ")
            except RecipeError as error:
                text = f"broken: {error.found}"
            listed.append({"name": name, "kind": kind, "summary": text})
    return listed


def describe(name: str) -> dict[str, Any]:
    """All about one pass or exporter: its module's text and its options.

    Raises:
        RecipeError: there is none of that name.
    """
    for kind, group, find in FINDERS:
        if name in names(group):
            found = find(name)
            text = inspect.getdoc(sys.modules[found.__module__]) or ""
            return {"name": name, "kind": kind, "text": text, "options": options(found)}
    known_names = [*names(PASSES), *names(EXPORTERS)]
    raise RecipeError("tersor passes", repr(name), one_of(known_names), nearest(name, known_names))


def options(found: type) -> list[dict[str, str]]:
    """The options of a pass or exporter: name, type, default, meaning (from the `Attributes` of its docstring)."""
    meanings: dict[str, str] = {}
    for base in reversed(found.__mro__):  # options may be inherited, as those of training are
        meanings |= attributes(inspect.cleandoc(base.__doc__ or ""))
    hints = typing.get_type_hints(found, include_extras=True)
    listed = []
    for field in dataclasses.fields(found):
        default, hint = field.default, hints[field.name]
        if isinstance(default, FieldInfo):  # `= Field(default=…, ge=…)` says the same as `Annotated[…]`
            default, hint = default.default, Annotated[hint, default]
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default in (dataclasses.MISSING, PydanticUndefined)
        listed.append(
            {
                "name": field.name,
                "type": spelled(hint),
                "default": "(required)" if required else "none" if default is None else str(default),
                "meaning": meanings.get(field.name, ""),
            }
        )
    return listed


def spelled(hint: Any) -> str:
    """A type as people write it: `int, > 1 | none`, `list of ffn | heads`."""
    if typing.get_origin(hint) is Annotated:
        inner, *extras = typing.get_args(hint)
        limits = [m for extra in extras for m in getattr(extra, "metadata", [extra])]
        signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
        found = [f"{signs[k]} {v}" for m in limits for k, v in vars_of(m).items() if k in signs and v is not None]
        return ", ".join([spelled(inner), *found])
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, inside))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(spelled, inside))
    if origin in (list, tuple):
        return f"list of {spelled(inside[0])}"
    return "none" if hint is type(None) else str(getattr(hint, "__name__", hint))


def vars_of(limit: Any) -> dict[str, Any]:
    """The attributes of a constraint object (annotated_types uses slots)."""
    return {name: getattr(limit, name) for name in ("gt", "ge", "lt", "le") if hasattr(limit, name)}


def attributes(doc: str) -> dict[str, str]:
    """The `Attributes:` section of a docstring, by name."""
    section = re.search(r"^Attributes:\n((?:(?: {4}.*)?\n?)*)", doc, re.MULTILINE)
    found: dict[str, str] = {}
    name = ""
    for line in section.group(1).splitlines() if section else ():
        head = re.match(r" {4}(\w+): (.*)", line)
        if head:
            name = head.group(1)
            found[name] = head.group(2)
        elif line.strip() and name:
            found[name] += f" {line.strip()}"
    return found
