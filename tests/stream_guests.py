"""Kinds of machines and the guests that random streams run on them: memslots, tables, entries."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastmmu.bits import PFERR
from fastmmu.kvm import Kvm
from fastmmu.machine_state import SlotFlag
from fastmmu.paging import Cpu, Mode
from fastmmu.reference.walk import NX, PS, A, D, Memory, P, Translation, U, W, Walker

WRITE, USER, FETCH = int(PFERR.W), int(PFERR.U), int(PFERR.F)
RSVD = int(PFERR.RSVD)
LOG, READONLY = int(SlotFlag.LOG_DIRTY_PAGES), int(SlotFlag.READONLY)
PAGE = 4096
MIB2 = 1 << 21
TABLES_SLOT, MAIN, SMALL, ROM, HUGE = range(5)  # ids of the memslots
RANGES = {
    TABLES_SLOT: (0, MIB2),
    MAIN: (0x20_0000, 0x60_0000),
    SMALL: (0x60_3000, 0x60_B000),
    ROM: (0x70_0000, 0x70_4000),
    HUGE: (0x4000_0000, 0x8000_0000),
}
CODE = 0x10_0000  # a page of the slot of tables that every address space maps, and no store remaps
OWN_DATA = [0x18_0000 + PAGE * i for i in range(4)]  # data beside the tables
MAIN_DATA = [0x20_0000 + PAGE * i for i in (0, 1, 2, 3, 7, 8, 100, 511, 512, 513, 514, 900, 1022, 1023)]
SMALL_DATA = [0x60_3000 + PAGE * i for i in range(8)]
ROM_DATA = [0x70_0000 + PAGE * i for i in range(4)]
HUGE_DATA = [0x4000_0000 + n for n in (0, PAGE, 5 * MIB2, 5 * MIB2 + 3 * PAGE, 511 * MIB2 + 511 * PAGE)]
NEAR_DEVICES = [0x60_0000, 0x60_2000, 0x60_B000, 0x70_4000, 0x80_0000, 0x80_1000]
DEVICES = [0x1000_0000 + MIB2 * i + PAGE * (i % 5) for i in range(90)]  # enough frames that shadow pages become scarce
HIGH_DEVICES = [0x1_2345_6000, 1 << 36, (1 << 36) + PAGE, (1 << 44) + 3 * PAGE]
RAM_DATA = OWN_DATA + MAIN_DATA + SMALL_DATA


@dataclass(frozen=True)
class Kind:
    """A kind of machine, and of guest on it."""

    kvm: Kvm
    levels: int = 4  # of the guest's paging; 0 for none
    also_off: bool = False  # the guest switches paging off and on
    huge: bool = False  # a memslot of 1 GiB, mapped so by the host
    keys: bool = False  # protection keys
    spread: bool = False  # devices in so many places that shadow pages become scarce, and memslots that seldom go
    maxphyaddr: int = 46
    vcpus: int = 2
    modes: tuple[Mode, ...] = ()  # of the guest's paging, under shadow paging
    pcids: bool = False

    @property
    def legacy(self) -> bool:
        return not self.kvm.tdp_mmu


def kinds() -> dict[str, Kind]:
    npt, legacy, shadow = {}, {"tdp_mmu": False}, {"tdp_mmu": False, "tdp": False}
    manual = {"manual_protect": True}
    initially = {**manual, "initially_set": True}
    wide = {"levels": 5, "maxphyaddr": 52}
    artefacts = {"tlb_flushed_on_exit": True, "accessed_while_walking": True, "reserved_without_present": True}
    four, five, pae, two = (
        {"modes": (Mode.LONG4,)},
        {"modes": (Mode.LONG5,)},
        {"modes": (Mode.PAE,)},
        {"modes": (Mode.TWO_LEVEL,)},
    )
    every = {"modes": (Mode.LONG4, Mode.PAE, Mode.TWO_LEVEL), "also_off": True}
    return {
        "npt": Kind(Kvm(**npt), vcpus=3),
        "npt-off-and-on": Kind(Kvm(manual_protect=True), also_off=True),
        "npt-paging-off": Kind(Kvm(eager_page_split=False), levels=0),
        "npt-5-level": Kind(Kvm(), **wide),
        "npt-1g": Kind(Kvm(tlb=(4, 2)), huge=True),
        "npt-pml-initially": Kind(Kvm(pml=True, **initially), vcpus=3),
        "npt-no-mmio-caching": Kind(Kvm(mmio_caching=False, tlb=(1, 1))),
        "npt-no-mmio-info": Kind(Kvm(mmio_info=False, generation=(1 << 19) - 60)),
        "npt-host-36": Kind(Kvm(host_maxphyaddr=36, nx_huge_pages=True)),
        "npt-artefacts": Kind(Kvm(**artefacts)),
        "ept": Kind(Kvm(ept=True, tlb=(4, 2)), also_off=True),
        "ept-no-ad": Kind(Kvm(ept=True, ad=False, **initially)),
        "ept-pml": Kind(Kvm(ept=True, pml=True), vcpus=3),
        "ept-pml-5-level-nx": Kind(Kvm(ept=True, pml=True, nx_huge_pages=True, eager_page_split=False, **manual), **wide),
        "legacy": Kind(Kvm(**legacy), vcpus=3),
        "legacy-1g": Kind(Kvm(**legacy, **initially), huge=True),
        "legacy-5-level-tlb": Kind(Kvm(**legacy, tlb=(1, 1)), **wide),
        "legacy-ept-pml": Kind(Kvm(**legacy, ept=True, pml=True), also_off=True),
        "legacy-ept-pml-initially": Kind(Kvm(**legacy, ept=True, pml=True, **initially)),
        "legacy-ept-no-ad-nx": Kind(Kvm(**legacy, ept=True, ad=False, nx_huge_pages=True, tlb=(4, 2), **manual)),
        "legacy-no-mmio": Kind(Kvm(**legacy, mmio_caching=False, mmio_info=False, generation=(1 << 19) - 60), levels=0),
        "legacy-spread": Kind(Kvm(**legacy, ept=True), levels=0, spread=True),
        "shadow": Kind(Kvm(**shadow), levels=0, vcpus=3),
        "shadow-spread": Kind(Kvm(**shadow), levels=0, spread=True),
        "shadow-initially-tlb": Kind(Kvm(**shadow, tlb=(4, 2), **initially), levels=0),
        "shadow-nx-no-mmio": Kind(Kvm(**shadow, nx_huge_pages=True, mmio_caching=False, mmio_info=False), levels=0),
        "shadow-4": Kind(Kvm(**shadow), **four, vcpus=3),
        "shadow-4-alone": Kind(Kvm(**shadow), **four, vcpus=1),
        "shadow-5": Kind(Kvm(**shadow), **five),
        "shadow-pae": Kind(Kvm(**shadow), **pae, vcpus=3),
        "shadow-2": Kind(Kvm(**shadow), **two, vcpus=3),
        "shadow-4-pcid": Kind(Kvm(**shadow), **four, pcids=True),
        "shadow-5-pcid-tlb": Kind(Kvm(**shadow, tlb=(4, 2)), **five, pcids=True),
        "shadow-4-off-and-on": Kind(Kvm(**shadow), **four, also_off=True),
        "shadow-4-1g": Kind(Kvm(**shadow), **four, huge=True),
        "shadow-pae-1g-nx": Kind(Kvm(**shadow, nx_huge_pages=True), **pae, huge=True),
        "shadow-4-nx": Kind(Kvm(**shadow, nx_huge_pages=True), **four),
        "shadow-4-no-mmio": Kind(Kvm(**shadow, mmio_caching=False, mmio_info=False), **four),
        "shadow-2-no-mmio-info": Kind(Kvm(**shadow, mmio_info=False, generation=(1 << 19) - 60), **two),
        "shadow-4-spread": Kind(Kvm(**shadow), **four, spread=True, vcpus=4),
        "shadow-4-tlb": Kind(Kvm(**shadow, tlb=(1, 1)), **four),
        "shadow-4-initially": Kind(Kvm(**shadow, **initially), **four),
        "shadow-modes": Kind(Kvm(**shadow), **every, vcpus=3),
        "shadow-modes-5": Kind(Kvm(**shadow, tlb=(4, 2)), modes=(Mode.LONG5, Mode.LONG4, Mode.PAE), also_off=True),
    }


KINDS = kinds()
KEYS = Kind(Kvm(), keys=True)


# --- the guest's tables ----------------------------------------------------------------------------------------------------


class TableMemory(Memory):
    """The guest's tables: what was stored there; bits that walks set are told, not written."""

    def __init__(self, words: dict[int, int]) -> None:
        super().__init__([(*RANGES[TABLES_SLOT], "ram")], words)
        self.set_bits: list[tuple[int, int]] = []
        self.seen: list[int] = []

    def read(self, gpa: int, size: int) -> int:
        self.seen.append(gpa)
        return self.words.get(gpa, 0)

    def write(self, gpa: int, size: int, value: int) -> None:
        self.set_bits.append((gpa, value & ~self.words.get(gpa, 0)))

    def walk(self, cpu: Cpu, cr3: int, gva: int, access: int) -> Translation:
        """A walk, with what it read and set in `seen` and `set_bits`."""
        self.set_bits, self.seen = [], []
        return Walker(self, cpu).walk(cr3, gva, access)


