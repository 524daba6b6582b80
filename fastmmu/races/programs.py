"""The programs that are explored: a small machine, two or three threads of shipped functions, and what must hold in the end.

Each has a guard of guards.py that is taken out to see its race, or none. The first three are the cases of the mail of 2012.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastmmu import dirty_log
from fastmmu._jit import load, store
from fastmmu.bits import CR0, CR4, EFER, GPTE64, NPT_SPTE, PAGE_SHIFT, PAGE_SIZE, PFERR
from fastmmu.descent import root_for
from fastmmu.events import EventList, Op
from fastmmu.fault import page_fault
from fastmmu.guest import store_unseen
from fastmmu.host import unmap
from fastmmu.kvm import Kvm
from fastmmu.lock import lock_for_reading, lock_for_writing, unlock_for_reading, unlock_for_writing
from fastmmu.machine import Machine
from fastmmu.machine_state import LOG, TABLE_WORDS, Counter, KvmState, Request, SlotFlag, VmWord
from fastmmu.paging import Cpu
from fastmmu.rmap import drop_leaves, rmap_index
from fastmmu.shadow import account_shadowed
from fastmmu.spte import lowest
from fastmmu.tdp import split_huge_page
from fastmmu.threads import collect_pages, write_pages
from fastmmu.tlb import DIRTY, flush, lookup
from fastmmu.views import vcpu_of
from fastmmu.walk import walk_exact

OFF = Cpu(cr0=int(CR0.PE), cr3=0, cr4=0, efer=0)
ROOT, UPPER, DIRECTORY, LEAF = (PAGE_SIZE * i for i in (1, 2, 3, 4))
LONG = Cpu(cr0=int(CR0.PE | CR0.PG | CR0.WP), cr3=ROOT, cr4=int(CR4.PAE), efer=int(EFER.LME | EFER.LMA | EFER.NX))
FULL = int(GPTE64.P | GPTE64.W | GPTE64.U | GPTE64.A | GPTE64.D)
PAGES = 16
PAGE = np.uint64(5 * PAGE_SIZE)  # the page that it is about
OTHER = np.uint64(6 * PAGE_SIZE)
OLD, NEW = np.uint64(1), np.uint64(2)  # what is written
WRITE_FAULT = PFERR.P | PFERR.W | PFERR.U
TLB = (4, 1)
TABLES = 16
Step = Callable[["Stage", KvmState], None]


class Stage:
    """A machine as a program begins with it: copied once, put back before each order."""

    def __init__(self, machine: Machine, gfns: tuple[int, ...], frames: bool = False) -> None:
        vm, vcpus = machine.vm, machine.state
        self.machine = machine
        used = machine.slot_words_used
        self.frames = np.arange(PAGES, dtype=np.uint64) if frames else None
        self.arrays = [vm.spt, vm.shadowed, vm.page, vm.word, vm.slot_words[:used], vm.desc[:1024]]
        self.arrays += [vcpus.own, vcpus.tlb, vcpus.stat, vcpus.mmu.reg, vcpus.trail]
        self.arrays += [vm.mem.words[gfn * 512 : gfn * 512 + 512] for gfn in gfns]
        self.arrays += [] if self.frames is None else [self.frames]
        self.copies = [array.copy() for array in self.arrays]
        self.copy = np.zeros(PAGES, np.uint64)  # what a collector has copied
        self.vm, self.vcpus = vm._replace(frames=self.frames), vcpus
        row = vm.mem.slots[0]
        self.bitmaps = {int(row[name]): name for name in ("dirty", "host_dirty")}

    def restore(self) -> None:
        """As it was."""
        for array, copy in zip(self.arrays, self.copies, strict=True):
            np.copyto(array, copy)
        self.copy[:] = 0

    @property
    def stat(self) -> np.ndarray:
        """Counters for a thread that is no vCPU: those of vCPU 1."""
        return self.vcpus.stat[1]

    def watched(self, wrap: Callable[[str, np.ndarray, Callable[[int], bool]], np.ndarray]) -> KvmState:
        """The machine's state with its shared words wrapped: sptes, the dirty bitmaps, memory, locks and requests. Of a table that
        comes into being only the entries of the two pages that anybody touches."""
        vm, bitmaps, old = self.vm, self.bitmaps, int(self.vm.word[VmWord.FRESH_TABLE]) * TABLE_WORDS
        entries = {int(PAGE) >> 12, int(OTHER) >> 12}
        return vm._replace(
            spt=wrap("spt", vm.spt, lambda index: index < old or index % TABLE_WORDS in entries),
            slot_words=wrap("slot_words", vm.slot_words, lambda index: index in bitmaps),
            word=wrap("word", vm.word, lambda index: index >= VmWord.MMU_LOCK),
            mem=vm.mem._replace(words=wrap("memory", vm.mem.words, lambda index: True)),
        )

    # --- what the checks look at

    def spte(self, page: np.uint64) -> int:
        """The lowest entry for a page, by the tables of vCPU 0."""
        return int(self.vm.spt[leaf_of(self.machine, page)])

    def bit(self, name: str, page: np.uint64) -> bool:
        """Whether a bitmap of the memslot has a page."""
        return bool(int(self.vm.slot_words[int(self.vm.mem.slots[0][name])]) >> (int(page) >> 12) & 1)

    def memory(self, page: np.uint64) -> int:
        """The first word of a page."""
        return int(self.vm.mem.words[int(page) >> 3])


@dataclass(frozen=True)
class Program:
    """One question: `threads` run on what `stage` makes, `check` says what is wrong in the end; without `guard` it goes wrong."""

    name: str
    question: str
    guard: str
    threads: tuple[tuple[str, Step], ...]
    stage: Callable[[], Stage]
    check: Callable[[Stage], str]


# --- stages ----------------------------------------------------------------------------------------------------------------


def machine_of(
    kvm: Kvm, cpu: Cpu = OFF, *, pages: int = PAGES, host_level: int = 1, tables: dict[int, int] | None = None
) -> Machine:
    """A machine with one memslot and two vCPUs."""
    machine = Machine(kvm, cpu, memory=pages * PAGE_SIZE, vcpus=2, tables=TABLES)
    for gpa, value in (tables or {}).items():
        machine.memory.words[gpa // 8] = value
    row = machine.prepare_slot(0, 0, pages * PAGE_SIZE, host_level=host_level)
    machine.run(EventList().add(Op.SLOT_CREATE, value=row).each_vcpu(2, Op.EXIT).array())
    return machine


def leaf_of(machine: Machine, page: np.uint64) -> np.uint64:
    """Where the lowest entry for a page stands."""
    table, level = root_for(machine.vm, vcpu_of(machine.state, np.uint64(0)), page >> PAGE_SHIFT)
    return lowest(machine.vm.spt, table, level, page >> PAGE_SHIFT)[0]


def run(machine: Machine, *events: tuple[Op, dict[str, int]]) -> None:
    """Events on vCPU 0."""
    stream = EventList()
    for op, columns in events:
        stream.add(op, **columns)
    machine.run(stream.array())


def ready(machine: Machine, *gfns: int, frames: bool = False) -> Stage:
    """The stage: requests served, threads about to run."""
    machine.run(EventList().each_vcpu(2, Op.EXIT).array())
    machine.vm.word[VmWord.THREADS] = 2
    return Stage(machine, gfns, frames)


def logged(kvm: Kvm) -> Callable[[], Stage]:
    """A page that was written before logging began: W=0, MMU_WRITABLE=1, A=1; D as the processor left it."""

    def stage() -> Stage:
        machine = machine_of(kvm)
        run(machine, (Op.ACCESS, {"address": int(PAGE), "access": 2}), (Op.SLOT_FLAGS, {"value": int(SlotFlag.LOG_DIRTY_PAGES)}))
        return ready(machine, int(PAGE) >> 12)

    return stage


def logged_clean() -> Stage:
    """The same of the shadow MMU's direct map, and the page not dirty in its spte: it was mapped by a read."""
    machine = machine_of(DIRECT)
    run(machine, (Op.ACCESS, {"address": int(PAGE)}), (Op.SLOT_FLAGS, {"value": int(SlotFlag.LOG_DIRTY_PAGES)}))
    machine.vm.spt[leaf_of(machine, PAGE)] &= ~NPT_SPTE.D
    return ready(machine, int(PAGE) >> 12)


