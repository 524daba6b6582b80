"""Two-dimensional walks: against the composed one-dimensional references on random tables, and the rules one by one."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from machines import ACCESSES, chance, random_cpu, random_gva
from sizes import sized

import fastmmu
from fastmmu import Cpu, Ept, EptCaps, GuestMemory, Npt, OutsideMemory, translate_nested, translate_nested_many
from fastmmu._jit import JIT
from fastmmu.bits import ACC, CR4, EPT, GPTE64, PFERR
from fastmmu.events import EVENT
from fastmmu.nested import walk_nested
from fastmmu.nested_caches import clear_pages, clear_structures, make_nested_caches
from fastmmu.nested_plain import walk_nested_gva, walk_nested_stream
from fastmmu.paging import Mode
from fastmmu.processor import mmu_of
from fastmmu.reference.ept import Caps, EptWalker, Outside
from fastmmu.reference.nested import Answer, EptDimension, NestedWalker, NptDimension
from fastmmu.reference.walk import Memory
from fastmmu.state import NestedStat
from fastmmu.translate_nested import host_of, make_scratch

P, W, U, A, D, PS, NX = (int(getattr(GPTE64, name)) for name in ("P", "W", "U", "A", "D", "PS", "NX"))
R, EW, X, EA, ED, USER_X = (int(getattr(EPT, name)) for name in ("R", "W", "X", "A", "D", "USER_X"))
FULL, FLAGGED = P | W | U, P | W | U | A | D
WB, AD = 6 << 3, 1 << 6
WRITE, USER, FETCH = fastmmu.WRITE, fastmmu.USER, fastmmu.FETCH
GUEST_FINAL, GUEST_PAGE = int(PFERR.GUEST_FINAL), int(PFERR.GUEST_PAGE)
CAPS = EptCaps(46)
LONG = {"cr0": 0x8001_0001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}

# Random machines: pages of the second dimension's tables, then, from 2 MiB on, pages that the guest's tables may lie in; read-only
# ones among both, and two that do not exist. The dimensions share no page: then the order in which flags are set would matter.
HOST_PAGES, FIRST, GUEST_PAGES = 24, 512, 40
SLOTS = [
    (0, 8 << 12, "ram"), (8 << 12, 10 << 12, "rom"), (10 << 12, FIRST + 34 << 12, "ram"), (FIRST + 34 << 12, FIRST + 36 << 12, "rom"),
    (FIRST + 36 << 12, FIRST + 38 << 12, "ram"),
]  # fmt: skip
MODES = [Mode.TWO_LEVEL, Mode.PAE, Mode.LONG4, Mode.LONG5, Mode.NONE]


def random_host_entry(rng: np.random.Generator, ept: bool, leaf: bool) -> int:
    """An entry of the second dimension that usually leads on: pointers to its own tables, leaves to the guest's."""
    page = int(rng.integers(FIRST, FIRST + GUEST_PAGES)) if leaf else int(rng.integers(0, HOST_PAGES))
    entry = page << 12
    if ept:
        chances = [(R, 0.98), (EW, 0.9), (X, 0.9), (EA, 0.5), (ED, 0.5), (USER_X, 0.8), (PS, 0.03)]
        entry |= int(rng.choice([WB] * 12 + [0, 5 << 3, 2 << 3])) if leaf or chance(rng, 0.02) else 0
    else:
        chances = [(P, 0.98), (W, 0.92), (U, 0.97), (A, 0.5), (D, 0.5), (NX, 0.1), (PS, 0.03)]
    for bit, probability in chances:
        entry |= bit * chance(rng, probability)
    if entry & PS:
        entry = entry & ~0x3FFF_F000 | WB * ept | int(rng.choice([1 << 21, 1 << 30]))
    return entry ^ (1 << int(rng.integers(12, 64))) * chance(rng, 0.01)


def random_guest_entry(rng: np.random.Generator, half: bool) -> int:
    entry = int(rng.integers(0, 512)) << 12
    for bit, probability in ((P, 0.97), (W, 0.85), (U, 0.8), (A, 0.6), (D, 0.5), (PS, 0.06), (NX, 0.0 if half else 0.1)):
        entry |= bit * chance(rng, probability)
    if entry & PS and chance(rng, 0.8):
        entry &= ~(0x3FF000 if half else 0x1FF000)
    return entry if half else entry ^ (1 << int(rng.integers(0, 64))) * chance(rng, 0.01)


