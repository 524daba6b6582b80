"""Random valid event streams for a `Machine`, and a judge that follows them in plain Python.

`plan` makes a stream from a seed. `Judge` keeps its own copy of the guest's tables, of the data written and of the memslots, walks
with the reference walker, and says for each event which log rows are possible: what the tables give as they are now, or, for an
answer that succeeds, as they were at a moment since the last flush of that vCPU that covers the page, if the vCPU was there then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from fastmmu._jit import JIT
from fastmmu.audit import audit
from fastmmu.audit_state import AuditError
from fastmmu.bits import CR0, CR4, EFER, PFERR, RFLAGS
from fastmmu.events import EVENT, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine, MachineError
from fastmmu.machine_state import LogKind, SlotFlag, VmWord
from fastmmu.paging import Cpu
from fastmmu.reference.walk import ADDR, NX, PS, A, D, Memory, P, Translation, U, W, Walker

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

    @property
    def legacy(self) -> bool:
        return not self.kvm.tdp_mmu


def kinds() -> dict[str, Kind]:
    npt, legacy, shadow = {}, {"tdp_mmu": False}, {"tdp_mmu": False, "tdp": False}
    manual = {"manual_protect": True}
    initially = {**manual, "initially_set": True}
    wide = {"levels": 5, "maxphyaddr": 52}
    artefacts = {"tlb_flushed_on_exit": True, "accessed_while_walking": True, "reserved_without_present": True}
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


# --- the stream ------------------------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """A memslot as generator and judge follow it."""

    identity: int
    start: int
    end: int
    flags: int


@dataclass
class Plan:
    """A stream and what it refers to."""

    name: str
    kind: Kind
    seed: int
    guest: Guest
    cpus: list[Cpu]
    prepared: list[dict[str, int]]
    events: np.ndarray

    def machine(self) -> Machine:
        """A machine with the guest's tables and data in memory, before the first event."""
        machine = Machine(self.kind.kvm, self.cpus[0], memory=1 << 32, vcpus=self.kind.vcpus, tables=1 << 13)
        for number, cpu in enumerate(self.cpus):
            assert machine.registers(cpu) == number
        for arguments in self.prepared:
            machine.prepare_slot(**arguments)
        for gpa, value in self.guest.words.items():
            machine.memory.words[gpa >> 3] = value
        for frame, data in self.data().items():
            machine.memory.words[frame >> 3 : (frame + PAGE) >> 3] = np.frombuffer(data, np.uint64)
        machine.configure(log_accesses=True)
        return machine

    def data(self) -> dict[int, bytearray]:
        """What memory holds at the start, by frame."""
        rng = np.random.default_rng([self.seed, 7])
        return {frame: bytearray(rng.bytes(PAGE)) for frame in RAM_DATA + ROM_DATA + HUGE_DATA}


def registers(rng: np.random.Generator, kind: Kind, roots: list[int]) -> list[Cpu]:
    """Register settings: WP, SMEP, SMAP, AC, NX; paging off where the kind has it."""
    paging = kind.levels > 0
    rows = []
    for number in range(8):
        off = not paging or (kind.also_off and number in (3, 6))
        plain = number == 0
        cr4 = int(CR4.PAE) | (int(CR4.LA57) if kind.levels == 5 else 0)
        cr4 |= sum(int(flag) for flag in (CR4.SMEP, CR4.SMAP) if not plain and chance(rng, 0.4))
        cr4 |= int(CR4.PKE) if kind.keys else 0
        rows.append(
            Cpu(
                cr0=int(CR0.PE) | (0 if off else int(CR0.PG)) | (int(CR0.WP) if plain or chance(rng, 0.6) else 0),
                cr3=one_of(rng, roots),
                cr4=cr4,
                efer=(int(EFER.LME | EFER.LMA) if paging else 0) | (int(EFER.NX) if plain or chance(rng, 0.8) else 0),
                rflags=int(RFLAGS.AC) if chance(rng, 0.3) else 0,
                pkru=int(rng.integers(256)) if kind.keys else 0,
                maxphyaddr=kind.maxphyaddr,
            )
        )
    return list(dict.fromkeys(rows))


