"""Many two-dimensional walks at the speed of memory: blocks of walks, one branch-free pass over the block per entry read.

As batch.py, with a walk of the second dimension between the guest's levels. The top table of the guest is the same for a whole
block: its address is translated once.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import kernel
from fastmmu.batch import BLOCK, ENTRY, INDEX, PREFETCH_LEVEL, RIGHTS, WRONG, gather, is_address, is_canonical, prefetch_entries
from fastmmu.bits import ACC, EPT, GPTE64, ONE, PAGE_MASK, PAGE_OFFSET, PAGE_SHIFT, WORD_SHIFT, ZERO, field
from fastmmu.ept import INDEX_BITS
from fastmmu.nested_plain import (
    NOWHERE,
    TWO_MIB_LEVEL,
    fold_type,
    host_address_of,
    host_plain_for,
    not_plain,
    walk_nested_by,
    way_to,
)
from fastmmu.paging import LONG4
from fastmmu.state import Reg
from fastmmu.walk import ALL_ONES, MODE_LONG4, access_of, page_gpa, plain_for, table_index

ADDRESS, FINAL_GPA, LARGE = (np.uint64(BLOCK * lane) for lane in range(4, 7))  # lanes beside those of batch.py
LANES = 7
LARGE_OFFSET = field(20, 0)


@kernel
def put(answers, i, walk):
    """Store one answer."""
    answers.ok[i] = walk.ok
    answers.hpa[i] = walk.hpa
    answers.gpa[i] = walk.gpa
    answers.level[i] = walk.level
    answers.access[i] = walk.access
    answers.pferr[i] = walk.pferr
    answers.exit_reason[i] = walk.reason
    answers.exit_qualification[i] = walk.qualification


@kernel(inline=True)
def walk_alone(mem, mmu, host, scratch, caches, plain, masks, way, gva):
    """One walk, of any kind."""
    if is_address(plain.mode, gva):
        return walk_nested_by(mem, mmu, host, scratch, caches, None, plain, masks, way, gva)
    return not_plain()


@kernel
def host_block(mem, host, checks, lanes, count):
    """Translate the guest physical addresses of a lane in place, by mappings of 4 KiB and 2 MiB. A lane that is not plain keeps to
    a harmless address and is marked wrong, as does, unmarked, one that has its large page; the top table lies inside memory."""
    start, size = mem.start, mem.size
    level = host.levels
    width = PAGE_SHIFT + INDEX_BITS * level
    for i in range(count):
        gpa = lanes[ADDRESS + i]
        lanes[WRONG + i] |= gpa >> width
        lanes[INDEX + i] = (host.root >> WORD_SHIFT) + table_index(gpa, level, INDEX_BITS)
        lanes[LARGE + i] = ZERO
    while level > ONE:
        below = level - ONE
        gather(mem.words, lanes, count)
        large_bit = EPT.PS if level == TWO_MIB_LEVEL else ZERO
        for i in range(count):
            entry = lanes[ENTRY + i]
            target = entry & EPT.ADDR
            inside = np.uint64(np.int64(target) - start) < size
            large = entry & large_bit != ZERO
            table = target if inside and not large else host.root
            wrong = ((entry & checks.pointer_mask) ^ checks.pointer) | (ZERO if inside else ONE)
            lanes[WRONG + i] |= entry & host.reserved_2m if large else wrong
            lanes[LARGE + i] = entry if large else ZERO
            lanes[INDEX + i] = (table >> WORD_SHIFT) + table_index(lanes[ADDRESS + i], below, INDEX_BITS)
        if below == ONE:
            prefetch_entries(mem.words, lanes, count)
        level = below
    gather(mem.words, lanes, count)
    for i in range(count):
        large = lanes[LARGE + i]
        entry = large if large != ZERO else lanes[ENTRY + i]
        offset = LARGE_OFFSET if large != ZERO else PAGE_OFFSET
        lanes[WRONG + i] |= (fold_type(entry) & checks.leaf_mask) ^ checks.leaf
        lanes[ADDRESS + i] = (entry & EPT.ADDR & ~offset) | (lanes[ADDRESS + i] & offset)


@kernel
def mark_all(lanes, count):
    """Leave a whole block to the walk of one address after another."""
    for i in range(count):
        lanes[WRONG + i] = ONE


@kernel
def tables_block(mem, host, lanes, count):
    """`host_block` for the addresses of the guest's entries; where all of them lie in one table, that is translated once."""
    first, differ = lanes[ADDRESS], ZERO
    for i in range(count):
        differ |= lanes[ADDRESS + i] ^ first
    base = host_address_of(mem, host, host.table, None, first) if differ & PAGE_MASK == ZERO else NOWHERE
    if base == NOWHERE:
        host_block(mem, host, host.table, lanes, count)
        return
    for i in range(count):
        lanes[ADDRESS + i] = (base & PAGE_MASK) | (lanes[ADDRESS + i] & PAGE_OFFSET)


