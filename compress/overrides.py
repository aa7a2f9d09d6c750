"""`--set passes.0.with.remove=0.3`: a recipe's value replaced or added from the command line.

The path is keys and list positions, separated by dots; the value is YAML (`0.3`, `[kl, top1]`, `{metric: kl, max: 1}`).
What is set stands where the command line said it: errors about it name the `--set`, not a line of the file.
"""

from __future__ import annotations

from typing import Any

from .errors import RecipeError
from .words import closest, shown
from .yaml_file import MAX_DEPTH, Document, Loc, Mark, dotted, parse_yaml


def override(document: Document, text: str) -> None:
    """Apply one override in place. Whether the schema knows the key is for the validation to say.

    Raises:
        RecipeError: not `KEY=VALUE`, a value that is not YAML, or a path into something that has no parts.
    """
    name = f"--set {text if len(text) <= 80 else text[:79] + '…'}"
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise RecipeError(name, "no KEY=VALUE", "something like passes.0.with.remove=0.3")
    if len(parts) > MAX_DEPTH:
        raise RecipeError(name, f"{len(parts)} levels", f"at most {MAX_DEPTH}")
    mark, new = Mark(name), parse_yaml(value, name, lines=False)
    container, loc = document.value, ()
    for part, then in zip(parts[:-1], parts[1:], strict=True):
        step = _step(container, part, loc, name)
        if _absent(container, step):
            _put(document, container, step, loc, [] if then == "0" else {}, mark)
        container, loc = container[step], (*loc, step)
    step = _step(container, parts[-1], loc, name)
    at = (*loc, step)
    for marks in (document.keys, document.values):
        for old in [path for path in marks if path[: len(at)] == at]:
            del marks[old]
    _put(document, container, step, loc, new.value, mark)
    for path in new.values:
        document.keys[at + path] = document.values[at + path] = mark


def _absent(container: Any, step: str | int) -> bool:
    if isinstance(step, int):
        return step == len(container)
    return container.get(step) is None


def _put(document: Document, container: Any, step: str | int, loc: Loc, value: Any, mark: Mark) -> None:
    if isinstance(step, int) and step == len(container):
        container.append(value)
    else:
        container[step] = value
    document.keys[(*loc, step)] = document.values[(*loc, step)] = mark


def _step(container: Any, part: str, loc: Loc, name: str) -> str | int:
    """The key or position in `container` that `part` names."""
    here = dotted(loc) or "the recipe"
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise RecipeError(f"{name}: {part}", f"{here} = {shown(container)}", "a mapping or a list to set a part of")
    if not part.isdecimal() or int(part[:9]) > len(container) or len(part) > 9:
        last = len(container) - 1
        expected = f"a position from 0 to {last}, or {last + 1} to append" if container else "0 to append"
        used = [str(step.get("use")) for step in container if isinstance(step, dict)]
        meant = closest(part, used)
        remedy = "" if meant is None else f"{meant} is at {used.index(meant)}."
        raise RecipeError(f"{name}: {part}", f"no such position in {here}", expected, remedy)
    return int(part)
