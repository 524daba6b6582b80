"""The guest page-table walk, written from the Intel SDM, volume 3, chapter 4 (and facts section 1 for KVM's order)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastmmu.bits import ACC, CR0, CR4, EFER, GPTE32, GPTE64, PFERR, RFLAGS
from fastmmu.paging import Cpu

P, W, U, A, D, PS, NX, ADDR = (int(getattr(GPTE64, name)) for name in ("P", "W", "U", "A", "D", "PS", "NX", "ADDR"))
ACC_X, ACC_W, ACC_U = int(ACC.X), int(ACC.W), int(ACC.U)
PFERR_P, PFERR_W, PFERR_U, PFERR_RSVD, PFERR_F, PFERR_PK, PFERR_IMPLICIT = (
    int(getattr(PFERR, name)) for name in ("P", "W", "U", "RSVD", "F", "PK", "IMPLICIT")
)


@dataclass
class Memory:
    """Guest memory: {gpa of an 8-byte word: value}, zero where absent, and the slots (start, end, kind)."""

    slots: list[tuple[int, int, str]]
    words: dict[int, int] = field(default_factory=dict)

    def kind(self, gpa: int) -> str | None:
        """'ram' or 'rom' where there is memory, else None."""
        for start, end, kind in self.slots:
            if start <= gpa < end:
                return None if kind == "device" else kind
        return None

    def read(self, gpa: int, size: int) -> int:
        """The entry of 4 or 8 bytes at `gpa`, little endian."""
        word = self.words.get(gpa & ~7, 0)
        return word if size == 8 else word >> 8 * (gpa & 4) & 0xFFFFFFFF

    def write(self, gpa: int, size: int, value: int) -> None:
        """Replace that entry, and nothing beside it."""
        if size == 4:
            shift = 8 * (gpa & 4)
            value = self.read(gpa & ~7, 8) & ~(0xFFFFFFFF << shift) | value << shift
        self.words[gpa & ~7] = value

    def load(self, gpa: int, size: int) -> int:
        """Bytes at any address, as a number."""
        both = self.words.get(gpa & ~7, 0) | self.words.get((gpa & ~7) + 8, 0) << 64
        return both >> 8 * (gpa & 7) & (1 << 8 * size) - 1

    def store(self, gpa: int, size: int, value: int) -> None:
        """Store bytes at any address."""
        for i in range(size):
            word, shift = gpa + i & ~7, 8 * (gpa + i & 7)
            self.words[word] = self.words.get(word, 0) & ~(0xFF << shift) | (value >> 8 * i & 0xFF) << shift


@dataclass(frozen=True)
class Translation:
    """Answer of a walk; `pferr` is the error code when `ok` is False."""

    ok: bool
    gpa: int = 0
    level: int = 0
    access: int = 0
    pferr: int = 0


class GeneralProtection(Exception):
    """#GP instead of a page fault."""


