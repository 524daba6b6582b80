"""The text of KVM's tracepoints, as `perf script`, `trace-cmd report` and ftrace print them, or without their prefix.

An access is a `kvm_page_fault` that KVM resolved, or a `kvm_mmio`; one that is both is one access. What stands between two faults
of one task tells where the first one went: `kvm_mmu_spte_requested`, the walk of the guest's tables, `kvm_inj_exception`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fastmmu.bits import PAGE_SIZE, PFERR
from fastmmu.importers.block import HIGHEST_GPA, NO_ADDRESS, Block, canonical
from fastmmu.importers.rows import FETCH, FLAG, READ, WRITE, Rows
from fastmmu.importers.source import Source

FAULT, MMIO, REQUESTED, EXCEPTION = "kvm_page_fault", "kvm_mmio", "kvm_mmu_spte_requested", "kvm_inj_exception"
WALK, ELEMENT, MATCH = "kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "vcpu_match_mmio"
GPA, GVA, AUTO = "gpa", "gva", "auto"

BARE = re.compile(rb"\s*(?:[a-z][a-z0-9_]*:)?([A-Za-z_]\w*): ?(.*)")
PREFIX = re.compile(
    rb"\s*\S.*?[\s-]+(?P<pid>\d+)(?:/\d+)?\s+"  # comm and pid
    rb"(?:\(\s*[\d-]+\)\s+)?(?:\[\d+\]\s+)?"  # (tgid), [cpu]
    rb"(?:[A-Za-z0-9.#+]{4,9}\s+)?"  # flags of ftrace
    rb"\d+(?:\.\d+)?:\s+(?:\d+\s+)?"  # time, count
    rb"(?:[a-z]\w*:)?(?P<event>[A-Za-z_]\w*):\s*(?P<rest>.*)"
)
STACK = re.compile(rb"\s+[0-9a-f]{6,16}\s+\S|\s*<stack trace>|\s*=> ")
TOOL = re.compile(rb"\s*(?:$|cpus=\d+|version = |CPU \d+ is empty|CPU:?\s*\d+ \[.*EVENTS.*\])")
LONGEST_LINE = 2_000
SECTION = re.compile(rb"#\s*(npt[01])\b")
FAULT_FIELDS = re.compile(rb"(?:.*\s)?address (?:0x)?([0-9a-fA-F]{1,16}),?\s+error_code (?:0x)?([0-9a-fA-F]{1,16})\b")
MMIO_FIELDS = re.compile(rb"mmio (read|write|unsatisfied-read) len (\d{1,4}) gpa (?:0x)?([0-9a-fA-F]{1,16})\b")
REQUESTED_FIELDS = re.compile(rb"gfn (?:0x)?([0-9a-fA-F]{1,13}) ")
WALK_FIELDS = re.compile(rb"addr (?:0x)?([0-9a-fA-F]{1,16}) ")
ELEMENT_FIELDS = re.compile(rb"pte (?:0x)?([0-9a-fA-F]{1,16}) level (\d)")
MATCH_FIELDS = re.compile(rb"gva (?:0x)?([0-9a-fA-F]{1,16}) gpa (?:0x)?([0-9a-fA-F]{1,16})\b")

EPT_LINEAR = 1 << 7  # of an exit qualification, which stands in the place of an error code under EPT: bits 2:0 are R, W, X
OF_GPA = int(PFERR.GUEST_FINAL | PFERR.GUEST_PAGE)
OFFSET = PAGE_SIZE - 1
LARGEST_MMIO = 4096


@dataclass
class Fault:
    """A fault that waits for what comes of it."""

    address: int
    kind: int
    flags: int
    guest_physical: bool
    gpa: int = NO_ADDRESS
    refused: bool = False


@dataclass
class Task:
    """What is known of one task, which is one vCPU."""

    fault: Fault | None = None
    walked: int = NO_ADDRESS  # the address of the walk in progress
    unsatisfied: set[int] = field(default_factory=set)
    gva_of: dict[int, int] = field(default_factory=dict)  # page by page, since the last fault


class Tracepoints:
    """A reader of tracepoint text.

    Attributes:
        skipped: tracepoints and lines that say nothing of an access, by name.
        seen: records by what their address was.
    """

    def __init__(self, source: Source, address: str, take: Callable[[Rows, int], object]) -> None:
        """`address` is GPA, GVA, or AUTO: by section line, else by error code."""
        self._source, self._address, self._section = source, address, AUTO
        self._block = Block(take)
        self._tasks: dict[bytes, Task] = {}
        self._gva_of: dict[int, int] = {}  # gva page by gpa page of devices, ever
        self._last_physical = address != GVA
        self.skipped: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def read(self) -> None:
        """Read it all.

        Raises:
            TraceError: FILE:LINE: what was expected.
        """
        handlers: dict[bytes, Callable[[Task, bytes], bool]] = {
            FAULT.encode(): self._on_fault,
            MMIO.encode(): self._on_mmio,
            REQUESTED.encode(): self._on_requested,
            EXCEPTION.encode(): self._on_exception,
            WALK.encode(): self._on_walk,
            ELEMENT.encode(): self._on_element,
            MATCH.encode(): self._on_match,
        }
        for chunk in self._source.chunks():
            lines = chunk.split(b"\n")[:-1]
            for number, line in enumerate(lines, self._source.line):
                task, event, rest = self._split(line, number)
                handler = handlers.get(event)
                if handler is None:
                    continue
                if task not in self._tasks:
                    self._tasks[task] = Task()
                if not handler(self._tasks[task], rest):
                    self._source.fail_line(number, line, EXPECTED[event.decode()])
            self._source.line += len(lines)
        for one in self._tasks.values():
            self._resolve(one)
        self._block.flush()

    def _split(self, line: bytes, number: int) -> tuple[bytes, bytes, bytes]:
        """A line as (task, tracepoint, fields); the tracepoint is empty where the line is none."""
        if line[:1] == b"#":
            section = SECTION.match(line)
            if section:
                self._section = GPA if section[1] == b"npt1" else GVA
            self.skipped["comments"] += 1
            return b"", b"", b""
        if len(line) > LONGEST_LINE:  # the patterns take time that grows with the square of the length
            self._source.fail_line(number, line, f"a line of at most {LONGEST_LINE:,} bytes")
        found = PREFIX.match(line)
        if found:
            task, event, rest = found["pid"], found["event"], found["rest"]
        else:
            for pattern, what in ((TOOL, "lines of the tracing tool"), (STACK, "lines of call stacks")):
                if pattern.match(line):
                    self.skipped[what] += 1
                    return b"", b"", b""
            bare = BARE.match(line)
            if not bare:
                expected = "a tracepoint: its name, a colon and its fields, after the tool's prefix if there is one"
                self._source.fail_line(number, line, expected)
            task, event, rest = b"", bare[1], bare[2]
        if event.decode() not in EXPECTED:
            self.skipped[event.decode()] += 1
        return task, event, rest

    def _on_fault(self, task: Task, rest: bytes) -> bool:
        found = FAULT_FIELDS.match(rest)
        if not found:
            return False
        address, code = int(found[1], 16), int(found[2], 16)
        qualification = code & EPT_LINEAR and not code & OF_GPA
        how = self._address if self._address != AUTO else self._section
        physical = how == GPA or (how == AUTO and bool(qualification or code & OF_GPA))
        if not canonical(address) or (physical and address >= HIGHEST_GPA):
            return False
        self._resolve(task)
        if qualification and physical:
            kind = WRITE if code & 2 else FETCH if code & 4 else READ
        else:
            kind = WRITE if code & int(PFERR.W) else FETCH if code & int(PFERR.F) else READ
        user = not physical and code & int(PFERR.U)
        task.fault = Fault(address, kind, int(FLAG.USER) if user else 0, physical, address if physical else NO_ADDRESS)
        task.gva_of.clear()
        self._last_physical = physical
        return True

    def _on_requested(self, task: Task, rest: bytes) -> bool:
        found = REQUESTED_FIELDS.match(rest)
        if not found:
            return False
        if task.fault:
            self._learn(task, task.fault.address, int(found[1], 16) << 12)
        return True

    def _on_exception(self, task: Task, rest: bytes) -> bool:
        if b"#PF" in rest and task.fault and not task.fault.guest_physical:
            task.fault.refused = True
        return True

    def _on_walk(self, task: Task, rest: bytes) -> bool:
        found = WALK_FIELDS.match(rest)
        if found:
            task.walked = int(found[1], 16)
        return bool(found)

    def _on_element(self, task: Task, rest: bytes) -> bool:
        found = ELEMENT_FIELDS.match(rest)
        if not found:
            return False
        entry, level = int(found[1], 16), int(found[2])
        if task.walked != NO_ADDRESS and entry & 1 and (level == 1 or (level <= 3 and entry & 0x80)):
            low = (1 << 12 + 9 * (level - 1)) - 1
            self._learn(task, task.walked, entry & 0xFFFFFFFFFF000 & ~low | task.walked & low)
            task.walked = NO_ADDRESS
        return True

    def _on_match(self, task: Task, rest: bytes) -> bool:
        found = MATCH_FIELDS.match(rest)
        if found:
            self._learn(task, int(found[1], 16), int(found[2], 16))
        return bool(found)

    def _learn(self, task: Task, gva: int, gpa: int) -> None:
        """A gva goes to a gpa: the fault's, if it is of that page and was not told yet, or a device's."""
        if gpa >= HIGHEST_GPA:
            return
        fault = task.fault
        task.gva_of[gpa >> 12] = gva >> 12
        if fault and not fault.guest_physical and fault.address >> 12 == gva >> 12:
            fault.gpa = gpa & ~OFFSET | fault.address & OFFSET

    def _on_mmio(self, task: Task, rest: bytes) -> bool:
        found = MMIO_FIELDS.match(rest)
        if not found:
            return False
        gpa, size = int(found[3], 16), int(found[2])
        if gpa >= HIGHEST_GPA or not 0 < size <= LARGEST_MMIO:
            return False
        if found[1] == b"read" and gpa in task.unsatisfied:
            task.unsatisfied.discard(gpa)  # the end of an access that has been told
            self.skipped["kvm_mmio, the end of an unsatisfied read"] += 1
            return True
        if found[1] == b"unsatisfied-read":
            task.unsatisfied.add(gpa)
        self._device(task, gpa, min(size, PAGE_SIZE - (gpa & OFFSET)), WRITE if found[1] == b"write" else READ)
        return True

    def _device(self, task: Task, gpa: int, size: int, kind: int) -> None:
        """A record of a device access; it takes the place of the fault that led to it."""
        fault, page, flags = task.fault, gpa >> 12, int(FLAG.DEVICE)
        if fault and fault.gpa != NO_ADDRESS and fault.gpa >> 12 != page:
            self._resolve(task)
            fault = None
        if fault:
            flags |= fault.flags
            gva = gpa if fault.guest_physical else fault.address & ~OFFSET | gpa & OFFSET
            task.fault = None
        elif self._last_physical:
            gva = gpa
        else:
            known = task.gva_of.get(page, self._gva_of.get(page))
            if known is None or not canonical(known << 12):
                self.skipped["kvm_mmio without a virtual address"] += 1
                return
            gva = known << 12 | gpa & OFFSET
        self._gva_of[page] = gva >> 12
        self.seen["device accesses"] += 1
        self._block.add(gva, kind, size, gpa, flags)

    def _resolve(self, task: Task) -> None:
        """A record of the fault that waits, unless it was the guest's own."""
        fault, task.fault = task.fault, None
        if fault is None:
            return
        if fault.refused:
            self.skipped["kvm_page_fault that the guest got as its own"] += 1
            return
        self.seen["faults by gpa" if fault.guest_physical else "faults by gva"] += 1
        if fault.gpa == NO_ADDRESS:
            self.seen["faults by gva whose gpa is not told"] += 1
        self._block.add(fault.address, fault.kind, 1, fault.gpa, fault.flags)


EXPECTED = {
    FAULT: f"kvm_page_fault: address and error_code in hexadecimal (a canonical gva, or a gpa below {HIGHEST_GPA:#x})",
    MMIO: f"kvm_mmio: mmio read, write or unsatisfied-read, len, gpa below {HIGHEST_GPA:#x}",
    REQUESTED: "kvm_mmu_spte_requested: gfn in hexadecimal",
    EXCEPTION: "kvm_inj_exception: the exception",
    WALK: "kvm_mmu_pagetable_walk: addr in hexadecimal",
    ELEMENT: "kvm_mmu_paging_element: pte in hexadecimal and level",
    MATCH: "vcpu_match_mmio: gva and gpa in hexadecimal",
}
