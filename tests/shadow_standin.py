"""Machines that stand in for the model, to test the judge: the simplest MMU that is right, and such that are wrong in one way."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from stream_guests import PAGE, READONLY, WRITE
from stream_plans import Plan, Slot, slot_of

from fastmmu.bits import CR4
from fastmmu.events import Op
from fastmmu.machine_state import LOG, LogKind
from fastmmu.memory import GuestMemory
from fastmmu.paging import Cpu, Mode
from fastmmu.reference.walk import GeneralProtection, Memory, Translation, Walker

NO_FLUSH = 1 << 63
GENERAL_PROTECTION = 6


class Live(Memory):
    """The guest's memory itself."""

    def __init__(self, words: np.ndarray, slots: dict[int, Slot]) -> None:
        super().__init__([])
        self.array, self.memslots = words, slots

    def kind(self, gpa: int) -> str | None:
        slot = slot_of(self.memslots, gpa)
        return None if slot is None else "rom" if slot.flags & READONLY else "ram"

    def read(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.array.view(np.uint8)[gpa : gpa + size].tobytes(), "little")

    def write(self, gpa: int, size: int, value: int) -> None:
        self.array.view(np.uint8)[gpa : gpa + size] = np.frombuffer(
            (value & (1 << 8 * size) - 1).to_bytes(size, "little"), np.uint8
        )


class Registers(Walker):
    """A walker that keeps its PDPTEs."""

    pdptes: list[int]

    def load_pdptes(self, cr3: int) -> list[int]:
        return self.pdptes


@dataclass
class Processor:
    cpu: Cpu
    walker: Registers
    cr3: int
    tlb: dict[tuple[int, int, int], Translation]  # by PCID, page, access


