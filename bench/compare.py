"""`python -m bench compare`: one question, asked of some strategies, with parameters of the workload varied."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyperf
from rich.console import Console

from bench.costs import projected
from bench.experiment import Cell, Context, Experiment, Over
from bench.options import ROUNDS, Question, UsageError
from bench.ratios import Related, related
from bench.registry import EXPERIMENTS
from bench.suite import Suite
from bench.tables import Ratio, Table
from bench.workloads import BUNDLED_TRACE

WIDTH = 160  # off a terminal
MOST_COUNTERS = 4  # in a table; JSON and CSV have all


def ask(question: Question) -> int:
    """Check, measure and print; exit status.

    Raises:
        UsageError, TraceError, CheckError, WorkerError.
    """
    experiment = experiment_named(question.experiment)
    context = Context(question.trace or BUNDLED_TRACE, None, own=question.trace is not None)
    cells = chosen_cells(experiment, context, question)
    suite = Suite(context, cells, Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH))
    suite.check()
    asked = replace(question, rounds=question.rounds or max(ROUNDS, experiment.rounds))
    suite.measure({experiment.name: asked.rounds})
    rows = answers(experiment, suite, asked)
    print(FORMS[question.form](experiment, rows, asked), end="")
    return 0


def one_of(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error that names what there is."""
    return UsageError(f"{what} {name!r}: there is none; there are: {', '.join(known)}")


