"""A recorded stream replayed through KVM's MMU: each record's final translation must be the one that the recording machine made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastmmu.audit import audit
from fastmmu.bits import PFERR
from fastmmu.events import EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.machine_state import SlotFlag, Stop
from fastmmu.vm import ReplayError, Workload

CHUNK = 1 << 16  # events between two reports of progress, and between two audits


def machine_for(workload: Workload, kvm: Kvm, *, host_level: int = 1) -> Machine:
    """A machine with the workload's memslots, page tables and registers, before the first event.

    Args:
        workload: from `load_replay`.
        kvm: how KVM runs it.
        host_level: level at which the host maps the guest's memory, 1 to 3.
    """
    memory = [slot for slot in workload.slots if slot[2] != "device"]
    machine = Machine(kvm, workload.cpu, memory=max(end for _, end, _ in memory))
    events = EventList()
    for number, (start, end, kind) in enumerate(memory):
        flags = SlotFlag.READONLY if kind == "rom" else 0
        events.add(Op.SLOT_CREATE, value=machine.prepare_slot(number, start, end - start, flags, host_level=host_level))
    machine.run(events.array())
    machine.configure(keep_log=False)
    for gfn, words in workload.tables.items():
        machine.memory.words[gfn * 512 : gfn * 512 + 512] = words
    return machine


def replay_stream(
    workload: Workload,
    machine: Machine,
    *,
    audited: bool = False,
    checked: bool = False,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Replay the whole stream on a machine made for it; `progress` is told how many events are done, `checked` as `Machine.run`.

    Raises:
        ReplayError: a record that translates to another address than the one recorded; MachineError; AuditError.
    """
    events = workload.events
    for start in range(0, len(events), CHUNK):
        chunk = events[start : start + CHUNK]
        run = machine.run(chunk, checked=checked)
        if run.stop == Stop.DIFFERS:
            raise ReplayError(describe(chunk[run.stopped], run.address, run.code))
        if audited:
            audit(machine)
        if progress is not None:
            progress(min(start + CHUNK, len(events)))


def describe(event: np.void, gpa: int, code: int) -> str:
    """A record that went elsewhere, in one line."""
    access = int(event["access"])
    kind = "fetch" if access & int(PFERR.F) else "write" if access & int(PFERR.W) else "read"
    found = f"faults with code {code:#x}" if gpa == (1 << 64) - 1 else f"translates to gpa {gpa:#x}"
    return (
        f"column gpa, record {int(event['record'])}: {kind} of gva {int(event['address']):#x} {found}, "
        f"expected gpa {int(event['value']):#x}"
    )
