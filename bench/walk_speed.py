"""The walk and threads experiments: how fast is a random walk, against a C loop, the memory itself, and other walkers?

Guests of 1, 16 and 256 GiB, identity-mapped by 4 KiB pages, random addresses, one thread, the tables in huge pages of the host.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyperf

from bench.experiment import Cell, Checked, CheckError, Context, Description, Experiment, Over, Timed
from bench.peers import c_loop, emulator, forensics
from bench.results import counters_of
from bench.tables import Table, best_ratio, by_workload, nanoseconds, ratio_text, round_values
from fastmmu import WRITE, Cpu, GuestMemory, Translations, translate_many
from fastmmu.bits import CR0, CR4, EFER, GPTE64
from fastmmu.paging import reserved_masks
from fastmmu.processor import mmu_of
from fastmmu.state import TRAIL_LENGTH
from fastmmu.walk import walk_column

NAME, THREADS_NAME = "walk", "threads"
SIZES = {"1gib": 1, "16gib": 16, "256gib": 256, "256gib-mix": 256}
PEERS = ("c", "bound", "scalar", "many")
SLOW_PEERS = ("unicorn", "volatility3")
WALKS = 1 << 20
SLOW_WALKS = {"unicorn": 1 << 16, "volatility3": 1 << 11}
THREAD_ROUNDS = 20
TABLES = 0x10_0000
PLACE = 0x3000_0000  # of the emulator's loop and list, far from the tables
LEAF = int(GPTE64.P | GPTE64.W | GPTE64.U | GPTE64.A | GPTE64.D)
GIB = 1 << 30
MEBIBYTE = 1 << 20
HUGE = 2 * MEBIBYTE
# The mix, shuffled: shares of walks, and the GiB of the guest that they go to.
MIX = {"4 KiB": (0.90, 0, 230), "2 MiB": (0.08, 230, 251), "not present": (0.01, 251, 253), "read-only": (0.01, 253, 256)}


class Guest:
    """An identity-mapped guest, the addresses to walk, and the answers expected (0 for a fault)."""

    def __init__(self, gib: int, mix: bool) -> None:
        pages = gib << 18
        counts = [1, -(-gib // 512), gib, pages >> 9]  # tables of level 4, 3, 2, 1
        starts = TABLES + 4096 * np.cumsum([0, *counts[:-1]])
        self.table_bytes = 4096 * sum(counts)
        self.ram = GuestMemory(max(gib * GIB, TABLES + self.table_bytes + HUGE))
        self.ram.advise_huge(0, TABLES + self.table_bytes + HUGE - 1 & ~(HUGE - 1))
        words = self.ram.words
        self.leaf = int(starts[3]) >> 3
        words[self.leaf : self.leaf + pages] = np.arange(pages, dtype=np.uint64) << np.uint64(12) | np.uint64(LEAF)
        for level in range(3):
            below = np.arange(counts[level + 1], dtype=np.uint64) * np.uint64(4096) + np.uint64(starts[level + 1])
            first = int(starts[level]) >> 3
            words[first : first + len(below)] = below | np.uint64(LEAF)
        if mix:
            self.make_mix(words, int(starts[2]) >> 3)
        self.cpu = Cpu(
            cr0=int(CR0.PE | CR0.WP | CR0.PG), cr3=TABLES, cr4=int(CR4.PAE), efer=int(EFER.LME | EFER.LMA | EFER.NX), maxphyaddr=46
        )
        rng = np.random.default_rng(gib)
        if mix:
            parts = [
                rng.integers(low * GIB, high * GIB, round(WALKS * share), dtype=np.uint64) for share, low, high in MIX.values()
            ]
            self.gvas = np.concatenate(parts)
            rng.shuffle(self.gvas)
            self.gpas = np.where(self.gvas < np.uint64(MIX["not present"][1] * GIB), self.gvas, np.uint64(0))
        else:
            self.gvas = rng.integers(0, gib * GIB, WALKS, dtype=np.uint64) & ~np.uint64(7)
            self.gpas = self.gvas

    def make_mix(self, words: np.ndarray, directory: int) -> None:
        """2 MiB pages, absent pages and read-only pages in their ranges."""
        _, low, high = MIX["2 MiB"]
        frames = np.arange(low << 9, high << 9, dtype=np.uint64) << np.uint64(21)
        words[directory + (low << 9) : directory + (high << 9)] = frames | np.uint64(LEAF) | GPTE64.PS
        for name, flag in (("not present", GPTE64.P), ("read-only", GPTE64.W)):
            _, low, high = MIX[name]
            words[self.leaf + (low << 18) : self.leaf + (high << 18)] &= ~flag


@lru_cache(maxsize=1)
def guest(workload: str) -> Guest:
    """The guest of a workload's name; one is kept."""
    return Guest(SIZES[workload], workload.endswith("-mix"))


