"""What the processor does by itself: it walks the guest's tables through the tables of sptes, sets A and D, and fills its TLB.

With two-dimensional paging each entry of the guest's tables has a guest physical address, which is translated like the final
one (AMD APM volume 2, 15.25.5; SDM volume 3, 29.3.3): up to 4 x 4 + 4 + 4 = 24 reads. Without it the processor walks the sptes
alone, by the guest's virtual address, and sets A and D only there. No paging-structure cache is modelled.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import cmpxchg, inner, load, prefetch
from fastmmu.bits import ACC, GPTE64, ONE, PAGE_MASK, PAGE_OFFSET, PAGE_SHIFT, PFERR, WORD_SHIFT, ZERO, field
from fastmmu.descent import (
    NOWHERE,
    descend,
    descend_from,
    is_executable,
    reserved_code,
    root_for,
    touch_gpa,
    use_spte,
    walk_sptes,
)
from fastmmu.machine_state import Counter, Status, Touch, VcpuWord, VmWord
from fastmmu.memslot import note_write
from fastmmu.paging import LONG4
from fastmmu.permission import fault_kind, key_fault, permission_fault
from fastmmu.pool import NO_TABLE, count
from fastmmu.spte import INDEX_BITS, INDEX_MASK, frame_at, is_writable, pfn_of
from fastmmu.state import Reg
from fastmmu.tlb import insert, lookup
from fastmmu.views import is_nested
from fastmmu.walk import (
    ALL_ONES,
    MODE_LONG4,
    MODE_NONE,
    access_of,
    exchange_entry,
    mode_of,
    page_gpa,
    plain_for,
    read_entry,
    reserved_row,
    table_index,
)

ACCESS_BITS = PFERR.W | PFERR.U | PFERR.F
TABLE_ACCESS = PFERR.U | PFERR.GUEST_PAGE
FINAL_ACCESS = PFERR.U | PFERR.GUEST_FINAL
ADDRESS_32 = field(31, 0)
ENTRY_SHIFT = np.uint64(3)
GUESS_MASK = np.uint64(255)


@inner
def guest_fault(vcpu, gva, access, pferr):
    """A #PF that the processor delivers to the guest."""
    return Touch(Status.FAULT, ZERO, gva, pferr | (access & vcpu.mmu.reg[Reg.PFERR_ACCESS]))


@inner
def leaves(address, pferr):
    """A fault that exits to KVM."""
    return Touch(Status.EXIT, ZERO, address, pferr)


@inner
def not_plain():
    """What a plain walk answers where the case is not plain, and an access where the replay stops."""
    return Touch(Status.STOP, ZERO, ZERO, ZERO)


@inner
def rights_of(word, spte):
    """ACC form of what a leaf grants, under shadow paging."""
    rights = spte & (ACC.W | ACC.U)
    return rights | ACC.X if is_executable(word, spte) else rights


@inner
def leaf_gpa(gva, spte, level):
    """Guest physical address of `gva` in the page of a leaf spte."""
    page = gva >> PAGE_SHIFT
    return ((pfn_of(spte) | (page - frame_at(page, level))) << PAGE_SHIFT) | (gva & PAGE_OFFSET)


@inner
def remember_leaf(vm, vcpu, gva, spte, level):
    """Fill the TLB from a leaf under shadow paging, as a walk leaves it: the gpa."""
    gpa, writable = leaf_gpa(gva, spte, level), vm.word[VmWord.USE_WRITE]
    insert(vcpu.tlb, gva, gpa, rights_of(vm.word, spte), level, spte & writable == writable, is_executable(vm.word, spte))
    return gpa


@inner
def walk_shadow(vm, vcpu, gva, access):
    """Translate `gva` by the sptes alone; all that KVM put into them is final."""
    page = gva >> PAGE_SHIFT
    table, level = root_for(vm, vcpu, page)
    if table == NO_TABLE:
        return leaves(gva, access & ACCESS_BITS)
    paging = vcpu.mmu.reg[Reg.MODE] != MODE_NONE
    while True:
        index, found = walk_sptes(vm, table, level, page, access & ACCESS_BITS)
        if index == NOWHERE:
            return leaves(gva, found)
        if paging and permission_fault(vcpu.mmu, rights_of(vm.word, found), access):
            return leaves(gva, (access & ACCESS_BITS) | PFERR.P)
        used, spte = use_spte(vm, vcpu, index, found, ZERO, access & PFERR.W != ZERO)
        if used:
            break
    level = np.uint64(vm.page[index >> INDEX_BITS]["level"])
    return Touch(Status.DONE, remember_leaf(vm, vcpu, gva, spte, level), ZERO, ZERO)


