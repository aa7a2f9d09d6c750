"""`moe` with `dynamic`: tokens and blocks differ in the number of experts, one budget holds, ONNX chooses the same."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tersor.compress.calibration.batches import batches
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import RecipeError
from tersor.compress.moe.dynamic import threshold
from tersor.compress.moe.own import RoutedFfn
from tersor.compress.moe.routing import Routing, loads
from tersor.compress.passes.moe import Moe
from tersor.compress.tokens import Tokens
from tersor.export.client import Client
from tersor.export.decoder import OnnxDecoder
from tersor.export.mixture import choice, experts
from tersor.export.mixture.parity import Chosen
from tersor.export.onnx import Onnx

CASES = [("bert", "feature-extraction"), ("gpt2", "text-generation"), ("opt", "text-generation")]
each = pytest.mark.parametrize(("name", "task"), CASES, ids=[name for name, _ in CASES])
FORMS = [*((*case, "slices") for case in CASES), (*CASES[0], "whole")]
EXPERTS, ACTIVE, SHARED = 8, 3, 1


@pytest.fixture(scope="module")
def converted(converted, samples):
    """As elsewhere, under a budget and on more text."""
    return partial(converted, text=samples(96, 32), experts=EXPERTS, active=ACTIVE, shared=SHARED, dynamic=True)


def average(checkpoint: Checkpoint, text: list[np.ndarray], score: float | None = None) -> list[float]:
    """Routed experts that a token chooses, by block."""
    model = checkpoint.model()
    for module in model.modules():
        if score is not None and isinstance(module, RoutedFfn):
            module.null_score = score
    return [sum(block) for block in loads(model, checkpoint.layout, batches(text, checkpoint.layout))]


@each
def test_the_saved_class_spends_the_budget(name, task, tiny, tmp_path, converted, samples):
    text = samples(96, 32)
    checkpoint = tiny(name, task)
    details = converted(checkpoint)
    checkpoint.save(tmp_path)
    again = Checkpoint.load(tmp_path, task)
    found = average(again, text)
    assert sum(found) / len(found) == pytest.approx(ACTIVE - SHARED, rel=0.02)
    assert [(SHARED + k) / EXPERTS for k in found] == pytest.approx(details["active_per_layer"], abs=0.01)
    assert again.config.num_experts_per_tok == details["active"] == 2 * ACTIVE - SHARED
    loose, strict = (sum(average(again, text, score)) for score in (-1.0, 1.0))
    assert strict < 0.9 * sum(found) < 0.9 * 0.9 * loose


def test_tokens_and_blocks_differ(tiny, converted, samples):
    checkpoint = tiny("bert", "feature-extraction")
    name = "encoder.layer.1.intermediate.dense.weight"  # in one block few units do all the work
    checkpoint.tensors[name] = checkpoint.tensors[name].clone()
    checkpoint.tensors[name][:24] *= 6
    text = samples(96, 32)
    converted(checkpoint)
    with Routing.of(checkpoint.layout) as routing, torch.no_grad():
        checkpoint.model()(torch.tensor(np.stack(text)))
    counts = [(choices < EXPERTS - SHARED).sum(1).double() for choices in routing.choices]
    assert counts[0].mean() > 1.15 * counts[1].mean()
    assert all(count.std() > 0.3 for count in counts)
    converted(fixed := tiny("bert", "feature-extraction"), dynamic=False)
    with Routing.of(fixed.layout) as routing, torch.no_grad():
        fixed.model()(torch.tensor(np.stack(text)))
    assert all(choices.shape[1] == ACTIVE - SHARED for choices in routing.choices)
    assert all(int(choices.max()) < EXPERTS - SHARED for choices in routing.choices)


def test_unequal_tokens_gain_by_it(tiny, converted):
    """Where half of the tokens need the FFN and half do not, a budget loses less than so many for each."""

    def left(**options) -> float:
        checkpoint = tiny("gpt2", "text-generation")
        embedding = checkpoint.tensors["transformer.wte.weight"].clone()
        embedding[:, 0] = torch.where(torch.arange(len(embedding)) % 2 == 0, 2.0, -2.0)
        checkpoint.tensors["transformer.wte.weight"] = embedding
        for name in list(checkpoint.tensors):
            if name.endswith("c_fc.weight"):
                rows = 2 * checkpoint.tensors[name]
                rows[0] = rows[0].abs() + 0.5  # where the first coordinate is negative, hardly a unit opens
                checkpoint.tensors[name] = rows
        details = converted(checkpoint, **options)
        return sum(details["fit_per_layer"]["left after"])

    assert left() < 0.9 * left(dynamic=False)


def test_raising_every_block_of_a_model_changes_no_allotment(tiny, converted):
    """The price is in shares of a block's own energy: twice the down projection needs no more experts."""

    def shares(factor: float) -> list[float]:
        checkpoint = tiny("bert", "feature-extraction")
        for name in ("encoder.layer.1.output.dense.weight", "encoder.layer.1.output.dense.bias"):
            checkpoint.tensors[name] = factor * checkpoint.tensors[name]
        return converted(checkpoint)["active_per_layer"]

    assert shares(2.0) == pytest.approx(shares(1.0), abs=0.02)


