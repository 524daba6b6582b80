"""Roots: which tables a vCPU's processor walks, those of address spaces that it left a moment ago, and requests to the vCPU.

Facts 9.1 to 9.3; `kvm_mmu_load`, `kvm_mmu_new_pgd`, `kvm_set_cr3` and `vcpu_enter_guest` of Linux 6.1. Besides the current root a
vCPU keeps three, the newest first, each with the value of CR3 that it is for. The four roots of PAE paging are never kept.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import exchange, inner, store
from fastmmu.bits import ACC, CR0, CR3, CR4, EFER, GPTE64, ONE, PAGE_SHIFT, ROLE, WORD_SHIFT, ZERO, field
from fastmmu.descent import FOUR_ROOTS, PAE_LEVEL, PAE_ROOT_SHIFT
from fastmmu.exits import IN_GUEST, IN_KVM, ask_one, is_asked, request_word, take_request
from fastmmu.hardware import needs_of
from fastmmu.machine_state import PREVIOUS_ROOTS, Counter, Request, Stop, VcpuWord, VmWord
from fastmmu.memory import find_slot
from fastmmu.paging import TWO_LEVEL
from fastmmu.pool import NO, NO_TABLE, NONE, count, is_obsolete
from fastmmu.rmap import QUADRANT_SHIFT
from fastmmu.shadow import (
    commit_zapped,
    get_shadow_page,
    is_short_of_pages,
    make_pages_available,
    put_root,
    root_levels,
    root_role,
)
from fastmmu.state import NO_SLOT, Reg
from fastmmu.sync import forget_mmio, sync_children
from fastmmu.tdp import get_root
from fastmmu.tdp import put_root as put_tdp_root
from fastmmu.tlb import flush
from fastmmu.views import is_nesting, is_shadow_paging, is_tdp_mmu, kvm_view, turned
from fastmmu.walk import MODE_PAE, MODE_TWO_LEVEL, mode_of

TLB_FLUSH, FREE_OBSOLETE_ROOTS, LOAD_ROOT, FLUSH_CURRENT, MMU_SYNC, FLUSH_GUEST = (np.uint64(one) for one in Request)
PAE_ROOTS = 4
PAE_ROOT = np.uint64(VcpuWord.PAE_ROOT)
PREVIOUS, PREVIOUS_PGD = np.uint64(VcpuWord.PREVIOUS_ROOT), np.uint64(VcpuWord.PREVIOUS_PGD)
KEPT = np.uint64(PREVIOUS_ROOTS)
ONE_ROOT = np.uint32(1)
PDPTE_TABLE = field(31, 5)
PDPTES = np.uint64(Reg.PDPTE0)
ROLE_CR0 = CR0.PG | CR0.WP
ROLE_CR4 = CR4.PSE | CR4.PAE | CR4.LA57 | CR4.SMEP | CR4.SMAP | CR4.PKE
ROLE_EFER = EFER.LME | EFER.LMA | EFER.NX


@inner
def stop(vm, reason, address, code):
    """End the replay."""
    vm.word[VmWord.STOP] = np.uint64(reason)
    vm.word[VmWord.STOP_ADDRESS], vm.word[VmWord.STOP_CODE] = address, code


# --- loading ---------------------------------------------------------------------------------------------------------------


@inner(inline=True)
def load_root(vm, vcpu):
    """Find or make the root that the processor walks, and flush what its TLB has for another one. False when that is the end."""
    own = vcpu.own
    if is_tdp_mmu(vm, vcpu):
        root = get_root(vm)
    elif is_shadow_paging(vm, vcpu) and not has_tables(vm, vcpu):
        stop(vm, Stop.TRIPLE_FAULT, vcpu.mmu.reg[Reg.CR3], ZERO)
        return False
    elif is_short_of_pages(vm.word) and not make_pages_available(vm, vcpu.stat):
        stop(vm, Stop.NO_PAGES, ZERO, ZERO)
        return False
    elif own[VcpuWord.ROOT_LEVEL] != PAE_LEVEL:
        gfn = (vcpu.mmu.reg[Reg.CR3] & GPTE64.ADDR) >> PAGE_SHIFT if is_shadow_paging(vm, vcpu) else ZERO
        root = take_root(vm, vcpu, gfn, own[VcpuWord.ROOT_ROLE] | own[VcpuWord.ROOT_LEVEL])
    else:
        root = load_pae_roots(vm, vcpu)
    if root == NO_TABLE:
        stop(vm, Stop.NO_TABLES, ZERO, ZERO)
        return False
    own[VcpuWord.ROOT], own[VcpuWord.PGD] = root, vcpu.mmu.reg[Reg.CR3]
    sync_roots(vm, vcpu)
    flush(vcpu.tlb)
    return True


@inner
def has_tables(vm, vcpu):
    """Whether the guest's top tables lie in memslots: a guest without is shut down."""
    slots = vm.mem.slots
    if find_slot(slots, vcpu.mmu.reg[Reg.CR3] & mode_of(vcpu.mmu).root) == NO_SLOT:
        return False
    if vcpu.mmu.reg[Reg.MODE] != MODE_PAE:
        return True
    for i in range(PAE_ROOTS):
        pdpte = vcpu.mmu.reg[PDPTES + np.uint64(i)]
        if pdpte & GPTE64.P != ZERO and find_slot(slots, pdpte & GPTE64.ADDR) == NO_SLOT:
            return False
    return True


