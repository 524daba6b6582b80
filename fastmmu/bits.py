"""Bit layouts, each declared once: page-table entries, error codes, access rights, control registers.

A layout is a NamedTuple class whose field defaults are `uint64` masks; the instance beside it is what code uses
(`gpte & GPTE64.NX` compiles to an immediate). Sources: Intel SDM volume 3, chapter 4 (figure 4-11 for the formats), AMD APM
volume 2, chapter 5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def bit(position: int) -> np.uint64:
    """Mask of one bit."""
    return np.uint64(1 << position)


def field(high: int, low: int) -> np.uint64:
    """Mask of the bits high..low, both included, written as the manual writes a field."""
    return np.uint64((1 << (high + 1)) - (1 << low))


class Gpte64(NamedTuple):
    """An 8-byte guest page-table entry: PAE, 4-level and 5-level paging."""

    P: np.uint64 = bit(0)
    W: np.uint64 = bit(1)
    U: np.uint64 = bit(2)
    PWT: np.uint64 = bit(3)
    PCD: np.uint64 = bit(4)
    A: np.uint64 = bit(5)
    D: np.uint64 = bit(6)
    PS: np.uint64 = bit(7)
    G: np.uint64 = bit(8)
    PAT_LARGE: np.uint64 = bit(12)
    ADDR: np.uint64 = field(51, 12)
    KEY: np.uint64 = field(62, 59)
    NX: np.uint64 = bit(63)


class Gpte32(NamedTuple):
    """A 4-byte guest page-table entry: 32-bit two-level paging."""

    P: np.uint64 = bit(0)
    W: np.uint64 = bit(1)
    U: np.uint64 = bit(2)
    PWT: np.uint64 = bit(3)
    PCD: np.uint64 = bit(4)
    A: np.uint64 = bit(5)
    D: np.uint64 = bit(6)
    PS: np.uint64 = bit(7)
    G: np.uint64 = bit(8)
    ADDR: np.uint64 = field(31, 12)
    ADDR_4M: np.uint64 = field(31, 22)
    PSE36: np.uint64 = field(16, 13)  # bits 35:32 of a 4 MiB page's address


GPTE64 = Gpte64()
GPTE32 = Gpte32()


class Pferr(NamedTuple):
    """Page-fault error code; its W, U, F and IMPLICIT bits also name the access that a walk is asked about."""

    P: np.uint64 = bit(0)
    W: np.uint64 = bit(1)
    U: np.uint64 = bit(2)
    RSVD: np.uint64 = bit(3)
    F: np.uint64 = bit(4)
    PK: np.uint64 = bit(5)
    GUEST_FINAL: np.uint64 = bit(32)  # nested paging only: the final address of a guest walk
    GUEST_PAGE: np.uint64 = bit(33)  # nested paging only: an entry of the guest's own tables
    IMPLICIT: np.uint64 = bit(48)  # software only: a supervisor access that no instruction asked for (SMAP ignores AC)


PFERR = Pferr()


class Acc(NamedTuple):
    """Access rights after a walk, in KVM's form."""

    X: np.uint64 = bit(0)
    W: np.uint64 = bit(1)
    U: np.uint64 = bit(2)
    ALL: np.uint64 = field(2, 0)


ACC = Acc()


class NptSpte(NamedTuple):
    """A shadow or NPT spte: what the processor walks under shadow paging and under AMD's nested paging (facts 3.1)."""

    P: np.uint64 = bit(0)
    W: np.uint64 = bit(1)
    U: np.uint64 = bit(2)
    A: np.uint64 = bit(5)
    D: np.uint64 = bit(6)
    PS: np.uint64 = bit(7)
    HOST_WRITABLE: np.uint64 = bit(9)
    MMU_WRITABLE: np.uint64 = bit(10)
    MMU_PRESENT: np.uint64 = bit(11)
    ADDR: np.uint64 = field(51, 12)
    AD_DISABLED: np.uint64 = bit(52)
    NX: np.uint64 = bit(63)
    MMIO: np.uint64 = bit(51) | bit(0)  # a reserved address bit, and P so that the processor looks at it


class EptSpte(NamedTuple):
    """An EPT spte (facts 3.1; SDM volume 3, table 29-6)."""

    R: np.uint64 = bit(0)
    W: np.uint64 = bit(1)
    X: np.uint64 = bit(2)
    WRITE_BACK: np.uint64 = np.uint64(6 << 3)
    PS: np.uint64 = bit(7)
    A: np.uint64 = bit(8)
    D: np.uint64 = bit(9)
    MMU_PRESENT: np.uint64 = bit(11)
    ADDR: np.uint64 = field(51, 12)
    AD_DISABLED: np.uint64 = bit(52)
    SAVED: np.uint64 = bit(54) | bit(56)  # R and X of an access-tracked entry, which is not present for the processor (facts 3.2)
    HOST_WRITABLE: np.uint64 = bit(57)
    MMU_WRITABLE: np.uint64 = bit(58)
    SUPPRESS_VE: np.uint64 = bit(63)
    MMIO: np.uint64 = bit(1) | bit(2)  # writable and executable but not readable: a misconfiguration
    MMIO_MASK: np.uint64 = field(2, 0) | bit(63)


class MmioSpte(NamedTuple):
    """Where an MMIO spte of either form keeps the memslot generation (facts 3.4)."""

    GENERATION_LOW: np.uint64 = field(10, 3)  # generation bits 7:0
    GENERATION_HIGH: np.uint64 = field(62, 52)  # generation bits 18:8
    GENERATION: np.uint64 = field(18, 0)  # of the memslot generation


