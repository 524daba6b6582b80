"""What an experiment is to the harness: cells that can be checked, and timed; tables that can be made from stored files.

A cell is one strategy on one workload; its name is `experiment/workload/strategy`, its benchmarks add a metric:
`mmio-cache/linux-boot/generation/time`. Parameters that are not at their defaults stand behind the workload:
`mmio-cache/linux-boot@slots=64/generation`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyperf

from bench.charts import Chart
from bench.tables import Table
from bench.workloads import device_accesses, trace_workload
from fastmmu.vm import Workload


class CheckError(Exception):
    """Kernels and reference disagree: an error of this program, never a slow result."""


@dataclass(frozen=True)
class Cell:
    """A cell's name in its parts; `parameters` are (name, value), sorted by name."""

    experiment: str
    workload: str
    strategy: str
    parameters: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.experiment}/{self.workload}{self.suffix}/{self.strategy}"

    @property
    def suffix(self) -> str:
        """The parameters as they stand in the name."""
        return "".join(f"@{name}={value}" for name, value in self.parameters)

    @classmethod
    def named(cls, name: str) -> Cell:
        """The cell of that name; a workload's own name may hold slashes."""
        experiment, *parts, strategy = name.split("/")
        workload, *values = "/".join(parts).split("@")
        pairs = (value.split("=") for value in values)
        return cls(experiment, workload, strategy, tuple((key, int(value)) for key, value in pairs))

    def value(self, parameter: str, default: int) -> int:
        """Value of a parameter."""
        return dict(self.parameters).get(parameter, default)

    def having(self, parameter: str, value: int) -> Cell:
        """The same cell with that value."""
        return replace(self, parameters=tuple(sorted({**dict(self.parameters), parameter: value}.items())))


@dataclass(frozen=True)
class Timed:
    """Work to be timed: `once()` runs it, `reset()` prepares it, `digest()` tells what it computed, `accesses` how many."""

    once: Callable[[], object]
    reset: Callable[[], object]
    digest: Callable[[], int]
    accesses: int

    def run(self, loops: int) -> float:
        """Seconds that `loops` runs take, preparation left out."""
        total = 0.0
        for _ in range(loops):
            self.reset()
            begin = time.perf_counter()
            self.once()
            total += time.perf_counter() - begin
        return total


@dataclass(frozen=True)
class Checked:
    """A cell's counters, proven; `expected` is the digest that timed runs must come to."""

    counters: dict[str, int]
    expected: int
    digest: str = ""
    counts: dict[str, int] = field(default_factory=dict)  # lower is better: a benchmark of its own where above zero


@dataclass
class Context:
    """The trace that the command line names, read once, when first needed; `own`: it is not the bundled one."""

    trace: Path
    records: int | None
    own: bool = False
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made when first asked for under that key: cells share what is checked once."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def of(self, cell: Cell) -> Context:
        """The context of a cell: one of its own for each number of records. Other parameters are the experiment's to look at."""
        records = cell.value("records", 0)
        return self.once(("records", records), lambda: Context(self.trace, records, self.own)) if records else self

    @cached_property
    def workload(self) -> Workload:
        """The stream of the trace.

        Raises:
            TraceError: the file cannot be replayed.
        """
        return trace_workload(self.trace, self.records)


@dataclass(frozen=True)
class Description:
    """What a reader must know: the question in a sentence; who claimed what, where and when; what the numbers do not show.

    An experiment without a source stands among the other experiments.
    """

    question: str
    source: str = ""
    claim: str = ""
    not_shown: str = ""
    year: int = 0


@dataclass(frozen=True)
class Over:
    """What a cell's time is set in relation to: that strategy's on the same workload. A cost is own over plain, a speed-up the
    other way round."""

    strategy: str
    cost: bool = False
    called: str = ""  # in heads, in place of the strategy's name

    @property
    def head(self) -> str:
        """Head of a column of such ratios."""
        return f"{'cost' if self.cost else 'speed-up'} over {self.called or self.strategy}"


@dataclass(frozen=True)
class Priced:
    """Which counters of a cell are exits, remote flushes, and faults that take the mmu lock; all for each `per`.

    Attributes:
        per: counter of the accesses that the time is divided by.
        exits, flushes, locks: counters, added up.
        endless: counters of accesses that never complete; where one is above zero, no time can be projected.
        over: what a projection is set in relation to, where that is not what the measured time is: a bare walk causes no exit.
    """

    per: str
    exits: tuple[str, ...] = ()
    flushes: tuple[str, ...] = ()
    locks: tuple[str, ...] = ()
    endless: tuple[str, ...] = ()
    over: Callable[[Cell], Over | None] | None = None


def alone(cell: Cell) -> Over | None:
    """For projections that stand beside nothing."""
    return None


def with_value(context: Context, cell: Cell, name: str, value: int) -> Cell | None:
    """A cell with a parameter at that value, whatever the cell."""
    return cell.having(name, value)


def on_the_trace(context: Context, cell: Cell, name: str, value: int) -> Cell | None:
    """Only cells of the trace have the parameter."""
    return cell.having(name, value) if cell.workload == context.workload.name else None


@dataclass(frozen=True)
class Parameter:
    """A number that a workload has, from `least` to `most`; `apply` gives a cell with it, or None for a cell that has it not."""

    name: str
    meaning: str
    least: int
    most: int
    apply: Callable[[Context, Cell, str, int], Cell | None] = with_value


RECORDS = Parameter("records", "records of the trace that are replayed, from its start", 1, 1 << 40)


def unavailable(context: Context, cell: Cell) -> str:
    """For experiments whose cells can all be timed."""
    return ""


def answered(context: Context) -> str:
    """For experiments that every trace can answer."""
    return ""


def without_devices(context: Context) -> str:
    """For experiments about accesses to devices."""
    return "" if device_accesses(context.workload) else "it has no device accesses"


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        cells: all of them, on this context.
        check, timed: a cell's counters, proven; its work.
        why_not: why a checked cell is not timed, or an empty text.
        tables: made from a stored suite.
        by_default, quick: part of a run that names nothing; of --quick, which has 20 s, compiling included.
        rounds: at least so many, whatever the command line says.
        description: for the report.
        part_of: the experiment whose question this one answers too.
        over: what each cell's time is set in relation to; a function where that depends on the cell.
        charts: made from a stored suite; without: bars of the ratios.
        traced: the cells that a recorded stream answers; without: no recording enters.
        unanswered: why this stream cannot answer, or an empty text.
        parameters: what `compare --vary` may change.
        priced: which counters cost what.
        measured: patterns of counters that are measurements: they differ from run to run.
    """

    name: str
    cells: Callable[[Context], list[Cell]]
    check: Callable[[Context, Cell], Checked]
    timed: Callable[[Context, Cell], Timed]
    why_not: Callable[[Context, Cell], str]
    tables: Callable[[dict[str, pyperf.Benchmark]], list[Table]]
    by_default: bool = True
    quick: bool = True
    rounds: int = 0
    description: Description | None = None
    part_of: str = ""
    over: Over | Callable[[Cell], Over | None] | None = None
    charts: Callable[[Experiment, dict[str, pyperf.Benchmark]], list[Chart]] | None = None
    traced: Callable[[Context], list[Cell]] | None = None
    unanswered: Callable[[Context], str] = answered
    parameters: tuple[Parameter, ...] = ()
    priced: Priced | None = None
    measured: tuple[str, ...] = ()

    def over_of(self, cell: Cell) -> Over | None:
        """What a cell's time is set in relation to."""
        return self.over(cell) if callable(self.over) else self.over
