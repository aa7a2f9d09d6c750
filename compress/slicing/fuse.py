"""Norms of a pre-norm stream without gains: the algebra that makes the residual stream free to rotate.

    reads(gain · n(x) + bias)  =  (reads · diag(gain)) n(x) + (reads · bias + its own bias)

After fusing, every norm of the stream is a bare division by the RMS, which an orthogonal rotation of the
stream does not change; so Q may be multiplied into every tensor that touches the stream. Cut to k columns,
the stock norm of width k divides by the RMS over k values where the original divided by d:

    y / √(|y|²/k + eps·d/k)  =  √(k/d) · y / √(|y|²/d + eps)

so `eps·d/k` goes into the config (or √(k/d) into the producers, where transformers' code fixes eps) and √(d/k) into
the consumers, in float64 (as a bf16 gain it would be rounded with the same sign everywhere). A LayerNorm's bias b goes
into its consumers' biases; where one has none (the head of GPT-2), into the direction that n(x), of mean zero, leaves
free: the norm's bias becomes all ones, W becomes W centred + W b 1ᵀ/d. Unlike SliceGPT's code nothing is centred for
RMSNorm models and eps is the config's own. Source: SliceGPT (Ashkboos et al., arXiv 2401.15024), section 3.

All functions are pure, take tensors by name and work in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from ..axes import Dim, project
from ..deferred import Later, at_once
from ..errors import RecipeError
from ..layout import Layout

ROWS = 4096
"""Rows that are changed at a time."""

Tensors = Mapping[str, torch.Tensor]


def obstacle(layout: Layout) -> str:
    """Why the stream has no free rotation that a stock config could hold; empty if it has one."""
    arch = layout.arch
    if arch.stream != "pre-norm":
        return f"a {arch.stream} stream: its norms stand behind the additions"
    if arch.axis("hidden") is None and not heads_follow(layout):
        return "a config that ties hidden to other sizes"
    behind = next((b.post_norm for b in arch.branches if b.post_norm), "")
    if behind:
        return f"the norm {behind}, which acts on what is added to the stream"
    if layout.task == "feature-extraction" or not readers(layout, layout.full(arch.final_norm)):
        return f"the task {layout.task}, whose output is the stream itself"
    return ""


def heads_follow(layout: Layout) -> bool:
    """Whether a stock config has no width of heads, so that hidden may shrink only by whole heads (GPT-2, OPT)."""
    return layout.arch.axis("hidden") is None and ("hidden", "heads") in layout.arch.coupled


def rotatable(layout: Layout) -> None:
    """Refuse a layout whose stream has no free rotation that a stock config could hold.

    Raises:
        RecipeError: names what stands in the way.
    """
    found = obstacle(layout)
    if found:
        place = f"slice on hidden: {layout.arch.model_type}"
        raise RecipeError(place, found, "a stream that may be rotated", "Use on: [ffn].")


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


def tied_heads(layout: Layout) -> list[str]:
    """Head modules that read the final norm and share their weight with the embedding."""
    if not layout.arch.final_norm:
        return []
    found = readers(layout, layout.full(layout.arch.final_norm))
    return [module for module in found if layout.tensors[f"{module}.weight"].shared_with]


def stays_tied(layout: Layout) -> bool:
    """Whether a head can stay tied through a rotation: see `tie`. A LayerNorm's bias leaves it no room."""
    return bool(tied_heads(layout)) and layout.arch.norm.kind == "rms"


def embeddings(layout: Layout) -> list[str]:
    """Parameters that write to the stream before the first block."""
    names = [layout.full(name) for name in layout.arch.embeddings]
    return [f for name in names for f in (name, f"{name}.weight", f"{name}.bias") if f in layout.tensors]


def centred(tensor: torch.Tensor, layout: Layout, name: str) -> torch.Tensor:
    """The parameter with its mean along `hidden` removed; computed in float64, float32."""
    values, number = along(tensor, layout, name, "hidden")
    return (values - values.mean(-1, keepdim=True)).movedim(-1, number).float()


