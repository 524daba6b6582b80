"""The plain case of two-dimensional walks, which nearly every walk is, and loops over walks of any kind.

One masked compare for each entry stands for all checks of nested.py, in both dimensions; what is not plain is for the exact walk.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner, kernel, likely, load
from fastmmu.bits import EPT, GPTE64, ONE, PAGE_MASK, PAGE_SHIFT, PFERR, WORD_SHIFT, ZERO, field
from fastmmu.ept import INDEX_BITS, count
from fastmmu.nested import walk_nested
from fastmmu.nested_caches import clear_structures, fill_page, fill_structure, find_page, find_structure
from fastmmu.paging import LONG4, PlainColumn
from fastmmu.state import Checks, HostKind, HostPlain, NestedStat, NestedWalk, Reg, Walk, Way
from fastmmu.walk import ALL_ONES, MODE_LONG4, mix, page_gpa, plain_answer, plain_for, reserved_row, table_index

TABLE_KIND, READ_KIND, WRITE_KIND, FETCH_KIND = (np.uint64(kind) for kind in HostKind)
NOWHERE = ALL_ONES  # instead of an hpa: the walk is not plain
TWO_MIB_LEVEL, ONE_GIB_LEVEL = np.uint64(2), np.uint64(3)
FOUR_LEVELS = LONG4.levels
TYPE_MIDDLE = field(4, 4)


@inner
def checks_of(host, kind):
    """The masked compares for one kind of access."""
    return Checks(
        host.checks[kind, PlainColumn.POINTER_MASK],
        host.checks[kind, PlainColumn.POINTER],
        host.checks[kind, PlainColumn.LEAF_MASK],
        host.checks[kind, PlainColumn.LEAF],
    )


@kernel
def host_plain_for(host, access):
    """The second dimension's checks for walks with `access` (PFERR bits)."""
    kind = WRITE_KIND if access & PFERR.W != ZERO else FETCH_KIND if access & PFERR.F != ZERO else READ_KIND
    table, final = checks_of(host, TABLE_KIND), checks_of(host, kind)
    return HostPlain(host.root, host.levels, table, final, kind, host.reserved_2m, host.reserved_1g)


@inner
def fold_type(entry):
    """A leaf with bit 4 inverted where bit 5 is set: bits 4:3 are 0 just for the memory types 0 and 6, uncacheable and write-back.
    AMD's leaves have no type there, and nothing asks for these bits."""
    return entry ^ ((entry >> ONE) & TYPE_MIDDLE)


@inner
def is_inside(mem, table):
    """Whether the table lies in the largest slot."""
    return np.uint64(np.int64(table) - mem.start) < mem.size


@inner
def is_pointer(checks, entry):
    """Whether an entry leads to a table, plainly; what `checks` wants lies in its mask, so that two instructions do."""
    return (entry ^ checks.pointer) & checks.pointer_mask == ZERO


@inner
def is_wide(host, gpa):
    """Whether an address is wider than the tables of the second dimension."""
    return gpa >> (PAGE_SHIFT + INDEX_BITS * host.levels) != ZERO


@inner
def entry_place(table, gpa, level):
    """Index of the word that holds the entry for `gpa`."""
    return (table >> WORD_SHIFT) + table_index(gpa, level, INDEX_BITS)


@inner
def leaf_address(host, checks, entry, gpa, level):
    """hpa of `gpa` where the entry is a plain leaf, else NOWHERE."""
    if fold_type(entry) & checks.leaf_mask != checks.leaf:
        return NOWHERE
    if level == ONE:
        return page_gpa(LONG4, entry, gpa, ONE)
    reserved = host.reserved_2m if level == TWO_MIB_LEVEL else host.reserved_1g
    if level > ONE_GIB_LEVEL or entry & EPT.PS == ZERO or entry & reserved != ZERO:
        return NOWHERE
    return page_gpa(LONG4, entry, gpa, level)


@inner
def no_way():
    """None is known."""
    zeros = (ZERO, ZERO, ZERO, ZERO)
    return Way(NOWHERE, ZERO, zeros, zeros)


@kernel
def way_to(mem, host, gpa):
    """The way to the guest's top table at `gpa`, in a second dimension of four levels.

    All walks of a loop begin with it. What was found plain stays so while the same entries stand in the same places: a walk reads
    all of them, but need not wait for one to know where the next is. And nearly all other ways begin with the same top entry.
    17 against 28 ns for a two-dimensional walk of hot tables, in which few instructions but long waits are the cost.
    """
    if host.levels != FOUR_LEVELS or is_wide(host, gpa) or not is_inside(mem, host.root):
        return no_way()
    level = FOUR_LEVELS
    place = entry_place(host.root, gpa, level)
    entry = load(mem.words, place)
    places, entries = (place, place, place, place), (entry, entry, entry, entry)  # a short way has its top entry more than once
    while level > ONE and is_pointer(host.table, entry) and is_inside(mem, entry & EPT.ADDR):
        level -= ONE
        place = entry_place(entry & EPT.ADDR, gpa, level)
        entry = load(mem.words, place)
        places = (places[1], places[2], places[3], place)
        entries = (entries[1], entries[2], entries[3], entry)
    return Way(leaf_address(host, host.table, entry, gpa, level), FOUR_LEVELS + ONE - level, places, entries)