@inner
def needs_of(word, access):
    """(bits that a leaf must hold for the processor to use it without more ado, bits that it must not)."""
    kind = ONE if access & PFERR.W != ZERO else ONE + ONE if access & PFERR.F != ZERO else ZERO
    return word[np.uint64(VmWord.USE_READ) + kind], word[np.uint64(VmWord.NOT_READ) + kind]


@inner(inline=True)
def walk_shadow_plainly(vm, vcpu, gva, access):
    """The plain case of it: nothing denied; or nothing mapped, or not for writing, which exits."""
    word, page = vm.word, gva >> PAGE_SHIFT
    table, level = root_for(vm, vcpu, page)  # NO_TABLE has a row, too, in which nothing is
    index, spte, level = descend(vm.spt, table, page, level)
    kind = fault_kind(vcpu.mmu, access)
    needed, mask = vcpu.own[np.uint64(VcpuWord.LEAF_BITS) + kind], vcpu.own[np.uint64(VcpuWord.LEAF_MASK) + kind]
    if spte & mask != needed:
        if spte & word[VmWord.HARDWARE_PRESENT] == ZERO:
            return leaves(gva, access & ACCESS_BITS)
        if spte & word[VmWord.MMIO_MASK] == word[VmWord.MMIO_VALUE]:
            return leaves(gva, reserved_code(word, access & ACCESS_BITS))
        if access & PFERR.W != ZERO and not is_writable(spte):
            return leaves(gva, (access & ACCESS_BITS) | PFERR.P)
        missing = needed & (word[VmWord.ACCESSED] | word[VmWord.DIRTY]) & ~spte
        if (spte | missing) & mask != needed:
            return not_plain()
        if cmpxchg(vm.spt, index, spte, spte | missing) != spte:  # what was mapped without being asked for has neither A nor D
            return not_plain()
        spte |= missing
    vcpu.own[guess_of(page)] = index & ~INDEX_MASK
    return Touch(Status.DONE, remember_leaf(vm, vcpu, gva, spte, level), ZERO, ZERO)


@inner
def guess_of(page):
    """Where the vCPU keeps its guess at the leaf table of a page."""
    return np.uint64(VcpuWord.LEAF_TABLE) + ((page >> INDEX_BITS) & GUESS_MASK)


@inner
def look_ahead(vm, vcpu, gva):
    """Ask for the leaf of an address that will be walked soon. It may be the wrong one: nothing depends on it but time."""
    page = gva >> PAGE_SHIFT
    prefetch(vm.spt, vcpu.own[guess_of(page)] | (page & INDEX_MASK))


@inner
def set_guest_bits(vm, vcpu, mode, table, gva, leaf_level, write):
    """Set A from the top table down to the leaf, and D in the leaf of a write. False when an entry had changed meanwhile."""
    level = mode.levels
    while True:
        gpte = vcpu.trail[level]
        wanted = gpte | GPTE64.A
        if level == leaf_level and write:
            wanted |= GPTE64.D
        if wanted != gpte:
            held, index = table, table_index(gva, level, mode.index_bits)
            if is_nested(vcpu.nested, vcpu.own):
                mapped, _, held = touch_gpa(vm, vcpu, table, TABLE_ACCESS | PFERR.W)
                if not mapped:
                    return False
            if not exchange_entry(vm.mem, mode, held, index, gpte, wanted):
                return False
            vcpu.trail[level] = wanted
            note_write(vm, vcpu, held)
        if level == leaf_level:
            return True
        table = gpte & mode.root
        level -= ONE


@inner
def ask_for_bits(vm, vcpu, mode, table, gva, leaf_level, write):
    """(address of the first entry whose A or D may not be set, error code), or (NOWHERE, 0): each that is to change is written to,
    and none is changed before all may be."""
    level = mode.levels
    while True:
        gpte = vcpu.trail[level]
        if gpte & GPTE64.A == ZERO or (level == leaf_level and write and gpte & GPTE64.D == ZERO):
            entry = table + table_index(gva, level, mode.index_bits) * (ONE << (PAGE_SHIFT - mode.index_bits))
            mapped, answer, _ = touch_gpa(vm, vcpu, entry, TABLE_ACCESS | PFERR.W)
            if not mapped:
                return entry, answer
        if level == leaf_level:
            return NOWHERE, ZERO
        table = gpte & mode.root
        level -= ONE


