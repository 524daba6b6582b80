"""What an exit to KVM does at once, the page-modification log with it; and the requests to a vCPU, served before it enters."""

from __future__ import annotations

import numpy as np

from fastmmu._jit import fetch_and, fetch_or, inner, load, store
from fastmmu.bits import ONE, ZERO
from fastmmu.machine_state import PML_ENTRIES, Counter, Running, VcpuWord, VmWord
from fastmmu.memslot import mark_dirty, slot_by_gfn
from fastmmu.pool import FIRST_REQUEST, WORDS_PER_VCPU, count
from fastmmu.state import NO_SLOT
from fastmmu.tlb import flush

IN_KVM, IN_GUEST = np.uint64(Running.KVM), np.uint64(Running.GUEST)


@inner
def request_word(vcpu):
    """Where in `vm.word` the vCPU's requests stand; behind them, where its thread is (a Running)."""
    return FIRST_REQUEST + vcpu.own[VcpuWord.NUMBER] * WORDS_PER_VCPU


@inner
def is_asked(vm, vcpu):
    """Whether there are requests to the vCPU."""
    return load(vm.word, request_word(vcpu)) != ZERO


@inner
def ask_one(vm, vcpu, which):
    """Ask one vCPU for something."""
    fetch_or(vm.word, request_word(vcpu), which)


@inner
def take_request(vm, vcpu, which):
    """Whether something was asked of the vCPU; it is not any more."""
    number = request_word(vcpu)
    return load(vm.word, number) & which != ZERO and fetch_and(vm.word, number, ~which) & which != ZERO


@inner
def drain_pml(vm, vcpu):
    """Each exit takes the logged pages over into the dirty bitmaps."""
    for i in range(vcpu.own[VcpuWord.PML]):
        gfn = vcpu.own[np.uint64(VcpuWord.PML_LOG) + i]
        number = slot_by_gfn(vm, vcpu, gfn)
        if number != NO_SLOT:
            mark_dirty(vm, vm.mem.slots[number], gfn)
    vcpu.own[VcpuWord.PML] = ZERO


@inner(inline=True)
def leave(vm, vcpu):
    """The guest exits to KVM."""
    store(vm.word, request_word(vcpu) + ONE, IN_KVM)
    count(vcpu.stat, Counter.EXITS_NO_IRQ)
    if vm.word[VmWord.PML] != ZERO:
        drain_pml(vm, vcpu)
    if vm.word[VmWord.TLB_FLUSHED_ON_EXIT] != ZERO:
        flush(vcpu.tlb)


@inner
def log_modification(vm, vcpu, gfn):
    """The processor sets D in an spte: with page-modification logging it notes the page; a full log exits first."""
    if vm.word[VmWord.PML] == ZERO or vm.word[VmWord.LOGGING_SLOTS] == ZERO:
        return
    if vcpu.own[VcpuWord.PML] == np.uint64(PML_ENTRIES):
        count(vcpu.stat, Counter.PML_FULL)
        leave(vm, vcpu)
    vcpu.own[np.uint64(VcpuWord.PML_LOG) + vcpu.own[VcpuWord.PML]] = gfn
    vcpu.own[VcpuWord.PML] += ONE
