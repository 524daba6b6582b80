"""What keeps threads apart, in every order of their steps: the mmu lock, frozen entries, waits for who reads without lock."""

from __future__ import annotations

import numpy as np
import pytest
from test_races import INTERPRETED, Step, explore

from fastmmu._jit import cmpxchg, exchange, load, store
from fastmmu.bits import FROZEN, ONE, ZERO
from fastmmu.lock import lock_for_reading, lock_for_writing, unlock_for_reading, unlock_for_writing
from fastmmu.machine_state import Counter, Running, VmWord
from fastmmu.pool import FIRST_REQUEST, allocate, flush_remote, reclaim, release
from fastmmu.races.programs import TDP, machine_of
from fastmmu.races.turns import Shared
from fastmmu.tdp import freeze, try_set_spte

pytestmark = INTERPRETED
WORDS = int(FIRST_REQUEST) + 8
READERS, WRITERS, WRONG, WRITTEN, TABLE, CONTENT = range(WORDS, WORDS + 6)  # words of the tests, behind those of a VM
SEEN = WORDS + 6
SPTE = np.uint64(0xABC000)


def add(words: Shared, at: int, by: int) -> None:
    """Atomically: what is tested is not this."""
    words.modify(at, np.uint64(by % 2**64), lambda seen, value: np.uint64((int(seen) + int(value)) % 2**64))


def reads(words: Shared) -> None:
    stat = np.zeros(len(Counter), np.int64)
    lock_for_reading(words, stat)
    add(words, READERS, 1)
    if load(words, WRITERS) != ZERO:
        store(words, WRONG, ONE)
    add(words, READERS, -1)
    unlock_for_reading(words, stat)


def writes(words: Shared) -> None:
    stat = np.zeros(len(Counter), np.int64)
    lock_for_writing(words, stat)
    add(words, WRITERS, 1)
    if load(words, WRITERS) != ONE or load(words, READERS) != ZERO:
        store(words, WRONG, ONE)
    add(words, WRITERS, -1)
    unlock_for_writing(words, stat)
    add(words, WRITTEN, 1)


@pytest.mark.parametrize("steps", [(writes, writes), (reads, writes), (reads, reads, writes)], ids=lambda steps: "-".join(step.__name__ for step in steps))
def test_a_writer_is_alone(steps: tuple[Step, ...]) -> None:
    def check(words: np.ndarray) -> str:
        free = words[VmWord.MMU_LOCK] == 0 and words[WRITTEN] == steps.count(writes)
        return "not alone" if words[WRONG] else "" if free else "the lock is not free"

    found, _ = explore(list(steps), check, SEEN + 1)
    assert found.orders >= 2 and not found.wrong, found.message


def test_readers_are_together() -> None:
    def meets(words: Shared) -> None:
        lock_for_reading(words, np.zeros(len(Counter), np.int64))
        add(words, READERS, 1)
        if load(words, READERS) == ONE + ONE:
            store(words, SEEN, ONE)

    _, ends = explore([meets, meets], lambda words: "", SEEN + 1)
    assert any(end[SEEN] for end in ends)


def test_an_entry_that_another_thread_removes_is_waited_for() -> None:
    def removes(words: Shared) -> None:
        if cmpxchg(words, TABLE, ZERO, FROZEN) == ZERO:
            store(words, TABLE, SPTE)

    def frees(words: Shared) -> None:
        words.words[SEEN] = freeze(words, np.uint64(TABLE))

    found, ends = explore([removes, frees], lambda words: "" if words[TABLE] == FROZEN and words[SEEN] != FROZEN else "not frozen", SEEN + 1)
    assert not found.wrong, found.message
    assert {int(end[SEEN]) for end in ends} == {0, int(SPTE)}


def test_nothing_takes_the_place_of_a_frozen_entry() -> None:
    machine = machine_of(TDP)
    machine.vm.spt[7] = FROZEN
    stat = machine.state.stat[0]
    assert not try_set_spte(machine.vm, stat, np.uint64(7), ONE, FROZEN, SPTE)
    assert machine.vm.spt[7] == FROZEN and stat[Counter.EXCHANGE_FAILED] == 0


def test_who_reads_without_lock_is_waited_for() -> None:
    """A table is taken away and used for something else: who goes down by it meanwhile does not see that."""

    def reader(words: Shared) -> None:
        exchange(words, FIRST_REQUEST + ONE, np.uint64(Running.READING))
        if load(words, TABLE) != ZERO:
            words.words[SEEN] = load(words, CONTENT)
        store(words, FIRST_REQUEST + ONE, np.uint64(Running.KVM))

    def remover(words: Shared) -> None:
        store(words, TABLE, ZERO)
        flush_remote(words, np.zeros(len(Counter), np.int64))
        store(words, CONTENT, SPTE)

    first = {VmWord.VCPUS: 1, VmWord.THREADS: 1, TABLE: 1, CONTENT: 5}
    found, ends = explore([reader, remover], lambda words: "" if words[SEEN] in (0, 5) else "used already", SEEN + 1, first)
    assert not found.wrong, found.message
    assert {int(end[SEEN]) for end in ends} == {0, 5}


def test_tables_are_free_when_nobody_can_read_them_any_more() -> None:
    machine = machine_of(TDP)
    vm, stat = machine.vm, machine.state.stat[0]
    vm.word[VmWord.THREADS] = 2
    table = allocate(vm, ZERO, ONE)
    release(vm, table)
    assert allocate(vm, ZERO, ONE) != table
    reclaim(vm, stat)
    assert allocate(vm, ZERO, ONE) == table
