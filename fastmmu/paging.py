"""Paging modes as the manual defines them, and the tables that follow from a definition and the registers.

A `PagingMode` holds what distinguishes the modes in a walk. `reserved_masks`, `permission_bytes` and `plain_checks` derive, once
per register change, the tables that a walk looks up.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from fastmmu.bits import ACC, CR0, CR4, EFER, GPTE32, GPTE64, PFERR, PHYSICAL_BITS, RFLAGS, bit, field
from fastmmu.checks import WORD, checked_flag, checked_int


class Mode(IntEnum):
    """Paging modes, by their number in the state; SDM volume 3, 4.1.1."""

    NONE = 0
    TWO_LEVEL = 2
    PAE = 3
    LONG4 = 4
    LONG5 = 5


class PagingMode(NamedTuple):
    """One paging mode: SDM volume 3, table 4-1 and figures 4-2 to 4-10."""

    levels: np.uint64  # of tables in memory; the PDPTEs of PAE are registers
    index_bits: np.uint64
    half: bool  # entries are 4 bytes long
    pae: bool  # the top tables are found by the PDPTE registers
    keys: bool  # leaf bits 62:59 are a protection key
    root: np.uint64  # mask of the table address in CR3 and in an entry


TWO_LEVEL = PagingMode(levels=np.uint64(2), index_bits=np.uint64(10), half=True, pae=False, keys=False, root=GPTE32.ADDR)
PAE = PagingMode(levels=np.uint64(2), index_bits=np.uint64(9), half=False, pae=True, keys=False, root=GPTE64.ADDR)
LONG4 = PagingMode(levels=np.uint64(4), index_bits=np.uint64(9), half=False, pae=False, keys=True, root=GPTE64.ADDR)
LONG5 = PagingMode(levels=np.uint64(5), index_bits=np.uint64(9), half=False, pae=False, keys=True, root=GPTE64.ADDR)

MAX_LEVELS = 5
ADDRESS_BITS = {Mode.NONE: 64, Mode.TWO_LEVEL: 32, Mode.PAE: 32, Mode.LONG4: 48, Mode.LONG5: 57}
"""Width of a guest virtual address; in the long modes the bits above are copies of the highest one."""

REGISTERS = ("cr0", "cr3", "cr4", "efer", "pkru", "pkrs", "rflags")


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """Registers and features of a processor that decide how a guest address is translated.

    All values are ints. `maxphyaddr` is in bits (36 to 52), `page_1g` is CPUID's 1 GiB-page bit, `amd` makes bit 8 of PML4 and
    PML5 entries reserved.

    Raises:
        ValueError: a register outside 64 bits, a MAXPHYADDR outside 36..52, or a combination that no processor accepts.

    Example:
        >>> from fastmmu import Cpu
        >>> Cpu(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00).mode.name
        'LONG4'
        >>> Cpu(cr0=0x80010001, cr3=0x1000, cr4=0x1020, efer=0xD00, maxphyaddr=52).mode.name
        'LONG5'
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pkru: int = 0
    pkrs: int = 0
    rflags: int = 0
    maxphyaddr: int = 46
    page_1g: bool = True
    amd: bool = False

    def __post_init__(self) -> None:
        for name in REGISTERS:
            object.__setattr__(self, name, checked_int(getattr(self, name), 0, WORD, name, "an int from 0 to 2^64 - 1"))
        width = checked_int(self.maxphyaddr, 36, PHYSICAL_BITS, "maxphyaddr", f"an int from 36 to {PHYSICAL_BITS}")
        object.__setattr__(self, "maxphyaddr", width)
        for name in ("page_1g", "amd"):
            object.__setattr__(self, name, checked_flag(getattr(self, name), name))
        if self.cr0 & int(CR0.PG) and self.efer & int(EFER.LMA | EFER.LME) and not self.cr4 & int(CR4.PAE):
            raise ValueError(f"cr4={self.cr4:#x} efer={self.efer:#x}: expected CR4.PAE with paging in long mode")

    @property
    def mode(self) -> Mode:
        """Paging mode that CR0, CR4 and EFER select (SDM volume 3, 4.1.1)."""
        if not self.cr0 & int(CR0.PG):
            return Mode.NONE
        if not self.cr4 & int(CR4.PAE):
            return Mode.TWO_LEVEL
        if not self.efer & int(EFER.LMA | EFER.LME):
            return Mode.PAE
        return Mode.LONG5 if self.cr4 & int(CR4.LA57) else Mode.LONG4

    @property
    def reported_access(self) -> int:
        """Access bits that an error code reports: W, U, and F if EFER.NX or CR4.SMEP is set (facts 1.5)."""
        fetch = self.efer & int(EFER.NX) or self.cr4 & int(CR4.SMEP)
        return int(PFERR.W | PFERR.U | (PFERR.F if fetch else np.uint64(0)))


def physical_bits_above(maxphyaddr: int, high: int) -> np.uint64:
    """Mask of the bits from MAXPHYADDR up to `high`; none where MAXPHYADDR is beyond it."""
    return field(high, maxphyaddr) if maxphyaddr <= high else np.uint64(0)