class Generator:
    """Makes events one after another; knows the tables and memslots that they lead to."""

    def __init__(self, name: str, kind: Kind, seed: int) -> None:
        self.name, self.kind, self.seed = name, kind, seed
        self.rng = np.random.default_rng([seed, crc32(name.encode())])
        self.guest = Builder(self.rng, kind).build()
        self.tables = TableMemory(dict(self.guest.words))
        self.cpus = registers(self.rng, kind, self.guest.roots)
        self.prepared = self.prepare()
        self.rows: list[tuple[int, int, int, int, int, int, int]] = []
        self.slots: dict[int, Slot] = {}
        self.vcpu, self.of = 0, [[0, self.cpus[0].cr3] for _ in range(kind.vcpus)]
        self.recent: list[int] = []

    def prepare(self) -> list[dict[str, int]]:
        """Two forms of most memslots: what the host maps, where, logging from the start."""
        rows = []
        for identity, (start, end) in RANGES.items():
            if identity == HUGE and not self.kind.huge:
                continue
            base = {"slot": identity, "gpa": start, "size": end - start, "flags": READONLY if identity == ROM else 0}
            level = {MAIN: 2, HUGE: 3, TABLES_SLOT: 2}.get(identity, 1)
            rows.append({**base, "host_level": level})
            if identity != TABLES_SLOT:
                changed = {"flags": base["flags"] | LOG} if chance(self.rng, 0.5) else {"hva_offset": 0x1000}
                rows.append({**base, "host_level": level, **changed})
        return rows

    def add(self, op: Op, access: int = 0, address: int = 0, value: int = 0, size: int = 0) -> None:
        self.rows.append((op, access, 0, size, len(self.rows), address, value))

    def plan(self, count: int) -> Plan:
        for row in [i for i, one in enumerate(self.prepared) if i == 0 or one["slot"] != self.prepared[i - 1]["slot"]]:
            self.create(row)
        names = list(WEIGHTS)
        weights = np.cumsum([WEIGHTS[name] for name in names])
        while len(self.rows) < count:
            getattr(self, names[int(np.searchsorted(weights, self.rng.random() * weights[-1]))])()
        events = np.array(self.rows, EVENT)
        return Plan(self.name, self.kind, self.seed, self.guest, self.cpus, self.prepared, events)

    # --- the guest

    def address(self, size: int = 1) -> int:
        """A gva; for data, often over the end of a page."""
        rng = self.rng
        row = self.of[self.vcpu][0]
        pages = self.guest.pages
        if not self.cpus[row].cr0 & int(CR0.PG):
            page = data_frame(rng, self.kind, high=False)
        elif self.recent and chance(rng, 0.7):
            page = one_of(rng, self.recent)
        else:
            page = one_of(rng, pages)
            self.recent = [page, *self.recent[:2]]
        if size > 1 and chance(rng, 0.35):
            return page + PAGE - int(rng.integers(1, size))
        return page + int(rng.integers(PAGE - size + 1))

    def access(self) -> None:
        access = int(self.rng.choice([0, WRITE, USER, USER | WRITE]))
        self.add(Op.ACCESS if chance(self.rng, 0.8) else Op.DEVICE, access, self.address())

    def fetch(self) -> None:
        """Not from a device: there KVM gives up. Behind it a fetch from the page of code, which instructions are fetched from again."""
        gva, access = self.address(), FETCH | (USER if chance(self.rng, 0.5) else 0)
        row, cr3 = self.of[self.vcpu]
        walk = self.tables.walk(self.cpus[row], cr3, gva, access)
        if not walk.ok or slot_of(self.slots, walk.gpa):
            self.add(Op.ACCESS, access, gva)
        self.add(Op.ACCESS, FETCH, self.guest.code if self.cpus[row].cr0 & int(CR0.PG) else CODE)

    def load(self) -> None:
        size = int(self.rng.choice([1, 2, 3, 4, 8, 8]))
        self.add(Op.LOAD, USER if chance(self.rng, 0.5) else 0, self.address(size), size=size)

    def write(self) -> None:
        size = int(self.rng.choice([1, 2, 4, 7, 8, 8]))
        self.add(
            Op.WRITE, WRITE | (USER if chance(self.rng, 0.5) else 0), self.address(size), int(self.rng.integers(1 << 63)), size
        )

    def exchange(self) -> None:
        size = int(self.rng.choice([1, 4, 8]))
        self.add(
            Op.EXCHANGE, WRITE | (USER if chance(self.rng, 0.5) else 0), self.address(size), int(self.rng.integers(1 << 63)), size
        )
        self.add(Op.OPERAND, value=0)

    def store(self) -> None:
        rng = self.rng
        if chance(rng, 0.04) or not self.kind.levels:  # to data, read-only memory or a device
            self.add(
                Op.STORE,
                address=data_frame(rng, self.kind, high=False) + 8 * int(rng.integers(512)),
                value=int(rng.integers(1 << 63)),
            )
            return
        level = int(rng.choice([1, 1, 1, 1, 1, 1, 2, 2, 3, 4 if chance(rng, 0.4) else 1]))
        gpa = one_of(rng, self.guest.entries[level])
        again = self.recent and chance(rng, 0.6)
        if again:  # an entry that a page in use goes through
            _, cr3 = self.of[self.vcpu]
            self.tables.walk(self.cpus[0], cr3, self.recent[0], 0)
            depth = len(self.tables.seen) - (1 if chance(rng, 0.75) else int(rng.integers(1, len(self.tables.seen) + 1)))
            found, height = self.tables.seen[depth], max(self.kind.levels, 4) - depth
            gpa, level = (found, height) if found in self.guest.entries.get(height, []) else (gpa, level)
        old = self.tables.words.get(gpa, 0)
        value = entry(rng, self.kind, self.guest, level)
        if old & P and chance(rng, 0.35):  # the same address with other rights
            value = old & (ADDR | PS) | rights(rng, self.kind, is_leaf=level == 1 or bool(old & PS))
        elif chance(rng, 0.3):
            value = self.guest.words.get(gpa, 0)
        self.tables.words[gpa] = value
        self.add(Op.STORE, address=gpa, value=value)
        if chance(rng, 0.1):
            self.invlpg()
        if again:
            page = self.recent[0]
            if chance(rng, 0.35):  # of the page itself, or of another one near it, which matters for large pages alone
                self.add(Op.INVLPG, address=page if chance(rng, 0.6) else page ^ PAGE)
            self.recent = [page]
            for _ in range(int(rng.integers(3))):
                getattr(self, str(rng.choice(["access", "access", "load", "write", "fetch"])))()

    def invlpg(self) -> None:
        self.add(Op.INVLPG, address=self.address())

    def cr3(self) -> None:
        self.of[self.vcpu][1] = one_of(self.rng, self.guest.roots)
        self.add(Op.CR3, value=self.of[self.vcpu][1])

    def flush(self) -> None:
        self.add(Op.FLUSH)

    def set_registers(self, op: Op) -> None:
        row = int(self.rng.integers(len(self.cpus)))
        self.of[self.vcpu] = [row, self.of[self.vcpu][1] if op == Op.REGISTERS else self.cpus[row].cr3]
        self.recent = []
        self.add(op, value=row)

    def registers(self) -> None:
        self.set_registers(Op.REGISTERS)

    def mode(self) -> None:
        self.set_registers(Op.MODE)

    def other_vcpu(self) -> None:
        self.vcpu = int(self.rng.integers(self.kind.vcpus))
        self.add(Op.VCPU, value=self.vcpu)

    def leave(self) -> None:
        self.add(Op.EXIT)

    # --- the host

    def create(self, row: int) -> None:
        one = self.prepared[row]
        self.slots[one["slot"]] = Slot(one["slot"], one["gpa"], one["gpa"] + one["size"], one["flags"])
        self.add(Op.SLOT_CREATE, value=row)

    def slot(self) -> None:
        """Delete a memslot, or create one that is missing."""
        rng = self.rng
        if self.kind.spread and chance(rng, 0.85):
            return
        missing = [i for i, one in enumerate(self.prepared) if one["slot"] not in self.slots]
        if missing and chance(rng, 0.8):
            self.create(one_of(rng, missing))
            return
        identity = one_of(rng, sorted(self.slots.keys() - {TABLES_SLOT}) or [TABLES_SLOT])
        if identity != TABLES_SLOT:
            del self.slots[identity]
            self.add(Op.SLOT_DELETE, address=identity)

    def flags(self) -> None:
        slot = self.slots[one_of(self.rng, sorted(self.slots))]
        slot.flags ^= 0 if chance(self.rng, 0.05) else LOG
        self.add(Op.SLOT_FLAGS, address=slot.identity, value=slot.flags)

    def dirty(self, op: Op) -> None:
        logging = [identity for identity, slot in self.slots.items() if slot.flags & LOG]
        if logging:
            self.add(op, address=one_of(self.rng, logging))

    def dirty_get(self) -> None:
        self.dirty(Op.DIRTY_GET)

    def dirty_clear(self) -> None:
        if self.kind.kvm.manual_protect:
            self.dirty(Op.DIRTY_CLEAR)

    def unmap(self) -> None:
        start = data_frame(self.rng, self.kind, high=False) if chance(self.rng, 0.8) else 0
        pages = int(self.rng.choice([1, 1, 3, 512, 700]))
        self.add(Op.UNMAP, address=start, value=start + PAGE * pages)

    def page_limit(self) -> None:
        self.add(Op.PAGE_LIMIT, value=int(self.rng.choice([64, 64, 70, 200])))

    def parameter(self) -> None:
        which = VmWord.NX_HUGE_PAGES if chance(self.rng, 0.6) else VmWord.EAGER_PAGE_SPLIT
        self.add(Op.PARAMETER, address=which, value=int(self.rng.integers(2)))


