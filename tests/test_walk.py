"""The walk against the reference: random machines, and the rules one by one."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from machines import ACCESSES, random_cpu, random_gva, random_machine
from sizes import sized

import fastmmu.walk
from fastmmu import Cpu, GuestMemory
from fastmmu._jit import JIT, fetch_and, fetch_or, kernel
from fastmmu.bits import ACC, GPTE64, ONE, PFERR
from fastmmu.paging import Mode, permission_bytes
from fastmmu.processor import make_state
from fastmmu.reference.walk import Memory, Walker
from fastmmu.state import Reg
from fastmmu.walk import walk_gva

P, W, U, A, D, PS, NX = (int(getattr(GPTE64, name)) for name in ("P", "W", "U", "A", "D", "PS", "NX"))
WRITE, USER, FETCH = int(PFERR.W), int(PFERR.U), int(PFERR.F)
LONG = {"cr0": 0x8001_0001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
GVA = 0x0000_7F12_3456_7ABC


def answer(walk: object) -> tuple[bool, int, int, int, int]:
    """A walk as plain ints; rights count only where the walk succeeded."""
    return bool(walk.ok), int(walk.gpa), int(walk.level), int(walk.access) if walk.ok else 0, int(walk.pferr)


@pytest.mark.parametrize("part", range(4))
def test_random_machines_agree_with_the_reference(seed: int, part: int) -> None:
    rng = np.random.default_rng([seed, part])
    kinds: dict[str, int] = {}
    for number in range(sized(60, 4)):
        machine = random_machine(rng)
        walker = Walker(machine.reference, machine.cpu)
        for _ in range(sized(400, 100)):
            gva, access = random_gva(rng, machine.cpu.mode), int(rng.choice(ACCESSES))
            state = machine.state
            ours = answer(walk_gva(state.mem, state.mmu, state.trail, np.uint64(gva), np.uint64(access)))
            theirs = walker.walk(machine.cpu.cr3, gva, access)
            assert ours == answer(theirs), f"machine {number}: gva {gva:#x}, access {access:#x}, {machine.cpu}"
            kind = f"level {ours[2]}" if ours[0] else f"fault {ours[4] & ~0x16:#x}"
            kinds[kind] = kinds.get(kind, 0) + 1
        assert not machine.differences(), f"machine {number}, {machine.cpu}"
    if JIT:  # the sample is not one-sided: every outcome occurs
        assert set(kinds) == {"level 1", "level 2", "level 3", "fault 0x0", "fault 0x1", "fault 0x9", "fault 0x21"}, kinds


def test_permission_bytes_are_the_references(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(sized(300, 50)):
        cpu = random_cpu(rng)
        walker = Walker(Memory([]), cpu)
        table = permission_bytes(cpu)
        for access in ACCESSES:
            smap_off = walker.alignment_check and not access & int(PFERR.IMPLICIT)
            kind = (access & 0x16 | (8 if smap_off else 0)) >> 1
            for page in range(8):
                bits = (page & int(ACC.U), page & int(ACC.W), page & int(ACC.X))
                assert bool(table[kind] >> page & 1) == walker.denied(*(bool(bit) for bit in bits), access)


class Mapped:
    """One 4-level mapping of GVA whose entries a test can spoil: `entry[level]` is the word index of each."""

    def __init__(self, flags: dict[int, int] | None = None, **registers: int) -> None:
        self.memory = GuestMemory(1 << 20)
        self.cpu = Cpu(**{**LONG, **registers})
        self.state = make_state(self.memory, self.cpu)
        self.entry: dict[int, int] = {}
        table = 0x1000
        for level in (4, 3, 2, 1):
            self.entry[level] = (table + 8 * (GVA >> (3 + 9 * level) & 511)) // 8
            table = 0x5000 if level == 1 else table + 0x1000
            self.memory.words[self.entry[level]] = table | (flags or {}).get(level, P | W | U)

    def walk(self, access: int) -> tuple[bool, int, int, int, int]:
        state = self.state
        return answer(walk_gva(state.mem, state.mmu, state.trail, np.uint64(GVA), np.uint64(access)))

    def bits(self, mask: int) -> dict[int, bool]:
        return {level: bool(int(self.memory.words[word]) & mask) for level, word in self.entry.items()}


def test_a_is_set_on_every_level_and_d_in_the_leaf_of_a_write() -> None:
    mapped = Mapped()
    assert mapped.walk(USER)[0]
    assert mapped.bits(A) == {4: True, 3: True, 2: True, 1: True}
    assert not any(mapped.bits(D).values())
    assert mapped.walk(USER | WRITE)[0]
    assert mapped.bits(D) == {4: False, 3: False, 2: False, 1: True}


def test_a_failing_walk_sets_no_bit() -> None:
    """Facts 13, S1, and the permission failure of the patch of 2007."""
    not_present = Mapped({4: P | U, 1: 0})
    assert not_present.walk(WRITE | USER) == (False, 0, 1, 0, WRITE | USER)
    assert not any(not_present.bits(A).values())
    denied = Mapped({2: P | U})
    assert denied.walk(WRITE | USER) == (False, 0, 1, 0, 1 | WRITE | USER)
    assert not any(denied.bits(A).values())


def test_write_protect_decides_a_supervisor_write() -> None:
    """Facts 13, S2."""
    flags = {2: P | U}
    assert Mapped(flags).walk(WRITE) == (False, 0, 1, 0, 1 | WRITE)
    relaxed = Mapped(flags, cr0=0x8000_0001)
    assert relaxed.walk(WRITE)[0]
    assert relaxed.bits(D)[1]


def test_reserved_beats_permission_and_not_present_beats_both() -> None:
    """Facts 13, S3."""
    assert Mapped({1: P | W | 1 << 47}).walk(USER)[4] == 1 | 8 | USER
    assert Mapped({2: P, 1: 1 << 47}).walk(USER)[4] == USER


def test_fetch_is_reported_only_with_nx_or_smep() -> None:
    """Facts 13, S4."""
    flags = {1: 0}
    assert Mapped(flags, efer=0x500).walk(FETCH)[4] == 0
    assert Mapped(flags).walk(FETCH)[4] == FETCH
    assert Mapped(flags, efer=0x500, cr4=0x10_0020).walk(FETCH)[4] == FETCH


def test_a_read_of_a_clean_page_grants_no_write() -> None:
    """Facts 13, S5."""
    mapped = Mapped()
    assert not mapped.walk(USER)[3] & int(ACC.W)
    assert mapped.walk(USER | WRITE)[3] & int(ACC.W)
    assert mapped.walk(USER)[3] & int(ACC.W)


@pytest.mark.parametrize("accessed", [0, A | D], ids=["first", "plain"])
@pytest.mark.parametrize(
    ("rights", "access", "write_protect", "denied"),
    [
        (0b01, USER, True, True),  # AD: no data access
        (0b01, 0, True, True),
        (0b01, FETCH, True, False),  # fetches are exempt
        (0b10, USER, True, False),  # WD: reads pass
        (0b10, USER | WRITE, True, True),
        (0b10, USER | WRITE, False, True),  # user writes whatever CR0.WP is
        (0b10, WRITE, True, True),
        (0b10, WRITE, False, False),  # supervisor writes only under CR0.WP
    ],
)
@pytest.mark.parametrize("key", [0, 5])
def test_protection_keys(key: int, rights: int, access: int, write_protect: bool, denied: bool, accessed: int) -> None:
    """Facts 1.4.5: for user pages by PKRU, for supervisor pages by PKRS."""
    cr0 = 0x8001_0001 if write_protect else 0x8000_0001
    flags = {level: P | W | U | accessed for level in (4, 3, 2)}
    for user, registers in ((U, {"pkru": rights << 2 * key}), (0, {"pkrs": rights << 2 * key})):
        if not user and access & USER:
            continue
        leaf = {**flags, 1: P | W | user | accessed | key << 59}
        mapped = Mapped(leaf, cr0=cr0, cr4=0x140_0020, **registers)
        code = 0x21 | access & ~FETCH | (FETCH if access & FETCH else 0)
        assert mapped.walk(access)[0] != denied and mapped.walk(access)[4] == (code if denied else 0)
        assert Mapped(leaf, cr0=cr0, cr4=0x20, **registers).walk(access)[0], "without CR4.PKE and CR4.PKS nothing is denied"
        others = {"pkru": registers.get("pkrs", 0), "pkrs": registers.get("pkru", 0)}
        assert Mapped(leaf, cr0=cr0, cr4=0x140_0020, **others).walk(access)[0], "the other register rules other pages"


@pytest.mark.parametrize("accessed", [0, A], ids=["first", "plain"])
def test_features_decide_what_is_reserved(accessed: int) -> None:
    """Facts 1.3: 1 GiB pages only where CPUID has them; bit 8 of PML4 entries on AMD alone; NX only with EFER.NX."""
    flags = {level: P | W | U | accessed for level in (4, 3, 2, 1)}
    large = {**flags, 3: P | W | U | PS | accessed}
    for bits, expected in ((0, True), (1 << 12, True), (1 << 13, False), (1 << 29, False)):
        mapped = Mapped({**large, 3: large[3] | bits})
        mapped.memory.words[mapped.entry[3]] = 1 << 30 | bits | large[3]
        assert mapped.walk(USER)[0] == expected
        assert not expected or mapped.walk(USER)[1:3] == (1 << 30 | GVA & (1 << 30) - 1, 3)
        mapped.state = make_state(mapped.memory, Cpu(**LONG, page_1g=False))
        assert mapped.walk(USER) == (False, 0, 3, 0, 1 | 8 | USER)
    for amd in (False, True):
        mapped = Mapped({**flags, 4: flags[4] | 1 << 8})
        mapped.state = make_state(mapped.memory, Cpu(**LONG, amd=amd))
        assert mapped.walk(USER)[4] == (1 | 8 | USER if amd else 0)
        lower = Mapped({level: bits | (1 << 8 if level < 4 else 0) for level, bits in flags.items()})
        lower.state = make_state(lower.memory, Cpu(**LONG, amd=amd))
        assert lower.walk(USER)[0]
    for efer, code in ((0xD00, 0), (0x500, 1 | 8 | USER)):
        assert Mapped({**flags, 2: flags[2] | NX}, efer=efer).walk(USER)[4] == code


def test_tables_in_rom_keep_their_bits() -> None:
    mapped = Mapped()
    mapped.memory.slots = [(0, 0x4000, "ram"), (0x4000, 0x5000, "rom"), (0x5000, 1 << 20, "ram")]
    mapped.state = make_state(mapped.memory, mapped.cpu)
    assert mapped.walk(USER | WRITE)[0]
    assert mapped.bits(A) == {4: True, 3: True, 2: True, 1: False}


@pytest.mark.parametrize("target", [0x10_0000, 0x3000, 0xF_FFFF_FFFF_F000], ids=["device", "hole", "beyond the end"])
def test_nothing_outside_a_slot_is_read(target: int) -> None:
    mapped = Mapped(maxphyaddr=52)
    mapped.memory.slots = [(0, 0x3000, "ram"), (0x4000, 1 << 20, "ram"), (0x10_0000, 0x10_1000, "device")]
    mapped.state = make_state(mapped.memory, mapped.cpu)
    mapped.memory.words[mapped.entry[3]] = target | P | W | U
    assert mapped.walk(USER) == (False, 0, 2, 0, USER)


@pytest.mark.skipif(JIT, reason="replaces cmpxchg, which compiled code has inlined")
def test_a_changed_entry_restarts_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts 13, S6: one mismatch at any level costs one more walk, the end is the same."""
    honest = fastmmu.walk.cmpxchg
    for level in (4, 3, 2, 1):
        mapped = Mapped()
        calls = []

        def meddling(words, index, expected, desired, level=level, mapped=mapped, calls=calls):
            calls.append(int(index))
            if int(index) == mapped.entry[level] and calls.count(int(index)) == 1:
                words[index] = words[index] | np.uint64(1 << 52)  # an ignored bit: another value, the same meaning
            return honest(words, index, expected, desired)

        monkeypatch.setattr(fastmmu.walk, "cmpxchg", meddling)
        assert mapped.walk(USER | WRITE)[0]
        assert len(calls) == 5, "the levels above are done, the changed one is tried again"
        assert all(mapped.bits(A).values()) and mapped.bits(D)[1]
        assert mapped.bits(1 << 52) == {other: other == level for other in (4, 3, 2, 1)}


