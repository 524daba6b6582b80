"""The pool of tables, and the shadow pages among them: role, hash, link, unlink, zap, the limit on their number.

Facts 5.7, 5.11, 5.14. Tables of the TDP MMU come from the same pool but are neither hashed nor counted. A table is named by its
row; its sptes begin at row * 512 in `spt`. An spte is named by its index there; index 0 is none.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import ACC, ONE, PAGE_SHIFT, ROLE, ZERO, field
from fastmmu.machine_state import HASH_BUCKETS, REQUESTS, TABLE_WORDS, Counter, Request, VmWord
from fastmmu.memory import find_slot
from fastmmu.spte import INDEX_BITS, is_leaf, is_mmio, is_table, make_table, pages_at, pfn_of
from fastmmu.state import NO_SLOT

MULTIPLIER_HIGH, MULTIPLIER_LOW = np.uint64(0x61C88646), np.uint64(0x80B583EB)  # the golden ratio, as the kernel has it
HALF_SHIFT, HALF_MASK = np.uint64(32), field(31, 0)
BUCKET_SHIFT = np.uint64(32 - HASH_BUCKETS.bit_length() + 1)
ACCESS_SHIFT = np.uint64(8)
NO_TABLE = ZERO
MIN_FREE_PAGES, REFILL_PAGES = np.uint64(5), np.uint64(25)
INVALID = np.uint32(ROLE.INVALID)
TABLE_SIZE = np.uint64(TABLE_WORDS)
NONE, NO, YES = np.uint32(0), np.uint8(0), np.uint8(1)
PAGES_4K = np.uint64(Counter.PAGES_4K)


@inner
def count(stat, which):
    """Count one."""
    stat[which] += 1


@inner
def flush_remote(word, stat):
    """Ask for a flush of every vCPU's TLB, before it enters the guest again."""
    count(stat, Counter.REMOTE_TLB_FLUSH_REQUESTS)
    ask(word, np.uint64(Request.TLB_FLUSH))


@inner
def ask(word, which):
    """Ask all vCPUs for something."""
    for i in range(word[VmWord.VCPUS]):
        word[REQUESTS + i] |= which


@inner
def count_leaf(stat, level, by):
    """Leaf sptes of `level` became more by so many, an int; or fewer."""
    stat[PAGES_4K + level - ONE] += by


# --- tables ----------------------------------------------------------------------------------------------------------------


@inner
def allocate(vm, gfn, level):
    """A table of zeros, or NO_TABLE when the pool is used up."""
    word = vm.word
    table = word[VmWord.FREE_TABLE]
    if table != NO_TABLE:
        word[VmWord.FREE_TABLE] = np.uint64(vm.page[table]["next"])
        vm.spt[table * TABLE_SIZE : (table + ONE) * TABLE_SIZE] = ZERO
    else:
        table = word[VmWord.FRESH_TABLE]  # never used: the memory under it is zero
        if table >= np.uint64(len(vm.page)):
            return NO_TABLE
        word[VmWord.FRESH_TABLE] = table + ONE
    page = vm.page[table]
    page["gfn"], page["level"], page["parent"] = gfn, level, ZERO
    page["role"] = np.uint32(level)
    page["roots"] = page["next"] = page["older"] = page["newer"] = NONE
    page["generation"] = word[VmWord.VALID_GENERATION]
    page["nx_split"] = NO
    return table


@inner
def release(vm, table):
    """Give a table back."""
    vm.page[table]["role"] = NONE
    vm.page[table]["next"] = vm.word[VmWord.FREE_TABLE]
    vm.word[VmWord.FREE_TABLE] = table


@inner
def forget_nx_split(vm, stat, table):
    """A table that an execution had made is no longer one that could be a huge page."""
    if vm.page[table]["nx_split"] != NO:
        vm.page[table]["nx_split"] = NO
        stat[Counter.NX_LPAGE_SPLITS] -= 1


# --- reverse map -----------------------------------------------------------------------------------------------------------


