"""The mmio-cache experiment in the whole MMU: MMIO sptes and the MMIO info cache, each on and off, under the TDP MMU.

`<trace>`: with NPT, whose MMIO sptes have a reserved bit; `<trace>-ept`: with EPT, whose are misconfigurations.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyperf

from bench.experiment import RECORDS, Cell, Checked, Context, Description, Experiment, Over, Priced, Timed, without_devices
from bench.mmio_cache import FEWEST_ACCESSES
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, nanoseconds, ratio_text, round_values
from bench.workloads import device_accesses
from fastmmu.audit import audit
from fastmmu.bits import PFERR
from fastmmu.events import Op
from fastmmu.kvm import Kvm
from fastmmu.measure import fault_column
from fastmmu.stream import machine_for, replay_stream

NAME = "mmio-mmu"
KVMS = {
    "none": Kvm(mmio_caching=False, mmio_info=False),
    "info": Kvm(mmio_caching=False),
    "spte": Kvm(mmio_info=False),
    "spte+info": Kvm(),
}
EPT = "-ept"
SHOWN = ("pf_taken", "pf_mmio_spte_created", "tlb_misses")


def cells(context: Context) -> list[Cell]:
    """The four on the trace, with NPT and with EPT."""
    return [Cell(NAME, context.workload.name + form, strategy) for form in ("", EPT) for strategy in KVMS]


def kvm_of(cell: Cell) -> Kvm:
    """How KVM runs it."""
    return replace(KVMS[cell.strategy], ept=cell.workload.endswith(EPT))


def accesses(context: Context) -> int:
    """Device accesses of the trace."""
    return device_accesses(context.workload)


def check(context: Context, cell: Cell) -> Checked:
    """The whole stream, memory accesses included: every record must go where it went.

    Raises:
        ReplayError, AuditError.
    """
    machine = machine_for(context.workload, kvm_of(cell))
    replay_stream(context.workload, machine)
    audit(machine)
    workload = replace(context.workload, events=context.workload.device_events)
    machine = machine_for(workload, kvm_of(cell))
    replay_stream(workload, machine)
    counters = machine.counters()
    return Checked({**counters, "accesses": accesses(context)}, 0, counts={name: counters[name] for name in SHOWN})


def timed(context: Context, cell: Cell) -> Timed:
    """KVM's part of each device access, from the exit to the decision to emulate, on a machine that has seen the stream once."""
    kvm = kvm_of(cell)
    workload = replace(context.workload, events=context.workload.device_events)
    machine = machine_for(workload, kvm)
    replay_stream(workload, machine)
    gpas = workload.events["value"][workload.events["op"] == Op.DEVICE].copy()
    pferr = PFERR.GUEST_FINAL | PFERR.U | (PFERR.P | PFERR.RSVD if kvm.mmio_caching else np.uint64(0))
    if kvm.ept and kvm.mmio_caching:
        pferr = PFERR.RSVD  # a misconfiguration tells nothing else (facts 2.2)
    return Timed(lambda: fault_column(machine.vm, machine.state, np.uint64(0), gpas, pferr), lambda: None, lambda: 0, len(gpas))


def why_not(context: Context, cell: Cell) -> str:
    """Traces that touch devices too rarely are counted only."""
    return "" if accesses(context) >= FEWEST_ACCESSES else f"{accesses(context):,} device accesses, fewer than {FEWEST_ACCESSES:,}"


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Speed-up over neither."""
    made = []
    for workload, strategies in by_workload(suite).items():
        times = {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items() if "time" in metrics}
        rows = []
        for strategy, metrics in strategies.items():
            counters = counters_of(next(iter(metrics.values())))
            own = times.get(strategy)
            timing = (ratio_text(times["none"], own, cost=False), nanoseconds(own)) if own and "none" in times else ("-", "-")
            rows.append((strategy, *timing, *counts(counters, *SHOWN)))
        devices = counters_of(next(iter(next(iter(strategies.values())).values())))["accesses"]
        note = (
            f"{devices:,} device accesses, TDP MMU{', EPT' if workload.endswith(EPT) else ''}, TLB of 256 sets by 4 ways. Timed is "
            "KVM's part, from the exit to the decision "
            "to emulate; the exit itself, the emulator and the processor's walk are the same for all. Without MMIO sptes the fault "
            "does not say that it is one of a device, and the cache is not asked."
        )
        head = ("remembered", "speed-up over none", "ns per access", *SHOWN)
        made.append(Table(f"mmio-cache in the whole MMU, {workload}", head, rows, note))
    return made


DESCRIPTION = Description(
    question="In the whole MMU, what do MMIO sptes and the MMIO info cache each save of a device access?",
    not_shown="The exit, the emulator and the processor's own walk, which are the same for all four.",
)

EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    why_not,
    tables,
    by_default=False,
    description=DESCRIPTION,
    part_of="mmio-cache",
    over=Over("none"),
    traced=cells,
    unanswered=without_devices,
    parameters=(RECORDS,),
    priced=Priced("accesses", exits=("exits_no_irq",), flushes=("remote_tlb_flush_requests",), locks=("lock_taken",)),
)