@kernel
def walk_again(mem, mmu, trail, gva, access, times, stop, torn, first, second):
    """Walk `times` times; counts answers that neither mapping gives."""
    for _ in range(times):
        walk = walk_gva(mem, mmu, trail, gva, access)
        if walk.ok and walk.gpa != first and walk.gpa != second:
            torn[0] += ONE
    stop[0] = ONE


@kernel
def rewrite(words, index, one, other, stop):
    """Store two entries in turn until told to stop."""
    while stop[0] == np.uint64(0):
        words[index] = one
        words[index] = other


@pytest.mark.skipif(not JIT, reason="needs threads without the GIL")
def test_a_walk_under_a_writer_is_never_torn() -> None:
    mapped = Mapped()
    leaf = mapped.entry[1]
    one, other = np.uint64(0x5000 | P | W | U), np.uint64(0xA_BCDE_F000 | P | W | U)
    offset = GVA & 0xFFF
    stop, torn = np.zeros(1, np.uint64), np.zeros(1, np.uint64)
    rewrite(mapped.memory.words, leaf, one, other, np.ones(1, np.uint64))  # compile
    writer = threading.Thread(target=rewrite, args=(mapped.memory.words, leaf, one, other, stop))
    writer.start()
    state = mapped.state
    walk_again(
        state.mem, state.mmu, state.trail, np.uint64(GVA), np.uint64(USER), 300_000, stop, torn,
        np.uint64(0x5000 | offset), np.uint64(0xA_BCDE_F000 | offset),
    )  # fmt: skip
    writer.join()
    assert torn[0] == 0


