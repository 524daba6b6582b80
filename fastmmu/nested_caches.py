"""What a processor may remember of two-dimensional walks: the paging-structure cache and the nested cache.

SDM volume 3, 4.10.3 and 29.4.1 (combined mappings); APM volume 2, 15.25.8. Both hold only what plain walks have found: entries that
are present, accessed, and grant what was asked. The paging-structure cache is forgotten by INVLPG and loads of CR3, both when the
second dimension changes. Until then an answer may be older than the tables, as the manuals allow.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import kernel
from fastmmu.bits import ONE, PAGE_MASK, PAGE_OFFSET, PAGE_SHIFT, ZERO
from fastmmu.ept import INDEX_BITS, count
from fastmmu.state import NestedCaches, NestedStat, Structure
from fastmmu.walk import ALL_ONES

POINTER_LEVELS = 4  # of tables below the top one, in 5-level paging
STRUCTURE_SETS, PAGE_SETS = 32, 64
KIND_SHIFT = np.uint64(2)
HPA, TAG = 1, 0


def make_nested_caches(structures: bool, pages: bool) -> NestedCaches:
    """Empty caches; what is not asked for is None."""
    return NestedCaches(
        np.zeros((POINTER_LEVELS, STRUCTURE_SETS, len(Structure)), np.uint64) if structures else None,
        np.zeros((PAGE_SETS, 2), np.uint64) if pages else None,
    )


@kernel
def prefix_of(gva, level):
    """The part of a linear address that leads to a table of `level`, made odd: 0 is no tag."""
    return ((gva >> (PAGE_SHIFT + INDEX_BITS * level)) << ONE) | ONE


@kernel
def set_of(tag, sets):
    """Place of a tag made by `prefix_of` or `page_tag`, by its low address bits."""
    return tag & (np.uint64(sets) - ONE)


@kernel
def find_structure(structures, plain, stat, gva):
    """(level, hpa of the guest's table, AND, OR of the entries above it) of the lowest table that is known; without one the top
    level, whose hpa is not known (all ones). Only if the entries above grant the access of `plain`."""
    if structures is None:
        return plain.mode, ALL_ONES, ALL_ONES, ZERO
    forbidden = plain.pointer_mask & ~plain.pointer
    level = ONE
    while level < plain.mode:
        tag = prefix_of(gva, level)
        row = structures[level - ONE, set_of(tag >> ONE, structures.shape[1])]
        if row[Structure.TAG] == tag:
            rights, seen = row[Structure.RIGHTS], row[Structure.SEEN]
            if rights & plain.pointer == plain.pointer and seen & forbidden == ZERO:
                count(stat, NestedStat.STRUCTURE_HITS, ONE)
                return level, row[Structure.TABLE], rights, seen
        level += ONE
    return plain.mode, ALL_ONES, ALL_ONES, ZERO


@kernel
def fill_structure(structures, level, gva, table, rights, seen):
    """Remember that `gva` leads to the guest's table of `level` at hpa `table`."""
    if structures is None:
        return
    tag = prefix_of(gva, level)
    row = structures[level - ONE, set_of(tag >> ONE, structures.shape[1])]
    row[Structure.TAG], row[Structure.TABLE], row[Structure.RIGHTS], row[Structure.SEEN] = tag, table, rights, seen


@kernel
def clear_structures(structures, stat):
    """INVLPG, or a load of CR3 (SDM volume 3, 4.10.4.1)."""
    if structures is None:
        return
    for level in range(structures.shape[0]):
        for number in range(structures.shape[1]):
            structures[level, number, Structure.TAG] = ZERO
    count(stat, NestedStat.FLUSHES, ONE)


@kernel
def page_tag(gpa, kind):
    """A guest page and a kind of access, which has two bits; odd: 0 is no tag."""
    return (((gpa >> PAGE_SHIFT) << KIND_SHIFT | kind) << ONE) | ONE


@kernel
def find_page(pages, kind, stat, gpa):
    """hpa of `gpa`, or all ones where the nested cache does not know it for this kind of access."""
    row = pages[set_of(gpa >> PAGE_SHIFT, pages.shape[0])]
    if row[TAG] != page_tag(gpa, kind):
        return ALL_ONES
    count(stat, NestedStat.PAGE_HITS, ONE)
    return row[HPA] | (gpa & PAGE_OFFSET)


@kernel
def fill_page(pages, kind, gpa, hpa):
    """Remember a translation of the second dimension."""
    row = pages[set_of(gpa >> PAGE_SHIFT, pages.shape[0])]
    row[TAG], row[HPA] = page_tag(gpa, kind), hpa & PAGE_MASK


@kernel
def clear_pages(pages):
    """The second dimension has changed: INVEPT, or a flush of the guest's ASID."""
    if pages is None:
        return
    for number in range(pages.shape[0]):
        pages[number, TAG] = ZERO
