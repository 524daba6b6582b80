"""The mmu lock: many readers or one writer, a spin lock (facts section 10).

Faults of the TDP MMU read-lock it, all other changes of sptes write-lock it. The word holds the number of readers, or WRITER. Who
must wait pauses longer each time, up to a bound. Other words of the VM follow what the lock protects; a vCPU's own words need none.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import cmpxchg, cycles, fetch_add, fetch_sub, inner, load, pause, store
from fastmmu.bits import ONE, ZERO, bit
from fastmmu.machine_state import Counter, VmWord

WRITER = bit(63)
MOST_PAUSES = 64
LOCK, POOL, WAITERS = np.uint64(VmWord.MMU_LOCK), np.uint64(VmWord.POOL_LOCK), np.uint64(VmWord.LOCK_WAITERS)
MOST_YIELDS = 1000


@inner
def back_off(pauses):
    """Wait a little; returns for how long the next time."""
    for _ in range(pauses):
        pause()
    return min(pauses + pauses, MOST_PAUSES)


@inner
def now(word):
    """The time in cycles, where anybody wants to know."""
    return np.int64(cycles()) if word[VmWord.LOCK_TIMED] != ZERO else 0


@inner
def taken(word, stat, asked):
    """The lock was asked for at cycle `asked`, and is held from now on."""
    since = now(word)
    stat[Counter.LOCK_TAKEN] += 1
    stat[Counter.LOCK_WAITED] += since - asked
    stat[Counter.LOCK_HELD] -= since


@inner
def lock_for_reading(word, stat):
    """Wait until no writer has the lock."""
    asked = now(word)
    seen = load(word, LOCK)
    if seen & WRITER != ZERO or cmpxchg(word, LOCK, seen, seen + ONE) != seen:
        wait_for_reading(word)
    taken(word, stat, asked)


@inner
def wait_for_reading(word):
    """The same, once a writer has it, or another reader was faster."""
    fetch_add(word, WAITERS, ONE)
    pauses = 1
    while True:
        seen = load(word, LOCK)
        if seen & WRITER == ZERO and cmpxchg(word, LOCK, seen, seen + ONE) == seen:
            break
        pauses = back_off(pauses)
    fetch_sub(word, WAITERS, ONE)


@inner
def unlock_for_reading(word, stat):
    """One reader less."""
    stat[Counter.LOCK_HELD] += now(word)
    fetch_sub(word, LOCK, ONE)


@inner
def lock_for_writing(word, stat):
    """Wait until nobody has the lock."""
    asked = now(word)
    if cmpxchg(word, LOCK, ZERO, WRITER) != ZERO:
        wait_for_writing(word)
    taken(word, stat, asked)


@inner
def wait_for_writing(word):
    """The same, once somebody has it."""
    fetch_add(word, WAITERS, ONE)
    pauses = 1
    while cmpxchg(word, LOCK, ZERO, WRITER) != ZERO:
        pauses = back_off(pauses)
    fetch_sub(word, WAITERS, ONE)


@inner
def unlock_for_writing(word, stat):
    """Nobody has it any more."""
    stat[Counter.LOCK_HELD] += now(word)
    store(word, LOCK, ZERO)


@inner
def is_contended(word):
    """Whether somebody waits for the lock."""
    return load(word, WAITERS) != ZERO


@inner
def yield_lock(word, stat, reading):
    """Drop the lock, which is held for `reading` or for writing, and take it again after who waits for it now: KVM's is handed on
    in turn."""
    if reading:
        unlock_for_reading(word, stat)
    else:
        unlock_for_writing(word, stat)
    for _ in range(MOST_YIELDS):
        if not is_contended(word) or load(word, LOCK) != ZERO:
            break
        pause()
    if reading:
        lock_for_reading(word, stat)
    else:
        lock_for_writing(word, stat)


@inner
def lock_pool(word):
    """The lock of the pool of tables, held for a few words only."""
    pauses = 1
    while cmpxchg(word, POOL, ZERO, ONE) != ZERO:
        pauses = back_off(pauses)


@inner
def unlock_pool(word):
    """Nobody has it any more."""
    store(word, POOL, ZERO)
