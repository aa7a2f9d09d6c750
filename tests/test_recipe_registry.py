"""Passes and exporters by name, the built-ins and those of a package that is none of ours."""
# ruff: noqa: E501 -- a message is one line here as it is there

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from tersor.compress import registry
from tersor.compress.errors import RecipeError
from tersor.compress.recipe import ExportStep, PassStep, json_schema, load_recipe
from tersor.compress.recipe import schema as recipe_schema

TOY = '''
"""A package of somebody else's."""
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from tersor.compress.errors import RecipeError
from tersor.compress.pass_ import STRICT, Pass


@dataclass(frozen=True, config=STRICT)
class Part:
    """A part of the model.

    Attributes:
        block: its number.
    """

    block: Annotated[int, Field(ge=0, le=9)]


@dataclass(frozen=True, config=STRICT)
class Toy(Pass):
    """Do nothing, with options of every kind.

    More about it.

    Attributes:
        rate: a share, which is
            told over two lines.
        parts: which parts.
        mode: how.
        careful: whether to look.
        words: a mapping.
        limit: a number, or nothing.
    """

    needs_calibration: ClassVar[bool] = True

    rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    parts: tuple[Part, ...] = ()
    mode: Literal["fast", "exact"] = "fast"
    careful: bool = False
    words: dict[str, int] = Field(default_factory=dict)
    limit: float | None = 2.0

    @field_validator("mode")
    @classmethod
    def _not_exact(cls, mode):
        if mode == "exact":
            raise RecipeError("mode", "'exact'", "'fast'", "It is not built yet.")
        return mode

    def requires(self, layout: Any) -> Any:
        raise NotImplementedError

    def apply(self, checkpoint: Any, context: Any) -> None:
        raise NotImplementedError

    def checks(self, details: Any) -> list:
        return []


@dataclass(frozen=True)
class Loose(Pass):
    """Its configuration would let unknown options through."""

    rate: float = 0.5


class Plain(Pass):
    """No dataclass."""


class Other:
    """No pass."""
'''