@inner
def take_root(vm, vcpu, gfn, role):
    """A shadow page as a root for one vCPU more; NO_TABLE without a free table."""
    table = get_shadow_page(vm, vcpu, gfn, role)
    if table != NO_TABLE:
        vm.page[table]["roots"] += ONE_ROOT
    return table


@inner
def load_pae_roots(vm, vcpu):
    """Four roots of 1 GiB each, for which FOUR_ROOTS stands; NO_TABLE without a free table.

    They follow the guest's four directories; or, each, a quarter of its only one; or, with paging off, nothing.
    """
    mode, role = vcpu.mmu.reg[Reg.MODE], vcpu.own[VcpuWord.ROOT_ROLE] | PAE_LEVEL
    for i in range(PAE_ROOTS):
        number = np.uint64(i)
        gfn, quadrant = number << PAE_ROOT_SHIFT, ZERO
        vcpu.own[PAE_ROOT + number] = NO_TABLE
        if mode == MODE_TWO_LEVEL:
            gfn, quadrant = (vcpu.mmu.reg[Reg.CR3] & TWO_LEVEL.root) >> PAGE_SHIFT, number << QUADRANT_SHIFT
        elif mode == MODE_PAE:
            pdpte = vcpu.mmu.reg[PDPTES + number]
            if pdpte & GPTE64.P == ZERO:
                continue
            gfn = (pdpte & GPTE64.ADDR) >> PAGE_SHIFT
        table = take_root(vm, vcpu, gfn, role | quadrant)
        if table == NO_TABLE:
            return table
        vcpu.own[PAE_ROOT + number] = table
    return FOUR_ROOTS


@inner
def sync_roots(vm, vcpu):
    """Bring everything under the current root up to date (facts 9); the MMIO info cache forgets its gva."""
    root = vcpu.own[VcpuWord.ROOT]
    if not is_shadow_paging(vm, vcpu) or root == NO_TABLE:
        return
    forget_mmio(vcpu)
    if root != FOUR_ROOTS:
        sync_children(vm, vcpu, root)
        return
    for i in range(PAE_ROOTS):
        table = vcpu.own[PAE_ROOT + np.uint64(i)]
        if table != NO_TABLE:
            sync_children(vm, vcpu, table)


# --- letting go ------------------------------------------------------------------------------------------------------------


@inner
def drop_current(vm, vcpu):
    """Let go of the current root. The caller commits what that zaps."""
    own = vcpu.own
    root = own[VcpuWord.ROOT]
    ask_one(vm, vcpu, LOAD_ROOT)
    own[VcpuWord.ROOT] = NO_TABLE
    if root == NO_TABLE:
        return
    if is_tdp_mmu(vm, vcpu):
        put_tdp_root(vm, vcpu.stat, root)
    elif root != FOUR_ROOTS:
        put_root(vm, vcpu.stat, root)
    else:
        for i in range(PAE_ROOTS):
            table = own[PAE_ROOT + np.uint64(i)]
            if table != NO_TABLE:
                put_root(vm, vcpu.stat, table)
            own[PAE_ROOT + np.uint64(i)] = NO_TABLE


