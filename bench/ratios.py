"""Ratios of a stored suite, as numbers: each timed cell beside the one that its experiment sets it in relation to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pyperf

from bench.charts import Bar, Bars, Chart
from bench.experiment import Cell, Experiment, Over
from bench.results import counters_of
from bench.tables import Ratio, ratio_of, round_values

TIME = "time"


@dataclass(frozen=True)
class Related:
    """A cell of a suite: its counters, its rounds in seconds, and the ratio to the plain cell's where both were timed."""

    cell: Cell
    counters: dict[str, int]
    times: list[float] | None = None
    over: Over | None = None
    plain: list[float] | None = None

    @property
    def ratio(self) -> Ratio | None:
        """The ratio, or None."""
        if self.over is None or self.times is None or self.plain is None:
            return None
        return ratio_of(self.plain, self.times, cost=self.over.cost)

    @property
    def is_plain(self) -> bool:
        """Whether it is the plain one itself."""
        return self.over is not None and self.over.strategy == self.cell.strategy


def cells_of(suite: dict[str, pyperf.Benchmark]) -> dict[Cell, dict[str, pyperf.Benchmark]]:
    """Benchmarks by cell and metric, in the order of the file."""
    found: dict[Cell, dict[str, pyperf.Benchmark]] = {}
    for name, benchmark in suite.items():
        cell, metric = name.rsplit("/", 1)
        found.setdefault(Cell.named(cell), {})[metric] = benchmark
    return found


def related(experiment: Experiment, suite: dict[str, pyperf.Benchmark]) -> list[Related]:
    """Every cell of a suite, beside its plain one; rounds that do not pair up give no ratio."""
    found = cells_of(suite)
    times = {cell: round_values(metrics[TIME]) for cell, metrics in found.items() if TIME in metrics}
    rows = []
    for cell, metrics in found.items():
        over = experiment.over_of(cell)
        plain = None if over is None else times.get(replace(cell, strategy=over.strategy))
        own = times.get(cell)
        if plain is not None and own is not None and len(plain) != len(own):
            plain = None
        rows.append(Related(cell, counters_of(next(iter(metrics.values()))), own, over, plain))
    return rows


def ratio_bars(experiment: Experiment, suite: dict[str, pyperf.Benchmark]) -> list[Chart]:
    """The ratios of an experiment as bars, one chart for each kind of ratio; the plain ones, always 1, are the line at 1."""
    kinds: dict[str, list[Bar]] = {}  # by the head of their column
    for row in related(experiment, suite):
        if row.ratio is None or row.is_plain or row.over is None:
            continue
        ratio = row.ratio
        bar = Bar(row.cell.workload, row.cell.strategy, ratio.median, ratio.text, ratio.low, ratio.high, ratio.unstable)
        kinds.setdefault(row.over.head, []).append(bar)
    made: list[Chart] = []
    for number, (head, bars) in enumerate(kinds.items(), 1):
        name = f"{experiment.name}-{number}" if len(kinds) > 1 else experiment.name
        alone = f" on {bars[0].group}" if len({bar.group for bar in bars}) == 1 else ""
        made.append(Bars(name, f"{experiment.name}: {head}{alone}", head, grouped(bars), reference=1.0))
    return made


def grouped(bars: list[Bar]) -> tuple[Bar, ...]:
    """Bars of one group beside each other, groups in the order in which they first come."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    return tuple(sorted(bars, key=lambda bar: groups.index(bar.group)))


def charts_of(experiment: Experiment, suite: dict[str, pyperf.Benchmark]) -> list[Chart]:
    """The charts of an experiment: its own, or its ratios."""
    return ratio_bars(experiment, suite) if experiment.charts is None else experiment.charts(experiment, suite)
