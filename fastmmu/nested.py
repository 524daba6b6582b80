"""The two-dimensional walk: a guest's page tables, whose own addresses are translated by EPT or by AMD's nested tables.

SDM volume 3, 29.3.1 and 29.3.3.2; APM volume 2, 15.25.5 and 15.25.6. For 4 x 4 levels up to 24 entries are read:

    gva -- guest CR3                                            g = guest's entry, h = entry of the second dimension
            |  h h h h -> g4        each table of the guest has a guest physical address,
            |  h h h h -> g3        which takes a walk of the second dimension;
            |  h h h h -> g2
            |  h h h h -> g1        so has the address that the guest's tables give
            +- h h h h -> hpa

The guest's A and D are set when its own walk has come to its end, before the final address is translated; each translation of the
second dimension sets its own.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import kernel
from fastmmu.bits import ACC, EPT, GPTE64, ONE, PAGE_MASK, PAGE_SHIFT, PFERR, ZERO, field
from fastmmu.ept import INDEX_BITS, OUTSIDE, count, walk_ept
from fastmmu.memory import find_slot
from fastmmu.paging import LONG4
from fastmmu.permission import key_fault, permission_fault
from fastmmu.state import NO_SLOT, Exit, HostKind, HostWalk, NestedStat, NestedWalk, Reg
from fastmmu.walk import (
    ALL_ONES,
    MODE_NONE,
    PDPTE_INDEX,
    PDPTE_LEVEL,
    PDPTE_SHIFT,
    ROM,
    access_of,
    exchange_entry,
    mode_of,
    page_gpa,
    read_entry,
    reserved_row,
    table_index,
    walk_exact,
)

NESTED_PAGE_FAULT = np.uint64(Exit.NESTED_PAGE_FAULT)
TABLE_KIND, READ_KIND, WRITE_KIND, FETCH_KIND = (np.uint64(kind) for kind in HostKind)
NOWHERE = ALL_ONES  # instead of an hpa: the walk is not plain
TWO_MIB_LEVEL, ONE_GIB_LEVEL = np.uint64(2), np.uint64(3)
FOUR_LEVELS = LONG4.levels
TYPE_MIDDLE = field(4, 4)


# --- the second dimension, exactly ---------------------------------------------------------------------------------


@kernel
def walk_npt(mem, npt, trail, stat, gpa, access, paging_structure):
    """Translate `gpa` through AMD's nested tables: ordinary ones, walked as by a user; an access to a paging structure is a write
    (APM volume 2, 15.25.5). A failure is a nested page fault, its error code with GUEST_PAGE or GUEST_FINAL (15.25.6)."""
    if npt is None:  # then there is an EPT, and nothing calls this; but a branch is pruned only where its argument is None
        return HostWalk(False, ZERO, ZERO, ZERO, ZERO, ZERO)
    pferr = PFERR.U
    where = PFERR.GUEST_PAGE if paging_structure else PFERR.GUEST_FINAL
    if paging_structure or access & EPT.W != ZERO:
        pferr |= PFERR.W
    elif access & EPT.X != ZERO:
        pferr |= PFERR.F
    levels = npt.reg[Reg.MODE]
    if gpa >> (PAGE_SHIFT + INDEX_BITS * levels) != ZERO:
        return HostWalk(False, ZERO, ZERO, ZERO, NESTED_PAGE_FAULT, (pferr & npt.reg[Reg.PFERR_ACCESS]) | where)
    walk = walk_exact(mem, npt, trail, gpa, pferr)
    count(stat, NestedStat.HOST_READS, levels + ONE - walk.level)
    if walk.ok:
        return HostWalk(True, walk.gpa, walk.level, walk.access, ZERO, ZERO)
    return HostWalk(False, ZERO, walk.level, ZERO, NESTED_PAGE_FAULT, walk.pferr | where)


@kernel
def walk_dimension(ept, npt, mem, trail, stat, gpa, access, paging_structure, user_linear):
    """Translate `gpa` in whichever second dimension there is; arguments as `walk_ept`."""
    if ept is None:
        return walk_npt(mem, npt, trail, stat, gpa, access, paging_structure)
    return walk_ept(mem, ept, trail, stat, gpa, access, paging_structure, user_linear)


@kernel
def tables_are_written(ept):
    """Whether every access to the guest's tables is checked as a write. Under EPT without A and D it is a read, until a flag in the
    guest's entry has to be set."""
    if ept is None:
        return True
    return ept.accessed != ZERO


# --- the guest's dimension, exactly --------------------------------------------------------------------------------


@kernel
def guest_fault(mmu, level, access, pferr):
    """A #PF for the guest."""
    return NestedWalk(False, ZERO, ZERO, level, ZERO, pferr | (access & mmu.reg[Reg.PFERR_ACCESS]), ZERO, ZERO)


@kernel
def nested_exit(gpa, level, host_walk):
    """An exit for a guest physical address; for a table outside memory its hpa instead."""
    if host_walk.reason == OUTSIDE:
        return outside(host_walk.hpa, level)
    return NestedWalk(False, ZERO, gpa, level, ZERO, ZERO, host_walk.reason, host_walk.qualification)


@kernel
def outside(hpa, level):
    """A table that lies outside memory."""
    return NestedWalk(False, hpa, ZERO, level, ZERO, ZERO, OUTSIDE, ZERO)


@kernel
def entry_gpa(mode, table, gva, level):
    """Guest physical address of the entry for `gva` in the table at `table`."""
    return table + table_index(gva, level, mode.index_bits) * (ONE << (PAGE_SHIFT - mode.index_bits))


@kernel
def with_flags(gpte, is_leaf, write):
    """The guest's entry as a walk leaves it."""
    return gpte | GPTE64.A | (GPTE64.D if is_leaf and write else ZERO)


