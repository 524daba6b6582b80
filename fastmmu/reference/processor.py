"""What the processor does between two exits: its TLB, the walk of the guest's tables through the nested table, the retry.

Sources: AMD APM volume 2, 15.25 (nested paging, error codes in 15.25.6) and 5.5 (TLB); for what KVM's emulator does with an
instruction, facts 4.3. A `Vcpu` also holds what KVM keeps per vCPU: roots, pending requests, the last device page.
With shadow paging the walk is one of the shadow tables, without a TLB: it would not show, because KVM flushes it with every exit
that takes something away from an entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastmmu.bits import ACC, CR0, PFERR
from fastmmu.paging import Cpu, Mode
from fastmmu.reference.tables import PAGE, Device, DeviceInfo, Leaf, Table, lowest, span
from fastmmu.reference.walk import A, D, Memory, Translation, Walker

PFERR_P, PFERR_W, PFERR_U, PFERR_RSVD, PFERR_F, GUEST_FINAL, GUEST_PAGE = (
    int(getattr(PFERR, name)) for name in ("P", "W", "U", "RSVD", "F", "GUEST_FINAL", "GUEST_PAGE")
)
ACC_X, ACC_W, ACC_U = int(ACC.X), int(ACC.W), int(ACC.U)
OFFSET = PAGE - 1
EXCHANGE = "exchange"
Operand = int | str | None  # what a write stores: a number, the result of an exchange, or nothing that matters
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

    def __init__(self, code: int, address: int = 0) -> None:
        super().__init__(f"{code:#x} {address:#x}")
        self.code, self.address = code, address
        self.reads: list[tuple[int, int, bool]] = []  # pieces that an emulated exchange has read when its store faults


@dataclass
class Outcome:
    """How an access ended: the guest's page fault (`pferr`, at `address`), or the bytes it covers.

    `pieces` has a (gpa, length, is a device) for each page.
    """

    pieces: list[tuple[int, int, bool]] = field(default_factory=list)
    pferr: int | None = None
    address: int = 0
    emulated: bool = False  # by KVM
    stored: bool = False  # what goes to memory is there
    reads: list[tuple[int, int, bool]] = field(default_factory=list)  # of an emulated exchange: what it reads first


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
        self.sync_requested = False
        self.flush_current_requested = False
        self.root_cr3 = 0  # of the current root
        self.previous: list[tuple[int, Table] | None] = [None] * 3  # roots that it had before, with their CR3 (facts 9.1)
        self.pdptes = [0] * 4  # of PAE paging, as a load of CR3 found them
        self.device: DeviceInfo | None = None
        self.code = 0  # gva of the last fetch
        self.faults: list[tuple[int, int]] = []  # every exit for a page fault: (address, error code)
        self.tlb = Tlb(machine.hardware)
        self.set_registers(0, cr0=0x10, cr3=0, cr4=0, efer=0)

    def set_registers(self, cpl: int, *, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """Load the registers that translation depends on; what follows for the TLB and the roots is the caller's."""
        features = {"maxphyaddr": self.machine.maxphyaddr, "page_1g": self.machine.page_1g, "amd": True}
        self.cpu = Cpu(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, **features)
        if self.machine.npt and self.cpu.mode not in (Mode.NONE, Mode.LONG4, Mode.LONG5):
            raise NotBuilt("guest paging with 32-bit addresses")
        self.cpl = cpl
        self.reads = TableReads(self)
        self.walker = Walker(self.reads, self.cpu)
        self.kvm_walker = Walker(self.machine.memory, self.cpu)

    @property
    def shadowing(self) -> bool:
        """Whether the hardware walks shadows of the guest's tables."""
        return self.walker.paging and not self.machine.npt

    @property
    def user(self) -> int:
        """U of an error code, by the privilege level."""
        return PFERR_U if self.cpl == 3 else 0

    def write_control(self, **registers: int) -> None:
        """The guest moves to CR0, CR3, CR4 or EFER: no exit with nested paging, an empty TLB."""
        on, free = int(CR0.PG | CR0.WP), int(CR0.TS | CR0.MP)  # a change of TS and MP alone is not intercepted while those are on
        unseen = registers.keys() == {"cr0"} and registers["cr0"] & on == on and not (self.cpu.cr0 ^ registers["cr0"]) & ~free
        if not self.machine.npt and not unseen:
            self.exit()
            self.machine.write_control(self, **registers)
            return
        old = {name: getattr(self.cpu, name) for name in ("cr0", "cr3", "cr4", "efer")}
        self.set_registers(self.cpl, **(old | registers))
        self.tlb.empty()

    def invlpg(self, gva: int) -> None:
        """The guest's INVLPG: no exit with nested paging."""
        if not self.machine.npt:
            self.exit()
            self.machine.invlpg(self, gva)
        self.tlb.invalidate(gva // PAGE)

    def enter(self) -> None:
        """KVM serves the requests and loads the roots, until nothing is left to do before the guest runs."""
        machine = self.machine
        while (
            self.free_roots_requested
            or self.sync_requested
            or self.flush_requested
            or self.flush_current_requested
            or not self.roots
        ):
            if self.free_roots_requested:
                machine.mmu.release_obsolete(self)
            self.free_roots_requested = False
            if self.sync_requested:
                self.sync_requested = False
                machine.mmu.sync_roots(self)
            if self.flush_requested or self.flush_current_requested:  # to flush all does both
                machine.counters["tlb_flush"] += 1
                self.tlb.empty()
            self.flush_requested = self.flush_current_requested = False
            if not self.roots:
                machine.mmu.load_roots(self)
                self.tlb.empty()

    def exit(self) -> None:
        """Leave the guest."""
        self.machine.counters["exits_no_irq"] += 1
        if self.machine.hardware.tlb_flushed_on_exit:
            self.tlb.empty()

    def access(self, gva: int, access: int, size: int, operand: Operand = None) -> Outcome:
        """Touch memory; `access` is W, U and F of an error code. Restarts after every fault that KVM repaired."""
        if access & PFERR_F:
            self.code = gva
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
                try:
                    if self.machine.page_fault(self, fault.address, fault.code):
                        return self.machine.emulate(self, parts, access, fault, operand)
                except GuestFault as injected:
                    return Outcome(pferr=injected.code, address=injected.address, reads=injected.reads)
        raise RuntimeError(f"access to {gva:#x} never ends: {self.faults[-1]}")

    def translate(self, gva: int, access: int) -> int:
        """The gpa, from the TLB or by a walk which fills it."""
        if self.shadowing:
            return self.shadowed(gva, access)
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
        _, leaf = lowest(self.roots, gpa // PAGE)
        if leaf is None:
            raise NestedFault(gpa, code)
        if isinstance(leaf, Device):
            raise NestedFault(gpa, code | PFERR_RSVD | (0 if self.machine.hardware.reserved_without_present else PFERR_P))
        if (access & PFERR_W and not leaf.writable) or (access & PFERR_F and not leaf.executable):
            raise NestedFault(gpa, code | PFERR_P)
        leaf.accessed = True
        leaf.dirty = leaf.dirty or bool(access & PFERR_W)
        return leaf

    def shadowed(self, gva: int, access: int) -> int:
        """The gpa by the shadow tables; KVM keeps CR0.WP and EFER.NX set in the hardware, SMEP and SMAP are the guest's."""
        code = access & (PFERR_W | PFERR_F | PFERR_U)
        level, leaf = lowest(self.roots, gva // PAGE)
        if leaf is None:
            raise NestedFault(gva, code)
        if isinstance(leaf, Device):
            raise NestedFault(gva, code | PFERR_RSVD | (0 if self.machine.hardware.reserved_without_present else PFERR_P))
        if access & PFERR_U:
            denied = not leaf.user
        elif access & PFERR_F:
            denied = leaf.user and self.walker.smep
        else:
            denied = leaf.user and self.walker.smap and not self.walker.alignment_check
        if denied or (access & PFERR_W and not leaf.writable) or (access & PFERR_F and not leaf.executable):
            raise NestedFault(gva, code | PFERR_P)
        leaf.accessed = True
        leaf.dirty = leaf.dirty or bool(access & PFERR_W)
        return (leaf.gfn + gva // PAGE % span(level)) * PAGE | gva & OFFSET
