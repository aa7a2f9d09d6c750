"""slice on hidden where the config has no width of heads: whole heads leave with it (GPT-2, OPT)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tersor.compress.axes import positions
from tersor.compress.calibration.stages import stages
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import RecipeError
from tersor.compress.pass_ import Context
from tersor.compress.passes.slice import Slice
from tersor.compress.slicing.fuse import producers, restate

CASES = [("gpt2", ""), ("gpt2", "layer-scaled"), ("opt", ""), ("opt", "unbiased")]


def answer(checkpoint: Checkpoint) -> torch.Tensor:
    ids = torch.arange(4, 36).reshape(2, 16)
    with torch.no_grad():
        return checkpoint.model()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def made(tiny, model_type: str, variant: str) -> Checkpoint:
    return tiny(model_type, variant=variant, tie_word_embeddings=False)


def sliced(checkpoint: Checkpoint, **options: object) -> dict:
    context = Context(list(np.random.default_rng(0).integers(4, 100, (8, 24))))
    step = Slice(**options)
    step.apply(checkpoint, context)
    checkpoint.checks += step.checks(context.details)
    assert checkpoint.failing_checks() == []
    return context.details


def planted(checkpoint: Checkpoint, rank: int) -> None:
    """One head that nobody hears, and a stream of low rank once its mean is taken off."""
    layout, tensors = checkpoint.layout, dict(checkpoint.tensors)
    for block in range(layout.depth):
        writer = stages(layout, block)[0].writers[0]
        name = f"{writer.module}.weight"
        where = next(n for n, dim in enumerate(layout.tensors[name].dims) if dim.has(f"heads{block}"))
        dim = layout.tensors[name].dims[where]
        dead = positions(dim, f"heads{block}", torch.tensor([1]), layout.sizes)
        tensors[name] = tensors[name].index_fill(where, dead, 0.0)
    q = torch.linalg.qr(torch.randn(layout.families["hidden"], rank, generator=torch.Generator().manual_seed(5)))[0]
    for name in producers(layout):
        where = next(n for n, dim in enumerate(layout.tensors[name].dims) if dim.has("hidden"))
        tensors[name] = (tensors[name].movedim(where, -1) @ q @ q.T).movedim(-1, where)
    checkpoint.become(layout, tensors)


@pytest.mark.parametrize(("model_type", "variant"), CASES)
def test_what_the_stream_and_a_head_do_not_hold_leaves_and_nothing_is_lost(tiny, model_type, variant):
    dense = made(tiny, model_type, variant)
    sizes = {"heads": 3, "hidden": 36}
    share = 1 - restate(dense.layout, sizes).parameters / dense.layout.parameters - 1e-6
    planted(dense, rank=33)
    before = answer(dense)
    details = sliced(dense, remove=share, on=["hidden"])
    assert details["sizes"] == sizes
    assert (answer(dense) - before).abs().max() < 1e-3 * max(1.0, float(before.abs().max()))
    whole = made(tiny, model_type, variant)  # the twin: what is used is missed
    before = answer(whole)
    sliced(whole, remove=share, on=["hidden"])
    assert (answer(whole) - before).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_ffn_takes_up_what_whole_heads_leave_over(tiny, model_type):
    checkpoint = made(tiny, model_type, "")
    details = sliced(checkpoint, remove=0.4, on=["hidden", "ffn"], split=1.0)
    assert details["sizes"]["hidden"] == 12 * details["sizes"]["heads"]
    assert details["delivered"] == pytest.approx(0.4, abs=0.01)
    assert all(fit["left_after"] <= fit["left_before"] + 1e-9 for fit in details["fits"])


def test_a_tied_head_is_untied_and_counted(tiny, tmp_path):
    tied = tiny("gpt2", vocab_size=300)
    details = sliced(tied, remove=0.1, on=["hidden"])
    assert not tied.config.tie_word_embeddings
    assert details["delivered"] >= 0.1
    tied.save(tmp_path / "model")
    again = Checkpoint.load(tmp_path / "model")
    assert torch.equal(answer(again), answer(tied))
    with pytest.raises(RecipeError, match="No sizes"):  # two tables of a wide vocabulary outweigh what blocks lose
        Slice(remove=0.3, on=["hidden"]).requires(tiny("gpt2", vocab_size=30_000).layout)
