"""Which layers become sparse, and which functions their inputs come from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from tersor.compress.errors import RecipeError
from tersor.compress.words import nearest
from torch import nn

from .functions import Conv2d, Linear, Op
from .options import FIRST, LAST

NORMS: dict[str, tuple[type[nn.Module], ...]] = {
    "rows": (nn.LayerNorm,),
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d),
}
"""Norms that keep their input for their own gradient, by what they run over: a token, or the whole batch."""


def operation(module: nn.Module) -> Op | None:
    """What the module computes, if it is one of the layers that can be sparse."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return Linear()
    if isinstance(module, Conv1D):
        return Linear(transposed=True)
    if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return Conv2d(_pair(module.stride), _pair(module.padding), _pair(module.dilation), module.groups)
    return None


def _pair(sizes: Iterable[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def layers(model: nn.Module, exempt: Iterable[str]) -> dict[str, nn.Module]:
    """Layers by name, in order, without the exempt ones.

    Raises:
        RecipeError: a name or pattern matches no layer, or none is left.
    """
    found = {name: module for name, module in model.named_modules() if operation(module) is not None}
    if not found:
        raise RecipeError("swat", "a model without Linear or Conv2d", "a layer that can be sparse")
    dense: set[str] = set()
    for word in exempt:
        matched = matches(word, model, list(found))
        if matched is None:
            remedy = nearest(word, found) or "`re:` in front makes it a pattern."
            expected = f"a name like {next(iter(found))!r}"
            raise RecipeError("swat: exempt", f"{word!r}, which matches no layer", expected, remedy)
        dense |= matched
    if dense >= found.keys():
        raise RecipeError("swat: exempt", f"all {len(found)} layers", "at least one layer left")
    return {name: module for name, module in found.items() if name not in dense}


def matches(word: str, model: nn.Module, names: list[str]) -> set[str] | None:
    """The names that a word of `exempt` means; None if a name or pattern means none."""
    if word == FIRST:
        return set() if any(isinstance(m, nn.Embedding) for m in model.modules()) else {names[0]}
    if word == LAST:
        return {names[-1]}
    if word.startswith("re:"):
        try:
            pattern = re.compile(word[3:])
        except re.error as error:
            raise RecipeError("swat: exempt", f"{word!r} ({error})", "a regular expression behind `re:`") from error
        matched = {name for name in names if pattern.search(name)}
    else:
        matched = {name for name in names if name == word or name.startswith(f"{word}.")}
    return matched or None


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Elementwise activations without parameters, by name: what is known to be a function of its input alone."""
    from transformers.activations import ACT2CLS

    known: tuple[Any, ...] = tuple({c[0] if isinstance(c, tuple) else c for c in ACT2CLS.values()})
    plain = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Softplus)
    found = {name: module for name, module in model.named_modules() if type(module) in {*known, *plain}}
    return {name: module for name, module in found.items() if next(module.parameters(), None) is None}


def norms(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Norms of a kind by name; a subclass may compute something else."""
    return {name: module for name, module in model.named_modules() if type(module) in NORMS[kind]}


def is_relu(module: nn.Module) -> bool:
    """Whether one bit of the output tells the gradient."""
    return type(module) is nn.ReLU


def keeps(module: nn.Module) -> str:
    """What autograd keeps of the module's forward: its `input` alone, its `result` alone, or `more`."""
    if getattr(module, "inplace", False):
        return "result"
    x = torch.linspace(-3, 3, 64).requires_grad_()
    seen: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = type(module).forward(module, x)
    if seen <= {x.untyped_storage().data_ptr()}:
        return "input"
    return "result" if seen == {y.untyped_storage().data_ptr()} else "more"
