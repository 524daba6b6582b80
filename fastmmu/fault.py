"""The page fault: MMIO, the fast path, and mapping at the goal level in the TDP MMU or in shadow pages (facts sections 4 to 6).

Follows `kvm_mmu_page_fault` of Linux 6.1 from the top down to the entry that is written. Both maps are direct: an spte is a
function of the gfn alone, with all rights.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import cmpxchg, inner
from fastmmu.bits import ACC, GENERATION_UPDATING, MMIO_SPTE, NPT_SPTE, ONE, PAGE_SHIFT, PFERR, ZERO
from fastmmu.hardware import PAE_LEVEL, is_executable, root_for
from fastmmu.machine_state import Counter, Outcome, VcpuWord, VmWord
from fastmmu.memslot import is_readonly, logs_dirty, mark_dirty, max_mapping_level, slot_by_gfn
from fastmmu.mmio import fill, match_gpa
from fastmmu.shadow import (
    NO_TABLE,
    YES,
    count,
    count_leaf,
    drop_leaf,
    flush_remote,
    get_shadow_page,
    gfn_of_entry,
    is_short_of_pages,
    link,
    make_pages_available,
    rmap_index,
)
from fastmmu.spte import (
    entry_of,
    frame_at,
    is_leaf,
    is_mmio,
    is_present,
    is_table,
    is_writable,
    lowest,
    make_leaf,
    make_mmio,
    mmio_generation,
    pfn_of,
)
from fastmmu.state import NO_SLOT, Walk
from fastmmu.tdp import link_table, set_spte, zap_huge

PREFETCH_PAGES = np.uint64(8)
NOT_STARTED = ZERO
FAST_RETRIES = 4
MMIO, MMIO_GENERATION, MMIO_END = int(VcpuWord.MMIO), int(VcpuWord.MMIO_GENERATION), int(VcpuWord.PML_LOG)
MAX_GENERATION = MMIO_SPTE.GENERATION


@inner
def cache_mmio(vm, vcpu, gva, gfn):
    """Remember the device page in the MMIO info cache (facts 4.1); gva 0 where the address that faulted is a gpa."""
    if vm.word[VmWord.MMIO_INFO] != ZERO:
        walk = Walk(True, gfn << PAGE_SHIFT, ONE, ACC.W | ACC.U, ZERO)
        fill(vcpu.own[MMIO:MMIO_GENERATION], None, vcpu.own[MMIO_GENERATION:MMIO_END], vcpu.mmu, gva, walk)


@inner
def mmio_fault(vm, vcpu, gpa):
    """The processor met a reserved bit: EMULATE, or INVALID for the slow path, or RETRY (facts 4.4)."""
    gfn = gpa >> PAGE_SHIFT
    if vm.word[VmWord.MMIO_INFO] != ZERO:
        if match_gpa(vcpu.own[MMIO:MMIO_GENERATION], vcpu.own[MMIO_GENERATION:MMIO_END], vcpu.mmu, gpa):
            return Outcome.EMULATE
    table, level = root_for(vm, vcpu, gfn)
    index, level = lowest(vm.spt, table, level, gfn)
    spte = vm.spt[index]
    if not is_mmio(vm.word, spte):
        return Outcome.RETRY
    generation = vm.word[VmWord.GENERATION]
    if generation & GENERATION_UPDATING != ZERO or mmio_generation(spte) != generation & MAX_GENERATION:
        return Outcome.INVALID
    cache_mmio(vm, vcpu, ZERO, gfn)
    return Outcome.EMULATE


@inner
def allows(word, spte, access):
    """Whether the processor may do `access` through a leaf spte (facts 6.2)."""
    if access & PFERR.F != ZERO:
        return is_executable(word, spte)
    if access & PFERR.W != ZERO:
        return is_writable(spte)
    return spte & word[VmWord.HARDWARE_PRESENT] != ZERO


@inner
def fast_fault(vm, vcpu, number, gfn, pferr):
    """The path without mmu lock: FIXED, SPURIOUS, or INVALID when it is not for this path (facts section 6).

    Only a write to a present entry; where sptes have no A and D, also faults on entries that are not present for the processor.
    """
    word = vm.word
    if pferr & PFERR.RSVD != ZERO:
        return Outcome.INVALID
    if pferr & PFERR.P != ZERO:
        if pferr & PFERR.W == ZERO:
            return Outcome.INVALID
    elif word[VmWord.AD] != ZERO:
        return Outcome.INVALID
    table, root_level = root_for(vm, vcpu, gfn)
    for _ in range(FAST_RETRIES + 1):
        index, level = lowest(vm.spt, table, root_level, gfn)
        spte = vm.spt[index]
        if not is_leaf(spte, level):
            return Outcome.INVALID
        if allows(word, spte, pferr):
            count(vcpu.stat, Counter.PF_FAST)
            return Outcome.SPURIOUS
        wanted = spte
        if pferr & PFERR.W != ZERO and spte & word[VmWord.MMU_WRITABLE] != ZERO:
            wanted |= NPT_SPTE.W
            if level > ONE and number != NO_SLOT and logs_dirty(vm.mem.slots[number]):
                return Outcome.INVALID  # only the first of its pages would be logged
        if wanted == spte or not allows(word, wanted, pferr):
            return Outcome.INVALID
        if cmpxchg(vm.spt, index, spte, wanted) == spte:
            if number != NO_SLOT:
                mark_dirty(vm, vm.mem.slots[number], gfn)
            count(vcpu.stat, Counter.PF_FAST)
            return Outcome.FIXED
    return Outcome.INVALID


@inner
def goal_levels(vm, number, gfn, fetch):
    """(goal, requested) levels of the mapping, and whether a fetch may not use a huge page (facts 5.9)."""
    disallowed = fetch and vm.word[VmWord.NX_HUGE_PAGES] != ZERO
    if number == NO_SLOT or logs_dirty(vm.mem.slots[number]):
        return ONE, ONE, disallowed
    limit = vm.word[VmWord.MAX_LEVEL] if vm.word[VmWord.TDP] != ZERO else PAE_LEVEL  # PAE tables end at 2 MiB
    requested = max_mapping_level(vm, vm.mem.slots[number], gfn, limit)
    return (ONE if disallowed else requested), requested, disallowed


@inner
def new_leaf(vm, vcpu, number, gfn, level, old):
    """What the entry becomes: a leaf that maps the frame of `gfn`, or an MMIO spte where there is no memslot."""
    if number == NO_SLOT:
        count(vcpu.stat, Counter.PF_MMIO_SPTE_CREATED)
        return make_mmio(vm.word, gfn)
    slot = vm.mem.slots[number]
    spte = make_leaf(vm.word, frame_at(gfn, level), level, ACC.ALL, old, not is_readonly(slot), False)
    if is_writable(spte):
        mark_dirty(vm, slot, gfn)
    return spte


@inner
def gives_way(vm, goal, level, spte):
    """Under NX huge pages a table is not replaced by a huge page, which could not be executed: the goal is below (facts 5.9.5)."""
    return vm.word[VmWord.NX_HUGE_PAGES] != ZERO and level > ONE and level == goal and is_table(spte, level)


@inner
def make_child(vm, vcpu, index, level, gfn, disallowed, requested):
    """Put a table under the entry at `index`, in place of nothing, an MMIO spte or a huge page; NO_TABLE without a free one.

    In 6.1 a huge page above the goal is not split but dropped: the other pages of its frame fault anew.
    """
    if vm.word[VmWord.TDP_MMU] != ZERO:
        if is_present(vm.spt[index]):
            zap_huge(vm, vcpu.stat, index, level)
        return link_table(vm, vcpu.stat, index, level, gfn, disallowed and requested >= level)
    child = get_shadow_page(vm, vcpu.stat, frame_at(gfn, level), level - ONE)
    if child == NO_TABLE:
        return child
    if is_present(vm.spt[index]):
        drop_leaf(vm, vcpu.stat, index)
        flush_remote(vm.word, vcpu.stat)
    link(vm, index, child)
    if disallowed and requested >= level and vm.word[VmWord.TDP] != ZERO and vm.page[child]["nx_split"] != YES:
        vm.page[child]["nx_split"] = YES
        count(vcpu.stat, Counter.NX_LPAGE_SPLITS)
    return child


@inner(inline=True)
def descend(vm, vcpu, number, gfn, fetch):
    """(index, level) of the entry at the goal level for `gfn`, tables made on the way; index 0 without a free table."""
    goal, requested, disallowed = goal_levels(vm, number, gfn, fetch)
    table, level = root_for(vm, vcpu, gfn)
    while True:
        index = entry_of(table, gfn, level)
        old = vm.spt[index]
        if gives_way(vm, goal, level, old):
            goal -= ONE
        if level == goal:
            return index, level
        table = pfn_of(old) if is_table(old, level) else make_child(vm, vcpu, index, level, gfn, disallowed, requested)
        if table == NO_TABLE:
            return ZERO, level
        level -= ONE


@inner(inline=True)
def map_tdp(vm, vcpu, number, gfn, fetch):
    """Map `gfn` in the TDP MMU (facts 5.4b)."""
    index, level = descend(vm, vcpu, number, gfn, fetch)
    if index == ZERO:
        return Outcome.NO_TABLES
    old = vm.spt[index]
    spte = new_leaf(vm, vcpu, number, gfn, level, old)
    if spte == old:
        return Outcome.SPURIOUS if number != NO_SLOT else Outcome.EMULATE
    if old == ZERO and number != NO_SLOT:
        vm.spt[index] = spte
        count_leaf(vcpu.stat, level, 1)
        return Outcome.FIXED
    set_spte(vm, vcpu.stat, index, level, spte)
    if is_table(old, level):
        flush_remote(vm.word, vcpu.stat)
    return Outcome.FIXED if number != NO_SLOT else Outcome.EMULATE


@inner(inline=True)
def map_direct(vm, vcpu, number, gfn, fetch):
    """Map `gfn` in direct shadow pages, then its neighbours (facts 5.4a, 5.10)."""
    index, level = descend(vm, vcpu, number, gfn, fetch)
    if index == ZERO:
        return Outcome.NO_TABLES
    outcome = set_leaf(vm, vcpu, number, index, level, gfn)
    if outcome != Outcome.SPURIOUS and level == ONE and vm.word[VmWord.AD] != ZERO:
        prefetch_neighbours(vm, vcpu, index)
    return outcome


@inner(inline=True)
def set_leaf(vm, vcpu, number, index, level, gfn):
    """Write the leaf of a shadow page (facts 5.10)."""
    old = vm.spt[index]
    if number == NO_SLOT:
        vm.spt[index] = new_leaf(vm, vcpu, number, gfn, level, old)
        return Outcome.EMULATE
    was_mapped = is_leaf(old, level)
    if is_table(old, level):
        vm.page[pfn_of(old)]["parent"] = ZERO  # the table stays, without a parent
        flush_remote(vm.word, vcpu.stat)
        old = ZERO
    spte = new_leaf(vm, vcpu, number, gfn, level, old)
    vm.spt[index] = spte
    if spte == old:
        return Outcome.SPURIOUS
    if not was_mapped:
        add_leaf(vm.slot_words, vcpu.stat, vm.mem.slots[number], index, frame_at(gfn, level), level)
    elif loses(vm.word, old, spte):
        flush_remote(vm.word, vcpu.stat)
    return Outcome.FIXED


@inner
def loses(word, old, spte):
    """Whether a present entry loses what a TLB may still have: writability, A or D (facts 6.4)."""
    lost = old & ~spte & (word[VmWord.ACCESSED] | word[VmWord.DIRTY])
    return lost != ZERO or (old & word[VmWord.MMU_WRITABLE] != ZERO and not is_writable(spte))


@inner
def add_leaf(slot_words, stat, slot, index, gfn, level):
    """Account for a new leaf of `gfn`, and enter it in the reverse map."""
    slot_words[rmap_index(slot, gfn, level)] = index
    count_leaf(stat, level, 1)


@inner(inline=True)
def prefetch_neighbours(vm, vcpu, index):
    """Map the free entries of the aligned eight around a new leaf, run by run from the lowest up (truth README section 6).

    A run ends the prefetch if it cannot be taken whole: its first page has no memslot, or one that logs or is read-only, or the
    run crosses the slot's end.
    """
    first = index & ~(PREFETCH_PAGES - ONE)
    start = NOT_STARTED
    for at in range(first, first + PREFETCH_PAGES + ONE):
        taken = at == first + PREFETCH_PAGES or at == index or is_present(vm.spt[at])
        if not taken:
            if start == NOT_STARTED:
                start = at
        elif start != NOT_STARTED:
            if not prefetch_run(vm, vcpu, start, at):
                return
            start = NOT_STARTED


@inner
def prefetch_run(vm, vcpu, start, end):
    """Map the entries [start, end) of a shadow page; False when they cannot be taken."""
    gfn = gfn_of_entry(vm, start)
    number = slot_by_gfn(vm, vcpu, gfn)
    if number == NO_SLOT:
        return False
    slot = vm.mem.slots[number]
    if logs_dirty(slot) or is_readonly(slot) or gfn + (end - start) > slot["base"] + slot["pages"]:
        return False
    for index in range(start, end):
        vm.spt[index] = make_leaf(vm.word, gfn, ONE, ACC.ALL, vm.spt[index], True, True)
        add_leaf(vm.slot_words, vcpu.stat, slot, index, gfn, ONE)
        gfn += ONE
    return True


@inner(inline=True)
def handle(vm, vcpu, address, pferr):
    """A fault of a direct map that is not answered by what KVM remembers of devices (facts 5.4a, 5.4b)."""
    gfn = address >> PAGE_SHIFT
    number = slot_by_gfn(vm, vcpu, gfn)
    outcome = fast_fault(vm, vcpu, number, gfn, pferr)
    if outcome != Outcome.INVALID:
        return outcome
    if number == NO_SLOT:
        cache_mmio(vm, vcpu, ZERO if vm.word[VmWord.TDP] != ZERO else address, gfn)
        if vm.word[VmWord.MMIO_CACHING] == ZERO or gfn > vm.word[VmWord.MAX_GFN]:
            return Outcome.EMULATE
    elif pferr & PFERR.W != ZERO and is_readonly(vm.mem.slots[number]):
        return Outcome.EMULATE
    fetch = pferr & PFERR.F != ZERO
    if vm.word[VmWord.TDP_MMU] != ZERO:
        return map_tdp(vm, vcpu, number, gfn, fetch)
    if is_short_of_pages(vm.word) and not make_pages_available(vm, vcpu.stat):
        return Outcome.NO_PAGES
    return map_direct(vm, vcpu, number, gfn, fetch)


@inner(inline=True)
def page_fault(vm, vcpu, address, pferr):
    """What KVM does on a fault exit: an `Outcome`, counted (facts 5.2)."""
    if pferr & PFERR.RSVD != ZERO:
        outcome = mmio_fault(vm, vcpu, address)
        if outcome != Outcome.INVALID:
            return outcome
    count(vcpu.stat, Counter.PF_TAKEN)
    outcome = handle(vm, vcpu, address, pferr)
    if outcome == Outcome.FIXED:
        count(vcpu.stat, Counter.PF_FIXED)
    elif outcome == Outcome.EMULATE:
        count(vcpu.stat, Counter.PF_EMULATE)
    elif outcome == Outcome.SPURIOUS:
        count(vcpu.stat, Counter.PF_SPURIOUS)
    return outcome
