"""Scenario documents (kvm-truth/1) that no file holds: named variants of the recorded kinds, and random ones.

No `expect` but one member: what userspace supplies for device reads, from which both models take it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Document = dict[str, Any]
Words = dict[int, int]

PAGE, MIB2, GIB = 0x1000, 0x200000, 0x40000000
DATA, ALIAS, PERMISSIONS, DEVICE = 0x8000000000, 0x9000000000, 0xA000000000, 0x10000000000  # gva, each under its own PML4 entry
DATA_GPA, DEVICE_GPA = 0x40000000, 0xD0000000
ENTRY, UPPER, HUGE = 0x67, 0x27, 0xE7  # P W U A D; P W U A; P W U A D PS
NX, RESERVED = 1 << 63, 1 << 51
CR0, CR0_NO_WP, CR4, EFER = 0x80010031, 0x80000031, 0x220, 0xD00
INTERPRETER = {"code": "0x4000", "code_end": "0x4191", "jump_table": "0x40dc", "pf_handler": "0x4120", "nonpaging": "0x4175"}
LOG, READONLY = "KVM_MEM_LOG_DIRTY_PAGES", "KVM_MEM_READONLY"
CAPABILITY = "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"
SUPPLY = 48  # device reads of a step that get data; those behind them read zeros
TDP, TDP_N, NONPAGING = "tdp", "tdp_n", "nonpaging"  # npt1, npt1-tdpN, npt0 with guest paging off
KINDS = (TDP, TDP_N, NONPAGING)
SHADOW = "shadow"  # npt0 with guest paging on; its scenarios are in `shadow_scenarios`


def runs_of(words: Words) -> list[dict[str, Any]]:
    """Words as runs: neighbours whose values go up by the same."""
    runs: list[list[int]] = []  # gpa, count, value, step
    for gpa, value in sorted(words.items()):
        if runs and gpa == runs[-1][0] + 8 * runs[-1][1]:
            last = runs[-1]
            if last[1] == 1:
                last[3] = (value - last[2]) % (1 << 64)
            if value == (last[2] + last[1] * last[3]) % (1 << 64):
                last[1] += 1
                continue
        runs.append([gpa, 1, value, 0])
    return [run(*one[:3], step=one[3], stride=8) for one in runs]


def run(gpa: int, count: int, value: int, *, step: int = 0, stride: int = 8) -> dict[str, Any]:
    """A run of words."""
    return {"gpa": hex(gpa), "count": count, "value": hex(value), "step": hex(step), "stride": hex(stride)}


def bits_of(pages: set[int], count: int) -> str:
    """A bitmap over `count` pages."""
    data = bytearray(-(-count // 8))
    for page in pages:
        data[page // 8] |= 1 << page % 8
    return data.hex()


class Tables:
    """The guest's page tables: pages from 0x100000 on, PML4 first; 0..8 MiB mapped to itself by 4 KiB entries."""

    def __init__(self) -> None:
        self.words: Words = {}
        self.free = 0x100000
        self.root = self.table()
        for gpa in range(0, 0x800000, PAGE):
            self.map(gpa, gpa)

    def table(self) -> int:
        """A page for one more table."""
        self.free += PAGE
        return self.free - PAGE

    def entry(self, gva: int, level: int = 1, *, root: int | None = None) -> int:
        """Address of the entry for `gva`; upper tables are made as needed."""
        table = self.root if root is None else root
        for height in range(4, level, -1):
            at = table + (gva >> 12 + 9 * (height - 1) & 511) * 8
            if at not in self.words:
                self.words[at] = self.table() | UPPER
            table = self.words[at] & ~0xFFF & ~NX
        return table + (gva >> 12 + 9 * (level - 1) & 511) * 8

    def map(self, gva: int, gpa: int, bits: int = ENTRY, level: int = 1, *, root: int | None = None) -> int:
        """Map a page; the address of its entry."""
        at = self.entry(gva, level, root=root)
        self.words[at] = gpa | bits
        return at

    def second_root(self) -> int:
        """Another PML4 that shares everything but the device window."""
        root = self.table()
        for number in range(512):
            if number != DEVICE >> 39 and self.root + 8 * number in self.words:
                self.words[root + 8 * number] = self.words[self.root + 8 * number]
        return root


