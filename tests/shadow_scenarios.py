"""Scenario documents for shadow paging (npt0, guest paging on): the guest writes its own page tables. Named ones, and random ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import scenarios
from scenarios import (
    ALIAS,
    CR0,
    CR0_NO_WP,
    DATA,
    DATA_GPA,
    DEVICE,
    DEVICE_GPA,
    ENTRY,
    GIB,
    HUGE,
    MIB2,
    NX,
    PAGE,
    PERMISSIONS,
    READONLY,
    RESERVED,
    SHADOW,
    UPPER,
    Builder,
    Chance,
    Document,
    run,
)  # fmt: skip

SELF = 0xFFFFFF0000000000  # under PML4 entry 510, the one that points to the PML4 itself
FREE = 0x700000  # pages of the low slot that are mapped and used by nothing
FLUSH = "CR3"


def odd_writes() -> Document:
    """Leaf tables: halves of entries, unaligned and page-crossing stores, exchanges, entries without A or D; INVLPG and CR3 between."""
    b = Builder(SHADOW)
    b.map_data(600)
    b.slot(1, DATA_GPA, 700 * PAGE)
    leaf, root = b.tables.entry(DATA), b.tables.root
    b.warm()
    b.guest(("LOOPR", DATA + 8, PAGE, 600))
    b.guest(
        ("W4", leaf, 0x40123067), ("R8", DATA + 8), ("INVLPG", DATA), ("R8", DATA + 8), ("W4", leaf + 4, 0x80000000), ("EXEC", DATA)
    )
    b.guest(("INVLPG", DATA), ("EXEC", DATA), ("R8", DATA + 8), ("W8", leaf + 4, 0x4000106700000000), ("R8", DATA + PAGE + 8))
    b.guest((FLUSH, root), ("R8", DATA + 8), ("R8", DATA + PAGE + 8), ("W8", leaf + 3, 5), ("W4", leaf + 0x16, 0), ("R8", DATA + 8))
    b.guest((FLUSH, root), ("LOOPR", DATA + 8, PAGE, 9), ("W8", leaf, DATA_GPA | 0x07), ("W8", leaf + 8, DATA_GPA + PAGE | 0x27))
    b.guest((FLUSH, root), ("R8", DATA + 8), ("W8", DATA + PAGE + 16, 7), ("R8", leaf), ("R8", leaf + 8))
    b.guest(("CMPX", leaf + 16, DATA_GPA | 0x65, 0x40002067), ("INVLPG", DATA + 2 * PAGE), ("W8", DATA + 2 * PAGE, 1))
    b.guest(
        ("CMPX", leaf + 16, 1, 2),
        ("W8", leaf + 24, 0),
        ("R8", DATA + 3 * PAGE),
        ("INVLPG", DATA + 3 * PAGE),
        ("R8", DATA + 3 * PAGE),
    )
    b.guest(("W8", leaf + 32, DATA_GPA | ENTRY | RESERVED), ("INVLPG", DATA + 4 * PAGE), ("R8", DATA + 4 * PAGE))
    b.guest(
        ("W8", leaf + 0xFFC, 0x4012306700000000),
        ("W8", leaf + 0xFFC, 0x67400F0067),
        (FLUSH, root),
        ("LOOPR", DATA + 511 * PAGE, PAGE, 3),
    )
    b.guest(*[("W8", leaf + 8 * i, DATA_GPA + (600 + i) * PAGE | ENTRY) for i in range(0, 60, 3)], ("INVLPG", DATA + 9 * PAGE))
    b.guest(("LOOPR", DATA + 8, PAGE, 60), (FLUSH, root), ("LOOPW", DATA + 16, PAGE, 60))
    return b.document()


def upper_writes(level: int) -> Document:
    """An upper table: relinked, cleared, flooded with and without use, halves, unaligned stores; level 4 is the root itself."""
    b = Builder(SHADOW)
    b.map_data(1100)
    b.slot(1, DATA_GPA, 1100 * PAGE)
    entry, root = b.tables.entry(DATA, level), b.tables.root
    value = b.tables.words[entry]
    b.warm()
    b.guest(("LOOPR", DATA + 8, 64 * PAGE, 17))
    b.guest(
        ("W8", entry, 0), ("R8", DATA + 8), ("W8", entry, value), ("R8", DATA + 8), ("W8", entry, value & ~0x20), ("R8", DATA + 8)
    )
    b.guest(*[("W8", entry, value | i << 9 & 0xE00) for i in range(9)], ("R8", DATA + 8))
    b.guest(*[op for i in range(4) for op in (("W8", entry, value | i << 9 & 0xE00), ("R8", DATA + 8 + i * PAGE))])
    b.guest(("W4", entry + 4, 0), ("W4", entry, value), ("R8", DATA + 8), ("W4", entry + 2, value >> 16), ("R8", DATA + 8))
    b.guest(("W8", entry + 4, 0), ("R8", DATA + 8), ("W8", entry, value))
    b.guest(("W8", entry - 4, value << 32) if level < 4 else ("W4", entry, value), ("R8", DATA + 8), ("W8", entry, value))
    b.guest(
        ("CMPX", entry, value | 0x200, value),
        ("CMPX", entry, value, 1),
        ("R8", DATA + 8),
        ("W8", entry, value | NX),
        ("EXEC", DATA),
    )
    b.guest(("W8", entry, value & ~2), ("R8", DATA + 8), ("W8", DATA + 8, 1), ("W8", entry, value & ~4), ("R8", DATA + 8))
    b.guest(("W8", entry, value | RESERVED), ("R8", DATA + 8), ("W8", entry, value), ("W8", DATA + 8, 1), (FLUSH, root))
    b.guest(("W8", (entry | 0xFFF) - (3 if level < 4 else 10), 0), ("R8", DATA + 8), ("LOOPW", DATA + 8, 64 * PAGE, 17))
    return b.document()


def table_aliases(early: bool) -> Document:
    """Page tables are written through several gvas, which are used before the tables are shadowed (`early`) or after."""
    b = Builder(SHADOW)
    b.map_data(64)
    b.slot(1, DATA_GPA, 128 * PAGE)
    tables = [b.tables.entry(DATA, level) & ~0xFFF for level in (1, 2, 3)]
    at = b.tables.entry(DATA) & 0xFFF
    for window in range(2):
        for i, table in enumerate(tables):
            b.tables.map(ALIAS + (8 * window + i) * PAGE, table)
    alias = [ALIAS + i * PAGE for i in (0, 8)]
    b.warm()
    if early:
        b.guest(("LOOPW", ALIAS + 0xF00, PAGE, 3), ("LOOPW", ALIAS + 8 * PAGE + 0xF00, PAGE, 3))
    b.guest(("LOOPR", DATA + 8, PAGE, 64))
    b.guest(("W8", alias[0] + at, DATA_GPA + 70 * PAGE | ENTRY), ("R8", DATA + 8), ("W8", alias[1] + at + 8, DATA_GPA | ENTRY))
    b.guest(("INVLPG", DATA + PAGE), ("R8", DATA + PAGE + 8), ("R8", DATA + 8), (FLUSH, b.tables.root), ("R8", DATA + 8))
    b.guest(
        ("W8", alias[1] + at + 16, 0), ("W8", tables[0] + at + 24, 0), ("INVLPG", DATA + 2 * PAGE), ("LOOPR", DATA + 8, PAGE, 5)
    )
    b.guest(
        *[("LOOPW", ALIAS + (8 * i + 1) * PAGE + 0xF00, 8, 2) for i in range(2)],
        ("R8", DATA + 8),
        ("W8", ALIAS + 2 * PAGE + 0xFFC, 0),
    )
    b.guest(("LOOPW", ALIAS + 10 * PAGE + 0xF00, 8, 5), ("R8", DATA + 8), (FLUSH, b.tables.root), ("LOOPW", DATA + 8, PAGE, 30))
    b.guest(
        ("LOOPW", ALIAS + 0xF00, 8 * PAGE, 2),
        ("CMPX", alias[0] + at, 0, 0),
        ("R8", DATA + 8),
        (FLUSH, b.tables.root),
        ("R8", DATA + 8),
    )
    return b.document()


def role_changes() -> Document:
    """A page is a leaf table (and unsync), then an upper one, then data, then a leaf table of other access."""
    b = Builder(SHADOW)
    b.map_data(512)
    b.slot(1, DATA_GPA, 600 * PAGE)
    root = b.tables.root
    leaf, upper, top = b.tables.entry(DATA), b.tables.entry(DATA, 2), b.tables.entry(DATA, 3)
    spare = b.tables.entry(ALIAS, 2)  # an empty entry of another directory
    other = b.tables.entry(PERMISSIONS, 2)
    b.warm()
    b.guest(("LOOPR", DATA + 8, PAGE, 16))
    b.guest(("W8", leaf, DATA_GPA + 9 * PAGE | ENTRY), ("W8", spare, leaf & ~0xFFF | 0x25), ("R8", ALIAS + 8), ("W8", ALIAS + 8, 1))
    b.guest(
        ("W8", spare, leaf & ~0xFFF | UPPER),
        ("W8", ALIAS + 16, 1),
        ("W8", other, leaf & ~0xFFF | 0x23 | NX),
        ("R8", PERMISSIONS + 8),
    )
    b.guest(
        ("W8", leaf, DATA_GPA + 7 * PAGE | ENTRY), ("R8", ALIAS + 8), ("R8", PERMISSIONS + 8), ("INVLPG", DATA), ("R8", DATA + 8)
    )
    b.guest((FLUSH, root), ("R8", DATA + 8), ("R8", ALIAS + 8), ("R8", PERMISSIONS + 8))
    b.guest(("W8", leaf + 8, (FREE + PAGE) | UPPER), ("W8", top, leaf & ~0xFFF | UPPER), ("R8", DATA + MIB2 + 8), ("R8", DATA + 8))
    b.guest(("W8", FREE + PAGE, DATA_GPA + PAGE | ENTRY), ("R8", DATA + MIB2 + 8), ("W8", leaf + 8, 0), ("R8", DATA + MIB2 + 8))
    b.guest(("W8", top, upper & ~0xFFF | UPPER), ("R8", DATA + 8), ("W8", leaf, DATA_GPA | ENTRY), ("R8", DATA + 8))
    b.guest(("W8", upper, FREE | UPPER), (FLUSH, root), ("R8", DATA + 8), ("W8", FREE, DATA_GPA | ENTRY), ("R8", DATA + 8))
    b.guest(("W8", DATA + 8, FREE), ("W8", FREE + 8, FREE | ENTRY), ("R8", DATA + PAGE), ("W8", DATA + PAGE + 16, 0x40003067))
    b.guest(
        ("R8", DATA + 2 * PAGE + 8), ("W8", upper, leaf & ~0xFFF | UPPER), ("LOOPW", leaf & ~0xFFF, 8, 4), ("R8", DATA + 5 * PAGE)
    )
    b.guest(("LOOPR", FREE, 8, 4), (FLUSH, root), ("LOOPW", FREE, 8, 4), ("R8", DATA + 6 * PAGE))
    return b.document()


def recursive() -> Document:
    """A PML4 entry points to the PML4: tables of every level are read and written through it, without and with A."""
    b = Builder(SHADOW)
    b.map_data(64)
    b.slot(1, DATA_GPA, 64 * PAGE)
    root = b.tables.root
    b.tables.words[root + 8 * 510] = root | 0x07
    leaf = SELF | DATA >> 9 & 0x7FFFFFFFF8
    upper = SELF | (leaf >> 9 & 0x7FFFFFFFF8)
    third = SELF | (upper >> 9 & 0x7FFFFFFFF8)
    top = SELF | (third >> 9 & 0x7FFFFFFFF8)
    b.warm()
    b.guest(("R8", leaf), ("R8", upper), ("R8", third), ("R8", top), ("R8", root + 8 * 510), ("R8", DATA + 8))
    b.guest(("W8", leaf, DATA_GPA + 9 * PAGE | ENTRY), ("R8", DATA + 8), ("INVLPG", DATA), ("R8", DATA + 8))
    b.guest(
        ("W8", root + 8 * 510, root | 0x03),
        ("W8", leaf + 8, DATA_GPA | ENTRY),
        ("R8", DATA + PAGE + 8),
        (FLUSH, root),
        ("R8", DATA + PAGE + 8),
    )
    b.guest(
        ("LOOPW", upper + 8 * 100, 8, 4), ("R8", DATA + 8), ("LOOPW", third + 8 * 100, 8, 3), ("R8", DATA + 8), ("W4", top + 4, 0)
    )
    b.guest(
        ("R8", DATA + 8), ("W8", top + 8 * 3, 1), ("W8", top + 8 * 3, 0), ("R8", leaf), ("W8", leaf, 0), (FLUSH, root), ("R8", DATA)
    )
    b.guest(("W8", root + 8 * 510, 0), ("R8", leaf), ("R8", DATA + PAGE))
    return b.document()


def address_spaces(count: int) -> Document:
    """Several PML4s over the same memory take turns; more than are kept; tables change while another is current."""
    b = Builder(SHADOW)
    b.map_data(32)
    b.map_device()
    roots = [b.tables.root] + [b.tables.second_root() for _ in range(count - 1)]
    for i, root in enumerate(roots[1:], 1):
        b.tables.map(DEVICE, DATA_GPA + i * PAGE, root=root)
        b.tables.map(DEVICE + PAGE, DEVICE_GPA + i * PAGE, root=root)
    entries = [b.tables.entry(DEVICE, root=root) for root in roots]
    leaf = b.tables.entry(DATA)
    b.slot(1, DATA_GPA, 64 * PAGE)
    b.warm()
    visit = [("R8", DATA + 8), ("R8", DEVICE + 8), ("R8", DEVICE + PAGE)]
    b.guest(*[op for root in roots for op in (("CR3", root), *visit)])
    b.guest(*[op for root in reversed(roots) for op in (("CR3", root), *visit)])
    b.guest(
        ("W8", leaf, DATA_GPA + 40 * PAGE | ENTRY), *[op for root in roots for op in (("CR3", root), *visit)], ("CR3", roots[0])
    )
    b.guest(*[("W8", at, DATA_GPA + (50 + i) * PAGE | ENTRY) for i, at in enumerate(entries)], ("INVLPG", DEVICE), *visit)
    b.guest(*[op for root in roots[::2] + roots[1::2] for op in (("CR3", root), *visit, ("W8", leaf + 8, DATA_GPA | ENTRY))])
    b.guest(("CR3", roots[0]), ("W8", roots[-1] + 8, 0), ("CR3", roots[-1]), *visit, ("CR3", roots[0]), *visit)
    b.guest(*[("LOOPW", root + 8 * 100, 8, 4) for root in roots], *[op for root in roots for op in (("CR3", root), *visit)])
    b.guest(
        ("CR3", roots[1]), ("LOOPW", roots[1] + 8 * 100, 8, 3), *visit, ("CR3", roots[1] | 8), *visit, ("CR3", roots[0]), *visit
    )
    b.mode(cr3=roots[1])
    b.guest(*visit, ("W8", entries[1], 0), ("R8", DEVICE), ("INVLPG", DEVICE), ("R8", DEVICE), ("CR3", roots[0]), *visit)
    return b.document()


def write_protect_off(huge: bool) -> Document:
    """CR0.WP goes off and on: supervisor writes to read-only pages, also huge ones; then the user looks."""
    b = Builder(SHADOW)
    for i, bits in enumerate((0x05, 0x01, 0x25, 0x65, 0x67, 0x07, 0x85, 0x65 | NX)):
        if huge:
            b.tables.map(DATA + i * MIB2, DATA_GPA + i * MIB2, bits | 0x80, 2)
        else:
            b.tables.map(DATA + i * PAGE, DATA_GPA + i * PAGE, bits)
    step = MIB2 if huge else PAGE
    b.slot(1, DATA_GPA, 8 * MIB2, host="2M")
    b.warm()
    pages = [DATA + i * step for i in range(8)]
    b.guest(*[("R8", page + 8) for page in pages], *[("W8", page + 8, 1) for page in pages])
    b.guest(("CR0", CR0_NO_WP), *[("W8", page + 8, 2) for page in pages], *[("R8", page + 8) for page in pages], ("CR0", CR0))
    b.guest(*[("R8", page + 8) for page in pages], *[("W8", page + 8, 3) for page in pages])
    b.mode(wp=False, cpl=3)
    b.guest(*[("R8", page + 8) for page in pages], *[("W8", page + 8, 4) for page in pages])
    b.mode(wp=False)
    b.guest(*[("W8", page + 8, 5) for page in pages], *[("EXEC", page) for page in pages])
    b.log(1, True)
    b.guest(*[("R8", page + PAGE) for page in pages[:-1]], *[("W8", page + 8, 6) for page in pages])
    b.get(1)
    b.mode(wp=False, cpl=3)
    b.guest(*[("R8", page + 8) for page in pages], ("W8", pages[4], 1))
    b.log(1, False)
    b.mode()
    b.guest(
        *[("R8", page + 8) for page in pages],
        ("CR0", CR0_NO_WP),
        ("CR0", CR0_NO_WP),
        ("W8", pages[0], 1),
        ("CR0", CR0),
        ("R8", pages[0]),
    )
    return b.document()


def two_vcpus_edit(shared: bool) -> Document:
    """Two vCPUs on the same tables, or on PML4s of their own over the same lower tables; both edit."""
    b = Builder(SHADOW, vcpus=2)
    b.map_data(40)
    b.map_device()
    root = b.tables.root
    other = root if shared else b.tables.second_root()
    if not shared:
        b.tables.map(DEVICE, DEVICE_GPA + 5 * PAGE, root=other)
        b.mode(1, cr3=other)
    leaf, upper = b.tables.entry(DATA), b.tables.entry(DATA, 2)
    b.slot(1, DATA_GPA, 64 * PAGE)
    b.warm()
    b.warm(1)
    for vcpu in (0, 1):
        b.guest(("LOOPR", DATA + 8, PAGE, 24), ("R8", DEVICE + 8), vcpu=vcpu)
    b.guest(("W8", leaf, DATA_GPA + 50 * PAGE | ENTRY), ("R8", DATA + 8), vcpu=0)
    b.guest(("R8", DATA + 8), ("INVLPG", DATA), ("R8", DATA + 8), ("W8", leaf + 8, 0), vcpu=1)
    b.guest(("R8", DATA + PAGE + 8), (FLUSH, root), ("R8", DATA + PAGE + 8), vcpu=0)
    b.guest(("W8", leaf + 8, DATA_GPA | ENTRY), ("R8", DATA + PAGE + 8), (FLUSH, other), ("LOOPW", DATA + 16, PAGE, 8), vcpu=1)
    b.guest(("W8", upper, 0), ("W8", upper, b.tables.words[upper]), vcpu=0)
    b.guest(("R8", DATA + 8), ("W8", upper, b.tables.words[upper] | 0x200), ("W8", upper, b.tables.words[upper]), vcpu=1)
    b.guest(("LOOPW", root + 8 * 100, 8, 4), ("R8", DATA + 8), vcpu=0)
    b.guest(("R8", DATA + 8), ("R8", DEVICE + 8), ("LOOPW", other + 8 * 100, 8, 4), vcpu=1)
    b.mode(1, wp=False, cr3=other)
    b.guest(("R8", DATA + 8), ("W8", leaf + 16, DATA_GPA | 0x65), (FLUSH, other), ("W8", DATA + 2 * PAGE, 3), vcpu=1)
    b.guest(("R8", DATA + 2 * PAGE), ("W8", DATA + 2 * PAGE, 3), (FLUSH, root), ("W8", DATA + 2 * PAGE, 3), vcpu=0)
    b.log(1, True)
    b.guest(("LOOPW", DATA + 24, PAGE, 10), vcpu=1)
    b.guest(("LOOPW", DATA + 24, PAGE, 10), vcpu=0)
    b.get(1)
    b.delete(1)
    b.guest(("R8", DATA + 8), vcpu=1)
    b.guest(("R8", DATA + 8), ("R8", DEVICE + 8), vcpu=0)
    return b.document()


def wide(b: Builder, regions: int) -> list[int]:
    """`regions` leaf tables with four pages each, all of the data slot; their first entries."""
    for i in range(regions):
        for page in range(4):
            b.tables.map(DATA + i * MIB2 + page * PAGE, DATA_GPA + (4 * i + page) * PAGE)
    return [b.tables.entry(DATA + i * MIB2) for i in range(regions)]


def many_unsync(regions: int = 40) -> Document:
    """More tables are unsync than one batch takes; under several directories, and used by CR3, INVLPG and a new root."""
    b = Builder(SHADOW)
    leafs = wide(b, regions)
    for i in range(20):
        b.tables.map(ALIAS + i * GIB, DATA_GPA + i * PAGE)
    leafs += [b.tables.entry(ALIAS + i * GIB) for i in range(20)]
    other = b.tables.second_root()
    b.slot(1, DATA_GPA, (4 * regions + 8) * PAGE)
    b.limit(400)
    b.warm()
    touch = [("LOOPR", DATA + 8, MIB2, regions), ("LOOPR", ALIAS + 8, GIB, 20)]
    edit = [("W8", at, DATA_GPA + (4 * regions) * PAGE | ENTRY) for at in leafs]
    b.guest(*touch)
    b.guest(*edit, *touch)
    b.guest((FLUSH, b.tables.root), *touch)
    b.guest(*edit[::2], ("INVLPG", DATA), ("INVLPG", DATA + 2 * MIB2), *touch, ("CR3", other), *touch)
    b.guest(*edit[::3], ("CR3", b.tables.root), *touch)
    b.guest(*[("W8", at, 0) for at in leafs[:30]])
    b.mode(cr3=other)
    b.guest(*touch[1:])
    b.guest(*edit[:30])
    b.guest(("W8", b.tables.entry(DATA, 3), 0), ("W8", b.tables.entry(DATA, 3), b.tables.words[b.tables.entry(DATA, 3)]), *touch)
    b.guest(*edit[:30], *[("W8", b.tables.entry(DATA, 3) + 8, i) for i in range(4)], *touch)
    b.guest(*edit[5:50], *[("W8", b.tables.entry(DATA, 4) + 8 * 300, i) for i in range(4)], ("R8", DATA + 8))
    return b.document()


def recycled_unsync() -> Document:
    """A small limit: pages that are recycled have unsync ones below them, which go along and count."""
    b = Builder(SHADOW)
    leafs = wide(b, 110)
    b.slot(1, DATA_GPA, 448 * PAGE)
    b.limit(64)
    b.warm()
    b.guest(("LOOPR", DATA + 8, MIB2, 40))
    b.guest(*[("W8", at, DATA_GPA + 445 * PAGE | ENTRY) for at in leafs[:40:2]], ("LOOPR", DATA + 8, MIB2, 30))
    b.guest(("LOOPR", DATA + 8, MIB2, 80))
    b.guest(*[("W8", at, DATA_GPA + 446 * PAGE | ENTRY) for at in leafs[70:80]], ("LOOPW", DATA + 24, MIB2, 110))
    b.guest(*[("W8", at, 0) for at in leafs[90:110]], ("W8", b.tables.entry(DATA, 3), 0))
    b.guest(("LOOPR", DATA + 8, MIB2, 60), ("W8", b.tables.entry(DATA, 3), b.tables.words[b.tables.entry(DATA, 3)]))
    b.guest(("LOOPR", DATA + 8, MIB2, 60), *[("W8", at + 8, 0) for at in leafs[40:60]])
    b.limit(66)
    b.log(1, True)
    b.guest(("LOOPW", DATA + 8, MIB2, 110))
    b.get(1)
    b.limit(200)
    b.guest(("LOOPW", DATA + 8, MIB2, 110), *[("W8", at + 8, 0) for at in leafs[:110:2]])
    b.limit(70)
    b.guest(("LOOPR", DATA + 8, 3 * MIB2, 36))
    b.log(1, False)
    b.guest((FLUSH, b.tables.root), ("LOOPR", DATA + 8, MIB2, 110))
    return b.document()


def recycled_first_page() -> Document:
    """A small limit: the fault of a store's second page recycles the table of its first, which faults when the store starts again."""
    b = Builder(SHADOW)
    wide(b, 110)
    for i in range(100):
        b.tables.map(DATA + (i + 1) * MIB2 - PAGE, DATA_GPA + (440 + i % 8) * PAGE)
    b.slot(1, DATA_GPA, 448 * PAGE)
    b.limit(64)
    b.warm()
    edge = DATA + 4 * MIB2
    for regions in range(44, 56):  # some of them leave no room for the second page
        b.guest(("W8", edge - PAGE, 1), ("LOOPR", edge + 2 * MIB2, MIB2, regions), ("W8", edge - 3, 2), ("R8", edge - 5))
        b.delete(1)
        b.slot(1, DATA_GPA, 448 * PAGE)
    return b.document()


