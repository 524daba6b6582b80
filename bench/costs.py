"""What would it save? Counts times costs: time that the model does not spend, beside the time that it was measured to spend.

A projection, never a measurement: the counts are exact, the costs are assumptions of whoever reads the table.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import pyperf

from bench.experiment import Experiment, Priced
from bench.prices import Prices
from bench.ratios import Related, related
from bench.tables import Table, nanoseconds, ratio_of

NANOSECOND = 1e-9


def shares(priced: Priced, counters: dict[str, int]) -> tuple[float, float, float] | None:
    """Exits, flushes and locked faults for each access; None where the cell does not count them."""
    accesses = counters.get(priced.per, 0)
    named = (priced.exits, priced.flushes, priced.locks)
    if not accesses or not all(name in counters for names in named for name in names):
        return None
    return tuple(sum(counters[name] for name in names) / accesses for names in named)  # type: ignore[return-value]


def projected(priced: Priced | None, counters: dict[str, int], prices: Prices) -> float | None:
    """Nanoseconds for each access that a machine would spend on them; None where nothing can be said, or there is no end to it."""
    found = None if priced is None else shares(priced, counters)
    if found is None or priced is None or any(counters.get(name, 0) for name in priced.endless):
        return None
    return sum(share * price for share, price in zip(found, (prices.exit, prices.flush, prices.lock), strict=True))


def projection(experiment: Experiment, suite: dict[str, pyperf.Benchmark], prices: Prices) -> Table | None:
    """The projection of a suite, or None: the ratio of the sums, the projected time, the measured one, and the counts.

    Workloads that were not timed are left out where all strategies come to the same.
    """
    priced = experiment.priced
    if priced is None:
        return None
    beside = replace(experiment, over=priced.over or experiment.over)
    found = {row.cell: row for row in related(beside, suite) if shares(priced, row.counters) is not None}
    told: dict[tuple[str, str], set[float | None]] = {}
    for cell, row in found.items():
        told.setdefault((cell.workload, cell.suffix), set()).add(projected(priced, row.counters, prices))
    timed = {(cell.workload, cell.suffix) for cell, row in found.items() if row.times is not None}
    rows = []
    for cell, row in found.items():
        if (cell.workload, cell.suffix) in timed or len(told[cell.workload, cell.suffix]) > 1:
            plain = None if row.over is None else found.get(replace(cell, strategy=row.over.strategy))
            rows.append((f"{cell.workload}{cell.suffix} / {cell.strategy}", *projected_row(row, plain, priced, prices)))
    if not rows:
        return None
    counted = ("exits", "flushes", "under the lock")
    head = ("workload / strategy", "projected ratio", "ns saved", "ns projected", "ns measured", *counted)
    note = (
        "A projection, not a measurement: counts for each access times assumed costs. The ratio is that of the sums, measured and "
        "projected, and goes the same way as the experiment's own; of the projections alone where nothing was timed."
    )
    return Table(f"projection, {experiment.name}: what would it save?", head, rows, note)


def projected_row(row: Related, plain: Related | None, priced: Priced, prices: Prices) -> tuple[str, ...]:
    """A row of the projection behind its name."""
    own = projected(priced, row.counters, prices)
    other = None if plain is None else projected(priced, plain.counters, prices)
    ratio = saved = "-"
    if own is not None and other is not None and row.over is not None:
        sums = [value * NANOSECOND for value in (other, own)]
        if row.times is not None and row.plain is not None:
            before, after = ([time + value for time in times] for times, value in zip((row.plain, row.times), sums, strict=True))
        else:
            before, after = [sums[0]], [sums[1]]
        if all(before + after):
            ratio = ratio_of(before, after, cost=row.over.cost).text
        saved = f"{(statistics.median(before) - statistics.median(after)) / NANOSECOND:.1f}"
    time = "-" if row.times is None else nanoseconds(row.times)
    counted = (f"{share:.4f}" for share in shares(priced, row.counters) or ())
    return (ratio, saved, "no end" if own is None else f"{own:.1f}", time, *counted)
