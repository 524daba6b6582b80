"""The rules of the audit (`audit.py`): does the whole state of a machine hold together?

Plain NumPy over the state, sharing nothing with the kernels but layouts. Each rule says what must be true after any event; the
first that is broken is raised, with the place. Rules follow facts 3.1 (sptes), 5.11 and 5.14 (shadow pages), 7 (dirty log) and
9.5 (TLB).
"""

from __future__ import annotations

import numpy as np

from fastmmu.audit_shadow import check_guest_tables, check_indirect, check_protection, check_rmap, check_shadow_pages
from fastmmu.audit_state import State, fail, must, spte_list
from fastmmu.bits import ACC, GPTE64, MMIO_SPTE, NPT_SPTE
from fastmmu.descent import FOUR_ROOTS
from fastmmu.machine import Machine
from fastmmu.machine_state import PER_VCPU, PREVIOUS_ROOTS, TABLE_WORDS, Request, SlotFlag, VcpuWord, VmWord
from fastmmu.tlb import DIRTY, EPOCH, EXECUTE, PAGE_NUMBER

PAGE_COUNTERS = {1: "pages_4k", 2: "pages_2m", 3: "pages_1g"}
FLUSHING = int(Request.TLB_FLUSH | Request.TLB_FLUSH_CURRENT | Request.LOAD_ROOT | Request.FREE_OBSOLETE_ROOTS)


def check_machine(machine: Machine, guest_tables: bool) -> None:
    """See `audit.audit`."""
    state = State(machine)
    check_slots(state)
    check_counts(state)
    check_links(state)
    check_leaves(state)
    check_mmio(state)
    if state.shadow.any():
        pages = State(machine, shadow_pages=True)
        check_shadow_pages(pages)
        check_rmap(pages)
        check_indirect(pages)
        check_protection(state)
        if guest_tables:
            check_guest_tables(pages)
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
    """A non-leaf entry points to a table in use, of the level below, which points back; a direct one to a table of its frame."""
    pages = state.machine.vm.page
    target = state.pfn[state.table].astype(np.int64)
    level = np.broadcast_to(state.level, state.spte.shape)[state.table]
    where = state.index[state.table]
    must(np.isin(target, state.rows), "entry points to a table that is not in use, spte", where)
    must(pages["level"][target] == level - np.uint64(1), "entry points to a table of another level, spte", where)
    direct = ~state.indirect[state.table]
    must(
        pages["gfn"][target[direct]] == state.gfn[state.table][direct],
        "entry points to a table of another frame, spte",
        where[direct],
    )
    parents = [(index, row) for row in state.rows.tolist() for index in spte_list(state.machine, int(pages["parents"][row]))]
    expected = sorted(zip(where.tolist(), target.tolist(), strict=True))
    if sorted(parents) != expected:
        fail("lists of parents and entries that point to tables differ, (spte, table)", sorted(set(parents) ^ set(expected))[:1])
    is_root = state.page["level"] == state.word[VmWord.ROOT_LEVEL]
    must((state.page["parents"] != 0) | is_root | state.shadow, "table of the TDP MMU without a parent", state.rows)


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
    access = state.access[leaf]
    wanted = (access & ACC.X != 0) & ~huge_nx
    must(executable == wanted, "executable under NX huge pages or against the guest, or not executable without reason, spte", where)
    must((access & ACC.W != 0) | ~writable, "writable against the guest, spte", where)
    must((access & ACC.U != 0) == state.has(VmWord.USER)[leaf], "for the user against the guest, or not although, spte", where)


def check_mmio(state: State) -> None:
    """What is not present is nothing, or an MMIO spte of a frame without memslot if its generation is today's."""
    rest = ~state.present & (state.spte != 0)
    mmio = rest & (state.spte & state.word[VmWord.MMIO_MASK] == state.word[VmWord.MMIO_VALUE])
    must(mmio[rest], "neither present nor an MMIO spte, spte", state.index[rest])
    must((np.broadcast_to(state.level, state.spte.shape) == 1)[mmio], "MMIO spte above 4 KiB, spte", state.index[mmio])
    spte = state.spte[mmio]
    frame = (spte & NPT_SPTE.ADDR & ~state.word[VmWord.MMIO_VALUE]) >> np.uint64(12)
    direct = ~state.indirect[mmio]
    must((frame == state.gfn[mmio])[direct], "MMIO spte of another frame, spte", state.index[mmio][direct])
    low, high = (spte & MMIO_SPTE.GENERATION_LOW) >> np.uint64(3), (spte & MMIO_SPTE.GENERATION_HIGH) >> np.uint64(52)
    today = (low | high << np.uint64(8)) == state.word[VmWord.GENERATION] & MMIO_SPTE.GENERATION
    today &= direct  # a sync gives one in an indirect page today's generation whether there is a memslot now or not, as in KVM
    must((state.slot_of(frame) < 0)[today], "MMIO spte of a frame that a memslot holds, spte", state.index[mmio][today])


