"""`.npz` recordings: replay files are checked and rewritten; records without page tables get tables."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from fastmmu.bits import PAGE_OFFSET, PAGE_SIZE
from fastmmu.importers.build import Extra, Report
from fastmmu.importers.layout import LIMIT, Range
from fastmmu.importers.rows import FLAG, Rows
from fastmmu.importers.spool import NpzWriter
from fastmmu.importers.tables import PROT_NX, PROT_USER, PROT_WRITE
from fastmmu.trace.npz import REPLAY_FILE, Reader, within
from fastmmu.trace.replay_file import (
    COLUMNS,
    EVENT_COLUMNS,
    EVENT_CR3,
    EVENT_INVPCID,
    RECORD_COLUMNS,
    STORE_COLUMNS,
    TABLE_COLUMNS,
    check_values,
    load_replay,
)

PIECE = 1 << 18


def column_names(path: Path) -> set[str]:
    """Columns of an `.npz`; none where it is no zip archive, which `Reader` will say."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # the zip reader raises a dozen kinds for damaged input
        return set()


def has_tables(path: Path) -> bool:
    """Whether a file says anything of page tables: then it is a replay file, and must be a whole one."""
    return bool(column_names(path) & {"start_words", *STORE_COLUMNS, *TABLE_COLUMNS})


def rewrite(path: Path, file: IO[bytes], report: Report) -> None:
    """Check a replay file and write its columns again, those of the format alone.

    Raises:
        TraceError: as `load_replay`.
    """
    workload = load_replay(path)
    reader = Reader(path, COLUMNS, REPLAY_FILE)
    with NpzWriter(file) as writer:
        for name in COLUMNS:
            writer.array(name, reader.array(name))
    record = reader.group(RECORD_COLUMNS)
    report.records, report.accesses = len(record["gva"]), int(record["count"].sum(dtype=np.uint64))
    report.reads, report.writes, report.fetches = np.bincount(record["kind"], minlength=3).tolist()
    report.device_records = int(record["io"].sum())
    report.pages = len(np.unique(record["gva"] >> np.uint64(12)))
    report.tables = len(workload.tables)
    report.paging_levels = reader.meta()["paging_levels"]
    report.built = "page tables are those of the recording"


def read_npz(path: Path, take: Callable[[Rows, int], object]) -> Extra:
    """Hand on the records of a file without page tables, each as a row; their count stands.

    Returns:
        What else it tells of its machine.

    Raises:
        TraceError: as `load_replay`.
    """
    names = column_names(path)
    more = [name for name in ("meta", *EVENT_COLUMNS) if name in names]
    reader = Reader(path, (*RECORD_COLUMNS, *more), REPLAY_FILE)
    record = reader.group(RECORD_COLUMNS)
    check_values(reader, record)
    gva, gpa = record["gva"], record["gpa"]
    top = (gva.view(np.int64) >> np.int64(56)).view(np.uint64)
    reader.fail_at("gva", (top != 0) & (~top != 0), gva, "a canonical address")
    reader.fail_at("gpa", gpa >= np.uint64(LIMIT), gpa, f"an address below {LIMIT:#x}")
    reader.fail_at("gpa", (gva ^ gpa) & PAGE_OFFSET != 0, gpa, "the same offset in its page as the gva")
    extra = Extra(memory_of(reader, record) if "meta" in more else None, *flushes_of(reader, names, len(gva)))
    prot = record["prot"]
    flags = np.where(prot & PROT_USER, np.uint8(FLAG.USER), 0) | np.where(prot & PROT_WRITE, np.uint8(FLAG.WRITE), 0)
    flags |= np.where(prot & PROT_NX, 0, np.uint8(FLAG.FETCH)) | np.where(record["io"], np.uint8(FLAG.DEVICE), 0)
    room = np.uint64(PAGE_SIZE) - (gva & PAGE_OFFSET)  # a record is of the page where it begins
    size = np.minimum(np.uint64(1) << record["size"].astype(np.uint64), room).astype(np.uint16)
    rows = Rows(gva, gpa, size, record["count"], record["kind"], flags.astype(np.uint8))
    for start in range(0, len(gva), PIECE):
        part = Rows(*(np.ascontiguousarray(column[start : start + PIECE]) for column in rows))
        take(part, len(part.gva))
    return extra


def memory_of(reader: Reader, record: dict[str, np.ndarray]) -> tuple[list[Range], list[Range]] | None:
    """Memslots and device ranges of `meta`, if it has them for the file as a whole and they hold all records."""
    meta = reader.meta()
    if not {"memslots", "mmio_ranges"} <= meta.keys():
        return None
    slots, devices = reader.meta_ranges(meta, "memslots"), reader.meta_ranges(meta, "mmio_ranges")
    device = record["io"] == 1
    inside = np.where(device, within(record["gpa"], devices), within(record["gpa"], slots))
    return (slots, devices) if inside.all() else None


def flushes_of(reader: Reader, names: set[str], records: int) -> tuple[np.ndarray, np.ndarray]:
    """CR3 loads and flushes, where the file has them: records and types."""
    if not names >= EVENT_COLUMNS.keys():
        return np.zeros(0, np.uint32), np.zeros(0, np.uint16)
    event = reader.group(EVENT_COLUMNS)
    before, kind = event["event_record"], event["event_type"]
    reader.fail_at("event_record", before > records, before, f"at most {records}, the number of records")
    falling = np.append(False, before[1:] < before[:-1])[: len(before)]
    reader.fail_at("event_record", falling, before, "ascending record numbers")
    reader.fail_at("event_type", (kind < EVENT_CR3) | (kind > EVENT_INVPCID), kind, "1 CR3 load, 2 INVLPG or 3 INVPCID")
    return before, kind
