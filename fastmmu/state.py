"""Every record and enum that crosses a module border in compiled code.

State is small NamedTuples of arrays; rows of mixed fields are structured arrays; registers and counters are `IntEnum`-indexed
uint64 arrays. The same source runs with the JIT off.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from fastmmu.paging import MAX_LEVELS


class SlotKind(IntEnum):
    """What a range of guest physical memory is."""

    RAM = 0
    ROM = 1
    DEVICE = 2


SLOT = np.dtype([("start", np.uint64), ("end", np.uint64), ("kind", np.uint64)])
"""A memslot row: byte addresses, end exclusive."""

NO_SLOT = -1


class MemoryState(NamedTuple):
    """Guest physical memory: uint64 words by gpa >> 3, the same bytes as uint32 halves, memslots (the largest first)."""

    words: np.ndarray
    halves: np.ndarray
    slots: np.ndarray
    start: np.int64  # the largest slot once more, as scalars: nearly every table lies in it
    size: np.uint64


class Reg(IntEnum):
    """Registers of the vCPU state, uint64 each."""

    CR3 = 0
    MODE = 1  # a paging.Mode
    AC = 2  # 1 when EFLAGS.AC is set
    PFERR_ACCESS = 3  # the access bits that an error code reports: W, U, and F under NX or SMEP (facts 1.5)
    GENERATION = 4  # memslot generation, bit 63 while an update is in progress (facts 3.4.5)
    LARGE = 5  # GPTE64.PS where bit 7 makes a page large: always, but under two-level paging only with CR4.PSE
    PKRU = 6  # 0 where the feature is off
    PKRS = 7
    WP = 8  # 1 when CR0.WP is set
    PDPTE0 = 9  # the four PDPTEs of PAE paging, as loaded with CR3
    PDPTE1 = 10
    PDPTE2 = 11
    PDPTE3 = 12
    PDPTE_RESERVED = 13  # bits that a present one must not set when it is loaded
    # of the tables that a hypervisor gives its guest
    EPT = 14  # 1: they are an EPT, and CR3 is the EPTP
    EPT_FLAGS = 15  # the bits A and D of its entries, where the EPTP enables them
    EPT_BAD = 16  # bit n: an entry whose bits 5:0 are n is misconfigured


class MmuState(NamedTuple):
    """What a walk needs of the processor."""

    reg: np.ndarray  # uint64[len(Reg)]
    reserved: np.ndarray  # uint64[16], see paging.reserved_masks
    permissions: np.ndarray  # uint8[16], see paging.permission_bytes
    plain: np.ndarray  # uint64[16, len(PlainColumn)], see paging.plain_checks


class VmState(NamedTuple):
    """One virtual machine with one vCPU."""

    mem: MemoryState
    mmu: MmuState
    trail: np.ndarray  # uint64[TRAIL_LENGTH]: the entries that the walk in progress read, by level


class Plain(NamedTuple):
    """What tells a plain walk for one kind of access, as scalars that a loop keeps in registers (see paging.plain_checks)."""

    mode: np.uint64
    root: np.uint64
    pointer_mask: np.uint64
    pointer: np.uint64
    leaf_mask: np.uint64
    leaf: np.uint64
    access: np.uint64


class Walk(NamedTuple):
    """Answer of a walk, scalars: when `ok` is False, gpa is 0 and pferr is the error code (which may be 0)."""

    ok: bool
    gpa: np.uint64
    level: np.uint64
    access: np.uint64
    pferr: np.uint64


class EptState(NamedTuple):
    """What a walk of an EPT needs of the EPTP, the capabilities and the execution controls (see ept.ept_state)."""

    root: np.uint64
    levels: np.uint64
    present: np.uint64  # any of these bits makes an entry present
    user_x: np.uint64  # EPT.USER_X under mode-based execute, else 0
    accessed: np.uint64  # EPT.A where the EPTP enables the flags, else 0
    dirty: np.uint64
    misconfigured: np.uint64  # bit n: an entry whose bits 5:0 are n is misconfigured
    reserved: np.ndarray  # uint64[16], row 8 * (large) + level


class Host(NamedTuple):
    """The second dimension: an EPT, or AMD's nested tables, which are ordinary ones, the other None; and what tells plain walks."""

    ept: EptState | None
    npt: MmuState | None
    root: np.uint64
    levels: np.uint64
    checks: np.ndarray  # uint64[len(HostKind), len(PlainColumn)], by kind of access
    reserved_2m: np.uint64
    reserved_1g: np.uint64


class HostKind(IntEnum):
    """Kinds of access to a guest physical address."""

    TABLE = 0  # to an entry of the guest's paging structures
    READ = 1
    WRITE = 2
    FETCH = 3


class HostWalk(NamedTuple):
    """Answer of a walk in the second dimension, scalars. When `ok` is False: hpa 0, reason and qualification of the exit; for
    OUTSIDE the hpa of the table."""

    ok: bool
    hpa: np.uint64
    level: np.uint64
    rights: np.uint64
    reason: np.uint64
    qualification: np.uint64


class Exit(IntEnum):
    """Exit reasons of a failed translation in the second dimension (SDM volume 3, appendix C; APM volume 2, appendix C)."""

    NONE = 0
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    NESTED_PAGE_FAULT = 0x400
    OUTSIDE = 1 << 16  # no exit of a processor: a table lies outside memory


