"""Threads that take turns: before each access to a shared word a thread stops, and who explores says which one goes on.

The threads are real ones, so that the functions that ship run as they are; but only one at a time has the turn.
"""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Place = tuple[str, int]  # a shared word: its array's name, its index


class Access(NamedTuple):
    """The access that a thread is about to do."""

    place: Place
    writes: bool
    kind: str


class Done(NamedTuple):
    """An access that was done: by which thread, in which function, what it saw and what it left there."""

    thread: int
    access: Access
    function: str
    seen: int
    left: int


class Abandoned(BaseException):
    """The order that is explored ends here; the thread unwinds."""


@dataclass
class Worker:
    """One thread: the lock that it sleeps on, its next access, and what it waits for to change."""

    number: int
    turn: Any = field(default_factory=_thread.allocate_lock)
    function: Callable[[], None] | None = None
    access: Access | None = None  # None: it has finished
    read: dict[Place, int] = field(default_factory=dict)  # what it has read since it last paused: version of each word
    awaits: dict[Place, int] = field(default_factory=dict)
    error: BaseException | None = None
    where: str = ""  # the function that the next access stands in


class Turns:
    """The threads of one program, and the one at a time that has the turn."""

    def __init__(self, threads: int) -> None:
        self.home = _thread.allocate_lock()
        self.home.acquire()
        self.active: Worker | None = None
        self.abandoned = False
        self.failure: Exception | None = None
        self.choose: Callable[[], int | None] | None = None
        self.versions: dict[Place, int] = {}
        self.last: tuple[int, int] = (0, 0)
        self.functions: bool = False  # note in which function each access stands
        self.workers = [Worker(number) for number in range(threads)]
        for worker in self.workers:
            worker.turn.acquire()
            threading.Thread(target=self.live, args=(worker,), daemon=True).start()

    # --- the threads' side

    def live(self, worker: Worker) -> None:
        """A thread runs one function after another, each when it is first given the turn."""
        while True:
            worker.turn.acquire()
            if worker.function is None:
                return
            try:
                worker.function()
            except Abandoned:
                pass
            except Exception as error:
                worker.error = error
            worker.access = None
            self.hand_over(worker)

    def hand_over(self, worker: Worker) -> bool:
        """Who comes next is told by `choose`: another thread, or the explorer where there is none; True for the same one again."""
        try:
            number = None if self.choose is None else self.choose()
        except Exception as error:  # the explorer's own, for the thread that explores
            self.failure, number = error, None
        if number == worker.number:
            return True
        self.active = None if number is None else self.workers[number]
        (self.home if self.active is None else self.active.turn).release()
        return False

    def stop(self, place: Place, writes: bool, kind: str) -> None:
        """Before an access: hand over the turn, and wait to have it again."""
        worker = self.active
        if worker is None:
            return  # nobody explores now
        if self.functions:
            frame = sys._getframe(2)
            while frame.f_code.co_filename.endswith("_jit.py"):
                frame = frame.f_back
            worker.where = frame.f_code.co_name
        worker.access = Access(place, writes, kind)
        if not self.hand_over(worker):
            worker.turn.acquire()
        if self.abandoned:
            raise Abandoned
        worker.awaits = {}
        worker.read.setdefault(place, self.versions.get(place, 0))

    def note(self, place: Place, seen: int, left: int) -> None:
        """After an access: what it saw and left."""
        self.last = seen, left
        if seen != left:
            self.versions[place] = self.versions.get(place, 0) + 1

    def pause(self) -> None:
        """A thread waits: it goes on when another one has changed any of what it has read since it last did."""
        worker = self.active
        if worker is not None and worker.read:
            worker.awaits, worker.read = worker.read, {}

    # --- the explorer's side

    def start(self, functions: list[Callable[[], None]]) -> None:
        """Let each thread run to its first access."""
        self.versions.clear()
        for worker, function in zip(self.workers, functions, strict=True):
            worker.function, worker.error, worker.read, worker.awaits = function, None, {}, {}
            self.resume(worker.number)

    def resume(self, number: int) -> None:
        """Give a thread the turn until its next access."""
        worker = self.workers[number]
        self.active = worker
        worker.turn.release()
        self.home.acquire()

    def go(self, choose: Callable[[], int | None]) -> None:
        """Let threads take turns until `choose` names none."""
        number = choose()
        if number is not None:
            self.choose = choose
            self.resume(number)
            self.choose = None
        if self.failure is not None:
            raise self.failure

    def enabled(self) -> dict[int, Access]:
        """The threads that can go on, and the next access of each."""
        ready = {}
        for worker in self.workers:
            if worker.access is None:
                continue
            if not worker.awaits or any(self.versions.get(place, 0) != version for place, version in worker.awaits.items()):
                ready[worker.number] = worker.access
        return ready

    def unfinished(self) -> bool:
        """Whether any thread has not come to its end."""
        return any(worker.access is not None for worker in self.workers)

    def abandon(self) -> None:
        """Unwind the threads that have not finished."""
        self.abandoned = True
        for worker in self.workers:
            while worker.access is not None:
                self.resume(worker.number)
        self.abandoned = False

    def end(self) -> None:
        """Let the threads end."""
        for worker in self.workers:
            worker.function = None
            worker.turn.release()


class Shared:
    """An array whose accesses are steps, where the word is one of those that threads share; else as NumPy's."""

    def __init__(self, name: str, words: np.ndarray, turns: Turns, shares: Callable[[int], bool]) -> None:
        self.name, self.words, self.turns, self.shares = name, words, turns, shares
        self.dtype, self.shape, self.size = words.dtype, words.shape, words.size

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) or not self.shares(int(index)):
            return self.words[index]
        place = (self.name, int(index))
        self.turns.stop(place, False, "read")
        value = self.words[place[1]]
        self.turns.note(place, int(value), int(value))
        return value

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice) or not self.shares(int(index)):
            self.words[index] = value
            return
        place = (self.name, int(index))
        self.turns.stop(place, True, "write")
        seen = int(self.words[place[1]])
        self.words[place[1]] = value
        self.turns.note(place, seen, int(value))

    def cmpxchg(self, index: Any, expected: Any, desired: Any) -> Any:
        """The atomic instruction, one step."""
        place = (self.name, int(index))
        self.turns.stop(place, True, "cmpxchg")
        seen = self.words[place[1]]
        if seen == expected:
            self.words[place[1]] = desired
        self.turns.note(place, int(seen), int(self.words[place[1]]))
        return seen

    def modify(self, index: Any, value: Any, operation: Callable[[Any, Any], Any]) -> Any:
        """An atomic read, change and write, one step."""
        place = (self.name, int(index))
        self.turns.stop(place, True, "exchange")
        seen = self.words[place[1]]
        self.words[place[1]] = operation(seen, value)
        self.turns.note(place, int(seen), int(self.words[place[1]]))
        return seen
