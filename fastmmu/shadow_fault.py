"""Page faults that shadow pages answer: the direct map, and the guest's tables shadowed (facts 5.4, 5.8, 5.9).

Follows `__direct_map`, `FNAME(page_fault)` and `FNAME(fetch)` of Linux 6.1. Both go down from the root, make the pages that are
missing, and write one leaf.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import ACC, CR0, CR4, EPT, GPTE64, ONE, PAGE_SHIFT, PFERR, ZERO
from fastmmu.descent import PAE_LEVEL, root_for
from fastmmu.ept12 import gpte_of, is_ept12, walk_ept12
from fastmmu.leaf import prefetch_neighbours, set_leaf
from fastmmu.machine_state import PREVIOUS_ROOTS, Counter, Mapping, Outcome, VcpuWord, VmWord
from fastmmu.memslot import logs_dirty, mark_dirty, max_mapping_level, note_write, slot_by_gfn
from fastmmu.pool import NO, NO_TABLE, NONE, YES, count
from fastmmu.shadow import child_role, get_shadow_page, leads_to, link, role_of
from fastmmu.spte import entry_of, frame_at, is_table, pages_at, pfn_of
from fastmmu.state import NO_SLOT, Reg
from fastmmu.sync import invalidate_current, invalidate_under, sync_children
from fastmmu.tlb import invalidate
from fastmmu.views import is_nested
from fastmmu.walk import ALL_ONES, WRITTEN, access_of, mode_of, read_entry, table_index, walk_exact

OPEN = Outcome.INVALID


# --- the guest's tables ----------------------------------------------------------------------------------------------------


@inner
def top_table(vcpu, mode, gva):
    """Address of the first table in memory that a walk goes through."""
    if mode.pae:
        return vcpu.mmu.reg[np.uint64(Reg.PDPTE0) + ((gva >> np.uint64(30)) & np.uint64(3))] & mode.root
    return vcpu.mmu.reg[Reg.CR3] & mode.root


@inner
def walk_for_kvm(vm, vcpu, gva, access):
    """KVM walks the guest's tables (facts 1), or those that a hypervisor gave its guest: the Walk. A and D that it sets are logged,
    and taken over into the trail."""
    return walk_tables(vcpu.nested, vm, vcpu, gva, access)


@inner
def walk_tables(nested, vm, vcpu, gva, access):
    """The same; `nested` is the vCPU's."""
    if nested is None:
        return walk_gptes(vm, vcpu, gva, access)
    if vcpu.mmu.reg[Reg.EPT] == ZERO:
        return walk_gptes(vm, vcpu, gva, access)
    return walk_ept12(vm, vcpu, gva, access)


@inner
def walk_gptes(vm, vcpu, gva, access):
    """The same for ordinary entries."""
    walk = walk_exact(vm.mem, vcpu.mmu, vcpu.trail, gva, access)
    if not walk.ok or vcpu.trail[WRITTEN] == ZERO:
        return walk
    mode = mode_of(vcpu.mmu)
    table, level = top_table(vcpu, mode, gva), mode.levels
    while True:
        gpte = vcpu.trail[level]
        if vcpu.trail[WRITTEN] & (ONE << level) != ZERO:
            write_leaf = level == walk.level and access & PFERR.W != ZERO
            vcpu.trail[level] = gpte | GPTE64.A | (GPTE64.D if write_leaf else ZERO)
            number = slot_by_gfn(vm, vcpu, table >> PAGE_SHIFT)
            mark_dirty(vm, vm.mem.slots[number], table >> PAGE_SHIFT)
            note_write(vm, vcpu, table)
        if level == walk.level:
            return walk
        table = gpte & mode.root
        level -= ONE


@inner
def has_changed(vm, vcpu, mode, table, gva, level):
    """Whether the guest's entry is another one than the walk has read (facts 5.8.1). A table that maps itself can do that."""
    return read_entry(vm.mem, mode, table, table_index(gva, level, mode.index_bits)) != vcpu.trail[level]


@inner
def changes_itself(vm, vcpu, mode, gva, walk, access):
    """Whether the page is one of the tables that map it, at its own size: it is mapped by 4 KiB then."""
    may_write = walk.access & ACC.W != ZERO
    if not may_write and not (vcpu.own[VcpuWord.CR0] & CR0.WP == ZERO and access & PFERR.U == ZERO):
        return False
    table, level, gfn = top_table(vcpu, mode, gva), mode.levels, walk.gpa >> PAGE_SHIFT
    while True:
        if (gfn ^ (table >> PAGE_SHIFT)) & ~(pages_at(walk.level) - ONE) == ZERO:
            return True
        if level == walk.level:
            return False
        table = vcpu.trail[level] & mode.root
        level -= ONE


