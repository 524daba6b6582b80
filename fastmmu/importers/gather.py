"""From accesses to records: accesses over two pages are parted, repeated ones absorbed, and each page gets a mapping.

Three rules say what is absorbed. NONE: nothing. CONSECUTIVE: a fetch record lasts until another code page is entered; data
accesses to one page, of one kind, with nothing but fetches from the same code page between them, are one record. TLB: an access
is absorbed by the record of its page and kind that is still in a filter of 16 sets by 4 ways per kind, first in first out, emptied
when the page tables change. Accesses to devices are always records of their own.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner, kernel
from fastmmu.bits import ONE, PAGE_OFFSET, PAGE_SHIFT, PAGE_SIZE, ZERO, field
from fastmmu.importers.rows import FETCH, FLAG, MOST, SETS, UNKNOWN, WAYS, WRITE, Made, Rule

LOW_HALF = field(31, 0)
SPREAD = np.uint64(0x9E3779B1)  # 2^32 divided by the golden ratio
UPPER, MIDDLE, LOWER = np.uint64(32), np.uint64(25), np.uint64(12)
KEY_SHIFT, USER_SHIFT = np.uint64(3), np.uint64(2)
LARGEST_COUNT = np.uint64(MOST)
SETS_MASK = np.uint64(SETS - 1)
PAGE_BYTES = np.uint64(PAGE_SIZE)
TOP, TOP_ONES = np.uint64(47), field(16, 0)  # bits 63:47 of an address are equal under four levels of tables
DATA = 1  # with CONSECUTIVE, the slot of the data record


@inner
def place_of(table, page):
    """Where a page's search in the hash table begins. The product of two 32-bit numbers does not overflow."""
    mixed = ((page ^ (page >> MIDDLE)) & LOW_HALF) * SPREAD
    return ((mixed >> LOWER) ^ (mixed >> UPPER) ^ mixed) & np.uint64(len(table) - 1)


@inner
def find(mappings, page):
    """Index in the hash table of the entry for `page`, or of the empty one where it belongs."""
    mask = np.uint64(len(mappings.table) - 1)
    place = place_of(mappings.table, page)
    while True:
        entry = mappings.table[place]
        if entry == 0 or mappings.gva[np.uint64(entry) - ONE] == page:
            return place
        place = (place + ONE) & mask


@kernel
def rehash(mappings):
    """Enter all mappings into the (empty) hash table; a later mapping of a page takes the place of an earlier one."""
    for i in range(np.int64(mappings.used[0])):
        mappings.table[find(mappings, mappings.gva[i])] = np.uint32(i + 1)


@inner
def mapping_of(mappings, page, frame, record):
    """The mapping of `page`, (number, whether it is new). `frame` is where the access went, or UNKNOWN: anywhere."""
    place = find(mappings, page)
    entry = mappings.table[place]
    if entry != 0:
        number = np.uint64(entry) - ONE
        known = mappings.gpa[number]
        if frame == UNKNOWN or frame == known:  # noqa: SIM109
            return number, False
        if known == UNKNOWN:
            mappings.gpa[number] = frame  # told later than it was used
            return number, False
    number = mappings.used[0]
    mappings.used[0] += ONE
    mappings.gva[number], mappings.gpa[number], mappings.first[number] = page, frame, record
    mappings.before[number], mappings.flags[number] = entry, 0
    mappings.table[place] = np.uint32(number + ONE)
    return number, True


@inner
def settle(slots, slot, out, base):
    """Write the total of the record in a slot where it belongs."""
    record = slots.record[slot]
    if slots.key[slot] != UNKNOWN:
        if record >= base:
            out.count[record - base] = np.uint32(slots.total[slot])
        else:
            late = out.made[Made.LATE]
            out.late_record[late], out.late_total[late] = record, slots.total[slot]
            out.made[Made.LATE] += ONE


@kernel
def settle_all(slots, out, base):
    """Write the totals of all records in slots, which stay there."""
    for slot in range(len(slots.key)):
        settle(slots, slot, out, base)


