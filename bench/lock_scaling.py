"""The lock-scaling experiment: 1 to 128 vCPUs that fault under the mmu lock, simulated event by event, beside published times.

A machine with two cores cannot show how a lock holds up under 64 vCPUs. What one fault costs is measured here; two parameters are
fitted, for each published series on its rows of 2 and 8 vCPUs: what a fault costs outside the lock, and what it costs to hand the
lock over for each vCPU that waits. Every other row is a prediction, those with huge pages split eagerly all of them: where the map
is direct and the processor logs modifications a split page can be written without a fault; else each write faults still, under the
lock, and reads do not any more. A lock taken for reading is held by many at once: of it only
the hand-over of its word is one after another.
"""

from __future__ import annotations

import csv
import heapq
import random
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyperf

from bench.charts import Chart, Lines, Panel, Series
from bench.experiment import Cell, Checked, Context, Description, Experiment, Timed
from bench.results import counters_of
from bench.tables import Table, by_workload
from fastmmu.bits import CR0, PFERR
from fastmmu.events import EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.machine_state import SlotFlag
from fastmmu.measure import fault_column
from fastmmu.paging import Cpu

NAME = "lock-scaling"
EACH, ANY = "each-waiter", "any-waiter"  # a hand-over costs so much for each vCPU that waits, or so much if any does
PUBLISHED = Path(__file__).with_name("published.csv")
DIRECT = "direct"
COSTS = ("measured_fault", "outside", "handover", "read", "write")
FITTED = (2, 8)
ALSO = (1, 128)  # vCPUs that nobody has published
FAULTS = 400  # of each simulated vCPU; the time goes by how many there are
PAGES = 1 << 18  # of each vCPU: 1 GiB, every page faults once, whatever share of the accesses are writes: logging drops huge pages
PAGE_WORDS = 512
NANOSECONDS = 1e9
STEPS = 26  # of a bisection
MEASURED, SIZE, SEED = 5, 256 << 20, 2022
FAULT = PFERR.GUEST_FINAL | PFERR.U | PFERR.W | PFERR.P


class Row(NamedTuple):
    """One published time: seconds in which that many vCPUs wrote their memory again; and the same with huge pages split before, or
    None."""

    source: str
    mmu: str
    lock: str
    map: str
    writes: int
    vcpus: int
    seconds: float
    split_seconds: float | None

    @property
    def series(self) -> str:
        """The rows that are fitted together."""
        return f"{self.source}, {self.writes} % writes"


@lru_cache(maxsize=1)
def published() -> tuple[Row, ...]:
    """The rows of published.csv."""
    with PUBLISHED.open(newline="") as file:
        return tuple(
            Row(
                *(one[name] for name in ("source", "mmu", "lock", "map")),
                *(int(one[name]) for name in ("writes", "vcpus")),
                float(one["seconds"]),
                float(one["split_seconds"]) if one["split_seconds"] else None,
            )
            for one in csv.DictReader(file)
        )


def series() -> dict[str, list[Row]]:
    """The rows by series; one without both fitted rows is left out: there is nothing to fit it on."""
    found: dict[str, list[Row]] = {}
    for row in published():
        found.setdefault(row.series, []).append(row)
    return {name: rows for name, rows in found.items() if set(FITTED) <= {row.vcpus for row in rows}}


class Costs(NamedTuple):
    """Nanoseconds: under the lock, one after another; of the rest of a fault; of a hand-over, for each vCPU that waits."""

    held: float
    outside: float
    handover: float
    each: bool = True  # a hand-over costs as often as vCPUs wait
    shared: bool = False  # a lock for reading: its word goes from one to the next all the same


def simulate(vcpus: int, costs: Costs, faults: int = FAULTS) -> float:
    """Nanoseconds until each of `vcpus` has had `faults` faults; who asks first has the lock first. The time outside the lock is
    exponential, about its mean: equal times would fall into step, and never meet."""
    rng = random.Random(SEED)
    ready = [(rng.expovariate(1) * costs.outside, number) for number in range(vcpus)]
    heapq.heapify(ready)
    left = [faults] * vcpus
    free = finish = 0.0
    while ready:
        asked, number = heapq.heappop(ready)
        waiting = sum(1 for other, _ in ready if other <= free)
        times = (waiting if costs.each else min(waiting, 1)) + costs.shared
        finish = max(asked, free) + costs.handover * times + costs.held
        free = finish
        left[number] -= 1
        if left[number]:
            heapq.heappush(ready, (finish + rng.expovariate(1) * costs.outside, number))
    return finish