def cells(context: Context) -> list[Cell]:
    """Peers on each size; the slow ones on the smallest."""
    fast = [
        Cell(NAME, workload, peer) for workload in SIZES for peer in PEERS if not (workload.endswith("-mix") and peer == "bound")
    ]
    return fast + [Cell(NAME, "1gib", peer) for peer in SLOW_PEERS]


def thread_cells(context: Context) -> list[Cell]:
    """One thread and two, on the largest guest."""
    return [Cell(THREADS_NAME, "256gib", number) for number in ("one", "two")]


def digest_of(array: np.ndarray) -> int:
    """Digest of an array, order included."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).digest(), "little")


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def check(context: Context, cell: Cell) -> Checked:
    """Translate all, compare with the identity (or a fault), and count what memory it took.

    Raises:
        CheckError: an address differs.
    """
    guest.cache_clear()
    translate_many(GuestMemory(4096), Cpu(cr0=0, cr3=0, cr4=0, efer=0), [0])  # compiled and loaded before memory is counted
    before = resident()
    one = guest(cell.workload)
    batch = one.gvas.nbytes + one.gpas.nbytes * (one.gpas is not one.gvas)
    answers = translate_many(one.ram, one.cpu, one.gvas, WRITE)
    growth = resident() - before
    batch += sum(column.nbytes for column in answers)
    if not np.array_equal(answers.gpa, one.gpas):
        wrong = int(np.flatnonzero(answers.gpa != one.gpas)[0])
        raise CheckError(f"{cell.name}: gva {int(one.gvas[wrong]):#x} translates to {int(answers.gpa[wrong]):#x}")
    counters = {"walks": WALKS, "table_bytes": one.table_bytes, "batch_bytes": batch, "resident_growth_bytes": growth}
    return Checked(counters, expected(one, cell.strategy))


def expected(one: Guest, strategy: str) -> int:
    """Digest that a strategy must come to."""
    if strategy == "bound":
        return digest_of(leaves(one))
    if strategy == "unicorn":
        gvas = one.gvas[: SLOW_WALKS["unicorn"]]
        emulator.put_list(one.ram, gvas, PLACE)
        return int(np.add.reduce(one.ram.words[gvas >> np.uint64(3)]))
    if strategy == "volatility3":
        return digest_of(one.gpas[: SLOW_WALKS["volatility3"]])
    return digest_of(one.gpas)


def leaves(one: Guest) -> np.ndarray:
    """The leaf entries that the walks read, by arithmetic."""
    return (one.gvas >> np.uint64(12) << np.uint64(12)) | np.uint64(LEAF)


def timed(context: Context, cell: Cell) -> Timed:
    """The work of a peer."""
    one = guest(cell.workload)
    if cell.strategy in ("one", "two"):
        return many_timed(one, 2 if cell.strategy == "two" else 1)
    out = np.empty(WALKS, np.uint64)
    words, gvas = one.ram.words, one.gvas
    if cell.strategy == "c":
        reserved = int(reserved_masks(one.cpu)[1])
        return result(lambda: c_loop.walk_all(words, one.ram.size, one.cpu.cr3, reserved, WRITE, gvas, out), out)
    if cell.strategy == "bound":
        index = np.uint64(one.leaf) + (gvas >> np.uint64(12))
        return result(lambda: c_loop.read_all(words, index, out), out)
    if cell.strategy == "scalar":
        state, mmu, trail = one.ram.state, mmu_of(one.ram, one.cpu), np.zeros(TRAIL_LENGTH, np.uint64)
        return result(lambda: walk_column(state, mmu, trail, gvas, np.uint64(WRITE), out), out)
    if cell.strategy == "unicorn":
        return unicorn_timed(one)
    if cell.strategy == "volatility3":
        return volatility_timed(one)
    return many_timed(one, 1)


def result(once, out: np.ndarray) -> Timed:
    """Work whose answers come into `out`."""
    return Timed(once, lambda: None, lambda: digest_of(out), len(out))


def many_timed(one: Guest, threads: int) -> Timed:
    """`translate_many`, as its users call it, allocation of the answers included; by halves where there are two threads."""
    parts = np.array_split(one.gvas, threads)
    kept: list[Translations] = []
    pool = ThreadPoolExecutor(threads)

    def once() -> None:
        if threads == 1:
            kept[:] = [translate_many(one.ram, one.cpu, one.gvas, WRITE)]
        else:
            kept[:] = pool.map(lambda part: translate_many(one.ram, one.cpu, part, WRITE), parts)

    return Timed(once, kept.clear, lambda: digest_of(np.concatenate([many.gpa for many in kept])), WALKS)


def unicorn_timed(one: Guest) -> Timed:
    """The emulator's loop over a part of the addresses."""
    machine = emulator.Emulator(one.ram, one.cpu, one.gvas[: SLOW_WALKS["unicorn"]], PLACE)
    total = [0]

    def once() -> None:
        total[0] = machine.run()

    return Timed(once, lambda: None, lambda: total[0], SLOW_WALKS["unicorn"])


