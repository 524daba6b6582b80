"""The cached-access experiment: whose rights does the table get that takes a huge page's place when dirty logging begins?

Under shadow paging, by the policy of the patches' first versions: the same paths that split a nested guest's huge pages in Linux
6.1, for a guest that pages by itself. `<rights>[-<writes>]-nx<on|off>`: a guest maps its memory by huge pages, logging begins, then
each 4 KiB page is accessed once. `split-2m`, `split-1g`: the splitting alone, beside a copy of the bytes that it must write.
`<trace>-nx<on|off>`: a recorded stream during which logging begins and ends again and again.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyperf

from bench.experiment import Cell, Checked, CheckError, Context, Experiment, Timed, unavailable
from bench.fast_faults import PERIOD, host_events
from bench.huge_guest import DATA_SLOT, GIB, LOG, HugeGuest
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, ratio_text, round_values
from fastmmu.audit import audit
from fastmmu.bits import ROLE
from fastmmu.events import Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.machine_state import SHADOW_PAGE, STAT_WORDS, TABLE_WORDS, Counter, VmWord
from fastmmu.measure import split_slot
from fastmmu.stream import machine_for
from fastmmu.vm import Workload

NAME = "cached-access"
LAZY, CACHED, MEMCPY = "lazy", "cached", "memcpy"
EAGER = ("guest-walk", "propagate", CACHED)
STRATEGIES = (LAZY, *EAGER)
SIZE, LARGE, SPLIT_SIZE = GIB, 64 * GIB, 16 * GIB
AUDITED = 4 * GIB  # an audit looks at every spte; of larger guests the gauges must do
NX_ON, NX_OFF = "nx-on", "nx-off"
PASS_COUNTERS = ("pf_taken", "splits", "split_reads", "remote_tlb_flush_requests", "mmu_cache_miss", "orphans", "pages_4k")
MIXED = ("rwx", "rw", "ro", "nx")
# what the splits of a VM keep ready: room for 513 descriptors and 40 more, a page header, a table (facts 8.2)
SPLIT_CACHE_BYTES = (513 + 40) * 8 + SHADOW_PAGE.itemsize + TABLE_WORDS * 8


@dataclass(frozen=True)
class Work:
    """A guest, and what it does after logging began."""

    windows: tuple[tuple[str, ...], ...]
    nx: bool
    writes: int = 100
    level: int = 2
    size: int = SIZE


def workloads() -> dict[str, Work]:
    """By name, under NX huge pages and without: rights of all kinds, shares of writes, memory mapped twice, larger guests."""
    found = {}
    for nx in (False, True):
        end = NX_ON if nx else NX_OFF
        for rights in (*MIXED, "mixed"):
            found[f"{rights}-{end}"] = Work((MIXED if rights == "mixed" else (rights,),), nx)
        for writes in (50, 5):
            found[f"rwx-{writes}-{end}"] = Work((("rwx",),), nx, writes)
        found[f"twice-equal-{end}"] = Work((("rwx",), ("rwx",)), nx, 50)
        found[f"twice-different-{end}"] = Work((("rwx",), ("rw", "ro")), nx, 50)
    found["rwx-5-1g-nx-on"] = Work((("rwx",),), True, 5, 3, 4 * GIB)
    found["rwx-5-64g-nx-on"] = Work((("rwx",),), True, 5, 2, LARGE)
    return found


SPLITS = {f"split-{name}": Work((("rwx",),), False, level=level, size=SPLIT_SIZE) for name, level in (("2m", 2), ("1g", 3))}


def kvm_of(strategy: str, nx: bool) -> Kvm:
    """KVM with one of the strategies."""
    access = strategy if strategy in EAGER else CACHED
    eager = strategy != LAZY
    return Kvm(
        tdp=False, tdp_mmu=False, nx_huge_pages=nx, eager_page_split=eager, split_shadow_pages=eager, split_access=access
    )  # fmt: skip


def cells(context: Context) -> list[Cell]:
    """Lazy first, which splits nothing eagerly; the copy first where only the splitting counts; then the trace."""
    made = [Cell(NAME, workload, strategy) for workload in workloads() for strategy in STRATEGIES]
    made += [Cell(NAME, workload, strategy) for workload in SPLITS for strategy in (MEMCPY, *EAGER)]
    return made + [Cell(NAME, f"{context.workload.name}-{end}", strategy) for end in (NX_OFF, NX_ON) for strategy in STRATEGIES]


@lru_cache(maxsize=1)
def guest(work: Work, strategy: str) -> HugeGuest:
    """The guest of a cell; one is kept."""
    return HugeGuest(kvm_of(strategy if strategy != MEMCPY else CACHED, work.nx), work.size, work.windows, work.level)


def kind_of(cell: Cell) -> str:
    """`pass`, `split` or `trace`."""
    return "pass" if cell.workload in workloads() else "split" if cell.workload in SPLITS else "trace"


# --- the work --------------------------------------------------------------------------------------------------------------


class Pass:
    """Logging begins, and each page is accessed once."""

    def __init__(self, cell: Cell) -> None:
        self.work = workloads()[cell.workload]
        self.guest = guest(self.work, cell.strategy)
        self.gvas, self.accesses = self.guest.first_pass(self.work.writes)
        self.faults = 0

    def run(self) -> None:
        """Timed."""
        self.guest.log(on=True)
        self.faults = self.guest.touch(self.gvas, self.accesses)


class Split:
    """The splitting alone, or a copy of as many bytes as it writes: sptes, words of the reverse map, page headers."""

    def __init__(self, cell: Cell) -> None:
        self.work, self.copies = SPLITS[cell.workload], cell.strategy == MEMCPY
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
        done = len(context.workload.events)
        return Checked({**machine.counters(), "accesses": done, "orphans": orphans(machine)}, done)
    if kind == "split":
        return check_split(cell)
    one = Pass(cell)
    one.guest.map_huge()
    machine = one.guest.machine
    before = machine.counters()
    begin = time.perf_counter()
    one.guest.log(on=True)
    split_done = time.perf_counter()
    if one.work.size <= AUDITED:
        audit(machine)
    resumed = time.perf_counter()
    faults = one.guest.touch(one.gvas, one.accesses)
    end = time.perf_counter()
    if one.work.size <= AUDITED:
        audit(machine)
    counters = {name: value - before[name] for name, value in machine.counters().items()}
    expected = 0 if cell.strategy == LAZY else len(one.guest.heads) * (1 if one.work.level == 2 else 513)
    if faults < 0 or counters["splits"] != expected:
        raise CheckError(f"{cell.name}: {counters['splits']} pages split, expected {expected}; {faults} faults")
    told = {"log_on_us": round((split_done - begin) * 1e6), "pass_us": round((end - resumed) * 1e6)}
    told |= {"orphans": orphans(machine), "translations": translations(machine), "accesses": len(one.gvas)}
    return Checked({**counters, **told}, faults)


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
        accesses = len(context.workload.events)
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
    return Timed(one.run, one.guest.map_huge, lambda: one.faults, len(one.gvas))


# --- tables ----------------------------------------------------------------------------------------------------------------


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """The first pass after logging began; what the mail claims; the splitting alone; the trace."""
    found = by_workload(suite)
    passes = {name: found[name] for name in workloads() if name in found}
    splits = {name: found[name] for name in SPLITS if name in found}
    traces = {name: one for name, one in found.items() if name not in passes and name not in splits}
    made = [pass_table(passes), claims_table(passes), split_table(splits), trace_table(traces)]
    return [table for table in made if table.rows]


Found = dict[str, dict[str, dict[str, pyperf.Benchmark]]]


def times_of(strategies: dict[str, dict[str, pyperf.Benchmark]]) -> dict[str, list[float]]:
    """Seconds an access of each round, by strategy."""
    return {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items() if "time" in metrics}


def counted(strategies: dict[str, dict[str, pyperf.Benchmark]]) -> dict[str, dict[str, int]]:
    """Counters by strategy."""
    return {strategy: counters_of(next(iter(metrics.values()))) for strategy, metrics in strategies.items()}


def pass_table(found: Found) -> Table:
    """Split and first pass together, against lazy."""
    rows = []
    for workload, strategies in found.items():
        times, counters = times_of(strategies), counted(strategies)
        for strategy, own in times.items():
            one = counters[strategy]
            ratio = ratio_text(times[LAZY], own, cost=False) if LAZY in times else "-"
            extra = f"{one['pf_taken'] - counters[CACHED]['pf_taken']:+,}" if CACHED in counters else "-"
            total = f"{statistics.median(own) * one['accesses'] * 1e3:.2f}"
            parts = (f"{one['log_on_us'] / 1e3:.2f}", f"{one['pass_us'] / 1e3:.2f}")
            rows.append((f"{workload} / {strategy}", ratio, total, *parts, extra, *counts(one, *PASS_COUNTERS)))
    head = (
        "workload / rights from", f"speed-up over {LAZY}", "ms", "log on", "pass", "faults more than cached",
        "pf_taken", "splits", "guest reads", "flushes", "mmu_cache_miss", "without parent", "pages_4k",
    )  # fmt: skip
    note = (
        "Shadow paging of an ordinary guest by the policy of the patches' first versions, 1 GiB in 2 MiB pages if nothing else is "
        "said. Timed: logging begins, then each 4 KiB page is accessed once, in order, by walking the sptes and by KVM's part of "
        "each fault; of accesses that are no writes one in eight is a fetch, where the guest grants it. `log on` and `pass` are of "
        "the run that was counted. `without parent`: shadow pages that stay, counted against the limit, though nothing leads there."
    )
    return Table("huge pages split when dirty logging begins", head, rows, note)


def claims_table(found: Found) -> Table:
    """What the mail says of access caching and of the alternative, with what was counted."""
    rows = []
    for workload, strategies in found.items():
        counters = counted(strategies)
        if CACHED not in counters or "propagate" not in counters or not workload.endswith(NX_ON):
            continue
        cached, other = counters[CACHED], counters["propagate"]
        regions = max(other["splits"], 1)
        rows.append((
            workload,
            f"{cached['translations'] >> 10:,}",
            "0",
            f"{SPLIT_CACHE_BYTES:,}",
            f"{other['pf_taken'] - cached['pf_taken']:+,}",
            f"{other['mmu_cache_miss'] - cached['mmu_cache_miss']:+,}",
            f"{other['orphans'] - cached['orphans']:+,}",
            f"{(other['remote_tlb_flush_requests'] - cached['remote_tlb_flush_requests']) / regions:+.2f}",
        ))  # fmt: skip
    head = (
        "workload", "KiB of translations", "of them for access", "bytes of split caches",
        "faults", "shadow pages made", "without parent", "flushes per page split",
    )  # fmt: skip
    note = (
        '"Requires no additional memory": access lies in the low bits of the word that held the gfn alone; splitting itself needs '
        "its caches, once a VM. The last four columns are what propagating the huge spte's rights costs more than caching the "
        'guest\'s: "extra faults", and new shadow pages where existing ones could be used.'
    )
    return Table("the mail's claims under NX huge pages, propagate against cached", head, rows, note)


def split_table(found: Found) -> Table:
    """The splitting alone against a copy."""
    rows = []
    for workload, strategies in found.items():
        times, counters = times_of(strategies), counted(strategies)
        for strategy, own in times.items():
            one = counters[strategy]
            copy = ratio_text(times[MEMCPY], own, cost=True) if MEMCPY in times else "-"
            other = ratio_text(times["propagate"], own, cost=True) if "propagate" in times and strategy != MEMCPY else "-"
            rate = f"{one['size'] / GIB / (statistics.median(own) * one['accesses']):,.0f}"
            rows.append((f"{workload} / {strategy}", copy, other, f"{statistics.median(own) * 1e9:.0f}", rate))
    head = ("pages / rights from", "cost over the copy", "cost over propagate", "ns per split", "GiB of guest memory a second")
    note = (
        "16 GiB of a guest's huge pages, one thread. `memcpy` copies as many bytes as a split writes: 512 sptes, as many words of "
        "the reverse map, the page header."
    )
    return Table("splitting huge pages", head, rows, note)


def trace_table(found: Found) -> Table:
    """The recorded stream."""
    rows = []
    for workload, strategies in found.items():
        times, counters = times_of(strategies), counted(strategies)
        for strategy, own in times.items():
            ratio = ratio_text(times[LAZY], own, cost=False) if LAZY in times else "-"
            shown = counts(counters[strategy], "pf_taken", "splits", "remote_tlb_flush_requests", "mmu_cache_miss", "orphans")
            rows.append((f"{workload} / {strategy}", ratio, f"{statistics.median(own) * 1e9:.2f}", *shown))
    counted_as = ("pf_taken", "splits", "flushes", "mmu_cache_miss", "without parent")
    head = ("trace / rights from", f"speed-up over {LAZY}", "ns per record", *counted_as)
    note = f"Shadow paging, 2 MiB host pages; logging goes on or off every {PERIOD:,} records, the log collected before it ends."
    return Table("a recorded stream under migration after migration", head, rows, note)


EXPERIMENT = Experiment(NAME, cells, check, timed, unavailable, tables, by_default=False)
