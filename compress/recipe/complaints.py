"""What is wrong with a recipe, one line each: pydantic's errors as the author of the file would say them.

A line is `FILE:LINE:COLUMN: key: found X, expected Y. remedy`. The expectation is read off the JSON Schema at
that key (schema_words.py), so that it cannot drift from what is accepted; the remedy is the nearest right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from ..errors import RecipeError
from ..words import closest, nearest, one_of, shown
from .schema_words import Schema, describe, keys, remedy_for
from .yaml_file import Document, Loc, Mark, dotted

UNKNOWN_KEY = {"extra_forbidden", "unexpected_keyword_argument", "unexpected_positional_argument"}
MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}
STEPS = {"passes", "export"}
MOST = 50
"""Lines of one message; more faults than that are counted."""


class RecipeFaultsError(RecipeError):
    """Everything that is wrong with a recipe, a line each, in the file's order.

    Attributes:
        errors: the lines as errors of their own, at most `MOST`.
    """

    def __init__(self, errors: Sequence[RecipeError]):
        first = errors[0]
        super().__init__(first.place, first.found, first.expected, first.remedy)
        self.errors = tuple(errors)
        lines = [str(error) for error in errors[:MOST]]
        if len(errors) > MOST:
            lines.append(f"… and {len(errors) - MOST} more.")
        self.args = ("\n".join(lines),)

    def at(self, place: str) -> RecipeFaultsError:
        """The same errors, said of a place that the caller knows better."""
        return RecipeFaultsError([error.at(place) for error in self.errors])  # type: ignore[misc]


class _Fault:
    """One of pydantic's errors with its place in the file."""

    def __init__(self, detail: ErrorDetails, document: Document):
        self.detail = detail
        self.kind = _kind(detail)
        self.loc = _written(detail, document.value)
        marks = document.keys if self.kind == "unknown" and self.loc in document.keys else document.values
        self.mark = nearest_mark(marks, self.loc)


def translate(
    details: Iterable[ErrorDetails], document: Document, schema_at: Callable[[Loc, Any], Schema]
) -> RecipeFaultsError:
    """All faults, a line each, in the order of the file; what the command line set comes last.

    Args:
        details: pydantic's errors.
        document: what was validated, with its places.
        schema_at: (path, document's value) → JSON Schema of what may stand there, references resolved.
    """
    faults = {(fault.loc, fault.kind): fault for fault in (_Fault(d, document) for d in details)}
    unknown = defaultdict(list)
    for loc, kind in faults:
        if kind == "unknown":
            unknown[loc[:-1]].append(str(loc[-1]))
    told = [
        fault
        for fault in faults.values()
        # What is missing because it is misspelt or misplaced is one fault, not two.
        if not (fault.kind == "missing" and _meant(fault.loc, unknown))
    ]
    told.sort(key=lambda fault: fault.mark.order)
    said = [_say(fault, document.value, schema_at) for fault in told[:MOST]]
    return RecipeFaultsError([*said, *(RecipeError(str(f.mark), "more") for f in told[MOST:])])


def _kind(detail: ErrorDetails) -> str:
    if detail["type"] in UNKNOWN_KEY:
        return "unknown"
    return "missing" if detail["type"] in MISSING else "value"


def _meant(missing: Loc, unknown: dict[Loc, list[str]]) -> bool:
    """Whether an unknown key is the missing one: misspelt, beside its `with`, or that `with`."""
    beside = unknown.get(missing[:-1], [])
    if any(closest(key, [str(missing[-1])]) for key in beside[:MOST]):
        return True
    above = unknown.get(missing[:2], ()) if len(missing) == 4 and missing[2] == "with" else []
    return any(key in {missing[-1], "options"} or closest(key, ["with"]) for key in above[:MOST])


def _written(detail: ErrorDetails, tree: Any) -> Loc:
    """Pydantic's path as a path of the file: `with` for `options`, and without the branches of unions."""
    parts = list(detail["loc"])
    if len(parts) > 2 and parts[0] in STEPS and parts[2] == "options" and detail["type"] not in UNKNOWN_KEY:
        parts[2] = "with"
    last = len(parts) - 1
    loc: Loc = ()
    node = tree
    for index, part in enumerate(parts):
        if isinstance(node, dict) and part == 0:
            continue  # one mapping, taken as a list of one
        node_may_lack = node is None or isinstance(node, dict)
        if node is ABSENT or holds(node, part):
            node = ABSENT if node is ABSENT else node[part]
        elif part == "with" or (node_may_lack and index == last and _kind(detail) == "missing"):
            node = ABSENT
        else:
            continue  # the branch of a union
        loc = (*loc, part)
    return loc


ABSENT: Any = object()


def holds(node: Any, part: str | int) -> bool:
    """Whether `node[part]` is there."""
    if isinstance(node, list):
        return isinstance(part, int) and part < len(node)
    return isinstance(node, dict) and part in node


def value_at(tree: Any, loc: Loc) -> Any:
    """The value that stands at `loc`, None if nothing does."""
    for part in loc:
        if not holds(tree, part):
            return None
        tree = tree[part]
    return tree


def as_written(loc: Loc, tree: Any) -> Loc:
    """A path of the recipe as a path of the file, where one gate may stand for a list of one."""
    found: Loc = ()
    for part in loc:
        if part != 0 or not isinstance(value_at(tree, found), dict):
            found = (*found, part)
    return found


def nearest_mark(marks: dict[Loc, Mark], loc: Loc) -> Mark:
    """Place of what stands at `loc`, or of the nearest thing around it that was written."""
    while loc and loc not in marks:
        loc = loc[:-1]
    return marks[loc]


def _say(fault: _Fault, tree: Any, schema_at: Callable[[Loc, Any], Schema]) -> RecipeError:
    loc, detail = fault.loc, fault.detail
    place = f"{fault.mark}: {dotted(loc)}" if loc else str(fault.mark)
    context = detail.get("ctx", {})
    if fault.kind == "unknown":
        key, known = str(loc[-1]), keys(schema_at(loc[:-1], tree))
        return RecipeError(place, f"an unknown key {shown(key)}", one_of(known) or "no key", _home(key, known))
    if detail["type"] == "recipe":
        return RecipeError(place, context["found"], context["expected"], context["remedy"])
    if detail["type"] in {"value_error", "assertion_error"}:
        return RecipeError(place, str(context.get("error", detail["msg"])))
    schema = schema_at(loc, tree)
    if fault.kind == "missing":
        return RecipeError(place, "nothing", describe(schema) or "a value", _addition(str(loc[-1]), schema))
    expected = describe(schema) or detail["msg"].removeprefix("Input should be ")
    value = value_at(tree, loc)
    return RecipeError(place, shown(value), expected, remedy_for(value, schema))


def _addition(key: str, schema: Schema) -> str:
    return f"Add `{key}: {schema.get('const', '…')}`."


def _home(key: str, known: dict[str, Schema]) -> str:
    """Where an unknown key would belong."""
    for name, part in known.items():
        if key in keys(part):
            return f"It belongs under {name}."
    if key == "options" and "with" in known:
        return "Did you mean 'with'?"
    return nearest(key, known)
