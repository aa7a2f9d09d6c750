"""Passes and exporters by name, found through entry points.

The built-ins are entry points of tersor itself (pyproject.toml), so that a package of somebody else's adds a
pass in exactly the same way. Looking up one name imports that one module: the list of names costs no import,
and a broken package harms only the recipes that use it.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Literal, TypeVar

from pydantic.dataclasses import is_pydantic_dataclass

from .errors import RecipeError
from .exporter import Exporter
from .pass_ import STRICT, Pass
from .words import nearest, one_of, shown

Group = Literal["tersor.passes", "tersor.exporters"]

PASSES: Group = "tersor.passes"
EXPORTERS: Group = "tersor.exporters"

T = TypeVar("T")


def names(group: Group) -> list[str]:
    """Every name of the group, sorted. Imports nothing."""
    return sorted({point.name for point in _points(group)})


def find_pass(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        RecipeError: unknown name, a package that does not import, or a class that is not a pass.
    """
    return _find(name, PASSES, "pass", Pass)  # type: ignore[type-abstract]


def find_exporter(name: str) -> type[Exporter]:
    """The exporter of that name.

    Raises:
        RecipeError: unknown name, a package that does not import, or a class that is not an exporter.
    """
    return _find(name, EXPORTERS, "exporter", Exporter)  # type: ignore[type-abstract]


def _find(name: str, group: Group, kind: str, base: type[T]) -> type[T]:
    points = [point for point in _points(group) if point.name == name]
    if not points:
        known = names(group)
        raise RecipeError(kind, f"an unknown {kind} {shown(name)}", one_of(known), nearest(name, known))
    if len({point.value for point in points}) > 1:
        owners = " and ".join(sorted(_owner(point) for point in points))
        raise RecipeError(
            kind, f"{name!r} offered by {owners}", "one package a name", "Uninstall one of them."
        )
    found, said = _load(points[0]), f"{name!r} = {points[0].value}"
    if isinstance(found, Exception):
        what = f"{type(found).__name__}: {found}".splitlines()[0][:200]
        raise RecipeError(
            kind,
            f"{said} that cannot be imported ({what})",
            "a module that imports",
            f"Repair or uninstall {_owner(points[0])}.",
        ) from found
    if not (isinstance(found, type) and issubclass(found, base)):
        raise RecipeError(kind, said, f"a subclass of {base.__module__}.{base.__name__}")
    # Any other dataclass would let options of any type, or any name, through to the pass.
    config = getattr(found, "__pydantic_config__", {}) if is_pydantic_dataclass(found) else {}
    if any(config.get(key) != value for key, value in STRICT.items()):
        raise RecipeError(kind, said, "a frozen pydantic dataclass with config=STRICT")
    return found


@cache
def _points(group: Group) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


@cache
def _load(point: EntryPoint) -> object:
    """The class, or why there is none."""
    try:
        return point.load()
    except Exception as error:  # noqa: BLE001 -- foreign code raises anything; the user needs to know whose it is
        return error


def _owner(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist else point.value
