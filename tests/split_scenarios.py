"""Scenario documents of eager splitting in the shadow MMU (the policy of the patches' first versions): named ones, and random ones.

Guests map their memory by huge pages with rights of all kinds, some of it twice; NX huge pages are off or on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from scenarios import (
    CR0,
    CR0_NO_WP,
    DATA,
    DATA_GPA,
    GIB,
    HUGE,
    LOG,
    MIB2,
    NONPAGING,
    NX,
    PAGE,
    SHADOW,
    TDP,
    TDP_N,
    Builder,
    Document,
    run,
)

SECOND = 0xC000000000  # another window on the same memory
STRATEGIES = ("cached", "guest-walk", "propagate")
RWX, RW, RO, RX = HUGE, HUGE | NX, HUGE & ~0x02 | NX, HUGE & ~0x02
CLEAN, UNUSED, SUPERVISOR = HUGE & ~0x40, HUGE & ~0x60, HUGE & ~0x04
RIGHTS = (RWX, RWX, RW, RO, RX, CLEAN, UNUSED, SUPERVISOR)


def builder(kind: str, strategy: str, *, nx: bool, on_fault: bool = False, **more: Any) -> Builder:
    """A document with the policy on."""
    b = Builder(kind, nx=nx, **more)
    b.config |= {"split_shadow_pages": True, "split_access": strategy, "split_on_fault": on_fault}
    return b


def logged(strategy: str, *, nx: bool, rights: tuple[int, int] = (RWX, RWX), manual: int = 0, limit: int = 0) -> Document:
    """Two regions, mapped twice, touched, logged, written, executed, collected, logged no more."""
    b = builder(SHADOW, strategy, nx=nx)
    for i in range(2):
        b.tables.map(DATA + i * MIB2, DATA_GPA + i * MIB2, rights[0], 2)
        b.tables.map(SECOND + i * MIB2, DATA_GPA + i * MIB2, rights[1], 2)
    b.data.append(run(DATA_GPA, 1024, 0xC3, stride=PAGE))
    b.slot(1, DATA_GPA, 2 * MIB2, host="2M")
    if limit:
        b.limit(limit)
    if manual:
        b.cap(manual)
    b.warm()
    for window in (DATA, SECOND):
        b.guest(("LOOPR", window + 8, MIB2, 2), ("W8", window + 16, 1), ("W8", window + MIB2 + 16, 1))
    b.log(1, True)
    if manual == 3:
        b.clear(1, 0, 512, {0, 1, 100})
        b.clear(1, 512, 512, {5})
    b.guest(*[(name, window + 0x3000) for window in (DATA, SECOND) for name in ("R8", "EXEC")])
    b.guest(("LOOPW", DATA + 8, 7 * PAGE, 100), ("LOOPW", SECOND + 8, 9 * PAGE, 100))
    b.guest(*[("EXEC", window + i * 0x25000) for window in (DATA, SECOND) for i in range(8)])
    b.get(1)
    if manual:
        b.clear(1, 0, 1024)
    b.guest(("LOOPW", DATA + 8, 5 * PAGE, 150), ("LOOPR", SECOND + 8, 3 * PAGE, 300))
    b.log(1, False)
    b.guest(("LOOPW", DATA + 8, 64 * PAGE, 16), ("LOOPR", SECOND + 8, 64 * PAGE, 16), ("EXEC", DATA), ("EXEC", SECOND + MIB2))
    b.log(1, True)
    b.guest(("LOOPW", SECOND + 8, 64 * PAGE, 16))
    return b.document()


def gibibyte(strategy: str) -> Document:
    """A guest's 1 GiB page, on 2 MiB and then on 1 GiB of the host; a part of it cleared. Few of its pages are touched."""
    b = builder(SHADOW, strategy, nx=True)
    b.tables.map(DATA, DATA_GPA, RWX, 3)
    b.slot(1, DATA_GPA, GIB, host="1G")
    b.cap(3)
    b.warm()
    b.guest(("W8", DATA + 8, 1))
    b.log(1, True)
    b.clear(1, 0, 64, {0})
    b.guest(("W8", DATA + 8, 1), ("W8", DATA + 9 * PAGE, 1), ("W8", DATA + 3 * MIB2, 1), ("R8", DATA + 8 * MIB2))
    b.get(1)
    return b.document()


