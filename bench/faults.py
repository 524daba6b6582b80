"""The faults experiment: what does a page fault cost, KVM's part of it, against a walk of the tables that it fills?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyperf

from bench.experiment import (
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
    alone,
    unavailable,
)
from bench.results import counters_of
from bench.tables import Table, by_workload, nanoseconds, ratio_text, round_values
from fastmmu.audit import audit
from fastmmu.bits import CR0, PFERR
from fastmmu.events import EVENT, EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.machine_state import SlotFlag
from fastmmu.measure import fault_column, walk_spte_column
from fastmmu.paging import Cpu

NAME = "faults"
MMUS = ("tdp", "legacy")
SIZES = {"4k": (1 << 30, 1, 1 << 12), "2m": (16 << 30, 2, 1 << 21)}  # guest memory, level of the host's mapping, bytes a fault maps
CASES = ("first-touch", "after-unmap", "write-protect")
WALK = "walk"
GROUP = 8  # pages that the shadow MMU maps together: one address in each group, so that every fault is one
SEED = 2012
WRITE_FAULT = PFERR.GUEST_FINAL | PFERR.U | PFERR.W
LOG = int(SlotFlag.LOG_DIRTY_PAGES)
MIB = Parameter("mib", "MiB of the guest's memory", 2, 1 << 18)


def cells(context: Context) -> list[Cell]:
    """The walk, and each kind of fault, by MMU and page size."""
    return [Cell(NAME, f"{mmu}/{size}", case) for mmu in MMUS for size in SIZES for case in (WALK, *CASES)]


@dataclass
class Guest:
    """A machine with one memslot, and the addresses that fault, in random order."""

    machine: Machine
    size: int
    gpas: np.ndarray
    slot: int

    def run(self, events: EventList) -> None:
        self.machine.run(events.array())

    def fault(self, pferr: np.uint64) -> int:
        """All faults, one after another; how many were fixed."""
        return fault_column(self.machine.vm, self.machine.state, np.uint64(0), self.gpas, pferr)

    def recreate(self) -> None:
        """The memslot goes and comes: nothing is mapped, no table is left but the root."""
        self.run(EventList().add(Op.SLOT_DELETE, address=0).add(Op.SLOT_CREATE, value=self.slot))
        self.enter()

    def enter(self) -> None:
        """The guest runs, so that its vCPU has a root and no request is open."""
        self.run(EventList().add(Op.EXIT))

    def unmap(self) -> None:
        """The host unmaps each of the pages that will fault, and no other: the tables stay."""
        pages = np.sort(self.gpas)
        events = np.zeros(len(pages), EVENT)
        events["op"], events["address"], events["value"] = Op.UNMAP, pages, pages + np.uint64(4096)
        self.machine.run(events)
        self.enter()

    def log(self, on: bool) -> None:
        """Dirty logging on or off."""
        self.run(EventList().add(Op.SLOT_FLAGS, address=0, value=LOG if on else 0))
        self.enter()


def guest(cell: Cell) -> Guest:
    """The guest of a cell, with all its pages mapped."""
    mmu, name = cell.workload.split("/")
    size, host_level, page = SIZES[name]
    size = cell.value(MIB.name, size >> 20) << 20
    cpu = Cpu(cr0=int(CR0.PE), cr3=0, cr4=0, efer=0)
    machine = Machine(Kvm(tdp_mmu=mmu == "tdp", eager_page_split=False), cpu, memory=size)
    step = page * (GROUP if name == "4k" else 1)
    gpas = np.random.default_rng(SEED).permutation(size // step).astype(np.uint64) * np.uint64(step)
    one = Guest(machine, size, gpas, machine.prepare_slot(0, 0, size, host_level=host_level))
    one.run(EventList().add(Op.SLOT_CREATE, value=one.slot))
    one.enter()
    one.fault(WRITE_FAULT)
    return one


def prepare(one: Guest, case: str) -> None:
    """Before a run: what will fault is unmapped or write-protected."""
    if case == "first-touch":
        one.recreate()
    elif case == "after-unmap":
        one.unmap()
    elif case == "write-protect":
        one.log(on=False)
        one.fault(WRITE_FAULT)  # what logging had split comes back
        one.log(on=True)


def timed(context: Context, cell: Cell) -> Timed:
    """One kind of fault, or the walk of the same tables for the same addresses."""
    one = guest(cell)
    fixed = [0]
    pferr = WRITE_FAULT | (PFERR.P if cell.strategy == "write-protect" else np.uint64(0))

    def once() -> None:
        if cell.strategy == WALK:
            fixed[0] = walk_spte_column(one.machine.vm, one.machine.state, one.gpas, WRITE_FAULT)[0]
        else:
            fixed[0] = one.fault(pferr)

    return Timed(once, lambda: prepare(one, cell.strategy), lambda: int(fixed[0]), len(one.gpas))


def check(context: Context, cell: Cell) -> Checked:
    """Run once: every fault is fixed, the counters say so, and the state holds together afterwards.

    Raises:
        CheckError: a fault was not fixed.
    """
    work = guest(cell)
    prepare(work, cell.strategy)
    before = work.machine.counters()
    expected = len(work.gpas)
    if cell.strategy == WALK:
        done = walk_spte_column(work.machine.vm, work.machine.state, work.gpas, WRITE_FAULT)[0]
    else:
        done = work.fault(WRITE_FAULT | (PFERR.P if cell.strategy == "write-protect" else np.uint64(0)))
    audit(work.machine)
    counters = {name: value - before[name] for name, value in work.machine.counters().items()}
    if done != expected or (cell.strategy != WALK and counters["pf_fixed"] != expected):
        raise CheckError(f"{cell.name}: {done} of {expected} addresses, pf_fixed {counters['pf_fixed']}")
    mapped = counters["pages_4k"] + 512 * counters["pages_2m"]
    return Checked({**counters, "faults": expected, "mapped_4k": mapped}, expected)


def over_walk(suite: dict[str, pyperf.Benchmark]) -> Iterator[tuple[str, str, list[float], dict[str, int] | None]]:
    """Each timed case: its name, the ratio to the walk of its workload, seconds of its rounds, and counters (None for the walk)."""
    for workload, strategies in by_workload(suite).items():
        times = {case: round_values(metrics["time"]) for case, metrics in strategies.items() if "time" in metrics}
        for case, own in times.items():
            ratio = ratio_text(times[WALK], own, cost=True) if WALK in times else "-"
            yield f"{workload} / {case}", ratio, own, None if case == WALK else counters_of(strategies[case]["time"])


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Faults against the walk."""
    rows = []
    for name, ratio, own, counters in over_walk(suite):
        shown = ("-", "-", "-", "-")
        if counters is not None:
            counted = (counters[name] for name in ("pages_4k", "pf_fast", "remote_tlb_flush_requests"))
            shown = (f"{1 / statistics.median(own) / 1e6:.1f}", *(f"{value:,}" for value in counted))
        rows.append((name, ratio, nanoseconds(own), *shown))
    head = ("mmu / page / fault", "cost over the walk", "ns", "million faults per second", "pages_4k", "pf_fast", "flushes")
    note = (
        "KVM's part of a fault, from the exit to the entry (no TLB is involved), one vCPU, addresses in random order: 4k: one page "
        "in eight of 1 GiB (the legacy map takes its seven neighbours along on first touch); 2m: 16 GiB of 2 MiB host pages, whose "
        "write-protected ones give way to 4 KiB. The walk is of the same sptes for the same addresses."
    )
    return [Table("page faults", head, rows, note)] if rows else []


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    by_default=False,
    description=Description(
        "What does a page fault cost, KVM's part of it, against a walk of the tables that it fills?",
    ),
    over=Over(WALK, cost=True),
    parameters=(MIB,),
    priced=Priced("faults", exits=("pf_taken",), flushes=("remote_tlb_flush_requests",), locks=("lock_taken",), over=alone),
)
