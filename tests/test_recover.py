"""recover: distillation from the original that keeps earlier promises, in a recipe and by hand; tiny random models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tersor.compress import How, apply, load_recipe
from tersor.compress.checkpoint import Check, Checkpoint
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.evaluate.gate import Gate
from tersor.compress.pass_ import Context
from tersor.compress.passes import recover as module
from tersor.compress.passes.recover import Recover, matrices
from tersor.compress.passes.slice import Slice
from tersor.compress.progress import Progress
from tersor.compress.rundir import hash_tree
from tersor.compress.train import learning
from tersor.compress.train import options as train_options
from tersor.compress.train.generated import continued
from tersor.compress.train.learning import rows
from tersor.compress.train.losses import IGNORED
from tersor.compress.train.promises import Held, held
from tersor.compress.train.redrawn import redrawn

QUICK = {"steps": 20, "batch": 8, "learning_rate": 3e-3}


def sequences(checkpoint: Checkpoint, count: int = 24, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    vocabulary = checkpoint.layout.families["vocab"]
    return [generator.integers(5, vocabulary, n) for n in generator.integers(8, 33, count)]


def copied(checkpoint: Checkpoint) -> Checkpoint:
    return Checkpoint(checkpoint.layout, dict(checkpoint.tensors), checks=list(checkpoint.checks))


@pytest.fixture(scope="module")
def cut(tiny) -> tuple[Checkpoint, Checkpoint, list[np.ndarray]]:
    """A tiny Llama, its slice with the promises of slicing, and text."""
    original = tiny("llama")
    text, made, details = sequences(original), copied(original), {}
    options = Slice(remove=0.3, split=0.5)
    options.apply(made, Context(text, details=details))
    made.checks = options.checks(details)
    assert not made.failing_checks()
    return original, made, text


@torch.no_grad()
def divergence(checkpoint: Checkpoint, original: Checkpoint, text: list[np.ndarray]) -> float:
    """Mean KL(original ‖ checkpoint) in nats a token."""
    ours, theirs = checkpoint.model(), original.model()
    total = count = 0.0
    for ids in text:
        batch = torch.as_tensor(ids)[None]
        q, p = (torch.log_softmax(m(input_ids=batch).logits.double(), -1) for m in (ours, theirs))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(ids)
    return total / count


def test_it_comes_nearer_to_the_original_and_keeps_what_slicing_promised(cut):
    original, made, text = cut
    after, details = copied(made), {}
    Recover(**QUICK).apply(after, Context(text, original=original, details=details))
    assert after.failing_checks() == []
    assert divergence(after, original, text) < 0.8 * divergence(made, original, text)
    assert details["steps"] == 20
    assert len(details["loss"]["loss"]) == 20
    assert details["packed"] == "positions"
    norms = [n for n in made.tensors if "layernorm" in n or n == "model.norm.weight"]
    assert details["held"] == sum(made.tensors[n].numel() for n in norms)
    assert all(torch.equal(made.tensors[n], after.tensors[n]) for n in norms)


def test_without_holding_a_promise_training_breaks_it(cut, monkeypatch):
    original, made, text = cut
    after = copied(made)
    monkeypatch.setattr(Held, "hold", lambda self, model: None)
    Recover(**QUICK).apply(after, Context(text, original=original))
    assert any("neutral gain" in wrong for wrong in after.failing_checks())


def test_what_is_held_is_asked_of_the_checks(tiny):
    checkpoint = tiny("llama", variant="tied")
    up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    checkpoint.tensors[up][:3] = 0
    before = checkpoint.tensors[down].clone()

    def zeros(_config, tensors):
        return None if int((tensors[up] == 0).sum()) >= 3 * tensors[up].shape[1] else "zeros are gone"

    checkpoint.checks = [
        Check("zeros", zeros),
        Check("same", lambda _c, tensors: None if torch.equal(tensors[down], before) else "it moved"),
        Check("nothing", lambda _c, _t: None),
    ]
    assert held(checkpoint) == Held(frozenset({down}), frozenset({up}))
    checkpoint.checks = checkpoint.checks[2:]
    assert held(checkpoint) == Held()


def test_zeros_stay_zero_while_their_neighbours_move(tiny):
    original = tiny("llama")
    checkpoint, name = copied(original), "model.layers.1.mlp.up_proj.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name] * (torch.arange(48) % 2)
    dead = checkpoint.tensors[name] == 0
    count = int(dead.sum())
    checkpoint.checks = [Check("zeros", lambda _c, t: None if int((t[name] == 0).sum()) >= count else "fewer zeros")]
    before, details = checkpoint.tensors[name].clone(), {}
    Recover(**QUICK, weight_decay=0.1).apply(
        checkpoint, Context(sequences(original), original=original, details=details)
    )
    after = checkpoint.tensors[name]
    assert details["zeros_kept"] == [name]
    assert torch.equal(after == 0, dead)
    assert bool((after[~dead] != before[~dead]).float().mean() > 0.99)


def test_a_promise_that_no_tensor_breaks_alone_is_refused(tiny):
    checkpoint = tiny("llama")
    one, two = "model.norm.weight", "lm_head.weight"
    first, second = (checkpoint.tensors[n].clone() for n in (one, two))

    def either(_config, tensors):
        return None if torch.equal(tensors[one], first) or torch.equal(tensors[two], second) else "both moved"

    checkpoint.checks = [Check("one of two", either)]
    with pytest.raises(PreflightError, match="one of two"):
        held(checkpoint)


def test_low_rank_changes_touch_the_blocks_matrices_and_are_merged(cut):
    original, made, text = cut
    after, details = copied(made), {}
    Recover(**{**QUICK, "learning_rate": 1e-2}, lora=4).apply(after, Context(text, original=original, details=details))
    changed = {n for n in made.tensors if not torch.equal(made.tensors[n], after.tensors[n])}
    assert changed == set(matrices(made.layout))
    assert after.tensors.keys() == made.tensors.keys()
    difference = (after.tensors[min(changed)] - made.tensors[min(changed)]).double()
    assert int(torch.linalg.matrix_rank(difference, rtol=1e-4)) <= 4
    assert divergence(after, original, text) < 0.95 * divergence(made, original, text)
    assert details["trained"] == sum(4 * sum(made.tensors[n].shape) for n in changed)
    assert after.failing_checks() == []


@pytest.mark.parametrize(
    ("model_type", "task"),
    [("gpt2", None), ("bert", None), ("bert", "text-classification"), ("resnet", None), ("vit", None)],
)
@pytest.mark.parametrize("lora", [None, 2])
def test_other_tasks_recover_too(tiny, model_type, task, lora):
    original, damaged = tiny(model_type, task), tiny(model_type, task)
    layout = original.layout
    generator = torch.Generator().manual_seed(3)
    for tensor in damaged.tensors.values():
        if tensor.ndim > 1 and tensor.is_floating_point():
            tensor.mul_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
    if layout.arch.inputs == "pixels":
        side = getattr(layout.config, "image_size", 32)
        shape = (layout.families["channels"], side, side)
        data = [np.random.default_rng(n).standard_normal(shape).astype(np.float32) for n in range(16)]
    else:
        data = sequences(original)
    options = Recover(steps=15, batch=8, learning_rate=3e-3, lora=lora)
    if lora and not matrices(layout):
        with pytest.raises(RecipeError, match="lora"):
            options.apply(damaged, Context(data, original=original))
        return
    details: dict = {}
    options.apply(damaged, Context(data, original=original, details=details))
    assert np.mean(details["loss"]["loss"][-4:]) < np.mean(details["loss"]["loss"][:4])


def test_in_bfloat16_short_sequences_have_plain_attention_and_the_same_loss(tiny, monkeypatch):
    original = tiny("llama")
    text, made, losses = sequences(original), tiny("llama", num_attention_heads=2, num_key_value_heads=2), {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for precision, short in (("float32", 512), ("bfloat16", 512), ("bfloat16", 16)):
        monkeypatch.setattr(learning, "SHORT", short)
        lesson = Recover(precision=precision).lesson("recover", made, Context(text, original=original), text)
        attention = lesson.model.config._attn_implementation
        losses[precision, attention] = float(
            lesson.objective(lesson.model, lesson.data.collate(lesson.data.items)).detach()
        )
    assert [attention for _, attention in losses] == ["sdpa", "eager", "sdpa"]
    expected = losses["float32", "sdpa"]
    assert expected > 1
    assert all(found == pytest.approx(expected, rel=1e-3) for found in losses.values())


def test_the_stored_dtype_stays(tiny):
    original = tiny("llama", dtype="bfloat16")
    checkpoint = copied(original)
    Recover(steps=2, batch=4).apply(checkpoint, Context(sequences(original), original=original))
    assert {t.dtype for t in checkpoint.tensors.values()} == {torch.bfloat16}
    assert original.tensors["lm_head.weight"].dtype == torch.bfloat16


def test_the_original_and_the_input_are_left_alone(tiny):
    original = tiny("llama")
    checkpoint = copied(original)
    before = copy.deepcopy(original.tensors)
    Recover(steps=3, batch=4, distill=0.5).apply(checkpoint, Context(sequences(original), original=original))
    assert all(torch.equal(before[n], original.tensors[n]) for n in before)
    assert not torch.equal(before["lm_head.weight"], checkpoint.tensors["lm_head.weight"])


def test_a_gate_on_a_tenth_of_the_text_ends_it_early(cut):
    original, made, text = cut
    reached = divergence(made, original, text)
    for limit, stopped in ((1.5 * reached, True), (1e-9, False)):
        details: dict = {}
        options = Recover(**{**QUICK, "save_every": 2}, stop=Gate(metric="kl", max=limit))
        options.apply(copied(made), Context(text, original=original, details=details))
        assert details["stopped"] is stopped
        assert (details["steps"] < 20) is stopped


def test_what_cannot_be_is_refused(tiny, monkeypatch):
    encoder = tiny("bert").layout
    with pytest.raises(RecipeError, match="no labels"):
        Recover(distill=0.5).requires(encoder)
    with pytest.raises(PreflightError, match="calibration"):
        Recover().apply(tiny("llama"), Context([]))
    with pytest.raises(PreflightError, match="original"):
        Recover().apply(tiny("llama"), Context([np.arange(5)]))
    monkeypatch.setattr(train_options, "find_spec", lambda name: None)
    with pytest.raises(PreflightError, match=r"no accelerate and no peft.*tersor\[train\]"):
        Recover().requires(encoder)


def test_the_forecast_grows_with_what_is_trained_and_kept(tiny):
    layout = tiny("llama").layout
    full, low = Recover().requires(layout), Recover(lora=2).requires(layout)
    assert low.memory < full.memory
    assert low.disk < full.disk
    assert Recover(activation_checkpointing="full").requires(layout).memory < full.memory
    assert full.layout is layout


STEPS = """
passes:
  - use: slice
    with: {remove: 0.2, split: 0.5}
  - use: recover
    with: {steps: 12, batch: 4, save_every: 3, average: 2, learning_rate: 0.003, redrawn: 0.5}
