"""Plain words for error messages: a value as found, a list of choices, the nearest of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

LONGEST = 60


def shown(value: Any) -> str:
    """A recipe's value as its author would write it, shortened to one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"a mapping with {', '.join(map(str, value))}"[:LONGEST] if value else "an empty mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def one_of(choices: Iterable[str]) -> str:
    """`one of a, b` or `a`; empty for none."""
    listed = list(choices)
    return "".join(listed) if len(listed) < 2 else f"one of {', '.join(listed)}"


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` most looks like, case and dashes aside; None if none is near."""
    by_look = {_look(choice): choice for choice in choices}
    found = difflib.get_close_matches(_look(word), by_look, n=1, cutoff=0.6)
    return by_look[found[0]] if found else None


def nearest(word: str, choices: Iterable[str]) -> str:
    """`Did you mean 'b'?`, or nothing if no choice is near."""
    found = closest(word[:LONGEST], choices)
    return "" if found is None else f"Did you mean {found!r}?"


def _look(word: str) -> str:
    return word.lower().replace("-", "_")