def logged_and_written() -> Stage:
    """A page that is in the log, and writable in the TLB of vCPU 0."""
    machine = machine_of(TDP)
    run(machine, (Op.ACCESS, {"address": int(PAGE), "access": 2}), (Op.SLOT_FLAGS, {"value": int(SlotFlag.LOG_DIRTY_PAGES)}))
    run(machine, (Op.WRITE, {"address": int(PAGE), "access": 2, "size": 8, "value": int(OLD)}))
    return ready(machine, int(PAGE) >> 12)


def huge(*, logs: bool, on_fault: bool = False) -> Callable[[], Stage]:
    """A huge page that was read only; with `logs` its memslot logs; `on_fault`: faults split it, else they drop it."""

    def stage() -> Stage:
        machine = machine_of(Kvm(eager_page_split=False, split_on_fault=on_fault, tlb=TLB), pages=1024, host_level=2)
        run(machine, (Op.ACCESS, {"address": int(PAGE)}))
        if logs:
            run(machine, (Op.SLOT_FLAGS, {"value": int(SlotFlag.LOG_DIRTY_PAGES)}))
        machine.vm.spt[leaf_of(machine, PAGE)] &= ~NPT_SPTE.D
        flush(machine.state.tlb[0])
        return ready(machine, int(PAGE) >> 12)

    return stage


