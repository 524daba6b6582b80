"""Rows filled one by one, by the parsers that are written in Python."""

from __future__ import annotations

from collections.abc import Callable

from fastmmu.importers.rows import UNKNOWN, Rows, make_rows
from fastmmu.trace.npz import MAXPHYADDR

BLOCK = 1 << 15
TOP = 1 << 56
NO_ADDRESS = int(UNKNOWN)
HIGHEST_GPA = 1 << MAXPHYADDR


def canonical(gva: int, size: int = 1) -> bool:
    """Whether all bytes of an access have canonical addresses of five-level paging, and the same sign."""
    return gva + size <= TOP or (1 << 64) - TOP <= gva <= (1 << 64) - size


class Block:
    """Rows that are handed on, `take(rows, how many)`, whenever there are enough."""

    def __init__(self, take: Callable[[Rows, int], object]) -> None:
        self._take = take
        self._rows = make_rows(BLOCK)
        self._length = 0

    def add(self, gva: int, kind: int, size: int, gpa: int, flags: int, count: int = 1) -> None:
        """One row; `gpa` may be NO_ADDRESS."""
        at, rows = self._length, self._rows
        rows.gva[at], rows.gpa[at], rows.size[at], rows.count[at] = gva, gpa, size, count
        rows.kind[at], rows.flags[at] = kind, flags
        self._length += 1
        if self._length == BLOCK:
            self.flush()

    def flush(self) -> None:
        """Hand on what is there."""
        self._take(self._rows, self._length)
        self._length = 0
