"""Charts as data: what is drawn, and the same in words. `figures.py` draws them.

Like tables they are made from stored files and from nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Bar:
    """One number with its spread; `said` is how a reader is told of it."""

    group: str
    label: str
    value: float
    said: str
    low: float | None = None
    high: float | None = None
    unstable: bool = False


@dataclass(frozen=True)
class Bars:
    """Bars in groups; `reference` is where nothing is gained and nothing lost."""

    name: str
    title: str
    axis: str
    bars: tuple[Bar, ...]
    reference: float | None = None

    @property
    def words(self) -> str:
        """Every bar, for who cannot see it."""
        groups = groupby(self.bars, lambda bar: bar.group)
        said = "; ".join(f"{name}: " + ", ".join(f"{bar.label} {bar.said}" for bar in bars) for name, bars in groups)
        axis = "" if self.axis in self.title else f" {self.axis}."
        return f"{self.title}.{axis} {said}."


@dataclass(frozen=True)
class Series:
    """Points (x, y); `source` says whose they are: one of SOURCES."""

    label: str
    source: str
    points: tuple[tuple[float, float], ...]
    spread: tuple[tuple[float, float], ...] = ()


SOURCES = ("published", "simulated", "simulated-2", "measured", "measured-2")
"""Each has its colour and its marks, in all charts."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Lines:
    """Lines over a number of things, vCPUs as a rule, in panels that share their axes."""

    name: str
    title: str
    x_axis: str
    y_axis: str
    panels: tuple[Panel, ...]
    logarithmic: bool = False
    levels: tuple[tuple[float, str], ...] = ()  # published values that belong to no x

    @property
    def words(self) -> str:
        """Every point, for who cannot see it."""
        said = "; ".join(
            f"{panel.title}{', ' * bool(panel.title)}{one.label}: " + ", ".join(f"{x:g}: {y:.3g}" for x, y in one.points)
            for panel in self.panels
            for one in panel.series
        )
        levels = "".join(f" {label}: {value:.2f}." for value, label in self.levels)
        return f"{self.title}. {self.y_axis}, by {self.x_axis}. {said}.{levels}"


Chart = Bars | Lines
