"""Sparse training over steps: what is sparse when, what is exempt, what a resumed run has, what is left at the end."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tersor.compress.errors import RecipeError
from tersor.sparse.meters import measure
from tersor.sparse.swat import SparseTraining, Sparsity, swat
from tersor.sparse.swat.callback import STATE, SwatCallback
from tersor.sparse.swat.density import spread
from tersor.sparse.swat.groups import groups_of
from torch import nn


def mlp(seed: int = 0, width: int = 48) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 4),
        )  # fmt: skip


def batch(step: int, rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 20, generator=g)
    return x, (x[:, :4] ** 2).argmax(1)


def train(model: nn.Module, training: SparseTraining, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        training.step()


MODES = {
    "exact": Sparsity(weights=0.8, activations=0.8, period=3),
    "exact, momentum": Sparsity(weights=0.8, activations=0.5, period=3, distribution="momentum", values="bfloat16"),
    "sampled": Sparsity(mode="sampled", weights=0.5, activations=0.8, period=3),
    "structured": Sparsity(mode="structured", weights=0.7, activations=0.5, period=3, exempt=("last",)),
}


@pytest.mark.parametrize("at", [7, 9, 16])
@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_identical(mode, at):
    def finish(interrupted: bool) -> dict[str, torch.Tensor]:
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        with swat(model, MODES[mode], steps=24) as training:
            train(model, training, optimizer, 0, at)
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
            if not interrupted:
                train(model, training, optimizer, at, 24)
        if interrupted:
            model = mlp(seed=9)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            with swat(model, MODES[mode], steps=24) as training:
                training.load_state_dict(state[2])
                train(model, training, optimizer, at, 24)
        return model.state_dict()

    whole, resumed = finish(False), finish(True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


@pytest.mark.parametrize("mode", ["exact", "structured"])
def test_resume_without_the_state_differs(mode):
    """The twin: thresholds and units are not a function of the weights at the moment of resuming."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with swat(model, MODES[mode], steps=24) as training:
        train(model, training, optimizer, 0, 10)
        kept = training.state_dict()
        fresh = SparseTraining(model, MODES[mode], 24).state_dict()
    assert any(name not in fresh or not torch.equal(fresh[name], tensor) for name, tensor in kept.items())
    with pytest.raises(RecipeError, match=r"swat: state: found no state of [06]"):
        SparseTraining(mlp(), Sparsity(exempt=()), 24).load_state_dict(kept)


def test_the_ramp_is_cubic_over_its_share():
    options = Sparsity(weights=0.8)
    assert options.share(0, 100) == 0
    assert options.share(25, 100) == pytest.approx(0.8 * (1 - 0.5**3))
    assert options.share(50, 100) == options.share(99, 100) == pytest.approx(0.8)
    assert Sparsity(weights=0.8, ramp="none").share(0, 100) == 0.8


@pytest.mark.parametrize("mode", MODES)
def test_masks_become_zeros_and_forwards_come_back(mode):
    model = mlp()
    with swat(model, MODES[mode], steps=12) as training:
        train(model, training, torch.optim.Adam(model.parameters(), lr=1e-2), 0, 12)
        training.refresh(final=True)
        inside = model(batch(99)[0])
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.allclose(model(batch(99)[0]), inside, atol=1e-5)
    weights = {n: p for n, p in model.named_parameters() if n in ("2.weight", "4.weight")}
    zeros = sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
    if mode != "structured":
        assert zeros == pytest.approx(MODES[mode].weights, abs=1e-3)
    assert bool((model[6].weight != 0).all()), "the last layer is exempt"


