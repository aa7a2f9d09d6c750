"""A shrunk random model of the same architecture, so that a recipe can be checked in seconds.

Axes go down to a few units by the architecture's own equations; vocabulary, tokenizer and every switch of the config
stay, so the same code paths run. Its scores mean nothing: gates are judged but not enforced.
"""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, named_parameters
from .data import Source
from .layout import Layout, model_class
from .pretrained import load_tokenizer, quiet, read_side_files
from .recipe import Recipe
from .train.options import Training

SMALL = {"kv_heads": 2, "queries": 2, "heads": 4, "head_dim": 16, "ffn": 96, "shared_ffn": 96}
BLOCKS = 2
SAMPLES, LENGTH = 16, 64
STEPS = 4


def shrink_config(layout: Layout) -> Layout:
    """The layout with few blocks and narrow axes, as a config that transformers accepts.

    Without blocks (ResNet) it stays as it is: such a model is small.
    """
    if not layout.arch.depth:
        return layout
    sizes = {name: min(size, SMALL.get(name, size)) for name, size in layout.families.items()}
    heads = math.prod(sizes[a] for a in ("kv_heads", "queries", "heads") if a in sizes)
    sizes["hidden"] = min(sizes["hidden"], heads * sizes.get("head_dim", 16))
    config = copy.deepcopy(layout.config)
    for attribute, product in layout.arch.config:
        setattr(config, attribute, math.prod(sizes[a.strip()] for a in product.split("*")))
    depth = min(layout.depth, BLOCKS)
    setattr(config, layout.arch.depth, depth)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layout.depth:
            setattr(config, name, value[:depth])
    return Layout.of(config, layout.task, layout.dtype)


def write_smoke_model(source: Path, layout: Layout, directory: Path, seed: int) -> None:
    """Write a small random checkpoint of `layout`'s kind, with the tokenizer of `source`."""
    small = shrink_config(layout)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        model = model_class(small.config, small.task)(small.config)
    Checkpoint(
        small,
        {n: t.to(getattr(torch, small.dtype)) for n, t in named_parameters(model).items()},
        load_tokenizer(source),
        read_side_files(source),
    ).save(directory)


def _less(part: Source) -> Source:
    """A little of a source; what was left out stays left out, since an empty list is no value for it."""
    given = {f.name: getattr(part, f.name) for f in fields(part) if getattr(part, f.name) != f.default}
    return Source(**{**given, "samples": min(part.samples, SAMPLES), "length": min(part.length, LENGTH)})


def _shorter(options: Any) -> Any:
    """A pass that trains, with few steps; any other as it is."""
    if not isinstance(options, Training):
        return options
    return replace(options, steps=min(options.steps, STEPS), save_every=1)


def smoke_recipe(recipe: Recipe, model: Path) -> Recipe:
    """The recipe on the small model, with a little of its data and of its training."""
    data = recipe.data
    parts = {
        name: _less(part)
        for name in ("calibration", "heldout")
        if (part := getattr(data, name)) is not None
    }
    passes = tuple(step.model_copy(update={"options": _shorter(step.options)}) for step in recipe.passes)
    changes = {"model": str(model), "data": data.model_copy(update=parts), "passes": passes}
    return recipe.model_copy(update=changes)
