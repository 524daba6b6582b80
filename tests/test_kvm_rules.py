"""Rules of KVM's direct maps, one by one, by the facts (section in each test), on machines built by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fastmmu.audit import audit
from fastmmu.audit_rules import lookup
from fastmmu.audit_state import State
from fastmmu.bits import CR0, CR4, EFER, EPT_SPTE, MMIO_SPTE, NPT_SPTE
from fastmmu.events import EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine, MachineError
from fastmmu.machine_state import Counter, LogKind, Stop, VcpuWord, VmWord
from fastmmu.paging import Cpu
from fastmmu.translate import FETCH, USER, WRITE

R, W, X = 0, WRITE, FETCH
PAGE, TWO_MIB, GIB = 1 << 12, 1 << 21, 1 << 30
LOG, READONLY = 1, 2
FLAT = Cpu(cr0=int(CR0.PE), cr3=0, cr4=0, efer=0, maxphyaddr=40)
LONG = {"cr0": int(CR0.PE | CR0.PG | CR0.WP), "cr4": int(CR4.PAE), "efer": int(EFER.LME | EFER.LMA | EFER.NX), "maxphyaddr": 40}
MMUS = {"tdp": Kvm(), "legacy": Kvm(tdp_mmu=False), "shadow": Kvm(tdp=False, tdp_mmu=False), "ept": Kvm(ept=True)}
MEMORY = 4 * TWO_MIB
DEVICE = 0xD000_0000


class Guest:
    """A machine whose guest does not page: gva is gpa. Slot 0 covers the first 8 MiB."""

    def __init__(
        self, kvm: Kvm, *, host_level: int = 1, flags: int = 0, vcpus: int = 1, size: int = MEMORY, hva_offset: int = 0
    ) -> None:
        self.machine = Machine(kvm, FLAT, memory=GIB * 4, vcpus=vcpus)
        self.machine.configure(log_faults=True)
        self.slot(0, 0, size, flags, host_level=host_level, hva_offset=hva_offset)

    def run(self, *events: tuple[Op, dict]) -> np.ndarray:
        stream = EventList()
        for op, columns in events:
            stream.add(op, **columns)
        log = self.machine.run(stream.array()).log
        audit(self.machine)
        return log

    def slot(self, identity: int, gpa: int, size: int, flags: int = 0, **more: int) -> None:
        row = self.machine.prepare_slot(identity, gpa, size, flags, **more)
        self.run((Op.SLOT_CREATE, {"value": row}))

    def touch(self, gpa: int, access: int = R) -> dict[str, int]:
        """One access; the counters that changed."""
        return self.count((Op.ACCESS, {"address": gpa, "access": access}))

    def count(self, *events: tuple[Op, dict]) -> dict[str, int]:
        before = self.machine.counters()
        self.run(*events)
        after = self.machine.counters()
        ours = {"tlb_hits", "tlb_misses", "exits_no_irq"} | {one.name.lower() for one in Counter if one >= Counter.FAST_FIXED}
        return {name: after[name] - before[name] for name in after if after[name] != before[name] and name not in ours}

    def log(self, on: bool) -> dict[str, int]:
        return self.count((Op.SLOT_FLAGS, {"address": 0, "value": LOG if on else 0}))

    def dirty(self) -> list[int]:
        self.run((Op.DIRTY_GET, {"address": 0}))
        return np.flatnonzero(self.machine.report(0)).tolist()

    def spte(self, gpa: int) -> int:
        """The lowest entry for `gpa`."""
        return lookup(State(self.machine), 0, gpa >> 12)[0]


@pytest.fixture(params=MMUS)
def guest(request: pytest.FixtureRequest) -> Guest:
    return Guest(MMUS[request.param])


def test_a_first_touch_maps_one_page_or_eight(guest: Guest) -> None:
    """Facts 5.4; truth README section 6: the TDP MMU prefetches nothing, shadow pages take the aligned eight."""
    mapped = 1 if guest.machine.kvm.tdp_mmu else 8
    changed = guest.touch(0x5000, W)
    assert (changed["pf_taken"], changed["pf_fixed"], changed["pages_4k"]) == (1, 1, mapped)
    assert "pf_taken" not in guest.touch(0x5000, W)
    assert ("pf_taken" in guest.touch(0x6000, W)) == (mapped == 1)


def test_prefetch_stops_at_the_first_run_it_cannot_take() -> None:
    """Truth README section 6: from the lowest up; a run that has no memslot, or crosses its end, ends it."""
    guest = Guest(MMUS["legacy"], size=5 * PAGE)
    assert guest.touch(0x2000)["pages_4k"] == 3  # 0 and 1, then 3 to 7 cross the end
    other = Guest(MMUS["legacy"], size=3 * PAGE)
    other.slot(1, 0x4000, 4 * PAGE)
    assert other.touch(0x6000)["pages_4k"] == 1  # 0 to 5 begin in a memslot and leave it: nothing above is tried


def test_huge_pages_and_what_refuses_them() -> None:
    """Facts 5.9."""
    for name in ("tdp", "legacy", "shadow", "ept"):
        assert Guest(MMUS[name], host_level=2).touch(0x5000)["pages_2m"] == 1
        assert "pages_2m" not in Guest(MMUS[name], host_level=1).touch(0x5000)
        assert "pages_2m" not in Guest(MMUS[name], host_level=2, flags=LOG).touch(0x5000)
        assert "pages_2m" not in Guest(MMUS[name], host_level=2, hva_offset=PAGE).touch(0x5000)
        ragged = Guest(MMUS[name], host_level=2, size=TWO_MIB + PAGE)
        assert ragged.touch(0x5000)["pages_2m"] == 1
        assert "pages_2m" not in ragged.touch(TWO_MIB)
    assert Guest(MMUS["tdp"], host_level=3, size=GIB).touch(0x5000)["pages_1g"] == 1
    assert Guest(Kvm(page_1g=False), host_level=3, size=GIB).touch(0x5000)["pages_2m"] == 1
    assert Guest(MMUS["shadow"], host_level=3, size=GIB).touch(0x5000)["pages_2m"] == 1  # PAE tables end there


def test_nx_huge_pages() -> None:
    """Facts 3.5, 5.9.5: a fetch puts a table in place of the huge page, and later faults do not bring the huge page back."""
    for name in ("tdp", "legacy"):
        guest = Guest(Kvm(tdp_mmu=name == "tdp", nx_huge_pages=True), host_level=2)
        assert guest.touch(0x5000, W)["pages_2m"] == 1
        changed = guest.touch(0x5000, X)
        assert (changed["pages_2m"], changed["nx_lpage_splits"], changed["remote_tlb_flush_requests"]) == (-1, 1, 1)
        assert guest.touch(0x9000, R).get("pages_2m", 0) == 0
        assert guest.count((Op.PARAMETER, {"address": VmWord.NX_HUGE_PAGES, "value": 0}))["nx_lpage_splits"] == -1


def test_a_read_only_memslot(guest: Guest) -> None:
    """Facts 4.7, 5.5: reads map it without any right to write, a write is emulated, and nothing about it is remembered."""
    guest.slot(1, 0x1000_0000, 4 * PAGE, READONLY)
    assert guest.touch(0x1000_0000)["pages_4k"] == 1  # prefetch refuses read-only memslots
    for _ in range(2):
        changed = guest.touch(0x1000_0010, W)
        assert changed == {"pf_taken": 1, "pf_emulate": 1, "insn_emulation": 1, "mmio_exits": 1}
    assert guest.touch(0x1000_0010, R) == {}


def test_a_device_page_is_remembered(guest: Guest) -> None:
    """Facts 4.4: the first access makes an MMIO spte and counts; the next ones count nothing but the exit."""
    first = guest.touch(DEVICE, W)
    assert (first["pf_taken"], first["pf_emulate"], first["pf_mmio_spte_created"]) == (1, 1, 1)
    for access in (R, W):
        assert guest.touch(DEVICE + 8, access) == {"insn_emulation": 1, "mmio_exits": 1}


def test_without_mmio_sptes_each_access_takes_the_slow_path() -> None:
    """Facts 4.7."""
    guest = Guest(Kvm(mmio_caching=False))
    for _ in range(3):
        assert guest.touch(DEVICE) == {"pf_taken": 1, "pf_emulate": 1, "insn_emulation": 1, "mmio_exits": 1}


def test_any_memslot_change_makes_mmio_sptes_stale_once(guest: Guest) -> None:
    """Facts 3.4.7; truth README section 6."""
    guest.touch(DEVICE)
    guest.slot(3, 0x2000_0000, PAGE)
    assert guest.touch(DEVICE)["pf_mmio_spte_created"] == 1
    assert "pf_mmio_spte_created" not in guest.touch(DEVICE)


def test_a_memslot_over_a_device_page(guest: Guest) -> None:
    """The stale MMIO spte gives way to memory, and back."""
    guest.touch(DEVICE)
    guest.slot(3, DEVICE, PAGE)
    assert guest.touch(DEVICE, W)["pf_fixed"] == 1
    guest.run((Op.SLOT_DELETE, {"address": 3}))
    assert guest.touch(DEVICE)["mmio_exits"] == 1


@pytest.mark.parametrize("name", MMUS)
def test_the_generation_wraps(name: str) -> None:
    """Facts 3.4.6: 19 bits; when they come to zero, everything is zapped."""
    start = int(MMIO_SPTE.GENERATION) - 3
    guest = Guest(Kvm(**{**MMUS[name].__dict__, "generation": start - start % 2}))  # the first memslot takes two of four steps
    guest.touch(0x5000)
    guest.touch(DEVICE)
    assert guest.machine.counters()["pages_4k"] > 0
    guest.slot(3, 0x2000_0000, PAGE)
    assert int(guest.machine.vm.word[VmWord.GENERATION]) & int(MMIO_SPTE.GENERATION) == 0
    assert guest.machine.counters()["pages_4k"] == 0
    assert guest.touch(DEVICE)["pf_mmio_spte_created"] == 1


def test_the_generation_has_its_place_in_the_spte() -> None:
    """Facts 3.4.3: bits 7:0 at 10:3, bits 18:8 at 62:52."""
    guest = Guest(Kvm(generation=0x2A5A4))
    guest.touch(DEVICE)
    generation = 0x2A5A4 + 2
    expected = int(NPT_SPTE.MMIO) | 6 | (generation & 0xFF) << 3 | (generation >> 8) << 52 | DEVICE
    assert guest.spte(DEVICE) == expected


def test_frame_zero_never_hits_the_info_cache() -> None:
    """Facts 4.2: gfn 0 is no gfn; its MMIO spte answers."""
    machine = Guest(Kvm())
    machine.run((Op.SLOT_DELETE, {"address": 0}))
    machine.touch(0x10)
    assert int(machine.machine.state.own[0, VcpuWord.MMIO + 1]) == 0
    assert machine.touch(0x10) == {"insn_emulation": 1, "mmio_exits": 1}


def test_write_protection_keeps_mmu_writable_and_the_fast_path_lifts_it(guest: Guest) -> None:
    """Facts 6 and 7.1: logging takes W alone; a write gets it back without the lock, and is logged."""
    guest.touch(0x5000, W)
    assert guest.log(on=True)["remote_tlb_flush_requests"] == 1
    mmu_writable = int(guest.machine.vm.word[VmWord.MMU_WRITABLE])
    spte = guest.spte(0x5000)
    assert not spte & int(NPT_SPTE.W)
    assert spte & mmu_writable
    changed = guest.touch(0x5000, W)
    assert (changed["pf_fast"], changed["pf_fixed"], changed["tlb_flush"]) == (1, 1, 1)
    assert guest.dirty() == [5]
    assert guest.dirty() == []


def test_reads_under_logging_do_not_dirty_what_is_mapped(guest: Guest) -> None:
    """Truth README section 6: a read that maps a page writable marks it dirty; one that finds it mapped does not."""
    guest.touch(0x5000, W)
    guest.log(on=True)
    guest.touch(0x5000, R)
    assert guest.dirty() == []
    guest.touch(0x10_0000, R)
    assert guest.dirty() == [0x100]


def test_logging_splits_huge_pages_and_they_come_back() -> None:
    """Facts 7.1.3, 7.4 as 6.1 does it: eager in the TDP MMU; else by the first write, page by page."""
    for kvm, after_log_on in ((Kvm(), 512), (Kvm(eager_page_split=False), 0), (Kvm(tdp_mmu=False), 0)):
        guest = Guest(kvm, host_level=2)
        guest.touch(0x5000, W)
        guest.log(on=True)
        assert guest.machine.counters()["pages_4k"] == after_log_on
        changed = guest.touch(0x5000, W)
        assert changed.get("pages_2m", 0) == (0 if after_log_on else -1)
        guest.log(on=False)
        assert guest.machine.counters()["pages_4k"] == 0
        assert guest.touch(0x5000, W)["pages_2m"] == 1


def test_initially_all_set() -> None:
    """Facts 7.1.1, 7.3: log-on protects nothing; CLEAR protects huge pages for good (MMU_WRITABLE goes) and what it clears."""
    guest = Guest(Kvm(manual_protect=True, initially_set=True, eager_page_split=False), host_level=2)
    guest.touch(0x5000, W)
    assert guest.log(on=True) == {}
    assert guest.dirty() == list(range(MEMORY // PAGE))
    guest.machine.set_report(0, np.arange(64))
    guest.run((Op.DIRTY_CLEAR, {"address": 0}))
    spte = guest.spte(0x5000)
    assert not spte & int(NPT_SPTE.W | NPT_SPTE.MMU_WRITABLE)
    changed = guest.touch(0x5000, W)
    assert "pf_fast" not in changed
    assert changed["pages_2m"] == -1
    guest.run((Op.DIRTY_GET, {"address": 0}))
    assert np.flatnonzero(~guest.machine.report(0)).tolist() == [page for page in range(64) if page != 5]


def test_page_modification_logging() -> None:
    """Facts 7: a write to a clean page costs no fault, and is in the log; the buffer of 512 overflows into an exit."""
    guest = Guest(Kvm(ept=True, pml=True), host_level=1)
    for page in range(600):
        guest.touch(page * PAGE, W)
    guest.log(on=True)
    changed = guest.count(*((Op.ACCESS, {"address": page * PAGE, "access": W}) for page in range(600)))
    assert "pf_taken" not in changed
    assert changed["pml_full"] == 1
    assert guest.dirty() == list(range(600))
    guest.touch(7 * PAGE, W)
    assert guest.dirty() == [7]


def test_ept_sptes() -> None:
    """Facts 3.1, 2.2: the bits of EPT, and a misconfiguration that tells nothing of the access."""
    guest = Guest(Kvm(ept=True))
    guest.touch(0x5000, W)
    spte = guest.spte(0x5000)
    wanted = EPT_SPTE.R | EPT_SPTE.W | EPT_SPTE.X | EPT_SPTE.WRITE_BACK | EPT_SPTE.A | EPT_SPTE.D | EPT_SPTE.HOST_WRITABLE
    wanted |= EPT_SPTE.MMU_WRITABLE | EPT_SPTE.MMU_PRESENT | EPT_SPTE.SUPPRESS_VE
    assert spte == int(wanted) | 0x5000
    guest.touch(DEVICE, W)
    log = guest.run((Op.ACCESS, {"address": DEVICE, "access": W}))
    assert [(row["address"], row["value"]) for row in log if row["kind"] == LogKind.EXIT] == [(DEVICE, 8)]


def test_an_unmap_flushes_and_refaults(guest: Guest) -> None:
    """Facts 9.5: whatever maps any page of the range goes, and the TLB with it."""
    guest.touch(0x5000, W)
    mapped = guest.machine.counters()["pages_4k"]
    changed = guest.count((Op.UNMAP, {"address": 0x5000, "value": 0x6000}))
    assert changed == {"pages_4k": -1, "remote_tlb_flush_requests": 1}
    assert guest.touch(0x5000, W)["tlb_flush"] == 1
    assert guest.machine.counters()["pages_4k"] == mapped
    assert guest.count((Op.UNMAP, {"address": 0x30_0000, "value": 0x30_1000})) == {}


def test_shadow_pages_are_recycled_oldest_first() -> None:
    """Facts 5.7: fewer than 5 free: zap the oldest until 25 are; roots in use stay. The TDP MMU has no limit."""
    for name, recycled in (("legacy", True), ("tdp", False)):
        guest = Guest(MMUS[name], size=GIB)
        guest.run((Op.PAGE_LIMIT, {"value": 64}))
        changed = guest.count(*((Op.ACCESS, {"address": i * TWO_MIB, "access": W}) for i in range(80)))
        assert ("mmu_recycled" in changed) == recycled
        assert int(guest.machine.vm.word[VmWord.USED_PAGES]) <= 64
        if recycled:
            assert "pf_taken" in guest.touch(0, W)  # its table was the oldest
            assert changed["mmu_recycled"] == changed["mmu_shadow_zapped"]


def test_the_limit_follows_the_memslots_until_it_is_set() -> None:
    """Truth README section 6."""
    guest = Guest(MMUS["legacy"], size=GIB)
    assert int(guest.machine.vm.word[VmWord.MAX_PAGES]) == GIB // PAGE // 50
    guest.run((Op.PAGE_LIMIT, {"value": 100}))
    guest.slot(1, 2 * GIB, GIB)
    assert int(guest.machine.vm.word[VmWord.MAX_PAGES]) == 100


def test_a_flush_reaches_every_vcpu(guest: Guest) -> None:
    """Facts 9.5: a remote flush is served by each vCPU before it enters again, once however many were asked for."""
    two = Guest(guest.machine.kvm, vcpus=2)
    for vcpu in (0, 1):
        two.run((Op.VCPU, {"value": vcpu}), (Op.ACCESS, {"address": 0x5000, "access": W}))
    two.log(on=True)
    two.log(on=False)
    two.log(on=True)
    for vcpu in (0, 1):
        changed = two.count((Op.VCPU, {"value": vcpu}), (Op.ACCESS, {"address": 0x5000, "access": R}))
        assert changed == {"tlb_flush": 1}


def test_roots_are_shared_and_outlive_register_changes(guest: Guest) -> None:
    """Truth C: a change of CR0 by KVM_SET_SREGS unloads the root, but what it maps stays."""
    guest.touch(0x5000, W)
    row = guest.machine.registers(Cpu(cr0=int(CR0.PE | CR0.WP), cr3=0, cr4=0, efer=0, maxphyaddr=40))
    guest.run((Op.MODE, {"value": row}))
    assert guest.touch(0x5000, W) == {}


def long_guest(kvm: Kvm) -> Guest:
    """A guest that pages, with one table of each level at 0x1000 to 0x4000 and a page at gva 0, gpa 0x9000."""
    guest = Guest(kvm)
    words = guest.machine.memory.words
    for level in range(3):
        words[(0x1000 * (level + 1)) // 8] = 0x1000 * (level + 2) | 7
    words[0x4000 // 8] = 0x9000 | 7
    guest.run((Op.MODE, {"value": guest.machine.registers(Cpu(cr3=0x1000, **LONG))}))
    return guest


def test_a_walk_touches_each_table_as_a_write() -> None:
    """Truth README section 4, rule 8: error codes 0x200000006 for each table, 0x100000004 for the final address."""
    guest = long_guest(Kvm(tlb_flushed_on_exit=True))
    log = guest.run((Op.ACCESS, {"address": 0x123, "access": R}))
    faults = [(int(row["address"]), int(row["value"])) for row in log if row["kind"] == LogKind.EXIT]
    table = 0x2_0000_0006
    assert faults == [(0x1000, table), (0x2000, table), (0x3000, table), (0x4000, table), (0x9123, 0x1_0000_0004)]
    assert [int(guest.machine.memory.words[gpa // 8]) & 0x20 for gpa in (0x1000, 0x2000, 0x3000, 0x4000)] == [0x20] * 4


def test_accessed_bits_dirty_the_tables_pages() -> None:
    """The processor's own writes to guest tables are writes: logged like any other."""
    guest = long_guest(Kvm())
    guest.touch(0)
    guest.log(on=True)
    guest.run((Op.CR3, {"value": 0x1000}))
    guest.touch(0)
    assert guest.dirty() == [1, 2, 3, 4]
    guest.run((Op.CR3, {"value": 0x1000}))
    guest.touch(0, W)
    assert guest.dirty() == [1, 2, 3, 4, 9]


