"""The mmio-cache experiment: what is it worth to remember the last device access's translation, and is it still correct?"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pyperf

from bench.experiment import (
    RECORDS,
    Cell,
    Checked,
    CheckError,
    Context,
    Description,
    Experiment,
    Over,
    Parameter,
    Priced,
    Timed,
    on_the_trace,
    without_devices,
)
from bench.results import counters_of, per_million
from bench.tables import Table, by_workload, counts, nanoseconds, rates, ratio_text, round_values
from bench.workloads import SMALL_WORKLOADS, device_accesses
from fastmmu.bits import PAGE_SIZE
from fastmmu.memory import Slot
from fastmmu.reference.replay import Replay
from fastmmu.state import Digest
from fastmmu.strategy import MMIO_CACHE
from fastmmu.vm import Outcome, Vm, Workload

FEWEST_ACCESSES = 10_000
"""A run of fewer device accesses lasts so short that the 2 µs of the call from Python would be a tenth of it and more."""


def small_workloads() -> dict[str, Workload]:
    """The small named workloads, by name."""
    return {workload.name: workload for workload in (make() for make in SMALL_WORKLOADS)}


def divided(slots: list[Slot], parts: int) -> list[Slot]:
    """The memslots with the largest RAM one cut into so many, equal but for the last."""
    largest = max((slot for slot in slots if slot[2] == "ram"), key=lambda slot: slot[1] - slot[0])
    start, end, kind = largest
    step = -(-(end - start) // parts // PAGE_SIZE) * PAGE_SIZE
    pieces = [(low, min(low + step, end), kind) for low in range(start, end, step)]
    return [slot for slot in slots if slot != largest] + pieces


def workload_of(context: Context, cell: Cell) -> Workload:
    """The workload that a cell names: a small one, or the trace, its memory in as many memslots as the cell says."""
    if small := small_workloads().get(cell.workload):
        return small
    parts = cell.value("slots", 1)
    return replace(context.workload, slots=divided(context.workload.slots, parts)) if parts > 1 else context.workload


def traced(context: Context) -> list[Cell]:
    """Every strategy on the trace."""
    return [Cell(MMIO_CACHE.name, context.workload.name, strategy.name) for strategy in MMIO_CACHE.strategies]


def cells(context: Context) -> list[Cell]:
    """Every strategy on the trace and on each small workload."""
    small = [Cell(MMIO_CACHE.name, name, strategy.name) for name in small_workloads() for strategy in MMIO_CACHE.strategies]
    return traced(context) + small


def reference_run(workload: Workload, strategy: str) -> Replay:
    """The whole stream in the reference."""
    words = {
        (gfn << 12) + 8 * index: word
        for gfn, page in workload.tables.items()
        for index, word in enumerate(page.tolist())
        if word
    }  # fmt: skip
    reference = Replay(workload.cpu, workload.slots, words, strategy)
    reference.run(workload.events.tolist())
    return reference


def check_workload(workload: Workload, strategy: str, reference: Replay | None = None) -> Outcome:
    """Replay with counters; the reference must come to the same counters, digests and page tables.

    Raises:
        ReplayError: a record translates to another address than the recorded one.
        CheckError: kernels and reference disagree.
    """
    outcome = Vm(workload, MMIO_CACHE.strategy(strategy)).check()
    reference = reference or reference_run(workload, strategy)
    for what, ours, theirs in (
        ("counters", {k: v for k, v in outcome.counters.items() if v}, {k: v for k, v in reference.counters.items() if v}),
        ("digests", outcome.digests, reference.digests),
        ("page tables", outcome.tables, {gpa: word for gpa, word in reference.memory.words.items() if word}),
    ):
        if ours != theirs:
            where = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))[:3]
            shown = ", ".join(f"{key}: kernel {ours.get(key)}, reference {theirs.get(key)}" for key in where)
            raise CheckError(f"mmio-cache/{workload.name}/{strategy}: {what} differ from the reference ({shown})")
    return outcome


def check(context: Context, cell: Cell) -> Checked:
    """Counters of a cell, proven against the reference."""
    workload = workload_of(context, cell)
    if cell.value("slots", 1) > 1:  # memory in parts is the same memory: the reference, whose look-up is slow, has it whole
        whole = context.once(("reference", cell.strategy), lambda: reference_run(context.workload, cell.strategy))
        outcome = check_workload(workload, cell.strategy, whole)
    else:
        outcome = context.once((workload.name, cell.strategy), lambda: check_workload(workload, cell.strategy))
    counters = outcome.counters
    everything = repr((sorted(counters.items()), sorted(outcome.digests.items()), sorted(outcome.tables.items())))
    return Checked(
        counters=counters,
        expected=outcome.digests["device"],
        digest=hashlib.blake2b(everything.encode(), digest_size=8).hexdigest(),
        counts={
            "guest_walks_per_million": per_million(counters["device_walks"], counters["device_accesses"]),
            **{name: counters[name] for name in ("wrong", "stale_legal", "miss_permission")},
        },
    )


def timed(context: Context, cell: Cell) -> Timed:
    """Device accesses with the table stores and flushes between them; memory accesses, which no strategy touches, left out."""
    workload = workload_of(context, cell)
    vm = Vm(workload, MMIO_CACHE.strategy(cell.strategy))
    events = workload.device_events
    return Timed(lambda: vm.run(events), vm.reset, lambda: int(vm.digest[Digest.DEVICE]), device_accesses(workload))


def why_not(context: Context, cell: Cell) -> str:
    """Small workloads are counted only; so are traces that touch devices too rarely."""
    if cell.workload in small_workloads():
        return "a small workload"
    accesses = device_accesses(context.workload)
    return "" if accesses >= FEWEST_ACCESSES else f"{accesses:,} device accesses, fewer than {FEWEST_ACCESSES:,}"


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Tables of the mmio-cache experiment: timed workloads one each, the small ones together."""
    plain = MMIO_CACHE.strategies[0].name
    made = []
    small: list[tuple[str, ...]] = []
    for workload, strategies in by_workload(suite).items():
        counters = {strategy: counters_of(next(iter(metrics.values()))) for strategy, metrics in strategies.items()}
        times = {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items() if "time" in metrics}
        if not times:
            for strategy, own in counters.items():
                judged = counts(own, "wrong", "stale_legal", "granted_to_user", "miss_permission")
                small.append((f"{workload} / {strategy}", *rates(own), *judged))
            continue
        rows = []
        for strategy, own in counters.items():
            ratio = ratio_text(times[plain], times[strategy], cost=False) if plain in times else "-"
            rows.append((strategy, ratio, nanoseconds(times[strategy]), *rates(own), *counts(own, "wrong", "stale_legal")))
        own = next(iter(counters.values()))
        note = (
            "{} device accesses of {} records, {} stores to page tables, {} CR3 loads, {} INVLPG. "
            "Ratios are formed within a round: median and [middle half] over {} rounds."
        ).format(
            *counts(own, "device_accesses", "records", "table_stores", "cr3_loads", "invlpgs"), len(next(iter(times.values())))
        )
        head = ("strategy", f"speed-up over {plain}", "ns per access", "hit rate", "walks per access", "wrong", "stale-legal")
        made.append(Table(f"mmio-cache on {workload}", head, rows, note))
    if small:
        head = ("workload / strategy", "hit rate", "walks per access", "wrong", "stale-legal", "granted to user", "denied hits")
        made.append(Table("mmio-cache: counts of workloads that are not timed", head, small))
    return made