"""


class Cut(Progress):
    """Ends the run at a step of the training, as Ctrl-C does."""

    def track(self, items, label):
        for number, item in enumerate(items):
            if label == "recover" and number == 8:
                raise KeyboardInterrupt
            yield item


def journalled(path: Path) -> dict:
    """The details of the training."""
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return next(e["details"] for e in entries if e["step"] == "2-recover")


def test_a_run_that_was_cut_off_in_the_training_goes_on_and_ends_with_the_same_bytes(small_recipe, tmp_path):
    recipe = load_recipe(small_recipe(STEPS))
    with pytest.raises(KeyboardInterrupt):
        apply(recipe, How(tmp_path / "cut", threads=1, progress=Cut()))
    state = tmp_path / "cut" / ".steps" / "2-recover.state"
    assert [p.name for p in sorted(state.iterdir())] == ["checkpoint-3", "checkpoint-6"]
    resumed = apply(recipe, How(tmp_path / "cut", threads=1, resume=True))
    whole = apply(recipe, How(tmp_path / "whole", threads=1))
    assert hash_tree(tmp_path / "cut" / "model") == hash_tree(tmp_path / "whole" / "model")
    assert not (tmp_path / "whole" / ".steps").exists()
    one, two = (journalled(tmp_path / name / "journal.jsonl") for name in ("cut", "whole"))
    assert one["loss"] == two["loss"]
    assert resumed.metrics["checkpoint"]["kl"] == whole.metrics["checkpoint"]["kl"]


def test_the_module_says_where_its_numbers_come_from():
    assert "benchmarks/recover.py" in (module.__doc__ or "")
    assert (Path(__file__).parent.parent / "benchmarks" / "recover.py").exists()


def test_sequences_that_the_original_goes_on_with(tiny, tmp_path):
    """They start with pieces of the text, follow the original's own distribution, and are drawn once."""
    original = tiny("llama")
    text = sequences(original)
    model = original.model()
    before = torch.get_rng_state()
    drawn = continued(model, text, 6, 24, seed=1, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(s) for s in drawn] == [24] * 6
    start = min(len(s) for s in text)
    pieces = {tuple(s[i : i + start]) for s in text for i in range(len(s) - start + 1)}
    assert {tuple(s[:start]) for s in drawn} <= pieces
    again, kept = continued(model, text, 6, 24, seed=1), continued(None, text, 6, 24, folder=tmp_path)
    assert np.array_equal(drawn, again)
    assert np.array_equal(drawn, kept)
    assert not np.array_equal(drawn, continued(model, text, 6, 24, seed=2))
    nats = [likelihood(model, found) for found in (drawn, sequences(original, 6, seed=5))]
    assert nats[0] < nats[1] - 0.3, "the original finds its own words likelier than random ones"
    details: dict = {}
    Recover(**QUICK, continued=4).apply(copied(original), Context(text, original=original, details=details))
    assert details["rows"] >= 4
    with pytest.raises(RecipeError, match="only language models"):
        Recover(continued=1).requires(tiny("bert").layout)


