"""Two-dimensional translation for people who hold a memory image: `translate_nested` and `translate_nested_many`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastmmu.batch import BLOCK
from fastmmu.bits import CR0, CR4, EFER, EPT, GPTE64, PAGE_MASK, PHYSICAL_LIMIT, QUALIFICATION, ZERO, field
from fastmmu.checks import checked_flag, checked_int
from fastmmu.ept import OUTSIDE, EptCaps, checked_eptp, outside
from fastmmu.memory import GuestMemory
from fastmmu.nested import walk_dimension
from fastmmu.nested_batch import LANES, translate_nested_all
from fastmmu.nested_caches import make_nested_caches
from fastmmu.paging import Cpu, Mode, PlainColumn, plain_checks
from fastmmu.processor import mmu_of
from fastmmu.state import TRAIL_LENGTH, EptState, Exit, Host, HostKind, HostWalk, NestedScratch
from fastmmu.translate import PFERR, checked_access, checked_accesses, checked_column, checked_gva

PDPTE_TABLE = 0xFFFF_FFE0
FOLDED_TYPE = field(4, 3)


@dataclass(frozen=True)
class Ept:
    """The second dimension of an Intel processor: an EPT.

    Raises:
        ValueError: not an int of 64 bits and an EptCaps; EptpError, a ValueError: the EPTP makes VM entry fail.

    Example:
        >>> from fastmmu import Ept, EptCaps
        >>> Ept(0x101E, EptCaps()).eptp  # tables at 0x1000, four levels, write-back
        4126
        >>> Ept(0x1006, EptCaps())
        Traceback (most recent call last):
        ...
        fastmmu.ept.EptpError: ...
    """

    eptp: int
    caps: EptCaps

    def __post_init__(self) -> None:
        checked_eptp(self.eptp, self.caps)
        object.__setattr__(self, "eptp", int(self.eptp))


@dataclass(frozen=True)
class Npt:
    """The second dimension of an AMD processor: the host's own paging in long mode, from nCR3 (APM volume 2, 15.25.3).

    `levels` is 4 or 5, by the host's CR4.LA57; `nx` its EFER.NXE; `maxphyaddr` is in bits, `page_1g` is CPUID's 1 GiB-page bit.

    Raises:
        ValueError: an nCR3 that is no page-aligned address below 2^52, or anything else that no processor has.

    Example:
        >>> from fastmmu import Npt
        >>> Npt(0x1000, levels=5).cpu.mode.name
        'LONG5'
    """

    ncr3: int
    levels: int = 4
    nx: bool = True
    maxphyaddr: int = 46
    page_1g: bool = True

    def __post_init__(self) -> None:
        told = "a multiple of 4096 from 0 to 2^52 - 4096"
        ncr3 = checked_int(self.ncr3, 0, PHYSICAL_LIMIT - 1, "ncr3", told)
        if ncr3 & ~int(GPTE64.ADDR):
            raise ValueError(f"ncr3: {self.ncr3!r}, expected {told}")
        levels = checked_int(self.levels, 4, 5, "levels", "4 or 5")
        for name, value in (("ncr3", ncr3), ("levels", levels), ("nx", checked_flag(self.nx, "nx"))):
            object.__setattr__(self, name, value)
        self.cpu  # noqa: B018  (checks the rest)

    @property
    def cpu(self) -> Cpu:
        """The host's registers, as its nested tables are walked with them."""
        return Cpu(
            cr0=int(CR0.PE | CR0.WP | CR0.PG),
            cr3=self.ncr3,
            cr4=int(CR4.PAE | (CR4.LA57 if self.levels == 5 else ZERO)),
            efer=int(EFER.LME | EFER.LMA | (EFER.NX if self.nx else ZERO)),
            maxphyaddr=self.maxphyaddr,
            page_1g=self.page_1g,
            amd=True,
        )


class NestedTranslation(NamedTuple):
    """One two-dimensional translation.

    `ok`: `hpa` is the answer, `gpa` what the guest's tables gave, `level` and `access` as of `Translation`, for the guest's tables.
    Not ok and `exit_reason` 0: a #PF of the guest, with `pferr`; as in `Translation` an address that is none has level 0.
    Not ok with an `exit_reason`: the second dimension failed for the guest physical address `gpa`, at the guest's `level`: 48 EPT
    violation, 49 EPT misconfiguration, with its exit qualification, or 0x400 nested page fault, with its error code.
    """

    ok: bool
    hpa: int
    gpa: int
    level: int
    access: int
    pferr: int
    exit_reason: int
    exit_qualification: int


