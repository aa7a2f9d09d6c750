"""What docs/training.md and docs/swat.md show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tersor.compress import load_recipe
from tersor.compress.train import Training
from torch import nn

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The page's pieces of code."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


def run(code: str, **given: Any) -> dict[str, Any]:
    exec(compile(code, "docs", "exec"), given)
    return given


@pytest.mark.parametrize("page", ["training.md", "swat.md"])
def test_recipes_are_read(page, small_recipe):
    (fragment,) = blocks(page, "yaml")
    assert len(load_recipe(small_recipe(fragment)).passes) == 2
    with pytest.raises(Exception, match=r"stepz"):
        load_recipe(small_recipe(fragment.replace("steps", "stepz")))


def test_training_by_hand(save_tiny, tmp_path, monkeypatch):
    (code,) = blocks("training.md", "python")
    monkeypatch.chdir(tmp_path)
    for name in ("small", "original"):
        save_tiny("llama").rename(name)
    assert "Training(steps=300, batch=4)" in code
    generator = np.random.default_rng(0)
    texts = [generator.integers(5, 90, n) for n in (20, 13, 7, 17)]
    found = run(
        code.replace("Training(steps=300, batch=4)", "short"), sequences=texts, short=Training(steps=3, batch=2)
    )
    assert found["done"].steps == 3
    assert (tmp_path / "recovered" / "model.safetensors").exists()


def test_sparse_training_in_a_plain_loop():
    (loop, *_) = blocks("swat.md", "python")
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 6, generator=generator), torch.zeros(8, dtype=torch.long)) for _ in range(4)]
    found = run(
        loop.replace("steps=1000", "steps=4"),
        model=model, batches=batches, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam(model.parameters()),
    )  # fmt: skip
    assert found["training"].number == 4
    assert float((model[2].weight == 0).float().mean()) == pytest.approx(0.8, abs=0.01)


def test_sparse_training_in_a_trainer(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    code = blocks("swat.md", "python")[1]
    ids = torch.arange(5, 21)
    args = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    model = tiny("llama").model().requires_grad_(True)
    data = [{"input_ids": ids, "labels": ids}] * 16
    with torch.random.fork_rng():
        found = run(code, Trainer=Trainer, model=model, args=args, data=data)
    assert found["trainer"].state.global_step == 4
    assert (tmp_path / "checkpoint-2" / "swat.safetensors").exists()


def test_sparse_training_and_a_smaller_model():
    code = blocks("swat.md", "python")[2]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 6, 3),
        nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip
    assert run(code, model=model)["removed"] == {"2": 7}
    assert model[2].weight.shape == (3, 8, 3, 3)
