"""A guest that is a hypervisor runs a guest of its own: VMRUN, and the ways back (facts 2.5).

L1 gives L2 tables from L2's gpas to its own (NPT12 at the nested CR3, or EPT12 at the EPTP). KVM shadows them, page by page, as it
would shadow the tables of a guest that pages; the processor walks these shadow pages (NPT02, EPT02) for L2. Follows
`nested_svm_vmrun`, `nested_svm_vmexit`, `kvm_init_shadow_npt_mmu`, `kvm_init_shadow_ept_mmu` and `handle_invept` of Linux 6.1.
"""

from __future__ import annotations

import numpy as np

from fastmmu._jit import inner
from fastmmu.bits import CR0, CR4, EFER, EPT, ONE, PAGE_SHIFT, ROLE, ZERO
from fastmmu.exits import ask_one, leave
from fastmmu.machine_state import PREVIOUS_ROOTS, Counter, VcpuWord, VmWord
from fastmmu.memslot import mark_dirty, slot_by_gfn
from fastmmu.pool import NO_TABLE, count
from fastmmu.roots import FLUSH_CURRENT, FLUSH_GUEST, MMU_SYNC, drop_current, drop_previous, new_pgd
from fastmmu.shadow import commit_zapped
from fastmmu.state import NO_SLOT, Reg
from fastmmu.tlb import flush
from fastmmu.views import kvm_view, turned, vcpu_of

ROW_BITS, ROW_MASK = np.uint64(32), np.uint64(0xFFFFFFFF)
NO_FETCH = ZERO


@inner
def copy(target, source):
    """Copy element by element: a whole-array assignment would allocate."""
    for i in range(len(target)):
        target[i] = source[i]


@inner
def load_row(mmu, table, row, cr3):
    """Load a row of the register table, with another CR3. The generation is the VM's, PDPTEs are loaded from memory."""
    for i in range(len(mmu.reg)):
        if i != Reg.GENERATION and not Reg.PDPTE0 <= i <= Reg.PDPTE3:
            mmu.reg[i] = table.mmu.reg[row, i]
    mmu.reg[Reg.CR3] = cr3
    copy(mmu.reserved, table.mmu.reserved[row])
    copy(mmu.permissions, table.mmu.permissions[row])
    for kind in range(len(mmu.plain)):
        copy(mmu.plain[kind], table.mmu.plain[row, kind])


@inner
def nested_role(cr4, efer):
    """Role of the roots of a nested guest, without level: what L1's registers say, as a guest without CR0.WP (6.1 gives CR0.PG
    alone for NPT, where every access is a user's)."""
    role = ROLE.ACCESS | ROLE.GUEST_MODE
    role |= ROLE.EFER_NX if efer & EFER.NX != ZERO else ZERO
    role |= ROLE.SMEP_ANDNOT_WP if cr4 & CR4.SMEP != ZERO else ZERO
    return role | (ROLE.SMAP_ANDNOT_WP if cr4 & CR4.SMAP != ZERO else ZERO)


@inner
def ept_role(nested):
    """The same for tables that are an EPT (`kvm_calc_shadow_ept_root_page_role`)."""
    return ROLE.ACCESS | ROLE.GUEST_MODE | (ROLE.AD_DISABLED if nested.reg[Reg.EPT_FLAGS] == ZERO else ZERO)


@inner
def touch_vmcb(vm, vcpu, gpa):
    """KVM writes to the block that describes the nested guest."""
    number = slot_by_gfn(vm, vcpu, gpa >> PAGE_SHIFT)
    if number != NO_SLOT:
        mark_dirty(vm, vm.mem.slots[number], gpa >> PAGE_SHIFT)


@inner
def switch(vm, vcpu):
    """The other guest runs from now on: the processor's TLB is emptied, and before the entry what is shadowed is synced. Not with
    EPT, whose translations a hypervisor drops by INVEPT alone (`nested_vmx_transition_tlb_flush`)."""
    flush(vcpu.tlb)
    if vm.word[VmWord.EPT] != ZERO:
        ask_one(vm, vcpu, FLUSH_GUEST)
        return
    ask_one(vm, vcpu, MMU_SYNC | FLUSH_CURRENT)


