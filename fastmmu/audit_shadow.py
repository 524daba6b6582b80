"""The audit of shadow pages: hash, list and reverse map; and of those that follow the guest's tables: do they, and may nobody write
those tables unseen (facts 5.11 to 5.14)?"""

from __future__ import annotations

import numpy as np

from fastmmu.audit_state import State, fail, must, spte_list
from fastmmu.bits import ACC, CR4, EPT, GPTE64, NPT_SPTE, ROLE
from fastmmu.machine_state import HASH_BUCKETS, TABLE_WORDS, SlotFlag, SplitAccess, VcpuWord, VmWord


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
    slot = state.slot_of(state.gfn[state.leaf])
    level = np.broadcast_to(state.level, state.spte.shape)[state.leaf]
    shift = np.uint64(9) * (level - np.uint64(1))
    rows = state.slots[slot]
    at = rows["rmap"][np.arange(len(rows)), level.astype(np.int64)] + (state.gfn[state.leaf] >> shift) - (rows["base"] >> shift)
    expected = set(zip(at.tolist(), state.index[state.leaf].tolist(), strict=True))
    found = []
    for one in state.slots:
        base, pages = int(one["base"]), int(one["pages"])
        for height in (1, 2, 3):
            start = int(one["rmap"][height])
            heads = state.machine.vm.slot_words[
                start : start + (base + pages - 1 >> 9 * (height - 1)) - (base >> 9 * (height - 1)) + 1
            ]
            for frame in np.flatnonzero(heads).tolist():
                found += [(start + frame, index) for index in spte_list(state.machine, int(heads[frame]))]
    if len(found) != len(expected) or set(found) != expected:
        fail("reverse map and leaves differ, (word, spte)", sorted(set(found) ^ expected)[:1] or "an spte twice")


def check_indirect(state: State) -> None:
    """All of it that concerns shadow pages of the guest's tables, but for what those tables say."""
    role = state.page["role"].astype(np.uint64)
    indirect = role & (ROLE.DIRECT | ROLE.INVALID) == 0
    unsync = state.page["unsync"] != 0
    if int(indirect.sum()) != int(state.word[VmWord.INDIRECT_PAGES]):
        fail("shadow pages of guest tables", f"{int(indirect.sum())}, counted {int(state.word[VmWord.INDIRECT_PAGES])}")
    identities = list(zip(state.page["gfn"][indirect].tolist(), role[indirect].tolist(), strict=True))
    if len(set(identities)) != len(identities):
        fail("two shadow pages with one identity", "(gfn, role)")
    must(~unsync | (indirect & (state.page["level"] == 1)), "unsync, but no page of a leaf table, table", state.rows)
    check_huge_pages(state, indirect)
    check_unsync(state, unsync)


def check_guest_tables(state: State) -> None:
    """Each page that is in step says what the guest's table says; but KVM does not see all that is written where it did not ask."""
    if state.word[VmWord.UNASKED]:
        return
    role = state.page["role"].astype(np.uint64)
    for at in np.flatnonzero((role & (ROLE.DIRECT | ROLE.INVALID) == 0) & (state.page["unsync"] == 0)).tolist():
        check_entries(state, at)


def check_huge_pages(state: State, indirect: np.ndarray) -> None:
    """Every shadowed table counts against huge pages over it, beside a slot's ragged ends and a host address out of step."""
    gfns = state.page["gfn"][indirect]
    for slot in state.slots:
        base, end = int(slot["base"]), int(slot["base"] + slot["pages"])
        inside = gfns[(gfns >= slot["base"]) & (gfns < slot["base"] + slot["pages"])]
        for level in (2, 3):
            shift = 9 * (level - 1)
            frames = (end - 1 >> shift) - (base >> shift) + 1
            first = int(slot["disallow"][level])
            expected = np.bincount((inside >> np.uint64(shift)).astype(np.int64) - (base >> shift), minlength=frames)
            expected[0] += base % (1 << shift) != 0
            expected[-1] += end % (1 << shift) != 0
            rest = state.machine.vm.slot_words[first : first + frames].astype(np.int64) - expected
            if len(set(rest.tolist())) != 1 or rest[0] not in (0, 1):
                fail(
                    f"memslot {int(slot['id'])}: counts against huge pages of level {level}, beyond those known",
                    sorted(set(rest.tolist())),
                )


