"""Nested guests of a hypervisor with EPT, against two walks of the reference put together; rules of their own; the audit after each step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from test_nested_guest import (  # noqa: F401 (the tests among them hold with EPT too)
    DATA,
    FULL,
    L1,
    L2,
    L2_TABLES,
    NPT,
    PAGE_SIZE,
    PAGES,
    SIZE,
    VMCB,
    Nested,
    judged,
    play,
    play_huge,
    test_a_device_of_the_nested_guest,
    test_a_table_of_the_nested_guest_that_is_not_mapped_is_named_as_one,
    test_an_unmap_takes_both_maps,
    test_deleting_a_memslot_zaps_everything,
    test_dirty_logging_sees_both_guests,
    test_the_block_that_describes_the_nested_guest_is_written,
    test_the_guests_own_fault_stays_inside,
    test_the_root_is_kept_between_runs,
    test_what_follows_the_exit_of_the_nested_guest_is_its_hypervisors,
    with_strategy,
)

from fastmmu.audit import audit
from fastmmu.bits import CR0, EPT, EPTP, ROLE
from fastmmu.ept import EptpError
from fastmmu.events import EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine, NotBuilt
from fastmmu.machine_state import LogKind, VcpuWord
from fastmmu.reference.ept import Caps, EptWalker
from fastmmu.reference.nested import EptDimension
from fastmmu.reference.walk import Memory

R, W, X, A, D = (int(getattr(EPT, name)) for name in ("R", "W", "X", "A", "D"))
RWX, FLAGS, WRITE_BACK = R | W | X, A | D, 6 << 3
EPTP_OF = NPT | 6 | 3 << 3
VIOLATION, MISCONFIGURATION = 48, 49
COMMON = {"nested": True, "ept": True, "eager_page_split": False}


class NestedEpt(Nested):
    """The same with EPT12, whose EPTP enables A and D."""

    pointer, leaf_rights, flags = RWX | A, RWX | WRITE_BACK | FLAGS, FLAGS
    tables = EPTP_OF | int(EPTP.AD)

    def dimension(self, memory: Memory) -> EptDimension:
        return EptDimension(EptWalker(memory, self.tables, Caps(40, False, True, True, True)))

    @staticmethod
    def random_entry(rng: np.random.Generator, page: int) -> int:
        entry = page * PAGE_SIZE
        for bit, probability in ((R, 0.92), (W, 0.75), (X, 0.8), (A, 0.6), (D, 0.5)):
            entry |= bit if rng.random() < probability else 0
        entry |= WRITE_BACK if rng.random() < 0.96 else int(rng.integers(8)) << 3
        return entry | (1 << 45 if rng.random() < 0.03 else 0)  # a reserved bit

    def enter(self) -> None:
        if not self.inside and self.stale:  # what EPT12 said before may be remembered till then
            self.run(Op.INVEPT, value=0 if self.machine.counters()["nested_run"] % 2 else self.tables)
            self.stale = False
        super().enter()


class NestedPlainEpt(NestedEpt):
    """An EPTP without A and D: both bits of entries mean nothing."""

    tables = EPTP_OF


KINDS = {
    "tdp-mmu": (NestedEpt, Kvm(**COMMON)),
    "shadow": (NestedEpt, Kvm(**COMMON, tdp_mmu=False)),
    "tdp-mmu, no A and D": (NestedPlainEpt, Kvm(**COMMON, ad=False)),
    "shadow, no A and D": (NestedPlainEpt, Kvm(**COMMON, tdp_mmu=False, ad=False)),
}
EAGER = {**COMMON, "eager_page_split": True, "nx_huge_pages": True}
SPLITTING = {"eager": (NestedEpt, Kvm(**EAGER)), "eager, no A and D": (NestedPlainEpt, Kvm(**EAGER, ad=False))}


@pytest.fixture(params=list(KINDS))
def nested(request: pytest.FixtureRequest) -> Iterator[NestedEpt]:
    kind, kvm = KINDS[request.param]
    one = kind(kvm)
    yield one
    audit(one.machine)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("part", range(3))
def test_every_access_as_two_walks_say(seed: int, kind: str, part: int) -> None:
    play(np.random.default_rng([seed, part]), *KINDS[kind], 150)


@pytest.mark.parametrize("kind", list(SPLITTING))
@pytest.mark.parametrize("part", range(3))
def test_huge_pages_of_ept12_are_split_whatever_their_rights(seed: int, kind: str, part: int) -> None:
    guest, kvm = SPLITTING[kind]
    assert play_huge(np.random.default_rng([seed, 70 + part]), guest, with_strategy(kvm, part), 200)


@pytest.mark.long
@pytest.mark.parametrize("kind", list(KINDS))
def test_many_accesses_as_two_walks_say(seed: int, kind: str) -> None:
    for part in range(100):
        play(np.random.default_rng([seed, 1000 + part]), *KINDS[kind], 600)


@pytest.mark.parametrize("kind", list(SPLITTING))
@pytest.mark.parametrize("strategy", ["cached", "guest-walk", "propagate"])
def test_a_write_to_a_split_page_of_ept12_is_one_fault(kind: str, strategy: str) -> None:
    """What EPT12 grants is the table's access: also where its entries have no D that could be clear. But propagated rights lack X."""
    guest, kvm = SPLITTING[kind]
    one = guest(replace(kvm, split_access=strategy), host_level=2)
    one.machine.memory.words[(NPT + 2 * PAGE_SIZE) // 8 + 1] = DATA | one.leaf_rights | int(EPT.PS)
    one.enter()
    judged(one, DATA, 0)
    one.run(Op.SLOT_FLAGS, address=1, value=1)
    before = one.machine.counters()
    assert one.count("splits") == 1
    judged(one, DATA + 9 * PAGE_SIZE, 2)
    moved = one.changed(before)
    assert moved["pf_taken"] == 1 and moved.get("mmu_cache_miss", 0) == (strategy == "propagate")


@pytest.mark.long
@pytest.mark.parametrize("kind", list(SPLITTING))
def test_huge_pages_of_ept12_are_split_in_many_guests(seed: int, kind: str) -> None:
    guest, kvm = SPLITTING[kind]
    for part in range(100):
        play_huge(np.random.default_rng([seed, 2000 + part]), guest, with_strategy(kvm, part), 600)


# --- rules -----------------------------------------------------------------------------------------------------------------


def set_entry(one: NestedEpt, page: int, value: int, *, drop: bool = True) -> None:
    """L1 stores an entry of EPT12, and drops what may be remembered of it."""
    one.leave()
    one.run(Op.WRITE, access=2, address=one.npt(page), size=8, value=value)
    one.stale = drop


def exits(one: NestedEpt, gva: int, access: int) -> tuple[int, int, int]:
    """Reason, nested gpa and qualification of the exit that L1 sees."""
    one.enter()
    log = [row for row in one.run(Op.ACCESS, access=access, address=gva) if row[0] == LogKind.NESTED_EXIT]
    assert len(log) == 1 and not one.inside
    return one.reason, *log[0][1:]


def entry(page: int, rights: int) -> int:
    return page * PAGE_SIZE | rights | WRITE_BACK | FLAGS


def test_a_missing_right_goes_to_the_hypervisor(nested: NestedEpt) -> None:
    set_entry(nested, 70, entry(70, R | X))
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 0)
    before = nested.machine.counters()
    assert exits(nested, 70 * PAGE_SIZE + 8, 2) == (VIOLATION, 70 * PAGE_SIZE + 8, W | (R | X) << 3 | 0x180)
    assert nested.changed(before) == {"pf_taken": 1, "exits_no_irq": 1}  # no #PF of L1 is injected, nothing is fixed
    set_entry(nested, 70, entry(70, RWX), drop=False)  # a right more needs no INVEPT: the fault asks again
    nested.enter()
    judged(nested, 70 * PAGE_SIZE + 8, 2)


