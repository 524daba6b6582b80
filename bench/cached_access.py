"""The cached-access experiment: whose rights does the table get that takes a huge page's place when dirty logging begins?

Under shadow paging, by the policy of the patches' first versions: the same paths that split a nested guest's huge pages in Linux
6.1, for a guest that pages by itself. `<rights>[-<writes>]-nx<on|off>`: a guest maps its memory by huge pages, logging begins, then
each 4 KiB page is accessed once. `split-2m`, `split-1g`: the splitting alone, beside a copy of the bytes that it must write.
`<trace>-nx<on|off>`: a recorded stream during which logging begins and ends again and again.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from bench.cached_access_tables import CACHED, GIB, LAZY, MEMCPY, NAME, NX_OFF, NX_ON, PERIOD, PROPAGATE, over, tables
from bench.experiment import RECORDS, Cell, Checked, CheckError, Context, Description, Experiment, Priced, Timed, unavailable
from bench.fast_faults import host_events
from bench.huge_guest import DATA_SLOT, LOG, HugeGuest
from fastmmu.audit import audit
from fastmmu.bits import ROLE
from fastmmu.events import Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.machine_state import SHADOW_PAGE, STAT_WORDS, TABLE_WORDS, Counter, VmWord
from fastmmu.measure import split_slot
from fastmmu.rmap import DESC_WORDS
from fastmmu.stream import machine_for
from fastmmu.vm import Workload

EAGER = ("guest-walk", PROPAGATE, CACHED)
STRATEGIES = (LAZY, *EAGER)
SIZE, LARGE, SPLIT_SIZE = GIB, 64 * GIB, 16 * GIB
AUDITED = 4 * GIB  # an audit looks at every spte; of larger guests the gauges must do
MIXED = ("rwx", "rw", "ro", "nx")
FIRST_PASS = 4  # marks of time up to its end
REPEATS = 3  # of the run that is counted, for its times
# what the splits of a VM keep ready: 513 descriptors, in an array with room for 40 more, a page header, a table (facts 8.2)
SPLIT_CACHE_BYTES = (513 + 40) * 8 + 513 * int(DESC_WORDS) * 8 + SHADOW_PAGE.itemsize + TABLE_WORDS * 8


@dataclass(frozen=True)
class Work:
    """A guest, and what it does after logging began."""

    windows: tuple[tuple[str, ...], ...]
    nx: bool
    writes: int
    level: int
    size: int


def workloads() -> dict[str, Work]:
    """By name, under NX huge pages and without: rights of all kinds, shares of writes, memory mapped twice, larger guests."""
    found = {}
    for nx in (False, True):
        end = NX_ON if nx else NX_OFF
        for rights in (*MIXED, "mixed"):
            found[f"{rights}-{end}"] = Work((MIXED if rights == "mixed" else (rights,),), nx, 100, 2, SIZE)
        for writes in (50, 5):
            found[f"rwx-{writes}-{end}"] = Work((("rwx",),), nx, writes, 2, SIZE)
        found[f"twice-equal-{end}"] = Work((("rwx",), ("rwx",)), nx, 50, 2, SIZE)
        found[f"twice-different-{end}"] = Work((("rwx",), ("rw", "ro")), nx, 50, 2, SIZE)
    found["rwx-5-1g-nx-on"] = Work((("rwx",),), True, 5, 3, 4 * GIB)
    found["rwx-5-64g-nx-on"] = Work((("rwx",),), True, 5, 2, LARGE)
    return found


SPLITS = {"split-2m": 2, "split-1g": 3}
"""Workloads of the splitting alone: the level of their pages."""


def kvm_of(strategy: str, nx: bool, **more: bool) -> Kvm:
    """KVM with one of the strategies, under shadow paging."""
    eager, access = strategy != LAZY, strategy if strategy in EAGER else CACHED
    policy = {"eager_page_split": eager, "split_shadow_pages": eager, "split_access": access}
    return Kvm(tdp=False, tdp_mmu=False, nx_huge_pages=nx, **policy, **more)


def cells(context: Context) -> list[Cell]:
    """Lazy first, which splits nothing eagerly; the copy first where only the splitting counts; then the trace."""
    made = [Cell(NAME, workload, strategy) for workload in workloads() for strategy in STRATEGIES]
    made += [Cell(NAME, workload, strategy) for workload in SPLITS for strategy in (MEMCPY, *EAGER)]
    return made + traced_cells(context)


def traced_cells(context: Context) -> list[Cell]:
    """The strategies on the trace, without NX huge pages and with them."""
    return [Cell(NAME, f"{context.workload.name}-{end}", strategy) for end in (NX_OFF, NX_ON) for strategy in STRATEGIES]


@lru_cache(maxsize=1)
def guest(work: Work, strategy: str) -> HugeGuest:
    """The guest of a cell; one is kept."""
    return HugeGuest(kvm_of(strategy if strategy != MEMCPY else CACHED, work.nx), work.size, work.windows, work.level)


def kind_of(cell: Cell) -> str:
    """`pass`, `split` or `trace`."""
    return "pass" if cell.workload in workloads() else "split" if cell.workload in SPLITS else "trace"


def with_records(context: Context, cell: Cell, name: str, value: int) -> Cell | None:
    """Only cells of the trace have a number of records."""
    return cell.having(name, value) if kind_of(cell) == "trace" else None


# --- the work --------------------------------------------------------------------------------------------------------------


class Pass:
    """Logging begins, and each page is accessed once."""

    def __init__(self, cell: Cell) -> None:
        self.work = workloads()[cell.workload]
        self.guest = guest(self.work, cell.strategy)
        self.events = self.guest.first_pass(self.work.writes)
        self.guest.machine.check(self.events)

    def run(self) -> None:
        """Timed."""
        self.guest.log(on=True)
        self.guest.machine.run(self.events, checked=True)


class Split:
    """The splitting alone, or a copy of as many bytes as it writes: sptes, words of the reverse map, page headers."""

    def __init__(self, cell: Cell) -> None:
        self.work, self.copies = Work((("rwx",),), False, 100, SPLITS[cell.workload], SPLIT_SIZE), cell.strategy == MEMCPY
        small = self.work.size >> 21
        self.splits = small if self.work.level == 2 else small + small // 512
        self.guest = guest(self.work, cell.strategy)
        self.stat = np.zeros(STAT_WORDS, np.int64)
        size = self.splits * (2 * TABLE_WORDS * 8 + SHADOW_PAGE.itemsize)
        self.source, self.target = np.ones(size if self.copies else 0, np.uint8), np.zeros(size if self.copies else 0, np.uint8)

    def run(self) -> None:
        """Timed."""
        if self.copies:
            np.copyto(self.target, self.source)
        else:
            split_slot(self.guest.machine.vm, self.stat, np.uint64(DATA_SLOT))


def switched_stream(workload: Workload) -> np.ndarray:
    """The stream, with logging switched on for the guest's memory after each other PERIOD records, and off after the next, when the
    log has been collected: migration after migration."""
    memory = [number for number, slot in enumerate(slot for slot in workload.slots if slot[2] != "device") if slot[2] == "ram"]
    parts = []
    for number, start in enumerate(range(0, len(workload.events), PERIOD)):
        parts.append(workload.events[start : start + PERIOD])
        if number % 2:
            parts.append(host_events(Op.DIRTY_GET, memory, 0))
        parts.append(host_events(Op.SLOT_FLAGS, memory, 0 if number % 2 else LOG))
    return np.concatenate(parts)


def traced(context: Context, cell: Cell) -> tuple[Machine, np.ndarray]:
    """A fresh machine for the trace, whose memory the host maps by huge pages, and its events."""
    context = context.of(cell)
    events = context.once("switched", lambda: switched_stream(context.workload))
    machine = machine_for(context.workload, kvm_of(cell.strategy, cell.workload.endswith(NX_ON)), host_level=2)
    machine.check(events)
    machine.populate()
    return machine, events


# --- checked and timed -----------------------------------------------------------------------------------------------------


def orphans(machine: Machine) -> int:
    """Shadow pages that nothing points to and that are nobody's root, but that are kept and counted."""
    page = machine.vm.page[: int(machine.vm.word[VmWord.FRESH_TABLE])]
    used = (page["role"] != 0) & (page["role"] & np.uint32(ROLE.INVALID) == 0)
    return int((used & (page["parents"] == 0) & (page["roots"] == 0)).sum())