def fuse(layout: Layout, tensors: Tensors, later: Later = at_once) -> tuple[Layout, dict[str, torch.Tensor]]:
    """Multiply every norm's gain and bias into its consumers, and a LayerNorm's centring into the producers.

    A tied head that cannot stay tied is untied; in front of one that can, the final norm keeps its gain.

    Args:
        layout: a pre-norm layout.
        tensors: all parameters by name, any dtype; not changed.
        later: when the weights are made.

    Returns:
        the layout and its tensors; those that changed are float32, computed in float64.
    """
    fused = dict(tensors)
    norm_, kept = layout.arch.norm, tied_heads(layout) if stays_tied(layout) else []
    for norm in norms(layout):
        if any(module in kept for module in readers(layout, norm)):
            continue
        gain = tensors[f"{norm}.weight"].double() + norm_.gain_offset
        bias = tensors.get(f"{norm}.bias")
        lent = bias is not None and any(f"{module}.bias" not in tensors for module in readers(layout, norm))
        for module in readers(layout, norm):
            name = f"{module}.weight"
            constant = bias.double() if lent and bias is not None else None
            if bias is not None and not lent:
                weight, _ = along(tensors[name], layout, name, "hidden")
                fused[f"{module}.bias"] = (tensors[f"{module}.bias"].double() + weight @ bias.double()).float()
            change = partial(scaled, tensors[name], layout, name, gain, constant)
            fused[name] = later(name, tensors[name].shape, change)
        fused[f"{norm}.weight"] = torch.full_like(gain, 1 - norm_.gain_offset).float()
        if bias is not None:
            fused[f"{norm}.bias"] = torch.full_like(gain, float(lent)).float()
    after = layout if kept else layout.resized({}, untie=True)
    if norm_.kind == "layer":
        for name in producers(after):
            fused[name] = later(name, fused[name].shape, partial(centred, fused[name], after, name))
    return after, fused


def scaled(
    tensor: torch.Tensor, layout: Layout, name: str, gain: torch.Tensor, constant: torch.Tensor | None = None
) -> torch.Tensor:
    """The parameter with its `hidden` multiplied by a gain; computed in float64, float32.

    With a `constant` b, what all ones in its `hidden` give is what b gave before.
    """

    def rows(part: torch.Tensor) -> torch.Tensor:
        values, number = along(part, layout, name, "hidden")
        found = values * gain
        if constant is not None:
            found = found + ((values @ constant) / len(gain) - found.mean(-1))[..., None]
        return found.movedim(-1, number).float()

    return by_rows(rows, tensor, layout.tensors[name].dims)


def producers(layout: Layout) -> list[str]:
    """Parameters whose values end up in the stream: embeddings, what writes to it, and their biases."""
    writers = [branch.writes for block in range(layout.depth) for branch in layout.branches(block)]
    found = [*embeddings(layout), *(f"{w}.{part}" for w in writers for part in ("weight", "bias"))]
    return [name for name in found if name in layout.tensors]


def rotate(
    layout: Layout, fused: Tensors, basis: torch.Tensor, narrow: Layout, later: Later = at_once
) -> dict[str, torch.Tensor]:
    """Move a fused model's stream into `basis`, as a stock config of hidden size k holds it.

    Args:
        layout: that of `fused`.
        fused: what `fuse` returned; other axes than hidden may have been shrunk since.
        basis: float64 `[d, k]`, from `cut`.
        narrow: the layout to arrive at, from `restate`.
        later: when the weights are made.

    Returns:
        tensors by name; those that touch the stream are new, float32.
    """
    d, k = basis.shape
    kept = tied_heads(layout)
    gains = {f"{norm}.{part}" for norm in norms(layout) for part in ("weight", "bias")}
    reads = {f"{module}.weight" for module in consumers(layout) if module not in kept}
    writes, written = set(producers(layout)), embeddings(layout)
    correction, scale = embedding_correction(layout, narrow), stream_scale(layout, narrow)
    back = lift(layout, basis).T
    rotated: dict[str, torch.Tensor] = {}
    for name, tensor in fused.items():
        if narrow.tensors[name].shared_with:
            continue
        if name in gains:
            rotated[name] = tensor[:k].clone()  # all entries of a fused norm are the same
            continue
        dims, factor = layout.tensors[name].dims, scale if name in writes else 1.0
        if name in written:
            factor *= correction
        if any(dim.has("hidden") for dim in dims):
            turned_shape = [k if dim.has("hidden") else n for dim, n in zip(dims, tensor.shape, strict=True)]
            axes = back if name in reads else basis
            rotated[name] = later(name, turned_shape, partial(turned, tensor, dims, axes, factor))
        else:
            rotated[name] = tensor if tensor.dtype == torch.float32 else tensor.float()
    if kept:
        name, offset = f"{layout.full(layout.arch.final_norm)}.weight", layout.arch.norm.gain_offset
        gain = (basis * (fused[name].double() + offset)[:, None] * basis).sum(0) * (d / k) ** 0.5 / correction
        rotated[name] = (gain - offset).float()
    for name, shape in narrow.tensors.items():
        if shape.shared_with:
            rotated[name] = rotated[shape.shared_with]
    return rotated


