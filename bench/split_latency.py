"""The split-latency experiment: what do faults of a vCPU cost while another thread splits, and holds the mmu lock?

Real threads: one vCPU writes to random pages; the other thread clears the dirty log part by part, which with a log that is set from
the start is when KVM splits and protects (facts 7.4, 8.1). Each fault's time is taken; `quiet` is the same with the clearing done.
"""

from __future__ import annotations

import statistics
import threading
import time

import numpy as np
import pyperf

from bench.cached_access import STRATEGIES, kvm_of
from bench.cached_access_tables import GIB
from bench.cached_access_tables import NAME as CACHED_ACCESS
from bench.experiment import Cell, Checked, CheckError, Context, Description, Experiment, Timed
from bench.huge_guest import DATA_SLOT, PAGE, SEED, HugeGuest
from bench.results import counters_of
from bench.tables import Table, by_workload
from fastmmu.audit import audit
from fastmmu.bits import PFERR
from fastmmu.events import EventList, Op
from fastmmu.machine_state import VmWord
from fastmmu.measure import time_stamp, touch_column

NAME = "split-latency"
SIZE, PART = 8 * GIB, 256 << 20  # of the guest, and of one clear
REPEATS = 5
BATCH = 500  # accesses between two looks at whether the clearing is over
QUIET_FAULTS = 50_000
PERCENTILES = {"p50": 50.0, "p99": 99.0, "p999": 99.9}


def cells(context: Context) -> list[Cell]:
    """One guest, the four strategies."""
    return [Cell(NAME, f"{SIZE // GIB}g", strategy) for strategy in STRATEGIES]


