"""Page tables as an operating system makes them: a page is mapped right before its first touch, a table made when it is needed."""

from __future__ import annotations

import numpy as np

from fastmmu.bits import GPTE64, PAGE_SHIFT
from fastmmu.importers.rows import FLAG
from fastmmu.trace.replay_file import FLAG_STORE

PROT_USER, PROT_WRITE, PROT_NX = 1, 2, 4
POINTER = GPTE64.P | GPTE64.W | GPTE64.U | GPTE64.A
INDEX = np.uint64(511)
NOTHING = np.uint64(0)


def prot_of(flags: np.ndarray) -> np.ndarray:
    """The column `prot`: what was done with a page, it may be; what was not, it may not."""
    prot = np.where(flags & np.uint8(FLAG.USER), PROT_USER, 0)
    prot |= np.where(flags & np.uint8(FLAG.WRITE), PROT_WRITE, 0)
    return (prot | np.where(flags & np.uint8(FLAG.FETCH), 0, PROT_NX)).astype(np.uint8)


def leaf_bits(flags: np.ndarray, level: np.ndarray) -> np.ndarray:
    """A leaf entry without its address; A and D are set, as Linux does for pages of a process."""
    bits = np.full(len(flags), GPTE64.P | GPTE64.A, np.uint64)
    bits |= np.where(flags & np.uint8(FLAG.USER), GPTE64.U, NOTHING)
    bits |= np.where(flags & np.uint8(FLAG.WRITE), GPTE64.W | GPTE64.D, NOTHING)
    bits |= np.where(flags & np.uint8(FLAG.FETCH), NOTHING, GPTE64.NX)
    return bits | np.where(level == 2, GPTE64.PS, NOTHING)


class Tree:
    """The tables for some pages, given in order of first touch; a page may come again, with another frame.

    Attributes:
        tables: how many there are, the root among them; they lie in the frames from `start` on, in order of need, the root first.
    """

    def __init__(self, pages: np.ndarray, level: np.ndarray, first: np.ndarray, levels: int, start: int) -> None:
        """Args: page numbers of 4 KiB, levels of their leaf entries (1 or 2), the record that needs each, levels of tables."""
        self._pages = pages & np.uint64((1 << 9 * levels) - 1)
        self._level, self._first, self._levels = level, first, levels
        needs: list[np.ndarray] = []
        places: list[np.ndarray] = []
        self._keys: dict[int, np.ndarray] = {levels: np.zeros(1, np.uint64)}
        for table in range(levels - 1, 0, -1):
            below = np.flatnonzero(level <= table)
            keys, index = np.unique(self._pages[below] >> np.uint64(9 * table), return_index=True)
            self._keys[table] = keys
            needs.append(below[index])
            places.append(np.full(len(keys), table))
        need, of_level = np.concatenate(needs), np.concatenate(places)
        order = np.lexsort((-of_level, need))
        frames = np.empty(len(need), np.uint64)
        frames[order] = start + 1 + np.arange(len(need), dtype=np.uint64)
        self._frames = {levels: np.array([start], np.uint64)}
        for table in range(levels - 1, 0, -1):
            self._frames[table] = frames[of_level == table]
        self._need = dict(zip(range(levels - 1, 0, -1), needs, strict=True))
        self.tables = 1 + len(need)

    def _entry(self, level: int, key: np.ndarray) -> np.ndarray:
        """Where the entry of `level` that covers each address stands, gpa; `key` is the address without what lies below."""
        above = np.zeros(len(key), np.uint64) if level == self._levels else key >> np.uint64(9)
        table = self._frames[level][np.searchsorted(self._keys[level], above)]
        return (table << PAGE_SHIFT) + np.uint64(8) * (key & INDEX)

    def stores(self, frame: np.ndarray, flags: np.ndarray) -> dict[str, np.ndarray]:
        """All stores to tables in order, as columns of the replay format. `frame` and `flags` (see `Flag`) belong to the pages."""
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        for table in range(self._levels - 1, 0, -1):
            need, keys = self._need[table], self._keys[table]
            value = self._frames[table] << PAGE_SHIFT | POINTER
            parts.append((need, self._entry(table + 1, keys), value, np.full(len(keys), table + 1, np.uint8)))
        value = leaf_bits(flags, self._level)
        for level in (1, 2):
            rows = np.flatnonzero(self._level == level)
            address = np.where(level == 2, frame[rows] & ~INDEX, frame[rows]) << PAGE_SHIFT
            where = self._entry(level, self._pages[rows] >> np.uint64(9 * (level - 1))) if len(rows) else address
            parts.append((rows, where, address | value[rows], np.full(len(rows), level, np.uint8)))
        need, gpa, values, levels = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((-levels.astype(np.int8), need))
        return {
            "pt_record": self._first[need[order]].astype(np.uint32),
            "pt_gpa": gpa[order],
            "pt_value": values[order],
            "pt_level": levels[order],
            "pt_flag": np.full(len(order), FLAG_STORE, np.uint8),
        }