def bisect(low: float, high: float, too_little: Callable[[float], bool]) -> float:
    """Where `too_little` turns false."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_little(middle) else (low, middle)
    return (low + high) / 2


def fit(known: Costs, few: float, many: float) -> Costs:
    """The costs with which 2 and 8 vCPUs take `few` and `many` nanoseconds a fault of each; what of a fault is `known` was
    measured, and the fitted cost outside the lock comes on top."""

    def with_handover(handover: float) -> Costs:
        def costs(rest: float) -> Costs:
            return known._replace(outside=known.outside + rest, handover=handover)

        return costs(bisect(0.0, few, lambda rest: simulate(FITTED[0], costs(rest)) / FAULTS < few))

    best = bisect(0.0, many, lambda handover: simulate(FITTED[1], with_handover(handover)) / FAULTS < many)
    return with_handover(best)


def measured(mmu: str) -> float:
    """Nanoseconds of a write fault below a huge page of a memslot that logs, KVM's part, on this machine; the best of a few."""
    machine = Machine(Kvm(tdp_mmu=mmu == "tdp", eager_page_split=False), Cpu(cr0=int(CR0.PE), cr3=0, cr4=0, efer=0), memory=SIZE)
    machine.run(EventList().add(Op.SLOT_CREATE, value=machine.prepare_slot(0, 0, SIZE, host_level=2)).add(Op.EXIT).array())
    gpas = np.arange(0, SIZE, 4096, dtype=np.uint64)
    best = float("inf")
    for _ in range(MEASURED):
        machine.run(EventList().add(Op.SLOT_FLAGS, address=0, value=0).add(Op.EXIT).array())
        fault_column(machine.vm, machine.state, np.uint64(0), gpas[::512], FAULT & ~PFERR.P)
        machine.run(EventList().add(Op.SLOT_FLAGS, address=0, value=int(SlotFlag.LOG_DIRTY_PAGES)).add(Op.EXIT).array())
        begin = time.perf_counter()
        fault_column(machine.vm, machine.state, np.uint64(0), gpas, FAULT)
        best = min(best, (time.perf_counter() - begin) / len(gpas) * NANOSECONDS)
    return best


