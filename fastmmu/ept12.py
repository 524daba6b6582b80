"""The EPT that a hypervisor gives its guest (EPT12), as KVM reads it: entries, the walk, and the exit that a failed walk is.

KVM keeps one set of functions for tables of a guest and compiles it twice, once for entries of EPT. Here an entry becomes what an
ordinary one would say: R stands where U does, so that all that follows is the same. Follows `FNAME(walk_addr_generic)` of Linux
6.1, built for EPT, and `nested_ept_inject_page_fault` (facts 2.3).
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner, load
from fastmmu.bits import ACC, EPT, GPTE64, ONE, PAGE_SHIFT, PFERR, QUALIFICATION, WORD_SHIFT, ZERO
from fastmmu.ept import INDEX_BITS, MISCONFIGURATION, PATTERN, RIGHTS, RIGHTS_SHIFT, VIOLATION
from fastmmu.machine_state import VcpuWord
from fastmmu.memory import find_slot
from fastmmu.memslot import mark_dirty, note_write
from fastmmu.paging import LONG4
from fastmmu.permission import permission_fault
from fastmmu.state import NO_SLOT, Reg, Walk
from fastmmu.walk import ALL_ONES, ROM, access_of, exchange_entry, page_gpa, reserved_row, table_index

R_TO_U, A_TO_A, X_TO_NX = np.uint64(2), np.uint64(8 - 5), np.uint64(63 - 2)
U_TO_READ = np.uint64(2)  # from PFERR.U to the qualification's R, and from PFERR.F to its X
FLAGS = EPT.A | EPT.D
KEPT = GPTE64.ADDR | GPTE64.PS | GPTE64.W
WHERE = PFERR.GUEST_FINAL | PFERR.GUEST_PAGE


# --- entries ---------------------------------------------------------------------------------------------------------------


@inner
def is_ept12(nested, mmu):
    """Whether the tables that `mmu` names hold entries of EPT; `nested` is the vCPU's."""
    if nested is None:
        return False
    return mmu.reg[Reg.EPT] != ZERO


@inner
def gpte_of(nested, mmu, entry):
    """What an entry of a hypervisor's EPT says, as an ordinary one; others as they are. Without A and D it was always used."""
    if nested is None:
        return entry
    if mmu.reg[Reg.EPT] == ZERO:
        return entry
    flags = (entry | (FLAGS & ~mmu.reg[Reg.EPT_FLAGS])) & FLAGS
    gpte = (entry & KEPT) | ((entry & EPT.R) << R_TO_U) | (flags >> A_TO_A) | ((~entry & EPT.X) << X_TO_NX)
    return gpte | GPTE64.P if entry & RIGHTS != ZERO else gpte


@inner
def is_bad(nested, mmu, entry, level):
    """Whether an entry that is present sets reserved bits, or rights and memory type of EPT that do not go together."""
    if entry & mmu.reserved[reserved_row(entry & mmu.reg[Reg.LARGE], level)] != ZERO:
        return True
    if nested is None:
        return False
    return (mmu.reg[Reg.EPT_BAD] >> (entry & PATTERN)) & ONE != ZERO


# --- the walk --------------------------------------------------------------------------------------------------------------


