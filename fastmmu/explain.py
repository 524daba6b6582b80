"""A walk as a person would read it: each entry decoded, the deciding bit named. Plain Python, it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fastmmu.bits import CR0, CR4, EFER, GPTE32, GPTE64, PAGE_SIZE, PFERR, ZERO
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
GRANTS = ("does not grant", "do not grant")  # one entry, several
PFERR_NAMES = ("P", "W", "U", "RSVD", "F", "PK")


@dataclass(frozen=True)
class Step:
    """One entry that a walk reads.

    Attributes:
        name: as in the manual: PML4E, PDPTE, PDE, PTE.
        index: its place in its table.
        address: its gpa; None for a PDPTE register of PAE paging.
        value: what it holds; None where its table lies outside every memory slot.
        bits: names of the bits set.
        rights: what this entry and those above grant, in the form "urwx", a dash for what they do not; empty if it grants nothing.
        decides: which of its bits decides on a fault, in words; empty for the others.
    """

    name: str
    index: int
    address: int | None
    value: int | None
    bits: tuple[str, ...] = ()
    rights: str = ""
    decides: str = ""

    def __str__(self) -> str:
        if self.address is None:
            return f"{self.name} register {self.index}: {self.value:#x}"
        if self.value is None:
            return f"{self.name} {self.index} at {self.address:#x}: its table lies outside every memory slot"
        return f"{self.name} {self.index} at {self.address:#x}: {self.value:#x} ({' '.join(self.bits) or 'no bit set'})"


@dataclass(frozen=True)
class Explanation:
    """A walk in words.

    Attributes:
        question: access, gva, paging mode and CR3.
        steps: the entries read, in order.
        answer: the gpa, or the fault and the deciding bit.
        gpa: None on a fault.
        page: bytes of the page; 0 on a fault and with paging off.
        pferr: the error code of a page fault; None where there is none.
    """

    question: str
    steps: tuple[Step, ...]
    answer: str
    gpa: int | None = None
    page: int = 0
    pferr: int | None = None

    def __str__(self) -> str:
        return "\n".join([self.question, *(f"   {step}" for step in self.steps), f"=> {self.answer}"])


def names_of(value: int, layout: tuple, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the bits set."""
    return tuple(name for name in names if value & int(getattr(layout, name)))


def entry_bits(gpte: int, level: int, large: int) -> tuple[str, ...]:
    """Names of the bits that an entry sets; bit 7 is PS in a directory and PAT in a table, a large page has its PAT at bit 12."""
    names = names_of(gpte, GPTE64, FLAG_NAMES)
    if level == 1:
        names = tuple("PAT" if name == "PS" else name for name in names)
    return (*names, "PAT") if level > 1 and large and gpte & int(GPTE64.PAT_LARGE) else names


def access_name(access: int) -> str:
    """An access in words."""
    who = "user" if access & int(PFERR.U) else "implicit supervisor" if access & int(PFERR.IMPLICIT) else "supervisor"
    what = [word for bit, word in ((PFERR.W, "write"), (PFERR.F, "fetch")) if access & int(bit)]
    return f"{who} {' and '.join(what) or 'read'}"


def told_of(names: list[str], one: str, several: str) -> str:
    """Entries as a subject, with the verb that agrees."""
    return f"{' and '.join(names)} {one if len(names) == 1 else several}"


def page_bytes(mode: PagingMode, level: int) -> int:
    """Bytes of a page mapped at `level`."""
    return PAGE_SIZE << int(mode.index_bits) * (level - 1)


