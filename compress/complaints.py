"""What is wrong with a recipe, one line each: pydantic's errors as the author of the file would say them.

A line is `FILE:LINE:COLUMN: key: found X, expected Y. remedy`. The expectation is read off the JSON Schema at that
key, so that it cannot drift from what is accepted; the remedy is the nearest thing that would have been right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from .errors import RecipeError
from .words import closest, nearest, one_of, shown
from .yaml_file import Document, Loc, Mark, dotted

Schema = dict[str, Any]

UNKNOWN_KEY = {"extra_forbidden", "unexpected_keyword_argument", "unexpected_positional_argument"}
MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}


class RecipeErrors(RecipeError):
    """Everything that is wrong with a recipe, a line each, in the file's order.

    Attributes:
        errors: the lines as errors of their own.
    """

    def __init__(self, errors: Sequence[RecipeError]):
        first = errors[0]
        super().__init__(first.place, first.found, first.expected, first.remedy)
        self.errors = tuple(errors)
        self.args = ("\n".join(map(str, errors)),)

    def at(self, place: str) -> RecipeErrors:
        """The same errors, said of a place that the caller knows better."""
        return RecipeErrors([RecipeError(f"{place}: {e.place}", e.found, e.expected, e.remedy) for e in self.errors])


def translate(
    details: Iterable[ErrorDetails], document: Document, schema_at: Callable[[Loc, Any], Schema]
) -> list[RecipeError]:
    """One error a fault, in the order of the file; what the command line set comes last.

    Args:
        details: pydantic's errors.
        document: what was validated, with its places.
        schema_at: (path, document's value) → JSON Schema of what may stand there, references resolved.
    """
    faults: dict[tuple[Loc, bool], tuple[Mark, RecipeError]] = {}
    by_loc = {(loc, _kind(d)): d for d in details for loc in [written_loc(d, document.value)]}
    unknown = [loc for loc, kind in by_loc if kind == "unknown"]
    for (loc, kind), detail in by_loc.items():
        if kind == "missing" and any(_means(key, loc) for key in unknown):
            continue  # a misspelt or misplaced key is one fault, not two
        if any((loc[:n], "value") in by_loc for n in range(len(loc))):
            continue  # what holds it is wrong altogether
        key_fault = kind == "unknown"
        mark = _mark(document, loc, key_fault)
        schema = schema_at(loc[:-1] if key_fault else loc, document.value)
        found, expected, remedy = _say(kind, detail, loc, document.value, schema)
        faults[loc, key_fault] = mark, RecipeError(f"{mark}: {dotted(loc)}" if loc else str(mark), found, expected, remedy)
    ordered = sorted(faults.values(), key=lambda fault: fault[0].order)
    return [error for _, error in ordered]


def _kind(detail: ErrorDetails) -> str:
    if detail["type"] in UNKNOWN_KEY:
        return "unknown"
    return "missing" if detail["type"] in MISSING else "value"


def _means(unknown: Loc, missing: Loc) -> bool:
    """Whether the unknown key is the missing one misspelt, or stands beside the `with` it belongs in, or is that `with`."""
    *place, key = unknown
    if tuple(place) == missing[:-1]:
        return closest(str(key), [str(missing[-1])]) is not None
    under_with = "with" in missing[:-1] and tuple(place) == missing[: missing.index("with")]
    return under_with and (key in {missing[-1], "options"} or closest(str(key), ["with"]) is not None)


def written_loc(detail: ErrorDetails, tree: Any) -> Loc:
    """pydantic's path as a path of the file: without the branches of unions, with `with` for `options`."""
    loc: Loc = ()
    node = tree
    inside = True
    parts = detail["loc"]
    for index, part in enumerate(parts):
        if part == "options" and len(loc) == 2 and loc[0] in {"passes", "export"} and detail["type"] not in UNKNOWN_KEY:
            part = "with"
        if inside and isinstance(node, dict) and part == 0 and isinstance(part, int):
            continue  # one mapping, taken as a list of one
        held = isinstance(node, dict) and part in node
        held = held or (isinstance(node, list) and isinstance(part, int) and part < len(node))
        if inside and held:
            node = node[part]
        elif not inside or part == "with" or (isinstance(node, dict) and index == len(parts) - 1 and _kind(detail) == "missing"):
            inside = False
        else:
            continue  # the branch of a union
        loc = (*loc, part)
    return loc


def as_written(loc: Loc, tree: Any) -> Loc:
    """A path of the recipe as a path of the file, where one gate may stand for a list of one."""
    found: Loc = ()
    for part in loc:
        if part != 0 or not isinstance(value_at(tree, found), dict):
            found = (*found, part)
    return found


def value_at(tree: Any, loc: Loc) -> Any:
    """The value that stands at `loc`, None if nothing does."""
    for part in loc:
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


def _mark(document: Document, loc: Loc, key: bool) -> Mark:
    marks = document.keys if key and loc in document.keys else document.values
    while loc and loc not in marks:
        loc = loc[:-1]
    return marks[loc]


def _say(kind: str, detail: ErrorDetails, loc: Loc, tree: Any, schema: Schema) -> tuple[str, str, str]:
    """Found, expected, remedy."""
    context = detail.get("ctx", {})
    value = value_at(tree, loc)
    if kind == "unknown":
        known = keys(schema)
        return f"an unknown key {shown(str(loc[-1]))}", one_of(known), _home(str(loc[-1]), known)
    if kind == "missing":
        return "nothing", describe(schema) or "a value", f"Add `{loc[-1]}: …`."
    if detail["type"] == "recipe":
        return context["found"], context["expected"], context["remedy"]
    if detail["type"] in {"value_error", "assertion_error"}:
        return str(context.get("error", detail["msg"])), "", ""
    expected = describe(schema) or detail["msg"].removeprefix("Input should be ")
    return shown(value), expected, remedy_for(value, schema)


def _home(key: str, known: dict[str, Schema]) -> str:
    """Where an unknown key would belong."""
    for name, part in known.items():
        if key in keys(part):
            return f"It belongs under {name}."
    if key == "options" and "with" in known:
        return "Did you mean 'with'?"
    return nearest(key, known)


def keys(schema: Schema) -> dict[str, Schema]:
    """What a mapping may hold: schemas by key."""
    return {key: part for branch in branches(schema) for key, part in branch.get("properties", {}).items()}


def branches(schema: Schema) -> list[Schema]:
    """The alternatives of a schema, null left out."""
    found = schema.get("anyOf") or schema.get("oneOf") or [schema]
    return [branch for branch in found if branch.get("type") != "null"]


def describe(schema: Schema) -> str:
    """A JSON Schema in plain words; empty if it says nothing."""
    said = [words for words in map(_describe_one, branches(schema)) if words]
    return " or ".join(dict.fromkeys(said))


def _describe_one(schema: Schema) -> str:
    if "const" in schema:
        return shown(schema["const"])
    if "enum" in schema:
        return one_of(map(str, schema["enum"]))
    kind = schema.get("type")
    if kind in {"number", "integer"}:
        return ("a number" if kind == "number" else "a whole number") + _bounds(schema)
    if kind == "array":
        inner = describe(schema.get("items", {}))
        return f"a list, each {inner}" if inner else "a list"
    if kind == "object":
        named = keys(schema)
        return f"a mapping with {', '.join(named)}" if named else "a mapping"
    if kind == "string" and schema.get("minLength"):
        return "text that is not empty"
    return {"string": "text", "boolean": "true or false"}.get(str(kind), "")


def _bounds(schema: Schema) -> str:
    low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" between {low:g} and {high:g}, both excluded"
    said = [
        f"{word} {schema[key]:g}" if abs(schema[key]) < 1e6 else f"{word} {schema[key]}"
        for key, word in (
            ("exclusiveMinimum", "over"),
            ("minimum", "of at least"),
            ("exclusiveMaximum", "under"),
            ("maximum", "of at most"),
        )
        if key in schema
    ]
    return f" {' and '.join(said)}" if said else ""


def remedy_for(value: Any, schema: Schema) -> str:
    """The nearest right thing to a wrong value, or nothing."""
    for branch in branches(schema):
        kind = branch.get("type")
        if "const" in branch:
            return f"This tersor knows only {shown(branch['const'])}."
        if "enum" in branch:
            return nearest(str(value), map(str, branch["enum"]))
        if kind in {"number", "integer"}:
            return _number_meant(value, branch)
        if kind == "boolean" and str(value).lower() in {"yes", "on", "no", "off", "0", "1"}:
            return f"Did you mean {shown(str(value).lower() in {'yes', 'on', '1'})}?"
        if kind == "array" and isinstance(value, dict):
            return "Begin each entry of a list with '- '."
        if kind == "array" and isinstance(value, str):
            return f"Did you mean [{', '.join(value.replace(',', ' ').split())[:60]}]?"
        if kind == "string" and isinstance(value, (int, float)):
            return f'Did you mean "{shown(value)}", in quotes?'
    return ""


def _number_meant(value: Any, schema: Schema) -> str:
    """`50` or `50 %` for a share is 0.5; `'0.5'` and `0,5` are 0.5; `3.0` is 3."""
    text = str(value).strip()
    share = isinstance(value, str) and text.endswith("%")
    try:
        number = float(text.removesuffix("%").strip().replace(",", ".")) / (100 if share else 1)
    except ValueError:
        return ""
    if isinstance(value, bool):
        return ""
    if not _fits(number, schema) and 1 <= number <= 100 and _is_share(schema):
        number /= 100
    if not _fits(number, schema):
        return ""
    return f"Did you mean {int(number) if schema['type'] == 'integer' else f'{number:g}'}?"


def _is_share(schema: Schema) -> bool:
    return schema["type"] == "number" and schema.get("exclusiveMaximum", schema.get("maximum")) == 1


def _fits(number: float, schema: Schema) -> bool:
    if schema["type"] == "integer" and not number.is_integer():
        return False
    return (
        number > schema.get("exclusiveMinimum", -float("inf"))
        and number >= schema.get("minimum", -float("inf"))
        and number < schema.get("exclusiveMaximum", float("inf"))
        and number <= schema.get("maximum", float("inf"))
    )
