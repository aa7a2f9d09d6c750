"""The decoder with a cache against stock torch: parity, greedy tokens, names, padding, bytes, and the client."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import ParityMissed, PreflightError, RecipeError
from tersor.compress.evaluate.gate import Gate, judge
from tersor.compress.evaluate.torch_scorer import TorchScorer
from tersor.compress.paths import package_path
from tersor.compress.pretrained import locate
from tersor.export import cached, cached_parity, runtime
from tersor.export.decoder import OnnxDecoder
from tersor.export.generate import Generator, choose
from tersor.export.small import nbits

WIDE: dict[str, Any] = {"head_dim": 8, "max_position_embeddings": 128}
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "", WIDE),
    "llama-tied": ("llama", "tied", WIDE),
    "mistral-windowed": ("mistral", "windowed", WIDE),
    "phi": ("phi", "", {"max_position_embeddings": 128}),
    "gemma2": ("gemma2", "", {"max_position_embeddings": 128}),
    "gpt2": ("gpt2", "", {}),
}
SLOW: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-biased": ("llama", "biased", WIDE),
    "qwen2": ("qwen2", "", WIDE),
    "qwen3": ("qwen3", "", WIDE),
    "gemma": ("gemma", "", WIDE),
    "granite": ("granite", "", WIDE),
    "phi3-windowed": ("phi3", "windowed", {"max_position_embeddings": 128}),
    "opt": ("opt", "", {}),
}
WINDOWED = ("mistral-windowed", "gemma2", "phi3-windowed")
PROMPT = np.array([5, 17, 42, 9, 60])

Made = Callable[..., tuple[Checkpoint, Path]]


@pytest.fixture(scope="session")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(form, precision) -> (checkpoint, artifact directory)`, each exported once."""
    done: dict[tuple[str, str], tuple[Checkpoint, Path]] = {}

    def make(form: str, precision: str = "float32") -> tuple[Checkpoint, Path]:
        if (form, precision) not in done:
            if form in WINDOWED and not runtime.knows("a window in a graph with a cache"):
                pytest.skip("this ONNX Runtime gets windows wrong, and the exporter says so")
            model_type, variant, config = (FORMS | SLOW)[form]
            checkpoint, directory = tiny(model_type, variant=variant, **config), tmp_path_factory.mktemp(form)
            OnnxDecoder(precision=precision).write(checkpoint, directory, [])
            done[form, precision] = checkpoint, directory
        return done[form, precision]

    return make


def greedy(checkpoint: Checkpoint, prompt: np.ndarray, count: int) -> np.ndarray:
    """Stock transformers' own loop; no end token."""
    with torch.no_grad():
        out = checkpoint.model(torch.float32).generate(
            torch.from_numpy(prompt)[None], max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    return np.asarray(out[0, len(prompt) :])


def endless(directory: Path) -> Generator:
    generator = Generator(directory, threads=1)
    generator.ends = frozenset()
    return generator


def steps(checkpoint: Checkpoint) -> int:
    return min(64, (checkpoint.layout.longest or 128) - len(PROMPT))


@pytest.mark.parametrize("form", [*FORMS, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)])
def test_greedy_tokens_equal_torchs(made: Made, form: str) -> None:
    checkpoint, directory = made(form)  # which has passed parity
    generator, count = endless(directory), steps(checkpoint)
    assert np.array_equal(generator.generate(PROMPT, count), greedy(checkpoint, PROMPT, count))


def test_a_grown_cache_and_one_in_place_give_the_same_tokens(made: Made) -> None:
    generator = endless(made("llama")[1])
    assert generator.shared
    in_place = generator.generate(PROMPT, 64)
    generator.shared = False
    assert np.array_equal(generator.generate(PROMPT, 64), in_place)
    generator.shared = True
    assert not np.array_equal(generator.generate(PROMPT[::-1].copy(), 64), in_place)


