"""Three floors around a device page: L2 touches it, L1 has mapped it, the device model sits in L0 (facts 2.2 to 2.4).

L1's table EPT12 lies in L1's memory; L0's own table EPT02, which the processor walks while L2 runs, in L0's. Both are real tables,
walked by `ept.walk_ept`. EPT02 never grants anything here: a device page has no memslot, so that its entry is empty, which is a
violation, or an MMIO spte, which is a misconfiguration. Only a violation has an exit qualification; L0 keeps the last one, as
Linux did up to about 6.8. Where EPT12 does not grant the access L0 hands the exit to L1, with a qualification whose access bits
are, by strategy,

- stale: those kept from the last violation, though the exit at hand may have been a misconfiguration;
- derived: those of the walk of EPT12 that failed (the patch of 2018).

An access is tried again and again, as a processor does. It never completes if the whole state recurs: nothing else acts meanwhile,
so that the same would follow for ever. The state is L1's entry, L0's entry, the qualification kept, and the memslot generation.

Left out: L2's own page tables (its linear addresses are its physical ones), accessed and dirty flags in EPT12, the exits that L1
itself causes when it writes its table and resumes L2, and what an emulator does with the bytes that a fetch finds in a device.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from fastmmu._jit import inner, kernel
from fastmmu.bits import EPT, MMIO_SPTE, ONE, PAGE_SHIFT, QUALIFICATION, ZERO
from fastmmu.ept import MISCONFIGURATION, RIGHTS, VIOLATION, count, walk_ept
from fastmmu.machine_state import VmWord
from fastmmu.spte import make_mmio, mmio_generation
from fastmmu.state import EptState, MemoryState

ACCESS = QUALIFICATION.R | QUALIFICATION.W | QUALIFICATION.X
LINEAR = QUALIFICATION.LINEAR | QUALIFICATION.FINAL
NEVER = ONE  # bit of an answer: the access never completes. The number of tries stands above it.
MOST_STATES = 24
"""Different states during one access, at most: L1 only adds rights (4 values); L0's entry is empty, an MMIO spte of an older
generation or one of today's (3); the first violation decides what is kept (2)."""


class Floor(IntEnum):
    """Words of the three floors, uint64 each."""

    STRATEGY = 0  # a Told
    POLICY = 1  # of L1: a Grant
    EXECUTE_ONLY = 2  # 1 where L1's EPT may have entries with X alone
    SAVED = 3  # of the last violation: access bits, and bits 8:7; L0 reads no other
    LOGGED = 4  # rows of the log in use


class Told(IntEnum):
    """Where the access bits come from that L1 is told."""

    STALE = 0
    DERIVED = 1


class Grant(IntEnum):
    """What L1 does with a violation: it adds the rights that it is told of."""

    EXACT = 0
    WRITE_WITH_READ = 1  # and W wherever R is, as Linux has done for device memory since a340b3e229b2


class Act(IntEnum):
    """What happens next, outside L0's and L1's will."""

    ACCESS = 0  # L2 accesses a device page; the value is 1 read, 2 write, 4 fetch
    MEMSLOTS = 1  # user space of L0 changes a memslot: MMIO sptes become old
    ELSEWHERE = 2  # a violation at another page, which L0 handles; the value is its qualification


STALE, WRITE_WITH_READ = np.uint64(Told.STALE), np.uint64(Grant.WRITE_WITH_READ)
AN_ACCESS, NEW_MEMSLOTS = np.uint64(Act.ACCESS), np.uint64(Act.MEMSLOTS)

ACT = np.dtype([("act", np.uint64), ("value", np.uint64), ("gfn", np.uint64)])
"""One act; `gfn` is the page of L2, from 0."""


class Tally(IntEnum):
    """Counters, uint64 each."""

    ACCESSES = 0
    COMPLETED = 1
    NEVER_COMPLETED = 2
    VIOLATIONS = 3  # exits of L2 at a device page
    MISCONFIGURATIONS = 4
    INJECTED = 5  # violations handed to L1
    INJECTED_MISCONFIGURATIONS = 6
    GRANTS = 7  # writes of L1 to EPT12, each of which drops L0's entry
    UNCHANGED = 8  # violations from which L1 learnt nothing new
    EPT12_WALKS = 9
    MMIO_SPTES = 10  # made


class Event(IntEnum):
    """Steps of the log."""

    VIOLATION = 0
    MISCONFIGURATION = 1
    OLD_GENERATION = 2  # the MMIO spte is of another generation: the slow path
    FAULT_WALK = 3  # L0's fault handler walks EPT12
    EMULATOR_WALK = 4
    MMIO_SPTE = 5
    INJECTED = 6
    INJECTED_MISCONFIGURATION = 7
    GRANTED = 8
    UNCHANGED = 9
    COMPLETED = 10
    RECURRED = 11
    MEMSLOTS = 12
    ELSEWHERE = 13


