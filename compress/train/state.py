"""The state of a training on disk: a folder a checkpoint, the newest whole one to continue from, the last averaged.

A checkpoint holds what changes (trainable parameters and buffers, by the module's own names), the optimizer, the
schedule, the generators and, written last, trainer_state.json: a folder without a readable one was cut off by a kill
and is removed. transformers' own saving renames and regroups some architectures' weights for from_pretrained and
resumes with `strict=False`; ours stores what is there and refuses what is missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import PreflightError

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
STATE = "trainer_state.json"


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that require gradients, each storage once, and stored buffers, by name."""
    stored = model.state_dict(keep_vars=True)
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in stored.items():
        if id(tensor) in seen or (isinstance(tensor, nn.Parameter) and not tensor.requires_grad):
            continue
        seen.add(id(tensor))
        found[name] = tensor.detach()
    return found


def save_weights(model: nn.Module, folder: Path, whole: dict[str, torch.Tensor] | None = None) -> None:
    """Write what training changes; of a model in shards, its part of the `whole` state."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = trained_tensors(model)
    if whole is not None:
        tensors = {name: whole[name] for name in tensors}
    save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, folder / WEIGHTS)


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], place: str) -> None:
    """Copy weights in.

    Raises:
        PreflightError: names or shapes are not the model's.
    """
    ours = trained_tensors(model)
    if wrong := sorted(ours.keys() ^ weights.keys()):
        raise PreflightError(place, f"a checkpoint of other weights ({wrong[0]})", "this model's")
    for name, tensor in ours.items():
        if tensor.shape != weights[name].shape:
            raise PreflightError(f"{place}: {name}", str(list(weights[name].shape)), str(list(tensor.shape)))
        tensor.copy_(weights[name])


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first. Those that a kill cut off are removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / STATE).read_text("utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
            continue
        found.append(path)
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def ended(checkpoint: Path, steps: int) -> bool:
    """Whether nothing is left to do behind a checkpoint: all steps are done, or a gate said stop."""
    state = json.loads((checkpoint / STATE).read_text("utf-8"))
    control: dict[str, Any] = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(state["global_step"] >= steps or control.get("should_training_stop", False))


def history(checkpoint: Path) -> tuple[int, list[dict[str, Any]]]:
    """The step of a checkpoint and what was logged up to it."""
    found = json.loads((checkpoint / STATE).read_text("utf-8"))
    return int(found["global_step"]), found["log_history"]


def mean(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean of checkpoints' weights, summed in float64 and cast once; of integers, the last.

    Averaging the end of one trajectory: Izmailov et al. (arXiv 1803.05407).
    """
    total: dict[str, torch.Tensor] = {}
    last: dict[str, torch.Tensor] = {}
    for path in paths:
        last = load_file(path / WEIGHTS)
        for name, tensor in last.items():
            if tensor.is_floating_point():
                total[name] = total.get(name, 0) + tensor.double()
    return {n: (total[n] / len(paths)).to(t.dtype) if n in total else t for n, t in last.items()}