WEIGHTS = {
    "access": 40, "fetch": 6, "load": 13, "write": 14, "exchange": 4, "store": 10, "invlpg": 2.5, "cr3": 1.5, "flush": 0.7,
    "registers": 1, "mode": 0.7, "other_vcpu": 3, "leave": 0.7, "slot": 0.7, "flags": 1.2, "dirty_get": 1.7, "dirty_clear": 1,
    "unmap": 0.7, "page_limit": 0.3, "parameter": 0.4,
}  # fmt: skip


def slot_of(slots: dict[int, Slot], gpa: int) -> Slot | None:
    """The memslot that holds a gpa."""
    for slot in slots.values():
        if slot.start <= gpa < slot.end:
            return slot
    return None


# --- the judge -------------------------------------------------------------------------------------------------------------

Row = tuple[int, int, int, int, int]  # kind, size, address, value, mask of the value's bits that are known
Page = tuple[Translation, bool]  # how a page is translated, and whether by the tables as they are now
ALL = 2**64 - 1


@dataclass
class Possible:
    """What an access may come to: its log, and the bytes that it writes."""

    log: list[Row]
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # gpa, size, value; to memory
    faults: bool = False

    def fits(self, found: list[tuple[int, int, int, int]]) -> bool:
        return agree(self.log, found)


