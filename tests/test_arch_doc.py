"""docs/writing_an_architecture.md, followed: its file and tiny config make an architecture under contract."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "writing_an_architecture.md"


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", DOC.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return found[0]


def contract(directory: Path, architecture: str, only: str = "test") -> subprocess.CompletedProcess[str]:
    """Run the suite, or a part of it, on an architecture that lies outside the package."""
    (directory / "arch").mkdir()
    (directory / "arch" / "starcoder2.py").write_text(architecture, "utf-8")
    (directory / "found.py").write_text(
        f"from tersor.compress import arch\narch.__path__.append({str(directory / 'arch')!r})\n", "utf-8"
    )
    tests = directory / "tests"
    shutil.copytree(ROOT / "tests" / "tiny", tests / "tiny")
    for name in ("conftest.py", "test_arch_contract.py"):
        shutil.copy(ROOT / "tests" / name, tests)
    (tests / "tiny" / "starcoder2.json").write_text(block("json"), "utf-8")
    command = ["-m", "pytest", "-p", "found", "--import-mode=importlib", "-q", "-k", f"starcoder2 and {only}"]
    return subprocess.run(
        [sys.executable, *command, "--rootdir", str(tests), str(tests / "test_arch_contract.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tests,
        env={**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"},
    )


def test_the_page_makes_an_architecture(tmp_path):
    found = contract(tmp_path, block("python"))
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong", "fails"),
    [
        ("kv_heads{i} * queries * head_dim", "queries * kv_heads{i} * head_dim", "test_permuting_an_axis"),
        ('"hidden", "ffn{i}", BIAS', '"hidden", "ffn{i}"', "test_every_parameter_is_named_once"),
    ],
)
def test_a_mistake_is_caught(tmp_path, right, wrong, fails):
    source = block("python")
    assert right in source
    found = contract(tmp_path, source.replace(right, wrong), fails)
    assert found.returncode == 1, found.stderr
    assert fails in found.stdout
