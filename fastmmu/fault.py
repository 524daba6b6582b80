"""The page fault: MMIO, the fast path, and mapping in the TDP MMU or in shadow pages (facts sections 4 to 6).

Follows `kvm_mmu_page_fault` of Linux 6.1 from the top down to the entry that is written.
"""

from __future__ import annotations

import numpy as np

from fastmmu import guards
from fastmmu._jit import cmpxchg, exchange, inner, likely, load, store
from fastmmu.bits import ACC, FROZEN, GENERATION_UPDATING, MMIO_SPTE, NPT_SPTE, ONE, PAGE_SHIFT, PFERR, ZERO
from fastmmu.descent import descend as walk_lockless
from fastmmu.descent import is_executable, root_for
from fastmmu.exits import IN_KVM, request_word
from fastmmu.lock import lock_for_reading, lock_for_writing, unlock_for_reading, unlock_for_writing
from fastmmu.machine_state import Counter, Outcome, Running, VcpuWord, VmWord
from fastmmu.memslot import host_frame, is_readonly, logs_dirty, mark_dirty, slot_by_gfn
from fastmmu.mmio import covers, fill, match_gpa
from fastmmu.pool import NO_TABLE, count, flush_remote
from fastmmu.shadow import is_short_of_pages, make_pages_available
from fastmmu.shadow_fault import (
    OPEN,
    clear_floods,
    count_nx_split,
    fetch,
    gives_way,
    goal_levels,
    guest_rights,
    inject,
    map_direct,
    map_leaf,
    mapping_limit,
    walk_for_kvm,
)
from fastmmu.spte import (
    entry_of,
    frame_at,
    is_access_tracked,
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
    restore_access,
)
from fastmmu.state import NO_SLOT, Reg, Walk
from fastmmu.tdp import LOST, link_table, split_huge_page, try_set_spte, zap_huge
from fastmmu.unsync import is_write_tracked, refuses_write
from fastmmu.views import is_nested, is_shadow_paging

FAST_RETRIES = 4
READING = np.uint64(Running.READING)
MMIO, MMIO_GENERATION, MMIO_END = int(VcpuWord.MMIO), int(VcpuWord.MMIO_GENERATION), int(VcpuWord.MMIO_GENERATION) + 1


@inner(inline=True)
def cache_mmio(vm, vcpu, gva, gfn, access):
    """Remember the device page in the MMIO info cache (facts 4.1); gva 0 where the address that faulted is a gpa. Of a nested guest
    the address is neither: only the gfn is kept."""
    if is_nested(vcpu.nested, vcpu.own):
        gva = ZERO
    if vm.word[VmWord.MMIO_INFO] != ZERO:
        walk = Walk(True, gfn << PAGE_SHIFT, ONE, access, ZERO)
        fill(vcpu.own[MMIO:MMIO_GENERATION], None, vcpu.own[MMIO_GENERATION:MMIO_END], vcpu.mmu, gva, walk)


@inner
def is_remembered(vm, vcpu, address):
    """Whether the MMIO info cache knows the address that faulted: a gva under shadow paging, else a gpa (facts 4.2)."""
    if vm.word[VmWord.MMIO_INFO] == ZERO or is_nested(vcpu.nested, vcpu.own):
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


@inner(inline=True)
def fast_fault(vm, vcpu, number, page, gfn, pferr):
    """The path without mmu lock: FIXED, SPURIOUS, or INVALID when it is not for this path (facts section 6). By `page` the entry is
    found: in a direct map it is the gfn.

    Only a write to a present entry; where sptes have no A and D, also faults on entries that are not present for the processor.
    """
    if number == NO_SLOT:
        return Outcome.INVALID  # nothing is mapped there
    if pferr & (PFERR.RSVD | PFERR.P | PFERR.W) != PFERR.P | PFERR.W:
        if pferr & (PFERR.RSVD | PFERR.P) != ZERO or vm.word[VmWord.AD] != ZERO:
            return Outcome.INVALID
    if vm.word[VmWord.THREADS] != ZERO:
        exchange(vm.word, request_word(vcpu) + ONE, READING)  # who frees a table waits until this one has left (facts 6.2)
    outcome = fix_fast(vm, vcpu, number, page, gfn, pferr)
    if vm.word[VmWord.THREADS] != ZERO:
        store(vm.word, request_word(vcpu) + ONE, IN_KVM)
    if outcome != Outcome.INVALID:
        count(vcpu.stat, Counter.PF_FAST)
    return outcome