def touched() -> tuple[float, float]:
    """Nanoseconds of a read of one word in each page of memory that is there, and of a write; the best of a few."""
    words = np.zeros(SIZE // 8, np.uint64)[:: PAGE_WORDS]
    words += np.uint64(1)
    reads, writes = [], []
    for _ in range(MEASURED):
        begin = time.perf_counter()
        words.sum()
        middle = time.perf_counter()
        words[:] = 7
        reads.append(middle - begin)
        writes.append(time.perf_counter() - middle)
    return min(reads) / len(words) * NANOSECONDS, min(writes) / len(words) * NANOSECONDS


def simulate_split(vcpus: int, row: Row, costs: Costs, read: float, write: float) -> float:
    """Nanoseconds in which that many vCPUs access each of their pages once after these were split."""
    writes = row.writes / 100
    if row.map == DIRECT:
        return PAGES * (writes * write + (1 - writes) * read)
    between = costs._replace(outside=costs.outside + read * (1 - writes) / writes)
    return simulate(vcpus, between) / FAULTS * PAGES * writes


def cells(context: Context) -> list[Cell]:
    """Both readings of what a hand-over costs, for each series."""
    return [Cell(NAME, name, strategy) for name in series() for strategy in (EACH, ANY)]


def check(context: Context, cell: Cell) -> Checked:
    """Measure, fit and predict; microseconds, and tenths of a nanosecond for the costs."""
    rows = series()[cell.workload]
    fault = context.once(("fault", rows[0].mmu), lambda: measured(rows[0].mmu))
    shared = rows[0].lock == "read"
    few, many = (next(row.seconds for row in rows if row.vcpus == count) / PAGES * NANOSECONDS for count in FITTED)
    known = Costs(0.0 if shared else fault, fault if shared else 0.0, 0.0, cell.strategy == EACH, shared)
    costs = fit(known, few, many)
    told = {"measured_fault": fault, "outside": costs.outside, "handover": costs.handover}
    counters = {name: round(value * 10) for name, value in told.items()}
    read, write = context.once("touched", touched)
    counters |= {"read": round(read * 10), "write": round(write * 10)}
    times = {row.vcpus: row for row in rows}
    for vcpus in sorted({*times, *ALSO}):
        counters[f"simulated_{vcpus}"] = round(simulate(vcpus, costs) / FAULTS * PAGES / 1e3)
        counters[f"splitsimulated_{vcpus}"] = round(simulate_split(vcpus, rows[0], costs, read, write) / 1e3)
        if vcpus in times:
            counters[f"published_{vcpus}"] = round(times[vcpus].seconds * 1e6)
            if times[vcpus].split_seconds is not None:
                counters[f"splitpublished_{vcpus}"] = round(times[vcpus].split_seconds * 1e6)
    return Checked(counters, 0, counts={"measured_fault": counters["measured_fault"]})


def timed(context: Context, cell: Cell) -> Timed:
    """Nothing is timed."""
    raise RuntimeError(f"{cell.name}: {why_not(context, cell)}")


def why_not(context: Context, cell: Cell) -> str:
    """It is simulated."""
    return "simulated, not timed"


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Published and simulated seconds, row by row: without eager splitting, and with it."""
    rows, costs, split = [], [], []
    for workload, strategies in by_workload(suite).items():
        readings = {strategy: counters_of(next(iter(metrics.values()))) for strategy, metrics in strategies.items()}
        for strategy, counters in readings.items():
            told = (f"{counters[name] / 10:.0f}" for name in COSTS if name in counters)
            costs.append((f"{workload} / {strategy}", *told))
        for vcpus in vcpus_of(readings):
            shown = compared(readings, vcpus, "")
            rows.append((f"{workload} / {vcpus}", *shown, "fitted" if vcpus in FITTED else "predicted"))
            if f"splitpublished_{vcpus}" in next(iter(readings.values())):
                shown = compared(readings, vcpus, "split")
                bare = series()[workload][0].map == DIRECT if workload in series() else False
                split.append((f"{workload} / {vcpus}", *(["-", "-"] if bare else shown[:2]), *shown[2:]))
    if not rows:
        return []
    note = (
        "Seconds in which N vCPUs write 1 GiB each again after dirty logging began, huge pages not split before. A fault is "
        "measured here; its cost outside the lock and that of a hand-over are fitted on 2 and 8 vCPUs, the latter read in two "
        "ways: for each vCPU that waits, or once if any does. A ratio is simulated over published."
    )
    split_note = (
        "The same with huge pages split before; nothing is fitted to these rows. On a direct map with page-modification "
        "logging, as those machines had it, no write faults: ours is the time of the bare accesses, measured here, without what "
        "the processor's log costs: D to be set, and an exit for each 512 pages. Elsewhere every write to a page faults under the "
        "lock, and reads fault no more."
    )
    head = ("series / vCPUs", "ratio, each waiter", "ratio, any waiter", "s, each waiter", "s, any waiter", "s, published")
    told = ("series", "ns of a fault, measured", "ns outside, fitted", "ns of a hand-over, fitted", "ns of a read", "ns of a write")
    made = [Table("vCPUs under the mmu lock", (*head, "row"), rows, note)]
    made += [Table("vCPUs under the mmu lock, huge pages split eagerly", head, split, split_note)] if split else []
    return [*made, Table("what the simulation goes by", told[: len(costs[0])], costs)]


def vcpus_of(readings: dict[str, dict[str, int]]) -> list[int]:
    """Numbers of vCPUs that were simulated."""
    first = next(iter(readings.values()))
    return sorted(int(name.removeprefix("simulated_")) for name in first if name.startswith("simulated_"))


def compared(readings: dict[str, dict[str, int]], vcpus: int, which: str) -> list[str]:
    """Ratios of both readings, and seconds: ours and the published ones."""
    ours = [readings[strategy].get(f"{which}simulated_{vcpus}") if strategy in readings else None for strategy in (EACH, ANY)]
    theirs = next(iter(readings.values())).get(f"{which}published_{vcpus}")
    ratios = ["-" if theirs is None or one is None else f"{one / theirs:.2f}" for one in ours]
    return ratios + ["-" if one is None else f"{one / 1e6:.3f}" for one in (*ours, theirs)]


def charts(experiment: Experiment, suite: dict[str, pyperf.Benchmark]) -> list[Chart]:
    """Seconds over vCPUs, a panel for each published series: its points, and both readings of a hand-over."""
    panels = []
    for workload, strategies in by_workload(suite).items():
        counters = {strategy: counters_of(next(iter(metrics.values()))) for strategy, metrics in strategies.items()}
        drawn = [Series("published", "published", seconds_of(next(iter(counters.values())), "published_"))]
        for strategy, source in ((EACH, "simulated"), (ANY, "simulated-2")):
            if strategy in counters:
                drawn.append(Series(f"ours, {strategy}", source, seconds_of(counters[strategy], "simulated_")))
        panels.append(Panel(workload, tuple(drawn)))
    title = "Seconds in which N vCPUs write 1 GiB each again after dirty logging began"
    return [Lines(NAME, title, "vCPUs", "seconds", tuple(panels), logarithmic=True)] if panels else []


def seconds_of(counters: dict[str, int], prefix: str) -> tuple[tuple[float, float], ...]:
    """(vCPUs, seconds) of the counters with that prefix."""
    found = {int(name.removeprefix(prefix)): value for name, value in counters.items() if name.startswith(prefix)}
    return tuple((float(vcpus), found[vcpus] / 1e6) for vcpus in sorted(found))


DESCRIPTION = Description(
    question="How does the mmu lock hold up under 1 to 128 vCPUs that all fault?",
    claim="The points are David Matlack's, of the cover letters of eager page splitting (2022): with splitting off every first "
    "write to a page takes the lock, and the time grows with the vCPUs.",
    not_shown="A measurement: one fault is measured here, the rest is simulated, with two costs fitted on the rows of 2 and 8 "
    "vCPUs. What a hand-over costs is read in two ways, both are drawn, and neither is known to be the hardware's: where "
    "most of the time is spent waiting, that for each waiter ends far above what was published. Where huge pages were split before "
    "and the map is direct, ours is a lower bound only, the bare accesses.",
)

EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    why_not,
    tables,
    by_default=False,
    description=DESCRIPTION,
    part_of="fast-page-fault",
    charts=charts,
    measured=("measured_fault", "outside", "handover", "read", "write", "simulated_*", "splitsimulated_*"),
)
