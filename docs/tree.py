"""Print the tree of the README: every module with the first sentence of its docstring; --write puts it there."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("compress", "sparse", "export")
ONE_LINE = {"compress/arch"}
"""Rooms whose files are all of one kind."""
FOLDERS = {
    "recipes": "recipes that ship, the embedded decoder and its text",
    "benchmarks": "speed and quality against named baselines; prints the tables that are quoted",
    "tests": "",
    "docs": "how the house is built, how to add a pass or an architecture",
}
LISTED = ("benchmarks",)
WIDTH = 28
BEFORE, AFTER = "## The tree\n\n", "\n`python docs/tree.py"


def first_sentence(path: Path) -> str:
    """What a module's docstring says first, without its own name in front."""
    text = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0].replace("\n", " ")
    own = path.parent.name if path.stem == "__init__" else path.stem.strip("_")
    for prefix in (f"{own}: ", f"{own.capitalize()}: ", f"tersor.{own}: "):
        text = text.removeprefix(prefix)
    sentence = text.split(". ")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() or sentence[1:2] == " " else sentence


def rooms() -> Iterator[Path]:
    """Every package, a parent before its children."""
    for package in PACKAGES:
        yield from sorted(init.parent for init in (ROOT / package).rglob("__init__.py"))


def files(folder: Path) -> Iterator[str]:
    """A line a module."""
    for path in sorted(folder.glob("*.py")):
        if path.stem != "__init__":
            yield f"{'    ' + path.name:<{WIDTH}}{first_sentence(path)}"


def lines() -> Iterator[str]:
    """The tree, a line a file."""
    for room in rooms():
        name = room.relative_to(ROOT).as_posix()
        yield f"{name + '/':<{WIDTH}}{first_sentence(room / '__init__.py')}"
        if name not in ONE_LINE:
            yield from files(room)
    for name, what in FOLDERS.items():
        yield f"{name + '/':<{WIDTH}}{what}".rstrip()
        if name in LISTED:
            yield from files(ROOT / name)


def write(readme: Path) -> None:
    """Replace the tree in the README."""
    head, rest = readme.read_text("utf-8").split(BEFORE)
    tail = rest[rest.index(AFTER) :]
    tree = "".join(f"    {line}\n" for line in lines())
    readme.write_text(f"{head}{BEFORE}{tree}{tail}", "utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write(ROOT / "README.md")
    else:
        print("\n".join(lines()))