class NestedTranslations(NamedTuple):
    """Many translations: arrays of one length, of bool, uint64, uint64, uint8, uint8, uint32, uint32, uint64."""

    ok: np.ndarray
    hpa: np.ndarray
    gpa: np.ndarray
    level: np.ndarray
    access: np.ndarray
    pferr: np.ndarray
    exit_reason: np.ndarray
    exit_qualification: np.ndarray


def ept_checks(ept: EptState) -> np.ndarray:
    """For each HostKind the masks by which a walk of an EPT is plain: as `paging.plain_checks`, uint64[len(HostKind), 4].

    Every entry is readable beside what the access needs, so that no pattern of rights is misconfigured; a leaf's memory type,
    folded (nested.fold_type), is 0 or 6; a fetch finds both rights to execute, whatever the linear address.
    """
    table = np.zeros((len(HostKind), len(PlainColumn)), np.uint64)
    writes_tables = ept.accessed != ZERO
    for kind, row in zip(HostKind, table, strict=True):
        write = kind == HostKind.WRITE or (kind == HostKind.TABLE and writes_tables)
        needed = EPT.R | ept.accessed | (EPT.W if write else ZERO) | (EPT.X | ept.user_x if kind == HostKind.FETCH else ZERO)
        row[PlainColumn.POINTER] = needed
        row[PlainColumn.POINTER_MASK] = needed | EPT.PS | ept.reserved[2] | ept.reserved[4]
        row[PlainColumn.LEAF] = needed | (ept.dirty if write else ZERO)
        row[PlainColumn.LEAF_MASK] = row[PlainColumn.LEAF] | FOLDED_TYPE | ept.reserved[1]
    return table


@lru_cache(maxsize=64)
def host_of(nested: Ept | Npt) -> Host:
    """State of the second dimension as kernels take it."""
    if isinstance(nested, Ept):
        ept = checked_eptp(nested.eptp, nested.caps)
        return Host(ept, None, ept.root, ept.levels, ept_checks(ept), ept.reserved[8 + 2], ept.reserved[8 + 3])
    npt = mmu_of(GuestMemory(4096), nested.cpu)
    user, write, fetch = (int(flag) >> 1 for flag in (PFERR.U, PFERR.W, PFERR.F))
    kinds = (user | write, user, user | write, user | fetch)  # in the order of HostKind
    checks = np.ascontiguousarray(plain_checks(nested.cpu)[list(kinds)])
    return Host(None, npt, np.uint64(nested.ncr3), np.uint64(nested.levels), checks, npt.reserved[8 + 2], npt.reserved[8 + 3])


def make_scratch() -> NestedScratch:
    """Working space for one thread."""
    entries, tables, host = (np.zeros(TRAIL_LENGTH, np.uint64) for _ in range(3))
    return NestedScratch(entries, tables, host, np.zeros(LANES * BLOCK, np.uint64))


def find_pdptes(ram: GuestMemory, cpu: Cpu, host: Host) -> HostWalk:
    """Where the four PDPTEs of PAE paging lie, which a load of CR3 reads. For EPT that is no access to a paging structure, but a
    read that has no linear address: bits 7 and 8 of the qualification are clear (SDM volume 3, 29.3.5 and table 28-7)."""
    table, trail = np.uint64(cpu.cr3 & PDPTE_TABLE), np.zeros(TRAIL_LENGTH, np.uint64)
    walk = walk_dimension(host.ept, host.npt, ram.state, trail, None, table, EPT.R, host.ept is None, False)
    if walk.reason == Exit.EPT_VIOLATION:
        walk = walk._replace(qualification=np.uint64(walk.qualification) & ~(QUALIFICATION.LINEAR | QUALIFICATION.FINAL))
    return walk


