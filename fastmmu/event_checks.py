"""What may reach the kernel that replays events: compiled code checks no bounds, so every column is checked here, with NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from fastmmu.bits import CR3, PAGE_SIZE, PFERR, PHYSICAL_LIMIT, field
from fastmmu.events import EVENT, Op
from fastmmu.machine_state import SlotFlag, VmWord

ACCESSES = (Op.ACCESS, Op.DEVICE, Op.LOAD, Op.WRITE, Op.EXCHANGE)
DATA = (Op.LOAD, Op.WRITE, Op.EXCHANGE)
SLOT_EVENTS = (Op.SLOT_CREATE, Op.SLOT_DELETE, Op.SLOT_FLAGS, Op.DIRTY_GET, Op.DIRTY_CLEAR)
PARAMETERS = (VmWord.NX_HUGE_PAGES, VmWord.EAGER_PAGE_SPLIT, VmWord.FORCE_SYNC_ON_REUSE)
"""Module parameters that may change while a VM runs."""


@dataclass(frozen=True)
class MemslotInfo:
    """A memslot as Python follows it: byte addresses, flags, and its row among the prepared ones."""

    start: int
    end: int
    flags: int
    row: int


@dataclass(frozen=True)
class Limits:
    """What bounds the events of a machine: bits of addresses, whether CR4.PCIDE occurs, how many vCPUs, which rows of registers
    are a processor's, what prepare_vmrun() gave, whether there are nested guests and whether they have EPT."""

    maxphyaddr: int
    width: int
    pcids: bool
    vcpus: int
    registers: np.ndarray
    vmruns: np.ndarray
    nested: bool
    ept: bool


def refuse_event(events: np.ndarray, at: int, column: str, expected: str) -> NoReturn:
    """Name the event, the column and what was expected."""
    op = int(events["op"][at])
    name = Op(op).name if op < len(Op) else "event"
    raise ValueError(f"event {at}, {name}: {column} {int(events[column][at]):#x}, expected {expected}")


def check_events(events: np.ndarray, limits: Limits, slots: dict[int, MemslotInfo], prepared: np.ndarray) -> None:
    """Refuse events that a machine with these limits, memslots and prepared memslots cannot replay.

    Raises:
        ValueError: naming the event and what was expected.
    """
    if not isinstance(events, np.ndarray) or events.dtype != EVENT or events.ndim != 1:
        raise ValueError(f"events: {getattr(events, 'dtype', type(events).__name__)}, expected EVENT rows")
    op, access, address, value = (events[name] for name in ("op", "access", "address", "value"))

    def refuse(bad: np.ndarray, column: str, expected: str) -> None:
        if bad.any():
            refuse_event(events, int(np.flatnonzero(bad)[0]), column, expected)

    refuse(op >= len(Op), "op", f"an operation up to {len(Op) - 1}")
    refuse(op == Op.GENERATION, "op", "memslot events instead: the machine keeps the generation")
    touches, data = np.isin(op, ACCESSES), np.isin(op, DATA)
    known, write_fetch = np.uint8(PFERR.W | PFERR.U | PFERR.F), np.uint8(PFERR.W | PFERR.F)
    refuse(touches & (access & ~known != 0), "access", "W, U and F alone")
    refuse(touches & (access & write_fetch == write_fetch), "access", "a write or a fetch, not both")
    refuse(data & ((events["size"] == 0) | (events["size"] > 8)), "size", "1 to 8 bytes")
    refuse(data & (access & np.uint8(PFERR.F) != 0), "access", "no fetch")
    refuse((op == Op.LOAD) & (access & np.uint8(PFERR.W) != 0), "access", "a read")
    refuse(np.isin(op, (Op.WRITE, Op.EXCHANGE)) & (access & np.uint8(PFERR.W) == 0), "access", "a write")
    refuse((op == Op.EXCHANGE) & (np.append(op[1:], len(Op)) != Op.OPERAND), "op", "an OPERAND event behind it")
    last = address + np.where(data, events["size"], 1).astype(np.uint64) - np.uint64(1)
    canonical = is_canonical(address, limits.width) & is_canonical(last, limits.width) & (last >= address)
    refuse((touches | (op == Op.INVLPG)) & ~canonical, "address", "a canonical address")
    bad_store = (address & np.uint64(7) != 0) | (address >= np.uint64(1 << limits.maxphyaddr))
    refuse((op == Op.STORE) & bad_store, "address", f"a multiple of 8 below 2^{limits.maxphyaddr}")
    upper = ~field(limits.maxphyaddr - 1, 0) & ~(CR3.NO_FLUSH if limits.pcids else np.uint64(0))
    refuse((op == Op.CR3) & (value & upper != 0), "value", f"an address of {limits.maxphyaddr} bits")
    refuse((op == Op.VCPU) & (value >= limits.vcpus), "value", f"a vCPU below {limits.vcpus}")
    sets = np.isin(op, (Op.MODE, Op.REGISTERS))
    rows = np.append(limits.registers, False)  # the last for every row beyond
    row = np.minimum(value, np.uint64(len(limits.registers))).astype(np.int64)
    refuse(sets & ~rows[row], "value", "a row of registers()")
    nesting = np.isin(op, (Op.VMRUN, Op.VMEXIT, Op.INVEPT))
    refuse(nesting & (not limits.nested), "op", "a machine with nested guests")
    refuse((op == Op.INVEPT) & (not limits.ept), "op", "a machine with EPT")
    enters = op == Op.VMRUN
    enters[enters] = ~np.isin(value[enters], limits.vmruns)
    refuse(enters, "value", "a row of prepare_vmrun()")
    refuse((op == Op.VMRUN) & (address >= np.uint64(1 << limits.maxphyaddr)), "address", f"below 2^{limits.maxphyaddr}")
    check_nesting(events, refuse)
    names = ", ".join(one.name for one in PARAMETERS)
    refuse((op == Op.PARAMETER) & (~np.isin(address, PARAMETERS) | (value > 1)), "address", names)
    refuse((op == Op.PAGE_LIMIT) & (value < 64), "value", "at least 64, as KVM demands")
    page = np.uint64(PAGE_SIZE - 1)
    span = (address & page != 0) | (value & page != 0) | (address >= value) | (value > PHYSICAL_LIMIT)
    refuse(np.isin(op, (Op.UNMAP, Op.AGE)) & span, "address", "a range of whole pages")
    check_slot_events(events, dict(slots), prepared)


