"""A guest under shadow paging that maps its data by huge pages, once or twice, for benchmarks of splitting them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastmmu.bits import CR0, CR4, EFER, GPTE64, PFERR
from fastmmu.events import EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.machine_state import SlotFlag
from fastmmu.measure import touch_column
from fastmmu.paging import Cpu

PAGE, GIB = 4096, 1 << 30
ROOT = 0x1000
UPPER = int(GPTE64.P | GPTE64.W | GPTE64.U | GPTE64.A)
LEAF = int(GPTE64.P | GPTE64.U | GPTE64.A | GPTE64.D | GPTE64.PS)
CPU = Cpu(cr0=int(CR0.PE | CR0.PG | CR0.WP), cr3=ROOT, cr4=int(CR4.PAE), efer=int(EFER.LME | EFER.LMA | EFER.NX), maxphyaddr=46)
TABLES_SLOT, DATA_SLOT = 0, 1
LOG = int(SlotFlag.LOG_DIRTY_PAGES)
RIGHTS = {
    "rwx": LEAF | int(GPTE64.W),
    "rw": LEAF | int(GPTE64.W | GPTE64.NX),
    "ro": LEAF,
    "nx": LEAF | int(GPTE64.NX),
}
"""Leaf bits by what the guest grants: all; no fetches; no writes; neither."""
WINDOW_BITS = 39  # each window on the data is under a PML4 entry of its own
FETCHES = 8  # one in so many accesses to a page that may be executed, and that are no writes, is a fetch
SEED = 2022


class HugeGuest:
    """A machine with `size` bytes of data, mapped by the guest's pages of `level` in each window.

    Args:
        kvm: how KVM runs it; shadow paging.
        size: bytes, a multiple of the page size.
        windows: for each window the rights of its pages, in turn: names of RIGHTS.
        level: 2 or 3.
    """

    def __init__(self, kvm: Kvm, size: int, windows: Sequence[Sequence[str]], level: int = 2) -> None:
        self.size, self.windows, self.level = size, [list(one) for one in windows], level
        self.page = PAGE << 9 * (level - 1)
        self.count = size // self.page
        tables = 64 + 3 * len(windows) * (2 + size // GIB + size // (PAGE * 512))
        self.machine = Machine(kvm, CPU, memory=GIB + size, tables=tables)
        self.write_tables()
        slots = ((TABLES_SLOT, 0, GIB // 4), (DATA_SLOT, GIB, size))
        self.prepared = [self.machine.prepare_slot(number, gpa, length, host_level=level) for number, gpa, length in slots]
        self.run(EventList().add(Op.SLOT_CREATE, value=self.prepared[0]).add(Op.SLOT_CREATE, value=self.prepared[1]))
        self.run(EventList().add(Op.PAGE_LIMIT, value=tables).add(Op.EXIT))
        self.machine.populate(tables)
        heads = np.arange(self.count, dtype=np.uint64) * np.uint64(self.page)
        names = [[own[i % len(own)] for i in range(self.count)] for own in self.windows]
        self.heads = np.concatenate([heads + np.uint64(window << WINDOW_BITS) for window in range(len(windows))])
        write = {name: int(PFERR.U | (PFERR.W if bits & int(GPTE64.W) else np.uint64(0))) for name, bits in RIGHTS.items()}
        self.head_accesses = np.array([write[name] for own in names for name in own], np.uint64)

    def write_tables(self) -> None:
        """PML4, and for each window a PDPT, whose entries are the 1 GiB pages or point to PDs of 2 MiB pages."""
        words, free = self.machine.memory.words, ROOT + PAGE
        for window, names in enumerate(self.windows):
            pdpt, free = free, free + PAGE
            words[(ROOT >> 3) + window] = pdpt | UPPER
            bits = np.array([RIGHTS[names[i % len(names)]] for i in range(self.count)], np.uint64)
            leaves = bits | np.uint64(GIB) + np.uint64(self.page) * np.arange(self.count, dtype=np.uint64)
            if self.level == 3:
                words[pdpt >> 3 : (pdpt >> 3) + self.count] = leaves
                continue
            directories = -(-self.count // 512)
            words[pdpt >> 3 : (pdpt >> 3) + directories] = (free | UPPER) + PAGE * np.arange(directories, dtype=np.uint64)
            words[free >> 3 : (free >> 3) + self.count] = leaves
            free += PAGE * directories

    def run(self, events: EventList) -> None:
        """Replay events."""
        self.machine.run(events.array())

    def map_huge(self) -> None:
        """Nothing is mapped but huge pages, all of them."""
        self.log(on=False)
        self.run(EventList().add(Op.SLOT_DELETE, address=DATA_SLOT).add(Op.SLOT_CREATE, value=self.prepared[1]).add(Op.EXIT))
        self.touch(self.heads, self.head_accesses)

    def log(self, *, on: bool) -> None:
        """Dirty logging on, which splits, or off."""
        self.run(EventList().add(Op.SLOT_FLAGS, address=DATA_SLOT, value=LOG if on else 0).add(Op.EXIT))

    def touch(self, gvas: np.ndarray, accesses: np.ndarray, ticks: np.ndarray | None = None, vcpu: int = 0) -> int:
        """The guest's accesses: how many faults they took, -1 where one was denied."""
        return int(touch_column(self.machine.vm, self.machine.state, np.uint64(vcpu), gvas, accesses, ticks))

    def first_pass(self, writes: int) -> tuple[np.ndarray, np.ndarray]:
        """One access to each 4 KiB page, in order: (gvas, accesses). `writes` in a hundred write, where the guest grants it."""
        rng = np.random.default_rng(SEED)
        gvas, accesses = [], []
        for window, names in enumerate(self.windows):
            pages = np.arange(self.size // PAGE, dtype=np.uint64)
            bits = np.array([RIGHTS[name] for name in names], np.uint64)[pages // np.uint64(self.page // PAGE) % len(names)]
            write = (bits & GPTE64.W != 0) & (rng.integers(0, 100, len(pages)) < writes)
            fetch = ~write & (bits & GPTE64.NX == 0) & (rng.integers(0, FETCHES, len(pages)) == 0)
            gvas.append(pages * np.uint64(PAGE) + np.uint64(window << WINDOW_BITS))
            accesses.append(PFERR.U | np.where(write, PFERR.W, np.uint64(0)) | np.where(fetch, PFERR.F, np.uint64(0)))
        return np.concatenate(gvas), np.concatenate(accesses)
