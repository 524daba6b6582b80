"""Random small machines: guest memory full of plausible and implausible page tables, registers, and accesses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmmu import Cpu, GuestMemory
from fastmmu.bits import CR0, CR4, EFER, GPTE64, PFERR, RFLAGS
from fastmmu.paging import Mode
from fastmmu.processor import mmu_of
from fastmmu.reference.walk import Memory
from fastmmu.state import TRAIL_LENGTH, VmState

PAGES = 40
ROM_PAGES = (32, 36)  # of the pages, these are read-only
SLOTS = [(0, 32 << 12, "ram"), (32 << 12, 36 << 12, "rom"), (36 << 12, 38 << 12, "ram"), (0x10_0000, 0x10_1000, "device")]
ACCESSES = (0, 2, 4, 6, 0x10, 0x14, int(PFERR.IMPLICIT), int(PFERR.IMPLICIT) | 2)


@dataclass
class Machine:
    """The same machine twice: as kernels see it, and as the reference does."""

    memory: GuestMemory
    cpu: Cpu
    state: VmState
    reference: Memory

    def differences(self) -> list[str]:
        """Words that differ between the two."""
        where = np.flatnonzero(self.memory.words)
        ours = {int(word) * 8: int(self.memory.words[word]) for word in where}
        theirs = {gpa: word for gpa, word in self.reference.words.items() if word}
        return [
            f"{gpa:#x}: kernel {ours.get(gpa, 0):#x}, reference {theirs.get(gpa, 0):#x}"
            for gpa in sorted(ours.keys() | theirs.keys())
            if ours.get(gpa) != theirs.get(gpa)
        ]


def chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def random_entry(rng: np.random.Generator) -> int:
    """An 8-byte entry that usually leads on, with every bit set or clear now and then."""
    entry = int(rng.integers(0, PAGES + 2)) << 12
    for name, probability in (("P", 0.97), ("W", 0.8), ("U", 0.8), ("A", 0.6), ("D", 0.5), ("PS", 0.06), ("G", 0.2), ("NX", 0.1)):
        if chance(rng, probability):
            entry |= int(getattr(GPTE64, name))
    if entry & int(GPTE64.PS) and chance(rng, 0.8):
        entry &= ~0x1FF000  # a large page that is aligned for a PDE
        entry |= int(rng.integers(0, 4)) << 30
    if chance(rng, 0.3):
        entry |= int(rng.integers(0, 16)) << 59  # a protection key
    if chance(rng, 0.02):
        entry |= 1 << int(rng.integers(0, 64))
    return entry


def random_half(rng: np.random.Generator) -> int:
    """A 4-byte entry, likewise."""
    entry = random_entry(rng) & 0xFFFF_FFFF
    if entry & int(GPTE64.PS) and chance(rng, 0.8):
        entry &= ~0x3FF000
        entry |= int(rng.integers(0, 16)) << 13 | int(rng.integers(0, 4)) << 22  # PSE-36
    return entry


def random_cpu(rng: np.random.Generator, mode: Mode | None = None) -> Cpu:
    mode = Mode(int(rng.choice([2, 3, 4, 4, 4, 5, 5]))) if mode is None else mode
    cr4 = 0 if mode in (Mode.NONE, Mode.TWO_LEVEL) else int(CR4.PAE)
    cr4 |= int(CR4.LA57) if mode == Mode.LONG5 else 0
    for flag in (CR4.SMEP, CR4.SMAP, CR4.PKE, CR4.PKS):
        cr4 |= int(flag) * chance(rng, 0.35)
    cr4 |= int(CR4.PSE) * chance(rng, 0.7)
    long_mode = int(EFER.LME | EFER.LMA) if mode in (Mode.LONG4, Mode.LONG5) else 0
    return Cpu(
        cr0=int(CR0.PE) | (0 if mode == Mode.NONE else int(CR0.PG)) | int(CR0.WP) * chance(rng, 0.6),
        # the PDPTEs of PAE paging in ROM: in RAM, the accessed bit of another table's entry would change them under the processor
        cr3=(int(rng.integers(*ROM_PAGES)) if mode == Mode.PAE else int(rng.integers(0, 34))) << 12 | int(rng.integers(0, 8)) << 3,
        cr4=cr4,
        efer=long_mode | int(EFER.NX) * chance(rng, 0.7),
        pkru=int(rng.integers(0, 1 << 32)) & ~(3 if chance(rng, 0.5) else 0),
        pkrs=int(rng.integers(0, 1 << 32)) & ~(3 if chance(rng, 0.5) else 0),
        rflags=int(RFLAGS.AC) * chance(rng, 0.5),
        maxphyaddr=int(rng.choice([36, 40, 46, 52])),
        page_1g=chance(rng, 0.7),
        amd=chance(rng, 0.3),
    )


def random_machine(rng: np.random.Generator, mode: Mode | None = None) -> Machine:
    memory = GuestMemory(PAGES << 12)
    cpu = random_cpu(rng, mode)
    # a table of few distinct entries, so that random addresses often meet the same one: A and D get set under other walks
    if cpu.mode == Mode.TWO_LEVEL:
        pool = np.array([random_half(rng) for _ in range(64)], np.uint32)
        memory.words.view(np.uint32)[:] = pool[rng.integers(0, len(pool), PAGES * 1024)]
    else:
        pool = np.array([random_entry(rng) for _ in range(64)], np.uint64)
        memory.words[:] = pool[rng.integers(0, len(pool), PAGES * 512)]
    memory.slots = SLOTS
    if cpu.mode == Mode.PAE:
        first = (cpu.cr3 & 0xFFFF_FFE0) >> 3
        memory.words[first : first + 4] = [int(rng.integers(0, PAGES)) << 12 | chance(rng, 0.9) for _ in range(4)]
    words = {8 * int(index): int(memory.words[index]) for index in np.flatnonzero(memory.words)}
    state = VmState(memory.state, mmu_of(memory, cpu), np.zeros(TRAIL_LENGTH, np.uint64))
    return Machine(memory, cpu, state, Memory(list(SLOTS), words))


def random_gva(rng: np.random.Generator, mode: Mode) -> int:
    """An address of the mode; indices from a small range, so that tables are met again."""
    gva = int(rng.integers(0, 1 << 12))
    if mode == Mode.TWO_LEVEL:
        return gva | int(rng.choice([0, 1, 2, 511, 512, 1023])) << 12 | int(rng.choice([0, 1, 2, 511, 512, 1023])) << 22
    if mode in (Mode.PAE, Mode.NONE):
        return gva | int(rng.choice([0, 1, 2, 255, 256, 511])) << 12 | int(rng.integers(0, 2048)) << 21
    levels = int(mode)
    for level in range(1, levels + 1):
        gva |= int(rng.choice([0, 1, 2, 255, 256, 511])) << (3 + 9 * level)
    top = 11 + 9 * levels
    return gva | (((1 << 64) - (1 << (top + 1))) if gva >> top & 1 else 0)
