"""Guests of all paging modes for shadow paging: tables that share, that recur, that map each other, and entries to store there."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from stream_guests import (
    CODE,
    MAIN_DATA,
    MIB2,
    PAGE,
    RANGES,
    READONLY,
    Guest,
    Kind,
    chance,
    data_frame,
    gva_of,
    one_of,
)

from fastmmu.bits import CR0, CR4, EFER, RFLAGS
from fastmmu.paging import Cpu, Mode
from fastmmu.reference.walk import NX, PS, A, D, P, U, W

ROM_TABLES = 5  # id of one more memslot: read-only, with tables
ROM_TABLES_RANGE = (0x90_0000, 0x90_4000)
SPARE = range(1600, 2000)  # bytes of each table that hold no entry which any address that is used goes through
CODE_INDEX, UPPER, RECURSION, ALIASES = 300, 496, 510, 5
LONG = (Mode.LONG4, Mode.LONG5)


@dataclass
class World:
    """The tables of one paging mode."""

    mode: Mode
    roots: list[int] = field(default_factory=list)
    entries: dict[int, list[int]] = field(default_factory=dict)  # by level, gpas; level 3 of PAE: the PDPTEs
    tables: dict[int, list[int]] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)
    aliases: list[int] = field(default_factory=list)  # addresses that map tables
    code: int = 0

    @property
    def size(self) -> int:
        """Bytes of an entry."""
        return 4 if self.mode == Mode.TWO_LEVEL else 8

    @property
    def levels(self) -> int:
        return {Mode.TWO_LEVEL: 2, Mode.PAE: 3}.get(self.mode, int(self.mode))


@dataclass
class Worlds(Guest):
    """All of them, in one memory; what the guest executes is fixed."""

    worlds: dict[Mode, World] = field(default_factory=dict)
    frames: list[int] = field(default_factory=list)  # of tables
    levels: dict[int, tuple[Mode, int]] = field(default_factory=dict)  # by gpa of an entry, whose it is and its level
    pdpts: list[int] = field(default_factory=list)  # roots of PAE


class WorldBuilder:
    """Builds them in the first MiB of memory, and some in a read-only memslot."""

    def __init__(self, rng: np.random.Generator, kind: Kind) -> None:
        self.rng, self.kind, self.guest, self.next = rng, kind, Worlds(), PAGE
        self.rom = ROM_TABLES_RANGE[0]
        self.world = World(Mode.NONE)
        self.alias_tables: list[tuple[World, int]] = []

    def build(self) -> Worlds:
        for mode in self.kind.modes:
            self.world = self.guest.worlds[mode] = World(mode)
            {Mode.TWO_LEVEL: self.two_level, Mode.PAE: self.pae}.get(mode, self.long)()
        for world, table in self.alias_tables:
            self.world = world
            self.fill_aliases(table)
        assert self.next <= CODE
        return self.guest

    # --- parts

    def table(self, level: int, *, fixed: bool = False, rom: bool = False) -> int:
        if rom and self.rom < ROM_TABLES_RANGE[1]:
            gpa, self.rom = self.rom, self.rom + PAGE
        else:
            gpa, self.next = self.next, self.next + PAGE
        self.guest.frames.append(gpa)
        if not fixed:
            self.world.tables.setdefault(level, []).append(gpa)
        return gpa

    def put(self, table: int, index: int, level: int, value: int, *, fixed: bool = False) -> None:
        gpa, size = table + self.world.size * index, self.world.size
        word, shift = gpa & ~7, 8 * (gpa & 7)
        mask = (1 << 8 * size) - 1 << shift
        self.guest.words[word] = (self.guest.words.get(word, 0) & ~mask) | (value << shift & mask)
        if fixed:
            self.guest.fixed.append(word)
        else:
            self.world.entries.setdefault(level, []).append(gpa)
            self.guest.levels[gpa] = (self.world.mode, level)

    def upper(self, table: int) -> int:
        """An entry that points to a table, seldom with fewer rights: tables that are shared are reached by several of these."""
        rng = self.rng
        bits = P | (0 if chance(rng, 0.08) else W) | (0 if chance(rng, 0.08) else U) | (A if chance(rng, 0.5) else 0)
        if self.world.size == 8 and chance(rng, 0.04):
            bits |= NX
        return table | bits

    def pages_table(self) -> int:
        """A level-1 table of data."""
        table = self.table(1, rom=chance(self.rng, 0.12))
        for index in self.low_indices():
            self.put(table, index, 1, world_leaf(self.rng, self.kind, self.guest, self.world, 1))
        return table

    def low_indices(self) -> list[int]:
        return [0, 1, 2, 3, 511, 512, 1023] if self.world.size == 4 else [0, 1, 2, 3, 4, 511]

    def code_table(self) -> int:
        table = self.table(1, fixed=True)
        self.put(table, 0, 1, CODE | P | W, fixed=True)
        return table

    def alias_table(self) -> int:
        """A level-1 table that maps tables, filled when all are there."""
        table = self.table(1)
        self.alias_tables.append((self.world, table))
        return table

    def second_alias(self) -> int:
        return 512 if self.world.size == 4 else 256

    def fill_aliases(self, table: int) -> None:
        rng = self.rng
        for number, frame in enumerate(self.guest.frames[:190]):
            for index in (number, self.second_alias() + number):
                bits = P | A | (W if chance(rng, 0.9) else 0) | (U if chance(rng, 0.5) else 0) | (D if chance(rng, 0.5) else 0)
                self.put(table, index, 1, frame | bits)

    def alias_indices(self, count: int = 12) -> list[int]:
        """Some of its indices: known tables are few while worlds are built, so any of the first."""
        numbers = self.rng.choice(28, size=count, replace=False).tolist()
        return [number + self.second_alias() * int(self.rng.integers(2)) for number in numbers]

    def directory(self, own: int, shared: int, aliases: int, *, base: int = 0, into: int = 0) -> int:
        """A directory, or a quarter of one that exists."""
        table = into or self.table(2)
        for index, below in ((0, own), (1, shared), (ALIASES, aliases)):
            self.put(table, base + index, 2, self.upper(below) if index != ALIASES else below | P | W | U)
        for index in (2, 3):
            self.put(table, base + index, 2, world_leaf(self.rng, self.kind, self.guest, self.world, 2))
        self.put(table, base + 4, 2, 0)
        return table

    def list_directory(self, top: int, shift: int, base: int = 0) -> None:
        """Addresses under a directory whose first address is `top`."""
        world = self.world
        for index in (0, 1):
            world.pages += [top | base + index << shift | low << 12 for low in self.low_indices()]
        offsets = (0, 1, 3, 17, 256, 511, 1023) if world.size == 4 else (0, 1, 3, 17, 40, 256, 511)
        for index in (2, 3):
            world.pages += [top | base + index << shift | low << 12 for low in offsets]
        world.pages.append(top | base + 4 << shift | 7 << 12)
        world.aliases += [top | base + ALIASES << shift | low << 12 for low in self.alias_indices()]

    # --- modes

    def two_level(self) -> None:
        """Directories of 4 MiB entries; a quarter of each is one shadow page."""
        world, shared, aliases = self.world, self.pages_table(), self.alias_table()
        code = self.code_table()
        for _ in range(3):
            root, own = self.table(2, fixed=True), [self.pages_table(), self.pages_table()]
            for quarter in range(4):
                self.directory(own[quarter % 2], shared, aliases, base=256 * quarter, into=root)
            self.put(root, 700, 2, code | P | W, fixed=True)
            self.put(root, 1022, 2, root | P | W | U)
            world.roots.append(root)
        for quarter in range(4):
            self.list_directory(0, 22, 256 * quarter)
        world.aliases += [1022 << 22 | index << 12 for index in (0, 1, 256, 513, 769, 1022)]
        world.code = 700 << 22

    def pae(self) -> None:
        """Four directories below PDPTEs, some of which are shared."""
        world, shared, aliases = self.world, self.pages_table(), self.alias_table()
        code = self.code_table()
        pdpts = self.table(3, fixed=True)
        common = [self.directory(self.pages_table(), shared, aliases) for _ in range(2)]
        for number in range(3):
            own = self.directory(self.pages_table(), shared, aliases)
            self.put(own, CODE_INDEX, 2, code | P | W, fixed=True)
            self.put(own, 511, 2, own | P | W | U)
            pdpt = pdpts + 32 * number
            self.guest.pdpts.append(pdpt)
            self.put(pdpt, 0, 3, own | P, fixed=True)
            for index, below in ((1, common[0]), (2, own), (3, common[1] if number else common[0])):
                self.put(pdpt, index, 3, below | P)
            world.roots.append(pdpt)
        for index in range(4):
            self.list_directory(index << 30, 21)
            world.aliases += [index << 30 | 511 << 21 | low << 12 for low in (0, 1, 5, 511)]
        world.code = CODE_INDEX << 21

    def region(self, shared: int, aliases: int, below: int) -> int:
        """A page-directory-pointer table: its own directory twice, one that is shared, and 1 GiB or nothing."""
        top, directory = self.table(3), self.directory(self.pages_table(), shared, aliases)
        for index, table in ((0, directory), (2, below)):
            self.put(top, index, 3, self.upper(table))
        self.put(top, 1, 3, world_leaf(self.rng, self.kind, self.guest, self.world, 3) if chance(self.rng, 0.7) else 0)
        return top

    def long(self) -> None:
        world, shared, aliases = self.world, self.pages_table(), self.alias_table()
        five = world.mode == Mode.LONG5
        chain = [self.table(level, fixed=True) for level in (3, 2)]
        self.put(chain[0], 0, 3, chain[1] | P | W, fixed=True)
        self.put(chain[1], 0, 2, self.code_table() | P | W, fixed=True)
        below = self.directory(self.pages_table(), shared, aliases)
        common = self.region(shared, aliases, below)
        for _ in range(3):
            low = self.table(4)
            high = self.table(4) if five else low
            self.put(low, 0, 4, self.upper(self.region(shared, aliases, below)))
            self.put(low, RECURSION, 4, low | P | W | U)
            self.put(high, UPPER, 4, self.upper(common))
            self.put(high, CODE_INDEX, 4, chain[0] | P | W, fixed=True)
            root = low
            if five:
                root = self.table(5, fixed=True)
                self.put(root, 0, 5, self.upper(low))
                self.put(root, 511, 5, high | P | W, fixed=True)
                self.put(root, 5, 5, self.upper(low))
            world.roots.append(root)
        tops = [(0, 0), (511, UPPER)] + [(5, 0)] * five
        for top in tops:
            for index in (0, 2):
                self.list_directory(gva_of(*top, index, 0, 0), 21)
            world.pages += [gva_of(*top, 1, 0, 0), gva_of(*top, 1, 5, 3), gva_of(*top, 1, 0, 17)]
        r, first = RECURSION, 0 if five else 511
        recurring = [(r, 0, 0, 1), (r, 0, 0, 0), (r, r, 0, 0), (r, r, 0, 2), (r, r, r, 0), (r, r, r, r)]
        world.aliases += [gva_of(first, *indices) for indices in recurring]
        world.code = gva_of(511, CODE_INDEX, 0, 0, 0)


# --- entries ---------------------------------------------------------------------------------------------------------------


def world_rights(rng: np.random.Generator, world: World, *, is_leaf: bool, reserved: float = 0.02) -> int:
    """Bits of an entry beside the address."""
    likely = (
        {P: 0.96, W: 0.82, U: 0.8, A: 0.6, D: 0.5, NX: 0.08} if is_leaf else {P: 0.98, W: 0.93, U: 0.93, A: 0.6, D: 0.2, NX: 0.04}
    )
    bits = sum(bit for bit, probability in likely.items() if chance(rng, probability))
    if world.size == 4:
        return bits & ~NX
    return bits | (1 << 51 if chance(rng, reserved) else 0) | (1 << 62 if chance(rng, 0.01) else 0)


def world_leaf(rng: np.random.Generator, kind: Kind, guest: Worlds, world: World, level: int) -> int:
    """A random leaf entry."""
    bits = world_rights(rng, world, is_leaf=True)
    if level == 1:
        if chance(rng, 0.08):
            return bits | one_of(rng, guest.frames)
        return bits | data_frame(rng, kind, high=world.size == 8)
    if world.size == 4:
        frame = one_of(rng, [0, 0x40_0000, 0x40_0000, 0x1000_0000, 0x4000_0000 if kind.huge else 0])
        if chance(rng, 0.05):
            frame |= 1 << 13  # PSE-36: above 4 GiB
        if chance(rng, 0.03):
            frame |= 1 << int(rng.integers(17, 22))  # reserved
        return bits | PS | frame
    if level == 2:
        frame = one_of(rng, [0, MAIN_DATA[0], MAIN_DATA[0] + MIB2, 0x60_0000, 0x80_0000, 0x1000_0000])
        if kind.huge and chance(rng, 0.4):
            frame = one_of(rng, [0x4000_0000, 0x4000_0000 + 5 * MIB2])
        if chance(rng, 0.03):
            frame |= 1 << 13  # reserved
        return bits | PS | frame
    return bits | PS | one_of(rng, [0, 0x4000_0000])


def world_entry(rng: np.random.Generator, kind: Kind, guest: Worlds, world: World, level: int) -> int:
    """What a store puts into an entry of a table of `level`."""
    if chance(rng, 0.08):
        return 0
    if world.mode == Mode.PAE and level == 3:
        return (
            one_of(rng, world.tables[2])
            | (P if chance(rng, 0.9) else 0)
            | (one_of(rng, [2, 4, 1 << 7, 1 << 8, 1 << 50, NX]) if chance(rng, 0.15) else 0)
        )
    if level == 1 or (level <= 3 and chance(rng, 0.4)):
        return world_leaf(rng, kind, guest, world, level)
    if level > 1 and chance(rng, 0.04) and world.mode != Mode.PAE and world.tables.get(level) and world.size == 8:
        table = one_of(rng, world.tables[level])  # a table of the same level: used at two
    else:
        table = one_of(rng, world.tables[level - 1])
    return table | world_rights(rng, world, is_leaf=False) | (PS if level >= 4 and chance(rng, 0.04) else 0)


# --- registers -------------------------------------------------------------------------------------------------------------


def world_registers(rng: np.random.Generator, kind: Kind, guest: Worlds) -> list[Cpu]:
    """Rows of registers: each mode in turn, with WP, SMEP, SMAP, PSE, AC, NX; paging off where the kind has it."""
    rows = []
    large = chance(rng, 0.8)  # shadow pages do not tell a guest with CR4.PSE from one without: it never changes
    for number in range(4 * len(kind.modes) + 4):
        mode = kind.modes[number % len(kind.modes)]
        off = kind.also_off and number % 4 == 3
        plain = number == 0
        cr4 = sum(int(flag) for flag in (CR4.SMEP, CR4.SMAP) if not plain and chance(rng, 0.3))
        cr4 |= int(CR4.PAE) if mode != Mode.TWO_LEVEL else 0
        cr4 |= int(CR4.LA57) if mode == Mode.LONG5 else 0
        cr4 |= int(CR4.PSE) if large else 0
        cr4 |= int(CR4.PCIDE) if kind.pcids and (plain or chance(rng, 0.85)) else 0
        root = one_of(rng, guest.worlds[mode].roots)
        rows.append(
            Cpu(
                cr0=int(CR0.PE) | (0 if off else int(CR0.PG)) | (int(CR0.WP) if plain or chance(rng, 0.6) else 0),
                cr3=root | (int(rng.integers(4)) if cr4 & int(CR4.PCIDE) else 0),
                cr4=cr4,
                efer=(int(EFER.LME | EFER.LMA) if mode in LONG else 0) | (int(EFER.NX) if plain or chance(rng, 0.8) else 0),
                rflags=int(RFLAGS.AC) if chance(rng, 0.3) else 0,
                maxphyaddr=kind.maxphyaddr,
            )
        )
    return list(dict.fromkeys(rows))


def rom_tables_slot() -> dict[str, int]:
    start, end = ROM_TABLES_RANGE
    return {"slot": ROM_TABLES, "gpa": start, "size": end - start, "flags": READONLY, "host_level": 1}


assert ROM_TABLES not in RANGES
