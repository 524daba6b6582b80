"""Shadow pages: role, look-up, creation, link, zap, the limit on their number (facts 5.7, 5.11, 5.13, 5.14).

A *direct* page maps guest frames in order; an *indirect* one follows a table of the guest, which is write-protected, or unsync.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner, store
from fastmmu.bits import CR0, CR4, ONE, PAGE_SHIFT, ROLE, ZERO
from fastmmu.leaf import sync_page
from fastmmu.machine_state import Counter, Request, VmWord
from fastmmu.memory import find_slot
from fastmmu.pool import (
    INVALID,
    NO,
    NO_TABLE,
    NONE,
    TABLE_SIZE,
    allocate,
    ask,
    bucket_of,
    count,
    enlist,
    flush_remote,
    forget_nx_split,
    is_obsolete,
    release,
    unhash,
    unlist,
)
from fastmmu.rmap import (
    ACCESS_SHIFT,
    MAX_HUGE_LEVEL,
    QUADRANT_SHIFT,
    add_parent,
    at_cursor,
    drop_leaf,
    drop_parent,
    first,
    is_indirect,
    write_protect,
)
from fastmmu.spte import INDEX_BITS, is_leaf, is_mmio, is_present, is_table, make_table, pfn_of
from fastmmu.state import NO_SLOT
from fastmmu.unsync import clear_path, first_leaf, mark_link, mark_synced, next_leaf, walk_unsync
from fastmmu.walk import MODE_LONG4, MODE_NONE

MIN_FREE_PAGES, REFILL_PAGES = np.uint64(5), np.uint64(25)
ONE_ROOT = np.uint32(1)
TWO = np.uint64(2)


# --- role ------------------------------------------------------------------------------------------------------------------


@inner
def root_role(word, mode, cr0, cr4):
    """Role of the roots for these registers, without level and quadrant: all rights (facts 5.11).

    Under shadow paging KVM runs with EFER.NX whatever the guest has; what its other bits say about permissions is in the role.
    """
    role = ROLE.ACCESS | ROLE.EFER_NX
    if word[VmWord.AD] == ZERO:
        role |= ROLE.AD_DISABLED
    if word[VmWord.TDP] != ZERO:
        return role | ROLE.DIRECT | ROLE.CR0_WP
    if mode == MODE_NONE:
        return role | ROLE.DIRECT
    if cr0 & CR0.WP != ZERO:
        role |= ROLE.CR0_WP
    else:
        role |= ROLE.SMEP_ANDNOT_WP if cr4 & CR4.SMEP != ZERO else ZERO
        role |= ROLE.SMAP_ANDNOT_WP if cr4 & CR4.SMAP != ZERO else ZERO
    if cr4 & CR4.PAE == ZERO:
        role |= ROLE.FOUR_BYTE_GPTE
    return role


@inner
def root_levels(word, mode):
    """Level of the tables that a vCPU's walk begins in: 2 under the four PAE roots, which KVM uses wherever the guest is not in
    long mode."""
    if word[VmWord.TDP] != ZERO:
        return word[VmWord.ROOT_LEVEL]
    return mode if mode >= MODE_LONG4 else TWO


@inner
def child_role(parent, index, access, direct):
    """Role of the page under entry `index` of one with role `parent`: a table of 4-byte entries has two, each for half of it."""
    role = parent & ~(ROLE.LEVEL | ROLE.ACCESS | ROLE.DIRECT | ROLE.QUADRANT)
    role |= ((parent & ROLE.LEVEL) - ONE) | (access << ACCESS_SHIFT) | (ROLE.DIRECT if direct else ZERO)
    if role & ROLE.FOUR_BYTE_GPTE != ZERO:
        role |= (index & ONE) << QUADRANT_SHIFT
    return role


@inner
def role_of(vm, index):
    """Role of the page in which the entry at `index` stands."""
    return np.uint64(vm.page[index >> INDEX_BITS]["role"])


# --- making one ------------------------------------------------------------------------------------------------------------


@inner
def find_or_make(vm, stat, gfn, role):
    """The shadow page for (gfn, role), as it is, or a new one; NO_TABLE when the pool is used up (facts 5.11.4).

    An unsync one of a leaf table, where an upper table is wanted, is zapped: the guest uses the page otherwise now.
    """
    bucket = bucket_of(gfn)
    table = vm.word[bucket]
    collisions = 0
    while table != NO_TABLE:
        page = vm.page[table]
        if not is_obsolete(vm, table):
            if page["gfn"] != gfn:
                collisions += 1
            elif np.uint64(page["role"]) == role:
                break
            elif role & ROLE.LEVEL > ONE and page["unsync"] != NO:
                zap(vm, stat, table)
        table = np.uint64(page["next"])
    commit_zapped(vm, stat, False)
    stat[Counter.MAX_MMU_PAGE_HASH_COLLISIONS] = max(stat[Counter.MAX_MMU_PAGE_HASH_COLLISIONS], collisions)
    if table == NO_TABLE:
        count(stat, Counter.MMU_CACHE_MISS)
        table = allocate(vm, gfn, role & ROLE.LEVEL)
        if table != NO_TABLE:
            vm.page[table]["role"] = np.uint32(role)
            enlist(vm, table, bucket)
            if role & ROLE.DIRECT == ZERO:
                account_shadowed(vm, stat, gfn)
    return table


@inner
def get_shadow_page(vm, vcpu, gfn, role):
    """The same for a fault or a root: one that is unsync is brought up to date, and stays unsync."""
    table = find_or_make(vm, vcpu.stat, gfn, role)
    if table != NO_TABLE and is_indirect(vm.page[table]):
        if vm.page[table]["unsync"] != NO and sync_page(vm, vcpu, table):
            flush_remote(vm.word, vcpu.stat)
        vm.page[table]["floods"] = NO
    return table


@inner
def account_shadowed(vm, stat, gfn):
    """A table of the guest is shadowed from now on: no huge page may cover it, and nobody may write it unseen (facts 5.11.5)."""
    vm.word[VmWord.INDIRECT_PAGES] += ONE
    number = find_slot(vm.mem.slots, gfn << PAGE_SHIFT)
    if number != NO_SLOT:
        slot = vm.mem.slots[number]
        disallow_huge(vm, slot, gfn, 1)
        if write_protect(vm, stat, slot, gfn):
            flush_remote(vm.word, stat)


@inner
def unaccount_shadowed(vm, gfn):
    """The opposite; what was write-protected stays so until it faults."""
    vm.word[VmWord.INDIRECT_PAGES] -= ONE
    number = find_slot(vm.mem.slots, gfn << PAGE_SHIFT)
    if number != NO_SLOT:
        disallow_huge(vm, vm.mem.slots[number], gfn, -1)


@inner
def disallow_huge(vm, slot, gfn, by):
    """Count a reason against huge pages over `gfn`, or take it back."""
    level = TWO
    while level <= MAX_HUGE_LEVEL:
        shift = INDEX_BITS * (level - ONE)
        at = slot["disallow"][level] + (gfn >> shift) - (slot["base"] >> shift)
        if by > 0:
            vm.slot_words[at] += ONE
        else:
            vm.slot_words[at] -= ONE
        level += ONE


@inner
def leads_to(vm, index, level, gfn, role):
    """Whether the entry at `index` points to the page for (gfn, role). One that is linked already does, unless the host changed the
    guest's tables without telling KVM."""
    spte = vm.spt[index]
    if not is_table(spte, level):
        return False
    page = vm.page[pfn_of(spte)]
    return page["gfn"] == gfn and np.uint64(page["role"]) == role


