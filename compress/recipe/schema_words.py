"""A JSON Schema in plain words: what it expects, and what a wrong value may have meant."""

from __future__ import annotations

import math
from typing import Any

from ..words import nearest, one_of, shown

Schema = dict[str, Any]

INF = math.inf
YES, NO = {"yes", "on", "1", "true"}, {"no", "off", "0", "false"}
BOUNDS = (
    ("exclusiveMinimum", "over"),
    ("minimum", "of at least"),
    ("exclusiveMaximum", "under"),
    ("maximum", "of at most"),
)


def branches(schema: Schema) -> list[Schema]:
    """The alternatives of a schema, null left out."""
    found = schema.get("anyOf") or schema.get("oneOf") or [schema]
    return [branch for branch in found if branch.get("type") != "null"]


def keys(schema: Schema) -> dict[str, Schema]:
    """What a mapping may hold: schemas by key."""
    return {key: part for branch in branches(schema) for key, part in branch.get("properties", {}).items()}


def describe(schema: Schema) -> str:
    """What is expected; empty if the schema does not say."""
    said = [words for words in map(_describe_one, branches(schema)) if words]
    return " or ".join(dict.fromkeys(said))


def _describe_one(schema: Schema) -> str:
    kind = schema.get("type")
    if "const" in schema:
        words = shown(schema["const"])
    elif "enum" in schema:
        words = one_of(map(str, schema["enum"]))
    elif kind in {"number", "integer"}:
        words = ("a number" if kind == "number" else "a whole number") + _bounds(schema)
    elif kind == "array":
        inner = describe(schema.get("items", {}))
        words = f"a list, each {inner}" if inner else "a list"
    elif kind == "object":
        named = keys(schema)
        words = f"a mapping with {', '.join(named)}" if named else "a mapping"
    elif kind == "string":
        words = _text(schema)
    else:
        words = "true or false" if kind == "boolean" else ""
    return words


def _bounds(schema: Schema) -> str:
    low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" between {_bound(low)} and {_bound(high)}, both excluded"
    if schema.keys() >= {"minimum", "maximum"}:
        return f" from {_bound(schema['minimum'])} to {_bound(schema['maximum'])}"
    said = [f"{word} {_bound(schema[key])}" for key, word in BOUNDS if key in schema]
    return f" {' and '.join(said)}" if said else ""


def _bound(number: float) -> str:
    return f"{number:g}" if abs(number) < 1e6 else f"{number:,}"


def _text(schema: Schema) -> str:
    said = "text"
    if "maxLength" in schema:
        said += f" of {schema.get('minLength', 0)} to {schema['maxLength']} characters"
    elif schema.get("minLength"):
        said += " that is not empty"
    return said + (f" that matches {schema['pattern']}" if "pattern" in schema else "")


def remedy_for(value: Any, schema: Schema) -> str:
    """The nearest right thing to a wrong value, or nothing."""
    return next((said for said in (_remedy(value, branch) for branch in branches(schema)) if said), "")


def _remedy(value: Any, schema: Schema) -> str:
    kind = schema.get("type")
    word = str(value).lower()
    remedy = ""
    if "const" in schema:
        remedy = f"This tersor knows only {shown(schema['const'])}."
    elif "enum" in schema:
        remedy = nearest(str(value), map(str, schema["enum"]))
    elif kind in {"number", "integer"}:
        remedy = _number_meant(value, schema)
    elif kind == "boolean" and word in YES | NO:
        remedy = f"Did you mean {shown(word in YES)}?"
    elif kind == "array" and isinstance(value, dict):
        remedy = "Begin each entry of a list with '- '."
    elif kind == "array" and isinstance(value, str) and value.strip() and len(value) < 60:
        remedy = f"Did you mean [{', '.join(value.replace(',', ' ').split())}]?"
    elif kind == "string" and isinstance(value, (int, float)):
        remedy = f'Did you mean "{shown(value)}", in quotes?'
    return remedy


def _number_meant(value: Any, schema: Schema) -> str:
    """`50` or `50 %` for a share is 0.5; `'0.5'` and `0,5` are 0.5; `3.0` is 3."""
    text = str(value).strip()
    percent = text.endswith("%")
    try:
        number = float(text.removesuffix("%").strip().replace(",", ".")) / (100 if percent else 1)
    except ValueError:
        return ""
    share = schema["type"] == "number" and schema.get("exclusiveMaximum", schema.get("maximum")) == 1
    if share and not _fits(number, schema) and 1 < number <= 100:
        number /= 100
    if isinstance(value, bool) or not _fits(number, schema):
        return ""
    return f"Did you mean {int(number) if schema['type'] == 'integer' else f'{number:g}'}?"


def _fits(number: float, schema: Schema) -> bool:
    if not math.isfinite(number) or (schema["type"] == "integer" and not number.is_integer()):
        return False
    above = number > schema.get("exclusiveMinimum", -INF) and number >= schema.get("minimum", -INF)
    return bool(above and number < schema.get("exclusiveMaximum", INF) and number <= schema.get("maximum", INF))
