"""Zeros leave the products of a graph and its answers stay; what is still heard stays too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tersor.export.graph import trace, zeros
from torch import nn

onnxruntime = pytest.importorskip("onnxruntime")


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Twice(nn.Module):
    """What its first layer makes is read by two others."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x):
        made = torch.relu(self.first(x))
        return self.second(made) + self.third(made)


def plain(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), activation, nn.Linear(64, 32))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1),
    )  # fmt: skip


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1 if tensor.ndim == 1 else
                         torch.randn(tensor.shape, generator=generator) * 0.2)  # fmt: skip
    return model.eval()


def traced(model: nn.Module, x: torch.Tensor):
    return trace.trace(model, [x], ["x"], ["y"], 23, axes={0: "batch"})


def run(graph, x: torch.Tensor, folder) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    trace.save(graph, folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


def check(model: nn.Module, x: torch.Tensor, folder, expected: dict[str, int]) -> int:
    """The rewritten graph answers as the model does; returns how many weights it holds."""
    graph = traced(model, x)
    assert zeros.shrink(graph) == expected
    with torch.no_grad():
        truth = model(x).numpy()
    assert float(np.abs(run(graph, x, folder) - truth).max()) <= 1e-5 * float(np.abs(truth).max())
    return sum(v.const_value.size for v in graph.graph.initializers.values())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Sigmoid()])
@pytest.mark.parametrize("shape", [(5, 7, 32), (5, 32)])
def test_units_that_nobody_listens_to_leave(activation, shape, tmp_path):
    model = seeded(plain(activation))
    whole = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model[2].weight[:, 5:53] = 0
    left = check(model, torch.randn(shape), tmp_path, {"units": 48, "gathered": 0, "grouped": 0})
    assert left <= whole - 48 * (32 + 1 + 32) + 8  # an activation's own constants


def test_a_gate_and_what_it_multiplies_shrink_together(tmp_path):
    model = seeded(Gated())
    with torch.no_grad():
        model.down.weight[:, ::2] = 0
    assert check(model, torch.randn(3, 4, 32), tmp_path, {"units": 32, "gathered": 0, "grouped": 0}) < 3 * 32 * 32 + 200


def test_filters_leave_with_their_norm(tmp_path):
    model = seeded(convolutions())
    with torch.no_grad():
        model[3].weight[:, 4:] = 0
        model[5].weight[:, :3] = 0
    check(model, torch.randn(2, 8, 10, 10), tmp_path, {"units": 15, "gathered": 0, "grouped": 0})


def test_what_is_read_elsewhere_is_gathered(tmp_path):
    model = seeded(Twice())
    with torch.no_grad():
        model.second.weight[:, 10:] = 0
    check(model, torch.randn(2, 3, 32), tmp_path, {"units": 0, "gathered": 1, "grouped": 0})


def test_groups_of_outputs_with_inputs_of_their_own(tmp_path):
    model = seeded(nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    keep = torch.zeros(8, 64, dtype=torch.bool)
    for group in range(8):
        keep[group, torch.randperm(64, generator=torch.Generator().manual_seed(group))[:13]] = True
    with torch.no_grad():
        model[0].weight.mul_(keep.repeat_interleave(8, 0))
    left = check(model, torch.randn(2, 3, 64), tmp_path, {"units": 0, "gathered": 0, "grouped": 1})
    assert left == 64 * 13 + 8 * 13 + 64


def test_scattered_zeros_and_no_zeros_change_nothing(tmp_path):
    for share in (0.0, 0.8):
        model = seeded(plain(nn.ReLU()))
        with torch.no_grad():
            for layer in (model[0], model[2]):
                mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) >= share
                layer.weight.mul_(mask)
        check(model, torch.randn(2, 3, 32), tmp_path, {"units": 0, "gathered": 0, "grouped": 0})


def test_one_weight_that_listens_keeps_a_unit(tmp_path):
    model = seeded(plain(nn.ReLU()))
    with torch.no_grad():
        model[2].weight[:, 5:53] = 0
        model[2].weight[7, 20] = 1e-30
    check(model, torch.randn(2, 3, 32), tmp_path, {"units": 47, "gathered": 0, "grouped": 0})


def test_a_wrong_unit_would_show(tmp_path):
    """The twin: another column than the zero one is taken."""
    model = seeded(plain(nn.ReLU()))
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        truth = model(x).numpy()
        model[2].weight[:, 5] = 0
    graph = traced(model, x)
    zeros.shrink(graph)
    assert float(np.abs(run(graph, x, tmp_path) - truth).max()) > 1e-3 * float(np.abs(truth).max())
