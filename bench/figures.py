"""Charts drawn as SVG by matplotlib, the same bytes each time, in colours that are told apart by those who see few.

Matplotlib is imported when the first chart is drawn, after everything has been measured. Text stays text. The colours of a dark
page are a style sheet that goes by those of the light one: a program without style sheets shows the light figure.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from itertools import groupby
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from bench.charts import Bar, Bars, Chart, Lines, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
INK, MUTED, GRID, SURFACE = "#1f2933", "#5f6b7a", "#d9dee5", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#008060", "#aa4499"  # after Okabe and Ito, and Tol
DARK = {INK: "#e6e9ee", MUTED: "#a3afbd", GRID: "#3a4350", SURFACE: "#161b22", BLUE: "#56b4e9", ORANGE: "#f4a259", GREEN: "#3ecf9f",
        PURPLE: "#dd99cc"}  # fmt: skip
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
WIDTH, ROW = 7.4, 0.235  # inches
LOGARITHMIC = 12  # bars whose values differ by more than this factor
COLUMNS = 3  # of panels
LONG_TITLE = 32  # of a panel: behind its comma goes below
LOOKS = {
    "published": {"color": ORANGE, "marker": "o", "linestyle": "none", "markersize": 5},
    "simulated": {"color": BLUE, "marker": "", "linestyle": "-"},
    "simulated-2": {"color": GREEN, "marker": "", "linestyle": "--"},
    "measured": {"color": BLUE, "marker": "s", "linestyle": "-", "markersize": 4},
    "measured-2": {"color": GREEN, "marker": "D", "linestyle": "--", "markersize": 4},
}
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "fastmmu", "font.size": 9, "font.family": "DejaVu Sans", "text.color": INK,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.linewidth": 0.8, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "figure.facecolor": SURFACE, "axes.facecolor": "none",
    "hatch.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip


class FiguresError(Exception):
    """No figure can be drawn here; one line."""


def style() -> str:
    """Style sheet for dark screens: whatever has a light colour gets the dark one. Its selectors name no ancestor: what `use` shows
    has none."""
    rules = [
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in DARK.items()
        for part in ("fill", "stroke")
    ]
    return "@media screen and (prefers-color-scheme:dark){" + "".join(rules) + "}"


def draw(chart: Chart) -> str:
    """A chart as an SVG element, without the style sheet: for a page that has it.

    Raises:
        FiguresError: matplotlib is not installed.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would warn about its own cache of fonts
    try:
        with warnings.catch_warnings():  # of matplotlib and what it imports, about each other
            warnings.simplefilter("ignore")
            import matplotlib
            from matplotlib.backends.backend_svg import FigureCanvasSVG
            from matplotlib.figure import Figure
    except ImportError as error:
        raise FiguresError(f"charts need matplotlib ({error}): pip install -e . brings it") from None
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        if isinstance(chart, Bars):
            draw_bars(figure, chart)
        else:
            draw_lines(figure, chart)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return tidied(out.getvalue(), chart)


def standing_alone(svg: str) -> str:
    """The element as a file of its own, with its style sheet."""
    head, rest = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><style>{style()}</style>{rest}\n'