@inner(inline=True)
def is_way(mem, host, way):
    """Whether the way still holds, and its top entry does for the final access too."""
    if way.hpa == NOWHERE or not is_pointer(host.final, way.entries[0]):
        return False
    changed = ZERO
    for i in range(4):
        changed |= load(mem.words, way.places[i]) ^ way.entries[i]
    return changed == ZERO


@inner(inline=True)
def host_address(mem, host, way, known, checks, stat, gpa):
    """hpa of `gpa`, which is not wide, where the walk of the second dimension is plain: nothing denied, A and D set; else NOWHERE.
    `known`: the way holds."""
    if known:
        entry, table = load(mem.words, entry_place(host.root, gpa, FOUR_LEVELS)), way.entries[0] & EPT.ADDR
        count(stat, NestedStat.HOST_READS, ONE)
        if not likely(entry == way.entries[0]):
            table = entry & EPT.ADDR
            if not is_pointer(checks, entry) or not is_inside(mem, table):
                return NOWHERE
        return host_address_from(mem, host, checks, stat, gpa, table, FOUR_LEVELS - ONE)
    if host.levels == FOUR_LEVELS and is_inside(mem, host.root):  # a constant unrolls the loop: 27 against 33 ns per walk
        return host_address_from(mem, host, checks, stat, gpa, host.root, FOUR_LEVELS)
    return host_address_of(mem, host, checks, stat, gpa)


@kernel
def host_address_of(mem, host, checks, stat, gpa):
    """The same for any number of levels, not inlined."""
    if is_wide(host, gpa) or not is_inside(mem, host.root):
        return NOWHERE
    return host_address_from(mem, host, checks, stat, gpa, host.root, host.levels)


@inner(inline=True)
def host_address_from(mem, host, checks, stat, gpa, table, level):
    """The same from the table of `level`, which is inside memory."""
    while True:
        entry = load(mem.words, entry_place(table, gpa, level))
        count(stat, NestedStat.HOST_READS, ONE)
        if level == ONE or not likely(is_pointer(checks, entry)):
            return leaf_address(host, checks, entry, gpa, level)
        table = entry & EPT.ADDR
        if not likely(is_inside(mem, table)):
            return NOWHERE
        level -= ONE


@inner(inline=True)
def host_page(pages, mem, host, way, known, checks, kind, stat, gpa):
    """`host_address`, by the nested cache where there is one."""
    if pages is None:
        return host_address(mem, host, way, known, checks, stat, gpa)
    hpa = find_page(pages, kind, stat, gpa)
    if hpa == NOWHERE:
        hpa = host_address(mem, host, way, known, checks, stat, gpa)
        if hpa != NOWHERE:
            fill_page(pages, kind, gpa, hpa)
    return hpa


@kernel
def not_plain():
    """Says only that the exact walk must answer."""
    return NestedWalk(False, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO)


@inner(inline=True)
def walk_nested_plain(mem, mmu, plain, host, way, structures, pages, stat, gva):
    """The plain case of 4-level and 5-level paging, in both dimensions: one masked compare for each entry stands for all checks.

    Answers as `walk_nested` for the access of `plain` and `host`, or not ok. `way` is one that `way_to` found for the root of
    `plain`. `structures` and `pages` are the caches of NestedCaches; they hold nothing but what plain walks have found.
    """
    if structures is None:
        if pages is None:
            if plain.mode == MODE_LONG4 and likely(is_way(mem, host, way)):
                count(stat, NestedStat.HOST_READS, way.reads)
                at, top = way.hpa & PAGE_MASK, FOUR_LEVELS
                return walk_nested_from(mem, mmu, plain, host, way, True, structures, pages, stat, gva, top, at, ALL_ONES, ZERO)
    if is_wide(host, plain.root):
        return not_plain()
    level, at, rights, seen = find_structure(structures, plain, stat, gva)
    return walk_nested_from(mem, mmu, plain, host, way, False, structures, pages, stat, gva, level, at, rights, seen)


