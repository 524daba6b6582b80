"""The import-speed experiment: how fast is the text of a trace imported, against a plain Python loop over its lines?

Both read one file in valgrind's lackey form. The loop does the least that a reader in plain Python can: it takes each line apart
and appends kind, address and size to lists. The import does all of `fastmmu trace import`: it checks each line, makes records,
builds page tables and writes a compressed replay file.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyperf

from bench.experiment import Cell, Checked, CheckError, Context, Experiment, Timed, unavailable
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, nanoseconds, ratio_text, round_values
from fastmmu.importers.build import Report, write_replay
from fastmmu.importers.collect import Collector
from fastmmu.importers.lackey import read_lackey
from fastmmu.importers.rows import Rule
from fastmmu.importers.source import Source

NAME = "import-speed"
WORKLOADS = {"merged": Rule.CONSECUTIVE, "every-access": Rule.NONE}
STRATEGIES = ("loop", "import")
LINES = 1_000_000
CODE, DATA, STACK = 0x40_0000, 0x3000_0000, 0x1F_FE00_0000
FETCH, LOAD, STORE, MODIFY = range(4)
SHARES = (0.65, 0.22, 0.1, 0.03)  # of fetches, loads, stores, modifies: as valgrind tells of compiled programs


@lru_cache(maxsize=1)
def text() -> bytes:
    """A trace of LINES lines: code runs on within a page and then jumps, data is half on the stack and half anywhere in 16 MiB."""
    rng = np.random.default_rng(9)
    kinds = rng.choice(4, LINES, p=SHARES)
    pages = np.maximum.accumulate(np.where(rng.random(LINES) < 0.02, np.arange(LINES), 0))
    code = CODE + (rng.integers(0, 64, LINES)[pages] << 12) + rng.integers(0, 4088, LINES)
    stack = rng.random(LINES) < 0.5
    data = np.where(stack, STACK + rng.integers(0, 512, LINES) * 8, DATA + rng.integers(0, 1 << 21, LINES) * 8)
    address = np.where(kinds == FETCH, code, data)
    marks = ("I ", " L", " S", " M")
    lines = [
        f"{marks[kind]} {at:08x},{4 if kind == FETCH else 8}\n" for kind, at in zip(kinds.tolist(), address.tolist(), strict=True)
    ]
    return "".join(lines).encode()


def cells(context: Context) -> list[Cell]:
    """Loop and import, with consecutive accesses merged and not."""
    return [Cell(NAME, workload, strategy) for workload in WORKLOADS for strategy in STRATEGIES]


def loop(path: Path) -> tuple[int, int]:
    """The plain loop: (sum of addresses, sum of sizes), so that its work can be told."""
    kinds, addresses, sizes = [], [], []
    with path.open() as file:
        for line in file:
            address, size = line[3:].split(",")
            kinds.append(line[:2])
            addresses.append(int(address, 16))
            sizes.append(int(size))
    return sum(addresses), len(kinds)


def run_import(path: Path, folder: Path, rule: Rule) -> Report:
    """The import, as the command does it."""
    output = folder / "out.npz"
    report = Report("lackey", str(path), str(output))
    with Source(path) as source:
        collector = Collector(folder, rule)
        read_lackey(source, collector.take, report.skipped)
        with output.open("wb") as file:
            write_replay(file, collector, report, large=False, absent=0)
        collector.close()
    return report


class Work:
    """A file with the trace, in a folder of its own, which is removed when this process ends."""

    def __init__(self, cell: Cell) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fastmmu-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.path = self.folder / "trace.txt"
        self.path.write_bytes(text())
        self.strategy, self.rule = cell.strategy, WORKLOADS[cell.workload]
        self.done = 0

    def once(self) -> None:
        """One reading of all lines."""
        if self.strategy == "loop":
            self.done = loop(self.path)[1]
        else:
            self.done = run_import(self.path, self.folder, self.rule).accesses


def check(context: Context, cell: Cell) -> Checked:
    """The import represents every line of the text, at the addresses that the loop reads.

    Raises:
        CheckError: it does not.
    """
    work = Work(cell)
    total, lines = loop(work.path)
    report = run_import(work.path, work.folder, work.rule)
    with np.load(work.folder / "out.npz") as columns:
        read = int(columns["gva"].sum(dtype=np.uint64)) if work.rule == Rule.NONE else total & (1 << 64) - 1
        represented = int(columns["count"].sum(dtype=np.uint64))
    if (read, represented, report.accesses) != (total & (1 << 64) - 1, lines, LINES):
        raise CheckError(f"{cell.name}: {represented} accesses, sum of addresses {read:#x}; the loop read {lines}, {total:#x}")
    return Checked({"lines": lines, "bytes": len(text()), "records": report.records, "pages": report.pages}, lines)


def timed(context: Context, cell: Cell) -> Timed:
    """One reading of the file."""
    work = Work(cell)
    return Timed(work.once, lambda: None, lambda: work.done, LINES)


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Rates against the loop."""
    rows = []
    for workload, strategies in by_workload(suite).items():
        times = {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items()}
        if "loop" not in times:
            continue
        for name, own in times.items():
            records = counts(counters_of(strategies[name]["time"]), "records")[0] if name == "import" else "-"
            rate = ratio_text(times["loop"], own, cost=False)
            rows.append((f"{workload} / {name}", rate, nanoseconds(own), records))
    head = ("records / reader", "rate over the plain loop", "ns per line", "records")
    note = (
        f"{LINES:,} lines of valgrind's lackey text. The loop takes lines apart and appends to lists; the import checks them, "
        "makes records, builds page tables and writes a compressed replay file."
    )
    return [Table("import of lackey text", head, rows, note)] if rows else []


EXPERIMENT = Experiment(NAME, cells, check, timed, unavailable, tables, by_default=False, quick=False)
