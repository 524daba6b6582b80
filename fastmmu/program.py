"""The guest program of scenario files, as events: every access of its interpreter, in order (truth README, sections 4 and 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmmu.bits import PFERR
from fastmmu.checks import WORD
from fastmmu.events import EVENT, EventList, Op

R, W, X, USER = 0, int(PFERR.W), int(PFERR.F), int(PFERR.U)
IDT_PAGE_FAULT, GDT_CODE, GDT_STACK, TSS = 0x20E0, 0x1008, 0x1010, 0x3004
GDT_USER_CODE, GDT_USER_STACK = 0x1020, 0x1018
FAULT_LOG, FAULT_LOG_ROW = 0x10000, 0x10040
KERNEL_STACK = 0xA000  # top of the stack on which a fault from CPL 3 is delivered


@dataclass(frozen=True)
class Program:
    """A guest step as events, with the events that deliver and handle a #PF; `op_of[i]` is the op that event i belongs to.

    The events of a nested guest stand where its hypervisor's VMRUN does, from index `inside.start` up to `inside.stop`; there
    `op_of` counts the ops of the nested guest, whose own handler is `nested_handler`.
    """

    events: np.ndarray
    op_of: np.ndarray
    handler: np.ndarray
    inside: range
    nested_handler: np.ndarray

    def after_op(self, event: int) -> int:
        """Index of the first event of the op behind that of an event."""
        same = self.op_of[event:] == self.op_of[event]
        return event + (len(same) if same.all() else int(np.argmin(same)))


class Writer:
    """Writes the accesses of one step at one privilege level."""

    def __init__(self, step: dict[str, Any], interpreter: dict[str, int], rows: dict[int, int]) -> None:
        self.events = EventList()
        self.step, self.interpreter, self.rows = step, interpreter, rows
        self.user = USER if step["cpl"] == 3 else 0
        self.code, self.stack = step["regs"]["rip"], step["regs"]["rsp"]
        self.commands = step["regs"].get("commands")
        self.bytes = 8 if self.commands is not None else 4  # without paging the program is 32-bit

    def touch(self, gva: int, access: int) -> None:
        """An access of the interpreter itself."""
        self.events.add(Op.ACCESS, access=access | self.user, address=gva)

    def data(self, op: Op, gva: int, size: int, value: int = 0) -> None:
        """An access that an op asks for."""
        access = self.user if op == Op.LOAD else self.user | W
        self.events.add(op, access=access, address=gva, value=value, size=size)

    def fetch_command(self, number: int) -> None:
        """Rule 1: the interpreter reads its next command."""
        if self.commands is None:  # rule 7
            self.touch(self.code, X)
            return
        command = self.commands + 64 * number
        self.touch(self.code, X)
        for word in range(4):
            self.touch(command + 8 * word, R)
        self.touch(self.interpreter["jump_table"], R)
        self.touch(self.code, X)

    def loop(self, name: str, start: int, stride: int, times: int) -> np.ndarray:
        """Rules 2 and 3, all iterations at once: the events of one, with the address of each."""
        if start + stride * max(times - 1, 0) > WORD:
            raise ValueError(f"{name} from {start:#x}, stride {stride:#x}, {times} times, expected addresses below 2^64")
        once = Writer(self.step, self.interpreter, self.rows)
        once.touch(self.code, X)
        if name == "LOOPX":
            once.call(0)
        else:
            once.data(Op.LOAD if name == "LOOPR" else Op.WRITE, 0, self.bytes)
        pattern = once.events.array()
        place = next(i for i in range(1, len(pattern)) if not pattern["address"][i])  # the event whose address is the loop's
        events = np.tile(pattern, times)
        gvas = np.uint64(start) + np.arange(times, dtype=np.uint64) * np.uint64(stride)
        events["address"][place :: len(pattern)] = gvas
        if name == "LOOPW":
            events["value"][place :: len(pattern)] = gvas & np.uint64((1 << 8 * self.bytes) - 1)
        return events

    def call(self, target: int) -> None:
        """Rule 3."""
        self.touch(self.stack - 8, W)
        self.touch(target, X)
        self.touch(self.stack - 8, R)

    def vmrun(self, number: int, vmcb: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Rule 4: the events before the nested guest's, and those after them."""
        self.events = EventList()
        self.fetch_command(number)
        self.touch(self.stack - 8, W)
        self.events.add(Op.VMRUN, address=vmcb, value=rows)
        before, self.events = self.events.array(), EventList()
        self.touch(self.stack - 8, R)
        return before, self.events.array()

    def op(self, number: int, op: list[Any]) -> np.ndarray:
        """One op, as events."""
        name, gva, *rest = op
        self.events = EventList()
        self.fetch_command(number)
        if name.startswith("LOOP"):
            return np.concatenate([self.events.array(), self.loop(name, gva, *rest)])
        if name == "EXEC":
            self.call(gva)
            self.touch(self.code, X)
        elif name in ("R8", "R4"):
            self.data(Op.LOAD, gva, int(name[1]))
        elif name in ("W8", "W4"):
            self.data(Op.WRITE, gva, int(name[1]), rest[0] & ((1 << 8 * int(name[1])) - 1))
        elif name == "CMPX":
            self.data(Op.EXCHANGE, gva, 8, rest[0])
            self.events.add(Op.OPERAND, value=rest[1])
        elif name == "INVLPG":
            self.events.invlpg(gva)
        elif name == "CR3":
            self.events.cr3(gva)
        elif name == "CR0":
            self.events.add(Op.REGISTERS, value=self.rows[number])
        if name in ("R8", "R4", "CMPX"):
            self.touch(self.commands + 64 * number + 32, W)
        return self.events.array()

    def end(self, number: int, leaves: Op = Op.EXIT) -> np.ndarray:
        """Rule 5: one more command, then OUT to user space, or VMMCALL to the hypervisor."""
        self.events = EventList()
        self.fetch_command(number)
        self.events.add(leaves)
        return self.events.array()

    def handler(self) -> np.ndarray:
        """Rule 6: delivery of a #PF, the guest's handler, IRET; all at CPL 0."""
        from_user, self.user, self.events = self.user, 0, EventList()
        stack = (KERNEL_STACK if from_user else self.stack) - 8
        descriptors = (GDT_USER_CODE, GDT_USER_STACK) if from_user else (GDT_CODE, GDT_STACK)
        accesses = [(IDT_PAGE_FAULT, R), (GDT_CODE, R)] + [(TSS, R)] * bool(from_user) + [(stack, W)] * 6
        accesses += [(self.code, X), (stack, W), (FAULT_LOG, R), (FAULT_LOG, W), (FAULT_LOG_ROW, W)]
        accesses += [(stack, R), (stack, W), (stack, R), (descriptors[0], R), (stack, R), (descriptors[1], R)]
        for gva, access in accesses:
            self.touch(gva, access)
        self.user = from_user
        self.touch(self.code, X)
        return self.events.array()


