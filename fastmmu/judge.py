"""Old answers told apart: legally stale, or wrong.

A translation may be older than the tables until the guest demands that it be forgotten: INVLPG of the page, or a CR3 load that
flushes. So a delivered gpa is right if a walk of today's tables gives it, **stale but legal** if the tables gave it at some
moment since the last flush that covers the page, else **wrong**. The judge follows the one entry of the MMIO info cache and
keeps, for each of the four kinds of access (W and U or not), whether the cached answer is still legal.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import kernel
from fastmmu.bits import ONE, PAGE_SHIFT, PFERR, ZERO
from fastmmu.state import Mmio
from fastmmu.walk import walk_gva

KIND = PFERR.W | PFERR.U
KINDS = 4


@kernel
def look(vm, gva, access):
    """Walk today's tables without leaving a trace in them."""
    return walk_gva(vm.mem, vm.mmu, None, gva, access)


@kernel
def kind_bit(access):
    """Bit of the access's kind in `legal`."""
    return ONE << ((access & KIND) >> ONE)


@kernel
def granted_today(vm, entry):
    """Kinds of access for which today's tables give the cached frame, as bits."""
    kinds = ZERO
    for kind in range(KINDS):
        access = np.uint64(kind) << ONE
        walk = look(vm, entry[Mmio.GVA], access)
        if walk.ok and walk.gpa >> PAGE_SHIFT == entry[Mmio.GFN]:
            kinds |= kind_bit(access)
    return kinds


@kernel
def on_table_change(legal, vm, entry):
    """The tables changed: what they say now becomes legal beside what was."""
    if legal is None:
        return
    if entry[Mmio.GVA] != ZERO:
        legal[0] |= granted_today(vm, entry)


@kernel
def on_flush(legal, vm, entry):
    """The entry's page was flushed, or the entry was filled: only what the tables say now is legal."""
    if legal is None:
        return
    if entry[Mmio.GVA] != ZERO:
        legal[0] = granted_today(vm, entry)


@kernel
def is_legal(legal, access):
    """Whether the cached answer to such an access was the tables' at some moment since the last flush."""
    return legal[0] & kind_bit(access) != ZERO