class Machine:
    """Random tables in both dimensions, and the reference on a copy."""

    def __init__(self, rng: np.random.Generator, mode: Mode, ept: bool) -> None:
        self.memory = GuestMemory(FIRST + GUEST_PAGES << 12)
        words = self.memory.words.reshape(-1, 512)
        # the lower half of the second dimension's pages are tables of pointers, the upper half ones of leaves
        levels = int(rng.choice([4, 5]))
        pointers = np.array([random_host_entry(rng, ept, False) for _ in range(96)], np.uint64)
        leaves = np.array([random_host_entry(rng, ept, True) for _ in range(96)], np.uint64)
        last = HOST_PAGES // 2
        words[:HOST_PAGES] = rng.choice(pointers, (HOST_PAGES, 512))
        words[last:HOST_PAGES] = rng.choice(leaves, (HOST_PAGES - last, 512))
        for level in range(levels):  # a page for each level, so that most walks go down in order
            below = np.arange(512) % 3 + (level + 1) * 3 - 2 if level + 1 < levels else None
            rows = slice(0, 1) if level == 0 else slice(level * 3 - 2, level * 3 + 1)
            if below is None:
                words[rows] = rng.choice(leaves, (rows.stop - rows.start, 512))
            else:
                kept = rng.choice(pointers, (rows.stop - rows.start, 512)) & ~np.uint64(0xF_FFFF_FFFF_F000 | PS)
                words[rows] = kept | (below.astype(np.uint64) << np.uint64(12))
        half = mode == Mode.TWO_LEVEL
        pool = np.array([random_guest_entry(rng, half) for _ in range(64)], np.uint32 if half else np.uint64)
        guest = self.memory.words[FIRST * 512 :].view(pool.dtype)
        guest[:] = rng.choice(pool, len(guest))
        self.memory.slots = SLOTS
        self.cpu = dataclasses.replace(random_cpu(rng, mode), cr3=int(rng.integers(0, 512)) << 12)
        self.reference = Memory(list(SLOTS), {8 * int(i): int(self.memory.words[i]) for i in np.flatnonzero(self.memory.words)})
        if ept:
            caps = EptCaps(int(rng.choice([40, 46, 52])), *(chance(rng, 0.6) for _ in range(4)))
            self.nested = Ept(6 | (levels - 1) << 3 | AD * chance(rng, 0.5), caps)
            own = Caps(caps.maxphyaddr, caps.mode_based_execute, caps.execute_only, caps.page_2m, caps.page_1g)
            dimension = EptDimension(EptWalker(self.reference, self.nested.eptp, own))
        else:
            self.nested = Npt(0, levels, chance(rng, 0.8), int(rng.choice([40, 46, 52])), chance(rng, 0.6))
            dimension = NptDimension(self.reference, self.nested.cpu)
        self.walker = NestedWalker(dimension, self.cpu)
        self.walker.walker.pdptes = tuple(int(rng.integers(0, 512)) << 12 | chance(rng, 0.9) for _ in range(4))

    def mmu(self):
        """The guest's registers; under PAE paging with PDPTEs of our own."""
        mmu = mmu_of(GuestMemory(4096), dataclasses.replace(self.cpu, cr3=0))
        mmu = mmu._replace(reg=mmu.reg.copy())
        mmu.reg[0] = self.cpu.cr3
        mmu.reg[9:13] = self.walker.walker.pdptes
        return mmu

    def differences(self) -> list[str]:
        words = self.memory.words
        ours = {8 * int(i): int(words[i]) for i in np.flatnonzero(words)}
        theirs = {gpa: word for gpa, word in self.reference.words.items() if word}
        keys = sorted(gpa for gpa in ours.keys() | theirs.keys() if ours.get(gpa) != theirs.get(gpa))
        return [f"{gpa:#x}: kernel {ours.get(gpa, 0):#x}, reference {theirs.get(gpa, 0):#x}" for gpa in keys]


def answer_of(walk: object) -> Answer:
    """A kernel's answer as plain ints; rights count only where the walk succeeded."""
    numbers = [int(value) for value in walk[1:]]
    answer = Answer(bool(walk.ok), *numbers)
    return answer if answer.ok else dataclasses.replace(answer, access=0)


def compare(machine: Machine, walk, gva: int, access: int, told: str, kinds: dict[str, int]) -> None:
    """One walk against the reference's."""
    try:
        wanted = machine.walker.walk(gva, access)
    except Outside:
        assert int(walk.reason) == 1 << 16, told
        kinds["outside"] = kinds.get("outside", 0) + 1
        return
    assert answer_of(walk) == wanted, f"{told}: gva {gva:#x}, access {access:#x}, {machine.cpu}, {machine.nested}"
    kind = "ok" if wanted.ok else f"exit {wanted.reason}" if wanted.reason else "fault"
    kinds[kind] = kinds.get(kind, 0) + 1


def random_walks(rng: np.random.Generator, machines: int, walks: int, ept: bool) -> dict[str, int]:
    """Random machines; on each one the exact walk, or the plain one in front of it, beside the reference."""
    kinds: dict[str, int] = {}
    for number in range(machines):
        mode = MODES[int(rng.integers(len(MODES)))]
        machine = Machine(rng, mode, ept)
        mmu, host, scratch = machine.mmu(), host_of(machine.nested), make_scratch()
        none = make_nested_caches(False, False)
        for _ in range(walks):
            gva, access = random_gva(rng, mode), int(rng.choice(ACCESSES))
            if mode == Mode.NONE:
                gva = int(rng.integers(0, 1 << 40)) >> int(rng.integers(0, 28))
            if number % 2:
                walk = walk_nested(machine.memory.state, mmu, host, scratch, None, np.uint64(gva), np.uint64(access))
            else:
                walk = walk_nested_gva(machine.memory.state, mmu, host, scratch, none, None, np.uint64(gva), np.uint64(access))
            compare(machine, walk, gva, access, f"machine {number}", kinds)
        assert not machine.differences(), f"machine {number}, {machine.cpu}, {machine.nested}"
    return kinds


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
@pytest.mark.parametrize("part", range(2))
def test_random_machines_are_the_composed_references(seed: int, part: int, ept: bool) -> None:
    kinds = random_walks(np.random.default_rng([seed, part, ept]), sized(60, 12), sized(250, 60), ept)
    if JIT:  # the sample is not one-sided
        assert set(kinds) >= ({"ok", "fault", "exit 48", "exit 49", "outside"} if ept else {"ok", "fault", "exit 1024"}), kinds
        assert kinds["ok"] > 1000, kinds


