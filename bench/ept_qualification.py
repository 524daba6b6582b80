"""The ept-qualification experiment: L2 accesses device pages that L0 emulates, in all orders; what L1 is told of each violation."""

from __future__ import annotations

import hashlib
import itertools
from functools import lru_cache

import numpy as np
import pyperf

from bench.charts import Bar, Bars, Chart
from bench.experiment import (
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
    without_devices,
)
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, nanoseconds, ratio_text, round_values
from fastmmu.bits import EPT, PAGE_SHIFT, PFERR
from fastmmu.ept import FETCH, READ, WRITE
from fastmmu.events import Op
from fastmmu.floors import ACT, House, Tally, run_acts
from fastmmu.qualification import POLICIES, entries02, entries12, make_house, make_seen, mmio_generation_of
from fastmmu.reference.qualification import BIT
from fastmmu.reference.qualification import House as Reference
from fastmmu.strategy import EPT_QUALIFICATION

NAME = EPT_QUALIFICATION.name
DATA, ALL, EXECUTE_ONLY, WOVEN = "data", "all", "all-execute-only", "woven"
WORKLOADS = tuple(f"{l1}/{orders}" for l1 in POLICIES for orders in (DATA, ALL, EXECUTE_ONLY, WOVEN))
LENGTH = 4  # accesses to each page
COPIES = 32  # pages with the same order
SEED = 2018
LETTER_OF = {bit: letter for letter, bit in BIT.items()}


@lru_cache(maxsize=4)
def accesses_of(orders: str, copies: int, length: int = LENGTH) -> np.ndarray:
    """ACT[n]: every order of so many accesses on pages of its own, page after page; woven: the pages mixed at random."""
    kinds = (READ, WRITE) if orders == DATA else (READ, WRITE, FETCH)
    every = np.array(list(itertools.product(kinds, repeat=length)), np.uint64)
    values = np.tile(every, (copies, 1))
    rows = np.zeros(values.size, ACT)
    gfns = np.repeat(np.arange(len(values), dtype=np.uint64), length).reshape(values.shape)
    rows["value"], rows["gfn"] = values.ravel(), gfns.ravel()
    if orders == WOVEN:  # shuffle the slots; a page's accesses fill its slots in their order
        slots = np.random.default_rng(SEED).permutation(rows["gfn"])
        rows[np.argsort(slots, kind="stable")] = rows.copy()
    return rows


def traced_accesses(context: Context) -> np.ndarray:
    """ACT[n]: a trace's accesses to devices, in their order, as if L2 made them; its pages numbered."""
    events = context.workload.events[context.workload.events["op"] == Op.DEVICE]
    rows = np.zeros(len(events), ACT)
    fetch, write = (events["access"] & np.uint8(bit) != 0 for bit in (PFERR.F, PFERR.W))
    rows["value"] = np.where(fetch, FETCH, np.where(write, WRITE, READ))
    rows["gfn"] = np.unique(events["value"] >> PAGE_SHIFT, return_inverse=True)[1]
    return rows


class Case:
    """The floors at the start, and the accesses, of one cell."""

    def __init__(self, context: Context, cell: Cell) -> None:
        self.strategy, (self.l1, orders) = cell.strategy, cell.workload.split("/")
        self.execute_only = orders == EXECUTE_ONLY
        if cell.workload in WORKLOADS:
            self.rows = accesses_of(orders, cell.value("copies", COPIES), cell.value("length", LENGTH))
        else:
            self.rows = traced_accesses(context)
        self.answers, self.seen = np.zeros(len(self.rows), np.uint64), make_seen()
        self.house: House = make_house(
            self.strategy, self.l1, execute_only=self.execute_only, pages=int(self.rows["gfn"].max()) + 1
        )
        self.floor = self.house.floor.copy()

    def reset(self) -> None:
        """EPT12 and EPT02 empty, nothing kept."""
        entries12(self.house)[:] = 0
        entries02(self.house)[:] = 0
        self.house.floor[:] = self.floor

    def run(self, stat: np.ndarray | None) -> None:
        """All accesses."""
        run_acts(self.house, stat, None, self.seen, self.rows, self.answers)

    def digest(self) -> int:
        """Of the tries of each access, and of both tables."""
        parts = (self.answers, entries12(self.house), entries02(self.house))
        return int.from_bytes(hashlib.blake2b(b"".join(part.tobytes() for part in parts), digest_size=8).digest(), "little")


def traced(context: Context) -> list[Cell]:
    """The trace's accesses to devices, under both policies of L1."""
    workloads = [f"{l1}/{context.workload.name}" for l1 in POLICIES]
    return [Cell(NAME, workload, strategy.name) for workload in workloads for strategy in EPT_QUALIFICATION.strategies]


def cells(context: Context) -> list[Cell]:
    """Both strategies on each workload; a trace that the user names comes first."""
    built = [Cell(NAME, workload, strategy.name) for workload in WORKLOADS for strategy in EPT_QUALIFICATION.strategies]
    return (traced(context) if context.own else []) + built


