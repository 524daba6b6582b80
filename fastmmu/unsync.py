"""Shadow pages that are out of step with the guest's table: who may be, how they are found again (facts 5.12).

The table of a leaf level may be left writable: its shadow pages are *unsync* until the guest flushes. Each page above one has a bit
for the entry that leads to it. The bits are a hint: a walk clears those that lead nowhere.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import ONE, ZERO
from fastmmu.machine_state import VECTOR_SIZE, Counter, VmWord
from fastmmu.pool import NO, NO_TABLE, NONE, TABLE_SIZE, YES, after_indirect, count, first_indirect
from fastmmu.rmap import after, at_cursor, first
from fastmmu.spte import INDEX_BITS, is_table, pfn_of

WORD_BITS, BIT_MASK = np.uint64(6), np.uint64(63)
NOWHERE = TABLE_SIZE
TWO_MIB = np.uint64(9)
HUGE = np.uint64(2)
HALVES = tuple(np.uint64(32 >> i) for i in range(6))
ONE_CHILD = np.uint32(1)
LENGTH, TABLES, ENTRIES = (np.uint64(word) for word in (VmWord.VECTOR_LENGTH, VmWord.VECTOR_TABLE, VmWord.VECTOR_INDEX))
STACK, NEXT, FOUND = (np.uint64(word) for word in (VmWord.STACK_TABLE, VmWord.STACK_INDEX, VmWord.STACK_FOUND))
PATH, PATH_ENTRY = np.uint64(VmWord.PATH_TABLE), np.uint64(VmWord.PATH_INDEX)
FULL = np.uint64(VECTOR_SIZE)


@inner
def may_be_shadowed(vm, slot, gfn):
    """False where no shadow page follows a table at `gfn`: each forbids huge pages over its own frame (facts 5.9.4)."""
    if vm.word[VmWord.INDIRECT_PAGES] == ZERO:
        return False
    return vm.slot_words[slot["disallow"][HUGE] + (gfn >> TWO_MIB) - (slot["base"] >> TWO_MIB)] != ZERO


@inner
def is_write_tracked(vm, slot, gfn):
    """Whether an upper table of the guest at `gfn` is shadowed: writes to it are emulated, each one."""
    if not may_be_shadowed(vm, slot, gfn):
        return False
    table = first_indirect(vm, gfn)
    while table != NO_TABLE:
        if np.uint64(vm.page[table]["level"]) > ONE:
            return True
        table = after_indirect(vm, table, gfn)
    return False


@inner
def refuses_write(vm, stat, slot, gfn, can_unsync, prefetch):
    """Whether an spte of `gfn` must stay read-only. Where a leaf table lies there it becomes unsync instead, if it may (facts
    5.12.2)."""
    if not may_be_shadowed(vm, slot, gfn):
        return False
    if is_write_tracked(vm, slot, gfn):
        return True
    table = first_indirect(vm, gfn)
    while table != NO_TABLE:
        if not can_unsync:
            return True
        if vm.page[table]["unsync"] == NO:
            if prefetch:
                return True
            mark_unsync(vm, stat, table)
        table = after_indirect(vm, table, gfn)
    return False


@inner
def mark_unsync(vm, stat, table):
    """A shadow page goes out of step."""
    count(stat, Counter.MMU_UNSYNC)
    vm.page[table]["unsync"] = YES
    mark_parents(vm, table)


@inner
def mark_synced(vm, stat, table):
    """A shadow page is in step again."""
    stat[Counter.MMU_UNSYNC] -= 1
    vm.page[table]["unsync"] = NO


@inner
def mark_entry(vm, index):
    """An entry leads to an unsync page; whether it is the first of its page to do so."""
    page, entry = vm.page[index >> INDEX_BITS], index & (TABLE_SIZE - ONE)
    mask = ONE << (entry & BIT_MASK)
    if page["unsync_entries"][entry >> WORD_BITS] & mask != ZERO:
        return False
    page["unsync_entries"][entry >> WORD_BITS] |= mask
    page["unsync_children"] += ONE_CHILD
    return page["unsync_children"] == ONE_CHILD


@inner
def clear_entry(vm, table, entry):
    """An entry does not lead to an unsync page any more."""
    vm.page[table]["unsync_entries"][entry >> WORD_BITS] &= ~(ONE << (entry & BIT_MASK))
    vm.page[table]["unsync_children"] -= ONE_CHILD


@inner
def mark_parents(vm, table):
    """Mark every entry on every way from a root to a page. A page is on the list of work once: when its first bit is set."""
    vm.page[table]["work"] = NONE
    while table != NO_TABLE:
        work = np.uint64(vm.page[table]["work"])
        cursor = first(vm.page[table]["parents"])
        while cursor != ZERO:
            index = at_cursor(vm, cursor)
            cursor = after(vm, cursor)
            if mark_entry(vm, index):
                above = index >> INDEX_BITS
                vm.page[above]["work"] = work
                work = above
        table = work


@inner
def mark_link(vm, index, child):
    """An entry was made to point to `child`."""
    if vm.page[child]["unsync_children"] != NONE or vm.page[child]["unsync"] != NO:
        if mark_entry(vm, index):
            mark_parents(vm, index >> INDEX_BITS)


# --- finding them ----------------------------------------------------------------------------------------------------------


@inner
def lowest_bit(mask):
    """Number of the lowest bit set; there must be one."""
    number = ZERO
    for width in HALVES:
        if mask & ((ONE << width) - ONE) == ZERO:
            mask >>= width
            number += width
    return number


@inner
def next_entry(vm, table, entry):
    """The first marked entry of a page from `entry` on, NOWHERE if there is none."""
    while entry < TABLE_SIZE:
        left = vm.page[table]["unsync_entries"][entry >> WORD_BITS] >> (entry & BIT_MASK)
        if left != ZERO:
            return entry + lowest_bit(left)
        entry = (entry | BIT_MASK) + ONE
    return NOWHERE


@inner
def collect(vm, table, entry):
    """Put a page into the vector, an unsync one once; whether it is full now."""
    word = vm.word
    if vm.page[table]["unsync"] != NO:
        for i in range(word[LENGTH]):
            if word[TABLES + i] == table:
                return False
    word[TABLES + word[LENGTH]], word[ENTRIES + word[LENGTH]] = table, entry
    word[LENGTH] += ONE
    return word[LENGTH] == FULL


@inner
def enter_page(vm, table, level):
    """The walk goes on in a page."""
    vm.word[STACK + level], vm.word[NEXT + level], vm.word[FOUND + level] = table, ZERO, ZERO


@inner
def walk_unsync(vm, top):
    """Collect up to 16 pages, unsync leaves and those between them and `top`, depth first; False when there is no leaf.

    As in KVM: so many as fit are handled together, with one flush, then the walk begins anew.
    """
    word = vm.word
    word[LENGTH] = ZERO
    if vm.page[top]["unsync_children"] == NONE:
        return False
    collect(vm, top, NOWHERE)
    level = np.uint64(vm.page[top]["level"])
    highest = level
    enter_page(vm, top, level)
    while True:
        table = word[STACK + level]
        entry = next_entry(vm, table, word[NEXT + level])
        if entry == NOWHERE:
            found = word[FOUND + level]
            if level == highest:
                return found != ZERO
            level += ONE
            word[FOUND + level] += found
            if found == ZERO:
                clear_entry(vm, word[STACK + level], word[NEXT + level] - ONE)
            continue
        word[NEXT + level] = entry + ONE
        spte = vm.spt[table * TABLE_SIZE + entry]
        child = pfn_of(spte) if is_table(spte, level) else NO_TABLE
        if child != NO_TABLE and vm.page[child]["unsync_children"] != NONE:
            if collect(vm, child, entry):
                return True
            level -= ONE
            enter_page(vm, child, level)
        elif child != NO_TABLE and vm.page[child]["unsync"] != NO:
            word[FOUND + level] += ONE
            if collect(vm, child, entry):
                return True
        else:
            clear_entry(vm, table, entry)


@inner
def first_leaf(vm):
    """Number of the first unsync leaf in the vector, with the way to it."""
    vm.word[PATH + np.uint64(vm.page[vm.word[TABLES]]["level"])] = NO_TABLE
    return next_leaf(vm, ZERO)


@inner
def next_leaf(vm, number):
    """Number of the first unsync leaf in the vector from `number` on, with the way to it; the vector's length at the end."""
    word = vm.word
    while number < word[LENGTH]:
        table = word[TABLES + number]
        level = np.uint64(vm.page[table]["level"])
        word[PATH_ENTRY + level] = word[ENTRIES + number]
        if level == ONE:
            break
        word[PATH + level - ONE] = table
        number += ONE
    return number


@inner
def clear_path(vm):
    """The leaf that the path leads to was handled: clear its bits, upwards as long as a page has no other."""
    level = ONE
    while True:
        table = vm.word[PATH + level]
        if table == NO_TABLE:
            return
        clear_entry(vm, table, vm.word[PATH_ENTRY + level])
        if vm.page[table]["unsync_children"] != NONE:
            return
        level += ONE