def test_another_models_graph_misses_parity(made: Made, tiny: Any) -> None:
    checkpoint, directory = made("llama")
    generator = Generator(directory, threads=1)
    cached_parity.hold(checkpoint, generator, [])
    with pytest.raises(ParityMissed):
        cached_parity.hold(tiny("llama", seed=1, **WIDE), generator, [])


def test_padding_that_leaks_misses_parity(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "HIDDEN", 0.0)
    with pytest.raises(ParityMissed):
        OnnxDecoder().write(tiny("llama", num_hidden_layers=1, **WIDE), tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_names_and_shapes_are_the_stock_ones(made: Made) -> None:
    session = onnxruntime.InferenceSession(made("gemma2")[1] / "model.onnx")
    inputs = {i.name: i.shape for i in session.get_inputs()}
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs["past_key_values.1.value"][1::2] == [4, 10]
    assert [o.name for o in session.get_outputs()] == ["logits", *cached.names(2, before=False)]


def test_two_exports_are_the_same_bytes_and_tell_no_paths(made: Made, tiny: Any, tmp_path: Path) -> None:
    first = made("llama")[1]
    OnnxDecoder().write(tiny("llama", **WIDE), tmp_path, [])
    files = {p.name: p.read_bytes() for p in first.iterdir()}
    assert files == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert not any(b"site-packages" in content or b".py" in content for content in (files["model.onnx"],))


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_the_readmes_lines_run_alone(made: Made, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = made(form)[1]
    code = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text("utf-8"), re.S)[0]
    monkeypatch.chdir(directory)
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, found)
    assert found["answer"] == endless(directory).generate([7, 8, 9], 8).tolist()


def test_config_states_the_caches_shape(made: Made) -> None:
    checkpoint, directory = made("llama")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    assert config["hidden_size"] == 8 * 8 != checkpoint.config.hidden_size == 48
    assert "own\nwidth is 48" in (directory / "README.md").read_text("utf-8")