@kernel
def walk_many_times(mem, mmu, trail, gva, access, times):
    """Walk again and again."""
    for _ in range(times):
        walk_gva(mem, mmu, trail, gva, access)


@kernel
def clear_and_count(words, index, bit, times, cleared):
    """Clear a bit atomically, again and again; counts how often it was set, as an operating system counts referenced pages."""
    for _ in range(times):
        if fetch_and(words, index, ~bit) & bit != np.uint64(0):
            cleared[0] += ONE


@kernel
def set_software_bit(words, index, bit, times):
    """Toggle a bit that the walk ignores, atomically."""
    for _ in range(times):
        fetch_or(words, index, bit)
        fetch_and(words, index, ~bit)


@pytest.mark.skipif(not JIT, reason="needs threads without the GIL")
def test_no_accessed_bit_is_lost_and_no_other_store_undone() -> None:
    """Two walkers against one thread that clears A and one that toggles a software bit in the same entry."""
    mapped = Mapped()
    leaf, times, software = mapped.entry[1], 200_000, np.uint64(1 << 9)
    state = mapped.state
    cleared = np.zeros(1, np.uint64)
    arguments = [
        (walk_many_times, (state.mem, state.mmu, np.zeros(6, np.uint64), np.uint64(GVA), np.uint64(USER | WRITE), times)),
        (walk_many_times, (state.mem, state.mmu, np.zeros(6, np.uint64), np.uint64(GVA), np.uint64(USER), times)),
        (clear_and_count, (mapped.memory.words, leaf, np.uint64(A), times, cleared)),
        (set_software_bit, (mapped.memory.words, leaf, software, times)),
    ]
    threads = [threading.Thread(target=function, args=given) for function, given in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entry = int(mapped.memory.words[leaf])
    assert entry & ~(A | D) == 0x5000 | P | W | U, "the software bit ends clear, everything else as it was"
    assert entry & D, "no walk after the write's clears D"
    assert mapped.walk(USER)[0] and mapped.bits(A)[1]
    assert cleared[0] > 0


def test_registers_that_are_not_supported_are_refused() -> None:
    for bad in ({"cr4": 0}, {"maxphyaddr": 35}, {"maxphyaddr": 53}, {"cr3": -1}, {"cr3": 1 << 64}, {"cr4": "x"}):
        with pytest.raises(ValueError, match="expected"):
            Cpu(**{**LONG, **bad})
    assert Cpu(**LONG).mode == Mode.LONG4
    assert int(make_state(GuestMemory(4096), Cpu(**{**LONG, "cr4": 0x1020})).mmu.reg[Reg.MODE]) == Mode.LONG5
