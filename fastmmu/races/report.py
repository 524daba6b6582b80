"""The explorer's answers as text: one line for each build of a program, and the shortest wrong order as two or three columns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from fastmmu import _jit, guards
from fastmmu.machine_state import PER_VCPU, VmWord
from fastmmu.races.explore import Explorer, Found, replay
from fastmmu.races.programs import LEAF, OTHER, PAGE, PROGRAMS, Program, Stage
from fastmmu.races.turns import Done, Place, Shared, Turns

MOST_ORDERS = 200_000
WIDTH = 62


@dataclass(frozen=True)
class Outcome:
    """What one build of a program came to; `schedule` is the shortest wrong order."""

    program: Program
    guarded: bool
    found: Found
    seconds: float
    schedule: tuple[str, ...]

    @property
    def as_it_should(self) -> bool:
        """No order is wrong with the guard, one at least without it; and every order was tried."""
        return (self.found.wrong == 0) == self.guarded and self.found.orders < MOST_ORDERS

    def text(self) -> str:
        """One line."""
        guard = self.program.guard or "no guard"
        state = f"{guard} in" if self.guarded else f"{guard} out"
        rate = self.found.orders / max(self.seconds, 1e-9) * 60
        wrong = "all right" if self.found.wrong == 0 else f"{self.found.wrong:,} wrong: {self.found.message}"
        return f"  {state}: {self.found.orders:,} orders, {wrong} ({self.seconds:.1f} s, {rate:,.0f} orders a minute)"


def explore(program: Program, *, guarded: bool) -> Outcome:
    """Explore one build of a program."""
    stage, turns = program.stage(), Turns(len(program.threads))
    vm = stage.watched(lambda name, words, shares: Shared(name, words, turns, shares))

    def reset() -> list[Callable[[], None]]:
        stage.restore()
        return [lambda step=step: step(stage, vm) for _, step in program.threads]

    begin = time.perf_counter()
    _jit.waiting[:] = [turns.pause]
    if program.guard:
        setattr(guards, program.guard, guarded)
    try:
        found = Explorer(turns, reset, lambda: program.check(stage)).explore(MOST_ORDERS)
        seconds = time.perf_counter() - begin
        schedule = () if found.choices is None else columns(program, stage, replay(turns, reset(), found.choices))
    finally:
        if program.guard:
            setattr(guards, program.guard, True)
        _jit.waiting.clear()
        turns.end()
    return Outcome(program, guarded, found, seconds, tuple(schedule))


def columns(program: Program, stage: Stage, steps: list[Done]) -> list[str]:
    """A column for each thread, a line for each step, in time order. Steps on words that only one thread touches, or that all of
    them only read, are left out: nobody sees in which order they come."""
    touched: dict[Place, set[int]] = {}
    for step in steps:
        touched.setdefault(step.access.place, set()).add(step.thread)
    for place in touched:
        if not any(step.access.writes for step in steps if step.access.place == place):
            touched[place] = set()
    lines = ["  " + "".join(label.ljust(WIDTH) for label, _ in program.threads).rstrip()]
    for step in steps:
        if len(touched[step.access.place]) > 1:
            lines.append("  " + (" " * WIDTH * step.thread + described(stage, step)))
    return lines


def described(stage: Stage, step: Done) -> str:
    """One step: the function, the word, what it saw and left."""
    name = named(stage, step.access.place)
    if not step.access.writes:
        return f"{step.function}: {name} is {step.seen:#x}"
    if step.access.kind == "cmpxchg" and step.seen == step.left:
        return f"{step.function}: {name} is {step.seen:#x}, exchange fails"
    if step.seen == step.left:
        return f"{step.function}: {name} stays {step.seen:#x}"
    return f"{step.function}: {name} {step.seen:#x} -> {step.left:#x}"


def named(stage: Stage, place: Place) -> str:
    """A shared word in words."""
    array, index = place
    if array == "slot_words":
        return f"{stage.bitmaps[index]} bitmap"
    if array == "memory":
        known = {int(PAGE) >> 3: "the page", int(OTHER) >> 3: "the other page", LEAF >> 3: "gpte"}
        return known.get(index, f"memory word {index:#x}")
    if array == "spt":
        return f"spte {index:#x}"
    for word in (VmWord.MMU_LOCK, VmWord.POOL_LOCK):
        if index == word:
            return word.name.lower().replace("_", " ")
    vcpu, which = divmod(index - VmWord.REQUESTS, PER_VCPU)
    return f"{('requests', 'running')[which]} of vCPU {vcpu}" if which < 2 else f"word {index}"


def explore_all(names: Iterable[str], show: Callable[[str], object]) -> bool:
    """Explore programs, guard in and guard out; whether all of it came out as it should."""
    with np.errstate(over="ignore"):
        outcomes = []
        for name in names:
            program = PROGRAMS[name]
            show(f"{name}: {program.question}")
            for guarded in (True, False) if program.guard else (True,):
                outcome = explore(program, guarded=guarded)
                outcomes.append(outcome)
                show(outcome.text())
                for line in outcome.schedule:
                    show(line)
    good = sum(outcome.as_it_should for outcome in outcomes)
    orders, seconds = sum(outcome.found.orders for outcome in outcomes), sum(outcome.seconds for outcome in outcomes)
    show(f"{good} of {len(outcomes)} as they should be, {orders:,} orders in {seconds:.1f} s")
    return good == len(outcomes)
