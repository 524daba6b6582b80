"""The translation look-aside buffer of a vCPU: what the processor remembers between flushes.

`tlb` is uint64[sets + 1, ways + 1, 2]: 4 KiB translations, the set chosen by the low bits of the page number; each set is filled in
turn, and behind its entries stands which is next. No paging-structure caches. First word: page number of the gva, and the epoch in
which it was made; an entry of another epoch than today's, which stands in the last row, is none, so that a flush need only begin
another one. Second word: frame, rights (ACC bits), the protection key where a gpte has it, and the bits below.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import ACC, GPTE64, ONE, PAGE_SHIFT, PFERR, ZERO, bit, field
from fastmmu.permission import key_fault, permission_fault
from fastmmu.state import Reg

EPOCH_SHIFT = np.uint64(52)  # of the first word: page numbers have 52 bits
LAST_EPOCH = field(11, 0)
PAGE_NUMBER = field(51, 0)
DIRTY = bit(3)  # a write needs no walk: D is set in the guest's leaf and in the spte, which is writable
DIRTY_SHIFT = np.uint64(3 - 1)  # from PFERR.W, which asks for it
EXECUTE = bit(4)  # the spte is executable: where PFERR.F stands, which asks for it
LEVEL_SHIFT = np.uint64(5)
LEVEL = field(6, 5)  # of the guest's leaf
INDEX_BITS = np.uint64(9)


@inner
def set_of(tlb, page):
    """The set of a page."""
    return page & np.uint64(tlb.shape[0] - 2)


@inner
def tag_of(tlb, page):
    """First word of an entry for a page, made now."""
    return page | (tlb[tlb.shape[0] - 1, 0, 0] << EPOCH_SHIFT)


@inner(inline=True)
def lookup(tlb, mmu, gva, access):
    """The second word of the entry that serves `access` to `gva`, or 0.

    An entry that does not grant the access is forgotten: the walk that follows decides (SDM volume 3, 4.10.4.1).
    """
    page = gva >> PAGE_SHIFT
    index, tag = set_of(tlb, page), tag_of(tlb, page)
    way = np.int64(-1)
    for i in range(tlb.shape[1] - 1):  # to the end: a loop that leaves where it hits is a branch that no processor foresees
        way = i if tlb[index, i, 0] == tag else way
    if way < 0:
        return ZERO
    entry = tlb[index, way, 1]
    needed = ((access & PFERR.W) << DIRTY_SHIFT) | (access & PFERR.F)
    denied = permission_fault(mmu, entry & ACC.ALL, access)
    if mmu.reg[Reg.PKRU] | mmu.reg[Reg.PKRS] != ZERO:
        denied = denied or key_fault(mmu, entry, entry & ACC.ALL, access)
    if entry & needed != needed or denied:
        tlb[index, way, 0] = ZERO
        return ZERO
    return entry


@inner(inline=True)
def insert(tlb, gva, gpa, rights, level, dirty, execute):
    """Remember a translation in place of the oldest of its set; `rights` are ACC bits and the protection key."""
    page = gva >> PAGE_SHIFT
    index, ways = set_of(tlb, page), np.uint64(tlb.shape[1] - 1)
    way = tlb[index, ways, 0]
    tlb[index, ways, 0] = way + ONE if way + ONE != ways else ZERO
    entry = (gpa & GPTE64.ADDR) | rights | (level << LEVEL_SHIFT)
    if dirty:
        entry |= DIRTY
    if execute:
        entry |= EXECUTE
    tlb[index, way, 0], tlb[index, way, 1] = tag_of(tlb, page), entry


@inner
def flush(tlb):
    """Forget everything: begin another epoch; when their numbers are used up, clear the entries."""
    last = tlb.shape[0] - 1
    epoch = tlb[last, 0, 0] + ONE
    if epoch > LAST_EPOCH:
        tlb[:, :, 0] = ZERO
        epoch = ONE
    tlb[last, 0, 0] = epoch


@inner
def invalidate(tlb, gva):
    """INVLPG: forget the page, and every piece of a large page around it (SDM volume 3, 4.10.4.1)."""
    page = gva >> PAGE_SHIFT
    epoch = tag_of(tlb, ZERO)
    for index in range(tlb.shape[0] - 1):
        for way in range(tlb.shape[1] - 1):
            tag, level = tlb[index, way, 0], (tlb[index, way, 1] & LEVEL) >> LEVEL_SHIFT
            if tag & ~PAGE_NUMBER == epoch and level != ZERO:
                shift = INDEX_BITS * (level - ONE)
                if (tag & PAGE_NUMBER) >> shift == page >> shift:
                    tlb[index, way, 0] = ZERO