@inner
def walk_ept12(vm, vcpu, gpa, access):
    """KVM translates a nested gpa (facts 2.3): the Walk. A and D that it sets are logged, and taken over into the trail.

    `access`: U asks for R, W for W, F for X; each is asked for by itself.
    """
    mmu, slots = vcpu.mmu, vm.mem.slots
    write = access & PFERR.W != ZERO
    while True:  # again when an entry changed between reading it and setting its A or D
        table, level, rights, raw = mmu.reg[Reg.CR3] & EPT.ADDR, mmu.reg[Reg.MODE], ALL_ONES, ALL_ONES
        while True:
            if find_slot(slots, table) == NO_SLOT:
                return refused(vcpu, level, access, ZERO, raw)
            entry = load(vm.mem.words, (table >> WORD_SHIFT) + table_index(gpa, level, INDEX_BITS))
            gpte = gpte_of(vcpu.nested, mmu, entry)
            raw &= entry
            if gpte & GPTE64.P == ZERO:
                return refused(vcpu, level, access, ZERO, raw)
            if is_bad(vcpu.nested, mmu, entry, level):
                return refused(vcpu, level, access, PFERR.P | PFERR.RSVD, raw)
            rights &= gpte ^ GPTE64.NX
            vcpu.trail[level] = entry
            if level == ONE or gpte & mmu.reg[Reg.LARGE] != ZERO:
                break
            table = gpte & GPTE64.ADDR
            level -= ONE

        granted = access_of(rights)
        if permission_fault(mmu, granted, access):
            return refused(vcpu, level, access, PFERR.P, raw)
        dirty = gpte & GPTE64.D != ZERO
        if not write and not dirty:
            granted &= ~ACC.W  # so that the first write walks, and sets D
        if rights & GPTE64.A == ZERO or (write and not dirty):
            if not set_flags(vm, vcpu, gpa, level, write):
                continue
        return Walk(True, page_gpa(LONG4, entry, gpa, level), level, granted, ZERO)


@inner
def refused(vcpu, level, access, pferr, raw):
    """A walk that fails: its own access, and the rights of the entries read so far, are what the qualification will say."""
    read_fetch = (access & (PFERR.U | PFERR.F)) >> U_TO_READ
    vcpu.own[VcpuWord.QUALIFICATION] = read_fetch | (access & PFERR.W) | ((raw & RIGHTS) << RIGHTS_SHIFT)
    return Walk(False, ZERO, level, ZERO, pferr | access)


@inner
def set_flags(vm, vcpu, gpa, leaf_level, write):
    """Set A from the top table down to the leaf, and D in the leaf of a write, in the entries that the walk has read; those in
    read-only memory stay as they are. False when one had changed meanwhile."""
    slots, table, level = vm.mem.slots, vcpu.mmu.reg[Reg.CR3] & EPT.ADDR, vcpu.mmu.reg[Reg.MODE]
    while True:
        entry = vcpu.trail[level]
        wanted = entry | EPT.A
        if level == leaf_level and write:
            wanted |= EPT.D
        slot = slots[find_slot(slots, table)]
        if wanted != entry and slot["kind"] != ROM:
            if not exchange_entry(vm.mem, LONG4, table, table_index(gpa, level, INDEX_BITS), entry, wanted):
                return False
            vcpu.trail[level] = wanted
            mark_dirty(vm, slot, table >> PAGE_SHIFT)
            note_write(vm, vcpu, table)
        if level == leaf_level:
            return True
        table = entry & EPT.ADDR
        level -= ONE


# --- the exit --------------------------------------------------------------------------------------------------------------


@inner
def note_exit(nested, own, pferr):
    """Keep what the processor said of the address at an exit: the qualification that a hypervisor sees has it from there."""
    if nested is None:
        return
    own[VcpuWord.EXIT_CODE] = pferr


@inner
def reflected_exit(nested, own, pferr):
    """(reason, qualification) of the exit that a hypervisor sees; with NPT (0, error code). `pferr`: where the address was met.

    A misconfiguration has no qualification; nor has the processor's own exit at an MMIO spte bits that say where the address was.
    """
    if nested is None:
        return ZERO, ZERO
    if nested.reg[Reg.EPT] == ZERO:
        return ZERO, (pferr & WHERE) | own[VcpuWord.INJECTED]
    if own[VcpuWord.INJECTED] & PFERR.RSVD != ZERO:
        return MISCONFIGURATION, ZERO
    qualification, met = own[VcpuWord.QUALIFICATION], own[VcpuWord.EXIT_CODE]
    if met & WHERE != ZERO:
        qualification |= QUALIFICATION.LINEAR
    if met & PFERR.GUEST_FINAL != ZERO:
        qualification |= QUALIFICATION.FINAL
    return VIOLATION, qualification
