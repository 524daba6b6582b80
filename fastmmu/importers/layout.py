"""Where everything lies in the machine that an import makes: frames of pages, devices, memslots, and the page tables' stores.

Frames are handed out in order of first touch, and so are page tables, each right before the page that needs it first. Pages that
the input gives an address keep it; all else lies above them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmmu.importers.rows import FLAG, UNKNOWN, Mappings
from fastmmu.importers.tables import Tree, prot_of
from fastmmu.trace.npz import MAXPHYADDR, TraceError

Range = tuple[int, int, str]

PAGES_2M = 512
FIRST_FRAME = 0x100  # where no page has an address: what lies below 1 MiB is left to firmware
LARGEST_GAP = 1 << 22  # pages, 16 GiB: RAM is not assumed over longer gaps between pages that were used
MOST_SLOTS = 509  # memslots that a VM may have
LIMIT = 1 << MAXPHYADDR


@dataclass(frozen=True)
class Layout:
    """The machine, and by mapping: `frame` uint64 (of its own 4 KiB page), `level` uint8, `prot` uint8, `device` bool."""

    frame: np.ndarray
    level: np.ndarray
    prot: np.ndarray
    device: np.ndarray
    stores: dict[str, np.ndarray]  # STORE_COLUMNS
    flushed: np.ndarray  # records before which a page was mapped elsewhere
    tables: int
    root: int
    levels: int
    memslots: list[Range]
    mmio_ranges: list[Range]


def up(frame: int) -> int:
    """The next 2 MiB boundary, in pages."""
    return -(-frame // PAGES_2M) * PAGES_2M


def lay_out(mappings: Mappings, levels: int, *, large: bool, absent: int, memory: tuple[list[Range], list[Range]] | None) -> Layout:
    """Place all that was touched.

    Args:
        mappings: see `Mappings`, cut to its length.
        levels: of page tables.
        large: 2 MiB pages where an aligned 2 MiB of addresses is touched (all but `absent` pages) and can be contiguous.
        absent: how many of the 512 pages of such a page need not be touched.
        memory: memslots and device ranges of the recording, or None: made from the pages used.

    Raises:
        TraceError: the pages do not fit below the largest physical address.
    """
    known, is_device = mappings.gpa != UNKNOWN, mappings.flags & np.uint8(FLAG.DEVICE) != 0
    device_frames = np.unique(mappings.gpa[known & is_device])
    is_device |= known & np.isin(mappings.gpa, device_frames)
    regions = Regions(mappings, is_device, absent) if large else None
    in_large = regions.member if regions else np.zeros(len(known), bool)

    frame = mappings.gpa.copy()
    above = max((end >> 12 for _, end, _ in memory[0] + memory[1]), default=0) if memory else 0
    above = max(above, int(mappings.gpa[known].max()) + 1 if known.any() else 0)
    start = up(above) if above else FIRST_FRAME
    small = ~known & ~is_device & ~in_large
    frame[small] = start + np.arange(small.sum(), dtype=np.uint64)
    end = start + int(small.sum())
    if regions:
        end = regions.place(mappings, frame, end)
    tables = end
    level = np.where(in_large, 2, 1).astype(np.uint8)
    flags = regions.joint_flags(mappings.flags) if regions else mappings.flags
    leaf = np.flatnonzero(~in_large | regions.lead) if regions else np.arange(len(known))
    tree = Tree(mappings.gva[leaf], level[leaf], mappings.first[leaf], levels, tables)
    end = tables + tree.tables
    invented = ~known & is_device
    window = up(end)
    frame[invented] = window + np.arange(invented.sum(), dtype=np.uint64)
    highest = max(window + int(invented.sum()), end)
    if highest << 12 > LIMIT:
        raise TraceError(f"the pages touched need memory up to {highest << 12:#x}, expected less than 2^{MAXPHYADDR} bytes")
    if memory:
        slots, devices = list(memory[0]), list(memory[1])
    else:
        slots, devices = ranges_of(frame[known & ~is_device], device_frames, in_large[known & ~is_device])
    slots = [*slots, (0 if not slots and not devices else start << 12, end << 12, "ram")]
    if invented.any():
        devices.append((window << 12, (window + int(invented.sum())) << 12, "imported"))
    if len(slots) > MOST_SLOTS:
        raise TraceError(f"memory of {len(slots)} separate ranges, expected at most {MOST_SLOTS} memslots")
    stores = tree.stores(frame[leaf], flags[leaf])
    flushed = mappings.first[mappings.before != 0]
    return Layout(frame, level, prot_of(flags), is_device, stores, flushed, tree.tables, tables << 12, levels, slots, devices)


def ranges_of(ram: np.ndarray, devices: np.ndarray, large: np.ndarray) -> tuple[list[Range], list[Range]]:
    """RAM and device ranges over the frames used: RAM without gaps of 16 GiB, to 2 MiB boundaries where no device is near."""
    whole = ram[large] & ~np.uint64(PAGES_2M - 1)
    ram = np.unique(np.concatenate([ram, whole, whole + np.uint64(PAGES_2M - 1)]))
    frames = np.concatenate([ram, devices])
    order = np.argsort(frames, kind="stable")
    frames, is_device = frames[order].astype(np.int64), (order >= len(ram))
    if not len(frames):
        return [], []
    gap = np.diff(frames)
    cut = np.flatnonzero((is_device[1:] != is_device[:-1]) | np.where(is_device[1:], gap > 1, gap >= LARGEST_GAP)) + 1
    starts, ends = frames[np.append(0, cut)].tolist(), (frames[np.append(cut - 1, len(frames) - 1)] + 1).tolist()
    kinds = is_device[np.append(0, cut)].tolist()
    slots: list[Range] = []
    ranges: list[Range] = []
    for i, (first, end, device) in enumerate(zip(starts, ends, kinds, strict=True)):
        if device:
            ranges.append((first << 12, end << 12, f"mmio-{first << 12:x}"))
            continue
        lowest = ends[i - 1] if i else 0
        highest = starts[i + 1] if i + 1 < len(starts) else LIMIT >> 12
        low = 0 if not i and first < LARGEST_GAP else max(lowest, first // PAGES_2M * PAGES_2M)
        slots.append((low << 12, min(highest, up(end)) << 12, "ram"))
    return slots, ranges


class Regions:
    """Aligned 2 MiB of addresses that become one page each. `member`: which mappings belong to one; `lead`: the first of each."""

    def __init__(self, mappings: Mappings, is_device: np.ndarray, absent: int) -> None:
        pages, gpas = mappings.gva, mappings.gpa
        replaced = np.zeros(len(pages), bool)
        replaced[mappings.before[mappings.before != 0] - 1] = True
        plain = ~replaced & (mappings.before == 0) & ~is_device
        self._order = np.argsort(pages >> np.uint64(9), kind="stable")
        region = (pages >> np.uint64(9))[self._order]
        self._starts = np.flatnonzero(np.append(True, region[1:] != region[:-1])) if len(region) else np.zeros(0, np.int64)
        counts = np.diff(np.append(self._starts, len(region)))
        self._of = np.repeat(np.arange(len(counts)), counts)
        base = np.where(gpas == UNKNOWN, UNKNOWN, gpas - (pages & np.uint64(PAGES_2M - 1)))[self._order]
        good = counts >= PAGES_2M - absent
        if len(good):
            low, high = np.minimum.reduceat(base, self._starts), np.maximum.reduceat(base, self._starts)
            aligned = (low == UNKNOWN) | (low & np.uint64(PAGES_2M - 1) == 0)
            good &= (low == high) & aligned & np.logical_and.reduceat(plain[self._order], self._starts)
            devices = np.unique(gpas[is_device & (gpas != UNKNOWN)])
            inside = np.searchsorted(devices, low) != np.searchsorted(devices, low + np.uint64(PAGES_2M))
            good &= ~inside | (low == UNKNOWN)
        self.member = np.zeros(len(pages), bool)
        self.member[self._order] = good[self._of] if len(good) else False
        self._good = np.flatnonzero(good)
        self.lead = np.zeros(len(pages), bool)
        self.lead[self._order[self._starts[self._good]]] = True

    def place(self, mappings: Mappings, frame: np.ndarray, end: int) -> int:
        """Give those without an address a frame, aligned, in order of first touch, from `end` on; returns where they end."""
        firsts = self._order[self._starts[self._good]]
        unknown = self._good[mappings.gpa[firsts] == UNKNOWN]
        unknown = unknown[np.argsort(self._order[self._starts[unknown]], kind="stable")]
        if not len(unknown):
            return end
        base = np.full(len(self._starts), UNKNOWN, np.uint64)
        base[unknown] = up(end) + PAGES_2M * np.arange(len(unknown), dtype=np.uint64)
        rows = np.isin(self._of, unknown)
        members = self._order[rows]
        frame[members] = base[self._of[rows]] + (mappings.gva[members] & np.uint64(PAGES_2M - 1))
        return up(end) + PAGES_2M * len(unknown)

    def joint_flags(self, flags: np.ndarray) -> np.ndarray:
        """Flags by mapping, of all members of a region together."""
        joint = flags.copy()
        if len(self._starts):
            of_region = np.bitwise_or.reduceat(flags[self._order], self._starts)
            joint[self._order] = np.where(self.member[self._order], of_region[self._of], flags[self._order])
        return joint
