"""The nested-walk experiment: what does a two-dimensional walk cost over a one-dimensional one, and over a C loop of the same walk?

Guests mapped by 4 KiB pages in both dimensions, random addresses, one thread, the tables in huge pages of the host: 1 GiB with
addresses from 32 MiB of it, whose tables stay in the caches of a core, and 64 GiB.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyperf

from bench.experiment import Cell, Checked, CheckError, Context, Description, Experiment, Over, Timed
from bench.peers import c_loop
from bench.tables import Table, by_workload, nanoseconds, ratio_text, round_values
from bench.walk_speed import HUGE, LEAF, digest_of
from fastmmu import WRITE, Cpu, Ept, EptCaps, GuestMemory, Npt, translate_many, translate_nested_many
from fastmmu.bits import CR0, CR4, EFER, EPT
from fastmmu.ept import ept_state
from fastmmu.nested import walk_nested_column
from fastmmu.nested_caches import make_nested_caches
from fastmmu.processor import mmu_of
from fastmmu.state import TRAIL_LENGTH
from fastmmu.translate_nested import host_of, make_scratch
from fastmmu.walk import walk_column

NAME = "nested-walk"
SIZES = {"hot": (1, 32 << 20), "64gib": (64, 64 << 30)}  # GiB of the guest, and the bytes of it that are walked
PEERS = ("walk", "walk-many", "c", "scalar", "npt", "many")
WALKS = 1 << 20
GIB = 1 << 30
CAPS = EptCaps(46)
EPT_POINTER = int(EPT.R | EPT.W | EPT.X)
EPT_LEAF = EPT_POINTER | 6 << 3


def put_tables(words: np.ndarray, start: int, pages: int, pointer: int, leaf: int, shift: int) -> int:
    """Four levels of tables at byte address `start` that map `pages` pages to those `shift` bytes higher; returns their end."""
    counts = [1, -(-pages // (1 << 27)), -(-pages // (1 << 18)), -(-pages // 512)]
    starts = [start + 4096 * sum(counts[:level]) for level in range(4)]
    frames = np.arange(pages, dtype=np.uint64) << np.uint64(12)
    words[starts[3] >> 3 : (starts[3] >> 3) + pages] = frames + np.uint64(shift | leaf)
    for level in range(3):
        below = np.arange(counts[level + 1], dtype=np.uint64) * np.uint64(4096) + np.uint64(starts[level + 1])
        words[starts[level] >> 3 : (starts[level] >> 3) + len(below)] = below | np.uint64(pointer)
    return start + 4096 * sum(counts)


class Guest:
    """A guest mapped one to one by its own tables, which lie at its physical address 0; the host holds it from `PLACE` on."""

    def __init__(self, workload: str) -> None:
        gib, span = SIZES[workload]
        pages = gib << 18
        table_pages = 1 + -(-gib // 512) + gib + (pages >> 9)
        size = 4 * HUGE + 8 * 4096 * table_pages
        size += -size % HUGE
        self.ram = GuestMemory(size)
        self.ram.advise_huge(0, size)
        words = self.ram.words
        # the host's memory: EPT, nested tables, the same tables for a walk in one dimension, and the guest's own
        npt = put_tables(words, HUGE, pages, EPT_POINTER, EPT_LEAF, 0)
        one = put_tables(words, npt, pages, LEAF, LEAF, 0)
        self.one_root = one
        place = put_tables(words, one, pages, LEAF, LEAF, 0)
        place += -place % 4096
        put_guest(words, place, pages)
        self.place, self.npt_root = place, npt
        for start, leaf in ((HUGE, EPT_LEAF), (npt, LEAF)):
            first = leaf_start(start, pages) >> 3
            words[first : first + pages] = (np.arange(pages, dtype=np.uint64) << np.uint64(12)) + np.uint64(place | leaf)
        efer = int(EFER.LME | EFER.LMA | EFER.NX)
        self.cpu = Cpu(cr0=int(CR0.PE | CR0.WP | CR0.PG), cr3=0, cr4=int(CR4.PAE), efer=efer, maxphyaddr=46)
        self.ept = Ept(HUGE | 6 | 3 << 3, CAPS)
        self.npt = Npt(npt)
        rng = np.random.default_rng(gib)
        self.gvas = rng.integers(0, span, WALKS, dtype=np.uint64) & ~np.uint64(7)
        self.hpas = self.gvas + np.uint64(place)


def leaf_start(start: int, pages: int) -> int:
    """Where `put_tables` puts the leaf tables."""
    return start + 4096 * (1 + -(-pages // (1 << 27)) + -(-pages // (1 << 18)))


def put_guest(words: np.ndarray, place: int, pages: int) -> None:
    """The guest's tables: its physical addresses begin at 0, in the host's memory at `place`."""
    end = put_tables(words[place >> 3 :], 0, pages, LEAF, LEAF, 0)
    if place + end > 8 * len(words):
        raise ValueError("the guest's tables do not fit")


@lru_cache(maxsize=1)
def guest(workload: str) -> Guest:
    """The guest of a workload's name; one is kept."""
    return Guest(workload)


