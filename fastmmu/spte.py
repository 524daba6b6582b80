"""Shadow page-table entries: predicates and constructors on a bare uint64 (facts section 3).

The bits that both forms share (W, PS, MMU_PRESENT, the frame) are constants; the others are masks that the VM keeps, as KVM does,
because it learns only when it is loaded whether sptes are NPT's or EPT's.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import cmpxchg, inner, load
from fastmmu.bits import ACC, EPT_SPTE, MMIO_SPTE, NPT_SPTE, ONE, PAGE_SHIFT, ZERO
from fastmmu.machine_state import VmWord

INDEX_BITS = np.uint64(9)
INDEX_MASK = np.uint64(511)
SAVED_SHIFT = np.uint64(54)
GENERATION_LOW_BITS = np.uint64(8)
GENERATION_LOW_SHIFT, GENERATION_HIGH_SHIFT = np.uint64(3), np.uint64(52)


@inner
def pages_at(level):
    """How many 4 KiB pages an entry of `level` maps."""
    return ONE << (INDEX_BITS * (level - ONE))


@inner
def frame_at(gfn, level):
    """First gfn of the frame of `level` that holds `gfn`."""
    return gfn & ~(pages_at(level) - ONE)


@inner
def entry_of(table, gfn, level):
    """Index in `spt` of the entry for `gfn` in a table of `level`."""
    return (table << INDEX_BITS) | ((gfn >> (INDEX_BITS * (level - ONE))) & INDEX_MASK)


@inner
def is_present(spte):
    """Shadow-present; whether the processor takes the entry is another question (facts 3.1.1)."""
    return spte & NPT_SPTE.MMU_PRESENT != ZERO


@inner
def is_last(spte, level):
    """Whether a present spte is a leaf."""
    return level == ONE or spte & NPT_SPTE.PS != ZERO


@inner
def is_leaf(spte, level):
    """Present, and a leaf."""
    return is_present(spte) and is_last(spte, level)


@inner
def is_table(spte, level):
    """Present, and a pointer to a table."""
    return is_present(spte) and not is_last(spte, level)


@inner
def is_writable(spte):
    """Whether the processor may write through the entry."""
    return spte & NPT_SPTE.W != ZERO


@inner
def pfn_of(spte):
    """Frame number in the entry: of memory, or the table's number."""
    return (spte & NPT_SPTE.ADDR) >> PAGE_SHIFT


@inner
def is_access_tracked(word, spte):
    """Whether a leaf is made not present for the processor, so that its next use is seen: where sptes have no A (facts 3.2)."""
    return word[VmWord.AD] == ZERO and spte & (EPT_SPTE.R | EPT_SPTE.W | EPT_SPTE.X) == ZERO


@inner
def is_accessed(word, spte):
    """Whether a leaf was used since the host last asked."""
    return spte & word[VmWord.ACCESSED] != ZERO if word[VmWord.AD] != ZERO else not is_access_tracked(word, spte)


@inner
def is_dirty(word, spte):
    """Whether a page was written through a leaf: D, or W where sptes have no D (facts 3.2.5)."""
    return spte & (word[VmWord.DIRTY] if word[VmWord.AD] != ZERO else NPT_SPTE.W) != ZERO


@inner
def mark_old(word, spte):
    """A leaf as it is after the host has asked: without A; or without R, W and X, of which R and X are kept elsewhere."""
    if word[VmWord.AD] != ZERO:
        return spte & ~word[VmWord.ACCESSED]
    return (spte & ~(EPT_SPTE.R | EPT_SPTE.W | EPT_SPTE.X)) | ((spte & (EPT_SPTE.R | EPT_SPTE.X)) << SAVED_SHIFT)


@inner
def restore_access(spte):
    """An access-tracked leaf as the processor takes it again. W stays clear: the next write sets it."""
    return (spte & ~EPT_SPTE.SAVED) | ((spte & EPT_SPTE.SAVED) >> SAVED_SHIFT)


@inner
def age_leaf(word, spt, index):
    """Mark the leaf at `index` as not used; whether it was."""
    while True:
        old = load(spt, index)
        if not is_accessed(word, old):
            return False
        if cmpxchg(spt, index, old, mark_old(word, old)) == old:
            return True


@inner
def is_mmio(word, spte):
    """Whether the entry is an MMIO spte (facts 3.4.2)."""
    return word[VmWord.MMIO_CACHING] != ZERO and spte & word[VmWord.MMIO_MASK] == word[VmWord.MMIO_VALUE]


