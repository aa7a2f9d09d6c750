"""What the ONNX Runtime on this machine can open: 1.23, the last for Python 3.10, knows less than the later ones."""

from __future__ import annotations

import onnxruntime
from tersor.compress.errors import PreflightError

OPSETS = {23: (1, 23), 24: (1, 24)}
"""ONNX opset → the first ONNX Runtime that runs it."""
SINCE = {
    "int8": (1, 24),
    "a window in a graph with a cache": (1, 24),
    "soft-capped attention": (1, 24),
    "experts as ONNX Runtime's operator": (1, 31),
}
"""What earlier versions cannot open, or answer wrongly."""


def version() -> tuple[int, int]:
    """Major and minor version of the ONNX Runtime installed here."""
    major, minor = onnxruntime.__version__.split(".")[:2]
    return int(major), int(minor)


def opset(asked: int | None) -> int:
    """`asked`, or the newest that runs here.

    Raises:
        PreflightError: ONNX Runtime is too old for the one asked for, so that nothing could be held to parity.
    """
    if asked is None:
        return max(number for number, since in OPSETS.items() if since <= version() or number == min(OPSETS))
    if version() < OPSETS[asked]:
        since = ".".join(map(str, OPSETS[asked]))
        raise PreflightError(
            f"export: opset: {asked}", f"ONNX Runtime {onnxruntime.__version__}", f"{since} or later", "Or opset: 23."
        )
    return asked


def knows(feature: str) -> bool:
    """Whether the ONNX Runtime here is new enough for one of `SINCE`."""
    return version() >= SINCE[feature]


def require(feature: str, place: str) -> None:
    """Refuse what would not open or be wrong.

    Raises:
        PreflightError: ONNX Runtime is too old for `feature`.
    """
    if not knows(feature):
        since = ".".join(map(str, SINCE[feature]))
        raise PreflightError(place, f"{feature}, and ONNX Runtime {onnxruntime.__version__}", f"ONNX Runtime {since}")
