"""The house rules that a reader cannot check by eye: who may import whom, what is packaged, what is documented."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("compress", "sparse", "export")
ALLOWED = {"compress": set(), "sparse": {"compress"}, "export": {"compress"}, "recipes": set()}
SOURCES = sorted(p for folder in (*FOLDERS, "recipes") for p in (ROOT / folder).rglob("*.py"))
EVERYWHERE = sorted(p for folder in (*FOLDERS, "recipes", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py"))


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of all modules that a source imports, anywhere in it. `package` resolves relative imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    return ".".join(("tersor", *path.relative_to(ROOT).parent.parts))


def wrong_arrows(source: str, package: str) -> set[str]:
    """Our folders that a source imports and may not."""
    own = package.split(".")[1]
    met = {name.split(".")[1] for name in imports(source, package) if name.startswith("tersor.") and name != "tersor."}
    return (met & set(FOLDERS)) - ALLOWED[own] - {own}


def bare(source: str) -> set[str]:
    """Imports that would make a second copy of our modules, or pick somebody else's."""
    return {n for n in imports(source, "") if n.split(".")[0] in FOLDERS}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    assert wrong_arrows(path.read_text("utf-8"), package_of(path)) == set()


def test_a_wrong_arrow_is_seen():
    assert wrong_arrows("from tersor.export import onnx", "tersor.sparse.passes") == {"export"}
    assert wrong_arrows("def f():\n    from ..sparse import passes", "tersor.compress") == {"sparse"}
    assert wrong_arrows("from tersor import export", "tersor.compress") == {"export"}
    assert wrong_arrows("from ..axes import Dim\nimport tersor.compress.walk", "tersor.compress.arch") == set()


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_bare_import(path):
    assert bare(path.read_text("utf-8")) == set()


def test_a_bare_import_is_seen():
    assert bare("import sparse\nfrom compress.axes import Dim") == {
        "sparse",
        "compress.axes",
        "compress.axes.Dim",
    }
    assert bare("from tersor.sparse import passes\nfrom . import export") == set()


def test_packages_are_the_folders_on_disk():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    assert len(told) == len(set(told))
    assert set(told) == {package_of(p) for p in SOURCES if p.name == "__init__.py"}
    assert {package_of(p) for p in SOURCES} <= set(told), "a folder of modules without __init__.py"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if not p.name.startswith("_")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_public_modules_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


def test_tests_have_no_package():
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_help_runs():
    if not (ROOT / "compress" / "cli.py").exists():
        pytest.skip("the command line is not built yet")
    found = subprocess.run(
        [sys.executable, "-c", "from tersor.compress.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "apply" in found.stdout


def test_help_imports_nothing_heavy():
    """Half a second is what a clock says; this is why."""
    if not (ROOT / "compress" / "cli.py").exists():
        pytest.skip("the command line is not built yet")
    heavy = ["torch", "transformers", "optimum", "onnxruntime", "onnx", "onnxscript", "matplotlib"]
    code = (
        "import sys\nfrom tersor.compress.cli import main\nsys.argv = ['tersor', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [m for m in {heavy} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.splitlines()[-1] == "HEAVY []", found.stdout + found.stderr