@inner
def link(vm, stat, index, child):
    """Make the entry at `index` point to a table; a huge page or another table in its place is dropped."""
    if is_present(vm.spt[index]):
        zap_entry(vm, stat, index, np.uint64(vm.page[index >> INDEX_BITS]["level"]))
        flush_remote(vm.word, stat)
    store(vm.spt, index, make_table(vm.word, child))  # the table is whole before who walks without the lock sees it
    add_parent(vm, child, index)
    mark_link(vm, index, child)


# --- zapping ---------------------------------------------------------------------------------------------------------------


@inner
def zap_entry(vm, stat, index, level):
    """Empty an entry of a shadow page: a leaf is dropped; a child table stays, without this parent (facts 5.14)."""
    spte = vm.spt[index]
    if is_leaf(spte, level):
        drop_leaf(vm, stat, index)
    elif is_table(spte, level):
        drop_parent(vm, pfn_of(spte), index)
    elif is_mmio(vm.word, spte):
        vm.spt[index] = ZERO


@inner
def zap_alone(vm, stat, table):
    """Empty a shadow page and take it out of use: it is freed by `commit_zapped`, or later if vCPUs have it as a root. Whether it
    is to be freed."""
    count(stat, Counter.MMU_SHADOW_ZAPPED)
    page = vm.page[table]
    for index in range(table * TABLE_SIZE, (table + ONE) * TABLE_SIZE):
        if vm.spt[index] != ZERO:
            zap_entry(vm, stat, index, np.uint64(page["level"]))
    while page["parents"] != ZERO:
        drop_parent(vm, table, at_cursor(vm, first(page["parents"])))
    was_invalid = page["role"] & INVALID != NONE
    if not was_invalid:
        unlist(vm, table)
        if is_indirect(page):
            unaccount_shadowed(vm, page["gfn"])
    if page["unsync"] != NO:
        mark_synced(vm, stat, table)
    forget_nx_split(vm, stat, table)
    freed = page["roots"] == NONE
    if freed:
        vm.word[VmWord.USED_PAGES] -= ONE
        page["newer"] = vm.word[VmWord.ZAPPED]
        vm.word[VmWord.ZAPPED] = table
    elif not is_obsolete(vm, table):
        ask(vm.word, np.uint64(Request.FREE_OBSOLETE_ROOTS))
    page["role"] |= INVALID
    return freed


