"""Where a requested reduction of real parameters is taken from: sizes that remove it, from which the loss may choose.

Hidden and heads move on coarse grids; FFN units take up the remainder, so a candidate delivers what was asked
for to within one unit of every block. Sizes stay the same in all blocks: that is what a stock config can
state.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

from ..errors import RecipeError
from ..layout import Layout
from .fuse import heads_follow, obstacle, restate
from .heads import WIDTHS, fixed_widths

Sizes = dict[str, int]

TOLERANCE = 0.005
"""Share of all parameters by which a candidate may miss the request if units of the FFN take up the remainder."""


def head_axis(layout: Layout) -> str:
    """The family of the heads that the config lets shrink (`kv_heads`, `heads`), or empty."""
    return next((a.name for a in layout.arch.axes if a.name in ("kv_heads", "heads") and a.shrinkable), "")


def free_words(layout: Layout) -> list[str]:
    """The recipe's words for what shrinks by default: all that a stock config of this architecture lets shrink but the
    width of heads, which RoPE's common frequencies make dear (heads.py), and hidden where whole heads go with it.
    """
    words = {"hidden": "hidden", "ffn": "ffn", head_axis(layout): "heads"}
    axes = [axis.name for axis in layout.arch.axes if axis.shrinkable and axis.name in words]
    free = [words[axis] for axis in axes if _held(layout, axis)]
    return [word for word in free if word != "hidden" or not obstacle(layout)]


def _held(layout: Layout, axis: str) -> bool:
    """Whether this config may state a smaller size: Phi-3's with longrope fixes hidden over the number of heads."""
    step = layout.grid(axis)
    sizes = {axis: max(layout.families[axis] // step * step - step, step)}
    if axis != "hidden" and layout.arch.axis("hidden"):  # which fewer heads may have to divide
        step = layout.grid("hidden", sizes)
        sizes["hidden"] = layout.families["hidden"] // step * step
    try:
        return bool(layout.resized(sizes))
    except RecipeError:
        return False


def axes_of(layout: Layout, on: Sequence[str]) -> list[str]:
    """Axis families behind the recipe's words.

    Raises:
        RecipeError: a word for which the architecture has no axis that may shrink.
    """
    found: list[str] = []
    for word in on:
        if word == "head_dim":
            if why := fixed_widths(layout):
                raise RecipeError("slice: on", "'head_dim'", "heads that may become narrower", f"Here are {why}.")
            found += WIDTHS
            continue
        axis = head_axis(layout) if word == "heads" else word
        if not axis or (layout.arch.axis(axis) is None and not (axis == "hidden" and heads_follow(layout))):
            free = ["heads" if a.name == head_axis(layout) else a.name for a in layout.arch.axes]
            raise RecipeError(
                "slice: on",
                repr(word),
                " or ".join(sorted(free)) or "nothing",
                f"A stock {layout.arch.model_type} config keeps {word} fixed.",
            )
        found.append(axis)
    return found


def candidates(layout: Layout, remove: float, axes: Sequence[str], round_to: int = 1, most: int = 6) -> list[Sizes]:
    """Sizes that remove the share asked for, the widest stream first.

    Args:
        layout: before.
        remove: share of the real parameters.
        axes: families that may change.
        round_to: hidden and ffn stay multiples of this (where they change).
        most: hidden sizes to offer, spread evenly.

    Returns:
        one or more; changed families only. With `ffn` among the axes each delivers `remove` within
        `TOLERANCE`, else each is the next grid point past it.

    Raises:
        RecipeError: no sizes remove that much.
    """
    found: list[Sizes] = []
    for heads in _heads(layout, axes):
        if "ffn" not in axes:
            found += _past(layout, heads, remove, axes, round_to)
            if found and ("hidden" not in axes or heads_follow(layout)):
                break
            continue
        wider = [
            _with_ffn(layout, {**heads, **hidden}, remove, round_to)
            for hidden in _hidden(layout, axes, heads, remove, round_to)
        ]
        found += spread([sizes for sizes in wider if sizes], most)
    if not found:
        raise RecipeError("slice: remove", str(remove), f"less on {', '.join(axes)}", "No sizes remove that much.")
    return found


def whole_heads(layout: Layout, options: Sequence[Sizes]) -> list[Sizes]:
    """The options that leave all heads as they are; all options if there is none."""
    changed = {head_axis(layout), *WIDTHS}
    return [option for option in options if not changed & option.keys()] or list(options)


def spread(items: list[Sizes], most: int) -> list[Sizes]:
    """At most `most` of the items, the first and the last among them, evenly."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _heads(layout: Layout, axes: Sequence[str]) -> list[Sizes]:
    """All heads whole, then fewer, then narrower ones: down to a half."""
    axis, d, found = head_axis(layout), layout.families["hidden"], [Sizes()]
    if heads_follow(layout):
        count, width = layout.families["heads"], layout.families["head_dim"]
        fewer = range(count - 1, max(count // 2, 1) - 1, -1) if "hidden" in axes else ()
        return [*([{}] if "ffn" in axes else []), *({"heads": left, "hidden": left * width} for left in fewer)]
    if axis in axes:
        count = layout.families[axis]
        found += [{axis: left} for left in range(count - 1, max(count // 2, 1) - 1, -1)]
    if "head_dim" in axes:
        width = layout.families["head_dim"]
        step = 2 * max(1, width // 16)
        found += [dict.fromkeys(WIDTHS, left) for left in range(width - step, max(width // 2, 2) - 1, -step)]
    if "hidden" in axes or layout.arch.axis("hidden") is None:
        return found
    return [sizes for sizes in found if d % layout.grid("hidden", sizes) == 0]  # hidden stays, heads must divide it


def _line(layout: Layout, sizes: Sizes, axis: str, step: int) -> tuple[float, float]:
    """Parameters as a line in the size of `axis`: (at zero, slope). Every tensor has each of our axes once."""
    full = layout.families[axis] // step * step
    low, high = ({**sizes, axis: size} for size in (full - step, full))
    slope = (_parameters(layout, high) - _parameters(layout, low)) / step
    return _parameters(layout, high) - slope * full, slope


def _narrowest(layout: Layout, heads: Sizes, remove: float, step: int) -> int:
    """The largest hidden size on the grid that alone removes at least the share asked for; 0 if there is none."""
    zero, slope = _line(layout, heads, "hidden", step)
    k = int((layout.parameters * (1 - remove) - zero) / slope) // step * step
    return max(min(k, (layout.families["hidden"] - 1) // step * step), 0)


def _past(layout: Layout, heads: Sizes, remove: float, axes: Sequence[str], round_to: int) -> list[Sizes]:
    """Sizes at or past the request where no FFN unit takes up the remainder."""
    goal = layout.parameters * (1 - remove) + 0.5
    if "hidden" not in axes or "hidden" in heads:
        return [heads] if heads and _parameters(layout, heads) <= goal else []
    k = _narrowest(layout, heads, remove, lcm(layout.grid("hidden", heads), round_to))
    return [{**heads, "hidden": k}] if k > 0 else []


def _hidden(layout: Layout, axes: Sequence[str], heads: Sizes, remove: float, round_to: int) -> list[Sizes]:
    """Hidden sizes from the whole down to where nothing is left for the FFN."""
    if "hidden" not in axes or heads_follow(layout):
        return [{}]
    step, d = lcm(layout.grid("hidden", heads), round_to), layout.families["hidden"]
    least = max(_narrowest(layout, heads, remove, step), step)
    grid = [{"hidden": k} for k in range((d - 1) // step * step, least - 1, -step)]
    whole: list[Sizes] = [] if d % layout.grid("hidden", heads) else [{}]
    return whole + spread(grid, 12)


def _with_ffn(layout: Layout, sizes: Sizes, remove: float, round_to: int) -> Sizes | None:
    """`sizes` with the number of units that comes nearest to the request; None if none can."""
    full, goal = layout.families["ffn"], layout.parameters * (1 - remove)
    if sizes and abs(_parameters(layout, sizes) - goal) <= TOLERANCE * layout.parameters:
        return sizes
    zero, slope = _line(layout, sizes, "ffn", 1)
    units = round((goal - zero) / slope / round_to) * round_to
    return {**sizes, "ffn": units} if max(round_to, full // 8) <= units < full else None


def _parameters(layout: Layout, sizes: Sizes) -> int:
    return restate(layout, sizes).parameters
