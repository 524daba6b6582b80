"""Replay of an event stream by the reference walker, with the four MMIO caches as plain classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fastmmu.paging import Cpu
from fastmmu.reference.walk import ACC_U, ACC_W, PFERR_F, PFERR_P, PFERR_RSVD, PFERR_U, PFERR_W, Memory, Translation, Walker

PAGE = ~0xFFF
WORD = (1 << 64) - 1
UPDATING = 1 << 63
ACCESS, DEVICE, STORE, CR3, INVLPG, FLUSH, GENERATION = range(7)


class NoCache:
    """Every device access walks."""

    filled: tuple[int, int] | None = None  # (page of the gva, page of the gpa)

    def look_up(self, vcpu: Vcpu, gva: int, access: int) -> str:
        """'hit', or the name of the counter that says why not."""
        return "no_cache"

    def fill(self, vcpu: Vcpu, gva: int, walk: Translation) -> bool:
        """Remember a walk; False if nothing was."""
        return False

    def clear(self) -> bool:
        """The guest flushed the page; True if something was forgotten."""
        return False


class GvaOnly(NoCache):
    """The patch as posted in June 2011: the last page, its access, and no way to forget."""

    def __init__(self) -> None:
        self.filled = None
        self.access = 0
        self.forgot = False

    def look_up(self, vcpu: Vcpu, gva: int, access: int) -> str:
        if self.filled is None or self.filled[0] == 0:
            return "miss_cleared" if self.forgot else "miss_cold"
        if self.filled[0] != gva & PAGE:
            return "miss_other_page"
        return "miss_permission" if access & PFERR_F or self.denies(vcpu, access) else "hit"

    def denies(self, vcpu: Vcpu, access: int) -> bool:
        """A write needs a writable page, user code a user page."""
        return bool(access & PFERR_W and not self.access & ACC_W) or bool(access & PFERR_U and not self.access & ACC_U)

    def fill(self, vcpu: Vcpu, gva: int, walk: Translation) -> bool:
        self.filled = (gva & PAGE, walk.gpa & PAGE)
        self.access = walk.access & (ACC_W | ACC_U)
        return True


class GvaCr3(GvaOnly):
    """As the review asked: an entry belongs to an address space."""

    def look_up(self, vcpu: Vcpu, gva: int, access: int) -> str:
        answer = super().look_up(vcpu, gva, access)
        return "miss_other_page" if answer in ("hit", "miss_permission") and vcpu.cr3 != self.cr3 else answer

    def fill(self, vcpu: Vcpu, gva: int, walk: Translation) -> bool:
        self.cr3 = vcpu.cr3
        return super().fill(vcpu, gva, walk)


class Generation(GvaOnly):
    """KVM of today (facts 4): tagged with the memslot generation, forgotten when the guest flushes, full permission check."""

    def look_up(self, vcpu: Vcpu, gva: int, access: int) -> str:
        answer = super().look_up(vcpu, gva, access)
        return "miss_generation" if answer in ("hit", "miss_permission", "miss_other_page") and self.stale(vcpu) else answer

    def stale(self, vcpu: Vcpu) -> bool:
        """Whether the memslots changed since the fill."""
        return self.generation != vcpu.generation

    def denies(self, vcpu: Vcpu, access: int) -> bool:
        return vcpu.walker.denied(bool(self.access & ACC_U), bool(self.access & ACC_W), False, access)

    def fill(self, vcpu: Vcpu, gva: int, walk: Translation) -> bool:
        if vcpu.generation & UPDATING:
            return False
        self.generation = vcpu.generation
        return super().fill(vcpu, gva, walk)

    def clear(self) -> bool:
        forgotten = self.filled is not None and self.filled[0] != 0
        self.filled = None
        self.forgot = self.forgot or forgotten
        return forgotten


CACHES = {"none": NoCache, "gva-only": GvaOnly, "gva+cr3": GvaCr3, "generation": Generation}


@dataclass
class Vcpu:
    """Registers that events change."""

    walker: Walker
    cr3: int
    generation: int = 0


class Replay:
    """One replay; after `run`: `counters`, `digests` and the memory."""

    def __init__(self, cpu: Cpu, slots: list[tuple[int, int, str]], words: dict[int, int], strategy: str) -> None:
        self.memory = Memory(sorted(slots, key=lambda slot: slot[0] - slot[1]), dict(words))
        self.vcpu = Vcpu(Walker(self.memory, cpu), cpu.cr3)
        self.cache = CACHES[strategy]()
        self.counters: Counter[str] = Counter()
        self.digests = {"all": 0, "device": 0}
        self.legal: set[int] = set()  # kinds of access for which the cached answer is still legal

    def run(self, events: list[tuple[int, ...]]) -> None:
        """Replay rows of (op, access, checked, size, record, address, value)."""
        for op, access, _, _, _, address, value in events:
            if op == ACCESS:
                self.answer(self.walk(address, access), "all")
            elif op == DEVICE:
                self.answer(self.device(address, access), "all", "device")
            elif op == STORE:
                self.counters["table_stores"] += 1
                self.memory.words[address] = value
                if self.cache.filled:
                    self.legal |= self.granted_today()
            elif op == CR3:
                self.counters["cr3_loads"] += 1
                self.vcpu.cr3 = value
                self.flush()
            elif op == INVLPG:
                self.counters["invlpgs"] += 1
                self.flush(address)
            elif op == FLUSH:
                self.counters["invlpgs"] += 1
                self.flush()
            elif op == GENERATION:
                self.counters["generation_changes"] += 1
                self.vcpu.generation = value

    def walk(self, gva: int, access: int) -> Translation:
        """A counted walk of the guest's tables."""
        self.counters["records"] += 1
        self.counters["guest_walks"] += 1
        walk = self.vcpu.walker.walk(self.vcpu.cr3, gva, access)
        self.counters["faults"] += not walk.ok
        if walk.pferr & (PFERR_P | PFERR_RSVD) == PFERR_P and self.cache.filled and self.cache.filled[0] == gva & PAGE:
            self.counters["clears"] += self.cache.clear()  # the injected fault invalidates its address (facts 1.9)
        return walk

    def device(self, gva: int, access: int) -> Translation:
        """A device access: from the cache, or by a walk that fills it."""
        self.counters["device_accesses"] += 1
        found = self.cache.look_up(self.vcpu, gva, access)
        if found == "hit":
            self.counters["hits"] += 1
            self.counters["records"] += 1
            return self.delivered(self.cache.filled[1] | gva & 0xFFF, gva, access)
        if found != "no_cache":
            self.counters[found] += 1
        self.counters["device_walks"] += 1
        walk = self.walk(gva, access)
        if walk.ok and self.memory.kind(walk.gpa) is None and self.cache.fill(self.vcpu, gva, walk):
            self.legal = self.granted_today()
        return walk

    def delivered(self, gpa: int, gva: int, access: int) -> Translation:
        """Judge an answer of the cache."""
        today = self.vcpu.walker.walk(self.vcpu.cr3, gva, access, update=False)
        if not today.ok or today.gpa != gpa:
            if access & (PFERR_W | PFERR_U) in self.legal:
                self.counters["stale_legal"] += 1
            else:
                self.counters["wrong"] += 1
                self.counters["granted_to_user"] += bool(access & PFERR_U) and not today.ok
        return Translation(True, gpa)

    def granted_today(self) -> set[int]:
        """Kinds of access for which today's tables give the cached answer."""
        gva, gpa = self.cache.filled
        walks = {kind: self.vcpu.walker.walk(self.vcpu.cr3, gva, kind, update=False) for kind in (0, 2, 4, 6)}
        return {kind for kind, walk in walks.items() if walk.ok and walk.gpa & PAGE == gpa}

    def flush(self, gva: int | None = None) -> None:
        """The guest flushed the page of `gva`, or everything."""
        if not self.cache.filled or (gva is not None and gva & PAGE != self.cache.filled[0]):
            return
        self.counters["clears"] += self.cache.clear()
        if self.cache.filled:
            self.legal = self.granted_today()

    def answer(self, walk: Translation, *digests: str) -> None:
        """Continue the digests: rotate left by 5, xor the gpa, or the error code with bit 63 set."""
        word = walk.gpa if walk.ok else walk.pferr | 1 << 63
        for name in digests:
            digest = self.digests[name]
            self.digests[name] = (digest << 5 & WORD | digest >> 59) ^ word
