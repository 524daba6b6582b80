"""Guest physical memory: one flat array of uint64 words, reserved sparsely, and the memslots that say what of it exists."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from fastmmu._jit import kernel
from fastmmu.bits import PAGE_SIZE, PHYSICAL_BITS, PHYSICAL_LIMIT
from fastmmu.checks import checked_int
from fastmmu.state import NO_SLOT, SLOT, MemoryState, SlotKind

MAP_NORESERVE = 0x4000  # Linux x86-64; the mmap module of Python 3.11 has no name for it

Slot = tuple[int, int, str]


def reserve(size: int, *, huge: bool = False) -> mmap.mmap:
    """Reserve `size` bytes of zeros that cost memory only where they are touched: 4 KiB at a time, or 2 MiB with `huge`.

    Raises:
        MemoryError: the system refuses to reserve that much.
    """
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"cannot reserve {size} bytes of guest memory: {error}") from None
    if huge:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def check_slots(slots: Iterable[Slot], size: int) -> list[Slot]:
    """Slots as a sorted list of (start, end, kind); end is exclusive.

    Raises:
        ValueError: not such triples, an empty or unaligned range, memory beyond `size`, or two slots that overlap.
    """
    try:
        rows = list(slots)
    except TypeError:
        raise ValueError(f"slots: {slots!r}, expected a list of (start, end, 'ram' | 'rom' | 'device')") from None
    checked = []
    for slot in rows:
        try:
            start, end, kind = slot
            kind = SlotKind[kind.upper()].name.lower()
        except (TypeError, ValueError, KeyError, AttributeError):
            raise ValueError(f"slot {slot!r}: expected (start, end, 'ram' | 'rom' | 'device')") from None
        bounds = f"ints, 0 <= start < end <= 2^{PHYSICAL_BITS}"
        start, end = (checked_int(value, 0, PHYSICAL_LIMIT, f"slot {slot!r}", bounds) for value in (start, end))
        if start >= end:
            raise ValueError(f"slot {slot!r}: expected {bounds}")
        if kind != "device":
            if start % PAGE_SIZE or end % PAGE_SIZE:
                raise ValueError(f"slot {slot!r}: expected bounds that are multiples of {PAGE_SIZE}")
            if end > size:
                raise ValueError(f"slot {slot!r}: ends beyond the {size:#x} bytes of guest memory")
        checked.append((start, end, kind))
    checked.sort()
    for lower, upper in pairwise(checked):
        if upper[0] < lower[1]:
            raise ValueError(f"slots {lower!r} and {upper!r} overlap")
    return checked


class GuestMemory:
    """Guest physical memory of `size` bytes, zero-filled, one RAM slot over all of it to begin with.

    Attributes:
        words: writable uint64[size / 8], indexed by gpa >> 3. A 256 GiB guest costs only the pages it touches.
        slots: list of (start, end, kind), kind 'ram', 'rom' or 'device', end exclusive; assigning validates. Nothing outside a
            RAM or ROM slot is ever read by a walk, nothing outside a RAM slot is written, whatever the guest's tables say.

    Raises:
        ValueError: the size is not a positive multiple of 4096.
        MemoryError: the system refuses to reserve that much.

    Example:
        >>> from fastmmu import GuestMemory
        >>> ram = GuestMemory(256 << 30)  # costs nothing yet
        >>> ram.words[0x1000 >> 3] = 0x2067
        >>> ram.slots = [(0, 128 << 30, "ram"), (0xFE_0000_0000, 0xFE_0000_1000, "device")]
        >>> ram.slots = [(0, 512 << 30, "ram")]
        Traceback (most recent call last):
        ...
        ValueError: slot (0, 549755813888, 'ram'): ends beyond the 0x4000000000 bytes of guest memory
    """

    def __init__(self, size: int) -> None:
        expected = f"a positive multiple of {PAGE_SIZE} bytes, up to 2^{PHYSICAL_BITS}"
        self.size = checked_int(size, 1, PHYSICAL_LIMIT, "size of guest memory", expected)
        if self.size % PAGE_SIZE:
            raise ValueError(f"size of guest memory: {size!r}, expected {expected}")
        self._mapping = reserve(self.size)
        self._words = np.frombuffer(self._mapping, np.uint64)
        self._halves = self._words.view(np.uint32)
        self.slots = [(0, self.size, "ram")]

    @property
    def words(self) -> np.ndarray:
        """The memory itself; write into it, it cannot be replaced."""
        return self._words

    @words.setter
    def words(self, words: np.ndarray) -> None:
        if words is not self._words:  # `ram.words |= ...` assigns the array to itself
            raise ValueError("ram.words cannot be replaced; write into it: ram.words[:] = ...")

    @property
    def slots(self) -> list[Slot]:
        """The memslots and device ranges, sorted by address."""
        return list(self._slots)

    @slots.setter
    def slots(self, slots: Iterable[Slot]) -> None:
        self._slots = check_slots(slots, self.size)
        memory = sorted((s for s in self._slots if s[2] != "device"), key=lambda s: s[0] - s[1])
        rows = np.zeros(max(1, len(memory)), SLOT)  # without any slot: one row that holds no address
        for row, (start, end, kind) in zip(rows, memory, strict=False):
            row["start"], row["end"], row["kind"] = start, end, SlotKind[kind.upper()]
        self.state = MemoryState(self._words, self._halves, rows, np.int64(rows[0]["start"]), rows[0]["end"] - rows[0]["start"])

    def clear(self, start: int, end: int) -> None:
        """Make the pages of [start, end), bytes, zeros that cost no memory."""
        self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def advise_huge(self, start: int, end: int) -> None:
        """Ask the host for huge pages under [start, end), bytes: fewer misses of the host's own TLB over large tables."""
        self._mapping.madvise(mmap.MADV_HUGEPAGE, start, end - start)


@kernel
def find_slot(slots, gpa):
    """Index of the memory slot that holds byte address `gpa`, or NO_SLOT. The largest slot, which holds nearly all, is first."""
    for i in range(len(slots)):
        if slots[i]["start"] <= gpa and gpa < slots[i]["end"]:
            return i
    return NO_SLOT