@dataclass
class Guest:
    """The tables at the start, where entries may be stored, and addresses worth an access."""

    words: dict[int, int] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)
    entries: dict[int, list[int]] = field(default_factory=dict)  # by level, gpas
    tables: dict[int, list[int]] = field(default_factory=dict)  # by level, that entries of the level above may point to
    fixed: list[int] = field(default_factory=list)  # entries over the page of code, which every exit may walk; never stored to
    pages: list[int] = field(default_factory=list)
    code: int = 0


def gva_of(*indices: int) -> int:
    """Canonical address of a page from its indices, PML5 first."""
    gva = 0
    for index in indices:
        gva = gva << 9 | index
    gva <<= 12
    return gva | ~0 << 57 & 2**64 - 1 if indices[0] >= 256 else gva


class Builder:
    """Builds the tables in the first MiB of memory."""

    def __init__(self, rng: np.random.Generator, kind: Kind) -> None:
        self.rng, self.kind, self.guest, self.next = rng, kind, Guest(), PAGE

    def table(self, level: int, open_to_stores: bool = True) -> int:
        gpa, self.next = self.next, self.next + PAGE
        if open_to_stores:
            self.guest.tables.setdefault(level, []).append(gpa)
        return gpa

    def put(self, table: int, index: int, level: int, value: int, open_to_stores: bool = True) -> None:
        self.guest.words[table + 8 * index] = value
        if open_to_stores:
            self.guest.entries.setdefault(level, []).append(table + 8 * index)
        else:
            self.guest.fixed.append(table + 8 * index)

    def region(self) -> int:
        """A page-directory-pointer table with all below it."""
        top, directory = self.table(3), self.table(2)
        self.put(top, 0, 3, directory | P | W | U)
        self.put(top, 1, 3, leaf(self.rng, self.kind, 3) if self.rng.random() < 0.7 else 0)
        for i in range(2):
            table = self.table(1)
            self.put(directory, i, 2, table | P | W | U)
            for index in (0, 1, 2, 3, 4, 511):
                self.put(table, index, 1, leaf(self.rng, self.kind, 1))
        for i in (2, 3):
            self.put(directory, i, 2, leaf(self.rng, self.kind, 2))
        self.put(directory, 4, 2, 0)
        return top

    def build(self) -> Guest:
        guest, levels = self.guest, max(self.kind.levels, 4)
        shared = self.region()
        chain = [self.table(level, False) for level in (3, 2, 1)]
        self.put(chain[0], 0, 3, chain[1] | P | W, False)
        self.put(chain[1], 0, 2, chain[2] | P | W, False)
        self.put(chain[2], 0, 1, CODE | P | W, False)
        upper, code = 496, 300
        for _ in range(3):
            low, high = self.table(4), self.table(4)
            if levels == 4:
                high = low
            self.put(low, 0, 4, self.region() | P | W | U)
            self.put(high, upper, 4, shared | P | W | U)
            self.put(high, code, 4, chain[0] | P | W, False)
            root = low
            if levels == 5:
                root = self.table(5, False)
                self.put(root, 0, 5, low | P | W | U)
                self.put(root, 511, 5, high | P | W, False)
                self.put(root, 5, 5, low | P | W | U)
            guest.roots.append(root)
        guest.code = gva_of(511, code, 0, 0, 0)
        for top in [(0, 0), (511, upper)] + [(5, 0)] * (levels == 5):
            guest.pages += [gva_of(*top, 0, i, index) for i in (0, 1) for index in (0, 1, 2, 3, 4, 511)]
            guest.pages += [gva_of(*top, 0, i, index) for i in (2, 3) for index in (0, 1, 3, 511)]
            guest.pages += [gva_of(*top, 0, 4, 7), gva_of(*top, 1, 0, 0), gva_of(*top, 1, 5, 3)]
        assert self.next <= CODE
        return guest


def chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def one_of(rng: np.random.Generator, values: list[int]) -> int:
    return values[int(rng.integers(len(values)))]


def data_frame(rng: np.random.Generator, kind: Kind, *, high: bool = True) -> int:
    """A frame that a page may map: mostly memory, else devices near and far."""
    lists = [OWN_DATA, MAIN_DATA, MAIN_DATA, MAIN_DATA, SMALL_DATA, SMALL_DATA, ROM_DATA, NEAR_DEVICES, DEVICES]
    if kind.huge:
        lists += [HUGE_DATA] * 3
    if kind.spread:
        lists += [DEVICES] * 12
    if high and kind.levels:
        lists.append(HIGH_DEVICES)
    return one_of(rng, lists[int(rng.integers(len(lists)))])


def rights(rng: np.random.Generator, kind: Kind, *, is_leaf: bool) -> int:
    """Bits of an entry beside the address."""
    likely = (
        {P: 0.95, W: 0.75, U: 0.7, A: 0.6, D: 0.5, NX: 0.15} if is_leaf else {P: 0.97, W: 0.9, U: 0.9, A: 0.6, D: 0.3, NX: 0.05}
    )
    bits = sum(bit for bit, probability in likely.items() if chance(rng, probability))
    if chance(rng, 0.02):
        bits |= 1 << 51 if kind.maxphyaddr < 52 else 0
    if kind.keys and is_leaf:
        bits |= int(rng.integers(4)) << 59
    return bits


def leaf(rng: np.random.Generator, kind: Kind, level: int) -> int:
    """A random leaf entry."""
    bits = rights(rng, kind, is_leaf=True)
    if level == 1:
        return bits | data_frame(rng, kind)
    if level == 2:
        frame = one_of(rng, [MAIN_DATA[0], MAIN_DATA[0] + MIB2, 0x60_0000, 0x80_0000, 0x1000_0000])
        if kind.huge and chance(rng, 0.4):
            frame = one_of(rng, [0x4000_0000, 0x4000_0000 + 5 * MIB2])
        if chance(rng, 0.03):
            frame |= 1 << 13  # reserved
        return bits | PS | frame
    return bits | PS | 0x4000_0000


def entry(rng: np.random.Generator, kind: Kind, guest: Guest, level: int) -> int:
    """What a store puts into an entry of a table of `level`."""
    if chance(rng, 0.08):
        return 0
    if level == 1 or (level <= 3 and chance(rng, 0.45)):
        return leaf(rng, kind, level)
    value = one_of(rng, guest.tables[level - 1]) | rights(rng, kind, is_leaf=False)
    return value | (PS if level >= 4 and chance(rng, 0.05) else 0)
