"""The access-checks experiment: the permission of a guest mapping, checked after the walk, in it per level, or in it once."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyperf

from bench.experiment import Cell, Checked, CheckError, Context, Description, Experiment, Over, Parameter, Priced, Timed
from bench.replay_cost import EndTables
from bench.replay_cost import unanswered as nothing_left
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, nanoseconds, ratio_text, round_values
from fastmmu import Cpu, GuestMemory
from fastmmu.access_checks import Check, Method, check_accesses
from fastmmu.bits import CR0, CR4, EFER, GPTE64, PFERR, WORDS_PER_PAGE
from fastmmu.processor import mmu_of
from fastmmu.reference import access_checks as reference
from fastmmu.reference.walk import Memory, Translation, Walker
from fastmmu.state import TRAIL_LENGTH
from fastmmu.strategy import ACCESS_CHECKS
from fastmmu.trace import load_snapshot

SNAPSHOTS = ("linux-boot", "fork-exec")
SNAPSHOT_NAMES = tuple(f"snapshot-{name}" for name in SNAPSHOTS)
MATRIX = {"matrix-wp1": True, "matrix-wp0": False}
READ, WRITE, USER = 0, int(PFERR.W), int(PFERR.U)
KINDS = (USER | WRITE, USER, WRITE, READ)
CLEAR_ACCESSED = ~GPTE64.A
FOLDER = Path(__file__).parent / "traces"
WORD = (1 << 64) - 1
MOST_PAGES = 16_384  # of a trace: the reference walks each sixteen times


class Case:
    """Guest memory at the start, registers, the accesses, and what the architecture says of each.

    `pages` are frames that hold page tables, where memory is too large to look for them.
    """

    def __init__(self, memory: GuestMemory, cpu: Cpu, gvas: np.ndarray, pages: np.ndarray | None = None) -> None:
        self.memory, self.cpu, self.known = memory, cpu, pages
        self.pages = np.unique(self.nonzero() // WORDS_PER_PAGE)
        self.start = memory.words.reshape(-1, WORDS_PER_PAGE)[self.pages].copy()
        self.gvas = np.repeat(gvas, len(KINDS))
        self.accesses = np.tile(np.array(KINDS, np.uint64), len(gvas))
        walker = self.walker()
        pairs = zip(self.gvas.tolist(), self.accesses.tolist(), strict=True)
        self.truth: list[Translation] = [walker.walk(cpu.cr3, gva, access, update=False) for gva, access in pairs]
        self.truth_ok = np.array([one.ok for one in self.truth])
        self.truth_pferr = np.array([one.pferr for one in self.truth], np.uint64)

    def nonzero(self) -> np.ndarray:
        """Indices of the words that are not zero."""
        if self.known is None:
            return np.flatnonzero(self.memory.words)
        rows, columns = np.nonzero(self.memory.words.reshape(-1, WORDS_PER_PAGE)[self.known])
        return self.known[rows] * WORDS_PER_PAGE + columns

    def walker(self) -> Walker:
        """The reference's processor, on a copy of the memory at the start."""
        gpas = (self.pages[:, None] * WORDS_PER_PAGE + np.arange(WORDS_PER_PAGE)) * 8
        words = {int(gpa): int(word) for gpa, word in zip(gpas.ravel(), self.start.ravel(), strict=True) if word}
        return Walker(Memory(self.memory.slots, words), self.cpu)

    def reset(self) -> None:
        """Guest memory as at the start."""
        self.memory.words.reshape(-1, WORDS_PER_PAGE)[self.pages] = self.start

    def part(self, pages: int) -> Case:
        """The same guest, the first pages of it only; guest memory as at the start."""
        self.reset()
        return Case(self.memory, self.cpu, self.gvas[:: len(KINDS)][:pages], self.known)


def snapshot_case(name: str) -> Case:
    """A real guest's tables with all A bits cleared; each page that QEMU listed is accessed in four ways."""
    path = FOLDER / f"snapshot-{name}.npz"
    snapshot = load_snapshot(path)
    words = snapshot.memory.words
    where = np.flatnonzero(words)
    words[where] &= CLEAR_ACCESSED
    cpu = snapshot.cpu
    plain = Cpu(cr0=cpu.cr0, cr3=cpu.cr3, cr4=int(CR4.PAE), efer=cpu.efer, maxphyaddr=cpu.maxphyaddr)  # no SMEP, SMAP, keys yet
    return Case(snapshot.memory, plain, np.load(path)["tlb_gva"].astype(np.uint64))