@pytest.mark.long
@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
def test_many_random_machines(seed: int, ept: bool) -> None:
    print(random_walks(np.random.default_rng([seed, 9, ept]), sized(1500, 30), sized(400, 60), ept))


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
@pytest.mark.parametrize("one_access", [True, False], ids=["one access", "an access each"])
def test_translate_nested_many_is_the_reference(seed: int, ept: bool, one_access: bool) -> None:
    """Whole blocks and a rest; memory compared at the end."""
    rng = np.random.default_rng([seed, ept, one_access])
    for _ in range(sized(20, 2)):
        mode = MODES[int(rng.integers(2, 4))]
        machine = Machine(rng, mode, ept)
        gvas = np.array([random_gva(rng, mode) for _ in range(sized(700, 270))], np.uint64)
        access = int(rng.choice(ACCESSES)) if one_access else rng.choice(np.array(ACCESSES, np.uint64), len(gvas))
        accesses = [access] * len(gvas) if one_access else access.tolist()
        try:
            wanted = [machine.walker.walk(gva, kind) for gva, kind in zip(gvas.tolist(), accesses, strict=True)]
        except Outside:
            with pytest.raises(OutsideMemory):
                translate_nested_many(machine.memory, machine.cpu, machine.nested, gvas, access)
            continue
        many = translate_nested_many(machine.memory, machine.cpu, machine.nested, gvas, access)
        for row, one in zip(zip(*(column.tolist() for column in many), strict=True), wanted, strict=True):
            assert row == (one.ok, one.hpa, one.gpa, one.level, row[4] if not one.ok else one.access, one.pferr, one.reason, one.qualification)
        assert not machine.differences()


class Guest:
    """A guest of `levels` whose tables and pages are identity-mapped by 4 KiB pages of a second dimension of as many levels.

    Guest tables at 0x1000, 0x2000 and so on down to the leaf table; GVA 0 is mapped to gpa 0x8000. The second dimension's leaf
    table at 0x25000 maps the first 2 MiB one to one.
    """

    def __init__(self, levels: int = 4, host_levels: int = 4, ept: bool = True, flags: bool = False, caps: EptCaps = CAPS) -> None:
        self.ram = GuestMemory(1 << 20)
        self.words = self.ram.words
        self.levels, self.host_levels = levels, host_levels
        self.cpu = Cpu(**{**LONG, "cr4": 0x20 | (int(CR4.LA57) if levels == 5 else 0)})
        for level in range(levels, 0, -1):
            self.set_guest(level, self.guest_table(level - 1) | FLAGGED if level > 1 else 0x8000 | FLAGGED)
        rights = R | EW | X | USER_X | EA | ED if ept else FLAGGED
        for level in range(host_levels, 1, -1):
            self.words[self.host_table(level) >> 3] = self.host_table(level - 1) | rights
        for page in range(256):
            self.set_host(page << 12, page << 12 | rights | (WB if ept else 0))
        root = self.host_table(host_levels)
        self.nested = Ept(root | 6 | (host_levels - 1) << 3 | AD * flags, caps) if ept else Npt(root, host_levels)

    def guest_table(self, level: int) -> int:
        return (self.levels - level + 1) << 12

    def host_table(self, level: int) -> int:
        return 0x20000 + ((self.host_levels - level + 1) << 12)

    def set_guest(self, level: int, entry: int) -> None:
        self.words[self.guest_table(level) >> 3] = entry

    def set_host(self, gpa: int, entry: int) -> None:
        self.words[(self.host_table(1) >> 3) + (gpa >> 12)] = entry

    def host(self, gpa: int) -> int:
        return int(self.words[(self.host_table(1) >> 3) + (gpa >> 12)])

    def walk(self, access: int = 0, gva: int = 0x123) -> fastmmu.NestedTranslation:
        return translate_nested(self.ram, self.cpu, self.nested, gva, access)

    def left(self, access: int = 0) -> tuple[int, int, int]:
        """(gpa, exit reason, qualification) of a failed walk."""
        answer = self.walk(access)
        assert not answer.ok and answer.hpa == 0 and answer.pferr == 0
        return answer.gpa, answer.exit_reason, answer.exit_qualification

    def stat(self, exact: bool, caches=None, gvas: tuple[int, ...] = (0x123,), access: int = 0) -> np.ndarray:
        """Counters of walks."""
        mmu, host, scratch = mmu_of(self.ram, self.cpu), host_of(self.nested), make_scratch()
        stat, caches = np.zeros(len(NestedStat), np.uint64), caches or make_nested_caches(False, False)
        for gva in gvas:
            if exact:
                walk = walk_nested(self.ram.state, mmu, host, scratch, stat, np.uint64(gva), np.uint64(access))
            else:
                walk = walk_nested_gva(self.ram.state, mmu, host, scratch, caches, stat, np.uint64(gva), np.uint64(access))
            assert walk.ok
        return stat


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "plain"])
@pytest.mark.parametrize(("levels", "host_levels", "reads"), [(4, 4, 24), (5, 5, 35), (4, 5, 29), (5, 4, 29)])
def test_reads_of_a_walk(levels: int, host_levels: int, reads: int, exact: bool, ept: bool) -> None:
    stat = Guest(levels, host_levels, ept, flags=True).stat(exact)
    assert stat[NestedStat.GUEST_READS] == levels
    assert stat[NestedStat.GUEST_READS] + stat[NestedStat.HOST_READS] == reads


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "plain"])
@pytest.mark.parametrize(("level", "reads"), [(2, 4 + 5 * 3), (3, 4 + 5 * 2)])
def test_reads_over_large_pages_of_the_second_dimension(level: int, reads: int, exact: bool, ept: bool) -> None:
    guest = Guest(ept=ept, flags=True)
    guest.words[guest.host_table(level) >> 3] = PS | (WB | R | EW | X | EA | ED if ept else FLAGGED)
    stat = guest.stat(exact, gvas=(0x123, 0x456))
    assert stat[NestedStat.GUEST_READS] + stat[NestedStat.HOST_READS] == 2 * reads


