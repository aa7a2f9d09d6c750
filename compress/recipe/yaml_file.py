"""YAML as data: a strict subset, read by events, with the line and column of every key and value.

A recipe needs mappings, lists and scalars; nothing else of YAML is accepted. Tags could construct objects,
anchors and aliases could grow ten lines into gigabytes, several documents and repeated keys would silently
drop a part: each is refused where it stands. Events are taken one by one, so that depth is known before
anything recurses, and size is checked before anything is read. Scalars resolve by YAML 1.2's core schema,
written out below: `no`, `1:30` and `8%` are text, and a number that is not finite is refused.

ruamel.yaml's parser serves for the events only; its constructors are not used.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..words import shown

Loc = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_DIGITS = 40

NULL = re.compile(r"~|null|Null|NULL|")
TRUE = re.compile(r"true|True|TRUE")
FALSE = re.compile(r"false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.nan|\.NaN|\.NAN")
# What YAML's own reader refuses; also refused as escapes, since no file system takes NUL or half a surrogate.
SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # JSON's escape of what is beyond U+FFFF
UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Mark:
    """A place in a text: its name (a file, or the `--set` it came from), line and column from 1 (0: none)."""

    name: str
    line: int = 0
    column: int = 0

    @property
    def order(self) -> tuple[bool, int, int]:
        """Sorts a file's places as they stand, those of the command line last."""
        return not self.line, self.line, self.column

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name


@dataclass
class Document:
    """Plain values (dict, list, str, int, float, bool, None) and where they were written.

    Attributes:
        value: the root.
        keys: place of the key (of the dash's item in lists), by path.
        values: place of the value, by path; `()` is the root.
    """

    value: Any = None
    keys: dict[Loc, Mark] = field(default_factory=dict)
    values: dict[Loc, Mark] = field(default_factory=dict)


def read_yaml(path: Path, name: str) -> Document:
    """The document in a file, called `name` in messages.

    Raises:
        RecipeError: missing, a directory, too large, not UTF-8, or not the YAML that `parse_yaml` takes.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise RecipeError(name, "a directory", "a YAML file")
        if not stat.S_ISREG(status.st_mode):
            raise RecipeError(name, "something that is not a regular file", "a YAML file")
        if status.st_size > MAX_BYTES:
            raise RecipeError(name, f"{status.st_size:,} bytes", f"at most {MAX_BYTES:,}", "A recipe holds no data.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError(name, "no such file", "a YAML file") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        raise RecipeError(name, f"a file that cannot be read ({error})", "a YAML file") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", "replace")
        mark = _mark_at(before, name)
        raise RecipeError(
            f"{mark}", f"byte 0x{raw[error.start]:02x}", "UTF-8 text", "Save the file as UTF-8."
        ) from error
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str, lines: bool = True) -> Document:
    """The document in `text`. Without `lines`, places are the name alone.

    Raises:
        RecipeError: not YAML, or a part of YAML that has no place in a recipe.
    """
    bad = UNPRINTABLE.search(text)
    if bad:
        mark = _mark_at(text[: bad.start()], name)
        raise RecipeError(str(mark if lines else name), f"the character U+{ord(bad.group()):04X}", "printable text")
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    def place(mark: Any) -> Mark:
        return Mark(name, mark.line + 1, mark.column + 1) if lines and mark else Mark(name)

    builder = _Builder(place)
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            builder.take(event)
    except MarkedYAMLError as error:
        what = ", ".join(_one_line(part) for part in (error.context, error.problem) if part)
        mark = place(error.problem_mark or error.context_mark)
        raise RecipeError(str(mark), f"text that is not YAML ({what})", "YAML", _syntax_remedy(what)) from error
    except (
        YAMLError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        # Besides its own errors, ruamel's scanner meets malformed escapes and directives with Python's.
        what = _one_line(error) or type(error).__name__
        raise RecipeError(name, f"text that is not YAML ({what})", "YAML") from error
    return builder.document


def _joined(pair: re.Match[str]) -> str:
    return pair.group().encode("utf-16", "surrogatepass").decode("utf-16")


def _one_line(said: object) -> str:
    return " ".join(str(said).split())[:200]


def _mark_at(before: str, name: str) -> Mark:
    return Mark(name, before.count("\n") + 1, len(before) - before.rfind("\n"))


def _syntax_remedy(problem: str) -> str:
    if "'\\t'" in problem:
        return "Indent with spaces."
    if "'%'" in problem or "'@'" in problem or "'`'" in problem:
        return "Put the value in quotes."
    if "mapping values are not allowed" in problem:
        return "A text with ': ' in it needs quotes; otherwise look at the indentation."
    return ""


def _on_one_line(anchor: str) -> str:
    """An anchor's name as it may stand in a message: some line separators are legal in YAML names."""
    return "".join(c if c.isprintable() else "?" for c in anchor[:20])