POINTS = """\
[tersor.passes]
toy = toy_passes:Toy
broken = toy_broken:Pass
raising = toy_raising:Pass
lost = toy_passes:Nowhere
loose = toy_passes:Loose
plain = toy_passes:Plain
other = toy_passes:Other
compact = toy_passes:Toy
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A real distribution on the path: metadata, entry points, modules."""
    site = tmp_path / "site"
    info = site / "toy_passes-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    (site / "toy_passes.py").write_text(TOY)
    (site / "toy_broken.py").write_text("import a_module_that_is_not_there\n")
    (site / "toy_raising.py").write_text("raise RuntimeError('no GPU\\nhere')\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    caches = (registry._points, registry._load)
    for cache in caches:
        cache.cache_clear()
    yield site
    for cache in caches:
        cache.cache_clear()
    for name in [name for name in sys.modules if name.startswith("toy_")]:
        del sys.modules[name]


def test_the_built_ins():
    assert {"slice", "compact"} <= set(registry.names("tersor.passes"))
    assert "onnx" in registry.names("tersor.exporters")
    for name in registry.names("tersor.passes"):
        assert registry.find_pass(name).__module__.endswith(f".passes.{name}")
    for name in registry.names("tersor.exporters"):
        assert registry.find_exporter(name).__module__.startswith("tersor.export.")


def test_one_name_imports_one_module():
    code = (
        "import sys; from tersor.compress.registry import find_pass, names; names('tersor.passes');"
        "before = [m for m in sys.modules if '.passes' in m and m.startswith('tersor')];"
        "find_pass('slice'); print(before, sorted(m for m in sys.modules if '.passes.' in m and m.startswith('tersor')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[] ['tersor.compress.passes.slice']\n"


def test_a_foreign_pass(toy, tmp_path):
    assert registry.find_pass("toy").__name__ == "Toy"
    assert "toy_broken" not in sys.modules
    path = tmp_path / "r.yaml"
    path.write_text(
        "recipe: 1\ndata: {calibration: {path: a.txt}}\npasses:\n  - use: toy\n"
        "    with: {rate: 1, parts: [{block: 3}], words: {a: 1}, limit: ~}\n"
    )
    recipe = load_recipe(path)
    options = recipe.passes[0].options
    assert options.rate == 1.0
    assert options.parts[0].block == 3
    assert options.limit is None
    path.write_text(recipe.to_yaml())  # an option's own null is kept, since its default is another
    assert load_recipe(path) == recipe
    assert recipe != load_recipe(path, ["passes.0.with.limit=2.0"])


@pytest.mark.parametrize(
    ("options", "at", "expected"),
    [
        ("{rate: 2}", "2", "rate: found 2, expected a number from 0 to 1. Did you mean 0.02?"),
        (
            "{parts: {block: 1}}",
            "{block",
            "parts: found a mapping with block, expected a list, each a mapping with block. "
            "Begin each entry of a list with '- '.",
        ),
        (
            "{parts: [{blok: 1}]}",
            "blok",
            "parts.0.blok: found an unknown key 'blok', expected block. Did you mean 'block'?",
        ),
        ("{parts: [{block: 12}]}", "12", "parts.0.block: found 12, expected a whole number from 0 to 9"),
        (
            "{parts: [{block: 1.0}]}",
            "1.0",
            "parts.0.block: found 1.0, expected a whole number from 0 to 9. Did you mean 1?",
        ),
        ("{mode: fst}", "fst", "mode: found 'fst', expected one of fast, exact. Did you mean 'fast'?"),
        ("{careful: yes}", "yes", "careful: found 'yes', expected true or false. Did you mean true?"),
        ("{words: {a: b}}", "b}", "words.a: found 'b', expected a whole number"),
        ("{limit: a lot}", "a lot", "limit: found 'a lot', expected a number"),
        ("{mode: exact}", "{mode", ": found 'exact', expected 'fast'. It is not built yet."),
        (
            "[0.5]",
            "[0.5]",
            ": found a list of 1, expected a mapping with rate, parts, mode, careful, words, limit",
        ),
    ],
)
def test_faults_in_the_options_of_a_foreign_pass(toy, tmp_path, options, at, expected):
    path = tmp_path / "r.yaml"
    line = f"  with: {options}"
    path.write_text(f"recipe: 1\ndata: {{calibration: {{path: a.txt}}}}\npasses:\n- use: toy\n{line}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    dot = "" if expected.startswith(":") else "."
    assert str(caught.value) == f"{path}:5:{line.index(at) + 1}: passes.0.with{dot}{expected}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "broken",
            "'broken' = toy_broken:Pass that cannot be imported (ModuleNotFoundError: No module named "
            "'a_module_that_is_not_there'), expected a module that imports. Repair or uninstall the package toy-passes.",
        ),
        (
            "raising",
            "'raising' = toy_raising:Pass that cannot be imported (RuntimeError: no GPU), expected a module that imports. "
            "Repair or uninstall the package toy-passes.",
        ),
        (
            "lost",
            "'lost' = toy_passes:Nowhere that cannot be imported (AttributeError: module 'toy_passes' has no attribute 'Nowhere'), "
            "expected a module that imports. Repair or uninstall the package toy-passes.",
        ),
        ("loose", "'loose' = toy_passes:Loose, expected a frozen pydantic dataclass with config=STRICT"),
        ("plain", "'plain' = toy_passes:Plain, expected a frozen pydantic dataclass with config=STRICT"),
        ("other", "'other' = toy_passes:Other, expected a subclass of tersor.compress.pass_.Pass"),
        (
            "compact",
            "'compact' offered by the package tersor and the package toy-passes, expected one package a name. Uninstall one of them.",
        ),
    ],
)
def test_a_foreign_pass_that_does_not_serve(toy, tmp_path, name, expected):
    with pytest.raises(RecipeError) as caught:
        registry.find_pass(name)
    assert str(caught.value) == f"pass: found {expected}"
    path = tmp_path / "r.yaml"
    path.write_text(f"recipe: 1\npasses:\n  - use: {name}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}:3:10: passes.0.use: found {expected}"


def test_unknown_names():
    with pytest.raises(
        RecipeError,
        match=r"^pass: found an unknown pass 'slise', expected one of .*slice.*Did you mean 'slice'\?$",
    ):
        registry.find_pass("slise")
    with pytest.raises(
        RecipeError, match=r"^exporter: found an unknown exporter 'onxx', expected .*Did you mean 'onnx'\?$"
    ):
        registry.find_exporter("onxx")


def allowed(schema: dict, name: str, step: type) -> dict:
    (rule,) = [
        r for r in schema["$defs"][step.__name__]["allOf"] if r["if"] == {"properties": {"use": {"const": name}}}
    ]
    return rule["then"]


def test_schema_of_the_built_ins():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["recipe"]
    assert schema["properties"]["recipe"]["const"] == 1
    assert "perplexity" in schema["properties"]["metrics"]["items"]["enum"]
    assert schema["$defs"]["PassStep"]["properties"]["use"]["enum"] == registry.names("tersor.passes")
    cut = allowed(schema, "slice", PassStep)
    assert cut["required"] == ["with"]
    assert cut["properties"]["with"]["properties"]["remove"]["exclusiveMaximum"] == 1
    assert "required" not in allowed(schema, "onnx", ExportStep)
    for kind, title in (
        ("Source", "path"),
        ("Gate", "max_increase"),
        ("Data", "heldout"),
        ("PassStep", "with"),
    ):
        assert schema["$defs"][kind]["properties"][title]["description"]
        assert schema["$defs"][kind]["description"]
    assert all(part["description"] for part in schema["properties"].values())


def test_schema_of_a_foreign_pass(toy):
    schema = json_schema()
    options = allowed(schema, "toy", PassStep)["properties"]["with"]
    assert options["description"] == "Do nothing, with options of every kind. More about it."
    assert options["properties"]["rate"]["description"] == "a share, which is told over two lines."
    assert options["properties"]["parts"]["items"] == {"$ref": "#/$defs/toy.Part"}
    assert schema["$defs"]["toy.Part"]["properties"]["block"]["maximum"] == 9
    said = allowed(schema, "broken", PassStep)["properties"]["with"]["description"]
    assert said.startswith("broken cannot be used: 'broken' = toy_broken:Pass that cannot be imported")
    assert references(schema) <= {f"#/$defs/{name}" for name in schema["$defs"]}


def references(node) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(references, node))
    if not isinstance(node, dict):
        return set()
    own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
    return own.union(*map(references, node.values()))


def test_making_the_schema_leaves_it_as_it_was(toy):
    assert json_schema() == json_schema()
    assert "enum" not in recipe_schema._recipe()["$defs"]["PassStep"]["properties"]["use"]