def volatility_timed(one: Guest) -> Timed:
    """volatility3 over a smaller part."""
    end = TABLES + one.table_bytes
    translate = forensics.translator(one.ram.words[: end // 8].tobytes(), one.cpu.cr3)
    gvas, kept = one.gvas[: SLOW_WALKS["volatility3"]], [np.zeros(0, np.uint64)]

    def once() -> None:
        kept[0] = forensics.translate_all(translate, gvas)

    return Timed(once, lambda: None, lambda: digest_of(kept[0]), len(gvas))


def why_not(context: Context, cell: Cell) -> str:
    """Peers that are not installed."""
    missing = {
        "c": "" if c_loop.available() else "no gcc",
        "bound": "" if c_loop.available() else "no gcc",
        "unicorn": "" if emulator.available() else "Unicorn is not installed",
        "volatility3": "" if forensics.available() else "volatility3 is not installed",
    }
    return missing.get(cell.strategy, "")


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Rates against the C loop and the bound, and the memory it took."""
    rows, memory = [], []
    for workload, strategies in by_workload(suite).items():
        times = {peer: round_values(metrics["time"]) for peer, metrics in strategies.items() if "time" in metrics}
        for peer, own in times.items():
            against_c = ratio_text(times["c"], own, cost=False) if "c" in times else "-"
            against_bound = ratio_text(times["bound"], own, cost=False) if "bound" in times else "-"
            rows.append((f"{workload} / {peer}", against_c, against_bound, nanoseconds(own)))
        if "many" in strategies and "time" in strategies["many"]:
            own = counters_of(strategies["many"]["time"])
            sizes = (own["resident_growth_bytes"], own["table_bytes"], own["batch_bytes"])
            memory.append((workload, *(f"{size / MEBIBYTE:.1f}" for size in sizes)))
    head = ("guest / walker", "rate over the C loop", "rate over the bound", "ns per walk")
    note = (
        f"{WALKS:,} random addresses a run, written; the bound reads one word for each; mix: "
        + ", ".join(f"{share:.0%} {name}" for name, (share, _, _) in MIX.items())
        + ". Unicorn runs a loop of reads in its guest; volatility3 is called once for each address."
    )
    memory_head = ("guest", "growth of resident memory, MiB", "tables, MiB", "arrays of the batch, MiB")
    return [Table("random walks", head, rows, note), Table("memory of random walks", memory_head, memory)]


def thread_tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Two threads against one."""
    times = {
        peer: round_values(metrics["time"]) for metrics_by in by_workload(suite).values() for peer, metrics in metrics_by.items()
    }
    if "one" not in times:
        return []
    rows = [
        (name, ratio_text(times["one"], own, cost=False), best_ratio(times["one"], own), nanoseconds(own))
        for name, own in times.items()
    ]
    head = ("threads", "rate over one thread", "best round", "ns per walk")
    return [Table("translate_many in two threads, 256 GiB", head, rows, f"{len(times['one'])} interleaved rounds.")]


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    why_not,
    tables,
    by_default=False,
    description=Description(
        "How fast is a random walk, against a C loop, the memory itself, and other walkers?",
    ),
    over=Over("c"),
    measured=("resident_growth_bytes",),
)
THREADS = Experiment(
    THREADS_NAME,
    thread_cells,
    check,
    timed,
    why_not,
    thread_tables,
    by_default=False,
    rounds=THREAD_ROUNDS,
    description=Description(
        "Do two threads translate twice as fast as one?",
    ),
    over=Over("one"),
    measured=("resident_growth_bytes",),
)