def test_an_exception_leaves_the_model_as_it_was_but_trained():
    model = mlp()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), swat(model, steps=12, ramp="none"):
        _ = 1 / 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_exempt_by_name_pattern_and_place():
    assert list(SparseTraining(mlp(), Sparsity(), 9).layers) == ["2", "4"]
    assert list(SparseTraining(mlp(), Sparsity(exempt=()), 9).layers) == ["0", "2", "4", "6"]
    assert list(SparseTraining(mlp(), Sparsity(exempt=("4", "re:^[06]$")), 9).layers) == ["2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exempt": ("re:attention",)}, "found 're:attention', which matches no layer, expected a name like '0'"),
        ({"exempt": ("re:(",)}, "expected a regular expression"),
        ({"exempt": ("re:.",)}, "found all 4 layers"),
        ({"mode": "structured", "on": ("heads",)}, "of which this model has none"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(RecipeError, match=message), swat(mlp(), steps=3, **options):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 0.0, "activations": 0.0}, "both 0"),
        ({"mode": "structured", "weights": 0.0}, "use mode 'sampled'"),
        ({"mode": "structured", "distribution": "erk"}, "one size for all blocks"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sparsity(**options)


@pytest.mark.parametrize("share", [-0.1, 1.0, 50, float("nan")])
def test_a_share_outside_0_and_1_is_refused(share):
    with pytest.raises(ValueError, match="weights"):
        Sparsity(weights=share)


def test_every_distribution_drops_the_same_in_all():
    sizes = {"a": 100, "b": 10_000, "c": 2_000}
    for weights in ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.9, "b": 0.02, "c": 0.1}, {"a": 1.0, "b": 0.0, "c": 5.0}):
        for share in (0.0, 0.3, 0.8, 0.99):
            found = spread(share, sizes, weights)
            dropped = sum(found[n] * sizes[n] for n in sizes)
            assert dropped == pytest.approx(share * sum(sizes.values()), abs=1e-6)
            assert all(0 <= s <= 1 for s in found.values())
    assert spread(0.8, sizes, {"a": 0.9, "b": 0.02, "c": 0.1})["a"] == 0.0


def test_erk_spares_small_layers():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 256), nn.Linear(256, 256))
    layers = SparseTraining(model, Sparsity(weights=0.97, distribution="erk", ramp="none", exempt=()), 9).layers
    assert layers["0"].share < layers["1"].share < layers["2"].share


def test_momentum_gives_weights_to_layers_with_large_gradients():
    model = mlp()
    options = Sparsity(distribution="momentum", ramp="none", period=2)
    with swat(model, options, steps=20) as training:
        assert training.layers["2"].share == training.layers["4"].share == 0.8
        train(model, training, torch.optim.SGD(model.parameters(), lr=0.1), 0, 4)
        two, four = training.layers["2"], training.layers["4"]
        assert (two.share < four.share) == (two.gradient > four.gradient)
        assert two.share != four.share


def conv_net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip
        return model.train()


def test_structured_convolutions_are_the_masked_ones():
    """All tokens drawn: loss, gradients and running statistics are those of a dense net with dead channels zero."""
    model, twin = conv_net().double(), conv_net().double()
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = Sparsity(mode="structured", weights=0.5, activations=0.0, ramp="none", exempt=("last",))
    with swat(model, options, steps=1) as training:
        assert [g.size for g in training.groups] == [16, 16]
        ours = model(x)
        ours.pow(2).sum().backward()
        dead = {name: ~live for name, live in training.live.items()}
    for name, layer, norm in (("0", twin[0], twin[1]), ("3", twin[3], twin[4])):
        for tensor in (layer.weight, layer.bias, norm.weight, norm.bias):
            tensor.data[dead[name]] = 0
    theirs = twin(x)
    theirs.pow(2).sum().backward()
    assert torch.allclose(ours, theirs)
    live, before = ~dead["3"], ~dead["0"]
    for mine, its in zip(model[4].parameters(), twin[4].parameters(), strict=True):
        assert torch.allclose(mine.grad[live], its.grad[live])
    assert torch.allclose(model[3].weight.grad[live][:, before], twin[3].weight.grad[live][:, before])
    assert torch.allclose(model[4].running_var[~dead["3"]], twin[4].running_var[~dead["3"]])
    assert bool((model[4].running_var[dead["3"]] == 1).all()), "nobody normalised dead channels"


