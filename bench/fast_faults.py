"""The fast-page-fault experiment: write-protection faults under the mmu lock against a compare-exchange without it.

`<mmu>/1g`: KVM's part of each fault alone, random order over 1 GiB of 4 KiB sptes, beside the bare exchange of the same words; and
in a VM whose vCPUs are threads, one with all of them or two with half each. `<mmu>/resume-N`: after dirty logging began N vCPUs
write every page again, TLB and all. `<trace>`: a recorded stream whose dirty log is collected again and again.
"""

from __future__ import annotations

import statistics
import threading
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyperf

from bench.charts import Chart, Lines, Panel, Series
from bench.experiment import (
    RECORDS,
    Cell,
    Checked,
    CheckError,
    Context,
    Description,
    Experiment,
    Over,
    Parameter,
    Priced,
    Timed,
    on_the_trace,
    unavailable,
)
from bench.ratios import ratio_bars
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, nanoseconds, ratio_of, ratio_text, round_values
from fastmmu.audit import audit
from fastmmu.bits import CR0, NPT_SPTE, PFERR
from fastmmu.events import EVENT, EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.machine_state import SlotFlag, VmWord
from fastmmu.measure import exchange_column, fault_column, index_column
from fastmmu.paging import Cpu
from fastmmu.stream import machine_for
from fastmmu.threads import Writes, run_threads
from fastmmu.vm import Workload

NAME = "fast-page-fault"
MMUS = ("tdp", "legacy")
EXCHANGE, FAST, LOCKED = "exchange", "fast", "locked"
THREADED = tuple(f"{strategy}-{threads}" for strategy in (FAST, LOCKED) for threads in (1, 2))
SIZE = 1 << 30
RESUME_SIZE, RESUME_VCPUS = 256 << 20, (1, 2, 4)
PERIOD = 50_000  # records between two collections of the log
SEED = 2012
THREAD_ROUNDS = 20
OFF = Cpu(cr0=int(CR0.PE), cr3=0, cr4=0, efer=0)
LOG = int(SlotFlag.LOG_DIRTY_PAGES)
FAULT = PFERR.GUEST_FINAL | PFERR.U | PFERR.W | PFERR.P
RESUMED = {"v5": (512_466_818, 269_231_261), "v7": (538_233_957, 249_809_853)}  # ns, before and after, as published in 2012
PUBLISHED = "2012, resume time after dirty-log: " + ", ".join(
    f"{before / 1e6:.1f} to {after / 1e6:.1f} ms ({version}, {before / after:.2f})" for version, (before, after) in RESUMED.items()
)


def kvm_of(mmu: str, strategy: str) -> Kvm:
    """KVM with the path, or without it. Huge pages play no part here."""
    return Kvm(tdp_mmu=mmu == "tdp", fast_page_fault=not strategy.startswith(LOCKED), eager_page_split=False)


def cells(context: Context) -> list[Cell]:
    """The bare exchange and both strategies, by MMU; then the resume, by vCPUs; then the trace."""
    alone = [Cell(NAME, f"{mmu}/1g", strategy) for mmu in MMUS for strategy in (EXCHANGE, FAST, LOCKED, *THREADED)]
    resume = [Cell(NAME, f"{mmu}/resume-{n}", strategy) for mmu in MMUS for n in RESUME_VCPUS for strategy in (LOCKED, FAST)]
    return alone + resume + traced_cells(context)


def traced_cells(context: Context) -> list[Cell]:
    """Both paths on the trace."""
    return [Cell(NAME, context.workload.name, strategy) for strategy in (LOCKED, FAST)]


@dataclass
class Guest:
    """A machine with one memslot whose pages are all mapped, and their addresses in random order: all, and those of each vCPU."""

    machine: Machine
    gpas: np.ndarray
    parts: list[np.ndarray]
    indices: np.ndarray

    def log(self, on: bool) -> None:
        """Dirty logging on, which protects every page, or off."""
        self.machine.run(EventList().add(Op.SLOT_FLAGS, address=0, value=LOG if on else 0).add(Op.EXIT).array())

    def protect(self) -> None:
        """Every page writable, then none."""
        self.log(on=False)
        exchange_column(self.machine.vm.spt, self.indices)
        self.log(on=True)

    def fault(self, threads: int) -> int:
        """All faults, by one vCPU on this thread, or by so many that are threads; how many were fixed."""
        vm, state = self.machine.vm, self.machine.state
        vm.word[VmWord.THREADS] = threads
        if threads == 0:
            return int(fault_column(vm, state, np.uint64(0), self.gpas, FAULT))
        fixed = [0] * threads

        def run(number: int) -> None:
            fixed[number] = int(fault_column(vm, state, np.uint64(number), self.parts[number], FAULT))

        vcpus = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
        for thread in vcpus:
            thread.start()
        for thread in vcpus:
            thread.join()
        vm.word[VmWord.THREADS] = 0
        return sum(fixed)