@inner
def free_current(vm, vcpu):
    """Let go of the current root alone."""
    drop_current(vm, vcpu)
    commit_zapped(vm, vcpu.stat, False)


@inner
def drop_previous(vm, vcpu, i):
    """Let go of one of the kept roots, if it is there. The caller commits what that zaps."""
    root = vcpu.own[PREVIOUS + i]
    vcpu.own[PREVIOUS + i] = NO_TABLE
    if root != NO_TABLE:
        put_root(vm, vcpu.stat, root)


@inner
def unload_roots(vm, vcpu):
    """Let go of all roots, of both guests; the MMIO info cache forgets its gva (facts 4.5)."""
    unload_own(vm, vcpu)
    if is_nesting(vcpu.nested):
        unload_own(vm, turned(vcpu.nested, vcpu))


@inner
def unload_own(vm, vcpu):
    """The same of the guest that runs."""
    for i in range(KEPT):
        drop_previous(vm, vcpu, i)
    drop_current(vm, vcpu)
    commit_zapped(vm, vcpu.stat, False)
    forget_mmio(vcpu)


@inner
def free_obsolete_roots(vm, vcpu):
    """Let go of roots that were zapped, of both guests; PAE roots always (facts 5.14)."""
    free_obsolete_own(vm, vcpu)
    if is_nesting(vcpu.nested):
        free_obsolete_own(vm, turned(vcpu.nested, vcpu))


@inner
def free_obsolete_own(vm, vcpu):
    """The same of the guest that runs."""
    for i in range(KEPT):
        kept = vcpu.own[PREVIOUS + i]
        if kept != NO_TABLE and is_obsolete(vm, kept):
            drop_previous(vm, vcpu, i)
    root = vcpu.own[VcpuWord.ROOT]
    if root != NO_TABLE and (root == FOUR_ROOTS or is_obsolete(vm, root)):
        drop_current(vm, vcpu)
    commit_zapped(vm, vcpu.stat, False)


@inner
def free_unsync_roots(vm, vcpu):
    """Kept roots that are out of step go, which is how they are brought up to date (facts 9.3)."""
    for i in range(KEPT):
        kept = vcpu.own[PREVIOUS + i]
        if kept != NO_TABLE and vm.page[kept]["unsync_children"] != NONE:
            drop_previous(vm, vcpu, i)
    commit_zapped(vm, vcpu.stat, False)


# --- another address space -------------------------------------------------------------------------------------------------


@inner(inline=True)
def is_usable(vm, vcpu, root, pgd, wanted):
    """Whether a root is the one for `wanted`, a value of CR3: same value, same role, not zapped."""
    role = vcpu.own[VcpuWord.ROOT_ROLE] | vcpu.own[VcpuWord.ROOT_LEVEL]
    return root != NO_TABLE and pgd == wanted and np.uint64(vm.page[root]["role"]) == role


@inner(inline=True)
def swap_root(vcpu, i):
    """Exchange the current root and a kept one."""
    own = vcpu.own
    root, pgd = own[VcpuWord.ROOT], own[VcpuWord.PGD]
    own[VcpuWord.ROOT], own[VcpuWord.PGD] = own[PREVIOUS + i], own[PREVIOUS_PGD + i]
    own[PREVIOUS + i], own[PREVIOUS_PGD + i] = root, pgd


@inner(inline=True)
def find_root(vm, vcpu, wanted):
    """Make the root for another value of CR3 the current one, if it is kept (facts 9.1.3). The roots before it move down by one; if
    there is none the oldest goes."""
    own = vcpu.own
    had_current = own[VcpuWord.ROOT] != NO_TABLE
    if had_current and is_usable(vm, vcpu, own[VcpuWord.ROOT], own[VcpuWord.PGD], wanted):
        return True
    kept = KEPT if vm.word[VmWord.CACHED_ROOTS] != ZERO else ZERO
    for i in range(kept):
        if had_current:
            swap_root(vcpu, i)
            if is_usable(vm, vcpu, own[VcpuWord.ROOT], own[VcpuWord.PGD], wanted):
                return True
        elif is_usable(vm, vcpu, own[PREVIOUS + i], own[PREVIOUS_PGD + i], wanted):
            swap_root(vcpu, i)
            for behind in range(i, KEPT - ONE):
                own[PREVIOUS + behind], own[PREVIOUS_PGD + behind] = own[PREVIOUS + behind + ONE], own[PREVIOUS_PGD + behind + ONE]
            own[PREVIOUS + KEPT - ONE] = NO_TABLE
            return True
    if had_current:
        free_current(vm, vcpu)
    return False