def over_tables(strategy: str) -> Document:
    """A huge page is split into a table that another window's 4 KiB tables hang from already: what those lack is unmapped."""
    b = builder(SHADOW, strategy, nx=False)
    for window in (DATA, SECOND):
        b.tables.map(window, DATA_GPA, RWX, 3)
    b.slot(1, DATA_GPA, GIB, (LOG,), host="1G")
    b.warm()
    b.guest(("LOOPW", SECOND + 8, MIB2, 4))
    b.log(1, False)
    b.guest(("R8", DATA + 8), ("R8", DATA + 5 * MIB2))
    b.log(1, True)
    b.guest(("R8", DATA + 8), ("R8", DATA + 5 * MIB2), ("W8", SECOND + MIB2 + 8, 1))
    return b.document()


def odd_words(strategy: str, last: int) -> Document:
    """The slot begins inside a 2 MiB frame, so that a word of the bitmap lies over a boundary: what a clear splits ends before the
    frame of its last page."""
    b = builder(SHADOW, strategy, nx=True)
    for i in range(4):
        b.tables.map(DATA + i * MIB2, DATA_GPA + i * MIB2, RWX, 2)
    b.slot(1, DATA_GPA + 300 * PAGE, 1500 * PAGE, host="2M")
    b.cap(3)
    b.warm()
    b.guest(("LOOPW", DATA + 300 * PAGE + 8, MIB2, 3), ("LOOPW", DATA + MIB2 + 8, MIB2, 2))
    b.log(1, True)
    b.clear(1, 11 * 64, 64, {1023 - 300 - 11 * 64, last - 300 - 11 * 64})
    b.guest(("LOOPW", DATA + MIB2 + 8, 16 * PAGE, 60))
    b.get(1)
    return b.document()


def supervisor_write(strategy: str) -> Document:
    """A read-only page is mapped by a supervisor's write without CR0.WP, and split; then WP is set, and the user reads."""
    b = builder(SHADOW, strategy, nx=True)
    b.tables.map(DATA, DATA_GPA, RX, 2)
    b.slot(1, DATA_GPA, MIB2, host="2M")
    b.data.append(run(DATA_GPA, 512, 0xC3, stride=PAGE))
    b.warm()
    b.mode(wp=False)
    b.guest(("W8", DATA + 8, 1))
    b.log(1, True)
    b.guest(("LOOPW", DATA + 8, 50 * PAGE, 9), ("EXEC", DATA + 70 * PAGE))
    b.mode(cpl=3, wp=False)
    b.guest(("LOOPR", DATA + 8, 40 * PAGE, 9), ("EXEC", DATA + 90 * PAGE), ("W8", DATA + 8, 1))
    b.mode()
    b.guest(("LOOPR", DATA + 8, 40 * PAGE, 9), ("W8", DATA + 8, 1))
    return b.document()


def on_fault(nx: bool) -> Document:
    """The TDP MMU splits what a write or a fetch wants smaller."""
    b = builder(TDP, "cached", nx=nx, on_fault=True, eager=False)
    b.map_data(1024, huge=True)
    b.slot(1, DATA_GPA, 2 * MIB2, host="2M")
    b.data.append(run(DATA_GPA, 1024, 0xC3, stride=PAGE))
    b.warm()
    b.guest(("LOOPW", DATA + 8, MIB2, 2))
    b.guest(("EXEC", DATA), ("EXEC", DATA + PAGE), ("R8", DATA + 9 * PAGE))
    b.log(1, True)
    b.guest(("LOOPR", DATA + 8, 64 * PAGE, 16), ("LOOPW", DATA + 8, 32 * PAGE, 32), ("EXEC", DATA + MIB2 + 5 * PAGE))
    b.get(1)
    b.log(1, False)
    b.guest(("LOOPW", DATA + 8, 64 * PAGE, 16), ("EXEC", DATA))
    return b.document()


