"""Plain values as YAML for people: blocks, and one line for what fits.

`parse_yaml` reads it back to the same values, and so does any YAML 1.2 reader; words that YAML 1.1 takes for
booleans are quoted as well.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .yaml_file import FALSE, FLOAT, INT, NOT_FINITE, NULL, TRUE

PLAIN = re.compile(r"[A-Za-z_./][\w./%-]*|[0-9]+(\.[0-9]+)?%", re.ASCII)
OLD_BOOLEAN = re.compile(r"y|yes|n|no|on|off", re.IGNORECASE)  # to a YAML 1.1 reader
WIDTH = 100


def to_yaml(value: Any, indent: str = "") -> str:
    """Plain values as YAML that `parse_yaml` reads back to the same: blocks, and one line for what fits."""
    flow = _flow(value)
    nested = isinstance(value, (dict, list)) and any(isinstance(p, (dict, list)) for p in _parts(value))
    if not isinstance(value, (dict, list)) or not value or (indent and not nested and len(flow) <= WIDTH):
        return f"{flow}\n"
    lines = []
    for key, part in value.items() if isinstance(value, dict) else ((None, part) for part in value):
        inner = to_yaml(part, indent + "  ")
        block = inner.startswith(indent + "  ")
        if key is not None:
            lines.append(f"{indent}{_flow(key)}:{chr(10) if block else ' '}{inner}")
        else:
            lines.append(f"{indent}- {inner.removeprefix(indent + '  ')}")
    return "".join(lines)


def _parts(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        taken = any(kind.fullmatch(value) for kind in (NULL, TRUE, FALSE, NOT_FINITE, INT, FLOAT, OLD_BOOLEAN))
        if PLAIN.fullmatch(value) and not taken:
            return value
        # JSON's quoting is YAML's, but for line separators, which YAML would fold.
        return re.sub(
            "[\x7f-\xa0\u2028\u2029\ufeff]",
            lambda m: f"\\u{ord(m[0]):04x}",
            json.dumps(value, ensure_ascii=False),
        )
    return json.dumps(value)
