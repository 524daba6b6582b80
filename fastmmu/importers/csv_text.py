"""Accesses as comma-separated values: a header line that names the columns, one access a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fastmmu.bits import PAGE_SIZE
from fastmmu.importers.block import HIGHEST_GPA, NO_ADDRESS, Block, canonical
from fastmmu.importers.rows import FETCH, FLAG, MOST, READ, WRITE, Rows
from fastmmu.importers.source import Source

NEEDED = ("gva", "kind")
COLUMNS = ("gva", "kind", "size", "gpa", "io", "count")
KINDS = {"r": READ, "w": WRITE, "x": FETCH, "0": READ, "1": WRITE, "2": FETCH}
HEADER = "a header line: gva,kind and any of size,gpa,io,count"
USER_HALF = 1 << 47


def number_of(text: str, default: int) -> int:
    """A number: 0x and hexadecimal, or decimal; `default` where there is none.

    Raises:
        ValueError: it is no number.
    """
    if not text:
        return default
    if not text.isascii() or "_" in text or text[0] in "+-":
        raise ValueError(text)
    return int(text, 16) if text[:2] in ("0x", "0X") else int(text)


class CsvReader:
    """A reader of such text; `skipped` counts lines without an access."""

    def __init__(self, source: Source, take: Callable[[Rows, int], object]) -> None:
        self._source = source
        self._block = Block(take)
        self._names: list[str] = []
        self._io_of: dict[tuple[bool, int], tuple[int, int]] = {}  # by page of the gpa, or of the gva: io, and which line said so
        self.skipped: Counter[str] = Counter()

    def read(self) -> None:
        """Read it all.

        Raises:
            TraceError: FILE:LINE: what was expected.
        """
        for chunk in self._source.chunks():
            lines = chunk.split(b"\n")[:-1]
            for number, line in enumerate(lines, self._source.line):
                text = line.strip()
                if not text or text[:1] == b"#":
                    self.skipped["comments" if text else "blank lines"] += 1
                elif not self._names:
                    self._head(number, line)
                else:
                    self._row(number, line)
            self._source.line += len(lines)
        if not self._names:
            self._source.fail_line(self._source.line, b"", HEADER)
        self._block.flush()

    def _head(self, number: int, line: bytes) -> None:
        names = [name.strip().lower() for name in line.decode("utf-8-sig", "backslashreplace").split(",")]
        if any(names.count(name) != 1 for name in {*names, *NEEDED}) or not set(names) <= set(COLUMNS):
            self._source.fail_line(number, line, HEADER)
        self._names = names

    def _row(self, number: int, line: bytes) -> None:
        fields = line.decode("latin-1").split(",")
        if len(fields) != len(self._names):
            self._source.fail_line(number, line, f"{len(self._names)} fields: {','.join(self._names)}")
        row = dict(zip(self._names, (one.strip() for one in fields), strict=True))
        kind = KINDS.get(row["kind"].lower())
        if kind is None:
            self._source.fail_line(number, line, "a kind: r, w or x, or 0, 1 or 2")
        gva = self._number(number, line, row, "gva", -1, 0, (1 << 64) - 1)
        size = self._number(number, line, row, "size", 1, 1, PAGE_SIZE)
        gpa = self._number(number, line, row, "gpa", NO_ADDRESS, 0, HIGHEST_GPA - 1)
        count = self._number(number, line, row, "count", 1, 1, MOST)
        io = self._number(number, line, row, "io", 0, 0, 1)
        if not canonical(gva, size):
            self._source.fail_line(number, line, "a canonical gva")
        known = gpa != NO_ADDRESS
        if known and (gpa ^ gva) % PAGE_SIZE:
            self._source.fail_line(number, line, "gva and gpa with the same offset in their page")
        before, where = self._io_of.setdefault((known, (gpa if known else gva) // PAGE_SIZE), (io, number))
        if before != io:
            self._source.fail_line(number, line, f"io {before} for this page, as in line {where}")
        flags = int(FLAG.USER) * (gva < USER_HALF) | int(FLAG.DEVICE) * io
        self._block.add(gva, kind, size, gpa, flags, count)

    def _number(self, number: int, line: bytes, row: dict[str, str], name: str, default: int, low: int, high: int) -> int:
        """A field of a row, checked; `default` where the column or the field is empty."""
        try:
            value = number_of(row.get(name, ""), default)
        except ValueError:
            value = -1
        if (value != default and not low <= value <= high) or value < 0:
            shown = f"{low} to {high}" if high < 1 << 13 or name == "count" else f"{low:#x} to {high:#x}"
            self._source.fail_line(number, line, f"{name}: a number from {shown}, in decimal, or hexadecimal with 0x")
        return value
