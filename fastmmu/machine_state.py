"""Records and enums of a virtual machine as KVM keeps it: memslots, words of the VM and its vCPUs, shadow pages, counters, log."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from fastmmu.state import MemoryState, MmuState


class SlotFlag(IntEnum):
    """Flags of a memslot, as KVM_SET_USER_MEMORY_REGION takes them."""

    LOG_DIRTY_PAGES = 1
    READONLY = 2


MEMSLOT = np.dtype([
    ("start", np.uint64),  # byte addresses, end exclusive: the first three as in SLOT, so that walks read the same rows
    ("end", np.uint64),
    ("kind", np.uint64),  # a SlotKind
    ("base", np.uint64),  # first gfn
    ("pages", np.uint64),
    ("id", np.uint64),
    ("flags", np.uint64),  # SlotFlag bits
    ("host_level", np.uint64),  # level at which the host itself maps the memory
    ("dirty", np.uint64),  # where its words begin in `KvmState.slot_words`: the dirty bitmap,
    ("written", np.uint64),  # what was written since it was last reported (for the audit),
    ("report", np.uint64),  # the bitmap that a DIRTY_GET returns, or a DIRTY_CLEAR takes,
    ("host_dirty", np.uint64),  # what the host was told to be dirty, when a leaf was removed,
    ("disallow", np.uint64, 4),  # by level: counts of reasons against a huge page, one word each huge frame,
    ("rmap", np.uint64, 4),  # by level: for each frame the list of the sptes that map it
])  # fmt: skip
"""A memslot. A row whose start equals its end holds no slot."""


class VmWord(IntEnum):
    """Words of the VM: how it is run, the masks of its sptes, its state."""

    # module parameters, capabilities
    TDP = 0  # two-dimensional paging; else the processor walks shadow pages
    TDP_MMU = 1
    EPT = 2  # sptes and error codes of EPT; else of NPT
    AD = 3  # sptes have accessed and dirty bits
    NX_HUGE_PAGES = 4
    EAGER_PAGE_SPLIT = 5
    MMIO_CACHING = 6  # MMIO sptes
    MMIO_INFO = 7  # the MMIO info cache
    PML = 8  # page-modification logging
    MANUAL_PROTECT = 9
    INITIALLY_SET = 10
    ROOT_LEVEL = 11
    MAX_LEVEL = 12  # of a huge page
    # artefacts of an emulated processor, truth README section 7
    TLB_FLUSHED_ON_EXIT = 13
    ACCESSED_WHILE_WALKING = 14
    RESERVED_WITHOUT_PRESENT = 15
    # masks of the sptes, by their form (facts 3.1)
    PRESENT = 16  # in every present spte
    HARDWARE_PRESENT = 17  # any of these, and the processor takes the entry
    EXECUTE = 18  # set in an executable leaf
    NO_EXECUTE = 19  # set in one that is not
    USER = 20
    ACCESSED = 21
    DIRTY = 22
    HOST_WRITABLE = 23
    MMU_WRITABLE = 24
    MEMORY_TYPE = 25
    AD_TYPE = 26
    MMIO_MASK = 27
    MMIO_VALUE = 28
    MMIO_ACCESS = 29
    # state
    GENERATION = 30  # of the memslots
    VALID_GENERATION = 31  # of the shadow pages: 0 or 1
    USED_PAGES = 32  # shadow pages, which the limit counts
    MAX_PAGES = 33
    REQUESTED_PAGES = 34  # the limit that user space set, 0 for none
    FREE_TABLE = 35  # first of the tables that were freed, 0 for none
    FRESH_TABLE = 36  # first table that was never used
    OLDEST = 37  # ends of the list of shadow pages in use
    NEWEST = 38
    TDP_ROOT = 39
    LOGGING_SLOTS = 40  # how many memslots log dirty pages
    VCPU = 41  # that the events belong to
    STOP = 42  # a Stop: why the replay ended
    STOP_ADDRESS = 43
    STOP_CODE = 44
    LOGGED = 45  # rows of the log in use
    SUPPLIED = 46  # device data taken
    LOG_FAULTS = 47  # log each fault that exits
    LOG_ACCESSES = 48  # log where each access went
    STOP_AT_FAULT = 49  # a guest #PF ends the replay
    MAX_GFN = 50  # beyond it no MMIO spte is made
    STOP_WHEN_FULL = 51  # end the replay when the log is nearly full
    VCPUS = 52
    USE_TABLE = 53  # what a leaf spte must hold for the processor to go through it without more ado: to a guest table,
    USE_READ = 54  # for a read,
    USE_WRITE = 55  # a write,
    USE_FETCH = 56  # a fetch;
    NOT_READ = 57  # and what it must not hold, for each of the three
    NOT_WRITE = 58
    NOT_FETCH = 59
    # what is remembered, as far as it can be switched
    CACHED_ROOTS = 60  # three roots besides the current one
    SYNC_SKIPS_UNCHANGED = 61  # a sync leaves an spte alone whose rights did not change
    LAST_SLOT = 62  # the memslot found last is tried first
    PREFETCH = 63  # of a fault's neighbours
    FORCE_SYNC_ON_REUSE = 64  # the parameter force_flush_and_sync_on_reuse
    # state of shadow paging
    INDIRECT_PAGES = 65  # shadow pages of guest tables
    FREE_DESC = 66  # first of the descriptors that were freed, 0 for none
    FRESH_DESC = 67  # first that was never used
    ZAPPED = 68  # first of the shadow pages that are to be freed, 0 for none
    UNASKED = 69  # leaves that became writable without KVM asking whether a guest's table lies there (see leaf.py)
    FAST_PAGE_FAULT = 70  # the path without the mmu lock; else every fault takes it
    LOCK_TIMED = 71  # count the cycles for which the mmu lock is waited for and held
    THREADS = 72  # vCPUs run at the same time: whoever must know that they have left the guest waits for it
    NEXT_RIP = 73  # the processor says where the next instruction is: KVM steps over VMRUN without emulating it
    SHADOW_ROOTS = 74  # there are shadow pages beside the TDP MMU's tables: a nested guest has run
    SPLIT_SHADOW_PAGES = 75  # eagerly those of every guest, not of nested guests alone
    SPLIT_ACCESS = 76  # where the rights of the table that takes a huge page's place come from: a SplitAccess
    SPLIT_ON_FAULT = 77  # the TDP MMU splits a huge page that a fault wants smaller; else it drops it
    VECTOR_LENGTH = 78  # shadow pages that a walk over unsync ones collected (see unsync.py): how many,
    VECTOR_TABLE = 79  # the pages,
    VECTOR_INDEX = VECTOR_TABLE + 16  # and which entry of the page above points to each;
    STACK_TABLE = VECTOR_INDEX + 16  # by level, the page that the walk is in,
    STACK_INDEX = STACK_TABLE + 6  # the entry that it looks at next,
    STACK_FOUND = STACK_INDEX + 6  # how many unsync leaves it found below,
    PATH_TABLE = STACK_FOUND + 6  # and the way to the page looked at
    PATH_INDEX = PATH_TABLE + 6
    HASH = PATH_INDEX + 6  # first of the 4096 buckets
    MMU_LOCK = HASH + 4096 + 16  # the mmu lock (see lock.py), alone in its cache line
    POOL_LOCK = MMU_LOCK + 16  # of the pool of tables, under the mmu lock for reading
    DEFERRED = POOL_LOCK + 1  # first of the tables that may still be read: freed when no thread can be (see pool.py)
    LOCK_WAITERS = POOL_LOCK + 16  # how many wait for the mmu lock
    REQUESTS = LOCK_WAITERS + 16  # the first vCPU's, then every PER_VCPU words: its Request bits,
    RUNNING = REQUESTS + 1  # and whether it runs the guest, or reads sptes without the mmu lock: a Running


VECTOR_SIZE = 16
HASH_BUCKETS = 4096
PER_VCPU = 8  # a cache line


class SplitAccess(IntEnum):
    """Where the guest's rights to a huge page come from when it is split (facts 8.3, 8.5, 8.6)."""

    CACHED = 0  # the word kept beside the gfn
    GUEST_WALK = 1  # the guest's entry, read again
    PROPAGATE = 2  # the huge spte itself: without X where NX huge pages took it, until a fault repairs it