def test_which_dimension_faulted() -> None:
    guest = Guest()
    assert guest.walk(WRITE) == (True, 0x8123, 0x8123, 1, int(ACC.ALL), 0, 0, 0)
    guest.set_host(0x8000, 0x9_F000 | WB | R)
    assert guest.walk() == (True, 0x9_F123, 0x8123, 1, int(ACC.ALL), 0, 0, 0)
    assert guest.left(WRITE) == (0x8123, 48, 0x18A)
    assert guest.left(FETCH) == (0x8123, 48, 0x18C)
    guest.set_host(0x8000, 0x8000 | WB | EW)
    assert guest.left() == (0x8123, 49, 0)
    guest.set_host(0x3000, 0)
    assert guest.left() == (0x3000, 48, 0x081)
    guest.set_guest(3, 0)
    assert guest.walk(USER) == (False, 0, 0, 3, 0, USER, 0, 0)
    assert guest.walk(gva=1 << 47) == (False, 0, 0, 0, 0, 0, 0, 0)


def test_guest_tables_under_ept_without_ad_are_read() -> None:
    """29.3.3.2: a read, and a read and a write where a flag has to be set. No flag is set when the write is denied."""
    guest = Guest()
    guest.set_host(0x4000, 0x4000 | WB | R)
    assert guest.walk(WRITE).ok
    guest.set_guest(1, 0x8000 | FULL | A)
    guest.set_guest(4, 0x2000 | FULL)
    assert guest.left(WRITE) == (0x4000, 48, 0x08B)
    assert int(guest.words[0x1000 >> 3]) == 0x2000 | FULL
    assert guest.walk().ok  # a read sets A in the top table alone, which is writable
    assert int(guest.words[0x1000 >> 3]) == 0x2000 | FULL | A


def test_guest_tables_under_ept_with_ad_are_written() -> None:
    guest = Guest(flags=True)
    guest.set_host(0x4000, 0x4000 | WB | R | EA)
    assert guest.left() == (0x4000, 48, 0x08B)
    guest.set_host(0x4000, 0x4000 | WB | R | EW)
    assert guest.walk().ok and guest.host(0x4000) & (EA | ED) == EA | ED
    guest.set_host(0x8000, 0x8000 | WB | R | EW)
    assert guest.walk().ok and guest.host(0x8000) & (EA | ED) == EA
    assert guest.walk(WRITE).ok and guest.host(0x8000) & (EA | ED) == EA | ED


def test_nested_page_faults_of_amd() -> None:
    """15.25.6: U always, W for the guest's tables, bit 32 or 33 for what was translated."""
    guest = Guest(ept=False)
    guest.set_host(0x8000, 0x8000 | FLAGGED & ~W)
    assert guest.walk().ok
    assert guest.left(WRITE) == (0x8123, 0x400, GUEST_FINAL | 7)
    guest.set_host(0x8000, 0)
    assert guest.left() == (0x8123, 0x400, GUEST_FINAL | 4)
    guest.set_host(0x8000, 0x8000 | FLAGGED | NX)
    assert guest.left(FETCH) == (0x8123, 0x400, GUEST_FINAL | 0x15)
    guest.set_host(0x3000, 0x3000 | FLAGGED & ~W)
    assert guest.left() == (0x3000, 0x400, GUEST_PAGE | 7)
    guest.set_host(0x3000, 0x3000 | FLAGGED & ~U)
    assert guest.left() == (0x3000, 0x400, GUEST_PAGE | 7)
    guest.set_host(0x3000, 0x3000 | FLAGGED | 1 << 50)
    assert guest.left() == (0x3000, 0x400, GUEST_PAGE | 0xF)


