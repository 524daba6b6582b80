"""The leaves of shadow pages: writing one, mapping the neighbours of one, bringing those of an unsync page up to date.

Facts 3.3, 5.8.5, 5.10 and 5.12.4; `mmu_set_spte`, `pte_prefetch` and `sync_page` of Linux 6.1.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import exchange, inner, load
from fastmmu.bits import ACC, GPTE64, HALF_SHIFT, ONE, PAGE_SHIFT, ROLE, WORD_SHIFT, ZERO
from fastmmu.ept12 import gpte_of, is_bad, is_ept12
from fastmmu.machine_state import Counter, Outcome, VmWord
from fastmmu.memslot import host_frame, is_readonly, logs_dirty, mark_dirty, slot_by_gfn
from fastmmu.pool import NONE, TABLE_SIZE, count, count_leaf, flush_remote
from fastmmu.rmap import (
    ACCESS_SHIFT,
    QUADRANT_SHIFT,
    access_of_entry,
    add_leaf,
    drop_leaf,
    drop_parent,
    enter_rmap,
    gfn_of_entry,
    is_indirect,
    loses,
    remember,
    rmap_index,
)
from fastmmu.spte import (
    INDEX_BITS,
    is_access_tracked,
    is_mmio,
    is_present,
    is_table,
    is_writable,
    make_leaf,
    make_mmio,
    mark_old,
    mmio_gfn,
    pfn_of,
)
from fastmmu.state import NO_SLOT
from fastmmu.unsync import may_be_shadowed, refuses_write
from fastmmu.walk import access_of, reserved_row

PREFETCH_PAGES = np.uint64(8)
NOT_STARTED = ZERO
FOUR_BYTE, QUADRANT = np.uint32(ROLE.FOUR_BYTE_GPTE), ROLE.QUADRANT


@inner(inline=True)
def make_shadow_leaf(vm, vcpu, slot, gfn, level, access, old, can_unsync, host_writable, prefetch):
    """(leaf spte, whether it was refused to be writable because a guest's table lies there); what it may write is logged.

    An entry that was writable keeps that without being asked again: protection was for whoever shadowed the table (facts 3.3.5). So
    does, in 6.1, what takes the place of an MMIO spte with W, which looks like one: a shadowed table can become writable so.
    """
    refused = False
    if access & ACC.W != ZERO and host_writable and may_be_shadowed(vm, slot, gfn):
        if not is_writable(old):
            refused = refuses_write(vm, vcpu.stat, slot, gfn, can_unsync, prefetch)
        elif not is_present(old):
            vm.word[VmWord.UNASKED] += ONE
    rights = access & ~ACC.W if refused else access
    spte = make_leaf(vm.word, host_frame(vm.frames, gfn), level, rights, old, host_writable, prefetch)
    if prefetch:
        spte = untouched(vcpu.nested, vm.word, spte)
    if is_writable(spte):
        mark_dirty(vm, slot, gfn)
    return spte, refused


@inner
def untouched(nested, word, spte):
    """A leaf that nobody asked for. Where sptes have no A it is access-tracked, so that its first use is seen (facts 5.12.4); of
    shadow pages of a guest's tables these are a nested guest's alone."""
    if nested is None:
        return spte
    return spte if word[VmWord.AD] != ZERO else mark_old(word, spte)


@inner(inline=True)
def set_leaf(vm, vcpu, number, index, level, gfn, access, write):
    """Write the leaf of a shadow page for the frame of `gfn`: an `Outcome` (facts 5.10)."""
    old = vm.spt[index]
    flushes, was_mapped = False, False
    if is_present(old):
        if is_table(old, level):
            drop_parent(vm, pfn_of(old), index)
            flushes = True
        elif number == NO_SLOT or pfn_of(old) != host_frame(vm.frames, gfn):
            drop_leaf(vm, vcpu.stat, index)
            flushes = True
        else:
            was_mapped = True
        old = vm.spt[index]
    if number == NO_SLOT:
        count(vcpu.stat, Counter.PF_MMIO_SPTE_CREATED)
        vm.spt[index] = make_mmio(vm.word, gfn, access)
        if flushes:
            flush_remote(vm.word, vcpu.stat)
        return Outcome.EMULATE
    slot = vm.mem.slots[number]
    outcome = Outcome.FIXED
    spte, refused = make_shadow_leaf(vm, vcpu, slot, gfn, level, access, old, True, not is_readonly(slot), False)
    if spte == old:
        outcome = Outcome.SPURIOUS
    else:
        old = exchange(vm.spt, index, spte)  # the fast path or the processor may have changed it meanwhile
        flushes |= was_mapped and loses(vm.word, old, spte)
    if refused and write:
        outcome = Outcome.EMULATE
    if flushes:
        flush_remote(vm.word, vcpu.stat)
    if was_mapped:
        remember(vm, index, gfn, access)
    else:
        add_leaf(vm, vcpu.stat, slot, index, gfn, access, level)
    return outcome


@inner(inline=True)
def prefetch_leaf(vm, vcpu, slot, index, gfn, access):
    """The same for a 4 KiB leaf that nobody asked for, in place of nothing or of an MMIO spte."""
    spte, _ = make_shadow_leaf(vm, vcpu, slot, gfn, ONE, access, vm.spt[index], True, True, True)
    vm.spt[index] = spte
    add_leaf(vm, vcpu.stat, slot, index, gfn, access, ONE)


@inner
def is_put_aside(nested, word, old, spte):
    """Whether a leaf becomes access-tracked, which a TLB may not know: as if it lost A."""
    if nested is None:
        return False
    return is_access_tracked(word, spte) and not is_access_tracked(word, old)


# --- neighbours ------------------------------------------------------------------------------------------------------------


@inner(inline=True)
def prefetch_neighbours(vm, vcpu, index):
    """Map the free entries of the aligned eight around a new 4 KiB leaf (truth README section 6)."""
    if vm.word[VmWord.PREFETCH] == ZERO:
        return
    if is_indirect(vm.page[index >> INDEX_BITS]):
        prefetch_gptes(vm, vcpu, index)
    else:
        prefetch_direct(vm, vcpu, index)


@inner(inline=True)
def prefetch_gptes(vm, vcpu, index):
    """By the guest's entries, from the lowest up, until one cannot be taken."""
    start = index & ~(PREFETCH_PAGES - ONE)
    for at in range(start, start + PREFETCH_PAGES):
        if at != index and not is_present(vm.spt[at]):
            if not prefetch_gpte(vm, vcpu, at, read_gpte(vm, at), True):
                return


@inner(inline=True)
def prefetch_direct(vm, vcpu, index):
    """Run by run of free entries.

    A run ends the prefetch if it cannot be taken whole: its first page has no memslot, or one that is read-only, or that logs where
    the pages would be writable, or the run crosses the slot's end.
    """
    start = index & ~(PREFETCH_PAGES - ONE)
    run = NOT_STARTED
    for at in range(start, start + PREFETCH_PAGES + ONE):
        taken = at == start + PREFETCH_PAGES or at == index or is_present(vm.spt[at])
        if not taken:
            if run == NOT_STARTED:
                run = at
        elif run != NOT_STARTED:
            if not prefetch_run(vm, vcpu, run, at):
                return
            run = NOT_STARTED


@inner(inline=True)
def prefetch_run(vm, vcpu, start, end):
    """Map the entries [start, end) of a direct shadow page; False when they cannot be taken."""
    gfn, access = gfn_of_entry(vm, start), access_of_entry(vm, start)
    number = slot_by_gfn(vm, vcpu, gfn)
    if number == NO_SLOT:
        return False
    slot = vm.mem.slots[number]
    if is_readonly(slot) or (access & ACC.W != ZERO and logs_dirty(slot)) or gfn + (end - start) > slot["base"] + slot["pages"]:
        return False
    if may_be_shadowed(vm, slot, gfn):  # the same answer for the whole run, which lies in one 2 MiB frame
        for index in range(start, end):
            prefetch_leaf(vm, vcpu, slot, index, gfn, access)
            gfn += ONE
        return True
    word, at = vm.word, rmap_index(slot, gfn, ONE)
    for index in range(start, end):
        vm.spt[index] = make_leaf(word, host_frame(vm.frames, gfn), ONE, access, vm.spt[index], True, True)
        enter_rmap(vm, vcpu.stat, at, index)
        at += ONE
        gfn += ONE
    count_leaf(vcpu.stat, ONE, np.int64(end - start))
    return True


@inner
def read_gpte(vm, index):
    """The guest's entry that the leaf at `index` follows, as it is now. Its table lies in a memslot: else it would be zapped."""
    page, entry = vm.page[index >> INDEX_BITS], index & (TABLE_SIZE - ONE)
    table = page["gfn"] << PAGE_SHIFT
    if page["role"] & FOUR_BYTE != NONE:
        quadrant = (np.uint64(page["role"]) & QUADRANT) >> QUADRANT_SHIFT
        return np.uint64(load(vm.mem.halves, (table >> HALF_SHIFT) + (quadrant << INDEX_BITS) + entry))
    return load(vm.mem.words, (table >> WORD_SHIFT) + entry)


@inner(inline=True)
def is_invalid(vcpu, gpte):
    """Whether nothing is mapped by an entry without asking the guest's walk: not present, never accessed, reserved bits."""
    if gpte_of(vcpu.nested, vcpu.mmu, gpte) & (GPTE64.P | GPTE64.A) != GPTE64.P | GPTE64.A:
        return True
    return is_bad(vcpu.nested, vcpu.mmu, gpte, ONE)


@inner(inline=True)
def rights_of(vm, vcpu, index, entry):
    """What the page's role and the entry grant; no write before D is set (facts 1.1, W16)."""
    gpte = gpte_of(vcpu.nested, vcpu.mmu, entry)
    role = np.uint64(vm.page[index >> INDEX_BITS]["role"])
    access = ((role & ROLE.ACCESS) >> np.uint64(8)) & access_of(gpte ^ GPTE64.NX)
    return access & ~ACC.W if gpte & GPTE64.D == ZERO else access


@inner
def gfn_of(gpte):
    """Frame in an entry of a leaf table."""
    return (gpte & GPTE64.ADDR) >> PAGE_SHIFT


@inner
def clear_leaf(vm, stat, index):
    """Remove whatever a leaf entry holds."""
    if is_present(vm.spt[index]):
        drop_leaf(vm, stat, index)
    vm.spt[index] = ZERO


@inner(inline=True)
def prefetch_gpte(vm, vcpu, index, gpte, unlogged):
    """Map what the guest's entry says, as if it had been accessed; with `unlogged` not writably where a slot logs. False: it cannot
    be taken."""
    if is_invalid(vcpu, gpte):
        clear_leaf(vm, vcpu.stat, index)
        return False
    gfn, access = gfn_of(gpte), rights_of(vm, vcpu, index, gpte)
    number = slot_by_gfn(vm, vcpu, gfn)
    if number == NO_SLOT:
        return False
    slot = vm.mem.slots[number]
    if is_readonly(slot) or (unlogged and access & ACC.W != ZERO and logs_dirty(slot)):
        return False
    prefetch_leaf(vm, vcpu, slot, index, gfn, access)
    return True


# --- sync ------------------------------------------------------------------------------------------------------------------


@inner
def sync_page(vm, vcpu, table):
    """Bring the leaves of an unsync page up to date; whether that is a reason to flush (facts 5.12.4).

    6.1 builds each again, as a prefetch: A is lost, and D where it was writable. Later kernels leave one alone whose rights, as
    they are kept beside the gfn, did not change (SYNC_SKIPS_UNCHANGED).
    """
    flushes = False
    for first in range(table * TABLE_SIZE, (table + ONE) * TABLE_SIZE, PREFETCH_PAGES):
        filled = ZERO
        for i in range(PREFETCH_PAGES):
            filled |= vm.spt[first + i]
        if filled != ZERO:  # most pages are far from full
            flushes |= sync_group(vm, vcpu, table, first)
    return flushes


@inner(inline=True)
def sync_group(vm, vcpu, table, first):
    """Eight leaves of them, from index `first` on. Most entries say what they said: all that is left of building a leaf again is
    that A and D are lost, and not even that where it is left alone."""
    word, role, flushes = vm.word, np.uint64(vm.page[table]["role"]), False
    bits, wanted = word[VmWord.ACCESSED] | word[VmWord.DIRTY], GPTE64.P | GPTE64.A
    if word[VmWord.SYNC_SKIPS_UNCHANGED] != ZERO:
        bits = ZERO
    alike = word[VmWord.LOGGING_SLOTS] == ZERO and role & ROLE.FOUR_BYTE_GPTE == ZERO
    alike = alike and not is_ept12(vcpu.nested, vcpu.mmu)
    reserved, granted = vcpu.mmu.reserved[reserved_row(ZERO, ONE)], (role & ROLE.ACCESS) >> ACCESS_SHIFT
    start = ((vm.page[table]["gfn"] << PAGE_SHIFT) >> WORD_SHIFT) + (first & (TABLE_SIZE - ONE))
    for i in range(PREFETCH_PAGES):
        index = first + i
        spte = vm.spt[index]
        if spte == ZERO:
            continue
        if alike:
            gpte = load(vm.mem.words, start + i)
            access = granted & access_of(gpte ^ GPTE64.NX)
            access = access & ~ACC.W if gpte & GPTE64.D == ZERO else access
            same = vm.shadowed[index] == (gpte & GPTE64.ADDR) | access and gpte & (wanted | reserved) == wanted
            if same and is_present(spte) and (is_writable(spte) or access & ACC.W == ZERO):
                vm.spt[index] = spte & ~bits
                flushes |= spte & bits != ZERO
                continue
        flushes |= sync_leaf(vm, vcpu, index)
    return flushes


@inner
def sync_leaf(vm, vcpu, index):
    """One leaf of them."""
    gpte, old = read_gpte(vm, index), vm.spt[index]
    if is_invalid(vcpu, gpte):
        clear_leaf(vm, vcpu.stat, index)
        return True
    gfn, access = gfn_of(gpte), rights_of(vm, vcpu, index, gpte)
    if is_mmio(vm.word, old):
        vm.spt[index] = make_mmio(vm.word, gfn, access) if mmio_gfn(old) == gfn else ZERO
        return False
    if gfn_of_entry(vm, index) != gfn or (access == ZERO and is_ept12(vcpu.nested, vcpu.mmu)):
        drop_leaf(vm, vcpu.stat, index)
        return True
    if vm.word[VmWord.SYNC_SKIPS_UNCHANGED] != ZERO and access_of_entry(vm, index) == access:
        return False
    remember(vm, index, gfn, access)
    slot = vm.mem.slots[slot_by_gfn(vm, vcpu, gfn)]
    host_writable = old & vm.word[VmWord.HOST_WRITABLE] != ZERO
    spte, _ = make_shadow_leaf(vm, vcpu, slot, gfn, ONE, access, old, False, host_writable, True)
    vm.spt[index] = spte
    return loses(vm.word, old, spte) or is_put_aside(vcpu.nested, vm.word, old, spte)
