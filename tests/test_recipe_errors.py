"""Recipes that are wrong: each fault's whole line: place, what was found, what was expected, the remedy."""
# ruff: noqa: E501 -- a message is one line here as it is there

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tersor.compress.errors import RecipeError
from tersor.compress.evaluate.metrics import METRICS
from tersor.compress.recipe import load_recipe
from tersor.compress.recipe.complaints import MOST, RecipeFaultsError
from tersor.compress.registry import find_pass, names
from tersor.compress.words import one_of

TOP = "one of recipe, name, model, task, dtype, seed, data, metrics, passes, gate, export"
SHARE = "a number between 0 and 1, both excluded"
TEXT = "data: {calibration: {path: a.txt}, heldout: {path: b.txt}}"
KNOWN = one_of(names("tersor.passes"))
EXPORTERS = one_of(names("tersor.exporters"))
SLICE = one_of(field.name for field in fields(find_pass("slice")))
COMPACT = one_of(field.name for field in fields(find_pass("compact")))
MEASURED = ", ".join(METRICS)


def lines(tmp_path, text: str, *overrides: str) -> list[str]:
    """The message's lines, the file's name shortened to `r`."""
    path = tmp_path / "r.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return [line.replace(str(path), "r") for line in str(caught.value).splitlines()]


