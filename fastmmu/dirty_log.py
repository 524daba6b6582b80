"""Dirty logging: write protection, the bitmap, get and clear, for both maps (facts section 7)."""

from __future__ import annotations

import numpy as np

from fastmmu._jit import exchange, fetch_and, inner
from fastmmu.bits import NPT_SPTE, ONE, ZERO
from fastmmu.exits import drain_pml
from fastmmu.lock import (
    is_contended,
    lock_for_reading,
    lock_for_writing,
    unlock_for_reading,
    unlock_for_writing,
    yield_lock,
)
from fastmmu.machine_state import VmWord
from fastmmu.memslot import WORD_BITS, max_mapping_level
from fastmmu.pool import DIRECT, NONE, flush_remote, reclaim
from fastmmu.rmap import MAX_HUGE_LEVEL, after, at_cursor, clear_rmap_bits, drop_leaf, first, has_rmaps, rmap_index
from fastmmu.split import split_shadow_range
from fastmmu.spte import INDEX_BITS, entry_of, frame_at, is_table, pages_at, pfn_of
from fastmmu.tdp import clear_bits, clear_bits_of_mask, set_spte, split_range
from fastmmu.walk import ALL_ONES

TWO_MIB_LEVEL = np.uint64(2)
W = NPT_SPTE.W
TAIL_MASK = np.uint64(63)


@inner
def bitmap_words(slot):
    """Words of a bitmap over the slot's pages."""
    return (slot["pages"] + TAIL_MASK) >> WORD_BITS


@inner
def word_of_pages(slot, i):
    """Mask of the pages that word `i` of the slot's bitmap stands for: fewer than 64 in the last one."""
    left = slot["pages"] - (np.uint64(i) << WORD_BITS)
    return ALL_ONES if left > TAIL_MASK else (ONE << left) - ONE


@inner
def splits_eagerly(word):
    """Whether KVM splits huge pages eagerly: without the TDP MMU never (facts 8.1), but for the policy of the patches' first
    versions."""
    return word[VmWord.EAGER_PAGE_SPLIT] != ZERO and word[VmWord.TDP_MMU] | word[VmWord.SPLIT_SHADOW_PAGES] != ZERO


@inner
def split_eagerly(vm, stat, slot, start, end):
    """Split the huge pages of [start, end), if KVM does it. Needs the mmu lock for writing."""
    if not splits_eagerly(vm.word):
        return
    if has_rmaps(vm.word):
        split_shadow_range(vm, stat, slot, start, end)
    if vm.word[VmWord.TDP_MMU] != ZERO:
        split_range(vm, stat, start, end, False)


@inner
def clear_slot_rmaps(vm, stat, slot, min_level, max_level, bits):
    """Clear bits in every leaf of shadow pages, of these levels, that maps memory of the slot. Needs the mmu lock for writing, and
    drops it where somebody waits."""
    base, end = slot["base"], slot["base"] + slot["pages"]
    for level in range(min_level, max_level + ONE):
        gfn = frame_at(base, level)
        while gfn < end:
            if is_contended(vm.word):
                yield_lock(vm.word, stat, False)
            clear_rmap_bits(vm, stat, slot, max(gfn, base), level, bits)
            gfn += pages_at(level)


@inner
def start(vm, stat, slot):
    """The slot begins to log: first the shadow pages, under the mmu lock for writing, then the TDP MMU, where faults go on
    meanwhile (facts 7.1, 8.1). With page-modification logging D is cleared instead of W: in shadow pages of 4 KiB leaves, in the
    TDP MMU of all; huge pages are write-protected."""
    if vm.word[VmWord.INITIALLY_SET] != ZERO:
        return  # every page counts as dirty: nothing to protect until it is cleared
    base, end = slot["base"], slot["base"] + slot["pages"]
    logged = vm.word[VmWord.PML] != ZERO
    lowest = TWO_MIB_LEVEL if logged else ONE
    if has_rmaps(vm.word):
        lock_for_writing(vm.word, stat)
        if splits_eagerly(vm.word):
            split_shadow_range(vm, stat, slot, base, end)
        if logged:
            clear_slot_rmaps(vm, stat, slot, ONE, ONE, vm.word[VmWord.DIRTY])
        clear_slot_rmaps(vm, stat, slot, lowest, MAX_HUGE_LEVEL, W)
        unlock_for_writing(vm.word, stat)
    if vm.word[VmWord.TDP_MMU] != ZERO:
        lock_for_reading(vm.word, stat)
        if splits_eagerly(vm.word):
            split_range(vm, stat, base, end, True)
        if logged:
            clear_bits(vm, stat, base, end, ONE, vm.word[VmWord.DIRTY])
        clear_bits(vm, stat, base, end, lowest, W)
        unlock_for_reading(vm.word, stat)
    flush_remote(vm.word, stat)


