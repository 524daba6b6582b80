"""The mmu experiment: what does KVM's MMU, with the processor under it, cost over walking the same addresses bare?

`<trace>-warm` replays records that cause no exit any more; `<trace>` the whole stream from the first fault on.
"""

from __future__ import annotations

from dataclasses import replace
from zlib import crc32

import numpy as np
import pyperf

from bench.experiment import RECORDS, Cell, Checked, Context, Description, Experiment, Over, Priced, Timed, unavailable
from bench.mmio_cache import check_workload
from bench.replay_cost import PLAIN, EndTables
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, nanoseconds, ratio_text, round_values
from fastmmu.audit import audit
from fastmmu.bits import PAGE_SHIFT, PFERR
from fastmmu.events import Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.machine_state import LogKind
from fastmmu.state import Reg
from fastmmu.stream import CHUNK, machine_for, replay_stream
from fastmmu.vm import Vm, Workload
from fastmmu.walk import walk_addresses

NAME = "mmu"
WARM = "-warm"
KVMS = {
    "tdp": Kvm(),
    "legacy": Kvm(tdp_mmu=False),
    "shadow": Kvm(tdp=False, tdp_mmu=False),
    "tdp-tlb-1x1": Kvm(tlb=(1, 1)),  # every record walks in two dimensions, except one to the page of the last
}


def cells(context: Context) -> list[Cell]:
    """The bare walk or replay first, then the MMUs."""
    name = context.workload.name
    whole = [Cell(NAME, name, strategy) for strategy in ("replay", "tdp", "legacy", "shadow")]
    return [Cell(NAME, name + WARM, strategy) for strategy in ("walk", *KVMS)] + whole


def warm_workload(context: Context) -> tuple[EndTables, Workload]:
    """The memory records that translate in the end tables, as a stream over those tables without stores; of the address space that
    has most of them, and without writes to page tables: those and CR3 loads exit under shadow paging."""
    end = EndTables(context)
    values, times = np.unique(end.cr3s, return_counts=True)
    cr3 = values[times.argmax()]
    is_table = np.isin(end.records["value"] >> PAGE_SHIFT, np.array(list(context.workload.tables), np.uint64))
    stores = (end.records["access"] & np.uint8(PFERR.W) != 0) & is_table
    memory = (end.records["op"] == Op.ACCESS) & (end.cr3s == cr3) & ~stores
    end.records, end.cr3s, end.gvas, end.accesses = (part[memory] for part in (end.records, end.cr3s, end.gvas, end.accesses))
    words = end.vm.memory.words.reshape(-1, 512)
    contents = {gfn: words[gfn].copy() for gfn in context.workload.tables}
    cpu = replace(context.workload.cpu, cr3=int(cr3))
    return end, replace(context.workload, cpu=cpu, tables=contents, events=end.records.copy())


def warm_machine(workload: Workload, kvm: Kvm) -> Machine:
    """A machine on which the stream has run twice: sptes are there, and what the TLB can hold."""
    machine = machine_for(workload, kvm)
    for _ in range(2):
        replay_stream(workload, machine)
    return machine


def check(context: Context, cell: Cell) -> Checked:
    """Every record translates as the recording machine did; warm streams cause no fault; the state holds together.

    Raises:
        ReplayError, CheckError, AuditError.
    """
    if cell.strategy in ("walk", "replay"):
        context.once((context.workload.name, PLAIN.name), lambda: check_workload(context.workload, PLAIN.name))
        return Checked({"accesses": accesses_of(context, cell)}, 0)
    kvm = KVMS[cell.strategy]
    if cell.workload.endswith(WARM):
        _, workload = warm_workload(context)
        machine = warm_machine(workload, kvm)
    else:
        workload = context.workload
        machine = machine_for(workload, kvm)
    before = machine.counters()
    replay_stream(workload, machine)
    audit(machine)
    counters = {name: value - before[name] for name, value in machine.counters().items()}
    again = 0 if cell.workload.endswith(WARM) else refaults(workload, kvm)
    counters |= {"accesses": accesses_of(context, cell), "refaults": again}
    return Checked(counters, digest_of(machine, before))


def refaults(workload: Workload, kvm: Kvm) -> int:
    """Page faults that exit to KVM at a page where one did before."""
    machine = machine_for(workload, kvm)
    machine.configure(log_faults=True)
    chunks = [workload.events[start : start + CHUNK] for start in range(0, len(workload.events), CHUNK)]
    logs = np.concatenate([machine.run(chunk).log for chunk in chunks])
    pages = logs["address"][logs["kind"] == LogKind.EXIT] >> PAGE_SHIFT
    return len(pages) - len(np.unique(pages))


