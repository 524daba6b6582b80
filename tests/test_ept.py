"""The EPT walk: an access matrix against the reference, compared bit by bit, and the rules of the manual one by one.

A case of the matrix is two entries of one path (one at any level, and the leaf), the kind of access, capabilities and the EPTP's A/D
bit. Exit qualification, rights, level and the entries left in memory are compared.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sizes import sized

import fastmmu
from fastmmu import EptCaps, GuestMemory, translate_ept
from fastmmu._jit import kernel
from fastmmu.bits import EPT
from fastmmu.ept import ept_state, walk_ept
from fastmmu.reference.ept import Caps, EptExit, EptWalker, Outside
from fastmmu.reference.walk import Memory
from fastmmu.state import TRAIL_LENGTH, NestedStat

R, W, X, PS, A, D, USER_X = (int(getattr(EPT, name)) for name in ("R", "W", "X", "PS", "A", "D", "USER_X"))
WB, AD = 6 << 3, 1 << 6
MAXPHYADDR = 45
TABLES = {5: 0x1000, 4: 0x2000, 3: 0x3000, 2: 0x4000, 1: 0x5000}
FRAME = 0x4000_0000
GPA = 0x123
SIZE = 0x10_0000
ALL_CAPS = [EptCaps(MAXPHYADDR, *flags) for flags in itertools.product((False, True), repeat=4)]
PLAIN_CAPS = EptCaps(MAXPHYADDR)
KINDS = [(access, table, user) for access in range(1, 8) for table in (False, True) for user in (False, True)]
RIGHTS = [sum(bits) for n in range(5) for bits in itertools.combinations((R, W, X, USER_X), n)]
TYPES = [number << 3 for number in range(8)]


def make_eptp(levels: int, flags: bool, memory_type: int = 6) -> int:
    return TABLES[levels] | memory_type | (levels - 1) << 3 | (AD if flags else 0)


def pointing(level: int, bits: int) -> int:
    """An entry of a level with these bits, leading to the next table, or to a page that is aligned for the level."""
    return bits | (TABLES[level - 1] if level > 1 and not bits & PS else FRAME)


@kernel
def run_cases(mem, ept, trail, uppers, upper, leaf, entries, leaves, accesses, tables, users, answers, left):
    """For each case: write both entries, walk, and note the answer and what is left."""
    for i in range(len(accesses)):
        mem.words[uppers] = upper
        mem.words[leaf] = leaves[i]
        mem.words[uppers] = entries[i]
        walk = walk_ept(mem, ept, trail, None, np.uint64(GPA), accesses[i], tables[i], users[i])
        answers[i, 0] = np.uint64(1) if walk.ok else np.uint64(0)
        answers[i, 1], answers[i, 2], answers[i, 3] = walk.hpa, walk.level, walk.rights
        answers[i, 4], answers[i, 5] = walk.reason, walk.qualification
        left[i, 0], left[i, 1] = mem.words[uppers], mem.words[leaf]


def reference_of(caps: EptCaps, eptp: int, words: dict[int, int]) -> EptWalker:
    own = Caps(caps.maxphyaddr, caps.mode_based_execute, caps.execute_only, caps.page_2m, caps.page_1g)
    return EptWalker(Memory([(0, SIZE, "ram")], words), eptp, own)


def expected(walker: EptWalker, gpa: int, access: int, table: bool, user: bool) -> list[int]:
    """The reference's answer in the columns of ours."""
    try:
        mapped = walker.walk(gpa, access, table, user)
    except EptExit as left:
        return [0, 0, left.level, left.rights, left.reason, left.qualification]
    return [1, mapped.hpa, mapped.level, mapped.rights, 0, 0]