@inner
def rmap_index(slot, gfn, level):
    """Where the slot keeps the spte that maps the frame of `gfn` at `level`."""
    shift = INDEX_BITS * (level - ONE)
    return slot["rmap"][level] + (gfn >> shift) - (slot["base"] >> shift)


@inner
def rmap_set(vm, gfn, level, spte_index):
    """A leaf of a shadow page maps `gfn` (direct maps: one spte for a frame and level, at most). 0 removes it."""
    number = find_slot(vm.mem.slots, gfn << PAGE_SHIFT)
    if number != NO_SLOT:
        vm.slot_words[rmap_index(vm.mem.slots[number], gfn, level)] = spte_index


# --- shadow pages ----------------------------------------------------------------------------------------------------------


@inner
def direct_role(word, level):
    """Role word of a direct shadow page (facts 5.11)."""
    role = ROLE.DIRECT | (ACC.ALL << ACCESS_SHIFT) | ROLE.EFER_NX | level
    if word[VmWord.TDP] != ZERO:
        role |= ROLE.CR0_WP
    if word[VmWord.AD] == ZERO:
        role |= ROLE.AD_DISABLED
    return np.uint32(role)


@inner
def bucket_of(gfn):
    """Index in `word` of the hash bucket: the top bits of the gfn times the multiplier, modulo 2^64, without overflow."""
    low, high = gfn & HALF_MASK, gfn >> HALF_SHIFT
    top = (low * MULTIPLIER_LOW) >> HALF_SHIFT
    top += (low * MULTIPLIER_HIGH) & HALF_MASK
    top += (high * MULTIPLIER_LOW) & HALF_MASK
    return np.uint64(VmWord.HASH) + ((top & HALF_MASK) >> BUCKET_SHIFT)


@inner
def is_obsolete(vm, table):
    """Zapped while it was a root, or left over from before everything was zapped."""
    page = vm.page[table]
    return page["role"] & INVALID != NONE or np.uint64(page["generation"]) != vm.word[VmWord.VALID_GENERATION]


@inner
def get_shadow_page(vm, stat, gfn, level):
    """The direct shadow page for (gfn, level), looked up or made; NO_TABLE when the pool is used up (facts 5.11.4)."""
    role = direct_role(vm.word, level)
    bucket = bucket_of(gfn)
    table = vm.word[bucket]
    collisions = ZERO
    while table != NO_TABLE:
        page = vm.page[table]
        if not is_obsolete(vm, table):
            if page["gfn"] != gfn:
                collisions += ONE
            elif page["role"] == role:
                break
        table = np.uint64(page["next"])
    if table == NO_TABLE:
        count(stat, Counter.MMU_CACHE_MISS)
        table = make_shadow_page(vm, gfn, level, role, bucket)
    stat[Counter.MAX_MMU_PAGE_HASH_COLLISIONS] = max(stat[Counter.MAX_MMU_PAGE_HASH_COLLISIONS], np.int64(collisions))
    return table


@inner
def make_shadow_page(vm, gfn, level, role, bucket):
    """A new shadow page: hashed, the newest of the list, counted against the limit."""
    table = allocate(vm, gfn, level)
    if table == NO_TABLE:
        return table
    word, page = vm.word, vm.page[table]
    page["role"], page["next"] = role, word[bucket]
    word[bucket] = table
    page["older"] = word[VmWord.NEWEST]
    if word[VmWord.NEWEST] != NO_TABLE:
        vm.page[word[VmWord.NEWEST]]["newer"] = table
    else:
        word[VmWord.OLDEST] = table
    word[VmWord.NEWEST] = table
    word[VmWord.USED_PAGES] += ONE
    return table


@inner
def unlist(vm, table):
    """Take a shadow page off the list by age."""
    word, page = vm.word, vm.page[table]
    older, newer = np.uint64(page["older"]), np.uint64(page["newer"])
    if newer != NO_TABLE:
        vm.page[newer]["older"] = older
    else:
        word[VmWord.NEWEST] = older
    if older != NO_TABLE:
        vm.page[older]["newer"] = newer
    else:
        word[VmWord.OLDEST] = newer
    page["older"] = page["newer"] = NONE


