"""fastmmu: an exact, fast, executable model of KVM's x86 MMU.

Each name is imported when it is first used (PEP 562): nobody waits for the kernels of what he does not use.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same as MODULES, for type checkers
    from fastmmu.address_space import Regions, regions
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
    from fastmmu.trace import Snapshot, TraceError, load_replay, load_snapshot
    from fastmmu.translate import FETCH, IMPLICIT, USER, WRITE, Translation, Translations, translate, translate_many
    from fastmmu.translate_nested import Ept, NestedTranslation, NestedTranslations, Npt, translate_nested, translate_nested_many
    from fastmmu.vm import ReplayError, Vm, Workload

MODULES = {
    "address_space": ("Regions", "regions"),
    "audit": ("audit",),
    "audit_state": ("AuditError",),
    "ept": ("EptCaps", "EptTranslation", "EptpError", "OutsideMemory", "translate_ept"),
    "events": ("EventList", "Op"),
    "explain": ("explain",),
    "kvm": ("Kvm",),
    "machine": ("Machine", "MachineError", "NotBuilt"),
    "machine_state": ("LogKind", "SlotFlag", "Stop"),
    "memory": ("GuestMemory",),
    "paging": ("Cpu",),
    "processor": ("GeneralProtection",),
    "trace": ("Snapshot", "TraceError", "load_replay", "load_snapshot"),
    "translate": ("FETCH", "IMPLICIT", "USER", "WRITE", "Translation", "Translations", "translate", "translate_many"),
    "translate_nested": (
        "Ept", "NestedTranslation", "NestedTranslations", "Npt", "translate_nested", "translate_nested_many",
    ),
    "vm": ("ReplayError", "Vm", "Workload"),
}  # fmt: skip
"""The public names, by the module that has them."""


class Package(ModuleType):
    """This module's class. A submodule that bears a public function's name, once imported, does not take its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in MODULES_OF or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def __getattr__(name: str) -> object:
    """A public name, when it is first used."""
    if name not in MODULES_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{MODULES_OF[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


MODULES_OF = {name: module for module, names in MODULES.items() for name in names}
sys.modules[__name__].__class__ = Package

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
    "Regions",
    "ReplayError",
    "SlotFlag",
    "Snapshot",
    "Stop",
    "TraceError",
    "Translation",
    "Translations",
    "Vm",
    "Workload",
    "audit",
    "explain",
    "load_replay",
    "load_snapshot",
    "regions",
    "translate",
    "translate_ept",
    "translate_many",
    "translate_nested",
    "translate_nested_many",
]
__version__ = "0.1.0"