class Matrix:
    """One EPTP and one set of capabilities; cases vary the entry at `level` and the leaf of the path."""

    def __init__(self, levels: int, flags: bool, caps: EptCaps, level: int) -> None:
        self.eptp, self.caps, self.level = make_eptp(levels, flags), caps, level
        self.memory = GuestMemory(SIZE)
        for at in range(2, levels + 1):
            self.memory.words[TABLES[at] >> 3] = pointing(at, R | W | X | USER_X)
        self.start = {8 * int(i): int(self.memory.words[i]) for i in np.flatnonzero(self.memory.words)}

    def run(self, entries: np.ndarray, leaves: np.ndarray, kinds: np.ndarray) -> None:
        """Compare kernel and reference on the cases."""
        count = len(entries)
        accesses, tables, users = (np.array([KINDS[k][part] for k in kinds.tolist()]) for part in range(3))
        answers, left = np.zeros((count, 6), np.uint64), np.zeros((count, 2), np.uint64)
        upper, leaf = TABLES[self.level], TABLES[1]
        run_cases(
            self.memory.state, ept_state(self.eptp, self.caps), np.zeros(TRAIL_LENGTH, np.uint64), upper >> 3,
            self.memory.words[upper >> 3], leaf >> 3, entries, leaves, accesses.astype(np.uint64), tables, users, answers, left,
        )  # fmt: skip
        words = dict(self.start)
        walker = reference_of(self.caps, self.eptp, words)
        rows = zip(entries.tolist(), leaves.tolist(), kinds.tolist(), answers.tolist(), left.tolist(), strict=True)
        for entry, leaf_entry, kind, answer, kept in rows:
            words[leaf] = leaf_entry
            words[upper] = entry
            walker.reads.clear()
            wanted = expected(walker, GPA, *KINDS[kind])
            if answer != wanted or kept != [words[upper], words[leaf]]:
                pytest.fail(
                    f"level {self.level} entry {entry:#x}, leaf {leaf_entry:#x}, access, table, user {KINDS[kind]}, {self.caps}, "
                    f"eptp {self.eptp:#x}\nok, hpa, level, rights, reason, qualification: {[hex(n) for n in answer]}, expected "
                    f"{[hex(n) for n in wanted]}\nentries left {[hex(n) for n in kept]}, expected {words[upper]:#x}, {words[leaf]:#x}"
                )


def random_entries(rng: np.random.Generator, level: int, count: int) -> np.ndarray:
    """Entries of a level with every pattern of rights, memory type, size, A, D; a reserved bit now and then."""
    bits = rng.choice(np.array(RIGHTS), count) | rng.choice(np.array(TYPES), count) * (rng.random(count) < (0.8 if level == 1 else 0.4))
    for bit, probability in ((PS, 0.4), (A, 0.5), (D, 0.5), (EPT.IGNORE_PAT, 0.1), (1 << 11, 0.2), (1 << 62, 0.1)):
        bits = bits.astype(np.uint64) | np.uint64(bit) * (rng.random(count) < probability).astype(np.uint64)
    entries = np.array([pointing(level, bit) for bit in bits.tolist()], np.uint64)
    for bit in (1 << 12, 1 << MAXPHYADDR, 1 << 51):
        entries ^= np.uint64(bit) * (rng.random(count) < 0.05).astype(np.uint64) * (entries & EPT.PS != 0)
    return entries | np.uint64(1 << MAXPHYADDR) * (rng.random(count) < 0.03).astype(np.uint64)


def sample(rng: np.random.Generator, settings: int, cases: int) -> int:
    """Random settings, random cases under each; returns how many were compared."""
    for number in range(settings):
        levels = 4 + number % 2
        level = int(rng.integers(1, levels + 1))
        matrix = Matrix(levels, bool(rng.random() < 0.5), ALL_CAPS[int(rng.integers(len(ALL_CAPS)))], level)
        entries = random_entries(rng, level, cases)
        matrix.run(entries, random_entries(rng, 1, cases), rng.integers(0, len(KINDS), cases))
    return settings * cases


def test_sample_of_the_matrix(seed: int) -> None:
    assert sample(np.random.default_rng(seed), sized(100, 40), sized(3000, 200)) == sized(300_000, 8_000)


