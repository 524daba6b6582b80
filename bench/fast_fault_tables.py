"""The fast-page-fault experiment as it is told: its tables and charts, and what its ratios are over."""

from __future__ import annotations

import statistics

import pyperf

from bench.charts import Chart, Lines, Panel, Series
from bench.experiment import Cell, Experiment, Over
from bench.ratios import ratio_bars
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, nanoseconds, ratio_of, ratio_text, round_values

NAME = "fast-page-fault"
MMUS = ("tdp", "legacy")
EXCHANGE, FAST, LOCKED = "exchange", "fast", "locked"
THREADED = tuple(f"{strategy}-{threads}" for strategy in (FAST, LOCKED) for threads in (1, 2))
PERIOD = 50_000  # records between two collections of the log
RESUMED = {"v5": (512_466_818, 269_231_261), "v7": (538_233_957, 249_809_853)}  # ns, before and after, as published in 2012
PUBLISHED = "2012, resume time after dirty-log: " + ", ".join(
    f"{before / 1e6:.1f} to {after / 1e6:.1f} ms ({version}, {before / after:.2f})" for version, (before, after) in RESUMED.items()
)


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Three tables: the fault alone, the resume after dirty logging began, the trace."""
    times = {
        workload: {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items() if "time" in metrics}
        for workload, strategies in by_workload(suite).items()
    }
    counters = {
        (workload, strategy): counters_of(metrics["time"])
        for workload, strategies in by_workload(suite).items()
        for strategy, metrics in strategies.items()
        if "time" in metrics
    }
    made = [alone_table(times, counters), resume_table(times, counters), trace_table(times, counters)]
    return [table for table in made if table.rows]


Times = dict[str, dict[str, list[float]]]
Counters = dict[tuple[str, str], dict[str, int]]


def alone_table(times: Times, counters: Counters) -> Table:
    """Faults against the bare exchange, and two threads against one."""
    rows = []
    for workload, own in times.items():
        if not workload.endswith("/1g"):
            continue
        for strategy, values in own.items():
            first = strategy.replace("-2", "-1")
            over = ratio_text(own[EXCHANGE], values, cost=True) if EXCHANGE in own and first == strategy else "-"
            rate = ratio_text(own[first], values, cost=False) if first != strategy and first in own else "-"
            best = f"{max(a / b for a, b in zip(own[first], values, strict=True)):.2f}" if rate != "-" else "-"
            shown = counts(counters[workload, strategy], "pf_fast", "pf_fixed", "lock_taken", "exchange_failed")
            shown = ("-",) * 4 if strategy == EXCHANGE else shown
            rows.append((f"{workload} / {strategy}", over, rate, best, nanoseconds(values), *shown))
    ratios = ("cost over the exchange", "rate over one thread", "best round")
    head = ("mmu / fault", *ratios, "ns", "pf_fast", "pf_fixed", "locks", "failed")
    note = (
        "Write-protection faults in random order over 1 GiB of 4 KiB sptes, KVM's part alone; `exchange` sets W in the same words. "
        "`-1`, `-2`: the vCPUs are threads, one with all pages, two with one half each; while they run, the fast path also marks "
        "that it reads, a locked exchange more. `failed`: compare-exchanges of an entry that had changed."
    )
    return Table("write-protection faults with and without the mmu lock", head, rows, note)


def resume_table(times: Times, counters: Counters) -> Table:
    """Time to write every page again, against the locked path."""
    rows = []
    for workload, own in times.items():
        if "/resume-" not in workload:
            continue
        for strategy, values in own.items():
            ratio = ratio_text(own[LOCKED], values, cost=False) if LOCKED in own else "-"
            counted = counters[workload, strategy]
            milliseconds = f"{statistics.median(values) * counted['accesses'] * 1e3:.2f}"
            held, waited = (f"{counted[name] / counted['accesses']:.0f}" for name in ("lock_held", "lock_waited"))
            shown = counts(counted, "pf_fast", "pf_fixed", "exchange_failed")
            rows.append((f"{workload} / {strategy}", ratio, milliseconds, held, waited, *shown))
    head = ("mmu / vCPUs / path", "speed-up over locked", "ms to resume", "cycles held", "waited", "pf_fast", "pf_fixed", "failed")
    note = f"256 MiB, each page written once after logging began. Cycles of the mmu lock are per page, counted apart. {PUBLISHED}."
    return Table("resume after dirty logging began", head, rows, note)


def trace_table(times: Times, counters: Counters) -> Table:
    """The recorded stream with its log collected."""
    rows = []
    for workload, own in times.items():
        if "/" in workload:
            continue
        for strategy, values in own.items():
            ratio = ratio_text(own[LOCKED], values, cost=False) if LOCKED in own else "-"
            counted = counters[workload, strategy]
            shown = counts(counted, "pf_taken", "pf_fast", "protected", "lock_taken")
            rows.append((f"{workload} / {strategy}", ratio, nanoseconds(values), *shown))
    head = ("trace / path", "speed-up over locked", "ns per record", "pf_taken", "pf_fast", "protected", "locks")
    return Table("a recorded stream under dirty logging", head, rows, f"TDP MMU; the log is collected every {PERIOD:,} records.")


def over(cell: Cell) -> Over | None:
    """The bare exchange for the fault alone, one thread for two, the locked path for the rest."""
    if not cell.workload.endswith("/1g"):
        return Over(LOCKED)
    if cell.strategy in THREADED:
        return Over(cell.strategy[:-1] + "1", called="one thread") if cell.strategy.endswith("2") else None
    return Over(EXCHANGE, cost=True)


def over_locked(cell: Cell) -> Over | None:
    """Each fast path beside the locked one; the bare exchange is no fault."""
    return None if cell.strategy == EXCHANGE else Over(cell.strategy.replace(FAST, LOCKED))


def charts(experiment: Experiment, suite: dict[str, pyperf.Benchmark]) -> list[Chart]:
    """What the fast path gains by vCPUs, beside the published gains; then the other ratios as bars."""
    series, sources = [], ("measured", "measured-2")
    workloads = by_workload(suite)
    for mmu, source in zip(MMUS, sources, strict=True):
        points, spread = [], []
        for name, strategies in workloads.items():
            if name.startswith(f"{mmu}/resume-") and all("time" in strategies.get(one, ()) for one in (LOCKED, FAST)):
                ratio = ratio_of(*(round_values(strategies[one]["time"]) for one in (LOCKED, FAST)), cost=False)
                points.append((float(name.rsplit("-", 1)[1]), ratio.median))
                spread.append((ratio.low, ratio.high))
        if points:
            series.append(Series(f"{mmu}, ours", source, tuple(points), tuple(spread)))
    levels = tuple((before / after, f"published 2012, {version}") for version, (before, after) in RESUMED.items())
    title = "Speed-up of writing every page again after dirty logging began"
    lines = Lines(f"{NAME}-resume", title, "vCPUs", f"speed-up over {LOCKED}", (Panel("", tuple(series)),), levels=levels)
    rest = {name: one for name, one in suite.items() if "/resume-" not in name}
    return ([lines] if series else []) + ratio_bars(experiment, rest)