class Walker:
    """A processor's view of one set of registers; CR3 is given with each walk."""

    def __init__(self, memory: Memory, cpu: Cpu) -> None:
        self.memory = memory
        cr4 = {name for name in CR4._fields if cpu.cr4 & int(getattr(CR4, name))}
        self.paging = bool(cpu.cr0 & int(CR0.PG))
        self.pae = "PAE" in cr4
        self.long = self.pae and bool(cpu.efer & int(EFER.LMA | EFER.LME))
        self.levels = (5 if "LA57" in cr4 else 4) if self.long else 2
        self.pse = "PSE" in cr4
        self.write_protect = bool(cpu.cr0 & int(CR0.WP))
        self.nx = bool(cpu.efer & int(EFER.NX))
        self.smep, self.smap = "SMEP" in cr4, "SMAP" in cr4
        self.user_keys = cpu.pkru if self.long and "PKE" in cr4 else 0
        self.supervisor_keys = cpu.pkrs if self.long and "PKS" in cr4 else 0
        self.alignment_check = bool(cpu.rflags & int(RFLAGS.AC))
        self.page_1g = cpu.page_1g
        self.amd = cpu.amd
        self.maxphyaddr = cpu.maxphyaddr

    def is_address(self, gva: int) -> bool:
        """Whether `gva` is an address of this mode: canonical in long mode (SDM volume 1, 3.3.7.1), else 32 bits wide."""
        if not self.paging:
            return True
        if not self.long:
            return gva < 1 << 32
        top = gva >> (56 if self.levels == 5 else 47)
        return top == 0 or top == (1 << (8 if self.levels == 5 else 17)) - 1

    def load_pdptes(self, cr3: int) -> list[int]:
        """The four PDPTEs that a load of CR3 reads under PAE paging (SDM volume 3, 4.4.1)."""
        table = cr3 & 0xFFFFFFE0
        pdptes = [self.memory.read(table + 8 * i, 8) if self.memory.kind(table) else 0 for i in range(4)]
        for pdpte in pdptes:
            if pdpte & P and (pdpte >> self.maxphyaddr or pdpte & 0x1C6):  # bits 8:6 and 2:1; 5 is set by QEMU, after the load
                raise GeneralProtection(f"PDPTE {pdpte:#x}")
        return pdptes

    def reserved(self, level: int, entry: int) -> bool:
        """Whether the entry sets a bit that is reserved in its kind (SDM volume 3, figures 4-4, 4-7, 4-11; section 4.5)."""
        if not self.pae:
            return level == 2 and self.pse and bool(entry & PS) and bool(entry & 0x3E0000)  # bits 21:17
        highest = 51 if self.long else 62
        if entry & (1 << (highest + 1)) - 1 & ~((1 << self.maxphyaddr) - 1):
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
            if access & PFERR_F and self.nx and not executable:
                return True
            return bool(access & PFERR_W) and not writable
        if access & PFERR_W and not writable and self.write_protect:
            return True
        if access & PFERR_F:
            return (self.smep and user_page) or (self.nx and not executable)
        return user_page and self.smap and bool(access & PFERR_IMPLICIT or not self.alignment_check)

    def key_denied(self, user_page: bool, key: int, access: int) -> bool:
        """Protection keys, SDM volume 3, section 4.6.2: PKRU for user pages, IA32_PKRS for supervisor pages, data accesses only."""
        if access & PFERR_F:
            return False
        register = self.user_keys if user_page else self.supervisor_keys
        if register >> 2 * key & 1:
            return True
        return bool(register >> 2 * key & 2) and bool(access & PFERR_W) and (bool(access & PFERR_U) or self.write_protect)

    def fault(self, level: int, code: int, access: int) -> Translation:
        """A page fault: `code` plus the bits that describe the access (SDM volume 3, section 4.7)."""
        if access & PFERR_F and not (self.nx or self.smep):
            access &= ~PFERR_F
        return Translation(False, level=level, pferr=code | access & (PFERR_W | PFERR_U | PFERR_F))

    def walk(self, cr3: int, gva: int, access: int, *, update: bool = True) -> Translation:
        """Translate an address of this mode; with `update`, set accessed and dirty bits as the processor does."""
        if not self.paging:
            return Translation(True, gva, 0, ACC_X | ACC_W | ACC_U)
        memory, level = self.memory, self.levels
        size, index_bits = (8, 9) if self.pae else (4, 10)
        table = cr3 & (ADDR if self.pae else int(GPTE32.ADDR))
        if self.pae and not self.long:
            pdpte = self.load_pdptes(cr3)[gva >> 30]
            if not pdpte & P:
                return self.fault(3, 0, access)
            table = pdpte & ADDR
        used: list[tuple[int, int]] = []
        user_page = writable = executable = True
        while True:
            if memory.kind(table) is None:
                return self.fault(level, 0, access)
            gpa = table + size * (gva >> (12 + index_bits * (level - 1)) & (1 << index_bits) - 1)
            entry = memory.read(gpa, size)
            if not entry & P:
                return self.fault(level, 0, access)
            if self.reserved(level, entry):
                return self.fault(level, PFERR_P | PFERR_RSVD, access)
            used.append((gpa, entry))
            user_page = user_page and bool(entry & U)
            writable = writable and bool(entry & W)
            executable = executable and not entry & NX
            large = level > 1 and bool(entry & PS) and (self.pae or self.pse)
            if level == 1 or large:
                break
            table, level = entry & ADDR, level - 1

        denied = self.denied(user_page, writable, executable, access)
        if self.long and self.key_denied(user_page, entry >> 59 & 15, access):
            return self.fault(level, PFERR_P | PFERR_PK, access)
        if denied:
            return self.fault(level, PFERR_P, access)
        if update:
            for depth, (gpa, _) in enumerate(used, 1):
                is_leaf = depth == len(used)
                old = memory.read(gpa, size)
                new = old | A | (D if is_leaf and access & PFERR_W else 0)
                if new != old and memory.kind(gpa) == "ram":
                    memory.write(gpa, size, new)
        if not access & PFERR_W and not entry & D:
            writable = False  # a clean page: the first write must walk to set D (facts 1.1, W16)
        offset_mask = (1 << (12 + index_bits * (level - 1))) - 1
        frame = entry & ADDR & ~offset_mask
        if large and size == 4:
            frame |= (entry >> 13 & 15) << 32  # PSE-36
        rights = (ACC_U if user_page else 0) | (ACC_W if writable else 0) | (ACC_X if executable else 0)
        return Translation(True, frame | gva & offset_mask, level, rights)