def test_mode_based_execute_goes_by_the_guests_tables() -> None:
    """The linear address is a user-mode one where all of the guest's entries say U, whoever fetches."""
    guest = Guest(caps=EptCaps(46, mode_based_execute=True))
    guest.set_host(0x8000, 0x8000 | WB | R | USER_X)
    assert guest.walk(FETCH).ok and guest.walk(FETCH | USER).ok
    guest.set_guest(2, 0x4000 | FLAGGED & ~U)
    assert guest.left(FETCH) == (0x8123, 48, 0x1CC)
    guest.cpu = Cpu(**{**LONG, "cr0": 0x11})
    assert translate_nested(guest.ram, guest.cpu, guest.nested, 0x8123, FETCH).ok  # paging off: user-mode


def test_what_is_almost_plain() -> None:
    """Each of these differs in one bit from a walk that needs no exact one."""
    guest = Guest(caps=EptCaps(46, mode_based_execute=True))
    guest.set_host(0x8000, 0x8000 | WB | R | X)
    assert guest.walk().ok and guest.left(FETCH) == (0x8123, 48, 0x1AC)
    for memory_type in range(8):
        guest.set_host(0x8000, 0x8000 | memory_type << 3 | R)
        assert guest.walk().exit_reason == (49 if memory_type in (2, 3, 7) else 0)
    rights, second = R | EW | X | USER_X, (guest.host_table(2) >> 3) + 2  # of gpa 4 MiB
    guest.set_guest(1, 0x40_1000 | FLAGGED)
    guest.words[second] = 0x60_0000 | rights | WB | PS
    assert guest.walk(WRITE) == (True, 0x60_1123, 0x40_1123, 1, int(ACC.ALL), 0, 0, 0)
    for reserved in (1 << 12, 1 << 20, 1 << 46):
        guest.words[second] = 0x60_0000 | rights | WB | PS | reserved
        assert guest.left() == (0x40_1123, 49, 0)
    guest.words[second] = 1 << 41 | rights
    guest.words[(guest.host_table(4) >> 3) + 1 :][:511] = 0x8000 | rights | WB  # what a walk would find that began again at the top
    with pytest.raises(OutsideMemory, match="0x20000000000"):
        guest.walk()
    wide = Guest()
    wide.cpu = dataclasses.replace(wide.cpu, maxphyaddr=52)
    wide.set_guest(1, 1 << 48 | 0x8000 | FLAGGED)
    assert wide.left() == (1 << 48 | 0x8123, 48, 0x181)


def test_flags_in_rom_stay() -> None:
    guest = Guest()
    guest.set_guest(4, 0x2000 | FULL)
    guest.ram.slots = [(0, 0x1000, "ram"), (0x1000, 0x2000, "rom"), (0x2000, 1 << 20, "ram")]
    assert guest.walk().ok and int(guest.words[0x1000 >> 3]) == 0x2000 | FULL


