"""Translation of guest addresses for people who hold a memory image: `translate` and `translate_many`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fastmmu.batch import BLOCK, LANES, translate_all
from fastmmu.bits import PFERR
from fastmmu.checks import WORD, checked_int
from fastmmu.memory import GuestMemory
from fastmmu.paging import Cpu
from fastmmu.processor import mmu_of
from fastmmu.state import TRAIL_LENGTH, Scratch

WRITE, USER, FETCH, IMPLICIT = (int(mask) for mask in (PFERR.W, PFERR.U, PFERR.F, PFERR.IMPLICIT))
ACCESS_BITS = WRITE | USER | FETCH | IMPLICIT
EXPECTED_ACCESS = "0 or WRITE, USER, FETCH, IMPLICIT or-ed"


class Translation(NamedTuple):
    """One translation.

    `ok` is separate from `pferr`, because error code 0 is a real fault. `gpa` is 0 on a fault. `level` is that of the mapping
    (1 4 KiB, 2 2 or 4 MiB, 3 1 GiB) or of the entry that failed; 0 where no entry was read: paging is off, or the address is none
    of this mode (not canonical, or wider than 32 bits outside long mode), for which a processor raises #GP and no page fault.
    `access` holds ACC_X 1, ACC_W 2, ACC_U 4; a read of a clean page reports no write access.
    """

    ok: bool
    gpa: int
    level: int
    access: int
    pferr: int


class Translations(NamedTuple):
    """Many translations: arrays of one length, of bool, uint64, uint8, uint8, uint32; fields as in `Translation`."""

    ok: np.ndarray
    gpa: np.ndarray
    level: np.ndarray
    access: np.ndarray
    pferr: np.ndarray


def checked_gva(gva: object) -> int:
    """An address as an int.

    Raises:
        ValueError: not an integer from 0 to 2^64 - 1.
    """
    return checked_int(gva, 0, WORD, "gva", "an int from 0 to 2^64 - 1")


def checked_access(access: object) -> int:
    """An access as an int.

    Raises:
        ValueError: bits other than WRITE, USER, FETCH, IMPLICIT.
    """
    value = checked_int(access, 0, ACCESS_BITS, "access", EXPECTED_ACCESS)
    if value & ~ACCESS_BITS:
        raise ValueError(f"access: {access!r}, expected {EXPECTED_ACCESS}")
    return value


def checked_column(values: object, check: Callable[[object], int], name: str) -> np.ndarray:
    """One-dimensional contiguous uint64; whatever is not an array of integers is checked element by element."""
    kind = values.dtype.kind if isinstance(values, np.ndarray) else ""
    if kind != "u" and not (kind == "i" and np.all(values >= 0)):  # type: ignore[operator]
        try:
            values = np.array([check(value) for value in values], np.uint64)  # type: ignore[attr-defined]
        except TypeError:
            raise ValueError(f"{name}: {type(values).__name__}, expected a one-dimensional sequence of ints") from None
    if values.ndim != 1:
        raise ValueError(f"{name}: shape {values.shape}, expected one dimension")
    return np.ascontiguousarray(values, np.uint64)


def checked_accesses(access: object, length: int) -> np.ndarray:
    """uint64 of length 1 (for all) or `length`."""
    if np.ndim(access) == 0:  # type: ignore[arg-type]
        scalar = access[()] if isinstance(access, np.ndarray) else access
        return np.array([checked_access(scalar)], np.uint64)
    column = checked_column(access, checked_access, "access")
    if len(column) != length:
        raise ValueError(f"access: length {len(column)}, expected {length} as of gvas")
    if length:
        checked_access(np.bitwise_or.reduce(column))
    return column


def translate_many(ram: GuestMemory, cpu: Cpu, gvas: object, access: object = 0) -> Translations:
    """Translate many guest virtual addresses; accessed and dirty bits are set in `ram.words` as the processor sets them.

    Args:
        ram: guest memory.
        cpu: registers; under PAE paging the PDPTEs are loaded once, at the start.
        gvas: one-dimensional array or sequence of unsigned integers.
        access: WRITE, USER, FETCH, IMPLICIT or-ed (0: a supervisor read), one for all or one for each.

    Releases the GIL; several threads may translate on the same memory.

    Raises:
        ValueError: bad arguments. GeneralProtection, a ValueError: CR3 cannot be loaded.

    Example:
        >>> from fastmmu import USER, Cpu, GuestMemory, translate_many
        >>> ram = GuestMemory(1 << 20)
        >>> for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4008, 0x5065)):
        ...     ram.words[gpa >> 3] = entry
        >>> cpu = Cpu(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
        >>> answers = translate_many(ram, cpu, [0x1234, 0x2000], USER)
        >>> answers.ok.tolist(), [hex(gpa) for gpa in answers.gpa.tolist()], answers.pferr.tolist()
        ([True, False], ['0x5234', '0x0'], [0, 4])
    """
    mmu = mmu_of(ram, cpu)
    column = checked_column(gvas, checked_gva, "gvas")
    accesses = checked_accesses(access, len(column))
    length = len(column)
    answers = Translations(
        np.empty(length, np.bool_),
        np.empty(length, np.uint64),
        np.empty(length, np.uint8),
        np.empty(length, np.uint8),
        np.empty(length, np.uint32),
    )
    scratch = Scratch(np.zeros(TRAIL_LENGTH, np.uint64), np.zeros(LANES * BLOCK, np.uint64))
    translate_all(ram.state, mmu, scratch, column, accesses, answers)
    return answers


def translate(ram: GuestMemory, cpu: Cpu, gva: int, access: int = 0) -> Translation:
    """Translate one guest virtual address; arguments and errors as `translate_many`.

    A call costs some microseconds: for more than a few addresses use `translate_many`.

    Example:
        A page that user code may read, by four levels of tables.

        >>> from fastmmu import USER, WRITE, Cpu, GuestMemory, translate
        >>> ram = GuestMemory(1 << 20)
        >>> for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4008, 0x5065)):
        ...     ram.words[gpa >> 3] = entry
        >>> cpu = Cpu(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
        >>> translate(ram, cpu, 0x1234, USER)
        Translation(ok=True, gpa=21044, level=1, access=5, pferr=0)
        >>> translate(ram, cpu, 0x1234, USER | WRITE)
        Translation(ok=False, gpa=0, level=1, access=0, pferr=7)
    """
    many = translate_many(ram, cpu, np.array([checked_gva(gva)], np.uint64), checked_access(access))
    return Translation(*(column[0].item() for column in many))