def test_words_that_the_original_might_have_said_come_anew_in_each_round(tiny):
    original = tiny("llama")
    model, given = copy.deepcopy(original.model()), sequences(original)
    data = rows(model, original.layout, given, 64)
    varied = redrawn(model, data, 0.5, seed=1)
    first, again, second = ([rows_.at(n, r) for n in range(len(data))] for rows_, r in (
        (varied, 0), (redrawn(model, data, 0.5, seed=1), 0), (varied, 1)))  # fmt: skip
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)
    changed = total = 0
    for row, kept, other, later in zip(first, data.items, varied.others, second, strict=True):
        differs, asked = row["input_ids"] != kept["input_ids"], kept["targets"] != IGNORED
        starts = np.diff(kept["segments"], prepend=0) != 0
        assert not differs[starts | (kept["segments"] == 0)].any(), "nothing is said before a sequence begins"
        assert (other == row["input_ids"]).any(0)[differs].all()
        assert not np.array_equal(row["input_ids"], later["input_ids"])
        assert np.array_equal(row["targets"][asked], np.roll(row["input_ids"], -1)[asked])
        assert np.array_equal(row["targets"] == IGNORED, ~asked)
        changed, total = changed + differs.sum(), total + asked.sum()
    assert 0.4 < changed / total <= 0.5
    drawn = [ids[segments == n] for row in first for ids, segments in [(row["input_ids"], row["segments"])]
             for n in range(1, segments.max() + 1)]  # fmt: skip
    generator = np.random.default_rng(2)
    noise = [np.where(generator.random(len(s)) < changed / total, generator.integers(5, 96, len(s)), s) for s in given]
    assert likelihood(model, drawn) < likelihood(model, noise) - 0.05, "likelier than words at random"
    for options, message in (({"distill": 0.5}, "distill: 1"), ({}, "only language models")):
        with pytest.raises(RecipeError, match=message):
            Recover(redrawn=0.5, **options).requires((original if options else tiny("bert")).layout)


@torch.no_grad()
def likelihood(model, text) -> float:
    """Mean nats a token."""
    losses = []
    for ids in text:
        batch = torch.as_tensor(ids)[None]
        losses.append(float(model(input_ids=batch, labels=batch).loss))
    return float(np.mean(losses))
