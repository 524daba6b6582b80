"""Cells: one strategy on one workload, checked against the reference, then timed.

A cell's name is `experiment/workload/strategy`; its benchmarks add a metric: `mmio-cache/linux-boot/generation/time`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastmmu.bits import ONE
from fastmmu.events import EVENT, Op
from fastmmu.reference.replay import Replay
from fastmmu.state import Digest, Reg
from fastmmu.strategy import MMIO_CACHE
from fastmmu.vm import Outcome, Vm, Workload, load_registers
from fastmmu.walk import ALL_ONES, look_addresses, walk_addresses

REPLAY = "replay"
REPLAY_STRATEGIES = ("walk", "replay")
WORD = (1 << 64) - 1


class CheckError(Exception):
    """Kernels and reference disagree: an error of this program, never a slow result."""


@dataclass(frozen=True)
class Cell:
    """A cell's name in its three parts."""

    experiment: str
    workload: str
    strategy: str

    @property
    def name(self) -> str:
        return f"{self.experiment}/{self.workload}/{self.strategy}"


@dataclass(frozen=True)
class Timed:
    """Work to be timed: `once()` runs it, `reset()` prepares it, `digest()` tells what it computed, `accesses` how many.

    `expected` is the digest that it must come to; None where that is the checked run's.
    """

    once: Callable[[], object]
    reset: Callable[[], object]
    digest: Callable[[], int]
    accesses: int
    expected: int | None = None

    def run(self, loops: int) -> float:
        """Seconds that `loops` runs take, preparation left out."""
        total = 0.0
        for _ in range(loops):
            self.reset()
            begin = time.perf_counter()
            self.once()
            total += time.perf_counter() - begin
        return total


def check_mmio(workload: Workload, strategy: str) -> Outcome:
    """Replay with counters; the reference must come to the same counters, digests and page tables.

    Raises:
        ReplayError: a record translates to another address than the recorded one.
        CheckError: kernels and reference disagree.
    """
    outcome = Vm(workload, MMIO_CACHE.strategy(strategy)).check()
    words = {
        (gfn << 12) + 8 * index: word
        for gfn, page in workload.tables.items()
        for index, word in enumerate(page.tolist())
        if word
    }  # fmt: skip
    reference = Replay(workload.cpu, workload.slots, words, strategy)
    reference.run(workload.events.tolist())
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


def digest_text(outcome: Outcome) -> str:
    """Short digest of all that a replay came to, for result files."""
    parts = repr((sorted(outcome.counters.items()), sorted(outcome.digests.items()), sorted(outcome.tables.items())))
    return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()


def timed_mmio(workload: Workload, strategy: str) -> Timed:
    """Device accesses with the table stores and flushes between them; memory accesses, which no strategy touches, left out."""
    vm = Vm(workload, MMIO_CACHE.strategy(strategy))
    events = workload.device_events
    accesses = int((events["op"] == Op.DEVICE).sum())
    return Timed(lambda: vm.run(events), vm.reset, lambda: int(vm.digest[Digest.DEVICE]), accesses)


def timed_replay(workload: Workload, strategy: str) -> Timed:
    """The records that translate in the end tables: walked bare from columns, or replayed as events (no stores, no flushes)."""
    vm = Vm(workload, MMIO_CACHE.strategy("none"))
    vm.run()
    state = vm.state
    events = workload.events
    is_access = np.isin(events["op"], (Op.ACCESS, Op.DEVICE))
    loads = np.maximum.accumulate(np.where(events["op"] == Op.CR3, np.arange(len(events)), -1))
    cr3s = np.where(loads < 0, np.uint64(workload.cpu.cr3), events["value"][loads])[is_access]
    records = events[is_access]
    gpas = np.empty(len(records), np.uint64)
    look_addresses(state.mem, state.mmu, cr3s, records["address"].copy(), records["access"].copy(), gpas)
    same = (gpas == records["value"]) & (gpas != ALL_ONES)
    records, cr3s = records[same], cr3s[same]
    gvas, accesses = records["address"].copy(), records["access"].copy()

    switch = np.flatnonzero(np.diff(cr3s, prepend=cr3s[:1] ^ ONE))
    stream = np.insert(records, switch, np.zeros(len(switch), EVENT))
    at = switch + np.arange(len(switch))
    stream["op"][at], stream["value"][at] = Op.CR3, cr3s[switch]

    digest = [0]

    def walk() -> None:
        digest[0] = int(walk_addresses(state.mem, state.mmu, state.trail, cr3s, gvas, accesses))

    def replay() -> None:
        vm.digest[:] = 0
        vm.run(stream)
        digest[0] = int(vm.digest[Digest.ALL])

    def reset() -> None:
        load_registers(state.mmu.reg, workload.cpu)
        state.mmu.reg[Reg.CR3] = workload.cpu.cr3

    expected = 0
    for gpa in records["value"].tolist():
        expected = (expected << 5 & WORD | expected >> 59) ^ gpa
    return Timed(walk if strategy == "walk" else replay, reset, lambda: digest[0], len(records), expected)


def timed(workload: Workload, cell: Cell) -> Timed:
    """The work of a timed cell."""
    make = timed_replay if cell.experiment == REPLAY else timed_mmio
    return make(workload, cell.strategy)
