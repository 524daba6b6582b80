"""The page fault: MMIO, the fast path, and mapping in the TDP MMU or in shadow pages (facts sections 4 to 6).

Follows `kvm_mmu_page_fault` of Linux 6.1 from the top down to the entry that is written.
"""

from __future__ import annotations

from fastmmu._jit import cmpxchg, inner
from fastmmu.bits import ACC, GENERATION_UPDATING, MMIO_SPTE, NPT_SPTE, ONE, PAGE_SHIFT, PFERR, ZERO
from fastmmu.hardware import is_executable, root_for
from fastmmu.machine_state import Counter, Outcome, VcpuWord, VmWord
from fastmmu.memslot import is_readonly, logs_dirty, mark_dirty, slot_by_gfn
from fastmmu.mmio import covers, fill, match_gpa
from fastmmu.pool import NO_TABLE, count, count_leaf, flush_remote
from fastmmu.roots import is_shadow_paging
from fastmmu.shadow import is_short_of_pages, make_pages_available
from fastmmu.shadow_fault import (
    clear_floods,
    fetch,
    gives_way,
    goal_levels,
    guest_rights,
    inject,
    map_direct,
    map_leaf,
    mapping_limit,
    settled,
    walk_for_kvm,
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
    mmio_access,
    mmio_generation,
    mmio_gfn,
    pfn_of,
)
from fastmmu.state import NO_SLOT, Reg, Walk
from fastmmu.tdp import link_table, set_spte, zap_huge
from fastmmu.unsync import is_write_tracked

FAST_RETRIES = 4
MMIO, MMIO_GENERATION, MMIO_END = int(VcpuWord.MMIO), int(VcpuWord.MMIO_GENERATION), int(VcpuWord.MMIO_GENERATION) + 1


@inner(inline=True)
def cache_mmio(vm, vcpu, gva, gfn, access):
    """Remember the device page in the MMIO info cache (facts 4.1); gva 0 where the address that faulted is a gpa."""
    if vm.word[VmWord.MMIO_INFO] != ZERO:
        walk = Walk(True, gfn << PAGE_SHIFT, ONE, access, ZERO)
        fill(vcpu.own[MMIO:MMIO_GENERATION], None, vcpu.own[MMIO_GENERATION:MMIO_END], vcpu.mmu, gva, walk)


@inner
def is_remembered(vm, vcpu, address):
    """Whether the MMIO info cache knows the address that faulted: a gva under shadow paging, else a gpa (facts 4.2)."""
    if vm.word[VmWord.MMIO_INFO] == ZERO:
        return False
    entry, generation = vcpu.own[MMIO:MMIO_GENERATION], vcpu.own[MMIO_GENERATION:MMIO_END]
    if is_shadow_paging(vm, vcpu):
        return covers(entry, address) and generation[0] == vcpu.mmu.reg[Reg.GENERATION]
    return match_gpa(entry, generation, vcpu.mmu, address)


@inner(inline=True)
def mmio_fault(vm, vcpu, address):
    """The processor met a reserved bit: EMULATE, or INVALID for the slow path, or RETRY (facts 4.4)."""
    if is_remembered(vm, vcpu, address):
        return Outcome.EMULATE
    page = address >> PAGE_SHIFT
    table, level = root_for(vm, vcpu, page)
    if table == NO_TABLE:
        return Outcome.RETRY
    index, level = lowest(vm.spt, table, level, page)
    spte = vm.spt[index]
    if not is_mmio(vm.word, spte):
        return Outcome.RETRY
    generation = vm.word[VmWord.GENERATION]
    if generation & GENERATION_UPDATING != ZERO or mmio_generation(spte) != generation & MMIO_SPTE.GENERATION:
        return Outcome.INVALID
    if is_shadow_paging(vm, vcpu):
        cache_mmio(vm, vcpu, address, mmio_gfn(spte), mmio_access(vm.word, spte))
    else:
        cache_mmio(vm, vcpu, ZERO, page, ACC.ALL)
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
def new_leaf(vm, vcpu, number, gfn, level, old):
    """What an entry of the TDP MMU becomes: a leaf that maps the frame of `gfn`, or an MMIO spte where there is no memslot."""
    if number == NO_SLOT:
        count(vcpu.stat, Counter.PF_MMIO_SPTE_CREATED)
        return make_mmio(vm.word, gfn, ACC.ALL)
    slot = vm.mem.slots[number]
    spte = make_leaf(vm.word, frame_at(gfn, level), level, ACC.ALL, old, not is_readonly(slot), False)
    if is_writable(spte):
        mark_dirty(vm, slot, gfn)
    return spte


@inner
def make_child(vm, vcpu, index, level, gfn, nx_split):
    """Put a table under an entry of the TDP MMU, in place of nothing, an MMIO spte or a huge page; NO_TABLE without a free one.

    In 6.1 a huge page above the goal is not split but dropped: the other pages of its frame fault anew.
    """
    if is_present(vm.spt[index]):
        zap_huge(vm, vcpu.stat, index, level)
    return link_table(vm, vcpu.stat, index, level, gfn, nx_split)


