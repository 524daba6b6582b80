"""Tables as text, and the numbers in them: ratios formed within rounds, medians, shares."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import pyperf
from rich.table import Table as RichTable

UNSTABLE = 0.30
"""A middle half of the rounds wider than this share of the median is called unstable instead of given as a number."""


@dataclass(frozen=True)
class Table:
    """A table as text: title, column heads, rows, and a line of explanation."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""

    def rich(self) -> RichTable:
        """For the terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for position, name in enumerate(self.head):
            table.add_column(name, justify="left" if position == 0 else "right", no_wrap=position < 2, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For files."""
        align = ["---"] + ["---:"] * (len(self.head) - 1)
        lines = [f"**{self.title}**", "", *("| " + " | ".join(cells) + " |" for cells in (self.head, align, *self.rows))]
        return "\n".join(lines + (["", self.note] if self.note else [])) + "\n"


def round_values(benchmark: pyperf.Benchmark) -> list[float]:
    """Seconds per access, one value a round: the median of the round's worker."""
    return [statistics.median(run.values) for run in benchmark.get_runs()]


@dataclass(frozen=True)
class Ratio:
    """A ratio formed within each round: median and middle half over rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def unstable(self) -> bool:
        """Whether the middle half is too wide to give a number."""
        return self.high - self.low > UNSTABLE * self.median

    @property
    def text(self) -> str:
        """The number and its interval; `unstable` in its place where that is too wide."""
        digits = 2 if self.median >= 0.1 else 4
        if self.rounds < 2:
            return f"{self.median:.{digits}f}"
        spread = f"[{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"unstable {spread}" if self.unstable else f"{self.median:.{digits}f} {spread}"


def ratio_of(plain: list[float], other: list[float], *, cost: bool) -> Ratio:
    """Ratio within each round: other over plain if it is a cost, else plain over other."""
    ratios = sorted(b / a if cost else a / b for a, b in zip(plain, other, strict=True))
    median = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (median,) * 3
    return Ratio(median, low, high, len(ratios))


def ratio_text(plain: list[float], other: list[float], *, cost: bool) -> str:
    """Ratio within each round, as text."""
    return ratio_of(plain, other, cost=cost).text


def best_ratio(plain: list[float], other: list[float]) -> str:
    """The best ratio of any round."""
    return f"{max(a / b for a, b in zip(plain, other, strict=True)):.2f}"


def nanoseconds(values: list[float]) -> str:
    """Median over rounds in ns."""
    return f"{statistics.median(values) * 1e9:.2f}"


def share(part: int, whole: int) -> str:
    """A percentage."""
    return f"{100 * part / whole:.2f} %" if whole else "-"


def by_workload(suite: dict[str, pyperf.Benchmark]) -> dict[str, dict[str, dict[str, pyperf.Benchmark]]]:
    """Benchmarks by workload, strategy and metric, in the order of the file."""
    found: dict[str, dict[str, dict[str, pyperf.Benchmark]]] = {}
    for name, benchmark in suite.items():
        _, *workload, strategy, metric = name.split("/")
        found.setdefault("/".join(workload), {}).setdefault(strategy, {})[metric] = benchmark
    return found


def rates(counters: dict[str, int]) -> tuple[str, str]:
    """Hit rate and walks per device access."""
    devices = counters["device_accesses"]
    return share(counters["hits"], devices), f"{counters['device_walks'] / devices:.4f}" if devices else "-"


def counts(counters: dict[str, int], *names: str) -> tuple[str, ...]:
    """Counters as text; "-" for one that older results do not have."""
    return tuple(f"{counters[name]:,}" if name in counters else "-" for name in names)
