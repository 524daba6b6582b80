"""Snapshots: the page tables of a guest at one moment, with its control registers. Format: `docs/snapshot-format.md`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmmu.bits import GPTE32, GPTE64, PAGE_SHIFT, PAGE_SIZE, PHYSICAL_LIMIT, WORDS_PER_PAGE
from fastmmu.memory import GuestMemory
from fastmmu.paging import Cpu, Mode
from fastmmu.trace.npz import MAXPHYADDR, SNAPSHOT, Reader, repeated


@dataclass(frozen=True)
class Snapshot:
    """Guest memory with the page tables in place, the registers, and all values of CR3 (`cpu` has the first, the active one)."""

    memory: GuestMemory
    cpu: Cpu
    cr3s: tuple[int, ...]


def load_snapshot(path: str | Path, *, cr3: int | None = None, maxphyaddr: int = MAXPHYADDR) -> Snapshot:
    """Read a snapshot; pages that it does not hold read as zeros, so that entries in them are not present.

    Args:
        path: the `.npz` file.
        cr3: a page-table root other than the active one.
        maxphyaddr: physical-address bits, which the file does not record.

    Raises:
        TraceError: one line naming the file, the column, the record and what was expected.

    Example:
        >>> from fastmmu import explain, load_snapshot
        >>> snapshot = load_snapshot("bench/traces/snapshot-linux-boot.npz")
        >>> print(explain(snapshot.memory, snapshot.cpu, 0xFFFFFFFF81000000).splitlines()[-1])
        => gpa 0x1000000, in a 2 MiB page; entries grant read, fetch; supervisor only
    """
    reader = Reader(Path(path), ("gfn", "words", "cr0", "cr3", "cr4", "efer"), SNAPSHOT)
    gfns, words = reader.array("gfn"), reader.array("words")
    if gfns.dtype != np.uint64 or gfns.ndim != 1 or not len(gfns):
        reader.fail(f"column gfn: {gfns.dtype} of shape {gfns.shape}, expected uint64, one for each table page")
    reader.fail_at("gfn", gfns >= np.uint64(PHYSICAL_LIMIT // PAGE_SIZE), gfns, "a guest frame number")
    reader.fail_at("gfn", repeated(gfns), gfns, "each page once")
    halves = words.dtype == np.uint32
    shape = (len(gfns), WORDS_PER_PAGE * 2 if halves else WORDS_PER_PAGE)
    if words.dtype not in (np.uint32, np.uint64) or words.shape != shape:
        reader.fail(f"column words: {words.dtype} of shape {words.shape}, expected uint64 of {shape}, or uint32 of twice the width")
    cr0, cr4, efer = (_register(reader, name) for name in ("cr0", "cr4", "efer"))
    cr3s = reader.array("cr3")
    if cr3s.dtype.kind not in "ui" or cr3s.ndim != 1 or not len(cr3s) or (cr3s.dtype.kind == "i" and cr3s.min() < 0):
        reader.fail(f"column cr3: {cr3s.dtype} of shape {cr3s.shape}, expected unsigned integers, the active one first")
    try:
        memory = GuestMemory((int(gfns.max()) + 1) << int(PAGE_SHIFT))
    except MemoryError as error:
        reader.fail(f"column gfn: {error}")
    memory.words.reshape(-1, WORDS_PER_PAGE)[gfns] = np.ascontiguousarray(words).view(np.uint64)
    try:
        cpu = Cpu(cr0=cr0, cr3=int(cr3s[0]) if cr3 is None else cr3, cr4=cr4, efer=efer, maxphyaddr=maxphyaddr)
    except ValueError as error:
        reader.fail(f"registers: {error}")
    root = cpu.cr3 & int(GPTE64.ADDR if cpu.mode in (Mode.LONG4, Mode.LONG5) else GPTE32.ADDR)
    if cpu.mode != Mode.NONE and root >> int(PAGE_SHIFT) not in gfns:
        where = "column cr3, record 0" if cr3 is None else "--cr3"
        reader.fail(f"{where}: {cpu.cr3:#x} is no page of the snapshot, expected one of {_roots(cr3s)}")
    return Snapshot(memory, cpu, tuple(int(value) for value in cr3s))


def _roots(cr3s: np.ndarray) -> str:
    return ", ".join(f"{int(value):#x}" for value in cr3s)


def _register(reader: Reader, name: str) -> int:
    column = reader.array(name)
    if column.dtype.kind not in "ui" or column.size != 1 or int(column.reshape(-1)[0]) < 0:
        reader.fail(f"column {name}: {column.dtype} of shape {column.shape}, expected one unsigned integer")
    return int(column.reshape(-1)[0])