def translations(machine: Machine) -> int:
    """Bytes of the arrays in which gfn and access are kept beside the sptes: a page for each shadow page of a guest's table that
    can have leaves."""
    page = machine.vm.page[: int(machine.vm.word[VmWord.FRESH_TABLE])]
    indirect = (page["role"] != 0) & (page["role"] & np.uint32(ROLE.DIRECT) == 0)
    return 4096 * int((indirect & (page["level"] <= 3)).sum())


def check(context: Context, cell: Cell) -> Checked:
    """Run once: what was to be split is split, no access is denied, the state holds together after the split and at the end.

    Raises:
        CheckError, AuditError, ReplayError.
    """
    kind = kind_of(cell)
    if kind == "trace":
        machine, events = traced(context, cell)
        machine.run(events, checked=True)
        audit(machine)
        done = len(context.of(cell).workload.events)
        return Checked({**machine.counters(), "accesses": done, "orphans": orphans(machine)}, done)
    if kind == "split":
        return check_split(cell)
    one = Pass(cell)
    machine, audited = one.guest.machine, one.work.size <= AUDITED
    samples = [counted_run(one, audited and number == 0) for number in range(REPEATS if audited else 1)]
    counters = samples[0][0]
    expected = 0 if cell.strategy == LAZY else len(one.guest.heads) * (1 if one.work.level == 2 else 513)
    if counters["pf_guest"] or counters["splits"] != expected:
        raise CheckError(f"{cell.name}: {counters['splits']} pages split, expected {expected}; {counters['pf_guest']} #PFs")
    for name in samples[0][1]:
        times = [round(times[name] * 1e6) for _, times in samples]
        counters |= {f"{name}_us": round(statistics.median(times)), f"{name}_us_low": min(times), f"{name}_us_high": max(times)}
    counters |= {"translations": translations(machine), "split_caches": SPLIT_CACHE_BYTES, "accesses": len(one.events)}
    one.guest.map_huge()
    one.run()
    return Checked(counters, one.guest.written())


