"""Eager splitting of huge pages in shadow pages (facts 8.1 to 8.6): of nested guests beside the TDP MMU, as it was merged, or of
every guest, as the first versions of the patches had it.

Follows `kvm_shadow_mmu_try_split_huge_pages` of Linux 6.1. The table that takes a huge page's place has a role, and with it the
guest's access; where that comes from is the VM's SPLIT_ACCESS. The TDP MMU's own splitting is in tdp.py.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner, load
from fastmmu.bits import ACC, EPT, GPTE64, HALF_SHIFT, NPT_SPTE, ONE, PAGE_SHIFT, ROLE, WORD_SHIFT, ZERO
from fastmmu.descent import is_executable
from fastmmu.lock import is_contended, yield_lock
from fastmmu.machine_state import Counter, SplitAccess, VmWord
from fastmmu.pool import NO_TABLE, NONE, TABLE_SIZE, count, count_leaf, flush_remote
from fastmmu.rmap import (
    ACCESS_SHIFT,
    MAX_HUGE_LEVEL,
    QUADRANT_SHIFT,
    access_of_entry,
    add_leaf,
    add_parent,
    at_cursor,
    drop_leaf,
    enter_rmap,
    first,
    gfn_of_entry,
    is_indirect,
    rmap_index,
)
from fastmmu.shadow import MIN_FREE_PAGES, child_role, find_or_make, role_of
from fastmmu.spte import (
    INDEX_BITS,
    frame_at,
    is_access_tracked,
    is_last,
    is_present,
    make_split_child,
    make_table,
    pages_at,
    restore_access,
)
from fastmmu.unsync import mark_link
from fastmmu.walk import access_of

GUEST_WALK, PROPAGATE = np.uint64(SplitAccess.GUEST_WALK), np.uint64(SplitAccess.PROPAGATE)
FOUR_BYTE = np.uint32(ROLE.FOUR_BYTE_GPTE)
HALF_DIRECTORY_BITS = INDEX_BITS - ONE  # a directory of 4-byte entries has a shadow page for each quarter: two sptes an entry


# --- the guest's rights ----------------------------------------------------------------------------------------------------


@inner
def guest_entry(vm, index):
    """The guest's entry that a huge spte in an indirect page follows, as it is now (facts 8.6)."""
    page, entry = vm.page[index >> INDEX_BITS], index & (TABLE_SIZE - ONE)
    table = page["gfn"] << PAGE_SHIFT
    if page["role"] & FOUR_BYTE != NONE:
        quadrant = (np.uint64(page["role"]) & ROLE.QUADRANT) >> QUADRANT_SHIFT
        return np.uint64(load(vm.mem.halves, (table >> HALF_SHIFT) + (quadrant << HALF_DIRECTORY_BITS) + (entry >> ONE)))
    return load(vm.mem.words, (table >> WORD_SHIFT) + entry)


@inner
def walked_access(vm, stat, index):
    """What the guest's tables grant, read again: of the tables above, the role says it. No vCPU is at hand, only what the role and
    the spte tell of the guest's registers."""
    role = role_of(vm, index)
    granted = (role & ROLE.ACCESS) >> ACCESS_SHIFT
    if not is_indirect(vm.page[index >> INDEX_BITS]):
        return granted
    count(stat, Counter.SPLIT_READS)
    entry = guest_entry(vm, index)
    if role & ROLE.GUEST_MODE != ZERO and vm.word[VmWord.EPT] != ZERO:
        access = (entry & EPT.W) | (ACC.U if entry & EPT.R != ZERO else ZERO) | (ACC.X if entry & EPT.X != ZERO else ZERO)
        dirty = entry & EPT.D != ZERO or role & ROLE.AD_DISABLED != ZERO
    else:
        access = access_of(entry ^ GPTE64.NX)
        dirty = entry & GPTE64.D != ZERO
    access &= granted if dirty else granted & ~ACC.W
    writable = vm.spt[index] & (NPT_SPTE.W | vm.word[VmWord.MMU_WRITABLE]) != ZERO
    if writable and access & ACC.W == ZERO and role & (ROLE.CR0_WP | ROLE.GUEST_MODE) == ZERO:
        access = (access | ACC.W) & ~ACC.U  # mapped by a supervisor's write without CR0.WP (facts 1.8)
        access = access & ~ACC.X if role & ROLE.SMEP_ANDNOT_WP != ZERO else access
    return access


@inner
def propagated_access(vm, index):
    """What the huge spte itself allows: less than the guest where KVM has a policy of its own, NX huge pages above all."""
    word, spte = vm.word, vm.spt[index]
    spte = restore_access(spte) if is_access_tracked(word, spte) else spte
    access = ACC.X if is_executable(word, spte) else ZERO
    access |= ACC.W if spte & (NPT_SPTE.W | word[VmWord.MMU_WRITABLE]) != ZERO else ZERO
    return access | (ACC.U if spte & word[VmWord.USER] != ZERO else ZERO)


