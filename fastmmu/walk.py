"""The guest page-table walk.

4-level paging, SDM volume 3, figure 4-8 (5-level adds PML5 = gva[56:48] on top):

     47      39 38      30 29      21 20      12 11         0
    +----------+----------+----------+----------+------------+
    |   PML4   |   PDPT   |    PD    |    PT    |   offset   |   gva
    +----------+----------+----------+----------+------------+
      level 4    level 3    level 2    level 1
      CR3 -> entry -> entry (1 GiB page) -> entry (2 MiB page) -> entry (4 KiB page)

The order of checks is KVM's (facts 1.1): per level not present, then reserved bits; permission once, with the rights of all
levels; accessed and dirty bits last, by compare-exchange on the very entries the walk read.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import cmpxchg, kernel, load
from fastmmu.bits import ACC, GPTE64, ONE, PAGE_SHIFT, PFERR, WORD_SHIFT, ZERO, field
from fastmmu.memory import find_slot
from fastmmu.paging import LONG4, LONG5, Mode, PagingMode
from fastmmu.permission import permission_fault
from fastmmu.state import NO_SLOT, Reg, SlotKind, Walk

ALL_ONES = field(63, 0)
ROM = np.uint64(SlotKind.ROM)
MODE_LONG5 = np.uint64(Mode.LONG5)


@kernel
def fault(mmu, level, access, pferr):
    """A failed walk: the error code is `pferr` plus the access bits that the processor reports (facts 1.5)."""
    return Walk(False, ZERO, level, ZERO, pferr | (access & mmu.reg[Reg.PFERR_ACCESS]))


@kernel
def table_index(gva, level, index_bits):
    """Index of the entry for `gva` in a table of `level`."""
    return (gva >> (PAGE_SHIFT + index_bits * (level - ONE))) & ((ONE << index_bits) - ONE)


@kernel
def page_offset_mask(level, index_bits):
    """Mask of the address bits inside a page mapped at `level`."""
    return (ONE << (PAGE_SHIFT + index_bits * (level - ONE))) - ONE


@kernel
def access_of(rights):
    """ACC form of the accumulated entry bits, in which NX is inverted (facts 1.2)."""
    access = ZERO
    if rights & GPTE64.NX != ZERO:
        access |= ACC.X
    if rights & GPTE64.W != ZERO:
        access |= ACC.W
    if rights & GPTE64.U != ZERO:
        access |= ACC.U
    return access


@kernel
def update_accessed_dirty(mem, trail, mode, table, gva, leaf_level, write):
    """Set A from the top level (whose table is at `table`) down to the leaf, and D in the leaf of a write (facts 1.6).

    Each entry is exchanged only if it still holds what the walk read (`trail`); entries in ROM stay as they are. Returns False
    when one had changed meanwhile: the walk must start again. May race with other walks and with any writer of the tables.
    """
    level = mode.levels
    while True:
        gpte = trail[level]
        wanted = gpte | GPTE64.A
        if level == leaf_level and write:
            wanted |= GPTE64.D
        if wanted != gpte and mem.slots[find_slot(mem.slots, table)]["kind"] != ROM:
            word = (table >> WORD_SHIFT) + table_index(gva, level, mode.index_bits)
            if cmpxchg(mem.words, word, gpte, wanted) != gpte:
                return False
        if level == leaf_level:
            return True
        table = gpte & GPTE64.ADDR
        level -= ONE


@kernel
def reserved_index(large, level):
    """Row of the reserved masks for an entry whose bit 7 is `large` (0 or GPTE64.PS): bit 7 becomes bit 3."""
    return (large >> np.uint64(4)) | level


def make_walker(mode: PagingMode):
    """Walker of one paging mode; a closure over its constants, so that shifts and masks are immediates."""

    @kernel(inline=True)
    def walk(mem, mmu, trail, gva, access):
        """Translate `gva` for `access` (PFERR bits) through the tables at CR3.

        Args:
            mem: MemoryState; every table address is looked up in its slots before it is read.
            mmu: MmuState.
            trail: uint64[6], scratch for the entries read; None for a walk that only looks: it leaves A and D alone.
            gva: uint64, canonical.
            access: uint64, PFERR.W, U, F, IMPLICIT.
        """
        root = mmu.reg[Reg.CR3] & mode.root
        write = access & PFERR.W != ZERO
        while True:  # again when an entry changed between reading it and setting its A or D (facts 1.1, W17)
            table = root
            level = mode.levels
            rights = ALL_ONES
            while True:
                if find_slot(mem.slots, table) == NO_SLOT:
                    return fault(mmu, level, access, ZERO)
                gpte = load(mem.words, (table >> WORD_SHIFT) + table_index(gva, level, mode.index_bits))
                if gpte & GPTE64.P == ZERO:
                    return fault(mmu, level, access, ZERO)
                large = gpte & mode.large
                if gpte & mmu.reserved[reserved_index(large, level)] != ZERO:
                    return fault(mmu, level, access, PFERR.P | PFERR.RSVD)
                rights &= gpte ^ GPTE64.NX
                if trail is not None:
                    trail[level] = gpte
                if level == ONE or large != ZERO:
                    break
                table = gpte & GPTE64.ADDR
                level -= ONE

            page_access = access_of(rights)
            if permission_fault(mmu, page_access, access):
                return fault(mmu, level, access, PFERR.P)
            dirty = gpte & GPTE64.D != ZERO
            if not write and not dirty:
                page_access &= ~ACC.W  # so that the first write walks, and sets D (W16)
            if trail is not None and (rights & GPTE64.A == ZERO or (write and not dirty)):
                if not update_accessed_dirty(mem, trail, mode, root, gva, level, write):
                    continue
            offset = page_offset_mask(level, mode.index_bits)
            return Walk(True, (gpte & GPTE64.ADDR & ~offset) | (gva & offset), level, page_access, ZERO)

    return walk


walk_long4 = make_walker(LONG4)
walk_long5 = make_walker(LONG5)


@kernel(inline=True)
def walk_gva(mem, mmu, trail, gva, access):
    """Walk in the paging mode of `mmu`."""
    if mmu.reg[Reg.MODE] == MODE_LONG5:
        return walk_long5(mem, mmu, trail, gva, access)
    return walk_long4(mem, mmu, trail, gva, access)


@kernel
def walk_addresses(mem, mmu, trail, cr3s, gvas, accesses):
    """The bare walk, over columns of equal length: the floor under any replay of the same records.

    Sets CR3 from `cr3s` before each walk; returns the order-sensitive digest of the gpas.
    """
    digest = ZERO
    for i in range(len(gvas)):
        mmu.reg[Reg.CR3] = cr3s[i]
        digest = mix(digest, walk_gva(mem, mmu, trail, gvas[i], np.uint64(accesses[i])))
    return digest


@kernel
def look_addresses(mem, mmu, cr3s, gvas, accesses, gpas):
    """Walk without leaving a trace, over columns of equal length; gpas[i] is all ones where the walk faults. Sets CR3 too."""
    for i in range(len(gvas)):
        mmu.reg[Reg.CR3] = cr3s[i]
        walk = walk_gva(mem, mmu, None, gvas[i], np.uint64(accesses[i]))
        gpas[i] = walk.gpa if walk.ok else ALL_ONES


@kernel
def mix(digest, walk):
    """Digest after one more answer: rotate by 5, then xor the gpa, or the error code with bit 63 set."""
    answer = walk.gpa if walk.ok else walk.pferr | GPTE64.NX
    return ((digest << np.uint64(5)) | (digest >> np.uint64(59))) ^ answer