def experiment_named(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in EXPERIMENTS:
        raise one_of("experiment", name, EXPERIMENTS)
    return EXPERIMENTS[name]


def chosen_cells(experiment: Experiment, context: Context, question: Question) -> list[Cell]:
    """The cells of a question, workload by workload, values in the order given.

    Raises:
        UsageError: an unknown strategy, workload or parameter, or the trace cannot answer. TraceError: it cannot be replayed.
    """
    cells = cells_to_ask(experiment, context)
    for name in question.strategies:
        if name not in (known := dict.fromkeys(cell.strategy for cell in cells)):
            raise one_of("--strategies", name, known)
    for name in question.workloads:
        if name not in (known := dict.fromkeys(cell.workload for cell in cells)):
            raise one_of("--workloads", name, known)
    if question.strategies:
        places = {name: place for place, name in enumerate(question.strategies)}
        cells = sorted((cell for cell in cells if cell.strategy in places), key=lambda cell: places[cell.strategy])
    workloads = list(dict.fromkeys(cell.workload for cell in cells))
    found = varied(experiment, context, sorted(cells, key=lambda cell: workloads.index(cell.workload)), question)
    if question.workloads:
        found = [cell for cell in found if cell.workload in question.workloads]
    else:
        timed = {cell.workload for cell in found if not experiment.why_not(context.of(cell), cell)}
        found = [cell for cell in found if cell.workload in timed] or found
    if not found:
        raise UsageError("--vary: no workload that is asked for has all of these parameters")
    return found


def cells_to_ask(experiment: Experiment, context: Context) -> list[Cell]:
    """All cells, or those of the user's trace.

    Raises:
        UsageError: the trace cannot answer.
    """
    if not context.own:
        return experiment.cells(context)
    if experiment.traced is None:
        raise UsageError(f"{experiment.name}: no recording enters it, its guests are built for it; ask it without --trace")
    if reason := experiment.unanswered(context):
        raise UsageError(f"{experiment.name}: not answered by {context.trace}: {reason}")
    return experiment.traced(context)


def varied(experiment: Experiment, context: Context, cells: list[Cell], question: Question) -> list[Cell]:
    """Each cell with every combination of values; those that have not all of the parameters are left out.

    Raises:
        UsageError: an unknown parameter, or a value out of its range.
    """
    known = {parameter.name: parameter for parameter in experiment.parameters}
    for name, values in question.vary:
        if not known:
            raise UsageError(f"--vary: {experiment.name} has no parameters that can be varied")
        if name not in known:
            said = "; ".join(f"{one.name}: {one.meaning}" for one in known.values())
            raise UsageError(f"--vary: {experiment.name} has no parameter {name!r}; it has: {said}")
        for value in values:
            if not known[name].least <= value <= known[name].most:
                raise UsageError(f"--vary: {name}={value}, expected {known[name].least:,} to {known[name].most:,}")
    found: dict[Cell, None] = {}
    for combination in itertools.product(*(values for _, values in question.vary)):
        for cell in cells:
            one: Cell | None = cell
            for (name, _), value in zip(question.vary, combination, strict=True):
                one = None if one is None else known[name].apply(context, one, name, value)
            if one is not None:
                found[one] = None
    order = {name: place for place, name in enumerate(dict.fromkeys(cell.workload for cell in found))}
    return sorted(found, key=lambda cell: order[cell.workload])


def answers(experiment: Experiment, suite: Suite, question: Question) -> list[dict[str, Any]]:
    """One row for each cell: names, values, ratio, times, projection, counters."""
    strategies = dict.fromkeys(cell.strategy for cell in suite.cells)

    def over(cell: Cell) -> Over | None:
        wanted = experiment.over_of(cell)
        if wanted is None or wanted.strategy in strategies:
            return wanted
        return Over(next(iter(strategies)), cost=wanted.cost)

    benchmarks: list[pyperf.Benchmark] = suite.benchmarks().get(experiment.name, [])
    found = {row.cell: row for row in related(replace(experiment, over=over), {one.get_name(): one for one in benchmarks})}
    rows = []
    for cell in suite.cells:
        row = found.get(cell) or Related(cell, {})
        counters = suite.checked[cell].counters
        cost = projected(experiment.priced, counters, question.prices)
        rows.append({
            "experiment": cell.experiment,
            "workload": cell.workload,
            **dict(cell.parameters),
            "strategy": cell.strategy,
            "ratio": row.ratio,
            "ratio_of": "" if row.ratio is None or row.over is None else row.over.head,
            "measured_ns": None if row.times is None else statistics.median(row.times) * 1e9,
            "not_timed": suite.reasons[cell],
            "projected_ns": cost,
            "counters": counters,
        })  # fmt: skip
    return rows


def parameters_of(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the parameters that stand in the rows."""
    fixed = ("experiment", "workload", "strategy", "ratio", "ratio_of", "measured_ns", "not_timed", "projected_ns", "counters")
    return list(dict.fromkeys(name for row in rows for name in row if name not in fixed))


def telling(experiment: Experiment, rows: list[dict[str, Any]]) -> list[str]:
    """The counters that explain the ratios: those that differ between rows, the priced ones first."""
    names = dict.fromkeys(name for row in rows for name in row["counters"])
    priced = experiment.priced
    first = () if priced is None else (*priced.exits, *priced.flushes, *priced.locks)
    differ = [name for name in (*first, *names) if name in names and len({row["counters"].get(name) for row in rows}) > 1]
    return list(dict.fromkeys(differ))[:MOST_COUNTERS]


def as_table(experiment: Experiment, rows: list[dict[str, Any]], question: Question) -> str:
    """For people."""
    parameters, counters = parameters_of(rows), telling(experiment, rows)
    heads = dict.fromkeys(row["ratio_of"] for row in rows if row["ratio_of"])
    head = next(iter(heads)) if len(heads) == 1 else "ratio"
    body = []
    for row in rows:
        ratio = "-" if row["ratio"] is None else row["ratio"].text + (f" ({row['ratio_of']})" if len(heads) > 1 else "")
        times = ("-" if row[name] is None else f"{row[name]:.2f}" for name in ("measured_ns", "projected_ns"))
        counted = (f"{row['counters'][name]:,}" if name in row["counters"] else "-" for name in counters)
        values = (f"{row[name]:,}" if name in row else "-" for name in parameters)
        body.append((f"{row['workload']} / {row['strategy']}", ratio, *values, *times, *counted))
    title = f"{experiment.name}: {question.rounds} interleaved rounds"
    table = Table(title, ("workload / strategy", head, *parameters, "ns measured", "ns projected", *counters), body)
    out = io.StringIO()
    console = Console(file=out, width=None if sys.stdout.isatty() else WIDTH, force_terminal=sys.stdout.isatty())
    console.print(table.rich())
    if experiment.priced is not None:
        console.print("Projected: counts for each access times assumed costs, no measurement.", highlight=False)
        for line in question.prices.words:
            console.print(line, highlight=False, markup=False)
    return out.getvalue()


def ratio_fields(ratio: Ratio | None) -> dict[str, Any] | None:
    """A ratio as plain values; the number is missing where it is unstable."""
    if ratio is None:
        return None
    value = None if ratio.unstable else ratio.median
    return {"median": value, "low": ratio.low, "high": ratio.high, "rounds": ratio.rounds, "unstable": ratio.unstable}


def as_json(experiment: Experiment, rows: list[dict[str, Any]], question: Question) -> str:
    """For programs: the rows, and the costs that the projection assumes."""
    prices = question.prices
    costs = {"exit_ns": prices.exit, "flush_ns": prices.flush, "lock_ns": prices.lock}
    told = [{**row, "ratio": ratio_fields(row["ratio"])} for row in rows]
    return json.dumps({"rounds": question.rounds, "projection_assumes": costs, "rows": told}, indent=1) + "\n"


def as_csv(experiment: Experiment, rows: list[dict[str, Any]], question: Question) -> str:
    """For spreadsheets: a column for each parameter and counter."""
    counters = dict.fromkeys(name for row in rows for name in row["counters"])
    names = ("experiment", "workload", *parameters_of(rows), "strategy", "ratio", "ratio_low", "ratio_high", "ratio_of")
    out = io.StringIO()
    writer = csv.DictWriter(out, (*names, "measured_ns", "projected_ns", *counters), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        ratio = ratio_fields(row["ratio"]) or {}
        told = {"ratio": ratio.get("median"), "ratio_low": ratio.get("low"), "ratio_high": ratio.get("high")}
        writer.writerow({**row, **told, **row["counters"]})
    return out.getvalue()


FORMS = {"table": as_table, "json": as_json, "csv": as_csv}
