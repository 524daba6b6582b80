"""The audit, as Python calls it. Its rules, which need the whole machine, are imported when it is first called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmmu.machine import Machine


def audit(machine: Machine, *, guest_tables: bool = True) -> None:
    """Check everything; without `guest_tables` all but the guest's own tables, which the host may have written without telling KVM.

    Raises:
        AuditError: the first rule that does not hold.
    """
    from fastmmu.audit_rules import check_machine

    check_machine(machine, guest_tables)
