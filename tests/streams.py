"""Random valid event streams for a `Machine`, and a judge that follows them in plain Python.

`plan` makes a stream from a seed. `Judge` keeps its own copy of the guest's tables, of the data written and of the memslots, walks
with the reference walker, and says for each event which log rows are possible: what the tables give as they are now, or, for an
answer that succeeds, as they were at a moment since the last flush of that vCPU that covers the page, if the vCPU was there then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from shadow_judge import ShadowJudge
from shadow_plans import ShadowGenerator
from shadow_standin import StandIn
from stream_guests import KINDS, PAGE, Kind
from stream_judge import Judge, Wrong
from stream_plans import Generator, Plan

from fastmmu._jit import JIT
from fastmmu.audit import audit
from fastmmu.audit_state import AuditError
from fastmmu.events import Op
from fastmmu.machine import Machine, MachineError


def describe(events: np.ndarray, at: int) -> str:
    row = events[at]
    return (
        f"{Op(int(row['op'])).name} access={int(row['access']):#x} size={int(row['size'])} "
        f"address={int(row['address']):#x} value={int(row['value']):#x}"
    )


# --- running one -----------------------------------------------------------------------------------------------------------


def is_inspected(events: np.ndarray) -> np.ndarray:
    """Writes over a page boundary (for an exchange, its operand): which pages were stored to shows in memory alone, after the event."""
    op, offset = events["op"], events["address"] % np.uint64(PAGE)
    crossing = np.isin(op, (Op.WRITE, Op.EXCHANGE)) & (offset + events["size"] > PAGE)
    exchange = crossing & (op == Op.EXCHANGE)
    return (crossing & ~exchange) | np.append(False, exchange[:-1])


def segments(events: np.ndarray, step: int, *, inspected: bool = False) -> Iterator[tuple[int, int]]:
    """Pieces of the stream: up to a DIRTY_GET, before a DIRTY_CLEAR, and at most `step` events; for some, behind inspected ones."""
    op, first = events["op"], 0
    ends = is_inspected(events) if inspected else np.zeros(len(events), bool)
    for at in range(len(events)):
        last = at == len(events) - 1
        cut = op[at] == Op.DIRTY_GET or last or op[at + 1] == Op.DIRTY_CLEAR or at + 1 - first >= step or ends[at]
        if cut and not (op[at] == Op.EXCHANGE and not last):
            yield first, at + 1
            first = at + 1


def plan(name: str, seed: int, count: int, kind: Kind | None = None) -> Plan:
    """The stream of a seed: always the same."""
    kind = kind or KINDS[name]
    return (ShadowGenerator if kind.modes else Generator)(name, kind, seed).plan(count)


def run(stream: Plan, *, step: int | None = None, machine: Machine | StandIn | None = None) -> Counter[str]:
    """Run and judge a stream, on a machine of its own or on what stands in for one.

    Raises:
        AssertionError: naming seed, kind, event, what was expected and found.
    """
    step = step or (100 if JIT else 1)
    events, machine = stream.events, machine or stream.machine()
    modes = bool(stream.kind.modes)

    def peek(gpa: int, size: int) -> int:
        return int.from_bytes(machine.memory.words.view(np.uint8)[gpa : gpa + size].tobytes(), "little")

    judge, checked = ShadowJudge(stream, peek) if modes else Judge(stream), 0
    rng = np.random.default_rng([stream.seed, 3])
    at = 0
    try:
        for first, end in segments(events, step, inspected=modes):
            at = first
            piece = events[first:end]
            if piece["op"][0] == Op.DIRTY_CLEAR:
                identity = int(piece["address"][0])
                pages = choose_pages(rng, machine.report(identity))
                machine.set_report(identity, pages)
                judge.cleared = pages.tolist()
            supply = rng.integers(1 << 63, size=200, dtype=np.uint64)
            result = machine.run(piece, supply=supply)
            judge.supply = supply.tolist()
            rows: dict[int, list[tuple[int, int, int, int]]] = {}
            for kind, size, event, address, value in result.log.tolist():
                rows.setdefault(event, []).append((kind, size, address, value))
            for number, row in enumerate(piece):
                at = first + number
                compared = int(piece[number + 1]["value"]) if row["op"] == Op.EXCHANGE else 0
                judge.event(at, row, compared, rows.get(number, []))
            if piece["op"][-1] == Op.DIRTY_GET:
                identity = int(piece["address"][-1])
                judge.check_report(identity, machine.report(identity))
            if modes and end - checked < step and end < len(events):
                continue
            checked = end
            judge.check_tables(machine.memory.words)
            if isinstance(machine, Machine):
                audit(machine)
    except (Wrong, AuditError, MachineError) as error:
        shown = events[at]["op"] == Op.EXCHANGE and at + 1 < len(events)
        raise AssertionError(
            f"seed {stream.seed}, kind {stream.name}, {len(events)} events, event {at} ({describe(events, at)}"
            f"{', ' + describe(events, at + 1) if shown else ''}), vCPU {judge.vcpus.index(judge.vcpu)}: {type(error).__name__}: {error}"
        ) from error
    counters = machine.counters()
    for name in (
        "pf_taken",
        "pf_fast",
        "mmu_recycled",
        "tlb_hits",
        "tlb_misses",
        "pml_full",
        "nx_lpage_splits",
        "pages_2m",
        "pages_1g",
    ):
        judge.totals[name] += counters.get(name, 0)
    judge.totals["streams"] += 1
    judge.totals["events"] += len(events)
    return judge.totals


def choose_pages(rng: np.random.Generator, report: np.ndarray) -> np.ndarray:
    """Which pages a DIRTY_CLEAR clears: those reported, some of them, or any."""
    reported = np.flatnonzero(report)
    draw = rng.random()
    if draw < 0.5:
        return reported
    if draw < 0.8:
        return reported[rng.random(len(reported)) < 0.5]
    return np.flatnonzero(rng.random(len(report)) < 0.2)