@inner
def walk_guest(vm, vcpu, gva, access):
    """Translate `gva` by the guest's tables, each entry's address by the sptes; the final address is left to the caller.

    Returns (Touch, level, rights and protection key, dirty): DONE with the gpa; FAULT; or EXIT for an entry whose address the
    sptes do not map.
    """
    mmu, mem = vcpu.mmu, vm.mem
    if mmu.reg[Reg.MODE] == MODE_NONE:
        return Touch(Status.DONE, gva & ADDRESS_32, ZERO, ZERO), ONE, ACC.ALL, True
    mode = mode_of(mmu)
    write = access & PFERR.W != ZERO
    root = mmu.reg[Reg.CR3] & mode.root
    # a table access is a write, for the A bit that it may set; under EPT only if the EPTP enables A and D (facts 2.1)
    table_access = TABLE_ACCESS
    if vm.word[VmWord.EPT] == ZERO or vm.word[VmWord.AD] != ZERO:
        table_access |= PFERR.W
    while True:  # again when an entry changed between reading it and setting its A or D
        table, level, rights = root, mode.levels, ALL_ONES
        while True:
            index = table_index(gva, level, mode.index_bits)
            entry = table + index * (ONE << (PAGE_SHIFT - mode.index_bits))
            mapped, answer, place = touch_gpa(vm, vcpu, entry, table_access)
            if not mapped:
                return leaves(entry, answer), ONE, ZERO, False
            held = place & PAGE_MASK
            gpte = read_entry(mem, mode, held, index)
            if gpte & GPTE64.P == ZERO:
                return guest_fault(vcpu, gva, access, ZERO), ONE, ZERO, False
            large = gpte & mmu.reg[Reg.LARGE]
            if gpte & mmu.reserved[reserved_row(large, level)] != ZERO:
                present = PFERR.P if vm.word[VmWord.RESERVED_WITHOUT_PRESENT] == ZERO else ZERO
                return guest_fault(vcpu, gva, access, present | PFERR.RSVD), ONE, ZERO, False
            rights &= gpte ^ GPTE64.NX
            last = level == ONE or large != ZERO
            if not last and gpte & GPTE64.A == ZERO and vm.word[VmWord.ACCESSED_WHILE_WALKING] != ZERO:
                if not exchange_entry(mem, mode, held, index, gpte, gpte | GPTE64.A):
                    break
                note_write(vm, vcpu, place)
                gpte |= GPTE64.A
            vcpu.trail[level] = gpte
            if last:
                break
            table = gpte & mode.root
            level -= ONE
        if not last:
            continue
        granted = access_of(rights)
        if mode.keys and key_fault(mmu, gpte, granted, access):
            return guest_fault(vcpu, gva, access, PFERR.P | PFERR.PK), ONE, ZERO, False
        if permission_fault(mmu, granted, access):
            return guest_fault(vcpu, gva, access, PFERR.P), ONE, ZERO, False
        dirty = gpte & GPTE64.D != ZERO or write
        if rights & GPTE64.A == ZERO or (write and gpte & GPTE64.D == ZERO):
            if table_access & PFERR.W == ZERO:  # the tables were only read so far
                if not is_nested(vcpu.nested, vcpu.own):
                    table_access |= PFERR.W
                    continue
                entry, answer = ask_for_bits(vm, vcpu, mode, root, gva, level, write)
                if entry != NOWHERE:
                    return leaves(entry, answer), ONE, ZERO, False
            if not set_guest_bits(vm, vcpu, mode, root, gva, level, write):
                continue
        if mode.keys:
            granted |= gpte & GPTE64.KEY
        return Touch(Status.DONE, page_gpa(mode, gpte, gva, level), ZERO, ZERO), level, granted, dirty


@inner(inline=True)
def is_usable(spt, table, level, gfn, needed, forbidden):
    """(whether a leaf maps `gfn` that holds all bits of `needed` and none of `forbidden`, the leaf)."""
    _, spte, _ = descend_from(spt, table, gfn, level)
    return spte & (needed | forbidden) == needed, spte