@dataclass
class _Frame:
    container: dict[str, Any] | list[Any]
    loc: Loc
    key: str | None = None
    key_mark: Mark | None = None


class _Builder:
    """Takes parser events; the document is whole at the end of the stream."""

    def __init__(self, place: Callable[[Any], Mark]):
        self.place = place
        self.document = Document()
        self.stack: list[_Frame] = []
        self.documents = self.nodes = 0

    def take(self, event: Any) -> None:
        from ruamel.yaml import events

        mark = self.place(event.start_mark)
        if isinstance(event, events.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise RecipeError(str(mark), "a second document", "one document", "Put each recipe into its own file.")
        elif isinstance(event, events.AliasEvent):
            raise RecipeError(str(mark), f"an alias *{_on_one_line(event.anchor)}", "the value itself", "Write it out.")
        elif isinstance(event, events.NodeEvent):
            self.nodes += 1
            if self.nodes > MAX_NODES:
                found = f"more than {MAX_NODES:,} keys and values"
                raise RecipeError(str(mark), found, "a recipe", "A recipe holds no data.")
            if event.anchor:
                raise RecipeError(
                    str(mark), f"an anchor &{_on_one_line(event.anchor)}", "plain values", "Write the value out twice."
                )
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise RecipeError(str(mark), f"a tag {shown(str(tag))}", "plain values", "Recipes are data: no tags.")
            if isinstance(event, events.ScalarEvent):
                self.scalar(event, mark)
            else:
                self.open({} if isinstance(event, events.MappingStartEvent) else [], mark)
        elif isinstance(event, (events.MappingEndEvent, events.SequenceEndEvent)):
            self.stack.pop()

    def scalar(self, event: Any, mark: Mark) -> None:
        text = SURROGATES.sub(_joined, event.value)
        bad = UNPRINTABLE.search(text)
        if bad:
            raise RecipeError(str(mark), f"the character U+{ord(bad.group()):04X}", "printable text")
        frame = self.stack[-1] if self.stack else None
        if frame is not None and isinstance(frame.container, dict) and frame.key is None:
            self.key(frame, text, mark)
            return
        if event.style is None and not text and frame is not None and frame.key_mark is not None:
            mark = frame.key_mark  # an absent value has no place of its own
        self.put(scalar(text, str(mark)) if event.style is None else text, mark)

    def key(self, frame: _Frame, text: str, mark: Mark) -> None:
        assert isinstance(frame.container, dict)
        if text in frame.container:
            first = self.document.keys[(*frame.loc, text)]
            where = f" (the first is in line {first.line})" if first.line else ""
            loc = dotted((*frame.loc, text))
            raise RecipeError(f"{mark}: {loc}", f"a second {shown(text)}{where}", "each key once", "Remove one.")
        frame.key, frame.key_mark = text, mark

    def open(self, container: dict[str, Any] | list[Any], mark: Mark) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise RecipeError(str(mark), "nesting without end", f"at most {MAX_DEPTH} levels")
        frame = self.stack[-1] if self.stack else None
        if frame is not None and isinstance(frame.container, dict) and frame.key is None:
            kind = "a mapping" if isinstance(container, dict) else "a list"
            raise RecipeError(str(mark), f"{kind} as a key", "a word", "Text with braces or brackets needs quotes.")
        self.stack.append(_Frame(container, self.put(container, mark)))

    def put(self, value: Any, mark: Mark) -> Loc:
        if not self.stack:
            self.document.value = value
            self.document.values[()] = mark
            return ()
        frame = self.stack[-1]
        if isinstance(frame.container, list):
            loc: Loc = (*frame.loc, len(frame.container))
            frame.container.append(value)
            self.document.keys[loc] = mark
        else:
            assert frame.key is not None
            assert frame.key_mark is not None
            loc = (*frame.loc, frame.key)
            frame.container[frame.key] = value
            self.document.keys[loc] = frame.key_mark
            frame.key = frame.key_mark = None
        self.document.values[loc] = mark
        return loc


def scalar(text: str, place: str) -> Any:
    """A plain scalar by YAML 1.2's core schema.

    Raises:
        RecipeError: a number that is not finite, or longer than a number has reason to be.
    """
    if NULL.fullmatch(text):
        return None
    if TRUE.fullmatch(text) or FALSE.fullmatch(text):
        return bool(TRUE.fullmatch(text))
    if NOT_FINITE.fullmatch(text):
        raise RecipeError(place, text, "a finite number")
    if not INT.fullmatch(text) and not FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise RecipeError(place, f"a number of {len(text)} characters", f"at most {MAX_DIGITS}", "Text needs quotes.")
    if INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        raise RecipeError(place, text, "a finite number")
    return value


def dotted(loc: Loc) -> str:
    """`passes.0.with.remove`, as `--set` writes it."""
    return ".".join(shown(p) if isinstance(p, str) and re.search(r"[\s.]|^$", p) else str(p)[:60] for p in loc)
