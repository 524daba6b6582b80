"""Random small machines: guest memory full of plausible and implausible page tables, registers, and accesses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmmu import Cpu, GuestMemory
from fastmmu.bits import CR0, CR4, EFER, GPTE64, PFERR, RFLAGS
from fastmmu.reference.walk import Memory
from fastmmu.state import VmState
from fastmmu.vm import make_state

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
    if chance(rng, 0.02):
        entry |= 1 << int(rng.integers(0, 64))
    return entry


def random_cpu(rng: np.random.Generator) -> Cpu:
    cr4 = int(CR4.PAE)
    for flag in (CR4.LA57, CR4.SMEP, CR4.SMAP):
        cr4 |= int(flag) * chance(rng, 0.4)
    return Cpu(
        cr0=int(CR0.PE | CR0.PG) | int(CR0.WP) * chance(rng, 0.6),
        cr3=int(rng.integers(0, 34)) << 12 | int(rng.integers(0, 8)) << 3,
        cr4=cr4,
        efer=int(EFER.LME | EFER.LMA) | int(EFER.NX) * chance(rng, 0.7),
        rflags=int(RFLAGS.AC) * chance(rng, 0.5),
        maxphyaddr=int(rng.choice([36, 40, 46, 52])),
        page_1g=chance(rng, 0.7),
        amd=chance(rng, 0.3),
    )


def random_machine(rng: np.random.Generator) -> Machine:
    memory = GuestMemory(PAGES << 12)
    # a table of few distinct entries, so that random addresses often meet the same one: A and D get set under other walks
    pool = [random_entry(rng) for _ in range(64)]
    for page in range(PAGES):
        memory.words[page * 512 : (page + 1) * 512] = np.array(pool, np.uint64)[rng.integers(0, len(pool), 512)]
    memory.slots = SLOTS
    cpu = random_cpu(rng)
    words = {8 * index: int(word) for index, word in enumerate(memory.words) if word}
    return Machine(memory, cpu, make_state(memory, cpu), Memory(list(SLOTS), words))


def random_gva(rng: np.random.Generator, levels: int) -> int:
    """A canonical address; indices from a small range, so that tables are met again."""
    gva = int(rng.integers(0, 1 << 12))
    for level in range(1, levels + 1):
        gva |= int(rng.choice([0, 1, 2, 255, 256, 511])) << (3 + 9 * level)
    top = 11 + 9 * levels
    return gva | (((1 << 64) - (1 << (top + 1))) if gva >> top & 1 else 0)
