"""A processor's registers as kernels take them: `Cpu` into state, and the PDPTEs that a load of CR3 reads."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fastmmu.bits import CR0, CR4, GPTE64
from fastmmu.memory import GuestMemory
from fastmmu.paging import (
    Cpu,
    Mode,
    alignment_check,
    key_rights,
    pdpte_reserved,
    permission_bytes,
    plain_checks,
    reserved_masks,
)
from fastmmu.state import TRAIL_LENGTH, MmuState, Reg, VmState


class GeneralProtection(ValueError):
    """CR3 cannot be loaded: a present PDPTE of PAE paging sets reserved bits, and the processor answers with #GP."""


def load_registers(reg: np.ndarray, cpu: Cpu) -> None:
    """Set uint64[len(Reg)] from the processor's registers."""
    reg[:] = 0
    reg[Reg.CR3] = cpu.cr3
    reg[Reg.MODE] = cpu.mode
    reg[Reg.AC] = alignment_check(cpu)
    reg[Reg.PFERR_ACCESS] = cpu.reported_access
    reg[Reg.LARGE] = GPTE64.PS if cpu.mode != Mode.TWO_LEVEL or cpu.cr4 & int(CR4.PSE) else 0
    reg[Reg.PKRU], reg[Reg.PKRS] = key_rights(cpu)
    reg[Reg.WP] = bool(cpu.cr0 & int(CR0.WP))
    reg[Reg.PDPTE_RESERVED] = pdpte_reserved(cpu)


@lru_cache(maxsize=64)
def _tables_of(cpu: Cpu) -> MmuState:
    reg = np.zeros(len(Reg), np.uint64)
    load_registers(reg, cpu)
    return MmuState(reg, reserved_masks(cpu), permission_bytes(cpu), plain_checks(cpu))


def load_pdptes(ram: GuestMemory, cpu: Cpu) -> list[int]:
    """The four PDPTEs that a load of CR3 reads under PAE paging, 0 where CR3 points outside memory (facts 1.7).

    Raises:
        GeneralProtection: a present one sets reserved bits.
    """
    table = cpu.cr3 & 0xFFFF_FFE0
    in_memory = any(start <= table < end for start, end, kind in ram.slots if kind != "device")
    pdptes = ram.words[table >> 3 : (table >> 3) + 4].tolist() if in_memory else [0, 0, 0, 0]
    for number, pdpte in enumerate(pdptes):
        bad = pdpte & pdpte_reserved(cpu)
        if pdpte & int(GPTE64.P) and bad:
            raise GeneralProtection(f"CR3 {cpu.cr3:#x} cannot be loaded: PDPTE {number}, {pdpte:#x}, sets reserved bits {bad:#x}")
    return pdptes


def mmu_of(ram: GuestMemory, cpu: Cpu) -> MmuState:
    """Processor state after a load of `cpu`'s registers.

    Raises:
        ValueError: not a GuestMemory and a Cpu; GeneralProtection as `load_pdptes`.
    """
    if not isinstance(ram, GuestMemory) or not isinstance(cpu, Cpu):
        raise ValueError(f"expected a GuestMemory and a Cpu, not {type(ram).__name__} and {type(cpu).__name__}")
    mmu = _tables_of(cpu)
    if cpu.mode == Mode.PAE:
        reg = mmu.reg.copy()
        reg[Reg.PDPTE0 : Reg.PDPTE3 + 1] = load_pdptes(ram, cpu)
        mmu = mmu._replace(reg=reg)
    return mmu


def make_state(memory: GuestMemory, cpu: Cpu) -> VmState:
    """State of a vCPU with these registers on that memory, as kernels take it."""
    mmu = mmu_of(memory, cpu)
    return VmState(memory.state, mmu._replace(reg=mmu.reg.copy()), np.zeros(TRAIL_LENGTH, np.uint64))
