"""The guest page-table walk, written from the Intel SDM, volume 3, chapter 4 (and facts section 1 for KVM's order)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastmmu.bits import ACC, CR0, CR4, EFER, GPTE64, PFERR, RFLAGS
from fastmmu.paging import Cpu

P, W, U, A, D, PS, NX, ADDR = (int(getattr(GPTE64, name)) for name in ("P", "W", "U", "A", "D", "PS", "NX", "ADDR"))
ACC_X, ACC_W, ACC_U = int(ACC.X), int(ACC.W), int(ACC.U)
PFERR_P, PFERR_W, PFERR_U, PFERR_RSVD, PFERR_F = (int(getattr(PFERR, name)) for name in ("P", "W", "U", "RSVD", "F"))
PFERR_IMPLICIT = int(PFERR.IMPLICIT)


@dataclass
class Memory:
    """Guest memory: {gpa of a word: value}, zero where absent, and the slots (start, end, kind)."""

    slots: list[tuple[int, int, str]]
    words: dict[int, int] = field(default_factory=dict)

    def kind(self, gpa: int) -> str | None:
        """'ram' or 'rom' where there is memory, else None."""
        for start, end, kind in self.slots:
            if start <= gpa < end:
                return None if kind == "device" else kind
        return None


@dataclass(frozen=True)
class Translation:
    """Answer of a walk; `pferr` is the error code when `ok` is False."""

    ok: bool
    gpa: int = 0
    level: int = 0
    access: int = 0
    pferr: int = 0


class Walker:
    """A processor's view of one set of registers; CR3 is given with each walk."""

    def __init__(self, memory: Memory, cpu: Cpu) -> None:
        self.memory = memory
        self.levels = 5 if cpu.cr4 & int(CR4.LA57) else 4
        self.write_protect = bool(cpu.cr0 & int(CR0.WP))
        self.nx = bool(cpu.efer & int(EFER.NX))
        self.smep = bool(cpu.cr4 & int(CR4.SMEP))
        self.smap = bool(cpu.cr4 & int(CR4.SMAP))
        self.alignment_check = bool(cpu.rflags & int(RFLAGS.AC))
        self.page_1g = cpu.page_1g
        self.amd = cpu.amd
        self.beyond_maxphyaddr = ((1 << 52) - 1) & ~((1 << cpu.maxphyaddr) - 1)

    def reserved(self, level: int, entry: int) -> bool:
        """Whether the entry sets a bit that is reserved in its kind (SDM volume 3, figure 4-11 and section 4.5)."""
        if entry & self.beyond_maxphyaddr:
            return True
        if entry & NX and not self.nx:
            return True
        if level >= 4:
            return bool(entry & PS) or (self.amd and bool(entry & (1 << 8)))
        if level == 3 and entry & PS:
            return not self.page_1g or bool(entry & 0x3FFFE000)  # bits 29:13
        if level == 2 and entry & PS:
            return bool(entry & 0x1FE000)  # bits 20:13
        return False

    def denied(self, user_page: bool, writable: bool, executable: bool, access: int) -> bool:
        """Access rights, SDM volume 3, section 4.6.1."""
        if access & PFERR_U:
            if not user_page:
                return True
            if access & PFERR_F:
                return self.nx and not executable
            return bool(access & PFERR_W) and not writable
        if access & PFERR_F:
            return (self.smep and user_page) or (self.nx and not executable)
        if user_page and self.smap and (access & PFERR_IMPLICIT or not self.alignment_check):
            return True
        return bool(access & PFERR_W) and not writable and self.write_protect

    def fault(self, level: int, code: int, access: int) -> Translation:
        """A page fault: `code` plus the bits that describe the access (SDM volume 3, section 4.7)."""
        if access & PFERR_F and not (self.nx or self.smep):
            access &= ~PFERR_F
        return Translation(False, level=level, pferr=code | access & (PFERR_W | PFERR_U | PFERR_F))

    def walk(self, cr3: int, gva: int, access: int, *, update: bool = True) -> Translation:
        """Translate; with `update`, set accessed and dirty bits as the processor does."""
        table, level = cr3 & ADDR, self.levels
        used: list[tuple[int, int]] = []
        words = self.memory.words
        user_page = writable = executable = True
        while True:
            if self.memory.kind(table) is None:
                return self.fault(level, 0, access)
            gpa = table + 8 * (gva >> (12 + 9 * (level - 1)) & 511)
            entry = words.get(gpa, 0)
            if not entry & P:
                return self.fault(level, 0, access)
            if self.reserved(level, entry):
                return self.fault(level, PFERR_P | PFERR_RSVD, access)
            used.append((gpa, entry))
            user_page = user_page and bool(entry & U)
            writable = writable and bool(entry & W)
            executable = executable and not entry & NX
            if level == 1 or entry & PS:
                break
            table, level = entry & ADDR, level - 1

        if self.denied(user_page, writable, executable, access):
            return self.fault(level, PFERR_P, access)
        if update:
            for depth, (gpa, entry) in enumerate(used, 1):
                is_leaf = depth == len(used)
                new = entry | A | (D if is_leaf and access & PFERR_W else 0)
                if new != entry and self.memory.kind(gpa) == "ram":
                    words[gpa] = new
        if not access & PFERR_W and not entry & D:
            writable = False  # a clean page: the first write must walk to set D (facts 1.1, W16)
        offset = gva & ((1 << (12 + 9 * (level - 1))) - 1)
        frame = entry & ADDR & ~((1 << (12 + 9 * (level - 1))) - 1)
        rights = (ACC_U if user_page else 0) | (ACC_W if writable else 0) | (ACC_X if executable else 0)
        return Translation(True, frame | offset, level, rights)