def agree(expected: list[Row], found: list[tuple[int, int, int, int]]) -> bool:
    """Whether log rows are those expected."""
    return len(found) == len(expected) and all(
        (kind, size, address) == seen[:3] and value & mask == seen[3] & mask
        for (kind, size, address, value, mask), seen in zip(expected, found, strict=True)
    )


@dataclass
class Vcpu:
    """What the judge knows of a vCPU."""

    cpu: Cpu
    cr3: int
    flushed: int = -1  # event
    invalidated: list[tuple[int, int]] = field(default_factory=list)  # event, gva
    reached: dict[int, list[int]] = field(default_factory=dict)  # by page, the events that accessed it since the last flush
    cached: set[int] = field(default_factory=set)  # pages that its TLB may hold


class Wrong(AssertionError):
    """The machine did what it must not."""


class Judge:
    """Follows a plan event by event."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.kvm = plan, plan.kind.kvm
        self.tables = TableMemory(dict(plan.guest.words))
        self.may = dict.fromkeys(plan.guest.fixed, A)  # A and D that walks may have set since the entry was stored,
        self.must: dict[int, int] = {}  # and those that they have
        self.journal: list[tuple[int, int, int]] = []  # event, gpa, the entry before it
        self.slots: dict[int, Slot] = {}
        self.written: dict[int, set[int]] = {}  # by memslot that logs, pages
        self.data = plan.data()
        self.known: dict[int, bytearray] = {}
        self.vcpus = [Vcpu(plan.cpus[0], plan.cpus[0].cr3) for _ in range(plan.kind.vcpus)]
        self.vcpu = self.vcpus[0]
        self.supply: list[int] = []
        self.cleared: list[int] = []  # pages that the next DIRTY_CLEAR names
        self.totals: Counter[str] = Counter()

    # --- memory

    def frame(self, gpa: int) -> tuple[bytearray, bytearray]:
        frame = gpa & ~(PAGE - 1)
        return self.data.setdefault(frame, bytearray(PAGE)), self.known.setdefault(frame, bytearray(b"\xff" * PAGE))

    def read(self, gpa: int, size: int) -> tuple[int, int]:
        """(value, mask of what is known)."""
        data, known = self.frame(gpa)
        at = gpa % PAGE
        return int.from_bytes(data[at : at + size], "little"), int.from_bytes(known[at : at + size], "little")

    def write(self, gpa: int, size: int, value: int) -> None:
        data, known = self.frame(gpa)
        at = gpa % PAGE
        data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        known[at : at + size] = b"\xff" * size
        self.note(gpa)

    def forget(self, gpa: int, size: int) -> None:
        known = self.frame(gpa)[1]
        known[gpa % PAGE : gpa % PAGE + size] = bytes(size)

    def note(self, gpa: int) -> None:
        """A page was written for certain: the dirty log must hold it."""
        slot = slot_of(self.slots, gpa)
        if slot and slot.identity in self.written:
            self.written[slot.identity].add((gpa - slot.start) // PAGE)

    def is_device(self, gpa: int, write: bool) -> bool:
        slot = slot_of(self.slots, gpa)
        return slot is None or (write and bool(slot.flags & READONLY))

    # --- translation

    def now(self, gva: int, access: int, *, hardware: bool = True) -> Translation:
        """By the tables as they are; by the processor, or by KVM's emulator."""
        walk = self.tables.walk(self.vcpu.cpu, self.vcpu.cr3, gva, access)
        if not walk.ok and hardware and walk.pferr & RSVD and self.kvm.reserved_without_present:
            return Translation(False, pferr=walk.pferr & ~1)
        return walk

    def before(self, gva: int, access: int) -> Iterator[Translation]:
        """Successful answers, in memory, that the vCPU's TLB may still hold."""
        vcpu, page = self.vcpu, gva >> 12
        reached = vcpu.reached.get(page)
        if not reached or page not in vcpu.cached:
            return
        then = TableMemory(dict(self.tables.words))
        end = len(self.journal)
        while end and self.journal[end - 1][0] > vcpu.flushed:
            until, gpa, old = self.journal[end - 1]
            end -= 1
            then.words[gpa] = old
            start = self.journal[end - 1][0] if end else -1
            walk = then.walk(vcpu.cpu, vcpu.cr3, gva, access)
            if not walk.ok or self.is_device(walk.gpa, bool(access & WRITE)):
                continue
            shift = 12 + 9 * (walk.level - 1)
            since = max([start, vcpu.flushed, *(at for at, one in vcpu.invalidated if one >> shift == gva >> shift)])
            here = bisect_left(reached, since)
            if here < len(reached) and reached[here] < until:
                yield walk

    # --- what an access may come to

    def possible(self, op: int, gva: int, access: int, size: int, value: int, compared: int, *, stale: bool) -> Iterator[Possible]:
        """All outcomes; by today's tables alone first."""
        part = min(size, PAGE - gva % PAGE)
        pages = [(gva, part)] + ([(gva + part, size - part)] if part < size else [])
        choices: list[list[Page]] = []
        for address, _ in pages:
            choices.append([(self.now(address, access), True)])
            if stale:
                choices[-1] += [(walk, False) for walk in self.before(address, access)]
        for first in choices[0]:
            for second in choices[1] if len(choices) > 1 else [first]:
                yield self.outcome(op, pages, [first, second][: len(pages)], access, value, compared)

    def outcome(self, op: int, pages: list[tuple[int, int]], walks: list[Page], access: int, value: int, compared: int) -> Possible:
        """What follows from these translations of the pages by the processor."""
        write = bool(access & WRITE)
        emulated = False
        for (address, _), (walk, _) in zip(pages, walks, strict=True):
            if not walk.ok:
                return fault_at(address, walk.pferr)
            if self.is_device(walk.gpa, write):
                emulated = True
                break
        parts = [(walk.gpa, size) for (walk, _), (_, size) in zip(walks, pages, strict=True)]
        if emulated:  # the page that faulted is known, the other one is walked by the emulator
            parts = []
            for (address, size), (walk, _) in zip(pages, walks, strict=True):
                if not (walk.ok and self.is_device(walk.gpa, write)) or (parts and self.is_device(parts[0][0], write)):
                    walk = self.now(address, access, hardware=False)
                if not walk.ok:
                    done = fault_at(address, walk.pferr)
                    if op == Op.EXCHANGE:
                        done.log[:0] = self.read_before(pages, walks, address, access)
                    return done
                parts.append((walk.gpa, size))
        return self.data_of(op, pages[0][0], parts, value, compared, emulated)

    def read_before(self, pages: list[tuple[int, int]], walks: list[Page], address: int, access: int) -> list[Row]:
        """What devices see of an emulated exchange that faults at the page of `address` when it writes: that it was read."""
        seen = self.now(address, access & ~WRITE, hardware=False)
        if not seen.ok:
            return []
        gpas = [seen.gpa if page == address else walk.gpa for (page, _), (walk, _) in zip(pages, walks, strict=True)]
        return [
            (LogKind.MMIO_READ, size, gpa, 0, 0) for gpa, (_, size) in zip(gpas, pages, strict=True) if self.is_device(gpa, False)
        ]

    def data_of(self, op: int, gva: int, parts: list[tuple[int, int]], value: int, compared: int, emulated: bool) -> Possible:
        """Log and effects of an access that succeeds."""
        done, (gpa, total) = Possible([]), (parts[0][0], sum(size for _, size in parts))
        loaded: list[Row] = []
        reads = op in (Op.LOAD, Op.EXCHANGE) or (op in (Op.ACCESS, Op.DEVICE) and emulated)
        supply = list(self.supply)
        if op in (Op.ACCESS, Op.DEVICE):
            reads, value = reads and not self.access & WRITE, 0
        if reads:
            seen = mask = shift = 0
            for at, size in parts:
                if emulated and self.is_device(at, False):
                    data = (supply.pop(0) if supply else 0) & (1 << 8 * size) - 1
                    done.log.append((LogKind.MMIO_READ, size, at, data, ALL))
                    known = (1 << 8 * size) - 1
                else:
                    data, known = self.read(at, size)
                seen, mask, shift = seen | data << shift, mask | known << shift, shift + 8 * size
            loaded = [(LogKind.LOADED, total, gva, seen, mask)] * (op in (Op.LOAD, Op.EXCHANGE))
            if loaded:
                if op == Op.EXCHANGE:
                    if mask != (1 << 8 * total) - 1:
                        done.writes = [(at, size, -1) for at, size in parts]  # unknown
                    value = value if seen == compared else seen
        if self.access & WRITE:
            unknown, shift = bool(done.writes), 0
            done.writes = []
            for at, size in parts:
                data = value >> shift & (1 << 8 * size) - 1
                shift += 8 * size
                if self.is_device(at, True):
                    done.log.append((LogKind.MMIO_WRITE, size, at, data, 0 if unknown else ALL))
                elif op in (Op.WRITE, Op.EXCHANGE):
                    done.writes.append((at, size, -1 if unknown else data))
                else:
                    done.writes.append((at, 0, 0))  # written, nobody says what: the model leaves memory alone
        done.log += [*loaded, (LogKind.ACCESSED, 0, gva, gpa, ALL)]
        return done

    # --- events

    def event(self, at: int, row: np.void, compared: int, found: list[tuple[int, int, int, int]]) -> None:
        """Judge one event by its log rows."""
        op, address, value = int(row["op"]), int(row["address"]), int(row["value"])
        self.totals[Op(op).name] += 1
        if op in (Op.ACCESS, Op.DEVICE, Op.LOAD, Op.WRITE, Op.EXCHANGE):
            self.judge_access(at, op, address, int(row["access"]), max(1, int(row["size"])), value, compared, found)
            return
        if found:
            raise Wrong(f"expected no log rows, found {text(found)}")
        vcpu = self.vcpu
        if op == Op.STORE:
            self.store(at, address, value)
        elif op == Op.CR3:
            vcpu.cr3 = value
            self.flushed(at)
        elif op == Op.FLUSH:
            self.flushed(at)
        elif op == Op.INVLPG:
            vcpu.invalidated.append((at, address))
            vcpu.cached.discard(address >> 12)
        elif op in (Op.MODE, Op.REGISTERS):
            cpu = self.plan.cpus[value]
            cr3 = vcpu.cr3 if op == Op.REGISTERS else cpu.cr3
            same = (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer) == (vcpu.cpu.cr0, vcpu.cr3, vcpu.cpu.cr4, vcpu.cpu.efer)
            vcpu.cpu, vcpu.cr3 = cpu, cr3
            if op == Op.REGISTERS or not same:
                self.flushed(at)
        elif op == Op.VCPU:
            self.vcpu = self.vcpus[value]
        elif op == Op.SLOT_CREATE:
            one = self.plan.prepared[value]
            self.slots[one["slot"]] = Slot(one["slot"], one["gpa"], one["gpa"] + one["size"], one["flags"])
            if one["flags"] & LOG:
                self.written[one["slot"]] = set()
        elif op == Op.SLOT_DELETE:
            slot = self.slots.pop(address)
            self.written.pop(address, None)
            for frame in list(self.data):
                if slot.start <= frame < slot.end:
                    self.known[frame] = bytearray(PAGE)
        elif op == Op.DIRTY_CLEAR:
            self.written[address].difference_update(self.cleared)
        elif op == Op.SLOT_FLAGS:
            if value & LOG and address not in self.written:
                self.written[address] = set()
            elif not value & LOG:
                self.written.pop(address, None)
            self.slots[address].flags = value

    def flushed(self, at: int) -> None:
        vcpu = self.vcpu
        vcpu.flushed = at
        vcpu.invalidated, vcpu.reached, vcpu.cached = [], {}, set()

    def store(self, at: int, gpa: int, value: int) -> None:
        if self.is_device(gpa, True):
            return
        self.note(gpa)
        if gpa < CODE:
            self.journal.append((at, gpa, self.tables.words.get(gpa, 0)))
            self.tables.words[gpa] = value
            self.may.pop(gpa, None)
            self.must.pop(gpa, None)
        else:
            self.write(gpa, 8, value)

    def judge_access(
        self, at: int, op: int, gva: int, access: int, size: int, value: int, compared: int, found: list[tuple[int, int, int, int]]
    ) -> None:
        self.access = access
        arguments = (op, gva, access, size, value, compared)
        crossing = gva % PAGE + size > PAGE
        changed = bool(self.journal) and self.journal[-1][0] > self.vcpu.flushed
        options = list(self.possible(*arguments, stale=False))
        expected = options[0]
        fitting = [one for one in options if one.fits(found)]
        if (not fitting or (crossing and access & WRITE)) and changed:
            options = list(self.possible(*arguments, stale=True))
            if not fitting:
                self.totals["answered from the TLB, tables changed"] += 1
            fitting = [one for one in options if one.fits(found)]
        if not fitting:
            raise Wrong(
                f"expected {text(expected.log)}{f' or {len(options) - 1} older' if len(options) > 1 else ''}, found {text(found)}"
            )
        done = fitting[0]
        self.totals["faults"] += done.faults
        self.totals["device accesses"] += sum(kind in (LogKind.MMIO_READ, LogKind.MMIO_WRITE) for kind, *_ in found)
        self.totals["over a page boundary"] += crossing
        reads = sum(kind == LogKind.MMIO_READ for kind, *_ in found)
        del self.supply[:reads]
        self.note_walks(at, gva, access, size, done, exchange=op == Op.EXCHANGE)
        if all(one.writes == done.writes for one in fitting):
            for gpa, length, data in done.writes:
                if length == 0:
                    self.note(gpa)
                elif data < 0:
                    self.forget(gpa, length)
                    self.note(gpa)
                else:
                    self.write(gpa, length, data)
        else:
            self.totals["second page uncertain"] += 1
            for one in fitting:
                for gpa, length, _ in one.writes:
                    self.forget(gpa, length)

    def note_walks(self, at: int, gva: int, access: int, size: int, done: Possible, *, exchange: bool) -> None:
        """A and D that the access may have set, or has; and what its TLB may hold from now on."""
        vcpu = self.vcpu
        addresses = [gva]
        if gva % PAGE + size > PAGE:
            addresses.append((gva | PAGE - 1) + 1)
        for address in addresses:
            if exchange and len(addresses) > 1:  # an exchange that is emulated reads first, and may be refused only then
                self.now(address, access & ~WRITE)
                for gpa, bits in self.tables.set_bits:
                    self.may[gpa] = self.may.get(gpa, 0) | bits
            walk, page = self.now(address, access), address >> 12
            for gpa, bits in self.tables.set_bits if walk.ok else []:
                if page not in vcpu.cached:
                    if bits & ~self.may.get(gpa, 0):
                        self.note(gpa)
                    self.must[gpa] = self.must.get(gpa, 0) | bits
                self.may[gpa] = self.may.get(gpa, 0) | bits
            if self.kvm.accessed_while_walking:
                for gpa in self.tables.seen:
                    self.may[gpa] = self.may.get(gpa, 0) | A
            if not walk.ok and done.faults and done.log[-1][2] == address:
                if page in vcpu.cached and len(addresses) > 1 and address == gva:  # by its TLB the processor may have gone on
                    self.now(addresses[1], access)
                    for gpa, bits in self.tables.set_bits:
                        self.may[gpa] = self.may.get(gpa, 0) | bits
                break
            if not done.faults or done.log[-1][2] != address:
                vcpu.reached.setdefault(page, []).append(at)
                vcpu.cached.add(page)

    # --- what is looked at between runs

    def check_tables(self, words: np.ndarray) -> None:
        """Entries are what was stored, plus A and D that walks set."""
        for gpa, value in self.tables.words.items():
            found = int(words[gpa >> 3])
            least, most = value | self.must.get(gpa, 0), value | self.may.get(gpa, 0)
            if found & least != least or found & ~most:
                raise Wrong(f"table entry {gpa:#x}: expected {least:#x} to {most:#x}, found {found:#x}")

    def check_report(self, identity: int, report: np.ndarray) -> None:
        """A DIRTY_GET reported every page that was written; without manual protection they are forgotten."""
        written = self.written[identity]
        missing = sorted(page for page in written if not report[page])
        if missing:
            raise Wrong(
                f"memslot {identity}: expected pages {missing[:5]} in the dirty bitmap, found {np.flatnonzero(report)[:20].tolist()}"
            )
        self.totals["pages that had to be dirty"] += len(written)
        if not self.kvm.manual_protect:
            written.clear()


