"""Three walks of one history: who checks the permission of a guest mapping, and when the accessed bits are set.

The setting is shadow paging: the processor walks the hypervisor's shadow of the guest's tables, which is empty at first, so that
every first access exits with a page fault whose error code has P=0, and the hypervisor walks the guest's tables. Sources: the mail
of January 2007 ("KVM: MMU: Perform access checks in walk_addr()") and facts 1.6. 4-level paging; W and U are all that was checked.

- after-walk: before the patch. A is set on the way down; the walk checks nothing. The caller checks the leaf alone, and only if the
  fault had P=1: a first fault is always called fixed. What the rights deny then faults again. The error code is the processor's.
- per-level: the patch. Each level is checked after its present test, and its A set after its check; the walk makes the error code.
- once: today. One check with the rights of all levels at the end, then all A bits (`walk_exact`).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from fastmmu._jit import fetch_or, kernel, load
from fastmmu.bits import GPTE64, ONE, PFERR, WORD_SHIFT, ZERO
from fastmmu.memory import find_slot
from fastmmu.paging import LONG4
from fastmmu.replay import count
from fastmmu.state import NO_SLOT, Reg, Walk
from fastmmu.walk import page_gpa, table_index, walk_exact


class Check(IntEnum):
    """Counters of the access-checks experiment, uint64 each."""

    ACCESSES = 0
    EXITS = 1  # page faults that the hypervisor handled
    WALKS = 2  # walks of the guest's tables
    INJECTED = 3  # page faults that the guest got
    WRONG_CODES = 4  # those whose error code is not the architecture's
    WRONG_OUTCOMES = 5  # accesses that completed and must not, or the other way round
    REFAULTS = 6  # faults called fixed that faulted again
    ENDLESS = 7  # accesses that would be called fixed for ever
    ACCESSED_BY_FAILING = 8  # A bits set by accesses that the architecture denies


class Method(IntEnum):
    """Strategies of the experiment, by their number in the state."""

    AFTER_WALK = 0
    PER_LEVEL = 1
    ONCE = 2


@kernel
def permits(gpte, access, write_protect):
    """Whether one entry grants the access, by W and U."""
    user = access & PFERR.U != ZERO
    if access & PFERR.W != ZERO and gpte & GPTE64.W == ZERO and (user or write_protect):
        return False
    return not (user and gpte & GPTE64.U == ZERO)


@kernel
def walk_levels(mem, mmu, stat, denied, gva, access, check):
    """The walk of 2007: with `check` as the patch has it, without as before. Sets A on the way down; the tables must lie in RAM.

    Returns (walk, leaf gpte, AND of all entries); `denied` says that the architecture refuses the access, for the counters.
    """
    table = mmu.reg[Reg.CR3] & LONG4.root
    level = LONG4.levels
    rights = GPTE64.W | GPTE64.U
    write_protect = mmu.reg[Reg.WP] != ZERO
    bits = access & (PFERR.W | PFERR.U)
    count(stat, Check.WALKS)
    while True:
        if find_slot(mem.slots, table) == NO_SLOT:
            return Walk(False, ZERO, level, ZERO, bits), ZERO, rights
        word = (table >> WORD_SHIFT) + table_index(gva, level, LONG4.index_bits)
        gpte = load(mem.words, word)
        if gpte & GPTE64.P == ZERO:
            return Walk(False, ZERO, level, ZERO, bits), ZERO, rights
        if check and not permits(gpte, access, write_protect):
            return Walk(False, ZERO, level, ZERO, PFERR.P | bits), gpte, rights
        if gpte & GPTE64.A == ZERO:
            fetch_or(mem.words, word, GPTE64.A)
            if denied:
                count(stat, Check.ACCESSED_BY_FAILING)
        rights &= gpte
        if level == ONE or gpte & GPTE64.PS != ZERO:
            return Walk(True, page_gpa(LONG4, gpte, gva, level), level, ZERO, ZERO), gpte, rights
        table = gpte & LONG4.root
        level -= ONE


@kernel
def access_after_walk(mem, mmu, stat, denied, gva, access):
    """One access as before the patch; what the guest sees."""
    bits = access & (PFERR.W | PFERR.U)
    write_protect = mmu.reg[Reg.WP] != ZERO
    count(stat, Check.EXITS)
    walk, gpte, rights = walk_levels(mem, mmu, stat, denied, gva, access, False)
    if not walk.ok:
        return walk
    if permits(rights, access, write_protect):
        return walk  # the shadow entry holds the rights of all levels: the processor now completes the access
    count(stat, Check.REFAULTS)
    count(stat, Check.EXITS)
    walk, gpte, rights = walk_levels(mem, mmu, stat, denied, gva, access, False)
    if permits(gpte, access, write_protect):  # the leaf alone: called fixed once more, and nothing has changed
        count(stat, Check.ENDLESS)
    return Walk(False, ZERO, walk.level, ZERO, PFERR.P | bits)


@kernel
def check_accesses(method, mem, mmu, trail, stat, gvas, accesses, truth_ok, truth_pferr, answers):
    """All accesses by one method, each from an empty shadow.

    Args:
        method: a Method. trail: uint64[TRAIL_LENGTH].
        stat: uint64[len(Check)], or None in a timed run; truth_ok, truth_pferr: what the architecture says, by access.
        answers: uint64[n]: gpa, or the error code with bit 63 set.
    """
    for i in range(len(gvas)):
        access = accesses[i]
        denied = not truth_ok[i]
        count(stat, Check.ACCESSES)
        if method == Method.AFTER_WALK:
            walk = access_after_walk(mem, mmu, stat, denied, gvas[i], access)
        else:
            count(stat, Check.EXITS)
            if method == Method.PER_LEVEL:
                walk, _, _ = walk_levels(mem, mmu, stat, denied, gvas[i], access, True)
            else:
                count(stat, Check.WALKS)
                walk = walk_exact(mem, mmu, trail, gvas[i], access)
        answers[i] = walk.gpa if walk.ok else walk.pferr | GPTE64.NX
        if stat is not None:
            judge_access(stat, walk, truth_ok[i], truth_pferr[i])


@kernel
def judge_access(stat, walk, truth_ok, truth_pferr):
    """Compare what the guest sees with what the architecture says."""
    if not walk.ok:
        count(stat, Check.INJECTED)
    if walk.ok != truth_ok:
        count(stat, Check.WRONG_OUTCOMES)
    elif not walk.ok and walk.pferr != np.uint64(truth_pferr):
        count(stat, Check.WRONG_CODES)