class Running(IntEnum):
    """Where a vCPU's thread is, for who must wait until it has left."""

    KVM = 0
    GUEST = 1
    READING = 2  # sptes, without the mmu lock


class Counter(IntEnum):
    """What KVM counts, under its names (facts 5.15, truth README section 5)."""

    PF_TAKEN = 0
    PF_FIXED = 1
    PF_EMULATE = 2
    PF_SPURIOUS = 3
    PF_FAST = 4
    PF_MMIO_SPTE_CREATED = 5
    PF_GUEST = 6
    TLB_FLUSH = 7
    INVLPG = 8
    REMOTE_TLB_FLUSH_REQUESTS = 9
    MMIO_EXITS = 10
    IO_EXITS = 11
    NESTED_RUN = 12
    INSN_EMULATION = 13
    EXITS_NO_IRQ = 14
    PAGES_4K = 15
    PAGES_2M = 16
    PAGES_1G = 17
    MMU_CACHE_MISS = 18
    MMU_SHADOW_ZAPPED = 19
    MMU_RECYCLED = 20
    MMU_PTE_WRITE = 21
    MMU_PDE_ZAPPED = 22
    MMU_FLOODED = 23
    MMU_UNSYNC = 24
    NX_LPAGE_SPLITS = 25
    MAX_MMU_RMAP_SIZE = 26
    MAX_MMU_PAGE_HASH_COLLISIONS = 27
    # ours, about the processor
    TLB_HITS = 28
    TLB_MISSES = 29
    STORES = 30  # to guest page tables, by a STORE event
    PML_FULL = 31
    # ours, about the mmu lock and the path without it
    FAST_FIXED = 32  # entries that the fast path made writable
    EXCHANGE_FAILED = 33  # compare-exchanges of an entry that had changed
    LOCK_TAKEN = 34  # the mmu lock, for reading or writing
    LOCK_WAITED = 35  # cycles that it was waited for, where LOCK_TIMED
    LOCK_HELD = 36  # and that it was held
    PROTECTED = 37  # leaves that logging took W from
    # ours, about huge pages that give way to smaller ones
    SPLITS = 38  # huge leaves that were replaced by a table of 512
    SPLIT_READS = 39  # guest entries read for that


