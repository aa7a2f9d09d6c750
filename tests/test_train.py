"""The training loop: packed rows, losses, memory, checkpoints; tiny random models, one process."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.pass_ import Context
from tersor.compress.passes.moe import Moe
from tersor.compress.train import (
    Classification,
    Distillation,
    LanguageModel,
    Training,
    images,
    loop,
    losses,
    options,
    text,
    train,
)
from tersor.compress.train import state as disk
from tersor.compress.train.loop import SMALL, groups
from tersor.compress.train.losses import IGNORED, answers, divergence
from tersor.compress.train.memory import checkpoint_activations
from tersor.compress.train.options import multiplies_bfloat16
from tersor.compress.train.rows import Rows, chosen
from transformers import TrainerCallback

TEXT = ("bert", "distilbert", "gemma2", "gpt2", "llama", "mistral", "modernbert", "opt", "phi", "qwen3", "roberta")


def module(tiny, model_type: str = "llama", attention: str = "sdpa", **options):
    """A model whose parameters may move, and its layout."""
    checkpoint = tiny(model_type, **options)
    model = copy.deepcopy(checkpoint.model()).requires_grad_(True)
    if attention == "eager" or model._supports_sdpa:
        model.set_attn_implementation(attention)
    return model, checkpoint.layout


def sequences(layout, lengths=(20, 13, 7, 17, 3), seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, layout.families["vocab"], n) for n in lengths]


def rows_of(model, layout, given, **options) -> Rows:
    return text(model, given, causal=layout.arch.causal, first_position=layout.first_position, **options)


def objective_of(model, layout):
    """A loss over every token: likelihood where there are logits, else the distance from another model."""
    if hasattr(model, "lm_head"):
        return LanguageModel()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return lambda model, batch: squared(model, other, batch)


def squared(model, other, batch):
    real = batch["targets"] != IGNORED
    inputs = {name: value for name, value in batch.items() if name != "targets"}
    return (model(**inputs).last_hidden_state - other(**inputs).last_hidden_state.detach())[real].square().sum()


def loss_and_gradients(model, objective, rows: Rows, of: list[list[int]]):
    """Summed over batches of rows `of`."""
    model.zero_grad()
    total = 0.0
    for numbers in of:
        loss = objective(model, rows.collate([rows[i] for i in numbers]))
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of gradients, as a share of the largest gradient."""
    largest = max(float(g.abs().max()) for g in a.values())
    return max(float((a[n] - b[n]).abs().max()) for n in a) / largest


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", TEXT)
def test_packed_loss_and_gradients_are_those_alone(tiny, model_type, attention):
    model, layout = module(tiny, model_type, attention)
    model.eval()
    given = sequences(layout)
    packed = rows_of(model, layout, given, width=40)
    assert len(packed) < len(given) or packed.apart == "padding"
    objective = objective_of(model, layout)
    loss, gradients = loss_and_gradients(model, objective, packed, [list(range(len(packed)))])
    singles = [rows_of(model, layout, [one], apart="padding") for one in given]
    parts = [loss_and_gradients(model, objective, single, [[0]]) for single in singles]
    alone = {n: sum(g[n] for _, g in parts) for n in gradients}
    assert loss == pytest.approx(sum(value for value, _ in parts), rel=1e-5)
    assert furthest(gradients, alone) < 1e-4
    assert sum(int(answers(s.collate(s.items))) for s in singles) == int(answers(packed.collate(packed.items)))


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_sequences_that_see_each_other_are_noticed(tiny, model_type):
    model, layout = module(tiny, model_type)
    model.eval()
    given = sequences(layout)
    packed = rows_of(model, layout, given, width=40)
    objective = objective_of(model, layout)
    _, apart = loss_and_gradients(model, objective, packed, [list(range(len(packed)))])
    blind = Rows([{**row, "position_ids": np.arange(len(row["input_ids"]))} for row in packed.items])
    _, together = loss_and_gradients(model, objective, blind, [list(range(len(packed)))])
    assert furthest(apart, together) > 0.01