def check_roots(state: State) -> None:
    """Each root is held by vCPUs as many times as it counts, for themselves or for nested guests."""
    vcpus = state.machine.state
    own = vcpus.own if vcpus.other is None else np.concatenate([vcpus.own, vcpus.other.own])
    held = np.zeros(len(state.machine.vm.page), np.int64)
    for vcpu in own:
        kept = vcpu[VcpuWord.PREVIOUS_ROOT : VcpuWord.PREVIOUS_ROOT + PREVIOUS_ROOTS].tolist()
        for root in roots_of(vcpu) + kept:
            held[root] += root != 0
    must(held[state.rows] == state.page["roots"], "vCPUs that hold a root are not as many as it counts, table", state.rows)
    must(held[state.rows].astype(bool) | (np.delete(held, state.rows).sum() == 0), "a root that is not in use", state.rows)


def roots_of(vcpu: np.ndarray) -> list[int]:
    """The tables in which a vCPU's walks begin, 0 for none."""
    if int(vcpu[VcpuWord.ROOT]) == FOUR_ROOTS:
        return vcpu[VcpuWord.PAE_ROOT : VcpuWord.PAE_ROOT + 4].tolist()
    return [int(vcpu[VcpuWord.ROOT])]


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
    own = machine.state.own[vcpu]
    if int(word[VmWord.REQUESTS + PER_VCPU * vcpu]) & FLUSHING or not own[VcpuWord.ROOT] or own[VcpuWord.IN_NESTED]:
        return  # what a nested guest's entries go through is not in them
    rows, epoch = machine.state.tlb[vcpu, :-1, 1:], machine.state.tlb[vcpu, -1, 0]
    tags, entries = (half.reshape(-1) for half in np.hsplit(rows, 2))
    valid = tags & EPOCH == epoch
    by_gva = word[VmWord.TDP] == 0
    for tag, entry in zip(tags[valid].tolist(), entries[valid].tolist(), strict=True):
        gfn = (entry & int(GPTE64.ADDR)) >> 12
        page = tag & int(PAGE_NUMBER) if by_gva else gfn
        spte, level = lookup(state, vcpu, page)
        if not spte & int(NPT_SPTE.MMU_PRESENT):
            fail(f"vCPU {vcpu}: TLB entry of a frame that is not mapped, gfn", hex(gfn))
        inside = (1 << 9 * (level - 1)) - 1
        if by_gva and (spte & int(NPT_SPTE.ADDR)) >> 12 != gfn & ~inside:
            fail(f"vCPU {vcpu}: TLB entry of another frame than the spte's, gfn", hex(gfn))
        # without CR0.WP a supervisor's write takes U, with SMEP X too: the guest grants both, so nothing is flushed
        lost = by_gva and spte & int(NPT_SPTE.W | NPT_SPTE.U) == int(NPT_SPTE.W)
        if by_gva and entry & int(ACC.U) and not spte & int(NPT_SPTE.U) and not lost:
            fail(f"vCPU {vcpu}: TLB entry for the user, spte not, gfn", hex(gfn))
        if entry & int(DIRTY) and not spte & int(NPT_SPTE.W):
            fail(f"vCPU {vcpu}: TLB entry writable, spte not, gfn", hex(gfn))
        masks = int(word[VmWord.EXECUTE] | word[VmWord.NO_EXECUTE])
        if entry & int(EXECUTE) and spte & masks != int(word[VmWord.EXECUTE]) and not lost:
            fail(f"vCPU {vcpu}: TLB entry executable, spte not, gfn", hex(gfn))


def lookup(state: State, vcpu: int, page: int) -> tuple[int, int]:
    """The lowest entry for a page number, and its level, by the tables that the vCPU walks."""
    own = state.machine.state.own[vcpu]
    level, roots = int(own[VcpuWord.ROOT_LEVEL]), roots_of(own)
    table = roots[page >> 18 & 3] if len(roots) == 4 else roots[0]
    while table:
        spte = int(state.machine.vm.spt[table * TABLE_WORDS + (page >> 9 * (level - 1)) % TABLE_WORDS])
        if not spte & int(NPT_SPTE.MMU_PRESENT) or level == 1 or spte & int(NPT_SPTE.PS):
            return spte, level
        table, level = (spte & int(NPT_SPTE.ADDR)) >> 12, level - 1
    return 0, level
