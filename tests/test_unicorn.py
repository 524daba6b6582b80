"""The walk against Unicorn, which is QEMU's MMU as a library: loads, stores and fetches executed there and walked here.

Compared: success, the address (by the content found there), CR2, the error code, accessed and dirty bits. Known of Unicorn 2.1.4
and taken into account: it sets A in the upper entries of walks that fail (masked: after a fault its A bits are taken over); its
physical addresses have 40 bits; the error code is in no register, but in the saved context, at an offset that known faults
reveal; CPL 3 is entered by IRETQ; PK is missing from the error code of an access that the ordinary rights deny as well.
"""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from sizes import sized

import fastmmu
from fastmmu.bits import CR0, CR4, EFER, GPTE64, RFLAGS

unicorn = pytest.importorskip("unicorn", reason="Unicorn is not installed: the differential test against QEMU's MMU is left out")
from unicorn import UC_ARCH_X86, UC_HOOK_INTR, UC_MODE_64, Uc, UcError  # noqa: E402
from unicorn import x86_const as x86  # noqa: E402

P, W, U, A, D, PS, NX = (int(getattr(GPTE64, name)) for name in ("P", "W", "U", "A", "D", "PS", "NX"))
RAM = 4 << 20
HIGH = 0xFFFF_FF80_0000_0000  # the harness's own mappings: PML4 entry 511
KERNEL, STACK, USERLAND = HIGH + 0x1000, HIGH + 0x2000, HIGH + 0x3000
GDT = HIGH + 0x2800
ROOT, TABLES, TABLES_END = 0x8000, 0x9000, 0x30000
PAGES_OF_LEVEL = {3: (0x9, 0x10), 2: (0x10, 0x1C), 1: (0x1C, 0x30)}  # page numbers of the random tables
MAXPHYADDR = 40
MSR_EFER = 0xC000_0080
CODE = {"read": b"\x48\x8b\x03", "write": b"\x48\x89\x03", "fetch": b"\xff\xe3"}  # mov rax,[rbx]; mov [rbx],rax; jmp rbx
IRETQ, WRPKRU = b"\x48\xcf", b"\x0f\x01\xef"
WRPKRU_AT = 0x200
SNIPPET = {name: 0x40 * number for number, name in enumerate(CODE, 1)}
ACCESS = {"read": 0, "write": fastmmu.WRITE, "fetch": fastmmu.FETCH}
PATTERN = 0x90_FEEB << 40 | 0xB8  # every word of memory: mov eax, page; jmp here (which ends the block of translated code)
PAGE_FAULT = 14
PK = 0x20


@dataclass
class Outcome:
    """What one access came to there."""

    fault: bool
    unmapped: bool
    cr2: int
    rax: int
    context: bytes


