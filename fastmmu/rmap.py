"""Lists of sptes: the reverse map from a frame to the leaves that map it, and from a table to the entries that point to it.

Facts 5.14. The head of a list is one word: 0 for an empty list; the index of its only spte; or, with MANY, where in `desc` its
first descriptor begins. A descriptor is 16 words: the head of the rest of the list, how many sptes it holds, and up to 14 of
them. A cursor goes through a list: 0 at the end, the index of an only spte, or MANY and the place in `desc` where the spte's index
stands.
"""

from __future__ import annotations

import numpy as np

from fastmmu import guards
from fastmmu._jit import exchange, fetch_and, inner, load, store
from fastmmu.bits import NPT_SPTE, ONE, PAGE_OFFSET, PAGE_SHIFT, ROLE, ZERO, bit
from fastmmu.machine_state import Counter, VmWord
from fastmmu.memory import find_slot
from fastmmu.memslot import set_bit
from fastmmu.pool import DIRECT, NONE, TABLE_SIZE, count_leaf, count_protected, flush_remote
from fastmmu.spte import INDEX_BITS, age_leaf, is_accessed, is_dirty, is_writable, pages_at
from fastmmu.state import NO_SLOT
from fastmmu.tdp import clear_bits

MANY = bit(63)
REST, LENGTH, FIRST, DESC_WORDS = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(16)
DESC_SPTES = DESC_WORDS - FIRST
LONGEST = 1000  # beyond it all sptes of the list are zapped
MAX_HUGE_LEVEL = np.uint64(3)
ACCESS_SHIFT, QUADRANT_SHIFT = np.uint64(8), np.uint64(5)  # of a role


@inner
def new_desc(vm):
    """An empty descriptor. There is room for one per spte: the pool cannot run out."""
    desc = vm.word[VmWord.FREE_DESC]
    if desc != ZERO:
        vm.word[VmWord.FREE_DESC] = vm.desc[desc + REST]
    else:
        desc = vm.word[VmWord.FRESH_DESC]
        vm.word[VmWord.FRESH_DESC] = desc + DESC_WORDS
    vm.desc[desc + REST] = vm.desc[desc + LENGTH] = ZERO
    return desc


@inner
def add(vm, head, index):
    """(the head of a list with one spte more, how many it had)."""
    if head == ZERO:
        return index, 0
    if head & MANY == ZERO:
        desc = new_desc(vm)
        vm.desc[desc + FIRST], vm.desc[desc + FIRST + ONE], vm.desc[desc + LENGTH] = head, index, FIRST
        return MANY | desc, 1
    desc, had = head & ~MANY, 0
    while vm.desc[desc + LENGTH] == DESC_SPTES:
        had += 14
        if vm.desc[desc + REST] == ZERO:
            vm.desc[desc + REST] = MANY | new_desc(vm)
        desc = vm.desc[desc + REST] & ~MANY
    length = vm.desc[desc + LENGTH]
    vm.desc[desc + FIRST + length] = index
    vm.desc[desc + LENGTH] = length + ONE
    return head, had + np.int64(length)


@inner
def remove(vm, head, index):
    """The head of a list without the spte at `index`, which must be in it: the last one of its descriptor takes its place."""
    if head & MANY == ZERO:
        return ZERO
    before, desc = ZERO, head & ~MANY
    while True:
        length = vm.desc[desc + LENGTH]
        for i in range(length):
            if vm.desc[desc + FIRST + i] == index:
                vm.desc[desc + FIRST + i] = vm.desc[desc + FIRST + length - ONE]
                vm.desc[desc + LENGTH] = length - ONE
                if length != ONE:
                    return head
                rest = vm.desc[desc + REST]
                vm.desc[desc + REST] = vm.word[VmWord.FREE_DESC]
                vm.word[VmWord.FREE_DESC] = desc
                if before == ZERO:
                    return rest
                vm.desc[before + REST] = rest
                return head
        before, desc = desc, vm.desc[desc + REST] & ~MANY


