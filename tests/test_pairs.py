"""Two texts in one sequence: token types go with the ids wherever a model is asked, and wrong ones are noticed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tersor.compress import How, apply, load_recipe
from tersor.compress.calibration.batches import batches
from tersor.compress.calibration.loss import judge
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.data import Source
from tersor.compress.errors import ParityMissed, RecipeError
from tersor.compress.evaluate import evaluate
from tersor.compress.evaluate.defaults import default_metrics
from tersor.compress.evaluate.metrics import divergence
from tersor.compress.evaluate.torch_scorer import TorchScorer
from tersor.compress.packing import PackedBatch
from tersor.compress.reading import Reader
from tersor.compress.tokens import Tokens
from tersor.compress.train import Distillation, text
from tersor.export.client import Client
from tersor.export.onnx import Onnx
from tersor.export.rows import check

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
PAIRS = [
    ("what grows here", "beans", 4.0, "yes"),
    ("who", "a man who came by in the morning", 2.5, "no"),
    ("where does it end", "at the sea", 3.0, "yes"),
    ("why", "nobody knows", 1.0, "no"),
]


def template(checkpoint: Checkpoint) -> Checkpoint:
    """The tiny tokenizer, joining two texts as BERT's does: <s> a </s> b </s>, types 0 and 1."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = checkpoint.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return checkpoint


@pytest.fixture(scope="module")
def scored(tiny: Any) -> Checkpoint:
    """A cross-encoder: one number a pair."""
    return template(tiny("bert", "text-classification", num_labels=1))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    rows = [("question", "answer", "score", "verdict"), *PAIRS * 8]
    path.write_text("\n".join("\t".join(map(str, row)) for row in rows) + "\n", "utf-8")
    return path


def read(checkpoint: Checkpoint, path: Path, **options: Any) -> list[Any]:
    source = Source(str(path), pair=("question", "answer"), samples=4, **options)
    return Reader.of(checkpoint).read(source, seed=None, base=None)


def sequences(seed: int = 0) -> list[Tokens]:
    draw = np.random.default_rng(seed)
    lengths = [(3, 9), (12, 1), (1, 1), (20, 30), (7, 0)]
    return [Tokens(draw.integers(4, 100, a + b), np.repeat([0, 1], [a, b])) for a, b in lengths]


def alone(checkpoint: Checkpoint, tokens: list[Tokens]) -> list[np.ndarray]:
    model = checkpoint.model(torch.float32)
    with torch.no_grad():
        asked = [{"input_ids": t.ids, "token_type_ids": t.kinds} for t in tokens]
        outs = [model(**{name: torch.from_numpy(value)[None] for name, value in one.items()}) for one in asked]
    return [(o.logits if hasattr(o, "logits") else o.last_hidden_state.mean(1))[0].numpy() for o in outs]


def test_pairs_are_read_with_their_types_and_a_number_or_a_class(scored: Checkpoint, tiny: Any, table: Path) -> None:
    samples = read(scored, table, label="score")
    assert [s.label for s in samples] == [4.0] * 4  # evenly spaced among the 32
    first = samples[0]
    assert first.ids.tolist()[:1] == [1]
    assert first.types.tolist() == [0] * (len(PAIRS[0][0]) + 2) + [1] * (len(PAIRS[0][1]) + 1)
    named = template(tiny("bert", "text-classification", label2id={"no": 0, "yes": 1}, id2label={0: "no", 1: "yes"}))
    assert read(named, table, label="verdict")[0].label == 1.0
    cut = read(scored, table, label="score", length=12)[0]
    assert len(cut.ids) == 12
    assert cut.types.max() == 1
    untyped = template(tiny("roberta", "text-classification"))
    assert read(untyped, table)[0].types is None