def counted_run(one: Pass, audited: bool) -> tuple[dict[str, int], dict[str, float]]:
    """One run in parts: (what was counted, seconds). The first pass again, now that all is mapped and logged, takes no fault: the
    difference is the time in faults.

    Raises:
        AuditError: the state does not hold together after the split, or at the end.
    """
    machine = one.guest.machine
    one.guest.map_huge()
    before = machine.counters()
    marks = [time.perf_counter()]
    one.guest.log(on=True)
    marks.append(time.perf_counter())
    if audited:
        audit(machine)
    for _ in range(2):
        marks.append(time.perf_counter())
        machine.run(one.events, checked=True)
        marks.append(time.perf_counter())
        if len(marks) == FIRST_PASS:
            after, left = machine.counters(), orphans(machine)
    if audited:
        audit(machine)
    counters = {name: value - before[name] for name, value in after.items()}
    first, again = marks[3] - marks[2], marks[5] - marks[4]
    return {**counters, "orphans": left}, {"log_on": marks[1] - marks[0], "pass": first, "faults": max(first - again, 0.0)}


def check_split(cell: Cell) -> Checked:
    """The same of the splitting alone."""
    one = Split(cell)
    one.guest.map_huge()
    one.run()
    splits = one.splits if one.copies else int(one.stat[Counter.SPLITS])
    if splits != one.splits or (one.copies and not (one.target == one.source).all()):
        raise CheckError(f"{cell.name}: {splits} pages split, expected {one.splits}; or the copy differs")
    return Checked({"accesses": splits, "size": one.work.size}, one.splits)


def timed(context: Context, cell: Cell) -> Timed:
    """The work of a cell."""
    kind = kind_of(cell)
    if kind == "trace":
        fresh: list[tuple[Machine, np.ndarray]] = []
        accesses = len(context.of(cell).workload.events)
        return Timed(
            lambda: fresh[0][0].run(fresh[0][1], checked=True),
            lambda: fresh.__setitem__(slice(None), [traced(context, cell)]),
            lambda: accesses,
            accesses,
        )
    if kind == "split":
        split = Split(cell)
        return Timed(split.run, split.guest.map_huge, lambda: split.splits, split.splits)
    one = Pass(cell)
    return Timed(one.run, one.guest.map_huge, one.guest.written, len(one.events))


DESCRIPTION = Description(
    question="To split a huge page a hypervisor must know what the guest's mapping really grants: remember it, walk the guest's "
    "tables again, or guess and repair later?",
    source="“Re: [PATCH v2 16/26] KVM: x86/mmu: Cache the access bits of shadowed translations”, Peter Xu and David Matlack, "
    "March 2022",
    claim="Access kept beside the gfn needs no additional memory. Copying the huge spte's rights would work too, says the review, "
    "at the price of extra faults, and of new shadow pages where existing ones could be used.",
    not_shown="The exits around the faults, and the guest's own work between them. The guest pages by itself, under the policy of "
    "the patches' first versions; nested guests, for which the code was merged, run the same paths, and are held to what a real "
    "kernel counted, but are not timed.",
    year=2022,
)

EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    by_default=False,
    description=DESCRIPTION,
    over=over,
    traced=traced_cells,
    parameters=(replace(RECORDS, apply=with_records),),
    priced=Priced("accesses", exits=("pf_taken",), flushes=("remote_tlb_flush_requests",), locks=("pf_taken",)),
    measured=("log_on_us*", "pass_us*", "faults_us*"),
)
