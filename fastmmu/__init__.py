"""fastmmu: an exact, fast, executable model of KVM's x86 MMU."""

from fastmmu.audit import audit
from fastmmu.audit_state import AuditError
from fastmmu.ept import EptCaps, EptpError, EptTranslation, OutsideMemory, translate_ept
from fastmmu.events import EventList, Op
from fastmmu.explain import explain
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine, MachineError, NotBuilt
from fastmmu.machine_state import LogKind, SlotFlag, Stop
from fastmmu.memory import GuestMemory
from fastmmu.paging import Cpu
from fastmmu.processor import GeneralProtection
from fastmmu.trace import TraceError, load_replay
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
from fastmmu.vm import ReplayError, Vm, Workload

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
