"""Random streams on every kind of machine, judged event by event; and what a machine refuses to run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from shadow_standin import StandIn
from sizes import sized
from stream_guests import KEYS, KINDS, Guest
from stream_plans import Plan
from streams import plan, run

from fastmmu.bits import CR0, CR4, EFER, GPTE64, PFERR
from fastmmu.events import EVENT, EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.machine import Machine, NotBuilt, Run
from fastmmu.machine_state import LogKind, SlotFlag, VmWord
from fastmmu.paging import Cpu

WRITE, USER, FETCH, PK = int(PFERR.W), int(PFERR.U), int(PFERR.F), int(PFERR.PK)
P, W, U, A, D = (int(getattr(GPTE64, name)) for name in ("P", "W", "U", "A", "D"))
STREAMS, EVENTS = sized(2, 1), sized(2000, 200)
STAND_IN_STREAMS, MOST_STREAMS = 4, 8
OFF = Cpu(cr0=int(CR0.PE), cr3=0, cr4=0, efer=0)
PAGING = Cpu(
    cr0=int(CR0.PE | CR0.PG | CR0.WP), cr3=0x1000, cr4=int(CR4.PAE | CR4.PKE), efer=int(EFER.LME | EFER.LMA | EFER.NX), pkru=0b1000
)  # key 1: writes denied
MEMORY = 1 << 24
DEVICE = 0x80_0000  # of the small machines below: no memslot from here on
FAR_DEVICE = 0x1000_0000  # of those that remember one
SHADOW = Kvm(tdp=False, tdp_mmu=False)


# --- random streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_random_streams(name: str, seed: int) -> None:
    wanted = {"device accesses", "STORE", "pf_taken"} | ({"faults"} if KINDS[name].levels else set())
    totals: Counter[str] = Counter()
    for number in range(MOST_STREAMS):  # a short one may lack something
        totals += run(plan(name, (seed + number) % 2**32, EVENTS))
        if number + 1 >= STREAMS and wanted <= set(totals):
            return
    raise AssertionError(f"{MOST_STREAMS} streams without {wanted - set(totals)}")


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("shadow-2", 2579287338),
        ("shadow-4-initially", 2579287338),
        ("shadow-4-tlb", 257945165),
        ("shadow-4-tlb", 1185880937),
        ("shadow-pae-1g-nx", 1185880900),
        ("shadow-pae", 1185880894),
    ],
)
def test_remembered_devices(name: str, seed: int) -> None:
    """Streams that the judge has got wrong: a device remembered on one page of two; an exchange that reads one, and stores what it saw
    elsewhere, or there, where memory is now, or that has no right
    to it and reads elsewhere; one that is remembered where the tables deny the write."""
    run(plan(name, seed, EVENTS))


def remembered(entry: int, then: int, access: int, gva: int, *, late: bool) -> Plan:
    """The kernel loads from the device that `entry` maps at 0x1000; `then` is stored there, and an exchange follows. With `late` the
    device becomes memory, and a sync makes its MMIO spte current all the same (facts 5.12.4)."""
    words = {0x1000: 0x2000 | P | W | U | A, 0x2000: 0x3000 | P | W | U | A, 0x3000: 0x4000 | P | W | U | A}
    words |= {0x4008: entry, 0x4010: 0x20_1000 | P | A, 0x4200: 0x4000 | P | W | A | D}
    slots = [{"slot": i, "gpa": gpa, "size": 0x20_0000, "flags": 0} for i, gpa in enumerate((0, 0x20_0000, FAR_DEVICE))]
    events = EventList().add(Op.SLOT_CREATE).add(Op.SLOT_CREATE, value=1).add(Op.LOAD, address=0x1000, size=8)
    if late:  # the table goes out of step, and is synced
        events.add(Op.SLOT_CREATE, value=2).add(Op.WRITE, access=WRITE, address=0x4_0F00, size=8).cr3(0x1000)
        events.add(Op.LOAD, address=0x1000, size=8)
    events.store(0x4008, then).add(Op.EXCHANGE, access=access, address=gva, size=8).add(Op.OPERAND)
    cpu = Cpu(cr0=PAGING.cr0, cr3=0x1000, cr4=int(CR4.PAE), efer=PAGING.efer)
    return Plan("shadow-4", KINDS["shadow-4"], 0, Guest(words), [cpu], slots, events.array())


@pytest.mark.parametrize("late", [False, True], ids=["no memslot", "a memslot since"])
def test_an_exchange_by_the_mmio_spte_of_a_page_that_was_the_kernels(late: bool) -> None:
    """Facts 4.3.4, 4.4: nobody walks before the emulator, which reads both pages first: the user may read the first one, which is
    memory now, and not the second one."""
    stream = remembered(FAR_DEVICE | P | A, 0x20_0000 | P | U | A, WRITE | USER, 0x1FFC, late=late)
    assert rows(stream.machine().run(stream.events))[-1] == (LogKind.PAGE_FAULT, 0x2000, P | WRITE | USER)
    assert run(stream)["faults"] == 1


def test_an_exchange_with_a_remembered_device_that_the_tables_deny() -> None:
    """Facts 4.3.1: no memory is found by a walk to exchange with; then the MMIO info cache is asked, as for any store."""
    stream = remembered(FAR_DEVICE | P | W | A | D, FAR_DEVICE | P | A, WRITE, 0x1000, late=True)
    log = rows(stream.machine().run(stream.events))
    assert [kind for kind, *_ in log[-4:]] == [LogKind.MMIO_READ, LogKind.MMIO_WRITE, LogKind.LOADED, LogKind.ACCESSED]
    assert run(stream)["faults"] == 0


def test_streams_are_repeatable() -> None:
    first, second = plan("npt", 5, 500), plan("npt", 5, 500)
    assert (first.events == second.events).all() and first.guest == second.guest
    assert run(first) == run(second)


def test_streams_are_judged_alike_in_any_pieces() -> None:
    stream = plan("ept-pml", 6, sized(600, 100))
    counts = [run(stream, step=step) for step in (1, 7, 100)]
    for name in ("faults", "device accesses", "pf_taken", "tlb_hits", "pages that had to be dirty"):
        assert len({one[name] for one in counts}) == 1


STAND_INS = ("shadow-4", "shadow-5", "shadow-pae", "shadow-2", "shadow-4-pcid", "shadow-modes")
RIGHT = {
    "no cache": {},
    "a TLB": {"tlb": True},
    "a TLB, and stores page by page": {"tlb": True, "pagewise": True},
}
WRONG = {
    "INVLPG": {"tlb": True, "forgets": "CR3 FLUSH MODE"},
    "flushes": {"tlb": True, "forgets": "CR3 INVLPG MODE"},
    "CR3": {"tlb": True, "forgets": "INVLPG FLUSH MODE"},
    "registers": {"tlb": True, "forgets": "CR3 INVLPG FLUSH"},
    "PCIDs": {"tlb": True, "pcids": False},
    "old faults": {"tlb": True, "faults": True},
    "A and D": {"accessed": False},
}


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("how", RIGHT)
def test_the_judge_accepts_what_is_right(name: str, how: str, seed: int) -> None:
    totals: Counter[str] = Counter()
    for number in range(STAND_IN_STREAMS):
        stream = plan(name, (seed + number) % 2**32, 2000)
        totals += run(stream, step=100, machine=StandIn(stream, **RIGHT[how]))
    assert totals["faults"] and totals["device accesses"] and totals["bytes of tables written"]
    assert bool(totals["answered by older tables"]) == ("tlb" in RIGHT[how])


@pytest.mark.parametrize("what", WRONG)
def test_the_judge_refuses_what_ignores(what: str) -> None:
    refused = 0
    for number in range(6):
        stream = plan("shadow-4-pcid", number, 2000)
        try:
            run(stream, step=100, machine=StandIn(stream, **WRONG[what]))
        except AssertionError:
            refused += 1
    assert refused


def test_streams_of_shadow_paging_use_it_all() -> None:
    """Each thing that the kinds are for happens in their first streams."""
    totals: Counter[str] = Counter()
    for number in range(20):  # bad PDPTEs are rare
        for name in STAND_INS if number < 3 else ("shadow-pae",):
            stream = plan(name, number, 2000)
            totals += run(stream, step=100, machine=StandIn(stream, tlb=True, pagewise=True))
    for what in (
        "answered by older tables",
        "general protection",
        "stored to the first page, then faulted",
        "pages that had to be dirty",
    ):
        assert totals[what], what


@pytest.mark.parametrize("flushes", [1, 2, 4093, 4094, 4095, 4096, 4097, 8190])
def test_no_number_of_flushes_brings_a_translation_back(flushes: int) -> None:
    machine = small(0x10_0000 | P | W | U | A | D)
    machine.run(EventList().access(0, USER).store(0x4000, 0x20_0000 | P | W | U | A | D).array())
    events = np.concatenate([EventList().flush().array().repeat(flushes), EventList().access(0, USER).array()])
    assert rows(machine.run(events)) == [(LogKind.ACCESSED, 0, 0x20_0000)]


def test_invlpg_forgets_all_pieces_of_a_large_page() -> None:
    machine = small()
    machine.memory.words[0x3000 >> 3] = 0x20_0000 | int(GPTE64.PS) | P | W | U | A | D
    store = EventList().access(0x5000, USER).store(0x3000, 0x40_0000 | int(GPTE64.PS) | P | W | U | A | D)
    assert rows(machine.run(store.access(0x5000, USER).array()))[-1] == (LogKind.ACCESSED, 0x5000, 0x20_5000)  # not flushed yet
    assert rows(machine.run(EventList().invlpg(0x1F_F000).access(0x5000, USER).array())) == [(LogKind.ACCESSED, 0x5000, 0x40_5000)]


@pytest.mark.long
@pytest.mark.parametrize("legacy", [False, True], ids=["tdp-mmu", "legacy"])
def test_a_thousand_streams(legacy: bool, seed: int) -> None:
    names = [name for name, kind in KINDS.items() if kind.legacy == legacy]
    totals: Counter[str] = Counter()
    for number in range(1000):
        totals += run(plan(names[number % len(names)], (seed + number) % 2**32, 2000))
    print("\n" + ("legacy and shadow" if legacy else "TDP MMU") + f", seed {seed}")
    for name, count in sorted(totals.items()):
        print(f"  {name}: {count}")
    assert totals["streams"] == 1000 and totals["answered from the TLB, tables changed"]
    assert totals["mmu_recycled"] or not legacy


# --- what such streams found: one small machine each -----------------------------------------------------------------------


def small(*leaves: int, kvm: Kvm | None = None, cpu: Cpu = PAGING, flags: int = 0) -> Machine:
    """A 4-level guest whose pages 0, 1, ... have these leaf entries; memory up to DEVICE."""
    machine = Machine(kvm or Kvm(), cpu, memory=MEMORY, tables=64)
    for level in range(3):
        machine.memory.words[0x1000 * (level + 1) >> 3] = 0x1000 * (level + 2) | P | W | U | A
    machine.memory.words[0x4000 >> 3 : (0x4000 >> 3) + len(leaves)] = leaves
    machine.configure(log_accesses=True)
    row = machine.prepare_slot(0, 0, DEVICE, flags)
    machine.run(EventList().add(Op.SLOT_CREATE, value=row).array())
    return machine


def rows(outcome: Run) -> list[tuple[LogKind, int, int]]:
    return [(LogKind(kind), address, value) for kind, _, _, address, value in outcome.log.tolist()]


@pytest.mark.parametrize("first", [0, FETCH], ids=["read then write", "fetch then write"])
def test_protection_keys_bind_accesses_that_the_tlb_serves(first: int) -> None:
    machine = small(0x10_0000 | 1 << 59 | P | W | U | A | D)
    machine.run(EventList().access(0, first | USER).array())
    assert rows(machine.run(EventList().access(8, WRITE | USER).array())) == [(LogKind.PAGE_FAULT, 8, P | WRITE | USER | PK)]


def test_random_streams_with_protection_keys() -> None:
    for number in range(5):
        run(plan("keys", number, EVENTS, KEYS))


@pytest.mark.parametrize("op, access", [(Op.LOAD, 0), (Op.WRITE, WRITE)], ids=["load", "write"])
def test_a_device_sees_nothing_of_an_access_whose_second_page_faults(op: Op, access: int) -> None:
    machine = small(DEVICE | P | W | U | A | D, 0)
    outcome = machine.run(EventList().add(op, access=access | USER, address=0xFFC, size=8).array())
    assert rows(outcome) == [(LogKind.PAGE_FAULT, 0x1000, access | USER)]


def test_an_emulated_exchange_faults_as_a_write() -> None:
    machine = small(DEVICE | P | W | U | A | D, 0)
    events = EventList().add(Op.EXCHANGE, access=WRITE | USER, address=0xFFC, size=8).add(Op.OPERAND)
    assert rows(machine.run(events.array()))[-1] == (LogKind.PAGE_FAULT, 0x1000, WRITE | USER)


def test_accessed_bits_that_the_emulator_sets_are_in_the_dirty_log() -> None:
    machine = small(flags=int(SlotFlag.LOG_DIRTY_PAGES))
    words = machine.memory.words
    words[0x3008 >> 3] = 0x5000 | P | W | U | A  # the second page has its own table, which the processor does not come to
    words[0x4FF8 >> 3], words[0x5000 >> 3] = DEVICE | P | W | U | A | D, 0x10_0000 | P | W | U | D
    machine.run(EventList().add(Op.LOAD, access=USER, address=0x1F_FFFC, size=8).add(Op.DIRTY_GET).array())
    assert int(words[0x5000 >> 3]) & A
    assert machine.report(0)[5]


# --- what is refused -------------------------------------------------------------------------------------------------------


def checked(events: EventList, *, kvm: Kvm | None = None, cpu: Cpu = PAGING) -> None:
    small(0, kvm=kvm, cpu=cpu).check(events.array())


ACCEPTED = EventList().access(0, 0)
REFUSED = {
    "an operation that is none": (EventList().add(len(Op)), "event 1, event: op"),
    "memslot generations": (EventList().generation(4), "event 1, GENERATION: op"),
    "an access bit that is none": (EventList().access(0, 1), "event 1, ACCESS: access 0x1"),
    "a reserved-bit access": (EventList().device(0, 8), "event 1, DEVICE: access 0x8"),
    "a fetch that writes": (EventList().access(0, WRITE | FETCH), "event 1, ACCESS: access 0x12"),
    "a load that writes": (EventList().add(Op.LOAD, access=WRITE, size=8), "event 1, LOAD: access 0x2"),
    "a load that fetches": (EventList().add(Op.LOAD, access=FETCH, size=8), "event 1, LOAD: access 0x10"),
    "a write that reads": (EventList().add(Op.WRITE, access=USER, size=8), "event 1, WRITE: access 0x4"),
    "an exchange that reads": (EventList().add(Op.EXCHANGE, size=8).add(Op.OPERAND), "event 1, EXCHANGE: access 0x0"),
    "a load of no bytes": (EventList().add(Op.LOAD), "event 1, LOAD: size 0x0"),
    "a load of nine bytes": (EventList().add(Op.LOAD, size=9), "event 1, LOAD: size 0x9"),
    "a write of 255 bytes": (EventList().add(Op.WRITE, access=WRITE, size=255), "event 1, WRITE: size 0xff"),
    "an exchange at the end": (EventList().add(Op.EXCHANGE, access=WRITE, size=8), "event 1, EXCHANGE: op"),
    "an exchange without operand": (EventList().add(Op.EXCHANGE, access=WRITE, size=8).flush(), "event 1, EXCHANGE: op"),
    "a gva beyond 47 bits": (EventList().access(1 << 47, 0), "event 1, ACCESS: address 0x800000000000"),
    "a gva with one high bit": (EventList().add(Op.LOAD, address=1 << 63, size=1), "event 1, LOAD: address"),
    "an INVLPG of such": (EventList().invlpg(1 << 56), "event 1, INVLPG: address 0x1"),
    "a store between entries": (EventList().store(0x1004, 0), "event 1, STORE: address 0x1004"),
    "a store beyond all memory": (EventList().store(1 << 52, 0), "event 1, STORE: address 0x1"),
    "a CR3 too wide": (EventList().cr3(1 << 46), "event 1, CR3: value 0x4"),
    "a vCPU too many": (EventList().add(Op.VCPU, value=1), "event 1, VCPU: value 0x1"),
    "a row of registers too many": (EventList().add(Op.MODE, value=1), "event 1, MODE: value 0x1"),
    "the same by the guest": (EventList().add(Op.REGISTERS, value=2**64 - 1), "event 1, REGISTERS: value"),
    "another parameter": (EventList().add(Op.PARAMETER, address=VmWord.EPT, value=1), "event 1, PARAMETER: address 0x2"),
    "a parameter that is neither": (
        EventList().add(Op.PARAMETER, address=VmWord.NX_HUGE_PAGES, value=2),
        "event 1, PARAMETER: address",
    ),
    "a limit that is too low": (EventList().add(Op.PAGE_LIMIT, value=63), "event 1, PAGE_LIMIT: value 0x3f"),
    "an empty range": (EventList().add(Op.UNMAP, address=0x1000, value=0x1000), "event 1, UNMAP: address"),
    "a range of part of a page": (EventList().add(Op.UNMAP, address=0x1000, value=0x1800), "event 1, UNMAP: address"),
    "a range backwards": (EventList().add(Op.UNMAP, address=0x3000, value=0x1000), "event 1, UNMAP: address"),
    "a slot that is not prepared": (EventList().add(Op.SLOT_CREATE, value=7), "event 1, SLOT_CREATE: value 0x7"),
    "a slot twice": (EventList().add(Op.SLOT_CREATE, value=0), "event 1, SLOT_CREATE: value 0x0"),
    "deleting what is not there": (EventList().add(Op.SLOT_DELETE, address=3), "event 1, SLOT_DELETE: address 0x3"),
    "deleting it twice": (EventList().add(Op.SLOT_DELETE).add(Op.SLOT_DELETE), "event 2, SLOT_DELETE: address 0x0"),
    "flags of what is not there": (EventList().add(Op.SLOT_FLAGS, address=9, value=1), "event 1, SLOT_FLAGS: address 0x9"),
    "making it read-only": (EventList().add(Op.SLOT_FLAGS, value=int(SlotFlag.READONLY)), "event 1, SLOT_FLAGS: value 0x2"),
    "flags that are none": (EventList().add(Op.SLOT_FLAGS, value=4), "event 1, SLOT_FLAGS: value 0x4"),
    "a log that is off": (EventList().add(Op.DIRTY_GET), "event 1, DIRTY_GET: address 0x0"),
    "clearing a log that is off": (EventList().add(Op.DIRTY_CLEAR), "event 1, DIRTY_CLEAR: address 0x0"),
    "a log that went off": (
        EventList().add(Op.SLOT_FLAGS, value=1).add(Op.DIRTY_GET).add(Op.SLOT_FLAGS).add(Op.DIRTY_GET),
        "event 4, DIRTY_GET: address 0x0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_events(name: str) -> None:
    bad, message = REFUSED[name]
    events = np.concatenate([ACCEPTED.array(), bad.array()])
    machine = small(0)
    before = machine.counters(), dict(machine.slots)
    with pytest.raises(ValueError, match=message):
        machine.run(events)
    assert (machine.counters(), dict(machine.slots)) == before


def test_accepted_events() -> None:
    small(0).check(ACCEPTED.array())
    wide = EventList().add(Op.EXCHANGE, access=WRITE, address=2**64 - 8, size=8).add(Op.OPERAND).cr3((1 << 46) - 0x1000)
    checked(wide)


def test_addresses_of_57_bits_need_a_guest_that_has_them() -> None:
    five = Cpu(cr0=PAGING.cr0, cr3=0, cr4=PAGING.cr4 | int(CR4.LA57), efer=PAGING.efer)
    checked(EventList().access(1 << 55, 0), cpu=five)
    with pytest.raises(ValueError, match="event 0, ACCESS: address"):
        checked(EventList().access(1 << 56, 0), cpu=five)


def test_overlapping_slots() -> None:
    machine = small(0)
    clash = machine.prepare_slot(1, DEVICE - 0x1000, 0x2000)
    beside = machine.prepare_slot(2, DEVICE, 0x2000)
    with pytest.raises(ValueError, match="event 0, SLOT_CREATE: value 0x1, expected a free id and range"):
        machine.check(EventList().add(Op.SLOT_CREATE, value=clash).array())
    with pytest.raises(ValueError, match="event 1, SLOT_CREATE: value 0x1"):
        machine.check(EventList().add(Op.SLOT_CREATE, value=beside).add(Op.SLOT_CREATE, value=clash).array())
    machine.run(EventList().add(Op.SLOT_DELETE).add(Op.SLOT_CREATE, value=clash).array())


def test_not_events() -> None:
    machine = small(0)
    for bad in ([], np.zeros(3), np.zeros((2, 2), EVENT), None):
        with pytest.raises(ValueError, match="expected EVENT rows"):
            machine.check(bad)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"slot": 510}, "slot: 510"),
        ({"slot": -1}, "slot: -1"),
        ({"gpa": 0x800}, "expected multiples of 4096"),
        ({"gpa": MEMORY}, "size"),
        ({"gpa": -0x1000}, "gpa"),
        ({"size": 0}, "size"),
        ({"size": MEMORY + 0x1000}, "size"),
        ({"size": 0x1800}, "expected multiples of 4096"),
        ({"flags": 4}, "flags"),
        ({"host_level": 0}, "host_level"),
        ({"host_level": 4}, "host_level"),
        ({"hva_offset": 1}, "expected multiples of 4096"),
        ({"hva_offset": 1 << 60}, "hva_offset"),
        ({"size": "4096"}, "size"),
    ],
)
def test_refused_slots(arguments: dict, message: str) -> None:
    machine = Machine(Kvm(), OFF, memory=MEMORY, tables=16)
    with pytest.raises(ValueError, match=message):
        machine.prepare_slot(**({"slot": 1, "gpa": 0, "size": 0x1000} | arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vcpus": 0}, "vcpus"),
        ({"vcpus": 1025}, "vcpus"),
        ({"tables": 15}, "tables"),
        ({"memory": 0x1800}, "size of guest memory"),
        ({"memory": 0}, "size of guest memory"),
    ],
)
def test_refused_machines(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Machine(Kvm(), OFF, **({"memory": MEMORY, "tables": 16} | arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tdp": False}, "tdp_mmu"),
        ({"tdp": False, "tdp_mmu": False, "ept": True}, "ept"),
        ({"ad": False}, "ad"),
        ({"tdp": False, "tdp_mmu": False, "pml": True}, "pml"),
        ({"ept": True, "ad": False, "pml": True}, "pml"),
        ({"initially_set": True}, "initially_set"),
        ({"host_maxphyaddr": 52}, "host_maxphyaddr"),
        ({"host_maxphyaddr": 35}, "host_maxphyaddr"),
        ({"generation": -1}, "generation"),
        ({"generation": 1 << 63}, "generation"),
        ({"tlb": (3, 4)}, "tlb: 3 sets"),
        ({"tlb": (0, 4)}, "tlb"),
        ({"tlb": (4, 0)}, "tlb"),
        ({"tlb": (4, 65)}, "tlb"),
        ({"tlb": 4}, "tlb"),
        ({"tlb": [4, 4]}, "tlb"),
        ({"mmio_info": 2}, "mmio_info"),
        ({"ept": "yes"}, "ept"),
    ],
)
def test_refused_kvms(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kvm(**arguments)


def test_refused_registers() -> None:
    machine = Machine(Kvm(), OFF, memory=MEMORY, tables=16)
    for changes, message in (({"maxphyaddr": 40}, "maxphyaddr: 40, expected 46"), ({"cr3": 1 << 46}, "cr3: 0x4")):
        with pytest.raises(ValueError, match=message):
            machine.registers(Cpu(**({"cr0": 1, "cr3": 0, "cr4": 0, "efer": 0} | changes)))
    with pytest.raises(NotBuilt, match="PAE"):
        machine.registers(Cpu(cr0=PAGING.cr0, cr3=0, cr4=PAGING.cr4, efer=0))
    with pytest.raises(ValueError, match="no protection keys under shadow paging"):
        small(0, kvm=SHADOW)


@pytest.mark.parametrize("kvm, bits", [(Kvm(), 48), (Kvm(tdp_mmu=False), 48), (SHADOW, 48)], ids=["npt", "legacy", "shadow"])
def test_a_store_beyond_what_the_root_reaches_is_refused(kvm: Kvm, bits: int) -> None:
    machine = small(0, kvm=kvm, cpu=OFF)
    with pytest.raises(ValueError, match="event 0, STORE"):
        machine.check(EventList().store((1 << bits) + 0x1000, 7).array())
