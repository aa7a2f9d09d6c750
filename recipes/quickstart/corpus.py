"""The text that ships with the recipes: the standard library's own sources, split by module path.

The SHA-256 of a module's path relative to the library decides its place: bucket 0 of 20 is `valid`, 1 is
`test`, the others are `train`. The quickstart model learned from `train` alone. Its two files are cuts of
whole lines, never edited: calibration.jsonl from an eleventh of `train`, heldout.jsonl from all of `valid`.
A cut is the middle of a module, where code is: beginnings are licences and imports that repeat. The codecs'
tables, generated and much alike on both sides of the split, and the files that a build writes are left out.

The encoder's sentences are first sentences of docstrings, white space joined, picked by their own SHA-256.

    python -m tersor.recipes.quickstart.corpus --output FOLDER

writes the three files again; on CPython 3.11.7 (built from source, tests included) their bytes are the same.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SHORTEST = 500  # characters; below lie empty __init__ files and stubs
CALIBRATION_SHARE = 11  # one module of this many
LEFT_OUT = (  # tables; what a build writes, with the paths of its machine; a test full of absolute paths
    "encodings/", "config-", "test/test_uu.py",
)  # fmt: skip
CALIBRATION = "quickstart/text/calibration.jsonl"
HELDOUT = "quickstart/text/heldout.jsonl"
SENTENCES = "minilm/sentences.txt"
CUT = {CALIBRATION: 3100, HELDOUT: 4000}  # characters of a module at most
SENTENCE_COUNT, SENTENCE_LENGTH = 320, range(25, 301)


class Module(NamedTuple):
    """One source file: its path relative to the library, with forward slashes, and its text."""

    path: str
    text: str


def bucket(path: str) -> int:
    """The SHA-256 of a module's path as a number."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16)


def part(path: str) -> str:
    """The part of the split, `train`, `valid` or `test`, that a module belongs to."""
    return {0: "valid", 1: "test"}.get(bucket(path) % 20, "train")


def modules(root: Path | None = None) -> list[Module]:
    """Every UTF-8 module of the library under `root` (default: the running interpreter's), sorted by path.

    Installed packages, lib2to3's broken samples and files under 500 characters are left out.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if "site-packages" in relative.parts or relative.as_posix().startswith("lib2to3/tests/data"):
            continue
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # four tests of other encodings
        if len(text) >= SHORTEST:
            found.append(Module(relative.as_posix(), text))
    return found


def middle(text: str, characters: int) -> str:
    """The middle of a text in whole lines, at most `characters` long; the whole text if it is short."""
    if len(text) <= characters:
        return text
    begin = text.rfind("\n", 0, (len(text) - characters) // 2 + 1) + 1
    return text[begin : text.rfind("\n", begin, begin + characters) + 1]


def cuts(found: list[Module]) -> dict[str, list[Module]]:
    """The records of the quickstart's two files, by file name."""
    written = [m for m in found if not m.path.startswith(LEFT_OUT)]
    learned = [m for m in written if part(m.path) == "train"]
    chosen = {
        CALIBRATION: [m for m in learned if bucket(m.path) // 20 % CALIBRATION_SHARE == 0],
        HELDOUT: [m for m in written if part(m.path) == "valid"],
    }
    cut = {name: [Module(m.path, middle(m.text, CUT[name])) for m in ms] for name, ms in chosen.items()}
    return {name: [m for m in ms if len(m.text) >= SHORTEST] for name, ms in cut.items()}


def docstrings(text: str) -> Iterator[str]:
    """The docstrings of a module; none if this interpreter cannot parse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's tests hold invalid escapes on purpose
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def sentences(found: list[Module]) -> list[str]:
    """First sentences of docstrings, of many lengths, each once, in the order of their hashes."""
    pattern = re.compile(r"[A-Z][a-z]*[ ,'][^_=<>|\\{}\[\]*`]*?[a-z)\"'][.!?](?= |$)")
    kept = set()
    for module in found:
        for docstring in docstrings(module.text):
            first = pattern.match(" ".join(docstring.split("\n\n")[0].split()))
            if first and len(first[0]) in SENTENCE_LENGTH and first[0].isascii():
                kept.add(first[0])
    return sorted(kept, key=bucket)[:SENTENCE_COUNT]


def main() -> None:
    """Write the recipes' text files from the standard library's sources."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to fill like `recipes`")
    output: Path = parser.parse_args().output
    found = modules()
    files = {SENTENCES: sentences(found)}
    for name, records in cuts(found).items():
        files[name] = [json.dumps(record._asdict(), ensure_ascii=False) for record in records]
    for name, lines in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("".join(f"{line}\n" for line in lines), "utf-8", newline="\n")
        print(f"{name}: {len(lines)} lines, {sum(map(len, lines))} characters")


if __name__ == "__main__":
    main()