@lru_cache(maxsize=1)
def guest(mmu: str, strategy: str, size: int, vcpus: int) -> Guest:
    """The guest of a cell; one is kept."""
    machine = Machine(kvm_of(mmu, strategy), OFF, memory=size, vcpus=vcpus)
    machine.memory.advise_huge(0, size)  # else most of a resume is the host's own TLB misses
    machine.run(EventList().add(Op.SLOT_CREATE, value=machine.prepare_slot(0, 0, size)).each_vcpu(vcpus, Op.EXIT).array())
    gpas = np.random.default_rng(SEED).permutation(size >> 12).astype(np.uint64) << np.uint64(12)
    fault_column(machine.vm, machine.state, np.uint64(0), gpas, FAULT & ~PFERR.P)
    indices = np.zeros(len(gpas), np.uint64)
    index_column(machine.vm, machine.state, gpas, indices)
    parts = [gpas[gpas * np.uint64(vcpus) // np.uint64(size) == part] for part in range(vcpus)]
    return Guest(machine, gpas, parts, indices)


def threads_of(cell: Cell) -> int:
    """How many threads a cell has, 0 for one vCPU that is none."""
    if "resume" in cell.workload:
        return int(cell.workload.rsplit("-", 1)[1])
    return int(cell.strategy.rsplit("-", 1)[1]) if cell.strategy in THREADED else 0


def guest_of(cell: Cell) -> Guest:
    """The guest of a cell that is no trace."""
    size = cell.value("pages", (RESUME_SIZE if "resume" in cell.workload else SIZE) >> 12) << 12
    return guest(cell.workload.split("/")[0], cell.strategy, size, max(threads_of(cell), 1))


def is_trace(cell: Cell) -> bool:
    """Whether the cell replays a recorded stream."""
    return "/" not in cell.workload


def resume_writes(one: Guest, vcpus: int) -> list[Writes]:
    """Each vCPU writes its part of the pages, in order."""
    return [Writes(part, part) for part in np.array_split(np.sort(one.gpas), vcpus)]


def logged_stream(workload: Workload, period: int) -> np.ndarray:
    """The stream with logging switched on for its memory before the first record, and the log collected every so many events."""
    memory = [number for number, slot in enumerate(slot for slot in workload.slots if slot[2] != "device") if slot[2] == "ram"]
    parts = [host_events(Op.SLOT_FLAGS, memory, LOG)]
    for start in range(0, len(workload.events), period):
        parts += [workload.events[start : start + period], host_events(Op.DIRTY_GET, memory, 0)]
    return np.concatenate(parts)


def host_events(op: Op, slots: list[int], value: int) -> np.ndarray:
    """The same event for several memslots."""
    events = np.zeros(len(slots), EVENT)
    events["op"], events["address"], events["value"] = op, slots, value
    return events


def traced(context: Context, cell: Cell) -> tuple[Machine, np.ndarray]:
    """A fresh machine for the trace, and its events."""
    events = traced_events(context, cell)
    machine = machine_for(context.workload, kvm_of("tdp", cell.strategy))
    machine.check(events)
    machine.populate()
    return machine, events


def check(context: Context, cell: Cell) -> Checked:
    """Run once with the lock's time taken: every fault is fixed, W was set as often as the counters say, the state holds together.

    Raises:
        CheckError: a fault was not fixed, or fixed elsewhere than the strategy says.
    """
    if is_trace(cell):
        machine, events = traced(context, cell)
    else:
        one = guest_of(cell)
        machine = one.machine
        one.protect()
    before = machine.counters()
    machine.vm.word[VmWord.LOCK_TIMED] = 1
    if is_trace(cell):
        machine.run(events, checked=True)
        done = accesses = len(context.workload.events)
    elif "resume" in cell.workload:
        run_threads(machine, resume_writes(one, threads_of(cell)), slot=0, collect=False)
        done = accesses = len(one.gpas)
    else:
        accesses = len(one.gpas)
        done = exchange_column(machine.vm.spt, one.indices) if cell.strategy == EXCHANGE else one.fault(threads_of(cell))
    machine.vm.word[VmWord.LOCK_TIMED] = 0
    counters = {name: value - before[name] for name, value in machine.counters().items()}
    if not is_trace(cell):
        writable = int(np.count_nonzero(machine.vm.spt[one.indices] & NPT_SPTE.W))
        fast = counters["fast_fixed"] == (accesses if cell.strategy.startswith(FAST) else 0)
        if done != accesses or writable != accesses or not fast:
            raise CheckError(f"{cell.name}: {done} of {accesses} faults fixed, {writable} writable, {counters['fast_fixed']} fast")
    if cell.strategy != EXCHANGE:
        audit(machine)
    return Checked({**counters, "accesses": accesses}, done)


def timed(context: Context, cell: Cell) -> Timed:
    """The work of a cell."""
    if is_trace(cell):
        fresh: list[Machine] = []
        accesses = len(context.workload.events)

        def renew() -> None:
            fresh[:] = [traced(context, cell)[0]]

        once = lambda: fresh[0].run(traced_events(context, cell), checked=True)  # noqa: E731
        return Timed(once, renew, lambda: accesses, accesses)
    one, done = guest_of(cell), [0]
    count = len(one.gpas)
    if "resume" in cell.workload:
        writes = resume_writes(one, threads_of(cell))
        return Timed(lambda: run_threads(one.machine, writes, slot=0, collect=False), one.protect, lambda: count, count)

    def faults() -> None:
        done[0] = exchange_column(one.machine.vm.spt, one.indices) if cell.strategy == EXCHANGE else one.fault(threads_of(cell))

    return Timed(faults, one.protect, lambda: int(done[0]), count)


def traced_events(context: Context, cell: Cell) -> np.ndarray:
    """The stream that `traced` has checked."""
    period = cell.value("period", PERIOD)
    return context.once(("logged", period), lambda: logged_stream(context.workload, period))


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


def charts(suite: dict[str, pyperf.Benchmark]) -> list[Chart]:
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
    return ([lines] if series else []) + ratio_bars(EXPERIMENT, rest)


def with_vcpus(context: Context, cell: Cell, name: str, value: int) -> Cell | None:
    """The resume with so many vCPUs, which its workload names."""
    first = f"/resume-{RESUME_VCPUS[0]}"
    return Cell(NAME, cell.workload.replace(first, f"/resume-{value}"), cell.strategy) if cell.workload.endswith(first) else None


def with_pages(context: Context, cell: Cell, name: str, value: int) -> Cell | None:
    """A guest of another size."""
    return None if is_trace(cell) else cell.having(name, value)


DESCRIPTION = Description(
    question="A write to a write-protected page faults only to have its W bit set: what is it worth to set it by compare-"
    "exchange, without the mmu lock?",
    source="“[PATCH v4 10/10] KVM: MMU: document mmu-lock and fast page fault”, Xiao Guangrong, 25 April 2012; the times are "
    "those of v5 and v7",
    claim="Faults that only write protection causes can be fixed out of the mmu lock, safely, if the spte says that host and MMU "
    "allow the write and the compare-exchange finds it unchanged. Resuming a guest after dirty logging began took about half the "
    "time; the chart has the published gains.",
    not_shown="The exit around each fault, which the published times include. More vCPUs than this machine has cores take turns; "
    "how the lock holds up under many is simulated (lock-scaling). The races of the path are tried in every order elsewhere: "
    "fastmmu races.",
    year=2012,
)
PARAMETERS = (
    Parameter("pages", "4 KiB pages of the guest, each of which faults once", 8, 1 << 24, with_pages),
    Parameter("vcpus", "vCPUs of the resume, each with its part of the pages", 1, 64, with_vcpus),
    Parameter("period", "events of the trace between two collections of the dirty log", 1_000, 1 << 40, on_the_trace),
    replace(RECORDS, apply=on_the_trace),
)

EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    by_default=False,
    rounds=THREAD_ROUNDS,
    description=DESCRIPTION,
    over=over,
    charts=charts,
    traced=traced_cells,
    parameters=PARAMETERS,
    priced=Priced("accesses", exits=("pf_taken",), flushes=("remote_tlb_flush_requests",), locks=("lock_taken",)),
    measured=("lock_held", "lock_waited", "exchange_failed", "tlb_*"),
)
