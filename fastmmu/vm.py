"""The Python face: a workload, and a virtual machine that replays it under one strategy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fastmmu.bits import PAGE_SHIFT, PAGE_SIZE, PFERR, WORDS_PER_PAGE
from fastmmu.events import EVENT, Op
from fastmmu.explain import explain_walk
from fastmmu.memory import GuestMemory, Slot
from fastmmu.paging import Cpu
from fastmmu.processor import load_registers, make_state
from fastmmu.replay import replay
from fastmmu.state import Digest, Reg, Stat
from fastmmu.strategy import Strategy


class ReplayError(ValueError):
    """A record whose translation differs from the recorded one; the message names record, addresses and walk."""


@dataclass(frozen=True)
class Workload:
    """A virtual machine at its start, and the stream of events that it sees.

    Attributes:
        name: short, for the names of cells.
        cpu: registers at the start.
        slots: memslots and device ranges, (start, end, kind) in bytes.
        tables: start content, {gfn: uint64[512]}; every page-table page that the stream changes or reaches is named here.
        events: EVENT rows.
        summary: one sentence.

    Example:
        A guest without page tables of its own, which reads one device register twice.

        >>> from fastmmu import Cpu, EventList, Workload
        >>> cpu = Cpu(cr0=1, cr3=0, cr4=0, efer=0)
        >>> slots = [(0, 1 << 20, "ram"), (0xFE000000, 0xFE001000, "device")]
        >>> events = EventList().device(0xFE000000, 0).device(0xFE000000, 0)
        >>> len(Workload("two reads", cpu, slots, {}, events.array()).device_events)
        2
    """

    name: str
    cpu: Cpu
    slots: list[Slot]
    tables: dict[int, np.ndarray]
    events: np.ndarray
    summary: str = ""
    source: str = field(default="", compare=False)

    @property
    def device_events(self) -> np.ndarray:
        """The stream without accesses to memory: what the MMIO info cache sees."""
        return self.events[self.events["op"] != Op.ACCESS]


@dataclass(frozen=True)
class Outcome:
    """What a replay came to: counters by name, digests by name, and the page tables it left, {gpa: word} without zeros."""

    counters: dict[str, int]
    digests: dict[str, int]
    tables: dict[int, int]


class Vm:
    """A virtual machine that replays a workload under one strategy of the mmio-cache experiment.

    Example:
        >>> from fastmmu import Vm, load_replay
        >>> from fastmmu.strategy import MMIO_CACHE
        >>> workload = load_replay("bench/traces/excerpt-replay-linux-boot-long.npz", records=2000)
        >>> vm = Vm(workload, MMIO_CACHE.strategy("generation"))
        >>> counters = vm.check().counters
        >>> counters["records"], counters["wrong"]
        (2000, 0)
    """

    def __init__(self, workload: Workload, strategy: Strategy) -> None:
        self.workload = workload
        self.memory = GuestMemory(max(end for _, end, kind in workload.slots if kind != "device"))
        self.memory.slots = workload.slots
        check_workload(workload, self.memory)
        self._gfns = np.array(sorted(workload.tables), np.uint64)
        self._start = np.array([workload.tables[int(gfn)] for gfn in self._gfns], np.uint64).reshape(-1, WORDS_PER_PAGE)
        self._pages = self.memory.words.reshape(-1, WORDS_PER_PAGE)
        self.state = make_state(self.memory, workload.cpu)
        self.cache = strategy.make_cache()
        self.digest = np.zeros(len(Digest), np.uint64)
        self.reset()

    def reset(self) -> None:
        """Back to the start: page tables, registers, cache, digest."""
        self._pages[self._gfns] = self._start
        load_registers(self.state.mmu.reg, self.workload.cpu)
        if self.cache is not None:
            for part in self.cache:
                if part is not None:
                    part[:] = 0
        self.digest[:] = 0

    def run(self, events: np.ndarray | None = None) -> None:
        """Replay without counters or checks, as the benchmarks time it."""
        replay(self.cache, self.state, None, None, self.digest, self.workload.events if events is None else events)

    def check(self) -> Outcome:
        """Replay from the start with counters; every record's walk is compared with the recorded address.

        Raises:
            ReplayError: a record translates to another address than the one recorded.
        """
        self.reset()
        stat = np.zeros(len(Stat), np.uint64)
        events = self.workload.events
        stopped = replay(self.cache, self.state, stat, np.zeros(1, np.uint64), self.digest, events)
        if stopped < len(events):
            raise ReplayError(self._describe(events[stopped]))
        stat[Stat.RECORDS] = np.isin(events["op"], (Op.ACCESS, Op.DEVICE)).sum()
        counters = {counter.name.lower(): int(stat[counter]) for counter in Stat}
        digests = {which.name.lower(): int(self.digest[which]) for which in Digest}
        return Outcome(counters, digests, self.tables())

    def tables(self) -> dict[int, int]:
        """Page tables as they are now, {gpa: word}, words of zero left out."""
        words = self._pages[self._gfns]
        rows, columns = np.nonzero(words)
        gpas = (self._gfns[rows] << PAGE_SHIFT) + columns.astype(np.uint64) * np.uint64(8)
        return dict(zip(gpas.tolist(), words[rows, columns].tolist(), strict=True))

    def _describe(self, event: np.void) -> str:
        access, gva = int(event["access"]), int(event["address"])
        kind = "fetch" if access & int(PFERR.F) else "write" if access & int(PFERR.W) else "read"
        cpu = replace(self.workload.cpu, cr3=int(self.state.mmu.reg[Reg.CR3]))
        walk = explain_walk(self.memory, cpu, gva, access)
        return (
            f"column gpa, record {int(event['record'])}: {kind} of gva {gva:#x} translates to {walk.answer}, "
            f"expected gpa {int(event['value']):#x}; walk: {'; '.join(map(str, walk.steps))}"
        )


def check_workload(workload: Workload, memory: GuestMemory) -> None:
    """Refuse what compiled code would trust: it checks no bounds.

    Raises:
        ValueError: events of another dtype, a page table outside memory or of another shape, a store outside the tables named.
    """
    if workload.events.dtype != EVENT:
        raise ValueError(f"workload {workload.name}: events of dtype {workload.events.dtype}, expected EVENT rows")
    for gfn, words in workload.tables.items():
        if not 0 <= gfn < memory.size // PAGE_SIZE or np.shape(words) != (WORDS_PER_PAGE,):
            raise ValueError(
                f"workload {workload.name}: table at gfn {gfn:#x}: expected {WORDS_PER_PAGE} words inside guest memory"
            )
    stores = workload.events[workload.events["op"] == Op.STORE]
    known = np.isin(stores["address"] >> PAGE_SHIFT, np.array(list(workload.tables), np.uint64))
    bad = np.flatnonzero(~known | (stores["address"] % np.uint64(8) != 0))
    if len(bad):
        address = int(stores["address"][bad[0]])
        raise ValueError(f"workload {workload.name}: store to {address:#x}: expected a multiple of 8 in one of its page tables")
