"""The pool of tables of sptes, and how shadow pages among them are found: by hash, and by age (facts 5.7, 5.11).

Tables of the TDP MMU come from the same pool but are neither hashed nor counted. A table is named by its row; its sptes begin at
row * 512 in `spt`. An spte is named by its index there; index 0 is none.
"""

from __future__ import annotations

import numpy as np

from fastmmu import guards
from fastmmu._jit import fetch_or, inner, load
from fastmmu.bits import NPT_SPTE, ONE, ROLE, ZERO, field
from fastmmu.lock import back_off, lock_pool, unlock_pool
from fastmmu.machine_state import HASH_BUCKETS, PER_VCPU, TABLE_WORDS, Counter, Request, Running, VmWord

MULTIPLIER_HIGH, MULTIPLIER_LOW = np.uint64(0x61C88646), np.uint64(0x80B583EB)  # the golden ratio, as the kernel has it
HALF_SHIFT, HALF_MASK = np.uint64(32), field(31, 0)
BUCKET_SHIFT = np.uint64(32 - HASH_BUCKETS.bit_length() + 1)
NO_TABLE = ZERO
TLB_FLUSH, KVM, GUEST = np.uint64(Request.TLB_FLUSH), np.uint64(Running.KVM), np.uint64(Running.GUEST)
FIRST_REQUEST, WORDS_PER_VCPU = np.uint64(VmWord.REQUESTS), np.uint64(PER_VCPU)
INVALID, DIRECT = np.uint32(ROLE.INVALID), np.uint32(ROLE.DIRECT)
TABLE_SIZE = np.uint64(TABLE_WORDS)
NONE, NO, YES = np.uint32(0), np.uint8(0), np.uint8(1)
PAGES_4K = np.uint64(Counter.PAGES_4K)


@inner
def count(stat, which):
    """Count one."""
    stat[which] += 1


@inner
def flush_remote(word, stat):
    """Ask for a flush of every vCPU's TLB, before it enters the guest again; and wait until each has left it."""
    count(stat, Counter.REMOTE_TLB_FLUSH_REQUESTS)
    ask(word, TLB_FLUSH)
    if word[VmWord.THREADS] != ZERO and guards.FLUSH_WAITS:
        wait_for_exits(word)


@inner
def ask(word, which):
    """Ask all vCPUs for something."""
    for i in range(word[VmWord.VCPUS]):
        fetch_or(word, FIRST_REQUEST + i * WORDS_PER_VCPU, which)


@inner
def wait_for_exits(word):
    """Until no vCPU runs the guest that was asked to flush its TLB, and none reads sptes without the mmu lock (facts 6.2)."""
    for i in range(word[VmWord.VCPUS]):
        request, pauses = FIRST_REQUEST + i * WORDS_PER_VCPU, 1
        while True:
            running = load(word, request + ONE)
            if running == KVM or (running == GUEST and load(word, request) & TLB_FLUSH == ZERO):
                break
            pauses = back_off(pauses)


@inner
def count_leaf(stat, level, by):
    """Leaf sptes of `level` became more by so many, an int; or fewer."""
    stat[PAGES_4K + level - ONE] += by


@inner
def count_protected(stat, spte, bits):
    """Count a leaf that was writable and is not any more."""
    if spte & bits & NPT_SPTE.W != ZERO:
        count(stat, Counter.PROTECTED)


# --- tables ----------------------------------------------------------------------------------------------------------------


@inner
def take_table(vm):
    """(a row that is not in use, or NO_TABLE; whether it never was, so that the memory under it is zero)."""
    word = vm.word
    lock_pool(word)
    table, fresh = word[VmWord.FREE_TABLE], False
    if table != NO_TABLE:
        word[VmWord.FREE_TABLE] = np.uint64(vm.page[table]["next"])
    elif word[VmWord.FRESH_TABLE] < np.uint64(len(vm.page)):
        table, fresh = word[VmWord.FRESH_TABLE], True
        word[VmWord.FRESH_TABLE] = table + ONE
    unlock_pool(word)
    return table, fresh


@inner
def allocate(vm, gfn, level):
    """A table of zeros, or NO_TABLE when the pool is used up."""
    word = vm.word
    table, fresh = take_table(vm)
    if table == NO_TABLE:
        return NO_TABLE
    if not fresh:
        vm.spt[table * TABLE_SIZE : (table + ONE) * TABLE_SIZE] = ZERO
    page = vm.page[table]
    page["gfn"], page["level"], page["parents"] = gfn, level, ZERO
    page["role"] = np.uint32(level)
    page["roots"] = page["next"] = page["older"] = page["newer"] = page["unsync_children"] = NONE
    page["generation"] = word[VmWord.VALID_GENERATION]
    page["nx_split"] = page["unsync"] = page["floods"] = NO
    for i in range(len(page["unsync_entries"])):
        page["unsync_entries"][i] = ZERO
    return table


