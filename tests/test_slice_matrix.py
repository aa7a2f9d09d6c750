"""slice on every architecture: one algorithm, described by data, so one suite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tersor.compress.arch import architecture, names
from tersor.compress.calibration.batches import Batch, batches
from tersor.compress.calibration.side import Side
from tersor.compress.calibration.stages import stages
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.layout import Layout
from tersor.compress.pass_ import Context
from tersor.compress.passes.slice import Slice
from tersor.compress.slicing import cutter as cutter_module
from tersor.compress.slicing.budget import free_words, head_axis
from tersor.compress.slicing.cutter import Cutter
from tersor.compress.slicing.fuse import fuse, heads_follow, obstacle, producers, restate

TASK = {"vit": "image-classification"}
SLICED = ["bert", "distilbert", "gemma", "gemma2", "gpt2", "granite", "llama", "mistral", "modernbert", "opt", "phi"]
SLICED += ["phi3", "qwen2", "qwen3", "roberta", "vit"]
ROTATED = ["gemma", "granite", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "vit"]
WITH_HEADS = ["gpt2", "opt"]
HEADS = ["gemma", "llama", "phi", "phi3", "qwen3", "vit"]


def made(tiny, model_type: str, **options: object) -> Checkpoint:
    return tiny(model_type, TASK.get(model_type), **options)


def inputs(checkpoint: Checkpoint, count: int = 8, seed: int = 0) -> list[np.ndarray]:
    rng, layout = np.random.default_rng(seed), checkpoint.layout
    if layout.arch.inputs == "pixels":
        shape = (count, layout.families["channels"], layout.config.image_size, layout.config.image_size)
        return list(rng.standard_normal(shape).astype(np.float32))
    return list(rng.integers(4, layout.families["vocab"], (count, 12)))


def answer(checkpoint: Checkpoint, seed: int = 1) -> torch.Tensor:
    (batch,) = batches(inputs(checkpoint, 4, seed), checkpoint.layout)
    with torch.no_grad():
        output = checkpoint.model()(**batch.inputs)
    return output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state


def sliced(checkpoint: Checkpoint, **options: object) -> dict:
    context = Context(inputs(checkpoint))
    step = Slice(**options)
    step.apply(checkpoint, context)
    checkpoint.checks += step.checks(context.details)
    assert checkpoint.failing_checks() == []
    return context.details


def share(layout: Layout, sizes: dict[str, int]) -> float:
    return 1 - restate(layout, sizes).parameters / layout.parameters


def test_the_lists_here_name_every_architecture_that_slice_can_work_on(tiny):
    dense = [name for name in names() if name != "resnet" and architecture(name).experts is None]
    able = {name: free_words(made(tiny, name).layout) for name in dense}
    assert sorted(name for name, words in able.items() if words) == sorted(SLICED)
    assert sorted(name for name, words in able.items() if "hidden" in words) == sorted(ROTATED)
    assert sorted(name for name in dense if heads_follow(made(tiny, name).layout)) == WITH_HEADS
    assert all(obstacle(made(tiny, name).layout) for name in SLICED if name not in ROTATED + WITH_HEADS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ROTATED + WITH_HEADS)
def test_fusing_changes_nothing(tiny, model_type, tied):
    dense = made(tiny, model_type, tie_word_embeddings=tied)
    assert (answer(Checkpoint(*fuse(dense.layout, dense.tensors))) - answer(dense)).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ROTATED)
def test_a_cut_to_the_whole_width_with_all_its_fits_changes_nothing(tiny, model_type, tied):
    dense = made(tiny, model_type, tie_word_embeddings=tied)
    context, whole = Context(inputs(dense)), {"hidden": dense.layout.families["hidden"]}
    cutter = Cutter.measured(dense, [whole], context, ridge=1e-2)
    data = batches(context.calibration, dense.layout)
    layout, tensors, _ = cutter.cut(whole, data, context)
    assert (answer(Checkpoint(layout, tensors)) - answer(dense)).abs().max() < 1e-4
    assert cutter.basis is not None
    cutter.basis = torch.roll(cutter.basis, 1, 0)  # the twin: another rotation than the fits believe is still exact,
    cutter.basis[:, 0] *= 0.5  # one that is no rotation is not
    layout, tensors, _ = cutter.cut(whole, data, context)
    assert (answer(Checkpoint(layout, tensors)) - answer(dense)).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ROTATED)
def test_a_planted_low_rank_stream_is_recovered_exactly(tiny, model_type):
    dense = made(tiny, model_type)
    layout, step = dense.layout, dense.layout.grid("hidden")
    k = layout.families["hidden"] - 2 * step if step > 1 else layout.families["hidden"] // 2
    rank = k - 2 if layout.arch.norm.kind == "layer" else k
    noise = torch.randn(layout.families["hidden"], rank, generator=torch.Generator().manual_seed(5))
    q = torch.linalg.qr(noise.double())[0]
    tensors = dict(dense.tensors)
    for name in producers(layout):
        if not layout.tensors[name].shared_with:
            where = next(n for n, dim in enumerate(layout.tensors[name].dims) if dim.has("hidden"))
            tensors[name] = (tensors[name].double().movedim(where, -1) @ q @ q.T).movedim(-1, where).float()
    dense.become(layout, tensors)
    before = answer(dense)
    found = sliced(dense, remove=share(layout, {"hidden": k}) - 1e-6, on=["hidden"])
    assert found["sizes"] == {"hidden": k}
    assert (answer(dense) - before).abs().max() < 1e-4 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize(("model_type", "word"), [*((m, "ffn") for m in SLICED), *((m, "heads") for m in HEADS)])
def test_dead_units_go_first_and_nothing_is_lost(tiny, model_type, word):
    dense = made(tiny, model_type)
    layout = dense.layout
    axis = head_axis(layout) if word == "heads" else "ffn"
    dead, tensors = layout.families[axis] // 4, dict(dense.tensors)
    for block in range(layout.depth):
        for branch in layout.branches(block):
            writer = next(w for s in stages(layout, block) for w in s.writers if w.module == branch.writes)
            if writer.axis(layout).rstrip("0123456789") == axis:
                rows = writer.groups(layout, writer.axis(layout))[1 : 1 + dead].flatten()
                name = f"{writer.module}.weight"
                where = next(n for n, dim in enumerate(layout.tensors[name].dims) if dim.has(writer.axis(layout)))
                tensors[name] = tensors[name].index_fill(where, rows, 0.0)
    dense.become(layout, tensors)
    before = answer(dense)
    found = sliced(dense, remove=share(layout, {axis: layout.families[axis] - dead}), on=[word])
    assert found["sizes"][axis] == layout.families[axis] - dead
    assert (answer(dense) - before).abs().max() < 1e-3 * max(1.0, float(before.abs().max()))
    alive = made(tiny, model_type)  # the twin: units that are alive are missed
    before = answer(alive)
    sliced(alive, remove=share(layout, {axis: layout.families[axis] - dead}), on=[word])
    assert (answer(alive) - before).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", SLICED)
def test_no_fit_is_worse_than_what_it_started_from(tiny, model_type):
    checkpoint = made(tiny, model_type)
    layout = checkpoint.layout
    details = sliced(checkpoint, remove=0.15, split=0.5)
    assert len(details["fits"]) >= 2 * layout.depth
    for fit in details["fits"]:
        assert fit["left_after"] <= fit["left_before"] + 1e-9, fit
    assert any(fit["left_after"] < 0.9 * fit["left_before"] for fit in details["fits"])
    assert abs(details["delivered"] - 0.15) < 0.01


@pytest.mark.parametrize("model_type", ["llama", "bert", "phi", "gpt2", "vit"])
def test_running_blocks_by_stages_gives_what_running_them_whole_gives(tiny, model_type, monkeypatch):
    by_stages, whole = made(tiny, model_type), made(tiny, model_type)
    sliced(by_stages, remove=0.15, split=0.5)
    monkeypatch.setattr(Side, "skippable", lambda _self, _stage: False)
    sliced(whole, remove=0.15, split=0.5)
    assert (answer(by_stages) - answer(whole)).abs().max() < 1e-3


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_padding_changes_no_sum(tiny, model_type, monkeypatch):
    rng = np.random.default_rng(0)
    ragged = [rng.integers(4, 60, length) for length in (3, 5, 8, 8, 11, 12, 12)]
    padded, alone = made(tiny, model_type), made(tiny, model_type)
    assert any(batch.real is not None for batch in batches(ragged, padded.layout))
    monkeypatch.setattr(cutter_module, "sensitivity", fixed := Frozen(cutter_module.sensitivity))
    Slice(remove=0.15, split=0.5).apply(padded, Context(ragged))
    one_by_one = lambda sequences, _layout: [Batch([s]) for s in sorted(sequences, key=len)]  # noqa: E731
    monkeypatch.setattr(cutter_module, "batches", one_by_one)
    monkeypatch.setattr("tersor.compress.passes.slice.batches", one_by_one)
    Slice(remove=0.15, split=0.5).apply(alone, Context(ragged))
    assert fixed.calls == 2
    assert (answer(padded) - answer(alone)).abs().max() < 1e-3


class Frozen:
    """Hands out the first result again: gradients depend on draws, and these on how sequences are batched."""

    def __init__(self, function):
        self.function, self.calls, self.result = function, 0, None

    def __call__(self, *args, **named):
        self.calls += 1
        self.result = self.result or self.function(*args, **named)
        return self.result


def test_stock_transformers_reloads_equal_outputs_of_all_in_a_fresh_process(tiny, tmp_path):
    script = """
import sys, torch, pathlib, transformers
from safetensors.torch import load_file
torch.set_num_threads(int(sys.argv[2]))
for directory in sorted(p for p in pathlib.Path(sys.argv[1]).iterdir() if p.is_dir()):
    config = transformers.AutoConfig.from_pretrained(directory)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], (directory, info)
    expected = load_file(directory.with_suffix(".safetensors"))
    wanted = expected.pop("wanted")
    with torch.no_grad():
        output = model(**expected)
    found = output.logits if getattr(output, "logits", None) is not None else output.last_hidden_state
    assert torch.equal(found, wanted), (directory.name, (found - wanted).abs().max())
assert not [m for m in sys.modules if m.startswith("tersor")]
"""
    for model_type in SLICED:
        checkpoint = made(tiny, model_type)
        sliced(checkpoint, remove=0.2, split=0.5)
        checkpoint.save(tmp_path / model_type)
        (batch,) = batches(inputs(checkpoint, 4, 1), checkpoint.layout)
        save_file({"wanted": answer(checkpoint).contiguous(), **batch.inputs}, tmp_path / f"{model_type}.safetensors")
    command = [sys.executable, "-c", script, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=Path(tmp_path))
