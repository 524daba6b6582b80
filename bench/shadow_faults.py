"""The shadow-faults experiment: KVM's part of a fault under shadow paging, against a walk of the guest's tables."""

from __future__ import annotations

import statistics

import numpy as np
import pyperf

from bench.experiment import Cell, Checked, CheckError, Context, Description, Experiment, Over, Priced, Timed, alone, unavailable
from bench.faults import MIB, WALK, over_walk
from bench.shadow_guest import WRITE, ShadowGuest
from bench.tables import Table, nanoseconds
from fastmmu.audit import audit
from fastmmu.walk import walk_column

NAME = "shadow-faults"
SIZE = 1 << 30
WORKLOADS = {"no-prefetch": False, "prefetch": True}
CASES = ("after-unmap", "first-touch")


def cells(context: Context) -> list[Cell]:
    """The walk, and each kind of fault, with neighbours prefetched and without."""
    return [Cell(NAME, workload, case) for workload in WORKLOADS for case in (WALK, *CASES)]


def prepare(guest: ShadowGuest, case: str) -> None:
    """Before a run: what will fault is unmapped."""
    if case == "first-touch":
        guest.recreate()
    elif case == "after-unmap":
        guest.unmap()


def walked(guest: ShadowGuest, gpas: np.ndarray) -> None:
    """Walk the guest's tables for each address."""
    state = guest.machine.state
    mmu = type(state.mmu)(*(part[0] for part in state.mmu))
    walk_column(guest.machine.vm.mem, mmu, state.trail[0], guest.gvas, WRITE, gpas)


def guest_of(cell: Cell) -> ShadowGuest:
    """The guest of a cell, with all its pages mapped."""
    guest = ShadowGuest(cell.value(MIB.name, SIZE >> 20) << 20, prefetch=WORKLOADS[cell.workload])
    guest.fault(guest.gvas)
    return guest


def timed(context: Context, cell: Cell) -> Timed:
    """One kind of fault, or the walk of the guest's tables for the same addresses."""
    guest = guest_of(cell)
    gpas, fixed = np.zeros(len(guest.gvas), np.uint64), [0]

    def once() -> None:
        if cell.strategy == WALK:
            walked(guest, gpas)
            fixed[0] = len(gpas)
        else:
            fixed[0] = guest.fault(guest.gvas)

    pages = len(gpas) if cell.strategy == WALK else guest.pages
    return Timed(once, lambda: prepare(guest, cell.strategy), lambda: fixed[0], pages)


def check(context: Context, cell: Cell) -> Checked:
    """Run once: every page is mapped, the counters say so, and the state holds together afterwards.

    Raises:
        CheckError: a page was not mapped, or a walk went elsewhere.
    """
    guest = guest_of(cell)
    prepare(guest, cell.strategy)
    before = guest.machine.counters()
    faults = len(guest.gvas)
    if cell.strategy == WALK:
        gpas = np.zeros(faults, np.uint64)
        walked(guest, gpas)
        if (gpas != guest.gvas + np.uint64(guest.data)).any():
            raise CheckError(f"{cell.name}: a walk went elsewhere")
        return Checked({"faults": 0, "pages": faults}, faults)
    fixed = guest.fault(guest.gvas)
    audit(guest.machine)
    counters = {name: value - before[name] for name, value in guest.machine.counters().items()}
    if fixed != faults or counters["pages_4k"] != guest.pages:
        raise CheckError(f"{cell.name}: {fixed} of {faults} faults fixed, {counters['pages_4k']} of {guest.pages} pages mapped")
    return Checked({**counters, "faults": faults, "pages": guest.pages}, faults)


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Faults against the walk, for each page."""
    rows = []
    for name, ratio, own, counters in over_walk(suite):
        shown = ("-", "-", "-")
        if counters is not None:
            rate = f"{counters['faults'] / counters['pages'] / statistics.median(own) / 1e6:.1f}"
            shown = (rate, f"{counters['faults']:,}", f"{counters['mmu_cache_miss']:,}")
        rows.append((name, ratio, nanoseconds(own), *shown))
    head = ("neighbours / fault", "cost over the walk", "ns per page", "million faults per second", "faults", "mmu_cache_miss")
    note = (
        "KVM's part of a write fault, from the exit to the entry, for each page that is mapped: 1 GiB mapped by the guest "
        "with 4 KiB entries, in random order; reverse map and shadowed translation kept. after-unmap: the host unmapped the pages, "
        "their shadow pages stayed; first-touch: those are made too. The walk is of the guest's tables for the same addresses."
    )
    return [Table("page faults under shadow paging", head, rows, note)] if rows else []


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    by_default=False,
    description=Description(
        "What does a fault under shadow paging cost, KVM's part of it, against a walk of the guest's tables?",
    ),
    over=Over(WALK, cost=True),
    parameters=(MIB,),
    priced=Priced("pages", exits=("faults",), flushes=("remote_tlb_flush_requests",), locks=("lock_taken",), over=alone),
)