DESCRIPTION = Description(
    question="A device access exits to the hypervisor, which needs its guest physical address: what is it worth to remember the "
    "last such translation, and is it still correct?",
    source="“[PATCH 04/15] KVM: MMU: cache mmio info on page fault path”, Xiao Guangrong, 7 June 2011, and Alexander Graf's "
    "review of 8 June",
    claim="With the last device access remembered there is no need to walk the guest's page tables again, the patch says. The "
    "review names two hazards: a page that the guest points elsewhere, and two processes with different devices at one address; "
    "the second could be seen by comparing CR3.",
    not_shown="What an exit and the emulation of the access cost: both are far above the walk that is saved. A walk here reads "
    "one flat array, so a kernel's costs more. Differences of a tenth between the cached strategies are where the compiler puts a"
    " handful of instructions, not their rules.",
    year=2011,
)
MEANING = "memslots that the guest's largest piece of RAM is divided into; the model looks through them one by one"
SLOTS = Parameter("slots", MEANING, 1, 32_764, on_the_trace)

EXPERIMENT = Experiment(
    MMIO_CACHE.name,
    cells,
    check,
    timed,
    why_not,
    tables,
    description=DESCRIPTION,
    over=Over("none"),
    traced=traced,
    unanswered=without_devices,
    parameters=(SLOTS, RECORDS),
    priced=Priced("device_accesses", exits=("device_accesses",)),
)
