"""The EPT walk in plain Python, from the Intel SDM, volume 3: 29.3.2 to 29.3.5 and table 28-7."""

from __future__ import annotations

from dataclasses import dataclass

from fastmmu.bits import EPT, EPTP, QUALIFICATION
from fastmmu.reference.walk import Memory

R, W, X, USER_X, PS, A, D = (int(getattr(EPT, name)) for name in ("R", "W", "X", "USER_X", "PS", "A", "D"))
ADDRESS = int(EPT.ADDR)
VIOLATION, MISCONFIGURATION = 48, 49


@dataclass(frozen=True)
class Caps:
    """Capabilities, and the mode-based execute control."""

    maxphyaddr: int
    mode_based_execute: bool
    execute_only: bool
    page_2m: bool
    page_1g: bool


@dataclass(frozen=True)
class Mapped:
    """Where an address leads; `rights` holds R, W, X, and 8 for user X."""

    hpa: int
    level: int
    rights: int


class EptExit(Exception):
    """The processor leaves the guest."""

    def __init__(self, reason: int, qualification: int, gpa: int, level: int, rights: int) -> None:
        super().__init__(f"exit {reason}, qualification {qualification:#x}, gpa {gpa:#x}, level {level}")
        self.reason, self.qualification, self.gpa, self.level, self.rights = reason, qualification, gpa, level, rights


class Outside(Exception):
    """A table where no memory is."""


class EptWalker:
    """One EPT on one memory."""

    def __init__(self, memory: Memory, eptp: int, caps: Caps) -> None:
        self.memory, self.caps = memory, caps
        self.root = eptp & int(EPTP.ADDR)
        self.levels = (eptp >> 3 & 7) + 1
        self.flags = bool(eptp & int(EPTP.AD))
        self.reads: list[int] = []  # hpa of every entry read

    def is_present(self, entry: int) -> bool:
        """29.3.2: any of bits 2:0, or bit 10 under mode-based execute."""
        return bool(entry & 7) or (self.caps.mode_based_execute and bool(entry & USER_X))

    def is_leaf(self, entry: int, level: int) -> bool:
        """Whether it maps a page; bit 7 of a PTE is ignored, higher up than PDPTEs it is reserved."""
        return level == 1 or (level <= 3 and bool(entry & PS))

    def is_misconfigured(self, entry: int, level: int) -> bool:
        """29.3.3.1, for a present entry."""
        caps = self.caps
        readable = bool(entry & R)
        if entry & W and not readable:
            return True
        if not caps.execute_only and not readable:
            if entry & X:
                return True
            if caps.mode_based_execute and entry & USER_X:
                return True
        if entry % (1 << 52) >> caps.maxphyaddr:
            return True
        if level >= 4:
            return bool(entry & 0xF8)  # bits 7:3
        if not self.is_leaf(entry, level):
            return bool(entry & 0x78)  # bits 6:3
        if level == 3 and (not caps.page_1g or entry & 0x3FFFF000):  # bits 29:12
            return True
        if level == 2 and (not caps.page_2m or entry & 0x1FF000):  # bits 20:12
            return True
        return entry >> 3 & 7 in (2, 3, 7)

    def violation(self, gpa: int, level: int, access: int, structure: bool, rights: int) -> EptExit:
        """Table 28-7; `rights` are bits 2:0 and, as 8, user X."""
        qualification = access | (rights & 7) << 3 | (int(QUALIFICATION.USER_X) if rights & 8 else 0) | int(QUALIFICATION.LINEAR)
        if not structure:
            qualification |= int(QUALIFICATION.FINAL)
        return EptExit(VIOLATION, qualification, gpa, level, rights)

    def walk(self, gpa: int, access: int, structure: bool = False, user_linear: bool = False) -> Mapped:
        """Translate; `access` is 1 read, 2 write, 4 fetch, or-ed.

        Raises:
            EptExit, Outside: it does not come to an end.
        """
        if structure and self.flags:
            access |= 3  # 29.3.3.2: a write, and both bits of the qualification
        if gpa >> 12 + 9 * self.levels:
            raise self.violation(gpa, 0, access, structure, 0)
        table, level = self.root, self.levels
        used: list[tuple[int, int]] = []
        readable = writable = executable = user_executable = True
        while True:
            if self.memory.kind(table) is None:
                raise Outside(f"{table:#x}")
            hpa = table + 8 * (gpa >> 12 + 9 * (level - 1) & 511)
            entry = self.memory.read(hpa, 8)
            self.reads.append(hpa)
            if not self.is_present(entry):
                raise self.violation(gpa, level, access, structure, 0)
            if self.is_misconfigured(entry, level):
                raise EptExit(MISCONFIGURATION, 0, gpa, level, 0)
            used.append((hpa, entry))
            readable, writable = readable and bool(entry & R), writable and bool(entry & W)
            executable, user_executable = executable and bool(entry & X), user_executable and bool(entry & USER_X)
            if self.is_leaf(entry, level):
                break
            table, level = entry & ADDRESS, level - 1

        by_mode = self.caps.mode_based_execute
        rights = readable + 2 * writable + 4 * executable + 8 * (by_mode and user_executable)
        may_fetch = user_executable if by_mode and user_linear else executable
        if (access & 1 and not readable) or (access & 2 and not writable) or (access & 4 and not may_fetch):
            raise self.violation(gpa, level, access, structure, rights)
        if self.flags:
            for hpa, _ in used:
                flags = A | (D if hpa == used[-1][0] and access & 2 else 0)
                if self.memory.kind(hpa) == "ram":
                    self.memory.write(hpa, 8, self.memory.read(hpa, 8) | flags)
        size = 1 << 12 + 9 * (level - 1)
        return Mapped((entry & ADDRESS) // size * size + gpa % size, level, rights)