KVM_COUNTERS = tuple(counter for counter in Counter if counter < Counter.TLB_HITS)
"""Those that KVM itself has."""


class VcpuWord(IntEnum):
    """Words of a vCPU."""

    ROOT = 0  # table that the processor walks, 0 for none; with PAE roots 1 stands for the four
    PAE_ROOT = 1  # first of the four, 0 for one that the guest has not
    NUMBER = 5
    FETCHED = 6  # gva of the last fetch: where an instruction is fetched again after an exit
    FETCH_ACCESS = 7  # and the access; 0 before the first
    LAST_SLOT = 8  # row of the memslot found last
    PML = 9  # pages logged
    CR0 = 10  # the registers as they were set
    CR4 = 11
    EFER = 12
    MMIO = 13  # the MMIO info cache: the words of Mmio,
    MMIO_GENERATION = 16  # and the memslot generation it is of
    ROOT_LEVEL = 17  # of the table that the processor walks; 2 with PAE roots
    ROOT_ROLE = 18  # role of its shadow page; under shadow paging it follows from the registers
    PGD = 19  # value of CR3 that the root is for
    PREVIOUS_ROOT = 20  # the roots kept besides, the newest first,
    PREVIOUS_PGD = 23  # and theirs
    INJECTED = 26  # error code of the #PF that KVM injects
    LEAF_BITS = 27  # under shadow paging, by fault kind: what a leaf must hold for the processor to use it without more ado,
    LEAF_MASK = 43  # among these bits
    LEAF_TABLE = 59  # a guess, by 2 MiB region of gvas, at the table that its leaves stand in: only what to prefetch comes from it
    NESTED = LEAF_TABLE + 256  # 1 in the words that belong to a nested guest
    IN_NESTED = NESTED + 1  # the nested guest runs
    REGISTERS = NESTED + 2  # row of the register table that was loaded last,
    KEPT_CR3 = NESTED + 3  # and CR3 while the nested guest runs
    VMCB = NESTED + 4  # gpa of the block that describes the nested guest
    QUALIFICATION = NESTED + 5  # of the walk of a hypervisor's EPT that failed last: bits 5:0
    EXIT_CODE = NESTED + 6  # error code of the processor's last exit
    PML_LOG = NESTED + 7  # gfns that page-modification logging noted