def logged_tables(manual: int = 0) -> Document:
    """The slot with the page tables logs dirty pages: A, D, stores to leaf tables and to upper ones."""
    b = Builder(SHADOW)
    for i in range(40):
        b.tables.map(DATA + i * PAGE, DATA_GPA + i * PAGE, (0x07, 0x27, ENTRY, 0x05)[i % 4])
    leaf, upper, root = b.tables.entry(DATA), b.tables.entry(DATA, 2), b.tables.root
    b.tables.words[upper] &= ~0x20
    if manual:
        b.cap(manual)
    b.slot(1, DATA_GPA, 64 * PAGE)
    b.warm()
    b.guest(("LOOPR", DATA, PAGE, 12))
    b.log(0, True)
    for first in (0, 16):
        b.guest(("LOOPR", DATA + first * PAGE, PAGE, 6), ("W8", DATA + (first + 8) * PAGE, 1))
        b.get(0)
        b.guest(("W8", leaf, DATA_GPA | ENTRY), ("W8", upper + 8, 0), ("R8", DATA), ("W8", leaf + 8, DATA_GPA | 0x27))
        if manual:
            b.clear(0, 0, 2048)
        b.get(0)
        b.guest((FLUSH, root), ("R8", DATA + 8), ("W8", leaf, DATA_GPA + PAGE | ENTRY), ("INVLPG", DATA), ("W8", DATA, 3))
        b.get(0)
    b.log(1, True)
    b.guest(("W8", leaf + 16, DATA_GPA + 5 * PAGE | ENTRY), ("INVLPG", DATA + 2 * PAGE), ("LOOPW", DATA + 8, PAGE, 12))
    b.get(1)
    b.guest((FLUSH, root), ("LOOPR", DATA + 8, PAGE, 40), ("LOOPW", DATA + 8, 4 * PAGE, 10), ("W8", upper, 0), ("R8", DATA + 8))
    b.get(1)
    b.get(0)
    b.log(0, False)
    b.guest(("W8", leaf + 24, 0), ("W8", upper, b.tables.words[upper]), ("R8", DATA + 8), ("LOOPW", DATA + 8, PAGE, 40))
    return b.document()


