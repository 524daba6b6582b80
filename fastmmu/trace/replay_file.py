"""The `.npz` replay format: accesses of a real guest, its page tables at the start, and every later change to them.

Everything in a file is checked before a kernel sees it, because compiled code checks no bounds. The columns are described in
`docs/replay-format.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastmmu.bits import CR0, CR4, EFER, GPTE64, PAGE_SHIFT, PFERR, PHYSICAL_BITS, PHYSICAL_LIMIT, WORDS_PER_PAGE
from fastmmu.events import EVENT, Op
from fastmmu.memory import Slot, check_slots, reserve
from fastmmu.paging import Cpu
from fastmmu.trace.npz import MAXPHYADDR, REPLAY_FILE, Reader, repeated, within
from fastmmu.vm import Workload

RECORD_COLUMNS = {"gva": "u8", "gpa": "u8", "kind": "u1", "io": "u1", "count": "u4", "level": "u1", "prot": "u1", "size": "u1"}
EVENT_COLUMNS = {"event_record": "u4", "event_type": "u2", "event_cr3": "u8"}
STORE_COLUMNS = {"pt_record": "u4", "pt_gpa": "u8", "pt_value": "u8", "pt_level": "u1", "pt_flag": "u1"}
TABLE_COLUMNS = {"start_gfn": "u8", "start_level": "u1"}

COLUMNS = ("meta", "start_words", *RECORD_COLUMNS, *EVENT_COLUMNS, *STORE_COLUMNS, *TABLE_COLUMNS)

READ, WRITE, FETCH = range(3)
LARGEST_ACCESS = 12  # log2 of a page: no access is larger
LARGEST_SIZE = 128  # of an event: what is larger matters to nobody
PROT_USER = 1
EVENT_CR3, EVENT_INVLPG, EVENT_INVPCID = 1, 2, 3
FLAG_STORE, FLAG_LINKED, FLAG_RELEASED = range(3)

ACCESS_OF_KIND = np.array([0, PFERR.W, PFERR.F], np.uint8)


def _check_tables(reader: Reader, gfns: np.ndarray, levels: np.ndarray, words: np.ndarray, machine: _Machine) -> None:
    """Start tables lie in RAM, once each, and their pointers to lower tables lead into RAM."""
    if words.dtype != np.uint64 or words.shape != (len(gfns), WORDS_PER_PAGE):
        reader.fail(f"column start_words: {words.dtype} of shape {words.shape}, expected uint64 of ({len(gfns)}, {WORDS_PER_PAGE})")
    reader.fail_at("start_gfn", gfns >= np.uint64(1 << (PHYSICAL_BITS - 12)), gfns, "a guest frame number")
    reader.fail_at("start_gfn", ~within(gfns << PAGE_SHIFT, machine.ram), gfns, "a page in RAM")
    reader.fail_at("start_gfn", repeated(gfns), gfns, "each table once")
    reader.fail_at("start_level", (levels < 1) | (levels > machine.levels), levels, f"1 to {machine.levels}")
    rows, columns = np.nonzero(words)
    _check_pointers(
        reader,
        machine,
        gfns[rows],
        levels[rows],
        words[rows, columns],
        lambda i: f"start_words, record {rows[i]}, entry {columns[i]}",
    )


def _check_pointers(
    reader: Reader, machine: _Machine, gfns: np.ndarray, levels: np.ndarray, gptes: np.ndarray, where: Callable[[int], str]
) -> None:
    """Present entries that point to a table lead into RAM, and not to their own table (at `gfns`)."""
    targets = gptes & GPTE64.ADDR
    to_itself = targets >> PAGE_SHIFT == gfns
    pointers = (gptes & GPTE64.P != 0) & (gptes & GPTE64.PS == 0) & (levels > 1)
    bad = np.flatnonzero(pointers & (to_itself | ~within(targets, machine.ram)))
    if len(bad):
        first = int(bad[0])
        what = "the table itself" if to_itself[first] else machine.describe(targets[first : first + 1])
        expected = f"expected a table of level {int(levels[first]) - 1} in RAM"
        reader.fail(f"column {where(first)}: points to {int(targets[first]):#x}, {what}; {expected}")


class _Machine:
    """Address ranges and paging depth of the recorded machine, from `meta`."""

    def __init__(self, reader: Reader, meta: dict[str, Any]) -> None:
        self.devices = reader.meta_ranges(meta, "mmio_ranges")
        memory = reader.meta_ranges(meta, "memslots")
        try:
            self.memory: list[Slot] = check_slots(memory, PHYSICAL_LIMIT)
        except ValueError as error:
            reader.fail(f"column meta: memslots: {error}")
        if any(kind == "device" for _, _, kind in self.memory) or not self.memory:
            reader.fail("column meta: memslots: expected at least one range, of kind ram or rom")
        for start, end, name in self.devices:
            for slot in self.memory:
                if start < slot[1] and slot[0] < end:
                    reader.fail(
                        f"column meta: mmio_ranges: {name} [{start:#x}, {end:#x}) overlaps memslot {slot}, expected none to"
                    )
        try:
            reserve(max(end for _, end, _ in self.memory)).close()
        except MemoryError as error:
            reader.fail(f"column meta: memslots: {error}")
        self.ram = [slot for slot in self.memory if slot[2] == "ram"]
        self.levels = reader.meta_int(meta, "paging_levels")
        if self.levels not in (4, 5):
            reader.fail(f"column meta: paging_levels is {self.levels}, expected 4 or 5")
        self.cr3 = reader.meta_int(meta, "cr3_start")

    def describe(self, address: np.ndarray) -> str:
        """In words, where the one address in a uint64[1] lies."""
        for start, end, name in self.devices:
            if within(address, [(start, end, name)])[0]:
                return f"in device range {name}"
        if within(address, self.memory)[0]:
            return "in ROM"
        return "outside every slot and device range"


def load_replay(path: str | Path, records: int | None = None) -> Workload:
    """Read a replay file; `records` cuts it to its first records.

    Returns:
        The workload: registers CR0.WP=1, EFER.NX=1, SMEP=SMAP=PKE=0, levels from `meta`; one ACCESS or DEVICE event per record
        (USER exactly where `prot` bit 0 is set), stores to page tables, CR3 loads and flushes before the record they belong to.

    Raises:
        TraceError: one line naming the file, the column, the record and what was expected.

    Example:
        >>> from fastmmu import load_replay
        >>> workload = load_replay("bench/traces/excerpt-replay-linux-boot-long.npz", records=2000)
        >>> workload.cpu.mode.name, workload.slots[0]
        ('LONG4', ...)
    """
    reader = Reader(Path(path), COLUMNS, REPLAY_FILE)
    meta = reader.meta()
    machine = _Machine(reader, meta)
    record, store, event = (reader.group(group) for group in (RECORD_COLUMNS, STORE_COLUMNS, EVENT_COLUMNS))
    tables = reader.group(TABLE_COLUMNS)
    words = reader.array("start_words")
    _check_tables(reader, tables["start_gfn"], tables["start_level"], words, machine)
    _check_records(reader, record, machine)
    _check_stores(reader, store, machine, len(record["gva"]))
    _check_events(reader, event, machine, len(record["gva"]))
    if not within(np.array([machine.cr3], np.uint64) & GPTE64.ADDR, machine.memory)[0]:
        reader.fail(f"column meta: cr3_start {machine.cr3:#x} lies outside memory, expected a table in RAM")

    length = len(record["gva"]) if records is None else min(records, len(record["gva"]))
    if length < len(record["gva"]):
        store = {name: column[store["pt_record"] < length] for name, column in store.items()}
        event = {name: column[event["event_record"] < length] for name, column in event.items()}
    record = {name: column[:length] for name, column in record.items()}

    contents = {int(gfn): page for gfn, page in zip(tables["start_gfn"], words, strict=True)}
    for gfn in np.unique(store["pt_gpa"] >> PAGE_SHIFT):
        contents.setdefault(int(gfn), np.zeros(WORDS_PER_PAGE, np.uint64))
    la57 = CR4.LA57 if machine.levels == 5 else 0
    cpu = Cpu(
        cr0=int(CR0.PE | CR0.WP | CR0.PG),
        cr3=machine.cr3,
        cr4=int(CR4.PAE) | int(la57),
        efer=int(EFER.LME | EFER.LMA | EFER.NX),
        maxphyaddr=MAXPHYADDR,
    )
    return Workload(
        name=str(meta.get("name", Path(path).stem)),
        cpu=cpu,
        slots=machine.memory,
        tables=contents,
        events=_merge(record, store, event),
        summary=str(meta.get("workload", "")),
        source=Path(path).name,
    )


def check_values(reader: Reader, record: dict[str, np.ndarray]) -> None:
    """There are records, and their small columns hold what the format knows.

    Raises:
        TraceError: they do not.
    """
    if not len(record["gva"]):
        reader.fail("column gva: no record, expected at least one")
    reader.fail_at("kind", record["kind"] > FETCH, record["kind"], "0 read, 1 write or 2 fetch")
    reader.fail_at("io", record["io"] > 1, record["io"], "0 or 1")
    reader.fail_at("prot", record["prot"] > 15, record["prot"], "a sum of 1, 2, 4 and 8")
    reader.fail_at("level", (record["level"] < 1) | (record["level"] > 3), record["level"], "1, 2 or 3")
    reader.fail_at("size", record["size"] > LARGEST_ACCESS, record["size"], f"at most {LARGEST_ACCESS}, the log2 of the bytes")
    reader.fail_at("count", record["count"] == 0, record["count"], "at least 1")


def _check_records(reader: Reader, record: dict[str, np.ndarray], machine: _Machine) -> None:
    check_values(reader, record)
    gva, gpa, io = record["gva"], record["gpa"], record["io"]
    unused = np.uint64(64 - 12 - 9 * machine.levels)
    sign_extended = ((gva << unused).view(np.int64) >> unused.astype(np.int64)).view(np.uint64)
    reader.fail_at("gva", sign_extended != gva, gva, f"a canonical address of {machine.levels}-level paging")
    in_memory, in_device = within(gpa, machine.memory), within(gpa, machine.devices)
    reader.fail_at("gpa", ~in_memory & ~in_device, gpa, "an address in a memslot or device range")
    reader.fail_at("gpa", (io == 1) & ~in_device, gpa, "an address in a device range, because io is 1")
    reader.fail_at("gpa", (io == 0) & ~in_memory, gpa, "an address in a memslot, because io is 0")


def _check_stores(reader: Reader, store: dict[str, np.ndarray], machine: _Machine, records: int) -> None:
    gpa = store["pt_gpa"]
    reader.fail_at("pt_record", store["pt_record"] > records, store["pt_record"], f"at most {records}, the number of records")
    _check_ascending(reader, "pt_record", store["pt_record"])
    reader.fail_at("pt_flag", store["pt_flag"] > FLAG_RELEASED, store["pt_flag"], "0, 1 or 2")
    reader.fail_at("pt_gpa", gpa & np.uint64(7) != 0, gpa, "a multiple of 8")
    reader.fail_at("pt_gpa", ~within(gpa, machine.ram), gpa, "an address in RAM")
    levels = store["pt_level"]
    reader.fail_at("pt_level", (levels < 1) | (levels > machine.levels), levels, f"1 to {machine.levels}")
    linked = np.where(store["pt_flag"] == FLAG_RELEASED, np.uint64(0), store["pt_value"])
    _check_pointers(reader, machine, gpa >> PAGE_SHIFT, levels, linked, lambda i: f"pt_value, record {i}")


def _check_events(reader: Reader, event: dict[str, np.ndarray], machine: _Machine, records: int) -> None:
    kind, cr3 = event["event_type"], event["event_cr3"]
    before = event["event_record"]
    reader.fail_at("event_record", before > records, before, f"at most {records}, the number of records")
    _check_ascending(reader, "event_record", before)
    reader.fail_at("event_type", (kind < EVENT_CR3) | (kind > EVENT_INVPCID), kind, "1 CR3 load, 2 INVLPG or 3 INVPCID")
    outside = (kind == EVENT_CR3) & ~within(cr3 & GPTE64.ADDR, machine.memory)
    reader.fail_at("event_cr3", outside, cr3, "a table in RAM, but it lies outside memory")


def _check_ascending(reader: Reader, name: str, column: np.ndarray) -> None:
    falling = np.zeros(len(column), bool)
    falling[1:] = column[1:] < column[:-1]
    reader.fail_at(name, falling, column, "ascending record numbers")


def _merge(record: dict[str, np.ndarray], store: dict[str, np.ndarray], event: dict[str, np.ndarray]) -> np.ndarray:
    """One stream: before each record its stores, then its CR3 loads and flushes (a flush follows the store it is for)."""
    kept = store["pt_flag"] != FLAG_RELEASED  # a released table is no store
    stores = np.zeros(int(kept.sum()), EVENT)
    stores["op"] = Op.STORE
    stores["record"], stores["address"], stores["value"] = (store[name][kept] for name in ("pt_record", "pt_gpa", "pt_value"))

    flushes = np.zeros(len(event["event_type"]), EVENT)
    loads = event["event_type"] == EVENT_CR3
    flushes["op"] = np.where(loads, Op.CR3, Op.FLUSH)
    flushes["record"] = event["event_record"]
    flushes["value"] = np.where(loads, event["event_cr3"], 0)

    accesses = np.zeros(len(record["gva"]), EVENT)
    accesses["op"] = np.where(record["io"] == 1, Op.DEVICE, Op.ACCESS)
    accesses["access"] = ACCESS_OF_KIND[record["kind"]] | np.where(record["prot"] & PROT_USER, np.uint8(PFERR.U), np.uint8(0))
    accesses["checked"] = 1
    accesses["size"] = np.minimum(1 << record["size"].astype(np.uint16), LARGEST_SIZE)
    accesses["record"] = np.arange(len(accesses))
    accesses["address"], accesses["value"] = record["gva"], record["gpa"]

    parts = [stores, flushes, accesses]
    merged = np.concatenate(parts)
    rank = np.concatenate([np.full(len(part), rank, np.uint8) for rank, part in enumerate(parts)])
    return merged[np.lexsort((rank, merged["record"]))]
