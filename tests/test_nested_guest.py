"""Nested guests on the machine, against two walks of the reference put together; rules of their own; the audit after each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fastmmu.audit import audit
from fastmmu.bits import CR0, CR4, EFER, GPTE64, PAGE_SIZE, PFERR
from fastmmu.events import EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine, NotBuilt
from fastmmu.machine_state import LogKind, SlotFlag, Stop, VcpuWord, VmWord
from fastmmu.paging import Cpu
from fastmmu.reference.nested import NESTED_PAGE_FAULT, EptDimension, NestedWalker, NptDimension
from fastmmu.reference.walk import Memory

PAGES = 256
DATA = 1 << 21  # gpa of a second memslot, whose host memory comes in 2 MiB
SIZE = 2 * DATA
L1_TABLES, NPT, L2_AT, VMCB = (PAGE_SIZE * page for page in (1, 8, 32, 40))  # gpas; NPT and L2's tables take four pages each
L2_TABLES = PAGE_SIZE * 16  # nested gpa of what lies at L2_AT
LONG = {"cr0": int(CR0.PE | CR0.PG | CR0.WP), "cr4": int(CR4.PAE), "efer": int(EFER.LME | EFER.LMA | EFER.NX), "maxphyaddr": 40}
FULL = int(GPTE64.P | GPTE64.W | GPTE64.U | GPTE64.A | GPTE64.D)
USED = int(GPTE64.P | GPTE64.W | GPTE64.U)
L1, L2 = Cpu(cr3=L1_TABLES, amd=True, **LONG), Cpu(cr3=L2_TABLES, amd=True, **LONG)
TABLES = Cpu(cr3=NPT, amd=True, **{**LONG, "cr0": int(CR0.PE | CR0.PG)})
LOG = int(SlotFlag.LOG_DIRTY_PAGES)
KVMS = {
    "tdp-mmu": Kvm(nested=True, eager_page_split=False),
    "eager": Kvm(nested=True, nx_huge_pages=True),
    "shadow": Kvm(nested=True, tdp_mmu=False, eager_page_split=False),
}


def chain(words: np.ndarray, root: int, to: int, rights: int) -> None:
    """Three upper tables from the page at `root` on; `to` is added to their addresses."""
    for level in range(3):
        words[(root + level * PAGE_SIZE) // 8] = (root + (level + 1) * PAGE_SIZE + to) | rights


class Nested:
    """A hypervisor with a nested guest. L1's own tables map the first 4 MiB as they are, NPT all pages but those of L2's tables."""

    pointer = leaf_rights = FULL  # of NPT's entries

    def __init__(self, kvm: Kvm, *, host_level: int = 1) -> None:
        self.machine = machine = Machine(kvm, L1, memory=SIZE)
        self.stale = False
        words = machine.memory.words
        for level in range(2):
            words[(L1_TABLES + level * PAGE_SIZE) // 8] = (L1_TABLES + (level + 1) * PAGE_SIZE) | FULL
        for i in range(2):
            words[(L1_TABLES + 2 * PAGE_SIZE) // 8 + i] = (i << 21) | FULL | int(GPTE64.PS)
        chain(words, NPT, 0, self.pointer)
        chain(words, L2_AT, L2_TABLES - L2_AT, FULL)
        for page in range(PAGES):
            words[self.npt(page) // 8] = page * PAGE_SIZE | self.leaf_rights
            words[self.leaf(page) // 8] = page * PAGE_SIZE | FULL
        for page in range(4):
            words[self.npt(L2_TABLES // PAGE_SIZE + page) // 8] = (L2_AT + page * PAGE_SIZE) | self.leaf_rights
        for table, rights in ((NPT, self.leaf_rights), (L2_AT, FULL)):  # a huge page behind the small ones
            words[(table + 2 * PAGE_SIZE) // 8 + 1] = DATA | rights | int(GPTE64.PS)
        slots = EventList().add(Op.SLOT_CREATE, value=machine.prepare_slot(0, 0, DATA))
        machine.run(slots.add(Op.SLOT_CREATE, value=machine.prepare_slot(1, DATA, DATA, host_level=host_level)).array())
        machine.configure(log_accesses=True)
        self.rows = machine.prepare_vmrun(L1, L2, self.tables)
        self.inside = False

    tables = NPT

    def dimension(self, memory: Memory) -> NptDimension | EptDimension:
        """The reference's."""
        return NptDimension(memory, TABLES)

    @staticmethod
    def random_entry(rng: np.random.Generator, page: int) -> int:
        """An entry of NPT."""
        return random_entry(rng, page)

    flags = int(GPTE64.D | GPTE64.A)

    @staticmethod
    def npt(page: int) -> int:
        """gpa of the entry for a nested gpa's page."""
        return NPT + 3 * PAGE_SIZE + 8 * page

    @staticmethod
    def leaf(page: int) -> int:
        """gpa of L2's entry for a gva's page."""
        return L2_AT + 3 * PAGE_SIZE + 8 * page

    def run(self, op: Op, **columns: int) -> list[tuple[int, int, int]]:
        """One event: (kind, address, value) of what it logged. As check_events wants it, an event inside stands behind a VMRUN."""
        events = EventList().add(op, **columns).array()
        run = self.machine.run(events, checked=True)
        assert run.stop == Stop.END
        self.reason = int(run.log["size"][-1]) if len(run.log) else 0  # of a NESTED_EXIT
        self.inside = bool(self.machine.state.own[0, VcpuWord.IN_NESTED])
        return [(kind, address, value) for kind, _, _, address, value in run.log.tolist()]

    def enter(self) -> None:
        if not self.inside:
            self.run(Op.VMRUN, address=VMCB, value=self.rows)

    def leave(self) -> None:
        if self.inside:
            self.run(Op.VMEXIT)

    def copy(self) -> Memory:
        """Guest memory as the reference sees it."""
        words = self.machine.memory.words
        where = np.flatnonzero(words[: SIZE // 8])
        return Memory([(0, SIZE, "ram")], {int(i) * 8: int(words[i]) for i in where})

    def count(self, name: str) -> int:
        return self.machine.counters()[name]

    def changed(self, before: dict[str, int]) -> dict[str, int]:
        """Counters that moved, without those of the processor and the lock."""
        after = self.machine.counters()
        return {name: after[name] - before[name] for name in after if after[name] != before[name] and not name.startswith(("tlb_", "lock_"))}


@pytest.fixture(params=list(KVMS))
def nested(request: pytest.FixtureRequest) -> Iterator[Nested]:
    one = Nested(KVMS[request.param])
    yield one
    audit(one.machine)


def judged(one: Nested, gva: int, access: int) -> None:
    """One access of L2 comes out as the two walks of the reference say, flags in both dimensions included."""
    memory = one.copy()
    answer = NestedWalker(one.dimension(memory), L2).walk(gva, access)
    log = one.run(Op.ACCESS, access=access, address=gva)
    if answer.ok:
        expected = (int(LogKind.ACCESSED), gva, answer.hpa)
    elif answer.reason:
        expected = (int(LogKind.NESTED_EXIT), answer.gpa, answer.qualification)
    else:
        expected = (int(LogKind.PAGE_FAULT), gva, answer.pferr)
    assert log == [expected], f"gva {gva:#x} access {access:#x}: {answer}"
    assert answer.ok or not answer.reason or one.reason == (answer.reason if answer.reason != NESTED_PAGE_FAULT else 0)
    where = [gpa for gpa in memory.words if memory.words[gpa] != int(one.machine.memory.words[gpa // 8])]
    assert not where, f"gva {gva:#x} access {access:#x}: words {[hex(gpa) for gpa in where]}"


def random_entry(rng: np.random.Generator, page: int) -> int:
    entry = page * PAGE_SIZE
    for name, probability in (("P", 0.95), ("W", 0.75), ("U", 0.85), ("A", 0.6), ("D", 0.5), ("NX", 0.2)):
        entry |= int(getattr(GPTE64, name)) if rng.random() < probability else 0
    return entry | (1 << 45 if rng.random() < 0.03 else 0)  # a reserved bit


def scramble(one: Nested, rng: np.random.Generator) -> None:
    """Random tables: data pages 64 to 127 move, with random rights; L2's own tables are left where they are."""
    words = one.machine.memory.words
    for page in range(64, 128):
        words[one.npt(page) // 8] = one.random_entry(rng, int(rng.integers(64, 128)))
        words[one.leaf(page) // 8] = random_entry(rng, int(rng.integers(64, 128)))
    for page in range(4):
        if rng.random() < 0.2:
            words[one.npt(L2_TABLES // PAGE_SIZE + page) // 8] &= ~np.uint64(one.flags)


def step(one: Nested, rng: np.random.Generator) -> None:
    """L2 accesses, or L1 or the host change something."""
    kind = rng.random()
    if kind < 0.75:
        one.enter()
        gva = int(rng.integers(64, 128)) * PAGE_SIZE + 8 * int(rng.integers(512)) if rng.random() < 0.9 else DATA + int(rng.integers(DATA))
        judged(one, gva & ~7, int(rng.choice([0, 2, 4, 6, 16, 20])))
    elif kind < 0.85:  # L1 stores to the tables that it gave L2
        one.leave()
        page = int(rng.integers(64, 128))
        value = one.random_entry(rng, int(rng.integers(64, 128)))
        if rng.random() < 0.2:  # L2's tables stay where they are, but may lose rights
            number = int(rng.integers(4))
            page, held = L2_TABLES // PAGE_SIZE + number, L2_AT // PAGE_SIZE + number
            value = one.random_entry(rng, held) if rng.random() < 0.3 else held * PAGE_SIZE | one.leaf_rights
        one.run(Op.WRITE, access=2, address=one.npt(page), size=8, value=value)
        one.stale = True
        assert int(one.machine.memory.words[one.npt(page) // 8]) == value
    elif kind < 0.9:  # or to L2's, for it
        one.leave()
        one.run(Op.WRITE, access=2, address=one.leaf(int(rng.integers(64, 128))), size=8, value=random_entry(rng, int(rng.integers(64, 128))))
    elif kind < 0.93:
        one.run(Op.SLOT_FLAGS, address=1, value=LOG if rng.random() < 0.6 else 0)
    elif kind < 0.95 and one.machine.slots[1].flags & LOG:
        one.run(Op.DIRTY_GET, address=1)
    elif kind < 0.97:
        start = int(rng.integers(PAGES)) * PAGE_SIZE
        one.run(Op.UNMAP, address=start, value=start + PAGE_SIZE * int(rng.integers(1, 40)))
    else:
        one.leave()


@pytest.mark.parametrize("kvm", list(KVMS))
@pytest.mark.parametrize("part", range(2))
def test_every_access_as_two_walks_say(seed: int, kvm: str, part: int) -> None:
    play(np.random.default_rng([seed, part]), Nested, with_strategy(KVMS[kvm], part), 150)


@pytest.mark.long
@pytest.mark.parametrize("kvm", list(KVMS))
def test_many_accesses_as_two_walks_say(seed: int, kvm: str) -> None:
    for part in range(100):
        play(np.random.default_rng([seed, 1000 + part]), Nested, with_strategy(KVMS[kvm], part), 600)


def with_strategy(kvm: Kvm, part: int) -> Kvm:
    """The rights of split pages from somewhere else in each part."""
    return replace(kvm, split_access=("guest-walk", "propagate", "cached")[part % 3])


def play(rng: np.random.Generator, kind: type[Nested], kvm: Kvm, steps: int) -> None:
    one = kind(kvm, host_level=int(rng.integers(1, 3)))
    scramble(one, rng)
    for number in range(steps):
        step(one, rng)
        if number % 10 == 0:
            audit(one.machine, guest_tables=True)
    one.leave()
    audit(one.machine)


def play_huge(rng: np.random.Generator, kind: type[Nested], kvm: Kvm, steps: int) -> int:
    """L2 uses its huge page, whose rights L1 changes, while logging comes and goes: every access as the two walks say, the audit after
    each change of logging. How many huge pages were split."""
    one = kind(kvm, host_level=2)
    entry = NPT + 2 * PAGE_SIZE + 8
    one.machine.memory.words[entry // 8] = DATA | one.leaf_rights | int(GPTE64.PS)
    one.enter()
    judged(one, DATA, 0)
    one.run(Op.SLOT_FLAGS, address=1, value=LOG)
    audit(one.machine, guest_tables=True)
    for _ in range(steps):
        choice = rng.random()
        if choice < 0.7:
            one.enter()
            judged(one, DATA + PAGE_SIZE * int(rng.integers(512)), int(rng.choice([0, 2, 4, 6, 16, 20])))
        elif choice < 0.85:
            one.leave()
            value = one.random_entry(rng, DATA // PAGE_SIZE) if rng.random() < 0.5 else DATA | one.leaf_rights
            one.run(Op.WRITE, access=2, address=entry, size=8, value=value | int(GPTE64.PS))
            one.stale = True
        elif choice < 0.95:
            one.run(Op.SLOT_FLAGS, address=1, value=0 if one.machine.slots[1].flags & LOG else LOG)
            audit(one.machine, guest_tables=True)
        elif one.machine.slots[1].flags & LOG:
            one.run(Op.DIRTY_GET, address=1)
    one.leave()
    audit(one.machine)
    return one.count("splits")


@pytest.mark.parametrize("part", range(3))
def test_huge_pages_are_split_whatever_their_rights(seed: int, part: int) -> None:
    assert play_huge(np.random.default_rng([seed, 70 + part]), Nested, with_strategy(KVMS["eager"], part), 200)


# --- rules -----------------------------------------------------------------------------------------------------------------


def test_the_root_is_kept_between_runs(nested: Nested) -> None:
    nested.enter()
    judged(nested, 64 * PAGE_SIZE, 0)
    nested.leave()
    nested.run(Op.ACCESS, address=0)
    before, flushed = nested.machine.counters(), nested.count("tlb_flush")
    nested.enter()
    judged(nested, 64 * PAGE_SIZE, 0)
    nested.leave()
    nested.run(Op.ACCESS, address=0)
    assert nested.changed(before) == {"nested_run": 1, "exits_no_irq": 2}
    assert nested.count("tlb_flush") == flushed + 2  # at each switch, before the entry


def test_a_vmrun_is_emulated_where_the_processor_does_not_say_where_it_ends() -> None:
    one = Nested(Kvm(nested=True, next_rip=False))
    one.enter()
    assert one.count("insn_emulation") == 1 and one.count("nested_run") == 1
    one.leave()
    assert one.count("insn_emulation") == 1


def test_a_missing_right_of_the_second_dimension_goes_to_the_hypervisor(nested: Nested) -> None:
    nested.machine.memory.words[nested.npt(70) // 8] = 70 * PAGE_SIZE | FULL & ~int(GPTE64.W)
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 0)
    assert nested.inside
    before = nested.machine.counters()
    log = nested.run(Op.ACCESS, access=2, address=70 * PAGE_SIZE + 8)
    code = int(PFERR.P | PFERR.W | PFERR.U | PFERR.GUEST_FINAL)
    assert log == [(LogKind.NESTED_EXIT, 70 * PAGE_SIZE + 8, code)] and not nested.inside
    assert nested.changed(before) == {"pf_taken": 1, "exits_no_irq": 1}  # no #PF of L1 is injected, nothing is fixed
    nested.run(Op.WRITE, access=2, address=nested.npt(70), size=8, value=70 * PAGE_SIZE | FULL)
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 2)


def test_a_table_of_the_nested_guest_that_is_not_mapped_is_named_as_one(nested: Nested) -> None:
    nested.machine.memory.words[nested.npt(L2_TABLES // PAGE_SIZE + 3) // 8] = 0
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 0)
    assert not nested.inside


def test_the_guests_own_fault_stays_inside(nested: Nested) -> None:
    nested.machine.memory.words[nested.leaf(70) // 8] = 0
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 4)
    assert nested.inside and nested.count("pf_guest") == 0


def test_what_follows_the_exit_of_the_nested_guest_is_its_hypervisors(nested: Nested) -> None:
    nested.machine.memory.words[nested.npt(70) // 8] = 0
    events = EventList().add(Op.VMRUN, address=VMCB, value=nested.rows).access(70 * PAGE_SIZE, 0).access(71 * PAGE_SIZE, 2)
    run = nested.machine.run(events.add(Op.VMEXIT).access(5 * PAGE_SIZE, 0).array())
    kinds = [(int(row["kind"]), int(row["event"])) for row in run.log]
    assert kinds == [(LogKind.NESTED_EXIT, 1), (LogKind.ACCESSED, 4)]
    assert nested.count("nested_run") == 1


def test_the_hypervisors_tables_are_write_protected_and_become_unsync(nested: Nested) -> None:
    nested.run(Op.WRITE, access=2, address=nested.npt(200), size=8, value=FULL)
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 2)
    nested.leave()
    before = nested.machine.counters()
    nested.run(Op.WRITE, access=2, address=nested.npt(200), size=8, value=200 * PAGE_SIZE | FULL)
    moved = nested.changed(before)
    assert moved["mmu_unsync"] == 1 and moved["pf_fixed"] == 1  # a leaf table
    before = nested.machine.counters()
    nested.run(Op.WRITE, access=2, address=NPT + 8, size=8, value=0)
    moved = nested.changed(before)
    assert moved["pf_emulate"] == 1 and moved["mmu_pte_write"] == 1  # an upper one
    nested.enter()
    assert nested.count("mmu_unsync") == 1
    judged(nested, 70 * PAGE_SIZE, 2)
    assert nested.count("mmu_unsync") == 0  # synced before the entry


def test_a_device_of_the_nested_guest(nested: Nested) -> None:
    words = nested.machine.memory.words
    words[nested.leaf(80) // 8] = 80 * PAGE_SIZE | FULL
    words[nested.npt(80) // 8] = 0x80_0000 | nested.leaf_rights  # beyond all memslots
    nested.enter()
    for made in (1, 0):  # the second time by an MMIO spte
        before = nested.machine.counters()
        log = nested.run(Op.LOAD, address=80 * PAGE_SIZE + 16, size=4)
        assert (LogKind.MMIO_READ, 0x80_0010, 0) in log
        moved = nested.changed(before)
        assert moved["mmio_exits"] == 1 and moved.get("pf_mmio_spte_created", 0) == made
    nested.leave()


def test_dirty_logging_sees_both_guests(nested: Nested) -> None:
    nested.run(Op.SLOT_FLAGS, address=1, value=LOG)
    nested.enter()
    nested.run(Op.WRITE, access=2, address=DATA + 5 * PAGE_SIZE, size=8, value=1)
    nested.leave()
    nested.run(Op.WRITE, access=2, address=DATA + 9 * PAGE_SIZE, size=8, value=1)
    nested.run(Op.DIRTY_GET, address=1)
    assert np.flatnonzero(nested.machine.report(1)).tolist() == [5, 9]
    nested.enter()
    nested.run(Op.WRITE, access=2, address=DATA + 5 * PAGE_SIZE, size=8, value=2)
    nested.run(Op.DIRTY_GET, address=1)
    assert np.flatnonzero(nested.machine.report(1)).tolist() == [5]
    nested.leave()


def test_an_unmap_takes_both_maps(nested: Nested) -> None:
    nested.run(Op.ACCESS, access=2, address=70 * PAGE_SIZE)
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 2)
    before = nested.count("pages_4k")
    nested.run(Op.UNMAP, address=70 * PAGE_SIZE, value=71 * PAGE_SIZE)
    assert nested.count("pages_4k") == before - 2
    nested.leave()


def test_deleting_a_memslot_zaps_everything(nested: Nested) -> None:
    nested.run(Op.ACCESS, address=70 * PAGE_SIZE)
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 2)
    nested.run(Op.SLOT_DELETE, address=1)
    assert nested.count("pages_4k") == 0
    judged(nested, 70 * PAGE_SIZE, 2)
    nested.leave()
    before = nested.count("pf_fixed")
    nested.run(Op.ACCESS, address=70 * PAGE_SIZE)
    assert nested.count("pf_fixed") > before  # by a new root


# --- huge pages ------------------------------------------------------------------------------------------------------------


def huge(*, rights: int = FULL, **kvm: bool | int) -> Nested:
    """L2 has used its huge page, which the host has one for."""
    one = Nested(Kvm(nested=True, **kvm), host_level=2)
    one.machine.memory.words[(NPT + 2 * PAGE_SIZE) // 8 + 1] = DATA | rights | int(GPTE64.PS)
    one.enter()
    judged(one, DATA, 0)
    assert one.count("pages_2m") == 1
    return one


@pytest.mark.parametrize("strategy", ["cached", "guest-walk", "propagate"])
def test_logging_splits_a_nested_guests_huge_page_at_once(strategy: str) -> None:
    one = huge(split_access=strategy)
    before = one.machine.counters()
    one.run(Op.SLOT_FLAGS, address=1, value=LOG)
    moved = one.changed(before)
    assert (moved["pages_2m"], moved["pages_4k"], moved["mmu_cache_miss"]) == (-1, 512, 1)
    audit(one.machine)
    before = one.machine.counters()
    judged(one, DATA + 7 * PAGE_SIZE, 2)
    assert one.changed(before) == {"pf_taken": 1, "pf_fixed": 1, "exits_no_irq": 1}  # a write-protection fault, and no more
    one.run(Op.DIRTY_GET, address=1)
    assert np.flatnonzero(one.machine.report(1)).tolist() == [7]


@pytest.mark.parametrize("strategy", ["cached", "guest-walk", "propagate"])
@pytest.mark.parametrize("rights", [FULL, FULL & ~int(GPTE64.W), FULL & ~int(GPTE64.D)], ids=["all", "no W", "no D"])
def test_split_pages_of_a_nested_guest_under_nx_huge_pages(strategy: str, rights: int) -> None:
    """Facts 8.4, 8.5: a page may be executed at once, or its table gives way to another one first. What the hypervisor's entry grants
    is the role's access; without D no writing."""
    one = huge(rights=rights, nx_huge_pages=True, split_access=strategy)
    one.run(Op.SLOT_FLAGS, address=1, value=LOG)
    audit(one.machine)
    before = one.machine.counters()
    judged(one, DATA + 9 * PAGE_SIZE, 16)
    moved = one.changed(before)
    if strategy == "propagate":
        assert moved["mmu_cache_miss"] == 1 and moved["remote_tlb_flush_requests"] == 1 and moved["pf_fixed"] == 1
    else:
        assert "pf_taken" not in moved
    audit(one.machine)
    assert (one.count("split_reads") == 1) == (strategy == "guest-walk")


@pytest.mark.parametrize("kvm", [{"eager_page_split": False}, {"tdp_mmu": False}], ids=str)
def test_without_eager_splitting_each_page_faults_anew(kvm: dict[str, bool]) -> None:
    one = huge(**kvm)
    one.run(Op.SLOT_FLAGS, address=1, value=LOG)
    assert one.count("pages_2m") == 1
    judged(one, DATA + 7 * PAGE_SIZE, 2)
    before = one.machine.counters()
    judged(one, DATA + 8 * PAGE_SIZE, 0)
    assert one.changed(before)["pf_fixed"] == 1


def test_two_ways_to_a_huge_page_share_its_table() -> None:
    one = huge()
    one.machine.memory.words[(NPT + 2 * PAGE_SIZE) // 8 + 2] = DATA | FULL | int(GPTE64.PS)
    one.machine.memory.words[(L2_AT + 2 * PAGE_SIZE) // 8 + 2] = 2 * DATA | FULL | int(GPTE64.PS)
    judged(one, 2 * DATA, 0)
    before = one.machine.counters()
    one.run(Op.SLOT_FLAGS, address=1, value=LOG)
    moved = one.changed(before)
    assert (moved["pages_2m"], moved["pages_4k"], moved["mmu_cache_miss"]) == (-2, 512, 1)
    audit(one.machine)


@pytest.mark.parametrize("executable", [True, False])
def test_small_pages_may_be_executed_as_the_hypervisor_says(executable: bool) -> None:
    one = huge(rights=FULL | (0 if executable else int(GPTE64.NX)), nx_huge_pages=True)
    one.run(Op.SLOT_FLAGS, address=1, value=LOG)
    before = one.machine.counters()
    judged(one, DATA + 9 * PAGE_SIZE, 16)
    assert one.changed(before).get("pf_taken", 0) == (0 if executable else 1)


def test_splitting_stops_where_the_quota_ends() -> None:
    one = huge()
    used = int(one.machine.vm.word[VmWord.USED_PAGES])
    one.machine.vm.word[VmWord.MAX_PAGES] = used + 5
    one.run(Op.SLOT_FLAGS, address=1, value=LOG)
    assert one.count("pages_2m") == 1
    judged(one, DATA + 7 * PAGE_SIZE, 2)


def test_clearing_splits_where_everything_counts_as_dirty() -> None:
    one = huge(manual_protect=True, initially_set=True)
    one.run(Op.SLOT_FLAGS, address=1, value=LOG)
    assert one.count("pages_2m") == 1
    one.machine.set_report(1, np.arange(3, 6))
    one.run(Op.DIRTY_CLEAR, address=1)
    assert one.count("pages_2m") == 0 and one.count("pages_4k") >= 512
    audit(one.machine)


def test_the_block_that_describes_the_nested_guest_is_written(nested: Nested) -> None:
    nested.run(Op.SLOT_FLAGS, address=0, value=LOG)
    nested.enter()
    nested.leave()
    nested.run(Op.DIRTY_GET, address=0)
    assert nested.machine.report(0)[VMCB // PAGE_SIZE]


def test_bad_input() -> None:
    one = Nested(KVMS["tdp-mmu"])
    with pytest.raises(ValueError, match="VMRUN and VMEXIT in turn"):
        one.machine.run(EventList().add(Op.VMEXIT).array())
    twice = EventList().add(Op.VMRUN, value=one.rows).add(Op.VMRUN, value=one.rows)
    with pytest.raises(ValueError, match="VMRUN and VMEXIT in turn"):
        one.machine.run(twice.array())
    with pytest.raises(ValueError, match="prepare_vmrun"):
        one.machine.run(EventList().add(Op.VMRUN, value=1 << 40).array())
    plain = Machine(Kvm(), L1, memory=SIZE)
    with pytest.raises(ValueError, match="nested guests"):
        plain.run(EventList().add(Op.VMRUN).array())
    with pytest.raises(ValueError, match="nested=True"):
        plain.prepare_vmrun(L1, L2, NPT)
    with pytest.raises(NotBuilt, match="long mode"):
        one.machine.prepare_vmrun(Cpu(cr0=int(CR0.PE | CR0.PG), cr3=0, cr4=0, efer=0, maxphyaddr=40), L2, NPT)
    with pytest.raises(ValueError, match="pml"):
        Kvm(nested=True, ept=True, pml=True)
    with pytest.raises(ValueError, match="machine with EPT"):
        one.machine.run(EventList().add(Op.INVEPT).array())
