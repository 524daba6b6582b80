"""Emulated writes to tables of the guest that are shadowed (facts 5.13; `kvm_mmu_pte_write` of Linux 6.1)."""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import CR4, ONE, PAGE_OFFSET, PAGE_SHIFT, ROLE, WORD_SHIFT, ZERO
from fastmmu.machine_state import Counter, VcpuWord, VmWord
from fastmmu.pool import NO_TABLE, NONE, after_indirect, count, first_indirect
from fastmmu.rmap import QUADRANT_SHIFT
from fastmmu.shadow import commit_zapped, zap, zap_entry
from fastmmu.spte import INDEX_BITS, is_present

FLOOD = np.uint8(3)
ONE_WRITE = np.uint8(1)
HALF, WHOLE = np.uint64(4), np.uint64(8)
FOUR_BYTE = np.uint32(ROLE.FOUR_BYTE_GPTE)
DIRECTORY = np.uint64(2)


@inner
def track_write(vm, vcpu, gpa, size):
    """The emulator wrote `size` bytes, of one page: shadow pages that follow them lose the entries, or go altogether."""
    if vm.word[VmWord.INDIRECT_PAGES] == ZERO:
        return
    count(vcpu.stat, Counter.MMU_PTE_WRITE)
    if size == HALF and vcpu.own[VcpuWord.CR4] & CR4.PAE != ZERO:  # one half of an 8-byte entry
        gpa, size = gpa & ~(WHOLE - ONE), WHOLE
    written = ZERO
    if size in (HALF, WHOLE):
        written = read_entry_at(vm, gpa, size)
    gfn = gpa >> PAGE_SHIFT
    flushes = False
    table = first_indirect(vm, gfn)
    while table != NO_TABLE:
        if is_misaligned(vm, table, gpa, size) or is_flooded(vm, table):
            zap(vm, vcpu.stat, table)
            count(vcpu.stat, Counter.MMU_FLOODED)
        else:
            flushes |= zap_written(vm, vcpu.stat, table, gpa, written)
        table = after_indirect(vm, table, gfn)
    commit_zapped(vm, vcpu.stat, flushes)


@inner
def read_entry_at(vm, gpa, size):
    """4 or 8 bytes of memory, which may lie in two words of one page."""
    index, shift = gpa >> WORD_SHIFT, (gpa & (WHOLE - ONE)) << np.uint64(3)
    value = vm.mem.words[index] >> shift
    if shift + (size << np.uint64(3)) > np.uint64(64):
        value |= vm.mem.words[index + ONE] << (np.uint64(64) - shift)
    return value if size == WHOLE else value & ((ONE << np.uint64(32)) - ONE)


@inner
def entry_bytes(vm, table):
    """Size of the entries of the guest's table."""
    return HALF if vm.page[table]["role"] & FOUR_BYTE != NONE else WHOLE


@inner
def is_misaligned(vm, table, gpa, size):
    """Whether the guest seems to use the page for other things: it writes over the bounds of an entry, or less than 4 bytes; but
    one byte at the start of an entry is how flags are changed."""
    inside = entry_bytes(vm, table) - ONE
    offset = gpa & PAGE_OFFSET
    if offset & inside == ZERO and size == ONE:
        return False
    return (offset ^ (offset + size - ONE)) & ~inside != ZERO or size < HALF


@inner
def is_flooded(vm, table):
    """Whether an upper table is written for the third time since it was last gone through: it is none any more, or a new one."""
    page = vm.page[table]
    if np.uint64(page["level"]) == ONE:
        return False  # it can become unsync instead
    page["floods"] = min(page["floods"] + ONE_WRITE, FLOOD)
    return page["floods"] == FLOOD


@inner
def zap_written(vm, stat, table, gpa, written):
    """Zap the entries that follow what was written; whether that is a reason to flush.

    A directory of 4-byte entries is shadowed by four pages, each entry by two of theirs; a table of them by two pages.
    """
    role, level = np.uint64(vm.page[table]["role"]), np.uint64(vm.page[table]["level"])
    offset, entries = gpa & PAGE_OFFSET, ONE
    if role & ROLE.FOUR_BYTE_GPTE != ZERO:
        offset <<= ONE
        if level == DIRECTORY:
            offset = (offset & ~(WHOLE - ONE)) << ONE
            entries = DIRECTORY
        if offset >> PAGE_SHIFT != (role & ROLE.QUADRANT) >> QUADRANT_SHIFT:
            return False
        offset &= PAGE_OFFSET
    first = (table << INDEX_BITS) + (offset >> WORD_SHIFT)
    flushes = False
    for index in range(first, first + entries):
        flushes |= is_present(vm.spt[index])
        zap_entry(vm, stat, index, level)
        if written != ZERO and level != ONE:
            count(stat, Counter.MMU_PDE_ZAPPED)
    return flushes
