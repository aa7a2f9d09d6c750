"""Inputs for a parity check or a clock where no data is at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


def random_inputs(checkpoint: Checkpoint, seed: int) -> list[Any]:
    """Sixteen sequences of random ids, or images, for a parity check and a clock where the recipe brings no data."""
    generator = np.random.default_rng(seed)
    if checkpoint.layout.arch.inputs == "pixels":
        shape = (checkpoint.layout.families["channels"], *image_size(checkpoint.config, checkpoint.side_files))
        return [generator.standard_normal(shape, np.float32) for _ in range(16)]
    vocab = checkpoint.layout.families["vocab"]
    return [generator.integers(0, vocab, size=int(n)) for n in generator.integers(8, 65, size=16)]


def image_size(config: Any, side_files: Mapping[str, bytes]) -> tuple[int, int]:
    """Height and width of the images that the model was made for; 224 each where nothing says it."""
    stated = getattr(config, "image_size", None)
    if stated is None:
        prepared = json.loads(side_files.get("preprocessor_config.json", b"{}"))
        size = prepared.get("crop_size") if prepared.get("do_center_crop") else prepared.get("size")
        stated = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
    if isinstance(stated, (list, tuple)):
        return int(stated[0]), int(stated[1])
    return int(stated or 224), int(stated or 224)