@inner(inline=True)
def new_pgd(vm, vcpu, value):
    """CR3 becomes another value: go on with a kept root, as it is, or load one before the next entry (facts 9.1.4)."""
    flush(vcpu.tlb)  # its entries do not say of which address space they are
    if vcpu.own[VcpuWord.ROOT] == FOUR_ROOTS:
        free_current(vm, vcpu)
    if not find_root(vm, vcpu, value):
        ask_one(vm, vcpu, LOAD_ROOT)
        return
    if vm.word[VmWord.FORCE_SYNC_ON_REUSE] != ZERO:
        ask_one(vm, vcpu, MMU_SYNC | FLUSH_CURRENT)
    forget_mmio(vcpu)
    vm.page[vcpu.own[VcpuWord.ROOT]]["floods"] = NO


@inner
def load_pdptes(vm, vcpu, cr3, reserved):
    """Read the four PDPTEs of PAE paging at `cr3`; False when the processor answers with #GP, and nothing is loaded (facts 1.7)."""
    table = cr3 & PDPTE_TABLE
    if find_slot(vm.mem.slots, table) == NO_SLOT:
        return False
    first = table >> WORD_SHIFT
    changed = False
    for i in range(PAE_ROOTS):
        pdpte = vm.mem.words[first + np.uint64(i)]
        if pdpte & GPTE64.P != ZERO and pdpte & reserved != ZERO:
            return False
        changed |= pdpte != vcpu.mmu.reg[PDPTES + np.uint64(i)]
    if changed:
        free_current(vm, vcpu)
    for i in range(PAE_ROOTS):
        vcpu.mmu.reg[PDPTES + np.uint64(i)] = vm.mem.words[first + np.uint64(i)]
    return True


@inner(inline=True)
def set_cr3(vm, vcpu, value):
    """MOV to CR3 under shadow paging (facts 9.2); False when the processor answers with #GP."""
    has_pcids = vcpu.own[VcpuWord.CR4] & CR4.PCIDE != ZERO
    keeps = has_pcids and value & CR3.NO_FLUSH != ZERO
    cr3 = value & ~CR3.NO_FLUSH if has_pcids else value
    if cr3 & CR3.NO_FLUSH != ZERO:
        return False
    pae = vcpu.mmu.reg[Reg.MODE] == MODE_PAE
    if pae and not load_pdptes(vm, vcpu, cr3, vcpu.mmu.reg[Reg.PDPTE_RESERVED]):
        return False
    if cr3 != vcpu.mmu.reg[Reg.CR3]:
        vcpu.mmu.reg[Reg.CR3] = cr3
        new_pgd(vm, vcpu, cr3)
    if not keeps:
        ask_one(vm, vcpu, MMU_SYNC | FLUSH_CURRENT)
        if has_pcids:
            free_roots_of(vm, vcpu, cr3 & CR3.PCID)
    return True


@inner
def free_roots_of(vm, vcpu, pcid):
    """The guest flushes a PCID: kept roots that belong to it go."""
    for i in range(KEPT):
        if vcpu.own[PREVIOUS_PGD + i] & CR3.PCID == pcid:
            drop_previous(vm, vcpu, i)
    commit_zapped(vm, vcpu.stat, False)


@inner
def change_registers(vm, vcpu, cr0, cr4, efer):
    """CR0, CR4 and EFER become other values, by the guest: what that flushes, and whether its roots can stay (facts 9.3).

    Not for two-dimensional paging. The new values are in force already, the old ones still stand in `own`.
    """
    own = vcpu.own
    cr0_changed, cr4_changed, efer_changed = own[VcpuWord.CR0] ^ cr0, own[VcpuWord.CR4] ^ cr4, own[VcpuWord.EFER] ^ efer
    had_pcids, has_pcids = own[VcpuWord.CR4] & CR4.PCIDE != ZERO, cr4 & CR4.PCIDE != ZERO
    if (cr0_changed & ROLE_CR0) | (cr4_changed & ROLE_CR4) | (efer_changed & ROLE_EFER) != ZERO or (has_pcids and not had_pcids):
        unload_roots(vm, vcpu)
    if (cr0_changed & ~cr0 & CR0.PG) | (cr4_changed & CR4.PGE) != ZERO or (had_pcids and not has_pcids):
        ask_one(vm, vcpu, FLUSH_GUEST)
    elif (cr4_changed & CR4.PAE) | (cr4_changed & cr4 & CR4.SMEP) != ZERO:
        ask_one(vm, vcpu, FLUSH_CURRENT)