def draw_bars(figure: Figure, chart: Bars) -> None:
    """Horizontal bars, groups one below the other; each bar has its number behind it, and its middle half as a line over it."""
    groups = [(name, list(bars)) for name, bars in groupby(chart.bars, lambda bar: bar.group)]
    titled = len(groups) > 1
    rows = len(chart.bars) + (len(groups) * 1.5 - 0.5 if titled else 0)
    figure.set_size_inches(WIDTH, 0.75 + ROW * rows)
    axes = figure.subplots()
    ends = [bar.high if bar.high is not None else bar.value for bar in chart.bars]
    starts = [bar.low if bar.low is not None else bar.value for bar in chart.bars]
    positive = [value for value in starts if value > 0]
    logarithmic = chart.reference is not None and len(positive) == len(starts) and max(ends) > LOGARITHMIC * min(positive)
    y, labels = 0.0, []
    for number, (name, bars) in enumerate(groups):
        if titled:
            y += 0.5 * (number > 0)
            axes.annotate(name, (0, y), (-4, 0), ("axes fraction", "data"), "offset points", ha="right", va="center", weight="bold")
            y += 1
        for bar in bars:
            draw_bar(axes, y, bar, chart.reference if logarithmic else 0)
            labels.append((y, bar.label))
            y += 1
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        low, high = min(*positive, chart.reference or 1), max(*ends, chart.reference or 1)
        axes.set_xlim(low / (high / low) ** 0.04, high * (high / low) ** 0.45)
    else:
        axes.set_xlim(0, max([*ends, chart.reference or 0]) * 1.4 or 1)
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels])
    axes.set_ylim(y - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(chart.axis)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    if chart.reference is not None:
        axes.axvline(chart.reference, color=INK, linewidth=1)


def draw_bar(axes: Axes, y: float, bar: Bar, start: float | None) -> None:
    """One bar; what is unstable has no bar, only its interval."""
    left = start or 0
    if not bar.unstable:
        axes.barh(y, bar.value - left, left=left, height=0.62, color=BLUE)
    end = bar.value
    if bar.low is not None and bar.high is not None:
        colour = ORANGE if bar.unstable else INK
        axes.plot([bar.low, bar.high], [y, y], color=colour, linewidth=1.2, solid_capstyle="butt", marker="|", markersize=5)
        end = max(bar.high, left)
    behind = {"facecolor": SURFACE, "edgecolor": "none", "pad": 0.8}
    axes.annotate(bar.said, (max(end, left), y), (6, 0), textcoords="offset points", va="center", fontsize=8, bbox=behind)


def draw_lines(figure: Figure, chart: Lines) -> None:
    """Panels with the same axes, three a row; one legend for all."""
    columns = min(COLUMNS, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    figure.set_size_inches(WIDTH, 0.7 + (1.85 if columns > 1 else 2.4) * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    cells = list(grid.flat)
    handles: dict[str, Any] = {}
    for axes, panel in zip(cells, chart.panels, strict=False):
        draw_panel(axes, panel, chart, handles)
    for axes in cells[len(chart.panels) :]:
        axes.set_visible(False)
    for number, axes in enumerate(cells[: len(chart.panels)]):
        axes.tick_params(labelbottom=number + columns >= len(chart.panels))
    figure.supxlabel(chart.x_axis, fontsize=9, color=INK)
    figure.supylabel(chart.y_axis, fontsize=9, color=INK)
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles), fontsize=8.5)


def draw_panel(axes: Axes, panel: Panel, chart: Lines, handles: dict[str, Any]) -> None:
    """One pair of axes."""
    xs = sorted({x for one in panel.series for x, _ in one.points})
    if chart.logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(0, 1.15 * max([y for one in panel.series for _, y in one.points] + [value for value, _ in chart.levels]))
    xs = [x for x in xs if not chart.logarithmic or math.log2(x).is_integer()]  # others lie too close
    axes.set_xticks(xs, [f"{x:g}" for x in xs], minor=False)
    axes.minorticks_off()
    axes.tick_params(labelsize=7.5 if len(chart.panels) > 1 else 8.5)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    if panel.title:
        title = panel.title if len(panel.title) <= LONG_TITLE else panel.title.replace(", ", ",\n", 1)
        axes.set_title(title, fontsize=8, loc="left", color=INK)
    for one in panel.series:
        x, y = zip(*one.points, strict=True)
        (line,) = axes.plot(x, y, linewidth=1.6, **LOOKS[one.source])
        handles.setdefault(one.label, line)
        for at, (low, high) in zip(x, one.spread, strict=False):
            axes.plot([at, at], [low, high], color=LOOKS[one.source]["color"], linewidth=1.2, marker="_", markersize=6)
    for value, label in chart.levels:
        axes.axhline(value, color=ORANGE, linewidth=1.4, linestyle=":")
        at = (0.99, value), (0, 2), ("axes fraction", "data"), "offset points"
        axes.annotate(f"{label}: {value:.2f}", *at, ha="right", va="bottom", fontsize=8)


def tidied(data: bytes, chart: Chart) -> str:
    """Matplotlib's file as one element: names that no other chart has, a title and a description, fonts of the reader."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(data)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r"(?:url\(#|href=\")#?([\w-]+)", data.decode()))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{chart.name}-{name}")
        for key, value in element.attrib.items():
            if key == f"{{{XLINK}}}href":
                element.set(key, f"#{chart.name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{chart.name}-"))
            elif key == "style" and "DejaVu" in value:
                element.set(key, re.sub(r"'DejaVu Sans'(, [^;]*)?", FONTS, value))
    root.set("role", "img")
    root.set("class", "chart")
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("aria-labelledby", f"{chart.name}-title {chart.name}-words")
    for position, (tag, text) in enumerate((("title", chart.title), ("desc", chart.words))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{chart.name}-{'title' if tag == 'title' else 'words'}"})
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")
