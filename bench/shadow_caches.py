"""The shadow-caches experiment: what are roots kept, access kept beside the gfn, and the memslot found last worth?

Each is a pair under shadow paging, on the whole stream from the first fault on: without it, and with it.
"""

from __future__ import annotations

from zlib import crc32

import pyperf

from bench.experiment import RECORDS, Cell, Checked, Context, Description, Experiment, Over, Priced, Timed, unavailable
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, nanoseconds, ratio_text, round_values
from fastmmu.audit import audit
from fastmmu.events import Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.stream import machine_for, replay_stream

NAME = "shadow-caches"
SWITCHES = {
    "cached-roots": "three roots besides the current one are kept (Linux 4.19)",
    "shadowed-access": "a sync leaves an spte alone whose access, kept beside its gfn, did not change (Linux 6.4)",
    "last-slot": "the memslot found last is tried first",
}
FIELDS = {"cached-roots": "cached_roots", "shadowed-access": "sync_skips_unchanged", "last-slot": "last_slot"}
STRATEGIES = ("off", "on")
SHOWN = ("exits_no_irq", "pf_taken", "mmu_cache_miss", "remote_tlb_flush_requests", "tlb_flush", "tlb_misses")


def kvm_of(cell: Cell) -> Kvm:
    """Shadow paging with one thing remembered or not, all others as in Linux 6.1."""
    switch = cell.workload.split("/")[-1]
    return Kvm(tdp=False, tdp_mmu=False, **{FIELDS[switch]: cell.strategy == "on"})


def cells(context: Context) -> list[Cell]:
    """The pairs on the trace."""
    return [Cell(NAME, f"{context.workload.name}/{switch}", strategy) for switch in SWITCHES for strategy in STRATEGIES]


def digest_of(machine: Machine) -> int:
    """What a run came to, counter by counter."""
    return crc32(repr(sorted(machine.counters().items())).encode())


def check(context: Context, cell: Cell) -> Checked:
    """Every record goes where it went, and the state holds together.

    Raises:
        ReplayError, AuditError.
    """
    machine = machine_for(context.workload, kvm_of(cell))
    replay_stream(context.workload, machine)
    audit(machine)
    return Checked({**machine.counters(), "accesses": accesses(context)}, digest_of(machine))


def accesses(context: Context) -> int:
    """Records of the trace."""
    return int((context.workload.events["op"] <= Op.DEVICE).sum())


def timed(context: Context, cell: Cell) -> Timed:
    """The whole stream on a new machine."""
    fresh: list[Machine] = []

    def renew() -> None:
        fresh[:] = [machine_for(context.workload, kvm_of(cell))]
        fresh[0].check(context.workload.events)
        fresh[0].populate()

    once = lambda: replay_stream(context.workload, fresh[0], checked=True)  # noqa: E731
    return Timed(once, renew, lambda: digest_of(fresh[0]), accesses(context))


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Speed-up of each over its absence."""
    rows, records = [], 0
    trace = ""
    for workload, strategies in by_workload(suite).items():
        trace, switch = workload.rsplit("/", 1)
        times = {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items() if "time" in metrics}
        for strategy, own in times.items():
            counters = counters_of(strategies[strategy]["time"])
            records = counters["accesses"]
            ratio = ratio_text(times["off"], own, cost=False) if "off" in times else "-"
            rows.append((f"{switch}: {strategy}", ratio, nanoseconds(own), *counts(counters, *SHOWN)))
    if not rows:
        return []
    head = ("remembered", "speed-up over off", "ns per record", *SHOWN)
    meaning = "; ".join(f"{switch}: {text}" for switch, text in SWITCHES.items())
    note = f"The whole stream of {records:,} records, 4 KiB host pages, TLB of 256 sets by 4 ways. {meaning}."
    return [Table(f"what shadow paging remembers, {trace}", head, rows, note)]


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    by_default=False,
    description=Description(
        "What are roots kept, access kept beside the gfn, and the memslot found last worth under shadow paging?",
    ),
    over=Over("off"),
    traced=cells,
    parameters=(RECORDS,),
    priced=Priced("accesses", exits=("exits_no_irq",), flushes=("remote_tlb_flush_requests",), locks=("lock_taken",)),
)
