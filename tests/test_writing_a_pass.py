"""docs/writing_a_pass.md, followed to the letter: its code becomes an installed package, its recipe is run."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.numpy import load_file

DOC = Path(__file__).parents[1] / "docs" / "writing_a_pass.md"


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOC.read_text("utf-8"), re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """What pip would leave behind of a package with this module and this entry point."""
    site = tmp_path / "site"
    info = site / "tersor_prune-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "tersor_prune.py").write_text(block("python"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tersor-prune\nVersion: 1.0\n")
    name, target = re.search(r'^(\w+) = "(.*)"$', block("toml"), re.MULTILINE).groups()  # type: ignore[union-attr]
    group = re.search(r'entry-points."(.*?)"', block("toml"))[1]  # type: ignore[index]
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    return site


def tersor(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", ""))))
    return subprocess.run(
        [sys.executable, "-m", "tersor.compress.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def test_the_documented_pass_is_found_described_and_run(package, tmp_path, save_tiny):
    described = tersor(package, "passes", "prune")
    assert "magnitude pruning" in described.stdout, described.stderr
    assert "share" in described.stdout
    text, recipe = tmp_path / "text.txt", tmp_path / "prune.yaml"
    text.write_text(inspect.getsource(textwrap))
    steps = block("yaml").replace("max_increase: 5%", "max_increase: 900%")  # the model is random
    recipe.write_text(
        f"recipe: 1\nmodel: {save_tiny('qwen2')}\ndata: {{heldout: {{path: {text}, samples: 8, length: 32}}}}\n{steps}"
    )
    done = tersor(package, "apply", recipe, "--output", tmp_path / "run", "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint"]["kl"] > 0
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    pruned = [n for n in weights if "mlp" in n and n.endswith("weight")]
    assert pruned
    for name in pruned:
        assert (weights[name] == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert not any((weights[n] == 0).mean() > 0.01 for n in weights if "self_attn" in n and n.endswith("weight"))


def test_a_share_of_thirty_is_refused_with_its_line(package, tmp_path, save_tiny):
    recipe = tmp_path / "prune.yaml"
    recipe.write_text(f"recipe: 1\nmodel: {save_tiny('llama')}\npasses:\n  - use: prune\n    with: {{share: 30}}\n")
    done = tersor(package, "validate", recipe)
    assert done.returncode == 2
    assert "prune.yaml:5:19: passes.0.with.share: found 30" in done.stderr