@inner
def unhash(vm, table):
    """Take a shadow page out of its hash bucket."""
    bucket = bucket_of(vm.page[table]["gfn"])
    after = np.uint64(vm.page[table]["next"])
    at = vm.word[bucket]
    if at == table:
        vm.word[bucket] = after
        return
    while np.uint64(vm.page[at]["next"]) != table:
        at = np.uint64(vm.page[at]["next"])
    vm.page[at]["next"] = after


@inner
def link(vm, index, child):
    """Make the entry at `index` point to a table."""
    vm.spt[index] = make_table(vm.word, child)
    vm.page[child]["parent"] = index


@inner
def gfn_of_entry(vm, index):
    """First gfn that the entry at `index` of a direct table maps."""
    page = vm.page[index >> INDEX_BITS]
    level = np.uint64(page["level"])
    return page["gfn"] + (index & (TABLE_SIZE - ONE)) * pages_at(level)


@inner
def drop_leaf(vm, stat, index):
    """Remove the leaf of a shadow page, with its reverse map."""
    level = np.uint64(vm.page[index >> INDEX_BITS]["level"])
    rmap_set(vm, gfn_of_entry(vm, index), level, ZERO)
    vm.spt[index] = ZERO
    count_leaf(stat, level, -1)


@inner
def unlink_children(vm, stat, table):
    """Empty a shadow page: leaves are dropped; child tables stay, without a parent (facts 5.14)."""
    level = np.uint64(vm.page[table]["level"])
    for index in range(table * TABLE_SIZE, (table + ONE) * TABLE_SIZE):
        spte = vm.spt[index]
        if is_leaf(spte, level):
            drop_leaf(vm, stat, index)
        elif is_table(spte, level):
            vm.page[pfn_of(spte)]["parent"] = ZERO
            vm.spt[index] = ZERO
        elif is_mmio(vm.word, spte):
            vm.spt[index] = ZERO


@inner
def zap(vm, stat, table):
    """Prepare a shadow page for freeing (facts 5.14); True when it was freed, False while vCPUs have it as their root.

    The caller flushes if any was freed.
    """
    count(stat, Counter.MMU_SHADOW_ZAPPED)
    unlink_children(vm, stat, table)
    page = vm.page[table]
    if page["parent"] != ZERO:
        vm.spt[page["parent"]] = ZERO
        page["parent"] = ZERO
    forget_nx_split(vm, stat, table)
    was_invalid = page["role"] & INVALID != NONE
    if not was_invalid:
        unlist(vm, table)
    if page["roots"] == NONE:
        unhash(vm, table)
        vm.word[VmWord.USED_PAGES] -= ONE
        release(vm, table)
        return True
    if not is_obsolete(vm, table):
        ask(vm.word, np.uint64(Request.FREE_OBSOLETE_ROOTS))
    page["role"] |= INVALID
    return False


@inner
def put_root(vm, stat, table):
    """A vCPU lets go of a root; True when that freed the page."""
    vm.page[table]["roots"] -= np.uint32(1)
    if vm.page[table]["roots"] == NONE and vm.page[table]["role"] & INVALID != NONE:
        return zap(vm, stat, table)
    return False


@inner
def zap_obsolete(vm, stat):
    """Zap all shadow pages of the last generation, the oldest first."""
    freed = False
    table = vm.word[VmWord.OLDEST]
    while table != NO_TABLE and is_obsolete(vm, table):
        freed |= zap(vm, stat, table)
        table = vm.word[VmWord.OLDEST]
    if freed:
        flush_remote(vm.word, stat)


@inner
def zap_oldest(vm, stat, wanted):
    """Zap the oldest shadow pages that are no root in use, until `wanted` are zapped (facts 5.7)."""
    zapped = ZERO
    table = vm.word[VmWord.OLDEST]
    while table != NO_TABLE and zapped < wanted:
        newer = np.uint64(vm.page[table]["newer"])
        if vm.page[table]["roots"] == NONE:
            zap(vm, stat, table)
            zapped += ONE
        table = newer
    if zapped != ZERO:
        flush_remote(vm.word, stat)
    stat[Counter.MMU_RECYCLED] += np.int64(zapped)


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
