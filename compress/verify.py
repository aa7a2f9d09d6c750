"""Verify: hold a finished run to its word, with the tools of its readers.

The checkpoint is loaded by stock transformers and each artifact by stock ONNX Runtime, in fresh processes in which
tersor is not imported; their outputs are compared with tersor's own. A class of tersor's own (moe/own.py) must be
refused there instead. Files are held against the hashes of the run, and every pass' promises are checked again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arch import SUFFIX
from .errors import PreflightError
from .rundir import hash_tree

STOCK_TRANSFORMERS = """
import sys, numpy, torch, transformers
out, directory, auto, inputs, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = getattr(transformers, auto).from_pretrained(directory, dtype="auto").eval()
with torch.no_grad():
    output = model(**{k: torch.from_numpy(v) for k, v in numpy.load(inputs).items()})[0]
assert "tersor" not in sys.modules
numpy.save(out, output.float().numpy())
"""
STOCK_ORT = """
import sys, numpy, onnxruntime
out, model, inputs = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
names = {i.name: i.shape for i in session.get_inputs()}
feed = {k: v for k, v in numpy.load(inputs).items() if k in names}
if "position_ids" in names:
    feed["position_ids"] = numpy.maximum(feed["attention_mask"].cumsum(1) - 1, 0)
rows = len(next(iter(feed.values())))
for name, shape in names.items():
    if name.startswith("past_key_values."):
        feed[name] = numpy.zeros((rows, shape[1], 0, shape[3]), numpy.float32)
