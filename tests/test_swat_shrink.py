"""Structured zeros leave the shapes of plain models; outputs stay."""

from __future__ import annotations

import copy

import pytest
import torch
from tersor.sparse.swat import shrink, swat
from torch import nn


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, stride=2, bias=False),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1),
    )  # fmt: skip


def units() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.GELU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))


def residual() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], layer_type="basic", num_labels=4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ResNetForImageClassification(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).logits

    return Net()


def trained(make) -> tuple[nn.Module, torch.Tensor]:
    """A model after a few steps of structured training, in eval mode, and images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = make().train(), torch.randn(8, 3, 8, 8)
    with swat(model, mode="structured", weights=0.5, activations=0.5, ramp="none", exempt=(), steps=3) as training:
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            training.step()
    return model.eval(), x


@pytest.mark.parametrize("make", [convolutions, units, residual])
@torch.no_grad()
def test_zero_channels_leave_and_outputs_stay(make):
    with torch.enable_grad():
        model, x = trained(make)
    before, count = model(x), sum(p.numel() for p in model.parameters())
    removed = shrink(model)
    assert removed
    assert sum(p.numel() for p in model.parameters()) < 0.8 * count
    assert torch.allclose(model(x), before, atol=1e-5 * float(before.abs().max()))
    assert shrink(model) == {}
    assert all(model.get_submodule(name).weight.shape[0] == removed[name] for name in removed), "half of each is left"


@torch.no_grad()
def test_a_channel_that_is_read_stays():
    """The twin: filters of zeros whose norm says something are read, and stay."""
    with torch.enable_grad():
        model, x = trained(convolutions)
    other = copy.deepcopy(model)
    dead = int((model[3].weight.abs().sum((0, 2, 3)) == 0).nonzero()[0])
    other[1].bias[dead] = 1.0
    other[3].weight[:, dead] = 0.1
    before = other(x)
    assert shrink(other)["0"] == shrink(model)["0"] - 1
    assert torch.allclose(other(x), before, atol=1e-5 * float(before.abs().max()))


def test_it_trains_on_and_one_channel_always_stays():
    model = convolutions()
    with torch.no_grad():
        model[3].weight.zero_()
    assert shrink(model)["0"] == 15
    assert (model[0].out_channels, model[1].num_features, model[3].in_channels) == (1, 1, 1)
    model.train()(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_is_dense_stays_as_it_is():
    model = convolutions()
    assert shrink(model) == {}
    assert model[0].out_channels == 16
