"""What the processor does between two exits: its TLB, the walk of the guest's tables through the nested table, the retry.

Sources: AMD APM volume 2, 15.25 (nested paging, error codes in 15.25.6) and 5.5 (TLB); for what KVM's emulator does with an
instruction, facts 4.3. A `Vcpu` also holds what KVM keeps per vCPU: roots, pending requests, the last device page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastmmu.bits import ACC, PFERR
from fastmmu.paging import Cpu, Mode
from fastmmu.reference.walk import A, D, Memory, Translation, Walker

PFERR_P, PFERR_W, PFERR_U, PFERR_RSVD, PFERR_F, GUEST_FINAL, GUEST_PAGE = (
    int(getattr(PFERR, name)) for name in ("P", "W", "U", "RSVD", "F", "GUEST_FINAL", "GUEST_PAGE")
)
ACC_X, ACC_W, ACC_U = int(ACC.X), int(ACC.W), int(ACC.U)
PAGE = 4096
OFFSET = PAGE - 1
RESTARTS = 1000  # far more than any access needs: every restart maps something


class NotBuilt(ValueError):
    """The document needs a part of KVM that this model does not have."""


@dataclass(frozen=True)
class Hardware:
    """The processor: size of its TLB, and the habits of the emulated one that the truth files were recorded on."""

    sets: int = 256
    ways: int = 4
    tlb_flushed_on_exit: bool = False  # the TLB does not outlive an exit
    accessed_while_walking: bool = False  # A of an upper entry is set even if the walk then fails
    reserved_without_present: bool = False  # error codes for reserved bits have P clear


TRUTH_HARDWARE = Hardware(tlb_flushed_on_exit=True, accessed_while_walking=True, reserved_without_present=True)


class NestedFault(Exception):
    """The host's table does not allow an access: an exit to KVM."""

    def __init__(self, address: int, code: int) -> None:
        super().__init__(f"{address:#x} {code:#x}")
        self.address, self.code = address, code


