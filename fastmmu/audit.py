"""The audit: does the whole state of a machine hold together?

Plain NumPy over the state, sharing nothing with the kernels but layouts. Each rule says what must be true after any event; the
first that is broken is raised, with the place. Rules follow facts 3.1 (sptes), 5.11 and 5.14 (shadow pages), 7 (dirty log) and
9.5 (TLB).
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from fastmmu.bits import GPTE64, MMIO_SPTE, NPT_SPTE, ROLE
from fastmmu.machine import Machine
from fastmmu.machine_state import HASH_BUCKETS, REQUESTS, TABLE_WORDS, Request, SlotFlag, VcpuWord, VmWord
from fastmmu.tlb import DIRTY, EPOCH_SHIFT, EXECUTE

PAGE_COUNTERS = {1: "pages_4k", 2: "pages_2m", 3: "pages_1g"}
FLUSHING = int(Request.TLB_FLUSH | Request.TLB_FLUSH_CURRENT | Request.LOAD_ROOT | Request.FREE_OBSOLETE_ROOTS)


class AuditError(AssertionError):
    """The state does not hold together; the message names the rule and the place."""


def fail(rule: str, where: object) -> NoReturn:
    """Raise the first broken rule."""
    raise AuditError(f"{rule}: {where}")


def must(true: np.ndarray, rule: str, where: np.ndarray) -> None:
    """Every element is true; else the first place where it is not."""
    if not true.all():
        fail(rule, hex(int(where[~true].reshape(-1)[0])))


class State:
    """A machine's tables, decoded: one row for each table in use, one column for each entry."""

    def __init__(self, machine: Machine) -> None:
        self.machine, vm = machine, machine.vm
        self.word = vm.word
        used = np.arange(int(self.word[VmWord.FRESH_TABLE]))
        self.rows = used[vm.page["role"][: len(used)] != 0]
        self.page = vm.page[self.rows]
        self.level = self.page["level"].astype(np.uint64)[:, None]
        self.index = self.rows.astype(np.uint64)[:, None] * np.uint64(TABLE_WORDS) + np.arange(TABLE_WORDS, dtype=np.uint64)
        self.spte = vm.spt.reshape(-1, TABLE_WORDS)[self.rows]
        self.present = self.spte & NPT_SPTE.MMU_PRESENT != 0
        last = (self.level == 1) | (self.spte & NPT_SPTE.PS != 0)
        self.leaf, self.table = self.present & last, self.present & ~last
        self.pages = np.uint64(1) << (np.uint64(9) * (self.level - np.uint64(1)))
        self.gfn = self.page["gfn"][:, None] + np.arange(TABLE_WORDS, dtype=np.uint64) * self.pages
        self.pfn = (self.spte & NPT_SPTE.ADDR) >> np.uint64(12)
        self.direct = self.word[VmWord.TDP_MMU] == 0
        slots = vm.mem.slots
        self.slots = slots[slots["start"] < slots["end"]]

    def has(self, which: VmWord) -> np.ndarray:
        """Whether each entry has all bits of a mask, and the mask is not empty."""
        mask = self.word[which]
        return (self.spte & mask == mask) & (mask != 0)

    def slot_of(self, gfn: np.ndarray) -> np.ndarray:
        """Row in `slots` of the memslot that holds each gfn, -1 for none."""
        found = np.full(gfn.shape, -1)
        for i, slot in enumerate(self.slots):
            found[(slot["base"] <= gfn) & (gfn < slot["base"] + slot["pages"])] = i
        return found

    def bitmap(self, slot: np.void, name: str) -> np.ndarray:
        """One of a slot's bitmaps, bool by page."""
        start, pages = int(slot[name]), int(slot["pages"])
        words = self.machine.vm.slot_words[start : start - (-pages // 64)]
        return np.unpackbits(words.view(np.uint8), bitorder="little")[:pages].astype(bool)


def audit(machine: Machine) -> None:
    """Check everything.

    Raises:
        AuditError: the first rule that does not hold.
    """
    state = State(machine)
    check_slots(state)
    check_counts(state)
    check_links(state)
    check_leaves(state)
    check_mmio(state)
    if state.direct:
        check_shadow_pages(state)
        check_rmap(state)
    check_roots(state)
    check_dirty_log(state)
    for vcpu in range(machine.vcpus):
        check_tlb(state, vcpu)


def check_slots(state: State) -> None:
    """Memslots do not overlap; as many log as are counted."""
    order = np.argsort(state.slots["start"])
    starts, ends = state.slots["start"][order], state.slots["end"][order]
    must(starts[1:] >= ends[:-1], "two memslots overlap at", starts[1:])
    logging = int((state.slots["flags"] & np.uint64(SlotFlag.LOG_DIRTY_PAGES) != 0).sum())
    if logging != int(state.word[VmWord.LOGGING_SLOTS]):
        fail("memslots that log dirty pages", f"{logging}, counted {int(state.word[VmWord.LOGGING_SLOTS])}")


def check_counts(state: State) -> None:
    """The page statistics count the leaf sptes; nx_lpage_splits the tables."""
    counters = state.machine.counters()
    for level, name in PAGE_COUNTERS.items():
        found = int((state.leaf & (state.level == level)).sum())
        if found != counters[name]:
            fail(name, f"{counters[name]}, but there are {found} leaf sptes of level {level}")
    splits = int(state.page["nx_split"].sum())
    if splits != counters["nx_lpage_splits"]:
        fail("nx_lpage_splits", f"{counters['nx_lpage_splits']}, but {splits} tables are")


def check_links(state: State) -> None:
    """A non-leaf entry points to a table in use, of the level below and of the same frame, which points back."""
    pages = state.machine.vm.page
    target = state.pfn[state.table].astype(np.int64)
    level = np.broadcast_to(state.level, state.spte.shape)[state.table]
    where = state.index[state.table]
    must(np.isin(target, state.rows), "entry points to a table that is not in use, spte", where)
    must(pages["level"][target] == level - np.uint64(1), "entry points to a table of another level, spte", where)
    must(pages["gfn"][target] == state.gfn[state.table], "entry points to a table of another frame, spte", where)
    must(pages["parent"][target] == where, "table does not point back to its parent, spte", where)
    parents = state.page["parent"]
    has_parent = parents != 0
    linked = state.machine.vm.spt[parents[has_parent].astype(np.int64)]
    must(
        (linked & NPT_SPTE.ADDR) >> np.uint64(12) == state.rows[has_parent],
        "parent does not point to its table",
        state.rows[has_parent],
    )
    if not state.direct:
        is_root = state.page["level"] == state.word[VmWord.ROOT_LEVEL]
        must(has_parent | is_root, "table of the TDP MMU without a parent", state.rows)


def check_leaves(state: State) -> None:
    """A leaf maps the frame at its place, inside one memslot, with rights that go together (facts 3.1.4)."""
    leaf, where = state.leaf, state.index[state.leaf]
    gfn, pages = state.gfn[leaf], np.broadcast_to(state.pages, state.spte.shape)[leaf]
    must(state.pfn[leaf] == gfn, "leaf maps another frame, spte", where)
    slot = state.slot_of(gfn)
    must(slot >= 0, "leaf outside every memslot, spte", where)
    must(state.slot_of(gfn + pages - np.uint64(1)) == slot, "leaf crosses the end of its memslot, spte", where)
    must(state.level.repeat(TABLE_WORDS, 1)[leaf] <= state.word[VmWord.MAX_LEVEL], "leaf is larger than allowed, spte", where)
    level = np.broadcast_to(state.level, state.spte.shape)[leaf]
    must(level <= state.slots["host_level"][slot], "leaf is larger than the host's mapping, spte", where)
    host, mmu = state.has(VmWord.HOST_WRITABLE)[leaf], state.has(VmWord.MMU_WRITABLE)[leaf]
    writable = (state.spte & NPT_SPTE.W != 0)[leaf]
    must(host | ~mmu, "MMU_WRITABLE without HOST_WRITABLE, spte", where)
    must(mmu | ~writable, "W without MMU_WRITABLE, spte", where)
    readonly = state.slots["flags"][slot] & np.uint64(SlotFlag.READONLY) != 0
    must(~(readonly & host), "HOST_WRITABLE in a read-only memslot, spte", where)
    must(readonly | host, "no HOST_WRITABLE in a writable memslot, spte", where)
    executable = state.spte[leaf] & (state.word[VmWord.EXECUTE] | state.word[VmWord.NO_EXECUTE]) == state.word[VmWord.EXECUTE]
    huge_nx = (level > 1) & (state.word[VmWord.NX_HUGE_PAGES] != 0)
    must(executable != huge_nx, "executable under NX huge pages, or not executable without, spte", where)


def check_mmio(state: State) -> None:
    """What is not present is nothing, or an MMIO spte of a frame without memslot if its generation is today's."""
    rest = ~state.present & (state.spte != 0)
    mmio = rest & (state.spte & state.word[VmWord.MMIO_MASK] == state.word[VmWord.MMIO_VALUE])
    must(mmio[rest], "neither present nor an MMIO spte, spte", state.index[rest])
    must((np.broadcast_to(state.level, state.spte.shape) == 1)[mmio], "MMIO spte above 4 KiB, spte", state.index[mmio])
    spte = state.spte[mmio]
    frame = (spte & NPT_SPTE.ADDR & ~state.word[VmWord.MMIO_VALUE]) >> np.uint64(12)
    must(frame == state.gfn[mmio], "MMIO spte of another frame, spte", state.index[mmio])
    low, high = (spte & MMIO_SPTE.GENERATION_LOW) >> np.uint64(3), (spte & MMIO_SPTE.GENERATION_HIGH) >> np.uint64(52)
    today = (low | high << np.uint64(8)) == state.word[VmWord.GENERATION] & MMIO_SPTE.GENERATION
    must((state.slot_of(frame) < 0)[today], "MMIO spte of a frame that a memslot holds, spte", state.index[mmio][today])


def check_shadow_pages(state: State) -> None:
    """Each shadow page is counted, in its hash bucket, and on the list by age unless it is a root that was zapped."""
    pages, word = state.machine.vm.page, state.word
    if len(state.rows) != int(word[VmWord.USED_PAGES]):
        fail("shadow pages", f"{len(state.rows)}, counted {int(word[VmWord.USED_PAGES])}")
    hashed = []
    for bucket in range(HASH_BUCKETS):
        table = int(word[VmWord.HASH + bucket])
        while table:
            if int(pages[table]["gfn"]) * 0x61C8864680B583EB % 2**64 >> 52 != bucket:
                fail("shadow page in another hash bucket, table", table)
            hashed.append(table)
            table = int(pages[table]["next"])
    if sorted(hashed) != state.rows.tolist():
        fail("shadow pages in the hash", f"{len(hashed)} of {len(state.rows)}")
    listed, table, younger = [], int(word[VmWord.NEWEST]), 0
    while table:
        if int(pages[table]["newer"]) != younger:
            fail("list of shadow pages does not point back, table", table)
        listed.append(table)
        younger, table = table, int(pages[table]["older"])
    invalid = state.page["role"] & np.uint32(ROLE.INVALID) != 0
    if sorted(listed) != state.rows[~invalid].tolist():
        fail("shadow pages on the list", f"{len(listed)} of {int((~invalid).sum())}")
    obsolete = state.page["generation"] != word[VmWord.VALID_GENERATION]
    must(~obsolete | invalid, "shadow page left over from before everything was zapped, table", state.rows)
    must(~invalid | (state.page["roots"] > 0), "zapped shadow page that is nobody's root, table", state.rows)


def check_rmap(state: State) -> None:
    """Each leaf stands in its memslot's reverse map, and nothing else does."""
    expected = np.zeros(state.machine.slot_words_used, np.uint64)
    gfn, slot = state.gfn[state.leaf], state.slot_of(state.gfn[state.leaf])
    level = np.broadcast_to(state.level, state.spte.shape)[state.leaf]
    shift = np.uint64(9) * (level - np.uint64(1))
    rows = state.slots[slot]
    at = rows["rmap"][np.arange(len(rows)), level.astype(np.int64)] + (gfn >> shift) - (rows["base"] >> shift)
    expected[at.astype(np.int64)] = state.index[state.leaf]
    for one in state.slots:
        for height in (1, 2, 3):
            shift = 9 * (height - 1)
            base, pages = int(one["base"]), int(one["pages"])
            start, frames = int(one["rmap"][height]), ((base + pages - 1) >> shift) - (base >> shift) + 1
            ours = state.machine.vm.slot_words[start : start + frames]
            must(
                ours == expected[start : start + frames],
                f"reverse map of memslot {int(one['id'])}, level {height}, word",
                np.arange(frames),
            )


def check_roots(state: State) -> None:
    """Each root is held by as many vCPUs as it counts."""
    own = state.machine.state.own
    held = np.zeros(len(state.machine.vm.page), np.int64)
    pae = state.word[VmWord.ROOT_LEVEL] == 2
    for vcpu in own[own[:, VcpuWord.ROOT] != 0]:
        for root in vcpu[VcpuWord.PAE_ROOT : VcpuWord.PAE_ROOT + 4] if pae else vcpu[[VcpuWord.ROOT]]:
            held[int(root)] += 1
    must(held[state.rows] == state.page["roots"], "vCPUs that hold a root are not as many as it counts, table", state.rows)
    must(held[state.rows].astype(bool) | (np.delete(held, state.rows).sum() == 0), "a root that is not in use", state.rows)


def check_dirty_log(state: State) -> None:
    """What was written since it was last reported is in the log, and what may be written unseen is so already (facts 7)."""
    own = state.machine.state.own
    noted = [own[i, VcpuWord.PML_LOG : VcpuWord.PML_LOG + int(own[i, VcpuWord.PML])] for i in range(len(own))]
    pending = np.concatenate(noted)
    unseen = state.leaf & (state.spte & NPT_SPTE.W != 0)
    if state.word[VmWord.PML]:
        unseen &= state.has(VmWord.DIRTY)
    for slot in state.slots[state.slots["flags"] & np.uint64(SlotFlag.LOG_DIRTY_PAGES) != 0]:
        dirty, written = state.bitmap(slot, "dirty"), state.bitmap(slot, "written")
        inside = pending[(pending >= slot["base"]) & (pending < slot["base"] + slot["pages"])]
        dirty[(inside - slot["base"]).astype(np.int64)] = True
        must(dirty | ~written, f"memslot {int(slot['id'])}: written, but not in the dirty log, page", np.arange(len(dirty)))
        for level, pages in ((1, 1), (2, 512), (3, 512 * 512)):
            of_level = unseen & (state.level == level)
            for gfn in state.gfn[of_level & (state.gfn >= slot["base"]) & (state.gfn < slot["base"] + slot["pages"])].tolist():
                first = gfn - int(slot["base"])
                if not dirty[first : first + pages].all():
                    fail(f"memslot {int(slot['id'])}: writable without being logged, level {level}, page", hex(first))


def check_tlb(state: State, vcpu: int) -> None:
    """No TLB entry gives more than the sptes, unless a flush is on its way (facts 9.5)."""
    machine, word = state.machine, state.word
    if int(word[REQUESTS + vcpu]) & FLUSHING or not machine.state.own[vcpu, VcpuWord.ROOT]:
        return
    entries, epoch = machine.state.tlb[vcpu, :-1].reshape(-1, 2), machine.state.tlb[vcpu, -1, 0, 0]
    entries = entries[entries[:, 0] >> EPOCH_SHIFT == epoch, 1]
    for entry in entries.tolist():
        gfn = (entry & int(GPTE64.ADDR)) >> 12
        spte = lookup(state, vcpu, gfn)
        if not spte & int(NPT_SPTE.MMU_PRESENT):
            fail(f"vCPU {vcpu}: TLB entry of a frame that is not mapped, gfn", hex(gfn))
        if entry & int(DIRTY) and not spte & int(NPT_SPTE.W):
            fail(f"vCPU {vcpu}: TLB entry writable, spte not, gfn", hex(gfn))
        masks = int(word[VmWord.EXECUTE] | word[VmWord.NO_EXECUTE])
        if entry & int(EXECUTE) and spte & masks != int(word[VmWord.EXECUTE]):
            fail(f"vCPU {vcpu}: TLB entry executable, spte not, gfn", hex(gfn))


def lookup(state: State, vcpu: int, gfn: int) -> int:
    """The lowest entry for `gfn`, by the tables that the vCPU walks."""
    own, level = state.machine.state.own[vcpu], int(state.word[VmWord.ROOT_LEVEL])
    table = int(own[VcpuWord.ROOT]) if level != 2 else int(own[VcpuWord.PAE_ROOT + (gfn >> 18 & 3)])
    while True:
        spte = int(state.machine.vm.spt[table * TABLE_WORDS + (gfn >> 9 * (level - 1)) % TABLE_WORDS])
        if not spte & int(NPT_SPTE.MMU_PRESENT) or level == 1 or spte & int(NPT_SPTE.PS):
            return spte
        table, level = (spte & int(NPT_SPTE.ADDR)) >> 12, level - 1