def every_pattern(levels: int, flags: bool, caps: EptCaps, stride: int, first: int) -> int:
    """All rights, memory types and sizes at every level x all kinds of access; returns how many."""
    done = 0
    for level in range(1, levels + 1):
        bits = [pointing(level, r | t | big) for r in RIGHTS for t in TYPES for big in (0, PS)]
        pairs = [(entry, kind) for entry in bits for kind in range(len(KINDS))][first::stride]
        entries = np.array([entry for entry, _ in pairs], np.uint64)
        kinds = np.array([kind for _, kind in pairs])
        Matrix(levels, flags, caps, level).run(entries, np.full(len(pairs), FRAME | WB | R | W | X | USER_X, np.uint64), kinds)
        done += len(pairs)
    return done


@pytest.mark.parametrize("flags", [False, True], ids=["no A/D", "A/D"])
def test_every_pattern_at_every_level(seed: int, flags: bool) -> None:
    """A part of them, another one in each run."""
    stride = sized(11, 311)
    first = int(np.random.default_rng(seed).integers(stride))
    done = sum(every_pattern(4 + number % 2, flags, caps, stride, first) for number, caps in enumerate(ALL_CAPS))
    assert done > sized(40_000, 1_000)


@pytest.mark.long
def test_all_patterns_and_millions_of_pairs(seed: int) -> None:
    done = sum(
        every_pattern(levels, flags, caps, sized(1, 101), 0) for levels in (4, 5) for flags in (False, True) for caps in ALL_CAPS
    )
    done += sample(np.random.default_rng(seed), sized(400, 40), sized(5000, 400))
    print(f"EPT matrix, seed {seed}: {done:,} cases")


@pytest.mark.parametrize("width", [32, 39, 45, 51, 52])
def test_every_bit_of_every_entry(width: int) -> None:
    """One bit at a time: reserved, ignored, a right or a part of the address, as the reference says."""
    caps = EptCaps(width)
    for level, position, big, access in itertools.product(range(1, 6), range(64), (0, PS), (1, 2, 4)):
        if big and level > 3:
            continue
        words = {TABLES[at]: pointing(at, R | W | X) for at in range(2, 6)} | {TABLES[1]: FRAME | WB | R | W | X}
        if big:
            words[TABLES[level]] = FRAME | PS | WB | R | W | X
        words[TABLES[level]] ^= 1 << position
        memory = GuestMemory(SIZE)
        for gpa, word in words.items():
            memory.words[gpa >> 3] = word
        eptp = make_eptp(5, False)
        try:
            wanted = expected(reference_of(caps, eptp, words), GPA, access, False, False)
        except Outside:
            with pytest.raises(fastmmu.OutsideMemory, match="a table at hpa 0x"):
                translate_ept(memory, eptp, GPA, access, caps)
            continue
        assert [int(n) for n in translate_ept(memory, eptp, GPA, access, caps)] == wanted, (level, position, big, access)


class Path:
    """Four levels of full rights that map GPA; entries can be changed one by one."""

    def __init__(self, **changes: int) -> None:
        self.ram = GuestMemory(SIZE)
        for level in (4, 3, 2):
            self.ram.words[TABLES[level] >> 3] = pointing(level, R | W | X)
        self.ram.words[TABLES[1] >> 3] = FRAME | WB | R | W | X
        for name, entry in changes.items():
            self.ram.words[TABLES[int(name[1])] >> 3] = entry

    def walk(self, access: int, flags: bool = False, caps: EptCaps = PLAIN_CAPS, **how: bool) -> tuple[int, int]:
        """(exit reason, qualification)."""
        answer = translate_ept(self.ram, make_eptp(4, flags), GPA, access, caps, **how)
        assert answer.ok == (answer.exit_reason == 0)
        return answer.exit_reason, answer.exit_qualification

    def left(self, mask: int) -> list[int]:
        return [int(self.ram.words[TABLES[level] >> 3]) & mask for level in (4, 3, 2, 1)]