@pytest.mark.parametrize("access, bits", [(0, R), (4, R), (2, W), (16, X)])
def test_an_absent_entry_has_no_rights(nested: NestedEpt, access: int, bits: int) -> None:
    set_entry(nested, 70, 0)
    assert exits(nested, 70 * PAGE_SIZE, access) == (VIOLATION, 70 * PAGE_SIZE, bits | 0x180)


@pytest.mark.parametrize("bad", [W, W | X, R | 2 << 3, R | 3 << 3, R | 7 << 3, R | 1 << 45])
def test_a_misconfiguration_has_no_qualification(nested: NestedEpt, bad: int) -> None:
    set_entry(nested, 70, 70 * PAGE_SIZE | FLAGS | bad)
    assert exits(nested, 70 * PAGE_SIZE, 0) == (MISCONFIGURATION, 70 * PAGE_SIZE, 0)


def test_tables_of_the_nested_guest_are_written_where_flags_are_kept(nested: NestedEpt) -> None:
    """With A and D in EPT12 each access to a table is a write too; without, one that sets a flag there is."""
    page, gva = L2_TABLES // PAGE_SIZE + 3, 70 * PAGE_SIZE
    set_entry(nested, page, entry(nested.leaf(0) // PAGE_SIZE, R | X))
    keeps = bool(nested.tables & int(EPTP.AD))
    denied = (VIOLATION, L2_TABLES + 3 * PAGE_SIZE + 8 * 70, R | W | (R | X) << 3 | 0x80)
    if keeps:
        assert exits(nested, gva, 0) == denied
    else:
        nested.enter()
        judged(nested, gva, 0)
        judged(nested, gva, 2)
    nested.leave()
    nested.run(Op.WRITE, access=2, address=nested.leaf(70), size=8, value=70 * PAGE_SIZE | FULL & ~0x60)
    assert exits(nested, gva, 0) == denied
    assert not int(nested.machine.memory.words[nested.leaf(70) // 8]) & 0x60


def test_execute_only_pages(nested: NestedEpt) -> None:
    set_entry(nested, 70, entry(70, X))
    for _ in range(2):
        nested.enter()
        judged(nested, 70 * PAGE_SIZE, 16)
        judged(nested, 70 * PAGE_SIZE, 16)
        assert exits(nested, 70 * PAGE_SIZE, 0) == (VIOLATION, 70 * PAGE_SIZE, R | X << 3 | 0x180)


def test_a_translation_lives_until_invept(nested: NestedEpt) -> None:
    gva = 70 * PAGE_SIZE
    nested.enter()
    judged(nested, gva, 0)
    set_entry(nested, 70, entry(71, RWX), drop=False)
    assert nested.count("mmu_unsync") == 1
    nested.enter()
    assert nested.run(Op.ACCESS, address=gva) == [(LogKind.ACCESSED, gva, gva)]  # what EPT12 said before
    nested.leave()
    for eptp, where in ((NPT + PAGE_SIZE, 70), (nested.tables & ~7, 71)):  # of other tables; of these, by another memory type
        before = nested.machine.counters()
        nested.run(Op.INVEPT, value=eptp)
        assert nested.changed(before) == {"exits_no_irq": 1}
        nested.enter()
        assert nested.run(Op.ACCESS, address=gva) == [(LogKind.ACCESSED, gva, where * PAGE_SIZE)]
        nested.leave()
    assert nested.count("mmu_unsync") == 0


def test_invept_of_all_drops_kept_roots(nested: NestedEpt) -> None:
    words, other = nested.machine.memory.words, 48 * PAGE_SIZE
    words[other // 8] = words[NPT // 8]
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 0)
    nested.leave()
    rows = nested.machine.prepare_vmrun(L1, L2, other | nested.tables % PAGE_SIZE)
    nested.run(Op.VMRUN, address=VMCB, value=rows)
    nested.leave()
    set_entry(nested, 70, entry(71, RWX), drop=False)
    nested.run(Op.INVEPT)
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 0)


def test_a_reflected_fault_drops_the_address_under_kept_roots_of_the_same_tables() -> None:
    """The same top table in use with four levels and with five (facts 2.3.5)."""
    one = NestedEpt(KINDS["tdp-mmu"][1])
    words, last = one.machine.memory.words, 48 * PAGE_SIZE
    for page in range(PAGES):
        words[last // 8 + page] = words[one.npt(page) // 8]
    words[one.npt(0) // 8] = last | RWX | A  # a pointer at level 2, or a page
    rows = one.machine.prepare_vmrun(L1, L2, one.tables ^ (3 ^ 4) << 3)
    gva = 70 * PAGE_SIZE

    def accesses_five() -> list[tuple[int, int, int]]:
        one.run(Op.VMRUN, address=VMCB, value=rows)
        log = one.run(Op.ACCESS, address=gva)
        one.leave()
        return log

    assert accesses_five() == [(LogKind.ACCESSED, gva, gva)]
    one.run(Op.WRITE, access=2, address=last + 8 * 70, size=8, value=entry(71, RWX))
    assert accesses_five() == [(LogKind.ACCESSED, gva, gva)]  # as before: no INVEPT
    set_entry(one, 70, 0, drop=False)
    assert exits(one, gva, 0)[0] == VIOLATION
    assert accesses_five() == [(LogKind.ACCESSED, gva, 71 * PAGE_SIZE)]
    audit(one.machine)


def test_five_levels(seed: int) -> None:
    class Five(NestedEpt):
        tables = (48 * PAGE_SIZE) | 6 | 4 << 3 | int(EPTP.AD)

        def __init__(self, kvm: Kvm, *, host_level: int = 1) -> None:
            super().__init__(kvm, host_level=host_level)
            self.machine.memory.words[48 * PAGE_SIZE // 8] = NPT | RWX | A

    play(np.random.default_rng([seed, 5]), Five, KINDS["tdp-mmu"][1], 100)


def test_a_device_asks_the_hypervisor_for_each_right(nested: NestedEpt) -> None:
    """A hypervisor that grants what it is asked for, one right at a time, gets on (facts 2.4)."""
    device, gva = 0x80_0000, 80 * PAGE_SIZE
    nested.machine.memory.words[nested.npt(80) // 8] = 0
    assert exits(nested, gva, 0) == (VIOLATION, gva, R | 0x180)
    set_entry(nested, 80, device | R | WRITE_BACK | FLAGS)
    nested.enter()
    assert (LogKind.MMIO_READ, device + 16, 0) in nested.run(Op.LOAD, address=gva + 16, size=4)
    nested.enter()
    before = nested.machine.counters()
    log = nested.run(Op.WRITE, access=2, address=gva + 16, size=4, value=7)
    # the MMIO spte is a misconfiguration for the processor, which says nothing more: the emulator asks, to write as well as to read
    assert log == [(LogKind.NESTED_EXIT, gva + 16, R | W | R << 3)] and nested.reason == VIOLATION
    assert "pf_taken" not in nested.changed(before)
    set_entry(nested, 80, device | R | W | WRITE_BACK | FLAGS)
    nested.enter()
    assert (LogKind.MMIO_WRITE, device + 16, 7) in nested.run(Op.WRITE, access=2, address=gva + 16, size=4, value=7)


def test_a_device_that_becomes_memory(nested: NestedEpt) -> None:
    set_entry(nested, 80, 0x80_0000 | RWX | WRITE_BACK | FLAGS)
    nested.enter()
    nested.run(Op.LOAD, address=80 * PAGE_SIZE, size=4)
    set_entry(nested, 80, entry(80, RWX))
    nested.enter()
    judged(nested, 80 * PAGE_SIZE, 2)


def test_aging_sees_the_nested_guest(nested: NestedEpt) -> None:
    nested.enter()
    for _ in range(2):
        judged(nested, 70 * PAGE_SIZE, 2)
        nested.run(Op.AGE, address=0, value=SIZE)
        audit(nested.machine)
    judged(nested, 70 * PAGE_SIZE, 2)


def test_a_sync_makes_pages_seem_unused(nested: NestedEpt) -> None:
    """What is built again for no access is without A, or access-tracked; its next use faults only then (facts 5.12.4)."""
    nested.enter()
    judged(nested, 70 * PAGE_SIZE, 0)
    set_entry(nested, 75, entry(75, R))
    nested.enter()
    judged(nested, 60 * PAGE_SIZE, 0)
    before = nested.count("pf_fixed")
    judged(nested, 70 * PAGE_SIZE, 0)
    assert nested.count("pf_fixed") - before == (0 if nested.machine.kvm.ad else 1)


def test_rights_that_leave_nothing_drop_the_page(nested: NestedEpt) -> None:
    """Where the entries of EPT12 have no right in common an spte would not be present: a sync drops it (facts 5.12.4)."""
    words, table, gva = nested.machine.memory.words, 48 * PAGE_SIZE, DATA + 5 * PAGE_SIZE
    words[table // 8 + 5] = gva | R | X | WRITE_BACK | FLAGS
    words[(NPT + 2 * PAGE_SIZE) // 8 + 1] = table | X | A
    nested.enter()
    judged(nested, gva, 16)
    nested.leave()
    nested.run(Op.WRITE, access=2, address=table + 8 * 5, size=8, value=gva | R | WRITE_BACK | FLAGS)
    nested.run(Op.INVEPT)
    before = nested.count("pages_4k")
    nested.enter()
    nested.run(Op.EXIT)
    assert nested.count("pages_4k") == before - 1
    assert exits(nested, gva, 16) == (VIOLATION, gva, X | 0x180)


def test_the_role_of_the_shadow_pages(nested: NestedEpt) -> None:
    nested.enter()
    nested.run(Op.EXIT)
    words = nested.machine.state.other.own[0]
    role = int(nested.machine.vm.page[words[VcpuWord.ROOT]]["role"])
    assert role == 4 | int(ROLE.ACCESS | ROLE.GUEST_MODE) | (0 if nested.machine.kvm.ad else int(ROLE.AD_DISABLED))


def test_flags_that_kvm_sets_are_logged() -> None:
    one = NestedEpt(KINDS["tdp-mmu"][1])
    words, tables = one.machine.memory.words, [NPT // PAGE_SIZE + level for level in range(4)]
    for level in range(3):
        words[(NPT + level * PAGE_SIZE) // 8] &= ~np.uint64(A)
    for page in range(PAGES):
        words[one.npt(page) // 8] &= ~np.uint64(FLAGS)
    one.run(Op.SLOT_FLAGS, address=0, value=1)
    one.enter()
    judged(one, 70 * PAGE_SIZE, 2)
    one.run(Op.DIRTY_GET, address=0)
    assert one.machine.report(0)[tables].all()
    assert int(words[one.npt(70) // 8]) & FLAGS == FLAGS
    audit(one.machine)


def test_a_device_of_a_guest_without_paging(nested: NestedEpt) -> None:
    set_entry(nested, 80, 0x80_0000 | RWX | WRITE_BACK | FLAGS)
    rows = nested.machine.prepare_vmrun(L1, replace(L2, cr0=int(CR0.PE), efer=0), nested.tables)
    nested.run(Op.INVEPT)
    nested.run(Op.VMRUN, address=VMCB, value=rows)
    assert nested.run(Op.ACCESS, address=70 * PAGE_SIZE) == [(LogKind.ACCESSED, 70 * PAGE_SIZE, 70 * PAGE_SIZE)]
    assert (LogKind.MMIO_READ, 0x80_0008, 0) in nested.run(Op.LOAD, address=80 * PAGE_SIZE + 8, size=4)


def test_what_cannot_be() -> None:
    one = NestedEpt(KINDS["tdp-mmu"][1])
    prepare = one.machine.prepare_vmrun
    for eptp in (NPT | 5 | 3 << 3, NPT | 6 | 2 << 3, NPT | 6 | 3 << 3 | 1 << 7, 1 << 45 | 6 | 3 << 3):
        with pytest.raises(EptpError):
            prepare(L1, L2, eptp)
    with pytest.raises(NotBuilt, match="A and D"):
        prepare(L1, L2, EPTP_OF)
    with pytest.raises(NotBuilt, match="A and D"):
        NestedPlainEpt(KINDS["shadow, no A and D"][1]).machine.prepare_vmrun(L1, L2, NestedEpt.tables)
    wide = Machine(KINDS["tdp-mmu"][1], replace(L1, maxphyaddr=52), memory=SIZE)
    with pytest.raises(NotBuilt, match="52 bits"):
        wide.prepare_vmrun(L1, replace(L2, maxphyaddr=52), NestedEpt.tables)
    with pytest.raises(ValueError, match="INVEPT"):
        one.machine.run(EventList().add(Op.VMRUN, value=one.rows).add(Op.INVEPT).array())
    for row in (one.rows >> 32, 1 << 20):
        with pytest.raises(ValueError, match="registers"):
            one.machine.run(EventList().add(Op.MODE, value=row).array())
    with pytest.raises(ValueError, match="prepare_vmrun"):
        one.machine.run(EventList().add(Op.VMRUN, value=one.rows & 0xFFFFFFFF).array())
