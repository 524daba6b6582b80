"""Real threads on one virtual machine: nothing that is written gets lost, whoever races with whom."""

from __future__ import annotations

import numpy as np
import pytest
from sizes import sized

from fastmmu.audit import audit
from fastmmu.bits import CR0, CR4, EFER, EPT_SPTE, NPT_SPTE, PAGE_SIZE
from fastmmu.events import EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine, NotBuilt
from fastmmu.machine_state import SlotFlag, VmWord
from fastmmu.paging import Cpu
from fastmmu.threads import ThreadRun, Writes, run_threads

OFF = Cpu(cr0=int(CR0.PE), cr3=0, cr4=0, efer=0)
LOG = int(SlotFlag.LOG_DIRTY_PAGES)
MMUS = {
    "tdp": Kvm(),
    "legacy": Kvm(tdp_mmu=False),
    "ept": Kvm(ept=True),
    "ept-no-ad": Kvm(ept=True, ad=False),
    "tdp-manual": Kvm(manual_protect=True),
    "tdp-locked": Kvm(fast_page_fault=False),
    "legacy-locked": Kvm(tdp_mmu=False, fast_page_fault=False),
}
FAST = [name for name in MMUS if not name.endswith("locked")]
PAGES = 512
WRITES = sized(200_000, 300)
RACING_FAULTS = 10_000_000


def machine_with(kvm: Kvm, *, vcpus: int = 2, pages: int = PAGES, host_level: int = 1, touched: bool = True) -> Machine:
    """A machine with one memslot that logs; all its pages were written before, if `touched`."""
    machine = Machine(kvm, OFF, memory=pages * PAGE_SIZE, vcpus=vcpus, tables=8192)
    events = EventList().add(Op.SLOT_CREATE, value=machine.prepare_slot(0, 0, pages * PAGE_SIZE, host_level=host_level))
    for page in range(pages if touched else 0):
        events.access(page * PAGE_SIZE, 2)
    machine.run(events.add(Op.SLOT_FLAGS, address=0, value=LOG).array())
    return machine


def random_writes(seed: int, vcpus: int, count: int, pages: int = PAGES) -> list[Writes]:
    """Writes of each vCPU to random pages, each of another value."""
    rng = np.random.default_rng(seed)
    values = np.arange(1, vcpus * count + 1, dtype=np.uint64).reshape(count, vcpus).T
    return [Writes(rng.integers(0, pages, count).astype(np.uint64) * np.uint64(PAGE_SIZE), np.ascontiguousarray(own)) for own in values]


