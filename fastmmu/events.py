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
    # The machine of machine.py only: guest
    LOAD = 7  # address: gva, size in bytes; what it reads goes to the log
    WRITE = 8  # address: gva, size, value: a store of data
    EXCHANGE = 9  # address: gva, size, value: new; the value of the OPERAND event behind it: what is compared
    OPERAND = 10
    VCPU = 11  # value: the vCPU that the following events belong to
    EXIT = 12  # the guest leaves by an I/O exit, the end of a run
    # and host
    MODE = 13  # value: row of the machine's register table (KVM_SET_SREGS)
    REGISTERS = 14  # the same row, loaded by the guest itself (MOV to CR0 or CR4, WRMSR of EFER)
    SLOT_CREATE = 15  # value: row of the machine's prepared memslots
    SLOT_DELETE = 16  # address: id of the memslot
    SLOT_FLAGS = 17  # address: id of the memslot, value: SlotFlag bits
    DIRTY_GET = 18  # address: id of the memslot; the bitmap is left in the slot's report
    DIRTY_CLEAR = 19  # address: id of the memslot; the bits to clear are taken from the slot's report
    UNMAP = 20  # address to value, bytes, were unmapped by the host (mmu notifier)
    PAGE_LIMIT = 21  # value: limit of shadow pages (KVM_SET_NR_MMU_PAGES)
    PARAMETER = 22  # address: a VmWord, value: what it becomes
    AGE = 23  # the host asks whether address to value, bytes, was used (mmu notifier, clear_flush_young)
    # the guest as a hypervisor
    VMRUN = 24  # address: gpa of the VMCB, value: row that Machine.prepare_vmrun() gave
    VMEXIT = 25  # the nested guest leaves by itself (VMMCALL); where a fault of it goes to its hypervisor, what follows it goes on
    INVEPT = 26  # value: the EPTP whose translations the hypervisor drops, or 0 for all


EVENT = np.dtype([
    ("op", np.uint8),
    ("access", np.uint8),
    ("checked", np.uint8),  # 1: value is the gpa that the access must translate to
    ("size", np.uint8),  # bytes of a LOAD, WRITE or EXCHANGE
    ("record", np.uint32),  # where it came from, for messages
    ("address", np.uint64),
    ("value", np.uint64),
])  # fmt: skip
"""One event, a row of 24 bytes."""


class EventList:
    """Builder of an event stream; `array()` is what `replay` and `Machine.run` take. `add` takes any event, the other methods are
    short for common ones.

    Example:
        >>> from fastmmu import USER, EventList, Op
        >>> events = EventList().cr3(0x1000).device(0x1008, USER).invlpg(0x1000).add(Op.AGE, address=0, value=1 << 20)
        >>> len(events)
        4
        >>> [Op(op).name for op in events.array()["op"]]
        ['CR3', 'DEVICE', 'INVLPG', 'AGE']
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int, int, int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, op: Op, *, access: int = 0, address: int = 0, value: int = 0, size: int = 0) -> EventList:
        """Any event."""
        self._rows.append((op, access, 0, size, len(self._rows), address, value))
        return self

    def each_vcpu(self, count: int, op: Op, *, value: int = 0) -> EventList:
        """The same event on each of the first `count` vCPUs; the last one to follow is vCPU 0."""
        for number in reversed(range(count)):
            self.add(Op.VCPU, value=number).add(op, value=value)
        return self

    def access(self, gva: int, access: int) -> EventList:
        """Access to memory."""
        return self.add(Op.ACCESS, access=access, address=gva)

    def device(self, gva: int, access: int) -> EventList:
        """Access to a device."""
        return self.add(Op.DEVICE, access=access, address=gva)

    def store(self, gpa: int, value: int) -> EventList:
        """Store of a page-table entry."""
        return self.add(Op.STORE, address=gpa, value=value)

    def cr3(self, value: int) -> EventList:
        """MOV to CR3."""
        return self.add(Op.CR3, value=value)

    def invlpg(self, gva: int) -> EventList:
        """INVLPG of one page."""
        return self.add(Op.INVLPG, address=gva)

    def flush(self) -> EventList:
        """Flush of everything."""
        return self.add(Op.FLUSH)

    def generation(self, value: int) -> EventList:
        """A new memslot generation."""
        return self.add(Op.GENERATION, value=value)

    def array(self) -> np.ndarray:
        """The stream as an array of EVENT rows.

        Raises:
            ValueError: a column that does not fit into its field.
        """
        try:
            return np.array(self._rows, EVENT)
        except (OverflowError, TypeError, ValueError):
            for at, row in enumerate(self._rows):
                for name, value in zip(EVENT.names or (), row, strict=True):
                    limit = 1 << 8 * EVENT[name].itemsize
                    if not isinstance(value, (int, np.integer)) or not 0 <= value < limit:
                        raise ValueError(f"event {at}: {name} {value!r}, expected an int below {limit:#x}") from None
            raise