@inner
def empty(slots, out, base):
    """No record absorbs anything any more."""
    for slot in range(len(slots.key)):
        settle(slots, slot, out, base)
        slots.key[slot] = UNKNOWN


@inner
def slot_of(slots, rule, page, kind, key):
    """The slot that holds `key`, or would: (slot, set). With CONSECUTIVE a set has one way."""
    if rule == Rule.CONSECUTIVE:
        row = 0 if kind == FETCH else 1
        return row, row
    row = kind * SETS + np.int64(page & SETS_MASK)
    for way in range(WAYS):
        if slots.key[row * WAYS + way] == key:
            return row * WAYS + way, row
    return row * WAYS + np.int64(slots.turn[row]), row


@inner
def log2_of(size):
    """The largest power of two that is not more."""
    log = 0
    while size > ONE:
        size >>= ONE
        log += 1
    return log


@inner(inline=True)
def take(gva, gpa, size, count, kind, flags, mappings, slots, out, rule, base):
    """One access within one page: absorbed, or a record."""
    page = gva >> PAGE_SHIFT
    frame = gpa if gpa == UNKNOWN else gpa >> PAGE_SHIFT
    device = flags & FLAG.DEVICE != ZERO
    key = page << KEY_SHIFT | (flags & FLAG.USER) << USER_SHIFT | kind
    out.made[Made.ACCESSES] += count
    slot, row = 0, 0
    if rule != Rule.NONE:
        slot, row = slot_of(slots, rule, page, np.int64(kind), key)
        same = slots.key[slot] == key and (frame == UNKNOWN or slots.gpa[slot] == frame) and not device
        if same and slots.total[slot] + count <= LARGEST_COUNT:
            slots.total[slot] += count
            return
    record = base + out.made[Made.RECORDS]
    number, new = mapping_of(mappings, page, frame, record)
    if new and (rule == Rule.TLB or mappings.before[number] != 0):  # the page tables change; of the other rule, only for moves
        empty(slots, out, base)
    mappings.flags[number] |= np.uint8(flags | (FLAG.FETCH if kind == FETCH else FLAG.WRITE if kind == WRITE else ZERO))
    place = out.made[Made.RECORDS]
    out.gva[place], out.kind[place], out.mapping[place] = gva, np.uint8(kind), np.uint32(number)
    out.size[place] = 0 if kind == FETCH else log2_of(size)
    out.count[place] = np.uint32(count)
    out.made[Made.RECORDS] += ONE
    top = gva >> TOP
    if top != ZERO and top != TOP_ONES:
        out.made[Made.WIDE] = ONE
    if rule == Rule.CONSECUTIVE and (kind == FETCH or device):
        settle(slots, DATA, out, base)
        slots.key[DATA] = UNKNOWN  # another code page, or a device access in between
    if rule != Rule.NONE and not device:
        settle(slots, slot, out, base)
        slots.key[slot], slots.gpa[slot], slots.record[slot], slots.total[slot] = key, frame, record, count
        if rule == Rule.TLB:
            slots.turn[row] = (np.uint64(slot) + ONE) % np.uint64(WAYS)


@kernel
def gather(rows, start, end, mappings, slots, out, rule, base):
    """Turn rows start..end into records, numbered from `base`; returns the first row for which mappings have no room."""
    for i in range(start, end):
        if np.int64(mappings.used[0]) + 2 > len(mappings.gva):
            return i
        gva, gpa, size = rows.gva[i], rows.gpa[i], np.uint64(rows.size[i])
        count, kind, flags = np.uint64(rows.count[i]), np.uint64(rows.kind[i]), np.uint64(rows.flags[i])
        while True:
            part = min(size, PAGE_BYTES - (gva & PAGE_OFFSET))
            take(gva, gpa, part, count, kind, flags, mappings, slots, out, rule, base)
            size -= part
            if size == ZERO:
                break
            gva, gpa = gva + part, UNKNOWN  # the next page may be anywhere
    return end
