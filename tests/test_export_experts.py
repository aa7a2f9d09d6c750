"""Mixtures of experts as ONNX: stock classes through the exporters, every form the same sum, every expert present."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tersor.compress.errors import ParityMissed, RecipeError
from tersor.compress.moe.routing import Routing
from tersor.export import parity, runtime
from tersor.export.client import Client
from tersor.export.decoder import OnnxDecoder
from tersor.export.graph.ops import CONTRIB
from tersor.export.mixture import choice, experts
from tersor.export.mixture.parity import Chosen
from tersor.export.onnx import Onnx

CLASSES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoeshared")
QUICK = {"qwen2_moe"}
each_class = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CLASSES]
)
EXPERTS, CHOSEN, HIDDEN, FFN = 6, 2, 64, 40
needs_operator = pytest.mark.skipif(not runtime.knows(choice.OPERATOR), reason="an older ONNX Runtime")


def samples(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 100, 20) for _ in range(8)]


# --- one block ----------------------------------------------------------------------------------------------------


def placeholder(act: str = "silu") -> ir.Node:
    """A node with random experts."""
    draw = np.random.default_rng(1)
    shapes = {"gate_up": (EXPERTS, 2 * FFN, HIDDEN), "down": (EXPERTS, HIDDEN, FFN)}
    stacks = [
        ir.Value(name=n, const_value=ir.tensor((draw.standard_normal(s) / s[2] ** 0.5).astype(np.float32)))
        for n, s in shapes.items()
    ]
    inputs = [ir.Value(name=name) for name in ("x", "index", "weights")]
    return ir.node("Experts", [*inputs, *stacks], {"activation": act, "chosen": CHOSEN}, domain=experts.DOMAIN)


def expected(node: ir.Node, feed: dict[str, np.ndarray]) -> np.ndarray:
    """The sum by its definition, float64."""
    gate_up, down = (experts.stored(value).astype(np.float64) for value in node.inputs[3:])
    answer = np.zeros(feed["x"].shape)
    for token, x in enumerate(feed["x"].astype(np.float64)):
        for expert, weight in zip(feed["index"][token], feed["weights"][token], strict=True):
            gate, up = np.split(gate_up[expert] @ x, 2)
            answer[token] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return answer


def run(node: ir.Node, form: experts.Form, feed: dict[str, np.ndarray]) -> np.ndarray:
    model = ir.to_proto(choice.alone(node, form)).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


FORMS = [("slices", 1e-5), ("whole", 1e-5), ("slices-int8", 0.06), ("slices-blocks", 0.04), ("whole-int8", 0.06)]
OPERATORS = [pytest.param(form, limit, marks=needs_operator) for form, limit in (("moe", 1e-5), ("qmoe", 0.04))]


@pytest.mark.parametrize(("form", "limit"), [*FORMS, *OPERATORS])
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_every_form_is_the_sum(form, limit, tokens):
    node = placeholder()
    feed = choice.drawn(node, tokens)
    feed["weights"] = np.random.default_rng(2).random(feed["weights"].shape, np.float32) + 0.1
    wanted = expected(node, feed)
    assert relative(run(node, form, feed), wanted) < limit
    moved = {**feed, "index": (feed["index"] + 1) % EXPERTS}
    assert relative(run(node, form, moved), wanted) > 0.1


@pytest.mark.parametrize("form", ["slices", "slices-int8"])
def test_one_expert_may_take_all_tokens_and_the_others_none(form):
    node = placeholder()
    feed = choice.drawn(node, 9)
    feed["index"][:] = [3, 5]
    assert relative(run(node, form, feed), expected(node, feed)) < 0.06


def test_an_eight_bit_answer_depends_on_its_token_alone():
    node, alone = placeholder(), choice.drawn(placeholder(), 1)
    feed = {name: np.repeat(value, 5, axis=0) for name, value in alone.items()}
    feed["x"][1:] *= 100
    assert np.array_equal(run(node, "slices-int8", feed)[0], run(node, "slices-int8", alone)[0])


def test_slices_are_standard_operators():
    graph = choice.alone(placeholder(), "slices").graph
    assert {node.domain for node in ir.traversal.RecursiveGraphIterator(graph)} == {""}
    eight = choice.alone(placeholder(), "slices-int8").graph
    assert CONTRIB in {node.domain for node in ir.traversal.RecursiveGraphIterator(eight)}


def test_an_activation_that_no_form_has_is_refused():
    with pytest.raises(RecipeError, match="experts with tanh"):
        choice.alone(placeholder("tanh"), "slices")


def test_the_clock_runs_every_form_at_every_size(monkeypatch):
    monkeypatch.setattr(choice, "REPEATS", dict.fromkeys(choice.TOKENS, 1))
    form, ratios = choice.measured(ir.Graph([], [], nodes=[placeholder()]), ["whole", "slices"])
    assert ratios["whole"] == dict.fromkeys(map(str, choice.TOKENS), 1.0)
    assert ratios["slices"].keys() == ratios["whole"].keys()
    assert form == choice.best(ratios)


@pytest.mark.parametrize(
    ("slices", "moe", "form"),
    [
        ((1.0, 2.0), (1.5, 1.6), "moe"),  # the larger product
        ((1.0, 2.0), (0.9, 9.0), "slices"),  # slower somewhere is out, whatever it wins elsewhere
        ((0.9, 2.0), (0.9, 9.0), "whole"),
        ((0.98, 2.0), (0.9, 9.0), "slices"),  # a clock's noise is no slowness
    ],
)
def test_the_form_that_is_taken_is_nowhere_slower(slices, moe, form):
    ratios = {"whole": (1.0, 1.0), "slices": slices, "moe": moe}
    assert choice.best({name: dict(zip("18", each, strict=True)) for name, each in ratios.items()}) == form


# --- models ---------------------------------------------------------------------------------------------------------


@each_class
def test_a_stock_class_exports_with_packed_input(name, tiny, tmp_path):
    facts = Onnx(experts="slices").write(tiny(name, "text-generation"), tmp_path, samples())
    assert facts["packing"] == "packed"
    assert facts["experts"]["form"] == "slices"
    assert len(facts["experts"]["routers"]) == facts["experts"]["layers"] == 2
    assert facts["parity"]["logits"]["error"] <= facts["parity"]["logits"]["limit"]


@each_class
def test_a_stock_class_exports_in_eight_bits(name, tiny, tmp_path):
    checkpoint = tiny(name, "text-generation", hidden_size=64)
    facts = Onnx(precision="int8", experts="slices").write(checkpoint, tmp_path, samples())
    assert facts["experts"]["form"] == "slices-int8"
    assert facts["parity"]["logits"]["packed_against_alone"] == 0
    model = ir.load(tmp_path / "model.onnx")
    products = {n.outputs[0].name: n.op_type for n in model.graph}
    assert {products[router] for router in facts["experts"]["routers"]} <= {"MatMul", "Gemm"}


@pytest.mark.parametrize("form", ["slices", "whole"])
@each_class
def test_a_stock_class_decodes(name, form, tiny, tmp_path):
    facts = OnnxDecoder(experts=form).write(tiny(name, "text-generation"), tmp_path, samples())
    assert facts["experts"]["form"] == form


@pytest.mark.slow
def test_fixed_shapes_take_the_whole(tiny, tmp_path):
    facts = Onnx(inputs="packed-static").write(tiny("qwen2_moe", "text-generation"), tmp_path, samples())
    assert facts["experts"]["form"] == "whole"


@pytest.mark.parametrize("chosen", [1, 2])
def test_all_experts_are_there_whatever_the_sample_chose(chosen, tiny, tmp_path):
    """Every token of the traced sample chooses expert 0, or 0 and 1; others are asked for afterwards."""
    checkpoint = tiny("mixtral", "text-generation", num_experts_per_tok=chosen)
    embedding = checkpoint.tensors["model.embed_tokens.weight"].clone()
    embedding[:50, 0], embedding[50:, 0] = 6.0, -6.0  # ids of the traced sample lie under 50
    checkpoint.tensors["model.embed_tokens.weight"] = embedding
    for name in list(checkpoint.tensors):
        if name.endswith("mlp.gate.weight"):
            router = 0.01 * checkpoint.tensors[name]
            router[:chosen, 0], router[chosen:, 0] = 5.0, -5.0
            checkpoint.tensors[name] = router
        if name.endswith(("post_attention_layernorm.weight", "input_layernorm.weight")):
            checkpoint.tensors[name] = checkpoint.tensors[name].abs() + 0.1
    model = checkpoint.model()
    hit: set[int] = set()
    for module in model.modules():
        if hasattr(module, "top_k") and hasattr(module, "weight"):
            module.register_forward_hook(lambda _m, _a, out: hit.update(out[2].unique().tolist()))
    with torch.no_grad():
        model(torch.arange(7)[None])
        assert hit == set(range(chosen))
        model(torch.arange(60, 70)[None])
        assert hit > set(range(chosen))
    facts = Onnx(experts="slices").write(checkpoint, tmp_path, [np.arange(60, 80)] * 2)
    assert facts["parity"]["logits"]["error"] <= facts["parity"]["logits"]["limit"]


# --- parity where experts are chosen ----------------------------------------------------------------------------------


def routers(checkpoint, factor: float = 1.0, flip: bool = False):
    """The checkpoint with its routers scaled, or with their experts in reverse."""
    for name in list(checkpoint.tensors):
        if name.endswith("mlp.gate.weight"):
            router = factor * checkpoint.tensors[name]
            checkpoint.tensors[name] = router.flip(0) if flip else router
    return checkpoint


@pytest.mark.parametrize("exporter", [Onnx(), Onnx(experts="slices", inputs="padded"), OnnxDecoder(experts="slices")])
def test_near_ties_are_judged_on_the_choices_of_the_artifact(exporter, tiny, tmp_path):
    """A router so small that probabilities tie in float32: each side may choose otherwise and neither is wrong."""
    checkpoint = routers(tiny("qwen2_moe", "text-generation"), 2.0**-22)
    figures = exporter.write(checkpoint, tmp_path, samples())["parity"]["logits"]
    assert figures["error"] <= figures["limit"] < 1e-4
    assert figures["choices_followed"] > 0


def test_ties_would_otherwise_fail_parity(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Chosen, "__call__", lambda _self, rows, _ids: [None for row in rows for _ in row])
    with pytest.raises(ParityMissed, match="parity of logits"):
        Onnx(experts="slices").write(routers(tiny("qwen2_moe", "text-generation"), 2.0**-22), tmp_path, samples())


def test_choices_that_no_rounding_explains_miss_parity(tiny, tmp_path):
    facts = Onnx(experts="slices").write(tiny("qwen2_moe", "text-generation"), tmp_path, samples())
    assert "choices_followed" not in facts["parity"]["logits"]
    with pytest.raises(ParityMissed, match="choices of experts"):
        parity.hold(routers(tiny("qwen2_moe", "text-generation"), flip=True), Client(tmp_path, threads=1), samples())


@each_class
def test_a_forward_follows_the_choices_it_is_given(name, tiny):
    checkpoint = tiny(name, "text-generation")
    model, experts_ = checkpoint.model(), checkpoint.layout.arch.experts
    shape = checkpoint.layout.families["experts"], getattr(checkpoint.config, experts_.active)
    ids = torch.tensor(np.stack(samples()))

    def run(given=None):
        with Routing(*shape, given) as routing, torch.no_grad():
            logits = model(ids).logits
        return logits, np.stack([index.numpy() for index in routing.choices])

    logits, choices = run()
    again, repeated = run(choices)
    other, _ = run((choices + 1) % shape[0])
    assert torch.equal(again, logits)
    assert np.array_equal(repeated, choices)
    assert (other - logits).abs().max() > 1e-2


def sized(tiny, hidden: int, ffn: int, experts_: int, chosen: int):
    sizes = {"hidden_size": hidden, "moe_intermediate_size": ffn, "num_experts": experts_}
    return tiny("qwen2_moe", "text-generation", **sizes, num_experts_per_tok=chosen)


@pytest.mark.parametrize(
    ("sizes", "forms"),
    [
        ((32, 16, 4, 2), ("whole", "whole-int8", "whole-blocks")),  # an expert is a few hundred weights
        ((64, 512, 4, 3), ("whole", "whole-int8", "whole-blocks")),  # three of four are chosen
        ((64, 512, 4, 1), ("slices", "whole-int8", "qmoe")),
        ((64, 512, 4, 2), ("slices", "whole-int8", "whole-blocks")),
        ((64, 4096, 4, 1), ("slices", "slices-int8", "qmoe")),
    ],
)
def test_experts_too_small_to_pass_over_stay_one_ffn(sizes, forms, tiny):
    layout = sized(tiny, *sizes).layout
    assert choice.form_of("auto", "float32", layout) == forms[0]
    assert choice.form_of("auto", "int8", layout) == forms[1]
    known = forms[2] if runtime.knows(choice.OPERATOR) else forms[2].replace("qmoe", "slices-blocks")
    assert choice.form_of("auto", "blocks", layout) == known
    for exporter, form in ((Onnx(), forms[0]), (Onnx(precision="int8"), forms[1]), (OnnxDecoder(), forms[0])):
        kept = [note for note in exporter.requires(layout).notes if "no faster than the dense model's" in note]
        assert len(kept) == form.startswith("whole")
    assert choice.form_of("slices", "float32", layout) == "slices"  # whoever asks for a form gets it
    assert len(Onnx(experts="slices").requires(layout).notes) == 1


def test_the_artifact_says_why_it_is_no_faster(tiny, tmp_path):
    small, large = sized(tiny, 32, 16, 4, 2), sized(tiny, 64, 512, 4, 1)
    said = {}
    for name, checkpoint in (("small", small), ("large", large)):
        (tmp_path / name).mkdir()
        said[name] = Onnx().write(checkpoint, tmp_path / name, samples(4))["experts"]
    assert said["small"]["form"] == "whole"
    assert "16 × 32" in said["small"]["note"]
    assert said["large"]["form"] == "slices"
    assert "note" not in said["large"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": "packed-static", "experts": "slices"}, "slices with inputs packed-static"),
        ({"precision": "int8", "experts": "operator"}, "operator, whose kernel needs silu and widths of 32"),
    ],
)
def test_forms_that_cannot_be_are_refused(tiny, options, said):
    if "operator" in options.values() and not runtime.knows(choice.OPERATOR):
        pytest.skip("an older ONNX Runtime")
    with pytest.raises(RecipeError, match=said):
        Onnx(**options).requires(tiny("qwen2_moe", "text-generation").layout)
