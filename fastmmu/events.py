"""The event stream: what a virtual machine sees, one row per event, in order."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Op(IntEnum):
    """Operation codes of events."""

    ACCESS = 0  # address: gva, access: PFERR bits; a load, store or fetch of memory
    DEVICE = 1  # the same, of a device: the access that exits to the hypervisor's emulator
    STORE = 2  # address: gpa of a page-table entry, value: its new content
    CR3 = 3  # value: MOV to CR3, flushing
    INVLPG = 4  # address: gva
    FLUSH = 5  # INVLPG whose operand is unknown, or INVPCID: everything is flushed
    GENERATION = 6  # value: memslot generation, bit 63 while the update is in progress


EVENT = np.dtype([
    ("op", np.uint8),
    ("access", np.uint8),
    ("checked", np.uint8),  # 1: value is the gpa that the access must translate to
    ("record", np.uint32),  # where it came from, for messages
    ("address", np.uint64),
    ("value", np.uint64),
])  # fmt: skip
"""One event, 23 bytes of fields in a packed row."""


class EventList:
    """Builder of a small event stream, one method per operation; `array()` is what `replay` takes."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int, int]] = []

    def _add(self, op: Op, access: int = 0, address: int = 0, value: int = 0) -> EventList:
        self._rows.append((op, access, 0, len(self._rows), address, value))
        return self

    def access(self, gva: int, access: int) -> EventList:
        """Access to memory."""
        return self._add(Op.ACCESS, access, gva)

    def device(self, gva: int, access: int) -> EventList:
        """Access to a device."""
        return self._add(Op.DEVICE, access, gva)

    def store(self, gpa: int, value: int) -> EventList:
        """Store of a page-table entry."""
        return self._add(Op.STORE, address=gpa, value=value)

    def cr3(self, value: int) -> EventList:
        """MOV to CR3."""
        return self._add(Op.CR3, value=value)

    def invlpg(self, gva: int) -> EventList:
        """INVLPG of one page."""
        return self._add(Op.INVLPG, address=gva)

    def flush(self) -> EventList:
        """Flush of everything."""
        return self._add(Op.FLUSH)

    def generation(self, value: int) -> EventList:
        """A new memslot generation."""
        return self._add(Op.GENERATION, value=value)

    def array(self) -> np.ndarray:
        """The stream as an array of EVENT rows."""
        return np.array(self._rows, EVENT)
