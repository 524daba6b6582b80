"""Kernels that do one part of the MMU's work over a column of addresses, for benchmarks."""

from __future__ import annotations

from fastmmu._jit import cmpxchg, cycles, inner, kernel, load
from fastmmu.bits import NPT_SPTE, PAGE_SHIFT, PFERR, ZERO
from fastmmu.descent import NOWHERE, root_for, use_spte, walk_sptes
from fastmmu.dirty_log import split_eagerly
from fastmmu.fault import page_fault
from fastmmu.lock import lock_for_writing, unlock_for_writing
from fastmmu.machine_state import Outcome
from fastmmu.memslot import slot_by_id
from fastmmu.spte import lowest, pfn_of
from fastmmu.state import NO_SLOT
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


@kernel
def time_stamp():
    """The processor's time-stamp counter, cycles."""
    return cycles()


MOST_FAULTS = 100  # of one access: far more than any takes


@inner
def touch(vm, vcpu, gva, access):
    """One access of the guest, on a processor without TLB: the sptes are walked, A and D set, and KVM is asked until they allow it.

    How many faults that took, less than 0 where the guest got a #PF instead.
    """
    page = gva >> PAGE_SHIFT
    for faults in range(MOST_FAULTS):
        table, level = root_for(vm, vcpu, page)
        index, found = walk_sptes(vm, table, level, page, access)
        if index == NOWHERE:
            if page_fault(vm, vcpu, gva, found) == Outcome.INJECT:
                return -1
        elif use_spte(vm, vcpu, index, found, page, access & PFERR.W != ZERO)[0]:
            return faults
    return -1


@kernel
def touch_column(vm, vcpus, number, gvas, accesses, ticks):
    """The accesses of one vCPU, one after another: how many faults they took, or less than 0 where one ended in a #PF.

    Args:
        gvas, accesses: uint64, as many; PFERR bits.
        ticks: uint64, as many, for the cycles that each took that faulted, and 0 for one that did not.
    """
    vcpu = vcpu_of(vcpus, number)
    total, denied = 0, False
    for i in range(len(gvas)):
        since = cycles()
        faults = touch(vm, vcpu, gvas[i], accesses[i])
        ticks[i] = cycles() - since if faults != 0 else ZERO
        denied |= faults < 0
        total += faults
    return -1 if denied else total


@kernel
def split_slot(vm, stat, identity):
    """Split the huge pages of a memslot, and nothing else of what the begin of dirty logging does.

    Args:
        stat: int64[STAT_WORDS], the caller's own counters.
        identity: uint64, id of a memslot; without one of that id nothing happens.
    """
    number = slot_by_id(vm, identity)
    if number == NO_SLOT:
        return
    slot = vm.mem.slots[number]
    lock_for_writing(vm.word, stat)
    split_eagerly(vm, stat, slot, slot["base"], slot["base"] + slot["pages"])
    unlock_for_writing(vm.word, stat)
