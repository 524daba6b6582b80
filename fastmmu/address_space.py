"""What an address space maps: its regions with their rights and page sizes, as an emulator's monitor lists them.

NumPy over whole tables. The regions of a table are worked out once for each level at which it stands, relative to the first
address that it maps, however many entries point to it: tables that many entries share, or that point to themselves, cost no more
than others. No kernel takes part; the tests compare the regions with the walk, and with what QEMU lists.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastmmu.bits import CR4, GPTE32, GPTE64, ONE, PAGE_SHIFT, WORDS_PER_PAGE, ZERO, bit
from fastmmu.explain import MODES
from fastmmu.memory import GuestMemory
from fastmmu.paging import ADDRESS_BITS, Cpu, Mode, reserved_masks
from fastmmu.processor import load_pdptes, mmu_of
from fastmmu.state import Reg

USER, WRITE, FETCH, GLOBAL = (bit(position) for position in range(4))
"""Rights of a region; it can always be read. GLOBAL: G is set in its leaf entries, and CR4.PGE."""
LEAF_LEVELS = 3
PAE_SHIFT = np.uint64(30)  # each PDPTE of PAE paging maps 1 GiB
MOST_REGIONS = 1 << 22
CHUNK = 4096
"""Tables that are read at a time."""


class TooManyRegions(ValueError):
    """More than MOST_REGIONS regions: tables that are shared, or point to themselves, and whose pages do not merge."""


class Regions(NamedTuple):
    """Regions in the order of their addresses: arrays of uint64, of one length n, `pages` of shape [n, 3].

    `start` and `size` are in bytes; `rights` are USER, WRITE, FETCH and GLOBAL or-ed; `gpa` is that of the first byte, and
    the others follow it only if the regions were asked for by gpa; `pages` counts the pages of levels 1, 2 and 3.
    """

    start: np.ndarray
    size: np.ndarray
    rights: np.ndarray
    gpa: np.ndarray
    pages: np.ndarray

    def of(self, chosen: np.ndarray) -> Regions:
        """Some of them, by a mask or by indices."""
        return Regions(*(column[chosen] for column in self))


NOTHING = Regions(*(np.zeros(0, np.uint64),) * 4, np.zeros((0, LEAF_LEVELS), np.uint64))


Grouped = tuple[np.ndarray, Regions]


class Entries(NamedTuple):
    """Entries of one level's tables that a walk accepts: number of the table, index in it, value, whether it maps a page."""

    table: np.ndarray
    index: np.ndarray
    value: np.ndarray
    leaf: np.ndarray


