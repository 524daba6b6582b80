"""Eager splitting of huge pages in shadow pages: those of nested guests, beside the TDP MMU (facts 8.1 to 8.3).

Follows `kvm_shadow_mmu_try_split_huge_pages` of Linux 6.1. The table that takes a huge page's place has a role, and with it the
guest's access: it is the one kept beside the gfn (`shadowed_translation`). The TDP MMU's own splitting is in tdp.py.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import ONE, ZERO
from fastmmu.machine_state import VmWord
from fastmmu.pool import NO_TABLE, TABLE_SIZE, flush_remote
from fastmmu.rmap import (
    MAX_HUGE_LEVEL,
    access_of_entry,
    add_leaf,
    add_parent,
    at_cursor,
    drop_leaf,
    first,
    gfn_of_entry,
    rmap_index,
)
from fastmmu.shadow import MIN_FREE_PAGES, child_role, find_or_make, role_of
from fastmmu.spte import INDEX_BITS, frame_at, is_last, is_present, make_split_child, make_table, pages_at
from fastmmu.unsync import mark_link


@inner
def has_quota(word):
    """Whether more shadow pages are free than one fault may need."""
    return word[VmWord.USED_PAGES] + MIN_FREE_PAGES < word[VmWord.MAX_PAGES]


@inner
def fill_table(vm, stat, slot, table, huge, access):
    """Map by a table what a huge spte maps; entries that are there stay. Whether one of them is a table, which may lack pages."""
    level, gfn, lacks = np.uint64(vm.page[table]["level"]), vm.page[table]["gfn"], False
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
    huge, access = vm.spt[index], access_of_entry(vm, index)
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
    return True


@inner
def split_list(vm, stat, slot, at):
    """Split the huge leaves on one list of the reverse map, all of nested guests; the rest stays where no quota is left (facts
    8.2)."""
    cursor = first(vm.slot_words[at])
    while cursor != ZERO:
        if not has_quota(vm.word) or not split_shadow_page(vm, stat, slot, at_cursor(vm, cursor)):
            return
        cursor = first(vm.slot_words[at])  # the list has changed


@inner
def split_shadow_range(vm, stat, slot, start, end):
    """Split what covers [start, end), the frame of `start` in any case, down to 4 KiB: all of 1 GiB first. Needs the mmu lock for
    writing."""
    level = np.uint64(MAX_HUGE_LEVEL)
    while level > ONE:
        gfn = start
        while True:
            split_list(vm, stat, slot, rmap_index(slot, gfn, level))
            gfn = frame_at(gfn, level) + pages_at(level)
            if gfn >= end:
                break
        level -= ONE
