"""Models that do not fit in memory: weights made when used, streams in files, a cut that goes on after a kill."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tersor.compress.calibration.streams import Streams
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.deferred import Cell, Deferred, Store, lent, own, when_used
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.pass_ import Context
from tersor.compress.passes.slice import Slice
from tersor.compress.preflight import parse_size
from tersor.compress.slicing import kept

IDS = torch.arange(24).reshape(2, 12) % 50


@pytest.fixture
def stored(tiny: Any, tmp_path: Path) -> Any:
    """`stored(model_type, variant, **config) -> directory` of a saved tiny checkpoint."""

    def make(model_type: str = "llama", variant: str = "", **config: Any) -> Path:
        directory = tmp_path / f"{model_type}-{variant}"
        tiny(model_type, variant=variant, **config).save(directory)
        return directory

    return make


def calibration(count: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 50, 32) for _ in range(count)]


def sliced(directory: Path, lean: bool, folder: Path | None = None, **hooks: Any) -> Checkpoint:
    checkpoint = Checkpoint.load(directory, lean=lean)
    Slice(remove=0.2, split=0.5).apply(checkpoint, Context(calibration(), seed=3, folder=folder, **hooks))
    return checkpoint


@pytest.mark.parametrize(("model_type", "variant"), [("llama", ""), ("llama", "tied"), ("qwen2", ""), ("gpt2", "")])
def test_a_lean_model_is_the_same_model_bit_for_bit(stored: Any, model_type: str, variant: str) -> None:
    directory = stored(model_type, variant)
    lean, whole = Checkpoint.load(directory, lean=True), Checkpoint.load(directory)
    model = lean.model()
    assert any(isinstance(p, Deferred) for p in model.parameters())
    assert not any(isinstance(p, Deferred) for p in whole.model().parameters())
    assert torch.equal(model(input_ids=IDS).logits, whole.model()(input_ids=IDS).logits)
    next(p for p in model.parameters() if isinstance(p, Deferred)).data.copy_(torch.zeros(()))
    assert not torch.equal(model(input_ids=IDS).logits, whole.model()(input_ids=IDS).logits)
    assert torch.equal(lean.model()(input_ids=IDS).logits, whole.model()(input_ids=IDS).logits), "the files changed"


def test_gradients_reach_the_stream_through_weights_that_are_made_late(stored: Any) -> None:
    directory = stored()
    slopes = []
    for lean in (True, False):
        model = Checkpoint.load(directory, lean=lean).model()
        stream = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=stream).logits.square().sum().backward()
        slopes.append(stream.grad)
    assert slopes[0] is not None
    assert torch.equal(slopes[0], slopes[1])


def test_autograd_keeps_no_weight_that_was_made(stored: Any) -> None:
    """The twin, a plain model, keeps them all."""
    directory, kept = stored(), []
    for lean in (True, False):
        model = Checkpoint.load(directory, lean=lean).model()
        stream = model.get_input_embeddings()(IDS).detach().requires_grad_()
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            model(inputs_embeds=stream).logits.sum()
        widths = {tuple(sorted(p.shape)) for p in model.parameters() if p.ndim == 2}
        found = [t for t in saved if tuple(sorted(t.shape)) in widths]
        assert found
        kept.append([t for t in found if not isinstance(t, Deferred)])
    assert kept[0] == []
    assert kept[1]


@pytest.mark.parametrize(
    ("model_type", "variant", "dtype"),
    [("llama", "", "bfloat16"), ("llama", "tied", "float32"), ("gpt2", "", "float32"), ("qwen2", "", "bfloat16")],
)
def test_lean_saving_writes_the_same_model_in_pieces(
    stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, variant: str, dtype: str
) -> None:
    import tersor.compress.checkpoint as module
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(module, "LEAN_SHARD", 8_000)
    directory = stored(model_type, variant)
    AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).save_pretrained(directory)
    for name, lean in (("whole", False), ("lean", True)):
        Checkpoint.load(directory, lean=lean).save(tmp_path / name)
    assert [path.name for path in (tmp_path / "whole").glob("*.safetensors")] == ["model.safetensors"]
    assert len(list((tmp_path / "lean").glob("*.safetensors"))) > 3
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "lean" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, lean = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("whole", "lean"))
    assert lean.keys() == whole.keys()
    assert all(torch.equal(lean[name], tensor) and lean[name].dtype == tensor.dtype for name, tensor in whole.items())
    assert Checkpoint.load(tmp_path / "lean", lean=True).lean, "what was written lean can be read lean"


def test_other_names_in_the_files_are_read_the_usual_way(stored: Any) -> None:
    from safetensors.torch import load_file, save_file

    directory = stored("bert")
    path = directory / "model.safetensors"
    save_file({f"bert.{name}": t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    assert not Checkpoint.load(directory, lean=True).lean


@pytest.mark.parametrize(("model_type", "variant"), [("llama", ""), ("llama", "tied"), ("phi", "")])
def test_a_lean_cut_is_the_cut(stored: Any, tmp_path: Path, model_type: str, variant: str) -> None:
    directory = stored(model_type, variant)
    whole = sliced(directory, lean=False)
    lean = sliced(directory, lean=True, folder=tmp_path / "state")
    assert not any(isinstance(t, Deferred) for t in lean.tensors.values())
    assert (tmp_path / "state" / "weights").is_dir()
    want = whole.model()(input_ids=IDS).logits
    assert (lean.model()(input_ids=IDS).logits - want).abs().max() < 1e-4 * want.abs().max()
    assert (Checkpoint.load(directory).model()(input_ids=IDS).logits - want).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize("lean", [False, True])
def test_a_killed_cut_goes_on_with_its_block(
    stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lean: bool
) -> None:
    monkeypatch.setattr(kept, "EVERY", 0.0)
    directory = stored("llama", num_hidden_layers=4)
    want = sliced(directory, lean, tmp_path / "whole").tensors
    labels: list[str] = []

    def killed(items: Iterable[Any], label: str) -> Iterator[Any]:
        labels.append(label)
        for number, item in enumerate(items):
            if label == "least squares" and number == 2:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        sliced(directory, lean, tmp_path / "killed", track=killed)
    assert "sensitivity" in labels
    labels.clear()

    def watched(items: Iterable[Any], label: str) -> Iterable[Any]:
        labels.append(label)
        return items

    ran: list[int] = []
    monkeypatch.setattr(kept.Kept, "block_done", lambda self, number, refit: ran.append(number))
    got = sliced(directory, lean, tmp_path / "killed", track=watched).tensors
    assert labels == ["least squares"], "what had been measured was measured again"
    assert ran == [2, 3]
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_view_of_its_own_leaves_the_other_alone(tmp_path: Path) -> None:
    store = Store(torch.bfloat16, tmp_path)
    source = torch.arange(6.0).reshape(2, 3)
    view = lent("w", source, store)
    mine = own("w", view, store)
    mine.copy_(torch.full((2, 3), 1 / 3))
    assert torch.equal(view.value(), source)
    assert mine.settle().dtype == torch.bfloat16
    assert torch.equal(mine.value(), torch.full((2, 3), 1 / 3).bfloat16().float())
    again = Deferred((2, 3), Cell(lambda: source), "w", store)
    again.recall()
    assert torch.equal(again.value(), mine.value())


def test_a_deferred_value_is_made_at_every_use_until_it_rests() -> None:
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.ones(2, 2)

    weight = when_used(Store(torch.float32))("w", (2, 2), make)
    assert float((weight @ torch.ones(2)).sum() + (weight * 2).sum()) == 12
    assert len(made) == 2
    weight.settle()  # type: ignore[attr-defined]
    assert float(weight.sum()) == 4
    assert len(made) == 3


def test_streams_in_files_hold_what_streams_in_memory_hold(tmp_path: Path) -> None:
    for streams in ([], Streams(tmp_path / "dense")):
        streams.append(torch.ones(2, 3, 4))
        streams.append(torch.zeros(1, 5, 4))
        streams[1] = torch.full((1, 5, 4), 7.0)
        assert [float(s.sum()) for s in streams] == [24, 140]
    assert (tmp_path / "dense.1").stat().st_size == 5 * 4 * 4


@pytest.mark.parametrize(("text", "number"), [("4GB", 4e9), ("1.5 gb", 1.5e9), ("800MB", 8e8), ("123", 123)])
def test_sizes_of_people(text: str, number: float) -> None:
    assert parse_size(text) == int(number)


@pytest.mark.parametrize("text", ["much", "4GiB", "-1GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parse_size(text)


def test_a_limit_under_what_a_run_needs_is_refused_before_it_starts(stored: Any, tmp_path: Path) -> None:
    from tersor.compress import How, apply, load_recipe

    text = tmp_path / "text.txt"
    text.write_text("one two three four five\n" * 50)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"recipe: 1\nmodel: {stored()}\ndata:\n  calibration: {{path: {text}, samples: 4, length: 8}}\n"
        "passes:\n  - {use: slice, with: {remove: 0.2}}\n"
    )
    with pytest.raises(PreflightError, match=r"memory: found 1\.0 MB allowed, expected .* \(see tersor plan\)"):
        apply(load_recipe(str(recipe)), How(tmp_path / "run", max_memory=1_000_000))
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match=r"remove"):
        load_recipe(str(recipe), ["passes.0.with.remove=2"])