@inner
def stop_logging(vm, stat, slot):
    """The slot logs no more: what could be a huge page is unmapped, and comes back as one (facts 7.1.3)."""
    lock_for_writing(vm.word, stat)
    if vm.word[VmWord.TDP_MMU] != ZERO:
        zap_collapsible_tables(vm, stat, slot)
    if has_rmaps(vm.word):
        zap_collapsible_leaves(vm, stat, slot)
    reclaim(vm, stat)
    unlock_for_writing(vm.word, stat)


@inner
def zap_collapsible_leaves(vm, stat, slot):
    """Shadow pages: remove each leaf of a direct page whose frame may be mapped at a higher level. An indirect page has its size
    from the guest."""
    zapped = False
    base, end = slot["base"], slot["base"] + slot["pages"]
    for level in range(ONE, MAX_HUGE_LEVEL):
        gfn = frame_at(base, level)
        while gfn < end:
            at = rmap_index(slot, max(gfn, base), level)
            cursor = first(vm.slot_words[at])
            while cursor != ZERO:
                index = at_cursor(vm, cursor)
                cursor = after(vm, cursor)
                page = vm.page[index >> INDEX_BITS]
                if page["role"] & DIRECT != NONE and level < could_be(vm, slot, max(page["gfn"], base)):
                    drop_leaf(vm, stat, index)
                    zapped = True
                    cursor = first(vm.slot_words[at])
            gfn += pages_at(level)
    if zapped:
        flush_remote(vm.word, stat)


@inner
def could_be(vm, slot, gfn):
    """Highest level at which the frame may be mapped."""
    return max_mapping_level(vm, slot, gfn, vm.word[VmWord.MAX_LEVEL])


@inner
def zap_collapsible_tables(vm, stat, slot):
    """The TDP MMU: remove each table, from the top down, whose frame may be mapped by the entry that points to it."""
    root = vm.word[VmWord.TDP_ROOT]
    if root == ZERO:
        return
    base, end = slot["base"], slot["base"] + slot["pages"]
    gfn = base
    while gfn < end:
        level, table = vm.word[VmWord.ROOT_LEVEL], root
        while True:
            index = entry_of(table, gfn, level)
            spte = vm.spt[index]
            if not is_table(spte, level):
                break
            if level <= MAX_HUGE_LEVEL and frame_at(gfn, level) >= base:
                if max_mapping_level(vm, slot, frame_at(gfn, level), vm.word[VmWord.MAX_LEVEL]) >= level:
                    set_spte(vm, stat, index, level, ZERO)
                    flush_remote(vm.word, stat)
                    break
            if level == TWO_MIB_LEVEL:
                break
            table = pfn_of(spte)
            level -= ONE
        gfn = frame_at(gfn, level) + pages_at(level)


# --- reading and clearing the bitmap ---------------------------------------------------------------------------------------


@inner
def protect_huge(vm, stat, slot, gfn):
    """Write-protect huge pages over `gfn`, as if for a shadowed table: MMU_WRITABLE goes too (facts 7.4.1)."""
    bits = W | vm.word[VmWord.MMU_WRITABLE]
    if vm.word[VmWord.TDP_MMU] != ZERO:
        clear_bits(vm, stat, gfn, gfn + ONE, TWO_MIB_LEVEL, bits)
    if not has_rmaps(vm.word):
        return
    for level in range(TWO_MIB_LEVEL, MAX_HUGE_LEVEL + ONE):
        clear_rmap_bits(vm, stat, slot, gfn, level, bits)