FAULTS = {
    # top level
    "no version": ("seed: 1", "r:1:1: recipe: found nothing, expected 1. Add `recipe: 1`."),
    "other version": ("recipe: 2", "r:1:9: recipe: found 2, expected 1. This tersor knows only 1."),
    "unknown key": (
        "recipe: 1\nsed: 1",
        f"r:2:1: sed: found an unknown key 'sed', expected {TOP}. Did you mean 'seed'?",
    ),
    "unknown key, nothing near": (
        "recipe: 1\nzzz: 1",
        f"r:2:1: zzz: found an unknown key 'zzz', expected {TOP}",
    ),
    "key of a part": (
        "recipe: 1\nheldout: {path: a}",
        f"r:2:1: heldout: found an unknown key 'heldout', expected {TOP}. It belongs under data.",
    ),
    "odd key": ("recipe: 1\n'a b': 1", f"r:2:1: 'a b': found an unknown key 'a b', expected {TOP}"),
    "text for a number": (
        "recipe: 1\nseed: one",
        "r:2:7: seed: found 'one', expected a whole number of at least 0 and under 2,147,483,648",
    ),
    "number in quotes": (
        "recipe: 1\nseed: '12'",
        "r:2:7: seed: found '12', expected a whole number of at least 0 and under 2,147,483,648. Did you mean 12?",
    ),
    "negative seed": (
        "recipe: 1\nseed: -1",
        "r:2:7: seed: found -1, expected a whole number of at least 0 and under 2,147,483,648",
    ),
    "nothing for a number": (
        "recipe: 1\nseed:",
        "r:2:1: seed: found nothing, expected a whole number of at least 0 and under 2,147,483,648",
    ),
    "number for text": (
        "recipe: 1\nmodel: 12",
        'r:2:8: model: found 12, expected text that is not empty. Did you mean "12", in quotes?',
    ),
    "empty text": ("recipe: 1\nmodel: ''", "r:2:8: model: found '', expected text that is not empty"),
    "choice": (
        "recipe: 1\ndtype: bf16",
        "r:2:8: dtype: found 'bf16', expected one of float32, bfloat16, float16. Did you mean 'bfloat16'?",
    ),
    "text for a list": (
        "recipe: 1\nmetrics: kl, top1",
        "r:2:10: metrics: found 'kl, top1', expected a list, each text. Did you mean [kl, top1]?",
    ),
    "mapping for a list": (
        "recipe: 1\npasses:\n  use: slice",
        "r:3:3: passes: found a mapping with use, expected a list, each a mapping with use, with, gate. "
        "Begin each entry of a list with '- '.",
    ),
    "list for a mapping": (
        "recipe: 1\ndata: [a.txt]",
        "r:2:7: data: found a list of 1, expected a mapping with calibration, heldout",
    ),
    "text for a source": (
        "recipe: 1\ndata: {heldout: b.txt}",
        "r:2:17: data.heldout: found 'b.txt', expected a mapping with path, field, samples, length, span, label, pair, "
        "choices, columns, delimiter, split, subset",
    ),
    "a source's key": (
        "recipe: 1\ndata: {heldout: {path: b.txt, sample: 3}}",
        "r:2:31: data.heldout.sample: found an unknown key 'sample', expected one of path, field, samples, length, span, "
        "label, pair, choices, columns, delimiter, split, subset. Did you mean 'samples'?",
    ),
    "a source's number": (
        "recipe: 1\ndata: {heldout: {path: b.txt, samples: 0}}",
        "r:2:40: data.heldout.samples: found 0, expected a whole number over 0",
    ),
    "long value": (
        f"recipe: 1\nseed: {'x' * 99}",
        f"r:2:7: seed: found '{'x' * 58}…, expected a whole number of at least 0 and under 2,147,483,648",
    ),
    # steps
    "unknown pass": (
        f"recipe: 1\n{TEXT}\npasses:\n  - use: slce",
        f"r:4:10: passes.0.use: found an unknown pass 'slce', expected {KNOWN}. Did you mean 'slice'?",
    ),
    "unknown exporter": (
        "recipe: 1\nexport: [{use: tflite}]",
        f"r:2:16: export.0.use: found an unknown exporter 'tflite', expected {EXPORTERS}",
    ),
    "no use": (
        "recipe: 1\npasses: [{with: {remove: 0.1}}]",
        "r:2:10: passes.0.use: found nothing, expected text. Add `use: …`.",
    ),
    "misspelt use is one fault": (
        f"recipe: 1\n{TEXT}\npasses: [{{uses: slice}}]",
        "r:3:11: passes.0.uses: found an unknown key 'uses', expected one of use, with, gate. Did you mean 'use'?",
    ),
    "a name for a step": (
        "recipe: 1\npasses: [slice]",
        "r:2:10: passes.0: found 'slice', expected a mapping with use, with, gate",
    ),
    "per cent as a share": (
        f"recipe: 1\n{TEXT}\npasses:\n  - use: slice\n    with: {{remove: 50}}",
        f"r:5:20: passes.0.with.remove: found 50, expected {SHARE}. Did you mean 0.5?",
    ),
    "per cent sign": (
        f"recipe: 1\n{TEXT}\npasses: [{{use: slice, with: {{remove: 25 %}}}}]",
        f"r:3:38: passes.0.with.remove: found '25 %', expected {SHARE}. Did you mean 0.25?",
    ),
    "decimal comma": (
        f"recipe: 1\n{TEXT}\npasses: [{{use: slice, with: {{remove: '0,25'}}}}]",
        f"r:3:38: passes.0.with.remove: found '0,25', expected {SHARE}. Did you mean 0.25?",
    ),
    "all of it": (
        f"recipe: 1\n{TEXT}\npasses: [{{use: slice, with: {{remove: 1}}}}]",
        f"r:3:38: passes.0.with.remove: found 1, expected {SHARE}",
    ),
    "more than all": (
        f"recipe: 1\n{TEXT}\npasses: [{{use: slice, with: {{remove: -3}}}}]",
        f"r:3:38: passes.0.with.remove: found -3, expected {SHARE}",
    ),
    "true for a number": (
        f"recipe: 1\n{TEXT}\npasses: [{{use: slice, with: {{remove: true}}}}]",
        f"r:3:38: passes.0.with.remove: found true, expected {SHARE}",
    ),
    "no options": (
        f"recipe: 1\n{TEXT}\npasses:\n  - use: slice",
        f"r:4:5: passes.0.with.remove: found nothing, expected {SHARE}. Add `remove: …`.",
    ),
    "empty options": (
        f"recipe: 1\n{TEXT}\npasses:\n  - use: slice\n    with:",
        f"r:5:5: passes.0.with.remove: found nothing, expected {SHARE}. Add `remove: …`.",
    ),
    "misspelt option is one fault": (
        f"recipe: 1\n{TEXT}\npasses: [{{use: compact, with: {{onn: [ffn]}}}}]",
        f"r:3:32: passes.0.with.onn: found an unknown key 'onn', expected {COMPACT}. Did you mean 'on'?",
    ),
    "option beside with": (
        f"recipe: 1\n{TEXT}\npasses: [{{use: slice, remove: 0.2}}]",
        "r:3:23: passes.0.remove: found an unknown key 'remove', expected one of use, with, gate. It belongs under with.",
    ),
    "options for with": (
        f"recipe: 1\n{TEXT}\npasses: [{{use: slice, options: {{remove: 0.2}}}}]",
        "r:3:23: passes.0.options: found an unknown key 'options', expected one of use, with, gate. Did you mean 'with'?",
    ),
    "a list in a list": (
        f"recipe: 1\n{TEXT}\npasses: [{{use: compact, with: {{on: [[ffn]]}}}}]",
        "r:3:37: passes.0.with.on.0: found a list of 1, expected one of ffn, shared_ffn, heads. Did you mean 'ffn'?",
    ),
    # what must hang together
    "unknown metric": (
        f"recipe: 1\n{TEXT}\nmetrics: [perplexty]",
        f"r:3:11: metrics.0: found 'perplexty', expected one of {MEASURED}. Did you mean 'perplexity'?",
    ),
    "always measured": (
        f"recipe: 1\n{TEXT}\nmetrics: [bytes]",
        f"r:3:11: metrics.0: found 'bytes', expected one of {MEASURED}. It is always measured: remove it here.",
    ),
    "metric twice": (
        f"recipe: 1\n{TEXT}\nmetrics: [kl, kl]",
        "r:3:15: metrics.1: found a second 'kl', expected each metric once. Remove one.",
    ),
    "metrics without text": (
        "recipe: 1\nmetrics: [kl]",
        "r:2:10: metrics: found metrics without text, expected data.heldout. Add `data: {heldout: {path: …}}`.",
    ),
    "gate without text": (
        "recipe: 1\ngate: {metric: kl, max: 1}",
        "r:2:7: gate: found a gate on kl without text, expected data.heldout. Add `data: {heldout: {path: …}}`.",
    ),
    "gate on what is not measured": (
        f"recipe: 1\n{TEXT}\nmetrics: [kl]\ngate: [{{metric: bytes, max: 1}}, {{metric: top1, min: 0.5}}]",
        "r:4:33: gate.1: found a gate on top1, which is not measured, expected one of kl, parameters, bytes, latency_ms. "
        "Add top1 to metrics.",
    ),
    "gate of a step": (
        f"recipe: 1\n{TEXT}\nmetrics: [kl]\nexport: [{{use: onnx, gate: {{metric: top1, min: 0.5}}}}]",
        "r:4:28: export.0.gate: found a gate on top1, which is not measured, expected one of kl, parameters, bytes, latency_ms. "
        "Add top1 to metrics.",
    ),
    "no calibration": (
        "recipe: 1\npasses: [{use: slice, with: {remove: 0.1}}]",
        "r:2:16: passes.0.use: found slice, which reads calibration text, and no data.calibration, expected text to calibrate on. "
        "Add `data: {calibration: {path: …}}`.",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, tmp_path):
    text, *expected = FAULTS[name]
    assert lines(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("gate", "parts"),
    [
        (
            "{metric: perplexty, max: 1}",
            ("r:3:16: gate.metric: ", "'perplexty'", "perplexity, ", "Did you mean"),
        ),
        ("{metric: kl}", ("r:3:7: gate: ", "max, max_increase, min, max_drop", "none")),
        ("{metric: kl, max: 1, min: 0}", ("r:3:7: gate: ", "min", "max")),
        ("[{metric: kl, max: 1}, {metric: kl, min: 1}]", ("r:3:30: gate.1: ", "min on kl", "max")),
        ("{metric: kl, max_increase: lots}", ("r:3:34: gate.max_increase: ", "'lots'", "8%")),
        (
            "{metric: kl, max_increas: 1}",
            ("r:3:20: gate.max_increas: found an unknown key", "Did you mean 'max_increase'?"),
        ),
        (
            "5%",
            ("r:3:7: gate: found '5%', expected a mapping with metric, max, min, max_increase, max_drop",),
        ),
    ],
)
def test_gates(tmp_path, gate, parts):
    said = lines(tmp_path, f"recipe: 1\n{TEXT}\ngate: {gate}")[0]
    assert all(part in said for part in parts), said


def test_span_that_is_none(tmp_path):
    said = lines(tmp_path, "recipe: 1\ndata: {heldout: {path: a.txt, span: half}}")
    assert len(said) == 1
    assert said[0].startswith("r:2:37: data.heldout.span: ")
    assert "'half'" in said[0]


def test_text_that_is_shared(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n")
    shared = "recipe: 1\ndata:\n  calibration: {path: a.txt, span: 0%-60%}\n  heldout: {path: ./a.txt, span: 50%-100%}"
    assert lines(tmp_path, shared) == [
        "r:4:12: data.heldout: found text that calibration reads too, expected text that no pass has seen. "
        "Give each its own file, or its own span of one file (`0%-50%`, `50%-100%`)."
    ]
    (tmp_path / "r.yaml").write_text(shared.replace("60%", "50%"))
    load_recipe(tmp_path / "r.yaml")


def test_text_of_a_kind_that_is_not_read(tmp_path):
    (tmp_path / "a.exe").write_text("one")
    said = lines(tmp_path, "recipe: 1\ndata: {heldout: {path: a.exe}}")
    assert len(said) == 1
    assert said[0].startswith("r:2:24: data.heldout.path: found a file of kind '.exe', expected ")


def test_all_faults_in_the_file_s_order_and_the_command_line_s_last(tmp_path):
    text = f"sed: 1\nrecipe: 1\n{TEXT}\npasses:\n  - with: {{remove: 3}}\n    use: slice\nseed: x\n"
    assert [line.split(" found ")[0] for line in lines(tmp_path, text, "dtype=int3", "metric=[kl]")] == [
        "r:1:1: sed:",
        "r:5:20: passes.0.with.remove:",
        "r:7:7: seed:",
        "--set dtype=int3: dtype:",
        "--set metric=[kl]: metric:",
    ]


def test_a_flood_of_faults_is_bounded(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("recipe: 1\n" + "".join(f"key{n}: 1\n" for n in range(3_000)))
    with pytest.raises(RecipeFaultsError) as caught:
        load_recipe(path)
    said = str(caught.value).splitlines()
    assert len(said) == MOST + 1
    assert said[-1] == f"… and {3_000 - MOST} more."


def test_faults_as_data(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("recipe: 1\nsed: 1\nseed: x")
    with pytest.raises(RecipeFaultsError) as caught:
        load_recipe(path)
    assert [error.found for error in caught.value.errors] == ["an unknown key 'sed'", "'x'"]
    assert [str(error) for error in caught.value.errors] == str(caught.value).splitlines()
    moved = str(caught.value.at("smoke"))
    assert [line.startswith("smoke: ") for line in moved.splitlines()] == [True, True]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "--set seed: found no KEY=VALUE, expected something like passes.0.with.remove=0.3"),
        ("=3", "--set =3: found no KEY=VALUE, expected something like passes.0.with.remove=0.3"),
        ("a..b=3", "--set a..b=3: found no KEY=VALUE, expected something like passes.0.with.remove=0.3"),
        ("sed=3", f"--set sed=3: sed: found an unknown key 'sed', expected {TOP}. Did you mean 'seed'?"),
        ("seed.x=3", "--set seed.x=3: x: found seed = 5, expected a mapping or a list"),
        (
            "passes.slice.with.remove=3",
            "--set passes.slice.with.remove=3: slice: found no such position in passes, "
            "expected a position from 0 to 0, or 1 to append. slice is at 0.",
        ),
        (
            "passes.2.use=slice",
            "--set passes.2.use=slice: 2: found no such position in passes, expected a position from 0 to 0, or 1 to append",
        ),
        (
            "export.1.use=onnx",
            "--set export.1.use=onnx: export: found a mapping with 1, expected a list, each a mapping with use, with, gate. "
            "Begin each entry of a list with '- '.",
        ),
        (
            "passes.0.with.remove=50",
            f"--set passes.0.with.remove=50: passes.0.with.remove: found 50, expected {SHARE}. Did you mean 0.5?",
        ),
        (
            "passes.0.with.remov=0.5",
            f"--set passes.0.with.remov=0.5: passes.0.with.remov: found an unknown key 'remov', expected {SLICE}. Did you mean 'remove'?",
        ),
        (
            "passes.0.wiht.remove=0.5",
            "--set passes.0.wiht.remove=0.5: passes.0.wiht: found an unknown key 'wiht', expected one of use, with, gate. "
            "Did you mean 'with'?",
        ),
        (
            "metrics={a: &x 1}",
            "--set metrics={a: &x 1}: found an anchor &x, expected plain values. Write the value out twice.",
        ),
        ("metrics=[", "--set metrics=[: found text that is not YAML (while parsing a flow node, "),
        ("seed=.nan", "--set seed=.nan: found .nan, expected a finite number"),
        (".".join("a" * 33) + "=1", f"--set {'a.' * 32}a=1: found 33 levels, expected at most 32"),
        ("seed=\ud800", "'--set seed=\\ud800': found characters that cannot be printed, expected KEY=VALUE"),
    ],
)
def test_overrides(tmp_path, override, expected):
    text = f"recipe: 1\nseed: 5\n{TEXT}\npasses: [{{use: slice, with: {{remove: 0.2}}}}]"
    said = lines(tmp_path, text, override)
    assert said[0].startswith(expected), said[0]
    if not expected.endswith(", "):
        assert said == [expected]


def test_a_long_override_is_shortened(tmp_path):
    said = lines(tmp_path, "recipe: 1", "seed=" + "9" * 5000)
    assert said == [
        f"--set seed={'9' * 74}…: found a number of 5000 characters, expected at most 40. Text needs quotes."
    ]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("quickstrt", "recipe quickstrt: found no recipe of that name, expected a .yaml file or one of "),
        ("nowhere.yaml", "nowhere.yaml: found no such file, expected a YAML file"),
        ("some/where", "some/where: found no such file, expected a YAML file"),
        ("here", "recipe here: found no recipe of that name, expected a .yaml file or one of "),
        (
            "a\0b.yaml",
            "'a\\x00b.yaml': found a file that cannot be read (embedded null byte), expected a YAML file",
        ),
        ("two\nlines.yaml", "'two\\nlines.yaml': found no such file, expected a YAML file"),
        ("x" * 3000 + "/a.yaml", "'xxxx"),
    ],
)
def test_references(tmp_path, monkeypatch, reference, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.yaml").write_text("recipe: 1")
    with pytest.raises(RecipeError) as caught:
        load_recipe(reference)
    said = str(caught.value)
    assert said.startswith(expected)
    assert len(said.splitlines()) == 1
    if reference == "here":
        assert said.endswith("Did you mean here.yaml?")
    if reference == "quickstrt":
        assert said.endswith("Did you mean 'quickstart'?")
        assert "quickstart" in said.split("expected")[1]


# Any tree of the schema's words, right and wrong, is a recipe or one line a fault.
KEYS = (
    "recipe name model task dtype seed data metrics passes gate export calibration heldout path field samples length"
    " span use with options metric max min max_increase max_drop remove on inputs"
)
WORDS = st.sampled_from([*KEYS.split(), "slice", "compact", "onnx", "kl", "bytes", "8%", "0", "1", "a.txt"])
VALUES = st.recursive(
    st.one_of(WORDS, st.integers(-2, 3), st.floats(-2, 2), st.none(), st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=15,
)


def steps(names: list[str]) -> st.SearchStrategy:
    step = st.fixed_dictionaries(
        {"use": st.sampled_from(names)}, optional={"with": VALUES, "gate": VALUES, "x": VALUES}
    )
    return st.lists(st.one_of(step, VALUES), max_size=3)


TREES = st.fixed_dictionaries(
    {"recipe": st.just(1)},
    optional={
        "data": st.one_of(VALUES, st.fixed_dictionaries({"calibration": VALUES, "heldout": VALUES})),
        "metrics": VALUES,
        "passes": steps(["slice", "compact", "slce"]),
        "gate": VALUES,
        "export": steps(["onnx"]),
        "seed": VALUES,
        "sed": VALUES,
    },
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_tree_is_a_recipe_or_a_line_a_fault(tmp_path_factory, tree):
    from tersor.compress.recipe.yaml_text import to_yaml

    path = tmp_path_factory.getbasetemp() / "tree.yaml"
    path.write_text(to_yaml(tree), "utf-8")
    try:
        load_recipe(path)
    except RecipeError as error:
        for line in str(error).splitlines():
            assert line.startswith(f"{path}:"), line
            assert not any(word in line for word in ("pydantic", "Input should", "dataclass", "validator")), line


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.tuples(st.lists(st.one_of(WORDS, st.integers(0, 2).map(str))), st.text()).map(
            lambda t: f"{'.'.join(t[0])}={t[1]}"
        ),
    )
)
def test_any_override_is_taken_or_refused_by_name(tmp_path_factory, override):
    path = tmp_path_factory.getbasetemp() / "base.yaml"
    path.write_text(f"recipe: 1\n{TEXT}\npasses: [{{use: slice, with: {{remove: 0.2}}}}]\n", "utf-8")
    try:
        load_recipe(path, [override])
    except RecipeError as error:
        said = str(error)
    else:
        return
    assert "--set " in said or str(path) in said
