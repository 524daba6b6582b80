"""KVM's walk of the guest's tables, with all that a shadow of its path is made from (facts 1)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastmmu.reference.processor import Vcpu
from fastmmu.reference.tables import PAGE, GuestMemory
from fastmmu.reference.walk import (
    ACC_U,
    ACC_W,
    ACC_X,
    ADDR,
    NX,
    PFERR_P,
    PFERR_PK,
    PFERR_RSVD,
    PFERR_W,
    PS,
    A,
    D,
    P,
    Translation,
    U,
    W,
    Walker,
)

ACC_ALL = ACC_U | ACC_W | ACC_X


@dataclass
class GuestWalk:
    """A walk of the guest's tables that allows the access (facts 1.1), with what the shadow of its path is made from."""

    gpa: int = 0
    level: int = 0  # of the leaf
    access: int = 0
    tables: dict[int, int] = field(default_factory=dict)  # gfn of the table of each level
    granted: dict[int, int] = field(default_factory=dict)  # by the entries above the table
    entries: dict[int, tuple[int, int]] = field(default_factory=dict)  # gpa and value
    changed: bool = False  # under the walk itself: it starts again

    @property
    def gfn(self) -> int:
        """The page."""
        return self.gpa // PAGE


def format_of(walker: Walker) -> tuple[int, int]:
    """Bytes of an entry, bits of an index."""
    return (8, 9) if walker.pae else (4, 10)


def access_of(walker: Walker, gpte: int) -> int:
    """The access that an entry grants (facts 1.2)."""
    return (ACC_W if gpte & W else 0) | (ACC_U if gpte & U else 0) | (ACC_X if not (walker.pae and gpte & NX) else 0)


def frame_of(walker: Walker, gpte: int, level: int) -> int:
    """Address of the table or page that an entry points to."""
    if walker.pae or level == 1 or not (walker.pse and gpte & PS):
        return gpte & (ADDR if walker.pae else 0xFFFFF000)
    return gpte & 0xFFC00000 | (gpte >> 13 & 15) << 32  # PSE-36


def walk_tables(vcpu: Vcpu, gva: int, access: int) -> GuestWalk | Translation:
    """Walk until nothing changes under the walk; a `Translation` says why it fails."""
    while isinstance(found := attempt(vcpu, gva, access), GuestWalk) and found.changed:
        pass
    return found


def attempt(vcpu: Vcpu, gva: int, access: int) -> GuestWalk | Translation:
    """One attempt (facts 1.1)."""
    walker, memory = vcpu.walker, vcpu.machine.memory
    size, index_bits = format_of(walker)
    level, table = walker.levels, frame_of(walker, vcpu.cpu.cr3, 1)
    if walker.pae and not walker.long:
        pdpte = vcpu.pdptes[gva >> 30]
        if not pdpte & P:
            return walker.fault(3, 0, access)
        table = pdpte & ADDR
    found = GuestWalk(access=ACC_ALL)
    while True:
        if memory.kind(table) is None:
            return walker.fault(level, 0, access)
        gpa = table + size * (gva >> 12 + index_bits * (level - 1) & (1 << index_bits) - 1)
        entry = memory.read(gpa, size)
        if not entry & P:
            return walker.fault(level, 0, access)
        if walker.reserved(level, entry):
            return walker.fault(level, PFERR_P | PFERR_RSVD, access)
        found.tables[level], found.granted[level], found.entries[level] = table // PAGE, found.access, (gpa, entry)
        found.access &= access_of(walker, entry)
        if level == 1 or (entry & PS and (walker.pae or walker.pse)):
            break
        table, level = frame_of(walker, entry, level), level - 1
    rights = [bool(found.access & right) for right in (ACC_U, ACC_W, ACC_X)]
    if walker.long and walker.key_denied(rights[0], entry >> 59 & 15, access):
        return walker.fault(level, PFERR_P | PFERR_PK, access)
    if walker.denied(*rights, access):
        return walker.fault(level, PFERR_P, access)
    offset = (1 << 12 + index_bits * (level - 1)) - 1
    found.level, found.gpa = level, frame_of(walker, entry, level) & ~offset | gva & offset
    if not access & PFERR_W and not entry & D:
        found.access &= ~ACC_W
    update(memory, found, size, access)
    return found


def update(memory: GuestMemory, found: GuestWalk, size: int, access: int) -> None:
    """Set A on the way and D in the leaf (facts 1.6); an entry that is on the way twice makes the walk start again."""
    for level, (gpa, entry) in found.entries.items():
        new = entry | A | (D if level == found.level and access & PFERR_W else 0)
        if new == entry or memory.kind(gpa) == "rom":
            continue
        if memory.read(gpa, size) != entry:
            found.changed = True
            return
        memory.write(gpa, size, new)
        found.entries[level] = gpa, new
