"""The audit, as Python calls it. Its rules, which need the whole machine, are imported when it is first called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmmu.machine import Machine


def audit(machine: Machine, *, guest_tables: bool = True) -> None:
    """Check everything; without `guest_tables` all but the guest's own tables, which the host may have written without telling KVM.

    Raises:
        AuditError: the first rule that does not hold.

    Example:
        >>> from fastmmu import WRITE, AuditError, Cpu, EventList, Kvm, Machine, Op, audit
        >>> machine = Machine(Kvm(), Cpu(cr0=1, cr3=0, cr4=0, efer=0), memory=1 << 30)  # without paging: gva is gpa
        >>> slot = machine.prepare_slot(0, gpa=0, size=1 << 30, host_level=2)
        >>> events = EventList().add(Op.SLOT_CREATE, value=slot).access(0x5000, WRITE).access(0x6000, 0)
        >>> run = machine.run(events.array())
        >>> audit(machine)
        >>> machine.vm.spt[machine.vm.spt.nonzero()[0][-1]] ^= 0x20_0000  # a leaf that maps another frame
        >>> try:
        ...     audit(machine)
        ... except AuditError as error:
        ...     print(error)
        leaf maps another frame, spte: ...
    """
    from fastmmu.audit_rules import check_machine

    check_machine(machine, guest_tables)
