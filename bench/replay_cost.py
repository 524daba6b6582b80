"""The replay experiment: what does it cost to replay events, over walking their addresses bare?"""

from __future__ import annotations

import numpy as np
import pyperf

from bench.experiment import RECORDS, Cell, Checked, Context, Description, Experiment, Over, Timed, unavailable
from bench.mmio_cache import check_workload
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, nanoseconds, ratio_text, round_values
from fastmmu.bits import ONE
from fastmmu.events import EVENT, Op
from fastmmu.processor import load_registers
from fastmmu.state import Digest, Reg
from fastmmu.strategy import MMIO_CACHE
from fastmmu.vm import Vm
from fastmmu.walk import ALL_ONES, look_addresses, walk_addresses

NAME = "replay"
STRATEGIES = ("walk", "replay")
PLAIN = MMIO_CACHE.strategies[0]
WORD = (1 << 64) - 1


def cells(context: Context) -> list[Cell]:
    """The bare walk and the replay, on the trace."""
    return [Cell(NAME, context.workload.name, strategy) for strategy in STRATEGIES]


class EndTables:
    """The records that translate in the end tables of a replay, as columns and as an event stream; no stores, no flushes."""

    def __init__(self, context: Context) -> None:
        workload = context.workload
        self.vm = Vm(workload, PLAIN)
        self.vm.run()
        state, events = self.vm.state, workload.events
        is_access = np.isin(events["op"], (Op.ACCESS, Op.DEVICE))
        loads = np.maximum.accumulate(np.where(events["op"] == Op.CR3, np.arange(len(events)), -1))
        cr3s = np.where(loads < 0, np.uint64(workload.cpu.cr3), events["value"][loads])[is_access]
        records = events[is_access]
        gpas = np.empty(len(records), np.uint64)
        look_addresses(state.mem, state.mmu, cr3s, records["address"].copy(), records["access"].copy(), gpas)
        same = (gpas == records["value"]) & (gpas != ALL_ONES)
        self.records, self.cr3s = records[same], cr3s[same]
        self.gvas, self.accesses = self.records["address"].copy(), self.records["access"].copy()

    def stream(self) -> np.ndarray:
        """The records as events, with a load wherever CR3 changes."""
        switch = np.flatnonzero(np.diff(self.cr3s, prepend=self.cr3s[:1] ^ ONE))
        stream = np.insert(self.records, switch, np.zeros(len(switch), EVENT))
        at = switch + np.arange(len(switch))
        stream["op"][at], stream["value"][at] = Op.CR3, self.cr3s[switch]
        return stream


def check(context: Context, cell: Cell) -> Checked:
    """Every record of the trace translates as recorded; the digest expected is made from the recorded addresses alone.

    Raises:
        ReplayError, CheckError: see `check_workload`.
    """
    return context.once(NAME, lambda: check_trace(context))


def check_trace(context: Context) -> Checked:
    """The check, which is the same for both cells."""
    context.once((context.workload.name, PLAIN.name), lambda: check_workload(context.workload, PLAIN.name))
    records = EndTables(context).records
    expected = 0
    for gpa in records["value"].tolist():
        expected = (expected << 5 & WORD | expected >> 59) ^ gpa
    return Checked({"accesses": len(records)}, expected)


def timed(context: Context, cell: Cell) -> Timed:
    """The same records: walked bare from columns, or replayed as events."""
    end = EndTables(context)
    vm, state = end.vm, end.vm.state
    stream = end.stream()
    digest = [0]

    def walk() -> None:
        digest[0] = int(walk_addresses(state.mem, state.mmu, state.trail, end.cr3s, end.gvas, end.accesses))

    def replay() -> None:
        vm.digest[:] = 0
        vm.run(stream)
        digest[0] = int(vm.digest[Digest.ALL])

    def reset() -> None:
        load_registers(state.mmu.reg, context.workload.cpu)
        state.mmu.reg[Reg.CR3] = context.workload.cpu.cr3

    return Timed(walk if cell.strategy == "walk" else replay, reset, lambda: digest[0], len(end.records))


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Tables of the replay experiment."""
    made = []
    for workload, strategies in by_workload(suite).items():
        times = {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items()}
        if "walk" not in times:
            continue
        rows = [(name, ratio_text(times["walk"], own, cost=True), nanoseconds(own)) for name, own in times.items()]
        (accesses,) = counts(counters_of(strategies["walk"]["time"]), "accesses")
        note = f"{accesses} records that translate in the end tables; replayed as events against walked bare from columns."
        made.append(Table(f"replay on {workload}", ("work", "cost over the bare walk", "ns per record"), rows, note))
    return made


def unanswered(context: Context) -> str:
    """A stream whose tables all change can be replayed, but not walked bare."""
    return "" if len(EndTables(context).records) else "none of its records translates in its last tables"


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    quick=False,
    description=Description(
        "What does it cost to replay events, over walking their addresses bare?",
    ),
    over=Over("walk", cost=True),
    traced=cells,
    unanswered=unanswered,
    parameters=(RECORDS,),
)
