"""The MMIO info cache: the translation of the last device access, kept so that the next one need not walk the guest's tables.

Facts, section 4; the two older forms are those of the mails of June 2011. `match`, `fill` and `clear` take the parts of a
`MmioInfo`; a part that a strategy does not have is None and leaves no trace in the compiled code.
"""

from __future__ import annotations

from fastmmu._jit import kernel
from fastmmu.bits import ACC, GENERATION_UPDATING, PAGE_MASK, PAGE_OFFSET, PAGE_SHIFT, PFERR, ZERO
from fastmmu.permission import permission_fault
from fastmmu.state import Miss, Mmio, Reg


@kernel
def denied(generation, mmu, cached, access):
    """Whether the cached rights refuse `access`. Today the full permission table (facts 4.3.1); the patch as posted knew W and
    U only (facts 12, D3), and kernels ran with CR0.WP set."""
    if generation is None:
        return access & (PFERR.W | PFERR.U) & ~cached != ZERO  # W and U stand at the same places in both forms
    return permission_fault(mmu, cached, access)


@kernel
def match(entry, cr3, generation, mmu, gva, access):
    """Look up a device access: a `Miss`, HIT when the cached frame answers it (facts 4.2, 4.3)."""
    if entry[Mmio.GVA] == ZERO:
        return Miss.EMPTY  # so page 0 never hits
    if generation is not None:
        if generation[0] != mmu.reg[Reg.GENERATION]:
            return Miss.GENERATION
    if entry[Mmio.GVA] != gva & PAGE_MASK:
        return Miss.OTHER_PAGE
    if cr3 is not None:
        if cr3[0] != mmu.reg[Reg.CR3]:
            return Miss.OTHER_PAGE
    if access & PFERR.F != ZERO:
        return Miss.PERMISSION  # only loads and stores are emulated by way of the cache
    if denied(generation, mmu, entry[Mmio.ACCESS], access):
        return Miss.PERMISSION
    return Miss.HIT


@kernel
def match_gpa(entry, generation, mmu, gpa):
    """Whether the cached frame is that of a guest physical address; frame 0 never is (facts 4.2)."""
    gfn = entry[Mmio.GFN]
    return generation[0] == mmu.reg[Reg.GENERATION] and gfn != ZERO and gfn == gpa >> PAGE_SHIFT


@kernel
def fill(entry, cr3, generation, mmu, gva, walk):
    """Remember a successful walk to an address without memslot. False while a memslot update is in progress (facts 4.1.1)."""
    if generation is not None:
        if mmu.reg[Reg.GENERATION] & GENERATION_UPDATING != ZERO:
            return False
        generation[0] = mmu.reg[Reg.GENERATION]
    if cr3 is not None:
        cr3[0] = mmu.reg[Reg.CR3]
    entry[Mmio.GVA] = gva & PAGE_MASK
    entry[Mmio.GFN] = walk.gpa >> PAGE_SHIFT
    entry[Mmio.ACCESS] = walk.access & (ACC.W | ACC.U)
    return True


@kernel
def clear(entry, generation):
    """Forget the gva, as KVM does on INVLPG of the page and on every CR3 load (facts 4.5). The mails' caches never do.

    Returns whether something was forgotten.
    """
    if generation is None:
        return False
    was_filled = entry[Mmio.GVA] != ZERO
    entry[Mmio.GVA] = ZERO
    return was_filled


@kernel
def covers(entry, page):
    """Whether the entry holds the page of address `page`."""
    return entry[Mmio.GVA] == page & PAGE_MASK and entry[Mmio.GVA] != ZERO


@kernel
def cached_gpa(entry, gva):
    """Guest physical address of `gva` by the cached frame."""
    return (entry[Mmio.GFN] << PAGE_SHIFT) | (gva & PAGE_OFFSET)
