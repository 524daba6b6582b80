"""The first pass of an import: rows in, records in files and mappings in memory out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastmmu.importers.gather import gather, rehash, settle_all
from fastmmu.importers.rows import KINDS, MOST, SETS, UNKNOWN, WAYS, Made, Mappings, Records, Rows, Rule, Slots, make_rows
from fastmmu.importers.spool import Spool
from fastmmu.trace.npz import TraceError

FIRST_ROOM = 1 << 12  # mappings
SPOOLED = {"gva": "u8", "kind": "u1", "size": "u1", "count": "u4", "mapping": "u4"}


def make_slots(rule: Rule) -> Slots:
    """Empty slots for a rule."""
    sets, ways = (SETS * KINDS, WAYS) if rule == Rule.TLB else (2, 1)
    empty = [np.full(sets * ways, UNKNOWN, np.uint64) for _ in range(4)]
    return Slots(*empty, np.zeros(sets, np.uint64))


def make_mappings(room: int) -> Mappings:
    """Room for so many mappings, a power of two."""
    words = [np.zeros(room, np.uint64) for _ in range(3)]
    table = np.zeros(4 * room, np.uint32)
    return Mappings(*words, np.zeros(room, np.uint32), np.zeros(room, np.uint8), table, np.zeros(1, np.uint64))


class Collector:
    """Records and mappings of all rows so far.

    Attributes:
        spool: records, see SPOOLED.
        mappings: see `Mappings`; entries beyond `used` mean nothing.
        accesses: what the records stand for.
        rows: how many were taken.
    """

    def __init__(self, folder: Path, rule: Rule) -> None:
        self.rule = rule
        self.spool = Spool(folder, SPOOLED)
        self.mappings = make_mappings(FIRST_ROOM)
        self._slots = make_slots(rule)
        self._out = self._room(0)
        self.rows = 0

    def _room(self, rows: int) -> Records:
        """Room for the records of so many rows, each of which may be two."""
        late = len(self._slots.key)
        room = [np.zeros(2 * rows, SPOOLED[name]) for name in ("gva", "kind", "size", "count", "mapping")]
        return Records(*room, np.zeros(late, np.uint64), np.zeros(late, np.uint64), np.zeros(len(Made), np.uint64))

    def close(self) -> None:
        """Give the files back."""
        self.spool.close()

    @property
    def accesses(self) -> int:
        """Accesses so far, of which one over two pages counts twice."""
        return int(self._out.made[Made.ACCESSES])

    @property
    def levels(self) -> int:
        """Levels of page tables that the addresses need."""
        return 5 if self._out.made[Made.WIDE] else 4

    def take(self, rows: Rows, length: int) -> None:
        """Add the first `length` rows.

        Raises:
            TraceError: more records than the format can number.
        """
        if 2 * length > len(self._out.gva):
            made = self._out.made
            self._out = self._room(length)._replace(made=made)
        out, base, start = self._out, np.uint64(self.spool.length), 0
        out.made[Made.RECORDS] = out.made[Made.LATE] = 0
        while True:
            start = gather(rows, start, length, self.mappings, self._slots, out, self.rule, base)
            if start == length:
                break
            self.grow()
        if self.rule != Rule.NONE:
            settle_all(self._slots, out, base)
        made, late = int(out.made[Made.RECORDS]), int(out.made[Made.LATE])
        if self.spool.length + made > MOST:
            raise TraceError(f"more than {MOST:,} records, expected fewer: --merge tlb makes them so")
        self.spool.append({name: getattr(out, name)[:made] for name in SPOOLED})
        self.spool.put("count", out.late_record[:late], out.late_total[:late])
        self.rows += length

    def grow(self) -> None:
        """Twice the room for mappings."""
        old, used = self.mappings, int(self.mappings.used[0])
        new = make_mappings(2 * len(old.gva))
        for name in ("gva", "gpa", "first", "before", "flags"):
            getattr(new, name)[:used] = getattr(old, name)[:used]
        new.used[0] = used
        rehash(new)
        self.mappings = new

    def warm(self) -> None:
        """Compile, or load, the kernels of this pass."""
        rows = make_rows(1)
        gather(rows, 0, 0, self.mappings, self._slots, self._out, self.rule, np.uint64(0))
        settle_all(self._slots, self._out, np.uint64(0))
        rehash(self.mappings)
