"""Rules of shadow paging, one by one, by the facts (section in each test), on machines built by hand: KVM's shadow pages follow the
guest's own tables, which the guest writes."""

from __future__ import annotations

import numpy as np
import pytest
from test_kvm_rules import DEVICE, GIB, LOG, LONG, MMUS, PAGE, READONLY, TWO_MIB, Guest, R, W, X

from fastmmu.bits import CR0, CR3, CR4, EFER, NPT_SPTE, RFLAGS
from fastmmu.events import Op
from fastmmu.kvm import Kvm
from fastmmu.machine import MachineError
from fastmmu.machine_state import LogKind, VcpuWord, VmWord
from fastmmu.paging import Cpu
from fastmmu.translate import USER

ROOT, UPPER, DIRECTORY, LEAF, WINDOW_LEAF, OTHER_ROOT, SPARE = (0x1000 * i for i in (1, 2, 3, 4, 5, 6, 0x40))
WINDOW = TWO_MIB  # gva: from here on each page of the first 2 MiB of memory is mapped, so that the guest can write its tables
DATA = 0x10_0000  # gpa of the pages at gva 0 and up
DEVICE_PAGE = 64 * PAGE  # gva of a device's page
FULL = 0x67  # P, W, U, A, D
NX, LARGE, A, D, U = 1 << 63, 0x80, 0x20, 0x40, 4
NO_WP = int(CR0.PE | CR0.PG)
PCIDS = {**LONG, "cr4": int(CR4.PAE | CR4.PCIDE)}
NO_FLUSH = int(CR3.NO_FLUSH)
MISS = "mmu_cache_miss"