class Builder:
    """Writes one document: config, memory, steps."""

    def __init__(
        self, kind: str, *, eager: bool = True, nx: bool = False, mmio_caching: bool = True, vcpus: int = 1,
        low_flags: tuple[str, ...] = (), low_host: str = "4K",
    ) -> None:  # fmt: skip
        self.kind, self.paging = kind, kind != NONPAGING
        self.config = {
            "npt": kind not in (NONPAGING, SHADOW), "tdp_mmu": kind == TDP, "eager_page_split": eager,
            "nx_huge_pages": "force" if nx else "off", "mmio_caching": mmio_caching,
        }  # fmt: skip
        self.tables = Tables()
        self.data: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.slots: dict[int, dict[str, Any]] = {}
        self.modes: dict[int, dict[str, Any]] = {}
        self.supplied = 0
        self.slot(0, 0, 0x800000, low_flags, host=low_host)
        for vcpu in range(vcpus):
            if vcpu:
                self.steps.append({"do": "create_vcpu", "vcpu": vcpu})
            self.mode(vcpu)

    def document(self) -> Document:
        """What was built."""
        registers = {"cr0": hex(CR0), "cr3": hex(self.tables.root), "cr4": hex(CR4), "efer": hex(EFER)}
        return {
            "format": "kvm-truth/1",
            "config": self.config,
            "scenario": "built",
            "cpu": {"cpuid": {"maxphyaddr": 40, "host_maxphyaddr": 40, "pdpe1gb": True}, "cpl": 0, **registers},
            "interpreter": INTERPRETER,
            "memory": runs_of(self.tables.words) + self.data,
            "steps": self.steps,
        }

    # --- host steps

    def slot(
        self,
        number: int,
        gpa: int,
        size: int,
        flags: tuple[str, ...] = (),
        *,
        host: str = "4K",
        offset: int = 0,
        fresh: bool = False,
    ) -> None:
        """Create a memslot. With `fresh` the host writes zeros where ops of these scenarios may have written before."""
        backing = {"page": host, "hva_minus_gpa_mod_2m": hex(offset % MIB2), "hva_minus_gpa_mod_1g": hex(offset % GIB)}
        step = {
            "do": "slot",
            "change": "create",
            "slot": number,
            "gpa": hex(gpa),
            "size": hex(size),
            "flags": list(flags),
            "host": backing,
        }
        self.steps.append(step)
        self.slots[number] = {"gpa": gpa, "size": size, "flags": tuple(flags)}
        if fresh:
            pages = size // PAGE
            self.memory([run(gpa + at, pages, 0, stride=PAGE) for at in (0, 8, 16, 24, 4088)])

    def flags(self, number: int, *flags: str) -> None:
        """Change the flags of a memslot."""
        slot = self.slots[number]
        slot["flags"] = flags
        step = {
            "do": "slot",
            "change": "flags",
            "slot": number,
            "gpa": hex(slot["gpa"]),
            "size": hex(slot["size"]),
            "flags": list(flags),
        }
        self.steps.append(step)

    def log(self, number: int, on: bool) -> None:
        """Dirty logging on or off."""
        others = [flag for flag in self.slots[number]["flags"] if flag != LOG]
        self.flags(number, *others, *([LOG] if on else []))

    def delete(self, number: int) -> None:
        """Delete a memslot."""
        gpa = self.slots.pop(number)["gpa"]
        self.steps.append({"do": "slot", "change": "delete", "slot": number, "gpa": hex(gpa), "size": "0x0", "flags": []})

    def mode(self, vcpu: int = 0, *, cpl: int = 0, wp: bool = True, cr3: int | None = None, low: int = 0) -> None:
        """KVM_SET_SREGS; without paging `low` is xored into CR0."""
        if self.paging:
            registers = {"cr0": CR0 if wp else CR0_NO_WP, "cr3": self.tables.root if cr3 is None else cr3, "cr4": CR4, "efer": EFER}
        else:
            registers = {"cr0": 0x31 ^ low, "cr3": 0, "cr4": 0, "efer": 0}
        self.modes[vcpu] = {"cpl": cpl, **{name: hex(value) for name, value in registers.items()}}
        self.steps.append({"do": "mode", "vcpu": vcpu, **self.modes[vcpu]})

    def memory(self, runs: list[dict[str, Any]]) -> None:
        """The host writes guest memory."""
        self.steps.append({"do": "memory", "runs": runs})

    def cap(self, value: int) -> None:
        """Manual dirty-log protection: 1, or 3 with the bitmap initially all set."""
        self.steps.append({"do": "enable_cap", "cap": CAPABILITY, "args": [value]})

    def limit(self, pages: int) -> None:
        """The limit of shadow pages."""
        self.steps.append({"do": "set_nr_mmu_pages", "n": pages})

    def param(self, name: str, value: Any) -> None:
        """A module parameter changes."""
        self.steps.append({"do": "param", "name": name, "value": value})

    def get(self, number: int) -> None:
        """KVM_GET_DIRTY_LOG."""
        self.steps.append({"do": "dirty_get", "slot": number, "pages": self.slots[number]["size"] // PAGE})

    def clear(self, number: int, first: int, pages: int, which: set[int] | None = None) -> None:
        """KVM_CLEAR_DIRTY_LOG of `pages` pages from `first`, or of some of them."""
        bitmap = bits_of(set(range(pages)) if which is None else which, pages)
        self.steps.append({"do": "dirty_clear", "slot": number, "first": first, "pages": pages, "bitmap": bitmap})

    def read(self, gpa: int) -> None:
        """The host reads a word."""
        self.steps.append({"do": "host_read", "gpa": hex(gpa)})

    # --- guest steps

    def guest(self, *ops: tuple[Any, ...], vcpu: int = 0, rip: int | None = None) -> None:
        """The guest runs. Numbers become hex strings; the count of a loop stays."""
        written = []
        for name, *rest in ops:
            numbers = [hex(value) for value in (rest[:2] if name.startswith("LOOP") else rest)]
            written.append(
                [name, *numbers, *(rest[2:] if name.startswith("LOOP") else [])] + [None] * (name in ("R8", "R4", "CMPX"))
            )
        regs = {"rip": 0x4000 if self.paging else 0x4175, "rsp": 0x6800 if vcpu else 0x8000}
        if self.paging:
            regs["commands"] = 0x22000 if vcpu else 0x20000
        mode = {name: self.modes[vcpu][name] for name in ("cpl", "cr0", "cr3")}
        self.supplied += 1
        supply = [["R", "0x0", 8, hex((self.supplied << 32 | i) * 0x10001)] for i in range(SUPPLY)]
        step = {"do": "guest", "vcpu": vcpu, **mode, "regs": {name: hex(value) for name, value in regs.items()}, "ops": written}
        self.steps.append({**step, "expect": {"mmio": supply}})

    def warm(self, vcpu: int = 0) -> None:
        """The first run, as the recorded files have it."""
        if self.paging:
            self.guest(("LOOPR", 0, PAGE, 36), ("LOOPW", 0x6FF8, PAGE, 4), ("W8", 0x10000, 0), vcpu=vcpu)
        else:
            self.guest(("LOOPR", 0x4000, PAGE, 1), vcpu=vcpu)

    def at(self, offset: int) -> int:
        """Address of the data at `offset`: by its window, or without paging the gpa itself."""
        return (DATA if self.paging else DATA_GPA) + offset

    def device(self, offset: int) -> int:
        """Address of the device at `offset`."""
        return (DEVICE if self.paging else DEVICE_GPA) + offset

    def map_data(self, pages: int, gpa: int = DATA_GPA, *, huge: bool = False, told: int | None = None) -> None:
        """Map the data window, and tell its pages apart, or as many as there is memory for."""
        for i in range(-(-pages // 512) if huge else pages):
            level, size = (2, MIB2) if huge else (1, PAGE)
            self.tables.map(DATA + i * size, gpa + i * size, HUGE if huge else ENTRY, level)
        self.data.append(run(gpa + 8, pages if told is None else told, 0xD0000, step=1, stride=PAGE))

    def map_device(self, pages: int = 8, readonly: int = 2) -> None:
        """Map the device window, one page read-only."""
        for i in range(pages):
            self.tables.map(DEVICE + i * PAGE, DEVICE_GPA + i * PAGE, ENTRY if i != readonly else 0x65)


# --- named variants --------------------------------------------------------------------------------------------------------


def odd_slot(kind: str) -> Document:
    """A: 700 pages in a slot that begins and ends inside groups of 8, written block by block from the top down."""
    b = Builder(kind)
    b.map_data(700, DATA_GPA + 3 * PAGE, told=698)
    b.slot(1, DATA_GPA + 3 * PAGE, 698 * PAGE)  # the last two pages of the window are nowhere
    base = b.at(0) if b.paging else b.at(3 * PAGE)
    b.warm()
    b.guest(*[("LOOPW", base + at * PAGE, PAGE, 7) for at in range(691, 340, -7)])
    b.guest(("LOOPW", base + 697 * PAGE, PAGE, 3), ("LOOPR", base, 3 * PAGE, 233))
    b.log(1, True)
    b.guest(("LOOPR", base, PAGE, 700))
    b.guest(*[("LOOPW", base + at * PAGE, PAGE, 3) for at in range(690, 0, -30)])
    b.get(1)
    b.guest(("LOOPW", base, 5 * PAGE, 139))
    b.get(1)
    b.get(1)
    b.log(1, False)
    b.guest(("LOOPW", base, PAGE, 700))
    b.delete(1)
    b.guest(("LOOPR", base, 100 * PAGE, 6))
    return b.document()


def logged_first(kind: str) -> Document:
    """A: logging is on before the first touch, which is a read; then writes."""
    b = Builder(kind)
    b.map_data(100)
    b.slot(1, DATA_GPA, 100 * PAGE, (LOG,))
    b.warm()
    b.guest(("LOOPR", b.at(0), 3 * PAGE, 33))
    b.get(1)
    b.guest(("LOOPR", b.at(0), PAGE, 100))
    b.guest(("LOOPW", b.at(0), 2 * PAGE, 50))
    b.get(1)
    b.guest(("LOOPW", b.at(0), PAGE, 100))
    b.get(1)
    b.log(1, False)
    b.guest(("LOOPR", b.at(0), PAGE, 100))
    return b.document()


def huge(kind: str, *, gpa: int = DATA_GPA, pages: int = 2048, offset: int = 0, eager: bool = True, host: str = "2M") -> Document:
    """B: 2M host pages, logging on, 4K reads and writes, logging off."""
    b = Builder(kind, eager=eager)
    b.map_data(pages + gpa % MIB2 // PAGE, gpa & -MIB2, huge=True, told=pages)
    b.slot(1, gpa, pages * PAGE, host=host, offset=offset)
    base = b.at(gpa % MIB2)
    b.warm()
    b.guest(("LOOPR", base + 8, MIB2, pages // 512), ("LOOPW", base + (pages - 1) * PAGE + 8, PAGE, 1))
    b.guest(("LOOPW", base + 8, MIB2, pages // 512))
    b.log(1, True)
    b.guest(("LOOPR", base + 8, 16 * PAGE, pages // 16))
    b.guest(("LOOPW", base + 8, 24 * PAGE, pages // 24))
    b.get(1)
    b.guest(("LOOPW", base + 8, 40 * PAGE, pages // 40), ("LOOPR", base + 8, 64 * PAGE, pages // 64))
    b.get(1)
    b.log(1, False)
    b.guest(("LOOPR", base + 8, 64 * PAGE, pages // 64))
    b.guest(("LOOPW", base + 8, 32 * PAGE, pages // 32))
    return b.document()


def gigabyte(kind: str) -> Document:
    """B: a 1G host page in a slot of 1 GiB, logged without eager split."""
    b = Builder(kind, eager=False)
    b.map_data(2048, huge=True)
    b.slot(1, DATA_GPA, GIB, host="1G")
    b.warm()
    b.guest(("LOOPR", b.at(8), MIB2, 4), ("LOOPW", b.at(8), MIB2, 4))
    b.log(1, True)
    b.guest(("LOOPR", b.at(8), MIB2, 4), ("LOOPW", b.at(8), 0x81000, 15))
    b.get(1)
    b.guest(("LOOPW", b.at(8), 0x81000, 15))
    if kind != NONPAGING:
        b.log(1, False)
        b.guest(("LOOPR", b.at(8), 0x81000, 15), ("LOOPW", b.at(8), MIB2, 4))
    return b.document()


def initially_set(kind: str, *, eager: bool = True, single: bool = False) -> Document:
    """Binit: everything dirty at first; odd ranges and scattered pages are cleared, or `single` pages inside huge ones."""
    b = Builder(kind, eager=eager)
    b.map_data(2048, huge=True)
    b.cap(3)
    b.slot(1, DATA_GPA, 2048 * PAGE, host="2M")
    b.warm()
    b.guest(("LOOPW", b.at(8), MIB2, 4))
    b.log(1, True)
    b.guest(("LOOPR", b.at(8), 32 * PAGE, 64), ("LOOPW", b.at(8), 128 * PAGE, 16))
    b.get(1)
    if single:
        b.clear(1, 704, 64, {3})
    b.clear(1, 64, 128, {*range(17, 90), 120, 127})
    b.guest(("LOOPW", b.at(8), 8 * PAGE, 256))
    b.clear(1, 448, 320, {*range(63, 65), *range(70, 317, 3)})
    b.guest(("LOOPW", b.at(8), 8 * PAGE, 256))
    b.clear(1, 1024, 64, {0, 1})
    b.clear(1, 1472, 512)
    b.get(1)
    b.guest(("LOOPR", b.at(8), 8 * PAGE, 256))
    b.guest(("LOOPW", b.at(8), 7 * PAGE, 292))
    b.get(1)
    b.log(1, False)
    b.guest(("LOOPW", b.at(8), 16 * PAGE, 128))
    return b.document()


def manual(kind: str) -> Document:
    """B under manual protection without the bitmap initially set: only a clear protects."""
    b = Builder(kind)
    b.map_data(520)
    b.cap(1)
    b.slot(1, DATA_GPA, 520 * PAGE, host="2M")
    b.warm()
    b.guest(("LOOPW", b.at(0), 64 * PAGE, 9))
    b.log(1, True)
    b.guest(("LOOPW", b.at(0), 5 * PAGE, 104))
    b.get(1)
    b.get(1)
    b.clear(1, 0, 512, set(range(0, 512, 7)))
    b.guest(("LOOPW", b.at(0), 7 * PAGE, 75))
    b.get(1)
    b.clear(1, 448, 72)
    b.clear(1, 0, 520)
    b.guest(("LOOPR", b.at(0), PAGE, 520))
    b.get(1)
    return b.document()


def executed(kind: str) -> Document:
    """Bexec: 2M pages read, executed, written while NX huge pages are forced; logging on and off."""
    b = Builder(kind, nx=True)
    b.map_data(2048, huge=True)
    b.slot(1, DATA_GPA, 2048 * PAGE, host="2M")
    b.warm()
    b.guest(("LOOPW", b.at(8), MIB2, 2), ("LOOPX", b.at(PAGE), MIB2, 4))
    b.guest(("EXEC", b.at(5 * PAGE)), ("LOOPR", b.at(8), 64 * PAGE, 32), ("LOOPW", b.at(8), MIB2, 4))
    b.log(1, True)
    b.guest(("LOOPX", b.at(0), 96 * PAGE, 20), ("LOOPW", b.at(8), 32 * PAGE, 64))
    b.get(1)
    b.guest(("LOOPW", b.at(8), 48 * PAGE, 40))
    b.log(1, False)
    b.guest(("LOOPR", b.at(8), 64 * PAGE, 32))
    b.guest(("LOOPX", b.at(0), MIB2, 4), ("LOOPW", b.at(8), MIB2, 4))
    return b.document()


def devices(kind: str, **config: bool) -> Document:
    """C: remaps, two roots, slots over the device, read-only slots, accesses over page boundaries."""
    b = Builder(kind, **config)
    b.map_data(8)
    b.map_device()
    entry = b.tables.entry(DEVICE)
    other = b.tables.second_root()
    b.tables.map(DEVICE, DEVICE_GPA + 0x100000, root=other)
    root = b.tables.root
    b.slot(1, DATA_GPA, 8 * PAGE)
    b.warm()
    d = b.device(0)
    b.guest(("R8", d + 16), ("R4", d + 20), ("W8", d + 8, 0x1122334455667788), ("W4", d + 12, 0xABCD), ("R8", d + 0xFFC))
    b.guest(("R8", d + PAGE), ("R8", d), ("R8", d + PAGE + 8), ("CMPX", d + 32, 5, 6), ("W8", d + 0xFF9, 0x0102030405060708))
    b.guest(("R8", d), ("W8", entry, DEVICE_GPA + 0x10000 | ENTRY), ("INVLPG", d), ("R8", d), ("W8", entry, DATA_GPA | ENTRY))
    b.guest(("R8", d + 8), ("W8", entry, 0), ("INVLPG", d), ("R8", d), ("W8", entry, DEVICE_GPA | ENTRY), ("INVLPG", d), ("R8", d))
    b.guest(("CR3", other), ("R8", d), ("CR3", root), ("R8", d), ("CR3", other), ("W8", d, 1), ("CR3", root), ("R8", d))
    b.guest(("R8", d + 2 * PAGE), ("W8", d + 2 * PAGE, 1), ("R8", d + 2 * PAGE - 4), ("R8", b.at(7 * PAGE + 0xFFC)))
    b.slot(2, DEVICE_GPA, 4 * PAGE, fresh=True)
    b.guest(
        ("R8", d), ("W8", d + 8, 0x77), ("R8", d + PAGE), ("R8", d + 3 * PAGE + 0xFFC), ("W8", d + 3 * PAGE + 0xFFC, 1 << 60 | 9)
    )
    b.read(DEVICE_GPA + 8)
    b.delete(2)
    b.guest(("R8", d), ("R8", d + 8), ("R8", d + PAGE), ("CMPX", d + 3 * PAGE + 8, 1, 0))
    b.slot(2, DEVICE_GPA, 4 * PAGE, (READONLY,), fresh=True)
    b.memory([run(DEVICE_GPA, 4, 0xFEED0001, step=7, stride=8)])
    b.guest(("R8", d), ("W8", d + 16, 0x99), ("W8", d + 16, 0x98), ("R8", d + 16), ("CMPX", d, 3, 0xFEED0001), ("CMPX", d, 3, 4))
    b.guest(("R8", d + 3 * PAGE + 0xFFC), ("W8", d + 3 * PAGE + 0xFFC, 5), ("W8", d + PAGE - 4, 6))
    b.flags(2, READONLY, LOG)
    b.guest(("R8", d), ("W8", d + 16, 0x97))
    b.get(2)
    b.delete(2)
    b.slot(3, 0xD1000000, PAGE)
    b.guest(("R8", d), ("R8", d + PAGE), ("R8", d), ("W8", d + 8, 1))
    b.mode(wp=False)
    b.guest(("W8", d + 2 * PAGE, 7), ("R8", d + 2 * PAGE))
    return b.document()


def bare_devices(*, mmio_caching: bool = True) -> Document:
    """C without guest paging: device pages, then slots over them."""
    b = Builder(NONPAGING, mmio_caching=mmio_caching)
    b.warm()
    d = b.device(0)
    b.guest(("LOOPR", d, PAGE, 12), ("LOOPW", d + 8, 2 * PAGE, 6), ("LOOPR", d, 4, 8))
    b.guest(("LOOPR", d + 0xFFE, PAGE, 3), ("LOOPW", d + 0xFFE, PAGE, 3), ("LOOPW", d + 0x9FFD, PAGE, 2))
    b.slot(2, DEVICE_GPA + 2 * PAGE, 5 * PAGE)
    b.guest(("LOOPR", d, PAGE, 12), ("LOOPW", d + 8, PAGE, 12), ("LOOPR", d + PAGE + 0xFFE, 5 * PAGE, 2))
    b.delete(2)
    b.slot(2, DEVICE_GPA + 3 * PAGE, 3 * PAGE, (READONLY,), fresh=True)
    b.guest(("LOOPR", d, PAGE, 12), ("LOOPW", d, PAGE, 12), ("LOOPW", d + 2 * PAGE + 0xFFE, 3 * PAGE, 2))
    b.slot(3, 0x90000000, PAGE)
    b.guest(("LOOPR", d, PAGE, 12), ("LOOPR", 0x90000000 - 2, PAGE, 2))
    return b.document()


PERMISSION_BITS = (0x07, 0x03, 0x05, 0x01, 0x07 | NX, 0x06, 0x07 | RESERVED, 0x27, 0x67, 0x65 | NX)


def permissions(kind: str, *, cpl: int, wp: bool) -> Document:
    """D: pages of every protection, read, written, executed; upper entries without W, U, A or with NX."""
    b = Builder(kind)
    upper = (0x27, 0x05, 0x03, 0x07 | NX)
    for i, above in enumerate(upper):
        for j, bits in enumerate(PERMISSION_BITS):
            b.tables.map(PERMISSIONS + i * MIB2 + j * PAGE, DATA_GPA + (16 * i + j) * PAGE, bits)
        b.tables.words[b.tables.entry(PERMISSIONS + i * MIB2, 2)] ^= UPPER ^ above
    b.slot(1, DATA_GPA, 64 * PAGE)
    b.mode(cpl=cpl, wp=wp)
    b.warm()
    pages = [PERMISSIONS + i * MIB2 + j * PAGE for i in range(len(upper)) for j in range(len(PERMISSION_BITS))]
    for name, rest in (("R8", ()), ("W8", (0x1234,)), ("EXEC", ()), ("CMPX", (1, 0x1234))):
        b.guest(*[(name, page + (8 if name != "EXEC" else 0), *rest) for page in pages])
    b.guest(*[("R8", page + 0xFFC) for page in pages], *[("W8", page + 0xFFC, 3) for page in pages])
    b.mode(cpl=3 - cpl, wp=not wp)
    b.guest(*[(name, page + 16, *rest) for page in pages[:20] for name, rest in (("R4", ()), ("W4", (7,)))])
    return b.document()


def table_edits(kind: str) -> Document:
    """E: the guest remaps leaves, relinks upper tables, swaps entries with and without INVLPG, and clears A and D."""
    b = Builder(kind)
    b.map_data(600)
    b.slot(1, DATA_GPA, 700 * PAGE)
    leaf, upper = b.tables.entry(DATA), b.tables.entry(DATA, 2)
    first, second = (b.tables.words[upper + 8 * i] for i in range(2))
    b.warm()
    d = DATA
    b.guest(("LOOPW", d + 16, PAGE, 600))
    b.guest(("R8", d + 8), ("W8", leaf, DATA_GPA + 600 * PAGE | ENTRY), ("R8", d + 8), ("INVLPG", d), ("R8", d + 8))
    b.guest(*[("W8", leaf + 8 * i, DATA_GPA + (610 + i) * PAGE | ENTRY) for i in range(1, 12)], ("LOOPR", d + 8, PAGE, 12))
    b.guest(("CR3", b.tables.root), *[("R8", d + 8 + i * PAGE) for i in range(12)])
    b.guest(
        ("W8", upper, second),
        ("R8", d + 8),
        ("INVLPG", d),
        ("R8", d + 8),
        ("W8", upper, first),
        ("CR3", b.tables.root),
        ("R8", d + 8),
    )
    b.guest(
        ("W4", leaf + 4, 0x80000000),
        ("EXEC", d),
        ("R8", d),
        ("W4", leaf + 4, 0),
        ("EXEC", d),
        ("W8", leaf, 0),
        ("EXEC", d),
        ("R8", d),
    )
    b.guest(("CMPX", leaf, DATA_GPA | 0x07, 0), ("CMPX", leaf, 1, 2), ("R8", d + 8), ("W8", d + 8, 4), ("R8", leaf))
    b.memory([run(leaf, 3, DATA_GPA | 0x07, step=PAGE)])
    b.log(0, True)
    b.guest(("R8", d + 8), ("W8", d + PAGE + 8, 1), ("LOOPR", d, PAGE, 20))
    b.get(0)
    b.guest(("W8", leaf, DATA_GPA | 0x05), ("W8", d, 1), ("W8", d + 0xFFC, 2), ("R8", d + PAGE - 4))
    b.get(0)
    b.log(0, False)
    b.guest(("LOOPW", d, PAGE, 30))
    return b.document()


def recycled(kind: str) -> Document:
    """G: few shadow pages, more 2M regions than they can map; the limit goes up and down."""
    b = Builder(kind)
    if b.paging:
        for i in range(150):
            b.tables.map(DATA + i * MIB2, DATA_GPA + i * MIB2, HUGE, 2)
    b.slot(1, DATA_GPA, 150 * MIB2)
    b.limit(64)
    b.warm()
    b.guest(("LOOPW", b.at(0), MIB2, 40))
    b.guest(("LOOPR", b.at(0), MIB2, 40))
    b.guest(("LOOPW", b.at(PAGE), MIB2, 150))
    b.guest(("LOOPR", b.at(PAGE), 2 * MIB2, 75))
    b.log(1, True)
    b.guest(("LOOPW", b.at(0), MIB2, 70))
    b.get(1)
    b.limit(200)
    b.guest(("LOOPW", b.at(0), MIB2, 150))
    b.guest(("LOOPW", b.at(0), MIB2, 150))
    b.limit(70)
    b.guest(("LOOPR", b.at(0), MIB2, 30))
    b.log(1, False)
    b.guest(("LOOPW", b.at(0), MIB2, 30))
    return b.document()


def two_vcpus(kind: str) -> Document:
    """Two vCPUs take turns over the same data, device and dirty log."""
    b = Builder(kind, vcpus=2)
    b.map_data(64)
    b.map_device()
    b.slot(1, DATA_GPA, 64 * PAGE)
    b.warm()
    b.warm(1)
    b.guest(("LOOPW", b.at(0), PAGE, 32))
    b.guest(("LOOPW", b.at(0), PAGE, 64), vcpu=1)
    b.log(1, True)
    b.guest(("LOOPW", b.at(0), 2 * PAGE, 32), vcpu=1)
    b.get(1)
    b.guest(("LOOPW", b.at(0), 3 * PAGE, 20), ("LOOPR", b.device(0), PAGE, 3))
    b.get(1)
    b.guest(("LOOPW", b.at(0), PAGE, 64), ("LOOPR", b.device(0), PAGE, 3), vcpu=1)
    b.mode(1, wp=False, low=2)
    b.guest(("LOOPR", b.at(0), PAGE, 64), ("LOOPW", b.device(8), PAGE, 2), vcpu=1)
    b.slot(2, DEVICE_GPA, 2 * PAGE)
    b.guest(("LOOPW", b.device(8), PAGE, 3))
    b.delete(2)
    b.guest(("LOOPR", b.device(8), PAGE, 3), ("LOOPW", b.at(0), PAGE, 10), vcpu=1)
    b.guest(("LOOPR", b.device(8), PAGE, 3), ("LOOPW", b.at(0), PAGE, 10))
    b.log(1, False)
    b.guest(("LOOPR", b.at(0), PAGE, 64), vcpu=1)
    b.guest(("LOOPW", b.at(0), PAGE, 64))
    return b.document()


def parameters(kind: str) -> Document:
    """nx_huge_pages and eager_page_split change while the VM runs."""
    b = Builder(kind, vcpus=2)
    b.map_data(1024, huge=True)
    b.slot(1, DATA_GPA, 1024 * PAGE, host="2M")
    execute = ("LOOPX", b.at(PAGE), MIB2, 2) if b.paging else ("LOOPR", b.at(PAGE), MIB2, 2)
    b.warm()
    b.warm(1)
    b.guest(("LOOPW", b.at(8), MIB2, 2), execute)
    b.param("nx_huge_pages", "force")
    b.guest(("LOOPW", b.at(8), MIB2, 2), execute, ("LOOPR", b.at(8), 64 * PAGE, 16))
    b.guest(execute, vcpu=1)
    b.param("nx_huge_pages", "force")
    b.param("eager_page_split", "N")
    b.log(1, True)
    b.guest(("LOOPW", b.at(8), 64 * PAGE, 16), execute)
    b.get(1)
    b.log(1, False)
    b.param("eager_page_split", True)
    b.guest(("LOOPR", b.at(8), 64 * PAGE, 16))
    b.log(1, True)
    b.guest(("LOOPW", b.at(8), 64 * PAGE, 16), vcpu=1)
    b.param("nx_huge_pages", "off")
    b.get(1)
    b.guest(execute, ("LOOPW", b.at(8), 32 * PAGE, 32))
    b.log(1, False)
    b.guest(execute, ("LOOPW", b.at(8), MIB2, 2))
    return b.document()


def late_slot(kind: str) -> Document:
    """A slot with 2M host pages appears under a table that was made for a device: a huge page takes the table's place."""
    b = Builder(kind)
    b.map_data(1536, huge=True)
    b.warm()
    b.guest(("LOOPR", b.at(8), PAGE, 3), ("LOOPW", b.at(MIB2 + 8), PAGE, 2))
    b.slot(1, DATA_GPA, 3 * MIB2, host="2M", fresh=True)
    b.guest(("LOOPR", b.at(8), 64 * PAGE, 24))
    b.guest(("LOOPW", b.at(8), 64 * PAGE, 24))
    b.log(1, True)
    b.guest(("LOOPW", b.at(8), 64 * PAGE, 24))
    b.get(1)
    b.delete(1)
    b.guest(("LOOPR", b.at(8), 64 * PAGE, 9))
    return b.document()


NAMED: dict[str, Callable[[], Document]] = {
    **{f"odd_slot-{kind}": lambda kind=kind: odd_slot(kind) for kind in KINDS},
    **{f"logged_first-{kind}": lambda kind=kind: logged_first(kind) for kind in KINDS},
    **{f"huge-{kind}": lambda kind=kind: huge(kind) for kind in KINDS},
    **{f"huge_eagerN-{kind}": lambda kind=kind: huge(kind, eager=False) for kind in KINDS},
    **{f"huge_unaligned-{kind}": lambda kind=kind: huge(kind, gpa=DATA_GPA + 5 * PAGE, pages=1700) for kind in KINDS},
    **{f"huge_misaligned_hva-{kind}": lambda kind=kind: huge(kind, offset=0x3000) for kind in KINDS},
    **{f"huge_gigabyte_offset-{kind}": lambda kind=kind: huge(kind, offset=MIB2) for kind in KINDS},
    **{f"gigabyte-{kind}": lambda kind=kind: gigabyte(kind) for kind in KINDS},
    **{f"initially_set-{kind}": lambda kind=kind: initially_set(kind) for kind in KINDS},
    **{f"initially_set_eagerN-{kind}": lambda kind=kind: initially_set(kind, eager=False, single=True) for kind in KINDS},
    **{f"initially_set_single-{kind}": lambda kind=kind: initially_set(kind, single=True) for kind in (TDP_N, NONPAGING)},
    **{f"manual-{kind}": lambda kind=kind: manual(kind) for kind in KINDS},
    **{f"executed-{kind}": lambda kind=kind: executed(kind) for kind in (TDP, TDP_N)},
    **{f"devices-{kind}": lambda kind=kind: devices(kind) for kind in (TDP, TDP_N)},
    **{f"devices_uncached-{kind}": lambda kind=kind: devices(kind, mmio_caching=False) for kind in (TDP, TDP_N)},
    "bare_devices": bare_devices,
    "bare_devices_uncached": lambda: bare_devices(mmio_caching=False),
    **{
        f"permissions_cpl{cpl}_wp{wp:d}-{kind}": lambda kind=kind, cpl=cpl, wp=wp: permissions(kind, cpl=cpl, wp=wp)
        for kind in (TDP, TDP_N) for cpl, wp in ((0, True), (0, False), (3, True))
    },
    **{f"table_edits-{kind}": lambda kind=kind: table_edits(kind) for kind in (TDP, TDP_N)},
    **{f"recycled-{kind}": lambda kind=kind: recycled(kind) for kind in KINDS},
    **{f"two_vcpus-{kind}": lambda kind=kind: two_vcpus(kind) for kind in KINDS},
    **{f"parameters-{kind}": lambda kind=kind: parameters(kind) for kind in KINDS},
    **{f"late_slot-{kind}": lambda kind=kind: late_slot(kind) for kind in KINDS},
}  # fmt: skip


# --- what neither model has ------------------------------------------------------------------------------------------------


def fetched_from_device() -> Document:
    """The guest calls a device."""
    b = Builder(TDP)
    b.map_device()
    b.warm()
    b.guest(("EXEC", b.device(0)))
    return b.document()


NEITHER: dict[str, Callable[[], Document]] = {"code in a device": fetched_from_device}


# --- small ones, on which the two models once differed, or still do ---------------------------------------------------------


def root_makes_room() -> Document:
    """Making a root recycles pages, whose flush is served before the guest is entered."""
    return random_scenario(random.Random(1851456391))


def created_late() -> Document:
    """A vCPU that is made after a flush was asked for."""
    b = Builder(TDP)
    b.map_data(8)
    b.slot(1, DATA_GPA, 8 * PAGE)
    b.warm()
    b.log(1, True)
    b.steps.append({"do": "create_vcpu", "vcpu": 1})
    b.mode(1)
    b.warm(1)
    return b.document()


def unchanged_flags() -> Document:
    """KVM_SET_USER_MEMORY_REGION with the flags that the slot has."""
    b = Builder(TDP)
    b.map_data(8)
    b.map_device()
    b.slot(1, DATA_GPA, 8 * PAGE)
    b.warm()
    b.guest(("R8", b.device(0)))
    b.log(1, False)
    b.guest(("R8", b.device(0)))
    return b.document()


def recreated() -> Document:
    """A slot is deleted and made again, with other host memory."""
    b = Builder(TDP)
    b.map_data(8)
    b.slot(1, DATA_GPA, 8 * PAGE)
    b.warm()
    b.guest(("W8", b.at(0), 5))
    b.delete(1)
    b.slot(1, DATA_GPA, 8 * PAGE)
    b.guest(("R8", b.at(0)))
    return b.document()


def gigabyte_log_off() -> Document:
    """Guest paging off: logging goes off over a 1G host page."""
    b = Builder(NONPAGING)
    b.slot(1, DATA_GPA, GIB, host="1G")
    b.warm()
    b.guest(("LOOPW", b.at(8), MIB2, 4))
    b.log(1, True)
    b.log(1, False)
    return b.document()


def cleared_inside_huge() -> Document:
    """Initially all set, eager split: one page is cleared inside a huge page."""
    b = Builder(TDP)
    b.map_data(512, huge=True)
    b.cap(3)
    b.slot(1, DATA_GPA, 512 * PAGE, host="2M")
    b.warm()
    b.guest(("W8", b.at(8), 1))
    b.log(1, True)
    b.clear(1, 64, 64, {3})
    return b.document()


def other_cr0_after_cr3() -> Document:
    """MOV to CR0 after MOV to CR3: CR3 stays."""
    b = Builder(TDP)
    b.map_device()
    other = b.tables.second_root()
    b.tables.map(DEVICE, DEVICE_GPA + 0x100000, root=other)
    b.warm()
    b.guest(("CR3", other), ("R8", b.device(0)), ("CR0", CR0_NO_WP), ("R8", b.device(0)), ("CR0", CR0), ("CR3", b.tables.root))
    return b.document()


def roots_under_pressure() -> Document:
    """A root is loaded while fewer than five shadow pages are free."""
    b = Builder(NONPAGING)
    b.slot(1, DATA_GPA, 150 * MIB2)
    b.limit(64)
    b.warm()
    for regions in range(53, 57):
        b.guest(("LOOPW", b.at(0), MIB2, regions))
        b.mode(low=2 * (regions & 1))
        b.guest(("LOOPR", 0x4000, PAGE, 1))
    return b.document()


def parameter_without_effect() -> Document:
    """A parameter changes that is read only when a VM is made."""
    b = Builder(TDP)
    b.warm()
    b.param("tdp_mmu", "N")
    b.warm()
    return b.document()


def exchanged(second: int) -> Document:
    """A cmpxchg over a page boundary: the first page is a device, the second does not allow it."""
    b = Builder(TDP)
    b.map_device()
    b.tables.map(DEVICE + 2 * PAGE, DEVICE_GPA + 2 * PAGE, second)
    b.warm()
    b.guest(("CMPX", b.device(2 * PAGE - 4), 1, 2))
    return b.document()


def last_fetch() -> Document:
    """Guest paging off: the last access of a step is a device's, and recycles the table that maps the code."""
    b = Builder(NONPAGING)
    b.slot(1, DATA_GPA, 150 * MIB2)
    b.limit(64)
    b.warm()
    b.guest(("LOOPW", b.at(0), MIB2, 55))
    b.guest(("LOOPR", b.device(0), PAGE, 1))
    return b.document()


def tables_in(flags: tuple[str, ...] | None) -> Document:
    """Page tables in a read-only memslot, or where there is none."""
    b = Builder(TDP)
    if flags is not None:
        b.slot(1, DATA_GPA, PAGE, flags)
        b.data.append(run(DATA_GPA, 1, 0x700000 | ENTRY))
    b.tables.words[b.tables.entry(DATA, 2)] = DATA_GPA | UPPER
    b.warm()
    b.guest(("R8", DATA))
    return b.document()


def second_page_faults() -> Document:
    """A store over a page boundary: the first page is a device, the second read-only."""
    b = Builder(TDP)
    b.map_device()
    b.warm()
    b.guest(("W8", b.device(2 * PAGE - 4), 2))
    return b.document()


def automatic() -> Document:
    """nx_huge_pages = auto: off on a processor without the bug, and AMD's have none."""
    b = Builder(TDP)
    b.map_data(512, huge=True)
    b.slot(1, DATA_GPA, 512 * PAGE, host="2M")
    b.warm()
    b.param("nx_huge_pages", "auto")
    b.guest(("EXEC", b.at(0)))
    return b.document()


def missing_log() -> Document:
    """KVM_GET_DIRTY_LOG of a slot that does not log: ENOENT."""
    b = Builder(TDP)
    b.warm()
    b.get(0)
    return b.document()


DIFFERENT: dict[str, tuple[Callable[[], Document], str]] = {
    "exchange_writes": (
        lambda: exchanged(0x65),
        "reference: the read goes to the device before the write faults (compare_exchange)",
    ),
    "tables_in_rom": (lambda: tables_in((READONLY,)), "compiled emulates as KVM does, the reference says NotBuilt"),
    "tables_in_device": (lambda: tables_in(None), "compiled emulates as KVM does, the reference says NotBuilt"),
}
"""Smallest documents on which the models differ, and which is to change."""

NAMED |= {
    **{make.__name__: make for make in (
        created_late, unchanged_flags, gigabyte_log_off, cleared_inside_huge, other_cr0_after_cr3, roots_under_pressure,
        second_page_faults, last_fetch, automatic, recreated, parameter_without_effect,
    )},
    "exchange_reads": lambda: exchanged(0),
    "missing_log": missing_log,
    "root_makes_room": root_makes_room,
}  # fmt: skip


# --- random documents ------------------------------------------------------------------------------------------------------

EDITED = 12  # pages at the begin of the data window, and of the device window, that ops remap
SPREAD, SPREAD_GPA, REGIONS = 0xB000000000, 0x50000000, 80  # many 2M regions, for the limit of shadow pages


class Chance:
    """A random scenario in the making."""

    def __init__(self, rng: random.Random, kinds: tuple[str, ...] = KINDS) -> None:
        self.rng = rng
        kind = rng.choice(kinds)
        vcpus = 2 if rng.random() < 0.3 else 1
        low = (LOG,) if rng.random() < 0.1 else ()
        self.b = Builder(
            kind, eager=rng.random() < 0.6, nx=rng.random() < 0.3, mmio_caching=rng.random() < 0.85, vcpus=vcpus, low_flags=low
        )
        self.vcpus = vcpus
        self.huge = rng.random() < 0.5
        self.lead = rng.choice((0, 0, 1, 3, 5, 8, 511))  # pages before the slot
        self.pages = rng.choice((512, 600, 1024, 1300)) if self.huge else rng.choice((5, 24, 61, 100, 515))
        self.manual = rng.choice((0, 0, 1, 3))
        self.spread = kind != TDP and rng.random() < 0.4
        self.fresh = False
        self.prepare()

    def prepare(self) -> None:
        """Tables, slots, capabilities, first runs."""
        b, rng = self.b, self.rng
        if b.paging:
            b.map_data(self.lead + self.pages + 8, huge=self.huge, told=0)
            b.map_device(EDITED, readonly=2)
            for i in range(16):
                b.tables.map(ALIAS + i * PAGE, 0x700000 + i * PAGE)
                b.tables.map(PERMISSIONS + i * PAGE, 0x710000 + i * PAGE, rng.choice(PERMISSION_BITS))
            if self.spread:
                for i in range(REGIONS):
                    b.tables.map(SPREAD + i * MIB2, SPREAD_GPA + i * MIB2, HUGE, 2)
            self.other = b.tables.second_root()
            for i in range(3):
                b.tables.map(DEVICE + i * PAGE, DEVICE_GPA + 0x100000 + i * PAGE, root=self.other)
        if self.manual and rng.random() < 0.7:
            self.enable()
        self.make_slot(1)
        b.data.append(run(DATA_GPA + self.lead * PAGE + 8, self.pages, 0xD0000, step=1, stride=PAGE))
        if self.spread:
            b.slot(4, SPREAD_GPA, REGIONS * MIB2)
            b.limit(rng.randrange(64, 90))
        for vcpu in range(self.vcpus):
            if not vcpu or self.spread or rng.random() < 0.8:
                b.warm(vcpu)
        self.fresh = True
        for _ in range(rng.randrange(12, 30)):
            self.step()

    def enable(self) -> None:
        """Manual protection, once."""
        self.b.cap(self.manual)
        self.capable, self.manual_on = True, True

    capable = manual_on = False

    def make_slot(self, number: int) -> None:
        """Create slot 1 (data), 2 (over the device) or 3 (elsewhere)."""
        rng, b = self.rng, self.b
        flags = (LOG,) if rng.random() < 0.2 else ()
        if number == 1:
            host = rng.choice(("4K", "2M", "2M")) if self.huge else rng.choice(("4K", "4K", "2M"))
            offset = rng.choice((0, 0, 0, 0x3000, MIB2))
            b.slot(1, DATA_GPA + self.lead * PAGE, self.pages * PAGE, flags, host=host, offset=offset, fresh=self.fresh)
        elif number == 2:
            readonly = (READONLY,) if rng.random() < 0.4 else ()
            b.slot(2, DEVICE_GPA + rng.randrange(4) * PAGE, rng.randrange(1, 9) * PAGE, readonly + flags, fresh=True)
        else:
            b.slot(3, 0xD1000000, PAGE * rng.randrange(1, 4))

    def step(self) -> None:
        """One step, or a few that belong together."""
        rng, b = self.rng, self.b
        choice = rng.random()
        logging = [number for number, slot in b.slots.items() if LOG in slot["flags"]]
        if choice < 0.55:
            self.guest()
        elif choice < 0.67:
            number = rng.choice([0, 1, 1, 1, 2, 4])
            if number in b.slots:
                b.log(number, LOG not in b.slots[number]["flags"])
        elif choice < 0.77 and logging:
            self.collect(rng.choice(logging))
        elif choice < 0.85:
            number = rng.choice((1, 2, 2, 3))
            if number in b.slots:
                b.delete(number)
            else:
                self.make_slot(number)
        elif choice < 0.88:
            b.param(
                *rng.choice(
                    (("nx_huge_pages", "force"), ("nx_huge_pages", "off"), ("eager_page_split", "N"), ("eager_page_split", "Y"))
                )
            )
        elif choice < 0.91:
            b.limit(rng.choice((64, 66, 80, 200)))
        elif choice < 0.95:
            cpl = rng.choice((0, 0, 3))
            b.mode(rng.randrange(self.vcpus), cpl=cpl, wp=rng.random() < 0.7, low=rng.choice((0, 2)))
        elif choice < 0.97 and b.paging and not self.huge:
            at, value = self.remap()
            b.memory([run(at, 1, value)])
        elif choice < 0.98:
            b.read(rng.choice((0x20000, 0x700008, 0x109000)))
        elif self.manual and not self.capable and not logging:
            self.enable()

    def collect(self, number: int) -> None:
        """KVM_GET_DIRTY_LOG or KVM_CLEAR_DIRTY_LOG."""
        rng, b = self.rng, self.b
        pages = b.slots[number]["size"] // PAGE
        if rng.random() < (0.5 if self.manual_on else 0.8):
            b.get(number)
            return
        first = rng.randrange(0, -(-pages // 64)) * 64
        count = min(pages - first, 64 * rng.randrange(1, 9))
        dense = rng.random()
        which = {page for page in range(count) if rng.random() < dense}
        if len(which) > 1:
            b.clear(number, first, count, which)

    def remap(self) -> tuple[int, int]:
        """A leaf entry that ops may change, and what it becomes."""
        rng, b = self.rng, self.b
        if self.huge or rng.random() < 0.5:
            at = b.tables.entry(DEVICE + rng.randrange(EDITED) * PAGE)
        else:
            at = b.tables.entry(DATA + rng.randrange(EDITED) * PAGE)
        gpa = rng.choice(
            (DEVICE_GPA + rng.randrange(20) * PAGE, DATA_GPA + rng.randrange(self.lead + self.pages + 4) * PAGE, 0x700000)
        )
        return at, rng.choice(
            (0, gpa | ENTRY, gpa | ENTRY, gpa | 0x27, gpa | 0x07, gpa | 0x05, gpa | 0x65 | NX, gpa | 0x07 | RESERVED)
        )

    def place(self, *, crossing: bool = True) -> int:
        """An address to access."""
        rng, b = self.rng, self.b
        offset = rng.choice((0, 8, 16, 16, 0x14, *((0xFFC, 0xFF9) if crossing else ())))
        where = rng.random()
        if where < 0.5:
            return b.at((self.lead if rng.random() < 0.9 else 0) * PAGE + rng.randrange(self.pages + 3) * PAGE) + offset
        if where < 0.85 or not b.paging:
            return b.device(rng.randrange(EDITED - 1) * PAGE) + offset
        return (ALIAS if where < 0.9 else PERMISSIONS) + rng.randrange(15) * PAGE + offset

    def op(self, cpl: int) -> list[tuple[Any, ...]]:
        """An op, or a few that belong together."""
        rng, b = self.rng, self.b
        choice = rng.random()
        if choice < 0.3 or not b.paging:
            if self.spread and rng.random() < 0.3:
                start = (SPREAD if b.paging else SPREAD_GPA) + rng.choice((0, PAGE, 7 * PAGE + 8))
                return [(rng.choice(("LOOPR", "LOOPW")), start, MIB2, rng.randrange(20, REGIONS))]
            place = self.place()  # a loop may go on behind the last page that is mapped
            return [(rng.choice(("LOOPR", "LOOPW")), place, rng.choice((8, PAGE, PAGE, 3 * PAGE, 64 * PAGE)), rng.randrange(1, 24))]
        if choice < 0.5:
            return [(rng.choice(("R8", "R4")), self.place())]
        if choice < 0.7:
            return [(rng.choice(("W8", "W4")), self.place(), rng.getrandbits(64))]
        if choice < 0.76:
            # within a page: over a boundary into read-only memory the reference cannot do it, see `exchange_writes`
            return [("CMPX", self.place() & ~7, rng.getrandbits(64), rng.choice((0, 0xD0000, 1)))]
        if choice < 0.86:
            at, value = self.remap()
            write = ("W8", at, value) if rng.random() < 0.8 else ("CMPX", at, value, rng.choice((0, b.tables.words[at])))
            return [write] + [("INVLPG", self.place())] * (cpl == 0 and rng.random() < 0.5)
        if choice < 0.93:
            if 1 in b.slots and self.pages > EDITED and rng.random() < 0.7:
                last = min(self.pages, b.slots[1]["size"] // PAGE)
                return [("EXEC", b.at((self.lead + rng.randrange(EDITED, last)) * PAGE))]
            return [("EXEC", rng.choice((ALIAS, PERMISSIONS)) + rng.randrange(16) * PAGE)]
        if cpl:
            return [("R8", 0x700000)]
        if rng.random() < 0.3:
            return [("CR0", CR0_NO_WP), ("W8", self.place(), 1), ("W8", PERMISSIONS + rng.randrange(15) * PAGE, 2), ("CR0", CR0)]
        root = b.tables.root
        return [("CR3", self.other), *[("R8", DEVICE + rng.randrange(4) * PAGE) for _ in range(2)], ("CR3", root)]

    def guest(self) -> None:
        """A guest step."""
        vcpu = self.rng.randrange(self.vcpus)
        cpl = self.b.modes[vcpu]["cpl"]
        ops = [op for _ in range(self.rng.randrange(1, 9)) for op in self.op(cpl)]
        self.b.guest(*ops, vcpu=vcpu)


def random_scenario(rng: random.Random) -> Document:
    """A whole document."""
    return Chance(rng).b.document()
