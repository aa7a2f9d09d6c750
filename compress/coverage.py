"""Coverage: what works on which architecture, asked of the passes and exporters themselves.

A cell is the answer of `requires` on the layout of transformers' default config: no list is kept by hand, so the
table says what a recipe would be told. tests/test_arch_coverage.py runs every cell that says yes.
"""

from __future__ import annotations

from typing import Any

from .arch import Architecture, architecture, names
from .errors import RecipeError
from .layout import Layout
from .registry import find_exporter, find_pass

TASKS = ("text-generation", "image-classification", "feature-extraction")
"""The task that an architecture is asked for: the first that it has a head for."""

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "slice hidden": ("slice", {"remove": 0.05, "on": ["hidden"]}),
    "slice ffn": ("slice", {"remove": 0.05, "on": ["ffn"]}),
    "slice heads": ("slice", {"remove": 0.05, "on": ["heads"]}),
    "slice head_dim": ("slice", {"remove": 0.05, "on": ["head_dim"]}),
    "compact ffn": ("compact", {"on": ("ffn",)}),
    "compact heads": ("compact", {"on": ("heads",)}),
    "moe": ("moe", {"experts": 4, "active": 2}),
    "onnx packed": ("onnx", {"inputs": "packed"}),
    "onnx padded": ("onnx", {"inputs": "padded"}),
}
"""Columns: a pass or exporter with options."""


def main_task(arch: Architecture) -> str:
    """The task that the table asks for."""
    return next(task for task in TASKS if task in arch.heads)


def form(column: str) -> Any:
    """The pass or exporter of a column, with its options."""
    name, options = FORMS[column]
    found = find_exporter(name) if name == "onnx" else find_pass(name)
    return found(**options)


def cell(layout: Layout, column: str) -> str:
    """Empty if the form works on the layout, else why not."""
    try:
        form(column).requires(layout)
    except RecipeError as error:
        return error.found if not error.expected else f"{error.found}, expected {error.expected}"
    return ""


def table() -> dict[str, dict[str, str]]:
    """Architecture → column → empty if it works, else why not."""
    from transformers import AutoConfig

    rows = {}
    for name in names():
        arch = architecture(name)
        config = AutoConfig.for_model(arch.model_type)
        layout = Layout.of(config, main_task(arch), "float32")
        rows[arch.model_type] = {column: cell(layout, column) for column in FORMS}
    return rows