SPLIT_NAMED: dict[str, Callable[[], Document]] = {
    **{
        f"split_{strategy}_nx{nx:d}_{name}": lambda strategy=strategy, nx=nx, rights=rights: logged(strategy, nx=nx, rights=rights)
        for strategy in STRATEGIES
        for nx in (False, True)
        for name, rights in (("equal", (RWX, RWX)), ("different", (RWX, RO)))
    },
    **{f"split_at_clear_{strategy}": lambda strategy=strategy: logged(strategy, nx=True, manual=3) for strategy in STRATEGIES},
    **{f"split_no_quota_{strategy}": lambda strategy=strategy: logged(strategy, nx=True, limit=64) for strategy in STRATEGIES[::2]},
    **{f"split_clean_{strategy}": lambda strategy=strategy: logged(strategy, nx=True, rights=(CLEAN, RWX)) for strategy in STRATEGIES},
    **{f"split_unused_{strategy}": lambda strategy=strategy: logged(strategy, nx=False, rights=(RX, UNUSED)) for strategy in STRATEGIES},
    **{f"split_odd_words_{last}": lambda last=last: odd_words("cached", last) for last in (1025, 1030)},
    **{f"split_supervisor_write_{strategy}": lambda strategy=strategy: supervisor_write(strategy) for strategy in STRATEGIES},
    **{f"split_on_fault_nx{nx:d}": lambda nx=nx: on_fault(nx) for nx in (False, True)},
    "split_1g_propagate": lambda: gibibyte("propagate"),
    "split_over_tables": lambda: over_tables("guest-walk"),
}


