"""Kernels that do one part of the MMU's work over a column of addresses, for benchmarks."""

from __future__ import annotations

from fastmmu._jit import cmpxchg, kernel, load
from fastmmu.bits import NPT_SPTE, PAGE_SHIFT, ZERO
from fastmmu.descent import NOWHERE, root_for, walk_sptes
from fastmmu.fault import page_fault
from fastmmu.machine_state import Outcome
from fastmmu.spte import lowest, pfn_of
from fastmmu.views import vcpu_of


@kernel
def fault_column(vm, vcpus, number, gpas, pferr):
    """KVM's part of one fault after another, from the exit to the entry: all with the error code `pferr`, on vCPU `number`.

    Returns how many were fixed.
    """
    vcpu = vcpu_of(vcpus, number)
    fixed = 0
    for i in range(len(gpas)):
        if page_fault(vm, vcpu, gpas[i], pferr) == Outcome.FIXED:
            fixed += 1
    return fixed


@kernel
def exchange_column(spt, indices):
    """The least that a fast fault must do: set W in one entry after another by a compare-exchange; how many had not changed."""
    done = 0
    for i in range(len(indices)):
        spte = load(spt, indices[i])
        if cmpxchg(spt, indices[i], spte, spte | NPT_SPTE.W) == spte:
            done += 1
    return done


@kernel
def index_column(vm, vcpus, gpas, indices):
    """Where the leaf of each address stands."""
    vcpu = vcpu_of(vcpus, ZERO)
    for i in range(len(gpas)):
        gfn = gpas[i] >> PAGE_SHIFT
        table, level = root_for(vm, vcpu, gfn)
        indices[i], _ = lowest(vm.spt, table, level, gfn)


@kernel
def walk_spte_column(vm, vcpus, gpas, access):
    """Walk the sptes for one address after another: (how many are mapped, xor of their frames)."""
    vcpu = vcpu_of(vcpus, ZERO)
    mapped = 0
    total = ZERO
    for i in range(len(gpas)):
        gfn = gpas[i] >> PAGE_SHIFT
        table, level = root_for(vm, vcpu, gfn)
        index, _ = walk_sptes(vm, table, level, gfn, access)
        if index != NOWHERE:
            mapped += 1
            total ^= pfn_of(vm.spt[index])
    return mapped, total