@inner
def lowest_bit(mask):
    """Number of the lowest bit set."""
    number = ZERO
    while mask & ONE == ZERO:
        mask >>= ONE
        number += ONE
    return number


@inner
def highest_bit(mask):
    """Number of the highest bit set."""
    number = ZERO
    while mask > ONE:
        mask >>= ONE
        number += ONE
    return number


@inner
def round_up(gfn):
    """First 2 MiB frame boundary at or above `gfn`."""
    return frame_at(gfn + pages_at(TWO_MIB_LEVEL) - ONE, TWO_MIB_LEVEL)


@inner
def protect_again(vm, stat, slot, i, mask):
    """The pages of `mask`, in word `i` of the bitmap, were reported: log their next write (facts 7.4)."""
    base = slot["base"] + (np.uint64(i) << WORD_BITS)
    if vm.word[VmWord.INITIALLY_SET] != ZERO:
        lowest, highest = base + lowest_bit(mask), base + highest_bit(mask)
        split_eagerly(vm, stat, slot, lowest, highest)
        protect_huge(vm, stat, slot, lowest)
        if round_up(lowest) != round_up(highest):
            protect_huge(vm, stat, slot, highest)
    bits = vm.word[VmWord.DIRTY] if vm.word[VmWord.PML] != ZERO else W
    if vm.word[VmWord.TDP_MMU] != ZERO:
        clear_bits_of_mask(vm, stat, base, mask, bits)
    if not has_rmaps(vm.word):
        return
    gfn = base
    while mask != ZERO:
        if mask & ONE != ZERO:
            clear_rmap_bits(vm, stat, slot, gfn, ONE, bits)
        gfn += ONE
        mask >>= ONE


@inner
def reported(vm, stat, slot, i, mask):
    """The pages of `mask` were taken from the log: the next write to them is logged again. False when there are none."""
    if mask == ZERO:
        return False
    fetch_and(vm.slot_words, slot["written"] + np.uint64(i), ~mask)  # the audit's own record
    protect_again(vm, stat, slot, i, mask)
    return True


@inner
def get(vm, stat, slot):
    """KVM_GET_DIRTY_LOG: leave the bitmap in the slot's report; without manual protection, clear and protect (facts 7.3)."""
    flushes = False
    lock_for_writing(vm.word, stat)
    for i in range(bitmap_words(slot)):
        at = slot["dirty"] + np.uint64(i)
        if vm.word[VmWord.MANUAL_PROTECT] != ZERO:
            vm.slot_words[slot["report"] + np.uint64(i)] = vm.slot_words[at]
            continue
        mask = ZERO
        if vm.slot_words[at] != ZERO:
            mask = exchange(vm.slot_words, at, ZERO)
        vm.slot_words[slot["report"] + np.uint64(i)] = mask
        flushes |= reported(vm, stat, slot, i, mask)
    reclaim(vm, stat)
    unlock_for_writing(vm.word, stat)
    if flushes:
        flush_remote(vm.word, stat)


@inner
def clear(vm, stat, slot):
    """KVM_CLEAR_DIRTY_LOG of the bits in the slot's report: only those that were set are protected (facts 7.3)."""
    flushes = False
    lock_for_writing(vm.word, stat)
    for i in range(bitmap_words(slot)):
        wanted = vm.slot_words[slot["report"] + np.uint64(i)] & word_of_pages(slot, i)
        mask = fetch_and(vm.slot_words, slot["dirty"] + np.uint64(i), ~wanted) & wanted
        flushes |= reported(vm, stat, slot, i, mask)
    reclaim(vm, stat)
    unlock_for_writing(vm.word, stat)
    if flushes:
        flush_remote(vm.word, stat)


@inner
def collect_pml(vm, vcpu):
    """Before the log is read every vCPU is made to exit, which drains what it has logged (facts 7.2)."""
    if vm.word[VmWord.PML] != ZERO:
        drain_pml(vm, vcpu)
