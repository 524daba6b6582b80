"""A walk as a person would read it: each entry decoded, the deciding bit named. Plain Python, it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmmu.bits import CR0, CR4, EFER, GPTE32, GPTE64, PFERR, ZERO
from fastmmu.memory import GuestMemory
from fastmmu.paging import (
    ADDRESS_BITS,
    LONG4,
    LONG5,
    PAE,
    TWO_LEVEL,
    Cpu,
    Mode,
    PagingMode,
    alignment_check,
    key_rights,
    reserved_masks,
)
from fastmmu.processor import GeneralProtection, load_pdptes, mmu_of
from fastmmu.state import Reg
from fastmmu.translate import checked_access, checked_gva

MODES = {Mode.TWO_LEVEL: TWO_LEVEL, Mode.PAE: PAE, Mode.LONG4: LONG4, Mode.LONG5: LONG5}
MODE_NAMES = {
    Mode.NONE: "no paging",
    Mode.TWO_LEVEL: "32-bit two-level paging",
    Mode.PAE: "PAE paging",
    Mode.LONG4: "4-level paging",
    Mode.LONG5: "5-level paging",
}
ENTRY_NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}
FLAG_NAMES = ("P", "W", "U", "PWT", "PCD", "A", "D", "PS", "G", "NX")
PFERR_NAMES = ("P", "W", "U", "RSVD", "F", "PK")


@dataclass(frozen=True)
class Explanation:
    """`steps`: one line per entry read; `answer`: the gpa or the fault in words; `gpa` is None on a fault, `pferr` its code."""

    steps: tuple[str, ...]
    answer: str
    gpa: int | None = None
    pferr: int = 0


def names_of(value: int, layout: tuple, names: tuple[str, ...]) -> str:
    """Names of the bits set."""
    return " ".join(name for name in names if value & int(getattr(layout, name)))


def access_name(access: int) -> str:
    """An access in words."""
    who = "user" if access & int(PFERR.U) else "implicit supervisor" if access & int(PFERR.IMPLICIT) else "supervisor"
    what = [word for bit, word in ((PFERR.W, "write"), (PFERR.F, "fetch")) if access & int(bit)]
    return f"{who} {' and '.join(what) or 'read'}"


def page_size(mode: PagingMode, level: int) -> str:
    """Size of a page mapped at `level`."""
    return {1: "4 KiB", 2: "4 MiB" if mode.half else "2 MiB", 3: "1 GiB"}[level]


class _Walk:
    """One explanation under way."""

    def __init__(self, ram: GuestMemory, cpu: Cpu, cr3: int, gva: int, access: int) -> None:
        self.ram, self.cpu, self.gva, self.access = ram, cpu, gva, access
        self.mode = MODES[cpu.mode]
        self.table = cr3 & int(self.mode.root)
        self.steps: list[str] = []
        self.entries: list[tuple[str, int]] = []

    def fault(self, pferr: int, why: str) -> Explanation:
        pferr |= self.access & self.cpu.reported_access
        bits = names_of(pferr, PFERR, PFERR_NAMES)
        return Explanation(tuple(self.steps), f"page fault, error code {pferr:#x} ({bits or 'no bit set'}): {why}", None, pferr)

    def read(self, level: int) -> tuple[str, int] | None:
        """Name and value of the entry at `level`; None where its table lies outside memory."""
        bits, size = int(self.mode.index_bits), 4 if self.mode.half else 8
        index = self.gva >> (12 + bits * (level - 1)) & (1 << bits) - 1
        gpa = self.table + size * index
        name = ENTRY_NAMES[level]
        if not any(start <= self.table < end and kind != "device" for start, end, kind in self.ram.slots):
            self.steps.append(f"{name} {index} at {gpa:#x}: its table lies outside every memory slot")
            return None
        word = int(self.ram.words[gpa >> 3])
        gpte = word if size == 8 else word >> 8 * (gpa & 4) & 0xFFFF_FFFF
        self.steps.append(f"{name} {index} at {gpa:#x}: {gpte:#x} ({names_of(gpte, GPTE64, FLAG_NAMES) or 'no bit set'})")
        return name, gpte

    def run(self) -> Explanation:
        if self.mode.pae:
            number = self.gva >> 30
            pdpte = load_pdptes(self.ram, self.cpu)[number]
            self.steps.append(f"PDPTE register {number}: {pdpte:#x}")
            if not pdpte & int(GPTE64.P):
                return self.fault(0, f"PDPTE {number} is not present (P)")
            self.table = pdpte & int(GPTE64.ADDR)
        reserved = reserved_masks(self.cpu)
        large_bit = int(mmu_of(self.ram, self.cpu).reg[Reg.LARGE])
        name, gpte, level, large = "", 0, 0, 0
        for level in range(int(self.mode.levels), 0, -1):
            entry = self.read(level)
            if entry is None:
                return self.fault(0, f"the table of level {level} at {self.table:#x} lies outside every memory slot")
            name, gpte = entry
            if not gpte & int(GPTE64.P):
                return self.fault(0, f"{name} is not present (P)")
            large = gpte & large_bit
            bad = gpte & int(reserved[(large >> 4) + level])
            if bad:
                positions = ", ".join(str(position) for position in range(64) if bad >> position & 1)
                return self.fault(int(PFERR.P | PFERR.RSVD), f"{name} sets reserved bits: {positions}")
            self.entries.append(entry)
            if large:
                break
            self.table = gpte & int(self.mode.root)
        return self.page(name, gpte, level)

    def page(self, name: str, gpte: int, level: int) -> Explanation:
        denial = self.denial()
        keys = self.key_denial(gpte) if self.mode.keys else ""
        if denial or keys:
            return self.fault(int(PFERR.P | (PFERR.PK if keys else ZERO)), "; ".join(filter(None, (denial, keys))))
        offset = (1 << (12 + int(self.mode.index_bits) * (level - 1))) - 1
        frame = gpte & int(GPTE64.ADDR) & ~offset
        if self.mode.half and level == 2:
            frame |= (gpte & int(GPTE32.PSE36)) << (32 - 13)
        gpa = frame | self.gva & offset
        granted = [] if self.entries_with(GPTE64.W, clear=True) else ["write"]
        granted += [] if self.entries_with(GPTE64.NX, clear=False) else ["fetch"]
        who = "supervisor only" if self.entries_with(GPTE64.U, clear=True) else "user and supervisor"
        answer = f"gpa {gpa:#x}, in a {page_size(self.mode, level)} page; entries grant {', '.join(['read', *granted])}; {who}"
        if "write" in granted and not gpte & int(GPTE64.D) and not self.access & int(PFERR.W):
            answer += "; D is clear, so that no write access is reported"
        return Explanation(tuple(self.steps), answer, gpa)

    def denial(self) -> str:
        """Which right is missing, by SDM volume 3, 4.6.1."""
        cpu, user, write, fetch = self.cpu, *(self.access & int(bit) for bit in (PFERR.U, PFERR.W, PFERR.F))
        supervisor_page = self.entries_with(GPTE64.U, clear=True)
        read_only = self.entries_with(GPTE64.W, clear=True)
        no_execute = self.entries_with(GPTE64.NX, clear=False)
        if user and supervisor_page:
            return f"{supervisor_page} does not grant user access (U)"
        if write and read_only and (user or cpu.cr0 & int(CR0.WP)):
            return f"{read_only} does not grant writing (W)" + ("" if user else ", and CR0.WP is set")
        if fetch and cpu.efer & int(EFER.NX) and no_execute:
            return f"{no_execute} forbids fetches (NX)"
        if fetch and not user and not supervisor_page and cpu.cr4 & int(CR4.SMEP):
            return "a supervisor fetch from a user page (CR4.SMEP)"
        exempt = alignment_check(cpu) and not self.access & int(PFERR.IMPLICIT)
        if not fetch and not user and not supervisor_page and cpu.cr4 & int(CR4.SMAP) and not exempt:
            return "a supervisor access to a user page (CR4.SMAP)"
        return ""

    def entries_with(self, bit: np.uint64, clear: bool) -> str:
        """Names of the entries whose `bit` is clear, or set; empty if there is none."""
        return " and ".join(name for name, gpte in self.entries if bool(gpte & int(bit)) != clear)

    def key_denial(self, gpte: int) -> str:
        """Which bit of a protection-key register denies the access, by SDM volume 3, 4.6.2."""
        if self.access & int(PFERR.F):
            return ""
        key = (gpte & int(GPTE64.KEY)) >> 59
        user_page = not self.entries_with(GPTE64.U, clear=True)
        name, register = ("PKRU", key_rights(self.cpu)[0]) if user_page else ("PKRS", key_rights(self.cpu)[1])
        if register >> 2 * key & 1:
            return f"protection key {key}: {name} disables access (AD)"
        binding = self.access & int(PFERR.U) or self.cpu.cr0 & int(CR0.WP)
        if register >> 2 * key & 2 and self.access & int(PFERR.W) and binding:
            return f"protection key {key}: {name} disables writes (WD)"
        return ""


def is_address(mode: Mode, gva: int) -> bool:
    """Whether `gva` is an address of the mode."""
    bits = ADDRESS_BITS[mode]
    if mode in (Mode.LONG4, Mode.LONG5):
        top = gva >> (bits - 1)
        return top == 0 or top == (1 << (65 - bits)) - 1
    return gva < 1 << bits


def explain_walk(ram: GuestMemory, cpu: Cpu, cr3: int, gva: int, access: int) -> Explanation:
    """Describe the walk of `gva` for `access` (PFERR bits) through the tables at `cr3`."""
    if cpu.mode == Mode.NONE:
        return Explanation((), f"gpa {gva:#x}: paging is off", gva)
    if not is_address(cpu.mode, gva):
        return Explanation((), f"no address of {MODE_NAMES[cpu.mode]}: general protection (#GP), no page fault")
    return _Walk(ram, cpu, cr3, gva, access).run()


def explain(ram: GuestMemory, cpu: Cpu, gva: int, access: int = 0) -> str:
    """The walk as a person would read it: each entry decoded, then the answer with the deciding bit. Memory stays as it is.

    Raises:
        ValueError: bad arguments, as `translate_many`.
    """
    gva, access = checked_gva(gva), checked_access(access)
    head = f"{access_name(access)} of gva {gva:#x}, {MODE_NAMES[cpu.mode]}, CR3 {cpu.cr3:#x}"
    try:
        mmu_of(ram, cpu)
    except GeneralProtection as error:
        return f"{head}\n=> general protection (#GP): {error}"
    told = explain_walk(ram, cpu, cpu.cr3, gva, access)
    return "\n".join([head, *(f"   {step}" for step in told.steps), f"=> {told.answer}"])
