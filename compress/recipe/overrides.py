"""`--set passes.0.with.remove=0.3`: a recipe's value replaced or added from the command line.

The path is keys and list positions, separated by dots; the value is YAML: `0.3`, `[kl, top1]`,
`{metric: kl, max: 1}`. Errors about what is set name the `--set`, not a line of the file.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..errors import RecipeError
from ..words import closest, shown
from .complaints import holds, value_at
from .yaml_file import MAX_DEPTH, UNPRINTABLE, Document, Loc, Mark, dotted, parse_yaml


def override(document: Document, text: str, under: Loc = ()) -> None:
    """Apply one override in place. Whether the schema knows the key is for the validation to say.

    Args:
        document: what to change.
        text: `KEY=VALUE`.
        under: path that KEY continues.

    Raises:
        RecipeError: not `KEY=VALUE`, a value that is not YAML, or a path into something that has no parts.
    """
    name = f"--set {text if len(text) <= 80 else text[:79] + '…'}"
    if UNPRINTABLE.search(text):
        raise RecipeError(ascii(name), "characters that cannot be printed", "KEY=VALUE")
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise RecipeError(name, "no KEY=VALUE", "something like passes.0.with.remove=0.3")
    if len(parts) > MAX_DEPTH:
        raise RecipeError(name, f"{len(parts)} levels", f"at most {MAX_DEPTH}")
    new = parse_yaml(value, name, lines=False)
    mark = new.values.setdefault((), Mark(name))
    container: Any = value_at(document.value, under)
    loc = under
    for part, then in pairwise(parts):
        step = _step(container, part, loc, name)
        if not holds(container, step) or container[step] is None:
            _put(document, container, (*loc, step), Document([] if then == "0" else {}, values={(): mark}))
        container, loc = container[step], (*loc, step)
    _put(document, container, (*loc, _step(container, parts[-1], loc, name)), new)


def _put(document: Document, container: Any, loc: Loc, new: Document) -> None:
    """Set `container[loc[-1]]`, which stands at `loc`, with its places."""
    if isinstance(container, list) and loc[-1] == len(container):
        container.append(new.value)
    else:
        container[loc[-1]] = new.value
    for marks in (document.keys, document.values):
        for old in [path for path in marks if path[: len(loc)] == loc]:
            del marks[old]
        marks.update({loc + path: mark for path, mark in new.values.items()})


def _step(container: Any, part: str, loc: Loc, name: str) -> str | int:
    """The key or position in `container` that `part` names."""
    here = dotted(loc) or "the recipe"
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise RecipeError(f"{name}: {part}", f"{here} = {shown(container)}", "a mapping or a list")
    if not part.isdecimal() or int(part[:9]) > len(container) or len(part) > 9:
        last = len(container) - 1
        expected = f"a position from 0 to {last}, or {last + 1} to append" if container else "0 to append"
        used = [str(step.get("use")) for step in container if isinstance(step, dict)]
        meant = closest(part, used)
        remedy = "" if meant is None else f"{meant} is at {used.index(meant)}."
        raise RecipeError(f"{name}: {part}", f"no such position in {here}", expected, remedy)
    return int(part)