@kernel
def walk_nested_block(mem, mmu, lanes, plain, masks, gvas, answers, first, count):
    """Translate gvas[first : first + count], at most BLOCK of them, all with one access, in 4-level or 5-level paging. What is not
    plain is left to be done, its lane WRONG not zero; returns the OR of that lane."""
    levels = plain.mode
    start, size = mem.start, mem.size
    root = host_address_of(mem, masks, masks.table, None, plain.root)
    if root == NOWHERE or np.uint64(np.int64(root) - start) >= size or np.uint64(np.int64(masks.root) - start) >= size:
        mark_all(lanes, count)
        return ONE
    for i in range(count):
        gva = gvas[first + i]
        lanes[ADDRESS + i] = root | (table_index(gva, levels, INDEX_BITS) << WORD_SHIFT)
        lanes[RIGHTS + i] = ALL_ONES
        lanes[WRONG + i] = ZERO if is_canonical(levels, gva) else ONE

    level = levels
    while True:
        for i in range(count):
            hpa = lanes[ADDRESS + i]
            inside = np.uint64(np.int64(hpa & PAGE_MASK) - start) < size
            lanes[WRONG + i] |= ZERO if inside else ONE
            lanes[INDEX + i] = (hpa if inside else root) >> WORD_SHIFT
        if level <= PREFETCH_LEVEL:
            prefetch_entries(mem.words, lanes, count)
        gather(mem.words, lanes, count)
        if level == ONE:
            break
        level -= ONE
        for i in range(count):
            gpte = lanes[ENTRY + i]
            lanes[RIGHTS + i] &= gpte ^ GPTE64.NX
            lanes[WRONG + i] |= (gpte & plain.pointer_mask) ^ plain.pointer
            lanes[ADDRESS + i] = (gpte & LONG4.root) | (table_index(gvas[first + i], level, INDEX_BITS) << WORD_SHIFT)
        tables_block(mem, masks, lanes, count)

    for i in range(count):
        gpte = lanes[ENTRY + i]
        lanes[WRONG + i] |= (gpte & plain.leaf_mask) ^ plain.leaf
        clean = ACC.W if gpte & GPTE64.D == ZERO else ZERO
        lanes[RIGHTS + i] = access_of(lanes[RIGHTS + i] & (gpte ^ GPTE64.NX)) & ~clean
        gpa = page_gpa(LONG4, gpte, gvas[first + i], ONE)
        lanes[ADDRESS + i] = gpa
        lanes[FINAL_GPA + i] = gpa
    host_block(mem, masks, masks.final, lanes, count)
    return put_block(lanes, answers, first, count)


@kernel
def put_block(lanes, answers, first, count):
    """Store the answers of a block as if all were plain; returns the OR of the lane WRONG."""
    any_wrong = ZERO
    for i in range(count):
        any_wrong |= lanes[WRONG + i]
        answers.hpa[first + i] = lanes[ADDRESS + i]
        answers.gpa[first + i] = lanes[FINAL_GPA + i]
    for i in range(count):
        answers.access[first + i] = np.uint8(lanes[RIGHTS + i])
        answers.level[first + i] = np.uint8(1)
    for i in range(count):
        answers.ok[first + i] = True
        answers.pferr[first + i] = np.uint32(0)
    for i in range(count):
        answers.exit_reason[first + i] = np.uint32(0)
        answers.exit_qualification[first + i] = ZERO
    return any_wrong


@kernel
def translate_nested_all(mem, mmu, host, scratch, caches, gvas, accesses, answers):
    """Translate all `gvas`; `accesses` has one element for all, or one for each. Shapes, dtypes as in `translate_nested_many`."""
    mode, lanes = mmu.reg[Reg.MODE], scratch.lanes
    length, block = np.uint64(len(gvas)), np.uint64(BLOCK)
    if length == ZERO:
        return
    one_access = np.uint64(len(accesses)) == ONE
    plain, masks = plain_for(mmu, accesses[0]), host_plain_for(host, accesses[0])
    way = way_to(mem, masks, plain.root)
    first = ZERO
    while first < length:
        count = min(block, length - first)
        same = True
        if not one_access:
            plain, masks = plain_for(mmu, accesses[first]), host_plain_for(host, accesses[first])
            for i in range(count):
                same &= accesses[first + i] == accesses[first]
        wrong = ONE
        if mode >= MODE_LONG4 and same:
            wrong = walk_nested_block(mem, mmu, lanes, plain, masks, gvas, answers, first, count)
        else:
            mark_all(lanes, count)
        if wrong != ZERO:
            for i in range(count):
                if lanes[WRONG + i] != ZERO:
                    if not same:
                        plain, masks = plain_for(mmu, accesses[first + i]), host_plain_for(host, accesses[first + i])
                    put(answers, first + i, walk_alone(mem, mmu, host, scratch, caches, plain, masks, way, gvas[first + i]))
        first += block
