"""The judge of random streams: follows a plan in plain Python and says which log rows are possible."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from stream_guests import CODE, LOG, PAGE, READONLY, RSVD, WRITE, TableMemory
from stream_plans import Plan, Slot, slot_of

from fastmmu.events import Op
from fastmmu.machine_state import LogKind
from fastmmu.paging import Cpu
from fastmmu.reference.walk import A, Translation

Row = tuple[int, int, int, int, int]  # kind, size, address, value, mask of the value's bits that are known
Page = tuple[Translation, bool]  # how a page is translated, and whether by the tables as they are now
ALL = 2**64 - 1


@dataclass
class Possible:
    """What an access may come to: its log, and the bytes that it writes."""

    log: list[Row]
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # gpa, size, value; to memory
    faults: bool = False
    later: list[tuple[int, int]] = field(default_factory=list)  # A and D that may be set after the writes: gpa of a word, bits

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
