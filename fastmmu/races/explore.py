"""All orders in which threads can take their steps, but one of each kind: two orders are alike if they differ only in steps that do
not touch the same word.

Dynamic partial-order reduction with source sets and sleep sets (Abdulla, Aronis, Jonsson and Sagonas, 2014): an order is run to its
end; where an access raced with an earlier step of another thread, whatever must come before it, or it itself, is tried in the place
of that step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from fastmmu.races.turns import Access, Done, Place, Turns


@dataclass
class Node:
    """One state of the order that is run: who can go on, who goes on, who has been tried, and who need not be tried again."""

    enabled: dict[int, Access]
    thread: int
    sleep: dict[int, Access]
    todo: set[int]
    done: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Step:
    """An access that was done: by which thread, its how many-th, and what happened before it, by thread."""

    thread: int
    access: Access
    number: int
    clock: tuple[int, ...]

    def before(self, clock: tuple[int, ...] | list[int]) -> bool:
        """Whether it happened before a step with that clock."""
        return clock[self.thread] >= self.number


@dataclass
class Found:
    """What the exploration came to: orders run to their end, how many of them broke the invariant, and the shortest of those."""

    orders: int = 0
    wrong: int = 0
    steps: int = 0
    choices: list[int] | None = None
    message: str = ""


def conflict(one: Access, other: Access) -> bool:
    """Whether the order of two accesses matters."""
    return one.place == other.place and (one.writes or other.writes)


class Clocks:
    """Which steps happened before which: vector clocks, by thread and by word."""

    def __init__(self, threads: int) -> None:
        self.thread = [[0] * threads for _ in range(threads)]
        self.written: dict[Place, list[int]] = {}
        self.read: dict[Place, list[int]] = {}

    def advance(self, thread: int, access: Access) -> Step:
        """The thread does an access."""
        clock = self.thread[thread]
        seen = [self.written.get(access.place)] + ([self.read.get(access.place)] if access.writes else [])
        for other in seen:
            if other is not None:
                clock[:] = map(max, clock, other)
        clock[thread] += 1
        if access.writes:
            self.written[access.place] = clock.copy()
            self.read.pop(access.place, None)
        else:
            before = self.read.get(access.place)
            self.read[access.place] = clock.copy() if before is None else list(map(max, before, clock))
        return Step(thread, access, clock[thread], tuple(clock))


class Explorer:
    """Runs a program of a few threads in every order that can make a difference."""

    def __init__(self, turns: Turns, reset: Callable[[], list[Callable[[], None]]], check: Callable[[], str]) -> None:
        self.turns, self.reset, self.check = turns, reset, check
        self.found = Found()
        self.stack: list[Node] = []
        self.trace: list[Step] = []  # of the order that is run
        self.compared: dict[int, tuple[int, int]] = {}  # by thread: its step, and with how many at the next one's word
        self.at: dict[Place, list[int]] = {}  # the steps at each word
        self.clocks = Clocks(0)

    def explore(self, most: int) -> Found:
        """All orders, but no more than `most`."""
        while True:
            self.run_one()
            if self.found.orders >= most or not self.go_back():
                return self.found

    def run_one(self) -> None:
        """Run one order: as the stack says, then whoever comes first."""
        self.turns.start(self.reset())
        self.clocks = Clocks(len(self.turns.workers))
        self.trace, self.at, self.compared = [], {}, {}
        self.turns.go(self.choose)
        if not self.turns.unfinished():
            self.judge(self.problem())
        elif not self.turns.enabled():
            self.judge("every thread waits for another one")
        self.turns.abandon()

    def choose(self) -> int | None:
        """The thread that goes on; None at the end of the order, or where all that can go on was tried in another order."""
        enabled = self.turns.enabled()
        depth = len(self.trace)
        for thread, access in enabled.items():
            self.find_races(thread, access)
        if not enabled or (depth == len(self.stack) and not self.push(enabled)):
            return None
        thread = self.stack[depth].thread
        access = enabled[thread]
        self.at.setdefault(access.place, []).append(depth)
        self.trace.append(self.clocks.advance(thread, access))
        return thread

    def problem(self) -> str:
        """What is wrong at the end of an order; empty if nothing is."""
        for worker in self.turns.workers:
            if worker.error is not None:
                return f"thread {worker.number} raised {type(worker.error).__name__}: {worker.error}"
        return self.check()

    def push(self, enabled: dict[int, Access]) -> bool:
        """A state that is new: the thread that had the turn keeps it. False if all that can go on was tried in another order."""
        sleep: dict[int, Access] = {}
        last = -1
        if self.stack:
            above = self.stack[-1]
            last, access = above.thread, above.enabled[above.thread]
            asleep = above.sleep | {thread: above.enabled[thread] for thread in above.done}
            sleep = {thread: other for thread, other in asleep.items() if not conflict(other, access)}
        awake = [thread for thread in enabled if thread not in sleep]
        if not awake:
            return False
        thread = last if last in awake else min(awake)
        self.stack.append(Node(enabled, thread, sleep, {thread}))
        return True

    def find_races(self, thread: int, access: Access) -> None:
        """The earlier steps in whose place the thread's next access could have come; each is compared once."""
        known, depths = self.clocks.thread[thread], self.at.get(access.place, [])
        count = known[thread]
        compared = self.compared.get(thread)
        start = compared[1] if compared is not None and compared[0] == count else 0
        self.compared[thread] = count, len(depths)
        for depth in depths[start:]:
            step = self.trace[depth]
            if step.thread != thread and conflict(step.access, access) and not step.before(known):
                node = self.stack[depth]
                first = self.initials(depth, thread, access) & set(node.enabled) or set(node.enabled)
                if not first & node.todo:
                    node.todo.add(min(first - set(node.sleep), default=min(first)))

    def initials(self, depth: int, thread: int, access: Access) -> set[int]:
        """The threads of which one must go first for the access to come before the step at `depth`: of what does not follow from
        that step, those that follow from nothing else."""
        raced, known = self.trace[depth], self.clocks.thread[thread]
        rest = [step for step in self.trace[depth + 1 :] if not raced.before(step.clock)]
        first: set[int] = set()
        seen: set[int] = set()
        for i, step in enumerate(rest):
            if step.thread not in seen:
                seen.add(step.thread)
                if not any(earlier.before(step.clock) for earlier in rest[:i]):
                    first.add(step.thread)
        if thread not in seen and not any(step.before(known) or conflict(step.access, access) for step in rest):
            first.add(thread)
        return first

    def judge(self, message: str) -> None:
        """Count an order; keep the shortest that is wrong: fewest changes of turn, then fewest steps."""
        found = self.found
        found.orders += 1
        found.steps += len(self.trace)
        if not message:
            return
        found.wrong += 1
        choices = [step.thread for step in self.trace]
        if found.choices is None or length(choices) < length(found.choices):
            found.choices, found.message = choices, message

    def go_back(self) -> bool:
        """To the last state in which another thread is to be tried; False when there is none."""
        while self.stack:
            node = self.stack[-1]
            node.done.add(node.thread)
            left = node.todo - node.done - set(node.sleep)
            if left:
                node.thread = min(left)
                return True
            self.stack.pop()
        return False


def length(choices: list[int]) -> tuple[int, int]:
    """How long an order is to read."""
    return sum(one != other for one, other in pairwise(choices)), len(choices)


def replay(turns: Turns, functions: list[Callable[[], None]], choices: list[int]) -> list[Done]:
    """Run one order again, and tell its steps."""
    turns.functions = True
    steps = []
    turns.start(functions)
    for thread in choices:
        access, where = turns.enabled()[thread], turns.workers[thread].where
        turns.resume(thread)
        steps.append(Done(thread, access, where, *turns.last))
    turns.abandon()
    turns.functions = False
    return steps