# --- going down ------------------------------------------------------------------------------------------------------------


@inner(inline=True)
def goal_levels(vm, number, gfn, fetch, limit):
    """(goal, requested) levels of a mapping of at most `limit`, and whether a fetch may not use a huge page (facts 5.9)."""
    disallowed = fetch and vm.word[VmWord.NX_HUGE_PAGES] != ZERO
    if limit == ONE or number == NO_SLOT or logs_dirty(vm.mem.slots[number]):
        return ONE, ONE, disallowed
    requested = max_mapping_level(vm, vm.mem.slots[number], gfn, min(limit, vm.word[VmWord.MAX_LEVEL]))
    return (ONE if disallowed else requested), requested, disallowed


@inner
def gives_way(vm, goal, level, spte):
    """Under NX huge pages a table is not replaced by a huge page, which could not be executed: the goal is below (facts 5.9.5)."""
    return vm.word[VmWord.NX_HUGE_PAGES] != ZERO and level > ONE and level == goal and is_table(spte, level)


@inner
def clear_flood(vm, table):
    """The page was gone through: emulated writes to it are counted anew (facts 5.13.4)."""
    vm.page[table]["floods"] = NO


@inner
def clear_floods(vm, vcpu, gva):
    """The same for every page on the way to `gva`."""
    page = gva >> PAGE_SHIFT
    table, level = root_for(vm, vcpu, page)
    while table != NO_TABLE:
        clear_flood(vm, table)
        spte = vm.spt[entry_of(table, page, level)]
        if not is_table(spte, level):
            return
        table = pfn_of(spte)
        level -= ONE


@inner
def count_nx_split(vm, stat, table):
    """A fetch made a table where a huge page could stand."""
    if vm.page[table]["nx_split"] != YES:
        vm.page[table]["nx_split"] = YES
        count(stat, Counter.NX_LPAGE_SPLITS)


@inner(inline=True)
def settled(outcome):
    """A fault that needs no mapping."""
    return Mapping(outcome, NO_SLOT, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO)


@inner(inline=True)
def map_leaf(vm, vcpu, mapping, pferr):
    """From the mapping's table down to the goal level, by direct pages, and the leaf there: an `Outcome`.

    A direct page under a guest's huge page grants what the guest granted when it was made: where that has changed, as when D was
    set, it does not lead there any more, and another one takes its place (`validate_direct_spte`, facts 5.8.4).
    """
    _, number, page, table, level, gfn, access, limit = mapping
    fetch, write = pferr & PFERR.F != ZERO, pferr & PFERR.W != ZERO
    goal, requested, disallowed = goal_levels(vm, number, gfn, fetch, limit)
    while True:
        clear_flood(vm, table)
        index = entry_of(table, page, level)
        if gives_way(vm, goal, level, vm.spt[index]):
            goal -= ONE
        if level == goal:
            break
        role, first = child_role(role_of(vm, index), index, access, True), frame_at(gfn, level)
        if leads_to(vm, index, level, first, role):
            table = pfn_of(vm.spt[index])
        else:
            table = get_shadow_page(vm, vcpu, first, role)
            if table == NO_TABLE:
                return Outcome.NO_TABLES
            link(vm, vcpu.stat, index, table)
            if disallowed and requested >= level and (vm.word[VmWord.TDP] != ZERO or vcpu.mmu.reg[Reg.MODE] != ZERO):
                count_nx_split(vm, vcpu.stat, table)
        level -= ONE
    outcome = set_leaf(vm, vcpu, number, index, level, frame_at(gfn, level), access, write)
    if outcome != Outcome.SPURIOUS and level == ONE and vm.word[VmWord.AD] != ZERO:
        prefetch_neighbours(vm, vcpu, index)
    return outcome


@inner(inline=True)
def map_direct(vm, vcpu, number, gfn):
    """The Mapping of `gfn` in direct shadow pages (facts 5.4a). Without two-dimensional paging they end at 2 MiB."""
    table, level = root_for(vm, vcpu, gfn)
    limit = vm.word[VmWord.MAX_LEVEL] if vm.word[VmWord.TDP] != ZERO else PAE_LEVEL
    return Mapping(OPEN, number, gfn, table, level, gfn, ACC.ALL, limit)