STRUCTURED = [("llama", ("ffn", "heads")), ("vit", ("ffn", "heads")), ("gpt2", ("ffn",))]


@pytest.mark.parametrize(("model_type", "on"), STRUCTURED)
def test_structured_transformers_are_the_masked_ones_and_run_smaller_products(model_type, on, tiny):
    checkpoint = tiny(model_type)
    model = checkpoint.model().double().requires_grad_()
    if model_type == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()}
    else:
        inputs = {"input_ids": torch.arange(24).view(2, 12) + 4}
    options = Sparsity(mode="structured", weights=0.5, activations=0.0, ramp="none", exempt=("last",), on=on)
    with swat(model, options, steps=1) as training:
        inside = model(**inputs)[0]
        flops = measure(lambda: model(**inputs)[0].sum().backward(), training)
    assert torch.allclose(model(**inputs)[0], inside), "masks became zeros"
    assert flops.realised < 0.8 * flops.dense
    assert flops.counted == pytest.approx(flops.realised, rel=0.12 if "heads" in on else 1e-6)  # attention shrinks too


def test_a_transformer_inside_another_module_has_its_groups(tiny):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny("llama").model()

    assert [g.name for g in groups_of(Wrapped(), ("ffn",))] == ["inner.ffn0", "inner.ffn1"]


def test_counted_and_realised():
    model, (x, y) = mlp(), batch(0)

    def step() -> None:
        nn.functional.cross_entropy(model(x), y).backward()

    dense = measure(step)
    parts = {"0": 2 * 20 * 48, "2": 3 * 48 * 48, "4": 3 * 48 * 48, "6": 3 * 48 * 4}
    assert dense.dense == dense.counted == dense.realised == 2 * 40 * sum(parts.values())
    for drop, left_out in (("all", 2 * 0.5), ("stored", 0.5)):  # behind GELU, whose input is kept, nothing is dropped
        model = mlp()
        with swat(model, steps=1, ramp="none", weights=0.75, activations=0.5, drop=drop) as training:
            step()  # tells ReLU who reads it
            exact = measure(step, training)
        assert exact.realised == exact.dense == dense.dense, "masks do not make a product smaller"
        assert exact.counted == dense.dense - 2 * 40 * 48 * 48 * (2 * 2 * 0.75 + left_out)
    with swat(mlp(), steps=1, ramp="none", mode="sampled", weights=0.0, activations=0.75) as training:
        model = training.model
        sampled = measure(step, training)
    assert sampled.counted == sampled.realised == dense.dense - 2 * 40 * 2 * 48 * 48 * 0.75


def test_units_leave_and_return_by_their_norm():
    (group,) = groups_of(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), ("channels",))
    first, second = torch.ones(6, 4), torch.ones(3, 6)
    first[2], second[:, 2], second[:, 5] = 10, 0.05, 3
    scores = group.scores({"0": first, "2": second})
    assert scores.argsort(descending=True).tolist()[0] == 5
    assert scores.argmin() == 2
    assert float(scores[0]) == pytest.approx(math.sqrt(4) * math.sqrt(3))


def test_the_callback_trains_resumes_and_hardens(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs the extra `train`")
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": x, "labels": int(y)} for step in range(4) for x, y in zip(*batch(step), strict=True)]

    def run(resume: bool) -> tuple[Model, SwatCallback]:
        model, callback = Model(), SwatCallback(Sparsity(weights=0.6, activations=0.6, period=3))
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=14, save_steps=7, per_device_train_batch_size=16, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            Trainer(model, args, train_dataset=data, callbacks=[callback]).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-7") if resume else None
            )
        return model, callback

    whole, _ = run(False)
    assert (tmp_path / "checkpoint-7" / STATE).is_file()
    resumed, _ = run(True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert float((whole.net[2].weight == 0).float().mean()) == pytest.approx(0.6, abs=1e-3)
