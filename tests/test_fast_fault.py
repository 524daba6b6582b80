"""The page fault without the mmu lock (facts section 6), access tracking (3.2), and what both must not do."""

from __future__ import annotations

import pytest
from test_kvm_rules import MMUS, TWO_MIB, Guest, R, W, X
from test_shadow_rules import Shadowed

from fastmmu.bits import EPT_SPTE, NPT_SPTE
from fastmmu.events import Op
from fastmmu.kvm import Kvm
from fastmmu.machine_state import VmWord

DIRECT = {
    "tdp": MMUS["tdp"],
    "legacy": MMUS["legacy"],
    "ept": MMUS["ept"],
    "ept-no-ad": Kvm(ept=True, ad=False),
    "legacy-ept-no-ad": Kvm(ept=True, ad=False, tdp_mmu=False),
}
WITHOUT_AD = ("ept-no-ad", "legacy-ept-no-ad")
RWX = int(EPT_SPTE.R | EPT_SPTE.W | EPT_SPTE.X)


def age(guest: Guest, start: int, end: int) -> dict[str, int]:
    return guest.count((Op.AGE, {"address": start, "value": end}))


@pytest.fixture(params=DIRECT)
def guest(request: pytest.FixtureRequest) -> Guest:
    return Guest(DIRECT[request.param])


def protected(guest: Guest, gpa: int = 0x5000) -> Guest:
    """A guest with a page that was written before logging began."""
    guest.touch(gpa, W)
    guest.log(True)
    return guest


def test_a_write_protected_page_is_fixed_without_the_lock(guest: Guest) -> None:
    """6.2: W by an exchange, the page logged; the lock is not touched."""
    protected(guest)
    taken = guest.machine.counters()["lock_taken"]
    changed = guest.touch(0x5000, W)
    assert (changed["pf_fast"], changed["pf_fixed"]) == (1, 1)
    counters = guest.machine.counters()
    assert (counters["fast_fixed"], counters["lock_taken"] - taken) == (1, 0)
    assert guest.dirty() == [5]


def test_the_path_can_be_switched_off() -> None:
    """The strategy that it is measured against: the same fault under the lock, and the same state after it."""
    for name in ("tdp", "legacy"):
        guest = protected(Guest(Kvm(tdp_mmu=name == "tdp", fast_page_fault=False)))
        taken = guest.machine.counters()["lock_taken"]
        changed = guest.touch(0x5000, W)
        assert "pf_fast" not in changed and changed["pf_fixed"] == 1
        assert guest.machine.counters()["lock_taken"] == taken + 1
        assert guest.spte(0x5000) & int(NPT_SPTE.W)
        assert guest.dirty() == [5]


def test_what_is_not_for_this_path(guest: Guest) -> None:
    """6.1: nothing mapped; a fetch; 6.2: an entry without MMU_WRITABLE."""
    assert "pf_fast" not in guest.touch(0x5000, W)
    assert "pf_fast" not in guest.touch(0x9000, X)
    readonly = Guest(guest.machine.kvm, flags=2)
    readonly.touch(0x5000)
    assert "pf_fast" not in readonly.touch(0x5000, W)


def test_a_huge_page_of_a_slot_that_logs(guest: Guest) -> None:
    """6.2: only the first of its pages would be logged."""
    huge = Guest(guest.machine.kvm, host_level=2)
    huge.touch(0x5000, W)
    huge.count((Op.PARAMETER, {"address": VmWord.EAGER_PAGE_SPLIT, "value": 0}))  # no eager splitting
    huge.log(True)
    changed = huge.touch(0x7000, W)
    assert "pf_fast" not in changed
    assert changed["pages_2m"] == -1
    assert huge.dirty() == [7]


def test_an_aged_page_faults_once_and_comes_back() -> None:
    """3.2, 6.1: without A bits the entry is made not present; the fast path gives R and X back, and W to who writes."""
    for name in WITHOUT_AD:
        guest = Guest(DIRECT[name])
        guest.touch(0x5000, W)
        assert age(guest, 0x5000, 0x6000) == {"remote_tlb_flush_requests": 1}
        assert guest.spte(0x5000) & (RWX | int(EPT_SPTE.SAVED)) == int(EPT_SPTE.SAVED)
        assert age(guest, 0x5000, 0x6000) == {}  # it is old already
        changed = guest.touch(0x5000, R)
        assert (changed["pf_fast"], changed["pf_fixed"]) == (1, 1)
        assert guest.spte(0x5000) & (RWX | int(EPT_SPTE.SAVED)) == int(EPT_SPTE.R | EPT_SPTE.X)
        changed = guest.touch(0x5000, W)
        assert (changed["pf_fast"], changed["pf_fixed"]) == (1, 1)
        assert guest.spte(0x5000) & RWX == RWX
        age(guest, 0x5000, 0x6000)
        changed = guest.touch(0x5000, W)  # both at once
        assert (changed["pf_fast"], changed["pf_fixed"]) == (1, 1)
        assert guest.spte(0x5000) & (RWX | int(EPT_SPTE.SAVED)) == RWX


def test_what_an_aged_page_logs() -> None:
    """6.2: only an exchange that sets W dirties the page."""
    for name in WITHOUT_AD:
        guest = protected(Guest(DIRECT[name]))
        age(guest, 0x5000, 0x6000)
        guest.touch(0x5000, R)
        assert guest.dirty() == []
        age(guest, 0x5000, 0x6000)
        guest.touch(0x5000, W)
        assert guest.dirty() == [5]


def test_with_accessed_bits_aging_takes_no_right() -> None:
    """3.2: A goes, nothing faults, the next use sets it."""
    for name in ("tdp", "legacy", "ept", "shadow"):
        guest = Guest(MMUS[name])
        accessed = int(EPT_SPTE.A if name == "ept" else NPT_SPTE.A)
        guest.touch(0x5000, W)
        assert age(guest, 0x5000, 0x6000) == {"remote_tlb_flush_requests": 1}
        assert not guest.spte(0x5000) & accessed
        assert set(guest.touch(0x5000, W)) <= {"tlb_flush"}
        assert guest.spte(0x5000) & accessed


def test_aging_of_huge_pages_and_of_nothing(guest: Guest) -> None:
    huge = Guest(guest.machine.kvm, host_level=2)
    huge.touch(0x5000, W)
    assert age(huge, TWO_MIB, 2 * TWO_MIB) == {}
    assert age(huge, 0x9000, 0xA000) == {"remote_tlb_flush_requests": 1}
    assert age(huge, 0x9000, 0xA000) == {}


def test_under_shadow_paging_it_is_never_taken() -> None:
    """6.1.4: only direct maps; a guest that does not page has one even so."""
    assert protected(Guest(MMUS["shadow"])).touch(0x5000, W)["pf_fast"] == 1
    shadowed = Shadowed()
    shadowed.touch(0, W)
    shadowed.log(True)
    changed = shadowed.touch(0, W)
    assert "pf_fast" not in changed and changed["pf_fixed"] == 1


def test_pages_beside_the_one_that_faults_stay_protected(guest: Guest) -> None:
    guest.touch(0x6000, W)
    protected(guest)
    guest.touch(0x5000, W)
    assert not guest.spte(0x6000) & int(EPT_SPTE.W)
