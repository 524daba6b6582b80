"""The guest program of scenario files, as events: every access of its interpreter, in order (truth README, sections 4 and 6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastmmu.bits import PFERR
from fastmmu.events import EventList, Op

R, W, X, USER = 0, int(PFERR.W), int(PFERR.F), int(PFERR.U)
IDT_PAGE_FAULT, GDT_CODE, GDT_STACK, TSS = 0x20E0, 0x1008, 0x1010, 0x3004
GDT_USER_CODE, GDT_USER_STACK = 0x1020, 0x1018
FAULT_LOG, FAULT_LOG_ROW = 0x10000, 0x10040
KERNEL_STACK = 0xA000  # top of the stack on which a fault from CPL 3 is delivered


@dataclass
class Program:
    """A guest step as events, with the events that deliver and handle a #PF; `op_of[i]` is the op that event i belongs to."""

    events: np.ndarray
    op_of: list[int]
    handler: np.ndarray
    results: list[tuple[int, Any]] = field(default_factory=list)  # (op, value that it loaded; None when it faulted)

    def after_op(self, op: int) -> int:
        """Index of the first event of the op behind `op`."""
        return next((i for i, number in enumerate(self.op_of) if number > op), len(self.op_of))


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

    def loop(self, name: str, start: int, stride: int, times: int) -> None:
        """Rules 2 and 3."""
        for i in range(times):
            gva = start + i * stride
            self.touch(self.code, X)
            if name == "LOOPR":
                self.data(Op.LOAD, gva, self.bytes)
            elif name == "LOOPW":
                self.data(Op.WRITE, gva, self.bytes, gva & ((1 << 8 * self.bytes) - 1))
            else:
                self.call(gva)

    def call(self, target: int) -> None:
        """Rule 3."""
        self.touch(self.stack - 8, W)
        self.touch(target, X)
        self.touch(self.stack - 8, R)

    def op(self, number: int, op: list[Any]) -> None:
        """One op."""
        name, gva, *rest = op
        self.fetch_command(number)
        if name.startswith("LOOP"):
            self.loop(name, gva, *rest)
        elif name == "EXEC":
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


def write_program(step: dict[str, Any], interpreter: dict[str, int], rows: dict[int, int]) -> Program:
    """The events of a guest step; `rows` gives, by op number, the machine's register row that a CR0 op loads."""
    writer = Writer(step, interpreter, rows)
    op_of: list[int] = []
    for number, op in enumerate(step["ops"]):
        writer.op(number, op)
        op_of += [number] * (len(writer.events) - len(op_of))
    writer.fetch_command(len(step["ops"]))
    writer.events.add(Op.EXIT)  # rule 5: OUT to user space
    op_of += [len(step["ops"])] * (len(writer.events) - len(op_of))
    return Program(writer.events.array(), op_of, writer.handler())