def lift(layout: Layout, basis: torch.Tensor) -> torch.Tensor:
    """The normalised stream of width d from the one of width k in `basis`: float64 `[k, d]`; all ones stay all ones."""
    d, k = basis.shape
    found = (d / k) ** 0.5 * basis.T
    return found + 1 / k if layout.arch.norm.kind == "layer" else found


def stream_scale(before: Layout, after: Layout) -> float:
    """What a narrow stream is multiplied by, where transformers' code fixes eps: eps·d/k under |y|²/k then is eps."""
    if before.arch.norm.eps:
        return 1.0
    return (after.families["hidden"] / before.families["hidden"]) ** 0.5


def turned(tensor: torch.Tensor, dims: tuple[Dim, ...], basis: torch.Tensor, factor: float) -> torch.Tensor:
    """The parameter with its `hidden` expressed in the basis; computed in float64, float32."""
    return by_rows(lambda part: (project(part, dims, "hidden", basis) * factor).float(), tensor, dims)


def by_rows(
    change: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, dims: tuple[Dim, ...]
) -> torch.Tensor:
    """`change` of a tensor in pieces where rows do not meet: an embedding in float64 is the largest thing there is."""
    if tensor.ndim != 2 or dims[0].has("hidden") or len(tensor) <= ROWS:
        return change(tensor)
    return torch.cat([change(part) for part in tensor.split(ROWS)])


def cut(layout: Layout, fused: Tensors, basis: torch.Tensor, k: int) -> torch.Tensor:
    """The first directions of a basis as coordinates of a stream of width k that a stock config can hold.

    A tied head multiplies the embedding E by Qᵀ diag(g) Q, where only a diagonal can be stored: so Q is
    turned, inside the space it spans, to the eigenvectors of that matrix, which makes it diagonal. With k = d
    this is exact. A LayerNorm removes the mean of its k values: so k − 1 directions are embedded in k values
    of mean zero.

    Args:
        layout: that of `fused`.
        fused: what `fuse` returned.
        basis: float64 `[d, d]`, orthonormal columns, most important first.
        k: the new hidden size.

    Returns:
        float64 `[d, k]`.
    """
    if layout.arch.norm.kind == "layer":
        return basis[:, : k - 1] @ zero_sum(k).T
    if not tied_heads(layout):
        return basis[:, :k]
    gain = fused[f"{layout.full(layout.arch.final_norm)}.weight"].double() + layout.arch.norm.gain_offset
    chosen = basis[:, :k]
    return chosen @ torch.linalg.eigh(chosen.T @ (gain[:, None] * chosen))[1]


def zero_sum(k: int) -> torch.Tensor:
    """float64 `[k, k - 1]`, orthonormal columns that each sum to zero (Helmert's)."""
    columns = torch.ones(k, k, dtype=torch.float64).triu(1) - torch.arange(k, dtype=torch.float64).diag()
    return (columns / columns.norm(dim=0).clamp_min(1e-300))[:, 1:]


def embedding_correction(before: Layout, after: Layout) -> float:
    """Factor on the embeddings that undoes a change in the scale that the forward derives from hidden_size."""
    if not before.arch.embedding_scale:
        return 1.0
    return (before.families["hidden"] / after.families["hidden"]) ** 0.5


def restate(layout: Layout, changes: Mapping[str, int]) -> Layout:
    """The layout after `changes`, with the epsilon of its hidden size; untied where a head cannot stay tied."""
    rotates = "hidden" in changes
    after = layout.resized(changes, untie=rotates and not stays_tied(layout))
    if rotates and layout.arch.norm.eps:
        eps = layout.arch.norm.eps
        ratio = layout.families["hidden"] / after.families["hidden"]
        setattr(after.config, eps, getattr(layout.config, eps) * ratio)
    return after
