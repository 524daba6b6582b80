"""fastmmu: an exact, fast, executable model of KVM's x86 MMU.

What translates addresses is imported at once. The machine and the replays, whose kernels are many, are imported when one of their
names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fastmmu.audit import audit
from fastmmu.ept import EptCaps, EptpError, EptTranslation, OutsideMemory, translate_ept
from fastmmu.explain import explain
from fastmmu.memory import GuestMemory
from fastmmu.paging import Cpu
from fastmmu.processor import GeneralProtection
from fastmmu.translate import (
    FETCH,
    IMPLICIT,
    USER,
    WRITE,
    Translation,
    Translations,
    translate,
    translate_many,
)
from fastmmu.translate_nested import (
    Ept,
    NestedTranslation,
    NestedTranslations,
    Npt,
    translate_nested,
    translate_nested_many,
)

if TYPE_CHECKING:  # the same as LATER, for type checkers
    from fastmmu.audit_state import AuditError
    from fastmmu.events import EventList, Op
    from fastmmu.kvm import Kvm
    from fastmmu.machine import Machine, MachineError, NotBuilt
    from fastmmu.machine_state import LogKind, SlotFlag, Stop
    from fastmmu.trace import TraceError, load_replay
    from fastmmu.vm import ReplayError, Vm, Workload

LATER = {
    "fastmmu.audit_state": ("AuditError",),
    "fastmmu.events": ("EventList", "Op"),
    "fastmmu.kvm": ("Kvm",),
    "fastmmu.machine": ("Machine", "MachineError", "NotBuilt"),
    "fastmmu.machine_state": ("LogKind", "SlotFlag", "Stop"),
    "fastmmu.trace": ("TraceError", "load_replay"),
    "fastmmu.vm": ("ReplayError", "Vm", "Workload"),
}
"""Names that are imported when they are first used, by module."""


def __getattr__(name: str) -> object:
    """A name of LATER (PEP 562)."""
    for module, names in LATER.items():
        if name in names:
            value = globals()[name] = getattr(import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "FETCH",
    "IMPLICIT",
    "USER",
    "WRITE",
    "AuditError",
    "Cpu",
    "Ept",
    "EptCaps",
    "EptTranslation",
    "EptpError",
    "EventList",
    "GeneralProtection",
    "GuestMemory",
    "Kvm",
    "LogKind",
    "Machine",
    "MachineError",
    "NestedTranslation",
    "NestedTranslations",
    "NotBuilt",
    "Npt",
    "Op",
    "OutsideMemory",
    "ReplayError",
    "SlotFlag",
    "Stop",
    "TraceError",
    "Translation",
    "Translations",
    "Vm",
    "Workload",
    "audit",
    "explain",
    "load_replay",
    "translate",
    "translate_ept",
    "translate_many",
    "translate_nested",
    "translate_nested_many",
]
__version__ = "0.1.0"