def fault_at(address: int, code: int) -> Possible:
    return Possible([(LogKind.PAGE_FAULT, 0, address, code, ALL)], faults=True)


def text(rows: list) -> str:
    """Log rows in words."""
    return "[" + ", ".join(f"{LogKind(row[0]).name} {row[1]} {row[2]:#x} = {row[3]:#x}" for row in rows) + "]"


def describe(events: np.ndarray, at: int) -> str:
    row = events[at]
    return (
        f"{Op(int(row['op'])).name} access={int(row['access']):#x} size={int(row['size'])} "
        f"address={int(row['address']):#x} value={int(row['value']):#x}"
    )


# --- running one -----------------------------------------------------------------------------------------------------------


def segments(events: np.ndarray, step: int) -> Iterator[tuple[int, int]]:
    """Pieces of the stream: up to a DIRTY_GET, before a DIRTY_CLEAR, and at most `step` events."""
    op, first = events["op"], 0
    for at in range(len(events)):
        last = at == len(events) - 1
        cut = op[at] == Op.DIRTY_GET or last or op[at + 1] == Op.DIRTY_CLEAR or at + 1 - first >= step
        if cut and not (op[at] == Op.EXCHANGE and not last):
            yield first, at + 1
            first = at + 1


def plan(name: str, seed: int, count: int, kind: Kind | None = None) -> Plan:
    """The stream of a seed: always the same."""
    return Generator(name, kind or KINDS[name], seed).plan(count)


