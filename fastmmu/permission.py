"""The permission check of a walk: one look-up in a table made when the registers change (facts 1.4), and protection keys."""

from __future__ import annotations

import numpy as np

from fastmmu._jit import kernel
from fastmmu.bits import ACC, GPTE64, ONE, PFERR, ZERO
from fastmmu.state import Reg

KIND_BITS = PFERR.W | PFERR.U | PFERR.F
KEY_SHIFT = np.uint64(59)
ACCESS_DISABLE, WRITE_DISABLE = np.uint64(1), np.uint64(2)


@kernel
def fault_kind(mmu, access):
    """Row of the tables by fault kind: W, U, F of `access`, "SMAP does not apply" in the place of RSVD, shifted right by one."""
    kind = access & KIND_BITS
    if mmu.reg[Reg.AC] != ZERO and access & PFERR.IMPLICIT == ZERO:
        kind |= PFERR.RSVD
    return kind >> ONE


@kernel
def permission_fault(mmu, page_access, access):
    """Whether `access` (PFERR bits) to a page with `page_access` (ACC bits) faults."""
    return (np.uint64(mmu.permissions[fault_kind(mmu, access)]) >> page_access) & ONE != ZERO


@kernel
def key_fault(mmu, gpte, page_access, access):
    """Whether the leaf's protection key denies the access (facts 1.4.5; SDM volume 3, 4.6.2 for supervisor keys).

    PKRU rules user pages, PKRS supervisor pages; fetches are exempt. Write-disable binds user accesses, and all under CR0.WP.
    """
    if access & PFERR.F != ZERO:
        return False
    register = mmu.reg[Reg.PKRU] if page_access & ACC.U != ZERO else mmu.reg[Reg.PKRS]
    rights = register >> (((gpte & GPTE64.KEY) >> KEY_SHIFT) << ONE)
    if rights & ACCESS_DISABLE != ZERO:
        return True
    return rights & WRITE_DISABLE != ZERO and access & PFERR.W != ZERO and (access & PFERR.U != ZERO or mmu.reg[Reg.WP] != ZERO)
