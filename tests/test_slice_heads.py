"""Narrower heads: nothing is lost where nothing was held, and the frequencies that stay are those of the pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tersor.compress.arch import architecture, names
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import RecipeError
from tersor.compress.layout import Layout
from tersor.compress.pass_ import Context
from tersor.compress.passes.slice import Slice
from tersor.compress.slicing.budget import free_words
from tersor.compress.slicing.fuse import restate
from tersor.compress.slicing.heads import fixed_widths, narrowed_rope, pair_order
from tersor.export.decoder import OnnxDecoder
from tersor.export.onnx import Onnx

NARROWED = ["gemma", "gemma2", "granite", "llama", "mistral", "qwen2"]
WIDTH, LEFT = 6, 4


def made(tiny, model_type: str, **options: object) -> Checkpoint:
    options = {"head_dim": WIDTH, **options}
    if model_type == "llama":
        options |= {"attention_bias": True}
    return tiny(model_type, **options)


def answer(checkpoint: Checkpoint) -> torch.Tensor:
    ids = torch.arange(4, 36).reshape(2, 16)
    with torch.no_grad():
        return checkpoint.model()(input_ids=ids, use_cache=False).logits


def narrowed(checkpoint: Checkpoint) -> dict:
    layout = checkpoint.layout
    goal = restate(layout, {"head_dim": LEFT, "value_dim": LEFT}).parameters
    step = Slice(remove=1 - goal / layout.parameters - 1e-6, on=["head_dim"])
    context = Context(list(np.random.default_rng(0).integers(4, layout.families["vocab"], (8, 24))))
    step.apply(checkpoint, context)
    checkpoint.checks += step.checks(context.details)
    assert checkpoint.failing_checks() == []
    return context.details


def planted(checkpoint: Checkpoint, pair: int) -> None:
    """Queries and keys without one rotary pair, values of rank `LEFT` in every group."""
    layout, tensors = checkpoint.layout, dict(checkpoint.tensors)
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(WIDTH, LEFT, generator=generator))[0]
    low = turn @ turn.T
    alive = torch.ones(WIDTH)
    alive[[pair, pair + WIDTH // 2]] = 0
    for name, shape in layout.tensors.items():
        if not shape.dims or not any(shape.dims[0].has(axis) for axis in ("head_dim", "value_dim")):
            continue
        parts = []
        widths = [type(shape.dims[0])((section,)).size(layout.sizes) for section in shape.dims[0].sections]
        for section, part in zip(shape.dims[0].sections, tensors[name].split(widths), strict=True):
            heads = part.unflatten(0, (-1, WIDTH))
            matrix = torch.diag(alive) if "head_dim" in section else low
            parts.append(torch.einsum("vw,hw...->hv...", matrix, heads).flatten(0, 1))
        tensors[name] = torch.cat(parts)
    checkpoint.become(layout, tensors)


def test_the_list_here_names_every_architecture_whose_heads_may_become_narrower():
    assert sorted(n for n in names() if architecture(n).rotary and not architecture(n).experts) == NARROWED


@pytest.mark.parametrize("model_type", NARROWED)
def test_what_heads_do_not_use_leaves_and_nothing_is_lost(tiny, model_type):
    dense = made(tiny, model_type)
    planted(dense, pair=1)
    before = answer(dense)
    details = narrowed(dense)
    assert details["sizes"] == {"head_dim": LEFT, "value_dim": LEFT}
    assert (answer(dense) - before).abs().max() < 1e-4 * max(1.0, float(before.abs().max()))
    whole = made(tiny, model_type)  # the twin: what heads use is missed
    before = answer(whole)
    narrowed(whole)
    assert (answer(whole) - before).abs().max() > 1e-3


def test_the_frequencies_that_stay_are_those_of_the_pairs_that_stay(tiny):
    dense = made(tiny, "llama")
    model = dense.model()
    kept = torch.tensor([0, 2, 3, 5])
    layout = restate(dense.layout, {"head_dim": LEFT, "value_dim": LEFT})
    layout.config.rope_parameters = narrowed_rope(dense.layout, model, kept)
    small = type(model)(layout.config)
    wanted = model.model.rotary_emb.inv_freq[[0, 2]]
    assert torch.allclose(small.model.rotary_emb.inv_freq, wanted, rtol=1e-6)
    assert not torch.allclose(small.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq[[0, 1]], rtol=1e-2)


@pytest.mark.parametrize("model_type", NARROWED)
def test_a_narrow_checkpoint_reads_back_and_cannot_become_narrower_again(tiny, model_type, tmp_path):
    dense = made(tiny, model_type)
    narrowed(dense)
    dense.save(tmp_path / "model")
    again = Checkpoint.load(tmp_path / "model")
    assert torch.equal(answer(again), answer(dense))
    assert "longrope" in fixed_widths(again.layout)


@pytest.mark.parametrize("exporter", [Onnx(), OnnxDecoder()], ids=["scores", "cached"])
def test_a_narrow_checkpoint_answers_alike_as_onnx(tiny, exporter, tmp_path):
    dense = made(tiny, "llama")
    narrowed(dense)
    texts = list(np.random.default_rng(1).integers(4, dense.layout.families["vocab"], (4, 20)))
    figures = exporter.write(dense, tmp_path, texts)["parity"]["logits"]  # raises ParityMissed
    assert 0 < figures["error"] <= figures["limit"]


def test_a_config_that_counts_frequencies_itself_keeps_its_heads(tiny):
    factors = {"short_factor": [1.0] * 3, "long_factor": [1.5] * 3}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **factors}
    long = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    assert free_words(long.layout) == ["ffn"]
    assert free_words(tiny("phi3").layout) == ["hidden", "ffn", "heads"]
    assert free_words(tiny("llama", hidden_size=64).layout) == ["hidden", "ffn", "heads"], "six heads do not divide 64"
    with pytest.raises(RecipeError, match="transformers refuses"):
        Slice(remove=0.2, on=["hidden"]).requires(long.layout)


def test_pairs_leave_together_the_least_first():
    assert pair_order(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1, 4, 2, 5, 0, 3]


@pytest.mark.parametrize(
    ("model_type", "said"), [("qwen3", "norm"), ("phi3", "config"), ("gpt2", "norm"), ("bert", "norm")]
)
def test_heads_of_fixed_width_are_refused(tiny, model_type, said):
    layout: Layout = tiny(model_type).layout
    with pytest.raises(RecipeError, match=said):
        Slice(remove=0.05, on=["head_dim"]).requires(layout)