@inner
def run_nested(nested, vm, vcpus, vcpu, table, vmcb, rows):
    """VMRUN: L2 runs. `nested` is the vCPU's; `rows` of the register table: low half L2's registers, high half L1's for its tables.

    Returns the vCPU with L2 on it.
    """
    if nested is None:
        return vcpu
    own, number = vcpu.own, vcpu.own[VcpuWord.NUMBER]
    leave(vm, vcpu)
    if vm.word[VmWord.NEXT_RIP] == ZERO:
        count(vcpu.stat, Counter.INSN_EMULATION)
    count(vcpu.stat, Counter.NESTED_RUN)
    touch_vmcb(vm, vcpu, vmcb)
    own[VcpuWord.KEPT_CR3], own[VcpuWord.VMCB] = vcpu.mmu.reg[Reg.CR3], vmcb
    guest, tables = rows & ROW_MASK, rows >> ROW_BITS
    load_row(vcpu.mmu, table, guest, table.mmu.reg[guest, Reg.CR3])
    load_row(nested, table, tables, table.mmu.reg[tables, Reg.CR3])
    own[VcpuWord.IN_NESTED] = ONE
    other = vcpu.other.own
    other[VcpuWord.CR0], other[VcpuWord.CR4], other[VcpuWord.EFER] = CR0.PG, table.raw[tables, 1], table.raw[tables, 2]
    other[VcpuWord.ROOT_LEVEL] = nested.reg[Reg.MODE]
    if nested.reg[Reg.EPT] == ZERO:
        other[VcpuWord.ROOT_ROLE] = nested_role(table.raw[tables, 1], table.raw[tables, 2])
    else:
        other[VcpuWord.ROOT_ROLE] = ept_role(nested)
    other[VcpuWord.FETCH_ACCESS] = NO_FETCH
    vm.word[VmWord.SHADOW_ROOTS] = ONE
    inside = vcpu_of(vcpus, number)
    new_pgd(vm, kvm_view(inside.nested, inside), nested.reg[Reg.CR3])
    switch(vm, inside)
    return inside


@inner
def end_nested(nested, vm, vcpus, vcpu, table):
    """#VMEXIT: L1 runs again, with the registers that it had. Returns the vCPU with L1 on it."""
    if nested is None:
        return vcpu
    own, number = vcpu.other.own, vcpu.own[VcpuWord.NUMBER]
    load_row(vcpu.mmu, table, own[VcpuWord.REGISTERS], own[VcpuWord.KEPT_CR3])
    own[VcpuWord.IN_NESTED] = ZERO
    own[VcpuWord.FETCH_ACCESS] = NO_FETCH
    touch_vmcb(vm, vcpu, own[VcpuWord.VMCB])
    outside = vcpu_of(vcpus, number)
    switch(vm, outside)
    return outside


@inner
def invalidate_ept(nested, vm, vcpu, eptp):
    """INVEPT by L1, of the tables of one EPTP or of all (0): the roots that shadow them go, and who loads one again syncs it.
    `nested` is the vCPU's."""
    if nested is None:
        return
    leave(vm, vcpu)
    inside = turned(nested, vcpu)
    own = inside.own
    for i in range(PREVIOUS_ROOTS):
        if is_of_ept(own[VcpuWord.PREVIOUS_PGD + i], eptp):
            drop_previous(vm, inside, np.uint64(i))
    if own[VcpuWord.ROOT] != NO_TABLE and is_of_ept(own[VcpuWord.PGD], eptp):
        drop_current(vm, inside)
    commit_zapped(vm, vcpu.stat, False)


@inner
def is_of_ept(pgd, eptp):
    """Whether a root is for the tables of an EPTP, 0 being any: memory type and flags do not count."""
    return eptp == ZERO or (pgd ^ eptp) & EPT.ADDR == ZERO