def check_unsync(state: State, unsync: np.ndarray) -> None:
    """The gauge counts unsync pages; each is found from every page above it, by the bits of the entries that lead there."""
    gauge = state.machine.counters()["mmu_unsync"]
    if int(unsync.sum()) != gauge:
        fail("mmu_unsync", f"{gauge}, but {int(unsync.sum())} pages are")
    bits = np.unpackbits(state.page["unsync_entries"].copy().view(np.uint8).reshape(-1, 64), axis=1, bitorder="little")
    must(bits.sum(axis=1) == state.page["unsync_children"], "entries marked unsync are not as many as counted, table", state.rows)
    marked = unsync | (state.page["unsync_children"] > 0)
    of_row = np.zeros(len(state.machine.vm.page), bool)
    of_row[state.rows] = marked
    leads = of_row[state.pfn[state.table].astype(np.int64)]
    must(
        bits[state.table].astype(bool) | ~leads, "entry leads to an unsync page, and is not marked, spte", state.index[state.table]
    )


def check_protection(state: State) -> None:
    """Nothing maps a table writably whose pages are in step, nor could be made to without asking."""
    if state.word[VmWord.UNASKED]:
        return
    role = state.page["role"].astype(np.uint64)
    synced = state.shadow & (role & (ROLE.DIRECT | ROLE.INVALID) == 0) & (state.page["unsync"] == 0)
    may = (state.spte & NPT_SPTE.W != 0) | state.has(VmWord.MMU_WRITABLE)
    writable = state.leaf & may
    gfn, index = state.gfn[writable], state.index[writable]
    pages = np.broadcast_to(state.pages, state.spte.shape)[writable]
    tables = np.sort(state.page["gfn"][synced])
    at = np.searchsorted(tables, gfn)
    covered = at < len(tables)
    covered[covered] = tables[at[covered]] < (gfn + pages)[covered]
    must(~covered, "a shadowed table can be written, spte", index)


def guest_entries(state: State, page: np.void) -> np.ndarray:
    """The guest's entries that a shadow page follows, one for each of its own: of a 4-byte directory each stands twice."""
    words, start, role = state.machine.memory.words, int(page["gfn"]) * TABLE_WORDS, int(page["role"])
    if not role & int(ROLE.FOUR_BYTE_GPTE):
        return words[start : start + TABLE_WORDS]
    halves = words.view(np.uint32)[2 * start : 2 * start + 2 * TABLE_WORDS].astype(np.uint64)
    quadrant = (role & int(ROLE.QUADRANT)) >> 5
    if page["level"] == 2:
        return halves[256 * quadrant : 256 * quadrant + 256].repeat(2)
    return halves[TABLE_WORDS * quadrant : TABLE_WORDS * (quadrant + 1)]


def of_ept(entries: np.ndarray, flags: bool) -> np.ndarray:
    """What entries of a hypervisor's EPT say, as ordinary ones: R as U, X as no NX; without flags A and D are as if set."""
    gptes = entries & (GPTE64.ADDR | GPTE64.PS | GPTE64.W)
    for bit, there in ((EPT.R | EPT.W | EPT.X, GPTE64.P), (EPT.R, GPTE64.U), (EPT.A, GPTE64.A), (EPT.D, GPTE64.D)):
        gptes |= np.where((entries & bit != 0) | (not flags and bit in (EPT.A, EPT.D)), there, np.uint64(0))
    return gptes | np.where(entries & EPT.X == 0, GPTE64.NX, np.uint64(0))


def rights(gptes: np.ndarray) -> np.ndarray:
    """ACC form of entries."""
    return (gptes & (ACC.W | ACC.U)) | np.where(gptes & GPTE64.NX == 0, ACC.X, np.uint64(0))


