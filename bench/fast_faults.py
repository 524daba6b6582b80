"""The fast-page-fault experiment: write-protection faults under the mmu lock against a compare-exchange without it.

`<mmu>/1g`: KVM's part of each fault alone, random order over 1 GiB of 4 KiB sptes, beside the bare exchange of the same words; and
in a VM whose vCPUs are threads, one with all of them or two with half each. `<mmu>/resume-N`: after dirty logging began N vCPUs
write every page again, TLB and all. `<trace>`: a recorded stream whose dirty log is collected again and again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from bench.experiment import (
    RECORDS,
    Cell,
    Checked,
    CheckError,
    Context,
    Description,
    Experiment,
    Parameter,
    Priced,
    Timed,
    on_the_trace,
    unavailable,
)
from bench.fast_fault_tables import (
    EXCHANGE,
    FAST,
    LOCKED,
    MMUS,
    NAME,
    PERIOD,
    THREADED,
    charts,
    over,
    over_locked,
    tables,
)
from fastmmu.audit import audit
from fastmmu.bits import CR0, NPT_SPTE, PFERR
from fastmmu.events import EVENT, EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine
from fastmmu.machine_state import SlotFlag, VmWord
from fastmmu.measure import exchange_column, fault_column, index_column
from fastmmu.paging import Cpu
from fastmmu.stream import machine_for
from fastmmu.threads import Writes, run_threads
from fastmmu.vm import Workload

SIZE = 1 << 30
RESUME_SIZE, RESUME_VCPUS = 256 << 20, (1, 2, 4)
SEED = 2012
THREAD_ROUNDS = 20
OFF = Cpu(cr0=int(CR0.PE), cr3=0, cr4=0, efer=0)
LOG = int(SlotFlag.LOG_DIRTY_PAGES)
FAULT = PFERR.GUEST_FINAL | PFERR.U | PFERR.W | PFERR.P


def kvm_of(mmu: str, strategy: str) -> Kvm:
    """KVM with the path, or without it. Huge pages play no part here."""
    return Kvm(tdp_mmu=mmu == "tdp", fast_page_fault=not strategy.startswith(LOCKED), eager_page_split=False)


def cells(context: Context) -> list[Cell]:
    """The bare exchange and both strategies, by MMU; then the resume, by vCPUs; then the trace."""
    alone = [Cell(NAME, f"{mmu}/1g", strategy) for mmu in MMUS for strategy in (EXCHANGE, FAST, LOCKED, *THREADED)]
    resume = [Cell(NAME, f"{mmu}/resume-{n}", strategy) for mmu in MMUS for n in RESUME_VCPUS for strategy in (LOCKED, FAST)]
    return alone + resume + traced_cells(context)


def traced_cells(context: Context) -> list[Cell]:
    """Both paths on the trace."""
    return [Cell(NAME, context.workload.name, strategy) for strategy in (LOCKED, FAST)]


@dataclass
class Guest:
    """A machine with one memslot whose pages are all mapped, and their addresses in random order: all, and those of each vCPU."""

    machine: Machine
    gpas: np.ndarray
    parts: list[np.ndarray]
    indices: np.ndarray

    def log(self, on: bool) -> None:
        """Dirty logging on, which protects every page, or off."""
        self.machine.run(EventList().add(Op.SLOT_FLAGS, address=0, value=LOG if on else 0).add(Op.EXIT).array())

    def protect(self) -> None:
        """Every page writable, then none."""
        self.log(on=False)
        exchange_column(self.machine.vm.spt, self.indices)
        self.log(on=True)

    def fault(self, threads: int) -> int:
        """All faults, by one vCPU on this thread, or by so many that are threads; how many were fixed."""
        vm, state = self.machine.vm, self.machine.state
        vm.word[VmWord.THREADS] = threads
        if threads == 0:
            return int(fault_column(vm, state, np.uint64(0), self.gpas, FAULT))
        fixed = [0] * threads

        def run(number: int) -> None:
            fixed[number] = int(fault_column(vm, state, np.uint64(number), self.parts[number], FAULT))

        vcpus = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
        for thread in vcpus:
            thread.start()
        for thread in vcpus:
            thread.join()
        vm.word[VmWord.THREADS] = 0
        return sum(fixed)


@lru_cache(maxsize=1)
def guest(mmu: str, strategy: str, size: int, vcpus: int) -> Guest:
    """The guest of a cell; one is kept."""
    machine = Machine(kvm_of(mmu, strategy), OFF, memory=size, vcpus=vcpus)
    machine.memory.advise_huge(0, size)  # else most of a resume is the host's own TLB misses
    machine.run(EventList().add(Op.SLOT_CREATE, value=machine.prepare_slot(0, 0, size)).each_vcpu(vcpus, Op.EXIT).array())
    gpas = np.random.default_rng(SEED).permutation(size >> 12).astype(np.uint64) << np.uint64(12)
    fault_column(machine.vm, machine.state, np.uint64(0), gpas, FAULT & ~PFERR.P)
    indices = np.zeros(len(gpas), np.uint64)
    index_column(machine.vm, machine.state, gpas, indices)
    parts = [gpas[gpas * np.uint64(vcpus) // np.uint64(size) == part] for part in range(vcpus)]
    return Guest(machine, gpas, parts, indices)


def threads_of(cell: Cell) -> int:
    """How many threads a cell has, 0 for one vCPU that is none."""
    if "resume" in cell.workload:
        return int(cell.workload.rsplit("-", 1)[1])
    return int(cell.strategy.rsplit("-", 1)[1]) if cell.strategy in THREADED else 0


def guest_of(cell: Cell) -> Guest:
    """The guest of a cell that is no trace."""
    size = cell.value("pages", (RESUME_SIZE if "resume" in cell.workload else SIZE) >> 12) << 12
    return guest(cell.workload.split("/")[0], cell.strategy, size, max(threads_of(cell), 1))


def is_trace(cell: Cell) -> bool:
    """Whether the cell replays a recorded stream."""
    return "/" not in cell.workload


def resume_writes(one: Guest, vcpus: int) -> list[Writes]:
    """Each vCPU writes its part of the pages, in order."""
    return [Writes(part, part) for part in np.array_split(np.sort(one.gpas), vcpus)]


def logged_stream(workload: Workload, period: int) -> np.ndarray:
    """The stream with logging switched on for its memory before the first record, and the log collected every so many events."""
    memory = [number for number, slot in enumerate(slot for slot in workload.slots if slot[2] != "device") if slot[2] == "ram"]
    parts = [host_events(Op.SLOT_FLAGS, memory, LOG)]
    for start in range(0, len(workload.events), period):
        parts += [workload.events[start : start + period], host_events(Op.DIRTY_GET, memory, 0)]
    return np.concatenate(parts)


def host_events(op: Op, slots: list[int], value: int) -> np.ndarray:
    """The same event for several memslots."""
    events = np.zeros(len(slots), EVENT)
    events["op"], events["address"], events["value"] = op, slots, value
    return events


def traced(context: Context, cell: Cell) -> tuple[Machine, np.ndarray]:
    """A fresh machine for the trace, and its events."""
    events = traced_events(context, cell)
    machine = machine_for(context.workload, kvm_of("tdp", cell.strategy))
    machine.check(events)
    machine.populate()
    return machine, events


def check(context: Context, cell: Cell) -> Checked:
    """Run once with the lock's time taken: every fault is fixed, W was set as often as the counters say, the state holds together.

    Raises:
        CheckError: a fault was not fixed, or fixed elsewhere than the strategy says.
    """
    if is_trace(cell):
        machine, events = traced(context, cell)
    else:
        one = guest_of(cell)
        machine = one.machine
        one.protect()
    before = machine.counters()
    machine.vm.word[VmWord.LOCK_TIMED] = 1
    if is_trace(cell):
        machine.run(events, checked=True)
        done = accesses = len(context.workload.events)
    elif "resume" in cell.workload:
        run_threads(machine, resume_writes(one, threads_of(cell)), slot=0, collect=False)
        done = accesses = len(one.gpas)
    else:
        accesses = len(one.gpas)
        done = exchange_column(machine.vm.spt, one.indices) if cell.strategy == EXCHANGE else one.fault(threads_of(cell))
    machine.vm.word[VmWord.LOCK_TIMED] = 0
    counters = {name: value - before[name] for name, value in machine.counters().items()}
    if not is_trace(cell):
        writable = int(np.count_nonzero(machine.vm.spt[one.indices] & NPT_SPTE.W))
        fast = counters["fast_fixed"] == (accesses if cell.strategy.startswith(FAST) else 0)
        if done != accesses or writable != accesses or not fast:
            raise CheckError(f"{cell.name}: {done} of {accesses} faults fixed, {writable} writable, {counters['fast_fixed']} fast")
    if cell.strategy != EXCHANGE:
        audit(machine)
    return Checked({**counters, "accesses": accesses}, done)


def timed(context: Context, cell: Cell) -> Timed:
    """The work of a cell."""
    if is_trace(cell):
        fresh: list[Machine] = []
        accesses = len(context.workload.events)

        def renew() -> None:
            fresh[:] = [traced(context, cell)[0]]

        once = lambda: fresh[0].run(traced_events(context, cell), checked=True)  # noqa: E731
        return Timed(once, renew, lambda: accesses, accesses)
    one, done = guest_of(cell), [0]
    count = len(one.gpas)
    if "resume" in cell.workload:
        writes = resume_writes(one, threads_of(cell))
        return Timed(lambda: run_threads(one.machine, writes, slot=0, collect=False), one.protect, lambda: count, count)

    def faults() -> None:
        done[0] = exchange_column(one.machine.vm.spt, one.indices) if cell.strategy == EXCHANGE else one.fault(threads_of(cell))

    return Timed(faults, one.protect, lambda: int(done[0]), count)


def traced_events(context: Context, cell: Cell) -> np.ndarray:
    """The stream that `traced` has checked."""
    period = cell.value("period", PERIOD)
    return context.once(("logged", period), lambda: logged_stream(context.workload, period))


def with_vcpus(context: Context, cell: Cell, name: str, value: int) -> Cell | None:
    """The resume with so many vCPUs, which its workload names."""
    first = f"/resume-{RESUME_VCPUS[0]}"
    return Cell(NAME, cell.workload.replace(first, f"/resume-{value}"), cell.strategy) if cell.workload.endswith(first) else None


def with_pages(context: Context, cell: Cell, name: str, value: int) -> Cell | None:
    """A guest of another size."""
    return None if is_trace(cell) else cell.having(name, value)


DESCRIPTION = Description(
    question="A write to a write-protected page faults only to have its W bit set: what is it worth to set it by compare-"
    "exchange, without the mmu lock?",
    source="“[PATCH v4 10/10] KVM: MMU: document mmu-lock and fast page fault”, Xiao Guangrong, 25 April 2012; the times are "
    "those of v5 and v7",
    claim="Faults that only write protection causes can be fixed out of the mmu lock, safely, if the spte says that host and MMU "
    "allow the write and the compare-exchange finds it unchanged. Resuming a guest after dirty logging began took about half the "
    "time; the chart has the published gains.",
    not_shown="The exit around each fault, which the published times include. More vCPUs than this machine has cores take turns; "
    "how the lock holds up under many is simulated (lock-scaling). The races of the path are tried in every order elsewhere: "
    "fastmmu races.",
    year=2012,
)
PARAMETERS = (
    Parameter("pages", "4 KiB pages of the guest, each of which faults once", 8, 1 << 24, with_pages),
    Parameter("vcpus", "vCPUs of the resume, each with its part of the pages", 1, 64, with_vcpus),
    Parameter("period", "events of the trace between two collections of the dirty log", 1_000, 1 << 40, on_the_trace),
    replace(RECORDS, apply=on_the_trace),
)

EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    unavailable,
    tables,
    by_default=False,
    rounds=THREAD_ROUNDS,
    description=DESCRIPTION,
    over=over,
    charts=charts,
    traced=traced_cells,
    parameters=PARAMETERS,
    priced=Priced(
        "accesses", exits=("pf_taken",), flushes=("remote_tlb_flush_requests",), locks=("lock_taken",), over=over_locked
    ),
    measured=("lock_held", "lock_waited", "exchange_failed"),
)