def deleted_unsync() -> Document:
    """Memslots come and go while tables are unsync and MMIO SPTEs are old."""
    b = Builder(SHADOW, vcpus=2)
    b.map_data(32)
    b.map_device()
    leaf, device, root = b.tables.entry(DATA), b.tables.entry(DEVICE), b.tables.root
    b.slot(1, DATA_GPA, 64 * PAGE)
    b.warm()
    b.warm(1)
    b.guest(("LOOPR", DATA + 8, PAGE, 20), ("LOOPR", DEVICE + 8, PAGE, 8), vcpu=1)
    b.guest(
        ("W8", leaf, DATA_GPA + 40 * PAGE | ENTRY), ("W8", device, DEVICE_GPA + 6 * PAGE | ENTRY), ("LOOPR", DEVICE + 8, PAGE, 8)
    )
    b.slot(2, DEVICE_GPA, 4 * PAGE, fresh=True)
    b.guest(("LOOPR", DEVICE + 8, PAGE, 8), (FLUSH, root), ("LOOPR", DEVICE + 8, PAGE, 8), ("R8", DATA + 8))
    b.guest(
        ("W8", device + 8, DEVICE_GPA + 9 * PAGE | ENTRY), ("R8", DEVICE + PAGE), ("INVLPG", DEVICE + PAGE), ("R8", DEVICE + PAGE)
    )
    b.delete(1)
    b.guest(("LOOPR", DEVICE + 8, PAGE, 8), ("R8", DATA + 8))
    b.guest(
        ("LOOPR", DEVICE + 8, PAGE, 8), ("R8", DATA + 8), ("W8", leaf, DEVICE_GPA | ENTRY), (FLUSH, root), ("R8", DATA + 8), vcpu=1
    )
    b.slot(1, DATA_GPA, 64 * PAGE, fresh=True)
    b.guest(("W8", leaf + 8, DATA_GPA | ENTRY), ("LOOPR", DATA + 8, PAGE, 4), ("W8", device + 16, 0), ("R8", DEVICE + 2 * PAGE))
    b.slot(3, 0xD1000000, PAGE)
    b.guest((FLUSH, root), ("LOOPR", DATA + 8, PAGE, 4), ("LOOPR", DEVICE + 8, PAGE, 8))
    b.delete(2)
    b.guest(("LOOPR", DATA + 8, PAGE, 4), ("LOOPR", DEVICE + 8, PAGE, 8), ("INVLPG", DEVICE), ("R8", DEVICE), vcpu=1)
    return b.document()


