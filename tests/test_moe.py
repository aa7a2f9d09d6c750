"""`moe`: exact where it must be, in classes that plain transformers opens; each statement with a twin that fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.pass_ import Context
from tersor.compress.passes.moe import Moe
from tersor.compress.slicing import kept

# --- exactness --------------------------------------------------------------------------------------------------------

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
x = torch.randn(4096, 48, generator=torch.Generator().manual_seed(3))
def opened(path, dtype=torch.float32, **options):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    with torch.no_grad():
        logits = model(ids).logits.double()
    return model, {key: sorted(map(str, names)) for key, names in info.items() if names}, logits
def kept(model):
    "Share of a router's choices, by the order of its logits, that its class repeats."
    same = wanted = 0
    for name, router in model.named_modules():
        if name.endswith((".gate", ".router")) and hasattr(router, "top_k"):
            order = (x.double() @ router.weight.double().T).topk(router.top_k, dim=1).indices
            same += int((order[:, :, None] == router(x)[2][:, None]).sum())
            wanted += order.numel()
    return same / wanted
found = []
for number in range(int(sys.argv[2])):
    path = f"{sys.argv[1]}/{number}"
    exact, single = (opened(f"{path}/dense", dtype)[2] for dtype in (torch.float64, torch.float32))
    moe, wrong, logits = opened(f"{path}/all")
    routed, missing, fewer = opened(f"{path}/routed")
    more = opened(f"{path}/routed", num_experts_per_tok=4 - int(open(f"{path}/shared").read()))[2]
    found.append({"own": float((single - exact).abs().max()), "error": float((logits - exact).abs().max()),
                  "wrong": wrong | missing, "class": type(moe).__name__, "kept": kept(routed),
                  "fewer": float((fewer - exact).abs().max() / exact.abs().max()),
                  "more": float((more - exact).abs().max() / exact.abs().max())})
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, tiny, converted) -> list[dict]:
    """Every case with all experts active, and with a router among four, opened by plain transformers in another
    process."""
    root = tmp_path_factory.mktemp("exact")
    for number, (name, variant, config, options, _) in enumerate(CASES):
        checkpoint, folder = tiny(name, variant=variant, **config), root / str(number)
        checkpoint.save(folder / "dense")
        converted(checkpoint, active=4, refit=False, **options)
        checkpoint.save(folder / "all")
        checkpoint = tiny(name, variant=variant, **config)
        details = converted(checkpoint, active=2, refit=False, **options)
        checkpoint.save(folder / "routed")
        (folder / "shared").write_text(str(details["shared"]))
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
    assert found["fewer"] > 1e-2


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]}-{c[1]}-{c[4]}-{i}" for i, c in enumerate(CASES)])
def test_the_shipped_router_chooses_in_a_fresh_process_as_its_logits_say(reloaded, number):
    """And where the class lets the number of experts be changed at load, all of them are nearly the dense model."""
    found, free = reloaded[number], CASES[number][4] in ("qwen2_moe", "qwen3_moe", "glm4_moe")
    assert found["kept"] >= 0.999
    assert (found["more"] < 0.02) == free


def test_fewer_experts_differ(tiny, converted, output):
    checkpoint = tiny("llama")
    before = output(checkpoint)
    converted(checkpoint, active=2, refit=False)
    assert (output(checkpoint) - before).abs().max() > 1e-2


def test_refit_with_every_expert_changes_nothing(tiny, converted, output):
    checkpoint = tiny("llama")
    before = output(checkpoint)
    converted(checkpoint, active=4, refit=True)
    assert (output(checkpoint) - before).abs().max() < 1e-4


@pytest.mark.parametrize("source", ["llama", "qwen3"])
def test_the_shipped_router_with_every_expert_is_nearly_dense(tiny, source, converted, output):
    checkpoint = tiny(source)
    before = output(checkpoint)
    details = converted(checkpoint, active=2, refit=False)
    assert details["k_at_load"] == "free"
    off = (output(checkpoint, top_k=details["experts"]) - before).abs().max() / before.abs().max()
    assert off < 10 * max(router["weight_error"] for router in details["router"])
    assert (output(checkpoint, top_k=details["experts"] - 1) - before).abs().max() > 1e-2


# --- the router in its class ------------------------------------------------------------------------------------------


def routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith((".gate", ".router")) and hasattr(m, "top_k")}


@pytest.mark.parametrize(
    ("source", "options"), [("llama", {}), ("qwen3", {}), ("qwen3", {"shared": 0}), ("granite", {})]
)
def test_the_class_chooses_what_the_router_says(tiny, source, options, converted):
    checkpoint = tiny(source, intermediate_size=128)
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


def test_too_small_a_scale_loses_choices():
    from tersor.compress.moe.router import kept, smallest_scale

    generator = torch.Generator().manual_seed(0)
    router, x = torch.randn(12, 48, generator=generator).double(), torch.randn(4096, 48, generator=generator)
    router /= (x.double() @ router.T).std()
    scale, share = smallest_scale(router, x, "softmax", torch.float32)
    assert share >= 0.9995
    assert kept(router, scale, x, 4, "softmax", torch.float32) >= 0.9995
    assert kept(router, scale / 4, x, 4, "softmax", torch.float32) < 0.9995
    assert kept(router, 2.0**-22, x, 4, "softmax", torch.float32) < 0.95


def test_the_load_counts_what_is_chosen(tiny, converted, samples):
    from tersor.compress.calibration.batches import batches
    from tersor.compress.moe.routing import loads

    checkpoint = tiny("llama")
    converted(checkpoint, active=2)
    shares = loads(checkpoint.model(), checkpoint.layout, batches(samples(5) + samples(3, 9), checkpoint.layout))
    assert [sum(block) for block in shares] == pytest.approx([checkpoint.config.num_experts_per_tok] * 2)
    assert max(max(block) for block in shares) > min(min(block) for block in shares)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_the_same_recipe_gives_the_same_bytes(tiny, converted):
    one, other = tiny("qwen2"), tiny("qwen2")
    converted(one)
    converted(other)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_bfloat16_stays_bfloat16(tiny, converted, output):
    checkpoint = tiny("qwen3", dtype="bfloat16")
    converted(checkpoint)
    kinds = {t.dtype for n, t in checkpoint.tensors.items() if "correction" not in n}
    assert kinds == {torch.bfloat16}
    output(checkpoint)


def test_weights_that_stay_in_their_files_give_the_same_experts(tiny, tmp_path, converted, samples):
    from dataclasses import replace

    tiny("llama").save(tmp_path / "dense")
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


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("refit", [False, True])
def test_a_killed_conversion_goes_on_with_its_block(tiny, tmp_path, monkeypatch, lean, refit, samples):
    monkeypatch.setattr(kept, "EVERY", 0.0)
    tiny("llama", num_hidden_layers=4).save(tmp_path / "dense")
    converting = Moe(experts=4, active=2, compare=False, refit=refit)
    blocks: list[int] = []

    def killed(items, label):
        for number in items:
            if number == 2:
                raise KeyboardInterrupt
            yield number

    def watched(items, label):
        for number in items:
            blocks.append(number)
            yield number

    def made(name: str, track) -> tuple[Checkpoint, dict]:
        checkpoint = Checkpoint.load(tmp_path / "dense", lean=lean)
        context = Context(samples(), folder=tmp_path / name, track=track)
        converting.apply(checkpoint, context)
        return checkpoint, json.loads(json.dumps(context.details))

    with pytest.raises(KeyboardInterrupt):
        made("killed", killed)
    resumed, details = made("killed", watched)
    assert blocks == [2, 3]
    blocks.clear()
    whole, wanted = made("whole", watched)
    assert blocks == [0, 1, 2, 3]
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)
    assert {**details, "seconds": 0} == {**wanted, "seconds": 0}