def test_how_sequences_are_kept_apart_is_found_on_the_model(tiny):
    found = {}
    for model_type in ("llama", "opt", "bert", "modernbert"):
        model, layout = module(tiny, model_type)
        given = sequences(layout, (40, 30))
        found[model_type] = chosen(model, given, layout.arch.causal, layout.first_position)
    assert found == {"llama": "positions", "opt": "mask", "bert": "mask", "modernbert": "padding"}


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activation_checkpointing_keeps_less_and_the_same_gradients(tiny, how):
    model, layout = module(tiny, num_hidden_layers=3)
    rows = rows_of(model, layout, sequences(layout), width=40)
    kept, gradients = {}, {}
    for each in ("none", how):
        copied = copy.deepcopy(model).train()
        checkpoint_activations(copied, each)
        kept[each] = saved_bytes(copied, rows)
        _, gradients[each] = loss_and_gradients(copied, LanguageModel(), rows, [list(range(len(rows)))])
    assert kept[how] < {"selective": 0.8, "full": 0.5}[how] * kept["none"]
    assert furthest(gradients["none"], gradients[how]) == 0.0


def saved_bytes(model, rows: Rows) -> int:
    """Bytes of the distinct storages that a forward inside the blocks keeps for backward, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    batch = rows.collate(rows.items)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(keep(t)) or t, lambda t: t):
        model.model(**{k: v for k, v in batch.items() if k != "targets"}, use_cache=False)
    return sum(seen.values())


def test_a_model_that_cannot_recompute_says_so():
    with pytest.raises(RecipeError, match="activation_checkpointing"):
        checkpoint_activations(torch.nn.Linear(2, 2), "full")


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def test_accumulation_is_one_larger_batch(tiny):
    start, layout = module(tiny)
    rows = rows_of(start, layout, sequences(layout, range(3, 35)), width=40)
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = copy.deepcopy(start)
        options = Training(steps=4, batch=batch, accumulate=accumulate, optimizer="sgd", learning_rate=1e-2)
        done = train(model, rows, LanguageModel(), options)
        found.append((done.losses, weights(model)))
    assert [loss for _, loss in found[0][0]] == pytest.approx([loss for _, loss in found[1][0]], rel=1e-4)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, found[1][1][name], rtol=1e-3, atol=1e-5)
    assert not same(found[0][1], weights(start))


def test_training_lowers_the_loss_and_leaves_the_process_as_it_was(tiny):
    model, layout = module(tiny)
    rows = rows_of(model, layout, sequences(layout), width=40)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    done = train(model, rows, LanguageModel(), Training(steps=30, batch=2, learning_rate=1e-2))
    assert done.steps == 30
    assert done.losses[-1][1] < 0.7 * done.losses[0][1]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert not model.training


def test_frozen_parameters_stay(tiny):
    model, layout = module(tiny)
    model.lm_head.weight.requires_grad_(False)
    before = weights(model)
    train(model, rows_of(model, layout, sequences(layout)), LanguageModel(), Training(steps=2, batch=2))
    after = weights(model)
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_the_last_checkpoints_are_averaged(tiny, tmp_path):
    start, layout = module(tiny)
    rows = rows_of(start, layout, sequences(layout))
    model = copy.deepcopy(start)
    done = train(model, rows, LanguageModel(), Training(steps=9, batch=2, save_every=3, average=2), folder=tmp_path)
    assert done.averaged == 2
    kept = disk.checkpoints(tmp_path)
    assert [p.name for p in kept] == ["checkpoint-6", "checkpoint-9"]
    one, two = (disk.mean([p]) for p in kept)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], two[name])
    expected = ((one[name].double() + two[name].double()) / 2).float()
    assert torch.equal(weights(model)[name], expected)


def test_a_loss_that_is_not_finite_names_the_step(tiny):
    model, layout = module(tiny)
    rows = rows_of(model, layout, sequences(layout))
    calls = []

    class Breaks(LanguageModel):
        def __call__(self, model, batch):
            calls.append(1)
            return super().__call__(model, batch) * (math.nan if len(calls) == 3 else 1)

    with pytest.raises(RecipeError, match=r"train: step 3: found a loss that is NaN.*learning_rate"):
        train(model, rows, Breaks(), Training(steps=5, batch=2))


def test_stop_ends_the_training_and_a_resumed_one_stays_ended(tiny, tmp_path):
    start, layout = module(tiny)
    rows = rows_of(start, layout, sequences(layout))
    options = Training(steps=20, batch=2, save_every=2)
    asked = []

    def third_time(model):
        asked.append(model.training)
        return len(asked) == 3

    model, again = copy.deepcopy(start), copy.deepcopy(start)
    done = train(model, rows, LanguageModel(), options, folder=tmp_path, stop=third_time)
    assert (done.steps, done.stopped, asked) == (6, True, [False] * 3)
    resumed = train(again, rows, LanguageModel(), options, folder=tmp_path, stop=third_time)
    assert (resumed.steps, resumed.losses, len(asked)) == (6, done.losses, 3)
    assert same(weights(model), weights(again))


def test_checkpoints_of_another_model_are_refused(tiny, tmp_path):
    model, layout = module(tiny)
    rows = rows_of(model, layout, sequences(layout))
    train(model, rows, LanguageModel(), Training(steps=2, batch=2), folder=tmp_path)
    wider, _ = module(tiny, intermediate_size=48)
    with pytest.raises(PreflightError, match="mlp"):
        train(wider, rows, LanguageModel(), Training(steps=2, batch=2), folder=tmp_path)


@torch.no_grad()
def test_distillation_from_oneself_asks_for_nothing(tiny):
    model, layout = module(tiny)
    model.eval()
    rows = rows_of(model, layout, sequences(layout), width=40)
    batch = rows.collate(rows.items)
    teacher = copy.deepcopy(model)
    assert float(Distillation(teacher, hidden=1.0)(model, batch)) == pytest.approx(0, abs=1e-4)
    hard, mixed = float(LanguageModel()(model, batch)), float(Distillation(teacher, soft=0.25)(model, batch))
    assert mixed == pytest.approx(0.75 * hard, rel=1e-5)
    other, _ = module(tiny, seed=1)
    assert float(Distillation(other.eval())(model, batch)) > 1
    assert float(Distillation(other.eval(), hidden=1.0)(model, batch)) > float(Distillation(other)(model, batch)) + 1


def test_divergence_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(5, 7, generator=generator) for _ in range(2))
    p, q = torch.softmax(wanted / 2, -1), torch.softmax(found / 2, -1)
    expected = 4 * (p * (p / q).log()).sum()
    assert float(divergence(found, wanted, 2.0)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("piece", [1, 30, 1 << 17])
def test_divergence_and_its_gradient_are_those_of_autograd(temperature, piece, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    found, wanted = (3 * torch.randn(2, 6, 9, generator=generator) for _ in range(2))
    real = torch.rand(2, 6, generator=generator) < 0.7
    assert 0 < int(real.sum()) < 12
    monkeypatch.setattr(losses, "PIECE", piece)

    def of(distance) -> tuple[torch.Tensor, torch.Tensor]:
        x = found.clone().requires_grad_()
        total = distance(x)
        (0.3 * total).backward()
        return total.detach(), x.grad

    def plain(x: torch.Tensor) -> torch.Tensor:
        ours, theirs = (torch.log_softmax(each[real] / temperature, -1) for each in (x, wanted))
        return temperature**2 * torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)

    ours, expected = of(lambda x: divergence(x, wanted, temperature, real)), of(plain)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    every = of(lambda x: divergence(x, wanted, temperature))
    assert abs(float(every[0] - expected[0])) > 0.1, "rows that are not real count in no sum"
    assert not bool(ours[1][~real].any())
    assert bool(every[1][~real].any())


def test_hidden_states_of_another_width_are_refused(tiny):
    model, layout = module(tiny)
    teacher, _ = module(tiny, hidden_size=96)
    rows = rows_of(model, layout, sequences(layout))
    with pytest.raises(RecipeError, match="hidden states of one shape"):
        Distillation(teacher, hidden=0.5)(model, rows.collate(rows.items))


def test_images_are_classified(tiny):
    model, layout = module(tiny, "resnet", "eager", task="image-classification")
    generator = np.random.default_rng(0)
    pixels = [generator.standard_normal((layout.families["channels"], 32, 32)) for _ in range(8)]
    rows = images(pixels, [n % 2 for n in range(8)])
    done = train(model, rows, Classification(), Training(steps=12, batch=8, learning_rate=1e-2))
    assert done.losses[-1][1] < 0.5 * done.losses[0][1]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "stable-decay"])
def test_the_rate_rises_in_the_warm_up_and_falls_as_its_schedule_says(tiny, schedule):
    model, layout = module(tiny)
    seen = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **_):
            seen.append(optimizer.param_groups[0]["lr"] / 1e-3)

    options = Training(steps=20, batch=1, learning_rate=1e-3, warmup=0.2, schedule=schedule)
    train(model, rows_of(model, layout, sequences(layout)), objective_of(model, layout), options, callbacks=[Rates()])
    left = [(step - 4) / 16 for step in range(4, 20)]
    falls = {
        "cosine": [0.5 * (1 + math.cos(math.pi * x)) for x in left],
        "linear": [1 - x for x in left],
        "constant": [1.0] * 16,
        "stable-decay": [min(1.0, (20 - step) / 4) for step in range(4, 20)],
    }
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75, *falls[schedule]], abs=1e-6)


def test_a_matrix_far_smaller_than_its_peers_moves_in_proportion(tiny):
    """A router that was scaled down keeps most of its choices; the twin, at the full rate, is overwritten."""
    original = tiny("llama")
    text_ = sequences(original.layout, [24] * 16)
    mixed = Checkpoint(original.layout, dict(original.tensors))
    Moe(experts=8, active=4, compare=False).apply(mixed, Context(text_))
    router = "model.layers.0.mlp.gate.weight"
    before = mixed.tensors[router]
    assert before.square().mean().sqrt() < 1e-2
    shares = []
    for proportional in (True, False):
        model = copy.deepcopy(mixed.model()).requires_grad_(True)
        if not proportional:
            model.get_parameter(router).data.mul_(1 / float(before.square().mean().sqrt()))
        start = model.get_parameter(router).detach().clone()
        rates = {id(p): g["lr"] for g in groups(model, Training()) for p in g["params"]}
        shares.append(rates[id(model.get_parameter(router))] / rates[id(model.lm_head.weight)])
        if proportional:
            train(model, text(model, text_), Distillation(original.model()), Training(steps=10, batch=8))
            assert 0 < float((model.get_parameter(router).detach() - start).norm() / start.norm()) < 0.2
    assert 0 < shares[0] < SMALL
    assert shares[1] == 1.0


@pytest.mark.parametrize("able", [True, False])
def test_auto_multiplies_in_bfloat16_where_the_machine_does(able, monkeypatch, tmp_path):
    monkeypatch.setattr(options, "multiplies_bfloat16", lambda: able)
    found = {
        p: loop.arguments_of(Training(precision=p), tmp_path, 0, False).bf16 for p in ("float32", "auto", "bfloat16")
    }
    assert found == {"float32": False, "auto": able, "bfloat16": True}
    assert isinstance(multiplies_bfloat16(), bool)
