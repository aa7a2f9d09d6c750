"""Norms of a pre-norm stream without gains: the algebra that makes the residual stream free to rotate.

    reads(gain · n(x) + bias)  =  (reads · diag(gain)) n(x) + (reads · bias + its own bias)

After fusing, every norm of the stream is a bare division by the RMS, which an orthogonal rotation of the
stream does not change; so Q may be multiplied into every tensor that touches the stream. Cut to k columns,
the stock norm of width k divides by the RMS over k values where the original divided by d:

    y / √(|y|²/k + eps·d/k)  =  √(k/d) · y / √(|y|²/d + eps)

so `eps·d/k` goes into the config and √(d/k) into the consumers, in float64 (as a bf16 gain it would be
rounded with the same sign everywhere). Unlike SliceGPT's code nothing is centred for RMSNorm models and eps
is the config's own. Source: SliceGPT (Ashkboos et al., arXiv 2401.15024), section 3.

All functions are pure, take tensors by name and work in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .axes import project
from .errors import RecipeError
from .layout import Layout

Tensors = Mapping[str, torch.Tensor]


def rotatable(layout: Layout) -> None:
    """Refuse a layout whose stream has no free rotation that a stock config could hold.

    Raises:
        RecipeError: names what stands in the way.
    """
    arch, place = layout.arch, "slice: on hidden"
    if arch.stream != "pre-norm":
        raise RecipeError(
            place,
            f"{arch.model_type}, a {arch.stream} stream (its norms stand behind the additions)",
            "a pre-norm model",
            "Use on: [ffn].",
        )
    if arch.axis("hidden") is None:
        raise RecipeError(
            place,
            f"{arch.model_type}, whose config ties hidden to other sizes",
            "a hidden size that can change alone",
        )
    if arch.norm.kind != "rms":
        raise RecipeError(
            place, f"{arch.model_type}, a LayerNorm model", "an RMSNorm model", "Use on: [ffn]."
        )
    if not readers(layout, layout.full(arch.final_norm)):
        raise RecipeError(
            place,
            f"the task {layout.task}, whose output is the stream itself",
            "a task with a head",
            "Use on: [ffn].",
        )


def norms(layout: Layout) -> list[str]:
    """Every norm on the stream by full module name, in the order of the forward, the final one last."""
    found = [b.norm for block in range(layout.depth) for b in layout.branches(block) if b.norm]
    final = [layout.full(layout.arch.final_norm)] if layout.arch.final_norm else []
    return list(dict.fromkeys(found + final))


def readers(layout: Layout, norm: str) -> list[str]:
    """Modules that read the output of `norm`, by full name."""
    found = [
        read
        for block in range(layout.depth)
        for branch in layout.branches(block)
        if branch.norm == norm
        for read in branch.reads
    ]
    if layout.arch.final_norm and norm == layout.full(layout.arch.final_norm):
        found += [layout.full(name) for name in layout.arch.reads_stream]
    return [name for name in dict.fromkeys(found) if f"{name}.weight" in layout.tensors]


def consumers(layout: Layout) -> Iterator[str]:
    """Modules that read a normalised stream, the head included."""
    for norm in norms(layout):
        yield from readers(layout, norm)


def along(tensor: torch.Tensor, layout: Layout, name: str, axis: str) -> tuple[torch.Tensor, int]:
    """A float64 copy of the tensor with its one dimension `axis` moved last, and where that dimension was."""
    number = next(n for n, dim in enumerate(layout.tensors[name].dims) if dim.sections == ((axis,),))
    return tensor.double().movedim(number, -1), number


def fuse(layout: Layout, tensors: Tensors) -> tuple[Layout, dict[str, torch.Tensor]]:
    """Multiply every norm's gain and bias into its consumers. A tied head is untied.

    Args:
        layout: a pre-norm layout.
        tensors: all parameters by name, any dtype; not changed.

    Returns:
        the layout (untied) and its tensors; those that changed are float64.

    Raises:
        RecipeError: a norm's bias meets a consumer that can hold none.
    """
    fused = dict(tensors)
    offset = layout.arch.norm.gain_offset
    for norm in norms(layout):
        gain = tensors[f"{norm}.weight"].double() + offset
        bias = tensors.get(f"{norm}.bias")
        for module in readers(layout, norm):
            name = f"{module}.weight"
            weight, number = along(tensors[name], layout, name, "hidden")
            if bias is not None and bool(bias.any()):
                if f"{module}.bias" not in tensors:
                    raise RecipeError(module, "no bias to hold its norm's", "a Linear with a bias")
                fused[f"{module}.bias"] = tensors[f"{module}.bias"].double() + weight @ bias.double()
            fused[name] = (weight * gain).movedim(-1, number)
        fused[f"{norm}.weight"] = torch.full_like(gain, 1 - offset)
        if bias is not None:
            fused[f"{norm}.bias"] = torch.zeros_like(gain)
    return layout.resized({}, untie=True), fused


def rotate(layout: Layout, fused: Tensors, basis: torch.Tensor) -> tuple[Layout, dict[str, torch.Tensor]]:
    """Move a fused model's stream into `basis` and state it as a stock config of hidden size k.

    Args:
        layout: that of `fused`.
        fused: what `fuse` returned.
        basis: float64 `[d, k]`, orthonormal columns.

    Returns:
        the layout of hidden size k and its tensors, float64 where they touch the stream.
    """
    d, k = basis.shape
    narrow = restate(layout, {"hidden": k})
    gains = {f"{norm}.{part}" for norm in norms(layout) for part in ("weight", "bias")}
    reads = {f"{module}.weight" for module in consumers(layout)}
    embeddings = {f"{layout.full(name)}.weight" for name in layout.arch.embeddings}
    rotated: dict[str, torch.Tensor] = {}
    for name, tensor in fused.items():
        if name in gains:
            rotated[name] = tensor[:k].clone()  # all entries of a fused norm are the same
            continue
        dims = layout.tensors[name].dims
        moved = project(tensor, dims, "hidden", basis) if any(dim.has("hidden") for dim in dims) else tensor
        if name in reads:
            moved = moved * (d / k) ** 0.5
        elif name in embeddings:
            moved = moved * embedding_correction(layout, narrow)
        rotated[name] = moved
    return narrow, rotated


def embedding_correction(before: Layout, after: Layout) -> float:
    """Factor on the embeddings that undoes a change in the scale that the forward derives from hidden_size."""
    scale: Any = getattr(before.arch, "embedding_scale", None)
    if not scale:
        return 1.0
    return (before.families["hidden"] / after.families["hidden"]) ** 0.5


def restate(layout: Layout, changes: Mapping[str, int]) -> Layout:
    """The untied layout after `changes`, with the epsilon that belongs to its hidden size."""
    after = layout.resized(changes, untie="hidden" in changes)
    eps = layout.arch.norm.eps
    ratio = layout.families["hidden"] / after.families["hidden"]
    if eps:
        setattr(after.config, eps, getattr(layout.config, eps) * ratio)
    return after
