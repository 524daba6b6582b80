"""What user space does to a VM: memslots come, change and go; host memory is unmapped; parameters change.

Facts 3.4.5, 5.7, 5.14, 7.1 and 9.
"""

from __future__ import annotations

import numpy as np

from fastmmu import dirty_log
from fastmmu._jit import inner
from fastmmu.bits import MMIO_SPTE, ONE, PAGE_OFFSET, PAGE_SHIFT, ZERO
from fastmmu.dirty_log import bitmap_words, word_of_pages
from fastmmu.lock import lock_for_writing, unlock_for_writing
from fastmmu.machine_state import Request, VmWord
from fastmmu.memslot import LOG, is_readonly, logs_dirty, slot_by_id
from fastmmu.pool import ask, flush_remote, reclaim
from fastmmu.rmap import MAX_HUGE_LEVEL, age_list, drop_leaves, has_rmaps, rmap_index
from fastmmu.shadow import set_page_limit, zap_obsolete
from fastmmu.spte import frame_at, pages_at
from fastmmu.state import NO_SLOT, Reg
from fastmmu.tdp import age_leafs, invalidate_root, zap_leafs

ADDRESS_SPACES = np.uint64(2)  # system management mode has its own slots: generations advance by two (facts 3.4.5)
PAGES_PER_SHADOW_PAGE, MIN_SHADOW_PAGES = np.uint64(50), np.uint64(64)


@inner
def zap_all_fast(vm, stat):
    """Make every shadow page obsolete and zap it; vCPUs drop their roots before they enter the guest again (facts 5.14)."""
    lock_for_writing(vm.word, stat)
    vm.word[VmWord.VALID_GENERATION] ^= ONE
    if vm.word[VmWord.TDP_MMU] != ZERO:
        invalidate_root(vm, stat)
    ask(vm.word, np.uint64(Request.FREE_OBSOLETE_ROOTS))
    zap_obsolete(vm, stat)
    unlock_for_writing(vm.word, stat)


@inner
def next_generation(vm, vcpus, stat):
    """A new set of memslots is in force; when the generation in MMIO sptes wraps, all of them go (facts 3.4.6)."""
    generation = vm.word[VmWord.GENERATION] + ADDRESS_SPACES
    vm.word[VmWord.GENERATION] = generation
    vcpus.mmu.reg[:, Reg.GENERATION] = generation
    tell_nested(vcpus.nested, generation)
    if generation & MMIO_SPTE.GENERATION & ~(ADDRESS_SPACES - ONE) == ZERO:
        zap_all_fast(vm, stat)


@inner
def tell_nested(nested, generation):
    """The same for what KVM makes of nested guests' tables; `nested` is that of all vCPUs."""
    if nested is not None:
        nested.reg[:, Reg.GENERATION] = generation


