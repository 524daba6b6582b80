"""Many translations at the speed of memory: blocks of walks, one branch-free pass over the block per level.

A single walk waits for four loads, one after the other, and a processor overlaps only as many walks as fit its window. A pass
over a block issues the loads of one level for all its walks, so that hundreds of cache misses are under way at once; the leaf
entries, which miss most, are asked for one pass ahead. A pass follows plain walks only (see `walk_plain`); what is not
plain keeps to a harmless address and is walked again, alone, at the end of its block.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import kernel, prefetch
from fastmmu.bits import ACC, GPTE64, ONE, PAGE_SHIFT, WORD_SHIFT, ZERO
from fastmmu.paging import LONG4
from fastmmu.state import Reg, Walk
from fastmmu.walk import ALL_ONES, MODE_LONG4, MODE_NONE, access_of, page_gpa, plain_for, table_index, walk_by

BLOCK = 256
# Lanes of the scratch array: word index of the next entry, the entry, the AND of the entries with NX inverted, and what is not zero
# where the walk is not plain. One array, so that the compiler sees that they do not overlap.
INDEX, ENTRY, RIGHTS, WRONG = (np.uint64(BLOCK * lane) for lane in range(4))
LANES = 4
PREFETCH_LEVEL = np.uint64(2)  # tables of this level and below are too many for the first cache


@kernel
def is_address(mode, gva):
    """Whether `gva` is an address of the paging mode: canonical in long mode, else 32 bits wide."""
    if mode == MODE_NONE:
        return True
    if mode >= MODE_LONG4:
        return is_canonical(mode, gva)
    return gva >> np.uint64(32) == ZERO


@kernel
def is_canonical(levels, gva):
    """Whether the bits above the highest index bit are copies of it (SDM volume 1, 3.3.7.1)."""
    top = np.int64(gva) >> np.int64(PAGE_SHIFT + LONG4.index_bits * levels - ONE)
    return top == np.int64(0) or top == np.int64(-1)


@kernel
def put(answers, i, walk):
    """Store one answer."""
    answers.ok[i] = walk.ok
    answers.gpa[i] = walk.gpa
    answers.level[i] = walk.level
    answers.access[i] = walk.access
    answers.pferr[i] = walk.pferr


@kernel
def translate_alone(mem, mmu, trail, plain, gva):
    """One translation, of any kind."""
    if is_address(plain.mode, gva):
        return walk_by(mem, mmu, trail, plain, gva)
    return Walk(False, ZERO, ZERO, ZERO, ZERO)


@kernel
def gather(words, lanes, count):
    """Read the entries at the word indices of the block."""
    for i in range(count):
        lanes[ENTRY + i] = words[lanes[INDEX + i]]


@kernel
def prefetch_entries(words, lanes, count):
    """Ask for the entries at the word indices of the block."""
    for i in range(count):
        prefetch(words, lanes[INDEX + i])


@kernel
def walk_block(mem, mmu, scratch, plain, gvas, answers, first, count):
    """Translate gvas[first : first + count], at most BLOCK of them, all with the access of `plain`, in 4-level or 5-level paging.

    Loop variables are unsigned: signed ones cost a check for negative indices.
    """
    index_bits, levels = LONG4.index_bits, plain.mode
    lanes = scratch.lanes
    start, size = mem.start, mem.size
    root_inside = np.uint64(np.int64(plain.root) - start) < size
    root = plain.root if root_inside else np.uint64(start)
    odd = ZERO if root_inside else ONE
    for i in range(count):
        gva = gvas[first + i]
        lanes[INDEX + i] = (root >> WORD_SHIFT) + table_index(gva, levels, index_bits)
        lanes[RIGHTS + i] = ALL_ONES
        lanes[WRONG + i] = odd if is_canonical(levels, gva) else ONE

    level = levels
    while level > ONE:
        below = level - ONE
        gather(mem.words, lanes, count)
        for i in range(count):
            gpte = lanes[ENTRY + i]
            target = gpte & LONG4.root
            inside = np.uint64(np.int64(target) - start) < size
            table = target if inside else root
            lanes[RIGHTS + i] &= gpte ^ GPTE64.NX
            lanes[WRONG + i] |= ((gpte & plain.pointer_mask) ^ plain.pointer) | (ZERO if inside else ONE)
            lanes[INDEX + i] = (table >> WORD_SHIFT) + table_index(gvas[first + i], below, index_bits)
        if below <= PREFETCH_LEVEL:
            prefetch_entries(mem.words, lanes, count)
        level = below

    gather(mem.words, lanes, count)
    any_wrong = ZERO
    for i in range(count):
        gpte = lanes[ENTRY + i]
        wrong = lanes[WRONG + i] | ((gpte & plain.leaf_mask) ^ plain.leaf)
        lanes[WRONG + i] = wrong
        any_wrong |= wrong
        clean = ACC.W if gpte & GPTE64.D == ZERO else ZERO
        lanes[RIGHTS + i] = access_of(lanes[RIGHTS + i] & (gpte ^ GPTE64.NX)) & ~clean
    for i in range(count):
        answers.gpa[first + i] = page_gpa(LONG4, lanes[ENTRY + i], gvas[first + i], ONE)
    for i in range(count):
        answers.access[first + i] = np.uint8(lanes[RIGHTS + i])
        answers.level[first + i] = np.uint8(1)
    for i in range(count):
        answers.ok[first + i] = True
        answers.pferr[first + i] = np.uint32(0)
    if any_wrong != ZERO:
        for i in range(count):
            if lanes[WRONG + i] != ZERO:
                put(answers, first + i, translate_alone(mem, mmu, scratch.trail, plain, gvas[first + i]))


@kernel
def translate_all(mem, mmu, scratch, gvas, accesses, answers):
    """Translate all `gvas`; `accesses` has one element for all, or one for each. Shapes and dtypes as in `translate_many`."""
    mode = mmu.reg[Reg.MODE]
    length, block = np.uint64(len(gvas)), np.uint64(BLOCK)
    if length == ZERO:
        return
    one_access = np.uint64(len(accesses)) == ONE
    blocks = mode >= MODE_LONG4
    plain = plain_for(mmu, accesses[0])
    first = ZERO
    while first < length:
        count = min(block, length - first)
        same = True
        if not one_access:
            plain = plain_for(mmu, accesses[first])
            for i in range(count):
                same &= accesses[first + i] == accesses[first]
        if blocks and same:
            walk_block(mem, mmu, scratch, plain, gvas, answers, first, count)
        else:
            for i in range(count):
                if not same:
                    plain = plain_for(mmu, accesses[first + i])
                put(answers, first + i, translate_alone(mem, mmu, scratch.trail, plain, gvas[first + i]))
        first += block
