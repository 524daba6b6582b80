"""The access matrix, in the manner of a hardware MMU test suite: every combination of entry bits, registers and access.

A case is one bit of each list below: the bits of the directory entry, of the leaf entry, and the kind of access, under one setting
of the registers. The expectation is the reference's; entries left in memory are compared too; a failing case is printed as words.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from sizes import sized

from fastmmu import Cpu, GuestMemory, explain
from fastmmu._jit import kernel
from fastmmu.bits import CR0, CR4, EFER, GPTE64, PFERR, RFLAGS
from fastmmu.paging import Mode
from fastmmu.processor import mmu_of
from fastmmu.reference.walk import Memory, Walker
from fastmmu.state import TRAIL_LENGTH
from fastmmu.walk import walk_exact, walk_gva

P, W, U, A, D, PS, NX = (int(getattr(GPTE64, name)) for name in ("P", "W", "U", "A", "D", "PS", "NX"))
KEY = 1 << 59
LOW_RESERVED = 1 << 13  # of large pages
MAXPHYADDR = 45
HIGH_RESERVED = 1 << MAXPHYADDR
PSE_RESERVED = 1 << 17  # of 4 MiB pages

DIRECTORY_BITS = {
    "P": P,
    "W": W,
    "U": U,
    "A": A,
    "D": D,
    "PS": PS,
    "NX": NX,
    "high": HIGH_RESERVED,
    "low": LOW_RESERVED,
    "key": KEY,
}
LEAF_BITS = {"P": P, "W": W, "U": U, "A": A, "D": D, "NX": NX, "high": HIGH_RESERVED, "key": KEY}
HALF_DIRECTORY_BITS = {"P": P, "W": W, "U": U, "A": A, "D": D, "PS": PS, "low": PSE_RESERVED}
HALF_LEAF_BITS = {"P": P, "W": W, "U": U, "A": A, "D": D, "PAT": PS}

WRITE, USER, FETCH, IMPLICIT = (int(bit) for bit in (PFERR.W, PFERR.U, PFERR.F, PFERR.IMPLICIT))
ACCESSES = {
    "read": 0, "write": WRITE, "fetch": FETCH, "user read": USER, "user write": USER | WRITE, "user fetch": USER | FETCH,
    "implicit read": IMPLICIT, "implicit write": IMPLICIT | WRITE,
}  # fmt: skip
SETTINGS = {
    "WP": ("cr0", int(CR0.WP)), "NX": ("efer", int(EFER.NX)), "SMEP": ("cr4", int(CR4.SMEP)), "SMAP": ("cr4", int(CR4.SMAP)),
    "AC": ("rflags", int(RFLAGS.AC)), "PKE": ("cr4", int(CR4.PKE)), "PKS": ("cr4", int(CR4.PKS)), "PSE": ("cr4", int(CR4.PSE)),
}  # fmt: skip
KEY_REGISTERS = {"key 1 free": 0, "key 1 AD": 0b0100, "key 1 WD": 0b1000, "key 0 WD": 0b0010, "both": 0b1101}

ROOT, DIRECTORY, LEAF, FRAME = 0x1000, 0x4000, 0x5000, 0x20_0000
GVA = 0x123


def subsets(bits: dict[str, int]) -> np.ndarray:
    """The OR of every subset."""
    return np.array([sum(chosen) for n in range(len(bits) + 1) for chosen in itertools.combinations(bits.values(), n)], np.uint64)


def words_of(value: int, bits: dict[str, int]) -> str:
    return " ".join(name for name, bit in bits.items() if value & bit) or "nothing"


def registers(mode: Mode, names: tuple[str, ...], keys: int) -> Cpu:
    """The processor with these settings on."""
    values = {"cr0": int(CR0.PE | CR0.PG), "cr4": 0, "efer": 0, "rflags": 0}
    if mode != Mode.TWO_LEVEL:
        values["cr4"] |= int(CR4.PAE)
    if mode in (Mode.LONG4, Mode.LONG5):
        values["efer"] |= int(EFER.LME | EFER.LMA)
        values["cr4"] |= int(CR4.LA57) if mode == Mode.LONG5 else 0
    for name in names:
        register, bit = SETTINGS[name]
        values[register] |= bit
    root = DIRECTORY if mode == Mode.TWO_LEVEL else ROOT
    return Cpu(cr3=root, pkru=keys, pkrs=keys, maxphyaddr=MAXPHYADDR, **values)


@kernel
def run_cases(mem, mmu, trail, entries, directory, leaf, directories, leaves, accesses, exact, answers, left):
    """For each case: write both entries, walk, and note the answer and the entries left. `entries`: words or halves of memory."""
    for i in range(len(accesses)):
        entries[directory] = directories[i]
        entries[leaf] = leaves[i]
        if exact:
            walk = walk_exact(mem, mmu, trail, np.uint64(GVA), accesses[i])
        else:
            walk = walk_gva(mem, mmu, trail, np.uint64(GVA), accesses[i])
        answers[i, 0] = np.uint64(1) if walk.ok else np.uint64(0)
        answers[i, 1], answers[i, 2], answers[i, 3], answers[i, 4] = walk.gpa, walk.level, walk.access, walk.pferr
        left[i, 0], left[i, 1] = entries[directory], entries[leaf]


class Matrix:
    """One setting of the registers, and the cases under it."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.half = cpu.mode == Mode.TWO_LEVEL
        self.memory = GuestMemory(0x10_0000)
        words = self.memory.words
        if cpu.mode == Mode.PAE:
            words[ROOT >> 3] = DIRECTORY | P
        tables = {Mode.LONG4: (ROOT, 0x3000), Mode.LONG5: (ROOT, 0x2000, 0x3000)}.get(cpu.mode, ())
        for table, below in itertools.pairwise((*tables, DIRECTORY)):
            words[table >> 3] = below | P | W | U | A
        self.entries = words.view(np.uint32) if self.half else words
        self.size = 4 if self.half else 8
        self.words = {8 * int(i): int(words[i]) for i in np.flatnonzero(words)}

    def run(self, directories: np.ndarray, leaves: np.ndarray, accesses: np.ndarray, *, exact: bool) -> None:
        """Compare kernel and reference on the cases."""
        count, dtype = len(accesses), self.entries.dtype
        directories = np.where(directories & np.uint64(PS), directories | np.uint64(FRAME * 4), directories | np.uint64(LEAF))
        leaves = leaves | np.uint64(FRAME)
        answers, left = np.zeros((count, 5), np.uint64), np.zeros((count, 2), np.uint64)
        run_cases(
            self.memory.state, mmu_of(self.memory, self.cpu), np.zeros(TRAIL_LENGTH, np.uint64), self.entries,
            DIRECTORY // self.size, LEAF // self.size, directories.astype(dtype), leaves.astype(dtype), accesses, exact, answers, left,
        )  # fmt: skip
        reference = Memory([(0, 0x10_0000, "ram")], dict(self.words))
        walker = Walker(reference, self.cpu)
        rows = zip(directories.tolist(), leaves.tolist(), accesses.tolist(), answers.tolist(), left.tolist(), strict=True)
        for directory, leaf, access, answer, (directory_left, leaf_left) in rows:
            reference.write(DIRECTORY, self.size, directory)
            reference.write(LEAF, self.size, leaf)
            found = walker.walk(self.cpu.cr3, GVA, access)
            expected = [int(found.ok), found.gpa, found.level, found.access if found.ok else answer[3], found.pferr]
            kept = (reference.read(DIRECTORY, self.size), reference.read(LEAF, self.size))
            if answer != expected or (directory_left, leaf_left) != kept:
                self.fail(directory, leaf, access, answer, expected, (directory_left, leaf_left), kept)

    def fail(
        self, directory: int, leaf: int, access: int, answer: list[int], expected: list[int], left: tuple, kept: tuple
    ) -> None:
        self.entries[DIRECTORY // self.size], self.entries[LEAF // self.size] = directory, leaf
        kind = next(name for name, bits in ACCESSES.items() if bits == access)
        pytest.fail(
            f"{kind} with directory: {words_of(directory, DIRECTORY_BITS)}; leaf: {words_of(leaf, LEAF_BITS)}; {self.cpu}\n"
            f"ok, gpa, level, access, error code: {[hex(n) for n in answer]}, expected {[hex(n) for n in expected]}\n"
            f"entries left: {[hex(n) for n in left]}, expected {[hex(n) for n in kept]}\n"
            + explain(self.memory, self.cpu, GVA, access)
        )

    def cases(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All cases under this setting, one row each."""
        directories = subsets(HALF_DIRECTORY_BITS if self.half else DIRECTORY_BITS)
        leaves = subsets(HALF_LEAF_BITS if self.half else LEAF_BITS)
        large = directories & np.uint64(PS) != 0  # then there is no leaf below, unless bit 7 is ignored
        pairs = [
            (d, leaf)
            for d, big in zip(directories, large, strict=True)
            for leaf in (leaves[:1] if big and not self.half else leaves)
        ]
        columns = np.array([(d, leaf, access) for d, leaf in pairs for access in ACCESSES.values()], np.uint64)
        return columns[:, 0], columns[:, 1], columns[:, 2]


MODES = (Mode.TWO_LEVEL, Mode.PAE, Mode.LONG4, Mode.LONG5)
ALL_SETTINGS = [chosen for n in range(len(SETTINGS) + 1) for chosen in itertools.combinations(SETTINGS, n)]


def sample(rng: np.random.Generator, settings: int, cases: int) -> int:
    """Random settings, random cases under each; returns how many were compared."""
    done = 0
    all_cases: dict[Mode, tuple[np.ndarray, ...]] = {}
    for number in range(settings):
        mode = MODES[number % len(MODES)]
        names = ALL_SETTINGS[rng.integers(0, len(ALL_SETTINGS))]
        matrix = Matrix(registers(mode, names, int(rng.choice(list(KEY_REGISTERS.values())))))
        columns = all_cases.setdefault(mode, matrix.cases())
        chosen = rng.integers(0, len(columns[0]), cases)
        matrix.run(*(column[chosen] for column in columns), exact=bool(number // len(MODES) % 2))
        done += cases
    return done


def test_sample_of_the_matrix(seed: int) -> None:
    assert sample(np.random.default_rng(seed), sized(64, 16), sized(3000, 1000)) == sized(192_000, 16_000)


@pytest.mark.parametrize("mode", MODES, ids=[mode.name for mode in MODES])
def test_page_1g_and_amd(seed: int, mode: Mode) -> None:
    """1 GiB pages on and off, and bit 8 of the upper entries, by the same cases with the directory one level up."""
    if mode not in (Mode.LONG4, Mode.LONG5):
        pytest.skip("only in long mode")
    rng = np.random.default_rng([seed, mode])
    for page_1g, amd in itertools.product((True, False), repeat=2):
        cpu = dataclasses.replace(registers(mode, ("WP", "NX"), 0), page_1g=page_1g, amd=amd)
        matrix = Matrix(cpu)
        walker = Walker(Memory([(0, 0x10_0000, "ram")]), cpu)
        for level, table in ((3, 0x3000), (4, 0x2000 if mode == Mode.LONG5 else ROOT)):
            for bits in rng.integers(0, 1 << 9, sized(300, 60)):
                entry = int(bits) | DIRECTORY | (1 << 30 if bits & PS else 0) | (1 << 13) * bool(rng.random() < 0.2)
                matrix.memory.words[table >> 3] = entry
                walker.memory.words = {8 * int(i): int(matrix.memory.words[i]) for i in np.flatnonzero(matrix.memory.words)}
                state = (matrix.memory.state, mmu_of(matrix.memory, cpu), np.zeros(TRAIL_LENGTH, np.uint64))
                ours = walk_gva(*state, np.uint64(GVA), np.uint64(USER))
                theirs = walker.walk(cpu.cr3, GVA, USER)
                told = f"level {level}: {explain(matrix.memory, cpu, GVA, USER)}"
                assert (bool(ours.ok), int(ours.gpa), int(ours.level), int(ours.pferr)) == (
                    theirs.ok, theirs.gpa, theirs.level, theirs.pferr,
                ), told  # fmt: skip


@pytest.mark.parametrize("width", [36, 39, 45, 51, 52])
@pytest.mark.parametrize("mode", MODES[1:], ids=[mode.name for mode in MODES[1:]])
def test_every_reserved_bit_of_every_entry(mode: Mode, width: int) -> None:
    """One bit at a time, in each entry of the walk: reserved, ignored or a part of the address, as the reference says."""
    cpu = dataclasses.replace(registers(mode, ("WP",), 0), maxphyaddr=width)
    levels = {Mode.PAE: {2: DIRECTORY, 1: LEAF}, Mode.LONG4: {4: ROOT, 3: 0x3000, 2: DIRECTORY, 1: LEAF}}.get(
        mode, {5: ROOT, 4: 0x2000, 3: 0x3000, 2: DIRECTORY, 1: LEAF}
    )
    for large in (0, PS):
        for table in levels.values():
            for position in range(64):
                matrix = Matrix(cpu)
                words = matrix.memory.words
                words[DIRECTORY >> 3], words[LEAF >> 3] = LEAF | P | W | U, FRAME | P | W | U
                words[table >> 3] = int(words[table >> 3]) ^ 1 << position | large
                reference = Memory([(0, 0x10_0000, "ram")], {8 * int(i): int(words[i]) for i in np.flatnonzero(words)})
                mmu = mmu_of(matrix.memory, cpu)
                ours = walk_gva(matrix.memory.state, mmu, np.zeros(TRAIL_LENGTH, np.uint64), np.uint64(GVA), np.uint64(USER))
                theirs = Walker(reference, cpu).walk(cpu.cr3, GVA, USER)
                assert (bool(ours.ok), int(ours.gpa), int(ours.pferr)) == (theirs.ok, theirs.gpa, theirs.pferr), (
                    f"bit {position} of the entry at {table:#x}: {explain(matrix.memory, cpu, GVA, USER)}"
                )


@pytest.mark.long
def test_millions_of_the_matrix(seed: int) -> None:
    cases = sample(np.random.default_rng(seed), sized(256, 16), sized(16_000, 2_000))
    print(f"access matrix, seed {seed}: {cases:,} cases")
