"""Plots of the report as SVG that stands inside HTML: no files, no network, the same bytes for the same numbers.

matplotlib without pyplot, so no global state: settings in a context, `svg.hashsalt` fixed, metadata dropped. Text stays
text, which browsers can select and scale. Ids get a prefix, since the ids of several figures meet in one page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

INK, SOFT, MAIN, LIMIT = "#1c2733", "#8896a5", "#1f6f8b", "#b3402a"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "tersor",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.unicode_minus": True,
}
WIDTH = 4.4  # inches: a phone shows it without scaling text below 10 px
NOTHING = {"Date": None, "Creator": None, "Format": None, "Type": None}


def bars(title: str, values: Mapping[str, float], label: Mapping[str, str], prefix: str) -> str:
    """Horizontal bars, the first on top, each with its own words at its end.

    Args:
        title: above the plot.
        values: by name; not negative.
        label: what is written beside each bar.
        prefix: of the ids, unique in the page.
    """

    def draw(axes: Any) -> None:
        names = list(values)
        colours = [SOFT, *[MAIN] * (len(names) - 1)]
        axes.barh(range(len(names)), list(values.values()), color=colours, height=0.62)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        for row, name in enumerate(names):
            axes.annotate(label[name], (values[name], row), (4, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, max(values.values(), default=1) * 1.35 or 1)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)

    return _svg(draw, title, 0.55 + 0.36 * len(values), prefix)


def intervals(
    title: str,
    values: Mapping[str, float],
    bounds: Mapping[str, Sequence[float | None]],
    limits: Sequence[float],
    prefix: str,
) -> str:
    """Points with their 95 % intervals, and gates as lines where they are not so far off that the rest would shrink.

    Args:
        title: above the plot.
        values: by name.
        bounds: low and high by name; None from a single sample.
        limits: values that gates hold the metric to.
        prefix: of the ids.
    """

    def draw(axes: Any) -> None:
        for row, (name, value) in enumerate(values.items()):
            colour = SOFT if row == 0 else MAIN
            low, high = bounds.get(name) or (None, None)
            if low is not None and high is not None:
                axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([value], [row], "o", color=colour, markersize=6)
            axes.annotate(f"{value:.4g}", (value, row), (0, 7), textcoords="offset points", ha="center")
        ends = [x for name in values for x in (values[name], *(bounds.get(name) or ())) if x is not None]
        reach = 2 * (max(ends) - min(ends)) if ends else 0.0
        for limit in (x for x in limits if min(ends) - reach <= x <= max(ends) + reach):
            axes.axvline(limit, color=LIMIT, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.75)
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=5)

    return _svg(draw, title, 0.75 + 0.42 * len(values), prefix)


def lines(
    title: str,
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    prefix: str,
    places: Sequence[float] | None = None,
    references: Mapping[str, float] | None = None,
    names: Sequence[str] | None = None,
) -> str:
    """One line or several over 0, 1, 2, … (layers, trials), or over places (steps).

    Args:
        title: above the plot.
        series: values by name; a single name is not shown as a legend. More than six go from light to dark, and the
            legend names the first and the last.
        xlabel: what is counted.
        prefix: of the ids.
        places: of the values, where they are not counted from 0.
        references: values by name that stand beside the series, as dashed lines.
        names: of the places, in their stead.
    """

    def draw(axes: Any) -> None:
        colours = (MAIN, LIMIT, SOFT, "#6a4c93", "#5b8c3a", "#c98a1b")
        many = len(series) > len(colours)
        for number, (name, values) in enumerate(series.items()):
            at = range(len(values)) if places is None else places
            style: dict[str, Any] = {"linewidth": 1.4, "color": colours[number % 6], "label": name, "markersize": 3.5}
            if many:
                shade = 0.25 + 0.75 * number / (len(series) - 1)
                ends = number in (0, len(series) - 1)
                style |= {"color": (MAIN, shade), "linewidth": 0.8, "label": name if ends else None}
            elif len(values) <= 60:
                style["marker"] = "o"
            axes.plot(at, values, **style)
        for name, value in (references or {}).items():
            axes.axhline(value, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(name, (1, value), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                          ha="right", fontsize=8, color=SOFT)  # fmt: skip
        axes.set_xlabel(xlabel)
        if names is None:
            axes.locator_params(axis="x", integer=True)
        else:
            axes.set_xticks(range(len(names)), names)
        axes.grid(axis="y", color="#e3e8ed", linewidth=0.8)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=9)

    return _svg(draw, title, 2.4, prefix)


def heat(title: str, rows: Sequence[Sequence[float]], xlabel: str, ylabel: str, prefix: str) -> str:
    """A field a value, darker where it is larger, from 0 to the largest, which the title names.

    Args:
        title: above the plot.
        rows: values; all rows are equally long.
        xlabel: what is counted along a row.
        ylabel: what the rows are.
        prefix: of the ids.
    """
    largest = max(map(max, rows))

    def draw(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        shades = LinearSegmentedColormap.from_list("tersor", ["#ffffff", MAIN])
        axes.pcolormesh(rows, cmap=shades, vmin=0, vmax=largest or 1, edgecolors="#ffffff", linewidth=0.5)
        axes.invert_yaxis()
        axes.set_xticks([0.5, len(rows[0]) - 0.5], [0, len(rows[0]) - 1])
        axes.set_yticks([0.5, len(rows) - 0.5], [0, len(rows) - 1])
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)

    return _svg(draw, f"{title} (dark: {largest:.3g})", 0.9 + min(2.6, 0.18 * len(rows)), prefix)


def _svg(draw: Any, title: str, height: float, prefix: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.tick_params(length=0)
        draw(axes)
        axes.set_title(title)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=NOTHING, transparent=True)
    return _inline(buffer.getvalue(), title, prefix)


def _inline(svg: str, title: str, prefix: str) -> str:
    """Only what HTML needs: no prolog, no metadata, no namespaces, ids of its own, scaled to the column."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    described = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg role="img" aria-label="{described}"'
    return re.sub(r"^<svg", lambda _: head, svg).strip()