class GuestFault(Exception):
    """The guest's own tables do not allow an access: a page fault for the guest."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code:#x}")
        self.code = code


@dataclass
class Leaf:
    """A present entry that maps memory; equal values are what KVM takes for "nothing changed"."""

    executable: bool
    writable: bool
    mmu_writable: bool
    accessed: bool
    dirty: bool


@dataclass
class Device:
    """An MMIO SPTE: the access faults with a reserved bit."""

    gfn: int
    generation: int


@dataclass(eq=False)
class Table:
    """512 entries of the host's table; `gfn` is the first page they map. Only shadow pages have parents and users."""

    gfn: int
    level: int
    entries: dict[int, Leaf | Device | Table] = field(default_factory=dict)
    parents: list[tuple[Table, int]] = field(default_factory=list)
    users: int = 0  # vCPUs that have it as a root
    invalid: bool = False
    nx_split: bool = False  # made because a fetch may not use a huge page, and counted

    def index(self, gfn: int) -> int:
        """Number of the entry that maps `gfn`."""
        return gfn // span(self.level) % 512

    def gfn_of(self, index: int) -> int:
        """First page that an entry maps."""
        return self.gfn + index * span(self.level)

    def visit(self, start: int, end: int, lowest: int = 1) -> Iterator[tuple[Table, int]]:
        """Entries that overlap a range of pages, those of a table after the entry that points to it.

        As in KVM's iterator an entry is visited if it begins before `end`: an empty range at the begin of an entry visits nothing,
        one inside of it does.
        """
        for index in range(max(0, (start - self.gfn) // span(self.level)), 512):
            if self.gfn_of(index) >= end:
                return
            yield self, index
            entry = self.entries.get(index)
            if isinstance(entry, Table) and self.level > lowest:
                yield from entry.visit(start, end, lowest)


def span(level: int) -> int:
    """4 KiB pages that an entry of this level maps."""
    return 1 << 9 * (level - 1)


def path(roots: list[Table], gfn: int) -> Iterator[tuple[Table, int]]:
    """Tables from the root down and the index in each; a table that is linked meanwhile is followed."""
    table = roots[0] if len(roots) == 1 else roots[gfn >> 18]
    while True:
        index = table.index(gfn)
        yield table, index
        entry = table.entries.get(index)
        if not isinstance(entry, Table):
            return
        table = entry


@dataclass
class Slot:
    """A memslot. `host_level` is the page size of the host's mapping, `misaligned` the levels at which it is not congruent."""

    gfn: int
    pages: int
    readonly: bool = False
    logging: bool = False
    host_level: int = 1
    misaligned: frozenset[int] = frozenset()
    dirty: set[int] = field(default_factory=set)

    @property
    def end(self) -> int:
        """First page behind the slot."""
        return self.gfn + self.pages

    def start_log(self, manual_protect: int) -> None:
        """A new bitmap (facts 7.1)."""
        self.dirty = set(range(self.pages)) if self.logging and manual_protect & 2 else set()

    def clear_dirty(self, pages: set[int]) -> list[list[int]]:
        """Clear bits; the gfns of those that were set, by words of the bitmap."""
        words: dict[int, list[int]] = {}
        for page in sorted(self.dirty & pages):
            words.setdefault(page // 64, []).append(self.gfn + page)
        self.dirty -= pages
        return list(words.values())

    def huge_level(self, gfn: int, limit: int = 3) -> int:
        """Largest level at which the page may be mapped (facts 5.9)."""
        for level in range(limit, 1, -1):
            start = gfn - gfn % span(level)
            if self.gfn <= start and start + span(level) <= self.end and level not in self.misaligned:
                return min(level, self.host_level)
        return 1


class GuestMemory(Memory):
    """Guest memory as KVM itself sees it: the memslots and their dirty logs."""

    def __init__(self) -> None:
        super().__init__([])
        self.memslots: dict[int, Slot] = {}

    def slot_at(self, gfn: int) -> Slot | None:
        """The slot of a page."""
        return next((slot for slot in self.memslots.values() if slot.gfn <= gfn < slot.end), None)

    def kind(self, gpa: int) -> str | None:
        """'ram', 'rom' or no slot."""
        slot = self.slot_at(gpa // PAGE)
        return None if slot is None else "rom" if slot.readonly else "ram"

    def write(self, gpa: int, size: int, value: int) -> None:
        """KVM's walker sets a bit: the table's page becomes dirty (facts 1.6)."""
        super().write(gpa, size, value)
        self.mark_dirty(gpa // PAGE)

    def mark_dirty(self, gfn: int) -> None:
        """Log a page (facts 7.2)."""
        slot = self.slot_at(gfn)
        if slot is not None and slot.logging:
            slot.dirty.add(gfn - slot.gfn)


@dataclass
class Fault:
    """One page fault on its way through the handler (facts 5.2)."""

    gfn: int
    code: int
    slot: Slot | None
    max_level: int


@dataclass
class Outcome:
    """How an access ended: the guest's page fault (`pferr`, at `address`), or the bytes it covers.

    `pieces` has a (gpa, length, is a device) for each page.
    """

    pieces: list[tuple[int, int, bool]] = field(default_factory=list)
    pferr: int | None = None
    address: int = 0


@dataclass
class TlbEntry:
    """One 4 KiB page."""

    page: int  # of the gva
    frame: int  # address of the page in guest memory
    rights: int  # ACC bits of the guest's tables
    dirty: bool  # a write needs no walk: D is set in both tables, and the host's lets it
    executable: bool  # in the host's table
    level: int  # of the guest's leaf


class Tlb:
    """Sets of a few entries, newest first."""

    def __init__(self, hardware: Hardware) -> None:
        self.ways = hardware.ways
        self.sets: list[list[TlbEntry]] = [[] for _ in range(hardware.sets)]

    def set_of(self, page: int) -> list[TlbEntry]:
        """The set in which a page may be."""
        return self.sets[page % len(self.sets)]

    def find(self, page: int) -> TlbEntry | None:
        """The entry of a page."""
        return next((entry for entry in self.set_of(page) if entry.page == page), None)

    def insert(self, entry: TlbEntry) -> None:
        """Put an entry in front; the last one goes."""
        entries = self.set_of(entry.page)
        entries.insert(0, entry)
        del entries[self.ways :]

    def remove(self, entry: TlbEntry) -> None:
        """Forget one entry."""
        self.set_of(entry.page).remove(entry)

    def empty(self) -> None:
        """Forget everything."""
        for entries in self.sets:
            entries.clear()

    def invalidate(self, page: int) -> None:
        """INVLPG: the page, and all that was cut out of a large page which covers it (APM volume 2, 5.5.2)."""
        for entries in self.sets:
            for entry in list(entries):
                shift = 9 * (entry.level - 1) if entry.level > 1 else 0
                if entry.page >> shift == page >> shift:
                    entries.remove(entry)


class TableReads(Memory):
    """Guest memory as the processor's own walk sees it: every read of an entry goes through the host's table first."""

    def __init__(self, vcpu: Vcpu) -> None:
        super().__init__([], vcpu.machine.memory.words)
        self.vcpu = vcpu
        self.entries: list[int] = []

    def kind(self, gpa: int) -> str:
        """The processor knows no slots: the host's table decides."""
        return "ram"

    def read(self, gpa: int, size: int) -> int:
        """One more level: the entry before it was a valid pointer."""
        if self.entries and self.vcpu.machine.hardware.accessed_while_walking:
            self.set_bits(self.entries[-1], A)
        self.vcpu.nested(gpa, PFERR_W, GUEST_PAGE)
        self.entries.append(gpa)
        return super().read(gpa, size)

    def set_bits(self, gpa: int, bits: int) -> None:
        """Set accessed or dirty in an entry."""
        self.words[gpa] = self.words.get(gpa, 0) | bits


class Vcpu:
    """A virtual processor."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine  # a kvm.Machine
        self.roots: list[Table] = []  # tables that the hardware starts from: one, or the four of PAE paging, or none loaded
        self.flush_requested = False
        self.free_roots_requested = False
        self.device: tuple[int, int] | None = None  # the last device page: (gfn, memslot generation)
        self.faults: list[tuple[int, int]] = []  # every exit for a page fault: (address, error code)
        self.tlb = Tlb(machine.hardware)
        self.set_registers(0, cr0=0x10, cr3=0, cr4=0, efer=0)

    def set_registers(self, cpl: int, *, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """Load the registers that translation depends on; what follows for the TLB and the roots is the caller's."""
        features = {"maxphyaddr": self.machine.maxphyaddr, "page_1g": self.machine.page_1g, "amd": True}
        self.cpu = Cpu(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, **features)
        if self.cpu.mode not in (Mode.NONE, Mode.LONG4, Mode.LONG5):
            raise NotBuilt("guest paging with 32-bit addresses")
        self.cpl = cpl
        self.reads = TableReads(self)
        self.walker = Walker(self.reads, self.cpu)
        self.kvm_walker = Walker(self.machine.memory, self.cpu)

    def write_control(self, **registers: int) -> None:
        """The guest moves to CR0, CR3, CR4 or EFER: no exit with nested paging, an empty TLB."""
        old = {name: getattr(self.cpu, name) for name in ("cr0", "cr3", "cr4", "efer")}
        self.set_registers(self.cpl, **(old | registers))
        self.tlb.empty()

    def invlpg(self, gva: int) -> None:
        """The guest's INVLPG: no exit with nested paging."""
        self.tlb.invalidate(gva // PAGE)

    def enter(self) -> None:
        """KVM serves the requests and loads the roots, until nothing is left to do before the guest runs."""
        machine = self.machine
        if not machine.npt and self.walker.paging:
            raise NotBuilt("shadow paging")
        while self.free_roots_requested or self.flush_requested or not self.roots:
            if self.free_roots_requested and any(root.invalid for root in self.roots):
                machine.mmu.release_roots(self)
            self.free_roots_requested = False
            if self.flush_requested:
                machine.counters["tlb_flush"] += 1
                self.tlb.empty()
            self.flush_requested = False
            if not self.roots:
                machine.mmu.load_roots(self)
                self.tlb.empty()

    def exit(self) -> None:
        """Leave the guest."""
        self.machine.counters["exits_no_irq"] += 1
        if self.machine.hardware.tlb_flushed_on_exit:
            self.tlb.empty()

    def access(self, gva: int, access: int, size: int) -> Outcome:
        """Touch memory; `access` is W, U and F of an error code. Restarts after every fault that KVM repaired."""
        first = min(size, PAGE - gva % PAGE)
        parts = [(gva, first)] + ([(gva + first, size - first)] if size > first else [])
        for _ in range(RESTARTS):
            self.enter()
            pieces = []
            try:
                for address, length in parts:
                    pieces.append((self.translate(address, access), length, False))
                return Outcome(pieces)
            except GuestFault as fault:
                return Outcome(pferr=fault.code, address=address)
            except NestedFault as fault:
                self.exit()
                self.faults.append((fault.address, fault.code))
                if self.machine.page_fault(self, fault.address, fault.code):
                    return self.emulate(parts, access, fault)
        raise RuntimeError(f"access to {gva:#x} never ends: {self.faults[-1]}")

    def translate(self, gva: int, access: int) -> int:
        """The gpa, from the TLB or by a walk which fills it."""
        entry = self.tlb.find(gva // PAGE)
        if entry is not None:
            if self.serves(entry, access):
                return entry.frame | gva & OFFSET
            self.tlb.remove(entry)
        walk, dirty = self.walk(gva, access)
        leaf = self.nested(walk.gpa, access, GUEST_FINAL)
        dirty = dirty and leaf.writable and leaf.dirty
        self.tlb.insert(TlbEntry(gva // PAGE, walk.gpa & ~OFFSET, walk.access, dirty, leaf.executable, walk.level))
        return walk.gpa

    def serves(self, entry: TlbEntry, access: int) -> bool:
        """Whether an entry answers an access under today's CR0, CR4, EFER and privilege."""
        if access & PFERR_W and not entry.dirty:
            return False
        if access & PFERR_F and not entry.executable:
            return False
        rights = [bool(entry.rights & right) for right in (ACC_U, ACC_W, ACC_X)]
        return not self.walker.paging or not self.walker.denied(*rights, access)

    def walk(self, gva: int, access: int) -> tuple[Translation, bool]:
        """Walk the guest's tables: the translation, and whether the leaf's D is set. A and D are set together at the end."""
        if not self.walker.paging:
            return Translation(True, gva, 1, ACC_U | ACC_W | ACC_X), True
        if not self.walker.is_address(gva):
            raise ValueError(f"gva {gva:#x} is no address of this mode")
        self.reads.entries = entries = []
        walk = self.walker.walk(self.cpu.cr3, gva, access, update=False)
        if not walk.ok:
            stripped = walk.pferr & PFERR_RSVD and self.machine.hardware.reserved_without_present
            raise GuestFault(walk.pferr & ~PFERR_P if stripped else walk.pferr)
        for entry in entries:
            self.reads.set_bits(entry, A)
        if access & PFERR_W:
            self.reads.set_bits(entries[-1], D)
        return walk, bool(self.reads.words[entries[-1]] & D)

    def nested(self, gpa: int, access: int, purpose: int) -> Leaf:
        """The host's leaf for a gpa, its A and D set; with nested paging every access is one by a user (APM 15.25.5)."""
        code = access & (PFERR_W | PFERR_F | PFERR_U)
        if self.machine.npt:
            code |= purpose | PFERR_U
        *_, (table, index) = path(self.roots, gpa // PAGE)
        leaf = table.entries.get(index)
        if leaf is None:
            raise NestedFault(gpa, code)
        if isinstance(leaf, Device):
            raise NestedFault(gpa, code | PFERR_RSVD | (0 if self.machine.hardware.reserved_without_present else PFERR_P))
        if (access & PFERR_W and not leaf.writable) or (access & PFERR_F and not leaf.executable):
            raise NestedFault(gpa, code | PFERR_P)
        leaf.accessed = True
        leaf.dirty = leaf.dirty or bool(access & PFERR_W)
        return leaf

    def emulate(self, parts: Iterable[tuple[int, int]], access: int, fault: NestedFault) -> Outcome:
        """KVM executes the instruction: each page for itself, the one that faulted without a walk (facts 4.3)."""
        if access & PFERR_F or fault.code & GUEST_PAGE:
            raise NotBuilt("code or page tables outside writable memory")
        self.machine.counters["insn_emulation"] += 1
        pieces = []
        for address, length in parts:
            gpa = fault.address
            if address & OFFSET != gpa & OFFSET:
                walk = self.kvm_walker.walk(self.cpu.cr3, address, access)
                if not walk.ok:
                    self.machine.counters["pf_guest"] += 1
                    return Outcome(pferr=walk.pferr, address=address)
                gpa = walk.gpa
            device = self.machine.memory.kind(gpa) is None or (bool(access & PFERR_W) and self.machine.memory.kind(gpa) == "rom")
            if access & PFERR_W and not device:
                self.machine.memory.mark_dirty(gpa // PAGE)
            pieces.append((gpa, length, device))
        if any(device for _, _, device in pieces):
            self.machine.counters["mmio_exits"] += 1
        return Outcome(pieces)