def reserved_masks(cpu: Cpu) -> np.ndarray:
    """Reserved bits of a gpte as uint64[16], row 8 * (large) + level; SDM volume 3, 4.3 to 4.5, facts 1.3."""
    masks = np.zeros((2, 8), np.uint64)
    large = masks[1]
    mode = cpu.mode
    if mode == Mode.TWO_LEVEL:
        large[2] = field(21, 17)  # PSE-36: bits 16:13 are address bits 35:32
    elif mode != Mode.NONE:
        masks[:, 1:] = physical_bits_above(cpu.maxphyaddr, 62 if mode == Mode.PAE else PHYSICAL_BITS - 1)
        if not cpu.efer & int(EFER.NX):
            masks[:, 1:] |= GPTE64.NX
        masks[:, 4:] |= GPTE64.PS | (bit(8) if cpu.amd else np.uint64(0))
        large[3] |= field(29, 13) if cpu.page_1g else GPTE64.PS
        large[2] |= field(20, 13)
    return masks.reshape(16)


def pdpte_reserved(cpu: Cpu) -> int:
    """Bits that a present PDPTE of PAE paging must not set when CR3 is loaded (SDM volume 3, table 4-8, facts 1.7).

    Bit 5, which the manual reserves too, is let pass: QEMU sets it as an accessed bit in memory, after the load, so that every
    image of a PAE guest taken from it has it.
    """
    return int(physical_bits_above(cpu.maxphyaddr, 63) | field(8, 6) | field(2, 1))


def permission_bytes(cpu: Cpu) -> np.ndarray:
    """Permission table as uint8[16]: in the byte of a fault kind, bit `access` says that such a page faults (facts 1.4).

    The fault kind is the error code's W, U, F and, at the place of RSVD, "SMAP does not apply", shifted right by one. With paging
    off nothing faults.
    """
    write_protect = bool(cpu.cr0 & int(CR0.WP))
    nx, smep, smap = cpu.efer & int(EFER.NX), cpu.cr4 & int(CR4.SMEP), cpu.cr4 & int(CR4.SMAP)
    table = np.zeros(16, np.uint8)
    for kind in range(16):
        pferr = kind << 1
        write, user, fetch = pferr & int(PFERR.W), pferr & int(PFERR.U), pferr & int(PFERR.F)
        smap_off = pferr & int(PFERR.RSVD)
        for access in range(int(ACC.ALL) + 1):
            page_w, page_u, page_x = access & int(ACC.W), access & int(ACC.U), access & int(ACC.X)
            faults = cpu.mode != Mode.NONE and (
                (write and not page_w and (user or write_protect))
                or (user and not page_u)
                or (fetch and nx and not page_x)
                or (fetch and smep and not user and page_u)
                or (smap and not fetch and not user and not smap_off and page_u)
            )
            table[kind] |= bool(faults) << access
    return table


class PlainColumn(IntEnum):
    """Columns of the table that tells a plain walk (see `plain_checks`), uint64 each."""

    POINTER_MASK = 0  # an entry that points to a table, masked by this,
    POINTER = 1  # must be this
    LEAF_MASK = 2  # and the leaf likewise
    LEAF = 3


def plain_checks(cpu: Cpu) -> np.ndarray:
    """For each fault kind (see `permission_bytes`) the masks by which a walk is plain: it succeeds and changes nothing in memory.

    uint64[16, len(PlainColumn)]. Every entry is present and accessed, gives the right that the access needs, and sets no reserved
    bit; the leaf of a write is dirty; where SMEP or SMAP forbids user pages the leaf is none; where protection keys deny anything
    the leaf has key 0, which they do not deny. The conditions are sufficient: what they refuse is for the exact walk. Large
    pages have more reserved bits, see `reserved_masks`. Only for 8-byte entries.
    """
    table = np.zeros((16, len(PlainColumn)), np.uint64)
    nothing = np.uint64(0)
    nx, smep, smap = cpu.efer & int(EFER.NX), cpu.cr4 & int(CR4.SMEP), cpu.cr4 & int(CR4.SMAP)
    for kind, row in enumerate(table):
        pferr = kind << 1
        write, user, fetch = pferr & int(PFERR.W), pferr & int(PFERR.U), pferr & int(PFERR.F)
        needed = GPTE64.P | GPTE64.A
        needed |= GPTE64.W if write and (user or cpu.cr0 & int(CR0.WP)) else nothing
        needed |= GPTE64.U if user else nothing
        forbidden = reserved_masks(cpu)[1] | (GPTE64.NX if fetch and nx else nothing)
        user_page_faults = not user and (smep if fetch else smap and not pferr & int(PFERR.RSVD))
        row[PlainColumn.POINTER] = needed
        row[PlainColumn.POINTER_MASK] = needed | forbidden | GPTE64.PS | (bit(8) if cpu.amd else nothing)
        row[PlainColumn.LEAF] = needed | (GPTE64.D if write else nothing)
        row[PlainColumn.LEAF_MASK] = row[PlainColumn.LEAF] | forbidden | (GPTE64.U if user_page_faults else nothing)
        if any(key_rights(cpu)):
            key_zero_is_free = not any(register & 3 for register in key_rights(cpu))
            row[PlainColumn.LEAF_MASK] |= GPTE64.KEY if key_zero_is_free else nothing
            row[PlainColumn.LEAF] |= nothing if key_zero_is_free else GPTE64.KEY  # outside the mask: nothing is plain
    return table


def alignment_check(cpu: Cpu) -> bool:
    """EFLAGS.AC: explicit supervisor accesses may touch user pages under SMAP."""
    return bool(cpu.rflags & int(RFLAGS.AC))


def key_rights(cpu: Cpu) -> tuple[int, int]:
    """Protection-key registers as they apply: (PKRU for user pages, PKRS for supervisor pages), 0 where the feature is off."""
    if cpu.mode not in (Mode.LONG4, Mode.LONG5):
        return 0, 0
    return cpu.pkru if cpu.cr4 & int(CR4.PKE) else 0, cpu.pkrs if cpu.cr4 & int(CR4.PKS) else 0
