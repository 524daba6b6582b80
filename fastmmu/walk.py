"""The guest page-table walk, in every paging mode.

4-level paging, SDM volume 3, figure 4-8 (5-level adds PML5 = gva[56:48] on top; PAE starts at level 2 from one of four
registers; two-level paging has ten index bits, 4-byte entries, and 4 MiB pages):

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

from fastmmu import guards
from fastmmu._jit import cmpxchg, kernel, load, store
from fastmmu.bits import ACC, GPTE32, GPTE64, HALF_SHIFT, ONE, PAGE_SHIFT, PFERR, WORD_SHIFT, ZERO, field
from fastmmu.memory import find_slot
from fastmmu.paging import LONG4, LONG5, PAE, TWO_LEVEL, Mode, PlainColumn
from fastmmu.permission import fault_kind, key_fault, permission_fault
from fastmmu.state import NO_SLOT, Plain, Reg, SlotKind, Walk

ALL_ONES = field(63, 0)
ROM = np.uint64(SlotKind.ROM)
MODE_NONE, MODE_TWO_LEVEL, MODE_PAE, MODE_LONG4, MODE_LONG5 = (np.uint64(mode) for mode in Mode)
PDPTE_LEVEL, PDPTE_SHIFT, PDPTE_INDEX = np.uint64(3), np.uint64(30), np.uint64(3)
PSE36_SHIFT = np.uint64(32 - 13)
LARGE_TO_ROW = np.uint64(7 - 3)
WRITTEN = 0  # of a trail: levels begin at 1


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
def reserved_row(large, level):
    """Row of the reserved masks for an entry whose bit 7 is `large` (0 or GPTE64.PS): bit 7 becomes bit 3."""
    return (large >> LARGE_TO_ROW) | level


@kernel
def read_entry(mem, mode, table, index):
    """The entry at `index` of the table at `table`, which lies in a slot."""
    if mode.half:
        return np.uint64(load(mem.halves, (table >> HALF_SHIFT) + index))
    return load(mem.words, (table >> WORD_SHIFT) + index)


@kernel
def exchange_entry(mem, mode, table, index, gpte, wanted):
    """Replace the entry if it is still `gpte`; returns whether it was. 4-byte entries share a word with a neighbour: each is
    exchanged on its own."""
    if not guards.GPTE_EXCHANGE and not mode.half:
        store(mem.words, (table >> WORD_SHIFT) + index, wanted)
        return True
    if mode.half:
        old = np.uint32(gpte)
        return cmpxchg(mem.halves, (table >> HALF_SHIFT) + index, old, np.uint32(wanted)) == old
    return cmpxchg(mem.words, (table >> WORD_SHIFT) + index, gpte, wanted) == gpte


@kernel
def access_of(rights):
    """ACC form of the accumulated entry bits, in which NX is inverted (facts 1.2)."""
    return (rights & (ACC.W | ACC.U)) | (rights >> np.uint64(63))


@kernel
def page_gpa(mode, gpte, gva, level):
    """Guest physical address of `gva` in the page that the leaf maps (facts 1.1, W14)."""
    offset = page_offset_mask(level, mode.index_bits)
    if mode.half and level != ONE:
        return (gpte & GPTE32.ADDR_4M) | ((gpte & GPTE32.PSE36) << PSE36_SHIFT) | (gva & offset)
    return (gpte & GPTE64.ADDR & ~offset) | (gva & offset)


@kernel
def update_accessed_dirty(mem, trail, mode, table, gva, leaf_level, write):
    """Set A from the top level (whose table is at `table`) down to the leaf, and D in the leaf of a write (facts 1.6).

    Each entry is exchanged only if it still holds what the walk read (`trail`); entries in ROM stay as they are. Which levels were
    written is added to `trail[WRITTEN]`, a bit each. Returns False when one had changed meanwhile: the walk must start again. May
    race with other walks and with any writer of the tables.
    """
    level = mode.levels
    while True:
        gpte = trail[level]
        wanted = gpte | GPTE64.A
        if level == leaf_level and write:
            wanted |= GPTE64.D
        if wanted != gpte and mem.slots[find_slot(mem.slots, table)]["kind"] != ROM:
            if not exchange_entry(mem, mode, table, table_index(gva, level, mode.index_bits), gpte, wanted):
                return False
            trail[WRITTEN] |= ONE << level
        if level == leaf_level:
            return True
        table = gpte & mode.root
        level -= ONE


@kernel
def mode_of(mmu):
    """The paging mode that the registers select; not for Mode.NONE."""
    mode = mmu.reg[Reg.MODE]
    if mode == MODE_LONG5:
        return LONG5
    if mode == MODE_PAE:
        return PAE
    if mode == MODE_TWO_LEVEL:
        return TWO_LEVEL
    return LONG4


@kernel
def walk_exact(mem, mmu, trail, gva, access):
    """Translate `gva` for `access` (PFERR bits) through the tables at CR3, in any paging mode.

    Args:
        mem: MemoryState; every table address is looked up in its slots before it is read.
        mmu: MmuState.
        trail: uint64[TRAIL_LENGTH], for the entries read, by level, and the levels written (WRITTEN); None for a walk that only
            looks: it leaves A and D alone.
        gva: uint64, canonical.
        access: uint64, PFERR.W, U, F, IMPLICIT.
    """
    if mmu.reg[Reg.MODE] == MODE_NONE:
        return Walk(True, gva, ZERO, ACC.ALL, ZERO)
    mode = mode_of(mmu)
    root = mmu.reg[Reg.CR3] & mode.root
    if mode.pae:
        pdpte = mmu.reg[np.uint64(Reg.PDPTE0) + ((gva >> PDPTE_SHIFT) & PDPTE_INDEX)]
        if pdpte & GPTE64.P == ZERO:
            return fault(mmu, PDPTE_LEVEL, access, ZERO)
        root = pdpte & mode.root
    write = access & PFERR.W != ZERO
    if trail is not None:
        trail[WRITTEN] = ZERO
    while True:  # again when an entry changed between reading it and setting its A or D (facts 1.1, W17)
        table = root
        level = mode.levels
        rights = ALL_ONES
        while True:
            if find_slot(mem.slots, table) == NO_SLOT:
                return fault(mmu, level, access, ZERO)
            gpte = read_entry(mem, mode, table, table_index(gva, level, mode.index_bits))
            if gpte & GPTE64.P == ZERO:
                return fault(mmu, level, access, ZERO)
            large = gpte & mmu.reg[Reg.LARGE]
            if gpte & mmu.reserved[reserved_row(large, level)] != ZERO:
                return fault(mmu, level, access, PFERR.P | PFERR.RSVD)
            rights &= gpte ^ GPTE64.NX
            if trail is not None:
                trail[level] = gpte
            if level == ONE or large != ZERO:
                break
            table = gpte & mode.root
            level -= ONE

        page_access = access_of(rights)
        denied = permission_fault(mmu, page_access, access)
        if mode.keys and key_fault(mmu, gpte, page_access, access):
            return fault(mmu, level, access, PFERR.P | PFERR.PK)
        if denied:
            return fault(mmu, level, access, PFERR.P)
        dirty = gpte & GPTE64.D != ZERO
        if not write and not dirty:
            page_access &= ~ACC.W  # so that the first write walks, and sets D (W16)
        if trail is not None and (rights & GPTE64.A == ZERO or (write and not dirty)):
            if not update_accessed_dirty(mem, trail, mode, root, gva, level, write):
                continue
        return Walk(True, page_gpa(mode, gpte, gva, level), level, page_access, ZERO)


@kernel
def plain_answer(gpte, gva, level, rights, seen):
    """Answer of a plain walk whose entries AND to `rights` and OR to `seen`."""
    page_access = access_of((rights & ~GPTE64.NX) | (~seen & GPTE64.NX))
    if gpte & GPTE64.D == ZERO:
        page_access &= ~ACC.W
    return Walk(True, page_gpa(LONG4, gpte, gva, level), level, page_access, ZERO)


@kernel
def plain_entry(mem, table, gva, level):
    """The 8-byte entry for `gva`, or 0, which is never plain, where the table lies outside the largest slot."""
    if np.uint64(np.int64(table) - mem.start) >= mem.size:  # below the start it wraps around: one compare for both ends
        return ZERO
    return load(mem.words, (table >> WORD_SHIFT) + table_index(gva, level, LONG4.index_bits))


@kernel(inline=True)
def walk_plain(mem, mmu, plain, gva):
    """The plain case of 4-level and 5-level paging: every table in the largest slot, nothing denied, A and D already set.

    It is what nearly every walk comes to. One masked compare per entry stands for all checks: the fewer the instructions, the more
    walks the processor overlaps (random walks over 512 MiB of tables: 41 ns, the exact walker alone 64 ns, a C loop 42 ns).
    Answers as `walk` for the access of `plain`; ok=False says only that the case is not plain, and is for the exact walker.
    """
    table = plain.root
    rights, seen = ALL_ONES, ZERO
    if plain.mode == MODE_LONG5:
        gpte = plain_entry(mem, table, gva, LONG5.levels)
        if gpte & plain.pointer_mask != plain.pointer:
            return Walk(False, ZERO, ZERO, ZERO, ZERO)
        table, rights, seen = gpte & LONG5.root, gpte, gpte
    level = LONG4.levels
    while True:
        gpte = plain_entry(mem, table, gva, level)
        rights &= gpte
        seen |= gpte
        if level == ONE:
            if gpte & plain.leaf_mask != plain.leaf:
                return Walk(False, ZERO, ZERO, ZERO, ZERO)
            return plain_answer(gpte, gva, ONE, rights, seen)
        if gpte & plain.pointer_mask != plain.pointer:
            reserved = mmu.reserved[reserved_row(GPTE64.PS, level)]
            if gpte & GPTE64.PS == ZERO or gpte & reserved != ZERO or gpte & plain.leaf_mask != plain.leaf:
                return Walk(False, ZERO, ZERO, ZERO, ZERO)
            return plain_answer(gpte, gva, level, rights, seen)
        table = gpte & LONG4.root
        level -= ONE


@kernel
def plain_for(mmu, access):
    """The checks of plain walks for `access`, in the registers as they are now."""
    kind = fault_kind(mmu, access)
    return Plain(
        mmu.reg[Reg.MODE],
        mmu.reg[Reg.CR3] & GPTE64.ADDR,
        mmu.plain[kind, PlainColumn.POINTER_MASK],
        mmu.plain[kind, PlainColumn.POINTER],
        mmu.plain[kind, PlainColumn.LEAF_MASK],
        mmu.plain[kind, PlainColumn.LEAF],
        access,
    )


@kernel(inline=True)
def walk_gva(mem, mmu, trail, gva, access):
    """Walk in the paging mode of `mmu`: the plain case at once, all others exactly."""
    return walk_by(mem, mmu, trail, plain_for(mmu, access), gva)


@kernel(inline=True)
def walk_by(mem, mmu, trail, plain, gva):
    """`walk_gva` for a loop in which registers and access stay: it makes `plain` once."""
    if plain.mode >= MODE_LONG4:
        walk = walk_plain(mem, mmu, plain, gva)
        if walk.ok:
            return walk
    return walk_exact(mem, mmu, trail, gva, plain.access)


@kernel
def walk_column(mem, mmu, trail, gvas, access, gpas):
    """Walk one address after another, all with one access: gpas[i], 0 where the walk faults."""
    plain = plain_for(mmu, access)
    for i in range(len(gvas)):
        gpas[i] = walk_by(mem, mmu, trail, plain, gvas[i]).gpa


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
