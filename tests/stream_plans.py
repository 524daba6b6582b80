"""Random valid event streams: a `Plan` from a seed, made by a `Generator`."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
from stream_guests import (
    CODE,
    FETCH,
    HUGE,
    HUGE_DATA,
    LOG,
    MAIN,
    PAGE,
    RAM_DATA,
    RANGES,
    READONLY,
    ROM,
    ROM_DATA,
    TABLES_SLOT,
    USER,
    WRITE,
    Builder,
    Guest,
    Kind,
    TableMemory,
    chance,
    data_frame,
    entry,
    one_of,
    rights,
)

from fastmmu.bits import CR0, CR4, EFER, RFLAGS
from fastmmu.events import EVENT, Op
from fastmmu.machine import Machine
from fastmmu.machine_state import VmWord
from fastmmu.paging import Cpu
from fastmmu.reference.walk import ADDR, PS, P


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


WEIGHTS = {
    "access": 40, "fetch": 6, "load": 13, "write": 14, "exchange": 4, "store": 10, "invlpg": 2.5, "cr3": 1.5, "flush": 0.7,
    "registers": 1, "mode": 0.7, "other_vcpu": 3, "leave": 0.7, "slot": 0.7, "flags": 1.2, "dirty_get": 1.7, "dirty_clear": 1,
    "unmap": 0.7, "page_limit": 0.3, "parameter": 0.4,
}  # fmt: skip


class Generator:
    """Makes events one after another; knows the tables and memslots that they lead to."""

    weights = WEIGHTS
    never_deleted = frozenset({TABLES_SLOT})

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
        names = list(self.weights)
        weights = np.cumsum([self.weights[name] for name in names])
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
        identities = sorted(self.slots.keys() - self.never_deleted)
        if identities:
            identity = one_of(rng, identities)
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


def slot_of(slots: dict[int, Slot], gpa: int) -> Slot | None:
    """The memslot that holds a gpa."""
    for slot in slots.values():
        if slot.start <= gpa < slot.end:
            return slot
    return None