def test_pae_guests_load_their_pdptes_through_the_second_dimension() -> None:
    guest = Guest()
    guest.cpu = Cpu(**{**LONG, "cr3": 0x6020, "efer": 0})
    guest.set_host(0x6000, 0x7000 | WB | R)
    guest.words[0x7020 >> 3] = 0x9000 | P
    guest.words[0x9000 >> 3] = 0x8000 & ~0x1F_FFFF | FLAGGED | PS
    assert guest.walk()[:4] == (True, 0x123, 0x123, 2)
    guest.words[0x7020 >> 3] = 0x9000 | P | 2
    with pytest.raises(fastmmu.GeneralProtection):
        guest.walk()
    guest.set_host(0x6000, 0)
    assert guest.left() == (0x6020, 48, 0x001)  # a read without a linear address
    guest.set_host(0x6000, 1 << 40 | WB | R)
    with pytest.raises(OutsideMemory, match="0x10000000000"):
        guest.walk()


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
def test_tables_that_lie_outside(ept: bool) -> None:
    guest = Guest(ept=ept)
    guest.set_host(0x3000, 1 << 40 | (WB | R | EW | X if ept else FLAGGED))
    with pytest.raises(OutsideMemory, match="a table at hpa 0x10000000000 lies outside memory"):
        guest.walk()
    guest.words[guest.host_table(2) >> 3] = 1 << 41 | (R | EW | X if ept else FLAGGED)
    if ept:
        with pytest.raises(OutsideMemory, match="a table at hpa 0x20000000000"):
            guest.walk()
    else:  # ordinary tables: as for `translate`, nothing is present there
        assert guest.left() == (0x1000, 0x400, GUEST_PAGE | 6)


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
def test_dimensions_that_share_their_tables(seed: int, ept: bool) -> None:
    """The guest's tables are those of the second dimension: whatever comes of it, it ends, inside the memory."""
    rng = np.random.default_rng([seed, ept])
    for _ in range(sized(60, 5)):
        machine = Machine(rng, Mode.LONG4, ept)
        for page in range(HOST_PAGES // 2):  # leaves that lead to the tables themselves
            leaves = machine.memory.words[(HOST_PAGES // 2 + page) * 512 :][:512]
            leaves &= ~np.uint64(0xFFF_FFFF_F000 & ~0xF000)
        machine.memory.words[3 * 512 * 3 : 512 * 16] &= ~np.uint64(0xFFF_FFFF_F000 & ~0xF000)
        gvas = np.array([random_gva(rng, Mode.LONG4) for _ in range(30)], np.uint64)
        for gva in gvas.tolist():
            try:
                answer = translate_nested(machine.memory, machine.cpu, machine.nested, gva, WRITE)
            except OutsideMemory:
                continue
            assert answer.ok or answer.exit_reason or answer.level


def test_the_way_to_the_top_table_is_looked_at_by_each_walk() -> None:
    """A walk sets A in a guest's entry that is a pointer of EPT as well, on the way to the guest's top table alone: for EPT that
    bit is reserved. Blocks leave such walks, and large pages of the guest, to be walked one after another."""
    guest = Guest()
    guest.cpu = dataclasses.replace(guest.cpu, cr3=0x20_0000)
    pointers, leaf = guest.host_table(2), 0x3_0000
    guest.words[(pointers >> 3) + 1], guest.words[leaf >> 3] = leaf | R | EW | X, 0x1000 | WB | R
    guest.words[0x3000 + 8 >> 3], guest.words[0x3000 + 16 >> 3] = pointers | FLAGGED, 0 | FLAGGED | PS
    flags, large = 1 << 21 | 1 << 12, 2 << 21 | 0x123
    many = translate_nested_many(guest.ram, guest.cpu, guest.nested, [large, flags, large])
    assert many.ok.tolist() == [True, True, False] and many.hpa.tolist() == [0x123, leaf, 0]
    assert (int(many.gpa[2]), int(many.level[2]), int(many.exit_reason[2])) == (0x20_0000, 4, 49)
    assert guest.walk(gva=large)[2:4] == (0x20_0000, 4) and guest.walk(gva=large).exit_reason == 49  # nor does one begin with it


def test_a_stream_takes_another_way_with_another_cr3() -> None:
    """Two top tables, of one page each; the digest is that of the hpas."""
    guest = Guest()
    for number, table in enumerate((0x9000, 0xA000, 0xB000, 0xC000)):
        guest.words[table >> 3] = (0xA000, 0xB000, 0xC000, 0xD000)[number] | FLAGGED
    mmu, host, scratch = mmu_of(guest.ram, guest.cpu), host_of(guest.nested), make_scratch()
    cr3s = np.array([0x1000, 0x9000, 0x9000, 0x1000], np.uint64)
    gvas, accesses = np.full(4, 0x123, np.uint64), np.zeros(4, EVENT["access"])
    digest, caches = 0, make_nested_caches(False, False)
    for hpa in (0x8123, 0xD123, 0xD123, 0x8123):
        digest = digest << 5 ^ hpa
    assert walk_nested_stream(guest.ram.state, mmu, host, scratch, caches, None, cr3s, gvas, accesses) == digest


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
def test_other_top_entries_than_that_of_the_guests_top_table(ept: bool) -> None:
    """A large page of the guest, and a table, in another 512 GiB than the top table: as granted there, not as here."""
    guest, far, reason = Guest(ept=ept), 1 << 39, 48 if ept else 0x400
    rights, top = R | EW | X if ept else FLAGGED, (guest.host_table(4) >> 3) + 1
    for table in (0x3_1000, 0x3_2000):
        guest.words[table >> 3] = table + 0x1000 | rights
    for page in range(16):
        guest.words[(0x3_3000 >> 3) + page] = page + 1 << 12 | rights | (WB if ept else 0)
    guest.words[top] = 0x3_1000 | rights
    guest.set_guest(2, far | FLAGGED | PS)
    assert guest.walk(WRITE)[:4] == (True, 0x1123, far | 0x123, 2)
    guest.set_guest(3, far | 0x2000 | FLAGGED)  # which is the table at 0x3000
    assert guest.walk(WRITE)[:4] == (True, 0x1123, far | 0x123, 2)
    guest.set_guest(3, 0x3000 | FLAGGED)
    guest.words[top] &= ~np.uint64(EW)
    assert guest.walk().ok and guest.left(WRITE)[:2] == (far | 0x123, reason)
    guest.words[top] |= np.uint64(EW | PS)
    assert guest.left(WRITE)[:2] == (far | 0x123, 49 if ept else 0x400)
    guest.words[top] = 1 << 20 | rights
    if ept:
        with pytest.raises(OutsideMemory):
            guest.walk()
    else:
        assert guest.left()[:2] == (far | 0x123, 0x400)


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
def test_the_top_entry_is_asked_for_the_final_access_too(ept: bool) -> None:
    guest = Guest(ept=ept)
    guest.set_guest(2, FLAGGED | PS)
    top = guest.host_table(4) >> 3
    before = int(guest.words[top])
    for access, word in ((WRITE, before & ~EW), (FETCH, before & ~X if ept else before | NX)):
        guest.words[top] = word
        if ept or access == FETCH:  # under nested tables a table is written
            assert guest.walk().ok
        assert guest.left(access)[1] == (48 if ept else 0x400)


def test_addresses_wider_than_the_tables_of_the_second_dimension() -> None:
    """CR3, a pointer, a large page: none of them wraps around."""
    guest, wide = Guest(), 1 << 48
    guest.cpu = dataclasses.replace(guest.cpu, maxphyaddr=52)
    guest.set_guest(3, wide | 0x3000 | FLAGGED)
    assert guest.left()[:2] == (wide | 0x3000, 48)
    guest.set_guest(3, 0x3000 | FLAGGED)
    guest.set_guest(2, wide | FLAGGED | PS)
    assert guest.left()[:2] == (wide | 0x123, 48)
    guest.set_guest(2, 0x4000 | FLAGGED)
    guest.cpu = dataclasses.replace(guest.cpu, cr3=wide | 0x1000)
    assert guest.left()[:2] == (wide | 0x1000, 48)


def hot(guest: Guest, pages: int = 8) -> tuple[int, ...]:
    """Addresses of some pages, each mapped to a page of its own."""
    for page in range(pages):
        guest.words[(guest.guest_table(1) >> 3) + page] = 0x8000 + (page << 12) | FLAGGED
    return tuple(page << 12 | 8 for page in range(pages))


@pytest.mark.parametrize(
    ("structures", "pages", "reads"),
    [(False, False, 8 * 24), (True, False, 24 + 7 * 5), (False, True, 24 + 7 * 8), (True, True, 24 + 7 * 5)],
)
def test_caches_are_counted(structures: bool, pages: bool, reads: int) -> None:
    """Eight pages of one leaf table: the second walk begins at that table; with the nested cache alone its four tables are known."""
    guest = Guest(flags=True)
    stat = guest.stat(False, make_nested_caches(structures, pages), hot(guest))
    assert stat[NestedStat.GUEST_READS] + stat[NestedStat.HOST_READS] == reads
    assert stat[NestedStat.WALKS] == 8 and stat[NestedStat.STRUCTURE_HITS] == 7 * structures
    assert stat[NestedStat.PAGE_HITS] == (0 if structures or not pages else 28)


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
@pytest.mark.parametrize("levels", [4, 5])
def test_caches_change_no_answer(seed: int, levels: int, ept: bool) -> None:
    """Static tables with every kind of page: with each set of caches the same answers as without, access by access."""
    rng = np.random.default_rng([seed, levels, ept])
    for _ in range(sized(30, 3)):
        machine = Machine(rng, Mode(levels), ept)
        mmu, host, scratch = machine.mmu(), host_of(machine.nested), make_scratch()
        # each set is compiled on its own: under nested tables only both caches, which is the same code
        sets = [make_nested_caches(*which) for which in (((True, False), (False, True), (True, True)) if ept else ((True, True),))]
        for _ in range(sized(400, 60)):
            gva, access = np.uint64(random_gva(rng, Mode(levels))), np.uint64(rng.choice(ACCESSES))
            wanted = answer_of(walk_nested(machine.memory.state, mmu, host, scratch, None, gva, access))
            for caches in sets:
                walk = walk_nested_gva(machine.memory.state, mmu, host, scratch, caches, None, gva, access)
                assert answer_of(walk) == wanted, (machine.cpu, machine.nested, hex(int(gva)), int(access))


def test_what_the_caches_remember_until_they_are_cleared() -> None:
    guest = Guest(flags=True)
    caches = make_nested_caches(True, True)
    mmu, host, scratch = mmu_of(guest.ram, guest.cpu), host_of(guest.nested), make_scratch()

    def hpa() -> int:
        return int(walk_nested_gva(guest.ram.state, mmu, host, scratch, caches, None, np.uint64(0), np.uint64(0)).hpa)

    assert hpa() == 0x8000
    guest.words[0x9000 >> 3] = 0xA000 | FLAGGED
    guest.set_guest(2, 0x9000 | FLAGGED)  # another leaf table: the paging-structure cache leads to the old one
    assert hpa() == 0x8000
    clear_structures(caches.structures, None)
    assert hpa() == 0xA000
    guest.set_host(0xA000, 0xB000 | WB | R | EA)  # another page of the host: the nested cache knows the old one
    assert hpa() == 0xA000
    clear_pages(caches.pages)
    assert hpa() == 0xB000


def test_a_cached_structure_grants_no_more_than_its_entries() -> None:
    guest = Guest(flags=True)
    guest.set_guest(2, 0x4000 | FLAGGED & ~W | NX)
    caches = make_nested_caches(True, True)
    assert guest.stat(False, caches)[NestedStat.STRUCTURE_HITS] == 0
    mmu, host, scratch = mmu_of(guest.ram, guest.cpu), host_of(guest.nested), make_scratch()
    for access in (WRITE, FETCH):
        walk = walk_nested_gva(guest.ram.state, mmu, host, scratch, caches, None, np.uint64(0), np.uint64(access))
        assert not walk.ok and walk.pferr == access | 1


def test_a_cached_page_is_known_for_one_kind_of_access() -> None:
    guest, caches = Guest(), make_nested_caches(True, True)
    guest.set_host(0x8000, 0x8000 | WB | R)
    mmu, host, scratch = mmu_of(guest.ram, guest.cpu), host_of(guest.nested), make_scratch()
    for access, reason in ((0, 0), (0, 0), (WRITE, 48), (FETCH, 48), (0, 0)):
        walk = walk_nested_gva(guest.ram.state, mmu, host, scratch, caches, None, np.uint64(0), np.uint64(access))
        assert walk.reason == reason


def test_addresses_of_several_tables() -> None:
    """Two leaf tables and two directories, in blocks and with caches: none is taken for another."""
    guest = Guest()
    places = {0: (0x4000, 0x8000), 1 << 21: (0x6000, 0x9000), 1 << 30: (0x7000, 0xA000), 1 << 30 | 1 << 21: (0xC000, 0xB000)}
    guest.words[0x3000 + 8 >> 3], guest.words[0x2000 + 8 >> 3] = 0x6000 | FLAGGED, 0xD000 | FLAGGED
    guest.words[0xD000 >> 3], guest.words[0xD000 + 8 >> 3] = 0x7000 | FLAGGED, 0xC000 | FLAGGED
    for table, page in places.values():
        guest.words[table >> 3] = page | FLAGGED
    gvas, wanted = list(places) * 90, [page for _, page in places.values()] * 90
    assert translate_nested_many(guest.ram, guest.cpu, guest.nested, gvas, WRITE).hpa.tolist() == wanted
    mmu, host, scratch = mmu_of(guest.ram, guest.cpu), host_of(guest.nested), make_scratch()
    for which in ((True, False), (False, True), (True, True)):
        caches = make_nested_caches(*which)
        walks = [walk_nested_gva(guest.ram.state, mmu, host, scratch, caches, None, np.uint64(gva), np.uint64(0)) for gva in gvas[:12]]
        assert [int(walk.hpa) for walk in walks] == wanted[:12]


@pytest.mark.parametrize("ept", [True, False], ids=["ept", "npt"])
def test_blocks_over_large_pages_of_the_second_dimension(ept: bool) -> None:
    """2 MiB pages beside 4 KiB ones; a reserved bit in one of them is found."""
    guest = Guest(ept=ept, flags=True)
    pages = 500
    frames = np.where(np.arange(pages) % 2, 0x60_0000, 0x8000) + (np.arange(pages) % 7 << 12)  # gpas: every other one in a large page
    guest.words[guest.guest_table(1) >> 3 :][:pages] = frames.astype(np.uint64) | np.uint64(FLAGGED)
    large = (R | EW | X | USER_X | EA | ED | WB if ept else FLAGGED) | PS
    guest.words[(guest.host_table(2) >> 3) + 3] = 0xA0_0000 | large  # 6 MiB to 10 MiB
    gvas = np.arange(pages, dtype=np.uint64) << np.uint64(12) | np.uint64(0x18)
    many = translate_nested_many(guest.ram, guest.cpu, guest.nested, gvas, WRITE)
    assert many.ok.all() and many.gpa.tolist() == (frames + 0x18).tolist()
    assert many.hpa.tolist() == np.where(frames >= 0x60_0000, frames + 0x40_0018, frames + 0x18).tolist()
    guest.words[(guest.host_table(2) >> 3) + 3] |= np.uint64(1 << 14)
    many = translate_nested_many(guest.ram, guest.cpu, guest.nested, gvas, WRITE)
    assert many.ok.tolist() == (frames < 0x60_0000).tolist() and set(many.exit_reason[~many.ok].tolist()) == {49 if ept else 0x400}


def test_threads_translate_on_the_same_memory() -> None:
    """Two threads set the flags of the same entries in both dimensions."""
    guest = Guest(flags=True)
    gvas = np.array(hot(guest, 200) * sized(50, 2), np.uint64)
    words = guest.words.copy()
    words[0x1000 >> 3 : 0x6000 >> 3] &= np.where(words[0x1000 >> 3 : 0x6000 >> 3] & np.uint64(P), ~np.uint64(A | D), ~np.uint64(0))
    guest.words[:] = words
    results: list[np.ndarray] = []

    def work() -> None:
        results.append(translate_nested_many(guest.ram, guest.cpu, guest.nested, gvas, WRITE).hpa)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(hpas, gvas + np.uint64(0x8000)) for hpas in results) and len(results) == 2
    assert (guest.words[guest.guest_table(1) >> 3 :][:200] & np.uint64(A | D) == A | D).all()


def test_bad_arguments() -> None:
    guest = Guest()
    for bad in (None, 5, guest.cpu):
        with pytest.raises(ValueError, match="nested"):
            translate_nested(guest.ram, guest.cpu, bad, 0)
    with pytest.raises(ValueError, match="expected a GuestMemory and a Cpu"):
        translate_nested(guest.cpu, guest.ram, guest.nested, 0)
    with pytest.raises(ValueError, match="gva"):
        translate_nested(guest.ram, guest.cpu, guest.nested, -1)
    with pytest.raises(ValueError, match="access"):
        translate_nested(guest.ram, guest.cpu, guest.nested, 0, 1)
    with pytest.raises(fastmmu.EptpError):
        Ept(0x1000 | 3, EptCaps(46))
    for bad in ({"ncr3": 1}, {"ncr3": 1 << 52}, {"ncr3": 0, "levels": 3}, {"ncr3": 0, "nx": "y"}, {"ncr3": 0, "maxphyaddr": 9}):
        with pytest.raises(ValueError):
            Npt(**bad)
    assert all(len(column) == 0 for column in translate_nested_many(guest.ram, guest.cpu, guest.nested, []))
    many = translate_nested_many(guest.ram, guest.cpu, guest.nested, [0])
    assert [str(column.dtype) for column in many] == ["bool", "uint64", "uint64", "uint8", "uint8", "uint32", "uint32", "uint64"]
