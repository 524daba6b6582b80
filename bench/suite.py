"""One run of `python -m bench`: cells checked, measured, written, shown."""

from __future__ import annotations

from pathlib import Path

import pyperf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.cells import REPLAY, Cell, CheckError, Timed, check_mmio, digest_text, timed
from bench.report import tables_of
from bench.results import count_benchmarks, counter_metadata, public_run, write_suites
from bench.rounds import Plan, calibrate, compiling, measure
from fastmmu.strategy import MMIO_CACHE
from fastmmu.vm import Outcome, Workload

FEWEST_ACCESSES = 10_000
"""A run of fewer device accesses lasts so short that the 2 µs of the call from Python would be a tenth of it and more."""


class Suite:
    """The chosen cells on their way from check to report."""

    def __init__(
        self,
        trace: Path,
        records: int | None,
        workload: Workload,
        workloads: dict[str, Workload],
        cells: list[Cell],
        console: Console,
    ) -> None:
        self.trace, self.records = trace, records
        self.workload, self.workloads = workload, workloads
        self.cells = cells
        self.console = console
        self.outcomes: dict[str, Outcome] = {}
        self.runs: dict[str, list[pyperf.Run]] = {}
        self.accesses: dict[str, int] = {}

    def progress(self) -> Progress:
        """A progress bar with time gone and left."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        return Progress(*columns, console=self.console)

    def check(self) -> None:
        """Counters of every cell, each proven against the reference.

        Raises:
            ReplayError, CheckError: see `check_mmio`.
        """
        checked = [cell for cell in self.cells if cell.experiment == MMIO_CACHE.name]
        plain = Cell(MMIO_CACHE.name, self.workload.name, MMIO_CACHE.strategies[0].name)
        if plain not in checked and any(cell.workload == self.workload.name for cell in self.cells):
            checked.append(plain)  # whatever is timed on a trace, the trace itself is checked
        timed_cells = [cell for cell in self.cells if cell.workload == self.workload.name]
        with compiling(timed_cells, self.trace, self.records), self.progress() as progress:
            task = progress.add_task("checking against the reference", total=len(checked))
            for cell in checked:
                progress.update(task, description=f"checking {cell.name}")
                self.outcomes[cell.name] = check_mmio(self.workloads[cell.workload], cell.strategy)
                progress.advance(task)
            progress.update(task, description="checked against the reference")
        for cell in checked:
            if cell.workload == self.workload.name:
                counters = self.outcomes[cell.name].counters
                self.console.print(
                    f"{cell.name}: {counters['records']:,} records as recorded, {counters['device_accesses']:,} device accesses, "
                    f"{counters['hits']:,} walks saved, {counters['wrong']:,} wrong",
                    highlight=False,
                    markup=False,
                )

    def measure(self, rounds: int) -> None:
        """Time the cells on the trace; the small workloads are counted only.

        Raises:
            WorkerError: a worker failed or came to another digest.
        """
        cells = [cell for cell in self.cells if cell.workload == self.workload.name]
        works = {cell: timed(self.workload, cell) for cell in cells}
        for cell in [cell for cell, work in works.items() if work.accesses < FEWEST_ACCESSES]:
            accesses = works.pop(cell).accesses
            self.console.print(
                f"{cell.name}: counted, not timed: {accesses:,} accesses, fewer than {FEWEST_ACCESSES:,}",
                highlight=False,
                markup=False,
            )
        with self.progress() as progress:
            task = progress.add_task("calibrating", total=rounds * len(works))
            plans = [calibrate(cell, work) for cell, work in works.items()]
            for plan in plans:
                self.check_digest(plan, works[plan.cell])
            self.accesses = {cell.name: work.accesses for cell, work in works.items()}
            progress.update(task, description="timing")
            self.runs = measure(plans, rounds, self.trace, self.records, lambda name: progress.advance(task))

    def check_digest(self, plan: Plan, work: Timed) -> None:
        """The timed work delivers what the checked run delivered.

        Raises:
            CheckError: it does not.
        """
        expected = work.expected if work.expected is not None else self.outcomes[plan.cell.name].digests["device"]
        if plan.digest != expected:
            raise CheckError(f"{plan.cell.name}: a timed run came to digest {plan.digest:#x}, the checked one to {expected:#x}")

    def write(self, folder: Path) -> None:
        """Write one pyperf suite per experiment.

        Raises:
            ResultError: the folder cannot be written.
        """
        suites: dict[str, list[pyperf.Benchmark]] = {}
        for cell in self.cells:
            benchmarks = suites.setdefault(cell.experiment, [])
            workload = self.workloads[cell.workload]
            extra: dict[str, int | str] = {"trace": workload.source} if workload.source else {}
            if cell.experiment == REPLAY:
                extra |= counter_metadata({"accesses": self.accesses.get(cell.name, 0)})
            else:
                outcome = self.outcomes[cell.name]
                extra |= counter_metadata(outcome.counters) | {"digest": digest_text(outcome)}
                benchmarks += count_benchmarks(cell.name, outcome, extra)
            if cell.name in self.runs:
                benchmarks.append(pyperf.Benchmark([public_run(run, extra) for run in self.runs[cell.name]]))
        write_suites(folder, {experiment: benchmarks for experiment, benchmarks in suites.items() if benchmarks})

    def show(self, folder: Path) -> None:
        """Print the tables of the files just written."""
        for table in tables_of(folder, {cell.experiment for cell in self.cells}):
            self.console.print(table.rich())
            if table.note:
                self.console.print(table.note, highlight=False, markup=False)
        self.console.print(f"results: {folder}", highlight=False, soft_wrap=True, markup=False)
