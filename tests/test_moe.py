"""`moe`: exact where it must be, in classes that plain transformers opens; each statement with a twin that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import PreflightError, RecipeError
from tersor.compress.pass_ import Context
from tersor.compress.passes.moe import Moe


def samples(count: int = 24, length: int = 16, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 100, length) for _ in range(count)]


def converted(checkpoint: Checkpoint, tokens: list[np.ndarray] | None = None, **options) -> dict:
    context = Context(tokens or samples())
    Moe(**{"experts": 4, "active": 2, "compare": False, **options}).apply(checkpoint, context)
    return context.details


@pytest.fixture
def dense(tiny):
    """`dense(model_type, variant="", **config)`: a tiny checkpoint."""
    return lambda name, variant="", **config: tiny(name, "text-generation", variant=variant, **config)


# --- exactness --------------------------------------------------------------------------------------------------

CASES = [  # source, variant, config, options, class
    ("llama", "", {}, {"target": "qwen2_moe"}, "qwen2_moe"),
    ("llama", "tied", {}, {"shared": 0}, "qwen2_moe"),
    ("llama", "wide-heads", {}, {"target": "glm4_moe"}, "glm4_moe"),
    ("llama", "", {"attention_bias": True}, {}, "granitemoeshared"),
    ("llama", "", {"intermediate_size": 60}, {"target": "mixtral"}, "mixtral"),
    ("mistral", "", {}, {}, "qwen2_moe"),
    ("mistral", "", {"sliding_window": 4}, {}, "qwen2_moe"),
    ("mistral", "", {"sliding_window": 4}, {"target": "mixtral"}, "mixtral"),
    ("qwen2", "", {}, {}, "qwen2_moe"),
    ("qwen2", "", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, {}, "qwen2_moe"),
    ("qwen3", "", {}, {}, "glm4_moe"),
    ("qwen3", "biased", {}, {"target": "qwen3_moe"}, "qwen3_moe"),
    ("granite", "", {}, {}, "granitemoeshared"),
    ("granite", "", {}, {"shared": 0}, "granitemoeshared"),
]

RELOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error(); logging.disable_progress_bar()
ids = torch.randint(4, 100, (3, 14), generator=torch.Generator().manual_seed(5))
def logits(path, dtype):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    with torch.no_grad():
        return model(ids).logits.double(), wrong, type(model).__name__
found = []
for number in range(int(sys.argv[2])):
    exact = logits(f"{sys.argv[1]}/{number}/dense", torch.float64)[0]
    single = logits(f"{sys.argv[1]}/{number}/dense", torch.float32)[0]
    moe, wrong, name = logits(f"{sys.argv[1]}/{number}/moe", torch.float32)
    found.append({"own": float((single - exact).abs().max()), "error": float((moe - exact).abs().max()),
                  "wrong": wrong, "class": name})
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, tiny) -> list[dict]:
    """Every case with all experts active, saved, and opened by plain transformers in another process."""
    root = tmp_path_factory.mktemp("exact")
    for number, (name, variant, config, options, _) in enumerate(CASES):
        checkpoint = tiny(name, "text-generation", variant=variant, **config)
        checkpoint.save(root / str(number) / "dense")
        converted(checkpoint, active=4, refit=False, **options)
        checkpoint.save(root / str(number) / "moe")
    code = [sys.executable, "-c", RELOAD, str(root), str(len(CASES))]
    answer = subprocess.run(code, capture_output=True, text=True, timeout=300, check=False, cwd=root)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert not any("tersor" in str(p) for p in Path(root).rglob("*.py"))
    return json.loads(answer.stdout.splitlines()[-1].removeprefix("FOUND "))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]}-{c[1]}-{c[4]}-{i}" for i, c in enumerate(CASES)])
def test_all_experts_are_the_dense_model_in_a_fresh_process(reloaded, number):
    found = reloaded[number]
    assert found["wrong"] == {}
    assert found["class"].lower().startswith(CASES[number][4].replace("_", ""))
    assert found["error"] <= 2 * found["own"], found


def output(checkpoint: Checkpoint, **config) -> torch.Tensor:
    ids = torch.tensor(np.stack(samples(4, seed=9)))
    model = checkpoint.model()
    for name, value in config.items():
        for module in (model, *model.modules()):
            if hasattr(module, name):
                setattr(module, name, value)
    with torch.no_grad():
        return model(ids).logits


def test_fewer_experts_differ(dense):
    checkpoint = dense("llama")
    before = output(checkpoint)
    converted(checkpoint, active=2, refit=False)
    assert (output(checkpoint) - before).abs().max() > 1e-2


def test_refit_with_every_expert_changes_nothing(dense):
    checkpoint = dense("llama")
    before = output(checkpoint)
    converted(checkpoint, active=4, refit=True)
    assert (output(checkpoint) - before).abs().max() < 1e-4


@pytest.mark.parametrize("source", ["llama", "qwen3"])
def test_the_shipped_router_with_every_expert_is_nearly_dense(dense, source):
    checkpoint = dense(source)
    before = output(checkpoint)
    details = converted(checkpoint, active=2, refit=False)
    assert details["k_at_load"] == "free"
    off = (output(checkpoint, top_k=details["experts"]) - before).abs().max() / before.abs().max()
    assert off < 10 * max(router["weight_error"] for router in details["router"])
    assert (output(checkpoint, top_k=details["experts"] - 1) - before).abs().max() > 1e-2


# --- the router in its class --------------------------------------------------------------------------------------


def routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith((".gate", ".router")) and hasattr(m, "top_k")}


@pytest.mark.parametrize(
    ("source", "options"), [("llama", {}), ("qwen3", {}), ("qwen3", {"shared": 0}), ("granite", {})]
)
def test_the_class_chooses_what_the_router_says(dense, source, options):
    checkpoint = dense(source, intermediate_size=128)
    details = converted(checkpoint, experts=16, active=6, **options)
    model, chosen, wanted = checkpoint.model(), 0, 0
    for router in routers(model).values():
        x = torch.randn(4096, 48, generator=torch.Generator().manual_seed(3))
        order = (x.double() @ router.weight.double().T).topk(details["active"], dim=1).indices
        chosen += int((order[:, :, None] == router(x)[2][:, None]).sum())
        wanted += order.numel()
    assert chosen / wanted >= 0.999
    assert all(router["kept"] >= 0.999 for router in details["router"])
    assert all(router["weight_error"] < 0.01 for router in details["router"])


def test_too_small_a_scale_loses_choices(dense):
    from tersor.compress.moe.router import kept, smallest_scale

    generator = torch.Generator().manual_seed(0)
    router, x = torch.randn(12, 48, generator=generator).double(), torch.randn(4096, 48, generator=generator)
    router /= (x.double() @ router.T).std()
    scale, share = smallest_scale(router, x, "softmax", torch.float32)
    assert share >= 0.9995
    assert kept(router, scale, x, 4, "softmax", torch.float32) >= 0.9995
    assert kept(router, scale / 4, x, 4, "softmax", torch.float32) < 0.9995
    assert kept(router, 2.0**-22, x, 4, "softmax", torch.float32) < 0.95


# --- what helps ---------------------------------------------------------------------------------------------------


def planted(checkpoint: Checkpoint, experts: int) -> Checkpoint:
    """FFNs whose units are large together by group, in a scrambled order."""
    generator = torch.Generator().manual_seed(4)
    for name, tensor in list(checkpoint.tensors.items()):
        if name.endswith("gate_proj.weight"):
            group = torch.randperm(len(tensor), generator=generator) % experts
            centres = 3 * torch.randn(experts, tensor.shape[1], generator=generator) / tensor.shape[1] ** 0.5
            checkpoint.tensors[name] = centres[group] + 0.1 * tensor
    return checkpoint


def loss(checkpoint: Checkpoint, wanted: torch.Tensor) -> float:
    return float((output(checkpoint) - wanted).square().mean())


def test_each_part_of_the_method_helps(dense):
    def made(**options) -> float:
        checkpoint = planted(dense("llama", intermediate_size=128), 8)
        wanted = output(checkpoint)
        converted(checkpoint, samples(200, 32), experts=8, active=2, **options)
        return loss(checkpoint, wanted)

    ours, plain = made(), made(refit=False)
    assert ours < plain < made(refit=False, partition="random")
    assert plain < made(refit=False, router="centre") * 1.5
    assert ours < 0.8 * made(partition="random")


def test_the_same_recipe_gives_the_same_bytes(dense):
    one, other = dense("qwen2"), dense("qwen2")
    converted(one)
    converted(other)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_bfloat16_stays_bfloat16(dense):
    checkpoint = dense("qwen3", dtype="bfloat16")
    converted(checkpoint)
    kinds = {t.dtype for n, t in checkpoint.tensors.items() if "correction" not in n}
    assert kinds == {torch.bfloat16}
    output(checkpoint)


def test_promises_hold_and_are_missed(dense):
    checkpoint = dense("llama")
    details = json.loads(json.dumps(converted(checkpoint)))
    check = Moe(4, 2).checks(details)[0]
    assert check.holds(checkpoint.config, checkpoint.tensors) is None
    checkpoint.config.num_experts_per_tok = 3
    assert "active is 3, not 1" in str(check.holds(checkpoint.config, checkpoint.tensors))


# --- partition ------------------------------------------------------------------------------------------------------


def test_balanced_groups_are_nearly_the_best(tiny):
    from tersor.compress.moe.assignment import balanced

    scipy = pytest.importorskip("scipy.optimize")
    cost = torch.rand(96, 8, generator=torch.Generator().manual_seed(1)).double()
    start = torch.arange(96) % 8
    found = balanced(cost)
    assert found.bincount().tolist() == [12] * 8
    rows, columns = scipy.linear_sum_assignment(cost.repeat_interleave(12, dim=1).numpy())
    best = float(cost.repeat_interleave(12, dim=1)[rows, columns].sum())
    reached = float(cost.gather(1, found[:, None]).sum())
    assert best <= reached <= 1.02 * best
    assert float(cost.gather(1, start[:, None]).sum()) > 2 * best


@pytest.mark.parametrize(("size", "count"), [(96, 8), (63, 7), (40, 2)])
def test_no_two_groups_gain_by_an_exchange(size, count):
    from tersor.compress.moe.assignment import balanced

    cost = -torch.rand(size, count, generator=torch.Generator().manual_seed(2)).double()

    def gain(groups: torch.Tensor) -> float:
        """The most that swapping one member each wins for any two groups."""
        own = cost.gather(1, groups[:, None])
        change = cost[:, groups] - own  # member i where member j is
        return -float((change + change.T).min())

    assert gain(balanced(cost)) < 1e-12
    assert gain(torch.arange(size) % count) > 0.1


def test_everyone_meets_everyone_once():
    from tersor.compress.moe.assignment import tournament

    for count in (2, 5, 8):
        rounds = tournament(count)
        assert all(len(set(r.flatten().tolist())) == r.numel() for r in rounds)
        met = sorted(tuple(sorted(pair)) for r in rounds for pair in r.tolist())
        assert met == [(a, b) for a in range(count) for b in range(a + 1, count)]


def test_weights_that_stay_in_their_files_give_the_same_experts(dense, tmp_path):
    from dataclasses import replace

    dense("llama").save(tmp_path / "dense")
    whole, lean = (Checkpoint.load(tmp_path / "dense", lean=late) for late in (False, True))
    assert lean.lean
    converted(whole)
    context = Context(samples(), folder=tmp_path / "state")
    judged = replace(lean, tensors=dict(lean.tensors))
    Moe(experts=4, active=2, compare=True).apply(judged, replace(context, details={}))
    Moe(experts=4, active=2, compare=False).apply(lean, context)
    assert all(torch.equal(whole.tensors[name], lean.tensors[name]) for name in whole.tensors)
    kept = {path.name.removesuffix(".safetensors") for path in (tmp_path / "state/weights").iterdir()}
    assert kept == {name for name in lean.tensors if ".mlp." in name}


def test_zeros_that_are_passed_over_change_no_sum(monkeypatch):
    from tersor.compress.calibration import lstsq

    generator = torch.Generator().manual_seed(0)
    chosen = (torch.rand(300, 5, generator=generator) < 0.3).repeat_interleave(60, dim=1)
    a, t = torch.randn(300, 300, generator=generator) * chosen, torch.randn(300, 7, generator=generator)
    weight, target = torch.rand(300, generator=generator), torch.randn(300, 7, generator=generator)

    def sums(share: float, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(lstsq, "SPARSE", share)
        fit = lstsq.Regression(300, 7, intercept=True)
        fit.add(a, targets, weight)
        return fit.gram.clone(), fit.cross

    (gram, cross), (dense_gram, dense_cross) = sums(1.0, t), sums(0.0, t)
    assert torch.allclose(gram, dense_gram, rtol=0, atol=1e-12 * float(dense_gram.abs().max()))
    assert torch.allclose(cross, dense_cross, rtol=0, atol=1e-12 * float(dense_cross.abs().max()))
    assert not torch.allclose(sums(1.0, target)[1], cross)


def test_co_activation_finds_planted_groups(dense):
    from tersor.compress.calibration.batches import batches
    from tersor.compress.calibration.side import Side
    from tersor.compress.moe.activations import Ffn, Tokens, before_ffn
    from tersor.compress.moe.cut import Cut
    from tersor.compress.moe.partition import PARTITIONS

    checkpoint = planted(dense("llama", intermediate_size=128), 8)
    data = batches(samples(40), checkpoint.layout)
    with torch.no_grad():
        side = Side.at_start(checkpoint.model(), checkpoint.layout, data)
        tokens = Tokens(Ffn.of(side.walk, 0), before_ffn(side, 0), data)
        gate = tokens.ffn.gate

        def alike(name: str) -> float:
            order = PARTITIONS[name](tokens, Cut(128, 8, 2, 0), 0)
            rows = torch.nn.functional.normalize(gate[order], dim=1).reshape(8, 16, -1)
            return float((rows @ rows.mT).mean())

        assert sorted(PARTITIONS["co-activation"](tokens, Cut(128, 8, 4, 2), 0).tolist()) == list(range(128))
        assert alike("co-activation") > 0.8 * alike("kmeans")
        assert alike("random") < 0.5 * alike("kmeans")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "config", "options", "said"),
    [
        ("llama", {}, {"experts": 5}, r"5 for an FFN of 64 units, expected a divisor of 64. Near by: 2, 4, 8"),
        ("llama", {}, {"active": 5}, "5 of 4 experts"),
        ("llama", {}, {"shared": 2}, "2 of 2 active experts"),
        ("qwen2_moe", {}, {}, "a mixture of experts already"),
        ("gpt2", {}, {"target": "mixtral"}, "whose FFN has no gate"),
        ("phi", {}, {}, "whose FFN cannot be cut"),
        ("llama", {"mlp_bias": True}, {}, "an FFN without biases"),
        ("qwen3", {}, {"target": "qwen2_moe"}, "qwen2_moe has no place for model.layers.0.self_attn"),
        ("llama", {}, {"target": "mixtral", "shared": 1}, "mixtral has no place for 1 shared experts"),
        ("mistral", {"sliding_window": 4}, {"target": "glm4_moe", "shared": 1}, "no place for attention windows of 4"),
        ("granite", {}, {"target": "qwen2_moe"}, "multipliers"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(dense, source, config, options, said):
    layout = dense(source, **config).layout
    with pytest.raises(RecipeError, match=said):
        Moe(**{"experts": 4, "active": 2, **options}).requires(layout)


def test_a_dead_expert_is_refused(dense):
    checkpoint = dense("llama")
    for name in list(checkpoint.tensors):
        if name.endswith("up_proj.weight"):
            checkpoint.tensors[name] = checkpoint.tensors[name].clone()
            checkpoint.tensors[name][2:] = 0
    with pytest.raises(PreflightError, match=r"block 0: found experts \[.*\] that no calibration token chooses"):
        converted(checkpoint, experts=32, active=1, shared=0)


def test_the_plan_is_what_comes_out(dense):
    checkpoint = dense("llama", intermediate_size=60)
    forecast = Moe(experts=4, active=3).requires(checkpoint.layout)
    assert forecast.notes[-1] == "a token uses 45 of 60 FFN units (75%)"
    converted(checkpoint, active=3)
    assert checkpoint.layout.parameters == forecast.layout.parameters


# --- what it says of itself -----------------------------------------------------------------------------------------


def test_the_details_say_what_each_number_of_experts_costs(dense):
    checkpoint = planted(dense("llama", intermediate_size=128), 8)
    details = converted(checkpoint, samples(100, 32), experts=8, active=4, compare=True)
    loss, curve = details["loss"], details["loss_by_k"]
    assert loss.keys() == {"dense", "oracle", "pruned", "experts"}
    assert [point["k"] for point in curve] == list(range(1, details["experts"] + 1))
    own = next(point for point in curve if point["k"] == details["active"])
    assert own["loss"] == pytest.approx(loss["experts"])
    assert own["active_share"] == 0.5
    assert all(len(layer) == details["experts"] for layer in details["load"])
    assert sum(details["load"][0].values()) == pytest.approx(details["active"])
    json.dumps(details)


def test_where_pruning_is_as_good_the_details_say_so(dense):
    """Random experts of an FFN whose units are all alike win nothing over units that are always there."""
    checkpoint = dense("llama", intermediate_size=128)
    details = converted(checkpoint, samples(60, 32), experts=8, active=6, shared=0, partition="random", compare=True)
    said = [line for line in details["warnings"] if "use `slice` on ffn" in line]
    assert bool(said) == (details["loss"]["pruned"] <= details["loss"]["experts"])
    assert said


def test_a_trial_is_the_loss_of_the_stored_class(dense):
    from tersor.compress.calibration.batches import batches
    from tersor.compress.calibration.loss import judge
    from tersor.compress.calibration.side import Side
    from tersor.compress.moe.convert import Method, convert
    from tersor.compress.moe.cut import Cut
    from tersor.compress.moe.trial import Trial

    checkpoint = dense("granite")
    layout, model = checkpoint.layout, checkpoint.model()
    data, judged = batches(samples(), layout), batches(samples(8, 20, seed=3), layout)
    with torch.no_grad():
        side = Side.at_start(model, layout, data)
    method = Method(weights="softmax of chosen")
    simulated = Trial(model, layout, judged).follow(
        convert(side, layout, Cut(64, 4, 2, 1), method, data, 0, lambda items, _: items)
    )
    converted(checkpoint)
    stored = judge(checkpoint.model(), None, checkpoint.layout, judged)
    assert simulated == pytest.approx(stored, rel=1e-5)
    assert abs(judge(model, None, layout, judged) - stored) > 1e-3


@pytest.mark.slow
def test_the_recipe_runs(tmp_path):
    from tersor.compress.recipe import load_recipe
    from tersor.compress.run import How, apply

    recipe = load_recipe("moe", ["data.calibration.samples=12", "data.heldout.samples=6", "data.calibration.length=64"])
    outcome = apply(recipe, How(output=tmp_path / "run", offline=True, threads=1, enforce=False))
    assert json.loads((tmp_path / "run/model/config.json").read_text("utf-8"))["model_type"] == "qwen2_moe"
    assert "loss by k" in (tmp_path / "run/report.html").read_text("utf-8")
    assert outcome.metrics["checkpoint"]["perplexity"] > outcome.metrics["original"]["perplexity"]


def test_distillation_helps_and_no_steps_change_nothing(dense):
    def made(**options) -> tuple[float, float, Checkpoint]:
        checkpoint = planted(dense("llama", intermediate_size=128), 8)
        wanted = output(checkpoint)
        details = converted(checkpoint, samples(200, 32), experts=8, active=2, **options)
        return sum(details["fit_per_layer"]["left after"]), loss(checkpoint, wanted), checkpoint

    (left, plain, one), (_, zero, other) = made(), made(distill_steps=0)
    assert zero == plain
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    less, better, third = made(distill_steps=150)
    assert less < 0.96 * left
    assert better < plain
    router = "model.layers.0.mlp.gate.weight"
    direction = torch.nn.functional.cosine_similarity(one.tensors[router], third.tensors[router], dim=1)
    assert direction.max() < 0.9999
    assert direction.min() > 0.5


def test_the_gradient_of_a_choice_is_that_of_its_edge():
    from tersor.compress.moe.distill import straight_through

    logits = torch.tensor([[3.0, 0.6, 0.4, -3.0]], requires_grad=True)
    gates = straight_through(logits, 2)
    assert gates.detach().round(decimals=6).tolist() == [[1, 1, 0, 0]]
    (gates @ torch.tensor([1.0, 1.0, 1.0, 1.0])).sum().backward()
    sure, near, almost, never = logits.grad[0].tolist()
    assert near == pytest.approx(almost)
    assert near > 100 * sure
    assert near > 100 * never


def test_distillation_without_a_refit_is_refused(dense):
    with pytest.raises(RecipeError, match="distill_steps"):
        Moe(4, 2, refit=False, distill_steps=10).requires(dense("llama").layout)


def test_recover_trains_router_and_experts_in_the_stock_class(dense):
    """From end to end: the result is nearer to the dense model, its router still tiny, and the load is told."""
    from tersor.compress.passes.recover import Recover

    original = planted(dense("llama", intermediate_size=128), 8)
    wanted, text = output(original), samples(640, 32)
    checkpoint = Checkpoint(original.layout, dict(original.tensors))
    details = converted(checkpoint, text, experts=8, active=2)
    router = "model.layers.0.mlp.gate.weight"
    before, moved = loss(checkpoint, wanted), checkpoint.tensors[router].clone()
    context = Context(text, original=original)
    Recover(steps=40, batch=16, learning_rate=1e-3).apply(checkpoint, context)
    assert loss(checkpoint, wanted) < 0.95 * before
    assert not torch.equal(checkpoint.tensors[router], moved)
    assert checkpoint.tensors[router].abs().max() < 4 * moved.abs().max()
    load = context.details["load_per_layer"]
    assert load.keys() == {f"{name} {when}" for name in ("busiest", "idlest") for when in ("before", "after")}
    assert load["busiest before"] == pytest.approx(details["load_per_layer"]["busiest"], abs=0.1)


def test_the_load_counts_what_is_chosen(dense):
    from tersor.compress.calibration.batches import batches
    from tersor.compress.moe.routing import loads

    checkpoint = dense("llama")
    converted(checkpoint, active=2)
    shares = loads(checkpoint.model(), checkpoint.layout, batches(samples(5) + samples(3, 9), checkpoint.layout))
    assert [sum(block) for block in shares] == pytest.approx([checkpoint.config.num_experts_per_tok] * 2)
    assert max(max(block) for block in shares) > min(min(block) for block in shares)
