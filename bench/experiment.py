"""What an experiment is to the harness: cells that can be checked, and timed; tables that can be made from stored files.

A cell is one strategy on one workload; its name is `experiment/workload/strategy`, its benchmarks add a metric:
`mmio-cache/linux-boot/generation/time`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyperf

from bench.tables import Table
from bench.workloads import trace_workload
from fastmmu.vm import Workload


class CheckError(Exception):
    """Kernels and reference disagree: an error of this program, never a slow result."""


@dataclass(frozen=True)
class Cell:
    """A cell's name in its three parts."""

    experiment: str
    workload: str
    strategy: str

    @property
    def name(self) -> str:
        return f"{self.experiment}/{self.workload}/{self.strategy}"

    @classmethod
    def named(cls, name: str) -> Cell:
        """The cell of that name; a workload's own name may hold slashes."""
        experiment, *workload, strategy = name.split("/")
        return cls(experiment, "/".join(workload), strategy)


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
    """The trace that the command line names, read once, when first needed."""

    trace: Path
    records: int | None
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made when first asked for under that key: cells share what is checked once."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    @cached_property
    def workload(self) -> Workload:
        """The stream of the trace.

        Raises:
            TraceError: the file cannot be replayed.
        """
        return trace_workload(self.trace, self.records)


@dataclass(frozen=True)
class Experiment:
    """One question. `why_not(context, cell)` gives the reason why a checked cell is not timed, or an empty text."""

    name: str
    cells: Callable[[Context], list[Cell]]
    check: Callable[[Context, Cell], Checked]
    timed: Callable[[Context, Cell], Timed]
    why_not: Callable[[Context, Cell], str]
    tables: Callable[[dict[str, pyperf.Benchmark]], list[Table]]
    by_default: bool = True
    quick: bool = True  # part of --quick, which has 20 s, compiling included
    rounds: int = 0  # at least so many, whatever the command line says


def unavailable(context: Context, cell: Cell) -> str:
    """For experiments whose cells can all be timed."""
    return ""
