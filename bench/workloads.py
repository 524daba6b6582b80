"""Workloads of the mmio-cache experiment: small named ones, each with one point to make, and streams of real machines."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fastmmu.bits import CR0, CR4, EFER, GENERATION_UPDATING, GPTE64, PFERR, WORDS_PER_PAGE
from fastmmu.events import EventList, Op
from fastmmu.paging import Cpu
from fastmmu.trace import load_replay
from fastmmu.vm import Workload

BUNDLED_TRACE = Path(__file__).parent / "traces" / "excerpt-replay-linux-boot-long.npz"

LONGEST_NAME = 60
# Names that experiments have for workloads of their own, beside those of the small ones below; and the end of one of them.
TAKEN = {"data", "all", "all-execute-only", "woven", "matrix-wp1", "matrix-wp0", "snapshot-linux-boot", "snapshot-fork-exec"}
TAKEN_END = "-warm"
RAM = 16 << 20
DEVICE_A, DEVICE_B = 0xFE00_0000, 0xFE10_0000
GVA = 0xFFFF_8000_0020_0000  # where the small workloads map their device
READ, WRITE, USER = 0, int(PFERR.W), int(PFERR.U)
TABLE_FLAGS = int(GPTE64.P | GPTE64.W | GPTE64.U | GPTE64.A)
LEAF_FLAGS = int(GPTE64.P | GPTE64.W | GPTE64.A | GPTE64.D | GPTE64.NX)
REPEATS = 100


class Tables:
    """Builder of 4-level page tables in a handful of pages."""

    def __init__(self) -> None:
        self.pages: dict[int, np.ndarray] = {}
        self._next_gfn = 0x100

    def page(self) -> int:
        """A new empty table; its gpa."""
        gfn = self._next_gfn
        self._next_gfn += 1
        self.pages[gfn] = np.zeros(WORDS_PER_PAGE, np.uint64)
        return gfn << 12

    def map(self, root: int, gva: int, gpa: int, flags: int = LEAF_FLAGS) -> int:
        """Map one 4 KiB page; returns the gpa of its leaf entry."""
        table = root
        for level in (4, 3, 2):
            index = gva >> (3 + 9 * level) & 511
            entry = int(self.pages[table >> 12][index])
            if not entry:
                entry = self.page() | TABLE_FLAGS
                self.pages[table >> 12][index] = entry
            table = entry & int(GPTE64.ADDR)
        index = gva >> 12 & 511
        self.pages[table >> 12][index] = gpa | flags
        return table + 8 * index

    def workload(self, name: str, summary: str, root: int, events: EventList) -> Workload:
        """The virtual machine that starts with these tables."""
        cpu = Cpu(
            cr0=int(CR0.PE | CR0.WP | CR0.PG), cr3=root, cr4=int(CR4.PAE), efer=int(EFER.LME | EFER.LMA | EFER.NX), maxphyaddr=40
        )
        slots = [(0, RAM, "ram"), (DEVICE_A, DEVICE_A + 0x10_0000, "device"), (DEVICE_B, DEVICE_B + 0x10_0000, "device")]
        return Workload(name, cpu, slots, self.pages, events.array(), summary)


def _remap(name: str, summary: str, *, invlpg: bool) -> Workload:
    tables = Tables()
    root = tables.page()
    leaf = tables.map(root, GVA, DEVICE_A)
    events = EventList()
    for turn in range(REPEATS):
        events.device(GVA + 8, READ).device(GVA + 16, WRITE)
        events.store(leaf, (DEVICE_A if turn % 2 else DEVICE_B) | LEAF_FLAGS)
        if invlpg:
            events.invlpg(GVA)
    events.device(GVA, READ)
    return tables.workload(name, summary, root, events)


def remap_invlpg() -> Workload:
    """The first hazard of the review, done properly by the guest."""
    return _remap("remap-invlpg", "the guest points a page at another device, then INVLPG, as it must", invlpg=True)


def remap_no_invlpg() -> Workload:
    """The first hazard of the review, as it was worded: without INVLPG."""
    return _remap("remap-no-invlpg", "the guest points a page at another device and does not tell the processor", invlpg=False)


def two_address_spaces() -> Workload:
    """The second hazard of the review: two processes, one gva, two devices."""
    tables = Tables()
    roots = [tables.page(), tables.page()]
    for root, device in zip(roots, (DEVICE_A, DEVICE_B), strict=True):
        tables.map(root, GVA, device, LEAF_FLAGS | USER)
    events = EventList()
    for turn in range(REPEATS):
        events.cr3(roots[turn % 2]).device(GVA + 8, READ | USER).device(GVA + 16, WRITE | USER)
    return tables.workload("two-address-spaces", "two processes map different devices at one gva", roots[0], events)


def kernel_only_page() -> Workload:
    """A kernel-only device page, touched by the kernel, then by user code."""
    tables = Tables()
    root = tables.page()
    tables.map(root, GVA, DEVICE_A)
    events = EventList()
    for _ in range(REPEATS):
        events.device(GVA + 8, READ).device(GVA + 8, READ | USER).device(GVA + 16, WRITE).device(GVA + 16, WRITE | USER)
    return tables.workload("kernel-only-page", "user code touches a device page that only the kernel may", root, events)


def memslot_update() -> Workload:
    """Memslots change under a cached translation, and device accesses come while an update is in progress."""
    tables = Tables()
    root = tables.page()
    tables.map(root, GVA, DEVICE_A)
    events = EventList()
    for turn in range(REPEATS):
        events.device(GVA + 8, READ).device(GVA + 8, READ)
        events.generation(turn | int(GENERATION_UPDATING)).device(GVA + 8, READ).generation(turn + 1)
    return tables.workload("memslot-update", "the host adds memslots between device accesses", root, events)


SMALL_WORKLOADS = (remap_invlpg, two_address_spaces, remap_no_invlpg, kernel_only_page, memslot_update)


def device_accesses(workload: Workload) -> int:
    """How many accesses to devices a stream has."""
    return int((workload.events["op"] == Op.DEVICE).sum())


def trace_workload(path: Path, records: int | None = None) -> Workload:
    """The stream of a replay file, named without the prefixes and suffixes that file names carry.

    Raises:
        TraceError: the file cannot be replayed.
    """
    workload = load_replay(path, records)
    name = re.sub(r"^((excerpt|replay)-)+|-long$", "", workload.name)
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", name)[:LONGEST_NAME] or "trace"
    if name in TAKEN | {make.__name__.replace("_", "-") for make in SMALL_WORKLOADS}:
        name = f"trace-{name}"
    if name.endswith(TAKEN_END):
        name = f"{name}-trace"
    return Workload(
        name=name,
        cpu=workload.cpu,
        slots=workload.slots,
        tables=workload.tables,
        events=workload.events,
        summary=workload.summary,
        source=workload.source,
    )