def devices_and_memory(mmio_caching: bool = True) -> Document:
    """A leaf table maps devices, then memory, then devices: by sync, by INVLPG, by a fault; also read-only memory."""
    b = Builder(SHADOW, mmio_caching=mmio_caching)
    b.map_data(16)
    b.map_device(16)
    d, at, root = DEVICE, b.tables.entry(DEVICE), b.tables.root
    b.slot(1, DATA_GPA, 64 * PAGE)
    b.slot(2, DEVICE_GPA + 32 * PAGE, 8 * PAGE, (READONLY,))
    b.warm()
    b.guest(("LOOPR", d + 8, PAGE, 16), ("LOOPW", d + 8, PAGE, 16))
    b.guest(
        *[("W8", at + 8 * i, DATA_GPA + i * PAGE | ENTRY) for i in range(4)],
        ("LOOPR", d + 8, PAGE, 4),
        (FLUSH, root),
        ("LOOPR", d + 8, PAGE, 4),
    )
    b.guest(
        *[("W8", at + 8 * i, DEVICE_GPA + i * PAGE | ENTRY) for i in range(6)],
        ("INVLPG", d),
        ("LOOPR", d + 8, PAGE, 6),
        (FLUSH, root),
        ("LOOPW", d + 8, PAGE, 6),
    )
    b.guest(
        *[("W8", at + 8 * i, DEVICE_GPA + i * PAGE | 0x65) for i in range(6)],
        ("W8", d, 1),
        (FLUSH, root),
        ("LOOPW", d, PAGE, 6),
        ("LOOPR", d, PAGE, 6),
    )
    b.guest(
        *[("W8", at + 8 * i, DEVICE_GPA + (32 + i) * PAGE | ENTRY) for i in range(6)],
        ("LOOPR", d, PAGE, 6),
        ("INVLPG", d + PAGE),
        ("LOOPW", d, PAGE, 6),
    )
    b.guest(
        (FLUSH, root),
        ("LOOPR", d, PAGE, 6),
        ("LOOPW", d, PAGE, 6),
        ("W8", d + 0xFFC, 1 << 40 | 9),
        ("R8", d + 5 * PAGE + 0xFFC),
        ("W8", d + 5 * PAGE + 0xFFC, 9),
    )
    b.guest(
        ("CMPX", d, 1, 0),
        ("CMPX", d + 8 * PAGE, 1, 0),
        ("W8", at, DATA_GPA | ENTRY),
        ("CMPX", d, 1, 0),
        ("INVLPG", d),
        ("CMPX", d, 1, 0),
    )
    b.guest(
        ("W8", at + 8, 0),
        ("W8", d + 0xFFC, 5 << 32 | 7),
        (FLUSH, root),
        ("W8", d + 0xFFC, 5 << 32 | 7),
        ("R8", d + 0xFFC),
        ("R8", d + 3 * PAGE - 4),
    )
    b.guest(
        ("W8", at, at & ~0xFFF | ENTRY),
        (FLUSH, root),
        ("W8", d + (at & 0xFF8) + 16, DATA_GPA | ENTRY),
        (FLUSH, root),
        ("R8", d + 2 * PAGE + 8),
    )
    b.mode(cpl=3)
    b.guest(
        ("LOOPR", d, PAGE, 8),
        ("LOOPW", d, PAGE, 8),
        ("W8", at + 24, DEVICE_GPA | 0x63),
        ("R8", d + 3 * PAGE),
        ("W8", d + 3 * PAGE, 1),
    )
    b.mode(wp=False)
    b.guest(
        ("LOOPW", d, PAGE, 8),
        ("W8", at + 32, DEVICE_GPA | 0x65),
        ("INVLPG", d + 4 * PAGE),
        ("W8", d + 4 * PAGE, 2),
        ("R8", d + 4 * PAGE),
    )
    return b.document()