class Role(NamedTuple):
    """The role of a shadow page (facts 5.11): with the gfn, what a shadow page is found by."""

    LEVEL: np.uint64 = field(3, 0)
    FOUR_BYTE_GPTE: np.uint64 = bit(4)
    QUADRANT: np.uint64 = field(6, 5)  # which part of a 32-bit guest's table: it has twice as many entries
    DIRECT: np.uint64 = bit(7)
    ACCESS: np.uint64 = field(10, 8)
    INVALID: np.uint64 = bit(11)
    EFER_NX: np.uint64 = bit(12)
    CR0_WP: np.uint64 = bit(13)
    SMEP_ANDNOT_WP: np.uint64 = bit(14)
    SMAP_ANDNOT_WP: np.uint64 = bit(15)
    AD_DISABLED: np.uint64 = bit(16)
    GUEST_MODE: np.uint64 = bit(17)  # of a nested guest


class Eptp(NamedTuple):
    """The EPT pointer, the VM-execution control that names an EPT's top table (SDM volume 3, table 25-9)."""

    TYPE: np.uint64 = field(2, 0)  # memory type for accesses to the tables
    LENGTH: np.uint64 = field(5, 3)  # levels of tables, less one
    AD: np.uint64 = bit(6)  # accessed and dirty flags are kept
    ADDR: np.uint64 = field(51, 12)


class Ept(NamedTuple):
    """An entry of an EPT table, as the processor reads it (SDM volume 3, tables 29-1 to 29-7). KVM's own bits: `EptSpte`."""

    R: np.uint64 = bit(0)
    W: np.uint64 = bit(1)
    X: np.uint64 = bit(2)  # under mode-based execute: for supervisor-mode linear addresses
    TYPE: np.uint64 = field(5, 3)
    IGNORE_PAT: np.uint64 = bit(6)
    PS: np.uint64 = bit(7)
    A: np.uint64 = bit(8)
    D: np.uint64 = bit(9)
    USER_X: np.uint64 = bit(10)  # under mode-based execute: for user-mode linear addresses
    ADDR: np.uint64 = field(51, 12)


class Qualification(NamedTuple):
    """Exit qualification of an EPT violation (SDM volume 3, table 28-7)."""

    R: np.uint64 = bit(0)
    W: np.uint64 = bit(1)
    X: np.uint64 = bit(2)
    RIGHTS: np.uint64 = field(5, 3)  # R, W, X of all entries used
    USER_X: np.uint64 = bit(6)
    LINEAR: np.uint64 = bit(7)  # there is a guest linear address
    FINAL: np.uint64 = bit(8)  # the access was to its translation, not to a paging-structure entry
    NMI: np.uint64 = bit(12)


EPTP, EPT, QUALIFICATION = Eptp(), Ept(), Qualification()

FROZEN = np.uint64(0x5A0)  # an spte of either form that is being removed: not present, and nothing else may take its place yet
NPT_SPTE, EPT_SPTE, MMIO_SPTE, ROLE = NptSpte(), EptSpte(), MmioSpte(), Role()


class Cr0(NamedTuple):
    """Control register 0, the bits that paging looks at."""

    PE: np.uint64 = bit(0)
    MP: np.uint64 = bit(1)
    TS: np.uint64 = bit(3)
    WP: np.uint64 = bit(16)
    PG: np.uint64 = bit(31)


class Cr3(NamedTuple):
    """Control register 3, beside the table's address."""

    PCID: np.uint64 = field(11, 0)
    NO_FLUSH: np.uint64 = bit(63)  # of a load with CR4.PCIDE: keep what is remembered of the address space


class Cr4(NamedTuple):
    """Control register 4, the bits that paging looks at."""

    PSE: np.uint64 = bit(4)
    PAE: np.uint64 = bit(5)
    PGE: np.uint64 = bit(7)
    LA57: np.uint64 = bit(12)
    PCIDE: np.uint64 = bit(17)
    SMEP: np.uint64 = bit(20)
    SMAP: np.uint64 = bit(21)
    PKE: np.uint64 = bit(22)
    PKS: np.uint64 = bit(24)


class Efer(NamedTuple):
    """Extended-feature-enable register, the bits that paging looks at."""

    LME: np.uint64 = bit(8)
    LMA: np.uint64 = bit(10)
    NX: np.uint64 = bit(11)


class Rflags(NamedTuple):
    """RFLAGS, the bit that paging looks at."""

    AC: np.uint64 = bit(18)


CR0, CR3, CR4, EFER, RFLAGS = Cr0(), Cr3(), Cr4(), Efer(), Rflags()

GENERATION_UPDATING = bit(63)  # of a memslot generation: an update is in progress (facts 3.4.5)

PAGE_SHIFT = np.uint64(12)
PAGE_SIZE = 4096
PAGE_OFFSET = field(11, 0)
PAGE_MASK = field(63, 12)
WORD_SHIFT = np.uint64(3)  # gpa >> 3 is the index of a uint64 word
HALF_SHIFT = np.uint64(2)  # gpa >> 2 is the index of a uint32 half word
WORDS_PER_PAGE = 512
PHYSICAL_BITS = 52  # the architecture's limit for MAXPHYADDR
PHYSICAL_LIMIT = 1 << PHYSICAL_BITS
ZERO, ONE = np.uint64(0), np.uint64(1)
