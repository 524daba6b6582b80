"""A processor's registers as kernels take them: `Cpu` into state, and the PDPTEs that a load of CR3 reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastmmu.bits import ACC, CR0, CR4, EPT, EPTP, GPTE64, PFERR
from fastmmu.ept import EptCaps, misconfigured_patterns, reserved_bits
from fastmmu.memory import GuestMemory
from fastmmu.paging import (
    Cpu,
    Mode,
    PlainColumn,
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


@dataclass(frozen=True)
class Ept12:
    """An EPT that a hypervisor gives its guest: an EPTP that VM entry accepts, and what the hypervisor's processor can do."""

    eptp: int
    caps: EptCaps


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
def tables_of(one: Cpu | Ept12) -> MmuState:
    """State that follows from registers, or from an EPTP."""
    reg = np.zeros(len(Reg), np.uint64)
    if isinstance(one, Ept12):
        load_eptp(reg, one)
        return MmuState(reg, reserved_bits(one.caps), ept_permissions(), np.zeros((16, len(PlainColumn)), np.uint64))
    load_registers(reg, one)
    return MmuState(reg, reserved_masks(one), permission_bytes(one), plain_checks(one))


def load_eptp(reg: np.ndarray, tables: Ept12) -> None:
    """Set uint64[len(Reg)] for tables of EPT: CR3 is the whole EPTP, by which roots are kept (facts 9.1)."""
    reg[Reg.CR3], reg[Reg.MODE] = tables.eptp, ((tables.eptp & int(EPTP.LENGTH)) >> 3) + 1
    reg[Reg.PFERR_ACCESS] = PFERR.W | PFERR.U | PFERR.F
    reg[Reg.LARGE], reg[Reg.EPT] = EPT.PS, 1
    reg[Reg.EPT_FLAGS] = EPT.A | EPT.D if tables.eptp & int(EPTP.AD) else 0
    reg[Reg.EPT_BAD] = misconfigured_patterns(tables.caps)


def ept_permissions() -> np.ndarray:
    """Permission table (see `paging.permission_bytes`) of EPT: U asks for R, which stands where U does, W for W, F for X."""
    table = np.zeros(16, np.uint8)
    for kind in range(16):
        asked = ((PFERR.W, ACC.W), (PFERR.U, ACC.U), (PFERR.F, ACC.X))
        needed = sum(int(right) for one, right in asked if kind << 1 & int(one))
        for access in range(int(ACC.ALL) + 1):
            table[kind] |= (access & needed != needed) << access
    return table


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
    mmu = tables_of(cpu)
    if cpu.mode == Mode.PAE:
        reg = mmu.reg.copy()
        reg[Reg.PDPTE0 : Reg.PDPTE3 + 1] = load_pdptes(ram, cpu)
        mmu = mmu._replace(reg=reg)
    return mmu


def make_state(memory: GuestMemory, cpu: Cpu) -> VmState:
    """State of a vCPU with these registers on that memory, as kernels take it."""
    mmu = mmu_of(memory, cpu)
    return VmState(memory.state, mmu._replace(reg=mmu.reg.copy()), np.zeros(TRAIL_LENGTH, np.uint64))
