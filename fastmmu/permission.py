"""The permission check of a walk: one look-up in a table made when the registers change (facts 1.4)."""

from __future__ import annotations

import numpy as np

from fastmmu._jit import kernel
from fastmmu.bits import ONE, PFERR, ZERO
from fastmmu.state import Reg

KIND_BITS = PFERR.W | PFERR.U | PFERR.F


@kernel
def permission_fault(mmu, page_access, access):
    """Whether `access` (PFERR bits) to a page with `page_access` (ACC bits) faults."""
    kind = access & KIND_BITS
    if mmu.reg[Reg.AC] != ZERO and access & PFERR.IMPLICIT == ZERO:
        kind |= PFERR.RSVD  # "SMAP does not apply" stands in the place of RSVD
    return (np.uint64(mmu.permissions[kind >> ONE]) >> page_access) & ONE != ZERO