@inner
def set_role(vm, vcpu):
    """The role of the roots, by the registers as they are now."""
    own, mode = vcpu.own, vcpu.mmu.reg[Reg.MODE]
    own[VcpuWord.ROOT_LEVEL] = root_levels(vm.word, mode)
    own[VcpuWord.ROOT_ROLE] = root_role(vm.word, mode, own[VcpuWord.CR0], own[VcpuWord.CR4]) & ~ROLE.LEVEL
    for kind in range(len(vcpu.mmu.permissions)):
        set_leaf_bits(vm.word, vcpu, np.uint64(kind))


@inner
def set_leaf_bits(word, vcpu, kind):
    """What a leaf must hold, and what not, for accesses of one kind: as for any leaf, and U as SMEP and SMAP have it."""
    access, denied = kind << ONE, np.uint64(vcpu.mmu.permissions[kind])
    needed, forbidden = needs_of(word, access)
    if denied >> (ACC.W | ACC.X) & ONE != ZERO:
        needed |= ACC.U
    if denied >> ACC.ALL & ONE != ZERO:
        forbidden |= ACC.U
    vcpu.own[np.uint64(VcpuWord.LEAF_BITS) + kind] = needed
    vcpu.own[np.uint64(VcpuWord.LEAF_MASK) + kind] = needed | forbidden


# --- entry -----------------------------------------------------------------------------------------------------------------


@inner
def enter(vm, vcpu):
    """Serve what was asked of the vCPU, and enter the guest. False when that is the end."""
    if vm.word[VmWord.THREADS] == ZERO and not is_asked(vm, vcpu):
        return True  # nearly always
    return serve_and_enter(vm, vcpu)


@inner
def serve_and_enter(vm, vcpu):
    """The same where something is asked, or other threads may ask.

    Serving a request may ask for another. First it says that it runs the guest, then it looks: who asks first and looks then
    cannot miss it (facts 10).
    """
    while True:
        if vm.word[VmWord.THREADS] != ZERO:
            exchange(vm.word, request_word(vcpu) + ONE, IN_GUEST)
        if not is_asked(vm, vcpu):
            return True
        store(vm.word, request_word(vcpu) + ONE, IN_KVM)
        if not serve(vm, kvm_view(vcpu.nested, vcpu)):
            return False


@inner
def serve(vm, vcpu):
    """What was asked of the vCPU by now."""
    if take_request(vm, vcpu, FREE_OBSOLETE_ROOTS):
        free_obsolete_roots(vm, vcpu)
    if take_request(vm, vcpu, MMU_SYNC):
        sync_roots(vm, vcpu)
    if take_request(vm, vcpu, TLB_FLUSH):
        take_request(vm, vcpu, FLUSH_CURRENT)  # all includes the current
        count_flush(vcpu)
    if take_request(vm, vcpu, FLUSH_CURRENT):
        count_flush(vcpu)
    if take_request(vm, vcpu, FLUSH_GUEST):
        if vm.word[VmWord.TDP] == ZERO:  # flushes do not reach what a hypervisor's EPT says
            sync_roots(vm, vcpu)
            free_unsync_roots(vm, vcpu)
        count_flush(vcpu)
    take_request(vm, vcpu, LOAD_ROOT)
    if vcpu.own[VcpuWord.ROOT] == NO_TABLE and not load_root(vm, vcpu):
        ask_one(vm, vcpu, LOAD_ROOT)  # whoever tries again comes here again
        return False
    return True


@inner
def count_flush(vcpu):
    """Flush the processor's TLB, because it was asked for."""
    count(vcpu.stat, Counter.TLB_FLUSH)
    flush(vcpu.tlb)