PREVIOUS_ROOTS = 3


class Request(IntEnum):
    """Requests to a vCPU, as bits; served before it enters the guest again."""

    TLB_FLUSH = 1
    FREE_OBSOLETE_ROOTS = 2
    LOAD_ROOT = 4
    TLB_FLUSH_CURRENT = 8
    MMU_SYNC = 16
    TLB_FLUSH_GUEST = 32


SHADOW_PAGE = np.dtype([
    ("gfn", np.uint64),  # first gfn mapped; of an indirect page: the guest's table
    ("parents", np.uint64),  # list of the sptes that point here (see rmap.py)
    ("unsync_entries", np.uint64, 8),  # a bit for each entry that leads, or led, to an unsync page
    ("role", np.uint32),  # ROLE bits; 0 for a table not in use
    ("roots", np.uint32),  # how many times vCPUs have it as a root, current or kept
    ("next", np.uint32),  # in its hash bucket, or on the list of free tables
    ("older", np.uint32),
    ("newer", np.uint32),
    ("work", np.uint32),  # next on a list of work
    ("unsync_children", np.uint32),  # how many bits of unsync_entries are set
    ("level", np.uint8),
    ("generation", np.uint8),  # VALID_GENERATION when it was made
    ("nx_split", np.uint8),  # counted in nx_lpage_splits: a fetch may not use the huge page that could stand here
    ("unsync", np.uint8),  # the guest may write its table unseen
    ("floods", np.uint8),  # emulated writes to its table since it was last gone through
], align=True)  # fmt: skip
"""What KVM knows of one table of sptes, shadow page or table of the TDP MMU (facts 5.11)."""


class LogKind(IntEnum):
    """Kinds of log rows."""

    MMIO_READ = 0  # address: gpa, size, value: data
    MMIO_WRITE = 1
    PAGE_FAULT = 2  # delivered to the guest; address: gva, value: error code
    LOADED = 3  # address: gva, size, value: data
    EXIT = 4  # a fault that exits to KVM; address, value: error code
    ACCESSED = 5  # address: gva, value: gpa
    GENERAL_PROTECTION = 6  # delivered to the guest; address: the value that CR3 did not take
    NESTED_EXIT = 7  # a fault of a nested guest that its hypervisor sees; address: the nested gpa, value: error code; with
    # EPT size is the reason, 48 or 49, and value the qualification


LOG = np.dtype([
    ("kind", np.uint8),
    ("size", np.uint8),
    ("event", np.uint32),  # index of the event
    ("address", np.uint64),
    ("value", np.uint64),
])  # fmt: skip
"""What a replay tells besides counters."""


class Stop(IntEnum):
    """Why a replay ended."""

    END = 0
    DIFFERS = 1  # an access translated to another address than the one recorded
    GUEST_FAULT = 2  # a guest #PF, where the machine stops at them
    LOG_FULL = 3
    NO_TABLES = 4  # the pool of tables is used up
    NO_PAGES = 5  # KVM's own limit leaves no shadow page: KVM_RUN fails with ENOSPC
    NO_PROGRESS = 6  # an access faults for ever
    DEVICE_FETCH = 7  # an instruction would be fetched from a device: KVM gives up
    TRIPLE_FAULT = 8  # the guest's top table lies outside every memslot


