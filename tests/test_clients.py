"""Stock clients open what we write, each in a virtual environment of its own (`make test-clients`).

optimum-onnx pins transformers < 4.58, so it cannot live beside tersor; it reads the artifact and nothing of ours.
TERSOR_CLIENTS names the environment's python; without it the tests are skipped.
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
from tersor.export.decoder import OnnxDecoder
from tersor.export.onnx import Onnx

PYTHON = os.environ.get("TERSOR_CLIENTS", "")
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not PYTHON, reason="TERSOR_CLIENTS names no python with optimum-onnx; make test-clients"),
]

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


def client(script: str, *arguments: str) -> Any:
    """What the script prints last, in the clients' environment."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [PYTHON, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def greedy(checkpoint: Checkpoint, prompt: list[int]) -> list[int]:
    with torch.no_grad():
        out = checkpoint.model(torch.float32).generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llama", {"head_dim": 8}), ("llama", {}), ("gpt2", {})],
    ids=["llama-sliced", "llama-odd-heads", "gpt2"],
)
def test_optimum_generates_the_same_tokens(tiny: Any, tmp_path: Path, model_type: str, config: dict[str, Any]) -> None:
    checkpoint = tiny(model_type, **config)
    OnnxDecoder().write(checkpoint, tmp_path, [])
    rows = [[5, 17, 42, 9, 60], [33, 4]]
    assert client(GENERATE, str(tmp_path), json.dumps(rows)) == [greedy(checkpoint, row) for row in rows]


def test_optimum_extracts_the_same_features(tiny: Any, tmp_path: Path) -> None:
    checkpoint = tiny("bert", "feature-extraction")
    Onnx(opset=23).write(checkpoint, tmp_path, [])
    ids = np.random.default_rng(0).integers(5, 60, (2, 9))
    with torch.no_grad():
        expected = checkpoint.model()(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    found = np.array(client(FEATURES, str(tmp_path), json.dumps(ids.tolist())))
    np.testing.assert_allclose(found, expected, atol=1e-4)
