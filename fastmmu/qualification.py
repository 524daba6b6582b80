"""The exit qualification that L1 is told: watch a device page of a nested guest, step by step (facts 2.2 to 2.4).

`watch(["read", "write"])` is the loop of 2018, `watch(["read", "write"], strategy="derived")` its end. The machine: `floors.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from fastmmu.bits import EPT, EPT_SPTE, MMIO_SPTE, PAGE_SHIFT, QUALIFICATION, WORDS_PER_PAGE
from fastmmu.checks import WORD, checked_flag, checked_int
from fastmmu.ept import FETCH, READ, UNCACHEABLE, WRITE, EptCaps, ept_state
from fastmmu.floors import ACT, LOG, MOST_STATES, NEVER, Act, Event, Floor, Grant, House, Tally, Told, run_acts
from fastmmu.kvm import Kvm, set_spte_masks
from fastmmu.machine_state import VmWord
from fastmmu.memory import GuestMemory
from fastmmu.state import TRAIL_LENGTH

STRATEGIES = tuple(one.name.lower() for one in Told)
POLICIES = tuple(one.name.lower().replace("_", "-") for one in Grant)
LINEAR, FINAL = int(QUALIFICATION.LINEAR), int(QUALIFICATION.FINAL)
ACTS = {
    "read": (Act.ACCESS, READ),
    "write": (Act.ACCESS, WRITE),
    "fetch": (Act.ACCESS, FETCH),
    "memslots": (Act.MEMSLOTS, 0),
    "other-read": (Act.ELSEWHERE, READ | LINEAR | FINAL),
    "other-write": (Act.ELSEWHERE, WRITE | LINEAR | FINAL),
    "other-fetch": (Act.ELSEWHERE, FETCH | LINEAR | FINAL),
    "other-walk": (Act.ELSEWHERE, READ | LINEAR),
}
"""What may happen, by name. The others are violations at another page of L2: L0 keeps their qualification; a walk is one of the
processor through L2's page tables, whose bit 8 is clear."""
TABLES = 0x1000
DEVICE = 0xF0_0000_0000
MOST_PAGES = 1 << 18  # one page of the directory of page directories
MOST_ACTS = 1000
STEPS = 8 * MOST_STATES  # of one act: no try has more than 7, and one comes behind the last
POINTER = EPT.R | EPT.W | EPT.X
SPTE_POINTER = POINTER | EPT_SPTE.MMU_PRESENT | EPT_SPTE.SUPPRESS_VE
MAXPHYADDR = 46


