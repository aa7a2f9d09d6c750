"""The wheel holds what the tree holds, works away from it, and every dependency has a tested version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FOLDERS = ("compress", "sparse", "export", "recipes")
IGNORED = shutil.ignore_patterns("__pycache__", ".*")


def files(folder: Path) -> set[str]:
    found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix() for p in found if p.suffix != ".pyc"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the tree and no older build leaks in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import sys\nfrom setuptools import build_meta\nbuild_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_wheel_holds_every_file_of_the_tree(unpacked, folder):
    """Modules, templates, type markers, recipes, the decoder and its text; a forgotten pattern shows here."""
    assert files(unpacked / "tersor" / folder) == files(ROOT / folder)


def test_wheel_adds_one_name_and_takes_no_other(unpacked):
    top = {path.name for path in unpacked.iterdir()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"tersor"}
    assert not (unpacked / "tersor" / "__init__.py").exists(), "a namespace: others may add to it"


def test_wheel_carries_both_licences(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    assert {"LICENSE", "recipes/quickstart/LICENSE-text"} <= files(info / "licenses")
    assert "License-Expression: Apache-2.0 AND PSF-2.0" in (info / "METADATA").read_text("utf-8")


def test_wheel_works_away_from_the_tree(unpacked, tmp_path):
    code = (
        "from tersor.compress.pretrained import locate\n"
        "from tersor.compress.paths import resolve_path\n"
        "from tersor.compress.recipe import load_recipe\n"
        "recipe = load_recipe('quickstart')\n"
        "print(locate(recipe.model, offline=True))\n"
        "print(resolve_path(recipe.data.heldout.path, None, 'here'))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    for line in found.stdout.splitlines():
        assert Path(line).is_relative_to(unpacked)
        assert Path(line).exists()


def declared() -> list[Requirement]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    return [Requirement(text) for text in (*project["dependencies"], *extras)]


def pins(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def unpinned(wanted: list[Requirement], pinned: list[Requirement], python: str) -> set[str]:
    """Names without exactly one pin inside their range, on this version of Python."""
    here = {"python_version": python}
    wrong = set()
    for need in wanted:
        if need.marker and not need.marker.evaluate(here):
            continue
        fitting = [p for p in pinned if same(p.name, need.name) and (not p.marker or p.marker.evaluate(here))]
        versions = [str(p.specifier).removeprefix("==") for p in fitting]
        if len(versions) != 1 or not need.specifier.contains(Version(versions[0])):
            wrong.add(need.name)
    return wrong


def same(a: str, b: str) -> bool:
    return re.sub(r"[-_.]+", "-", a).lower() == re.sub(r"[-_.]+", "-", b).lower()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_dependency_has_one_tested_version(python):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert unpinned(declared(), pins(lines), python) == set()
    assert "torch" in unpinned(declared(), pins([ln for ln in lines if not ln.startswith("torch==")]), python)


@pytest.mark.parametrize("target", ["demo", "test", "lint", "bench", "clean", "help"])
def test_make_knows_its_targets(target):
    if shutil.which("make") is None:
        pytest.skip("no make here")
    found = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert subprocess.run(["make", "-n", "nonsense"], cwd=ROOT, capture_output=True, check=False).returncode


def test_ci_is_a_script_that_bash_can_read():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
