"""The processor in the tables of sptes: where a walk begins, what it finds for an address, A and D that it sets on the way."""

from __future__ import annotations

import numpy as np

from fastmmu._jit import cmpxchg, inner, load
from fastmmu.bits import NPT_SPTE, ONE, PAGE_SHIFT, PFERR, ZERO
from fastmmu.exits import log_modification
from fastmmu.machine_state import VcpuWord, VmWord
from fastmmu.spte import INDEX_BITS, entry_of, is_last, is_writable, pfn_of
from fastmmu.views import is_nested
from fastmmu.walk import ALL_ONES, page_offset_mask

PAE_ROOT_SHIFT, PAE_ROOT_MASK = np.uint64(18), np.uint64(3)
PAE_LEVEL, FOUR_LEVELS = np.uint64(2), np.uint64(4)
POINTER_MASK = NPT_SPTE.MMU_PRESENT | NPT_SPTE.PS
FOUR_ROOTS = ALL_ONES  # instead of a root: the four of PAE paging
NOWHERE = ALL_ONES  # instead of the index of an spte: the entry faults


@inner(inline=True)
def root_for(vm, vcpu, page):
    """(table, level) at which the walk of the sptes begins, by page number of the address; NO_TABLE where a PAE root is missing."""
    own = vcpu.own
    if own[VcpuWord.ROOT_LEVEL] != PAE_LEVEL:
        return own[VcpuWord.ROOT], own[VcpuWord.ROOT_LEVEL]
    return own[np.uint64(VcpuWord.PAE_ROOT) + ((page >> PAE_ROOT_SHIFT) & PAE_ROOT_MASK)], PAE_LEVEL


@inner
def reserved_code(word, access):
    """Error code of reserved bits in an spte. An EPT misconfiguration tells nothing but that (facts 2.2)."""
    if word[VmWord.EPT] != ZERO:
        return PFERR.RSVD
    return access | PFERR.RSVD | (PFERR.P if word[VmWord.RESERVED_WITHOUT_PRESENT] == ZERO else ZERO)


@inner
def walk_sptes(vm, table, level, gfn, access):
    """(index of the leaf spte, the spte), or (NOWHERE, error code): translate by the tables of sptes, without setting A or D."""
    word = vm.word
    while True:
        index = entry_of(table, gfn, level)
        spte = load(vm.spt, index)
        if spte & word[VmWord.HARDWARE_PRESENT] == ZERO:
            return NOWHERE, access
        if spte & word[VmWord.MMIO_MASK] == word[VmWord.MMIO_VALUE]:
            return NOWHERE, reserved_code(word, access)
        if is_last(spte, level):
            break
        table = pfn_of(spte)
        level -= ONE
    if access & PFERR.W != ZERO and not is_writable(spte):
        return NOWHERE, access | PFERR.P
    if spte & word[VmWord.USER] == ZERO and word[VmWord.TDP] != ZERO and (access & PFERR.F == ZERO or word[VmWord.EPT] == ZERO):
        return NOWHERE, access | PFERR.P  # only what the hypervisor of a nested guest grants can lack it
    if access & PFERR.F != ZERO and not is_executable(word, spte):
        return NOWHERE, access | PFERR.P
    return index, spte


@inner
def is_executable(word, spte):
    """Whether the processor may fetch through a leaf spte."""
    return spte & (word[VmWord.EXECUTE] | word[VmWord.NO_EXECUTE]) == word[VmWord.EXECUTE]


@inner
def use_spte(vm, vcpu, index, spte, gfn, write):
    """The processor uses a leaf spte, as the walk has read it: it sets A, and D for a write. (whether the entry was still that,
    the entry as it is then): where another one has changed it the walk starts again."""
    word = vm.word
    wanted = spte | word[VmWord.ACCESSED] | (word[VmWord.DIRTY] if write else ZERO)
    if spte != wanted:
        if write and spte & word[VmWord.DIRTY] == ZERO:
            log_modification(vm, vcpu, gfn)
        if cmpxchg(vm.spt, index, spte, wanted) != spte:
            return False, spte
    return True, wanted


@inner(inline=True)
def descend(spt, table, page, level):
    """(index, spte, level) of the lowest entry for a page under a table of `level`."""
    if level == FOUR_LEVELS:  # a constant unrolls the loop: 12.4 against 13.0 ns per record that mostly walk
        return descend_from(spt, table, page, FOUR_LEVELS)
    return descend_from(spt, table, page, level)


@inner(inline=True)
def descend_from(spt, table, page, level):
    """The same, step by step."""
    index = entry_of(table, page, level)
    spte = load(spt, index)
    while level > ONE and spte & POINTER_MASK == NPT_SPTE.MMU_PRESENT:
        level -= ONE
        index = entry_of(pfn_of(spte), page, level)
        spte = load(spt, index)
    return index, spte, level


@inner
def place_of(vm, vcpu, gpa, index, spte):
    """Where in memory the page that a leaf maps holds `gpa`: there, but for a nested gpa."""
    if not is_nested(vcpu.nested, vcpu.own):
        return gpa
    inside = page_offset_mask(np.uint64(vm.page[index >> INDEX_BITS]["level"]), INDEX_BITS)
    return (spte & NPT_SPTE.ADDR & ~inside) | (gpa & inside)


@inner
def touch_gpa(vm, vcpu, gpa, access):
    """One access to a guest physical address: (True, spte, where that is in memory), or (False, error code, 0)."""
    gfn = gpa >> PAGE_SHIFT
    table, level = root_for(vm, vcpu, gfn)
    while True:
        index, found = walk_sptes(vm, table, level, gfn, access)
        if index == NOWHERE:
            return False, found, ZERO
        used, spte = use_spte(vm, vcpu, index, found, gfn, access & PFERR.W != ZERO)
        if used:
            return True, spte, place_of(vm, vcpu, gpa, index, spte)