@inner
def wanted_leaf(vm, number, spte, level, pferr):
    """What the lowest entry must become for the access: itself if it allows it, ZERO if this path cannot help (facts 6.2)."""
    word = vm.word
    if not is_present(spte):
        return ZERO
    wanted = spte
    if allows(word, spte, pferr):
        return wanted
    if word[VmWord.AD] == ZERO and is_access_tracked(word, spte):
        wanted = restore_access(spte)
    if pferr & PFERR.W != ZERO and spte & word[VmWord.MMU_WRITABLE] != ZERO:
        wanted |= NPT_SPTE.W
        if level > ONE and logs_dirty(vm.mem.slots[np.uint64(number)]):
            return ZERO  # only the first of its pages would be logged
    return wanted if wanted != spte and allows(word, wanted, pferr) else ZERO


@inner(inline=True)
def exchange_leaf(vm, vcpu, number, page, gfn, pferr):
    """One try to make the leaf for `gfn` allow the access, by a compare-exchange; RETRY where another thread was first.

    Nearly all lack nothing but W. One masked compare tells those, and the compiler is told: 14.3 instead of 15.6 ns a fault.
    """
    word = vm.word
    table, level = root_for(vm, vcpu, page)
    index, spte, level = walk_lockless(vm.spt, table, page, level)
    writable = NPT_SPTE.MMU_PRESENT | word[VmWord.MMU_WRITABLE]
    plain = level == ONE and spte & (writable | NPT_SPTE.W) == writable and word[VmWord.AD] != ZERO
    if likely(plain):  # with A and D only writes come here
        wanted = spte | NPT_SPTE.W
    else:
        wanted = wanted_leaf(vm, number, spte, level, pferr)
        if wanted == ZERO:
            return Outcome.INVALID
        if wanted == spte:
            return Outcome.SPURIOUS
    if not guards.FAST_EXCHANGE:
        store(vm.spt, index, wanted)
    elif cmpxchg(vm.spt, index, spte, wanted) != spte:
        count(vcpu.stat, Counter.EXCHANGE_FAILED)
        return Outcome.RETRY
    count(vcpu.stat, Counter.FAST_FIXED)
    if wanted & ~spte & NPT_SPTE.W != ZERO:
        mark_dirty(vm, vm.mem.slots[np.uint64(number)], gfn)
    return Outcome.FIXED


@inner
def exchange_again(vm, vcpu, number, page, gfn, pferr):
    """The tries after the first; a function of its own keeps their loop off the path of the first."""
    for _ in range(FAST_RETRIES):
        outcome = exchange_leaf(vm, vcpu, number, page, gfn, pferr)
        if outcome != Outcome.RETRY:
            return outcome
    return Outcome.INVALID


@inner(inline=True)
def fix_fast(vm, vcpu, number, page, gfn, pferr):
    """At most FAST_RETRIES + 1 tries of `exchange_leaf` (facts 6.2)."""
    outcome = exchange_leaf(vm, vcpu, number, page, gfn, pferr)
    return outcome if outcome != Outcome.RETRY else exchange_again(vm, vcpu, number, page, gfn, pferr)