class NestedWalk(NamedTuple):
    """Answer of a two-dimensional walk, scalars: as `Walk` for the guest's dimension, as `HostWalk` for the other."""

    ok: bool
    hpa: np.uint64
    gpa: np.uint64
    level: np.uint64
    access: np.uint64
    pferr: np.uint64
    reason: np.uint64
    qualification: np.uint64


class NestedScratch(NamedTuple):
    """Working space of one thread that walks in two dimensions: uint64[TRAIL_LENGTH] by level, and lanes for blocks."""

    entries: np.ndarray  # the guest's entries that the walk read
    tables: np.ndarray  # hpa of the guest's tables
    host: np.ndarray  # entries of the second dimension, as a trail
    lanes: np.ndarray  # uint64[nested_batch.LANES * BLOCK]


class Checks(NamedTuple):
    """Masked compares that tell a plain walk of one kind of access (see paging.plain_checks)."""

    pointer_mask: np.uint64
    pointer: np.uint64
    leaf_mask: np.uint64
    leaf: np.uint64


class HostPlain(NamedTuple):
    """What tells plain walks of the second dimension for one kind of access, as scalars that a loop keeps in registers."""

    root: np.uint64
    levels: np.uint64
    table: Checks  # an access to the guest's paging structures
    final: Checks  # the access to the address that the guest's tables give
    kind: np.uint64  # of the final access, a HostKind
    reserved_2m: np.uint64
    reserved_1g: np.uint64


class Way(NamedTuple):
    """How the second dimension led to the guest's top table when a loop began (see nested_plain.way_to)."""

    hpa: np.uint64  # of that table; all ones where the way is not plain, then the rest says nothing
    reads: np.uint64
    places: tuple[np.uint64, np.uint64, np.uint64, np.uint64]  # words that the entries are in, the top one first
    entries: tuple[np.uint64, np.uint64, np.uint64, np.uint64]


class NestedCaches(NamedTuple):
    """What a processor may remember of two-dimensional walks. Absent parts are None.

    `structures` is the paging-structure cache: which guest table, at which hpa, a part of a linear address leads to. `pages` is the
    nested cache: the host page of a guest page, for one kind of access.
    """

    structures: np.ndarray | None  # uint64[levels of pointers, sets, len(Structure)]
    pages: np.ndarray | None  # uint64[sets, 2]: tag, hpa


class Structure(IntEnum):
    """Fields of a row of the paging-structure cache."""

    TAG = 0
    TABLE = 1  # hpa of the table that it leads to
    RIGHTS = 2  # AND of the entries on the way
    SEEN = 3  # OR of them


class NestedStat(IntEnum):
    """Counters of two-dimensional walks, uint64 each."""

    WALKS = 0
    GUEST_READS = 1  # entries of the guest's tables
    HOST_READS = 2  # entries of the second dimension's tables
    STRUCTURE_HITS = 3  # walks that began below the top table
    PAGE_HITS = 4  # translations of the second dimension that the nested cache answered
    FLUSHES = 5


class Scratch(NamedTuple):
    """Working space of one thread that translates in blocks."""

    trail: np.ndarray  # uint64[TRAIL_LENGTH]
    lanes: np.ndarray  # uint64[LANES * BLOCK], see batch.py


TRAIL_LENGTH = MAX_LEVELS + 1


class MmioInfo(NamedTuple):
    """The MMIO info cache of one vCPU: one entry, and what is compared beside its address. Absent parts are None.

    `cr3` is the review's proposal of 2011; `generation` is KVM of today, whose presence also brings the rules that clear.
    """

    entry: np.ndarray  # uint64[len(Mmio)]
    cr3: np.ndarray | None  # uint64[1]
    generation: np.ndarray | None  # uint64[1]


class Mmio(IntEnum):
    """Fields of the cached MMIO translation (facts 4.1)."""

    GVA = 0  # page aligned; 0 is no gva
    GFN = 1
    ACCESS = 2


class Miss(IntEnum):
    """Why the MMIO info cache did not answer; HIT when it did."""

    HIT = 0
    EMPTY = 1  # no gva in the entry: never filled, or cleared
    OTHER_PAGE = 2  # another page, or another address space at this gva
    GENERATION = 3
    PERMISSION = 4  # a denied hit: it falls to the walk


class Stat(IntEnum):
    """Counters of a replay, uint64 each."""

    RECORDS = 0
    DEVICE_ACCESSES = 1
    GUEST_WALKS = 2  # walks of the guest's tables, all accesses
    DEVICE_WALKS = 3  # those made for device accesses
    HITS = 4  # device accesses answered by the cache: guest walks saved
    MISS_COLD = 5  # nothing was ever cached
    MISS_CLEARED = 6
    MISS_OTHER_PAGE = 7
    MISS_GENERATION = 8
    MISS_PERMISSION = 9
    CLEARS = 10  # filled entries that a rule cleared
    WRONG = 11  # delivered translations that the guest had flushed away
    STALE_LEGAL = 12  # delivered translations older than the tables, legal as a TLB's would be
    GRANTED_TO_USER = 13  # user device accesses delivered that no table since the last flush grants
    FAULTS = 14  # accesses that ended in a guest page fault
    TABLE_STORES = 15
    CR3_LOADS = 16
    INVLPGS = 17
    GENERATION_CHANGES = 18


class Digest(IntEnum):
    """Digests of what was delivered, order included."""

    ALL = 0
    DEVICE = 1