class Shadowed(Guest):
    """A guest that pages in long mode without two-dimensional paging, with one table of each level."""

    def __init__(self, kvm: Kvm = MMUS["shadow"], *, registers: dict[str, int] = LONG, host_level: int = 1, vcpus: int = 1) -> None:
        super().__init__(kvm, host_level=host_level, vcpus=vcpus)
        self.machine.configure(log_faults=True, log_accesses=True)
        self.build()
        for vcpu in reversed(range(vcpus)):
            self.run((Op.VCPU, {"value": vcpu}), (Op.MODE, {"value": self.row(registers, ROOT)}))

    def build(self) -> None:
        """The guest's tables."""
        for root in (ROOT, OTHER_ROOT):
            self.poke(root, UPPER | FULL)
        self.poke(UPPER, DIRECTORY | FULL)
        self.poke(DIRECTORY, LEAF | FULL)
        self.poke(DIRECTORY + 8, WINDOW_LEAF | FULL)
        for i in range(512):
            self.poke(WINDOW_LEAF + 8 * i, i * PAGE | FULL)
        for i in range(32):
            self.poke(LEAF + 8 * i, DATA + i * PAGE | FULL)
        self.poke(LEAF + 8 * 64, DEVICE | FULL)

    def poke(self, gpa: int, value: int) -> None:
        """A word of memory, before the guest runs."""
        self.machine.memory.words[gpa // 8] = value

    def row(self, registers: dict[str, int], cr3: int) -> int:
        return self.machine.registers(Cpu(cr3=cr3, **registers))

    def store(self, gpa: int, value: int, size: int = 8) -> dict[str, int]:
        """The guest stores to one of its tables; the counters that changed."""
        return self.count((Op.WRITE, {"address": WINDOW + gpa, "access": W, "size": size, "value": value}))

    def cr3(self, value: int) -> dict[str, int]:
        """MOV to CR3, and the entry behind it."""
        return self.count((Op.CR3, {"value": value}), (Op.EXIT, {}))

    def invlpg(self, gva: int) -> dict[str, int]:
        return self.count((Op.INVLPG, {"address": gva}))

    def goes(self, gva: int, access: int = R) -> int:
        """The gpa that an access reaches."""
        log = self.run((Op.ACCESS, {"address": gva, "access": access}))
        return next(int(row["value"]) for row in log if row["kind"] == LogKind.ACCESSED)

    def fault(self, gva: int, access: int = R) -> int:
        """The error code of the guest's #PF, -1 for none."""
        log = self.run((Op.ACCESS, {"address": gva, "access": access}))
        return next((int(row["value"]) for row in log if row["kind"] == LogKind.PAGE_FAULT), -1)

    def own(self, word: int) -> int:
        return int(self.machine.state.own[0, word])

    def kept(self) -> list[int]:
        """Values of CR3 whose roots are kept, the newest first."""
        return [self.own(VcpuWord.PREVIOUS_PGD + i) for i in range(3) if self.own(VcpuWord.PREVIOUS_ROOT + i)]

    def total(self, name: str) -> int:
        return self.machine.counters()[name]

    def word(self, gpa: int) -> int:
        return int(self.machine.memory.words[gpa // 8])


@pytest.fixture
def guest() -> Shadowed:
    return Shadowed()


# --- leaf tables -----------------------------------------------------------------------------------------------------------


def test_a_leaf_table_goes_out_of_step_at_its_first_write(guest: Shadowed) -> None:
    """Facts 5.12.2, 9.4; S10 for memory: one fault, then the guest writes unseen, and sees the old page until INVLPG."""
    guest.touch(0)
    changed = guest.store(LEAF, DATA + 9 * PAGE | FULL)
    assert (changed["mmu_unsync"], changed["pf_fixed"]) == (1, 1)
    assert "mmu_pte_write" not in changed
    assert guest.store(LEAF + 8, DATA + 10 * PAGE | FULL) == {}
    assert guest.goes(8) == DATA + 8
    changed = guest.invlpg(0)
    assert (changed["invlpg"], changed["remote_tlb_flush_requests"]) == (1, 1)
    assert guest.goes(8) == DATA + 9 * PAGE + 8
    assert guest.total("mmu_unsync") == 1


def test_a_load_of_cr3_brings_it_up_to_date(guest: Shadowed) -> None:
    """Facts 5.12.3, 9.2: also of the same value. The table is read-only again, and the next write faults anew."""
    guest.touch(0)
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    assert guest.cr3(ROOT)["mmu_unsync"] == -1
    assert guest.goes(8) == DATA + 9 * PAGE + 8
    assert guest.store(LEAF, DATA | FULL)["mmu_unsync"] == 1


def test_each_way_to_flush_brings_it_up_to_date(guest: Shadowed) -> None:
    """Facts 9.3: INVPCID of everything, CR4.PGE; and user space that sets another CR3, by way of a new root."""
    page_global = guest.row({**LONG, "cr4": int(CR4.PAE | CR4.PGE)}, ROOT)
    for number, flush in enumerate(
        ((Op.FLUSH, {}), (Op.REGISTERS, {"value": page_global}), (Op.MODE, {"value": guest.row(LONG, OTHER_ROOT)}))
    ):
        guest.touch(0)
        guest.store(LEAF, DATA + (9 + number) * PAGE | FULL)
        assert guest.total("mmu_unsync") == 1
        guest.run(flush)
        assert guest.goes(8) == DATA + (9 + number) * PAGE + 8
        assert guest.total("mmu_unsync") == 0


def test_entries_that_lose_rights(guest: Shadowed) -> None:
    """Facts 5.12.4: not present, no A, a reserved bit: the leaf is dropped. Without D, W or U: it loses the right."""
    values = {0: 0, 1: DATA + PAGE | FULL & ~A, 2: DATA + 2 * PAGE | FULL | 1 << 45}
    values[3] = DATA + 3 * PAGE | FULL & ~D
    guest.touch(0)
    for entry, value in values.items():
        guest.store(LEAF + 8 * entry, value)
    assert guest.cr3(ROOT)["pages_4k"] == -3
    assert guest.fault(0) == 0
    assert guest.fault(2 * PAGE) == 9
    assert guest.touch(PAGE)["pf_taken"] == 1
    assert guest.word(LEAF + 8) & A
    assert not guest.spte(3 * PAGE) & int(NPT_SPTE.W)


def test_a_sync_loses_what_the_processor_had_set(guest: Shadowed) -> None:
    """Linux 6.1 builds each leaf anew, as a prefetch, also one that has not changed: A and D of it are lost; a flush tells."""
    guest.touch(0, W)
    guest.store(LEAF + 8 * 20, DATA | FULL)
    assert guest.spte(0) & int(NPT_SPTE.A)
    assert guest.cr3(ROOT)["remote_tlb_flush_requests"] >= 1
    assert not guest.spte(0) & int(NPT_SPTE.A)
    assert guest.spte(0) & int(NPT_SPTE.W)


@pytest.mark.parametrize("logs", [False, True])
def test_later_kernels_leave_unchanged_leaves_alone(logs: bool) -> None:
    """Facts 5.12.4: there a leaf whose rights did not change keeps A and D; one whose rights did is built anew."""
    guest = Shadowed(Kvm(tdp=False, tdp_mmu=False, sync_skips_unchanged=True))
    if logs:
        guest.count((Op.SLOT_FLAGS, {"address": 0, "value": LOG}))
    guest.touch(0, W)
    guest.touch(PAGE, W)
    before = guest.spte(0)
    guest.store(LEAF + 8, DATA + PAGE | FULL & ~2)
    guest.cr3(ROOT)
    assert guest.spte(0) == before
    assert not guest.spte(PAGE) & int(NPT_SPTE.W | NPT_SPTE.A)


def test_rights_that_go_and_come_back(guest: Shadowed) -> None:
    """Facts 5.12.4, 8.3: what the entry grants is remembered beside the leaf at each sync."""
    guest.touch(0)
    for value in (FULL & ~U, FULL):
        guest.store(LEAF, DATA | value)
        guest.cr3(ROOT)
        assert bool(guest.spte(0) & int(NPT_SPTE.U)) == bool(value & U)
    assert guest.touch(0, USER) == {}


def test_a_leaf_that_a_sync_drops_is_flushed(guest: Shadowed) -> None:
    """Facts 5.12.4, 9.5: where nothing else is a reason to: a page found again, one of whose two leaves maps another frame now."""
    for i in range(1, 32):
        guest.poke(LEAF + 8 * i, DATA | FULL & ~2 if i == 1 else 0)
    guest.touch(0)
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    assert guest.store(DIRECTORY + 16, LEAF | FULL)["pf_emulate"] == 1
    assert guest.touch(2 * TWO_MIB + PAGE)["remote_tlb_flush_requests"] == 1
    assert guest.goes(0) == DATA + 9 * PAGE


def test_a_table_that_is_protected_for_a_sync_is_flushed(guest: Shadowed) -> None:
    """Facts 5.12.3, 9.5: where nothing else is a reason to: no leaf under it is lost, or loses A or D."""
    for i in range(32):
        guest.poke(LEAF + 8 * i, DATA + i * PAGE | FULL & ~2)
    guest.touch(0)
    guest.store(LEAF + 8 * 20, 0)
    guest.run((Op.UNMAP, {"address": DATA, "value": DATA + PAGE}))
    changed = guest.cr3(ROOT)
    assert (changed["mmu_unsync"], changed["remote_tlb_flush_requests"]) == (-1, 1)
    assert guest.store(LEAF + 8 * 20, 0)["mmu_unsync"] == 1


def test_a_sync_puts_no_table_out_of_step(guest: Shadowed) -> None:
    """Facts 5.12.2: an entry that maps a table gets W in the guest: the sync leaves it read-only, and the first write faults."""
    guest.poke(LEAF, WINDOW_LEAF | FULL & ~2)
    guest.touch(0)
    guest.store(LEAF, WINDOW_LEAF | FULL)
    assert guest.cr3(ROOT)["mmu_unsync"] == -1
    assert not guest.spte(0) & int(NPT_SPTE.W)
    assert guest.touch(0, W)["mmu_unsync"] == 1


def test_a_page_that_is_mapped_too_often(guest: Shadowed) -> None:
    """Facts 5.14: a list of more than 1000 sptes is zapped, with a flush."""
    for table in range(3):
        guest.poke(DIRECTORY + 8 * (table + 2), (SPARE + table * PAGE) | FULL)
        for i in range(512):
            guest.poke(SPARE + table * PAGE + 8 * i, DATA | FULL)
    pages = [(Op.ACCESS, {"address": 2 * TWO_MIB + i * 8 * PAGE, "access": R}) for i in range(192)]
    assert "remote_tlb_flush_requests" not in guest.count(*pages[:125])
    assert guest.total("pages_4k") == 1000
    assert guest.count(*pages[125:])["remote_tlb_flush_requests"] == 1
    assert guest.total("pages_4k") < 1000


def test_a_fault_on_an_entry_that_has_moved(guest: Shadowed) -> None:
    """Facts 5.10: the leaf maps another frame: it is dropped from the reverse map of that one, and the TLBs are flushed."""
    guest.poke(LEAF, DATA | FULL & ~D)
    guest.touch(0)
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    changed = guest.touch(0, W)
    assert (changed["pf_fixed"], changed["remote_tlb_flush_requests"]) == (1, 1)
    assert "pages_4k" not in changed
    assert guest.goes(0, W) == DATA + 9 * PAGE


def test_more_tables_than_one_batch_takes(guest: Shadowed) -> None:
    """Facts 5.12.3: sixteen pages at a time, those above the leafs among them, until none is left."""
    for i in range(20):
        guest.poke(DIRECTORY + 8 * (i + 2), (SPARE + i * PAGE) | FULL)
        guest.touch((i + 2) * TWO_MIB)
        guest.store(SPARE + i * PAGE, DATA + i * PAGE | FULL)
    assert guest.total("mmu_unsync") == 0  # a walk that ends in a #PF shadows nothing
    for i in range(20):
        guest.touch((i + 2) * TWO_MIB)
        guest.store(SPARE + i * PAGE, DATA | FULL)
    assert guest.total("mmu_unsync") == 20
    assert guest.cr3(ROOT)["mmu_unsync"] == -20
    assert guest.goes(21 * TWO_MIB) == DATA


def test_a_page_that_moves_keeps_its_place_in_the_reverse_map(guest: Shadowed) -> None:
    """Facts 5.12.4, 8.3: what a leaf maps is remembered beside it; the host's unmap finds it where it is now."""
    guest.touch(0)
    guest.store(LEAF, DATA + 40 * PAGE | FULL)
    guest.cr3(ROOT)
    guest.touch(0)
    assert guest.count((Op.UNMAP, {"address": DATA, "value": DATA + PAGE})) == {}
    unmapped = guest.count((Op.UNMAP, {"address": DATA + 40 * PAGE, "value": DATA + 41 * PAGE}))
    assert unmapped == {"pages_4k": -1, "remote_tlb_flush_requests": 1}


def test_the_prefetch_ends_at_the_first_entry_that_it_cannot_take(guest: Shadowed) -> None:
    """Facts 5.8.5: from the lowest of the aligned eight up; present, with A, no reserved bit."""
    for value in (0, DATA | FULL & ~A, DATA | FULL | 1 << 45, DATA | FULL | NX):
        other = Shadowed(registers={**LONG, "efer": int(EFER.LME | EFER.LMA)})  # NX is a reserved bit
        other.poke(LEAF + 8 * 2, value)
        assert other.touch(5 * PAGE)["pages_4k"] == 3  # 0 and 1, and the one that faulted
    assert guest.touch(5 * PAGE)["pages_4k"] == 8
    assert "pf_taken" not in guest.touch(7 * PAGE, W)


def test_a_prefetch_makes_no_table_writable(guest: Shadowed) -> None:
    """Facts 5.12.2: the window's entries for tables are mapped along, but read-only, and nothing becomes unsync."""
    guest.touch(0)
    assert "mmu_unsync" not in guest.touch(WINDOW, W)
    for table in (ROOT, UPPER, DIRECTORY, LEAF, WINDOW_LEAF):
        assert not guest.spte(WINDOW + table) & int(NPT_SPTE.W)
    assert guest.spte(WINDOW) & int(NPT_SPTE.W)


def test_a_prefetch_where_writes_are_logged_or_not_possible() -> None:
    """Facts 5.8.5: what would be writable is not mapped while its memslot logs, nor anything of a read-only memslot."""
    for flags, pages in ((LOG, 1), (READONLY, 1), (0, 8)):
        guest = Shadowed()
        guest.slot(1, 0x1000_0000, 32 * PAGE, flags)
        for i in range(8):
            guest.poke(LEAF + 8 * i, 0x1000_0000 + i * PAGE | FULL)
        assert guest.touch(5 * PAGE)["pages_4k"] == pages
    guest = Shadowed()
    guest.slot(1, 0x1000_0000, 32 * PAGE, LOG)
    for i in range(8):
        guest.poke(LEAF + 8 * i, 0x1000_0000 + i * PAGE | (FULL & ~2 if i < 4 else FULL))
    assert guest.touch(5 * PAGE)["pages_4k"] == 5  # those that are not writable need no log


def test_a_page_becomes_a_table(guest: Shadowed) -> None:
    """Facts 5.11.5: what may write it loses the right, MMU_WRITABLE too, and the TLBs are flushed."""
    guest.touch(WINDOW + SPARE, W)
    assert guest.spte(WINDOW + SPARE) & int(NPT_SPTE.W)
    guest.store(SPARE, DATA + 3 * PAGE | FULL)
    guest.store(DIRECTORY + 16, SPARE | FULL)
    changed = guest.touch(2 * TWO_MIB)
    assert (changed[MISS], changed["remote_tlb_flush_requests"], changed["tlb_flush"]) == (1, 1, 1)
    mmu_writable = int(guest.machine.vm.word[VmWord.MMU_WRITABLE])
    assert not guest.spte(WINDOW + SPARE) & (int(NPT_SPTE.W) | mmu_writable)


def test_a_page_that_is_found_again_is_synced_and_stays_unsync(guest: Shadowed) -> None:
    """Facts 5.11.4, 5.12.3 (b): a second directory entry leads to an unsync page."""
    guest.touch(0)
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    guest.store(DIRECTORY + 16, LEAF | FULL)
    changed = guest.touch(2 * TWO_MIB)
    assert MISS not in changed
    assert "mmu_unsync" not in changed
    assert guest.goes(2 * TWO_MIB) == DATA + 9 * PAGE
    assert guest.goes(0) == DATA + 9 * PAGE  # the same page, and what changed in it was flushed
    assert guest.store(LEAF, DATA | FULL) == {}


def test_no_upper_table_is_out_of_step(guest: Shadowed) -> None:
    """Facts 5.11.4, 5.12.1: an unsync leaf table that becomes an upper one is zapped first."""
    guest.touch(0)
    guest.store(LEAF + 8, SPARE | FULL)
    guest.store(SPARE, DATA + 5 * PAGE | FULL)
    assert guest.total("mmu_unsync") == 1
    guest.store(UPPER + 8, LEAF | FULL)
    changed = guest.touch(GIB + TWO_MIB)  # entry 1 of the new directory, entry 0 of the spare table
    assert (changed["mmu_unsync"], changed["mmu_shadow_zapped"]) == (-1, 1)
    assert guest.goes(GIB + TWO_MIB) == DATA + 5 * PAGE
    assert guest.store(LEAF + 8, SPARE | FULL)["pf_emulate"] == 1


# --- upper tables ----------------------------------------------------------------------------------------------------------


def test_writes_to_upper_tables_are_emulated(guest: Shadowed) -> None:
    """Facts 5.13: at each write the entry is zapped, at once; a new value that is not zero is counted."""
    guest.touch(0)
    changed = guest.store(DIRECTORY, SPARE | FULL)
    assert changed["pf_taken"] == 1  # though nothing was mapped there
    assert (changed["pf_emulate"], changed["mmu_pte_write"], changed["mmu_pde_zapped"]) == (1, 1, 1)
    assert changed["remote_tlb_flush_requests"] == 1
    assert "mmu_unsync" not in changed
    assert guest.fault(0) == 0  # the spare table is empty
    changed = guest.store(DIRECTORY, 0)
    assert (changed["pf_emulate"], changed["mmu_pte_write"]) == (1, 1)
    assert "mmu_pde_zapped" not in changed


def test_a_flood_of_writes(guest: Shadowed) -> None:
    """Facts 5.13.3, S20: the third write since the page was gone through zaps it; going through it starts anew."""
    guest.poke(UPPER + 8, SPARE | FULL)
    guest.poke(SPARE, LEAF | FULL)
    guest.touch(GIB)
    for page in (8, 16, 24):
        for _ in range(2):
            assert "mmu_flooded" not in guest.store(SPARE + 8 * 100, 0)
        guest.touch(GIB + page * PAGE)  # a fault: through all of them
    for _ in range(2):
        assert "mmu_flooded" not in guest.store(SPARE + 8 * 100, 0)
    changed = guest.store(SPARE + 8 * 100, 0)
    assert (changed["mmu_flooded"], changed["mmu_shadow_zapped"]) == (1, 1)
    assert guest.goes(GIB) == DATA


def test_a_leaf_table_is_not_flooded(guest: Shadowed) -> None:
    """Facts 5.13.3: a page that is a leaf table and a directory too: only its shadow page as a directory goes."""
    guest.poke(UPPER + 8, LEAF | FULL)
    guest.poke(LEAF + 8, SPARE | FULL)
    guest.poke(SPARE, DATA | FULL)
    guest.touch(0)
    guest.touch(GIB + TWO_MIB)
    for flooded in (0, 0, 1, 0, 0):
        changed = guest.store(LEAF + 8 * 100, 0)
        assert changed.get("mmu_flooded", 0) == flooded


@pytest.mark.parametrize(
    "offset, size, zapped", [(0, 8, 0), (0, 4, 0), (4, 4, 0), (2, 4, 0), (0, 1, 0), (1, 1, 1), (0, 2, 1), (4, 8, 1), (6, 4, 0)]
)
def test_writes_that_do_not_look_like_entries(guest: Shadowed, offset: int, size: int, zapped: int) -> None:
    """Facts 5.13.3: over the bounds of an entry, or less than 4 bytes, but for one byte at its start. 4 bytes are made a whole entry."""
    guest.touch(0)
    changed = guest.store(DIRECTORY + 8 * 100 + offset, 0, size)
    assert changed["mmu_pte_write"] == 1
    assert changed.get("mmu_flooded", 0) == zapped


def test_a_write_of_half_an_entry(guest: Shadowed) -> None:
    """Facts 5.13.2: 4 bytes count as the whole entry of 8: it is not zero though its upper half is."""
    guest.touch(0)
    assert guest.store(DIRECTORY + 4, 0, 4)["mmu_pde_zapped"] == 1
    assert guest.goes(0) == DATA


def test_tables_on_the_way_to_what_is_written_are_not_flooded(guest: Shadowed) -> None:
    """Facts 5.13.4: a write that is tracked clears the count of the pages on the way to the window."""
    guest.touch(0)
    for _ in range(4):
        changed = guest.store(ROOT + 8 * 100, 0)
        assert changed["mmu_pte_write"] == 1
    assert guest.total("mmu_flooded") == 0


def test_zapping_a_page_takes_the_unsync_ones_below(guest: Shadowed) -> None:
    """Facts 5.14: a flooded table goes, and before it the unsync pages under it; others stay."""
    guest.poke(UPPER + 8, SPARE | FULL)
    guest.poke(SPARE, LEAF | FULL)
    guest.touch(GIB)
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    changed = guest.store(SPARE + 4, 0)
    assert (changed["mmu_flooded"], changed["mmu_unsync"], changed["mmu_shadow_zapped"]) == (1, -1, 2)
    assert guest.goes(0) == DATA + 9 * PAGE


def test_a_kept_table_that_is_linked_again_is_still_unsync(guest: Shadowed) -> None:
    """Facts 5.8.2, 5.12.3: the upper page had unsync ones below it; they are synced before it is linked."""
    far = 512 * GIB
    guest.poke(ROOT + 8, SPARE | FULL)
    guest.poke(SPARE, DIRECTORY | FULL)
    guest.touch(far)
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    guest.store(ROOT + 8, 0)
    guest.store(ROOT + 8, SPARE | FULL)
    changed = guest.touch(far)
    assert changed["mmu_unsync"] == -1
    assert MISS not in changed
    assert guest.goes(far) == DATA + 9 * PAGE


# --- rights ----------------------------------------------------------------------------------------------------------------


def test_a_clean_page_is_mapped_for_reading(guest: Shadowed) -> None:
    """Facts 1.6, S5: a read maps it without W; the first write sets D, which is a write to the guest's table, and gets W."""
    guest.poke(LEAF, DATA | FULL & ~D)
    guest.touch(0)
    assert not guest.spte(0) & int(NPT_SPTE.W)
    assert guest.spte(PAGE) & int(NPT_SPTE.W)
    changed = guest.touch(0, W)
    assert (changed["pf_taken"], changed["pf_fixed"]) == (1, 1)
    assert guest.word(LEAF) & D
    assert guest.touch(0, W) == {}


def test_bits_that_kvm_sets_in_tables_are_logged(guest: Shadowed) -> None:
    """Facts 7.2: KVM's own walk writes A and D: the table's page is dirty, as is the page written."""
    guest.poke(LEAF, DATA | 7)
    guest.poke(DIRECTORY, LEAF | 7)
    guest.touch(PAGE * 20)
    guest.log(on=True)
    guest.dirty()
    guest.poke(DIRECTORY + 16, SPARE | 7)
    guest.poke(SPARE, DATA | 7)
    guest.touch(2 * TWO_MIB)
    assert guest.dirty() == [DIRECTORY // PAGE, SPARE // PAGE]
    guest.touch(2 * TWO_MIB, W)
    assert guest.dirty() == [SPARE // PAGE, DATA // PAGE]


def test_leaves_of_the_guests_tables_stay_when_logging_ends(guest: Shadowed) -> None:
    """Facts 7.1.3: only direct pages could map more at once; a 4 KiB page of the guest stays one, whatever the host has."""
    guest.slot(1, 0x1000_0000, TWO_MIB, host_level=2)
    for i in range(8):
        guest.poke(LEAF + 8 * i, 0x1000_0000 + i * PAGE | FULL)
    guest.touch(0, W)
    for flags in (LOG, 0):
        assert "pages_4k" not in guest.count((Op.SLOT_FLAGS, {"address": 1, "value": flags}))
    assert guest.touch(0, W)["pf_taken"] == 1  # an indirect page has no fast path: W comes back by a fault
    assert guest.touch(0, W) == {}


def test_a_shadowed_table_grants_what_all_above_it_grant() -> None:
    """Facts 5.11, 1.1: the role's access is that of all levels: through a read-only PDPTE, neighbours too are read-only."""
    guest = Shadowed()
    guest.touch(0)
    guest.poke(UPPER + 8, DIRECTORY | FULL & ~2)
    assert guest.touch(GIB)[MISS] == 2  # a directory and a leaf table of other access
    assert not guest.spte(GIB + PAGE) & int(NPT_SPTE.W)
    assert guest.fault(GIB + PAGE, W) == 3
    assert guest.touch(PAGE, W) == {}


def test_write_protect_and_smep_are_part_of_the_role(guest: Shadowed) -> None:
    """Facts 5.11: other CR0.WP, other pages; without it also other SMEP. With it SMEP changes nothing of them."""
    smep = int(CR4.PAE | CR4.SMEP)
    guest.touch(0)
    for registers, other in (
        ({**LONG, "cr0": NO_WP}, True),
        ({**LONG, "cr0": NO_WP, "cr4": smep}, True),
        ({**LONG, "cr4": smep}, False),
    ):
        guest.run((Op.REGISTERS, {"value": guest.row(registers, ROOT)}))
        assert (MISS in guest.touch(0)) == other


def test_a_write_without_write_protect_takes_the_page_from_the_user(guest: Shadowed) -> None:
    """Facts 1.8: the supervisor gets W, the user loses the page until it faults; with SMEP the supervisor may not execute it."""
    for smep in (0, int(CR4.SMEP)):
        guest = Shadowed(registers={**LONG, "cr0": NO_WP, "cr4": int(CR4.PAE) | smep})
        guest.poke(LEAF, DATA | FULL & ~2)
        guest.touch(0)
        guest.touch(0, W)
        spte = guest.spte(0)
        assert spte & int(NPT_SPTE.W)
        assert not spte & int(NPT_SPTE.U)
        assert bool(spte & int(NPT_SPTE.NX)) == bool(smep)
        assert guest.touch(0, USER)["pf_fixed"] == 1
        assert guest.spte(0) & int(NPT_SPTE.U)
        assert not guest.spte(0) & int(NPT_SPTE.W)


@pytest.mark.parametrize(
    ("cr4", "rflags", "access", "expected"),
    [(CR4.SMEP, 0, X, 0x11), (CR4.SMEP, 0, R, -1), (CR4.SMAP, 0, R, 1), (CR4.SMAP, 0, W, 3), (CR4.SMAP, RFLAGS.AC, W, -1), (CR4.SMAP, 0, X, -1)],
)
def test_the_supervisor_at_a_page_of_the_user(cr4: int, rflags: int, access: int, expected: int) -> None:
    """Facts 1.4: SMEP and SMAP bind it, by the U of a leaf that is there already; whether the TLB has it or not."""
    guest = Shadowed(registers={**LONG, "cr4": int(CR4.PAE | cr4), "rflags": int(rflags)})
    for user in (W | USER, X | USER):
        guest.touch(0, user)
    assert guest.fault(0, access) == expected
    assert guest.fault(0, access) == expected


def test_a_refused_access_reads_the_entry_again(guest: Shadowed) -> None:
    """Facts 1.9, 9.4: a #PF for want of rights drops what the processor and an unsync page have of the address, as INVLPG does."""
    guest.poke(LEAF, DATA | FULL & ~2)
    guest.touch(0)
    guest.store(LEAF, DATA + 9 * PAGE | FULL & ~2)
    assert guest.goes(0) == DATA
    assert guest.fault(0, W) == 3
    assert guest.goes(0) == DATA + 9 * PAGE


def test_a_huge_page_of_the_guest_changes_its_rights(guest: Shadowed) -> None:
    """Facts 5.8.4: a direct page under it has the access of its leaf; when D is set another one takes its place, after a flush."""
    guest.poke(DIRECTORY + 16, LARGE | FULL & ~D)
    guest.touch(0)
    assert guest.touch(2 * TWO_MIB + 0x8_0000)[MISS] == 1
    changed = guest.touch(2 * TWO_MIB + 0x8_0000, W)
    assert (changed[MISS], changed["remote_tlb_flush_requests"]) == (1, 1)
    assert guest.touch(2 * TWO_MIB + 0x8_1000, W) == {}  # came along


def test_a_page_over_its_own_tables_is_mapped_by_4k() -> None:
    """Linux 6.1, 5.15: a 1 GiB page in which a table of its own lies is mapped by 4 KiB, all of it; another one is not."""
    for bits, level in ((FULL, "pages_4k"), (FULL & ~2, "pages_2m")):  # one that cannot be written does not count
        guest = Shadowed(host_level=2)
        guest.poke(UPPER + 8, LARGE | bits)
        changed = guest.touch(GIB + 2 * TWO_MIB)
        assert level in changed
        assert ("pages_2m" in changed) == (level == "pages_2m")


# --- roots -----------------------------------------------------------------------------------------------------------------


def test_a_root_in_use_that_is_zapped(guest: Shadowed) -> None:
    """Facts 5.14: it lives until the vCPU lets it go, before its next entry; then another one is made. All below it stays."""
    guest.touch(0)
    guest.touch(WINDOW)
    pages = int(guest.machine.vm.word[VmWord.USED_PAGES])
    changed = guest.store(ROOT + 8 * 100 + 4, 0)
    assert (changed["mmu_flooded"], changed["mmu_shadow_zapped"]) == (1, 1)
    assert int(guest.machine.vm.word[VmWord.USED_PAGES]) == pages
    assert guest.touch(0)[MISS] == 1
    assert int(guest.machine.vm.word[VmWord.USED_PAGES]) == pages


def test_three_roots_are_kept(guest: Shadowed) -> None:
    """Facts 9.1: the newest first; a fifth address space lets the oldest go. A kept root is used as it is."""
    roots = [ROOT] + [SPARE + i * PAGE for i in range(4)]
    for root in roots[1:]:
        guest.poke(root, UPPER | FULL)
    for root in roots:
        guest.cr3(root)
        guest.touch(0)
    assert guest.kept() == [roots[3], roots[2], roots[1]]
    changed = guest.cr3(roots[1])
    assert guest.kept() == [roots[4], roots[3], roots[2]]
    assert MISS not in changed
    assert guest.touch(0) == {}


def test_a_root_is_for_one_value_of_cr3(guest: Shadowed) -> None:
    """Facts 9.1.2: a kept root of another CR3, if only in its PCID bits, is not used."""
    guest.touch(0)
    guest.cr3(ROOT | 8)
    assert guest.kept() == [ROOT]
    guest.cr3(OTHER_ROOT)
    assert guest.kept() == [ROOT | 8, ROOT]
    changed = guest.touch(0)
    assert changed["pf_fixed"] == 1  # the root's one entry
    assert MISS not in changed  # all below is shared


def test_a_load_that_does_not_flush_takes_a_kept_root_as_it_is() -> None:
    """Facts 9.2, S21: with PCIDs and bit 63 A -> B -> A: nothing is synced, the MMIO info cache is cleared each time."""
    guest = Shadowed(registers=PCIDS)
    guest.touch(0)
    guest.touch(DEVICE_PAGE)
    assert guest.own(VcpuWord.MMIO) == DEVICE_PAGE
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    guest.cr3(OTHER_ROOT | 1 | NO_FLUSH)  # a new root: it is synced when it is loaded
    assert guest.own(VcpuWord.MMIO) == 0
    guest.touch(DEVICE_PAGE)
    guest.store(LEAF + 8, DATA + 10 * PAGE | FULL)
    assert guest.total("mmu_unsync") == 1
    changed = guest.cr3(ROOT | NO_FLUSH)
    assert guest.own(VcpuWord.MMIO) == 0
    assert not {"mmu_unsync", MISS, "tlb_flush"} & set(changed)
    assert guest.goes(PAGE) == DATA + PAGE
    assert guest.kept() == [OTHER_ROOT | 1]


def test_a_load_that_flushes_frees_the_kept_roots_of_its_pcid() -> None:
    """Facts 9.2: kept roots whose CR3 carries the PCID go, others stay."""
    guest = Shadowed(registers=PCIDS)
    guest.touch(0)
    for cr3 in (OTHER_ROOT | 1, OTHER_ROOT | 2):
        guest.cr3(cr3 | NO_FLUSH)
        guest.touch(0)
    assert guest.kept() == [OTHER_ROOT | 1, ROOT]
    guest.cr3(ROOT | 1)
    assert guest.kept() == [OTHER_ROOT | 2, ROOT]


def test_without_pcids_each_load_syncs_a_kept_root(guest: Shadowed) -> None:
    """Facts 9.2: the kept roots stay, and the one that is used again is brought up to date."""
    guest.touch(0)
    guest.cr3(OTHER_ROOT)
    guest.touch(0)
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    changed = guest.cr3(ROOT)
    assert (changed["mmu_unsync"], guest.kept()) == (-1, [OTHER_ROOT])
    assert guest.goes(0) == DATA + 9 * PAGE


def in_another_space() -> Shadowed:
    """A guest with PCIDs that has gone to an address space with tables of its own, but for the window's, and written to a leaf table
    of the first, which is out of step."""
    guest = Shadowed(registers=PCIDS)
    guest.poke(OTHER_ROOT, SPARE | FULL)
    for i in range(3):
        guest.poke(SPARE + i * PAGE, (SPARE + (i + 1) * PAGE) | FULL if i < 2 else DATA | FULL)
    guest.poke(SPARE + PAGE + 8, WINDOW_LEAF | FULL)
    guest.touch(0)
    guest.cr3(OTHER_ROOT | 1 | NO_FLUSH)
    guest.touch(0)
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    assert guest.kept() == [ROOT]
    return guest


def test_invlpg_reaches_the_kept_roots() -> None:
    """Facts 9.4.3: the address is read again under each of them."""
    guest = in_another_space()
    guest.invlpg(0)
    guest.cr3(ROOT | NO_FLUSH)
    assert guest.total("mmu_unsync") == 1
    assert guest.goes(0) == DATA + 9 * PAGE


def test_a_guest_wide_flush_frees_kept_roots_that_are_out_of_step() -> None:
    """Facts 9.3: which is how they come up to date; those in step stay."""
    guest = in_another_space()
    guest.run((Op.FLUSH, {}), (Op.EXIT, {}))
    assert guest.total("mmu_unsync") == 1
    assert guest.kept() == []
    guest.cr3(ROOT | NO_FLUSH)
    assert guest.total("mmu_unsync") == 0
    assert guest.goes(0) == DATA + 9 * PAGE
    guest.run((Op.FLUSH, {}), (Op.EXIT, {}))
    assert guest.kept() == [OTHER_ROOT | 1]


def test_parameters_of_kept_roots() -> None:
    """`force_flush_and_sync_on_reuse`: a load that does not flush syncs all the same. And roots that are not kept are loaded anew."""
    for option, unsync, flushes in (({}, 1, 0), ({"force_sync_on_reuse": True}, 0, 1), ({"cached_roots": False}, 0, 1)):
        guest = Shadowed(Kvm(tdp=False, tdp_mmu=False, **option), registers=PCIDS)
        guest.touch(0)
        guest.cr3(OTHER_ROOT | 1 | NO_FLUSH)
        guest.touch(0)
        guest.store(LEAF, DATA + 9 * PAGE | FULL)
        changed = guest.cr3(ROOT | NO_FLUSH)
        assert (guest.total("mmu_unsync"), changed.get("tlb_flush", 0)) == (unsync, flushes)
        assert bool(guest.kept()) == ("cached_roots" not in option)


def test_kept_roots_go_with_everything_else(guest: Shadowed) -> None:
    """Facts 5.14: a memslot goes: every shadow page does, roots as soon as the vCPU comes to it."""
    guest.touch(0)
    guest.cr3(OTHER_ROOT)
    guest.slot(1, 0x1000_0000, PAGE)
    guest.run((Op.SLOT_DELETE, {"address": 1}))
    assert guest.kept() == [ROOT]
    guest.run((Op.EXIT, {}))
    assert guest.kept() == []
    assert int(guest.machine.vm.word[VmWord.USED_PAGES]) == 1


def test_what_serving_a_request_asks_for_is_served_too(guest: Shadowed) -> None:
    """`vcpu_enter_guest`: a new root is loaded and synced, which write-protects tables; the flush for that comes before the entry."""
    guest.touch(0)
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    guest.run((Op.MODE, {"value": guest.row(LONG, OTHER_ROOT)}), (Op.EXIT, {}))
    guest.run((Op.MODE, {"value": guest.row(LONG, ROOT)}))
    changed = guest.count((Op.EXIT, {}))
    assert (changed["mmu_unsync"], changed["tlb_flush"]) == (-1, 1)


def test_two_vcpus_share_shadow_pages() -> None:
    """Facts 5.11, 9.5: what one makes, both use; each flushes for what the other unlinks."""
    guest = Shadowed(vcpus=2)
    made = guest.touch(0)[MISS]
    guest.run((Op.VCPU, {"value": 1}))
    assert made == 4
    assert MISS not in guest.touch(0)
    assert guest.goes(0) == DATA
    guest.run((Op.VCPU, {"value": 0}))
    guest.store(LEAF, DATA + 9 * PAGE | FULL)
    guest.invlpg(0)
    guest.run((Op.VCPU, {"value": 1}))
    assert guest.goes(0) == DATA + 9 * PAGE


def test_recycling_counts_what_goes_along(guest: Shadowed) -> None:
    """Facts 5.7, 5.14: an old page takes its unsync children with it: they count, and fewer others go."""
    for i in range(80):
        guest.poke(UPPER + 8 * (i + 1), (SPARE + i * PAGE) | FULL)
        guest.poke(SPARE + i * PAGE, LEAF | FULL)
    guest.run((Op.PAGE_LIMIT, {"value": 64}))
    for i in range(40):
        guest.touch((i + 1) * GIB)
        guest.store(LEAF + 8 * 30, DATA | FULL)
    changed = guest.count(*((Op.ACCESS, {"address": (i + 1) * GIB, "access": R}) for i in range(40, 80)))
    assert changed["mmu_recycled"] == changed["mmu_shadow_zapped"]
    assert int(guest.machine.vm.word[VmWord.USED_PAGES]) <= 64


def test_a_guest_whose_root_is_nowhere_is_shut_down(guest: Shadowed) -> None:
    """Facts 9: `mmu_check_root`."""
    guest.run((Op.CR3, {"value": DEVICE}))
    with pytest.raises(MachineError, match="outside every memslot"):
        guest.touch(0)


# --- devices ---------------------------------------------------------------------------------------------------------------


def test_a_device_page_that_the_guest_moves(guest: Shadowed) -> None:
    """Facts 4.6, S10: the old device answers until INVLPG; the new one has an MMIO spte of its own."""
    first = guest.touch(DEVICE_PAGE)
    assert (first["pf_mmio_spte_created"], first["mmio_exits"]) == (1, 1)
    guest.store(LEAF + 8 * 64, DEVICE + PAGE | FULL)
    for flushed, gpa in ((False, DEVICE), (True, DEVICE + PAGE)):
        if flushed:
            guest.invlpg(DEVICE_PAGE)
        log = guest.run((Op.LOAD, {"address": DEVICE_PAGE, "access": R, "size": 8}))
        assert [int(row["address"]) for row in log if row["kind"] == LogKind.MMIO_READ] == [gpa]


def test_a_device_page_becomes_an_upper_table(guest: Shadowed) -> None:
    """Facts 4.5, 5.3: the write is emulated, as one to the device was; the MMIO info cache, which INVLPG cleared, is asked first."""
    guest.touch(DEVICE_PAGE, W)
    guest.store(LEAF + 8 * 64, DIRECTORY | FULL)
    guest.invlpg(DEVICE_PAGE)
    assert guest.own(VcpuWord.MMIO) == 0
    write = {"address": DEVICE_PAGE + 8 * 100, "access": W, "size": 8, "value": SPARE | FULL}
    changed = guest.count((Op.WRITE, write))
    assert (changed["pf_emulate"], changed["mmu_pte_write"]) == (1, 1)
    assert "mmio_exits" not in changed
    assert guest.word(DIRECTORY + 8 * 100) == SPARE | FULL


def test_a_device_page_becomes_memory(guest: Shadowed) -> None:
    """Facts 5.12.4: at the sync the MMIO spte of another gfn is cleared, without a flush."""
    guest.touch(DEVICE_PAGE)
    guest.store(LEAF + 8 * 64, DATA | FULL)
    guest.cr3(ROOT)
    assert guest.goes(DEVICE_PAGE) == DATA
    assert guest.own(VcpuWord.MMIO) == 0


def test_an_exchange_with_a_device_reads_first(guest: Shadowed) -> None:
    """Facts 4.3: one instruction, read then written; what user space supplies is compared."""
    log = guest.run(
        (Op.EXCHANGE, {"address": DEVICE_PAGE, "access": W, "size": 8, "value": 5}), (Op.OPERAND, {"value": 0})
    )  # user space supplies 0
    rows = [(row["kind"], int(row["value"])) for row in log if row["kind"] in (LogKind.MMIO_READ, LogKind.MMIO_WRITE)]
    assert rows == [(LogKind.MMIO_READ, 0), (LogKind.MMIO_WRITE, 5)]
    assert guest.total("insn_emulation") == 1


def test_an_exchange_in_an_upper_table(guest: Shadowed) -> None:
    """Facts 5.13: emulated too, and memory is what it compares with."""
    guest.touch(0)
    for compared, left in ((1, LEAF | FULL), (LEAF | FULL, SPARE | FULL)):
        exchange = (Op.EXCHANGE, {"address": WINDOW + DIRECTORY, "access": W, "size": 8, "value": SPARE | FULL})
        changed = guest.count(exchange, (Op.OPERAND, {"value": compared}))
        assert (changed["mmu_pte_write"], changed["mmu_pde_zapped"]) == (1, 1)
        assert guest.word(DIRECTORY) == left


# --- entries of 4 bytes, PAE -----------------------------------------------------------------------------------------------


class TwoLevel(Shadowed):
    """A guest with entries of 4 bytes: gva 0 to 4 MiB by one leaf table, the window behind it."""

    def __init__(self) -> None:
        super().__init__(registers={"cr0": LONG["cr0"], "cr4": 0, "efer": 0, "maxphyaddr": 40})

    def build(self) -> None:
        halves = self.machine.memory.words.view(np.uint32)
        halves[ROOT // 4] = LEAF | FULL
        halves[ROOT // 4 + 1] = WINDOW_LEAF | FULL
        for i in range(1024):
            halves[LEAF // 4 + i] = (DATA + i * PAGE) % (4 * TWO_MIB) | FULL
            halves[WINDOW_LEAF // 4 + i] = i * PAGE | FULL

    def store(self, gpa: int, value: int, size: int = 4) -> dict[str, int]:
        return self.count((Op.WRITE, {"address": 2 * TWO_MIB + gpa, "access": W, "size": size, "value": value}))


def test_a_table_of_4_byte_entries_has_two_shadow_pages() -> None:
    """Facts 5.11.1: four roots for the directory, two pages for a leaf table, each for its half."""
    guest = TwoLevel()
    assert guest.touch(0)[MISS] == 5  # four quarters of the directory, and half a table
    assert guest.touch(TWO_MIB)[MISS] == 1
    assert guest.goes(3 * PAGE) == DATA + 3 * PAGE
    assert guest.goes(TWO_MIB + 3 * PAGE) == DATA + TWO_MIB + 3 * PAGE
    assert guest.store(LEAF, 9 * PAGE | FULL)["mmu_unsync"] == 2
    guest.invlpg(0)
    assert guest.goes(0) == 9 * PAGE
    assert guest.goes(TWO_MIB) == DATA + TWO_MIB
    guest.store(LEAF + 4 * 513, 9 * PAGE | FULL)
    assert guest.cr3(ROOT)["mmu_unsync"] == -2
    for gva, gpa in ((0, 9 * PAGE), (PAGE, DATA + PAGE), (TWO_MIB, DATA + TWO_MIB), (TWO_MIB + PAGE, 9 * PAGE)):
        assert guest.goes(gva) == gpa
    for entry, value in ((2, DATA + PAGE | FULL), (3, 0), (1, 9 * PAGE | FULL)):
        guest.store(LEAF + 4 * entry, value)
    guest.cr3(ROOT)
    assert guest.goes(PAGE) == 9 * PAGE  # though entries 2 and 3, as one of 8 bytes, say what entry 1 has said


def test_a_write_to_a_directory_of_4_byte_entries() -> None:
    """Facts 5.13.3, S24: two entries go, in the page of that quarter only."""
    guest = TwoLevel()
    guest.touch(0)
    guest.touch(TWO_MIB)
    changed = guest.store(ROOT, SPARE | FULL)
    assert (changed["mmu_pte_write"], changed["mmu_pde_zapped"]) == (1, 2)
    assert guest.fault(0) == 0
    assert guest.fault(TWO_MIB) == 0
    guest.store(ROOT + 4 * 256, LEAF | FULL)  # the next quarter: 1 GiB
    assert guest.goes(GIB + PAGE) == DATA + PAGE
    guest.store(ROOT + 4 * 256, 0)
    assert guest.fault(GIB + PAGE) == 0


def test_pdptes_are_read_when_cr3_is_loaded() -> None:
    """Facts 1.7, 9.1: four roots by the PDPTEs; a change of one shows at the next load, of the same value too."""
    registers = {"cr0": LONG["cr0"], "cr4": int(CR4.PAE), "efer": int(EFER.NX), "maxphyaddr": 40}
    guest = Shadowed(registers=LONG)
    for root, pdpte in ((SPARE, DIRECTORY), (SPARE + 32, SPARE + PAGE)):
        guest.poke(root, pdpte | 1)
    guest.poke(SPARE + PAGE, WINDOW_LEAF | FULL)
    guest.poke(SPARE + PAGE + 8, WINDOW_LEAF | FULL)
    guest.run((Op.MODE, {"value": guest.row(registers, SPARE)}))
    assert guest.goes(PAGE) == DATA + PAGE
    assert guest.fault(GIB) == 0
    guest.store(SPARE + 8, DIRECTORY | 1)
    assert guest.fault(GIB) == 0
    guest.cr3(SPARE)
    assert guest.goes(GIB + PAGE) == DATA + PAGE
    guest.cr3(SPARE + 32)
    assert guest.goes(PAGE) == PAGE
    guest.store(SPARE + 32 + 16, DIRECTORY | 1 | 1 << 45)  # a reserved bit: #GP, and nothing changes
    log = guest.run((Op.CR3, {"value": SPARE + 32}))
    assert [int(row["value"]) for row in log if row["kind"] == LogKind.GENERAL_PROTECTION] == [0]
    assert guest.goes(PAGE, X) == PAGE
