"""Real vCPUs: each a Python thread over a kernel that holds no GIL, on one shared virtual machine, while another thread collects
the dirty log as a live migration does.

What they share they change by atomic instructions or under the mmu lock; each has its own TLB, counters and words. Direct maps
only: of shadow paging no more than the page fault takes the lock here, CR3 loads and INVLPG do not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastmmu import dirty_log
from fastmmu._jit import kernel, load, store
from fastmmu.bits import GPTE64, ONE, PAGE_SHIFT, PAGE_SIZE, PFERR, WORD_SHIFT, ZERO
from fastmmu.checks import checked_int
from fastmmu.events import EventList, Op
from fastmmu.exits import IN_KVM, request_word
from fastmmu.guest import access_bytes
from fastmmu.hardware import not_plain
from fastmmu.lock import lock_for_writing, unlock_for_writing
from fastmmu.machine import ERRORS, Machine, MachineError, NotBuilt
from fastmmu.machine_state import LOG, STAT_WORDS, SlotFlag, Status, Stop, VmWord
from fastmmu.memslot import WORD_BITS, slot_by_id
from fastmmu.paging import Mode
from fastmmu.pool import reclaim
from fastmmu.roots import enter
from fastmmu.tlb import lookup
from fastmmu.views import vcpu_of

CHUNK = 16_384  # writes between two looks at whether another thread has failed


@kernel
def write_pages(vm, vcpus, number, log, gpas, values):
    """vCPU `number` stores `values` at `gpas`, one after another; returns how many it has stored.

    Args:
        vm, vcpus: as for `drive`; other vCPUs and one collector of the dirty log may run at the same time.
        number: uint64.
        log: LOG[1], the thread's own.
        gpas: uint64, multiples of 8 in a writable memslot, not in the last page of an address space with paging.
        values: uint64, as many.
    """
    vcpu = vcpu_of(vcpus, number)
    asked, done = request_word(vcpu), len(gpas)
    if not enter(vm, vcpu):
        return 0
    for i in range(len(gpas)):
        if load(vm.word, asked) != ZERO and not enter(vm, vcpu):
            done = i
            break
        entry = lookup(vcpu.tlb, vcpu.mmu, gpas[i], PFERR.W)
        gpa = (entry & GPTE64.ADDR) | (gpas[i] & np.uint64(PAGE_SIZE - 1))
        if entry == ZERO:
            touched, _ = access_bytes(vm, vcpu, log, 0, gpas[i], ONE, PFERR.W, False, not_plain())
            if touched.status != Status.DONE:
                done = i
                break
            gpa = touched.gpa
        store(vm.mem.words, gpa >> WORD_SHIFT, values[i])
    store(vm.word, asked + ONE, IN_KVM)
    return done


@kernel
def collect_pages(vm, stat, identity, copy):
    """Get the dirty log of a memslot, protect what it names, and copy the first word of each of these pages; returns how many.

    Args:
        stat: int64[STAT_WORDS], the collector's own.
        copy: uint64[pages of the slot].
    """
    slot = vm.mem.slots[slot_by_id(vm, identity)]
    dirty_log.get(vm, stat, slot)
    if vm.word[VmWord.MANUAL_PROTECT] != ZERO:
        dirty_log.clear(vm, stat, slot)
    pages = 0
    for i in range(dirty_log.bitmap_words(slot)):
        word = vm.slot_words[slot["report"] + i]
        page = i << WORD_BITS
        while word != ZERO:
            if word & ONE != ZERO:
                copy[page] = load(vm.mem.words, (slot["base"] + page) << (PAGE_SHIFT - WORD_SHIFT))
                pages += 1
            word >>= ONE
            page += ONE
    return pages


@kernel
def settle(vm, stat):
    """No thread runs any more: free the tables that waited for that."""
    lock_for_writing(vm.word, stat)
    reclaim(vm, stat)
    unlock_for_writing(vm.word, stat)


@dataclass(frozen=True)
class Writes:
    """What one vCPU stores: `values` at `gpas`, uint64 each."""

    gpas: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class ThreadRun:
    """What a run came to: seconds from the start until each vCPU had done its writes; how often the log was collected while they
    ran, and how many pages it named in all; the pages' first words as they were copied."""

    seconds: tuple[float, ...]
    collections: int
    collected: int
    copy: np.ndarray