@inner
def make_mmio(word, gfn, access):
    """MMIO spte for a frame without memslot, with the guest's rights and today's generation (facts 3.4.3)."""
    generation = word[VmWord.GENERATION] & MMIO_SPTE.GENERATION
    low = (generation << GENERATION_LOW_SHIFT) & MMIO_SPTE.GENERATION_LOW
    high = ((generation >> GENERATION_LOW_BITS) << GENERATION_HIGH_SHIFT) & MMIO_SPTE.GENERATION_HIGH
    return word[VmWord.MMIO_VALUE] | (word[VmWord.MMIO_ACCESS] & access) | low | high | (gfn << PAGE_SHIFT)


@inner
def mmio_gfn(spte):
    """The device frame in an MMIO spte."""
    return (spte & NPT_SPTE.ADDR & ~NPT_SPTE.MMIO) >> PAGE_SHIFT


@inner
def mmio_access(word, spte):
    """The guest's rights in an MMIO spte."""
    return spte & word[VmWord.MMIO_ACCESS]


@inner
def mmio_generation(spte):
    """The 19 bits of memslot generation in an MMIO spte."""
    low = (spte & MMIO_SPTE.GENERATION_LOW) >> GENERATION_LOW_SHIFT
    return low | ((spte & MMIO_SPTE.GENERATION_HIGH) >> GENERATION_HIGH_SHIFT) << GENERATION_LOW_BITS


@inner
def make_table(word, table):
    """Non-leaf spte: all rights, so that only leaves restrict."""
    rights = word[VmWord.PRESENT] | NPT_SPTE.W | word[VmWord.USER] | word[VmWord.EXECUTE]
    return NPT_SPTE.MMU_PRESENT | rights | word[VmWord.AD_TYPE] | word[VmWord.ACCESSED] | (table << PAGE_SHIFT)


@inner(inline=True)
def make_leaf(word, pfn, level, access, old, host_writable, prefetch):
    """Leaf spte, in the order of facts 3.3; `old` is the entry that it replaces.

    Write protection of the guest's tables and dirty logging are for the caller.
    """
    spte = NPT_SPTE.MMU_PRESENT | word[VmWord.PRESENT] | word[VmWord.AD_TYPE] | word[VmWord.MEMORY_TYPE] | (pfn << PAGE_SHIFT)
    if not prefetch:
        spte |= word[VmWord.ACCESSED]
    if access & ACC.X != ZERO and not (level > ONE and word[VmWord.NX_HUGE_PAGES] != ZERO):
        spte |= word[VmWord.EXECUTE]
    else:
        spte |= word[VmWord.NO_EXECUTE]
    if access & ACC.U != ZERO:
        spte |= word[VmWord.USER]
    if level > ONE:
        spte |= NPT_SPTE.PS
    if host_writable:
        spte |= word[VmWord.HOST_WRITABLE]
        if access & ACC.W != ZERO:
            spte |= NPT_SPTE.W | word[VmWord.MMU_WRITABLE]
            if not is_writable(old):  # an MMIO spte counts as writable, too: it keeps W
                spte |= word[VmWord.DIRTY]
    return spte


@inner
def make_executable(word, spte):
    """A leaf that may be executed; one that is access-tracked stays so (facts 8.2)."""
    tracked = is_access_tracked(word, spte)
    if tracked:
        spte = restore_access(spte)
    spte = (spte & ~word[VmWord.NO_EXECUTE]) | word[VmWord.EXECUTE]
    return mark_old(word, spte) if tracked else spte


@inner
def make_split_child(word, huge, child_level, index, access):
    """Entry `index` of the table that replaces a huge spte of a page with these rights: it in smaller pieces (facts 8.2, 8.7)."""
    spte = huge + (index * pages_at(child_level) << PAGE_SHIFT)
    if child_level == ONE:
        spte &= ~NPT_SPTE.PS
        if access & ACC.X != ZERO and word[VmWord.NX_HUGE_PAGES] != ZERO:  # only as a huge page it may not be executable
            spte = make_executable(word, spte)
    return spte


@inner
def lowest(spt, table, level, gfn):
    """(index, level) of the lowest entry for `gfn` under a table of `level`: a leaf, or an entry that is not present."""
    index = entry_of(table, gfn, level)
    while is_table(load(spt, index), level):
        level -= ONE
        index = entry_of(pfn_of(spt[index]), gfn, level)
    return index, level