def paging(*, frames: bool, clean: bool = False) -> Stage:
    """A guest that pages: gva 0 goes to PAGE, by an indirect spte that is write-protected because its memslot logs. With `clean`
    the guest's leaf has neither A nor D."""
    tables = {ROOT: UPPER | FULL, UPPER: DIRECTORY | FULL, DIRECTORY: LEAF | FULL, LEAF: int(PAGE) | FULL}
    machine = machine_of(Kvm(tdp=False, tdp_mmu=False, prefetch=False, tlb=TLB), LONG, tables=tables)
    run(machine, (Op.ACCESS, {"address": 0, "access": 2}), (Op.SLOT_FLAGS, {"value": int(SlotFlag.LOG_DIRTY_PAGES)}))
    run(machine, (Op.DIRTY_GET, {"address": 0}))
    if clean:
        machine.memory.words[LEAF // 8] &= ~(GPTE64.A | GPTE64.D)
    return ready(machine, ROOT >> 12, UPPER >> 12, DIRECTORY >> 12, LEAF >> 12, int(PAGE) >> 12, frames=frames)


TDP, DIRECT = Kvm(tlb=TLB), Kvm(tdp=False, tdp_mmu=False, prefetch=False, tlb=TLB)


# --- threads ---------------------------------------------------------------------------------------------------------------


def writer(number: int, value: np.uint64) -> Step:
    """A vCPU stores to the page, until it has."""

    def step(stage: Stage, vm: KvmState) -> None:
        write_pages(vm, stage.vcpus, np.uint64(number), np.zeros(1, LOG), np.array([PAGE]), np.array([value]))

    return step


def faulter(number: int, address: np.uint64, pferr: np.uint64) -> Step:
    """KVM handles one page fault of a vCPU."""

    def step(stage: Stage, vm: KvmState) -> None:
        page_fault(vm, vcpu_of(stage.vcpus, np.uint64(number)), address, pferr)

    return step


def collector(stage: Stage, vm: KvmState) -> None:
    """A migration collects the dirty log, and copies what it names."""
    collect_pages(vm, stage.stat, np.uint64(0), stage.copy)


def unmapper(stage: Stage, vm: KvmState) -> None:
    """The host unmaps the page."""
    unmap(vm, stage.stat, PAGE, PAGE + np.uint64(PAGE_SIZE))


def shadower(stage: Stage, vm: KvmState) -> None:
    """The page becomes a table of a guest, and is shadowed."""
    lock_for_writing(vm.word, stage.stat)
    account_shadowed(vm, stage.stat, PAGE >> PAGE_SHIFT)
    unlock_for_writing(vm.word, stage.stat)


def splitter(stage: Stage, vm: KvmState) -> None:
    """A huge page is split eagerly, under the lock for reading."""
    lock_for_reading(vm.word, stage.stat)
    index = leaf_of(stage.machine, PAGE)
    split_huge_page(vm, stage.stat, index, np.uint64(2), load(vm.spt, index))
    unlock_for_reading(vm.word, stage.stat)


def mover(stage: Stage, vm: KvmState) -> None:
    """pfn1 is swapped out and given to gfn2; the guest's entry comes to point there, and is mapped; the log is collected."""
    vcpu, slot = vcpu_of(stage.vcpus, np.uint64(1)), vm.mem.slots[0]
    first, second = PAGE >> PAGE_SHIFT, OTHER >> PAGE_SHIFT
    lock_for_writing(vm.word, stage.stat)
    drop_leaves(vm, stage.stat, rmap_index(slot, first, np.uint64(1)))
    vm.frames[first], vm.frames[second] = vm.frames[second], vm.frames[first]
    store_unseen(vm, vcpu, np.uint64(LEAF), OTHER | np.uint64(FULL))
    unlock_for_writing(vm.word, stage.stat)
    page_fault(vm, vcpu, np.uint64(0), PFERR.U)
    dirty_log.get(vm, stage.stat, slot)


def walker(stage: Stage, vm: KvmState) -> None:
    """KVM walks the guest's tables for a write, which sets A and D."""
    vcpu = vcpu_of(stage.vcpus, np.uint64(0))
    walk_exact(vm.mem, vcpu.mmu, vcpu.trail, np.uint64(0), PFERR.W)


def storer(stage: Stage, vm: KvmState) -> None:
    """The guest stores another entry to its table."""
    store(vm.mem.words, LEAF >> 3, OTHER | np.uint64(FULL))


# --- what must hold --------------------------------------------------------------------------------------------------------


def check_log(stage: Stage) -> str:
    """Whoever may write a page without a fault: the page is in the log."""
    spte = stage.spte(np.uint64(0))
    if not spte & int(NPT_SPTE.W):
        return ""
    gfn = int(np.flatnonzero(stage.frames == np.uint64((spte & int(NPT_SPTE.ADDR)) >> 12))[0])
    return "" if stage.bit("dirty", np.uint64(gfn << 12)) else f"gfn {gfn} is writable through the spte, and not in the dirty log"


def check_tlb(stage: Stage) -> str:
    """A TLB holds no more than the spte, unless its flush was asked for."""
    vcpu = vcpu_of(stage.vcpus, np.uint64(0))
    asked = int(stage.vm.word[VmWord.REQUESTS]) & int(Request.TLB_FLUSH)
    entry = int(lookup(vcpu.tlb, vcpu.mmu, PAGE, np.uint64(0)))
    if entry & int(DIRTY) and not asked and not stage.spte(PAGE) & int(NPT_SPTE.W):
        return "vCPU 0 may write the page through its TLB, the spte does not allow it, and no flush was asked for"
    return ""


def check_dirty(stage: Stage) -> str:
    """A page that was written is dirty in its spte, or the host was told."""
    if stage.memory(PAGE) != NEW or stage.spte(PAGE) & int(NPT_SPTE.D) or stage.bit("host_dirty", PAGE):
        return ""
    return "the page was written, its D is lost, and the host was not told"


def check_copy(stage: Stage) -> str:
    """What was not copied is in the log still."""
    copied = int(stage.copy[int(PAGE) >> 12])
    if stage.bit("dirty", PAGE) or copied == stage.memory(PAGE):
        return ""
    return f"memory holds {stage.memory(PAGE)}, the copy {copied}, and the page is not in the log"


def check_logged(stage: Stage) -> str:
    """A page that is writable is in the log; each W that came was counted once."""
    fixed, protected = stage.vcpus.stat.sum(axis=0)[[Counter.FAST_FIXED, Counter.PROTECTED]].tolist()
    writable = bool(stage.spte(PAGE) & int(NPT_SPTE.W))
    if writable and not stage.bit("dirty", PAGE):
        return "the page is writable, and not in the dirty log"
    return "" if fixed - (protected - 1) == writable else f"W was set {fixed} times and taken {protected - 1} times"


def check_tables(stage: Stage) -> str:
    """The counters agree with the tables, and every table hangs in one."""
    spt = stage.vm.spt.reshape(-1, TABLE_WORDS)
    todo = [(int(stage.vcpus.own[0, 0]), int(stage.vm.word[VmWord.ROOT_LEVEL]))]
    reached, leaves = set(), {1: 0, 2: 0, 3: 0}
    while todo:
        table, level = todo.pop()
        reached.add(table)
        for spte in spt[table][spt[table] & NPT_SPTE.MMU_PRESENT != 0].tolist():
            if level == 1 or spte & int(NPT_SPTE.PS):
                leaves[level] += 1
            else:
                todo.append(((spte & int(NPT_SPTE.ADDR)) >> 12, level - 1))
    lost = set(np.flatnonzero(stage.vm.page["role"]).tolist()) - reached
    if lost:
        return f"{len(lost)} table in use that no entry points to"
    counted = stage.vcpus.stat.sum(axis=0)[[Counter.PAGES_4K, Counter.PAGES_2M]].tolist()
    return "" if counted == [leaves[1], leaves[2]] else f"pages_4k, pages_2m: {counted}, but there are {leaves[1]}, {leaves[2]}"


def check_store(stage: Stage) -> str:
    """The guest's store is not lost, though A and D may be added to it."""
    gpte = int(stage.vm.mem.words[LEAF >> 3])
    return "" if gpte & int(GPTE64.ADDR) == int(OTHER) else "the entry that the guest stored is gone"


PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        Program(
            "aba", "the spte looks the same, but maps another gfn by now: which page is logged?", "DIRECT_ONLY",
            (("vCPU 0: write fault", faulter(0, np.uint64(0), WRITE_FAULT)), ("host and vCPU 1", mover)),
            lambda: paging(frames=True), check_log,
        ),
        Program(
            "tlb-flush", "a page becomes a page table: does a writable TLB entry outlive that?", "FLUSH_IF_MMU_WRITABLE",
            (("vCPU 0: write", writer(0, NEW)), ("KVM: shadow the page", shadower)), logged(DIRECT), check_tlb,
        ),
        Program(
            "dirty-bit", "the host unmaps a page: is a write that came in between seen?", "ATOMIC_CLEAR",
            (("vCPU 0: write", writer(0, NEW)), ("host: unmap", unmapper)), logged_clean, check_dirty,
        ),
        Program(
            "log-clear", "the log is collected while a vCPU writes: is what it wrote copied, or logged again?", "FLUSH_WAITS",
            (("vCPU 0: write", writer(0, NEW)), ("migration: collect", collector)), logged_and_written, check_copy,
        ),
        Program(
            "zap", "the host unmaps a page that the fast path makes writable: does it come back?", "FAST_EXCHANGE",
            (("vCPU 0: write fault", faulter(0, PAGE, WRITE_FAULT | PFERR.GUEST_FINAL)), ("host: unmap", unmapper)),
            logged(TDP), check_tables,
        ),
        Program(
            "split", "a huge page is split while a vCPU writes to it: does D get lost?", "SPLIT_EXCHANGE",
            (("vCPU 0: write", writer(0, NEW)), ("KVM: split", splitter)), huge(logs=False), check_dirty,
        ),
        Program(
            "frozen", "two vCPUs map pages below one huge page: is a table lost?", "FROZEN_ZAP",
            (
                ("vCPU 0: write fault", faulter(0, PAGE, WRITE_FAULT | PFERR.GUEST_FINAL)),
                ("vCPU 1: write fault", faulter(1, OTHER, WRITE_FAULT | PFERR.GUEST_FINAL)),
            ),
            huge(logs=True), check_tables,
        ),
        Program(
            "split-twice", "two vCPUs split one huge page in their faults: is a table lost, or taken for a page?", "SPLIT_EXCHANGE",
            (
                ("vCPU 0: write fault", faulter(0, PAGE, WRITE_FAULT | PFERR.GUEST_FINAL)),
                ("vCPU 1: write fault", faulter(1, OTHER, WRITE_FAULT | PFERR.GUEST_FINAL)),
            ),
            huge(logs=True, on_fault=True), check_tables,
        ),
        Program(
            "accessed", "KVM's walk sets A and D while the guest stores another entry: is the store lost?", "GPTE_EXCHANGE",
            (("KVM: walk for vCPU 0", walker), ("vCPU 1: store", storer)), lambda: paging(frames=False, clean=True), check_store,
        ),
        Program(
            "three", "two vCPUs fault on one page while the log is collected: is each W logged, and counted once?", "",
            (
                ("vCPU 0: write fault", faulter(0, PAGE, WRITE_FAULT | PFERR.GUEST_FINAL)),
                ("vCPU 1: write fault", faulter(1, PAGE, WRITE_FAULT | PFERR.GUEST_FINAL)),
                ("migration: collect", collector),
            ),
            logged(TDP), check_logged,
        ),
    )
}  # fmt: skip
"""The programs by name, in the order in which they run."""
