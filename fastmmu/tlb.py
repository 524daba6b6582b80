"""The translation look-aside buffer of a vCPU: what the processor remembers between flushes.

`tlb` is uint64[sets, ways, 2]: 4 KiB translations, the set chosen by the low bits of the page number, each set ordered from the
newest to the oldest entry, which is the one that goes. No paging-structure caches. First word: page number of the gva, and VALID.
Second word: frame, rights (ACC bits), and the bits below.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import ACC, GPTE64, ONE, PAGE_SHIFT, PFERR, ZERO, bit, field
from fastmmu.permission import permission_fault

VALID = bit(63)
DIRTY = bit(3)  # a write needs no walk: D is set in the guest's leaf and in the spte, which is writable
EXECUTE = bit(4)  # the spte is executable
LEVEL_SHIFT = np.uint64(5)
LEVEL = field(6, 5)  # of the guest's leaf
INDEX_BITS = np.uint64(9)


@inner
def set_of(tlb, page):
    """The set of a page."""
    return page & np.uint64(tlb.shape[0] - 1)


@inner
def remove(tlb, index, way):
    """Forget one entry; the older ones of its set move up."""
    last = tlb.shape[1] - 1
    for i in range(way, last):
        tlb[index, i, 0], tlb[index, i, 1] = tlb[index, i + 1, 0], tlb[index, i + 1, 1]
    tlb[index, last, 0] = ZERO


@inner(inline=True)
def lookup(tlb, mmu, gva, access):
    """The second word of the entry that serves `access` to `gva`, or 0.

    An entry that does not grant the access is forgotten: the walk that follows decides (SDM volume 3, 4.10.4.1).
    """
    page = gva >> PAGE_SHIFT
    index = set_of(tlb, page)
    for way in range(tlb.shape[1]):
        if tlb[index, way, 0] == page | VALID:
            entry = tlb[index, way, 1]
            clean = access & PFERR.W != ZERO and entry & DIRTY == ZERO
            no_execute = access & PFERR.F != ZERO and entry & EXECUTE == ZERO
            if clean or no_execute or permission_fault(mmu, entry & ACC.ALL, access):
                remove(tlb, index, way)
                return ZERO
            return entry
    return ZERO


@inner
def insert(tlb, gva, gpa, rights, level, dirty, execute):
    """Remember a translation, as the newest of its set."""
    page = gva >> PAGE_SHIFT
    index = set_of(tlb, page)
    for i in range(tlb.shape[1] - 1, 0, -1):
        tlb[index, i, 0], tlb[index, i, 1] = tlb[index, i - 1, 0], tlb[index, i - 1, 1]
    entry = (gpa & GPTE64.ADDR) | rights | (level << LEVEL_SHIFT)
    if dirty:
        entry |= DIRTY
    if execute:
        entry |= EXECUTE
    tlb[index, 0, 0], tlb[index, 0, 1] = page | VALID, entry


@inner
def flush(tlb):
    """Forget everything."""
    tlb[:, :, 0] = ZERO


@inner
def invalidate(tlb, gva):
    """INVLPG: forget the page, and every piece of a large page around it (SDM volume 3, 4.10.4.1)."""
    page = gva >> PAGE_SHIFT
    for index in range(tlb.shape[0]):
        for back in range(tlb.shape[1]):
            way = tlb.shape[1] - 1 - back
            tag, level = tlb[index, way, 0], (tlb[index, way, 1] & LEVEL) >> LEVEL_SHIFT
            if tag & VALID != ZERO and level != ZERO:
                shift = INDEX_BITS * (level - ONE)
                if (tag & ~VALID) >> shift == page >> shift:
                    remove(tlb, index, way)
