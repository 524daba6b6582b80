"""The guest flushes: what is unsync under a root is brought up to date (facts 5.12.3, 9)."""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import ONE, PAGE_SHIFT, ZERO
from fastmmu.descent import root_for
from fastmmu.leaf import clear_leaf, prefetch_gpte, read_gpte, sync_page
from fastmmu.machine_state import VcpuWord, VmWord
from fastmmu.memory import find_slot
from fastmmu.mmio import covers
from fastmmu.pool import NO, NO_TABLE, NONE, flush_remote
from fastmmu.rmap import write_protect
from fastmmu.spte import entry_of, is_present, is_table, pfn_of
from fastmmu.state import NO_SLOT, Mmio
from fastmmu.unsync import clear_path, first_leaf, mark_synced, next_leaf, walk_unsync

MMIO, MMIO_GENERATION = int(VcpuWord.MMIO), int(VcpuWord.MMIO_GENERATION)


@inner
def forget_mmio(vcpu):
    """The MMIO info cache forgets its gva (facts 4.5)."""
    vcpu.own[VcpuWord.MMIO + Mmio.GVA] = ZERO


@inner
def sync_children(vm, vcpu, top):
    """Bring all unsync pages under `top` up to date, up to 16 pages at a time: first write-protect their tables, then read them."""
    flushes = False
    while walk_unsync(vm, top):
        length = vm.word[VmWord.VECTOR_LENGTH]
        protected = False
        at = first_leaf(vm)
        while at < length:
            protected |= protect_table(vm, vcpu.stat, vm.word[np.uint64(VmWord.VECTOR_TABLE) + at])
            at = next_leaf(vm, at + ONE)
        if protected:
            flush_remote(vm.word, vcpu.stat)
            flushes = False
        at = first_leaf(vm)
        while at < length:
            table = vm.word[np.uint64(VmWord.VECTOR_TABLE) + at]
            mark_synced(vm, vcpu.stat, table)
            flushes |= sync_page(vm, vcpu, table)
            clear_path(vm)
            at = next_leaf(vm, at + ONE)
    if flushes:
        flush_remote(vm.word, vcpu.stat)


@inner
def protect_table(vm, stat, table):
    """Make the guest's table of a shadow page read-only; whether that is a reason to flush."""
    gfn = vm.page[table]["gfn"]
    number = find_slot(vm.mem.slots, gfn << PAGE_SHIFT)
    return number != NO_SLOT and write_protect(vm, stat, vm.mem.slots[number], gfn)


@inner
def invalidate_under(vm, vcpu, gva, table, level):
    """INVLPG under one root: the leaf of an unsync page is dropped and read again (facts 9.4.5). Other pages are accurate."""
    if covers(vcpu.own[MMIO:MMIO_GENERATION], gva):
        forget_mmio(vcpu)
    page = gva >> PAGE_SHIFT
    while table != NO_TABLE:
        index = entry_of(table, page, level)
        spte = vm.spt[index]
        if level == ONE:
            if vm.page[table]["unsync"] != NO:
                clear_leaf(vm, vcpu.stat, index)
                if is_present(spte):
                    flush_remote(vm.word, vcpu.stat)
                prefetch_gpte(vm, vcpu, index, read_gpte(vm, index), False)
            return
        if vm.page[table]["unsync_children"] == NONE or not is_table(spte, level):
            return
        table = pfn_of(spte)
        level -= ONE


@inner
def invalidate_current(vm, vcpu, gva):
    """INVLPG under the root in use."""
    table, level = root_for(vm, vcpu, gva >> PAGE_SHIFT)
    invalidate_under(vm, vcpu, gva, table, level)