def trace_case(context: Context) -> Case:
    """The tables at the end of a recorded stream, all A bits cleared; each page that the busiest address space touched."""
    end = EndTables(context)
    tables = np.array(sorted(context.workload.tables), np.int64)
    end.vm.memory.words.reshape(-1, WORDS_PER_PAGE)[tables] &= CLEAR_ACCESSED
    values, times = np.unique(end.cr3s, return_counts=True)
    cr3 = values[times.argmax()]
    pages, first = np.unique(end.gvas[end.cr3s == cr3] & np.uint64(WORD - 4095), return_index=True)
    return Case(end.vm.memory, replace(context.workload.cpu, cr3=int(cr3)), pages[np.argsort(first)][:MOST_PAGES], tables)


def matrix_case(write_protect: bool) -> Case:
    """Every combination of P, W, U over all four levels of a walk, each with tables of its own."""
    flags = [sum(bits) for n in range(4) for bits in itertools.combinations((1, 2, 4), n)]
    memory = GuestMemory(64 << 20)
    words, free = memory.words, itertools.count(0x2000, 0x1000)
    root, gvas = 0x1000, []
    tables: dict[tuple[int, ...], int] = {(): root}
    for path in itertools.chain.from_iterable(itertools.product(range(8), repeat=depth) for depth in range(1, 5)):
        table = tables[path[:-1]]
        target = next(free) if len(path) < 4 else 0x100_0000 + (len(gvas) << 12)
        words[(table >> 3) + path[-1]] = target | flags[path[-1]]
        if len(path) < 4:
            tables[path] = target
        else:
            gvas.append(sum(index << shift for index, shift in zip(path, (39, 30, 21, 12), strict=True)))
    cr0 = int(CR0.PE | CR0.PG) | (int(CR0.WP) if write_protect else 0)
    cpu = Cpu(cr0=cr0, cr3=root, cr4=int(CR4.PAE), efer=int(EFER.LME | EFER.LMA))
    return Case(memory, cpu, np.array(gvas, np.uint64))


@lru_cache(maxsize=4)
def built_case(workload: str) -> Case:
    """The case of a workload's name."""
    if workload in MATRIX:
        return matrix_case(MATRIX[workload])
    return snapshot_case(workload.removeprefix("snapshot-"))


def is_built(cell: Cell) -> bool:
    """Whether the cell is on a workload of the experiment's own, not on a trace."""
    return cell.workload in MATRIX or cell.workload in SNAPSHOT_NAMES


def case_of(context: Context, cell: Cell) -> Case:
    """The case of a cell."""
    whole = built_case(cell.workload) if is_built(cell) else context.once(ACCESS_CHECKS.name, lambda: trace_case(context))
    pages = cell.value("pages", 0)
    return context.once((cell.workload, pages), lambda: whole.part(pages)) if pages else whole


def on_all(workloads: Iterable[str]) -> list[Cell]:
    """Three ways to check on each workload."""
    return [Cell(ACCESS_CHECKS.name, name, strategy.name) for name in workloads for strategy in ACCESS_CHECKS.strategies]


def traced(context: Context) -> list[Cell]:
    """The trace's tables."""
    return on_all([context.workload.name])


def cells(context: Context) -> list[Cell]:
    """The snapshots and the matrix; a trace that the user names comes first."""
    return (traced(context) if context.own else []) + on_all((*SNAPSHOT_NAMES, *MATRIX))


def method_of(strategy: str) -> Method:
    """Number of a strategy in the kernel."""
    return Method[strategy.upper().replace("-", "_")]


def digest_of(answers: np.ndarray) -> int:
    """Digest of the answers, order included."""
    return int.from_bytes(hashlib.blake2b(answers.tobytes(), digest_size=8).digest(), "little")


