"""Random streams for shadow paging: the guest writes its tables through its own mappings, by stores, by devices beside them."""

from __future__ import annotations

from typing import ClassVar
from zlib import crc32

import numpy as np
from shadow_follower import NO_FLUSH, Follower
from shadow_guests import LONG, ROM_TABLES, SPARE, World, WorldBuilder, rom_tables_slot, world_entry, world_registers, world_rights
from stream_guests import CODE, FETCH, PAGE, TABLES_SLOT, USER, WRITE, Kind, chance, data_frame, one_of
from stream_plans import WEIGHTS, Generator, slot_of

from fastmmu.bits import CR0, CR4
from fastmmu.events import Op
from fastmmu.paging import Cpu, Mode
from fastmmu.reference.walk import PS, GeneralProtection, P

WORD = 2**64 - 1


class ShadowGenerator(Generator):
    """Makes events for a guest whose tables KVM shadows; follows what they do to memory and to each vCPU's translations."""

    weights: ClassVar = {**WEIGHTS, "scene": 9, "cr3": 2.5, "invlpg": 1.5, "registers": 0.7, "mode": 0.5}
    never_deleted = frozenset({TABLES_SLOT, ROM_TABLES})

    def __init__(self, name: str, kind: Kind, seed: int) -> None:
        self.name, self.kind, self.seed = name, kind, seed
        self.rng = np.random.default_rng([seed, crc32(name.encode())])
        self.guest = WorldBuilder(self.rng, kind).build()
        self.cpus = world_registers(self.rng, kind, self.guest)
        self.prepared = [*self.prepare(), rom_tables_slot()]
        self.rows: list[tuple[int, int, int, int, int, int, int]] = []
        self.follower = Follower(self.first_words(), self.cpus[0], kind.vcpus)
        self.slots = self.follower.slots
        self.fixed = set(self.guest.fixed)
        self.vcpu = 0
        self.recent: list[int] = []
        self.late: set[int] = set()  # memslots that were created when the guest had run: MMIO sptes may have outlived that

    def first_words(self) -> dict[int, int]:
        """Memory at the start; data are left out, which are no tables but by accident."""
        return dict(self.guest.words)

    # --- where

    @property
    def cpu(self) -> Cpu:
        return self.follower.vcpu.cpu

    @property
    def world(self) -> World:
        """The tables of the vCPU's mode; without paging, of any."""
        mode = self.cpu.mode
        return self.guest.worlds[mode if mode in self.guest.worlds else self.kind.modes[len(self.rows) % len(self.kind.modes)]]

    def is_table(self, gpa: int) -> bool:
        return gpa & ~(PAGE - 1) in self.guest.frames

    def page(self) -> int:
        """A page worth an access."""
        rng, world = self.rng, self.world
        if not self.cpu.cr0 & int(CR0.PG):
            return one_of(rng, self.guest.frames) if chance(rng, 0.3) else data_frame(rng, self.kind, high=False)
        draw = rng.random()
        if self.recent and draw < 0.55:
            return one_of(rng, self.recent)
        page = one_of(rng, world.aliases if draw > 0.82 else world.pages)
        self.recent = [page, *self.recent[:2]]
        return page

    def address(self, size: int = 1) -> int:
        rng, page = self.rng, self.page()
        if size > 1 and chance(rng, 0.3) and page & 0xFFFFFFFF < 0xFFFFF000:
            return page + PAGE - int(rng.integers(1, size))
        return page + int(rng.integers(PAGE - size + 1))

    def targets(self, gva: int, access: int) -> set[int]:
        """Where an access may go."""
        walk = self.follower.now(gva, access)
        return {one.gpa for one in [walk] * walk.ok + self.follower.older(gva, access)}

    # --- accesses

    def fetch(self) -> None:
        """Only where no translation leads to a device, where KVM gives up; then a fetch from the page of code."""
        gva, access = self.address(), FETCH | (USER if chance(self.rng, 0.5) else 0)
        if self.is_plain_memory(gva):
            self.add(Op.ACCESS, access, gva)
        self.add(Op.ACCESS, FETCH, self.world.code if self.cpu.cr0 & int(CR0.PG) else CODE)

    def is_plain_memory(self, gva: int) -> bool:
        """Whether every translation of a page, whoever asks, leads to memory through tables, not through data."""
        follower = self.follower
        for access in (0, USER, FETCH, FETCH | USER, WRITE, WRITE | USER):
            walk = follower.now(gva, access)
            if self.cpu.cr0 & int(CR0.PG) and any(not self.is_table(gpa) for gpa in follower.view.seen):
                return False
            for gpa in [walk.gpa] * walk.ok + [one.gpa for one in follower.older(gva, access)]:
                slot = slot_of(self.slots, gpa)
                if slot is None or slot.identity in self.late:
                    return False
        return True

    def write(self) -> None:
        size = int(self.rng.choice([1, 2, 4, 7, 8, 8]))
        self.put(Op.WRITE, self.address(size), size)

    def exchange(self) -> None:
        size = int(self.rng.choice([1, 4, 8]))
        self.put(Op.EXCHANGE, self.address(size), size)

    def put(self, op: Op, gva: int, size: int) -> None:
        """A WRITE or EXCHANGE: what it does to tables is chosen, and certain."""
        rng, access = self.rng, WRITE | (USER if chance(self.rng, 0.5) else 0)
        value, compared = int(rng.integers(1 << 63)), 0
        walk = self.follower.now(gva, access)
        if walk.ok and self.is_table(walk.gpa) and gva % PAGE + size <= PAGE:
            gva, size, value = self.table_write(gva, walk.gpa, size)
        pages = [gva] + ([(gva | PAGE - 1) + 1] if gva % PAGE + size > PAGE else [])
        reached = [self.targets(page, access) for page in pages]
        tables = any(self.is_table(gpa) for targets in reached for gpa in targets)
        sure = len(pages) == 1 and self.follower.now(pages[0], access).ok and len(reached[0]) == 1  # where it goes
        if tables and not sure:
            for page in pages:
                self.invlpg_of(page)
        walks = [self.follower.now(page, access) for page in pages]
        if tables and len(pages) > 1:  # emulated page by page: it changes no table whatever becomes of it
            value, shift = 0, 0
            for page, one in zip(pages, walks, strict=True):
                part = min(size - shift // 8, PAGE - page % PAGE)
                value |= (self.follower.read(one.gpa, part) if one.ok else 0) << shift
                shift += 8 * part
        elif walks[0].ok and self.is_table(walks[0].gpa) and self.touches_fixed(walks[0].gpa, size):
            value = self.follower.read(walks[0].gpa, size)
        done = True
        if op == Op.EXCHANGE:
            old = self.follower.read(walks[0].gpa, size) if walks[0].ok else 0
            done = not (tables and self.has_accessed_bits(walks[0].gpa, size)) and chance(rng, 0.7)
            compared = old if done else old ^ 0x80  # A and D are not followed here: by another bit it fails for certain
        self.add(op, access, gva, value, size)
        if op == Op.EXCHANGE:
            self.add(Op.OPERAND, value=compared)
        shift = 0
        if all(one.ok for one in walks) and (done or op == Op.WRITE):
            for page, one in zip(pages, walks, strict=True):
                part = min(size - shift, PAGE - page % PAGE)
                if not self.follower.is_device(one.gpa, True):
                    self.follower.write(len(self.rows), one.gpa, part, value >> 8 * shift)
                shift += part
        if tables and len(pages) == 1 and chance(rng, 0.5):
            self.after_store(self.guest.levels.get(walks[0].gpa & -self.world.size, (None, 1))[1])

    def has_accessed_bits(self, gpa: int, size: int) -> bool:
        """Whether these bytes may include A or D of an entry."""
        width = 8 if Mode.TWO_LEVEL not in self.kind.modes else 4
        return any(byte % width == 0 for byte in range(gpa, gpa + size))

    def table_write(self, gva: int, gpa: int, size: int) -> tuple[int, int, int]:
        """(gva, size, value) of a write to the table at `gpa`, whatever the guest would write there."""
        rng, frame = self.rng, gpa & ~(PAGE - 1)
        page = gva & ~(PAGE - 1)
        here = [one for one in self.guest.levels if one & ~(PAGE - 1) == frame]
        if not here or chance(rng, 0.12):  # where no entry is used
            offset = SPARE.start + int(rng.integers(len(SPARE) - 8))
            return page + offset, size, int(rng.integers(1 << 63)) | P
        at = one_of(rng, here)
        mode, level = self.guest.levels[at]
        world = self.guest.worlds[mode]
        entry = self.entry(world, level, at)
        width = world.size
        draw = rng.random()
        if draw < 0.6:  # the entry
            return page + at % PAGE, width, entry
        first = at & ~7
        image = self.follower.read(first, 8)
        mask = (1 << 8 * width) - 1 << 8 * (at - first)
        image = (image & ~mask) | (entry << 8 * (at - first) & mask)
        if draw < 0.75 or at % PAGE > PAGE - 16:  # the word around it
            return page + first % PAGE, 8, image
        if draw < 0.9:  # part of it
            start = int(rng.integers(8 - min(size, 7) + 1))
            return page + (first + start) % PAGE, min(size, 7), image >> 8 * start
        start = int(rng.integers(1, 8))  # over its end
        wide = image | self.follower.read(first + 8, 8) << 64
        return page + (first + start) % PAGE, 8, wide >> 8 * start & WORD

    def entry(self, world: World, level: int, gpa: int) -> int:
        """What the guest makes of an entry."""
        rng = self.rng
        old = self.follower.read(gpa, world.size)
        is_pdpte = world.mode == Mode.PAE and level == 3
        if old & P and not is_pdpte and chance(rng, 0.4):  # the same address with other rights
            keep = 0xFFFFF000 if world.size == 4 else 0xF_FFFF_FFFF_F000
            return old & (keep | PS) | world_rights(rng, world, is_leaf=level == 1 or bool(old & PS))
        if chance(rng, 0.35):
            return self.guest.words.get(gpa & ~7, 0) >> 8 * (gpa & 7) & (1 << 8 * world.size) - 1
        return world_entry(rng, self.kind, self.guest, world, level)

    def touches_fixed(self, gpa: int, size: int) -> bool:
        return any(word in self.fixed for word in range(gpa & ~7, gpa + size, 8))

    # --- stores

    def store(self) -> None:
        rng, world = self.rng, self.world
        if chance(rng, 0.04):  # to data, read-only memory or a device
            self.add(
                Op.STORE,
                address=data_frame(rng, self.kind, high=False) + 8 * int(rng.integers(512)),
                value=int(rng.integers(1 << 63)),
            )
            return
        level = int(rng.choice([1, 1, 1, 1, 1, 1, 2, 2, 3, 4 if chance(rng, 0.4) else 1]))
        level = level if level in world.entries and (level != 3 or world.mode != Mode.PAE or chance(rng, 0.5)) else 1
        gpa = one_of(rng, world.entries[level])
        again = bool(self.recent and self.cpu.cr0 & int(CR0.PG) and chance(rng, 0.6))
        if again:  # an entry that a page in use goes through
            gva = self.recent[0]
            self.follower.now(gva, 0)
            known = [(self.guest.levels[one][1], one) for one in self.entries_read(gva) if one in self.guest.levels]
            if known:
                level, gpa = min(known) if chance(rng, 0.75) else known[int(rng.integers(len(known)))]
        self.store_entry(world, level, gpa)
        if again:
            self.after_store(level)

    def entries_read(self, gva: int) -> list[int]:
        """Entries that the last walk read: those of the words, by this mode's size."""
        words = sorted(self.follower.view.seen)
        return words if self.world.size == 8 else [word + half for word in words for half in (0, 4)]

    def store_entry(self, world: World, level: int, gpa: int) -> None:
        self.store_image(world, gpa, self.entry(world, level, gpa))

    def store_image(self, world: World, gpa: int, value: int) -> None:
        """A STORE of 8 bytes that makes the entry at `gpa` this."""
        first, shift, mask = gpa & ~7, 8 * (gpa & 7), (1 << 8 * world.size) - 1
        word = (self.follower.read(first, 8) & ~(mask << shift)) | (value & mask) << shift
        if first in self.fixed:
            return
        self.add(Op.STORE, address=first, value=word)
        if not self.follower.is_device(first, True):
            self.follower.write(len(self.rows), first, 8, word)

    def after_store(self, level: int) -> None:
        """INVLPG after only some changes; then what shows whether KVM noticed."""
        rng = self.rng
        if not self.recent:
            return
        page = self.recent[0]
        self.recent = [page]
        if chance(rng, 0.35):
            self.invlpg_of(page if chance(rng, 0.6) else page ^ PAGE)
        for _ in range(int(rng.integers(3))):
            getattr(self, str(rng.choice(["access", "access", "load", "write", "fetch"])))()

    def scene(self) -> None:
        """A page is used, its tables change, something is flushed or nothing, it is used again."""
        rng, follower = self.rng, self.follower
        if not self.cpu.cr0 & int(CR0.PG):
            return
        for _ in range(6):
            page, access = one_of(rng, self.world.pages), int(rng.choice([0, WRITE, USER, USER | WRITE]))
            if follower.now(page, access).ok:
                break
        else:
            return
        self.recent = [page]
        self.touch(page, access)
        known = [one for one in self.entries_read(page) if one in self.guest.levels]
        if not known:
            return
        first = self.vcpu
        if chance(rng, 0.25):
            self.other_vcpu()
        for _ in range(int(rng.choice([1, 1, 2]))):
            self.change(min(known, key=lambda one: self.guest.levels[one][1]) if chance(rng, 0.7) else one_of(rng, known))
        if self.vcpu != first and chance(rng, 0.6):
            self.other_vcpu(first)
        draw = rng.random()
        if draw < 0.22:
            self.invlpg_of(page if chance(rng, 0.7) else page ^ PAGE << int(rng.integers(10)))
        elif draw < 0.32:
            self.cr3()
        elif draw < 0.37:
            self.flush()
        elif draw < 0.43:
            self.set_registers(Op.REGISTERS if chance(rng, 0.6) else Op.MODE)
        for _ in range(int(rng.integers(1, 4))):
            self.touch(page, access if chance(rng, 0.7) else int(rng.choice([0, WRITE, USER, USER | WRITE])))

    def touch(self, page: int, access: int) -> None:
        """Any access to a page."""
        if not self.is_address(page):
            return
        if access & WRITE and chance(self.rng, 0.5):
            self.put(Op.WRITE, page + int(self.rng.integers(PAGE - 8)), 8)
        elif chance(self.rng, 0.3):
            self.add(Op.LOAD, access & USER, page + 8 * int(self.rng.integers(512)), size=8)
        else:
            self.add(Op.ACCESS if chance(self.rng, 0.8) else Op.DEVICE, access, page + int(self.rng.integers(PAGE)))
        self.follower.now(page, access)

    def is_address(self, gva: int) -> bool:
        return self.cpu.mode in LONG or gva < 1 << 32

    def change(self, gpa: int) -> None:
        """Another entry: by STORE, or through an address of the table."""
        mode, level = self.guest.levels[gpa]
        world = self.guest.worlds[mode]
        if chance(self.rng, 0.6) and self.cpu.cr0 & int(CR0.PG):
            for _ in range(30):
                gva = one_of(self.rng, self.world.aliases) + gpa % PAGE
                walk = self.follower.now(gva, WRITE)
                if walk.ok and walk.gpa == gpa and not self.touches_fixed(gpa, world.size) and self.targets(gva, WRITE) == {gpa}:
                    value = self.entry(world, level, gpa)
                    self.add(Op.WRITE, WRITE, gva, value, world.size)
                    if not self.follower.is_device(gpa, True):
                        self.follower.write(len(self.rows), gpa, world.size, value)
                    return
        self.store_entry(world, level, gpa)

    # --- flushes and registers

    def invlpg(self) -> None:
        self.invlpg_of(self.address())

    def invlpg_of(self, gva: int) -> None:
        self.add(Op.INVLPG, address=gva)
        self.follower.invlpg(len(self.rows), gva)

    def flush(self) -> None:
        self.add(Op.FLUSH)
        self.follower.flush(len(self.rows))

    def cr3(self) -> None:
        rng, cpu = self.rng, self.cpu
        value = one_of(rng, self.world.roots)
        if cpu.cr4 & int(CR4.PCIDE):
            number = self.world.roots.index(value)
            value |= number if chance(rng, 0.7) else int(rng.integers(4))
            value |= NO_FLUSH if chance(rng, 0.6) else 0
        elif chance(rng, 0.2):
            value = self.follower.vcpu.cr3  # the same again
        self.load_cr3(value)

    def load_cr3(self, value: int) -> None:
        self.add(Op.CR3, value=value)
        self.follower.load_cr3(len(self.rows), value)

    def set_registers(self, op: Op) -> None:
        row = int(self.rng.integers(len(self.cpus)))
        cpu, vcpu = self.cpus[row], self.follower.vcpu
        if op == Op.REGISTERS:
            row = self.prepare_registers(row)
            if row is None:
                return
            cpu = self.cpus[row]
        self.repair(cpu, vcpu.cr3 if op == Op.REGISTERS else cpu.cr3)
        self.recent = []
        self.add(op, value=row)
        self.follower.set_registers(len(self.rows), cpu, by_guest=op == Op.REGISTERS)
        if cpu.mode == Mode.PAE:  # whether the PDPTEs were loaded does not matter then
            self.load_cr3(self.follower.vcpu.cr3)

    def prepare_registers(self, row: int) -> int | None:
        """The guest itself goes from mode to mode with paging off, and to PCIDs with PCID 0."""
        cpu, vcpu = self.cpus[row], self.follower.vcpu
        old, new = vcpu.cpu, cpu
        if old.mode != new.mode and new.mode != Mode.NONE:
            if old.mode != Mode.NONE:
                off = [number for number, one in enumerate(self.cpus) if one.mode == Mode.NONE]
                if not off:
                    return None
                return one_of(self.rng, off)
            self.load_cr3(one_of(self.rng, self.guest.worlds[new.mode].roots))
        elif new.cr4 & int(CR4.PCIDE) and not old.cr4 & int(CR4.PCIDE) and vcpu.cr3 & PAGE - 1:
            self.load_cr3(vcpu.cr3 & ~(PAGE - 1))
        return row

    def repair(self, cpu: Cpu, cr3: int) -> None:
        """Store valid PDPTEs where they are loaded without a way to refuse."""
        if cpu.mode != Mode.PAE:
            return
        try:
            self.follower.pdptes(cpu, cr3)
        except GeneralProtection:
            for gpa in range(cr3 + 8, cr3 + 32, 8):
                self.store_image(self.guest.worlds[Mode.PAE], gpa, self.guest.words[gpa])

    def other_vcpu(self, number: int | None = None) -> None:
        mode = self.cpu.mode
        self.vcpu = int(self.rng.integers(self.kind.vcpus)) if number is None else number
        self.add(Op.VCPU, value=self.vcpu)
        self.follower.vcpu = self.follower.vcpus[self.vcpu]
        if self.cpu.mode != mode:
            self.recent = []

    # --- the host

    def create(self, row: int) -> None:
        super().create(row)
        if len(self.rows) > len(self.prepared):
            self.late.add(self.prepared[row]["slot"])