def run_threads(machine: Machine, writes: Sequence[Writes], *, slot: int, collect: bool = True) -> ThreadRun:
    """Let the first vCPUs of a machine store at the same time, one thread each.

    Args:
        machine: with a direct map and the guest's paging off, so that a gva is a gpa.
        writes: of vCPU 0, 1, and so on.
        slot: id of the memslot that all of it goes to.
        collect: get and clear its dirty log meanwhile, which must be on, and once more at the end.

    Raises:
        NotBuilt: shadow paging, a guest with paging, or page-modification logging.
        ValueError: an address that is not in the memslot, more vCPUs than the machine has, or nothing to collect.
        MachineError: a vCPU could not go on.
    """
    gate = Gate(machine, writes, slot, collect)
    machine.run(EventList().each_vcpu(machine.vcpus, Op.EXIT).array())
    copy = np.zeros(gate.pages, np.uint64)
    stat, collections, collected = np.zeros(STAT_WORDS, np.int64), 0, 0
    if collect:
        collected, collections = int(collect_pages(machine.vm, stat, slot, copy)), 1
        machine.run(EventList().each_vcpu(machine.vcpus, Op.EXIT).array())
    machine.vm.word[VmWord.THREADS] = len(writes)
    machine.vm.word[VmWord.STOP] = Stop.END
    gate.compile()
    begin = time.perf_counter()
    vcpus = [threading.Thread(target=gate.run_vcpu, args=(number,)) for number in range(len(writes))]
    try:
        for thread in vcpus:
            thread.start()
        while collect and any(thread.is_alive() for thread in vcpus):
            collected += int(collect_pages(machine.vm, stat, slot, copy))
            collections += 1
    finally:
        for thread in vcpus:
            thread.join()
        machine.vm.word[VmWord.THREADS] = 0
        settle(machine.vm, stat)
    if collect:
        collected += int(collect_pages(machine.vm, stat, slot, copy))
        machine.run(EventList().each_vcpu(machine.vcpus, Op.EXIT).array())
    machine.state.stat[0] += stat
    gate.check()
    return ThreadRun(tuple(end - begin for end in gate.ends), collections, collected, copy)


class Gate:
    """The threads' Python side: what is checked before they start, and how each one ended."""

    def __init__(self, machine: Machine, writes: Sequence[Writes], slot: int, collect: bool) -> None:
        if not machine.kvm.tdp or any(cpu.mode != Mode.NONE for cpu in machine.cpus):
            raise NotBuilt("threads under shadow paging, or of guests with paging")
        if machine.kvm.pml:
            raise NotBuilt("threads with page-modification logging")
        checked_int(len(writes), 1, machine.vcpus, "writes", f"those of 1 to {machine.vcpus} vCPUs")
        if slot not in machine.slots:
            raise ValueError(f"slot: {slot!r}, expected one of {sorted(machine.slots)}")
        info = machine.slots[slot]
        if collect and not info.flags & SlotFlag.LOG_DIRTY_PAGES:
            raise ValueError(f"slot {slot}: not logged, expected dirty logging to be on")
        for number, one in enumerate(writes):
            for name, column in (("gpas", one.gpas), ("values", one.values)):
                if not isinstance(column, np.ndarray) or column.dtype != np.uint64 or column.ndim != 1:
                    raise ValueError(f"vCPU {number}: {name}, expected a column of uint64")
            if len(one.gpas) != len(one.values):
                raise ValueError(f"vCPU {number}: {len(one.gpas)} gpas and {len(one.values)} values, expected as many")
            if len(one.gpas) and (int(one.gpas.min()) < info.start or int(one.gpas.max()) >= info.end or (one.gpas % 8).any()):
                expected = f"multiples of 8 in memslot {slot}, {info.start:#x} to {info.end:#x}"
                raise ValueError(f"vCPU {number}: gpas, expected {expected}")
        self.machine, self.writes = machine, writes
        self.pages = (info.end - info.start) // PAGE_SIZE
        self.ends = [0.0] * len(writes)
        self.done = [0] * len(writes)

    def compile(self) -> None:
        """The kernel is there before the first thread needs it."""
        none = np.zeros(0, np.uint64)
        write_pages(self.machine.vm, self.machine.state, np.uint64(0), np.zeros(1, LOG), none, none)

    def run_vcpu(self, number: int) -> None:
        """The thread of one vCPU."""
        machine, log, one = self.machine, np.zeros(1, LOG), self.writes[number]
        for start in range(0, len(one.gpas), CHUNK):
            part = slice(start, start + CHUNK)
            gpas, values = np.ascontiguousarray(one.gpas[part]), np.ascontiguousarray(one.values[part])
            done = int(write_pages(machine.vm, machine.state, np.uint64(number), log, gpas, values))
            self.done[number] += done
            if done < len(gpas):
                break
        self.ends[number] = time.perf_counter()

    def check(self) -> None:
        """Every vCPU has come to the end of its writes."""
        word = self.machine.vm.word
        for number, (done, one) in enumerate(zip(self.done, self.writes, strict=True)):
            if done < len(one.gpas):
                stop = Stop(int(word[VmWord.STOP]))
                why = ERRORS.get(stop, "the guest was given a page fault, or met a device")
                raise MachineError(f"vCPU {number}, write {done}, gpa {int(one.gpas[done]):#x}: {why}")
