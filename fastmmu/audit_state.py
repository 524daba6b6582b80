"""What an audit looks at: the state of a machine, decoded, and how it says that something is wrong."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from fastmmu.bits import ACC, EPT_SPTE, NPT_SPTE, ROLE
from fastmmu.machine import Machine
from fastmmu.machine_state import TABLE_WORDS, VmWord
from fastmmu.spte import SAVED_SHIFT


class AuditError(AssertionError):
    """The state does not hold together; the message names the rule and the place."""


def fail(rule: str, where: object) -> NoReturn:
    """Raise the first broken rule."""
    raise AuditError(f"{rule}: {where}")


def must(true: np.ndarray, rule: str, where: np.ndarray) -> None:
    """Every element is true; else the first place where it is not."""
    if not true.all():
        fail(rule, hex(int(where[~true].reshape(-1)[0])))


class State:
    """A machine's tables, decoded: one row for each table in use, one column for each entry; or the shadow pages alone."""

    def __init__(self, machine: Machine, *, shadow_pages: bool = False) -> None:
        self.machine, vm = machine, machine.vm
        self.word = vm.word
        used = np.arange(int(self.word[VmWord.FRESH_TABLE]))
        self.rows = used[vm.page["role"][: len(used)] != 0]
        if shadow_pages:
            self.rows = self.rows[is_shadow_page(vm.page["role"][self.rows], self.word)]
        self.page = vm.page[self.rows]
        self.level = self.page["level"].astype(np.uint64)[:, None]
        self.index = self.rows.astype(np.uint64)[:, None] * np.uint64(TABLE_WORDS) + np.arange(TABLE_WORDS, dtype=np.uint64)
        self.spte = with_access(vm.spt.reshape(-1, TABLE_WORDS)[self.rows], self.word)
        self.present = self.spte & NPT_SPTE.MMU_PRESENT != 0
        last = (self.level == 1) | (self.spte & NPT_SPTE.PS != 0)
        self.leaf, self.table = self.present & last, self.present & ~last
        self.pages = np.uint64(1) << (np.uint64(9) * (self.level - np.uint64(1)))
        self.shadow = is_shadow_page(self.page["role"], self.word)  # else tables of the TDP MMU
        role = self.page["role"].astype(np.uint64)[:, None]
        self.indirect = np.broadcast_to(self.shadow[:, None] & (role & ROLE.DIRECT == 0), self.spte.shape)
        self.gfn = self.page["gfn"][:, None] + np.arange(TABLE_WORDS, dtype=np.uint64) * self.pages
        access = np.where(self.shadow[:, None], (role & ROLE.ACCESS) >> np.uint64(8), ACC.ALL)
        self.access = np.broadcast_to(access, self.spte.shape).copy()
        remembered = vm.shadowed.reshape(-1, TABLE_WORDS)[self.rows]
        kept = self.indirect & self.leaf
        self.gfn[kept], self.access[kept] = remembered[kept] >> np.uint64(12), remembered[kept] & ACC.ALL
        self.pfn = (self.spte & NPT_SPTE.ADDR) >> np.uint64(12)
        slots = vm.mem.slots
        self.slots = slots[slots["start"] < slots["end"]]

    def has(self, which: VmWord) -> np.ndarray:
        """Whether each entry has all bits of a mask, and the mask is not empty."""
        mask = self.word[which]
        return (self.spte & mask == mask) & (mask != 0)

    def slot_of(self, gfn: np.ndarray) -> np.ndarray:
        """Row in `slots` of the memslot that holds each gfn, -1 for none."""
        found = np.full(gfn.shape, -1)
        for i, slot in enumerate(self.slots):
            found[(slot["base"] <= gfn) & (gfn < slot["base"] + slot["pages"])] = i
        return found

    def bitmap(self, slot: np.void, name: str) -> np.ndarray:
        """One of a slot's bitmaps, bool by page."""
        start, pages = int(slot[name]), int(slot["pages"])
        words = self.machine.vm.slot_words[start : start - (-pages // 64)]
        return np.unpackbits(words.view(np.uint8), bitorder="little")[:pages].astype(bool)


def is_shadow_page(role: np.ndarray, word: np.ndarray) -> np.ndarray:
    """Whether tables with these roles are shadow pages. Those of the TDP MMU have nothing in theirs but the level."""
    return (role & ~np.uint32(ROLE.LEVEL | ROLE.INVALID) != 0) | (word[VmWord.TDP_MMU] == 0)


def with_access(sptes: np.ndarray, word: np.ndarray) -> np.ndarray:
    """Sptes with the R and X that access tracking has put aside (facts 3.2); the processor's own view of them is not judged."""
    if word[VmWord.AD]:
        return sptes
    rights, saved = EPT_SPTE.R | EPT_SPTE.W | EPT_SPTE.X, sptes & EPT_SPTE.SAVED
    tracked = (sptes & NPT_SPTE.MMU_PRESENT != 0) & (saved != 0)
    must(sptes[tracked] & rights == 0, "access-tracked, but present for the processor, spte", sptes[tracked])
    return np.where(tracked, (sptes & ~EPT_SPTE.SAVED) | saved >> SAVED_SHIFT, sptes)


def spte_list(machine: Machine, head: int) -> list[int]:
    """The sptes of a list (see rmap.py)."""
    found: list[int] = []
    while head:
        if not head >> 63:
            return [*found, head]
        place = head & (1 << 63) - 1
        rest, length, *sptes = machine.vm.desc[place : place + 16].tolist()
        if not 0 < length <= len(sptes):
            fail("descriptor of a list of sptes", place)
        found += sptes[:length]
        head = rest
    return found
