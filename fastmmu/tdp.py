"""The TDP MMU: the direct map of two-dimensional paging, tables from guest to host physical addresses (facts 5.4b, 8.7, 9).

One root, shared by all vCPUs. Nothing is hashed, nothing counts against the limit of shadow pages, and no reverse map is needed:
the place of an entry follows from its gfn.
"""

from __future__ import annotations

import numpy as np

from fastmmu import guards
from fastmmu._jit import cmpxchg, exchange, fetch_and, inner, load, pause, store
from fastmmu.bits import ACC, FROZEN, ONE, PAGE_SHIFT, ZERO
from fastmmu.lock import is_contended, yield_lock
from fastmmu.machine_state import TABLE_WORDS, Counter, VmWord
from fastmmu.pool import (
    INVALID,
    NO_TABLE,
    TABLE_SIZE,
    allocate,
    count,
    count_leaf,
    count_protected,
    flush_remote,
    forget_nx_split,
    release,
)
from fastmmu.spte import (
    INDEX_BITS,
    age_leaf,
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

LOST = ~ZERO  # instead of a table: another thread has changed the entry


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
def freeze(spt, index):
    """Remove an entry of a table that goes, so that nobody puts another one there; returns what it was. Who is about to remove it
    alone, under the lock for reading, is waited for (facts 10.5)."""
    spte = exchange(spt, index, FROZEN)
    while spte == FROZEN:
        pause()
        spte = exchange(spt, index, FROZEN)
    return spte


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
        spte, level = freeze(vm.spt, index), np.uint64(vm.page[table]["level"])
        if is_table(spte, level):
            table = pfn_of(spte)
            index = table * TABLE_SIZE
            continue
        if is_leaf(spte, level):
            count_leaf(stat, level, -1)
        index += ONE


@inner
def set_spte(vm, stat, index, level, spte):
    """Replace an entry, and account for it. Needs the mmu lock for writing; the processor and the fast path may still change bits
    of the old one."""
    account(vm, stat, level, exchange(vm.spt, index, spte), spte)


@inner
def try_set_spte(vm, stat, index, level, old, spte):
    """The same under the mmu lock for reading: False, and nothing done, if the entry is not `old` any more, or is being removed
    (facts 10.2)."""
    if old == FROZEN:
        return False
    if cmpxchg(vm.spt, index, old, spte) != old:
        count(stat, Counter.EXCHANGE_FAILED)
        return False
    account(vm, stat, level, old, spte)
    return True


@inner
def account(vm, stat, level, old, spte):
    """What an entry was goes, what it has become comes; a table that it pointed to is freed. For who made the exchange (facts
    10.3)."""
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
def clear_bits(vm, stat, start, end, min_level, bits):
    """Clear bits in every leaf of [start, end) from `min_level` up; returns whether any changed."""
    if vm.word[VmWord.TDP_ROOT] == NO_TABLE:
        return False
    changed = False
    gfn = start
    while gfn < end:
        index, level = lowest_under_root(vm, gfn)
        spte = load(vm.spt, index)
        if level >= min_level and is_present(spte) and spte & bits != ZERO:
            if cmpxchg(vm.spt, index, spte, spte & ~bits) != spte:
                continue  # again: it changed meanwhile
            count_protected(stat, spte, bits)
            changed = True
        gfn = frame_at(gfn, level) + pages_at(level)
    return changed


@inner
def age_leafs(vm, start, end):
    """Mark every leaf that maps any gfn of [start, end) as not used; whether one was."""
    if vm.word[VmWord.TDP_ROOT] == NO_TABLE:
        return False
    young = False
    gfn = start
    while gfn < end:
        index, level = lowest_under_root(vm, gfn)
        if is_present(vm.spt[index]):
            young |= age_leaf(vm.word, vm.spt, index)
        gfn = frame_at(gfn, level) + pages_at(level)
    return young


@inner
def clear_bits_of_mask(vm, stat, base, mask, bits):
    """Clear bits in the 4 KiB leaves of the pages base + i for each bit i of `mask`."""
    if vm.word[VmWord.TDP_ROOT] == NO_TABLE:
        return
    gfn = base
    while mask != ZERO:
        if mask & ONE != ZERO:
            index, level = lowest_under_root(vm, gfn)
            if level == ONE and is_present(vm.spt[index]):
                count_protected(stat, fetch_and(vm.spt, index, ~bits), bits)
        gfn += ONE
        mask >>= ONE


@inner
def split_huge_page(vm, stat, index, level, huge):
    """Replace a huge leaf, which is `huge`, by a table of 512 that map the same; nothing needs a flush (facts 8.7). The table,
    NO_TABLE without a free one, or LOST if the entry is another one by now."""
    below = level - ONE
    gfn = pfn_of(huge)  # memory of the host is where the guest's is, in this model
    table = allocate(vm, gfn, below)
    if table == NO_TABLE:
        return NO_TABLE
    child, step = make_split_child(vm.word, huge, below, ZERO, ACC.ALL), pages_at(below) << PAGE_SHIFT
    for i in range(TABLE_SIZE):
        vm.spt[table * TABLE_SIZE + i] = child + i * step
    vm.page[table]["parents"] = index
    if not guards.SPLIT_EXCHANGE:
        store(vm.spt, index, make_table(vm.word, table))
    elif cmpxchg(vm.spt, index, huge, make_table(vm.word, table)) != huge:
        count(stat, Counter.EXCHANGE_FAILED)
        release(vm, table)
        return LOST
    count_leaf(stat, level, -1)
    count_leaf(stat, below, TABLE_WORDS)
    count(stat, Counter.SPLITS)
    return table


@inner
def split_range(vm, stat, start, end, reading):
    """Split every huge leaf that begins before `end` and reaches beyond `start` down to 4 KiB, eagerly (facts 8.7); stops where no
    table is free. The mmu lock is held, for `reading` or for writing, and dropped where somebody waits."""
    if vm.word[VmWord.TDP_ROOT] == NO_TABLE:
        return
    gfn = start
    while True:
        if is_contended(vm.word):
            yield_lock(vm.word, stat, reading)
        index, level = lowest_under_root(vm, gfn)
        if frame_at(gfn, level) >= end:
            return
        spte = load(vm.spt, index)
        if level > ONE and is_leaf(spte, level):
            if split_huge_page(vm, stat, index, level, spte) == NO_TABLE:
                return
        elif not is_table(spte, level):
            gfn = frame_at(gfn, level) + pages_at(level)


@inner
def link_table(vm, stat, index, level, gfn, nx_split, old):
    """Put an empty table under the entry at `index`, in place of `old`: nothing, or an MMIO spte. NO_TABLE without a free one, LOST
    if another thread was faster."""
    table = allocate(vm, frame_at(gfn, level), level - ONE)
    if table == NO_TABLE:
        return table
    vm.page[table]["parents"] = index
    vm.page[table]["nx_split"] = nx_split
    if cmpxchg(vm.spt, index, old, make_table(vm.word, table)) != old:
        count(stat, Counter.EXCHANGE_FAILED)
        release(vm, table)
        return LOST
    if nx_split:
        count(stat, Counter.NX_LPAGE_SPLITS)
    return table


@inner
def zap_huge(vm, stat, index, level, old):
    """A huge leaf gives way to a table: it is frozen, and flushed before anything else takes its place (facts 10.4). False if it
    had changed."""
    if not try_set_spte(vm, stat, index, level, old, FROZEN if guards.FROZEN_ZAP else ZERO):
        return False
    flush_remote(vm.word, stat)
    store(vm.spt, index, ZERO)
    return True
