"""tersor.compress: recipes that make checkpoints small, and the evaluator that holds them to it.

The verbs of the command line as functions: `load_recipe`, `validate`, `make_plan`, `apply`, `verify`. Names load on
first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Plan": "plan",
    "make_plan": "plan",
    "How": "run",
    "Outcome": "run",
    "apply": "run",
    "verify": "verify",
    "Checkpoint": "checkpoint",
    "Layout": "layout",
    "Architecture": "arch",
    "Pass": "pass_",
    "Exporter": "exporter",
    "Scorer": "evaluate",
    "TersorError": "errors",
}

if TYPE_CHECKING:
    from .arch import Architecture
    from .checkpoint import Checkpoint
    from .errors import TersorError
    from .evaluate import Scorer
    from .exporter import Exporter
    from .layout import Layout
    from .pass_ import Pass
    from .plan import Plan, make_plan
    from .recipe import Recipe, load_recipe
    from .run import How, Outcome, apply
    from .verify import verify

__all__ = [
    "Architecture",
    "Checkpoint",
    "Exporter",
    "How",
    "Layout",
    "Outcome",
    "Pass",
    "Plan",
    "Recipe",
    "Scorer",
    "TersorError",
    "apply",
    "load_recipe",
    "make_plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
