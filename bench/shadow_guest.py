"""A guest with 4-level paging under shadow paging, for benchmarks: all of its data memory is mapped once, by 4 KiB entries."""

from __future__ import annotations

import numpy as np

from fastmmu.bits import CR0, CR4, EFER, GPTE64, PFERR
from fastmmu.events import EVENT, EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.measure import fault_column
from fastmmu.paging import Cpu

PAGE = 4096
GROUP = 8  # pages that a fault maps together, where neighbours are prefetched
SEED = 2007
ROOT = 0x1000
UPPER = int(GPTE64.P | GPTE64.W | GPTE64.A)
LEAF = UPPER | int(GPTE64.D)
CPU = Cpu(cr0=int(CR0.PE | CR0.PG | CR0.WP), cr3=ROOT, cr4=int(CR4.PAE), efer=int(EFER.LME | EFER.LMA | EFER.NX), maxphyaddr=46)
WRITE = PFERR.W
TABLES_SLOT, DATA_SLOT = 0, 1


class ShadowGuest:
    """A machine with `size` bytes of data, of which no page is mapped by an spte yet; its vCPU has a root.

    Attributes:
        gvas: the addresses that fault, in random order: one page in eight where neighbours are prefetched, else every page.
        pages: 4 KiB pages of data.
    """

    def __init__(self, size: int, *, prefetch: bool) -> None:
        self.size, self.pages = size, size // PAGE
        leaf_tables = -(-self.pages // 512)
        directories, tops = -(-leaf_tables // 512), -(-leaf_tables // 512**2)
        self.data = -(-(ROOT + PAGE * (1 + tops + directories + leaf_tables)) // (1 << 21)) << 21
        kvm = Kvm(tdp=False, tdp_mmu=False, prefetch=prefetch)
        self.machine = Machine(kvm, CPU, memory=self.data + size, tables=2 * leaf_tables + 1024)
        self.write_tables(tops, directories, leaf_tables)
        step = GROUP if prefetch else 1
        self.gvas = np.random.default_rng(SEED).permutation(self.pages // step).astype(np.uint64) * np.uint64(PAGE * step)
        slots = ((TABLES_SLOT, 0, self.data), (DATA_SLOT, self.data, size))
        self.prepared = [self.machine.prepare_slot(number, gpa, length) for number, gpa, length in slots]
        self.run(EventList().add(Op.SLOT_CREATE, value=self.prepared[0]).add(Op.SLOT_CREATE, value=self.prepared[1]))
        self.run(EventList().add(Op.PAGE_LIMIT, value=2 * leaf_tables + 1024))
        self.enter()

    def write_tables(self, tops: int, directories: int, leaf_tables: int) -> None:
        """Tables one behind another: PML4, PDPTs, PDs, PTs, each entry pointing to the next page of the level below."""
        words = self.machine.memory.words
        top, directory = ROOT + PAGE, ROOT + PAGE * (1 + tops)
        leaf = directory + PAGE * directories
        for table, target, count in ((ROOT, top, tops), (top, directory, directories), (directory, leaf, leaf_tables)):
            words[table >> 3 : (table >> 3) + count] = (target | UPPER) + PAGE * np.arange(count, dtype=np.uint64)
        words[leaf >> 3 : (leaf >> 3) + self.pages] = (self.data | LEAF) + PAGE * np.arange(self.pages, dtype=np.uint64)

    def run(self, events: EventList) -> None:
        """Replay events."""
        self.machine.run(events.array())

    def enter(self) -> None:
        """The guest runs, so that its vCPU has a root and no request is open."""
        self.run(EventList().add(Op.EXIT))

    def fault(self, gvas: np.ndarray) -> int:
        """KVM's part of a write fault at each address; how many were fixed."""
        return int(fault_column(self.machine.vm, self.machine.state, np.uint64(0), gvas, WRITE))

    def recreate(self) -> None:
        """The memslots go and come: nothing is shadowed but the root."""
        events = EventList().add(Op.SLOT_DELETE, address=DATA_SLOT).add(Op.SLOT_CREATE, value=self.prepared[1])
        self.run(events)
        self.enter()

    def unmap(self) -> None:
        """The host unmaps all data pages: the shadow pages stay, empty."""
        events = np.zeros(1, EVENT)
        events["op"], events["address"], events["value"] = Op.UNMAP, self.data, self.data + self.size
        self.machine.run(events)
        self.enter()
