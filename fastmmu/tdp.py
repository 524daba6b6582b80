"""The TDP MMU: the direct map of two-dimensional paging, tables from guest to host physical addresses (facts 5.4b, 8.7, 9).

One root, shared by all vCPUs. Nothing is hashed, nothing counts against the limit of shadow pages, and no reverse map is needed:
the place of an entry follows from its gfn.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import ONE, ZERO
from fastmmu.machine_state import TABLE_WORDS, Counter, VmWord
from fastmmu.pool import INVALID, NO_TABLE, TABLE_SIZE, allocate, count, count_leaf, flush_remote, forget_nx_split, release
from fastmmu.spte import (
    INDEX_BITS,
    frame_at,
    is_leaf,
    is_present,
    is_table,
    lowest,
    make_split_child,
    make_table,
    pages_at,
    pfn_of,
)


@inner
def get_root(vm):
    """The root for one more vCPU, made if there is none; NO_TABLE when the pool is used up."""
    root = vm.word[VmWord.TDP_ROOT]
    if root == NO_TABLE:
        root = allocate(vm, ZERO, vm.word[VmWord.ROOT_LEVEL])
        if root == NO_TABLE:
            return root
        vm.word[VmWord.TDP_ROOT] = root
    vm.page[root]["roots"] += np.uint32(1)
    return root


@inner
def put_root(vm, stat, root):
    """A vCPU lets go of a root. It stays for the next one, with all its tables, unless it was invalidated meanwhile (truth C:
    `mode` steps keep pages_4k)."""
    vm.page[root]["roots"] -= np.uint32(1)
    if vm.page[root]["roots"] == np.uint32(0) and vm.page[root]["role"] & INVALID != np.uint32(0):
        free_tables(vm, stat, root)


@inner
def invalidate_root(vm, stat):
    """Zap everything: the root becomes invalid and empty; vCPUs let go of it before they enter the guest again."""
    root = vm.word[VmWord.TDP_ROOT]
    if root == NO_TABLE:
        return
    vm.word[VmWord.TDP_ROOT] = NO_TABLE
    vm.page[root]["role"] |= INVALID
    level = vm.word[VmWord.ROOT_LEVEL]
    for index in range(root * TABLE_SIZE, (root + ONE) * TABLE_SIZE):
        if is_table(vm.spt[index], level):
            free_tables(vm, stat, pfn_of(vm.spt[index]))
        vm.spt[index] = ZERO
    if vm.page[root]["roots"] == np.uint32(0):
        free_tables(vm, stat, root)


@inner
def free_tables(vm, stat, top):
    """Free a table that nothing points to any more, and all tables below it."""
    table, index = top, top * TABLE_SIZE
    while True:
        if index == (table + ONE) * TABLE_SIZE:
            parent = vm.page[table]["parents"]
            forget_nx_split(vm, stat, table)
            release(vm, table)
            if table == top:
                return
            table, index = parent >> INDEX_BITS, parent + ONE
            continue
        spte, level = vm.spt[index], np.uint64(vm.page[table]["level"])
        if is_table(spte, level):
            table = pfn_of(spte)
            index = table * TABLE_SIZE
            continue
        if is_leaf(spte, level):
            count_leaf(stat, level, -1)
        index += ONE


@inner
def point_to(vm, index, table):
    """Make the entry at `index` point to a table."""
    vm.spt[index] = make_table(vm.word, table)
    vm.page[table]["parents"] = index


@inner
def set_spte(vm, stat, index, level, spte):
    """Replace an entry, and account for what it was and what it becomes; a table that it pointed to is freed."""
    old = vm.spt[index]
    vm.spt[index] = spte
    if is_leaf(old, level):
        count_leaf(stat, level, -1)
    elif is_present(old):
        free_tables(vm, stat, pfn_of(old))
    if is_leaf(spte, level):
        count_leaf(stat, level, 1)


@inner
def lowest_under_root(vm, gfn):
    """(index, level) of the lowest entry for `gfn`. There must be a root."""
    return lowest(vm.spt, vm.word[VmWord.TDP_ROOT], vm.word[VmWord.ROOT_LEVEL], gfn)


@inner
def zap_leafs(vm, stat, start, end):
    """Remove every leaf that maps any gfn of [start, end); returns whether there was one."""
    if vm.word[VmWord.TDP_ROOT] == NO_TABLE:
        return False
    zapped = False
    gfn = start
    while gfn < end:
        index, level = lowest_under_root(vm, gfn)
        if is_present(vm.spt[index]):
            set_spte(vm, stat, index, level, ZERO)
            zapped = True
        gfn = frame_at(gfn, level) + pages_at(level)
    return zapped


@inner
def clear_bits(vm, start, end, min_level, bits):
    """Clear bits in every leaf of [start, end) from `min_level` up; returns whether any changed."""
    if vm.word[VmWord.TDP_ROOT] == NO_TABLE:
        return False
    changed = False
    gfn = start
    while gfn < end:
        index, level = lowest_under_root(vm, gfn)
        spte = vm.spt[index]
        if level >= min_level and is_present(spte) and spte & bits != ZERO:
            vm.spt[index] = spte & ~bits
            changed = True
        gfn = frame_at(gfn, level) + pages_at(level)
    return changed


@inner
def clear_bits_of_mask(vm, base, mask, bits):
    """Clear bits in the 4 KiB leaves of the pages base + i for each bit i of `mask`."""
    if vm.word[VmWord.TDP_ROOT] == NO_TABLE:
        return
    gfn = base
    while mask != ZERO:
        if mask & ONE != ZERO:
            index, level = lowest_under_root(vm, gfn)
            if level == ONE and is_present(vm.spt[index]):
                vm.spt[index] &= ~bits
        gfn += ONE
        mask >>= ONE


@inner
def split_huge_page(vm, stat, index, level):
    """Replace a huge leaf by a table of 512 that map the same; nothing needs a flush (facts 8.7). False without a free table."""
    huge = vm.spt[index]
    below = level - ONE
    gfn = pfn_of(huge)  # memory of the host is where the guest's is, in this model
    table = allocate(vm, gfn, below)
    if table == NO_TABLE:
        return False
    for i in range(TABLE_SIZE):
        vm.spt[table * TABLE_SIZE + i] = make_split_child(vm.word, huge, below, i)
    point_to(vm, index, table)
    count_leaf(stat, level, -1)
    count_leaf(stat, below, TABLE_WORDS)
    return True


@inner
def split_range(vm, stat, start, end):
    """Split every huge leaf that begins before `end` and reaches beyond `start` down to 4 KiB, eagerly (facts 8.7); stops where no
    table is free."""
    if vm.word[VmWord.TDP_ROOT] == NO_TABLE:
        return
    gfn = start
    while True:
        index, level = lowest_under_root(vm, gfn)
        if frame_at(gfn, level) >= end:
            return
        if is_present(vm.spt[index]) and level > ONE:
            if not split_huge_page(vm, stat, index, level):
                return
        else:
            gfn = frame_at(gfn, level) + pages_at(level)


@inner
def link_table(vm, stat, index, level, gfn, nx_split):
    """Put an empty table under the entry at `index`, in place of nothing or of an MMIO spte; NO_TABLE without a free one."""
    table = allocate(vm, frame_at(gfn, level), level - ONE)
    if table == NO_TABLE:
        return table
    point_to(vm, index, table)
    vm.page[table]["nx_split"] = nx_split
    if nx_split:
        count(stat, Counter.NX_LPAGE_SPLITS)
    return table


@inner
def zap_huge(vm, stat, index, level):
    """A huge leaf gives way to a table: it is removed, and flushed before the table appears."""
    set_spte(vm, stat, index, level, ZERO)
    flush_remote(vm.word, stat)