@inner(inline=True)
def walk_nested_from(mem, mmu, plain, host, way, known, structures, pages, stat, gva, level, at, rights, seen):
    """The same from the guest's table of `level`, which is at hpa `at`, or NOWHERE for the top one. `known`: the way holds."""
    table, wide = plain.root, EPT.ADDR & ~((ONE << (PAGE_SHIFT + INDEX_BITS * host.levels)) - ONE)
    pointer_mask, leaf_mask = plain.pointer_mask | wide, plain.leaf_mask | wide
    while True:
        if at == NOWHERE:
            gpa = table | (table_index(gva, level, INDEX_BITS) << WORD_SHIFT)
            at = host_page(pages, mem, host, way, known, host.table, TABLE_KIND, stat, gpa)
            if at == NOWHERE:
                return not_plain()
            at &= PAGE_MASK
            if level < plain.mode:
                fill_structure(structures, level, gva, at, rights, seen)
        if not likely(is_inside(mem, at)):
            return not_plain()
        gpte = load(mem.words, entry_place(at, gva, level))
        count(stat, NestedStat.GUEST_READS, ONE)
        rights &= gpte
        seen |= gpte
        if level == ONE:
            if gpte & leaf_mask != plain.leaf:
                return not_plain()
            break
        if not likely(gpte & pointer_mask == plain.pointer):
            reserved = mmu.reserved[reserved_row(GPTE64.PS, level)]
            if gpte & GPTE64.PS == ZERO or gpte & reserved != ZERO or gpte & leaf_mask != plain.leaf:
                return not_plain()
            break
        table = gpte & LONG4.root
        at = NOWHERE
        level -= ONE
    walk = plain_answer(gpte, gva, level, rights, seen)
    hpa = host_page(pages, mem, host, way, known, host.final, host.kind, stat, walk.gpa)
    if hpa == NOWHERE:
        return not_plain()
    return NestedWalk(True, hpa, walk.gpa, level, walk.access, ZERO, ZERO, ZERO)


@inner
def reads_of(stat):
    """(guest's, host's) entries read so far."""
    if stat is None:
        return ZERO, ZERO
    return stat[NestedStat.GUEST_READS], stat[NestedStat.HOST_READS]


@inner
def take_back(stat, reads):
    """Forget what a walk has read that was not plain: it begins again."""
    if stat is None:
        return
    stat[NestedStat.GUEST_READS], stat[NestedStat.HOST_READS] = reads


@inner(inline=True)
def walk_nested_by(mem, mmu, host, scratch, caches, stat, plain, masks, way, gva):
    """Walk: the plain case at once, all others exactly. `plain`, `masks` (HostPlain) and `way` are made once for a loop."""
    count(stat, NestedStat.WALKS, ONE)
    if plain.mode >= MODE_LONG4:
        before = reads_of(stat)
        walk = walk_nested_plain(mem, mmu, plain, masks, way, caches.structures, caches.pages, stat, gva)
        if walk.ok:
            return walk
        take_back(stat, before)
    return walk_nested(mem, mmu, host, scratch, stat, gva, plain.access)


@kernel
def walk_nested_gva(mem, mmu, host, scratch, caches, stat, gva, access):
    """`walk_nested_by` for one address; arguments as `walk_nested`, and NestedCaches."""
    plain, masks = plain_for(mmu, access), host_plain_for(host, access)
    return walk_nested_by(mem, mmu, host, scratch, caches, stat, plain, masks, way_to(mem, masks, plain.root), gva)


@kernel
def walk_nested_column(mem, mmu, host, scratch, caches, stat, gvas, access, hpas):
    """Walk one address after another, all with one access: hpas[i], 0 where the walk does not come to its end."""
    plain, masks, way = plain_for(mmu, access), host_plain_for(host, access), no_way()
    for i in range(len(gvas)):
        if way.hpa == NOWHERE:
            way = way_to(mem, masks, plain.root)
        walk = walk_nested_by(mem, mmu, host, scratch, caches, stat, plain, masks, way, gvas[i])
        hpas[i] = walk.hpa if walk.ok else ZERO


@kernel
def walk_nested_stream(mem, mmu, host, scratch, caches, stat, cr3s, gvas, accesses):
    """Walk the records of a stream, columns of equal length; a new CR3 is loaded where it changes, which clears what is remembered
    of the guest's tables. Returns the order-sensitive digest of the hpas."""
    digest, way = ZERO, no_way()
    for i in range(len(gvas)):
        if cr3s[i] != mmu.reg[Reg.CR3]:
            mmu.reg[Reg.CR3] = cr3s[i]
            clear_structures(caches.structures, stat)
            way = no_way()
        access = np.uint64(accesses[i])
        plain, masks = plain_for(mmu, access), host_plain_for(host, access)
        if way.hpa == NOWHERE:
            way = way_to(mem, masks, plain.root)
        walk = walk_nested_by(mem, mmu, host, scratch, caches, stat, plain, masks, way, gvas[i])
        digest = mix(digest, Walk(walk.ok, walk.hpa, walk.level, walk.access, walk.pferr))
    return digest
