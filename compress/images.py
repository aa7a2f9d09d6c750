"""Images for a model: a folder with a sub-folder for each class, prepared as the checkpoint's own files say.

`preprocessor_config.json` says how an image becomes numbers (resize, crop, rescale, normalise). transformers' own
processor does it, always through Pillow: with torchvision installed it would take another resampling, and the same
recipe would score differently from machine to machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import PreflightError, RecipeError

CONFIG = "preprocessor_config.json"


class Preparation:
    """How images become pixels.

    Args:
        side_files: of the checkpoint; holds preprocessor_config.json.
        place: what the model is called in errors.

    Raises:
        PreflightError: the file is missing or not understood, or Pillow is missing.
    """

    def __init__(self, side_files: Mapping[str, bytes], place: str = "model"):
        if CONFIG not in side_files:
            raise PreflightError(place, f"no {CONFIG}", "the file that says how images are prepared")
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise PreflightError("images", "no Pillow", "it, to read images", "pip install 'tersor[data]'") from error
        from transformers import AutoImageProcessor

        from .pretrained import quiet

        try:
            with tempfile.TemporaryDirectory() as folder, quiet():
                (Path(folder) / CONFIG).write_bytes(side_files[CONFIG])
                self._process: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except Exception as error:  # transformers raises many types; all mean that the file is not understood
            said = " ".join(str(error).split())[:200]
            raise PreflightError(
                f"{place}: {CONFIG}", f"a file that transformers refuses ({said})", "an image processor"
            ) from error

    def __call__(self, path: Path) -> np.ndarray:
        """An image file's pixels, float32 `[channels, height, width]`.

        Raises:
            PreflightError: the file is no whole image.
        """
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            said = " ".join(str(error).split())[:200]
            raise PreflightError(str(path), f"a file that is no whole image ({said})", "an image") from error
        pixels: np.ndarray = self._process(image, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, np.float32)


def numbers(names: Sequence[str], labels: Mapping[str, int], count: int, place: str) -> dict[str, int]:
    """The class number of each sub-folder.

    By the model's own names; or, where it has none (`LABEL_0`, …) and there are as many folders as classes, by the
    folders' order.

    Raises:
        RecipeError: a folder is no class of the model.
    """
    unknown = [name for name in names if name not in labels]
    if not unknown:
        return {name: labels[name] for name in names}
    unnamed = all(label == f"LABEL_{number}" for label, number in labels.items())
    if unnamed and len(names) == count:
        return {name: number for number, name in enumerate(sorted(names))}
    if unnamed:
        raise RecipeError(place, f"{len(names)} folders of images", f"{count}, one for each class of the model")
    known = ", ".join(list(labels)[:10]) + (", …" if len(labels) > 10 else "")
    raise RecipeError(place, f"a folder {unknown[0]!r}", f"classes of the model: {known}", "Rename the folder.")
