"""Paging modes as the manual defines them, and the masks that follow from a definition and the registers.

A `PagingMode` holds what distinguishes the modes in a walk; `make_walker` of `walk.py` closes over it. `reserved_masks` and
`permission_bytes` derive, once per register change, the tables that the walk looks up.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from fastmmu.bits import ACC, CR0, CR4, EFER, GPTE64, PFERR, PHYSICAL_BITS, RFLAGS, bit, field


class Mode(IntEnum):
    """Paging modes, by their number in the state."""

    LONG4 = 4
    LONG5 = 5


class PagingMode(NamedTuple):
    """One paging mode: SDM volume 3, table 4-1 and the table of use of linear-address bits."""

    levels: np.uint64
    index_bits: np.uint64
    large: np.uint64  # mask of the bit that makes an entry above level 1 the last one
    root: np.uint64  # mask of the table address in CR3


LONG4 = PagingMode(levels=np.uint64(4), index_bits=np.uint64(9), large=GPTE64.PS, root=GPTE64.ADDR)
LONG5 = PagingMode(levels=np.uint64(5), index_bits=np.uint64(9), large=GPTE64.PS, root=GPTE64.ADDR)

MAX_LEVELS = 5


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """Registers and features of a processor that decide how a guest address is translated.

    All values are ints. `maxphyaddr` is in bits (36 to 52), `page_1g` is CPUID's 1 GiB-page bit, `amd` makes bit 8 of PML4 and
    PML5 entries reserved.

    Raises:
        ValueError: a register outside 64 bits, a MAXPHYADDR outside 36..52, or a paging mode that is not supported.
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
        for name in ("cr0", "cr3", "cr4", "efer", "pkru", "pkrs", "rflags"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or not 0 <= value < 1 << 64:
                raise ValueError(f"{name}: {value!r}, expected an int from 0 to 2^64 - 1")
            object.__setattr__(self, name, int(value))
        if not 36 <= self.maxphyaddr <= PHYSICAL_BITS:
            raise ValueError(f"maxphyaddr: {self.maxphyaddr!r}, expected 36 to {PHYSICAL_BITS}")
        self.mode  # noqa: B018  an unsupported combination is refused here, not at the first walk

    @property
    def mode(self) -> Mode:
        """Paging mode that CR0, CR4 and EFER select (SDM volume 3, 4.1.1)."""
        long_mode = self.cr0 & int(CR0.PG) and self.cr4 & int(CR4.PAE) and self.efer & int(EFER.LME | EFER.LMA)
        if not long_mode:
            raise ValueError(f"cr0={self.cr0:#x} cr4={self.cr4:#x} efer={self.efer:#x}: only 4-level and 5-level paging so far")
        return Mode.LONG5 if self.cr4 & int(CR4.LA57) else Mode.LONG4

    @property
    def reported_access(self) -> int:
        """Access bits that an error code reports: W, U, and F if EFER.NX or CR4.SMEP is set (SDM volume 3, 4.7)."""
        fetch = self.efer & int(EFER.NX) or self.cr4 & int(CR4.SMEP)
        return int(PFERR.W | PFERR.U | (PFERR.F if fetch else np.uint64(0)))


def reserved_masks(cpu: Cpu) -> np.ndarray:
    """Reserved bits of a gpte as uint64[16], row 8 * (bit 7 of the entry) + level; SDM volume 3, 4.4 and 4.5, facts 1.3."""
    masks = np.zeros((2, 8), np.uint64)
    common = field(PHYSICAL_BITS - 1, cpu.maxphyaddr) if cpu.maxphyaddr < PHYSICAL_BITS else np.uint64(0)
    if not cpu.efer & int(EFER.NX):
        common |= GPTE64.NX
    masks[:, 1:] = common
    top = GPTE64.PS | (bit(8) if cpu.amd else np.uint64(0))
    masks[:, 4:] |= top
    masks[1, 3] |= field(29, 13) if cpu.page_1g else GPTE64.PS
    masks[1, 2] |= field(20, 13)
    return masks.reshape(16)


def permission_bytes(cpu: Cpu) -> np.ndarray:
    """Permission table as uint8[16]: in the byte of a fault kind, bit `access` says that such a page faults (facts 1.4).

    The fault kind is the error code's W, U, F and, at the place of RSVD, "SMAP does not apply", shifted right by one.
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
            faults = (
                (write and not page_w and (user or write_protect))
                or (user and not page_u)
                or (fetch and nx and not page_x)
                or (fetch and smep and not user and page_u)
                or (smap and not fetch and not user and not smap_off and page_u)
            )
            table[kind] |= bool(faults) << access
    return table


def alignment_check(cpu: Cpu) -> bool:
    """EFLAGS.AC: explicit supervisor accesses may touch user pages under SMAP."""
    return bool(cpu.rflags & int(RFLAGS.AC))
