"""The three floors around a device page in plain Python, from facts 2.2 to 2.4 and 3.4: sets of letters instead of tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastmmu.bits import QUALIFICATION

BIT = {"R": int(QUALIFICATION.R), "W": int(QUALIFICATION.W), "X": int(QUALIFICATION.X)}
LINEAR, FINAL = int(QUALIFICATION.LINEAR), int(QUALIFICATION.FINAL)
GENERATIONS = 1 << 19  # what an MMIO spte tells apart


def bits(letters: Iterable[str]) -> int:
    """Access bits of a set of letters."""
    return sum(BIT[letter] for letter in letters)


@dataclass
class Page:
    """One device page: L1's rights, and the generation of L0's MMIO spte, None where L0 has no entry."""

    granted: frozenset[str] = frozenset()
    spte: int | None = None


class Refused(Exception):
    """A walk of EPT12 that failed: for which access, and the rights found; or a misconfigured entry."""

    def __init__(self, access: frozenset[str], rights: frozenset[str], *, misconfigured: bool) -> None:
        super().__init__(access)
        self.access, self.rights, self.misconfigured = access, rights, misconfigured


@dataclass
class House:
    """L0, L1 and L2. `injected` lists what L1 was told: qualifications, 0 for a misconfiguration."""

    strategy: str
    l1: str
    execute_only: bool = True
    generation: int = 0
    saved: int = 0
    pages: dict[int, Page] = field(default_factory=dict)
    counters: Counter[str] = field(default_factory=Counter)
    injected: list[int] = field(default_factory=list)

    def page(self, gfn: int) -> Page:
        """The page, as it is before anybody has touched it."""
        return self.pages.setdefault(gfn, Page())

    def legal(self, rights: set[str]) -> bool:
        """29.3.3.1 of the manual, for an entry that grants something."""
        return "R" in rights or not ("W" in rights or ("X" in rights and not self.execute_only))

    def walk(self, page: Page, access: set[str]) -> None:
        """L0 walks EPT12.

        Raises:
            Refused: L1's entry does not do.
        """
        self.counters["ept12_walks"] += 1
        if page.granted and not self.legal(set(page.granted)):
            raise Refused(frozenset(access), frozenset(), misconfigured=True)
        if not page.granted or access - page.granted:
            raise Refused(frozenset(access), page.granted, misconfigured=False)

    def leave(self, page: Page, access: str) -> None:
        """One exit of L2, and what L0 does with it.

        Raises:
            Refused: L1 is to know.
        """
        if page.spte is None:
            self.counters["violations"] += 1
            self.saved = BIT[access] | LINEAR | FINAL
            self.remember(page, {access})
        else:
            self.counters["misconfigurations"] += 1
            if page.spte != self.generation % GENERATIONS:
                self.remember(page, set())
        self.walk(page, {access, "R"})  # the emulator

    def remember(self, page: Page, access: set[str]) -> None:
        """The fault handler: an MMIO spte, if L1 grants the access."""
        self.walk(page, access)
        self.counters["mmio_sptes"] += 1
        page.spte = self.generation % GENERATIONS

    def tell(self, page: Page, why: Refused) -> None:
        """L0 injects, L1 answers."""
        if why.misconfigured:
            self.counters["injected_misconfigurations"] += 1
            self.injected.append(0)
            return
        told = {letter for letter in "RWX" if self.saved & BIT[letter]} if self.strategy == "stale" else set(why.access)
        self.counters["injected"] += 1
        self.injected.append(bits(told) + 8 * bits(why.rights) + (self.saved & LINEAR) + (self.saved & FINAL))
        after = set(page.granted) | told
        if after and not self.legal(after):
            after.add("R")
        if self.l1 == "write-with-read" and "R" in after:
            after.add("W")
        if after == page.granted:
            self.counters["unchanged"] += 1
        else:
            self.counters["grants"] += 1
            page.granted, page.spte = frozenset(after), None

    def access(self, gfn: int, access: str) -> tuple[int, bool]:
        """L2 accesses a page, "R", "W" or "X": (exits, whether it completes)."""
        page = self.page(gfn)
        self.counters["accesses"] += 1
        before: list[tuple[object, ...]] = []
        while True:
            state = (page.granted, page.spte, self.saved)
            if state in before:
                self.counters["never_completed"] += 1
                return len(before), False
            before.append(state)
            try:
                self.leave(page, access)
            except Refused as why:
                self.tell(page, why)
            else:
                self.counters["completed"] += 1
                return len(before), True

    def change_memslots(self) -> None:
        """A new generation; all MMIO sptes go when it comes round to 0."""
        self.generation += 1
        if self.generation % GENERATIONS == 0:
            for page in self.pages.values():
                page.spte = None