def cells(context: Context) -> list[Cell]:
    """Every peer on both guests."""
    return [Cell(NAME, workload, peer) for workload in SIZES for peer in PEERS]


def check(context: Context, cell: Cell) -> Checked:
    """Translate all in both second dimensions and compare with arithmetic.

    Raises:
        CheckError: an address differs.
    """
    one = guest(cell.workload)
    for nested in (one.ept, one.npt):
        answers = translate_nested_many(one.ram, one.cpu, nested, one.gvas, WRITE)
        if not np.array_equal(answers.hpa, one.hpas):
            wrong = int(np.flatnonzero(answers.hpa != one.hpas)[0])
            raise CheckError(f"{cell.name}: gva {int(one.gvas[wrong]):#x} translates to {int(answers.hpa[wrong]):#x}")
    return Checked({"walks": WALKS}, digest_of(one.gvas if cell.strategy in ("walk", "walk-many") else one.hpas))


def timed(context: Context, cell: Cell) -> Timed:
    """The work of a peer."""
    one = guest(cell.workload)
    out, write = np.zeros(WALKS, np.uint64), np.uint64(WRITE)
    state, words, gvas = one.ram.state, one.ram.words, one.gvas
    flat = Cpu(cr0=one.cpu.cr0, cr3=one.one_root, cr4=one.cpu.cr4, efer=one.cpu.efer, maxphyaddr=46)
    kept: list = []
    if cell.strategy == "many":

        def many() -> None:
            kept[:] = [translate_nested_many(one.ram, one.cpu, one.ept, gvas, WRITE)]

        return Timed(many, kept.clear, lambda: digest_of(kept[0].hpa), WALKS)
    if cell.strategy == "walk-many":

        def walk_many() -> None:
            kept[:] = [translate_many(one.ram, flat, gvas, WRITE)]

        return Timed(walk_many, kept.clear, lambda: digest_of(kept[0].gpa), WALKS)
    if cell.strategy == "c":
        eptp, reserved = one.ept.eptp, int(ept_state(one.ept.eptp, CAPS).reserved[1])
        return Timed(
            lambda: c_loop.walk_nested(words, one.ram.size, one.cpu.cr3, eptp, reserved, WRITE, gvas, out),
            lambda: None, lambda: digest_of(out), WALKS,
        )  # fmt: skip
    if cell.strategy == "walk":
        mmu, trail = mmu_of(one.ram, flat), np.zeros(TRAIL_LENGTH, np.uint64)
        return Timed(lambda: walk_column(state, mmu, trail, gvas, write, out), lambda: None, lambda: digest_of(out), WALKS)
    mmu, scratch, none = mmu_of(one.ram, one.cpu), make_scratch(), make_nested_caches(False, False)
    host = host_of(one.npt if cell.strategy == "npt" else one.ept)
    return Timed(
        lambda: walk_nested_column(state, mmu, host, scratch, none, None, gvas, write, out),
        lambda: None, lambda: digest_of(out), WALKS,
    )  # fmt: skip


def why_not(context: Context, cell: Cell) -> str:
    """The C loop needs a compiler."""
    return "no gcc" if cell.strategy == "c" and not c_loop.available() else ""


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Cost over the walk in one dimension, rate over the C loop."""
    rows = []
    for workload, strategies in by_workload(suite).items():
        times = {peer: round_values(metrics["time"]) for peer, metrics in strategies.items() if "time" in metrics}
        for peer, own in times.items():
            plain = "walk-many" if peer in ("many", "walk-many") else "walk"
            cost = ratio_text(times[plain], own, cost=True) if plain in times else "-"
            rate = ratio_text(times["c"], own, cost=False) if "c" in times else "-"
            rows.append((f"{workload} / {peer}", cost, rate, nanoseconds(own)))
    head = ("guest / walker", "cost over the one-dimensional walk", "rate over the C loop", "ns per walk")
    note = "many over walk-many, the others over walk. "
    note += f"{WALKS:,} random addresses a run, written; 4 x 4 levels of 4 KiB pages, no caches; hot: addresses of 32 MiB."
    return [Table("two-dimensional walks", head, rows, note)]


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    why_not,
    tables,
    by_default=False,
    quick=False,
    description=Description(
        "What does a two-dimensional walk cost over a one-dimensional one, and over a C loop of the same walk?",
    ),
    over=lambda cell: Over("walk-many" if "many" in cell.strategy else "walk", cost=True),
)
