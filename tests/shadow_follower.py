"""What a guest's memory and vCPUs come to under a stream, in plain Python: for the generator and the judge of shadow paging.

Any page of memory may be a table here, so memory is one dict of words with a journal of all stores. A translation is legal if the
tables give it now, or gave it at a moment since the last flush of the vCPU that covers the page (SDM volume 3, 4.10): with PCIDs, a
flush of the current one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from stream_guests import READONLY
from stream_plans import Slot, slot_of

from fastmmu.bits import CR0, CR4, EFER
from fastmmu.paging import Cpu, Mode
from fastmmu.reference.walk import GeneralProtection, Memory, Translation, Walker

NO_FLUSH = 1 << 63  # of a CR3 load
PCID = 0xFFF
WORD = 2**64 - 1
NEVER, FOREVER = -1, 1 << 62
INDEX_BITS = {Mode.TWO_LEVEL: 10}  # else 9


def lanes(gpa: int, size: int, value: int) -> list[tuple[int, int, int]]:
    """The one or two words that `size` bytes at `gpa` lie in: (gpa, mask of the bytes, the bytes)."""
    first, shift, mask = gpa & ~7, 8 * (gpa & 7), (1 << 8 * size) - 1
    wide, data = mask << shift, (value & mask) << shift
    both = [(first, wide & WORD, data & WORD), (first + 8, wide >> 64, data >> 64)]
    return [one for one in both if one[1]]


class View(Memory):
    """Memory as a walk reads it, maybe as it was; A and D that the walk would set are told, not written."""

    def __init__(self, words: dict[int, int], slots: dict[int, Slot]) -> None:
        super().__init__([], words)
        self.memslots = slots
        self.then: dict[int, int] = {}  # words that were others at the moment that is looked at
        self.set_bits: list[tuple[int, int]] = []
        self.seen: set[int] = set()

    def kind(self, gpa: int) -> str | None:
        slot = slot_of(self.memslots, gpa)
        return None if slot is None else "rom" if slot.flags & READONLY else "ram"

    def read(self, gpa: int, size: int) -> int:
        at = gpa & ~7
        self.seen.add(at)
        word = self.then[at] if at in self.then else self.words.get(at, 0)
        return word if size == 8 else word >> 8 * (gpa & 4) & 0xFFFFFFFF

    def write(self, gpa: int, size: int, value: int) -> None:
        self.set_bits.append((gpa & ~7, (value & ~self.read(gpa, size)) << 8 * (gpa & 4)))


class LoadedWalker(Walker):
    """A walker whose PDPTE registers were loaded before."""

    pdptes: tuple[int, ...] = (0, 0, 0, 0)

    def load_pdptes(self, cr3: int) -> list[int]:
        return list(self.pdptes)


@dataclass
class ShadowVcpu:
    """Registers of a vCPU, and when its translations were flushed, by event."""

    cpu: Cpu
    cr3: int
    pdptes: tuple[int, ...] = (0, 0, 0, 0)
    flushed: int = NEVER
    flushed_pcid: dict[int, int] = field(default_factory=dict)
    invalidated: list[tuple[int, int, int]] = field(default_factory=list)  # event, PCID, gva
    loads: list[tuple[int, int]] = field(default_factory=list)  # event, CR3; since everything was flushed

    @property
    def pcid(self) -> int:
        return self.cr3 & PCID if self.cpu.cr4 & int(CR4.PCIDE) else 0


class Follower:
    """Memory, its journal, memslots and vCPUs."""

    def __init__(self, words: dict[int, int], cpu: Cpu, vcpus: int) -> None:
        self.words = words
        self.journal: list[tuple[int, int, int]] = []  # event, gpa of a word, the word before
        self.slots: dict[int, Slot] = {}
        self.view = View(self.words, self.slots)
        self.walkers: dict[Cpu, LoadedWalker] = {}
        self.vcpus = [ShadowVcpu(cpu, cpu.cr3, loads=[(NEVER, cpu.cr3)]) for _ in range(vcpus)]
        self.vcpu = self.vcpus[0]
        for one in self.vcpus:
            one.pdptes = self.pdptes(cpu, cpu.cr3)

    # --- memory

    def read(self, gpa: int, size: int, then: dict[int, int] | None = None) -> int:
        """Bytes of memory, without the A and D that walks set; with some words changed."""
        first = gpa & ~7
        words = self.words if then is None else self.words | then
        value = words.get(first, 0) | words.get(first + 8, 0) << 64
        return value >> 8 * (gpa - first) & (1 << 8 * size) - 1

    def overlay(self, gpa: int, size: int, value: int, then: dict[int, int] | None = None) -> dict[int, int]:
        """The words that a store changes, as they would be."""
        changed = {}
        for word, lane, part in lanes(gpa, size, value):
            old = (then or {}).get(word, self.words.get(word, 0))
            changed[word] = (old & ~lane) | part
        return changed

    def write(self, at: int, gpa: int, size: int, value: int) -> list[tuple[int, int]]:
        """Store bytes; returns (gpa, mask) of the words that they lie in."""
        for word, new in self.overlay(gpa, size, value).items():
            self.journal.append((at, word, self.words.get(word, 0)))
            self.words[word] = new
        return [(word, lane) for word, lane, _ in lanes(gpa, size, value)]

    def is_device(self, gpa: int, write: bool) -> bool:
        slot = slot_of(self.slots, gpa)
        return slot is None or (write and bool(slot.flags & READONLY))

    # --- registers

    def pdptes(self, cpu: Cpu, cr3: int) -> tuple[int, ...]:
        """What a load of CR3 reads.

        Raises:
            GeneralProtection: reserved bits are set.
        """
        self.view.then = {}
        return tuple(Walker(self.view, cpu).load_pdptes(cr3)) if cpu.mode == Mode.PAE else (0, 0, 0, 0)

    def load_cr3(self, at: int, value: int) -> bool:
        """MOV to CR3; False if it faults."""
        vcpu = self.vcpu
        pcids = bool(vcpu.cpu.cr4 & int(CR4.PCIDE))
        cr3 = value & ~NO_FLUSH
        try:
            vcpu.pdptes = self.pdptes(vcpu.cpu, cr3)
        except GeneralProtection:
            return False
        vcpu.cr3 = cr3
        vcpu.loads.append((at, cr3))
        if not pcids:
            self.flush(at)
        elif not value & NO_FLUSH:
            vcpu.flushed_pcid[vcpu.pcid] = at
        return True

    def set_registers(self, at: int, cpu: Cpu, *, by_guest: bool) -> None:
        """REGISTERS or MODE. What changes CR0, CR4 or EFER makes KVM begin with other roots, which is a flush of everything."""
        vcpu = self.vcpu
        cr3 = vcpu.cr3 if by_guest else cpu.cr3
        same = (cpu.cr0, cr3, cpu.cr4, cpu.efer) == (vcpu.cpu.cr0, vcpu.cr3, vcpu.cpu.cr4, vcpu.cpu.efer)
        vcpu.cpu, vcpu.cr3 = cpu, cr3
        vcpu.pdptes = self.pdptes(cpu, cr3)
        if not same:
            self.flush(at)

    def flush(self, at: int) -> None:
        vcpu = self.vcpu
        vcpu.flushed, vcpu.flushed_pcid, vcpu.invalidated, vcpu.loads = at, {}, [], [(at, vcpu.cr3)]

    def invlpg(self, at: int, gva: int) -> None:
        self.vcpu.invalidated.append((at, self.vcpu.pcid, gva))

    # --- translation

    def now(self, gva: int, access: int, then: dict[int, int] | None = None) -> Translation:
        """By the tables as they are, or with some words changed; `view` has what the walk read and set."""
        return self.walk(self.vcpu.cr3, gva, access, then or {})

    def walk(self, cr3: int, gva: int, access: int, then: dict[int, int]) -> Translation:
        vcpu, view = self.vcpu, self.view
        walker = self.walkers.get(vcpu.cpu)
        if walker is None:
            walker = self.walkers[vcpu.cpu] = LoadedWalker(view, vcpu.cpu)
        walker.pdptes = vcpu.pdptes
        view.then, view.set_bits, view.seen = then, [], set()
        if not walker.paging:
            gva &= 0xFFFFFFFF
        return walker.walk(cr3, gva, access)

    def shift(self, level: int) -> int:
        """Bits of an address within a page of this level."""
        return 12 + INDEX_BITS.get(self.vcpu.cpu.mode, 9) * (level - 1)

    def covered(self, gva: int, level: int) -> int:
        """The last flush that covers a translation by a leaf of this level."""
        vcpu, shift = self.vcpu, self.shift(max(level, 1))
        events = [at for at, pcid, one in vcpu.invalidated if pcid == vcpu.pcid and one >> shift == gva >> shift]
        return max([vcpu.flushed, vcpu.flushed_pcid.get(vcpu.pcid, NEVER), *events])

    def changed(self, gva: int) -> bool:
        """Whether a word that the last walk read was stored to since the last flush that covers the page, or another root has its PCID."""
        vcpu, since = self.vcpu, self.covered(gva, 1)  # what was here may have been no large page
        for at, gpa, _ in reversed(self.journal):
            if at <= since:
                break
            if gpa in self.view.seen:
                return True
        return bool(vcpu.cpu.cr4 & int(CR4.PCIDE)) and any(cr3 != vcpu.cr3 and cr3 & PCID == vcpu.pcid for _, cr3 in vcpu.loads)

    def older(self, gva: int, access: int) -> list[Translation]:
        """Successful answers of an earlier moment that are still legal, each once."""
        vcpu = self.vcpu
        if not vcpu.cpu.cr0 & int(CR0.PG):
            return []
        spans: dict[int, list[tuple[int, int]]] = {vcpu.cr3: [(NEVER, FOREVER)]}
        for number, (at, cr3) in enumerate(vcpu.loads):  # other roots under this PCID, while they were loaded
            if cr3 != vcpu.cr3 and vcpu.cpu.cr4 & int(CR4.PCIDE) and cr3 & PCID == vcpu.pcid:
                end = vcpu.loads[number + 1][0] if number + 1 < len(vcpu.loads) else FOREVER
                spans.setdefault(cr3, []).append((at, end))
        found: dict[int, Translation] = {}
        cpu = vcpu.cpu
        for other in self.seen_as(cpu):
            vcpu.cpu = other
            for cr3, moments in spans.items():
                for walk, start, end in self.history(cr3, gva, access):
                    if not walk.ok:
                        continue
                    level = (
                        1 if self.is_device(walk.gpa, False) else walk.level
                    )  # the MMIO info cache knows no large pages (facts 4.5)
                    since = max(start, self.covered(gva, level))
                    if any(max(since, first) < min(end, last) for first, last in moments):
                        found.setdefault(walk.gpa, walk)
        vcpu.cpu = cpu
        return list(found.values())

    @staticmethod
    def seen_as(cpu: Cpu) -> list[Cpu]:
        """Registers that shadow pages may have been made under: KVM shares them between guests with and without EFER.NX, so that an
        entry with NX, which is reserved without, may be there already (facts 1.8)."""
        return [cpu] if cpu.efer & int(EFER.NX) or cpu.mode == Mode.TWO_LEVEL else [cpu, replace(cpu, efer=cpu.efer | int(EFER.NX))]

    def history(self, cr3: int, gva: int, access: int) -> Iterator[tuple[Translation, int, int]]:
        """What walks gave, newest first, and from when to when."""
        vcpu, journal = self.vcpu, self.journal
        since = max(vcpu.flushed, vcpu.flushed_pcid.get(vcpu.pcid, NEVER))
        then: dict[int, int] = {}
        end, until, stale = len(journal), FOREVER, False
        walk = self.walk(cr3, gva, access, then)
        seen = self.view.seen
        while end and journal[end - 1][0] > since:
            end -= 1
            at, gpa, old = journal[end]
            then[gpa] = old
            stale = stale or gpa in seen
            if stale and not (end and journal[end - 1][0] == at):  # all of the event is undone
                yield walk, at, until
                walk = self.walk(cr3, gva, access, then)
                seen, until, stale = self.view.seen, at, False
        yield walk, since, until