@inner(inline=True)
def descend(vm, vcpu, number, gfn, fetch):
    """(index, level) of the entry at the goal level for `gfn`, tables made on the way; index 0 without a free table."""
    goal, requested, disallowed = goal_levels(vm, number, gfn, fetch, vm.word[VmWord.MAX_LEVEL])
    table, level = root_for(vm, vcpu, gfn)
    while True:
        index = entry_of(table, gfn, level)
        old = vm.spt[index]
        if gives_way(vm, goal, level, old):
            goal -= ONE
        if level == goal:
            return index, level
        split = disallowed and requested >= level
        table = pfn_of(old) if is_table(old, level) else make_child(vm, vcpu, index, level, gfn, split)
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
def without_memory(vm, vcpu, number, gva, gfn, access, pferr):
    """EMULATE for what no leaf can answer, INVALID for the rest: no memslot and no MMIO sptes; a write to a read-only memslot."""
    if number == NO_SLOT:
        cache_mmio(vm, vcpu, gva, gfn, access)
        if vm.word[VmWord.MMIO_CACHING] == ZERO or gfn > vm.word[VmWord.MAX_GFN]:
            return Outcome.EMULATE
    elif pferr & PFERR.W != ZERO and is_readonly(vm.mem.slots[number]):
        return Outcome.EMULATE
    return Outcome.INVALID


@inner(inline=True)
def is_tracked_write(vm, number, gfn, pferr):
    """Whether the fault is a write to an upper table of the guest that is shadowed; before the fault is looked at any closer."""
    write = PFERR.P | PFERR.W
    if number == NO_SLOT or pferr & (write | PFERR.RSVD) != write:
        return False
    return is_write_tracked(vm, vm.mem.slots[number], gfn)


@inner(inline=True)
def handle_direct(vm, vcpu, address, pferr):
    """A fault of a direct map that is not answered by what KVM remembers of devices: its Mapping (facts 5.4a, 5.4b)."""
    gfn = address >> PAGE_SHIFT
    number = slot_by_gfn(vm, vcpu, gfn)
    if is_tracked_write(vm, number, gfn, pferr):
        return settled(Outcome.EMULATE)
    outcome = fast_fault(vm, vcpu, number, gfn, pferr)
    if outcome != Outcome.INVALID:
        return settled(outcome)
    gva = ZERO if vm.word[VmWord.TDP] != ZERO else address
    if without_memory(vm, vcpu, number, gva, gfn, ACC.ALL, pferr) == Outcome.EMULATE:
        return settled(Outcome.EMULATE)
    if vm.word[VmWord.TDP_MMU] != ZERO:
        return settled(map_tdp(vm, vcpu, number, gfn, pferr & PFERR.F != ZERO))
    return map_direct(vm, vcpu, number, gfn)


@inner(inline=True)
def handle_indirect(vm, vcpu, gva, pferr):
    """A fault under shadow paging: the guest's own tables decide (facts 5.4c). Its Mapping, as far as they do."""
    walk = walk_for_kvm(vm, vcpu, gva, pferr & (PFERR.W | PFERR.U | PFERR.F))
    if not walk.ok:
        return settled(inject(vm, vcpu, gva, walk.pferr))
    gfn = walk.gpa >> PAGE_SHIFT
    number = slot_by_gfn(vm, vcpu, gfn)
    if is_tracked_write(vm, number, gfn, pferr):
        clear_floods(vm, vcpu, gva)
        return settled(Outcome.EMULATE)
    limit = mapping_limit(vm, vcpu, gva, walk, pferr)
    if without_memory(vm, vcpu, number, gva, gfn, walk.access, pferr) == Outcome.EMULATE:
        return settled(Outcome.EMULATE)
    access = guest_rights(vcpu, walk, number, pferr)
    if is_short_of_pages(vm.word) and not make_pages_available(vm, vcpu.stat):
        return settled(Outcome.NO_PAGES)
    return fetch(vm, vcpu, number, gva, walk, access, limit)


@inner(inline=True)
def page_fault(vm, vcpu, address, pferr):
    """What KVM does on a fault exit: an `Outcome`, counted (facts 5.2)."""
    if pferr & PFERR.RSVD != ZERO:
        outcome = mmio_fault(vm, vcpu, address)
        if outcome != Outcome.INVALID:
            return outcome
    count(vcpu.stat, Counter.PF_TAKEN)
    shadowed = is_shadow_paging(vm, vcpu)
    mapping = handle_indirect(vm, vcpu, address, pferr) if shadowed else handle_direct(vm, vcpu, address, pferr)
    outcome = mapping.outcome
    if outcome == Outcome.INVALID:
        if not shadowed and is_short_of_pages(vm.word) and not make_pages_available(vm, vcpu.stat):
            return Outcome.NO_PAGES
        outcome = map_leaf(vm, vcpu, mapping, pferr)
    if outcome == Outcome.FIXED:
        count(vcpu.stat, Counter.PF_FIXED)
    elif outcome == Outcome.EMULATE:
        count(vcpu.stat, Counter.PF_EMULATE)
    elif outcome == Outcome.SPURIOUS:
        count(vcpu.stat, Counter.PF_SPURIOUS)
    return outcome