def size_text(size: int) -> str:
    """A size in the largest unit that divides it: 2 MiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = next(power for power in reversed(range(len(units))) if (size and size % (1 << 10 * power) == 0) or power == 0)
    return f"{size >> 10 * power} {units[power]}"


class _Walk:
    """One explanation under way."""

    def __init__(self, ram: GuestMemory, cpu: Cpu, question: str, gva: int, access: int) -> None:
        self.ram, self.cpu, self.question, self.gva, self.access = ram, cpu, question, gva, access
        self.mode = MODES[cpu.mode]
        self.table = cpu.cr3 & int(self.mode.root)
        self.large_bit = int(mmu_of(ram, cpu).reg[Reg.LARGE])
        self.steps: list[Step] = []
        self.entries: list[tuple[str, int]] = []

    def fault(self, pferr: int, why: str, decides: dict[str, str]) -> Explanation:
        """A page fault; `decides` says of entries, by name, which bit it was."""
        pferr |= self.access & self.cpu.reported_access
        bits = " ".join(names_of(pferr, PFERR, PFERR_NAMES))
        steps = tuple(replace(step, decides=decides.get(step.name, "")) for step in self.steps)
        answer = f"page fault, error code {pferr:#x} ({bits or 'no bit set'}): {why}"
        return Explanation(self.question, steps, answer, pferr=pferr)

    def read(self, level: int) -> tuple[str, int] | None:
        """Name and value of the entry at `level`; None where its table lies outside memory."""
        bits, size = int(self.mode.index_bits), 4 if self.mode.half else 8
        index = self.gva >> (12 + bits * (level - 1)) & (1 << bits) - 1
        gpa = self.table + size * index
        name = ENTRY_NAMES[level]
        if not any(start <= self.table < end and kind != "device" for start, end, kind in self.ram.slots):
            self.steps.append(Step(name, index, gpa, None))
            return None
        word = int(self.ram.words[gpa >> 3])
        gpte = word if size == 8 else word >> 8 * (gpa & 4) & 0xFFFF_FFFF
        self.steps.append(Step(name, index, gpa, gpte, entry_bits(gpte, level, gpte & self.large_bit)))
        return name, gpte

    def run(self) -> Explanation:
        if self.mode.pae:
            number = self.gva >> 30
            pdpte = load_pdptes(self.ram, self.cpu)[number]
            self.steps.append(Step("PDPTE", number, None, pdpte, names_of(pdpte, GPTE64, ("P",))))
            if not pdpte & int(GPTE64.P):
                return self.fault(0, f"PDPTE {number} is not present (P)", {"PDPTE": "P is clear"})
            self.table = pdpte & int(GPTE64.ADDR)
        reserved = reserved_masks(self.cpu)
        name, gpte, level, large = "", 0, 0, 0
        for level in range(int(self.mode.levels), 0, -1):
            entry = self.read(level)
            if entry is None:
                return self.fault(0, f"the table of level {level} at {self.table:#x} lies outside every memory slot", {})
            name, gpte = entry
            if not gpte & int(GPTE64.P):
                return self.fault(0, f"{name} is not present (P)", {name: "P is clear"})
            large = gpte & self.large_bit
            bad = gpte & int(reserved[(large >> 4) + level])
            if bad:
                positions = "reserved bits: " + ", ".join(str(position) for position in range(64) if bad >> position & 1)
                return self.fault(int(PFERR.P | PFERR.RSVD), f"{name} sets {positions}", {name: f"sets {positions}"})
            self.entries.append(entry)
            self.steps[-1] = replace(self.steps[-1], rights=self.rights())
            if large:
                break
            self.table = gpte & int(self.mode.root)
        return self.page(name, gpte, level)

    def rights(self) -> str:
        """What the entries so far grant."""
        user, write = (not self.entries_with(flag, clear=True) for flag in (GPTE64.U, GPTE64.W))
        fetch = not self.entries_with(GPTE64.NX, clear=False)
        return "u-"[not user] + "r" + "w-"[not write] + "x-"[not fetch]

    def page(self, name: str, gpte: int, level: int) -> Explanation:
        denial, decides = self.denial(name)
        keys = self.key_denial(gpte) if self.mode.keys else ""
        if denial or keys:
            if keys:
                decides = {**decides, name: "; ".join(filter(None, (decides.get(name), "its protection key")))}
            return self.fault(int(PFERR.P | (PFERR.PK if keys else ZERO)), "; ".join(filter(None, (denial, keys))), decides)
        size = page_bytes(self.mode, level)
        frame = gpte & int(GPTE64.ADDR) & ~(size - 1)
        if self.mode.half and level == 2:
            frame |= (gpte & int(GPTE32.PSE36)) << (32 - 13)
        gpa = frame | self.gva & (size - 1)
        granted = [] if self.entries_with(GPTE64.W, clear=True) else ["write"]
        granted += [] if self.entries_with(GPTE64.NX, clear=False) else ["fetch"]
        who = "supervisor only" if self.entries_with(GPTE64.U, clear=True) else "user and supervisor"
        answer = f"gpa {gpa:#x}, in a {size_text(size)} page; entries grant {', '.join(['read', *granted])}; {who}"
        if "write" in granted and not gpte & int(GPTE64.D) and not self.access & int(PFERR.W):
            answer += "; D is clear, so that no write access is reported"
        return Explanation(self.question, tuple(self.steps), answer, gpa, size)

    def denial(self, leaf: str) -> tuple[str, dict[str, str]]:
        """Which right is missing, by SDM volume 3, 4.6.1, and which bit of which entries decides."""
        cpu, user, write, fetch = self.cpu, *(self.access & int(bit) for bit in (PFERR.U, PFERR.W, PFERR.F))
        supervisor_page = self.entries_with(GPTE64.U, clear=True)
        read_only = self.entries_with(GPTE64.W, clear=True)
        no_execute = self.entries_with(GPTE64.NX, clear=False)
        if user and supervisor_page:
            return f"{told_of(supervisor_page, *GRANTS)} user access (U)", dict.fromkeys(supervisor_page, "U is clear")
        if write and read_only and (user or cpu.cr0 & int(CR0.WP)):
            told = f"{told_of(read_only, *GRANTS)} writing (W)" + ("" if user else ", and CR0.WP is set")
            return told, dict.fromkeys(read_only, "W is clear")
        if fetch and cpu.efer & int(EFER.NX) and no_execute:
            return f"{told_of(no_execute, 'forbids', 'forbid')} fetches (NX)", dict.fromkeys(no_execute, "NX is set")
        in_all = {leaf: "U is set, in this entry and all above"}
        if fetch and not user and not supervisor_page and cpu.cr4 & int(CR4.SMEP):
            return "a supervisor fetch from a user page (CR4.SMEP)", in_all
        exempt = alignment_check(cpu) and not self.access & int(PFERR.IMPLICIT)
        if not fetch and not user and not supervisor_page and cpu.cr4 & int(CR4.SMAP) and not exempt:
            return "a supervisor access to a user page (CR4.SMAP)", in_all
        return "", {}

    def entries_with(self, bit: np.uint64, clear: bool) -> list[str]:
        """Names of the entries whose `bit` is clear, or set."""
        return [name for name, gpte in self.entries if bool(gpte & int(bit)) != clear]

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


def explain_walk(ram: GuestMemory, cpu: Cpu, gva: int, access: int = 0) -> Explanation:
    """The walk of `gva` for `access` entry by entry, for programs; arguments and errors as `explain`."""
    gva, access = checked_gva(gva), checked_access(access)
    question = f"{access_name(access)} of gva {gva:#x}, {MODE_NAMES[cpu.mode]}, CR3 {cpu.cr3:#x}"
    try:
        mmu_of(ram, cpu)
    except GeneralProtection as error:
        return Explanation(question, (), f"general protection (#GP): {error}")
    if cpu.mode == Mode.NONE:
        return Explanation(question, (), f"gpa {gva:#x}: paging is off", gva)
    if not is_address(cpu.mode, gva):
        return Explanation(question, (), f"no address of {MODE_NAMES[cpu.mode]}: general protection (#GP), no page fault")
    return _Walk(ram, cpu, question, gva, access).run()


def explain(ram: GuestMemory, cpu: Cpu, gva: int, access: int = 0) -> str:
    """The walk as a person would read it: each entry decoded, then the answer with the deciding bit. Memory stays as it is.

    Raises:
        ValueError: bad arguments, as `translate_many`.

    Example:
        >>> from fastmmu import USER, WRITE, Cpu, GuestMemory, explain
        >>> ram = GuestMemory(1 << 20)
        >>> for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4008, 0x5065)):
        ...     ram.words[gpa >> 3] = entry
        >>> cpu = Cpu(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
        >>> print(explain(ram, cpu, 0x1234, USER | WRITE))
        user write of gva 0x1234, 4-level paging, CR3 0x1000
           PML4E 0 at 0x1000: 0x2067 (P W U A D)
           PDPTE 0 at 0x2000: 0x3067 (P W U A D)
           PDE 0 at 0x3000: 0x4067 (P W U A D)
           PTE 1 at 0x4008: 0x5065 (P U A D)
        => page fault, error code 0x7 (P W U): PTE does not grant writing (W)
    """
    return str(explain_walk(ram, cpu, gva, access))