def test_the_qualification_of_table_28_7() -> None:
    read_only = Path(l1=FRAME | WB | R)
    assert read_only.walk(1) == (0, 0)
    assert read_only.walk(2) == (48, 0x18A)  # a write, R, bits 7 and 8
    assert read_only.walk(2 | 1) == (48, 0x18B)
    assert read_only.walk(4) == (48, 0x18C)
    assert read_only.walk(2, paging_structure=True) == (48, 0x08A)
    assert Path(l2=TABLES[1] | R | X).walk(2) == (48, 0x1AA)  # the AND of all entries: R and X
    assert Path(l3=0).walk(1) == (48, 0x181)  # not present: no rights, whatever the others give
    assert Path(l1=FRAME | WB | W).walk(1) == (49, 0)


def test_accesses_to_paging_structures_count_as_writes_with_ad() -> None:
    """29.3.3.2: both bits are set; without A and D they are what they are."""
    path = Path(l1=FRAME | WB | R)
    assert path.walk(1, paging_structure=True) == (0, 0)
    assert path.walk(1, flags=True, paging_structure=True) == (48, 0x08B)
    assert path.walk(1, flags=True) == (0, 0)
    writable = Path()
    assert writable.walk(1, flags=True, paging_structure=True) == (0, 0)
    assert writable.left(A | D) == [A, A, A, A | D]


def test_flags_only_with_bit_6_and_only_where_the_walk_succeeds() -> None:
    path = Path(l1=FRAME | WB | R)
    path.walk(1)
    path.walk(2, flags=True)
    assert path.left(A | D) == [0, 0, 0, 0]
    path.walk(1, flags=True)
    assert path.left(A | D) == [A, A, A, A]
    whole = Path()
    whole.walk(2, flags=True)
    assert whole.left(A | D) == [A, A, A, A | D]


def test_tables_in_rom_keep_their_flags() -> None:
    path = Path()
    path.ram.slots = [(0, 0x4000, "ram"), (0x4000, 0x6000, "rom"), (0x6000, SIZE, "ram")]
    assert path.walk(2, flags=True) == (0, 0)
    assert path.left(A | D) == [A, A, 0, 0]


def test_mode_based_execute() -> None:
    """25.6.2: bit 2 for supervisor-mode addresses, bit 10 for user-mode ones; bit 10 alone makes an entry present."""
    by_mode = EptCaps(MAXPHYADDR, mode_based_execute=True)
    upper = {f"l{level}": pointing(level, R | W | X | USER_X) for level in (4, 3, 2)}
    user_only = Path(**upper, l1=FRAME | WB | R | USER_X)
    assert user_only.walk(4, caps=by_mode, user_linear=True) == (0, 0)
    assert user_only.walk(4, caps=by_mode) == (48, 0x1CC)  # R in bits 5:3, and bit 6
    supervisor_only = Path(**upper, l1=FRAME | WB | R | X)
    assert supervisor_only.walk(4, caps=by_mode, user_linear=True) == (48, 0x1AC)
    assert supervisor_only.walk(4, caps=by_mode) == (0, 0)
    alone = Path(**upper, l1=FRAME | WB | USER_X)
    assert alone.walk(1, caps=by_mode) == (48, 0x1C1)
    assert alone.walk(1) == (48, 0x181)  # without the control the entry is not present
    assert alone.walk(1, caps=EptCaps(MAXPHYADDR, mode_based_execute=True, execute_only=False)) == (49, 0)
    answer = translate_ept(user_only.ram, make_eptp(4, False), GPA, 1, by_mode)
    assert answer == (True, FRAME | GPA, 1, 1 | 8, 0, 0)


def test_large_pages_and_wide_addresses() -> None:
    for level, size in ((2, 1 << 21), (3, 1 << 30)):
        path = Path(**{f"l{level}": FRAME | PS | WB | R})
        answer = translate_ept(path.ram, make_eptp(4, False), 0x1_2345, 1, PLAIN_CAPS)
        assert answer == (True, FRAME | 0x1_2345 & size - 1, level, 1, 0, 0)
        assert path.walk(1, caps=EptCaps(MAXPHYADDR, page_2m=False, page_1g=False)) == (49, 0)
    for gpa in (1 << 48, 1 << 63):
        assert translate_ept(Path().ram, make_eptp(4, False), gpa, 2, PLAIN_CAPS) == (False, 0, 0, 0, 48, 0x182)


