"""How an encoder's token states become one embedding a sequence, as the checkpoint's own files say.

sentence-transformers lists a model's stages in modules.json and the pooling in 1_Pooling/config.json. Mean and CLS
pooling and a closing normalisation are understood; anything else changes the embedding and is refused by name.
Without these files the embedding is the plain mean, not normalised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tersor.compress.errors import PreflightError, RecipeError

POOLING_FILE = "1_Pooling/config.json"
MODULES_FILE = "modules.json"
UNDERSTOOD = ("Transformer", "Pooling", "Normalize")
FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True)
class Pooling:
    """Mean over a sequence's tokens or its first token, then, if asked, division by the Euclidean norm."""

    mode: Literal["mean", "cls"] = "mean"
    normalize: bool = False

    @classmethod
    def of(cls, side_files: Mapping[str, bytes]) -> Pooling:
        """Read it from a checkpoint's side files.

        Raises:
            RecipeError: a stage or a pooling mode that is not understood.
            PreflightError: a file that is not JSON.
        """
        return cls(_mode(side_files.get(POOLING_FILE)), _normalizes(side_files.get(MODULES_FILE)))

    def as_json(self) -> dict[str, Any]:
        """For artifact.json."""
        return asdict(self)


def _json(name: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise PreflightError(name, f"an unreadable file ({error})", "JSON") from error


def _mode(content: bytes | None) -> Literal["mean", "cls"]:
    if content is None:
        return "mean"
    config = _json(POOLING_FILE, content)
    on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    on += [str(config["pooling_mode"])] if isinstance(config.get("pooling_mode"), str) else []
    modes = {FLAGS.get(name, name) for name in on}
    if modes == {"mean"}:
        return "mean"
    if modes == {"cls"}:
        return "cls"
    raise RecipeError(POOLING_FILE, " and ".join(sorted(modes)) or "no pooling mode", "mean or cls")


def _normalizes(content: bytes | None) -> bool:
    if content is None:
        return False
    stages = [str(stage.get("type", "")).rpartition(".")[2] for stage in _json(MODULES_FILE, content)]
    for stage in stages:
        if stage not in UNDERSTOOD:
            raise RecipeError(MODULES_FILE, repr(stage), f"stages among {', '.join(UNDERSTOOD)}")
    return "Normalize" in stages