@inner
def zap(vm, stat, table):
    """Zap a shadow page, before it the unsync ones under it (facts 5.14); how many are to be freed by `commit_zapped`."""
    freed = ZERO
    if np.uint64(vm.page[table]["level"]) > ONE:
        while walk_unsync(vm, table):
            at = first_leaf(vm)
            while at < vm.word[VmWord.VECTOR_LENGTH]:
                zap_alone(vm, stat, vm.word[np.uint64(VmWord.VECTOR_TABLE) + at])
                clear_path(vm)
                freed += ONE
                at = next_leaf(vm, at + ONE)
    return freed + ONE if zap_alone(vm, stat, table) else freed


@inner
def commit_zapped(vm, stat, flushes):
    """Flush, and free the pages that were zapped. Without any, flush if `flushes`."""
    table = vm.word[VmWord.ZAPPED]
    if table != NO_TABLE or flushes:
        flush_remote(vm.word, stat)
    while table != NO_TABLE:
        following = np.uint64(vm.page[table]["newer"])
        unhash(vm, table)
        release(vm, table)
        table = following
    vm.word[VmWord.ZAPPED] = NO_TABLE


@inner
def put_root(vm, stat, table):
    """A vCPU lets go of a root, which is zapped if it was only kept for that."""
    vm.page[table]["roots"] -= ONE_ROOT
    if vm.page[table]["roots"] == NONE and vm.page[table]["role"] & INVALID != NONE:
        zap(vm, stat, table)


@inner
def zap_obsolete(vm, stat):
    """Zap all shadow pages of the last generation, the oldest first."""
    table = vm.word[VmWord.OLDEST]
    while table != NO_TABLE and is_obsolete(vm, table):
        zap(vm, stat, table)
        table = vm.word[VmWord.OLDEST]
    commit_zapped(vm, stat, False)


@inner
def zap_oldest(vm, stat, wanted):
    """Zap the oldest shadow pages that are no root in use, until `wanted` are freed (facts 5.7).

    Where one took others with it the list has changed: begin again at its end, as KVM does.
    """
    freed, table = ZERO, vm.word[VmWord.OLDEST]
    while table != NO_TABLE:
        newer = np.uint64(vm.page[table]["newer"])
        if vm.page[table]["roots"] == NONE:
            number = zap(vm, stat, table)
            freed += number
            if freed >= wanted:
                break
            if number != ONE:
                newer = vm.word[VmWord.OLDEST]
        table = newer
    commit_zapped(vm, stat, False)
    stat[Counter.MMU_RECYCLED] += np.int64(freed)


@inner
def is_short_of_pages(word):
    """Whether fewer shadow pages are free than one fault may need."""
    return word[VmWord.USED_PAGES] + MIN_FREE_PAGES > word[VmWord.MAX_PAGES]


@inner
def make_pages_available(vm, stat):
    """Zap until there are enough shadow pages for many faults; False when not even one is free (facts 5.7)."""
    word = vm.word
    free = word[VmWord.MAX_PAGES] - min(word[VmWord.USED_PAGES], word[VmWord.MAX_PAGES])
    zap_oldest(vm, stat, REFILL_PAGES - free)
    return word[VmWord.USED_PAGES] < word[VmWord.MAX_PAGES]


@inner
def set_page_limit(vm, stat, limit):
    """Change the limit; what is used beyond it is zapped."""
    word = vm.word
    if word[VmWord.USED_PAGES] > limit:
        zap_oldest(vm, stat, word[VmWord.USED_PAGES] - limit)
        limit = word[VmWord.USED_PAGES]
    word[VmWord.MAX_PAGES] = limit