LOG = np.dtype([
    ("event", np.uint64), ("access", np.uint64), ("qualification", np.uint64),
    ("ok", np.uint64), ("rights", np.uint64), ("spte", np.uint64), ("saved", np.uint64),
])  # fmt: skip
"""One step: what was asked for, the qualification where there is one, whether a walk succeeded; and the state after it."""


class House(NamedTuple):
    """The three floors. Pages of L2 are numbered from 0; L1's and L0's entries for them stand in a row."""

    l1: MemoryState  # L1's memory: EPT12; no memslot of L0 covers the device behind it
    l0: MemoryState  # L0's own: EPT02
    ept12: EptState
    ept02: EptState
    trail: np.ndarray  # uint64[TRAIL_LENGTH]
    floor: np.ndarray  # uint64[len(Floor)]
    word: np.ndarray  # uint64[len(VmWord)]: the masks of L0's sptes, and the memslot generation
    leaf12: np.uint64  # index in l1.words of the entry for page 0
    leaf02: np.uint64  # in l0.words
    device: np.uint64  # the address in L1's memory of the device behind page 0
    pages: np.uint64


@inner
def note(house, log, event, gfn, access, qualification, ok):
    """Write a step into the log, where there is one and while there is room."""
    if log is None:
        return
    at = house.floor[Floor.LOGGED]
    if at >= np.uint64(len(log)):
        return
    row = log[at]
    row["event"], row["access"], row["qualification"] = event, access, qualification
    row["ok"] = ONE if ok else ZERO
    row["rights"] = house.l1.words[house.leaf12 + gfn] & RIGHTS
    row["spte"] = house.l0.words[house.leaf02 + gfn]
    row["saved"] = house.floor[Floor.SAVED]
    house.floor[Floor.LOGGED] = at + ONE


@inner
def extend(house, stat, log, gfn, told):
    """L1 handles a violation: it adds to its entry what it is told, and what makes the entry one that a processor takes."""
    at = house.leaf12 + gfn
    before = house.l1.words[at] & RIGHTS
    rights = before | told
    if rights & EPT.W != ZERO or (rights & EPT.X != ZERO and house.floor[Floor.EXECUTE_ONLY] == ZERO):
        rights |= EPT.R  # W alone is a misconfiguration, and so is X where the processor has no execute-only pages
    if rights & EPT.R != ZERO and house.floor[Floor.POLICY] == WRITE_WITH_READ:
        rights |= EPT.W
    if rights == before:
        count(stat, Tally.UNCHANGED, ONE)
        note(house, log, Event.UNCHANGED, gfn, told, ZERO, False)
        return
    house.l1.words[at] = (house.device + (gfn << PAGE_SHIFT)) | rights
    house.l0.words[house.leaf02 + gfn] = ZERO  # L1's tables are write-protected: L0 sees the write, and drops its own entry
    count(stat, Tally.GRANTS, ONE)
    note(house, log, Event.GRANTED, gfn, told, ZERO, True)


@inner
def inject(house, stat, log, gfn, walk):
    """L0 hands a failed walk of EPT12 to L1 (facts 2.3), and L1 handles it."""
    if walk.reason == MISCONFIGURATION:
        count(stat, Tally.INJECTED_MISCONFIGURATIONS, ONE)
        note(house, log, Event.INJECTED_MISCONFIGURATION, gfn, ZERO, ZERO, False)
        return  # L1 knows of no misconfiguration in its tables: it changes nothing
    saved = house.floor[Floor.SAVED]
    told = (saved if house.floor[Floor.STRATEGY] == STALE else walk.qualification) & ACCESS
    qualification = told | (walk.qualification & QUALIFICATION.RIGHTS) | (saved & LINEAR)
    count(stat, Tally.INJECTED, ONE)
    note(house, log, Event.INJECTED, gfn, told, qualification, False)
    extend(house, stat, log, gfn, told)


@inner
def walk_ept12(house, stat, log, event, gfn, access):
    """L0 walks L1's table for an access to L2's page."""
    walk = walk_ept(house.l1, house.ept12, house.trail, None, gfn << PAGE_SHIFT, access, False, False)
    count(stat, Tally.EPT12_WALKS, ONE)
    note(house, log, event, gfn, access, walk.qualification, walk.ok)
    return walk


@inner
def handle_fault(house, stat, log, gfn, access):
    """L0's fault handler: walk EPT12; where it grants the access, remember in EPT02 that a device is there. Returns the walk."""
    walk = walk_ept12(house, stat, log, Event.FAULT_WALK, gfn, access)
    if walk.ok:
        house.l0.words[house.leaf02 + gfn] = make_mmio(house.word, walk.hpa >> PAGE_SHIFT, ZERO)
        count(stat, Tally.MMIO_SPTES, ONE)
        note(house, log, Event.MMIO_SPTE, gfn, access, ZERO, True)
    return walk


