"""Experts computed as one masked FFN: what transformers computes, gradients included, and used where it pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tersor.compress.moe import whole
from tersor.compress.pass_ import Context
from tersor.compress.passes.recover import Recover

CLASSES = ("qwen2_moe", "glm4_moe", "qwen3_moe", "mixtral", "granitemoeshared")


def answer(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of the loss on their text."""
    ids = torch.randint(4, 100, (3, 14), generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    return found.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


@pytest.mark.parametrize("model_type", CLASSES)
def test_values_and_gradients_are_those_of_transformers(tiny, model_type):
    model = tiny(model_type).model().requires_grad_(True)
    logits, gradients = answer(model)
    whole.use(model)
    again, others = answer(model)
    assert apart(again, logits) < 1e-5
    assert others.keys() == gradients.keys()
    assert {name for name in gradients if "experts." in name}
    assert max(apart(others[name], gradients[name]) for name in gradients) < 1e-4


def test_an_expert_that_was_not_chosen_adds_nothing(tiny, monkeypatch):
    """The twin: with every expert's weight the same, the answer is another."""
    model = tiny("qwen2_moe").model()
    right = model(input_ids=torch.arange(4, 30)[None]).logits
    computed = whole.computed

    def unmasked(module, x, index, weights):
        every = torch.arange(module.gate_up_proj.shape[0]).expand(len(x), -1)
        return computed(module, x, every, weights.mean(1, keepdim=True).expand(every.shape))

    monkeypatch.setattr(whole, "computed", unmasked)
    whole.use(model)
    assert apart(model(input_ids=torch.arange(4, 30)[None]).logits, right) > 1e-2


@pytest.mark.parametrize(
    ("experts", "chosen", "width", "in_bfloat16", "pays"),
    [
        *((43, 10, 8, False, True), (43, 5, 8, False, False), (16, 8, 32, False, True), (16, 4, 32, False, False)),
        *((8, 4, 384, False, False), (8, 4, 384, True, True), (16, 2, 32, True, False)),
    ],
)
def test_it_pays_where_many_are_chosen_or_they_are_small(experts, chosen, width, in_bfloat16, pays):
    assert whole.pays(experts, chosen, width, in_bfloat16) == pays


@pytest.mark.parametrize(("chosen", "taken"), [(4, True), (2, False)])
def test_training_takes_it_where_it_pays(tiny, monkeypatch, chosen, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text, made = [np.arange(5, 25)], tiny("qwen2_moe", num_experts_per_tok=chosen)  # of 6, each of 32 units
    lesson = Recover().lesson("recover", made, Context(text, original=made), text)
    for model in (lesson.model, lesson.objective.teacher):
        assert (model.config._experts_implementation == whole.NAME) == taken
    assert "_experts_implementation" not in made.config.to_dict()


def test_the_forecast_holds_the_experts_that_are_computed(tiny, monkeypatch):
    """Of 6 experts of 32 units, 4 chosen: six activations of two more experts' units a token and block."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    layout, options = tiny("qwen2_moe", num_experts_per_tok=4).layout, Recover(batch=2, width=32)
    every = options.requires(layout).memory
    monkeypatch.setattr(whole, "pays", lambda *_: False)
    chosen = options.requires(layout).memory
    assert every - chosen == 4 * (2 * 32) * layout.depth * 6 * (2 * 32)
    one = options.requires(tiny("qwen2_moe", num_experts_per_tok=1).layout).memory
    assert chosen - one == 4 * (2 * 32) * layout.depth * 6 * (3 * 32)