class _Tables:
    """The tables of one address space on their way to regions. Each region has a group, a number: only those of one group merge."""

    def __init__(self, ram: GuestMemory, cpu: Cpu, by_gpa: bool) -> None:
        self.slots, self.by_gpa, self.mode = ram.slots, by_gpa, MODES[cpu.mode]
        self.length = WORDS_PER_PAGE * (2 if self.mode.half else 1)
        self.words = (ram.state.halves if self.mode.half else ram.words).reshape(-1, self.length)
        self.reserved = reserved_masks(cpu)
        self.large_bit = mmu_of(ram, cpu).reg[Reg.LARGE]
        self.global_bit = GPTE64.G if cpu.cr4 & int(CR4.PGE) else ZERO
        # addresses from here on are the upper half of the address space, far from the lower one
        self.middle = bit(ADDRESS_BITS[cpu.mode] - 1) if self.mode.keys else ZERO

    def span(self, level: int) -> np.uint64:
        """Bytes that an entry of a level stands for."""
        return np.uint64(1 << int(PAGE_SHIFT) + int(self.mode.index_bits) * (level - 1))

    def in_memory(self, gpas: np.ndarray) -> np.ndarray:
        """Which tables lie in a memory slot: nothing else is read."""
        inside = np.zeros(len(gpas), bool)
        for start, end, kind in self.slots:
            if kind != "device":
                inside |= (gpas >= np.uint64(start)) & (gpas < np.uint64(end))
        return inside

    def read(self, gpas: np.ndarray, level: int) -> Entries:
        """The entries of tables in memory that are present and set no reserved bit."""
        parts = [Entries(*(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.uint64, bool)))]
        for first in range(0, len(gpas), CHUNK):
            words = self.words[gpas[first : first + CHUNK] >> PAGE_SHIFT]
            table, index = np.nonzero(words & words.dtype.type(GPTE64.P))
            value = words[table, index].astype(np.uint64)
            leaf = value & self.large_bit != 0
            good = value & self.reserved[8 * leaf + level] == 0
            good &= leaf | (level == 1) | self.in_memory(value & self.mode.root)
            parts.append(Entries(*(column[good] for column in (table + first, index, value, leaf | (level == 1)))))
        return Entries(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def rights(self, value: np.ndarray) -> np.ndarray:
        """What entries grant, G aside."""
        granted = np.where(value & GPTE64.U, USER, 0) | np.where(value & GPTE64.W, WRITE, 0)
        return granted | np.where(value & GPTE64.NX, 0, FETCH)

    def leaves(self, entries: Entries, level: int) -> Grouped:
        """A region for each page that entries of a level map; its group is the number of its table."""
        table, index, value, _ = (column[entries.leaf] for column in entries)
        span = self.span(level)
        gpa = value & GPTE64.ADDR & ~(span - ONE)
        if self.mode.half and level == 2:
            gpa |= (value & GPTE32.PSE36) << np.uint64(32 - 13)
        rights = self.rights(value) | np.where(value & self.global_bit, GLOBAL, 0)
        pages = np.repeat(np.arange(1, LEAF_LEVELS + 1)[None] == level, len(value), 0).astype(np.uint64)
        return table, Regions(index.astype(np.uint64) * span, np.full(len(value), span), rights, gpa, pages)

    def below(self, entries: Entries, level: int, which: np.ndarray, lower: Grouped) -> Grouped:
        """The regions that the tables of a level have from those below: `which` of them each of its pointers points to.

        Raises:
            TooManyRegions: see there.
        """
        table, index, value, _ = (column[~entries.leaf] for column in entries)
        group, regions = lower
        first, last = np.searchsorted(group, which, "left"), np.searchsorted(group, which, "right")
        count = last - first
        if int(count.sum()) > MOST_REGIONS:
            shared = f"{len(which):,} entries of level {level} point to {len(np.unique(which)):,} tables"
            raise TooManyRegions(f"more than {MOST_REGIONS:,} regions: {shared}, whose pages do not merge")
        regions = regions.of(np.repeat(first - (np.cumsum(count) - count), count) + np.arange(count.sum()))
        start = regions.start + np.repeat(index.astype(np.uint64) * self.span(level), count)
        rights = regions.rights & np.repeat(self.rights(value) | GLOBAL, count)
        return np.repeat(table, count), regions._replace(start=start, rights=rights)

    def merged(self, group: np.ndarray, regions: Regions) -> Grouped:
        """Sorted, and neighbours with equal rights made one; by gpa only pages of one size that follow one another there too."""
        order = np.lexsort((regions.start, group))
        group, regions = group[order], regions.of(order)
        if not len(group):
            return group, regions
        one, other = regions.of(np.s_[:-1]), regions.of(np.s_[1:])
        same = (group[:-1] == group[1:]) & (one.start + one.size == other.start) & (other.start != self.middle)
        same &= one.rights == other.rights
        if self.by_gpa:
            same &= (one.gpa + one.size == other.gpa) & ((one.pages != 0) == (other.pages != 0)).all(1)
        first = np.flatnonzero(np.concatenate([[True], ~same]))
        sums = {name: np.add.reduceat(getattr(regions, name), first) for name in ("size", "pages")}
        return group[first], regions.of(first)._replace(**sums)

    def regions(self, gpas: np.ndarray) -> Grouped:
        """The regions of the top tables at `gpas`, which are sorted; the group is the number of the table."""
        found: list[tuple[int, Entries, np.ndarray]] = []
        for level in range(int(self.mode.levels), 0, -1):
            entries = self.read(gpas, level)
            gpas, which = np.unique(entries.value[~entries.leaf] & self.mode.root, return_inverse=True)
            found.append((level, entries, which))
        lower = np.zeros(0, np.int64), NOTHING
        for level, entries, which in reversed(found):
            parts = (self.below(entries, level, which, lower), self.leaves(entries, level))
            lower = self.merged(np.concatenate([group for group, _ in parts]), joined([regions for _, regions in parts]))
        return lower


def joined(parts: list[Regions]) -> Regions:
    """Regions one behind the other."""
    return Regions(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def regions(ram: GuestMemory, cpu: Cpu, *, by_gpa: bool = False) -> Regions:
    """What the tables at CR3 map, as regions of equal rights; none with paging off.

    Rights are those of all entries together. What a processor makes of them (CR0.WP, SMEP, SMAP, protection keys) is not looked at.
    An entry that sets a reserved bit, or whose table lies outside memory, maps nothing.

    Args:
        ram: guest memory, which stays as it is.
        cpu: registers.
        by_gpa: a region also ends where the page size changes, and where guest physical memory does not go on.

    Raises:
        ValueError: bad arguments. GeneralProtection, a ValueError: CR3 cannot be loaded. TooManyRegions, a ValueError.

    Example:
        >>> from fastmmu import Cpu, GuestMemory, regions
        >>> from fastmmu.address_space import USER, WRITE
        >>> ram = GuestMemory(1 << 20)
        >>> for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4008, 0x5065)):
        ...     ram.words[gpa >> 3] = entry
        >>> cpu = Cpu(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
        >>> ram.words[0x4010 >> 3 : 0x4020 >> 3] = 0x6065, 0x7067
        >>> found = regions(ram, cpu)
        >>> [hex(start) for start in found.start.tolist()], found.size.tolist(), (found.rights & WRITE != 0).tolist()
        (['0x1000', '0x3000'], [8192, 4096], [False, True])
    """
    mmu_of(ram, cpu)
    if cpu.mode == Mode.NONE:
        return NOTHING
    tables = _Tables(ram, cpu, by_gpa)
    quarters, top = np.zeros(1, np.uint64), np.array([cpu.cr3], np.uint64) & tables.mode.root
    if tables.mode.pae:
        pdptes = np.array(load_pdptes(ram, cpu), np.uint64)
        quarters = np.flatnonzero(pdptes & GPTE64.P).astype(np.uint64)
        top = pdptes[quarters] & GPTE64.ADDR
    inside = tables.in_memory(top)
    gpas, which = np.unique(top[inside], return_inverse=True)
    group, found = tables.regions(gpas)
    parts = [NOTHING]
    for quarter, table in zip(quarters[inside], which, strict=True):
        part = found.of(group == table)
        parts.append(part._replace(start=part.start + (quarter << PAE_SHIFT)))
    whole = joined(parts)
    _, whole = tables.merged(np.zeros(len(whole.start), np.int64), whole)
    if tables.middle:
        whole.start[whole.start >= tables.middle] |= ~(tables.middle - ONE)
    return whole
