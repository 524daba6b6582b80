"""The translation look-aside buffer of a vCPU: what the processor remembers between flushes.

`tlb` is uint64[sets + 1, 1 + 2 * room]: 4 KiB translations, the set chosen by the low bits of the page number; `room` is the number
of ways, rounded up to fours. A set's row: which way is filled next, in turn; the tags; the entries. No paging-structure caches.
Tag: page number of the gva, and the epoch in which it was made; one of another epoch than today's is of no entry, so that a flush
need only begin another one. Entry: frame, rights (ACC bits), the protection key where a gpte has it, and the bits below. The last
row: the epoch, where a tag has it, and the number of ways.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import ACC, GPTE64, ONE, PAGE_SHIFT, PFERR, ZERO, bit, field
from fastmmu.permission import key_fault, permission_fault
from fastmmu.state import Reg

FIRST_EPOCH, EPOCH = bit(52), field(63, 52)  # in a tag
PAGE_NUMBER = field(51, 0)
DIRTY = bit(3)  # a write needs no walk: D is set in the guest's leaf and in the spte, which is writable
DIRTY_SHIFT = np.uint64(3 - 1)  # from PFERR.W, which asks for it
EXECUTE = bit(4)  # the spte is executable: where PFERR.F stands, which asks for it
LEVEL_SHIFT = np.uint64(5)
LEVEL = field(6, 5)  # of the guest's leaf
INDEX_BITS = np.uint64(9)
TWO, THREE, FOUR = np.uint64(2), np.uint64(3), np.uint64(4)


@inner
def set_of(tlb, page):
    """The set of a page."""
    return page & np.uint64(tlb.shape[0] - 2)


@inner
def tag_of(tlb, page):
    """Tag of an entry for a page, made now."""
    return page | tlb[tlb.shape[0] - 1, 0]


@inner
def room_of(tlb):
    """Tags in a row."""
    return np.uint64(tlb.shape[1]) >> ONE


@inner(inline=True)
def lookup(tlb, mmu, gva, access):
    """The entry that serves `access` to `gva`, or 0.

    An entry that does not grant the access is forgotten: the walk that follows decides (SDM volume 3, 4.10.4.1).
    """
    page = gva >> PAGE_SHIFT
    index, tag = set_of(tlb, page), tag_of(tlb, page)
    at, room = ZERO, room_of(tlb)
    i = ONE
    while i < room:  # to the end: a loop that leaves where it hits is a branch that no processor foresees
        at = i if tlb[index, i] == tag else at
        at = i + ONE if tlb[index, i + ONE] == tag else at
        at = i + TWO if tlb[index, i + TWO] == tag else at
        at = i + THREE if tlb[index, i + THREE] == tag else at
        i += FOUR
    if at == ZERO:
        return ZERO
    entry = tlb[index, at + room]
    needed = ((access & PFERR.W) << DIRTY_SHIFT) | (access & PFERR.F)
    denied = permission_fault(mmu, entry & ACC.ALL, access)
    if mmu.reg[Reg.PKRU] | mmu.reg[Reg.PKRS] != ZERO:
        denied = denied or key_fault(mmu, entry, entry & ACC.ALL, access)
    if entry & needed != needed or denied:
        tlb[index, at] = ZERO
        return ZERO
    return entry


@inner(inline=True)
def insert(tlb, gva, gpa, rights, level, dirty, execute):
    """Remember a translation in place of the oldest of its set; `rights` are ACC bits and the protection key."""
    page = gva >> PAGE_SHIFT
    index, ways = set_of(tlb, page), tlb[tlb.shape[0] - 1, 1]
    at = tlb[index, 0] + ONE
    tlb[index, 0] = at if at != ways else ZERO
    entry = (gpa & GPTE64.ADDR) | rights | (level << LEVEL_SHIFT)
    if dirty:
        entry |= DIRTY
    if execute:
        entry |= EXECUTE
    tlb[index, at], tlb[index, at + room_of(tlb)] = tag_of(tlb, page), entry


@inner
def flush(tlb):
    """Forget everything: begin another epoch; when their numbers are used up, clear the tags."""
    last = tlb.shape[0] - 1
    if tlb[last, 0] == EPOCH:
        for index in range(last):
            for i in range(ONE, room_of(tlb) + ONE):
                tlb[index, i] = ZERO
        tlb[last, 0] = ZERO
    tlb[last, 0] += FIRST_EPOCH


@inner
def invalidate(tlb, gva):
    """INVLPG: forget the page, and every piece of a large page around it (SDM volume 3, 4.10.4.1)."""
    page, room = gva >> PAGE_SHIFT, room_of(tlb)
    epoch = tag_of(tlb, ZERO)
    for index in range(tlb.shape[0] - 1):
        for i in range(ONE, room + ONE):
            tag, level = tlb[index, i], (tlb[index, i + room] & LEVEL) >> LEVEL_SHIFT
            if tag & EPOCH == epoch and level != ZERO:
                shift = INDEX_BITS * (level - ONE)
                if (tag & PAGE_NUMBER) >> shift == page >> shift:
                    tlb[index, i] = ZERO