@inner
def release(vm, table):
    """Give a table back. While vCPUs run, one may still read it: it waits on a list of its own for `reclaim`."""
    vm.page[table]["role"] = NONE
    which = np.uint64(VmWord.DEFERRED) if vm.word[VmWord.THREADS] != ZERO else np.uint64(VmWord.FREE_TABLE)
    lock_pool(vm.word)
    vm.page[table]["next"] = vm.word[which]
    vm.word[which] = table
    unlock_pool(vm.word)


@inner
def reclaim(vm, stat):
    """Free the tables that waited. The mmu lock must be held for writing: nobody goes down then but who runs the guest, or reads
    without lock, and for those it waits."""
    waiting = vm.word[VmWord.DEFERRED]
    if waiting == NO_TABLE:
        return
    vm.word[VmWord.DEFERRED] = NO_TABLE
    flush_remote(vm.word, stat)
    while waiting != NO_TABLE:
        after = np.uint64(vm.page[waiting]["next"])
        vm.page[waiting]["next"] = vm.word[VmWord.FREE_TABLE]
        vm.word[VmWord.FREE_TABLE] = waiting
        waiting = after


@inner
def forget_nx_split(vm, stat, table):
    """A table that an execution had made is no longer one that could be a huge page."""
    if vm.page[table]["nx_split"] != NO:
        vm.page[table]["nx_split"] = NO
        stat[Counter.NX_LPAGE_SPLITS] -= 1


# --- the hash, and the list by age -----------------------------------------------------------------------------------------


@inner
def bucket_of(gfn):
    """Index in `word` of the hash bucket: the top bits of the gfn times the multiplier, modulo 2^64, without overflow."""
    low, high = gfn & HALF_MASK, gfn >> HALF_SHIFT
    top = (low * MULTIPLIER_LOW) >> HALF_SHIFT
    top += (low * MULTIPLIER_HIGH) & HALF_MASK
    top += (high * MULTIPLIER_LOW) & HALF_MASK
    return np.uint64(VmWord.HASH) + ((top & HALF_MASK) >> BUCKET_SHIFT)


@inner
def is_obsolete(vm, table):
    """Zapped while it was a root, or left over from before everything was zapped."""
    page = vm.page[table]
    return page["role"] & INVALID != NONE or np.uint64(page["generation"]) != vm.word[VmWord.VALID_GENERATION]


@inner
def next_indirect(vm, table, gfn):
    """The first of `table` and those behind it in its bucket that shadows the guest's table at `gfn`; NO_TABLE at the end."""
    while table != NO_TABLE:
        page = vm.page[table]
        if page["gfn"] == gfn and page["role"] & DIRECT == NONE and not is_obsolete(vm, table):
            return table
        table = np.uint64(page["next"])
    return NO_TABLE


@inner
def first_indirect(vm, gfn):
    """The newest shadow page of the guest's table at `gfn`, or NO_TABLE."""
    return next_indirect(vm, vm.word[bucket_of(gfn)], gfn)


@inner
def after_indirect(vm, table, gfn):
    """The one after it."""
    return next_indirect(vm, np.uint64(vm.page[table]["next"]), gfn)


@inner
def enlist(vm, table, bucket):
    """A new shadow page: hashed, the newest of the list, counted against the limit."""
    word, page = vm.word, vm.page[table]
    page["next"] = word[bucket]
    word[bucket] = table
    page["older"] = word[VmWord.NEWEST]
    if word[VmWord.NEWEST] != NO_TABLE:
        vm.page[word[VmWord.NEWEST]]["newer"] = table
    else:
        word[VmWord.OLDEST] = table
    word[VmWord.NEWEST] = table
    word[VmWord.USED_PAGES] += ONE


@inner
def unlist(vm, table):
    """Take a shadow page off the list by age."""
    word, page = vm.word, vm.page[table]
    older, newer = np.uint64(page["older"]), np.uint64(page["newer"])
    if newer != NO_TABLE:
        vm.page[newer]["older"] = older
    else:
        word[VmWord.NEWEST] = older
    if older != NO_TABLE:
        vm.page[older]["newer"] = newer
    else:
        word[VmWord.OLDEST] = newer
    page["older"] = page["newer"] = NONE


@inner
def unhash(vm, table):
    """Take a shadow page out of its hash bucket."""
    bucket = bucket_of(vm.page[table]["gfn"])
    after = np.uint64(vm.page[table]["next"])
    at = vm.word[bucket]
    if at == table:
        vm.word[bucket] = after
        return
    while np.uint64(vm.page[at]["next"]) != table:
        at = np.uint64(vm.page[at]["next"])
    vm.page[at]["next"] = after