@inner
def try_access(house, stat, log, gfn, access):
    """L2 tries an access once, which leaves it; whether L0 has emulated it."""
    seen = walk_ept(house.l0, house.ept02, house.trail, None, gfn << PAGE_SHIFT, access, False, False)
    if seen.reason == VIOLATION:
        house.floor[Floor.SAVED] = seen.qualification & (ACCESS | LINEAR)
        count(stat, Tally.VIOLATIONS, ONE)
        note(house, log, Event.VIOLATION, gfn, access, seen.qualification, False)
        walk = handle_fault(house, stat, log, gfn, access)
        if not walk.ok:
            inject(house, stat, log, gfn, walk)
            return False
    else:
        count(stat, Tally.MISCONFIGURATIONS, ONE)
        note(house, log, Event.MISCONFIGURATION, gfn, access, ZERO, False)
        spte = house.l0.words[house.leaf02 + gfn]
        if mmio_generation(spte) != house.word[VmWord.GENERATION] & MMIO_SPTE.GENERATION:
            note(house, log, Event.OLD_GENERATION, gfn, access, ZERO, False)
            walk = handle_fault(house, stat, log, gfn, ZERO)  # a misconfiguration does not say which access it was (facts 2.2)
            if not walk.ok:
                inject(house, stat, log, gfn, walk)
                return False
    # The emulator asks for itself; the walk for a nested guest always asks for R too (facts 2.3, rule 3).
    walk = walk_ept12(house, stat, log, Event.EMULATOR_WALK, gfn, access | EPT.R)
    if not walk.ok:
        inject(house, stat, log, gfn, walk)
        return False
    return True


@inner
def recurs(house, seen, tries, gfn):
    """Index of the try that began in today's state, or `tries`, and then today's state is written there."""
    rights, spte = house.l1.words[house.leaf12 + gfn], house.l0.words[house.leaf02 + gfn]
    saved, generation = house.floor[Floor.SAVED], house.word[VmWord.GENERATION]
    at = ZERO
    while at < tries:
        if seen[at, 0] == rights and seen[at, 1] == spte and seen[at, 2] == saved and seen[at, 3] == generation:
            return at
        at += ONE
    seen[tries, 0], seen[tries, 1], seen[tries, 2], seen[tries, 3] = rights, spte, saved, generation
    return tries


@inner
def access_device(house, stat, log, seen, gfn, access):
    """L2 tries an access until it completes, or the state recurs; returns the number of tries, times 2, and NEVER."""
    count(stat, Tally.ACCESSES, ONE)
    tries = ZERO
    while True:
        since = recurs(house, seen, tries, gfn)
        if since != tries:
            count(stat, Tally.NEVER_COMPLETED, ONE)
            note(house, log, Event.RECURRED, gfn, access, since, False)
            return (tries << ONE) | NEVER
        tries += ONE
        if try_access(house, stat, log, gfn, access):
            count(stat, Tally.COMPLETED, ONE)
            note(house, log, Event.COMPLETED, gfn, access, ZERO, True)
            return tries << ONE


@inner
def change_memslots(house):
    """A new memslot generation; when its part in MMIO sptes wraps around, all shadow entries go (facts 3.4.6)."""
    house.word[VmWord.GENERATION] += ONE
    if house.word[VmWord.GENERATION] & MMIO_SPTE.GENERATION == ZERO:
        gfn = ZERO
        while gfn < house.pages:
            house.l0.words[house.leaf02 + gfn] = ZERO
            gfn += ONE


@kernel
def run_acts(house, stat, log, seen, acts, answers):
    """All acts, in their order. An access that never completes is given up, and the next act follows.

    Args:
        house: House.
        stat: uint64[len(Tally)], or None in a timed run.
        log: LOG[any length], or None.
        seen: uint64[MOST_STATES, 4], working space.
        acts: ACT[n].
        answers: uint64[n]: as `access_device`; 0 for other acts.
    """
    for i in range(len(acts)):
        act, value, gfn = acts[i]["act"], acts[i]["value"], acts[i]["gfn"]
        if act == AN_ACCESS:
            answers[i] = access_device(house, stat, log, seen, gfn, value)
            continue
        answers[i] = ZERO
        if act == NEW_MEMSLOTS:
            change_memslots(house)
            note(house, log, Event.MEMSLOTS, gfn, ZERO, ZERO, True)
        else:
            house.floor[Floor.SAVED] = value & (ACCESS | LINEAR)
            note(house, log, Event.ELSEWHERE, gfn, value & ACCESS, value, False)