def test_reads_are_counted() -> None:
    stat, path = np.zeros(len(NestedStat), np.uint64), Path()
    one = np.uint64(1)
    walk_ept(path.ram.state, ept_state(make_eptp(4, False), PLAIN_CAPS), np.zeros(TRAIL_LENGTH, np.uint64), stat, np.uint64(GPA), one, False, False)
    assert stat[NestedStat.HOST_READS] == 4


@pytest.mark.parametrize("target", [SIZE, 0x9_0000, 1 << 44])
@pytest.mark.parametrize("level", [4, 3, 2])
def test_a_table_outside_memory_is_an_error(level: int, target: int) -> None:
    path = Path(**{f"l{level}": target | R | W | X})
    path.ram.slots = [(0, 0x9_0000, "ram"), (0x9_0000, 0xA_0000, "device")]
    with pytest.raises(fastmmu.OutsideMemory, match=f"a table at hpa {target:#x} lies outside memory"):
        path.walk(1)


def test_an_entry_that_changes_restarts_the_walk() -> None:
    """Two tables in one: the entry is its own upper one, so that setting A of the first changes what the second was read as."""
    ram = GuestMemory(SIZE)
    ram.words[0x1000 >> 3] = 0x1000 | R | W | X
    answer = translate_ept(ram, 0x1000 | 6 | 3 << 3 | AD, 5, 2, PLAIN_CAPS)
    assert (answer.ok, answer.hpa) == (True, 0x1005) and int(ram.words[0x1000 >> 3]) == 0x1000 | R | W | X | A | D


@pytest.mark.parametrize(
    ("eptp", "told"),
    [
        *((0x1000 | 3 << 3 | bad, f"memory type {bad}") for bad in (1, 2, 3, 4, 5, 7)),
        *((0x1000 | 6 | bad << 3, f"a walk of {bad + 1} levels") for bad in (0, 1, 2, 5, 6, 7)),
        *((0x1000 | 6 | 3 << 3 | 1 << bad, f"reserved bits {1 << bad:#x}") for bad in (7, 8, 9, 10, 11, 45, 51, 52, 63)),
    ],
)
def test_bad_eptps(eptp: int, told: str) -> None:
    with pytest.raises(fastmmu.EptpError, match=told):
        translate_ept(GuestMemory(SIZE), eptp, 0, 1, PLAIN_CAPS)


def test_bad_arguments() -> None:
    ram, good = GuestMemory(SIZE), make_eptp(4, False)
    for bad in (0, 8, -1, "r", None, 1.0, True):
        with pytest.raises(ValueError, match="access"):
            translate_ept(ram, good, 0, bad, PLAIN_CAPS)
    for bad in (-1, 1 << 64, 0.5, "x"):
        with pytest.raises(ValueError, match="gpa"):
            translate_ept(ram, good, bad, 1, PLAIN_CAPS)
    for bad in (-1, 1 << 64, None):
        with pytest.raises(ValueError, match="eptp"):
            translate_ept(ram, bad, 0, 1, PLAIN_CAPS)
    for name in ("paging_structure", "user_linear"):
        with pytest.raises(ValueError, match=name):
            translate_ept(ram, good, 0, 1, PLAIN_CAPS, **{name: "yes"})
    with pytest.raises(ValueError, match="caps"):
        translate_ept(ram, good, 0, 1, 46)
    with pytest.raises(ValueError, match="ram"):
        translate_ept(None, good, 0, 1, PLAIN_CAPS)
    for bad in (31, 53, "x"):
        with pytest.raises(ValueError, match="maxphyaddr"):
            EptCaps(bad)
    with pytest.raises(ValueError, match="page_1g"):
        EptCaps(46, page_1g=2)
