"""What ships with the recipes: the trained decoder, its text, the sentences, and the split that keeps them apart."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import platform
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.data import overlap, read_samples
from tersor.compress.evaluate import evaluate
from tersor.compress.evaluate.torch_scorer import TorchScorer
from tersor.compress.pretrained import locate
from tersor.compress.recipe import Recipe, load_recipe, shipped
from tersor.recipes.quickstart import corpus, train

RECIPES = Path(str(importlib.resources.files("tersor.recipes")))
DIGESTS = {
    "quickstart/model/model.safetensors": "9eeeeafee836172144ca5d85d80f1078cf9988d176e5f2e031de1f20a46c5b91",
    "quickstart/model/tokenizer.json": "cbf2dc694589bf3b8e45809ca9ea3d152983c3f6cd587a6965b7dc7c0d6d8bf2",
    corpus.CALIBRATION: "36c0b5d8f2427fa99d9ac13436e3812c6e5a035a36e0c84bb5ea380c1561f728",
    corpus.HELDOUT: "19ff64777f0eb25e4575aeef688ab00bd17c77a9cb3475949301cbadd22daba7",
    corpus.SENTENCES: "5bda5e7238d79d9ad438fa32335b50a731455e16a98837b0d178438d07d9c530",
}
PERPLEXITY_OF_A_QUARTER = 9.6946  # windows 0, 4, 8 … of the 96; of all 96 it is 10.80
LIBRARY = Path(sysconfig.get_path("stdlib"))


def has_the_sources() -> bool:
    """Whether this interpreter carries the library that the texts were cut from, tests included."""
    return platform.python_version() == "3.11.7" and (LIBRARY / "test" / "test_io.py").exists()


needs_the_sources = pytest.mark.skipif(not has_the_sources(), reason="needs CPython 3.11.7 with its test package")


def records(name: str) -> list[corpus.Module]:
    lines = (RECIPES / name).read_text("utf-8").splitlines()
    return [corpus.Module(**json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def quickstart() -> Recipe:
    return load_recipe("quickstart")


@pytest.fixture(scope="module")
def decoder(quickstart: Recipe) -> Checkpoint:
    assert quickstart.model is not None
    return Checkpoint.load(locate(quickstart.model, offline=True))


@pytest.mark.parametrize("name", DIGESTS)
def test_bytes_are_those_that_the_numbers_were_measured_on(name):
    assert hashlib.sha256((RECIPES / name).read_bytes()).hexdigest() == DIGESTS[name]


def test_small_enough_to_ship():
    sizes = {p.relative_to(RECIPES).as_posix(): p.stat().st_size for p in RECIPES.rglob("*") if p.is_file()}
    assert sum(size for name, size in sizes.items() if name.startswith("quickstart/model/")) <= 10_000_000
    assert max(sizes[corpus.CALIBRATION], sizes[corpus.HELDOUT]) <= 400_000


def test_heldout_modules_are_those_that_neither_model_nor_calibration_saw():
    calibration = {m.path for m in records(corpus.CALIBRATION)}
    heldout = {m.path for m in records(corpus.HELDOUT)}
    assert calibration
    assert heldout
    assert calibration.isdisjoint(heldout)
    assert {corpus.part(path) for path in calibration} == {"train"}
    assert {corpus.part(path) for path in heldout} == {"valid"}


def test_no_heldout_text_appears_in_calibration_under_another_path():
    """Single lines recur in the library; passages must not."""
    calibration = "".join(m.text for m in records(corpus.CALIBRATION))
    for module in records(corpus.HELDOUT):
        assert module.text not in calibration
        assert module.text[len(module.text) // 2 :][:400] not in calibration, module.path


@pytest.mark.parametrize("text", ["", "one line", "a\n" * 50, "x" * 99 + "\n", "ab\n\ncd\n" * 9])
@pytest.mark.parametrize("characters", [1, 10, 40, 1000])
def test_a_cut_is_whole_lines_of_the_text(text, characters):
    cut = corpus.middle(text, characters)
    assert cut in text
    assert len(cut) <= max(characters, 0)
    if len(text) <= characters:
        assert cut == text
    else:
        assert cut == "" or cut.endswith("\n")
        assert cut == "" or text[: text.index(cut)].endswith("\n") or text.startswith(cut)


@needs_the_sources
@pytest.mark.slow
def test_the_script_writes_the_same_texts_again():
    found = corpus.modules()
    assert corpus.sentences(found) == (RECIPES / corpus.SENTENCES).read_text("utf-8").splitlines()
    assert corpus.cuts(found) == {name: records(name) for name in (corpus.CALIBRATION, corpus.HELDOUT)}


@needs_the_sources
@pytest.mark.slow
def test_the_script_learns_the_same_tokenizer_again():
    """Merges over 28 MB. Twin: learned from the other modules they are others."""
    texts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for module in corpus.modules():
        texts[corpus.part(module.path)].append(module.text)
    ships = json.loads((RECIPES / "quickstart/model/tokenizer.json").read_text("utf-8"))["model"]
    assert json.loads(train.train_tokenizer(texts["train"]).to_str())["model"] == ships
    assert json.loads(train.train_tokenizer(texts["valid"]).to_str())["model"] != ships


def test_the_training_script_makes_the_shape_that_ships(decoder):
    model = train.new_model()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == decoder.layout.shapes()
    assert sum(p.numel() for p in model.parameters()) == decoder.layout.parameters == 4_820_160


def test_every_recipe_that_ships_is_valid_and_finds_its_files():
    assert set(shipped()) >= {"quickstart", "minilm-packed"}
    for name in shipped():
        recipe = load_recipe(name)
        assert recipe.gate, f"{name} ships without a gate"
        for source in (recipe.data.calibration, recipe.data.heldout):
            if source is not None:
                assert source.path.startswith("package:tersor.recipes/"), "a wheel knows no other path"


def test_sources_share_no_text(quickstart):
    assert not overlap(quickstart.data.calibration, quickstart.data.heldout, None)
    assert overlap(quickstart.data.heldout, quickstart.data.heldout, None)


def test_there_is_text_enough(quickstart, decoder):
    for source, least in ((quickstart.data.calibration, 128), (quickstart.data.heldout, 96)):
        samples = read_samples(source, decoder.tokenizer, windows=True, seed=0, base=None)
        assert len(samples) == source.samples >= least
        assert all(len(sample.ids) == source.length == 256 for sample in samples)


def test_sentences_are_many_different_and_of_many_lengths():
    sentences = (RECIPES / corpus.SENTENCES).read_text("utf-8").splitlines()
    assert len(sentences) == len(set(sentences)) == corpus.SENTENCE_COUNT
    words = sorted(len(sentence.split()) for sentence in sentences)
    assert words[0] <= 4
    assert words[-1] >= 30


def test_heldout_perplexity_is_the_known_one(quickstart, decoder):
    """On a quarter of the recipe's windows, in float32. Twin: without its first block the model is another one."""
    source = quickstart.data.heldout
    quarter = read_samples(source, decoder.tokenizer, windows=True, seed=None, base=None)[::4]
    measured = evaluate(TorchScorer(decoder), quarter, ["perplexity"])["perplexity"].value
    assert measured == pytest.approx(PERPLEXITY_OF_A_QUARTER, rel=1e-3)

    silent = {name: t * 0 if ".layers.0." in name else t for name, t in decoder.tensors.items()}
    broken = TorchScorer(replace(decoder, tensors=silent))
    assert evaluate(broken, quarter[:2], ["perplexity"])["perplexity"].value > 2 * measured
