"""The judge of streams under shadow paging: what the guest may legally see, with no cache of its own.

Beside what the tables give now, an access may go where they led at a moment since the last flush that covers the page, whoever
walked them then: shadow pages are shared by vCPUs, and neighbours are prefetched. A fault must be right now, for KVM walks the tables
before it delivers one. An access that KVM emulates is done page by page, as it finds each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, product

import numpy as np
from shadow_follower import Follower, lanes
from stream_guests import CODE, PAGE, USER, WRITE
from stream_judge import ALL, Judge, Possible, Wrong, fault_at, text
from stream_plans import Plan, Slot, slot_of

from fastmmu.bits import CR0
from fastmmu.events import Op
from fastmmu.machine_state import LogKind
from fastmmu.reference.walk import A, D, Translation

GENERAL_PROTECTION = 6  # the LogKind of that name
ACCESSES = (Op.ACCESS, Op.DEVICE, Op.LOAD, Op.WRITE, Op.EXCHANGE)
Peek = Callable[[int, int], int]  # bytes of the machine's memory: gpa, size
Part = tuple[int, int, int]  # gva, size, bytes before it


class ShadowJudge(Judge):
    """Follows a plan event by event. `peek` reads the machine's memory, as it is after the event: for those that `is_inspected`."""

    def __init__(self, plan: Plan, peek: Peek) -> None:
        super().__init__(plan)
        words = dict(plan.guest.words)
        for frame, data in plan.data().items():
            words.update(zip(range(frame, frame + PAGE, 8), np.frombuffer(data, np.uint64).tolist(), strict=True))
        self.peek = peek
        self.fixed = set(plan.guest.fixed)
        self.may = dict.fromkeys(self.fixed, A)  # by word: A and D that walks may have set since the entry was stored,
        self.must = {}  # and have
        self.follower = Follower(words, plan.cpus[0], plan.kind.vcpus)
        self.slots: dict[int, Slot] = self.follower.slots
        self.vcpus, self.vcpu = self.follower.vcpus, self.follower.vcpus[0]
        self.seen: set[int] = set()  # words that were compared with the machine's memory since they changed
        self.at = 0
        self.remembered: frozenset[int] = frozenset()  # page frames that KVM takes for a device's, though a memslot has come
        self.locked = False  # whether an exchange stores by what the tables say now: within a page, where they lead to memory
        self.came_late: set[int] = set()  # memslots that were created when the guest had run

    # --- memory

    def read(self, gpa: int, size: int) -> tuple[int, int]:
        value = self.follower.read(gpa, size)
        must, may = (self.bits(bits, gpa, size) for bits in (self.must, self.may))
        return value | must, (1 << 8 * size) - 1 & ~(may & ~(value | must))

    @staticmethod
    def bits(bits: dict[int, int], gpa: int, size: int) -> int:
        first = gpa & ~7
        return (bits.get(first, 0) | bits.get(first + 8, 0) << 64) >> 8 * (gpa - first) & (1 << 8 * size) - 1

    def write(self, gpa: int, size: int, value: int) -> None:
        for word, lane in self.follower.write(self.at, gpa, size, value):
            self.seen.discard(word)
            for bits in (self.may, self.must):
                if word in bits:
                    bits[word] &= ~lane
            if word in self.fixed:  # any exit may walk it again
                self.may[word] |= A
        self.note(gpa)

    # --- what an access may come to

    def choices(self, gva: int, access: int, changed: bool) -> list[Translation]:
        """How a page may be translated, the answer of today first."""
        found = [self.follower.now(gva, access)]
        if changed:
            found += [walk for walk in self.follower.older(gva, access) if not (found[0].ok and walk.gpa == found[0].gpa)]
        return found

    def outcomes(self, *arguments: int, stale: bool) -> Iterator[Possible]:
        """All outcomes, by today's tables alone first; then those where KVM remembers a device though a memslot has come, of one
        page or of both."""
        yield from self.outcomes_of(*arguments, stale=stale)
        if not stale or not self.came_late:
            return
        _, gva, access, size, *_ = arguments
        ends = {gva, gva + size - 1} if size else {gva}
        walks = [walk for end in ends for walk in self.choices(end, access, True) + self.choices(end, access & ~WRITE, True)]
        late = sorted({walk.gpa // PAGE for walk in walks if walk.ok and self.is_late(walk.gpa)})
        for count in (1, 2):
            for frames in combinations(late, count):
                self.remembered = frozenset(frames)
                yield from self.outcomes_of(*arguments, stale=stale)
        self.remembered = frozenset()

    def is_late(self, gpa: int) -> bool:
        slot = slot_of(self.slots, gpa)
        return slot is not None and slot.identity in self.came_late

    def is_device(self, gpa: int, write: bool) -> bool:
        return self.follower.is_device(gpa, write) or (gpa // PAGE in self.remembered and self.is_late(gpa))

    def outcomes_of(
        self, op: int, gva: int, access: int, size: int, value: int, compared: int, *, stale: bool
    ) -> Iterator[Possible]:
        part = min(size, PAGE - gva % PAGE)
        pages: list[Part] = [(gva, part, 0)] + ([(gva + part, size - part, part)] if part < size else [])
        writes = bool(access & WRITE)
        final = [self.choices(address, access, stale) for address, _, _ in pages]
        now = final[0][0]
        self.locked = op == Op.EXCHANGE and len(pages) == 1 and now.ok and not self.follower.is_device(now.gpa, True)
        for walks in product(*final):
            yield from self.outcome(op, pages, walks, walks, writes, value, compared)
        if writes and len(pages) > 1:  # the emulator stores to the first page before it looks for the second one
            yield from self.page_by_page(op, pages, final, access, value, compared)
        if op == Op.EXCHANGE:  # and reads before it writes
            reading = [self.choices(address, access & ~WRITE, stale) for address, _, _ in pages]
            for read, walks in product(product(*reading), product(*final)):
                if all(walk.ok for walk in read):
                    yield from self.outcome(op, pages, read, walks, writes, value, compared, emulated=True)
            for read in product(*reading):  # a page that it may not even read faults as one that it would write
                failed = next((i for i, walk in enumerate(read) if not walk.ok), 0)
                if failed and self.was_device(gva, stale):
                    yield fault_at(pages[failed][0], read[failed].pferr | WRITE)

    def was_device(self, gva: int, stale: bool) -> bool:
        """Whether a page may have an MMIO spte, of whatever rights. KVM emulates what comes to one without a walk (facts 4.4): where
        the rights do not suffice, the emulator is the first to ask the tables, by a read (facts 4.3.4)."""
        walks = [walk for right in (0, USER) for walk in self.choices(gva, right, stale) if walk.ok]
        return any(self.follower.is_device(walk.gpa, False) or self.is_late(walk.gpa) for walk in walks)

    def page_by_page(
        self, op: int, pages: list[Part], final: list[list[Translation]], access: int, value: int, compared: int
    ) -> Iterator[Possible]:
        """The second page by tables that the store to the first one changes."""
        size = pages[0][1]
        for first in final[0]:
            if op != Op.WRITE or not first.ok or self.follower.is_device(first.gpa, True):
                continue
            walk = self.follower.now(pages[1][0], access, self.follower.overlay(first.gpa, size, value))
            later = list(self.follower.view.set_bits)
            for one in self.outcome(op, pages, (first, walk), (first, walk), True, value, compared, emulated=True):
                yield replace(one, later=later)

    def outcome(
        self,
        op: int,
        pages: list[Part],
        read: tuple[Translation, ...],
        walks: tuple[Translation, ...],
        writes: bool,
        value: int,
        compared: int,
        *,
        emulated: bool = False,
    ) -> Iterator[Possible]:
        """What follows from these translations of the pages: for reading, and for writing or what else is done last."""

        def device(gpa: int, write: bool) -> bool:
            return self.follower.is_device(gpa, write) if write and self.locked else self.is_device(gpa, write)

        emulated = emulated or any(walk.ok and device(walk.gpa, writes) for walk in walks)
        reads = op in (Op.LOAD, Op.EXCHANGE) or (op in (Op.ACCESS, Op.DEVICE) and emulated and not writes)
        log, supply, seen, mask = [], list(self.supply), 0, 0
        if reads and all(walk.ok for walk in read):
            for (_, size, before), walk in zip(pages, read, strict=True):
                if emulated and device(walk.gpa, False):
                    data, known = (supply.pop(0) if supply else 0) & (1 << 8 * size) - 1, (1 << 8 * size) - 1
                    log.append((LogKind.MMIO_READ, size, walk.gpa, data, ALL))
                else:
                    data, known = self.read(walk.gpa, size)
                seen, mask = seen | data << 8 * before, mask | known << 8 * before
        failed = next((i for i, walk in enumerate(walks) if not walk.ok), None)
        total = sum(size for _, size, _ in pages)
        if failed is not None:
            done = fault_at(pages[failed][0], walks[failed].pferr)
            if op == Op.EXCHANGE:
                if log:
                    yield Possible([*log, *done.log], faults=True)
            yield done
            if failed == 1 and op == Op.WRITE and not device(walks[0].gpa, True):  # KVM has stored to the first page already
                gpa, size = walks[0].gpa, pages[0][1]
                yield Possible(done.log, [(gpa, size, value & (1 << 8 * size) - 1)], faults=True)
            return
        known = [(log, seen, mask, value)]
        if op == Op.EXCHANGE:
            unknown = ~mask & (1 << 8 * total) - 1
            ways = [seen == compared] if (seen ^ compared) & mask == 0 and not unknown else []
            if not ways:
                ways = [False] if (seen ^ compared) & mask else [True, False]
            known = []
            for equal in ways:
                exact = compared if equal else seen
                known.append((log, exact, (1 << 8 * total) - 1 if equal else mask, value if equal else -1))
        for rows, data, certain, new in known:
            done = Possible(list(rows))
            if writes:
                for (_, size, before), walk, source in zip(pages, walks, read, strict=True):
                    piece = -1 if new < 0 else new >> 8 * before & (1 << 8 * size) - 1
                    moved = source.gpa != walk.gpa or device(source.gpa, False)
                    if new < 0 and moved and not device(walk.gpa, True):  # it stores what it saw elsewhere
                        piece = data >> 8 * before & (1 << 8 * size) - 1
                    if device(walk.gpa, True):
                        back = data >> 8 * before & (1 << 8 * size) - 1
                        told = 0 if op in (Op.ACCESS, Op.DEVICE) else back if piece < 0 else piece
                        sure = certain >> 8 * before & (1 << 8 * size) - 1 if piece < 0 else ALL
                        done.log.append((LogKind.MMIO_WRITE, size, walk.gpa, told, sure))
                    elif op in (Op.WRITE, Op.EXCHANGE):
                        done.writes.append((walk.gpa, size, piece))
                    else:
                        done.writes.append((walk.gpa, 0, 0))
            if op in (Op.LOAD, Op.EXCHANGE):
                done.log.append((LogKind.LOADED, total, pages[0][0], data, certain))
            done.log.append((LogKind.ACCESSED, 0, pages[0][0], walks[0].gpa, ALL))
            yield done

    # --- events

    def event(self, at: int, row: np.void, compared: int, found: list[tuple[int, int, int, int]]) -> None:
        op, address, value = int(row["op"]), int(row["address"]), int(row["value"])
        self.at, follower = at, self.follower
        follower.vcpu = self.vcpu
        if op in ACCESSES:
            super().event(at, row, compared, found)
            return
        if op == Op.CR3 and not follower.load_cr3(at, value):
            self.totals["CR3"] += 1
            self.totals["general protection"] += 1
            if found != [(GENERAL_PROTECTION, 0, value, 0)]:
                raise Wrong(f"expected GENERAL_PROTECTION {value:#x}, found {text(found)}")
            return
        if found:
            raise Wrong(f"expected no log rows, found {text(found)}")
        if op not in (Op.CR3, Op.FLUSH, Op.INVLPG, Op.MODE, Op.REGISTERS, Op.SLOT_DELETE):
            super().event(at, row, compared, found)
            if op == Op.SLOT_CREATE and len(self.totals) > 1:
                self.came_late.add(self.plan.prepared[value]["slot"])
            return
        self.totals[Op(op).name] += 1
        if op == Op.FLUSH:
            follower.flush(at)
        elif op == Op.INVLPG:
            follower.invlpg(at, address)
        elif op in (Op.MODE, Op.REGISTERS):
            follower.set_registers(at, self.plan.cpus[value], by_guest=op == Op.REGISTERS)
        elif op == Op.SLOT_DELETE:  # memory keeps what it held
            del self.slots[address]
            self.written.pop(address, None)

    def store(self, at: int, gpa: int, value: int) -> None:
        if not self.follower.is_device(gpa, True):
            self.write(gpa, 8, value)

    def judge_access(
        self, at: int, op: int, gva: int, access: int, size: int, value: int, compared: int, found: list[tuple[int, int, int, int]]
    ) -> None:
        arguments = (op, gva, access, size, value, compared)
        crossing = gva % PAGE + size > PAGE
        fresh, before = self.note_may(gva, access, size)
        best, stale, first, number = None, False, None, 0
        inspected = crossing and bool(access & WRITE)
        for stale in (True,) if inspected else (False, True):
            options = list(self.outcomes(*arguments, stale=stale))
            first, number = first or options[0], len(options)
            fitting = [one for one in options if one.fits(found)]
            if inspected:
                fitting = self.agreeing_with_memory(fitting)
            if fitting:
                best = fitting[0]
                break
        if best is None:
            raise Wrong(f"expected {text(first.log)} or {number - 1} others, found {text(found)}")
        self.totals["answered by older tables"] += stale and not inspected
        self.totals["faults"] += best.faults
        self.totals["device accesses"] += sum(kind in (LogKind.MMIO_READ, LogKind.MMIO_WRITE) for kind, *_ in found)
        self.totals["over a page boundary"] += crossing
        self.totals["stored to the first page, then faulted"] += best.faults and bool(best.writes)
        del self.supply[: sum(kind == LogKind.MMIO_READ for kind, *_ in found)]
        if not best.faults:
            for gpa, bits in fresh:
                if bits & ~self.must.get(gpa, 0) & ~before[gpa]:
                    self.note(gpa)
                self.must[gpa] = self.must.get(gpa, 0) | bits
        for gpa, length, data in best.writes:
            if length == 0:
                self.note(gpa)
            elif data >= 0:
                self.totals["bytes of tables written"] += length if gpa < CODE else 0
                self.write(gpa, length, data)
            else:  # an exchange that failed stores what it saw: maybe over bits that its own walk had set since
                for word, lane, _ in lanes(gpa, length, 0):
                    self.must[word] = self.must.get(word, 0) & ~lane
                self.note(gpa)
        for gpa, bits in best.later:
            self.may[gpa] = self.may.get(gpa, 0) | bits
        if crossing:
            self.note_may(gva, access, size)

    def agreeing_with_memory(self, options: list[Possible]) -> list[Possible]:
        """Those whose stores, and no others, are in the machine's memory: which pages were stored to does not show in the log."""
        places = {(gpa, size) for one in options for gpa, size, data in one.writes if size and data >= 0}
        found = {place: self.peek(*place) for place in places}
        return [one for one in options if all(self.agrees(one, *place, seen) for place, seen in found.items())]

    def agrees(self, one: Possible, gpa: int, size: int, found: int) -> bool:
        """Whether these bytes of memory are what they would be."""
        then: dict[int, int] = {}
        stored: dict[int, int] = {}
        later: dict[int, int] = dict.fromkeys(self.fixed, A)
        for at, length, data in one.writes:
            if length and data >= 0:
                then.update(self.follower.overlay(at, length, data, then))
                for word, lane, _ in lanes(at, length, data):
                    stored[word] = stored.get(word, 0) | lane
        for word, bits in one.later:
            later[word] = later.get(word, 0) | bits
        new, after = self.bits(stored, gpa, size), self.bits(later, gpa, size)
        must, may = (self.bits(bits, gpa, size) & ~new for bits in (self.must, self.may))
        least = self.follower.read(gpa, size, then) | must
        return found & least == least and not found & ~(least | may | after)

    def note_may(self, gva: int, access: int, size: int) -> tuple[list[tuple[int, int]], dict[int, int]]:
        """A and D that an access may set: those that are set for certain if it succeeds, and what may have been set before."""
        part = min(size, PAGE - gva % PAGE)
        certain: list[tuple[int, int]] = []
        before: dict[int, int] = {}
        for address in [gva] + [gva + part] * (part < size):
            for wanted in {access, access & ~WRITE}:
                walk = self.follower.now(address, wanted)
                if not walk.ok:
                    continue
                bits = self.follower.view.set_bits
                if wanted == access and not self.follower.changed(address):
                    certain += [(gpa, mask & ~self.unsure(walk, access)) for gpa, mask in bits]
                for gpa, mask in bits:
                    before.setdefault(gpa, self.may.get(gpa, 0))
                    self.may[gpa] = self.may.get(gpa, 0) | mask
        return certain, before

    def unsure(self, walk: Translation, access: int) -> int:
        """Bits that need not be set: D by the kernel's write to a device under WP=0, for which the MMIO info cache needs no right to
        write and no walk (facts 4.3.1). An MMIO spte may outlive its memslot's creation: what syncs it makes it current (facts 5.12.4)."""
        slot = slot_of(self.slots, walk.gpa)
        kernel = not access & USER and not self.vcpu.cpu.cr0 & int(CR0.WP)
        return D | D << 32 if kernel and access & WRITE and (slot is None or slot.identity in self.came_late) else 0

    # --- what is looked at between runs

    def check_tables(self, words: np.ndarray) -> None:
        """Memory is what was stored, plus A and D that walks set."""
        for gpa, value in self.follower.words.items():
            if gpa in self.seen and gpa not in self.may:
                continue
            found = int(words[gpa >> 3])
            least, most = value | self.must.get(gpa, 0), value | self.must.get(gpa, 0) | self.may.get(gpa, 0)
            if found & least != least or found & ~most:
                raise Wrong(f"memory at {gpa:#x}: expected {least:#x} to {most:#x}, found {found:#x}")
            self.seen.add(gpa)
