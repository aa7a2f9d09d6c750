"""Training: transformers' Trainer and accelerate behind one thin layer, used by `recover` and `swat`.

    data = text(model, sequences)                      # rows that several sequences share without seeing each other
    done = train(model, data, LanguageModel(), Training(steps=300), folder=Path("state"))

`model` is trained in place; `done` says what happened. The same call continues a killed training from what lies in
`folder` and ends with the same bits. Nothing here knows of recipes: docs/training.md has the plain use, under
`accelerate launch` too.
"""

from .loop import Trained, train
from .losses import Classification, Distillation, LanguageModel, Objective
from .options import Training
from .rows import Rows, images, text

__all__ = [
    "Classification",
    "Distillation",
    "LanguageModel",
    "Objective",
    "Rows",
    "Trained",
    "Training",
    "images",
    "text",
    "train",
]
