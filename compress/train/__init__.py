"""Training: transformers' Trainer and accelerate behind one thin layer, used by `recover` and `swat`.

    data = text(model, sequences)                      # rows that several sequences share without seeing each other
    done = train(model, data, LanguageModel(), Training(steps=300), folder=Path("state"))

`model` is trained in place; `done` says what happened. The same call continues a killed training from what lies in
`folder` and ends with the same bits. Nothing here knows of recipes: docs/training.md has the plain use, under
`accelerate launch` too. Names load on first use, so that a recipe can be read where accelerate is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Classification": "losses",
    "Distillation": "losses",
    "LanguageModel": "losses",
    "Objective": "losses",
    "Rows": "rows",
    "Trained": "loop",
    "Training": "options",
    "fsdp2": "options",
    "images": "rows",
    "text": "rows",
    "train": "loop",
}

if TYPE_CHECKING:
    from .loop import Trained, train
    from .losses import Classification, Distillation, LanguageModel, Objective
    from .options import Training, fsdp2
    from .rows import Rows, images, text

__all__ = [
    "Classification",
    "Distillation",
    "LanguageModel",
    "Objective",
    "Rows",
    "Trained",
    "Training",
    "fsdp2",
    "images",
    "text",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