@inner(inline=True)
def fetch(vm, vcpu, number, gva, walk, access, limit):
    """Shadow the way that the walk went, page by page: the Mapping of its end (facts 5.8)."""
    mode, page = mode_of(vcpu.mmu), gva >> PAGE_SHIFT
    guest_table = top_table(vcpu, mode, gva)
    if has_changed(vm, vcpu, mode, guest_table, gva, mode.levels):
        return settled(Outcome.RETRY)
    table, level = root_for(vm, vcpu, page)
    rights = ALL_ONES
    while level > walk.level:
        clear_flood(vm, table)
        index = entry_of(table, page, level)
        gpte = gpte_of(vcpu.nested, vcpu.mmu, vcpu.trail[level])
        rights &= gpte ^ GPTE64.NX
        guest_table = gpte & mode.root
        role = child_role(role_of(vm, index), index, access_of(rights), False)
        linked = leads_to(vm, index, level, guest_table >> PAGE_SHIFT, role)
        if linked:
            child = pfn_of(vm.spt[index])
        else:
            child = get_shadow_page(vm, vcpu, guest_table >> PAGE_SHIFT, role)
            if child == NO_TABLE:
                return settled(Outcome.NO_TABLES)
            if vm.page[child]["unsync_children"] != NONE:
                sync_children(vm, vcpu, child)
        if has_changed(vm, vcpu, mode, guest_table, gva, level - ONE):
            return settled(Outcome.RETRY)
        if not linked:
            link(vm, vcpu.stat, index, child)
        table = child
        level -= ONE
    return Mapping(OPEN, number, page, table, level, walk.gpa >> PAGE_SHIFT, access, limit)


# --- the fault -------------------------------------------------------------------------------------------------------------


@inner
def inject(vm, vcpu, gva, pferr):
    """KVM gives the guest a #PF (facts 1.9), or a nested guest's hypervisor the exit that it causes. Where rights were missing,
    what the processor and unsync pages have of the address goes, as a processor drops it."""
    nested = is_nested(vcpu.nested, vcpu.own)
    if not nested:
        count(vcpu.stat, Counter.PF_GUEST)
    vcpu.own[VcpuWord.INJECTED] = pferr
    if (nested or vm.word[VmWord.TDP] == ZERO) and pferr & (PFERR.P | PFERR.RSVD) == PFERR.P:
        invalidate(vcpu.tlb, gva)
        if vcpu.own[VcpuWord.ROOT] != NO_TABLE:
            invalidate_current(vm, vcpu, gva)
    if is_ept12(vcpu.nested, vcpu.mmu):
        invalidate_same_ept(vm, vcpu, gva)
    return Outcome.INJECT


@inner
def invalidate_same_ept(vm, vcpu, gpa):
    """Before a fault of EPT goes to the hypervisor: the address under kept roots of the same tables, whose EPTP may say something
    else besides the address (facts 2.3.5)."""
    own = vcpu.own
    for i in range(PREVIOUS_ROOTS):
        root = own[VcpuWord.PREVIOUS_ROOT + i]
        if root != NO_TABLE and (own[VcpuWord.PREVIOUS_PGD + i] ^ vcpu.mmu.reg[Reg.CR3]) & EPT.ADDR == ZERO:
            invalidate_under(vm, vcpu, gpa, root, np.uint64(vm.page[root]["level"]))


@inner(inline=True)
def guest_rights(vcpu, walk, number, pferr):
    """What the leaf grants. A supervisor's write without CR0.WP to a page that denies it gets W, and the user loses the page; with
    SMEP the supervisor may not execute it then (facts 1.8)."""
    access = walk.access
    denied = pferr & (PFERR.W | PFERR.U) == PFERR.W and access & ACC.W == ZERO and number != NO_SLOT
    if denied and vcpu.own[VcpuWord.CR0] & CR0.WP == ZERO:
        access = (access | ACC.W) & ~ACC.U
        if vcpu.own[VcpuWord.CR4] & CR4.SMEP != ZERO:
            access &= ~ACC.X
    return access


@inner(inline=True)
def mapping_limit(vm, vcpu, gva, walk, pferr):
    """Highest level at which the guest's page may be mapped."""
    if walk.level == ONE or changes_itself(vm, vcpu, mode_of(vcpu.mmu), gva, walk, pferr):
        return ONE
    return walk.level
