"""The pytest plugin in a toy repository of its own: pytest in a fresh process, a real model, a planted regression."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

TEST = """
def test_model(accuracy_gate):
    accuracy_gate("model", data="heldout.txt", length=48, samples=12, max_increase={"perplexity": "2%"})
"""


class Toy:
    """A repository with a model, text and a suite."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]):
        self.root, self.site, self._capsys = root, root / "site", capsys
        if not any(found.name == "tersor" for found in entry_points(group="pytest11")):
            # An editable install from before the plugin does not name it: say what a fresh one says.
            told = self.site / "tersor_plugin-0.dist-info"
            told.mkdir(parents=True)
            (told / "METADATA").write_text("Metadata-Version: 2.1\nName: tersor-plugin\nVersion: 0\n")
            (told / "entry_points.txt").write_text("[pytest11]\ntersor = tersor.compress.pytest_plugin\n")

    @property
    def baseline(self) -> Path:
        return self.root / "tests" / "accuracy" / "test_toy.test_model.json"

    def write(self, text: str) -> None:
        (self.root / "tests" / "test_toy.py").write_text(textwrap.dedent(text))

    def pytest(self, *arguments: str) -> tuple[int, str]:
        """In a process of its own, as users run it: exit code and what it prints."""
        path = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTEST_ADDOPTS": "", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def here(self, *arguments: str) -> tuple[int, str]:
        """The same in this process, which has imported torch already."""
        self._capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            patch.syspath_prepend(str(self.site))
            patch.setenv("PYTEST_ADDOPTS", "")
            patch.setattr(sys, "dont_write_bytecode", True)  # a file rewritten within a second looks unchanged
            for name in [name for name in sys.modules if name.endswith("test_toy")]:
                patch.delitem(sys.modules, name)
            plain = ["-q", "-s", "-p", "no:cacheprovider", "--import-mode=importlib", "--color=no"]
            code = pytest.main([*plain, *arguments])
        return int(code), self._capsys.readouterr().out

    def add_noise(self) -> None:
        """Noise on the head: louder logits that are no more often right."""
        path = self.root / "model" / "model.safetensors"
        tensors = load_file(path)
        head = tensors["lm_head.weight"]
        noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(1))
        tensors["lm_head.weight"] = head + head.std() * noise
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def toy(tmp_path: Path, tiny: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> Toy:
    root = tmp_path / "repository"
    (root / "tests").mkdir(parents=True)
    (root / "pytest.ini").write_text("[pytest]\n")
    tiny("llama").save(root / "model")  # type: ignore[attr-defined]
    (root / "heldout.txt").write_text(inspect.getsource(textwrap)[:3000])
    repository = Toy(root, capsys)
    repository.write(TEST)
    return repository


def test_a_planted_regression_is_caught_and_readable(toy):
    code, said = toy.here()
    assert code == 1
    assert "no baseline at" in said
    assert 'pytest "tests/test_toy.py::test_model" --accuracy-update' in said
    assert not toy.baseline.exists(), "nothing writes a baseline unasked"

    code, said = toy.pytest("--accuracy-update")
    assert code == 0, said
    assert "baseline written, to be reviewed" in said
    written = toy.baseline.read_bytes()
    code, said = toy.here()
    assert code == 0, said
    assert toy.baseline.read_bytes() == written

    toy.add_noise()
    code, said = toy.pytest()
    assert code == 1
    record = json.loads(written)
    before = record["metrics"]["perplexity"]["value"]
    assert "model misses its limit on perplexity" in said
    assert "(baseline + 2%)" in said
    assert f"{before:.5g}"[:4] in said
    assert "rose most since the baseline on:" in said
    examples = re.findall(r'sample (\d+): ([\d.,]+) → ([\d.,]+)  (".*")', said)
    heldout = " ".join((toy.root / "heldout.txt").read_text().split())
    assert len(set(examples)) == 3, said[:3000]  # with CI set, pytest says it again in its summary
    assert all(json.loads(text) in heldout for *_, text in examples)
    assert all(float(now.replace(",", "")) >= float(then.replace(",", "")) for _, then, now, _ in examples)
    assert "Traceback" not in said
    assert "hold(" not in said, "the failure is a message, not tersor's own frames"


def test_the_baseline_is_reviewable(toy):
    toy.here("--accuracy-update")
    text = toy.baseline.read_text()
    record = json.loads(text)
    assert len(text.splitlines()) < 25
    assert str(toy.root) not in text
    assert len(record["data"]["sha256"]) == 64
    assert (record["data"]["samples"], record["data"]["length"]) == (12, 48)
    assert record["limits"] == ["perplexity max_increase 2%"]
    assert len(record["each"]["perplexity"]) == 12
    low, high = record["metrics"]["perplexity"]["interval"]
    assert low < record["metrics"]["perplexity"]["value"] < high


def test_other_text_makes_the_baseline_stale(toy):
    toy.here("--accuracy-update")
    with open(toy.root / "heldout.txt", "a") as file:
        file.write("one more line\n")
    code, said = toy.here()
    assert code == 1
    assert "the data changed since the baseline (heldout.txt)" in said
    toy.write(TEST.replace("samples=12", "samples=11"))
    code, said = toy.here()
    assert code == 1
    assert "sha256, samples changed" in said or "samples, sha256 changed" in said
    toy.baseline.write_text("{}")
    code, said = toy.here()
    assert code == 1
    assert "no baseline of tersor's" in said


def test_limits_relative_to_an_original(toy):
    shutil.copytree(toy.root / "model", toy.root / "small")
    toy.add_noise()  # `model` is what changes; `small` is its original
    toy.write("""
        def test_model(accuracy_gate):
            accuracy_gate("model", original="small", data={"path": "heldout.txt", "length": 48, "samples": 12},
                          max_increase={"kl": 0.0001, "perplexity": "1000%"}, min={"top1": 0.999})
    """)
    code, said = toy.here("--accuracy-update")
    assert code == 1, "an update does not turn a missed gate into a baseline"
    assert "model misses its limits on top1, kl" in said
    assert "met     perplexity" in said
    assert "rose most since the original on:" in said
    assert "fell most since the original on:" in said
    assert not toy.baseline.exists()

    toy.write("""
        def test_model(accuracy_gate):
            values = accuracy_gate("model", original="small", data="heldout.txt", length=48, samples=12,
                                   max_increase={"perplexity": "1000%"})
            assert values["parameters"] > 0
    """)
    assert toy.here("--accuracy-update")[0] == 0
    shutil.rmtree(toy.root / "small")  # the original's perplexity is in the baseline: only answers would need it
    code, said = toy.here()
    assert code == 0, said


def test_a_recipe_brings_text_metrics_and_gates(toy):
    (toy.root / "tests" / "small.yaml").write_text(
        f"recipe: 1\nmodel: {toy.root}/model\nmetrics: [perplexity, kl]\n"
        f"data: {{heldout: {{path: {toy.root}/heldout.txt, samples: 8, length: 32}}}}\n"
        "gate: {metric: kl, max: 0.001}\n"
    )
    toy.write("""
        def test_model(accuracy_gate):
            accuracy_gate("model", recipe="small.yaml")
            accuracy_gate("model", recipe="small.yaml", max={"perplexity": 1.01})
    """)
    code, said = toy.here("--accuracy-update")
    assert code == 1
    assert "misses its limit on perplexity" in said
    assert json.loads(toy.baseline.read_text())["metrics"].keys() == {"perplexity", "kl"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ('"model", data="heldout.txt"', "no limit"),
        ('"model", data="heldout.txt", max_drop={"perplexity": 1}', "could never catch a loss"),
        ('"model", data="heldout.txt", max={"perplexitty": 1}', "Did you mean perplexity"),
        ('"model", data="nothing.txt", max={"perplexity": 1}', "nothing.txt"),
        ('"./gone", data="heldout.txt", max={"perplexity": 1}', "./gone"),
        ('"model", data={"path": "heldout.txt", "feild": "x"}, max={"perplexity": 1}', "data.feild"),
        ('"model", max={"perplexity": 1}', "either data= or recipe="),
        ('"model", data="heldout.txt", max={"latency_ms": 1}', "latency_ms"),
        ('"model", data="heldout.txt", max_increase={"kl": 1}', "without an original"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_line(toy, call, words):
    toy.write(f"def test_model(accuracy_gate):\n    accuracy_gate({call})\n")
    code, said = toy.here("--accuracy-update", "--tb=short")
    assert code == 1
    assert words in said
    assert "Traceback" not in said
    assert not toy.baseline.exists()


def test_unused_it_costs_nothing_and_can_be_switched_off(toy):
    toy.write("""
        import sys

        def test_nothing_heavy():
            heavy = {"torch", "transformers", "numpy", "pydantic", "onnxruntime", "matplotlib"} & set(sys.modules)
            assert not heavy, heavy
            assert "tersor.compress.pytest_plugin" in sys.modules
    """)
    code, said = toy.pytest()
    assert code == 0, said
    toy.write("import sys\n\ndef test_off():\n    assert 'tersor.compress.pytest_plugin' not in sys.modules\n")
    code, said = toy.pytest("-p", "no:tersor")
    assert code == 0, said