def test_tables_in_read_only_memory_are_an_endless_fault() -> None:
    """Facts 5.3.3: mapped for reading, then written by the walk: KVM neither emulates nor maps it; the guest hangs."""
    guest = long_guest(Kvm())
    guest.slot(1, 0x1000_0000, PAGE, READONLY)
    guest.machine.memory.words[0x1000_0000 // 8] = 0x9000 | 7
    guest.machine.memory.words[0x3000 // 8] = 0x1000_0000 | 7
    guest.machine.memory.words[0x4008 // 8] = 0x1000_0000 | 7
    guest.machine.memory.words[0x3008 // 8] = 0x4000 | 7
    guest.run((Op.ACCESS, {"address": TWO_MIB + PAGE, "access": R}))  # maps the read-only page
    with pytest.raises(MachineError, match="faults for ever"):
        guest.touch(0)


def test_a_stale_translation_lives_until_it_is_flushed() -> None:
    """SDM volume 3, 4.10.4: the TLB answers until INVLPG or CR3."""
    for flush in ((Op.INVLPG, {"address": 0}), (Op.CR3, {"value": 0x1000}), (Op.FLUSH, {})):
        guest = long_guest(Kvm())
        guest.machine.configure(log_accesses=True)
        guest.touch(0)
        guest.run((Op.STORE, {"address": 0x4000, "value": 0xA000 | 7}))
        log = guest.run((Op.ACCESS, {"address": 8}), flush, (Op.ACCESS, {"address": 8}))
        assert [int(row["value"]) for row in log if row["kind"] == LogKind.ACCESSED] == [0x9008, 0xA008]


def test_a_guest_fault_is_delivered_without_an_exit() -> None:
    """With two-dimensional paging KVM does not see it (truth README section 5: pf_guest counts npt=0 only)."""
    guest = long_guest(Kvm())
    guest.touch(0)
    log = guest.run((Op.ACCESS, {"address": 0x5000, "access": W | USER}))
    assert [(int(row["address"]), int(row["value"])) for row in log if row["kind"] == LogKind.PAGE_FAULT] == [(0x5000, 6)]
    assert guest.machine.counters()["pf_guest"] == 0


def test_an_access_over_a_page_boundary_into_a_device() -> None:
    """Truth README section 4: two records, one exit; each page is looked up on its own."""
    guest = Guest(Kvm())
    guest.slot(1, DEVICE - PAGE, PAGE)
    log = guest.run((Op.WRITE, {"address": DEVICE - 4, "access": W, "size": 8, "value": 0x1122334455667788}))
    assert [tuple(row)[1:] for row in log.tolist() if row[0] == LogKind.MMIO_WRITE] == [(4, 0, DEVICE, 0x11223344)]
    assert int(guest.machine.memory.words[DEVICE // 8 - 1]) == 0x5566778800000000
    assert guest.machine.counters()["mmio_exits"] == 1


def test_what_kvm_gives_up_on() -> None:
    """An instruction in a device cannot be emulated; a guest whose top table lies outside memory is shut down."""
    with pytest.raises(MachineError, match="fetched from a device"):
        Guest(Kvm()).touch(DEVICE, X)
    guest = Guest(MMUS["shadow"])
    guest.run((Op.MODE, {"value": guest.machine.registers(Cpu(cr3=DEVICE, **LONG))}))
    with pytest.raises(MachineError, match="outside every memslot"):
        guest.touch(0)


def test_a_pool_that_is_too_small_says_so() -> None:
    machine = Machine(Kvm(), FLAT, memory=GIB, tables=16)
    row = machine.prepare_slot(0, 0, GIB)
    stream = EventList().add(Op.SLOT_CREATE, value=row)
    for i in range(20):
        stream.add(Op.ACCESS, address=i * TWO_MIB)
    with pytest.raises(MachineError, match="expected a larger `tables`"):
        machine.run(stream.array())


def test_stops_are_told() -> None:
    """A recorded address that differs ends the replay, and says where."""
    guest = Guest(Kvm())
    events = EventList().add(Op.ACCESS, address=0x5000).add(Op.ACCESS, address=0x6000).array()
    events["checked"], events["value"] = 1, (0x5000, 0x7000)
    run = guest.machine.run(events)
    assert (run.stopped, run.stop, run.address) == (1, Stop.DIFFERS, 0x6000)
    assert guest.machine.counters()["pf_taken"] == 2
    assert len(Counter) == len(guest.machine.counters())