class Outcome(IntEnum):
    """What became of a page fault (facts 5.1)."""

    RETRY = 1
    EMULATE = 2
    INVALID = 4  # this path did not handle it
    FIXED = 5
    SPURIOUS = 6
    NO_TABLES = 7  # as the Stop of that name
    NO_PAGES = 8
    INJECT = 9  # a #PF for the guest: VcpuWord.INJECTED has its code


class Status(IntEnum):
    """What became of an access."""

    DONE = 0
    FAULT = 1  # a guest #PF
    EXIT = 2  # a fault for KVM
    EMULATED = 3  # done by KVM's emulator
    STOP = 4  # it cannot be done; VmWord.STOP says why
    REFLECTED = 5  # a nested guest's access ended in its hypervisor


class Touch(NamedTuple):
    """Answer of the processor for one page: gpa when DONE; else where it faulted, gva or gpa, and the error code."""

    status: np.int64
    gpa: np.uint64
    address: np.uint64
    pferr: np.uint64


class Mapping(NamedTuple):
    """What a fault in shadow pages is to map: nothing unless `outcome` is INVALID, that is, still open."""

    outcome: np.int64
    number: np.int64  # row of the memslot, or NO_SLOT
    page: np.uint64  # page number of the address that faulted, by which entries are found
    table: np.uint64  # shadow page from which to go down to the leaf,
    level: np.uint64  # and its level
    gfn: np.uint64
    access: np.uint64  # what the guest grants
    limit: np.uint64  # highest level of the leaf


class KvmState(NamedTuple):
    """A virtual machine as KVM keeps it, shared by its vCPUs."""

    mem: MemoryState  # slots: MEMSLOT rows
    spt: np.ndarray  # uint64[tables * 512]: sptes; table i begins at i * 512, table 0 is never used
    shadowed: np.ndarray  # uint64[tables * 512]: by leaf of an indirect shadow page, gfn << 12 | access (facts 8.3)
    desc: np.ndarray  # uint64: descriptors of lists of sptes, 16 words each (see rmap.py)
    page: np.ndarray  # SHADOW_PAGE[tables]
    slot_words: np.ndarray  # uint64: what memslots keep by page
    frames: np.ndarray | None  # uint64: by gfn, the frame of host memory behind it; None: where the guest's is
    word: np.ndarray  # uint64[VmWord.REQUESTS + PER_VCPU * vcpus]


class RegisterTable(NamedTuple):
    """Register settings that MODE and REGISTERS events name by row."""

    mmu: MmuState  # each with one more leading axis
    raw: np.ndarray  # uint64[rows, 3]: CR0, CR4, EFER


class Words(NamedTuple):
    """Words of a guest: a tuple, which a kernel's parts may return, where they may not return an array."""

    own: np.ndarray  # uint64[VCPU_WORDS]


class VcpuState(NamedTuple):
    """One virtual processor; with one more leading axis, all of them.

    Where guests may have guests of their own (L1 runs L2), it has two sets of words, one for each: `own` are those of the guest
    that runs. `mmu` are the registers of whichever guest runs, `nested` what KVM makes of the tables that L1 gave L2.
    """

    mmu: MmuState
    trail: np.ndarray  # uint64[TRAIL_LENGTH]
    own: np.ndarray  # uint64[VCPU_WORDS]
    tlb: np.ndarray  # uint64[sets + 1, 1 + 2 * ways rounded up to fours], see tlb.py
    stat: np.ndarray  # int64[STAT_WORDS], by Counter: a gauge that one vCPU raises another may lower
    nested: MmuState | None  # None: no nested guests
    other: Words | None  # those of the guest that does not run


CACHE_LINE_WORDS = 8
STAT_WORDS = -(-len(Counter) // CACHE_LINE_WORDS) * CACHE_LINE_WORDS + CACHE_LINE_WORDS
"""Words of a row of counters: no two vCPUs have counters in one cache line, wherever the rows begin. In rows that touch, two
vCPUs that fault at the same time get in each other's way at every fault."""
PML_ENTRIES = 512
VCPU_WORDS = VcpuWord.PML_LOG + PML_ENTRIES
TABLE_WORDS = 512
