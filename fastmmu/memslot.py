"""Memslots: which host memory stands behind a gfn, how large a page may be, what was written.

Facts 5.9 and 7.2. The rows are those of `GuestMemory`'s slots with more columns, so that walks of the guest's tables read the same.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import fetch_or, inner
from fastmmu.bits import ONE, PAGE_SHIFT, ZERO
from fastmmu.machine_state import SlotFlag, VcpuWord, VmWord
from fastmmu.memory import find_slot
from fastmmu.spte import INDEX_BITS
from fastmmu.state import NO_SLOT

LOG = np.uint64(SlotFlag.LOG_DIRTY_PAGES)
READONLY = np.uint64(SlotFlag.READONLY)
WORD_BITS = np.uint64(6)
BIT_MASK = np.uint64(63)


@inner
def slot_by_gfn(vm, vcpu, gfn):
    """Row of the memslot that holds `gfn`, or NO_SLOT; the one found last is tried first, as KVM does."""
    slots = vm.mem.slots
    gpa = gfn << PAGE_SHIFT
    if vm.word[VmWord.LAST_SLOT] == ZERO:
        return find_slot(slots, gpa)
    last = vcpu.own[VcpuWord.LAST_SLOT]
    if slots[last]["start"] <= gpa and gpa < slots[last]["end"]:
        return np.int64(last)
    number = find_slot(slots, gpa)
    if number != NO_SLOT:
        vcpu.own[VcpuWord.LAST_SLOT] = np.uint64(number)
    return number


@inner
def slot_by_id(vm, identity):
    """Row of the memslot with this id, or NO_SLOT."""
    slots = vm.mem.slots
    for number in range(len(slots)):
        if slots[number]["id"] == identity and slots[number]["start"] < slots[number]["end"]:
            return number
    return NO_SLOT


@inner
def logs_dirty(slot):
    """Whether the memslot logs dirty pages."""
    return slot["flags"] & LOG != ZERO


@inner
def is_readonly(slot):
    """Whether the guest may only read the memslot."""
    return slot["flags"] & READONLY != ZERO


@inner
def set_bit(words, first, page):
    """Set bit `page` of the bitmap that begins at word `first`. May race with other vCPUs and with whoever collects the log."""
    fetch_or(words, first + (page >> WORD_BITS), ONE << (page & BIT_MASK))


@inner
def mark_dirty(vm, slot, gfn):
    """Log that a page was written, or may be from now on."""
    if logs_dirty(slot):
        set_bit(vm.slot_words, slot["dirty"], gfn - slot["base"])


@inner
def note_write(vm, vcpu, gpa):
    """The guest wrote: for the audit, which knows so what the dirty log must hold."""
    if vm.word[VmWord.LOGGING_SLOTS] == ZERO:
        return
    gfn = gpa >> PAGE_SHIFT
    number = slot_by_gfn(vm, vcpu, gfn)
    if number != NO_SLOT and logs_dirty(vm.mem.slots[number]):
        slot = vm.mem.slots[number]
        set_bit(vm.slot_words, slot["written"], gfn - slot["base"])


@inner
def host_frame(frames, gfn):
    """The frame of host memory behind a gfn."""
    if frames is None:
        return gfn
    return frames[gfn]


@inner
def max_mapping_level(vm, slot, gfn, level):
    """Highest level, up to `level`, at which the frame may be mapped: by the slot's bounds and by the host (facts 5.9.3)."""
    if slot["host_level"] == ONE:
        return ONE
    while level > ONE:
        shift = INDEX_BITS * (level - ONE)
        if vm.slot_words[slot["disallow"][level] + (gfn >> shift) - (slot["base"] >> shift)] == ZERO:
            break
        level -= ONE
    return min(level, slot["host_level"])