@pytest.mark.parametrize("form", ["llama", "gemma2"])
def test_scores_are_torchs(made: Made, form: str) -> None:
    checkpoint, directory = made(form)
    draw = np.random.default_rng(3)
    ids = [draw.integers(0, 100, n) for n in (9, 3, 30, 9)]
    for ours, theirs in zip(OnnxDecoder().open(directory, 1)(ids), TorchScorer(checkpoint)(ids), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_int8_is_small_and_close(made: Made) -> None:
    (checkpoint, directory), (_, plain) = made("llama-tied", "int8"), made("llama-tied")
    figures = json.loads((directory / "artifact.json").read_text("utf-8"))
    assert figures["parity"]["logits"]["cosine_mean"] > 0.995
    assert "error" in figures["parity_float32"]["logits"]
    assert (directory / "model.onnx").stat().st_size < 0.5 * (plain / "model.onnx").stat().st_size
    with pytest.raises(ParityMissed):
        cached_parity.hold(checkpoint, Generator(directory, threads=1), [])


def test_int8_of_products_with_a_bias(made: Made, tmp_path: Path) -> None:
    checkpoint, plain = made("gpt2")
    directory = shutil.copytree(plain, tmp_path / "int8")
    model = ir.load(plain / "model.onnx")
    nbits.quantize(model)
    assert not [n for n in model.graph if n.op_type in ("MatMul", "Gemm")]
    ir.save(model, directory / "model.onnx")
    figures = cached_parity.hold_int8(checkpoint, Generator(directory, threads=1), [])
    assert figures["logits"]["cosine_mean"] > 0.995


def test_int8_answers_do_not_depend_on_neighbours(made: Made) -> None:
    generator = Generator(made("llama-tied", "int8")[1], threads=1)
    draw = np.random.default_rng(4)
    ids = [draw.integers(0, 100, 12) for _ in range(4)]
    for together, one in zip(generator(ids), ids, strict=True):
        np.testing.assert_allclose(together, generator([one])[0], atol=1e-4)


def test_text_streams_and_stops(made: Made) -> None:
    generator = endless(made("llama")[1])
    whole = generator.generate("def ", 40)
    pieces = list(generator.stream("def ", 40))
    assert "".join(pieces) == whole
    assert len(pieces) > 5
    stop = str(whole)[10:13]
    cut = str(whole)[: str(whole).index(stop)]
    assert "".join(generator.stream("def ", 40, stop=[stop, "never there"])) == cut


def test_an_end_token_ends(made: Made) -> None:
    generator = endless(made("llama")[1])
    tokens = generator.generate(PROMPT, 20).tolist()
    generator.ends = frozenset([tokens[6]])
    assert generator.generate(PROMPT, 20).tolist() == tokens[: tokens.index(tokens[6])]


def test_draws_follow_their_seed(made: Made) -> None:
    generator = endless(made("llama")[1])
    drawn = [generator.generate(PROMPT, 30, temperature=2.0, seed=s).tolist() for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    likeliest = generator.generate(PROMPT, 30, temperature=2.0, top_p=1e-9)
    assert likeliest.tolist() == generator.generate(PROMPT, 30).tolist()


def test_draws_have_the_shares_of_the_logits() -> None:
    logits, draw = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), np.random.default_rng(0)
    drawn = np.bincount([choose(logits, 1.0, 1.0, draw) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    nucleus = np.bincount([choose(logits, 1.0, 0.7, draw) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(nucleus, [0.625, 0.375, 0, 0], atol=0.03)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [100]}, "token id 100"),
        ({"prompt": [1.5]}, "whole numbers"),
        ({"prompt": [1], "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": [1], "max_new_tokens": 128}, "at most 128 together"),
        ({"prompt": [1], "temperature": -1.0}, "temperature"),
        ({"prompt": [1], "top_p": 0.0}, "top_p"),
        ({"prompt": [1], "stop": ["x"]}, "a prompt of text"),
    ],
)
def test_what_cannot_be_is_refused(made: Made, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Generator(made("llama")[1], threads=1).generate(**arguments)


def test_only_decoders(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="text-generation"):
        OnnxDecoder().requires(tiny("bert", "feature-extraction").layout)
    with pytest.raises(PreflightError, match=r"artifact\.json"):
        Generator(tmp_path)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    checkpoint = Checkpoint.load(locate("package:tersor.recipes/quickstart/model"))
    directory = tmp_path_factory.mktemp("embedded")
    OnnxDecoder().write(checkpoint, directory, [])
    return checkpoint, directory


def test_the_embedded_decoder_continues_code_as_torch_does(embedded: tuple[Checkpoint, Path]) -> None:
    checkpoint, directory = embedded
    generator = endless(directory)
    prompt = generator.tokenize("import os\n\ndef main(")
    assert np.array_equal(generator.generate(prompt, 64), greedy(checkpoint, prompt, 64))


def perplexity(generator: Generator, ids: list[np.ndarray]) -> float:
    losses = []
    for logits, own in zip(generator(ids), ids, strict=True):
        x = logits[:-1].astype(np.float64)
        losses.append(np.logaddexp.reduce(x, axis=1) - x[np.arange(len(own) - 1), own[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def test_int8_passes_a_gate_that_coarser_weights_miss(
    embedded: tuple[Checkpoint, Path], tmp_path: Path
) -> None:
    plain = endless(embedded[1])
    lines = package_path("package:tersor.recipes/quickstart/text/heldout.jsonl", "text").read_text("utf-8").splitlines()
    ids = [plain.tokenize(json.loads(line)["text"])[:128] for line in lines[:12]]
    gate, before = Gate(metric="perplexity", max_increase="0.5%"), {"perplexity": perplexity(plain, ids)}
    kept = {}
    for bits in (8, 4):
        directory = shutil.copytree(embedded[1], tmp_path / str(bits))
        model = ir.load(directory / "model.onnx")
        nbits.quantize(model, bits)
        ir.save(model, directory / "model.onnx")
        scores = {"perplexity": perplexity(Generator(directory, threads=1), ids)}
        kept[bits] = judge(gate, scores, before).passed
    assert kept == {8: True, 4: False}
