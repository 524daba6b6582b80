"""One run of `python -m bench`: cells checked, measured, written, shown."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyperf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.experiment import Cell, Checked, CheckError, Context
from bench.interrupts import checkpoint
from bench.registry import EXPERIMENTS
from bench.report import tables_of
from bench.results import count_benchmarks, counter_metadata, public_run, write_suites
from bench.rounds import Plan, calibrate, compiling, measure
from fastmmu import AuditError, MachineError, ReplayError, TraceError
from fastmmu.events import Op

FEWEST_RECORDS = 10_000  # of a trace that is timed
SHOWN_COUNTERS = ("records", "device_accesses", "hits", "wrong")


def matches(name: str, pattern: str | None) -> bool:
    """Whether a cell's name is asked for."""
    return pattern is None or pattern in name or fnmatch.fnmatch(name, pattern) or pattern.startswith(f"{name}/")


class Suite:
    """The chosen cells on their way from check to report."""

    def __init__(self, context: Context, cells: list[Cell], console: Console) -> None:
        self.context, self.cells, self.console = context, cells, console
        self.checked: dict[Cell, Checked] = {}
        self.runs: dict[Cell, list[pyperf.Run]] = {}
        self.reasons = {cell: self.why_not(cell) for cell in cells}

    @property
    def timed_cells(self) -> list[Cell]:
        """The cells that can be timed."""
        return [cell for cell in self.cells if not self.reasons[cell]]

    def why_not(self, cell: Cell) -> str:
        """Why a cell is not timed; a trace of the user's may end before the call from Python is forgotten."""
        context = self.context.of(cell)
        reason = EXPERIMENTS[cell.experiment].why_not(context, cell)
        if reason or not context.own:
            return reason
        events = context.workload.events
        records = int(np.isin(events["op"], (Op.ACCESS, Op.DEVICE)).sum())
        return "" if records >= FEWEST_RECORDS else f"{records:,} records, fewer than {FEWEST_RECORDS:,}"

    def say(self, text: str) -> None:
        """Print a line as it is."""
        self.console.print(text, highlight=False, markup=False)

    def progress(self) -> Progress:
        """A progress bar with time gone and left."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())

    def check(self) -> None:
        """Counters of every cell, each proven against the reference.

        Raises:
            TraceError: the trace does not replay. CheckError: see the experiments' `check`.
        """
        with compiling(self.timed_cells, self.context), self.progress() as progress:
            task = progress.add_task("checking against the reference", total=len(self.cells))
            for cell in self.cells:
                checkpoint()
                progress.update(task, description=f"checking {cell.name}")
                self.checked[cell] = self.checked_cell(cell)
                progress.advance(task)
            progress.update(task, description="checked against the reference")
        for cell, checked in self.checked.items():
            if set(SHOWN_COUNTERS) <= checked.counters.keys() and cell.workload == self.context.workload.name:
                shown = ", ".join(f"{checked.counters[name]:,} {name.replace('_', ' ')}" for name in SHOWN_COUNTERS)
                self.say(f"{cell.name}: {shown}")

    def checked_cell(self, cell: Cell) -> Checked:
        """One cell; what a trace asks of a machine, and it cannot do, is told with the cell's name."""
        try:
            return EXPERIMENTS[cell.experiment].check(self.context.of(cell), cell)
        except (TraceError, MemoryError):
            raise
        except ReplayError as error:
            raise TraceError(f"{self.context.trace}: {error}") from None
        except (MachineError, AuditError, ValueError) as error:
            raise CheckError(f"{cell.name}: {error}") from None

    def measure(self, rounds: dict[str, int]) -> None:
        """Time the cells, each experiment in its own rounds, so many as stand beside its name.

        Raises:
            WorkerError: a worker failed or came to another digest. CheckError: a timed run delivers something else.
        """
        for cell, reason in self.reasons.items():
            of_trace = self.context.own or cell.workload == self.context.workload.name
            if reason and (of_trace or "installed" in reason or "gcc" in reason):
                self.say(f"{cell.name}: not timed: {reason}")
        groups: dict[str, list[Cell]] = {}
        for cell in self.timed_cells:
            groups.setdefault(cell.experiment, []).append(cell)
        with self.progress() as progress:
            total = sum(rounds[name] * len(cells) for name, cells in groups.items())
            task = progress.add_task("timing", total=total)
            for name, cells in groups.items():
                progress.update(task, description=f"calibrating {name}")
                plans = [self.plan(cell) for cell in cells]
                progress.update(task, description=f"timing {name}")
                self.runs |= measure(plans, rounds[name], self.context, self.advance(progress, task))
            progress.update(task, description="timed")

    @staticmethod
    def advance(progress: Progress, task: object) -> Callable[[], None]:
        """One step of the progress bar."""
        return lambda: progress.advance(task)  # type: ignore[arg-type]

    def plan(self, cell: Cell) -> Plan:
        """Calibrate one cell; what it delivers must be what the checked run delivered.

        Raises:
            CheckError: it is not.
        """
        checkpoint()
        plan = calibrate(cell, EXPERIMENTS[cell.experiment].timed(self.context.of(cell), cell))
        expected = self.checked[cell].expected
        if plan.digest != expected:
            raise CheckError(f"{cell.name}: a timed run came to digest {plan.digest:#x}, expected {expected:#x}")
        return plan

    def benchmarks(self) -> dict[str, list[pyperf.Benchmark]]:
        """What was found, as the benchmarks of a suite for each experiment."""
        suites: dict[str, list[pyperf.Benchmark]] = {}
        for cell in self.cells:
            benchmarks = suites.setdefault(cell.experiment, [])
            checked = self.checked[cell]
            extra = counter_metadata(checked.counters)
            if cell.workload == self.context.workload.name:
                extra["trace"] = self.context.workload.source
            if checked.digest:
                extra["digest"] = checked.digest
            benchmarks += count_benchmarks(cell.name, checked.counts, extra)
            if cell in self.runs:
                benchmarks.append(pyperf.Benchmark([public_run(run, extra) for run in self.runs[cell]]))
        return {experiment: benchmarks for experiment, benchmarks in suites.items() if benchmarks}

    def write(self, folder: Path) -> None:
        """Write one pyperf suite per experiment.

        Raises:
            ResultError: the folder cannot be written.
        """
        checkpoint()
        write_suites(folder, self.benchmarks())

    def show(self, folder: Path) -> None:
        """Print the tables of the files just written."""
        for table in tables_of(folder, {cell.experiment for cell in self.cells}):
            self.console.print(table.rich())
            if table.note:
                self.say(table.note)
        self.console.print(f"results: {folder}", highlight=False, soft_wrap=True, markup=False)
