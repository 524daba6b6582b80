"""The nested-caches experiment: entry reads and time of two-dimensional walks on a recorded stream, with the processor's caches."""

from __future__ import annotations

import numpy as np
import pyperf

from bench.experiment import RECORDS, Cell, Checked, CheckError, Context, Description, Experiment, Over, Timed, unavailable
from bench.nested_walk import CAPS, EPT_LEAF, EPT_POINTER, HUGE, put_tables
from bench.replay_cost import EndTables, unanswered
from bench.results import counters_of
from bench.tables import Table, by_workload, nanoseconds, ratio_text, round_values
from fastmmu import Ept, GuestMemory
from fastmmu.nested import walk_nested_stream
from fastmmu.processor import load_registers, make_state
from fastmmu.state import NestedStat
from fastmmu.strategy import NESTED_CACHES
from fastmmu.translate_nested import host_of, make_scratch

NAME = NESTED_CACHES.name
WORD = (1 << 64) - 1


class NestedEnd:
    """The records that translate in the end tables of a replay; an EPT without A and D maps each page of the guest to itself."""

    def __init__(self, context: Context) -> None:
        self.end, self.cpu = EndTables(context), context.workload.cpu
        self.gpas = self.end.records["value"]
        guest = self.end.vm.memory
        place = -(-guest.size // HUGE) * HUGE  # of the EPT, behind the guest's memory
        pages = max(guest.size >> 12, (int(self.gpas.max()) >> 12) + 1)
        self.ram = GuestMemory(place + 8 * pages + (pages >> 6) + 4 * HUGE & ~(HUGE - 1))
        where = np.flatnonzero(guest.words)
        self.ram.words[where] = guest.words[where]
        put_tables(self.ram.words, place, pages, EPT_POINTER, EPT_LEAF, 0)
        self.host, self.scratch = host_of(Ept(place | 6 | 3 << 3, CAPS)), make_scratch()
        self.state = make_state(self.ram, self.cpu)

    def reset(self) -> None:
        """Registers as at the start."""
        load_registers(self.state.mmu.reg, self.cpu)

    def walk(self, strategy: str, stat: np.ndarray | None) -> int:
        """Digest of the stream's hpas, from empty caches."""
        caches, end = NESTED_CACHES.strategy(strategy).make_cache(), self.end
        columns = end.cr3s, end.gvas, end.accesses
        return int(walk_nested_stream(self.state.mem, self.state.mmu, self.host, self.scratch, caches, stat, *columns))


def nested_end(context: Context) -> NestedEnd:
    """Of this trace, made once."""
    return context.once((NAME, context.workload.name), lambda: NestedEnd(context))


def cells(context: Context) -> list[Cell]:
    """Each strategy, on the trace."""
    return [Cell(NAME, context.workload.name, strategy.name) for strategy in NESTED_CACHES.strategies]


def check(context: Context, cell: Cell) -> Checked:
    """Every record comes to its recorded address; the counters are those of the second run, which finds all A and D set.

    Raises:
        CheckError: a record comes to another address.
    """
    one = nested_end(context)
    expected = 0
    for gpa in one.gpas.tolist():
        expected = (expected << 5 & WORD | expected >> 59) ^ gpa
    for _ in range(2):
        stat = np.zeros(len(NestedStat), np.uint64)
        one.reset()
        found = one.walk(cell.strategy, stat)
        if found != expected:
            raise CheckError(f"{cell.name}: came to digest {found:#x}, expected {expected:#x}")
    return Checked({which.name.lower(): int(stat[which]) for which in NestedStat}, expected)


def timed(context: Context, cell: Cell) -> Timed:
    """The stream's walks, uncounted."""
    one = nested_end(context)
    digest = [0]

    def once() -> None:
        digest[0] = one.walk(cell.strategy, None)

    return Timed(once, one.reset, lambda: digest[0], len(one.gpas))


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Reads and time for each strategy."""
    made = []
    for workload, strategies in by_workload(suite).items():
        times = {name: round_values(metrics["time"]) for name, metrics in strategies.items() if "time" in metrics}
        if "none" not in times:
            continue
        rows = []
        for name, own in times.items():
            counted = counters_of(strategies[name]["time"])
            reads, walks = counted["guest_reads"] + counted["host_reads"], counted["walks"]
            hits = f"{counted['structure_hits'] / walks:.2f}", f"{counted['page_hits'] / walks:.2f}"
            rows.append((name, ratio_text(times["none"], own, cost=False), f"{reads / walks:.2f}", *hits, nanoseconds(own)))
        head = ("caches", "speed-up over none", "reads per walk", "structure hits per walk", "page hits per walk", "ns per walk")
        note = (
            f"{counted['walks']:,} records walked in two dimensions, in the end tables, 4 KiB pages in the EPT; the "
            "paging-structure cache (32 tables for each level) is emptied where CR3 changes; the nested cache has 64 pages."
        )
        made.append(Table(f"nested-caches on {workload}", head, rows, note))
    return made


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    by_default=False,
    quick=False,
    description=Description(
        NESTED_CACHES.question,
    ),
    over=Over("none"),
    traced=cells,
    unanswered=unanswered,
    parameters=(RECORDS,),
)