def check(context: Context, cell: Cell) -> Checked:
    """Counters, the tries of each access and both tables equal those of the plain-Python floors.

    Raises:
        CheckError: they do not.
    """
    case, stat = Case(context, cell), np.zeros(len(Tally), np.uint64)
    case.run(stat)
    ours = {one.name.lower(): int(stat[one]) for one in Tally}
    reference = Reference(case.strategy, case.l1, case.execute_only)
    tries = []
    for gfn, value in zip(case.rows["gfn"].tolist(), case.rows["value"].tolist(), strict=True):
        number, done = reference.access(gfn, LETTER_OF[value])
        tries.append(2 * number + (not done))
    pages = [reference.page(gfn) for gfn in range(int(case.house.pages))]
    rights = [sum(BIT[letter] for letter in page.granted) for page in pages]
    generations = [mmio_generation_of(spte) if spte else None for spte in entries02(case.house)]
    for what, mine, other in (
        ("counters", {name: n for name, n in ours.items() if n}, {name: n for name, n in reference.counters.items() if n}),
        ("tries", case.answers.tolist(), tries),
        ("entries of EPT12", (entries12(case.house) & (EPT.R | EPT.W | EPT.X)).tolist(), rights),
        ("entries of EPT02", generations, [page.spte for page in pages]),
    ):
        if mine != other:
            raise CheckError(f"{cell.name}: {what} differ from the reference")
    lower = ("never_completed", "violations", "misconfigurations", "injected", "unchanged", "ept12_walks")
    return Checked(ours, case.digest(), counts={name: ours[name] for name in lower})


def timed(context: Context, cell: Cell) -> Timed:
    """All accesses from empty tables, uncounted."""
    case = Case(context, cell)
    return Timed(lambda: case.run(None), case.reset, case.digest, len(case.rows))


def why_not(context: Context, cell: Cell) -> str:
    """Reads and writes are timed, where all of them complete; an access that is given up takes no time that means anything."""
    l1, orders = cell.workload.split("/")
    if cell.workload in WORKLOADS and orders != DATA:
        return "counted only"
    return "accesses that never complete" if (l1, cell.strategy) == (POLICIES[0], "stale") else ""


def each(counters: dict[str, int], name: str) -> str:
    """A count per access."""
    return f"{counters[name] / counters['accesses']:.3f}"


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """One table: L1's policy, the orders and the strategy, time where it was taken, and the counters."""
    rows = []
    plain = EPT_QUALIFICATION.strategies[0].name
    for workload, strategies in by_workload(suite).items():
        times = {name: round_values(metrics["time"]) for name, metrics in strategies.items() if "time" in metrics}
        for name, metrics in strategies.items():
            own = counters_of(next(iter(metrics.values())))
            ratio = ratio_text(times[plain], times[name], cost=False) if plain in times and name in times else "-"
            speed = nanoseconds(times[name]) if name in times else "-"
            shares = (each(own, which) for which in ("violations", "misconfigurations", "injected", "ept12_walks"))
            rows.append((f"{workload} / {name}", ratio, *counts(own, "accesses", "never_completed"), *shares, speed))
    head = (
        "L1 / orders / strategy", f"speed-up over {plain}", "accesses", "never complete", "violations", "misconfigurations",
        "injected", "EPT12 walks", "ns per access",
    )  # fmt: skip
    note = (
        f"All orders of {LENGTH} accesses, each on pages of its own. data: reads and writes; all: fetches too; all-execute-only: "
        "with execute-only pages in L1's EPT; woven: as all, the pages mixed at random instead of one after the other. An "
        "access that never completes is counted until the whole state recurs, then given up. Violations, "
        "misconfigurations, injected violations and walks are per access. The time is the model's: an exit costs nothing. A "
        "trace's accesses to devices come in its own order."
    )
    return [Table("ept-qualification", head, rows, note)]


def charts(experiment: Experiment, suite: dict[str, pyperf.Benchmark]) -> list[Chart]:
    """The accesses that never complete, of a hundred."""
    bars = []
    for workload, strategies in by_workload(suite).items():
        for name, metrics in strategies.items():
            own = counters_of(next(iter(metrics.values())))
            part = 100 * own["never_completed"] / own["accesses"]
            bars.append(Bar(workload, name, part, f"{part:.1f} % of {own['accesses']:,}"))
    return [Bars(NAME, "Accesses that never complete", "% of the accesses, by L1's policy and orders", tuple(bars))] if bars else []


DESCRIPTION = Description(
    question="L2 touches a device page whose model sits in L0, and L1's table does not grant the access: which access does L0 say"
    " it was?",
    source="“[PATCH] X86/KVM: Update the exit_qualification access bits while walking an address”, KarimAllah Ahmed, 28 February "
    "2018, and his answer to Paolo Bonzini of 4 March",
    claim="The qualification that L1 is told is that of the last violation, though this exit may be a misconfiguration, which has"
    " none: after a read, a write is announced as a read, L1 adds only the read bit, and this goes on without any progress. "
    "Derived from the access itself it is right. A commit that maps device memory writable at a read hid the error by accident.",
    not_shown="L2's own page tables, A and D in EPT12, the exits that L1 causes when it writes its table and resumes L2, several "
    "vCPUs. The time is the model's, in which an exit costs nothing: where both strategies are timed they do the same work.",
    year=2018,
)
PARAMETERS = (
    Parameter("length", "accesses to each page, in every order", 1, 6, lambda _, cell, *one: built_only(cell, *one)),
    Parameter("copies", "pages with the same order", 1, 4_096, lambda _, cell, *one: built_only(cell, *one)),
)


def built_only(cell: Cell, name: str, value: int) -> Cell | None:
    """A trace has its own orders."""
    return cell.having(name, value) if cell.workload in WORKLOADS else None


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    why_not,
    tables,
    quick=False,
    description=DESCRIPTION,
    over=Over("stale"),
    charts=charts,
    traced=traced,
    unanswered=without_devices,
    parameters=PARAMETERS,
    priced=Priced("accesses", exits=("violations", "misconfigurations"), endless=("never_completed",)),
)