@inner
def new_leaf(vm, vcpu, number, gfn, level, old):
    """What an entry of the TDP MMU becomes: a leaf that maps the frame of `gfn`, or an MMIO spte where there is no memslot."""
    if number == NO_SLOT:
        count(vcpu.stat, Counter.PF_MMIO_SPTE_CREATED)
        return make_mmio(vm.word, gfn, ACC.ALL)
    slot = vm.mem.slots[number]
    rights = ACC.ALL
    if not is_writable(old) and vm.word[VmWord.INDIRECT_PAGES] != ZERO and refuses_write(vm, vcpu.stat, slot, gfn, True, False):
        rights = ACC.X | ACC.U  # a table that a hypervisor gave a nested guest lies there
    spte = make_leaf(vm.word, host_frame(vm.frames, frame_at(gfn, level)), level, rights, old, not is_readonly(slot), False)
    if is_writable(spte):
        mark_dirty(vm, slot, gfn)
    return spte


@inner
def make_child(vm, vcpu, index, level, gfn, nx_split, old):
    """Put a table under an entry of the TDP MMU, in place of `old`: nothing, an MMIO spte or a huge page; NO_TABLE without a free
    one, LOST where another thread has changed the entry.

    In 6.1 a huge page above the goal is not split but dropped: the other pages of its frame fault anew. Since 6.2 the table that
    takes its place maps them all (facts 5.4b).
    """
    if is_present(old) and vm.word[VmWord.SPLIT_ON_FAULT] != ZERO:
        table = split_huge_page(vm, vcpu.stat, index, level, old)
        if nx_split and table != NO_TABLE and table != LOST:
            count_nx_split(vm, vcpu.stat, table)
        return table
    if is_present(old):
        if not zap_huge(vm, vcpu.stat, index, level, old):
            return LOST
        old = ZERO
    return link_table(vm, vcpu.stat, index, level, gfn, nx_split, old) if old != FROZEN else LOST


@inner(inline=True)
def descend(vm, vcpu, number, gfn, fetch):
    """(OPEN, index of the entry at the goal level for `gfn`, its level, the entry), tables made on the way; or another Outcome."""
    goal, requested, disallowed = goal_levels(vm, number, gfn, fetch, vm.word[VmWord.MAX_LEVEL])
    table, level = root_for(vm, vcpu, gfn)
    while True:
        index = entry_of(table, gfn, level)
        old = load(vm.spt, index)
        if gives_way(vm, goal, level, old):
            goal -= ONE
        if level == goal:
            return OPEN, index, level, old
        split = disallowed and requested >= level
        table = pfn_of(old) if is_table(old, level) else make_child(vm, vcpu, index, level, gfn, split, old)
        if table == NO_TABLE:
            return Outcome.NO_TABLES, index, level, old
        if table == LOST:
            return Outcome.RETRY, index, level, old
        level -= ONE


@inner(inline=True)
def map_tdp(vm, vcpu, number, gfn, fetch):
    """Map `gfn` in the TDP MMU (facts 5.4b). Needs the mmu lock for reading: other faults go on meanwhile, and who loses the race
    for an entry tries again."""
    outcome, index, level, old = descend(vm, vcpu, number, gfn, fetch)
    if outcome != OPEN:
        return outcome
    spte = new_leaf(vm, vcpu, number, gfn, level, old)
    if spte == old:
        return Outcome.SPURIOUS if number != NO_SLOT else Outcome.EMULATE
    if not try_set_spte(vm, vcpu.stat, index, level, old, spte):
        return Outcome.RETRY
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
    if vm.word[VmWord.INDIRECT_PAGES] == ZERO or number == NO_SLOT or pferr & (write | PFERR.RSVD) != write:
        return False
    return is_write_tracked(vm, vm.mem.slots[number], gfn)


@inner
def has_pages(vm, stat):
    """Whether shadow pages are left, or could be recycled."""
    return not is_short_of_pages(vm.word) or make_pages_available(vm, stat)