def put_tables(words: np.ndarray, pages: int, pointer: np.uint64) -> int:
    """Four levels of tables from TABLES on, for so many pages from address 0, leaves empty; returns the index of the first leaf."""
    leaf_tables = -(-pages // WORDS_PER_PAGE)
    root, upper, directory, leaves = (TABLES + 8 * WORDS_PER_PAGE * number for number in range(4))
    words[root >> 3], words[upper >> 3] = np.uint64(upper) | pointer, np.uint64(directory) | pointer
    for number in range(leaf_tables):
        words[(directory >> 3) + number] = np.uint64(leaves + 8 * WORDS_PER_PAGE * number) | pointer
    return leaves >> 3


def make_house(
    strategy: str, l1: str, *, execute_only: bool = True, pages: int = 1, generation: int = 0, rights: int = 0
) -> House:
    """The three floors with `pages` device pages of L2, whose entries in EPT12 have `rights` (EPT bits 2:0), and an empty EPT02.

    Raises:
        KeyError: no such strategy or policy.
    """
    caps = EptCaps(MAXPHYADDR, False, execute_only, False, False)
    eptp = TABLES | 6 | 3 << 3
    size = TABLES + 8 * WORDS_PER_PAGE * (3 + -(-pages // WORDS_PER_PAGE))
    memories = GuestMemory(size), GuestMemory(size)
    leaf12, leaf02 = (put_tables(ram.words, pages, pointer) for ram, pointer in zip(memories, (POINTER, SPTE_POINTER), strict=True))
    floor, word = np.zeros(len(Floor), np.uint64), np.zeros(len(VmWord), np.uint64)
    floor[Floor.STRATEGY], floor[Floor.POLICY] = Told[strategy.upper()], Grant[l1.upper().replace("-", "_")]
    floor[Floor.EXECUTE_ONLY] = execute_only
    set_spte_masks(word, Kvm(ept=True))
    word[VmWord.GENERATION] = generation
    house = House(
        l1=memories[0].state,
        l0=memories[1].state,
        ept12=ept_state(eptp, caps),
        ept02=ept_state(eptp, EptCaps(MAXPHYADDR)),
        trail=np.zeros(TRAIL_LENGTH, np.uint64),
        floor=floor,
        word=word,
        leaf12=np.uint64(leaf12),
        leaf02=np.uint64(leaf02),
        device=np.uint64(DEVICE | UNCACHEABLE),
        pages=np.uint64(pages),
    )
    if rights:
        entries12(house)[:] = house.device + (np.arange(pages, dtype=np.uint64) << PAGE_SHIFT) | np.uint64(rights)
    return house


def entries12(house: House) -> np.ndarray:
    """L1's entries, a view of uint64[pages]."""
    return house.l1.words[int(house.leaf12) : int(house.leaf12 + house.pages)]


def entries02(house: House) -> np.ndarray:
    """L0's entries, a view of uint64[pages]."""
    return house.l0.words[int(house.leaf02) : int(house.leaf02 + house.pages)]


def make_seen() -> np.ndarray:
    """Working space of `run_acts`: the states in which tries of one access began."""
    return np.zeros((MOST_STATES, 4), np.uint64)


@dataclass(frozen=True)
class Step:
    """One step: its number from 1, an Event's name, a sentence; and the state after it.

    `rights` are those of L1's entry, as "RW-"; `generation` is that of the MMIO spte, None where L0's entry is empty; `saved` is
    what L0 keeps of the last violation's qualification; `qualification` is the one of this step's exit or walk, or 0.
    """

    number: int
    event: str
    text: str
    rights: str
    generation: int | None
    saved: int
    qualification: int


@dataclass(frozen=True)
class Watched:
    """What `watch` saw. `loop` has the numbers of the first and last step that come again and again, None where all accesses
    completed; `counters` are by the names of `floors.Tally`, in small letters."""

    steps: tuple[Step, ...]
    loop: tuple[int, int] | None
    counters: dict[str, int]

    @property
    def completes(self) -> bool:
        """Whether all accesses completed."""
        return self.loop is None


def watch(
    acts: Iterable[str],
    *,
    strategy: str = "stale",
    l1: str = "exact",
    execute_only: bool = True,
    rights: str = "",
    generation: int = 0,
) -> Watched:
    """Let things happen to one device page of L2, up to the first access that never completes, and tell each step.

    Args:
        acts: names of ACTS, or one such name: "read", "write", "fetch" are L2's accesses to the page; "memslots" a change of L0's
            memslots; "other-read", "other-write", "other-fetch", "other-walk" violations at another page.
        strategy: where L0 takes the access bits from that it tells L1: "stale", the last violation; "derived", the failed walk.
        l1: what L1 adds to its entry: "exact", what it is told; "write-with-read", W too wherever there is R.
        execute_only: L1's EPT may have entries with X alone.
        rights: what L1's entry grants to begin with, letters of "RWX".
        generation: memslot generation to begin with.

    Raises:
        ValueError: an unknown name, no act at all, or more than 1000.
    """
    names = [acts] if isinstance(acts, str) else list(acts)
    for name in names:
        checked_name(name, tuple(ACTS), "acts")
    if not 1 <= len(names) <= MOST_ACTS:
        raise ValueError(f"acts: {len(names)}, expected 1 to {MOST_ACTS}")
    checked_name(strategy, STRATEGIES, "strategy")
    checked_name(l1, POLICIES, "l1")
    only = checked_flag(execute_only, "execute_only")
    if not isinstance(rights, str) or set(rights) - set("RWX"):
        raise ValueError(f"rights: {rights!r}, expected letters of 'RWX'")
    begin = checked_int(generation, 0, WORD >> 1, "generation", "an int from 0 to 2^63 - 1")
    granted = sum(1 << "RWX".index(letter) for letter in set(rights))
    house = make_house(strategy, l1, execute_only=only, generation=begin, rights=granted)
    stat, log, seen = np.zeros(len(Tally), np.uint64), np.zeros(STEPS, LOG), make_seen()
    steps: list[Step] = []
    loop = None
    for name in names:
        row, answer = np.zeros(1, ACT), np.zeros(1, np.uint64)
        row["act"], row["value"] = ACTS[name]
        house.floor[Floor.LOGGED] = 0
        run_acts(house, stat, log, seen, row, answer)
        rows = log[: int(house.floor[Floor.LOGGED])]
        first = len(steps)
        for one in rows:
            steps.append(step_of(one, len(steps) + 1, name, strategy))
        if answer[0] & NEVER:
            tries = [step.number for step in steps[first:] if step.event in ("violation", "misconfiguration")]
            loop = tries[int(rows[-1]["qualification"])], len(steps) - 1
            text = f"the state is as it was before step {loop[0]}: the {name} never completes"
            steps[-1] = replace(steps[-1], text=text)
            break
    return Watched(tuple(steps), loop, {one.name.lower(): int(stat[one]) for one in Tally})


def checked_name(name: object, names: tuple[str, ...], what: str) -> None:
    """Raises ValueError where `name` is none of `names`."""
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{what}: {name!r}, expected one of {', '.join(names)}")


def letters(rights: int) -> str:
    """R, W, X of bits 2:0, as "R-X"."""
    return "".join(letter if rights >> place & 1 else "-" for place, letter in enumerate("RWX"))


def asked(access: int) -> str:
    """Access bits in words."""
    return " and ".join(word for place, word in enumerate(("read", "write", "fetch")) if access >> place & 1) or "any access"


def step_of(row: np.void, number: int, name: str, strategy: str) -> Step:
    """A row of the log as a step."""
    event = Event(int(row["event"]))
    access, qualification, saved = (int(row[field]) for field in ("access", "qualification", "saved"))
    entry = letters(int(row["rights"]))
    generation = mmio_generation_of(row["spte"]) if row["spte"] else None
    found = f"grants {asked(access)}" if row["ok"] else f"does not grant {asked(access)}"
    kept = "from the last violation" if strategy == "stale" else "of the walk that failed"
    text = {
        Event.VIOLATION: f"L2 tries to {name}; EPT02 is empty: violation, qualification {qualification:#x}, which L0 keeps",
        Event.MISCONFIGURATION: f"L2 tries to {name}; EPT02 has an MMIO spte: misconfiguration; L0 still keeps {saved:#x}",
        Event.OLD_GENERATION: "L0: the MMIO spte is of an older memslot generation: slow path, which knows no kind of access",
        Event.FAULT_WALK: f"L0's fault handler walks EPT12: {entry} {found}",
        Event.EMULATOR_WALK: f"L0's emulator walks EPT12: {entry} {found}",
        Event.MMIO_SPTE: f"L0 finds no memslot: MMIO spte of generation {generation} in EPT02",
        Event.INJECTED: f"L0 injects a violation, qualification {qualification:#x}: {asked(access)}, {kept}",
        Event.INJECTED_MISCONFIGURATION: f"L0 injects a misconfiguration: EPT12 has {entry}; L1 changes nothing",
        Event.GRANTED: f"L1 is told {asked(access)}: EPT12 becomes {entry}; L0 drops its entry",
        Event.UNCHANGED: f"L1 is told {asked(access)}: EPT12 has {entry} already; nothing changes",
        Event.COMPLETED: f"L0 emulates the {name}: done",
        Event.RECURRED: "",
        Event.MEMSLOTS: "L0's memslots change: MMIO sptes are of an older generation",
        Event.ELSEWHERE: f"a violation at another page, qualification {qualification:#x}, which L0 keeps",
    }[event]
    told = qualification if event != Event.RECURRED else 0
    return Step(number, event.name.lower(), text, entry, generation, saved, told)


def mmio_generation_of(spte: np.uint64) -> int:
    """Memslot generation in an MMIO spte, 19 bits."""
    low, high = int(spte & MMIO_SPTE.GENERATION_LOW) >> 3, int(spte & MMIO_SPTE.GENERATION_HIGH) >> 52
    return low | high << 8