@inner
def update_page_limit(vm, stat):
    """A fiftieth of the slots' pages, at least 64, unless user space set a limit (facts 5.7)."""
    if vm.word[VmWord.REQUESTED_PAGES] != ZERO:
        return
    pages = ZERO
    for i in range(len(vm.mem.slots)):
        pages += (vm.mem.slots[i]["end"] - vm.mem.slots[i]["start"]) >> PAGE_SHIFT
    set_page_limit(vm, stat, max(pages // PAGES_PER_SHADOW_PAGE, MIN_SHADOW_PAGES))


@inner
def begin_log(vm, slot):
    """The slot gets a dirty bitmap: all ones if it is to be initially all set."""
    for i in range(bitmap_words(slot)):
        all_set = vm.word[VmWord.INITIALLY_SET] != ZERO
        vm.slot_words[slot["dirty"] + np.uint64(i)] = word_of_pages(slot, i) if all_set else ZERO
        vm.slot_words[slot["written"] + np.uint64(i)] = ZERO
    vm.word[VmWord.LOGGING_SLOTS] += ONE


@inner
def create_slot(vm, vcpus, stat, prepared):
    """A memslot, prepared by Python, comes into force in a free row."""
    for i in range(len(vm.mem.slots)):
        if vm.mem.slots[i]["start"] == vm.mem.slots[i]["end"]:
            vm.mem.slots[i] = prepared
            if logs_dirty(prepared):
                begin_log(vm, prepared)
            break
    next_generation(vm, vcpus, stat)
    update_page_limit(vm, stat)


@inner
def delete_slot(vm, vcpus, stat, identity):
    """A memslot goes, and with it every spte of the VM (truth README section 6)."""
    number = slot_by_id(vm, identity)
    if number == NO_SLOT:
        return
    next_generation(vm, vcpus, stat)  # first it becomes invalid
    zap_all_fast(vm, stat)
    if logs_dirty(vm.mem.slots[number]):
        vm.word[VmWord.LOGGING_SLOTS] -= ONE
    vm.mem.slots[number]["end"] = vm.mem.slots[number]["start"]
    next_generation(vm, vcpus, stat)
    update_page_limit(vm, stat)


@inner
def set_slot_flags(vm, vcpus, stat, identity, flags):
    """Logging of a memslot is switched on or off."""
    number = slot_by_id(vm, identity)
    if number == NO_SLOT:
        return
    slot = vm.mem.slots[number]
    before = slot["flags"]
    if flags == before:
        return  # nothing changes, the generation neither
    slot["flags"] = flags
    if flags & LOG & ~before != ZERO:
        begin_log(vm, slot)
    elif before & LOG & ~flags != ZERO:
        vm.word[VmWord.LOGGING_SLOTS] -= ONE
    next_generation(vm, vcpus, stat)
    if is_readonly(slot):
        return
    if logs_dirty(slot):
        dirty_log.start(vm, stat, slot)
    else:
        dirty_log.stop_logging(vm, stat, slot)


@inner
def unmap(vm, stat, start, end):
    """The host unmapped memory that stands behind [start, end), bytes: what maps it goes (facts 9.5)."""
    zapped = False
    lock_for_writing(vm.word, stat)
    for i in range(len(vm.mem.slots)):
        slot = vm.mem.slots[i]
        low, high = part_of(slot, start, end)
        if low >= high:
            continue
        if vm.word[VmWord.TDP_MMU] != ZERO:
            zapped |= zap_leafs(vm, stat, low, high)
        if not has_rmaps(vm.word):
            continue
        level = ONE
        while level <= MAX_HUGE_LEVEL:
            gfn = frame_at(low, level)
            while gfn < high:
                zapped |= drop_leaves(vm, stat, rmap_index(slot, max(gfn, slot["base"]), level))
                gfn += pages_at(level)
            level += ONE
    if zapped:
        flush_remote(vm.word, stat)
    reclaim(vm, stat)
    unlock_for_writing(vm.word, stat)


@inner
def part_of(slot, start, end):
    """(first gfn of the memslot in [start, end), bytes, the gfn behind the last)."""
    first, last = start >> PAGE_SHIFT, (end + PAGE_OFFSET) >> PAGE_SHIFT
    return max(first, slot["base"]), min(last, slot["end"] >> PAGE_SHIFT)


@inner
def age(vm, stat, start, end):
    """The host asks whether memory behind [start, end), bytes, was used since it last did, and flushes if it was (facts 3.2)."""
    young = False
    lock_for_writing(vm.word, stat)
    for i in range(len(vm.mem.slots)):
        slot = vm.mem.slots[i]
        low, high = part_of(slot, start, end)
        if low >= high:
            continue
        if vm.word[VmWord.TDP_MMU] != ZERO:
            young |= age_leafs(vm, low, high)
        if not has_rmaps(vm.word):
            continue
        level = ONE
        while level <= MAX_HUGE_LEVEL:
            gfn = frame_at(low, level)
            while gfn < high:
                young |= age_list(vm, rmap_index(slot, max(gfn, slot["base"]), level))
                gfn += pages_at(level)
            level += ONE
    unlock_for_writing(vm.word, stat)
    if young:
        flush_remote(vm.word, stat)


@inner
def set_parameter(vm, stat, which, value):
    """A module parameter changes at run time; another policy for NX huge pages zaps everything."""
    before = vm.word[which]
    vm.word[which] = value
    if which == np.uint64(VmWord.NX_HUGE_PAGES) and value != before:
        zap_all_fast(vm, stat)
