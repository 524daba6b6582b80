"""The second pass of an import: the machine is laid out, and the replay file streamed to its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastmmu.bits import PAGE_OFFSET, PAGE_SHIFT, WORDS_PER_PAGE
from fastmmu.importers.collect import Collector
from fastmmu.importers.layout import Layout, Range, lay_out
from fastmmu.importers.rows import FETCH, READ, WRITE, Mappings
from fastmmu.importers.spool import NpzWriter
from fastmmu.trace.npz import TraceError
from fastmmu.trace.replay_file import EVENT_INVLPG, RECORD_COLUMNS


@dataclass
class Report:
    """What an import came to; `skipped` counts what was left out, by kind, `notes` say what was assumed."""

    format: str
    source: str
    output: str
    lines: int = 0
    records: int = 0
    accesses: int = 0
    reads: int = 0
    writes: int = 0
    fetches: int = 0
    device_records: int = 0
    pages: int = 0
    large_pages: int = 0
    remapped: int = 0
    tables: int = 0
    paging_levels: int = 4
    built: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Extra:
    """What an input with addresses of its own knows of its machine: memslots and device ranges, flushes and CR3 loads."""

    memory: tuple[list[Range], list[Range]] | None = None
    event_record: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    event_type: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))


NOTHING_MORE = Extra()
BYTES = sum(np.dtype(dtype).itemsize for dtype in RECORD_COLUMNS.values())  # of a record


def write_replay(
    file: IO[bytes],
    collector: Collector,
    report: Report,
    *,
    large: bool,
    absent: int,
    extra: Extra = NOTHING_MORE,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Write the collected records with page tables made for them; fill in the report, tell of bytes written, and of all.

    Raises:
        TraceError: there is no record, or the machine does not fit.
    """
    if not collector.spool.length:
        raise TraceError(f"{report.source}: no record, expected at least one")
    used = int(collector.mappings.used[0])
    mappings = Mappings(*(column[:used] for column in collector.mappings[:5]), *collector.mappings[5:])
    try:
        layout = lay_out(mappings, collector.levels, large=large, absent=absent, memory=extra.memory)
    except TraceError as error:
        raise TraceError(f"{report.source}: {error}") from None
    report.records, report.accesses = collector.spool.length, collector.accesses
    describe(report, layout, mappings)
    with NpzWriter(file) as writer:
        for name, dtype in RECORD_COLUMNS.items():
            parts = record_column(name, collector, layout, report)
            writer.column(name, dtype, report.records, told(parts, lambda size: progress(size, report.records * BYTES)))
        for name, column in layout.stores.items():
            writer.array(name, column)
        for name, column in events(layout, extra).items():
            writer.array(name, column)
        writer.array("start_gfn", np.array([layout.root >> 12], np.uint64))
        writer.array("start_level", np.array([layout.levels], np.uint8))
        writer.array("start_words", np.zeros((1, WORDS_PER_PAGE), np.uint64))
        writer.array("meta", np.array(json.dumps(meta_of(layout, report))))


def told(parts: Iterator[np.ndarray], advance: Callable[[int], object]) -> Iterator[np.ndarray]:
    """The parts of a column, each of which is told of, by its bytes, once it is written."""
    for part in parts:
        yield part
        advance(part.nbytes)


def record_column(name: str, collector: Collector, layout: Layout, report: Report) -> Iterator[np.ndarray]:
    """A column of all records, piece by piece."""
    by_mapping = {"level": layout.level, "prot": layout.prot, "io": layout.device.astype(np.uint8)}
    columns = {"gpa": ("gva", "mapping")}.get(name, ("mapping",) if name in by_mapping else (name,))
    for piece in collector.spool.pieces(columns):
        if name == "gpa":
            yield layout.frame[piece["mapping"]] << PAGE_SHIFT | piece["gva"] & PAGE_OFFSET
        elif name in by_mapping:
            part = by_mapping[name][piece["mapping"]]
            report.device_records += int(part.sum()) if name == "io" else 0
            yield part
        else:
            if name == "kind":
                kinds = np.bincount(piece["kind"], minlength=3)
                report.reads, report.writes = report.reads + int(kinds[READ]), report.writes + int(kinds[WRITE])
                report.fetches += int(kinds[FETCH])
            yield piece[name]


def events(layout: Layout, extra: Extra) -> dict[str, np.ndarray]:
    """Flushes: those of the input, and one for each page that was mapped elsewhere. A CR3 load loads the root that is built."""
    record = np.concatenate([extra.event_record, layout.flushed.astype(np.uint32)])
    kind = np.concatenate([extra.event_type, np.full(len(layout.flushed), EVENT_INVLPG, np.uint16)])
    order = np.argsort(record, kind="stable")
    return {
        "event_record": record[order],
        "event_type": kind[order],
        "event_cr3": np.full(len(order), layout.root, np.uint64),
    }


def describe(report: Report, layout: Layout, mappings: Mappings) -> None:
    """Counts of pages and tables, and how they were made."""
    leaves = layout.stores["pt_level"]
    report.pages = len(np.unique(mappings.gva))
    report.large_pages = int((layout.stores["pt_value"][leaves == 2] >> np.uint64(7) & np.uint64(1)).sum())
    report.remapped = len(layout.flushed)
    report.tables, report.paging_levels = layout.tables, layout.levels
    size = f"2 MiB pages where contiguous ({report.large_pages:,}), else 4 KiB" if report.large_pages else "4 KiB pages"
    report.built = f"page tables are built, not recorded: {layout.levels} levels, first touch, {size}"


def meta_of(layout: Layout, report: Report) -> dict[str, Any]:
    """The column `meta`."""
    return {
        "name": Path(report.output).stem,
        "workload": f"imported from {Path(report.source).name} ({report.format}); {report.built}",
        "memslots": [list(one) for one in layout.memslots],
        "mmio_ranges": [list(one) for one in layout.mmio_ranges],
        "paging_levels": layout.levels,
        "cr3_start": layout.root,
        "import": {**asdict(report), "source": Path(report.source).name, "output": Path(report.output).name},
    }
