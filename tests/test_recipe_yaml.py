"""Recipe files that are not recipes at all: hostile, broken or odd YAML is one clear line, and quickly."""
# ruff: noqa: E501 -- a message is one line here as it is there

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.compress.errors import RecipeError
from tersor.compress.recipe import Recipe, load_recipe
from tersor.compress.recipe.yaml_file import MAX_BYTES, MAX_DEPTH, parse_yaml

BILLION_LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{chr(n + 1)}: &{chr(n + 1)} [{', '.join([f'*{chr(n)}'] * 9)}]\n" for n in range(ord("a"), ord("j"))
)
NOT_YAML = "found text that is not YAML ("

HOSTILE = {
    "python object": (
        b"recipe: 1\nmodel: !!python/object/apply:os.system ['true']",
        "2:8: found a tag 'tag:yaml.org,2002:python/object/apply:os.system', expected plain values. Recipes are data: no tags.",
    ),
    "own tag": (
        b"recipe: !one 1",
        "1:9: found a tag '!one', expected plain values. Recipes are data: no tags.",
    ),
    "empty tag": (b"recipe: ! 1", "1:9: found a tag '!', expected plain values. Recipes are data: no tags."),
    "harmless tag": (
        b"recipe: !!int 1",
        "1:9: found a tag 'tag:yaml.org,2002:int', expected plain values. Recipes are data: no tags.",
    ),
    "billion laughs": (
        BILLION_LAUGHS.encode(),
        "1:4: found an anchor &a, expected plain values. Write the value out twice.",
    ),
    "alias": (b"recipe: 1\nseed: *s", "2:7: found an alias *s, expected the value itself. Write it out."),
    "merge": (b"recipe: 1\n<<: {seed: 1}", "2:1: <<: found an unknown key '<<', expected one of recipe, "),
    "deep": (
        b"recipe: 1\ngate: " + b"[" * 40 + b"]" * 40,
        f"2:38: found nesting without end, expected at most {MAX_DEPTH} levels",
    ),
    "endless": (
        b"[" * 250_000,
        f"1:{MAX_DEPTH + 1}: found nesting without end, expected at most {MAX_DEPTH} levels",
    ),
    "endless blocks": (
        b"- " * 120_000,
        f"1:{2 * MAX_DEPTH + 1}: found nesting without end, expected at most {MAX_DEPTH} levels",
    ),
    "endless list": (
        b"recipe: 1\nmetrics: [" + b"k," * 100_000 + b"]",
        "2:20001: found more than 10,000 keys and values, expected a recipe. A recipe holds no data.",
    ),
    "key twice": (
        b"recipe: 1\nseed: 1\nmodel: x\nseed: 2",
        "4:1: seed: found a second 'seed' (the first is in line 2), expected each key once. Remove one.",
    ),
    "key twice inside": (
        b"recipe: 1\ndata: {heldout: {path: a,\n path: b}}",
        "3:2: data.heldout.path: found a second 'path' (the first is in line 2), expected each key once. Remove one.",
    ),
    "two documents": (
        b"recipe: 1\n---\nrecipe: 1",
        "2:1: found a second document, expected one document. Put each recipe into its own file.",
    ),
    "list as key": (
        b"[recipe]: 1",
        "1:1: found a list as a key, expected a word. Text with braces or brackets needs quotes.",
    ),
    "mapping as key": (
        b"{a: 1}: 1",
        "1:1: found a mapping as a key, expected a word. Text with braces or brackets needs quotes.",
    ),
    "unquoted template": (
        b"model: {{name}}",
        "1:9: found a mapping as a key, expected a word. Text with braces or brackets needs quotes.",
    ),
    "list on top": (b"- use: slice", "1:1: found a list, expected a mapping. Its first line is `recipe: 1`."),
    "text on top": (
        b"hello",
        "1:1: found a single value, expected a mapping. Its first line is `recipe: 1`.",
    ),
    "not UTF-8": (
        "recipe: 1\nmodel: caf\xe9".encode("latin-1"),
        "2:11: found byte 0xe9, expected UTF-8 text. Save the file as UTF-8.",
    ),
    "UTF-16": (
        "recipe: 1".encode("utf-16"),
        "1:1: found byte 0xff, expected UTF-8 text. Save the file as UTF-8.",
    ),
    "binary": (b"\x7fELF\x02\x01\x01\x00", "1:1: found the character U+007F, expected printable text"),
    "NUL": (b"recipe: 1\nmodel: a\x00b", "2:9: found the character U+0000, expected printable text"),
    "NUL escaped": (b'recipe: 1\nmodel: "a\\0b"', "2:8: found the character U+0000, expected printable text"),
    "half a character": (
        b'recipe: 1\nmodel: "\\ud800"',
        "2:8: found the character U+D800, expected printable text",
    ),
    "infinite": (b"recipe: 1\nseed: -.inf", "2:7: found -.inf, expected a finite number"),
    "overflow": (b"recipe: 1\nseed: 1e999", "2:7: found 1e999, expected a finite number"),
    "endless number": (
        b"recipe: 1\nseed: " + b"9" * 9999,
        "2:7: found a number of 9999 characters, expected at most 40. Text needs quotes.",
    ),
    "tab": (
        b"data:\n\theldout: 1",
        f"2:1: {NOT_YAML}while scanning for the next token, found character '\\t' that cannot start any token)",
    ),
    "colon": (
        b"model: a: b",
        f"1:9: {NOT_YAML}mapping values are not allowed here), expected YAML. A text with ': ' in it needs quotes",
    ),
    "per cent": (
        b"model: %x",
        f"1:8: {NOT_YAML}while scanning for the next token, found character '%' that cannot start any token), expected YAML. Put the value in quotes.",
    ),
    "open list": (
        b"metrics: [kl",
        f"1:13: {NOT_YAML}while parsing a flow sequence, expected ',' or ']', but got '<stream end>')",
    ),
    "open quote": (
        b'model: "x',
        f"1:10: {NOT_YAML}while scanning a quoted scalar, found unexpected end of stream)",
    ),
    "bad escape": (
        b'model: "\\q"',
        f"1:10: {NOT_YAML}while scanning a double-quoted scalar, found unknown escape character 'q')",
    ),
    "escape out of range": (b'model: "\\UFFFFFFFF"', f" {NOT_YAML}"),
    "bad directive": (b"%YAML x\n---\nrecipe: 1", f"1:7: {NOT_YAML}while scanning a directive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, tmp_path):
    raw, expected = HOSTILE[name]
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    said = str(caught.value)
    assert caught.value.exit_code == 2
    first, *others = said.splitlines()
    assert first.startswith(f"{path}:{expected}"), first
    assert not others or name == "merge"


@pytest.mark.parametrize("raw", [b"", b"\n\n", b"# nothing\n", b"---\n", b"~", b"\xef\xbb\xbf"])
def test_empty(tmp_path, raw):
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert (
        str(caught.value) == f"{path}: found an empty file, expected a recipe. Its first line is `recipe: 1`."
    )


def test_a_large_file_is_refused_unread(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"recipe: 1\n#" + b" " * (MAX_BYTES - 11))
    load_recipe(path)  # exactly at the limit
    with path.open("ab") as file:
        file.truncate(10**12)  # sparse: reading it would not fit in memory
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert (
        str(caught.value)
        == f"{path}: found 1,000,000,000,000 bytes, expected at most 262,144. A recipe holds no data."
    )


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for name, found in (
        ("folder.yaml", "found a directory"),
        ("pipe.yaml", "found something that is not a regular file"),
        ("missing.yaml", "found no such file"),
        ("loop.yaml", "found a file that cannot be read ("),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {found}")
        assert str(caught.value).endswith("expected a YAML file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("recipe: 1")
    path.chmod(0)
    with pytest.raises(RecipeError, match="a file that cannot be read"):
        load_recipe(path)


def test_nesting_up_to_the_limit_is_read():
    tree = parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f").value
    for _ in range(MAX_DEPTH - 1):
        (tree,) = tree
    assert tree == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"),
        ("8%", "8%"), ("1.2.3", "1.2.3"), ("0x", "0x"), ("- -", [[None]]), ("'1'", "1"), ('"a\\tb"', "a\tb"),
        ("true", True), ("FALSE", False), ("~", None), ("null", None), ("", None),
        ("12", 12), ("-7", -7), ("+7", 7), ("007", 7), ("0o17", 15), ("0xfF", 255),
        ("1.5", 1.5), (".5", 0.5), ("5.", 5.0), ("1e3", 1000.0), ("-1E-2", -0.01),
        ("|\n a\n b\n", "a\nb\n"), (">\n a\n b\n", "a b\n"), ('"\\ud83d\\ude00"', "\U0001f600"),
        ("{a: 1, b: [x, {c: }]}", {"a": 1, "b": ["x", {"c": None}]}), ("1: a", {"1": "a"}),
    ],
)  # fmt: skip
def test_scalars_are_the_core_schema_s(text, value):
    found = parse_yaml(text, "f").value
    assert found == value
    assert type(found) is type(value)


NAMES = st.text("abcxyz", min_size=1, max_size=5)
TREES = st.recursive(
    st.text("abc123", min_size=2, max_size=6).filter(lambda text: not text.isdigit()),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3), st.dictionaries(NAMES, inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


def _leaves(tree, loc=()):
    if not isinstance(tree, (dict, list)):
        yield loc, tree
        return
    for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _leaves(part, (*loc, key))


@settings(max_examples=100, deadline=None)
@given(TREES, st.booleans())
def test_a_place_is_where_the_text_stands(tree, flow):
    """Line and column of each key and value, held against the text itself."""
    import io

    from ruamel.yaml import YAML

    yaml, out = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = flow
    yaml.dump(tree, out)
    document = parse_yaml(out.getvalue(), "f")
    lines = out.getvalue().splitlines()
    assert document.value == tree
    for loc, leaf in _leaves(tree):
        mark = document.values[loc]
        assert lines[mark.line - 1][mark.column - 1 :].lstrip("'\"").startswith(leaf)
        for n in range(1, len(loc) + 1):
            if isinstance(loc[n - 1], str):
                key = document.keys[loc[:n]]
                assert lines[key.line - 1][key.column - 1 :].lstrip("'\"").startswith(loc[n - 1])


PIECES = st.sampled_from(
    ["recipe: 1\n", "passes:\n", "  - use: slice\n", "    with: ", "{", "}", "[", "]", ": ", ", ", "- ", "\n", " ", "\t", "&a ", "*a",
     "!!", "!x ", "|", ">", "'", '"', "\\", "#", "%", "@", "`", "? ", "---\n", "...\n", "<<: ", "%YAML 1.1\n", "%TAG ! x\n", "\ufeff",
     "\x85", "\u2028", "\x00", "0.5", "1e999", "~", "seed", "gate", "\r", "\U0001f600", "\\x", '"\\u', '"\\U9'],
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(),
        st.text().map(lambda t: t.encode("utf-8", "surrogatepass")),
        st.lists(PIECES).map(lambda p: "".join(p).encode()),
    )
)
def test_any_bytes_are_a_recipe_or_refused(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    try:
        assert isinstance(load_recipe(path), Recipe)
    except RecipeError as error:
        for line in str(error).splitlines():
            assert line.startswith(f"{path}:")
