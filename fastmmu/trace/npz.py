"""Reading `.npz` files of others: columns by name, and the one way to complain about them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fastmmu.bits import PHYSICAL_LIMIT

# Neither replay files nor snapshots record MAXPHYADDR. This is the recording processor's: an emulated one with 40 address bits
# and 1 GiB pages.
MAXPHYADDR = 40

REPLAY_FILE, SNAPSHOT = "replay file", "snapshot"
KINDS = {REPLAY_FILE: ("start_words", "docs/replay-format.md"), SNAPSHOT: ("words", "docs/snapshot-format.md")}
"""Kinds of files: a column that no other kind has, and where they are described."""


class TraceError(ValueError):
    """A file that cannot be replayed; the message is one line: file, column, record, what was expected."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    return (str(error) or type(error).__name__).splitlines()[0]


class Reader:
    """One file being read: columns by name, and the one way to complain; `kind` is one of KINDS."""

    def __init__(self, path: Path, wanted: Iterable[str], kind: str) -> None:
        self.path = path
        self._columns: dict[str, np.ndarray] = {}
        if path.exists() and not path.is_file():
            self.fail("is no regular file; expected an .npz file")
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
            with np.load(path, allow_pickle=False) as columns:
                for name in wanted:
                    if name not in names:
                        self._lacks(name, names, kind)
                    self._columns[name] = self._read(columns, name)
        except FileNotFoundError:
            self.fail("No such file; expected an .npz file")
        except PermissionError:
            self.fail("cannot be read: permission denied")
        except TraceError:
            raise
        except Exception as error:  # the zip and array readers raise a dozen kinds for damaged input
            self.fail(f"not an .npz file, or a damaged one ({first_line(error)})")

    def _lacks(self, name: str, names: list[str], kind: str) -> NoReturn:
        """A column is missing: in a file of another kind that says more than the column's name."""
        mark, page = KINDS[kind]
        for other, (its, _) in KINDS.items():
            if its in names and mark not in names:
                self.fail(f"is a {other}, expected a {kind} ({page})")
        self.fail(f"column {name} is missing")

    def _read(self, columns: Any, name: str) -> np.ndarray:
        try:
            column = columns[name]
        except Exception as error:
            self.fail(f"column {name}: cannot be read ({first_line(error)}); expected an array without pickles")
        if not isinstance(column, np.ndarray):  # the reader gives the bytes of what has not an array's mark
            self.fail(f"column {name}: no array, expected one without pickles")
        return column

    def fail(self, message: str) -> NoReturn:
        raise TraceError(" ".join(f"{self.path}: {message}".splitlines()))

    def fail_at(self, column: str, bad: np.ndarray, values: np.ndarray, expected: str) -> None:
        """Complain about the first True of `bad`, if there is one."""
        where = np.flatnonzero(bad)
        if len(where):
            row = int(where[0])
            value = int(values[row])
            shown = f"{value:#x}" if values.dtype == np.uint64 else f"{value}"
            self.fail(f"column {column}, record {row}: {shown}, expected {expected}")

    def array(self, name: str) -> np.ndarray:
        return self._columns[name]

    def group(self, dtypes: dict[str, str]) -> dict[str, np.ndarray]:
        """Columns of one length, each one-dimensional and of its dtype."""
        group: dict[str, np.ndarray] = {}
        length, first = None, ""
        for name, dtype in dtypes.items():
            column = self.array(name)
            if column.dtype != np.dtype(dtype):
                self.fail(f"column {name}: dtype {column.dtype}, expected {np.dtype(dtype)}")
            if column.ndim != 1:
                self.fail(f"column {name}: shape {column.shape}, expected one dimension")
            if length is None:
                length, first = len(column), name
            if len(column) != length:
                self.fail(f"column {name}: length {len(column)}, expected {length} as in column {first}")
            group[name] = column
        return group

    def meta(self) -> dict[str, Any]:
        """The description: JSON text in a zero-dimensional array."""
        column = self.array("meta")
        if column.dtype.kind != "U" or column.ndim != 0:
            self.fail(f"column meta: dtype {column.dtype}, shape {column.shape}, expected one JSON text")
        try:
            meta = json.loads(str(column))
        except (ValueError, RecursionError) as error:
            self.fail(f"column meta: not JSON ({error})")
        if not isinstance(meta, dict):
            self.fail("column meta: expected a JSON object")
        return meta

    def meta_int(self, meta: dict[str, Any], key: str) -> int:
        value = meta.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
            self.fail(f"column meta: {key} is {value!r}, expected an unsigned 64-bit integer")
        return value

    def meta_ranges(self, meta: dict[str, Any], key: str) -> list[tuple[int, int, str]]:
        rows = meta.get(key)
        if not isinstance(rows, list):
            self.fail(f"column meta: {key} is {type(rows).__name__}, expected a list of [start, end, text]")
        for row in rows:
            good = isinstance(row, list) and len(row) == 3 and isinstance(row[2], str)
            if not good or not all(type(n) is int for n in row[:2]) or not 0 <= row[0] < row[1] <= PHYSICAL_LIMIT:
                self.fail(f"column meta: {key} holds {row!r}, expected [start, end, text] with start < end")
        return [tuple(row) for row in rows]


def within(addresses: np.ndarray, ranges: list[tuple[int, int, str]]) -> np.ndarray:
    """Which byte addresses (uint64) lie in one of the ranges."""
    inside = np.zeros(len(addresses), bool)
    for start, end, _ in ranges:
        inside |= (addresses >= np.uint64(start)) & (addresses < np.uint64(end))
    return inside


def repeated(values: np.ndarray) -> np.ndarray:
    """Which elements stand in the column a second time."""
    order = np.argsort(values, kind="stable")
    again = np.zeros(len(values), bool)
    again[order[1:]] = values[order][1:] == values[order][:-1]
    return again