@inner(inline=True)
def first(head):
    """Cursor on the first spte of a list."""
    return head + FIRST if head & MANY != ZERO else head


@inner(inline=True)
def at_cursor(vm, cursor):
    """Index of the spte under the cursor."""
    return vm.desc[cursor & ~MANY] if cursor & MANY != ZERO else cursor


@inner
def after(vm, cursor):
    """Cursor on the next spte, 0 at the end."""
    if cursor & MANY == ZERO:
        return ZERO
    place = cursor & ~MANY
    desc = place & ~(DESC_WORDS - ONE)
    if place + ONE < desc + FIRST + vm.desc[desc + LENGTH]:
        return cursor + ONE
    return first(vm.desc[desc + REST])


# --- tables ----------------------------------------------------------------------------------------------------------------


@inner
def add_parent(vm, child, index):
    """The entry at `index` points to a table."""
    vm.page[child]["parents"], _ = add(vm, vm.page[child]["parents"], index)


@inner
def drop_parent(vm, child, index):
    """The entry at `index` pointed to a table, which stays, without it."""
    vm.page[child]["parents"] = remove(vm, vm.page[child]["parents"], index)
    vm.spt[index] = ZERO


# --- leaves ----------------------------------------------------------------------------------------------------------------


@inner
def is_indirect(page):
    """Whether a shadow page follows a table of the guest."""
    return page["role"] & DIRECT == NONE


@inner
def gfn_of_entry(vm, index):
    """The gfn that a leaf maps: by its place in a direct table, as remembered of a guest's entry in another (facts 8.3)."""
    page = vm.page[index >> INDEX_BITS]
    if is_indirect(page):
        return vm.shadowed[index] >> PAGE_SHIFT
    return page["gfn"] + (index & (TABLE_SIZE - ONE)) * pages_at(np.uint64(page["level"]))


@inner
def access_of_entry(vm, index):
    """The rights that the guest grants the page of a leaf (facts 8.3)."""
    page = vm.page[index >> INDEX_BITS]
    if is_indirect(page):
        return vm.shadowed[index] & PAGE_OFFSET
    return (np.uint64(page["role"]) & ROLE.ACCESS) >> ACCESS_SHIFT


@inner
def remember(vm, index, gfn, access):
    """Keep what a guest's entry says, beside its leaf: one word. A direct page needs none, its role says it."""
    if is_indirect(vm.page[index >> INDEX_BITS]):
        vm.shadowed[index] = (gfn << PAGE_SHIFT) | access


@inner
def rmap_index(slot, gfn, level):
    """Where the slot keeps the list of sptes that map the frame of `gfn` at `level`."""
    shift = INDEX_BITS * (level - ONE)
    return slot["rmap"][level] + (gfn >> shift) - (slot["base"] >> shift)


@inner(inline=True)
def enter_rmap(vm, stat, at, index):
    """Add the leaf at `index` to the list in word `at` of `slot_words`; a list that gets too long is zapped."""
    if vm.slot_words[at] == ZERO:  # nearly always
        vm.slot_words[at] = index
        return
    head, had = add(vm, vm.slot_words[at], index)
    vm.slot_words[at] = head
    if had > stat[Counter.MAX_MMU_RMAP_SIZE]:
        stat[Counter.MAX_MMU_RMAP_SIZE] = had
    if had > LONGEST:
        drop_leaves(vm, stat, at)
        flush_remote(vm.word, stat)


@inner(inline=True)
def add_leaf(vm, stat, slot, index, gfn, access, level):
    """Account for a new leaf of `gfn`, and enter it in the reverse map."""
    remember(vm, index, gfn, access)
    count_leaf(stat, level, 1)
    enter_rmap(vm, stat, rmap_index(slot, gfn, level), index)