@dataclass(frozen=True)
class Nested:
    """A nested guest's part of a step: its registers and ops as those of a step, and the rows for its VMRUN and its CR0 ops."""

    step: dict[str, Any]
    vmrun: int
    rows: dict[int, int]


def write_program(
    step: dict[str, Any], interpreter: dict[str, int], rows: dict[int, int], nested: Nested | None = None
) -> Program:
    """The events of a guest step; `rows` gives, by op number, the machine's register row that a CR0 op loads.

    Raises:
        ValueError: an access beyond 2^64.
    """
    writer = Writer(step, interpreter, rows)
    parts: list[tuple[int, np.ndarray]] = []
    inside, handler = range(0), np.zeros(0, EVENT)
    for number, op in enumerate(step["ops"]):
        if op[0] != "VMRUN" or nested is None:
            parts.append((number, writer.op(number, op)))
            continue
        within = Writer(nested.step, interpreter, nested.rows)
        ops = nested.step["ops"]
        their = [within.op(i, one) for i, one in enumerate(ops)] + [within.end(len(ops), Op.VMEXIT)]
        before, after = writer.vmrun(number, op[1], nested.vmrun)
        parts.append((number, before))
        start = sum(len(part) for _, part in parts)
        parts += list(enumerate(their))
        inside, handler = range(start, start + sum(map(len, their))), within.handler()
        parts.append((number, after))
    parts.append((len(step["ops"]), writer.end(len(step["ops"]))))
    op_of = np.repeat([number for number, _ in parts], [len(part) for _, part in parts])
    return Program(np.concatenate([part for _, part in parts]), op_of, writer.handler(), inside, handler)