def check_nesting(events: np.ndarray, refuse: Callable[[np.ndarray, str, str], None]) -> None:
    """On each vCPU VMRUN and VMEXIT take turns; registers are not set while a nested guest runs, nor is its hypervisor's INVEPT."""
    inside, vcpu, bad = set(), 0, np.zeros(len(events), bool)
    for at in np.flatnonzero(np.isin(events["op"], (Op.VCPU, Op.VMRUN, Op.VMEXIT, Op.MODE, Op.INVEPT))).tolist():
        op = events["op"][at]
        if op == Op.VCPU:
            vcpu = int(events["value"][at])
        elif op == Op.VMEXIT:
            bad[at] = vcpu not in inside
            inside.discard(vcpu)
        else:
            bad[at] = vcpu in inside
            if op == Op.VMRUN:
                inside.add(vcpu)
    refuse(bad, "op", "VMRUN and VMEXIT in turn, and no MODE or INVEPT between them")


def check_slot_events(events: np.ndarray, slots: dict[int, MemslotInfo], prepared: np.ndarray) -> None:
    """Follow memslots through the stream: ids must exist, slots must not overlap."""
    for at in np.flatnonzero(np.isin(events["op"], SLOT_EVENTS)).tolist():
        op, identity, value = Op(int(events["op"][at])), int(events["address"][at]), int(events["value"][at])
        if op == Op.SLOT_CREATE:
            if value >= len(prepared):
                refuse_event(events, at, "value", "a row of prepare_slot()")
            row = prepared[value]
            start, end, identity = (int(row[name]) for name in ("start", "end", "id"))
            if identity in slots or any(start < other.end and other.start < end for other in slots.values()):
                refuse_event(events, at, "value", f"a free id and range; slot {identity} is taken or overlaps another")
            slots[identity] = MemslotInfo(start, end, int(row["flags"]), value)
            continue
        if identity not in slots:
            refuse_event(events, at, "address", "the id of a memslot")
        old = slots[identity]
        if op == Op.SLOT_DELETE:
            del slots[identity]
        elif op == Op.SLOT_FLAGS:
            if (value ^ old.flags) & ~int(SlotFlag.LOG_DIRTY_PAGES):
                refuse_event(events, at, "value", "no flag changed but LOG_DIRTY_PAGES")
            slots[identity] = MemslotInfo(old.start, old.end, value, old.row)
        elif not old.flags & SlotFlag.LOG_DIRTY_PAGES:
            refuse_event(events, at, "address", "a memslot that logs dirty pages")


def is_canonical(gva: np.ndarray, width: int) -> np.ndarray:
    """Whether the bits of an address from `width` - 1 up are all the same."""
    shift = np.uint64(64 - width)
    return ((gva << shift).view(np.int64) >> shift.astype(np.int64)).view(np.uint64) == gva