def run(stream: Plan, *, step: int | None = None) -> Counter[str]:
    """Run and judge a stream.

    Raises:
        AssertionError: naming seed, kind, event, what was expected and found.
    """
    step = step or (100 if JIT else 1)
    events, machine, judge = stream.events, stream.machine(), Judge(stream)
    rng = np.random.default_rng([stream.seed, 3])
    at = 0
    try:
        for first, end in segments(events, step):
            at = first
            piece = events[first:end]
            if piece["op"][0] == Op.DIRTY_CLEAR:
                identity = int(piece["address"][0])
                pages = choose_pages(rng, machine.report(identity))
                machine.set_report(identity, pages)
                judge.cleared = pages.tolist()
            supply = rng.integers(1 << 63, size=200, dtype=np.uint64)
            result = machine.run(piece, supply=supply)
            judge.supply = supply.tolist()
            rows: dict[int, list[tuple[int, int, int, int]]] = {}
            for kind, size, event, address, value in result.log.tolist():
                rows.setdefault(event, []).append((kind, size, address, value))
            for number, row in enumerate(piece):
                at = first + number
                compared = int(piece[number + 1]["value"]) if row["op"] == Op.EXCHANGE else 0
                judge.event(at, row, compared, rows.get(number, []))
            if piece["op"][-1] == Op.DIRTY_GET:
                identity = int(piece["address"][-1])
                judge.check_report(identity, machine.report(identity))
            judge.check_tables(machine.memory.words)
            audit(machine)
    except (Wrong, AuditError, MachineError) as error:
        shown = events[at]["op"] == Op.EXCHANGE and at + 1 < len(events)
        raise AssertionError(
            f"seed {stream.seed}, kind {stream.name}, {len(events)} events, event {at} ({describe(events, at)}"
            f"{', ' + describe(events, at + 1) if shown else ''}), vCPU {judge.vcpus.index(judge.vcpu)}: {type(error).__name__}: {error}"
        ) from error
    counters = machine.counters()
    for name in (
        "pf_taken",
        "pf_fast",
        "mmu_recycled",
        "tlb_hits",
        "tlb_misses",
        "pml_full",
        "nx_lpage_splits",
        "pages_2m",
        "pages_1g",
    ):
        judge.totals[name] += counters[name]
    judge.totals["streams"] += 1
    judge.totals["events"] += len(events)
    return judge.totals


def choose_pages(rng: np.random.Generator, report: np.ndarray) -> np.ndarray:
    """Which pages a DIRTY_CLEAR clears: those reported, some of them, or any."""
    reported = np.flatnonzero(report)
    draw = rng.random()
    if draw < 0.5:
        return reported
    if draw < 0.8:
        return reported[rng.random(len(reported)) < 0.5]
    return np.flatnonzero(rng.random(len(report)) < 0.2)