@inner
def split_access(vm, stat, index):
    """The guest's rights to the page of the huge spte at `index`, by the VM's strategy. The direct map of two-dimensional paging
    knows: all of them."""
    which, role = vm.word[VmWord.SPLIT_ACCESS], role_of(vm, index)
    if which == GUEST_WALK:
        return walked_access(vm, stat, index)
    if which == PROPAGATE and (vm.word[VmWord.TDP] == ZERO or role & ROLE.GUEST_MODE != ZERO):
        return propagated_access(vm, index)
    return access_of_entry(vm, index)


# --- one huge page ---------------------------------------------------------------------------------------------------------


@inner
def has_quota(word):
    """Whether more shadow pages are free than one fault may need."""
    return word[VmWord.USED_PAGES] + MIN_FREE_PAGES < word[VmWord.MAX_PAGES]


@inner
def is_empty(words, start):
    """Whether 512 words hold nothing."""
    filled = ZERO
    for i in range(start, start + TABLE_SIZE):
        filled |= words[i]
    return filled == ZERO


@inner
def fill_empty_table(vm, stat, at, table, level, child, step):
    """Map by an empty table what a huge spte maps: `child`, then each `step` beyond. `at`: where the first one's reverse map is."""
    start = table << INDEX_BITS
    for i in range(TABLE_SIZE):
        vm.spt[start + i] = child + i * step
    if is_empty(vm.slot_words, at):
        for i in range(TABLE_SIZE):
            vm.slot_words[at + i] = start + i
    else:
        for i in range(TABLE_SIZE):
            enter_rmap(vm, stat, at + i, start + i)
    count_leaf(stat, level, np.int64(TABLE_SIZE))


@inner
def fill_table(vm, stat, slot, table, huge, access):
    """Map by a table what a huge spte maps; entries that are there stay. Whether one of them is a table, which may lack pages."""
    level, gfn, lacks = np.uint64(vm.page[table]["level"]), vm.page[table]["gfn"], False
    if is_empty(vm.spt, table << INDEX_BITS):
        child = make_split_child(vm.word, huge, level, ZERO, access)
        fill_empty_table(vm, stat, rmap_index(slot, gfn, level), table, level, child, pages_at(level) << PAGE_SHIFT)
        return False
    for i in range(TABLE_SIZE):
        index = (table << INDEX_BITS) + i
        if is_present(vm.spt[index]):
            lacks |= not is_last(vm.spt[index], level)
            continue
        vm.spt[index] = make_split_child(vm.word, huge, level, i, access)
        add_leaf(vm, stat, slot, index, gfn + i * pages_at(level), access, level)
    return lacks


@inner
def split_shadow_page(vm, stat, slot, index):
    """Replace the huge leaf at `index` by a table; False where the pool has none."""
    huge, access = vm.spt[index], split_access(vm, stat, index)
    table = find_or_make(vm, stat, gfn_of_entry(vm, index), child_role(role_of(vm, index), index, access, True))
    if table == NO_TABLE:
        return False
    lacks = fill_table(vm, stat, slot, table, huge, access)
    drop_leaf(vm, stat, index)
    if lacks:
        flush_remote(vm.word, stat)
    vm.spt[index] = make_table(vm.word, table)
    add_parent(vm, table, index)
    mark_link(vm, index, table)
    count(stat, Counter.SPLITS)
    return True


# --- a range of them -------------------------------------------------------------------------------------------------------


@inner
def split_list(vm, stat, slot, at):
    """Split the huge leaves on one list of the reverse map; the rest stays where no quota is left (facts 8.2).

    KVM keeps one table and its descriptors ready for the next split. When they are used, or somebody waits for the mmu lock, it
    drops the lock, fills them up, and begins the list anew.
    """
    cursor = first(vm.slot_words[at])
    while cursor != ZERO:
        made = stat[Counter.MMU_CACHE_MISS]
        if not has_quota(vm.word) or not split_shadow_page(vm, stat, slot, at_cursor(vm, cursor)):
            return
        if stat[Counter.MMU_CACHE_MISS] != made or is_contended(vm.word):
            yield_lock(vm.word, stat, False)
        cursor = first(vm.slot_words[at])  # the list has changed


@inner
def split_shadow_range(vm, stat, slot, start, end):
    """Split what covers [start, end), the frame of `start` in any case, down to 4 KiB: all of 1 GiB first. Needs the mmu lock for
    writing, and drops it now and then."""
    level = np.uint64(MAX_HUGE_LEVEL)
    while level > ONE:
        gfn = start
        while True:
            split_list(vm, stat, slot, rmap_index(slot, gfn, level))
            gfn = frame_at(gfn, level) + pages_at(level)
            if gfn >= end:
                break
        level -= ONE