class SplitChance:
    """A random scenario in the making."""

    def __init__(self, rng: random.Random, kind: str, strategy: str) -> None:
        self.rng = rng
        self.b = builder(
            kind, strategy, nx=rng.random() < 0.6, on_fault=rng.random() < 0.5, eager=rng.random() < 0.9,
            vcpus=2 if rng.random() < 0.2 else 1,
        )  # fmt: skip
        self.lead = rng.choice((0, 0, 0, 3, 300))  # pages before the slot
        self.regions = rng.randrange(2, 5)
        self.pages = self.regions * 512 - self.lead - rng.choice((0, 0, 7))
        self.entries: list[int] = []
        if self.b.paging:
            self.map()
        self.manual = rng.choice((0, 0, 1, 3, 3))
        if self.manual:
            self.b.cap(self.manual)
        b = self.b
        b.slot(1, DATA_GPA + self.lead * PAGE, self.pages * PAGE, host=rng.choice(("2M", "2M", "2M", "4K")))
        b.data.append(run(DATA_GPA + self.lead * PAGE, self.pages, 0xC3, stride=PAGE))
        if rng.random() < 0.2:
            b.limit(rng.randrange(64, 70))
        b.warm()
        for _ in range(rng.randrange(8, 18)):
            self.step()

    def map(self) -> None:
        """Both windows, each region with rights of its own; now and then by one page of 1 GiB."""
        b, rng = self.b, self.rng
        for window in (DATA, SECOND):
            same = rng.choice(RIGHTS) if rng.random() < 0.5 else None
            if rng.random() < 0.1:
                self.entries.append(b.tables.map(window, DATA_GPA, same or rng.choice(RIGHTS), 3))
                continue
            for i in range(self.regions):
                self.entries.append(b.tables.map(window + i * MIB2, DATA_GPA + i * MIB2, same or rng.choice(RIGHTS), 2))

    def place(self) -> int:
        """An address in one of the windows, mostly in the slot."""
        rng, b = self.rng, self.b
        inside = rng.randrange(self.lead, self.lead + self.pages)
        page = rng.choice((self.lead, 512, inside, inside))
        if not b.paging:
            return DATA_GPA + page * PAGE + 8
        return rng.choice((DATA, SECOND)) + page * PAGE + 8

    def step(self) -> None:
        """One step."""
        rng, b = self.rng, self.b
        choice, logging = rng.random(), LOG in b.slots[1]["flags"]
        if choice < 0.55:
            vcpu = rng.randrange(len(b.modes))
            b.guest(*[op for _ in range(rng.randrange(1, 7)) for op in self.op(b.modes[vcpu]["cpl"])], vcpu=vcpu)
        elif choice < 0.75:
            if not logging and rng.random() < 0.8:
                self.sweep()
            b.log(1, not logging)
        elif choice < 0.87 and logging:
            self.collect()
        elif choice < 0.92:
            b.param("nx_huge_pages", rng.choice(("force", "off")))
        elif choice < 0.95 and b.paging:
            b.mode(rng.randrange(len(b.modes)), cpl=rng.choice((0, 3)), wp=rng.random() < 0.7)

    def sweep(self) -> None:
        """Something in each region, so that it is mapped by a huge page if it can be."""
        rng, b = self.rng, self.b
        first = self.lead if self.lead < 8 else 512
        for window in (DATA, SECOND) if b.paging else (DATA_GPA,):
            loop = rng.choice(("LOOPR", "LOOPW"))
            b.guest((loop, window + first * PAGE + 8, MIB2, (self.lead + self.pages - first - 1) // 512 + 1))

    def collect(self) -> None:
        """GET, or CLEAR of a part."""
        rng, b = self.rng, self.b
        if rng.random() < 0.4 or not self.manual:
            b.get(1)
            return
        first = rng.randrange(0, -(-self.pages // 64)) * 64
        count = min(self.pages - first, 64 * rng.randrange(1, 5))
        dense = rng.choice((0.02, 0.2, 1))
        which = {page for page in range(count) if rng.random() < dense}
        b.clear(1, first, count, which or {count - 1})

    def op(self, cpl: int) -> list[tuple[Any, ...]]:
        """An op, or a few that belong together."""
        rng, b = self.rng, self.b
        choice = rng.random()
        if choice < 0.45 or not b.paging:
            stride = rng.choice((PAGE, 3 * PAGE, 64 * PAGE, MIB2))
            return [(rng.choice(("LOOPR", "LOOPW", "LOOPW")), self.place(), stride, rng.randrange(1, 60))]
        if choice < 0.6:
            return [("W8", self.place(), rng.getrandbits(32) << 8 | 0xC3)]
        if choice < 0.8:
            return [("EXEC", self.place() & ~0xFFF)]
        if choice < 0.9:
            at = rng.choice(self.entries)
            value = b.tables.words[at] & ~0xFE7 & ~NX | rng.choice(RIGHTS)
            return [("W8", at, value)] + [("INVLPG", self.place())] * (cpl == 0 and rng.random() < 0.5)
        if cpl:
            return [("R8", self.place())]
        if choice < 0.95:
            return [("CR3", b.tables.root)]
        return [("CR0", CR0_NO_WP), ("W8", self.place(), 1), ("CR0", CR0)]


def random_split_scenario(rng: random.Random) -> Document:
    """A whole document, of any MMU."""
    kind, strategy = rng.choice((SHADOW, SHADOW, SHADOW, SHADOW, NONPAGING, TDP_N, TDP)), rng.choice(STRATEGIES)
    return SplitChance(rng, kind, strategy).b.document()


def random_shadow_split(rng: random.Random) -> Document:
    """A whole document of shadow paging."""
    return SplitChance(rng, SHADOW, "cached").b.document()