def digest_of(machine: Machine, before: dict[str, int]) -> int:
    """What a run came to, counter by counter; but the TLB, filled in turn, begins a warm run in another state each time."""
    changed = {name: value - before[name] for name, value in machine.counters().items() if not name.startswith("tlb_")}
    return crc32(repr(sorted(changed.items())).encode())


def accesses_of(context: Context, cell: Cell) -> int:
    """Records of a cell."""
    if cell.workload.endswith(WARM):
        return len(context.once("warm", lambda: warm_workload(context))[0].records)
    return int(np.isin(context.workload.events["op"], (Op.ACCESS, Op.DEVICE)).sum())


def timed(context: Context, cell: Cell) -> Timed:
    """The work of a cell."""
    if cell.workload.endswith(WARM):
        end, workload = warm_workload(context)
        accesses = len(end.records)
        if cell.strategy == "walk":
            state, cr3 = end.vm.state, context.workload.cpu.cr3

            def reset() -> None:
                state.mmu.reg[Reg.CR3] = cr3

            def walk() -> None:
                walk_addresses(state.mem, state.mmu, state.trail, end.cr3s, end.gvas, end.accesses)

            return Timed(walk, reset, lambda: 0, accesses)
        machine = warm_machine(workload, KVMS[cell.strategy])
        before: dict[str, int] = {}
        run = lambda: replay_stream(workload, machine, checked=True)  # noqa: E731
        return Timed(run, lambda: before.update(machine.counters()), lambda: digest_of(machine, before), accesses)
    workload = context.workload
    accesses = accesses_of(context, cell)
    if cell.strategy == "replay":
        vm = Vm(workload, PLAIN)
        return Timed(vm.run, vm.reset, lambda: 0, accesses)
    fresh: list[Machine] = []

    def renew() -> None:
        fresh[:] = [machine_for(workload, KVMS[cell.strategy])]
        fresh[0].check(workload.events)
        fresh[0].populate()

    start: dict[str, int] = {}

    def run_all() -> None:
        start.update(fresh[0].counters())
        replay_stream(workload, fresh[0], checked=True)

    return Timed(run_all, renew, lambda: digest_of(fresh[0], start), accesses)


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Cost over the bare work, and what explains it."""
    made = []
    for workload, strategies in by_workload(suite).items():
        times = {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items() if "time" in metrics}
        plain = next((name for name in ("walk", "replay") if name in times), None)
        rows = []
        for strategy, own in times.items():
            ratio = ratio_text(times[plain], own, cost=True) if plain else "-"
            counters = counters_of(strategies[strategy]["time"])
            names = ("exits_no_irq", "pf_fixed", "refaults", "mmio_exits", "tlb_hits", "tlb_misses", "stores")
            shown = counts(counters, *names) if "tlb_hits" in counters else ("-",) * len(names)
            tlb = "-" if strategy == plain else "x".join(map(str, KVMS[strategy].tlb))
            rows.append((strategy, ratio, nanoseconds(own), tlb, *shown))
        counted = ("exits", "pf_fixed", "refaults", "device", "TLB hits", "TLB misses", "stores")
        head = ("work", f"cost over the {plain}", "ns per record", "TLB", *counted)
        warm = "memory records of one address space that cause no exit"
        kind = warm if workload.endswith(WARM) else "the whole stream, from the first fault on"
        records = counters_of(next(iter(strategies.values()))["time"])["accesses"]
        note = f"{kind}: {records:,} records; 4 KiB host pages."
        made.append(Table(f"KVM's MMU on {workload}", head, rows, note))
    return made


def unanswered(context: Context) -> str:
    """The warm stream is made of memory records that translate in the last tables."""
    try:
        return "" if context.once("warm", lambda: warm_workload(context))[1].events.size else NO_WARM
    except ValueError:
        return NO_WARM


NO_WARM = "it has no memory records that translate in its last tables"

EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    by_default=False,
    description=Description(
        "What does KVM's MMU, with the processor under it, cost over walking the same addresses bare?",
    ),
    over=lambda cell: Over("walk" if cell.workload.endswith(WARM) else "replay", cost=True),
    traced=cells,
    unanswered=unanswered,
    parameters=(RECORDS,),
    priced=Priced("accesses", exits=("exits_no_irq",), flushes=("remote_tlb_flush_requests",), locks=("lock_taken",)),
)