numpy.save(out, session.run(None, feed)[0])
assert "tersor" not in sys.modules
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was verified.

    Attributes:
        what: the promise.
        holds: whether it is kept.
        detail: the figure behind it, or what is wrong.
    """

    what: str
    holds: bool
    detail: str


def verify(directory: Path) -> list[Finding]:
    """Verify a run directory.

    Raises:
        PreflightError: it is no finished run.
    """
    journal = read_journal(directory)
    published = next((e for e in journal if e["step"] == "published"), None)
    if published is None:
        raise PreflightError(str(directory), "a run that has not ended", "a finished one", "Continue it with --resume.")
    root = directory / "failed" if published["failed"] else directory
    findings = [_hashes(root, published["hashes"])]
    findings += _checks(root / "model", journal)
    inputs = _inputs(root / "model")
    findings.append(_stock_model(root / "model", inputs))
    findings += [
        _stock_artifact(root / name, root / "model", inputs) for name in published["hashes"] if name != "model"
    ]
    return findings


def read_journal(directory: Path) -> list[dict[str, Any]]:
    """The journal of a run directory.

    Raises:
        PreflightError: there is none.
    """
    path = directory / "journal.jsonl"
    if not path.is_file():
        raise PreflightError(str(directory), "no journal.jsonl", "a run directory written by tersor apply")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def _hashes(root: Path, expected: dict[str, dict[str, str]]) -> Finding:
    for name, files in expected.items():
        found = hash_tree(root / name) if (root / name).is_dir() else {}
        for file in sorted(files.keys() | found.keys()):
            if files.get(file) != found.get(file):
                return Finding("files as the run wrote them", False, f"{name}/{file} differs")
    return Finding("files as the run wrote them", True, f"{sum(map(len, expected.values()))} files")


def _checks(model: Path, journal: list[dict[str, Any]]) -> list[Finding]:
    from pydantic import TypeAdapter

    from .checkpoint import Checkpoint
    from .registry import find_pass

    checkpoint = Checkpoint.load(model)
    findings = []
    for entry in journal:
        if "details" not in entry or entry["use"] == "unchanged":
            continue
        options = TypeAdapter(find_pass(entry["use"])).validate_python(entry["options"], strict=False)
        for check in options.checks(entry["details"]):
            wrong = check.holds(checkpoint.config, checkpoint.tensors)
            findings.append(Finding(f"{entry['step']}: {check.name}", not wrong, wrong or "holds"))
    return findings


def _inputs(model: Path) -> dict[str, np.ndarray]:
    """Two rows of random ids, the second one padded on the right; or two random images."""
    from .pretrained import read_config

    layout = read_config(model)
    if layout.arch.inputs == "pixels":
        from .inputs import image_size
        from .pretrained import read_side_files

        shape = (2, layout.families["channels"], *image_size(layout.config, read_side_files(model)))
        return {"pixel_values": np.random.default_rng(0).standard_normal(shape, np.float32)}
    ids = np.random.default_rng(0).integers(0, layout.families["vocab"], size=(2, 23))
    mask = np.ones_like(ids)
    mask[1, 17:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    return found | ({"token_type_ids": np.zeros_like(ids)} if layout.arch.token_types else {})


def _fresh(script: str, *arguments: str) -> np.ndarray:
    """Run a script in a fresh interpreter; it writes one array."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npy"
        command = [sys.executable, "-c", script, str(out), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise PreflightError("fresh process", done.stderr.strip().splitlines()[-1], "a model that opens")
        found: np.ndarray = np.load(out)
        return found


def _stock_model(model: Path, inputs: dict[str, np.ndarray]) -> Finding:
    import torch
    from optimum.exporters.tasks import TasksManager

    from .checkpoint import Checkpoint

    checkpoint = Checkpoint.load(model)
    own = checkpoint.config.model_type.endswith(SUFFIX)
    what = "stock transformers " + ("refuses a class of tersor's own" if own else "gives the same output, bit for bit")
    with torch.no_grad():
        given = {k: torch.from_numpy(v) for k, v in inputs.items()}
        ours = checkpoint.model(checkpoint.dtype)(**given)[0]
    auto = TasksManager.get_model_class_for_task(checkpoint.layout.task, framework="pt").__name__
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.npz"
        np.savez(path, **inputs)  # type: ignore[arg-type]
        try:
            theirs = _fresh(STOCK_TRANSFORMERS, str(model), auto, str(path), str(torch.get_num_threads()))
        except PreflightError as error:
            return Finding(what, own, "" if own else error.found)
    if own:
        return Finding(what, False, "it opened as another")
    equal = np.array_equal(ours.float().numpy(), theirs)
    return Finding(what, equal, "0.0" if equal else f"differs by {np.abs(ours.float().numpy() - theirs).max():.1e}")


def _stock_artifact(artifact: Path, model: Path, inputs: dict[str, np.ndarray]) -> Finding:
    """Stock ORT against float64 torch, over real tokens, by the exporter's own parity rule."""
    import torch

    from .checkpoint import Checkpoint
    from .evaluate import output_of

    what = f"{artifact.name}: stock ONNX Runtime agrees with the checkpoint"
    described = json.loads((artifact / "artifact.json").read_text("utf-8"))
    if not described.get("parity") or described.get("precision") != "float32":
        return Finding(what, True, "judged by its gate, not by parity")
    checkpoint = Checkpoint.load(model)
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}

    def run(dtype: torch.dtype) -> np.ndarray:
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        answer: np.ndarray = checkpoint.model(dtype)(**cast)[0].numpy()
        return answer

    with torch.no_grad():
        exact, single = run(torch.float64), run(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.npz"
        np.savez(path, **inputs)  # type: ignore[arg-type]
        try:
            found = _fresh(STOCK_ORT, str(artifact / "model.onnx"), str(path))
        except PreflightError as error:
            return Finding(what, False, error.found)
    output = output_of(checkpoint.layout.task, checkpoint.layout.sizes["labels"])
    whole = output in ("classes", "number")  # one answer a sequence or image, not one a token
    real = np.ones(len(exact), bool) if whole else inputs["attention_mask"] > 0
    distance = float(np.abs(found[real] - exact[real]).max())
    # The scale of a state is its norm: single elements shrink with the width.
    states = checkpoint.layout.task == "feature-extraction"
    scale = np.linalg.norm(exact[real], axis=-1) if states else np.abs(exact[real])
    allowed = max(2 * float(np.abs(single[real] - exact[real]).max()), 1e-6 * float(scale.max()))
    return Finding(what, distance <= allowed, f"{distance:.1e}, {allowed:.1e} allowed")
