"""Unicorn, QEMU's MMU as a library: a guest loop reads one word at each address of a list, so that nearly every read walks."""

from __future__ import annotations

import importlib.util

import numpy as np

from fastmmu import Cpu, GuestMemory

MSR_EFER = 0xC000_0080
# L: mov rbx,[rsi]; add rdx,[rbx]; add rsi,8; dec rcx; jnz L
LOOP = b"\x48\x8b\x1e\x48\x03\x13\x48\x83\xc6\x08\x48\xff\xc9\x75\xf1"


def available() -> bool:
    """Whether Unicorn is installed."""
    return importlib.util.find_spec("unicorn") is not None


def put_list(ram: GuestMemory, gvas: np.ndarray, place: int) -> int:
    """Put the loop at `place` and the list a page behind it; the list's address."""
    ram.words[place >> 3 : (place >> 3) + 2] = np.frombuffer(LOOP.ljust(16, b"\x90"), np.uint64)
    ram.words[place + 4096 >> 3 : (place + 4096 >> 3) + len(gvas)] = gvas
    return place + 4096


class Emulator:
    """A processor on `ram`, whose identity-mapped pages at `place` hold the loop and, after it, the list."""

    def __init__(self, ram: GuestMemory, cpu: Cpu, gvas: np.ndarray, place: int) -> None:
        from unicorn import UC_ARCH_X86, UC_MODE_64, UC_PROT_ALL, Uc
        from unicorn import x86_const as x86

        self.x86, self.place, self.count = x86, place, len(gvas)
        self.list = put_list(ram, gvas, place)
        self.uc = uc = Uc(UC_ARCH_X86, UC_MODE_64)
        uc.mem_map_ptr(0, ram.size, UC_PROT_ALL, ram.words.ctypes.data)
        uc.reg_write(x86.UC_X86_REG_MSR, (MSR_EFER, cpu.efer))
        for register, value in ((x86.UC_X86_REG_CR3, cpu.cr3), (x86.UC_X86_REG_CR4, cpu.cr4), (x86.UC_X86_REG_CR0, cpu.cr0)):
            uc.reg_write(register, value)

    def run(self) -> int:
        """Read the whole list; the sum of what was read."""
        x86, uc = self.x86, self.uc
        registers = ((x86.UC_X86_REG_RSI, self.list), (x86.UC_X86_REG_RCX, self.count), (x86.UC_X86_REG_RDX, 0))
        for register, value in registers:
            uc.reg_write(register, value)
        uc.emu_start(self.place, self.place + len(LOOP))
        return uc.reg_read(x86.UC_X86_REG_RDX)