@pytest.mark.parametrize(
    ("task", "inputs", "options"),
    [
        ("text-classification", "packed", {"num_labels": 1}),
        ("text-classification", "packed-static", {}),
        ("feature-extraction", "packed", {}),
        ("token-classification", "padded", {}),
    ],
)
def test_torch_and_the_artifact_agree_on_types_in_any_arrangement(
    task: str, inputs: Any, options: dict[str, Any], tiny: Any, tmp_path: Path
) -> None:
    checkpoint, tokens = tiny("bert", task, **options), sequences()
    Onnx(inputs=inputs).write(checkpoint, tmp_path, tokens)
    client, want = Client(tmp_path, threads=1), alone(checkpoint, tokens)
    assert client.output == TorchScorer(checkpoint).output
    for scorer in (client, TorchScorer(checkpoint), lambda asked: [client([one])[0] for one in asked]):
        for got, exact in zip(scorer(tokens), want, strict=True):
            assert np.abs(got - exact).max() < 2e-5
    # the twin: other types, other answers, but for the sequence that has only the first text
    plain = client([one.ids for one in tokens])
    moved = [float(np.abs(got - exact).max()) for got, exact in zip(plain, want, strict=True)]
    assert min(moved[:4]) > 1e-3
    assert moved[4] < 2e-5


def test_rows_of_the_callers_own_take_types(scored: Checkpoint, tmp_path: Path) -> None:
    Onnx().write(scored, tmp_path, [])
    client, tokens = Client(tmp_path, threads=1), sequences()
    packed = PackedBatch.of(tokens, [[0, 1], [3, 2, 4]], 64)
    got = client.rows(packed.ids, packed.segments, packed.types)
    for answer, number in zip(got, packed.order, strict=True):
        assert np.abs(answer - client([tokens[number]])[0]).max() < 2e-5
    assert packed.types is not None
    with pytest.raises(RecipeError, match="row 1, segment 1: found token type 2, expected types from 0 to 1"):
        client.rows(packed.ids, packed.segments, np.where(packed.types[[0, 1]] * [[0], [1]], 2, 0))
    with pytest.raises(RecipeError, match="token_type_ids: found int64 of shape"):
        check(packed.ids, packed.segments, 100, None, packed.types[:1], 2)


