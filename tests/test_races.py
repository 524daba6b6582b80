"""The race explorer: it tries every order, finds the races that are there, and the shipped code has none."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from fastmmu import _jit
from fastmmu._jit import JIT
from fastmmu.races import RACES
from fastmmu.races.explore import Explorer, Found
from fastmmu.races.programs import PROGRAMS
from fastmmu.races.turns import Shared, Turns

INTERPRETED = pytest.mark.skipif(JIT, reason="the explorer needs the interpreter")
Step = Callable[[Shared], None]


def explore(
    steps: list[Step], check: Callable[[np.ndarray], str], words: int = 4, first: dict[int, int] | None = None
) -> tuple[Found, list[np.ndarray]]:
    """Small threads over a few words, zero but for those in `first`; the words at the end of each order."""
    raw, turns, ends = np.zeros(words, np.uint64), Turns(len(steps)), []
    shared = Shared("word", raw, turns, lambda index: True)

    def reset() -> list[Callable[[], None]]:
        raw[:] = 0
        for at, value in (first or {}).items():
            raw[at] = value
        return [lambda step=step: step(shared) for step in steps]

    def checked() -> str:
        ends.append(raw.copy())
        return check(raw)

    waiting = [] if JIT else _jit.waiting
    waiting[:] = [turns.pause]
    try:
        return Explorer(turns, reset, checked).explore(100_000), ends
    finally:
        waiting.clear()
        turns.end()


def adds(times: int = 1, at: int = 0) -> Step:
    def step(words: Shared) -> None:
        for _ in range(times):
            words[at] = words[at] + np.uint64(1)

    return step


def adds_atomically(words: Shared) -> None:
    words.modify(0, np.uint64(1), lambda seen, value: seen + value)


def test_an_update_that_is_lost_is_found() -> None:
    found, _ = explore([adds(), adds()], lambda words: "" if words[0] == 2 else "lost")
    assert found.wrong and found.message == "lost"
    assert found.choices in ([0, 1, 1, 0], [1, 0, 0, 1])  # two changes of turn: there is nothing shorter


def test_an_atomic_update_is_not_lost() -> None:
    found, _ = explore([adds_atomically] * 3, lambda words: "" if words[0] == 3 else "lost")
    assert (found.orders, found.wrong) == (6, 0)


def test_threads_that_share_nothing_have_one_order() -> None:
    found, _ = explore([adds(5, 0), adds(5, 1), adds(5, 2)], lambda words: "")
    assert found.orders == 1


@pytest.mark.parametrize("threads", [2, 3])
def test_every_result_that_any_order_has_is_reached(threads: int) -> None:
    """Against all orders by brute force: threads of random reads and writes over two words."""
    rng = np.random.default_rng(threads)
    for _ in range(20):
        plans = [
            [(bool(rng.integers(2)), int(rng.integers(2)), int(rng.integers(1, 9))) for _ in range(4 if threads == 2 else 2)]
            for _ in range(threads)
        ]
        steps = [lambda words, plan=plan, number=number: follow(plan, words, 2 + number) for number, plan in enumerate(plans)]
        _, ends = explore(steps, lambda words: "", 2 + threads)
        expected = {
            by_hand(plans, order)
            for order in set(itertools.permutations([number for number, plan in enumerate(plans) for _ in plan]))
        }
        assert {tuple(end.tolist()) for end in ends} == expected


def follow(plan: list[tuple[bool, int, int]], words: Shared | list[int], own: int) -> None:
    """A thread of the test above: writes go to a shared word, reads are gathered in a word of its own."""
    for writes, at, value in plan:
        if writes:
            words[at] = np.uint64(value)
        else:
            words.words[own] = words.words[own] * np.uint64(10) + words[at]


def by_hand(plans: list[list[tuple[bool, int, int]]], order: tuple[int, ...]) -> tuple[int, ...]:
    """The words after one order."""
    words, at_step = [0] * (2 + len(plans)), [0] * len(plans)
    for number in order:
        writes, at, value = plans[number][at_step[number]]
        at_step[number] += 1
        if writes:
            words[at] = value
        else:
            words[2 + number] = words[2 + number] * 10 + words[at]
    return tuple(words)


def test_a_thread_that_waits_is_not_run_for_ever() -> None:

    def waits(words: Shared) -> None:
        while words[0] == 0:
            words.turns.pause()
        words[1] = np.uint64(1)

    def sets(words: Shared) -> None:
        words[0] = np.uint64(1)

    found, _ = explore([waits, sets], lambda words: "" if words[1] == 1 else "not woken")
    assert found.orders == 2 and not found.wrong
    found, _ = explore([waits, waits], lambda words: "")
    assert found.message == "every thread waits for another one"


def test_an_error_in_a_thread_is_told() -> None:
    def fails(words: Shared) -> None:
        words[99] = np.uint64(1)

    found, _ = explore([fails, adds()], lambda words: "")
    assert found.wrong == found.orders and "IndexError" in found.message


def test_names() -> None:
    assert tuple(PROGRAMS) == RACES


@INTERPRETED
@pytest.mark.parametrize("name", RACES)
def test_a_guard_is_needed_and_enough(name: str) -> None:
    from fastmmu.races.report import explore as explore_program

    program = PROGRAMS[name]
    inside = explore_program(program, guarded=True)
    assert inside.as_it_should and inside.found.orders > 2
    if program.guard:
        outside = explore_program(program, guarded=False)
        assert outside.as_it_should and len(outside.schedule) > 2


@pytest.mark.parametrize(("names", "status", "last"), [(["zap"], 0, "2 of 2 as they should be"), (["zap", "nonsense"], 2, "")])
def test_the_command(names: list[str], status: int, last: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    run = subprocess.run([sys.executable, "-m", "fastmmu", "races", *names], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == status
    assert (run.stdout.splitlines() or [""])[-1].startswith(last)
    assert "Traceback" not in run.stderr
    if status:
        assert run.stderr.startswith("error: races: 'nonsense'") and len(run.stderr.splitlines()) == 1
