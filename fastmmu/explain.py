"""A walk as a person would read it: each entry decoded, the deciding bit named. Plain Python, it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmmu.bits import GPTE64, PFERR
from fastmmu.memory import GuestMemory
from fastmmu.paging import Cpu, Mode, reserved_masks
from fastmmu.state import Reg

ENTRY_NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}
FLAG_NAMES = ("P", "W", "U", "PWT", "PCD", "A", "D", "PS", "G", "NX")


@dataclass(frozen=True)
class Explanation:
    """`steps`: one line per entry read; `answer`: the gpa or the fault, in words."""

    steps: tuple[str, ...]
    answer: str


def flags_of(gpte: int) -> str:
    """Names of the bits set in an 8-byte entry."""
    return " ".join(name for name in FLAG_NAMES if gpte & int(getattr(GPTE64, name))) or "no bit set"


def explain_walk(memory: GuestMemory, reg: np.ndarray, cpu: Cpu, gva: int, access: int) -> Explanation:
    """Describe the walk of `gva` for `access` (PFERR bits) from the CR3 in `reg`; the features are those of `cpu`."""
    reserved = reserved_masks(cpu)
    table = int(reg[Reg.CR3]) & int(GPTE64.ADDR)
    rights = int(GPTE64.W | GPTE64.U)
    executable = True
    steps: list[str] = []
    for level in range(int(Mode(int(reg[Reg.MODE]))), 0, -1):
        gpa = table + ((gva >> (3 + 9 * level)) & 511) * 8
        name = f"{ENTRY_NAMES[level]} at {gpa:#x}"
        if not any(start <= table < end and kind != "device" for start, end, kind in memory.slots):
            steps.append(f"{name}: outside every memory slot")
            return Explanation(tuple(steps), f"a fault: table {table:#x} of level {level} lies outside memory")
        gpte = int(memory.words[gpa >> 3])
        steps.append(f"{name}: {gpte:#x} ({flags_of(gpte)})")
        if not gpte & int(GPTE64.P):
            return Explanation(tuple(steps), f"a fault: {ENTRY_NAMES[level]} not present (P)")
        large = gpte & int(GPTE64.PS) if level > 1 else 0
        bad = gpte & int(reserved[(8 if gpte & int(GPTE64.PS) else 0) + level])
        if bad:
            return Explanation(tuple(steps), f"a fault: reserved bits {bad:#x} set in {ENTRY_NAMES[level]}")
        rights &= gpte
        executable = executable and not gpte & int(GPTE64.NX)
        if large or level == 1:
            break
        table = gpte & int(GPTE64.ADDR)
    for wanted, granted, word in (
        (int(PFERR.W), rights & int(GPTE64.W), "write (W)"),
        (int(PFERR.U), rights & int(GPTE64.U), "user (U)"),
        (int(PFERR.F), executable, "fetch (NX)"),
    ):
        if access & wanted and not granted:
            return Explanation(tuple(steps), f"a fault: {word} not granted")
    offset = (1 << (3 + 9 * level)) - 1
    return Explanation(tuple(steps), f"gpa {(gpte & int(GPTE64.ADDR) & ~offset) | (gva & offset):#x}")