@inner(inline=True)
def handle_direct(vm, vcpu, address, pferr):
    """A fault of a direct map that is not answered by what KVM remembers of devices (facts 5.4a, 5.4b)."""
    gfn = address >> PAGE_SHIFT
    number = slot_by_gfn(vm, vcpu, gfn)
    if is_tracked_write(vm, number, gfn, pferr):
        return Outcome.EMULATE
    if vm.word[VmWord.FAST_PAGE_FAULT] != ZERO:
        outcome = fast_fault(vm, vcpu, number, gfn, gfn, pferr)
        if likely(outcome != Outcome.INVALID):
            return outcome
    gva = ZERO if vm.word[VmWord.TDP] != ZERO else address
    if without_memory(vm, vcpu, number, gva, gfn, ACC.ALL, pferr) == Outcome.EMULATE:
        return Outcome.EMULATE
    if vm.word[VmWord.TDP_MMU] != ZERO:
        lock_for_reading(vm.word, vcpu.stat)
        outcome = map_tdp(vm, vcpu, number, gfn, pferr & PFERR.F != ZERO)
        unlock_for_reading(vm.word, vcpu.stat)
        return outcome
    lock_for_writing(vm.word, vcpu.stat)
    outcome = Outcome.NO_PAGES
    if has_pages(vm, vcpu.stat):
        outcome = map_leaf(vm, vcpu, map_direct(vm, vcpu, number, gfn), pferr)
    unlock_for_writing(vm.word, vcpu.stat)
    return outcome


@inner(inline=True)
def handle_indirect(vm, vcpu, gva, pferr):
    """A fault under shadow paging: the guest's own tables decide (facts 5.4c)."""
    walk = walk_for_kvm(vm, vcpu, gva, pferr & (PFERR.W | PFERR.U | PFERR.F))
    if not walk.ok:
        return inject(vm, vcpu, gva, walk.pferr)
    gfn = walk.gpa >> PAGE_SHIFT
    number = slot_by_gfn(vm, vcpu, gfn)
    if is_tracked_write(vm, number, gfn, pferr):
        clear_floods(vm, vcpu, gva)
        return Outcome.EMULATE
    if not guards.DIRECT_ONLY:
        outcome = fast_fault(vm, vcpu, number, gva >> PAGE_SHIFT, gfn, pferr)
        if outcome != Outcome.INVALID:
            return outcome
    limit = mapping_limit(vm, vcpu, gva, walk, pferr)
    if without_memory(vm, vcpu, number, gva, gfn, walk.access, pferr) == Outcome.EMULATE:
        return Outcome.EMULATE
    access = guest_rights(vcpu, walk, number, pferr)
    lock_for_writing(vm.word, vcpu.stat)
    outcome = Outcome.NO_PAGES
    if has_pages(vm, vcpu.stat):
        mapping = fetch(vm, vcpu, number, gva, walk, access, limit)
        outcome = mapping.outcome
        if outcome == OPEN:
            outcome = map_leaf(vm, vcpu, mapping, pferr)
    unlock_for_writing(vm.word, vcpu.stat)
    return outcome


@inner(inline=True)
def page_fault(vm, vcpu, address, pferr):
    """What KVM does on a fault exit: an `Outcome`, counted (facts 5.2)."""
    if pferr & PFERR.RSVD != ZERO:
        outcome = mmio_fault(vm, vcpu, address)
        if outcome != Outcome.INVALID:
            return outcome
    count(vcpu.stat, Counter.PF_TAKEN)
    shadowed = is_shadow_paging(vm, vcpu)
    outcome = handle_indirect(vm, vcpu, address, pferr) if shadowed else handle_direct(vm, vcpu, address, pferr)
    if outcome == Outcome.FIXED:
        count(vcpu.stat, Counter.PF_FIXED)
    elif outcome == Outcome.EMULATE:
        count(vcpu.stat, Counter.PF_EMULATE)
    elif outcome == Outcome.SPURIOUS:
        count(vcpu.stat, Counter.PF_SPURIOUS)
    return outcome