@inner
def take_leaf(vm, index):
    """Remove a leaf; returns what it was. The fast path and the processor may still change it until then."""
    if guards.ATOMIC_CLEAR:
        return exchange(vm.spt, index, ZERO)
    old = load(vm.spt, index)
    if is_writable(old) or not is_accessed(vm.word, old):
        return exchange(vm.spt, index, ZERO)
    store(vm.spt, index, ZERO)
    return old


@inner
def drop_leaf(vm, stat, index):
    """Remove the leaf of a shadow page, from the reverse map too."""
    level = np.uint64(vm.page[index >> INDEX_BITS]["level"])
    gfn = gfn_of_entry(vm, index)
    number = find_slot(vm.mem.slots, gfn << PAGE_SHIFT)
    if number != NO_SLOT:
        at = rmap_index(vm.mem.slots[number], gfn, level)
        vm.slot_words[at] = remove(vm, vm.slot_words[at], index)
    old = take_leaf(vm, index)
    if number != NO_SLOT and is_dirty(vm.word, old):
        set_bit(vm.slot_words, vm.mem.slots[number]["host_dirty"], gfn - vm.mem.slots[number]["base"])
    count_leaf(stat, level, -1)


@inner
def drop_leaves(vm, stat, at):
    """Remove every leaf of the list in word `at` of `slot_words`; whether there was one."""
    dropped = False
    while vm.slot_words[at] != ZERO:
        drop_leaf(vm, stat, at_cursor(vm, first(vm.slot_words[at])))
        dropped = True
    return dropped


@inner
def loses(word, old, spte):
    """Whether a present entry loses what a TLB may still have: writability, A or D (facts 6.4)."""
    lost = old & ~spte & (word[VmWord.ACCESSED] | word[VmWord.DIRTY])
    return lost != ZERO or (old & word[VmWord.MMU_WRITABLE] != ZERO and not is_writable(spte))


@inner
def clear_rmap_bits(vm, stat, slot, gfn, level, bits):
    """Clear bits in every leaf that maps the frame of `gfn` at `level`; whether that is a reason to flush."""
    flushes = False
    cursor = first(vm.slot_words[rmap_index(slot, gfn, level)])
    while cursor != ZERO:
        index = at_cursor(vm, cursor)
        cursor = after(vm, cursor)
        seen = load(vm.spt, index)
        if seen & bits != ZERO:
            old = fetch_and(vm.spt, index, ~bits)
            count_protected(stat, old, bits)
            flushes |= loses(vm.word, old, old & ~bits) if guards.FLUSH_IF_MMU_WRITABLE else is_writable(seen)
    return flushes


@inner
def age_list(vm, at):
    """Mark every leaf of the list in word `at` of `slot_words` as not used; whether one was."""
    young = False
    cursor = first(vm.slot_words[at])
    while cursor != ZERO:
        young |= age_leaf(vm.word, vm.spt, at_cursor(vm, cursor))
        cursor = after(vm, cursor)
    return young


@inner
def has_rmaps(word):
    """Whether sptes are found by reverse map: those of shadow pages, also where the TDP MMU has others."""
    return word[VmWord.TDP_MMU] == ZERO or word[VmWord.SHADOW_ROOTS] != ZERO


@inner
def write_protect(vm, stat, slot, gfn):
    """Make every leaf over `gfn` read-only because a guest's table lies there: MMU_WRITABLE goes too (facts 6.4).

    Whether that is a reason to flush.
    """
    bits = NPT_SPTE.W | vm.word[VmWord.MMU_WRITABLE]
    flushes = vm.word[VmWord.TDP_MMU] != ZERO and clear_bits(vm, stat, gfn, gfn + ONE, ONE, bits)
    level = ONE
    while level <= MAX_HUGE_LEVEL:
        flushes |= clear_rmap_bits(vm, stat, slot, gfn, level, bits)
        level += ONE
    return flushes