def check_entries(state: State, at: int) -> None:
    """The entries of a page that is in step say what the guest's say now. A leaf may grant less: until a write sets D, say."""
    page, spte, index = state.page[at], state.spte[at], state.index[at]
    level, role, pages = int(page["level"]), np.uint64(page["role"]), state.machine.vm.page
    gptes = guest_entries(state, page)
    if state.machine.kvm.ept:
        bad = gptes & (EPT.R | EPT.W) == EPT.W
        must(~bad | (spte == 0), "spte where the hypervisor's entry is misconfigured", index)
        gptes = of_ept(gptes, state.machine.kvm.ad)
    granted = rights(gptes) & ((role & ROLE.ACCESS) >> np.uint64(8))
    large = (gptes & GPTE64.PS != 0) & (level > 1)
    if role & ROLE.FOUR_BYTE_GPTE:
        large &= bool((state.machine.state.own[:, VcpuWord.CR4] & CR4.PSE).any())
    frame = (gptes & GPTE64.ADDR) >> np.uint64(12)
    if role & ROLE.FOUR_BYTE_GPTE and level == 2:
        frame = np.where(large, (gptes >> np.uint64(22) << np.uint64(10)) | (gptes & np.uint64(0x1E000)) << np.uint64(7), frame)
        frame += large * (np.arange(TABLE_WORDS, dtype=np.uint64) & np.uint64(1)) * np.uint64(512)
    elif level > 1:
        frame = np.where(large, frame & ~np.uint64((1 << 9 * (level - 1)) - 1), frame)
    used = spte != 0
    slot = state.slot_of(page["gfn"][None])[0]
    readonly = slot >= 0 and state.slots[slot]["flags"] & np.uint64(SlotFlag.READONLY)
    accessed = GPTE64.P | (np.uint64(0) if readonly else GPTE64.A)  # in read-only memory A cannot be set
    must((gptes & accessed == accessed)[used], "spte where the guest's entry is not present or never accessed", index[used])
    leaf, table, mmio = state.leaf[at], state.table[at], used & ~state.present[at]
    must(state.gfn[at][leaf] == frame[leaf], "leaf maps another frame than the guest's entry, spte", index[leaf])
    must((large | (level == 1))[leaf], "leaf where the guest has a table, spte", index[leaf])
    check_rights(state.access[at][leaf], granted[leaf], role, index[leaf])
    must(
        ((spte & NPT_SPTE.ADDR & ~NPT_SPTE.MMIO) >> np.uint64(12) == frame)[mmio],
        "MMIO spte of another frame than the guest's",
        index[mmio],
    )
    child = pages[state.pfn[at][table].astype(np.int64)]
    child_role = child["role"].astype(np.uint64)
    must(
        (child_role & ROLE.DIRECT != 0) == large[table],
        "direct page under a table of the guest, or the opposite, spte",
        index[table],
    )
    must(child["gfn"] == frame[table], "entry points to another table than the guest's, spte", index[table])
    child_access, pointer = (child_role & ROLE.ACCESS) >> np.uint64(8), ~large[table]
    must(
        (child_access == granted[table])[pointer],
        "page of a table with other rights than the guest grants, spte",
        index[table][pointer],
    )
    propagates = state.word[VmWord.SPLIT_ACCESS] == np.uint64(SplitAccess.PROPAGATE)
    less = ACC.W | ACC.X if propagates else ACC.W
    check_rights(child_access[~pointer], granted[table][~pointer], role, index[table][~pointer], less)


def check_rights(
    kept: np.ndarray, granted: np.ndarray, role: np.uint64, index: np.ndarray, less: np.uint64 = ACC.W
) -> None:
    """Rights kept of a leaf are the guest's, those of `less` perhaps left out: W, or what a huge spte did not have when its rights
    were propagated. Without CR0.WP a supervisor's page may have W instead of U."""
    same = (kept | less) == (granted | less)
    supervisor = (kept & (ACC.W | ACC.U) == ACC.W) & (role & ROLE.CR0_WP == 0)
    must(same & (kept & less & ~granted == 0) | supervisor, "rights kept are not the guest's, spte", index)