@kernel
def check_writable(mem, host, scratch, stat, mode, root, gva, leaf_level, write):
    """Translate once more, for writing, the address of each guest entry in which a flag has to be set: under EPT without A and D
    that is a read and a write (29.3.3.2). An exit, or ok where all may be written."""
    table, level = root, mode.levels
    while True:
        gpte = scratch.entries[level]
        if with_flags(gpte, level == leaf_level, write) != gpte:
            gpa = entry_gpa(mode, table, gva, level)
            found = walk_dimension(host.ept, host.npt, mem, scratch.host, stat, gpa, EPT.R | EPT.W, True, False)
            if not found.ok:
                return nested_exit(gpa, level, found)
        if level == leaf_level:
            return NestedWalk(True, ZERO, ZERO, level, ZERO, ZERO, ZERO, ZERO)
        table = gpte & mode.root
        level -= ONE


@kernel
def set_guest_flags(mem, scratch, mode, gva, leaf_level, write):
    """Set A from the guest's top table down to its leaf, and D in the leaf of a write; entries in ROM stay as they are. False when
    an entry had changed since the walk read it."""
    level = mode.levels
    while True:
        gpte, table = scratch.entries[level], scratch.tables[level]
        wanted = with_flags(gpte, level == leaf_level, write)
        if wanted != gpte and mem.slots[find_slot(mem.slots, table)]["kind"] != ROM:
            if not exchange_entry(mem, mode, table, table_index(gva, level, mode.index_bits), gpte, wanted):
                return False
        if level == leaf_level:
            return True
        level -= ONE


@kernel
def final_kind(access):
    """The access to the final address: READ, WRITE or FETCH of ept.py."""
    if access & PFERR.W != ZERO:
        return EPT.W
    return EPT.X if access & PFERR.F != ZERO else EPT.R


@kernel
def finish(mem, host, scratch, stat, gpa, level, page_access, access):
    """Translate the address that the guest's tables give. It is a user-mode linear address where all of them say U, and with paging
    off (SDM volume 3, 29.3.3.2)."""
    user = page_access & ACC.U != ZERO
    found = walk_dimension(host.ept, host.npt, mem, scratch.host, stat, gpa, final_kind(access), False, user)
    if not found.ok:
        return nested_exit(gpa, level, found)
    return NestedWalk(True, found.hpa, gpa, level, page_access, ZERO, ZERO, ZERO)


@kernel
def walk_nested(mem, mmu, host, scratch, stat, gva, access):
    """Translate `gva` for `access` (PFERR bits) by the guest's tables and the second dimension, in any paging mode of the guest.

    Args:
        mem: MemoryState of the host's memory, which holds all tables; every address of a table is looked up before it is read.
        mmu: MmuState of the guest.
        host: Host.
        scratch: NestedScratch.
        stat: uint64[len(NestedStat)], or None.
        gva: uint64, canonical.
        access: uint64, PFERR.W, U, F, IMPLICIT.
    """
    if mmu.reg[Reg.MODE] == MODE_NONE:
        return finish(mem, host, scratch, stat, gva, ZERO, ACC.ALL, access)
    mode = mode_of(mmu)
    root = mmu.reg[Reg.CR3] & mode.root
    if mode.pae:
        pdpte = mmu.reg[np.uint64(Reg.PDPTE0) + ((gva >> PDPTE_SHIFT) & PDPTE_INDEX)]
        if pdpte & GPTE64.P == ZERO:
            return guest_fault(mmu, PDPTE_LEVEL, access, ZERO)
        root = pdpte & mode.root
    write = access & PFERR.W != ZERO
    while True:  # again when an entry changed between reading it and setting its A or D
        table, level, rights = root, mode.levels, ALL_ONES
        while True:
            gpa = entry_gpa(mode, table, gva, level)
            found = walk_dimension(host.ept, host.npt, mem, scratch.host, stat, gpa, EPT.R, True, False)
            if not found.ok:
                return nested_exit(gpa, level, found)
            at = found.hpa & PAGE_MASK
            if find_slot(mem.slots, at) == NO_SLOT:
                return outside(at, level)
            gpte = read_entry(mem, mode, at, table_index(gva, level, mode.index_bits))
            count(stat, NestedStat.GUEST_READS, ONE)
            if gpte & GPTE64.P == ZERO:
                return guest_fault(mmu, level, access, ZERO)
            large = gpte & mmu.reg[Reg.LARGE]
            if gpte & mmu.reserved[reserved_row(large, level)] != ZERO:
                return guest_fault(mmu, level, access, PFERR.P | PFERR.RSVD)
            rights &= gpte ^ GPTE64.NX
            scratch.entries[level], scratch.tables[level] = gpte, at
            if level == ONE or large != ZERO:
                break
            table = gpte & mode.root
            level -= ONE

        page_access = access_of(rights)
        denied = permission_fault(mmu, page_access, access)
        if mode.keys and key_fault(mmu, gpte, page_access, access):
            return guest_fault(mmu, level, access, PFERR.P | PFERR.PK)
        if denied:
            return guest_fault(mmu, level, access, PFERR.P)
        dirty = gpte & GPTE64.D != ZERO
        if not write and not dirty:
            page_access &= ~ACC.W
        if rights & GPTE64.A == ZERO or (write and not dirty):
            if not tables_are_written(host.ept):
                written = check_writable(mem, host, scratch, stat, mode, root, gva, level, write)
                if not written.ok:
                    return written
            if not set_guest_flags(mem, scratch, mode, gva, level, write):
                continue
        return finish(mem, host, scratch, stat, page_gpa(mode, gpte, gva, level), level, page_access, access)
