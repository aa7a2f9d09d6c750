"""Verify: hold a finished run to its word, with the tools of its readers.

The checkpoint is loaded by stock transformers and each artifact by stock ONNX Runtime, in fresh processes in which
tersor is not imported; their outputs are compared with tersor's own. A class of tersor's own (moe/own.py) must be
refused there instead. Files are held against the hashes of the run, and every pass' promises are checked again.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
numpy.savez(out, output.float().numpy())
"""
STOCK_ORT = """
import os, sys, numpy, onnxruntime
out, model, inputs, *asked = sys.argv[1:]
opened, options = model, onnxruntime.SessionOptions()
if asked:
    import onnx
    opened = onnx.load(model, load_external_data=False)
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    opened = opened.SerializeToString()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.path.dirname(model))
session = onnxruntime.InferenceSession(opened, options, providers=["CPUExecutionProvider"])
names = {i.name: i.shape for i in session.get_inputs()}
feed = {k: v for k, v in numpy.load(inputs).items() if k in names}
if "position_ids" in names:
    feed["position_ids"] = numpy.maximum(feed["attention_mask"].cumsum(1) - 1, 0)
rows = len(next(iter(feed.values())))
for name, shape in names.items():
    if name.startswith("past_key_values."):
        feed[name] = numpy.zeros((rows, shape[1], 0, shape[3]), numpy.float32)
first = session.get_outputs()[0].name
numpy.savez(out, *session.run([first, *asked], feed))
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


def _fresh(script: str, *arguments: str) -> list[np.ndarray]:
    """Run a script in a fresh interpreter; it writes arrays."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.npz"
        command = [sys.executable, "-c", script, str(out), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise PreflightError("fresh process", done.stderr.strip().splitlines()[-1], "a model that opens")
        return list(np.load(out).values())


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
            [theirs] = _fresh(STOCK_TRANSFORMERS, str(model), auto, str(path), str(torch.get_num_threads()))
        except PreflightError as error:
            return Finding(what, own, "" if own else error.found)
    if own:
        return Finding(what, False, "it opened as another")
    equal = np.array_equal(ours.float().numpy(), theirs)
    return Finding(what, equal, "0.0" if equal else f"differs by {np.abs(ours.float().numpy() - theirs).max():.1e}")


def _stock_artifact(artifact: Path, model: Path, inputs: dict[str, np.ndarray]) -> Finding:
    """Stock ORT against float64 torch, over real tokens, by the exporter's own parity rule.

    Where experts are chosen, torch computes on the artifact's choices, which are held to their scores.
    """
    import torch

    from .checkpoint import Checkpoint
    from .evaluate import output_of
    from .moe.routing import Routing, differences

    what = f"{artifact.name}: stock ONNX Runtime agrees with the checkpoint"
    described = json.loads((artifact / "artifact.json").read_text("utf-8"))
    if not described.get("parity") or described.get("precision") != "float32":
        return Finding(what, True, "judged by its gate, not by parity")
    checkpoint = Checkpoint.load(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.npz"
        np.savez(path, **inputs)  # type: ignore[arg-type]
        asked = described.get("experts", {}).get("choices", [])
        try:
            found, *choices = _fresh(STOCK_ORT, str(artifact / "model.onnx"), str(path), *asked)
        except PreflightError as error:
            return Finding(what, False, error.found)
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    given = _everywhere(choices, inputs["attention_mask"] > 0) if choices else None

    def run(dtype: torch.dtype) -> tuple[np.ndarray, Routing | None]:
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        routing = None if given is None else Routing.of(checkpoint.layout, given)
        with torch.no_grad(), routing or contextlib.nullcontext():
            return checkpoint.model(dtype)(**cast)[0].numpy(), routing

    (exact, choosing), (single, roughly) = run(torch.float64), run(torch.float32)
    if choosing is not None and roughly is not None:
        gap, limit = differences(choosing, roughly, tensors["attention_mask"].flatten() > 0)
        if gap > limit:
            return Finding(what, False, f"an expert is chosen that scores {gap:.1e} below another, {limit:.1e} allowed")
    output = output_of(checkpoint.layout.task, checkpoint.layout.sizes["labels"])
    whole = output in ("classes", "number")  # one answer a sequence or image, not one a token
    real = np.ones(len(exact), bool) if whole else inputs["attention_mask"] > 0
    distance = float(np.abs(found[real] - exact[real]).max())
    # The scale of a state is its norm: single elements shrink with the width.
    states = checkpoint.layout.task == "feature-extraction"
    scale = np.linalg.norm(exact[real], axis=-1) if states else np.abs(exact[real])
    allowed = max(2 * float(np.abs(single[real] - exact[real]).max()), 1e-6 * float(scale.max()))
    return Finding(what, distance <= allowed, f"{distance:.1e}, {allowed:.1e} allowed")


def _everywhere(choices: Sequence[np.ndarray], real: np.ndarray) -> np.ndarray:
    """An artifact's choices, `[tokens, chosen]` a block, at all places of a batch: int64 `[blocks, places, chosen]`.

    Artifacts that take padding out choose for real tokens alone; the others get the first experts.
    """
    stacked = np.stack([np.asarray(each).reshape(-1, np.shape(each)[-1]) for each in choices]).astype(np.int64)
    if stacked.shape[1] == real.size:
        return stacked
    found = np.tile(np.arange(stacked.shape[2]), (len(stacked), real.size, 1))
    found[:, real.ravel()] = stacked
    return found
