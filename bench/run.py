"""The main job: choose cells, check and measure them, keep the files, write the report; or only what is asked of stored files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console

from bench.against import compare_folders, stored_suites
from bench.costs import projection
from bench.experiment import Cell, Context, Experiment
from bench.figures import FiguresError
from bench.interrupts import checkpoint
from bench.options import Options, UsageError
from bench.registry import EXPERIMENTS
from bench.report import PAGE, committed_folders, headline_folder, regenerate, write_report
from bench.results import load_suite, making_sense_of, probe_folder
from bench.suite import Suite, matches
from bench.workloads import BUNDLED_TRACE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
LOCAL = RESULTS / "local"
COMMITTED_NAME = re.compile(r"\d{4}-\d{2}-\d{2}-")  # of a results folder that SUMMARY.md and README.md are made from
WIDTH = 140  # of tables off a terminal
NO_TRACE = "no recording enters it, its guests are built for it"


def run(options: Options) -> int:
    """What the command line asks for; returns the exit status.

    Raises:
        UsageError, ResultError, TraceError, ReplayError, CheckError, WorkerError.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.report_only:
        folder = options.report or default_folder()
        if options.priced:
            show_projections(folder, list(EXPERIMENTS), options, console)
        show_report(folder, options, console)
        return compare(options.against[0], folder, options, console) if options.against else 0
    if len(options.against) == 2:
        return compare(*options.against, options, console)
    context = Context(options.trace or BUNDLED_TRACE, options.records, own=options.trace is not None)
    chosen = traced_cells(options, context) if context.own else cells_named(options, context)
    if options.list_cells:
        for cell in chosen:
            print(cell.name + ("" if context.own or EXPERIMENTS[cell.experiment].by_default else "  (only when named with --only)"))
        return 0
    if options.against:
        stored_suites(options.against[0])  # found out before an hour of work
    return measured(options, context, chosen, console)


def measured(options: Options, context: Context, chosen: list[Cell], console: Console) -> int:
    """Check and measure the cells; files, tables, report; exit status."""
    folder = options.output or LOCAL
    probe_folder(folder)
    suite = Suite(context, chosen, console)
    suite.check()
    experiments = list(dict.fromkeys(cell.experiment for cell in chosen))
    suite.measure({name: max(options.rounds, EXPERIMENTS[name].rounds) for name in experiments})
    if not suite.benchmarks():
        raise UsageError(f"{context.trace}: nothing was timed, and no counter is above zero: no results")
    suite.write(folder)
    suite.show(folder)
    if options.priced:
        show_projections(folder, experiments, options, console)
    show_report(folder, options, console)
    resolved = folder.resolve()
    if resolved.parent == RESULTS and COMMITTED_NAME.match(resolved.name) and options.records is None:
        try:
            regenerate(ROOT)
            console.print("results/SUMMARY.md and the tables of README.md regenerated")
        except FiguresError as error:
            console.print(f"results/SUMMARY.md and README.md not regenerated: {error}", markup=False)
    return compare(options.against[0], folder, options, console, experiments) if options.against else 0


def default_folder() -> Path:
    """Where stored results are looked for: those of the last run here, else the newest of the repository."""
    if list(LOCAL.glob("*.json")) or not committed_folders(RESULTS):
        return LOCAL
    return headline_folder(RESULTS)


def is_named(experiment: Experiment, pattern: str | None) -> bool:
    """Whether a pattern begins with the name of an experiment, which then is the only one that is meant."""
    return (pattern or "").split("/")[0] == experiment.name


def cells_named(options: Options, context: Context) -> list[Cell]:
    """The cells that are asked for.

    Raises:
        UsageError: there are none.
    """
    quick = options.records is not None
    named = [one for one in EXPERIMENTS.values() if is_named(one, options.only)]
    wanted = named or [
        one for one in EXPERIMENTS.values() if options.list_cells or (one.by_default and (one.quick or not quick))
    ]
    chosen = [cell for one in wanted for cell in one.cells(context) if matches(cell.name, options.only)]
    if not chosen:
        raise UsageError(f"--only {options.only}: no cell of that name; --list shows them")
    return chosen


def traced_cells(options: Options, context: Context) -> list[Cell]:
    """The cells that the user's trace can answer; the experiments that it cannot are named, with the reason.

    Raises:
        UsageError: there are none. TraceError: the trace cannot be replayed.
    """
    named = [one for one in EXPERIMENTS.values() if is_named(one, options.only)]
    quick = options.records is not None
    chosen: list[Cell] = []
    for one in named or [one for one in EXPERIMENTS.values() if not quick or (one.quick and one.by_default)]:
        checkpoint()
        cells = [] if one.traced is None else [cell for cell in one.traced(context) if matches(cell.name, options.only)]
        if not cells and options.only is not None and not named:
            continue
        if reason := NO_TRACE if one.traced is None else one.unanswered(context):
            print(f"{one.name}: not answered by {context.trace}: {reason}", file=sys.stderr)
        else:
            chosen += cells
    if not chosen:
        raise UsageError(f"{options.trace}: no cell that is asked for can be answered by it")
    return chosen


def show_projections(folder: Path, experiments: list[str], options: Options, console: Console) -> None:
    """Counts times costs, for the experiments that name what costs."""
    shown = False
    for name in experiments:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        with making_sense_of(path):
            table = projection(EXPERIMENTS[name], load_suite(path), options.prices)
        if table is not None:
            console.print(table.rich())
            console.print(table.note, highlight=False, markup=False)
            shown = True
    for line in options.prices.words if shown else ():
        console.print(line, highlight=False, markup=False)


def show_report(folder: Path, options: Options, console: Console) -> None:
    """Write the page, and say where it is."""
    checkpoint()
    missing = write_report(folder, options.prices)
    if missing:
        print(missing, file=sys.stderr)
    console.print(f"report: {folder / PAGE}", highlight=False, soft_wrap=True, markup=False)


def compare(older: Path, newer: Path, options: Options, console: Console, experiments: list[str] | None = None) -> int:
    """Print what changed; exit status."""
    outcome = compare_folders(older, newer, options.min_speed, experiments)
    for table in outcome.tables():
        console.print(table.rich())
        if table.note:
            console.print(table.note, highlight=False, markup=False)
    for line in outcome.words():
        console.print(line, highlight=False, markup=False)
    return outcome.status