class Threads:
    """One run: a vCPU's thread, and this one, which clears the log."""

    def __init__(self, strategy: str) -> None:
        kvm = kvm_of(strategy, True, manual_protect=True, initially_set=True)  # with NX huge pages, where the strategies differ
        self.guest = HugeGuest(kvm, SIZE, (("rwx",),), vcpus=2)
        pages = np.random.default_rng(SEED).permutation(SIZE // PAGE).astype(np.uint64)
        self.gvas, self.accesses = pages * np.uint64(PAGE), np.full(len(pages), PFERR.U | PFERR.W, np.uint64)
        self.at, self.denied = 0, False

    def begin(self) -> None:
        """Huge pages everywhere, and a log that says that all is dirty."""
        self.guest.map_huge()
        self.guest.log(on=True)
        self.at = 0

    def clear_all(self) -> None:
        """Clear the log, part by part, as user space does."""
        machine, pages = self.guest.machine, PART // PAGE
        for first in range(0, SIZE // PAGE, pages):
            machine.set_report(DATA_SLOT, np.arange(first, first + pages))
            machine.run(EventList().add(Op.DIRTY_CLEAR, address=DATA_SLOT).array())

    def write(self, count: int) -> np.ndarray:
        """The vCPU's next writes: cycles of those that faulted."""
        part = slice(self.at, self.at + count)
        ticks = np.zeros(len(self.gvas[part]), np.uint64)
        machine = self.guest.machine
        self.denied |= touch_column(machine.vm, machine.state, np.uint64(1), self.gvas[part], self.accesses[part], ticks) < 0
        self.at += count
        return ticks[ticks != 0]

    def quiet(self) -> np.ndarray:
        """Faults after the clearing."""
        self.begin()
        self.clear_all()
        return self.write(QUIET_FAULTS)

    def splitting(self) -> np.ndarray:
        """Faults during it."""
        self.begin()
        self.write(0)
        over, running, found, failed = threading.Event(), threading.Event(), [], []

        def vcpu() -> None:
            try:
                while not over.is_set() and self.at + BATCH < len(self.gvas):
                    found.append(self.write(BATCH))
                    running.set()
            except BaseException as error:  # told to who waits
                failed.append(error)
            finally:
                running.set()

        thread = threading.Thread(target=vcpu)
        self.guest.machine.vm.word[VmWord.THREADS] = 2
        thread.start()
        try:
            running.wait()
            self.clear_all()
        finally:
            over.set()
            thread.join()
            self.guest.machine.vm.word[VmWord.THREADS] = 0
        if failed:
            raise failed[0]
        return np.concatenate(found)


def cycles_per_nanosecond() -> float:
    """Of the processor's time stamp."""
    time_stamp()  # compiled before the clock runs
    begin, ticks = time.perf_counter_ns(), int(time_stamp())
    time.sleep(0.05)
    return (int(time_stamp()) - ticks) / (time.perf_counter_ns() - begin)


def check(context: Context, cell: Cell) -> Checked:
    """Measure both a few times: medians of the percentiles over the repeats, and their lowest and highest, nanoseconds.

    Raises:
        CheckError: a write was denied; AuditError.
    """
    run, rate = Threads(cell.strategy), cycles_per_nanosecond()
    counters: dict[str, int] = {}
    for name, work in (("quiet", run.quiet), ("split", run.splitting)):
        samples = [work() for _ in range(REPEATS)]
        if not all(map(len, samples)):
            raise CheckError(f"{cell.name}: no faults to time")
        for label, percentile in PERCENTILES.items():
            values = sorted(float(np.percentile(one, percentile)) / rate for one in samples)
            told = {"": statistics.median(values), "_low": values[0], "_high": values[-1]}
            counters |= {f"{name}_{label}{which}": round(value) for which, value in told.items()}
        counters[f"{name}_faults"] = round(statistics.median(len(one) for one in samples))
    if run.denied:
        raise CheckError(f"{cell.name}: a write was denied")
    audit(run.guest.machine)
    return Checked(counters, 0, counts={"split_p999": counters["split_p999"]})


def timed(context: Context, cell: Cell) -> Timed:
    """Nothing is timed besides."""
    raise RuntimeError(f"{cell.name}: {why_not(context, cell)}")


def why_not(context: Context, cell: Cell) -> str:
    """The check measures."""
    return "each fault's time is taken while it is checked"


def spreads(counters: dict[str, int], which: str) -> list[str]:
    """Each percentile with its lowest and highest."""
    told = [[counters[f"{which}_{name}{end}"] for end in ("", "_low", "_high")] for name in PERCENTILES]
    return [f"{median:,} [{low:,}, {high:,}]" for median, low, high in told]


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Percentiles without and with the splitting."""
    rows = []
    for strategies in by_workload(suite).values():
        for strategy, metrics in strategies.items():
            one = counters_of(next(iter(metrics.values())))
            for which, name in (("quiet", "quiet"), ("split", "while it is cleared")):
                rows.append((f"{strategy} / {name}", *spreads(one, which), f"{one[f'{which}_faults']:,}"))
    head = ("rights from / when", "ns, 50 %", "ns, 99 %", "ns, 99.9 %", "faults")
    note = (
        f"KVM's part of a vCPU's write faults, a thread of its own, {SIZE // GIB} GiB in 2 MiB pages, NX huge pages on; another "
        f"thread clears the log by parts of {PART >> 20} MiB. Median of {REPEATS} repeats, [lowest, highest]. The mmu lock is "
        "dropped after each split that took a table, and where somebody waits between two; `lazy` has no splits to drop it at."
    )
    return [Table("vCPU faults while huge pages are split", head, rows, note)] if rows else []


DESCRIPTION = Description(
    question="What does splitting cost a vCPU that faults meanwhile?",
    not_shown="More than one vCPU beside the thread that splits: this machine has two cores. The highest percentile has the host's "
    "own interruptions in it.",
)
EXPERIMENT = Experiment(
    NAME, cells, check, timed, why_not, tables, by_default=False, description=DESCRIPTION, part_of=CACHED_ACCESS,
    measured=("quiet_*", "split_*"),
)  # fmt: skip
