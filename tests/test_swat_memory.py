"""Bytes that are really kept, by autograd's hooks, against dense training of the same block."""

from __future__ import annotations

import pytest
import torch
from tersor.sparse.meters import saved_bytes
from tersor.sparse.swat import swat
from torch import nn

SCALARS = 2048
"""Bytes of thresholds, one a layer, and of the places of 256 drawn tokens."""


class Attention(nn.Module):
    """q, k and v of one input."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        found = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return x + self.o(found * 1.5)


def feed_forward(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), activation, nn.Linear(256, 64))


def conv_block(width: int = 32, inplace: bool = False) -> list[nn.Module]:
    return [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace)]


def measured(model: nn.Module, x: torch.Tensor, **words) -> float:
    """Bytes kept in sparse training over bytes kept in dense training."""
    model.train()

    def one() -> int:
        with saved_bytes(model) as found:
            y = model(x * 1.0)  # x is somebody's activation: nobody else keeps it
        y.sum().backward()
        return found.total

    dense = one()
    with swat(model, steps=1, ramp="none", **{"exempt": (), **words}):
        first = one()  # in which an activation learns who reads it
        assert first <= dense + SCALARS, "a threshold a layer, a place a token"
        return one() / dense


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("values", "limit"), [("input", 0.235), ("bfloat16", 0.135)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_at_80_percent(kind, values, limit):
    linear = kind == "linear"
    model, x = (nn.Linear(128, 64), normal(2048, 128)) if linear else (nn.Conv2d(32, 32, 3), normal(8, 32, 32, 32))
    assert measured(nn.Sequential(model), x, weights=0.8, activations=0.8, values=values) <= limit


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.GELU("tanh")])
def test_an_activation_is_kept_once(activation):
    assert measured(feed_forward(activation), normal(512, 64), activations=0.8) <= 0.55


def test_a_composed_activation_is_kept_once():
    from transformers.activations import NewGELUActivation

    assert measured(feed_forward(NewGELUActivation()), normal(512, 64), activations=0.8) <= 0.25


def test_relu_is_one_bit():
    assert measured(feed_forward(nn.ReLU()), normal(512, 64), activations=0.8) <= 0.27


@pytest.mark.parametrize(("values", "limit"), [("input", 0.51), ("bfloat16", 0.44)])
@pytest.mark.parametrize("inplace", [False, True])
def test_convolution_norm_relu(values, limit, inplace):
    """Its input, the norm's input, and its output, which the next layer reads."""
    model = nn.Sequential(*conv_block(inplace=inplace), nn.Conv2d(32, 32, 1))
    assert measured(model, normal(8, 32, 16, 16), activations=0.8, values=values) <= limit


@pytest.mark.parametrize("values", ["input", "bfloat16"])
def test_each_further_convolution_norm_relu(values):
    """The norm's input, half of a dense block, and a bit a value for the ReLU; the next layer keeps nothing."""

    def kept(blocks: int, **words) -> float:
        model = nn.Sequential(*(m for _ in range(blocks) for m in conv_block()), nn.Conv2d(32, 32, 1))
        return measured(model, normal(8, 32, 16, 16), activations=0.8, values=values) * (2 * blocks + 1)

    assert (kept(4) - kept(2)) / 4 <= 0.52


def test_readers_of_one_tensor_share_what_is_kept():
    model, x = Attention(), normal(4, 128, 64)
    with saved_bytes(model) as dense:
        _ = model(x * 1.0)
    with swat(model, steps=1, ramp="none", exempt=(), activations=0.8), saved_bytes(model) as found:
        _ = model(x * 1.0)
    n = x.numel() * 4
    assert dense.total - found.total == pytest.approx(n * 2 * (1 - 1 / 32 - 0.2), rel=0.02)  # x and the input of o


@pytest.mark.parametrize("share", [0.0, 0.01, 0.03, 0.04, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("values", ["input", "bfloat16"])
@pytest.mark.parametrize("mode", ["exact", "sampled"])
@pytest.mark.parametrize(
    "make",
    [lambda: feed_forward(nn.ReLU()), lambda: feed_forward(nn.Tanh()), lambda: feed_forward(nn.Softmax(-1)),
     lambda: feed_forward(nn.Dropout(0.5)), lambda: feed_forward(nn.LayerNorm(256)), lambda: feed_forward(nn.GELU()),
     Attention],
)  # fmt: skip
def test_never_more_than_dense(make, mode, values, share):
    with torch.random.fork_rng(devices=[]):
        model, x = make(), normal(4, 64, 64)
        for exempt in ((), ("last",)):
            words = {"mode": mode, "weights": 0.5, "activations": share, "values": values, "exempt": exempt}
            if exempt == () or isinstance(model, nn.Sequential):
                assert measured(model, x, **words) <= 1 + SCALARS / (x.numel() * 4)


def test_keeping_zeros_saves_nothing():
    """The twin, as the published code does it: a dense tensor with zeros in it."""
    model, x = nn.Linear(128, 64), normal(512, 128)
    with saved_bytes(model) as found:
        _ = model(x.masked_fill(x.abs() < 1.28, 0))
    assert found.total == x.numel() * 4
