"""Replay of an event stream: the kernel that Python calls."""

from __future__ import annotations

import numpy as np

from fastmmu._jit import kernel
from fastmmu.bits import ONE, PFERR, WORD_SHIFT, ZERO
from fastmmu.events import Op
from fastmmu.judge import is_legal, look, on_flush, on_table_change
from fastmmu.memory import find_slot
from fastmmu.mmio import cached_gpa, clear, covers, fill, match
from fastmmu.state import NO_SLOT, Digest, Miss, Mmio, Reg, Stat, Walk
from fastmmu.walk import mix, walk_gva

OP_ACCESS, OP_DEVICE, OP_STORE, OP_CR3, OP_INVLPG, OP_FLUSH, OP_GENERATION = (np.uint8(op) for op in list(Op)[:7])
NO = np.uint8(0)


@kernel
def count(stat, which):
    """Count one; nothing in a timed run, where `stat` is None (counting cost 7.0 against 2.5 ns per walk)."""
    if stat is not None:
        stat[which] += ONE


@kernel
def count_miss(stat, reason):
    """Count a miss of the MMIO info cache by its reason."""
    if stat is None:
        return
    if reason == Miss.EMPTY:
        count(stat, Stat.MISS_COLD if stat[Stat.CLEARS] == ZERO else Stat.MISS_CLEARED)
    elif reason == Miss.OTHER_PAGE:
        count(stat, Stat.MISS_OTHER_PAGE)
    elif reason == Miss.GENERATION:
        count(stat, Stat.MISS_GENERATION)
    else:
        count(stat, Stat.MISS_PERMISSION)


@kernel
def check_delivery(stat, legal, vm, event, gpa, access):
    """Judge a gpa that the cache delivered; returns whether today's tables disagree with the recorded one."""
    if stat is None:
        return False
    gva = event["address"]
    today = look(vm, gva, access)
    if not today.ok or today.gpa != gpa:
        if is_legal(legal, access):
            count(stat, Stat.STALE_LEGAL)
        else:
            count(stat, Stat.WRONG)
            if not today.ok and access & PFERR.U != ZERO:
                count(stat, Stat.GRANTED_TO_USER)
    return differs(event, today)


@kernel
def differs(event, walk):
    """Whether the walk gives another address than the one recorded."""
    return event["checked"] != NO and not (walk.ok and walk.gpa == event["value"])


@kernel
def check_walk(stat, event, walk):
    """Count a walk; returns whether it disagrees with the recorded address."""
    if stat is None:
        return False
    count(stat, Stat.GUEST_WALKS)
    if not walk.ok:
        count(stat, Stat.FAULTS)
    return differs(event, walk)


@kernel
def after_walk(cache, stat, gva, walk):
    """What the cache learns from a walk: injecting a permission fault invalidates its address (facts 1.9, 4.5)."""
    if cache is None:
        return
    if not walk.ok and walk.pferr & (PFERR.P | PFERR.RSVD) == PFERR.P and covers(cache.entry, gva):
        if clear(cache.entry, cache.generation):
            count(stat, Stat.CLEARS)


@kernel
def after_device_walk(cache, vm, stat, legal, gva, walk):
    """What the cache learns from a device access that walked: an address without memslot fills it (facts 4.1)."""
    count(stat, Stat.DEVICE_WALKS)
    no_slot = walk.ok and find_slot(vm.mem.slots, walk.gpa) == NO_SLOT
    if cache is None:
        return
    if no_slot:
        if fill(cache.entry, cache.cr3, cache.generation, vm.mmu, gva, walk):
            on_flush(legal, vm, cache.entry)


@kernel
def flush(cache, vm, stat, legal):
    """The guest flushed the page of the cached gva (facts 4.5)."""
    if cache is None:
        return
    if clear(cache.entry, cache.generation):
        count(stat, Stat.CLEARS)
    on_flush(legal, vm, cache.entry)


@kernel
def invalidate(cache, vm, stat, legal, gva):
    """The guest flushed the page of `gva`."""
    if cache is None:
        return
    if covers(cache.entry, gva):
        flush(cache, vm, stat, legal)


@kernel
def store(cache, vm, stat, legal, gpa, value):
    """A store to a page table."""
    vm.mem.words[gpa >> WORD_SHIFT] = value
    count(stat, Stat.TABLE_STORES)
    if cache is None:
        return
    on_table_change(legal, vm, cache.entry)


@kernel
def match_device(cache, vm, stat, gva, access):
    """Ask the MMIO info cache; counts the answer."""
    count(stat, Stat.DEVICE_ACCESSES)
    if cache is None:
        return Miss.EMPTY
    reason = match(cache.entry, cache.cr3, cache.generation, vm.mmu, gva, access)
    if reason == Miss.HIT:
        count(stat, Stat.HITS)
    else:
        count_miss(stat, reason)
    return reason


@kernel
def device_gpa(cache, gva):
    """The cached answer, as a walk."""
    if cache is None:
        return Walk(False, ZERO, ZERO, ZERO, ZERO)
    return Walk(True, cached_gpa(cache.entry, gva), ONE, cache.entry[Mmio.ACCESS], ZERO)


@kernel
def replay(cache, vm, stat, legal, digest, events):
    """Replay `events` on `vm`; returns the index of the first event whose walk is not the recorded one, else their number.

    Args:
        cache: MmioInfo, or None for the strategy without a cache.
        vm: VmState, changed in place.
        stat: uint64[len(Stat)] counters, or None for a timed run, which counts, checks and judges nothing.
        legal: uint64[1], the judge's state; None exactly when `stat` is.
        digest: uint64[len(Digest)], continued with every answer.
        events: EVENT rows; stores must lie in RAM.
    """
    for i in range(len(events)):
        event = events[i]
        op, address, value = event["op"], event["address"], event["value"]
        access = np.uint64(event["access"])
        if op <= OP_DEVICE:
            if op == OP_DEVICE and match_device(cache, vm, stat, address, access) == Miss.HIT:
                walk = device_gpa(cache, address)
                differed = check_delivery(stat, legal, vm, event, walk.gpa, access)
            else:
                walk = walk_gva(vm.mem, vm.mmu, vm.trail, address, access)
                differed = check_walk(stat, event, walk)
                after_walk(cache, stat, address, walk)
                if op == OP_DEVICE:
                    after_device_walk(cache, vm, stat, legal, address, walk)
            digest[Digest.ALL] = mix(digest[Digest.ALL], walk)
            if op == OP_DEVICE:
                digest[Digest.DEVICE] = mix(digest[Digest.DEVICE], walk)
            if differed:
                return i
        elif op == OP_STORE:
            store(cache, vm, stat, legal, address, value)
        elif op == OP_CR3:
            vm.mmu.reg[Reg.CR3] = value
            count(stat, Stat.CR3_LOADS)
            flush(cache, vm, stat, legal)
        elif op == OP_INVLPG:
            count(stat, Stat.INVLPGS)
            invalidate(cache, vm, stat, legal, address)
        elif op == OP_FLUSH:
            count(stat, Stat.INVLPGS)
            flush(cache, vm, stat, legal)
        elif op == OP_GENERATION:
            vm.mmu.reg[Reg.GENERATION] = value
            count(stat, Stat.GENERATION_CHANGES)
    return len(events)