class StandIn:
    """Runs a plan by walking the tables at each access.

    With `tlb` it remembers translations as a processor may; `forgets` names the events at which it forgets what it must, of
    CR3, INVLPG, FLUSH and MODE; with `pcids` it tells translations apart by PCID. `faults` lets it remember faults too. `accessed`: it
    sets A and D. `pagewise`: a write over a page boundary stores to the first page before it looks for the second one.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        tlb: bool = False,
        forgets: str = "CR3 INVLPG FLUSH MODE",
        pcids: bool = True,
        faults: bool = False,
        accessed: bool = True,
        pagewise: bool = False,
    ) -> None:
        self.plan, self.caches, self.forgets, self.pcids = plan, tlb, forgets.split(), pcids
        self.faults, self.accessed, self.pagewise = faults, accessed, pagewise
        self.memory = GuestMemory(1 << 32)
        for gpa, value in plan.guest.words.items():
            self.memory.words[gpa >> 3] = value
        for frame, data in plan.data().items():
            self.memory.words[frame >> 3 : (frame + PAGE) >> 3] = np.frombuffer(data, np.uint64)
        self.slots: dict[int, Slot] = {}
        self.live = Live(self.memory.words, self.slots)
        self.vcpus = [self.processor(plan.cpus[0]) for _ in range(plan.kind.vcpus)]
        self.vcpu = self.vcpus[0]
        self.log: list[tuple[int, int, int, int, int]] = []
        self.supply: list[int] = []

    def processor(self, cpu: Cpu) -> Processor:
        one = Processor(cpu, Registers(self.live, cpu), cpu.cr3, {})
        self.load_pdptes(one, cpu.cr3)
        return one

    def load_pdptes(self, vcpu: Processor, cr3: int) -> None:
        if vcpu.cpu.mode == Mode.PAE:
            vcpu.walker.pdptes = Walker(self.live, vcpu.cpu).load_pdptes(cr3)

    def report(self, slot: int) -> np.ndarray:
        """Every page may have been written."""
        return np.ones((self.slots[slot].end - self.slots[slot].start) // PAGE, bool)

    def set_report(self, slot: int, pages: np.ndarray) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {}

    # --- events

    def run(self, events: np.ndarray, *, supply: np.ndarray) -> SimpleNamespace:
        self.log, self.supply = [], supply.tolist()
        for at, row in enumerate(events):
            op, address, value = Op(int(row["op"])), int(row["address"]), int(row["value"])
            if op in (Op.ACCESS, Op.DEVICE, Op.LOAD, Op.WRITE, Op.EXCHANGE):
                compared = int(events[at + 1]["value"]) if op == Op.EXCHANGE else 0
                self.access(at, op, address, max(1, int(row["size"])), int(row["access"]), value, compared)
            else:
                self.other(at, op, address, value)
        return SimpleNamespace(log=np.array(self.log, LOG))

    def pcid(self) -> int:
        return self.vcpu.cr3 & 0xFFF if self.pcids and self.vcpu.cpu.cr4 & int(CR4.PCIDE) else 0

    def forget(self, why: str, pcid: int | None = None, gva: int | None = None) -> None:
        if why in self.forgets:
            for key, walk in list(self.vcpu.tlb.items()):
                bits = 10 if self.vcpu.cpu.mode == Mode.TWO_LEVEL else 9
                shift = bits * (max(walk.level, 1) - 1)
                if (pcid is None or key[0] == pcid) and (gva is None or key[1] >> shift == gva >> 12 + shift):
                    del self.vcpu.tlb[key]

    def other(self, at: int, op: Op, address: int, value: int) -> None:
        vcpu = self.vcpu
        if op == Op.STORE:
            if self.live.kind(address) == "ram":
                self.live.write(address, 8, value)
        elif op == Op.CR3:
            pcids = bool(vcpu.cpu.cr4 & int(CR4.PCIDE))
            try:
                self.load_pdptes(vcpu, value & ~NO_FLUSH)
            except GeneralProtection:
                self.log.append((GENERAL_PROTECTION, 0, at, value, 0))
                return
            vcpu.cr3 = value & ~NO_FLUSH
            if not pcids or not value & NO_FLUSH:
                self.forget("CR3", self.pcid() if pcids else None)
        elif op == Op.INVLPG:
            self.forget("INVLPG", self.pcid(), address)
        elif op == Op.FLUSH:
            self.forget("FLUSH")
        elif op in (Op.MODE, Op.REGISTERS):
            cpu = self.plan.cpus[value]
            vcpu.cr3 = vcpu.cr3 if op == Op.REGISTERS else cpu.cr3
            vcpu.cpu, vcpu.walker = cpu, Registers(self.live, cpu)
            self.load_pdptes(vcpu, vcpu.cr3)
            self.forget("MODE")
        elif op == Op.VCPU:
            self.vcpu = self.vcpus[value]
        elif op == Op.SLOT_CREATE:
            one = self.plan.prepared[value]
            self.slots[one["slot"]] = Slot(one["slot"], one["gpa"], one["gpa"] + one["size"], one["flags"])
        elif op == Op.SLOT_DELETE:
            del self.slots[address]
            for one in self.vcpus:
                one.tlb.clear()
        elif op == Op.SLOT_FLAGS:
            self.slots[address].flags = value

    # --- accesses

    def translate(self, gva: int, access: int) -> Translation:
        vcpu = self.vcpu
        key = (self.pcid(), gva >> 12, access)
        if self.caches and key in vcpu.tlb:
            walk = vcpu.tlb[key]
            return Translation(walk.ok, walk.gpa & ~(PAGE - 1) | gva % PAGE, walk.level, walk.access, walk.pferr)
        gva = gva if vcpu.walker.paging else gva & 0xFFFFFFFF
        walk = vcpu.walker.walk(vcpu.cr3, gva, access, update=self.accessed)
        if walk.ok or self.faults:
            vcpu.tlb[key] = walk
        return walk

    def is_device(self, gpa: int, write: bool) -> bool:
        kind = self.live.kind(gpa)
        return kind is None or (write and kind == "rom")

    def access(self, at: int, op: Op, gva: int, size: int, access: int, value: int, compared: int) -> None:
        """All or nothing: both pages are translated first, unless `pagewise`."""
        write = bool(access & WRITE)
        part = min(size, PAGE - gva % PAGE)
        pages = [(gva, part, 0)] + ([(gva + part, size - part, part)] if part < size else [])
        gpas = []
        for address, _, _ in pages:
            walk = self.translate(address, access)
            if not walk.ok:
                self.log.append((LogKind.PAGE_FAULT, 0, at, address, walk.pferr))
                return
            gpas.append(walk.gpa)
            if self.pagewise and op == Op.WRITE and len(pages) > 1 and not self.is_device(walk.gpa, True):
                length, before = (part, 0) if address == gva else (size - part, part)
                self.live.write(walk.gpa, length, value >> 8 * before)
        emulated, seen = any(self.is_device(gpa, write) for gpa in gpas), 0
        data = op in (Op.LOAD, Op.WRITE, Op.EXCHANGE)
        if op in (Op.LOAD, Op.EXCHANGE) or (emulated and not write):
            for gpa, (_, length, before) in zip(gpas, pages, strict=True):
                if self.is_device(gpa, False):
                    one = self.supply.pop(0) & (1 << 8 * length) - 1
                    self.log.append((LogKind.MMIO_READ, length, at, gpa, one))
                else:
                    one = self.live.read(gpa, length)
                seen |= one << 8 * before
        value = value if data else 0
        if op == Op.EXCHANGE and seen != compared:
            value = seen
        if write:
            for gpa, (_, length, before) in zip(gpas, pages, strict=True):
                piece = value >> 8 * before & (1 << 8 * length) - 1
                if self.is_device(gpa, True):
                    self.log.append((LogKind.MMIO_WRITE, length, at, gpa, piece))
                elif data:
                    self.live.write(gpa, length, piece)
        if op in (Op.LOAD, Op.EXCHANGE):
            self.log.append((LogKind.LOADED, size, at, gva, seen))
        self.log.append((LogKind.ACCESSED, 0, at, gva, gpas[0]))