def translate_nested_many(ram: GuestMemory, cpu: Cpu, nested: Ept | Npt, gvas: object, access: object = 0) -> NestedTranslations:
    """Translate many virtual addresses of a guest to host physical addresses; A and D are set in `ram.words`, in both dimensions.

    Args:
        ram: host physical memory: the tables of the second dimension, and what these map of the guest's.
        cpu: the guest's registers; its CR3 is a guest physical address. Under PAE paging the PDPTEs are loaded once, at the start.
        nested: the second dimension, `Ept` or `Npt`.
        gvas: one-dimensional array or sequence of unsigned integers.
        access: WRITE, USER, FETCH, IMPLICIT or-ed (0: a supervisor read), one for all or one for each.

    Releases the GIL; several threads may translate on the same memory.

    Raises:
        ValueError: bad arguments. OutsideMemory, a ValueError: a table of EPT, or one of the guest's, lies outside memory; flags
            that were set before stay set. GeneralProtection, a ValueError: CR3 cannot be loaded.

    Example:
        See `translate_nested`; here for many addresses.

        >>> from fastmmu import Cpu, Ept, EptCaps, GuestMemory, translate_nested_many
        >>> ram = GuestMemory(1 << 20)
        >>> for hpa, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4028, 0x9033)):
        ...     ram.words[hpa >> 3] = entry
        >>> off = Cpu(cr0=1, cr3=0, cr4=0, efer=0)  # the guest does not page
        >>> answers = translate_nested_many(ram, off, Ept(0x101E, EptCaps()), [0x5678, 0x6000])
        >>> answers.ok.tolist(), answers.hpa.tolist(), answers.exit_reason.tolist()
        ([True, False], [38520, 0], [0, 48])
    """
    if not isinstance(nested, (Ept, Npt)):
        raise ValueError(f"nested: {type(nested).__name__}, expected an Ept or an Npt")
    if not isinstance(ram, GuestMemory) or not isinstance(cpu, Cpu):
        raise ValueError(f"expected a GuestMemory and a Cpu, not {type(ram).__name__} and {type(cpu).__name__}")
    column = checked_column(gvas, checked_gva, "gvas")
    accesses = checked_accesses(access, len(column))
    host, length = host_of(nested), len(column)
    answers = NestedTranslations(
        np.zeros(length, np.bool_),
        np.zeros(length, np.uint64),
        np.zeros(length, np.uint64),
        np.zeros(length, np.uint8),
        np.zeros(length, np.uint8),
        np.zeros(length, np.uint32),
        np.zeros(length, np.uint32),
        np.zeros(length, np.uint64),
    )
    if cpu.mode == Mode.PAE:
        found = find_pdptes(ram, cpu, host)
        if found.reason == OUTSIDE:
            raise outside(int(found.hpa))
        if not found.ok:
            answers.gpa[:], answers.level[:] = cpu.cr3 & PDPTE_TABLE, Mode.PAE
            answers.exit_reason[:], answers.exit_qualification[:] = found.reason, found.qualification
            return answers
        if not any(start <= found.hpa < end for start, end, kind in ram.slots if kind != "device"):
            raise outside(int(found.hpa) & int(PAGE_MASK))
        cpu = dataclasses.replace(cpu, cr3=int(found.hpa))
    mmu = mmu_of(ram, cpu)
    translate_nested_all(ram.state, mmu, host, make_scratch(), make_nested_caches(False, False), column, accesses, answers)
    wrong = np.flatnonzero(answers.exit_reason == OUTSIDE)
    if len(wrong):
        raise outside(int(answers.hpa[wrong[0]]))
    return answers


def translate_nested(ram: GuestMemory, cpu: Cpu, nested: Ept | Npt, gva: int, access: int = 0) -> NestedTranslation:
    """Translate one virtual address of a guest; arguments and errors as `translate_nested_many`.

    Example:
        One large page of the second dimension maps the guest's memory one to one, its tables included.

        >>> from fastmmu import USER, Cpu, GuestMemory, Npt, translate_nested
        >>> ram = GuestMemory(1 << 20)
        >>> for hpa, entry in ((0x8000, 0x9067), (0x9000, 0xE7)):  # the host's: a page of 1 GiB
        ...     ram.words[hpa >> 3] = entry
        >>> for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4067), (0x4008, 0x5065)):  # the guest's
        ...     ram.words[gpa >> 3] = entry
        >>> cpu = Cpu(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
        >>> answer = translate_nested(ram, cpu, Npt(0x8000), 0x1234, USER)
        >>> answer.ok, hex(answer.gpa), hex(answer.hpa)
        (True, '0x5234', '0x5234')
    """
    many = translate_nested_many(ram, cpu, nested, np.array([checked_gva(gva)], np.uint64), checked_access(access))
    return NestedTranslation(*(column[0].item() for column in many))