def huge_pages(level: int, host: str, *, nx: bool = False) -> Document:
    """Large guest pages: clean, then written; of other access; moved; over host pages of each size; logged."""
    b = Builder(SHADOW, nx=nx)
    size = MIB2 if level == 2 else GIB
    for i, bits in enumerate((0xA7, 0xE7, 0xA5, 0xA3, 0x87, 0xE7 | NX)):
        b.tables.map(DATA + i * size, DATA_GPA + (i if level == 2 else 0) * size, bits, level)
    at, root = b.tables.entry(DATA, level), b.tables.root
    b.slot(1, DATA_GPA, 3 * GIB // 2 if host == "1G" else 6 * MIB2, host=host)
    b.warm()
    pages = [DATA + i * size for i in range(6)]
    b.guest(*[("R8", page + PAGE + 8) for page in pages], ("LOOPR", DATA + 8, 9 * PAGE, 40))
    b.guest(
        *[("W8", page + 2 * PAGE + 8, 1) for page in pages], *[("EXEC", page) for page in pages], ("LOOPR", DATA + 16, 7 * PAGE, 40)
    )
    b.guest(
        ("W8", at, DATA_GPA | 0xA7),
        ("R8", DATA + 5 * PAGE),
        (FLUSH, root),
        ("R8", DATA + 5 * PAGE),
        ("W8", DATA + 6 * PAGE, 1),
        ("R8", at),
    )
    b.log(1, True)
    b.guest(*[("R8", page + 8) for page in pages], *[("W8", page + 8, 2) for page in pages], ("LOOPW", DATA + 8, 5 * PAGE, 30))
    b.get(1)
    b.guest(
        ("W8", at, DATA_GPA | 0xA7),
        ("LOOPR", DATA + 8, PAGE, 20),
        ("W8", DATA + 9 * PAGE, 1),
        ("LOOPR", DATA + 8, PAGE, 20),
        ("EXEC", DATA),
    )
    b.get(1)
    b.log(1, False)
    b.guest(("LOOPR", DATA + 8, 3 * PAGE, 30), *[("W8", page + 8, 3) for page in pages], *[("EXEC", page) for page in pages])
    b.guest(("W8", at + 8, DATA_GPA | 0xE5), ("R8", pages[1] + 8), ("W8", pages[1], 1), ("W8", at + 8, 0), ("R8", pages[1]))
    b.guest(
        ("W8", at, b.tables.entry(FREE) & ~0xFFF | UPPER),
        ("R8", DATA + 8),
        ("W8", at, DATA_GPA | HUGE),
        ("R8", DATA + 8),
        ("CR0", CR0_NO_WP),
        ("W8", pages[2], 1),
        ("R8", pages[2]),
        ("CR0", CR0),
        ("R8", pages[2]),
    )
    b.mode(cpl=3)
    b.guest(*[("R8", page + 8) for page in pages], *[("W8", page + 8, 2) for page in pages])
    return b.document()


def tables_in_huge_pages(host: str = "2M") -> Document:
    """Large guest pages over the memory with the tables themselves; a page in one becomes a table, and none again."""
    b = Builder(SHADOW, low_host=host)
    b.map_data(16)
    for i in range(4):
        b.tables.map(ALIAS + i * MIB2, i * MIB2, HUGE, 2)
    b.tables.map(PERMISSIONS, 0, HUGE, 3)
    leaf, upper, root = b.tables.entry(DATA), b.tables.entry(DATA, 2), b.tables.root
    own = b.tables.entry(ALIAS, 2)
    b.slot(1, DATA_GPA, 32 * PAGE)
    b.warm()
    b.guest(
        ("LOOPR", ALIAS + 0x8008, MIB2, 4),
        ("LOOPW", ALIAS + 0x9008, MIB2, 4),
        ("LOOPR", PERMISSIONS + 0x8008, MIB2, 4),
        ("LOOPR", DATA + 8, PAGE, 4),
    )
    b.guest(
        ("W8", ALIAS + leaf, DATA_GPA + 20 * PAGE | ENTRY),
        ("R8", DATA + 8),
        ("INVLPG", DATA),
        ("R8", DATA + 8),
        ("W8", PERMISSIONS + leaf, DATA_GPA | ENTRY),
    )
    b.guest(
        (FLUSH, root),
        ("R8", DATA + 8),
        ("W8", ALIAS + upper, FREE | UPPER),
        ("R8", DATA + 8),
        ("LOOPW", ALIAS + FREE, 8, 3),
        ("R8", DATA),
    )
    b.guest(
        ("W8", ALIAS + FREE, DATA_GPA | ENTRY),
        ("R8", DATA + 8),
        ("W8", PERMISSIONS + FREE + 8, DATA_GPA | ENTRY),
        ("R8", DATA + PAGE + 8),
    )
    b.guest(
        ("W8", ALIAS + own, HUGE), ("R8", ALIAS + own), ("W8", ALIAS + own, 0xA7), ("R8", ALIAS + 0x8008), ("W8", ALIAS + 0x8008, 1)
    )
    b.guest(
        *[("W8", ALIAS + upper + 8 * i, 0) for i in range(1, 5)],
        ("R8", DATA + 8),
        ("W8", upper, 0),
        ("LOOPW", ALIAS + FREE + 0x10008, PAGE, 20),
    )
    b.guest((FLUSH, root), ("LOOPW", ALIAS + FREE + 0x10008, PAGE, 20), ("W8", upper, leaf & ~0xFFF | UPPER), ("R8", DATA + 8))
    b.log(0, True)
    b.guest(("W8", ALIAS + leaf, DATA_GPA | ENTRY), ("LOOPW", ALIAS + FREE + 8, PAGE, 20), ("LOOPR", DATA + 8, PAGE, 3))
    b.get(0)
    b.log(0, False)
    b.guest(("LOOPW", ALIAS + FREE + 8, PAGE, 20), ("LOOPR", PERMISSIONS + 8, 0x40000, 30), ("R8", DATA + 8))
    return b.document()


def long_lists(pages: int = 1100) -> Document:
    """So many gvas map one page that its list is zapped; protected for the log before, with and without writable leafs."""
    b = Builder(SHADOW)
    for i in range(pages):
        b.tables.map(DATA + i * PAGE, DATA_GPA)
    b.slot(1, DATA_GPA, 8 * PAGE)
    b.warm()
    b.guest(("LOOPR", DATA + 8, 8 * PAGE, 90))
    b.log(1, True)
    b.guest(("LOOPW", DATA + 8, 16 * PAGE, 20))
    b.get(1)
    b.log(1, False)
    b.guest(("LOOPR", DATA + 8, PAGE, pages))
    b.guest(("LOOPW", DATA + 8, 8 * PAGE, pages // 8))
    return b.document()


def user_pages() -> Document:
    """User and supervisor pages, U cleared at each level, from both privilege levels; the tables change."""
    b = Builder(SHADOW)
    for i, bits in enumerate((0x67, 0x63, 0x65, 0x61, 0x67 | NX, 0x63 | NX, 0x07, 0x27)):
        b.tables.map(DATA + i * PAGE, DATA_GPA + i * PAGE, bits)
    b.slot(1, DATA_GPA, 16 * PAGE)
    entries = [b.tables.entry(DATA, level) for level in (1, 2, 3, 4)]
    b.warm()
    pages = [DATA + i * PAGE for i in range(9)]
    ops = [op for page in pages for op in (("R8", page + 8), ("W8", page + 16, 1), ("EXEC", page))]
    for cpl in (0, 3):
        b.mode(cpl=cpl)
        b.guest(*ops)
        for at in entries:
            value = b.tables.words[at]
            b.guest(("W8", at, value & ~4), ("R8", DATA + 8), ("W8", DATA + 8, 1), ("W8", at, value & ~2), ("W8", DATA + 8, 1))
            b.guest(*ops[:9], ("W8", at, value), *ops[:6])
    b.mode(cpl=0)
    b.guest((FLUSH, b.tables.root), *ops)
    return b.document()


def host_edits() -> Document:
    """The host writes page tables behind KVM's back: it is seen where a table is shadowed anew, synced or unsync."""
    b = Builder(SHADOW)
    b.map_data(32)
    leaf, upper, root = b.tables.entry(DATA), b.tables.entry(DATA, 2), b.tables.root
    b.slot(1, DATA_GPA, 64 * PAGE)
    b.warm()
    b.guest(("LOOPR", DATA + 8, PAGE, 16))
    b.memory([run(leaf, 20, DATA_GPA + 40 * PAGE | ENTRY, step=PAGE)])
    b.guest(
        ("LOOPR", DATA + 8, PAGE, 20),
        (FLUSH, root),
        ("R8", DATA + 8),
        ("W8", leaf + 8 * 30, 0),
        ("R8", DATA + 8),
        (FLUSH, root),
        ("LOOPR", DATA + 8, PAGE, 20),
    )
    b.memory([run(upper, 1, FREE | UPPER), run(FREE, 8, DATA_GPA | ENTRY, step=PAGE)])
    b.guest(("R8", DATA + 8), ("W8", upper + 8, 0), (FLUSH, root), ("R8", DATA + 8), ("W8", upper, FREE | UPPER), ("R8", DATA + 8))
    b.memory([run(leaf, 1, 0)])
    b.guest(("W8", upper, leaf & ~0xFFF | UPPER), ("R8", DATA + 8), ("R8", DATA + PAGE + 8))
    return b.document()


def host_relinks() -> Document:
    """The host gives entries above a leaf table another table, other rights, or a large page: what was linked is not what is wanted."""
    b = Builder(SHADOW)
    b.map_data(64)
    upper, root = b.tables.entry(DATA, 2), b.tables.root
    table = b.tables.words[upper] & ~0xFFF
    b.slot(1, DATA_GPA, 1024 * PAGE, host="2M")
    b.warm()
    b.guest(("LOOPR", DATA, PAGE, 16))
    b.memory([run(upper, 1, FREE | UPPER), run(FREE, 64, DATA_GPA + 100 * PAGE | ENTRY, step=PAGE)])
    b.guest(("R8", DATA + 40 * PAGE), ("LOOPR", DATA, PAGE, 20))
    b.memory([run(upper, 1, FREE | UPPER & ~2)])
    b.guest(("R8", DATA + 50 * PAGE), ("W8", DATA + 51 * PAGE, 1), (FLUSH, root), ("LOOPR", DATA, PAGE, 20))
    b.memory([run(upper, 1, DATA_GPA | HUGE)])
    b.guest(("LOOPR", DATA + 60 * PAGE, PAGE, 8), (FLUSH, root), ("LOOPW", DATA, PAGE, 20))
    b.memory([run(upper, 1, DATA_GPA + MIB2 | HUGE)])
    b.guest(("LOOPR", DATA + 100 * PAGE, PAGE, 8), (FLUSH, root), ("LOOPW", DATA, PAGE, 20))
    b.memory([run(upper, 1, table | UPPER)])
    b.guest(("LOOPR", DATA + 30 * PAGE, PAGE, 8), (FLUSH, root), ("LOOPW", DATA, PAGE, 20))
    return b.document()


SHADOW_NAMED: dict[str, Callable[[], Document]] = {
    **{f"{make.__name__}-{SHADOW}": lambda make=make: make(SHADOW) for make in (
        scenarios.odd_slot, scenarios.logged_first, scenarios.huge, scenarios.gigabyte, scenarios.initially_set, scenarios.manual,
        scenarios.executed, scenarios.devices, scenarios.table_edits, scenarios.recycled, scenarios.two_vcpus, scenarios.parameters,
        scenarios.late_slot,
    )},
    f"huge_eagerN-{SHADOW}": lambda: scenarios.huge(SHADOW, eager=False),
    f"huge_unaligned-{SHADOW}": lambda: scenarios.huge(SHADOW, gpa=DATA_GPA + 5 * PAGE, pages=1700),
    f"huge_misaligned_hva-{SHADOW}": lambda: scenarios.huge(SHADOW, offset=0x3000),
    f"initially_set_eagerN-{SHADOW}": lambda: scenarios.initially_set(SHADOW, eager=False, single=True),
    f"devices_uncached-{SHADOW}": lambda: scenarios.devices(SHADOW, mmio_caching=False),
    **{
        f"permissions_cpl{cpl}_wp{wp:d}-{SHADOW}": lambda cpl=cpl, wp=wp: scenarios.permissions(SHADOW, cpl=cpl, wp=wp)
        for cpl, wp in ((0, True), (0, False), (3, True), (3, False))
    },
    **{f"upper_writes_{level}": lambda level=level: upper_writes(level) for level in (2, 3, 4)},
    **{f"table_aliases_{when}": lambda when=when: table_aliases(when == "early") for when in ("early", "late")},
    **{f"address_spaces_{count}": lambda count=count: address_spaces(count) for count in (2, 4, 6)},
    **{f"write_protect_off_{size}": lambda size=size: write_protect_off(size == "2M") for size in ("4K", "2M")},
    **{f"two_vcpus_{which}_tables": lambda which=which: two_vcpus_edit(which == "same") for which in ("same", "own")},
    **{f"logged_tables_{manual}": lambda manual=manual: logged_tables(manual) for manual in (0, 1, 3)},
    **{f"huge_pages_{level}_{host}": lambda level=level, host=host: huge_pages(level, host) for level in (2, 3) for host in ("4K", "2M", "1G")},
    **{f"huge_pages_nx_{level}_{host}": lambda level=level, host=host: huge_pages(level, host, nx=True) for level in (2, 3) for host in ("2M", "1G")},
    **{f"tables_in_huge_pages_{host}": lambda host=host: tables_in_huge_pages(host) for host in ("4K", "2M")},
    "devices_and_memory_uncached": lambda: devices_and_memory(False),
    **{make.__name__: make for make in (
        odd_writes, role_changes, recursive, many_unsync, recycled_unsync, recycled_first_page, deleted_unsync, devices_and_memory, long_lists, user_pages, host_edits, host_relinks,
    )},
}  # fmt: skip


# --- random documents ------------------------------------------------------------------------------------------------------


class ShadowChance(Chance):
    """A random scenario of shadow paging in the making: more stores to page tables, and flushes of all kinds."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng, (SHADOW,))

    def prepare(self) -> None:
        """Also windows on the page tables, themselves through a PML4 entry, and large pages over the low memory."""
        b, rng = self.b, self.rng
        for window in (ALIAS, PERMISSIONS):
            b.tables.map(window, FREE)
        b.tables.map(DEVICE, DEVICE_GPA)
        self.known = [
            b.tables.entry(window + rng.randrange(3) * PAGE, level)
            for window in (DEVICE, ALIAS, PERMISSIONS)
            for level in (1, 1, 2, 3, 4)
        ]
        for i in range(4):
            b.tables.map(ALIAS + (32 + i) * PAGE, self.table(), rng.choice((ENTRY, ENTRY, 0x27, 0x65)))
        if rng.random() < 0.3:
            b.tables.map(ALIAS + 8 * MIB2, rng.choice((0, 0x200000, 0x600000)), HUGE, 2)
        if rng.random() < 0.3:
            b.tables.words[b.tables.root + 8 * 510] = b.tables.root | rng.choice((UPPER, 0x07, 0x03))
        super().prepare()

    def table(self) -> int:
        """A page table, but not the PML4: who writes there without care unmaps the program."""
        return self.rng.choice([at for at in self.known if at & ~0xFFF != self.b.tables.root]) & ~0xFFF

    def table_store(self) -> tuple[Any, ...]:
        """A store to a page table: a sensible entry or a strange one, at its place or beside it."""
        rng, b = self.rng, self.b
        at = rng.choice(self.known) if rng.random() < 0.7 else b.tables.entry(DEVICE + rng.randrange(12) * PAGE)
        old = b.tables.words.get(at, 0)
        target = rng.choice(
            (DATA_GPA + (self.lead + rng.randrange(self.pages + 2)) * PAGE, FREE + rng.randrange(16) * PAGE, DEVICE_GPA)
        )
        table = self.table()
        same = (old, old, old, 0, old & ~0x20, old & ~0x02, old & ~0x40, old ^ 4, old | 0x200, old ^ NX)
        moved = (table | UPPER, table | ENTRY, target | ENTRY, target | 0x27, target | 0x65, target | ENTRY | RESERVED)
        value = rng.choice(same + moved)
        if rng.random() < 0.15:
            at = ALIAS + (32 + rng.randrange(4)) * PAGE + (at & 0xFFF)
        shape = rng.random()
        if shape < 0.7:
            return ("W8", at, value)
        if shape < 0.8:
            return ("W4", at + rng.choice((0, 0, 4, 2)), value & 0xFFFFFFFF)
        if shape < 0.9:
            return ("CMPX", at, value, rng.choice((old, old, 0)))
        return ("W8", at + rng.choice((4, 1) if at & ~0xFFF == b.tables.root else (4, 1, -4)), value)

    def op(self, cpl: int) -> list[tuple[Any, ...]]:
        """Half of them are about page tables."""
        rng, b = self.rng, self.b
        choice = rng.random()
        if choice < 0.5:
            return super().op(cpl)
        if choice < 0.8:
            ops = [self.table_store() for _ in range(rng.choice((1, 1, 1, 2, 5)))]
            return ops + [("R8", rng.choice((ALIAS, PERMISSIONS, DEVICE)) + rng.randrange(4) * PAGE + 8)] * (rng.random() < 0.6)
        if cpl or choice < 0.85:
            recursive = SELF | rng.choice((DEVICE, ALIAS)) >> 9 & 0x7FFFFFFFF8
            return [("R8", ALIAS + (32 + rng.randrange(4)) * PAGE + 0x800), ("R8", recursive)]
        if choice < 0.92:
            return [("INVLPG", rng.choice((ALIAS, PERMISSIONS, DEVICE, DATA)) + rng.randrange(4) * PAGE)]
        if choice < 0.96:
            return [("CR3", rng.choice((b.tables.root, self.other)) | rng.choice((0, 0, 8)))]
        return [("CR0", rng.choice((CR0, CR0_NO_WP)))]


def random_shadow_scenario(rng: random.Random) -> Document:
    """A whole document."""
    return ShadowChance(rng).b.document()
