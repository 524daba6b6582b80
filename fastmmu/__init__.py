"""fastmmu: an exact, fast, executable model of KVM's x86 MMU."""

from fastmmu.memory import GuestMemory
from fastmmu.paging import Cpu
from fastmmu.trace import TraceError, load_replay
from fastmmu.vm import ReplayError, Vm, Workload

__all__ = ["Cpu", "GuestMemory", "ReplayError", "TraceError", "Vm", "Workload", "load_replay"]
__version__ = "0.1.0"
