"""The EPT walk: guest physical to host physical address, violations, misconfigurations, accessed and dirty flags.

SDM volume 3, 29.3.2 (the mechanism), 29.3.3 (misconfigurations, violations, their priority), 29.3.5 (accessed and dirty flags),
table 28-7 (exit qualification). The order, entry by entry (29.3.3.3): not present is a violation, else a bad entry is a
misconfiguration; the rights of all entries are looked at once, behind the last one; flags are set after that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastmmu._jit import cmpxchg, kernel, load
from fastmmu.bits import EPT, EPTP, ONE, PAGE_SHIFT, PHYSICAL_BITS, QUALIFICATION, WORD_SHIFT, ZERO, field
from fastmmu.checks import WORD, checked_flag, checked_int
from fastmmu.memory import GuestMemory, find_slot
from fastmmu.paging import LONG4, physical_bits_above
from fastmmu.state import NO_SLOT, TRAIL_LENGTH, EptState, Exit, HostWalk, NestedStat
from fastmmu.walk import ALL_ONES, ROM, page_gpa, reserved_row, table_index

READ, WRITE, FETCH = 1, 2, 4
"""Kinds of access to a guest physical address, as the exit qualification has them."""
UNCACHEABLE, WRITE_BACK = 0, 6
BAD_TYPES = (2, 3, 7)
WALK_LENGTHS = (4, 5)

VIOLATION, MISCONFIGURATION, OUTSIDE = (
    np.uint64(reason) for reason in (Exit.EPT_VIOLATION, Exit.EPT_MISCONFIGURATION, Exit.OUTSIDE)
)
INDEX_BITS = LONG4.index_bits
RIGHTS = EPT.R | EPT.W | EPT.X
RIGHTS_SHIFT = np.uint64(3)  # from bits 2:0 of an entry to those of the qualification
USER_X_SHIFT = np.uint64(10 - 6)  # and of the right to execute user-mode addresses
USER_X_TO_X = np.uint64(10 - 2)
USER_X_TO_RIGHTS = np.uint64(10 - 3)
PATTERN = field(5, 0)


class OutsideMemory(ValueError):
    """A table lies outside every RAM and ROM slot: what a processor would read there is not known."""


class EptpError(ValueError):
    """An EPTP with which no VM entry succeeds (SDM volume 3, 27.2.1.1)."""


@dataclass(frozen=True)
class EptCaps:
    """What a processor's EPT can do, and one execution control.

    `maxphyaddr` is in bits (32 to 52); `mode_based_execute` is the execution control of that name (SDM volume 3, 25.6.2); the
    others are bits 0, 16 and 17 of IA32_VMX_EPT_VPID_CAP.

    Raises:
        ValueError: a MAXPHYADDR outside 32..52, or a flag that is none.

    Example:
        >>> from fastmmu import EptCaps
        >>> EptCaps(maxphyaddr=40, page_1g=False).execute_only
        True
    """

    maxphyaddr: int = 46
    mode_based_execute: bool = False
    execute_only: bool = True
    page_2m: bool = True
    page_1g: bool = True

    def __post_init__(self) -> None:
        width = checked_int(self.maxphyaddr, 32, PHYSICAL_BITS, "maxphyaddr", f"an int from 32 to {PHYSICAL_BITS}")
        object.__setattr__(self, "maxphyaddr", width)
        for name in ("mode_based_execute", "execute_only", "page_2m", "page_1g"):
            object.__setattr__(self, name, checked_flag(getattr(self, name), name))


class EptTranslation(NamedTuple):
    """One translation by EPT.

    `hpa` is 0 where it failed. `level` is that of the mapping (1 4 KiB, 2 2 MiB, 3 1 GiB) or of the entry that failed; 0 where
    the address is wider than the tables. `rights` is the AND over the entries used: 1 R, 2 W, 4 X, under mode-based execute also 8,
    user X; 0 where an entry was not present or misconfigured. `exit_reason` is 0, 48 for a violation, 49 for a misconfiguration,
    whose qualification is 0.
    """

    ok: bool
    hpa: int
    level: int
    rights: int
    exit_reason: int
    exit_qualification: int


def reserved_bits(caps: EptCaps) -> np.ndarray:
    """Reserved bits of an entry as uint64[16], row 8 * (large) + level; SDM volume 3, tables 29-1 to 29-7, facts 1.3."""
    masks = np.zeros((2, 8), np.uint64)
    pointer, large = masks
    masks[:, 1:] = physical_bits_above(caps.maxphyaddr, PHYSICAL_BITS - 1)
    pointer[2:] |= field(6, 3)
    masks[:, 4:] |= field(7, 3)
    large[3] |= field(29, 12) if caps.page_1g else EPT.PS
    large[2] |= field(20, 12) if caps.page_2m else EPT.PS
    return masks.reshape(16)


def misconfigured_patterns(caps: EptCaps) -> np.uint64:
    """Bit n: an entry whose bits 5:0 are n is misconfigured (SDM volume 3, 29.3.3.1). Pointers reserve 5:3 in any case."""
    table = 0
    for pattern in range(64):
        r, w, x = (pattern & int(right) for right in (EPT.R, EPT.W, EPT.X))
        memory_type = pattern >> int(RIGHTS_SHIFT)
        bad_rights = (w and not r) or (x and not r and not caps.execute_only)
        table |= (1 if bad_rights or memory_type in BAD_TYPES else 0) << pattern
    return np.uint64(table)


@lru_cache(maxsize=64)
def ept_state(eptp: int, caps: EptCaps) -> EptState:
    """State of an EPT as kernels take it.

    Raises:
        EptpError: a memory type other than 0 and 6, a walk length other than 4 and 5, or reserved bits, among them those of the
            address from MAXPHYADDR up.
    """
    memory_type, levels = eptp & int(EPTP.TYPE), ((eptp & int(EPTP.LENGTH)) >> 3) + 1
    if memory_type not in (UNCACHEABLE, WRITE_BACK):
        raise EptpError(f"eptp {eptp:#x}: memory type {memory_type}, expected {UNCACHEABLE} or {WRITE_BACK}")
    if levels not in WALK_LENGTHS:
        raise EptpError(f"eptp {eptp:#x}: a walk of {levels} levels, expected 4 or 5")
    reserved = eptp & int(field(11, 7) | field(63, PHYSICAL_BITS) | physical_bits_above(caps.maxphyaddr, PHYSICAL_BITS - 1))
    if reserved:
        raise EptpError(f"eptp {eptp:#x}: sets reserved bits {reserved:#x} (MAXPHYADDR is {caps.maxphyaddr})")
    user_x = EPT.USER_X if caps.mode_based_execute else ZERO
    flags = bool(eptp & int(EPTP.AD))
    return EptState(
        root=np.uint64(eptp) & EPTP.ADDR,
        levels=np.uint64(levels),
        present=RIGHTS | user_x,
        user_x=user_x,
        accessed=EPT.A if flags else ZERO,
        dirty=EPT.D if flags else ZERO,
        misconfigured=misconfigured_patterns(caps),
        reserved=reserved_bits(caps),
    )


@kernel
def count(stat, which, number):
    """Add to a counter, where there are any."""
    if stat is None:
        return
    stat[which] += number


@kernel
def violation(ept, access, rights, paging_structure, level):
    """The exit for an entry that is not present (`rights` 0), or for rights that lack what the access needs."""
    qualification = access | ((rights & RIGHTS) << RIGHTS_SHIFT) | ((rights & ept.user_x) >> USER_X_SHIFT) | QUALIFICATION.LINEAR
    if not paging_structure:
        qualification |= QUALIFICATION.FINAL
    return HostWalk(False, ZERO, level, rights_of(ept, rights), VIOLATION, qualification)


@kernel
def rights_of(ept, rights):
    """R, W, X, and user X at bit 3, of the AND of entries."""
    return (rights & RIGHTS) | ((rights & ept.user_x) >> USER_X_TO_RIGHTS)


@kernel
def is_misconfigured(ept, entry, level):
    """Whether a present entry is one that the processor refuses (SDM volume 3, 29.3.3.1)."""
    pattern = (entry & PATTERN) | ((entry & ept.user_x) >> USER_X_TO_X)
    if (ept.misconfigured >> pattern) & ONE != ZERO:
        return True
    return entry & ept.reserved[reserved_row(entry & EPT.PS, level)] != ZERO


@kernel
def set_flags(mem, ept, trail, gpa, leaf_level, write):
    """Set A from the top table down to the leaf, and D in the leaf of a write, by compare-exchange on the entries that the walk
    has read (`trail`); entries in ROM stay as they are. False when one had changed meanwhile: the walk must start again."""
    table, level = ept.root, ept.levels
    while True:
        entry = trail[level]
        wanted = entry | ept.accessed
        if level == leaf_level and write:
            wanted |= ept.dirty
        if wanted != entry and mem.slots[find_slot(mem.slots, table)]["kind"] != ROM:
            at = (table >> WORD_SHIFT) + table_index(gpa, level, INDEX_BITS)
            if cmpxchg(mem.words, at, entry, wanted) != entry:
                return False
        if level == leaf_level:
            return True
        table = entry & EPT.ADDR
        level -= ONE


@kernel
def walk_ept(mem, ept, trail, stat, gpa, access, paging_structure, user_linear):
    """Translate `gpa` through the tables of `ept`.

    Args:
        mem: MemoryState; every table address is looked up in its slots before it is read.
        ept: EptState.
        trail: uint64[TRAIL_LENGTH], for the entries read, by level.
        stat: uint64[len(NestedStat)], or None.
        gpa: uint64.
        access: uint64, READ, WRITE, FETCH or-ed.
        paging_structure: the access is to an entry of the guest's tables: with A and D enabled it counts as a write too
            (29.3.3.2), and the qualification says both.
        user_linear: the linear address is a user-mode one, which selects the right to execute under mode-based execute.
    """
    if paging_structure and ept.accessed != ZERO:
        access |= EPT.R | EPT.W
    if gpa >> (PAGE_SHIFT + INDEX_BITS * ept.levels) != ZERO:
        return violation(ept, access, ZERO, paging_structure, ZERO)
    needed = access & (EPT.R | EPT.W)
    if access & EPT.X != ZERO:
        needed |= ept.user_x if user_linear and ept.user_x != ZERO else EPT.X
    write = access & EPT.W != ZERO
    while True:  # again when an entry changed between reading it and setting its A or D
        table, level, rights = ept.root, ept.levels, ALL_ONES
        while True:
            if find_slot(mem.slots, table) == NO_SLOT:
                return HostWalk(False, table, level, ZERO, OUTSIDE, ZERO)
            entry = load(mem.words, (table >> WORD_SHIFT) + table_index(gpa, level, INDEX_BITS))
            count(stat, NestedStat.HOST_READS, ONE)
            if entry & ept.present == ZERO:
                return violation(ept, access, ZERO, paging_structure, level)
            if is_misconfigured(ept, entry, level):
                return HostWalk(False, ZERO, level, ZERO, MISCONFIGURATION, ZERO)
            rights &= entry
            trail[level] = entry
            if level == ONE or entry & EPT.PS != ZERO:
                break
            table = entry & EPT.ADDR
            level -= ONE

        if rights & needed != needed:
            return violation(ept, access, rights, paging_structure, level)
        if rights & ept.accessed != ept.accessed or (write and entry & ept.dirty != ept.dirty):
            if not set_flags(mem, ept, trail, gpa, level, write):
                continue
        return HostWalk(True, page_gpa(LONG4, entry, gpa, level), level, rights_of(ept, rights), ZERO, ZERO)


def checked_gpa(gpa: object) -> int:
    """A guest physical address as an int.

    Raises:
        ValueError: not an integer from 0 to 2^64 - 1.
    """
    return checked_int(gpa, 0, WORD, "gpa", "an int from 0 to 2^64 - 1")


def checked_eptp(eptp: object, caps: object) -> EptState:
    """State of an EPT from what a user gave.

    Raises:
        ValueError: not an int of 64 bits and an EptCaps; EptpError as `ept_state`.
    """
    if not isinstance(caps, EptCaps):
        raise ValueError(f"caps: {type(caps).__name__}, expected an EptCaps")
    return ept_state(checked_int(eptp, 0, WORD, "eptp", "an int from 0 to 2^64 - 1"), caps)


def outside(hpa: int) -> OutsideMemory:
    """The error for a table at `hpa`."""
    return OutsideMemory(f"a table at hpa {hpa:#x} lies outside memory")


def translate_ept(
    ram: GuestMemory, eptp: int, gpa: int, access: int, caps: EptCaps, paging_structure: bool = False, user_linear: bool = False
) -> EptTranslation:
    """Translate one guest physical address by EPT; with EPTP bit 6, accessed and dirty flags are set in `ram.words`.

    Args:
        ram: host physical memory, in which the tables lie.
        eptp: the EPT pointer, its memory type, walk length and A/D bit included.
        gpa: guest physical address in bytes; one wider than the tables (48 or 57 bits) is a violation.
        access: 1 read, 2 write, 4 fetch, or-ed; each needs its right.
        caps: the processor's capabilities.
        paging_structure: the access is to an entry of the guest's paging structures.
        user_linear: the linear address is a user-mode one; looked at under mode-based execute only.

    Raises:
        ValueError: bad arguments; EptpError, a ValueError: the EPTP makes VM entry fail; OutsideMemory, a ValueError: a table lies
            outside memory. The final address may lie anywhere.

    Example:
        A page that may be read and written; a fetch is a violation, whose qualification says X asked for, R and W granted.

        >>> from fastmmu import EptCaps, GuestMemory, translate_ept
        >>> ram = GuestMemory(0x10_0000)
        >>> for hpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4028, 0x9033)):
        ...     ram.words[hpa >> 3] = entry
        >>> translate_ept(ram, 0x101E, 0x5678, 2, EptCaps())
        EptTranslation(ok=True, hpa=38520, level=1, rights=3, exit_reason=0, exit_qualification=0)
        >>> translate_ept(ram, 0x101E, 0x5678, 4, EptCaps())
        EptTranslation(ok=False, hpa=0, level=1, rights=3, exit_reason=48, exit_qualification=412)
    """
    if not isinstance(ram, GuestMemory):
        raise ValueError(f"ram: {type(ram).__name__}, expected a GuestMemory")
    ept = checked_eptp(eptp, caps)
    kind = checked_int(access, 1, READ | WRITE | FETCH, "access", "1 read, 2 write, 4 fetch, or-ed")
    structure, user = checked_flag(paging_structure, "paging_structure"), checked_flag(user_linear, "user_linear")
    trail = np.zeros(TRAIL_LENGTH, np.uint64)
    walk = walk_ept(ram.state, ept, trail, None, np.uint64(checked_gpa(gpa)), np.uint64(kind), structure, user)
    if walk.reason == OUTSIDE:
        raise outside(int(walk.hpa))
    return EptTranslation(bool(walk.ok), *(int(value) for value in walk[1:]))
