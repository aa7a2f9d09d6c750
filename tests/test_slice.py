"""slice: what must stay the same stays the same, what was asked for is what is delivered."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tersor.compress.calibration.batches import batches
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.layout import Layout
from tersor.compress.pass_ import Context
from tersor.compress.passes.slice import Slice
from tersor.compress.slicing.fuse import fuse, norms, restate, rotate

ROTATABLE = ["llama", "mistral", "qwen2"]


def windows(count: int = 8, length: int = 24, vocab: int = 100, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, vocab, (count, length)))


def logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return checkpoint.model()(input_ids=ids, use_cache=False).logits


def ids_of(checkpoint: Checkpoint, seed: int = 1) -> torch.Tensor:
    vocab = checkpoint.layout.families["vocab"]
    return torch.as_tensor(np.stack(windows(3, 16, vocab, seed)))


def sliced(checkpoint: Checkpoint, seed: int = 0, **options: object) -> dict:
    vocab = checkpoint.layout.families["vocab"]
    context = Context(windows(vocab=vocab, seed=seed))
    step = Slice(**options)
    step.apply(checkpoint, context)
    checkpoint.checks += step.checks(json.loads(json.dumps(context.details)))
    assert checkpoint.failing_checks() == []
    return context.details


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ROTATABLE)
def test_fusing_alone_changes_nothing(tiny, model_type, tied):
    dense = tiny(model_type, tie_word_embeddings=tied)
    layout, tensors = fuse(dense.layout, dense.tensors)
    ids = ids_of(dense)
    before = logits(dense, ids)
    assert (logits(Checkpoint(layout, tensors), ids) - before).abs().max() < 1e-4
    for norm in norms(dense.layout):  # the twin: gains dropped but not fused
        tensors[f"{norm}.weight"] = dense.tensors[f"{norm}.weight"]
    assert (logits(Checkpoint(layout, tensors), ids) - before).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ROTATABLE)
def test_a_full_rotation_changes_nothing(tiny, model_type):
    dense = tiny(model_type)
    d = dense.layout.families["hidden"]
    q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    ids = ids_of(dense)
    layout, fused = fuse(dense.layout, dense.tensors)
    rotated = Checkpoint(layout, rotate(layout, fused, q, layout))
    assert (logits(rotated, ids) - logits(dense, ids)).abs().max() < 1e-4
    unfused = Checkpoint(layout, rotate(layout, dict(dense.tensors), q, layout))  # twin: not fused first
    assert (logits(unfused, ids) - logits(dense, ids)).abs().max() > 1e-2


def planted(checkpoint: Checkpoint, rank: int) -> Checkpoint:
    """The checkpoint with every write to the stream projected on one random subspace of the given rank."""
    d = checkpoint.layout.families["hidden"]
    q = torch.linalg.qr(torch.randn(d, rank, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    tensors, arch, layout = dict(checkpoint.tensors), checkpoint.layout.arch, checkpoint.layout
    for name in arch.embeddings:
        full = f"{layout.full(name)}.weight"
        tensors[full] = (tensors[full].double() @ q @ q.T).float()
    for block in range(layout.depth):
        for branch in layout.branches(block):
            full = f"{branch.writes}.weight"
            tensors[full] = (q @ q.T @ tensors[full].double()).float()
            if f"{branch.writes}.bias" in tensors:
                tensors[f"{branch.writes}.bias"] = (q @ q.T @ tensors[f"{branch.writes}.bias"].double()).float()
    planted = Checkpoint(layout, tensors)
    planted.become(layout, tensors)
    return planted


@pytest.mark.parametrize("model_type", ROTATABLE)
def test_a_planted_low_rank_stream_is_recovered_exactly(tiny, model_type):
    whole = tiny(model_type)
    d, step = whole.layout.families["hidden"], whole.layout.grid("hidden")
    k = d - 2 * step if step > 1 else d // 2
    dense = planted(whole, rank=k)
    ids = ids_of(dense)
    before = logits(dense, ids)
    remove = 1 - restate(dense.layout, {"hidden": k}).parameters / dense.layout.parameters - 1e-6
    found = sliced(dense, remove=remove, on=["hidden"])
    assert found["sizes"]["hidden"] == k
    assert (logits(dense, ids) - before).abs().max() < 1e-4 * max(1.0, float(before.abs().max()))
    before = logits(whole, ids)  # twin: a full-rank stream is not recovered
    sliced(whole, remove=remove, on=["hidden"])
    assert (logits(whole, ids) - before).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_reloads_equal_logits_in_a_fresh_process(tiny, tmp_path, tied):
    checkpoint = tiny("llama", tie_word_embeddings=tied)
    sliced(checkpoint, remove=0.2, on=["hidden"])
    checkpoint.save(tmp_path / "model")
    ids = ids_of(checkpoint)
    save_file({"logits": logits(checkpoint, ids), "ids": ids}, tmp_path / "expected.safetensors")
    script = (
        "import sys, torch\nfrom safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "e = load_file(sys.argv[2])\n"
        "m, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "with torch.no_grad(): found = m(input_ids=e['ids'], use_cache=False).logits\n"
        "assert torch.equal(found, e['logits']), (found - e['logits']).abs().max()\n"
        "assert not [m for m in sys.modules if m.startswith('tersor')]\n"
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            tmp_path / "model",
            tmp_path / "expected.safetensors",
            str(torch.get_num_threads()),
        ],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )


def test_bfloat16_stays_bfloat16(tiny):
    checkpoint = tiny("llama", dtype="bfloat16")
    sliced(checkpoint, remove=0.2, on=["hidden"])
    assert {t.dtype for t in checkpoint.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("remove", [0.1, 0.3, 0.5])
def test_the_delivered_share_is_the_next_grid_point(tiny, tied, remove):
    checkpoint = tiny("llama", tie_word_embeddings=tied)
    before = checkpoint.layout
    forecast = Slice(remove=remove, on=["hidden"]).requires(before)
    details = sliced(checkpoint, remove=remove, on=["hidden"])
    real = sum(t.numel() for t in {id(t): t for t in checkpoint.tensors.values()}.values())
    assert real == checkpoint.layout.parameters == forecast.layout.parameters
    assert details["delivered"] == 1 - real / before.parameters >= remove
    wider = restate(before, {"hidden": checkpoint.layout.families["hidden"] + before.grid("hidden")})
    assert wider.parameters > before.parameters * (1 - remove)
    assert any(f"{real:,}" in note for note in forecast.notes)


def test_two_runs_give_the_same_bytes_and_another_calibration_other_bytes(tiny):
    runs = [tiny("llama") for _ in range(3)]
    for checkpoint, seed in zip(runs, (0, 0, 1), strict=True):
        sliced(checkpoint, seed=seed, remove=0.3, on=["hidden"])
    first, again, other = (c.tensors for c in runs)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize(
    ("model_type", "task", "options", "said"),
    [
        ("bert", "feature-extraction", {"remove": 0.2, "on": ["hidden"]}, "post-norm"),
        ("llama", "feature-extraction", {"remove": 0.2, "on": ["hidden"]}, "stream itself"),
        ("llama", "text-generation", {"remove": 0.99, "on": ["hidden"]}, "No sizes"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_by_name(tiny, model_type, task, options, said):
    layout = Layout.of(tiny(model_type, task).config, task)
    with pytest.raises(RecipeError, match=said):
        Slice(**options).requires(layout)


def test_options_are_strict():
    for wrong in (
        {"remove": 0},
        {"remove": 1.0},
        {"remove": 50},
        {"remove": "0.2"},
        {"remove": 0.2, "removed": 1},
    ):
        with pytest.raises(ValueError, match=r"validation error|unexpected"):
            Slice(**wrong)


def test_padding_is_not_counted(tiny):
    short, long = windows(1, 5)[0], windows(1, 9, seed=3)[0]
    (batch,) = batches([long, short], tiny("llama").layout, tokens=100)
    hidden = torch.arange(2 * 9 * 4, dtype=torch.float32).reshape(2, 9, 4)
    assert batch.tokens(hidden).shape == (14, 4)


def test_activations_that_overflow_name_their_layer(tiny):
    checkpoint = tiny("llama")
    name = checkpoint.layout.full("@layers.{i}.mlp.up_proj.weight", 1)
    checkpoint.tensors[name] = checkpoint.tensors[name] * 1e38
    with pytest.raises(PreflightError, match=r"layers\.1|norm"):
        sliced(checkpoint, remove=0.3, on=["hidden"])


def test_a_tied_head_stays_tied_and_costs_nothing(tiny):
    checkpoint = tiny("llama", tie_word_embeddings=True)
    sliced(checkpoint, remove=0.2, on=["hidden"])
    head, embedding = (checkpoint.tensors[n] for n in ("lm_head.weight", "model.embed_tokens.weight"))
    assert head is embedding
    assert checkpoint.config.tie_word_embeddings


def test_the_loss_on_a_tenth_of_the_calibration_data_chooses(tiny):
    found = [sliced(tiny("mistral"), remove=0.3, on=["hidden", "ffn"]) for _ in range(2)]
    tried = {json.dumps(entry["sizes"]): entry["loss"] for entry in found[0]["tried"]}
    assert len(tried) >= 3
    chosen = json.dumps(found[0]["sizes"])
    assert tried[chosen] == min(tried.values())
    assert found[0]["tried"] == found[1]["tried"]
    assert abs(found[0]["delivered"] - 0.3) <= 0.005


def test_the_recipe_can_fix_the_split(tiny):
    wide = sliced(tiny("mistral"), remove=0.3, on=["hidden", "ffn"], split=0.0)
    narrow = sliced(tiny("mistral"), remove=0.3, on=["hidden", "ffn"], split=1.0)
    assert wide["tried"] == narrow["tried"] == []
    assert "hidden" not in wide["sizes"]
    assert narrow["sizes"]["hidden"] < 48


def test_too_few_tokens_are_said_with_how_many_are_wanted(tiny):
    few = sliced(tiny("llama"), remove=0.2, on=["ffn"])["warnings"]
    assert len(few) == 1
    assert "192 calibration tokens" in few[0]
    context = Context(windows(count=80, length=200))
    Slice(remove=0.2, on=["ffn"]).apply(tiny("llama"), context)
    assert context.details["warnings"] == []


def test_no_calibration_data_is_refused(tiny):
    with pytest.raises(PreflightError, match="no calibration data"):
        Slice(remove=0.2).apply(tiny("llama"), Context([]))


def test_the_original_tensors_are_not_written_to(tiny):
    checkpoint = tiny("llama")
    before = dict(checkpoint.tensors)
    copies = {name: tensor.clone() for name, tensor in before.items()}
    for options in ({"on": ["ffn"]}, {"on": ["hidden"]}):
        sliced(Checkpoint(checkpoint.layout, dict(before)), remove=0.2, **options)
    assert all(torch.equal(before[name], copies[name]) for name in before)


def test_a_later_check_finds_a_gain_that_came_back(tiny):
    checkpoint = tiny("llama")
    sliced(checkpoint, remove=0.2, on=["hidden"])
    name = norms(checkpoint.layout)[0]
    checkpoint.tensors[f"{name}.weight"] = checkpoint.tensors[f"{name}.weight"] * 2
    assert any(name in failing for failing in checkpoint.failing_checks())


def test_a_split_is_found_where_heads_must_leave_too(tiny):
    """A wide vocabulary: no sizes remove as much with all heads, and hidden then moves on a finer grid."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    layout = tiny("llama", vocab_size=4096, head_dim=16, **shape).layout
    after = Slice(remove=0.3, split=0.5).requires(layout).layout
    assert after.families["kv_heads"] == 1
    assert after.parameters == pytest.approx(0.7 * layout.parameters, rel=0.01)
