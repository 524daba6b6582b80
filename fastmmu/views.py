"""A vCPU as its parts see it, where guests may have guests of their own: L1 is the guest, L2 the guest that L1 runs.

While L2 runs, the processor walks L2's tables, and each address in them through the tables of sptes that L2's words name; KVM's MMU
code sees the tables that L1 gave L2 as if they were the tables of a guest that pages, and nested gpas as its addresses (facts 2.5).
What a machine has no nested guests for is None, and nothing of this is compiled.
"""

from __future__ import annotations

from fastmmu._jit import inner, unless_none
from fastmmu.bits import ZERO
from fastmmu.machine_state import VcpuState, VcpuWord, VmWord, Words
from fastmmu.state import MmuState, Reg
from fastmmu.walk import MODE_NONE


@inner
def registers_of(mmu, number):
    """One vCPU's registers."""
    return MmuState(mmu.reg[number], mmu.reserved[number], mmu.permissions[number], mmu.plain[number])


@inner
def words_of(own, number):
    """One vCPU's words; `own` is a Words of all."""
    return Words(own.own[number])


registers_unless_none, words_unless_none = unless_none(registers_of), unless_none(words_of)


@inner
def turned(nested, vcpu):
    """The vCPU with the words of the guest that does not run in the place of the other's; not where there are no nested guests."""
    if nested is None:
        return vcpu
    return VcpuState(vcpu.mmu, vcpu.trail, vcpu.other.own, vcpu.tlb, vcpu.stat, nested, Words(vcpu.own))


@inner
def vcpu_of(vcpus, number):
    """One vCPU's state, as the guest that runs on it."""
    nested, other = registers_unless_none(vcpus.nested, number), words_unless_none(vcpus.other, number)
    mmu, own = registers_of(vcpus.mmu, number), vcpus.own[number]
    return facing(nested, VcpuState(mmu, vcpus.trail[number], own, vcpus.tlb[number], vcpus.stat[number], nested, other))


@inner
def facing(nested, vcpu):
    """The vCPU with the words of the guest that runs first; `nested` is the vCPU's."""
    if nested is None:
        return vcpu
    if vcpu.own[VcpuWord.IN_NESTED] == ZERO:
        return vcpu
    return turned(nested, vcpu)


@inner
def is_nesting(nested):
    """Whether the machine has nested guests."""
    return nested is not None


@inner
def is_nested(nested, own):
    """Whether a nested guest runs; both arguments are the vCPU's."""
    if nested is None:
        return False
    return own[VcpuWord.NESTED] != ZERO


@inner
def kvm_view(nested, vcpu):
    """The vCPU as KVM's MMU code sees it; `nested` is the vCPU's."""
    if nested is None:
        return vcpu
    if vcpu.own[VcpuWord.NESTED] == ZERO:
        return vcpu
    return VcpuState(nested, vcpu.trail, vcpu.own, vcpu.tlb, vcpu.stat, nested, vcpu.other)


@inner
def is_shadow_paging(vm, vcpu):
    """Whether the guest's tables are shadowed: it pages, without two-dimensional paging; or it is a nested guest, whose tables are
    those that its hypervisor gave it."""
    shadowed = vm.word[VmWord.TDP] == ZERO or is_nested(vcpu.nested, vcpu.own)
    return shadowed and vcpu.mmu.reg[Reg.MODE] != MODE_NONE


@inner
def is_tdp_mmu(vm, vcpu):
    """Whether the roots are the TDP MMU's."""
    return vm.word[VmWord.TDP_MMU] != ZERO and not is_nested(vcpu.nested, vcpu.own)