def test_parity_notices_an_artifact_fed_with_wrong_types(
    scored: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Client.feed

    def wrong(self: Client, rows: Any, tokens: Any) -> Any:
        made, spans = feed(self, rows, tokens)
        return {**made, "token_type_ids": made["token_type_ids"] * 0}, spans

    monkeypatch.setattr(Client, "feed", wrong)
    with pytest.raises(ParityMissed, match="parity of logits"):
        Onnx().write(scored, tmp_path, [])


def test_the_client_joins_texts_as_the_tokenizer_does(scored: Checkpoint, tmp_path: Path) -> None:
    Onnx().write(scored, tmp_path, [])
    client, pairs = Client(tmp_path, threads=1), [(a, b) for a, b, _, _ in PAIRS]
    want = [scored.tokenizer(a, b) for a, b in pairs]
    for one, encoded in zip(client.tokenize([*pairs, "alone"]), want, strict=False):
        assert one.ids.tolist() == encoded["input_ids"]
        assert one.kinds.tolist() == encoded["token_type_ids"]
    exact = alone(scored, client.tokenize(pairs))
    assert np.abs(np.stack(client.texts(pairs)) - np.stack(exact)).max() < 2e-5
    long = [("x" * 100, "y" * 9), "z" * 100]
    with pytest.raises(RecipeError, match="sequence 0: found 112 tokens, expected at most 64"):
        client.texts(long)
    pair, single = client.tokenize(long, truncate=True)
    assert len(pair) == len(single) == 64
    assert pair.ids[-1] == single.ids[-1] == 2  # the end is the tokenizer's own mark, not the text's
    assert pair.kinds.sum() == 10


def test_types_that_a_model_does_not_have_are_refused(scored: Checkpoint, tiny: Any, tmp_path: Path) -> None:
    wrong = Tokens(np.array([5, 6]), np.array([0, 2]))
    Onnx().write(scored, tmp_path, [])
    with pytest.raises(RecipeError, match="sequence 0: found token type 2, expected types from 0 to 1"):
        Client(tmp_path, threads=1)([wrong])
    with pytest.raises(RecipeError, match="found token type 2, expected types below 2"):
        TorchScorer(scored)([wrong])
    with pytest.raises(RecipeError, match="a model that reads token types"):
        TorchScorer(tiny("roberta"))([wrong])
    with pytest.raises(ValueError, match=r"types \[1\] for ids \[2\]"):
        Tokens(np.array([5, 6]), np.array([0]))


def test_calibration_and_training_see_types(scored: Checkpoint) -> None:
    tokens, model = sequences(), scored.model(torch.float32)
    (batch,) = batches(tokens, scored.layout)
    longest = max(tokens, key=len)
    assert batch.inputs["token_type_ids"][-1].tolist() == longest.kinds.tolist()
    (plain,) = batches([t.ids for t in tokens], scored.layout)
    assert "token_type_ids" not in plain.inputs
    assert judge(model, model, scored.layout, [batch]) == 0.0
    rows = text(model, tokens, causal=False, labels=[0] * len(tokens))
    collated = rows.collate(rows.items)
    with torch.no_grad():
        found = model(**{k: v for k, v in collated.items() if k != "targets"}).logits
    assert np.abs(found.numpy() - np.stack(alone(scored, tokens))).max() < 2e-5


def test_one_number_has_a_divergence_that_can_fail(scored: Checkpoint, tiny: Any) -> None:
    """A softmax over one class is 1 whatever the model says."""
    other, tokens = tiny("bert", "text-classification", num_labels=1, seed=1), sequences()
    ours, theirs = (np.concatenate(TorchScorer(c)(tokens))[:, None] for c in (other, scored))
    half = 0.5 * float(((ours - theirs) ** 2).sum())
    assert half > 0.01
    assert divergence(ours, theirs) == pytest.approx(half, rel=1e-5)
    found = judge(other.model(), scored.model(), scored.layout, batches(tokens, scored.layout))
    assert found == pytest.approx(half / len(tokens), rel=1e-4)
    teacher = Distillation(scored.model())
    rows = text(other.model(), tokens, causal=False, labels=[0] * len(tokens))
    assert float(teacher(other.model(), rows.collate(rows.items))) == pytest.approx(half, rel=1e-4)


def test_a_number_is_ranked_against_scores_and_is_no_class(scored: Checkpoint, table: Path) -> None:
    scorer = TorchScorer(scored)
    source = Source(str(table), pair=("question", "answer"), label="score", samples=32)
    samples = Reader.of(scored).read(source, seed=None, base=None)[:4]
    assert default_metrics(scorer.output, samples) == ("kl", "spearman", "pearson")
    numbers = [float(a[0]) for a in scorer([s.input for s in samples])]
    found = evaluate(scorer, samples, ["spearman", "pearson", "kl"], scorer)
    assert found["pearson"].value == pytest.approx(np.corrcoef(numbers, [s.label for s in samples])[0, 1], abs=1e-9)
    assert found["kl"].value == 0.0
    for name in ("accuracy", "macro_f1", "top1"):
        with pytest.raises(RecipeError, match="metrics for a model that gives number: kl, spearman, pearson"):
            evaluate(scorer, samples, [name], scorer)


def recipes() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.S)


@pytest.mark.parametrize("number", [0, 1])
def test_the_documented_recipes_run(number: int, scored: Checkpoint, tiny: Any, table: Path, tmp_path: Path) -> None:
    named = {"label2id": {"no": 0, "yes": 1}, "id2label": {0: "no", 1: "yes"}}
    checkpoint = scored if number == 0 else template(tiny("bert", "text-classification", **named))
    checkpoint.save(tmp_path / ("cross-encoder" if number == 0 else "entailment"))
    recipe = recipes()[number].replace("length: 96", "length: 60")  # the tiny model has 64 positions
    (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
    outcome = apply(load_recipe(tmp_path / "recipe.yaml"), How(tmp_path / "run", threads=1))
    assert outcome.passed
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    for artifact in metrics["artifacts"]:
        assert artifact["kl"] == pytest.approx(metrics["checkpoint"]["kl"], abs=1e-6)
    assert len(metrics["artifacts"]) == number + 1