class Machine:
    """One random machine, in Unicorn and here."""

    def __init__(self, rng: np.random.Generator, **registers: int) -> None:
        self.rng = rng
        self.words = np.zeros(RAM // 8, np.uint64)
        pages = np.arange(RAM // 8, dtype=np.uint64) >> np.uint64(9)
        self.words[:] = (pages << np.uint64(8)) | np.uint64(PATTERN)
        self.words[: TABLES_END // 8] = 0
        self.harness()
        self.random_tables()
        self.cpu = fastmmu.Cpu(cr3=ROOT, maxphyaddr=MAXPHYADDR, **(registers or self.random_registers()))
        self.memory = fastmmu.GuestMemory(RAM)
        self.memory.words[:] = self.words
        self.start()

    def harness(self) -> None:
        words = self.words
        words[(ROOT + 511 * 8) // 8] = 0x4000 | P | W | U | A
        words[0x4000 // 8] = 0x5000 | P | W | U | A
        words[0x5000 // 8] = 0x6000 | P | W | U | A
        for page, flags in ((1, 0), (2, W), (3, U)):
            words[0x6000 // 8 + page] = page << 12 | P | A | D | flags
        code = words.view(np.uint8)
        for name, instruction in CODE.items():
            for page in (0x1000, 0x3000):
                code[page + SNIPPET[name] : page + SNIPPET[name] + len(instruction)] = list(instruction)
        code[0x1000 : 0x1000 + len(IRETQ)] = list(IRETQ)
        code[0x1000 + WRPKRU_AT : 0x1000 + WRPKRU_AT + len(WRPKRU)] = list(WRPKRU)
        words[0x2800 // 8 : 0x2800 // 8 + 5] = [0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF]

    def entry(self, level: int) -> int:
        """An entry of a table of `level`: it points to a table of the level below, or now and then anywhere."""
        rng = self.rng
        low, high = PAGES_OF_LEVEL.get(level - 1, (TABLES_END >> 12, RAM >> 12))
        if rng.random() < 0.05:
            low, high = TABLES >> 12, RAM >> 12
        entry = int(rng.integers(low, high)) << 12
        for flag, probability in ((P, 0.96), (W, 0.8), (U, 0.75), (A, 0.6), (D, 0.5), (NX, 0.12)):
            entry |= flag * (rng.random() < probability)
        if rng.random() < 0.08:
            entry = entry & ~0x3FFFF000 | PS | (int(rng.integers(0, 2)) << 21) * (rng.random() < 0.5)
        if rng.random() < 0.02:
            entry |= 1 << int(rng.integers(12, 63))
        if rng.random() < 0.2:
            entry |= int(rng.integers(0, 4)) << 59
        return entry

    def random_tables(self) -> None:
        top = [self.entry(4) & ~PS for _ in range(64)]
        self.words[ROOT // 8 : ROOT // 8 + 511] = np.array(top, np.uint64)[self.rng.integers(0, 64, 511)]
        for level, (low, high) in PAGES_OF_LEVEL.items():
            pool = np.array([self.entry(level) for _ in range(64)], np.uint64)
            self.words[low << 9 : high << 9] = pool[self.rng.integers(0, 64, (high - low) << 9)]

    def random_registers(self) -> dict[str, int]:
        rng = self.rng
        some = lambda flag: int(flag) * (rng.random() < 0.5)  # noqa: E731
        return {
            "cr0": int(CR0.PE | CR0.PG) | some(CR0.WP),
            "cr4": int(CR4.PAE) | some(CR4.SMEP) | some(CR4.SMAP) | some(CR4.PKE),
            "efer": int(EFER.LME | EFER.LMA) | some(EFER.NX),
            "pkru": int(rng.integers(0, 256)),
            "rflags": some(RFLAGS.AC),
        }

    def start(self) -> None:
        self.uc = uc = Uc(UC_ARCH_X86, UC_MODE_64)
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_SKYLAKE_SERVER)
        uc.mem_map(0, RAM)
        uc.mem_write(0, self.words.tobytes())
        uc.reg_write(x86.UC_X86_REG_MSR, (MSR_EFER, self.cpu.efer))
        uc.reg_write(x86.UC_X86_REG_CR3, ROOT)
        uc.reg_write(x86.UC_X86_REG_CR4, self.cpu.cr4)
        uc.reg_write(x86.UC_X86_REG_CR0, self.cpu.cr0)
        uc.reg_write(x86.UC_X86_REG_GDTR, (0, GDT, 0x27, 0))
        uc.hook_add(UC_HOOK_INTR, self.on_interrupt)
        if self.cpu.cr4 & int(CR4.PKE):  # PKRU has no register number there: the instruction sets it
            for register, value in ((x86.UC_X86_REG_RAX, self.cpu.pkru), (x86.UC_X86_REG_RCX, 0), (x86.UC_X86_REG_RDX, 0)):
                uc.reg_write(register, value)
            uc.reg_write(x86.UC_X86_REG_CS, 0x08)
            uc.emu_start(KERNEL + WRPKRU_AT, 0, count=1)
        self.clean = uc.context_save()

    def on_interrupt(self, uc: Uc, number: int, _: object) -> None:
        self.fault = number == PAGE_FAULT
        self.other = number
        uc.emu_stop()

    def access(self, kind: str, gva: int, *, user: bool) -> Outcome:
        """Execute one access there."""
        uc = self.uc
        self.fault, self.other = False, 0
        uc.context_restore(self.clean)  # or a second fault would be a double fault: the first was never delivered
        uc.reg_write(x86.UC_X86_REG_CS, 0x08)
        uc.reg_write(x86.UC_X86_REG_SS, 0x10)
        uc.reg_write(x86.UC_X86_REG_CR2, 0)
        uc.reg_write(x86.UC_X86_REG_RBX, gva)
        uc.reg_write(x86.UC_X86_REG_RAX, 0x1122_3344_5566_7788)
        uc.reg_write(x86.UC_X86_REG_EFLAGS, 2 | self.cpu.rflags)
        uc.reg_write(x86.UC_X86_REG_RSP, STACK + 0x400)
        begin, count = KERNEL + SNIPPET[kind], 1
        if user:
            frame = np.array([USERLAND + SNIPPET[kind], 0x1B, 2 | self.cpu.rflags, 0, 0x23], np.uint64)
            uc.mem_write(0x2400, frame.tobytes())
            begin, count = KERNEL, 2
        unmapped = False
        try:
            uc.emu_start(begin, 0, count=count + (kind == "fetch"))
        except UcError as error:
            unmapped = not self.fault
            if unmapped and error.errno not in (6, 7, 8, unicorn.UC_ERR_EXCEPTION):
                raise
        context = uc.context_save()
        raw = ctypes.string_at(context.context, context.size)
        return Outcome(self.fault, unmapped, uc.reg_read(x86.UC_X86_REG_CR2), uc.reg_read(x86.UC_X86_REG_RAX), raw)

    def tables_there(self) -> np.ndarray:
        return np.frombuffer(self.uc.mem_read(ROOT, TABLES_END - ROOT), np.uint64)

    def gva(self) -> int:
        gva = int(self.rng.integers(0, 511)) << 39 if self.rng.random() < 0.5 else 0
        gva |= int(self.rng.integers(0, 3)) << 30 | int(self.rng.integers(0, 4)) << 21 | int(self.rng.integers(0, 40)) << 12
        gva |= int(self.rng.integers(0, 512)) * 8
        return gva | ((1 << 64) - (1 << 48) if gva >> 47 & 1 else 0)


@pytest.fixture(scope="module")
def error_code_offset() -> int | None:
    """Where the saved context keeps the error code: the place that says 0, 2, 4, 6, 0 after faults of which that is known."""
    machine = Machine(np.random.default_rng(0), cr0=0x8001_0001, cr4=0x20, efer=0xD00)
    machine.uc.mem_write(ROOT, bytes(8))
    kinds = [("read", False), ("write", False), ("read", True), ("write", True), ("read", False)]
    outcomes = [machine.access(kind, 0x5000, user=user) for kind, user in kinds]
    assert all(outcome.fault and outcome.cr2 == 0x5000 for outcome in outcomes)
    columns = np.array([np.frombuffer(outcome.context[: len(outcome.context) & ~3], np.uint32) for outcome in outcomes])
    found = np.flatnonzero((columns.T == [0, 2, 4, 6, 0]).all(axis=1))
    return int(found[0]) if len(found) else None


def compare(rng: np.random.Generator, machines: int, accesses: int, code_at: int | None) -> dict[str, int]:
    """Random machines, random accesses; returns how often what was compared."""
    tally: dict[str, int] = {}
    for number in range(machines):
        machine = Machine(rng)
        first, last = ROOT // 8, TABLES_END // 8
        for _ in range(accesses):
            kind, user = str(rng.choice(list(ACCESS))), bool(rng.random() < 0.5)
            gva = machine.gva()
            access = ACCESS[kind] | (fastmmu.USER if user else 0)
            before = machine.memory.words[first:last].copy()
            ours = fastmmu.translate(machine.memory, machine.cpu, gva, access)
            words = machine.memory.words
            in_tables = ours.ok and ROOT <= ours.gpa < TABLES_END
            if ours.ok and (ours.gpa >= RAM or (ours.gpa < TABLES_END and (not in_tables or kind != "read"))):
                words[first:last] = before  # nothing there to find, or the harness itself would be overwritten
                tally["skipped"] = tally.get("skipped", 0) + 1
                continue
            theirs = machine.access(kind, gva, user=user)
            told = f"machine {number}: {kind} of {gva:#x}, user {user}, {machine.cpu}\n" + fastmmu.explain(
                machine.memory, machine.cpu, gva, access
            )
            assert not theirs.unmapped, told
            assert ours.ok != theirs.fault, told
            there = machine.tables_there()
            if ours.ok:
                if kind == "write":
                    words[ours.gpa >> 3] = 0x1122_3344_5566_7788
                    stored = int(np.frombuffer(machine.uc.mem_read(ours.gpa, 8), np.uint64)[0])
                    assert stored == 0x1122_3344_5566_7788, told
                    pattern = PATTERN | ours.gpa >> 12 << 8
                    machine.uc.mem_write(ours.gpa, pattern.to_bytes(8, "little"))
                    words[ours.gpa >> 3] = pattern
                elif kind == "read":
                    assert theirs.rax == int(words[ours.gpa >> 3]), told
                else:
                    assert theirs.rax == ours.gpa >> 12, told
                assert np.array_equal(there, words[first:last]), told
            else:
                assert theirs.cr2 == gva, told
                assert np.array_equal(words[first:last], before), told
                if code_at is not None:
                    code = int(np.frombuffer(theirs.context, np.uint32, 1, code_at * 4)[0])
                    keyless = fastmmu.translate(machine.memory, dataclasses.replace(machine.cpu, pkru=0), gva, access)
                    words[first:last] = before
                    masked = (
                        0 if keyless.ok else PK
                    )  # denied without the key too: QEMU does not look at the key then, the manual does
                    assert code & ~masked == ours.pferr & ~masked, f"{code:#x} there, {ours.pferr:#x} here: {told}"
                changed = there ^ words[first:last]
                odd = [
                    f"{ROOT + 8 * i:#x}: {int(there[i]):#x} there, {int(words[first + i]):#x} here" for i in np.flatnonzero(changed)
                ]
                assert not np.any(changed & ~np.uint64(A)) and not np.any(~there & changed), f"{odd} {told}"
                words[first:last] = there
            name = f"{'user' if user else 'supervisor'} {kind}, {'ok' if ours.ok else hex(ours.pferr & ~0x16)}"
            tally[name] = tally.get(name, 0) + 1
    return tally


def test_sample_agrees_with_unicorn(seed: int, error_code_offset: int | None) -> None:
    if error_code_offset is None:
        print("the error code was not found in Unicorn's saved context: it is not compared")
    tally = compare(np.random.default_rng(seed), sized(40, 10), 60, error_code_offset)
    assert sum(tally.values()) - tally.get("skipped", 0) > sized(1000, 250)


@pytest.mark.long
def test_a_hundred_thousand_accesses_agree_with_unicorn(seed: int, error_code_offset: int | None) -> None:
    tally: dict[str, int] = {}
    rng = np.random.default_rng(seed)
    while sum(tally.values()) - tally.get("skipped", 0) < sized(100_000, 2_000):
        for name, count in compare(rng, 50, 100, error_code_offset).items():
            tally[name] = tally.get(name, 0) + count
    print(f"Unicorn, seed {seed}, error code {'compared' if error_code_offset is not None else 'not found'}: {tally}")