def test_a_threshold_is_exceeded_as_often_as_asked():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for count in (0, 1, 37, 999, 1000):
        assert int((values > threshold(values, count)).sum()) == count
    assert int((values > threshold(values, 37) - 0.1).sum()) > 37


# --- the same choices in ONNX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "task", "form"), FORMS)
def test_the_artifact_chooses_as_the_model_does(name, task, form, tiny, tmp_path, converted, samples):
    text = samples(96, 32)
    checkpoint = tiny(name, task)
    converted(checkpoint)
    facts = Onnx(experts=form).write(checkpoint, tmp_path, text[:8])
    assert facts["experts"]["form"] == form
    assert all(figures["error"] <= figures["limit"] for figures in facts["parity"].values())
    with Routing.of(checkpoint.layout) as routing, torch.no_grad():
        checkpoint.model()(torch.tensor(text[0][None]))
    (found,) = Chosen(Client(tmp_path, threads=1))([[0]], [Tokens.of(text[0])])
    wanted = np.stack([choices.numpy() for choices in routing.choices])
    assert np.array_equal(np.sort(found, 2), np.sort(wanted, 2))
    assert (wanted == EXPERTS - SHARED).any()


@pytest.mark.slow
def test_it_decodes_and_runs_in_eight_bits(tiny, tmp_path, converted, samples):
    checkpoint = tiny("gpt2", "text-generation")
    converted(checkpoint)
    for name in ("decoder", "int8"):
        (tmp_path / name).mkdir()
    decoder = OnnxDecoder(experts="slices").write(checkpoint, tmp_path / "decoder", samples(8))
    assert decoder["experts"]["form"] == "slices"
    small = Onnx(precision="int8", experts="slices").write(checkpoint, tmp_path / "int8", samples(8))
    assert small["experts"]["form"] == "slices-int8"


@pytest.mark.parametrize("form", ["slices", "whole", "slices-int8", "whole-int8"])
def test_no_expert_adds_nothing(form):
    """Tokens that choose none, some and all, in every form."""
    import onnx_ir as ir
    import onnxruntime

    draw, (count, width, ffn) = np.random.default_rng(0), (4, 32, 16)
    shapes = {"up": (count, ffn, width), "down": (count, width, ffn), "bias": (count, ffn)}
    arrays = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    stacks = [ir.Value(name=name, const_value=ir.tensor(array)) for name, array in arrays.items()]
    attributes = {"activation": "relu", "chosen": count, "nulls": count}
    inputs = [ir.Value(name=name) for name in ("x", "index", "weights")]
    node = ir.node("Experts", [*inputs, *stacks], attributes, domain=experts.DOMAIN)
    session = onnxruntime.InferenceSession(ir.to_proto(choice.alone(node, form)).SerializeToString())
    index = np.array([[4, 4, 4, 4], [2, 4, 4, 4], [3, 0, 4, 4], [1, 0, 2, 3]])
    x = draw.standard_normal((4, width)).astype(np.float32)

    def wanted(token: int) -> np.ndarray:
        opened = [np.maximum(arrays["up"][e] @ x[token] + arrays["bias"][e], 0) for e in index[token] if e < count]
        return sum((arrays["down"][e] @ h for e, h in zip(index[token], opened, strict=False)), np.zeros(width))

    (found,) = session.run(None, {"x": x, "index": index, "weights": np.ones(index.shape, np.float32)})
    assert np.array_equal(found[0], np.zeros(width))
    limit = 1e-5 if "int8" not in form else 0.05
    for token in range(1, 4):
        assert np.abs(found[token] - wanted(token)).max() < limit * np.abs(wanted(token)).max()
    assert np.abs(found[1] - wanted(2)).max() > 0.1


# --- what it says, and what it refuses ----------------------------------------------------------------------------


def test_the_details_say_what_a_threshold_costs(tiny, converted):
    details = converted(tiny("bert", "feature-extraction"), compare=True)
    curve = details["loss_by_threshold"]
    assert [point["threshold"] for point in curve] == sorted(point["threshold"] for point in curve)
    spent = [point["active_share"] for point in curve]
    assert spent == sorted(spent, reverse=True)
    assert curve[0]["loss"] < curve[-1]["loss"]
    own = next(point for point in curve if point["threshold"] == 0)
    assert own["loss"] == pytest.approx(details["loss"]["experts"])
    assert details["loss"]["experts"] > 1e-4  # against the dense model, not itself


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("llama", {}, "moe: dynamic: found llama, whose FFN has a gate"),
        ("bert", {"active": EXPERTS}, "every expert active"),
        ("bert", {"most": SHARED}, "1 experts where 3 are active on average"),
        ("bert", {"most": 2}, "2 experts where 3 are active on average"),
        ("bert", {"most": 9}, "9 experts where 3 are active on average"),
        ("bert", {"dynamic": False, "most": 4}, "4 without dynamic"),
    ],
)
def test_what_cannot_be_dynamic_is_refused(source, options, said, tiny):
    task = "text-generation" if source == "llama" else "feature-extraction"
    given = {"experts": EXPERTS, "active": ACTIVE, "shared": SHARED, "dynamic": True, **options}
    with pytest.raises(RecipeError, match=said):
        Moe(**given).requires(tiny(source, task).layout)