@inner(inline=True)
def walk_plainly(vm, vcpu, gva, access):
    """The plain case of a walk in two dimensions: 4-level paging, nothing denied, every A and D already set, in both dimensions.

    One masked compare for each entry stands for all checks. DONE fills the TLB as the exact walk would; EXIT is a fault of the
    final address; STOP says only that the case is not plain.
    """
    word = vm.word
    if word[VmWord.TDP] == ZERO:
        return walk_shadow_plainly(vm, vcpu, gva, access)
    plain = plain_for(vcpu.mmu, access)
    if plain.mode != MODE_LONG4 or is_nested(vcpu.nested, vcpu.own):
        return not_plain()
    root, top = vcpu.own[VcpuWord.ROOT], word[VmWord.ROOT_LEVEL]
    needed = word[VmWord.USE_TABLE]
    table, level = plain.root, LONG4.levels
    rights, seen = ALL_ONES, ZERO
    while True:
        entry = table + (table_index(gva, level, LONG4.index_bits) << ENTRY_SHIFT)
        usable, _ = is_usable(vm.spt, root, top, entry >> PAGE_SHIFT, needed, ZERO)
        if not usable:
            return not_plain()
        gpte = load(vm.mem.words, entry >> WORD_SHIFT)
        rights &= gpte
        seen |= gpte
        if level == ONE:
            if gpte & plain.leaf_mask != plain.leaf:
                return not_plain()
            break
        if gpte & plain.pointer_mask != plain.pointer:
            reserved = vcpu.mmu.reserved[reserved_row(GPTE64.PS, level)]
            if gpte & GPTE64.PS == ZERO or gpte & reserved != ZERO or gpte & plain.leaf_mask != plain.leaf:
                return not_plain()
            break
        table = gpte & LONG4.root
        level -= ONE
    gpa = page_gpa(LONG4, gpte, gva, level)
    needed, forbidden = needs_of(word, access)
    usable, spte = is_usable(vm.spt, root, top, gpa >> PAGE_SHIFT, needed, forbidden)
    if not usable:
        mapped, spte, _ = touch_gpa(vm, vcpu, gpa, final_access(vm, access))
        if not mapped:
            return leaves(gpa, spte)
    granted = access_of((rights & ~GPTE64.NX) | (~seen & GPTE64.NX))
    writable = word[VmWord.USE_WRITE]
    dirty = gpte & GPTE64.D != ZERO and spte & writable == writable
    insert(vcpu.tlb, gva, gpa, granted | (gpte & GPTE64.KEY), level, dirty, is_executable(word, spte))
    return Touch(Status.DONE, gpa, ZERO, ZERO)


@inner(inline=True)
def translate_page(vm, vcpu, gva, access):
    """Translate one address as the processor does, by its TLB or by a walk that fills it."""
    entry = lookup(vcpu.tlb, vcpu.mmu, gva, access)
    if entry != ZERO:
        count(vcpu.stat, Counter.TLB_HITS)
        return Touch(Status.DONE, (entry & GPTE64.ADDR) | (gva & ((ONE << PAGE_SHIFT) - ONE)), ZERO, ZERO)
    count(vcpu.stat, Counter.TLB_MISSES)
    touched = walk_plainly(vm, vcpu, gva, access)
    return touched if touched.status != Status.STOP else walk_and_insert(vm, vcpu, gva, access)


@inner
def final_access(vm, access):
    """The error code's bits for the address that a walk came to: with two-dimensional paging a user access, whoever asks; but EPT
    says so of a read alone (facts 2.2)."""
    if vm.word[VmWord.TDP] == ZERO:
        return access & ACCESS_BITS
    kind = access & (PFERR.W | PFERR.F)
    if vm.word[VmWord.EPT] != ZERO and kind != ZERO:
        return kind | PFERR.GUEST_FINAL
    return kind | FINAL_ACCESS


@inner
def access_gpa(vm, vcpu, gpa, access):
    """An access by guest physical address."""
    mapped, answer, place = touch_gpa(vm, vcpu, gpa, final_access(vm, access))
    return Touch(Status.DONE, place, ZERO, ZERO) if mapped else leaves(gpa, answer)


@inner
def walk_and_insert(vm, vcpu, gva, access):
    """Walk, and remember the translation."""
    if vm.word[VmWord.TDP] == ZERO:
        return walk_shadow(vm, vcpu, gva, access)
    touched, level, rights, dirty = walk_guest(vm, vcpu, gva, access)
    if touched.status != Status.DONE:
        return touched
    mapped, answer, place = touch_gpa(vm, vcpu, touched.gpa, final_access(vm, access))
    if not mapped:
        return leaves(touched.gpa, answer)
    if is_nested(vcpu.nested, vcpu.own) and answer & vm.word[VmWord.USER] == ZERO:
        return Touch(Status.DONE, place, ZERO, ZERO)  # execute-only: a TLB entry would be read through
    writable = is_writable(answer) and (answer & vm.word[VmWord.DIRTY] != ZERO or vm.word[VmWord.DIRTY] == ZERO)
    insert(vcpu.tlb, gva, place, rights, level, dirty and writable, is_executable(vm.word, answer))
    return Touch(Status.DONE, place, ZERO, ZERO)