def check_copy(machine: Machine, run: ThreadRun) -> None:
    """What was copied page by page, whenever the log named it, is what the memory holds; and the state holds together."""
    assert (run.copy == machine.memory.words[:: PAGE_SIZE // 8][: len(run.copy)]).all()
    audit(machine)


def writable(machine: Machine) -> int:
    """How many leaves are writable."""
    used = machine.vm.spt[: 512 * int(machine.vm.word[VmWord.FRESH_TABLE])]
    bits = NPT_SPTE.MMU_PRESENT | NPT_SPTE.W | (EPT_SPTE.MMU_WRITABLE if machine.kvm.ept else NPT_SPTE.MMU_WRITABLE)
    return int(np.count_nonzero(used & bits == bits))


@pytest.mark.parametrize("name", MMUS)
def test_no_write_is_lost(name: str, seed: int) -> None:
    """Whoever collects the log while vCPUs write, and copies what it names, has everything in the end."""
    machine = machine_with(MMUS[name])
    run = run_threads(machine, random_writes(seed, 2, WRITES), slot=0)
    check_copy(machine, run)
    assert run.collections and run.collected


@pytest.mark.parametrize("name", FAST)
def test_each_page_is_fixed_as_often_as_it_was_protected(name: str, seed: int) -> None:
    """W goes by logging and comes by the fast path, once each: nothing is counted twice when two vCPUs race for a page."""
    machine = machine_with(MMUS[name])
    before, had = machine.counters(), writable(machine)
    run_threads(machine, random_writes(seed, 2, WRITES), slot=0)
    changed = {key: value - before[key] for key, value in machine.counters().items()}
    assert had + changed["fast_fixed"] - changed["protected"] == writable(machine)
    assert changed["pf_fixed"] == changed["fast_fixed"]
    assert changed["pf_fast"] == changed["pf_fixed"] + changed["pf_spurious"]


@pytest.mark.parametrize("name", MMUS)
def test_pages_that_nothing_maps_yet(name: str) -> None:
    """Both vCPUs map the same pages first: tables and leaves come into being once."""
    pages = sized(16 * 1024, 64)
    machine = machine_with(MMUS[name], pages=pages, touched=False)
    gpas = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE)
    run = run_threads(machine, [Writes(gpas, gpas + np.uint64(1)), Writes(gpas, gpas + np.uint64(1))], slot=0)
    check_copy(machine, run)
    assert machine.counters()["pages_4k"] == pages


@pytest.mark.parametrize("name", MMUS)
def test_huge_pages_that_are_split_while_they_are_written(name: str, seed: int) -> None:
    """Logging begins over huge pages, and the first write to each of them drops it."""
    pages = sized(8 * 1024, 1024)
    machine = Machine(MMUS[name], OFF, memory=pages * PAGE_SIZE, vcpus=2, tables=8192)
    events = EventList().add(Op.SLOT_CREATE, value=machine.prepare_slot(0, 0, pages * PAGE_SIZE, host_level=2))
    for page in range(0, pages, 512):
        events.access(page * PAGE_SIZE, 2)
    events.add(Op.PARAMETER, address=VmWord.EAGER_PAGE_SPLIT, value=0)  # no eager splitting
    machine.run(events.add(Op.SLOT_FLAGS, address=0, value=LOG).array())
    assert machine.counters()["pages_2m"] == pages // 512
    run = run_threads(machine, random_writes(seed, 2, sized(50_000, 300), pages), slot=0)
    check_copy(machine, run)


def test_more_threads_than_cores(seed: int) -> None:
    machine = machine_with(MMUS["tdp"], vcpus=6)
    check_copy(machine, run_threads(machine, random_writes(seed, 6, WRITES // 4), slot=0))


def test_what_cannot_run_in_threads() -> None:
    one = random_writes(1, 1, 10)
    paging = Cpu(cr0=int(CR0.PE | CR0.PG), cr3=0x1000, cr4=int(CR4.PAE), efer=int(EFER.LME | EFER.LMA))
    shadow = Machine(Kvm(tdp=False, tdp_mmu=False), OFF, memory=PAGES * PAGE_SIZE)
    for machine in (shadow, Machine(Kvm(), paging, memory=PAGES * PAGE_SIZE)):
        with pytest.raises(NotBuilt, match="threads"):
            run_threads(machine, one, slot=0)
    machine = machine_with(MMUS["tdp"], vcpus=1)
    for writes, slot, message in (
        (one, 7, "slot: 7"),
        (one * 2, 0, "writes: 2"),
        ([], 0, "writes: 0"),
        ([Writes(one[0].gpas, one[0].values[:3])], 0, "10 gpas and 3 values"),
        ([Writes(one[0].gpas + np.uint64(4), one[0].values)], 0, "multiples of 8"),
        ([Writes(one[0].gpas + np.uint64(PAGES * PAGE_SIZE), one[0].values)], 0, "in memslot 0"),
        ([Writes(one[0].gpas.astype(np.int64), one[0].values)], 0, "column of uint64"),
    ):
        with pytest.raises(ValueError, match=message):
            run_threads(machine, writes, slot=slot)
    machine.run(EventList().add(Op.SLOT_FLAGS, address=0, value=0).array())
    with pytest.raises(ValueError, match="not logged"):
        run_threads(machine, one, slot=0)


@pytest.mark.long
@pytest.mark.parametrize("name", ["tdp", "legacy"])
def test_ten_million_racing_faults(name: str, seed: int) -> None:
    """The vCPUs write the same pages in the same order while the log is collected without a pause."""
    faults = rounds = 0
    while faults < RACING_FAULTS:
        machine = machine_with(MMUS[name], pages=64)
        before, had = machine.counters(), writable(machine)
        gpas = np.tile(np.arange(64, dtype=np.uint64) * np.uint64(PAGE_SIZE), 20_000)
        values = np.arange(1, 2 * len(gpas) + 1, dtype=np.uint64).reshape(len(gpas), 2).T
        run = run_threads(machine, [Writes(gpas, np.ascontiguousarray(own)) for own in values], slot=0)
        check_copy(machine, run)
        changed = {key: value - before[key] for key, value in machine.counters().items()}
        assert had + changed["fast_fixed"] - changed["protected"] == writable(machine)
        faults, rounds = faults + changed["pf_taken"], rounds + 1
    print(f"{name}: {faults:,} faults in {rounds} rounds")