def check(context: Context, cell: Cell) -> Checked:
    """Counters, equal to those of the plain-Python walks, as are the tables left.

    Raises:
        CheckError: they are not.
    """
    case = case_of(context, cell)
    case.reset()
    stat, answers = np.zeros(len(Check), np.uint64), np.zeros(len(case.gvas), np.uint64)
    trail = np.zeros(TRAIL_LENGTH, np.uint64)
    columns = (case.gvas, case.accesses, case.truth_ok, case.truth_pferr, answers)
    check_accesses(method_of(cell.strategy), case.memory.state, mmu_of(case.memory, case.cpu), trail, stat, *columns)
    ours = {one.name.lower(): int(stat[one]) for one in Check}
    walker = case.walker()
    pairs = list(zip(case.gvas.tolist(), case.accesses.tolist(), strict=True))
    theirs = reference.run(cell.strategy, walker, case.cpu.cr3, pairs, case.truth)
    words = case.memory.words
    left = {8 * int(index): int(words[index]) for index in case.nonzero()}
    if {name: n for name, n in ours.items() if n} != {name: n for name, n in theirs.items() if n}:
        raise CheckError(f"{cell.name}: counters differ from the reference: kernel {ours}, reference {dict(theirs)}")
    if left != {gpa: word for gpa, word in walker.memory.words.items() if word}:
        raise CheckError(f"{cell.name}: page tables differ from the reference's")
    lower = ("exits", "walks", "wrong_codes", "wrong_outcomes", "refaults", "endless", "accessed_by_failing")
    return Checked(ours, digest_of(answers), counts={name: ours[name] for name in lower})


def timed(context: Context, cell: Cell) -> Timed:
    """All accesses, each from an empty shadow; A bits cleared before."""
    case = case_of(context, cell)
    answers, trail = np.zeros(len(case.gvas), np.uint64), np.zeros(TRAIL_LENGTH, np.uint64)
    mmu, method = mmu_of(case.memory, case.cpu), method_of(cell.strategy)
    columns = (case.gvas, case.accesses, case.truth_ok, case.truth_pferr, answers)

    def once() -> None:
        check_accesses(method, case.memory.state, mmu, trail, None, *columns)

    return Timed(once, case.reset, lambda: digest_of(answers), len(case.gvas))


def why_not(context: Context, cell: Cell) -> str:
    """One real guest is timed, and a trace; the others are counted."""
    return "" if cell.workload == SNAPSHOT_NAMES[0] or not is_built(cell) else "counted only"


def unanswered(context: Context) -> str:
    """The walks of that time had four levels."""
    if context.workload.cpu.cr4 & int(CR4.LA57):
        return "its paging has five levels; the walks of 2007 have four"
    return nothing_left(context)


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """One table: workload and strategy, the ratio where it was timed, and the counters that explain it."""
    rows = []
    plain = ACCESS_CHECKS.strategies[0].name
    for workload, strategies in by_workload(suite).items():
        times = {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items() if "time" in metrics}
        for strategy, metrics in strategies.items():
            own = counters_of(next(iter(metrics.values())))
            ratio = ratio_text(times[plain], times[strategy], cost=False) if plain in times and strategy in times else "-"
            speed = nanoseconds(times[strategy]) if strategy in times else "-"
            names = ("accesses", "exits", "refaults", "endless", "wrong_codes", "accessed_by_failing")
            rows.append((f"{workload} / {strategy}", ratio, speed, *counts(own, *names)))
    head = (
        "workload / strategy", f"speed-up over {plain}", "ns per access", "accesses", "exits", "refaults", "endless",
        "wrong codes", "A by failing",
    )  # fmt: skip
    note = (
        "Each page is written and read, by user code and by the kernel, from an empty shadow. Refaults: faults called fixed that "
        "faulted again; endless: called fixed for ever, because the leaf alone grants what an upper level denies; A by failing: "
        "accessed bits set by accesses that the architecture denies."
    )
    return [Table("access-checks", head, rows, note)]


DESCRIPTION = Description(
    question="A hypervisor that shadows a guest's page tables must know which access the guest's mapping grants: what is it worth"
    " to check that in the walk, and once?",
    source="“[PATCH 3/5] KVM: MMU: Perform access checks in walk_addr()”, Avi Kivity, 23 January 2007",
    claim="Checked in the walk, accessed bits are no longer set for accesses that fail, faults are no longer called fixed that "
    "would fail the checks, which cost an unnecessary exit, and the guest's error codes are right.",
    not_shown="What an exit costs: a refault costs one more, and the times here are those of the walks alone. NX, reserved bits "
    "and keys came later and are left out of the older two.",
    year=2007,
)
PAGES = Parameter("pages", "pages that are accessed, each in four ways, from the first on", 1, 1 << 20)

EXPERIMENT = Experiment(
    ACCESS_CHECKS.name,
    cells,
    check,
    timed,
    why_not,
    tables,
    quick=False,
    description=DESCRIPTION,
    over=Over("after-walk"),
    traced=traced,
    unanswered=unanswered,
    parameters=(PAGES,),
    priced=Priced("accesses", exits=("exits",), endless=("endless",)),
)
