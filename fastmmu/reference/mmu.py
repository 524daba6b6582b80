"""KVM's two direct MMUs as in Linux 6.1: the TDP MMU and direct shadow pages.

Facts 3 to 9, with the differences of 6.1 that the truth files show. Plain objects instead of bits: an entry of a table is a
`Leaf`, a `Device` (MMIO SPTE) or the next `Table`; a `Place` is a table and the number of an entry in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastmmu.reference.processor import Vcpu
from fastmmu.reference.tables import Device, Fault, Leaf, Slot, Table, path, span
from fastmmu.reference.walk import PFERR_F

HUGEST, GAUGES = 3, {1: "pages_4k", 2: "pages_2m", 3: "pages_1g"}
MIN_FREE, REFILL = 5, 25  # shadow pages, facts 5.7
MMIO_GENERATION = 0x7FFFE  # two address spaces; 19 bits, the lowest names the space (facts 3.4)
FIXED, SPURIOUS, EMULATE = "pf_fixed", "pf_spurious", "pf_emulate"  # answers of the fault handler, by their counters
RETRY = "retry"  # one that is not counted
GOLDEN = 0x61C8864680B583EB  # of the hash of shadow pages: 4096 buckets, by bits 63:52 of the product
Place = tuple[Table, int]


class Mmu:
    """What both MMUs share."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine  # a kvm.Machine
        self.counters = machine.counters
        self.pages: list[Table] = []  # shadow pages, the oldest first; a zapped root in use is no longer here,
        self.used = 0  # but still counted

    def put(self, place: Place, new: Leaf | Device | Table | None) -> None:
        """Replace an entry, with the page gauges."""
        table, index = place
        old = table.entries.pop(index, None)
        if isinstance(new, Leaf) != isinstance(old, Leaf):
            self.counters[GAUGES[table.level]] += 1 if isinstance(new, Leaf) else -1
        if new is not None:
            table.entries[index] = new
        if isinstance(new, Table):
            new.parents.append(place)
        if isinstance(old, Table):
            old.parents.remove(place)
            self.unlinked(old)

    def map(self, vcpu: Vcpu, fault: Fault) -> str:
        """Choose a level, build the path down to it, set the leaf (facts 5.4, 5.9, 5.10).

        As in 6.1 a huge page above the goal is dropped and a table put in its place, and with NX huge pages no table is replaced
        by a huge page, whatever it was made for.
        """
        self.make_available()
        nx = self.machine.nx_huge_pages
        requested = 1 if fault.slot is None or fault.slot.logging else fault.slot.huge_level(fault.gfn, fault.max_level)
        disallowed = nx and bool(fault.code & PFERR_F)
        goal = 1 if disallowed else requested
        for table, index in path(vcpu.roots, fault.gfn):
            entry = table.entries.get(index)
            if nx and table.level == goal > 1 and isinstance(entry, Table):
                goal -= 1
            if table.level == goal:
                break
            if not isinstance(entry, Table):
                child = self.child(table.gfn_of(index), table.level - 1)
                splits = isinstance(entry, Leaf) and self.machine.split_on_fault and isinstance(self, TdpMmu)
                if splits:
                    self.fill(child, entry)
                self.put((table, index), child)
                if entry is not None and not splits:
                    self.machine.flush()
                if disallowed and requested >= table.level and self.machine.npt and not child.nx_split:
                    child.nx_split = True  # facts 3.5; in 6.1 counted only with TDP
                    self.counters["nx_lpage_splits"] += 1
        answer = self.set_leaf((table, index), fault)
        if answer != SPURIOUS:
            self.prefetch((table, index))
        return answer

    def set_leaf(self, place: Place, fault: Fault) -> str:
        """The entry at the goal level (facts 5.10)."""
        table, index = place
        if fault.slot is None:
            self.counters["pf_mmio_spte_created"] += 1
            self.put(place, Device(fault.gfn, self.machine.generation & MMIO_GENERATION))
            return EMULATE
        old = table.entries.get(index)
        new = self.make_leaf(fault.slot, fault.gfn, table.level, old)
        if new == old:
            return SPURIOUS
        self.put(place, new)
        cleans = isinstance(old, Leaf) and old.dirty and not new.dirty  # facts 6.4; W and A are not lost
        if isinstance(old, Table) or (cleans and not isinstance(self, TdpMmu)):  # that one flushes for tables alone (facts 5.4b)
            self.machine.flush()
        return FIXED

    def make_leaf(self, slot: Slot, gfn: int, level: int, old: object, *, prefetch: bool = False) -> Leaf:
        """Facts 3.3. D stays clear where the old entry had its W bit set; an MMIO SPTE has, it keeps the access there."""
        writable = not slot.readonly
        was_writable = old.writable if isinstance(old, Leaf) else isinstance(old, Device)
        if writable:
            self.machine.memory.mark_dirty(gfn)
        executable = level == 1 or not self.machine.nx_huge_pages
        return Leaf(executable, writable, writable, accessed=not prefetch, dirty=writable and not was_writable)

    def prefetch(self, place: Place) -> None:
        """Map neighbours of a page that was mapped: only in shadow pages."""

    def unlinked(self, table: Table) -> None:
        """No entry points to a table any more: a shadow page stays in the hash, with all its entries."""

    def split(self, start: int, end: int) -> None:
        """Eager split: in 6.1 only in the TDP MMU (truth README section 6)."""

    def make_available(self) -> None:
        """Facts 5.7; the TDP MMU uses no shadow pages."""
        free = max(self.machine.nr_mmu_pages - self.used, 0)
        if free < MIN_FREE and self.pages:
            self.zap_oldest(REFILL - free)

    def set_limit(self, limit: int) -> int:
        """A new limit of shadow pages: what is above it is zapped. The limit that results."""
        if self.used <= limit:
            return limit
        self.zap_oldest(self.used - limit)
        return self.used

    def release_roots(self, vcpu: Vcpu) -> None:
        """The vCPU drops its roots; valid ones live on without it."""
        vcpu.roots = []

    def release_obsolete(self, vcpu: Vcpu) -> None:
        """The same of roots that were zapped."""
        if any(root.invalid for root in vcpu.roots):
            self.release_roots(vcpu)

    def tracked(self, gfn: int) -> bool:
        """Whether every write to a page must be emulated."""
        return False

    def table_written(self, vcpu: Vcpu, gpa: int, size: int) -> None:
        """The emulator wrote to memory."""

    def leafs(self, start: int, end: int) -> Iterator[tuple[Place, Leaf]]:
        """All leafs that overlap the pages from `start` to before `end`."""
        for table, index in list(self.entries(start, end)):
            leaf = table.entries.get(index)
            if isinstance(leaf, Leaf):
                yield (table, index), leaf

    def write_protect(self, start: int, end: int, only: set[int] | None = None) -> None:
        """Clear W, not MMU_WRITABLE: in all leafs of a range, or in the 4K leafs of some pages of it."""
        for (table, index), leaf in self.leafs(start, end):
            if only is None or (table.level == 1 and table.gfn_of(index) in only):
                leaf.writable = False

    def protect_huge(self, gfn: int) -> None:
        """Clear W and MMU_WRITABLE in the huge pages that map `gfn`."""
        for (table, _), leaf in self.leafs(gfn, gfn + 1):
            if table.level > 1:
                leaf.writable = leaf.mmu_writable = False

    def unmap(self, start: int, end: int) -> bool:
        """The host took memory away: zap the leafs, leave the tables. Whether there were any."""
        found = [place for place, _ in self.leafs(start, end)]
        for place in found:
            self.put(place, None)
        return bool(found)


class TdpMmu(Mmu):
    """The TDP MMU: one tree for all vCPUs; its tables are not counted as shadow pages."""

    root: Table | None = None  # the MMU itself keeps a reference: it lives until the next "zap all"

    def load_roots(self, vcpu: Vcpu) -> None:
        """Find or make the root."""
        self.root = self.root or Table(0, 4)
        vcpu.roots = [self.root]

    def zap_all(self) -> None:
        """The whole tree goes; a vCPU that still has it drops it before its next entry, so nothing is flushed."""
        if self.root is not None:
            self.unlinked(self.root)
        self.root = None

    def unlinked(self, table: Table) -> None:
        """A table is out of the tree: all below it goes."""
        for index in list(table.entries):
            self.put((table, index), None)
        self.counters["nx_lpage_splits"] -= table.nx_split
        table.invalid = True

    def child(self, gfn: int, level: int) -> Table:
        """An empty table."""
        return Table(gfn, level)

    def entries(self, start: int, end: int, lowest: int = 1) -> Iterator[Place]:
        """Entries that overlap a range of pages."""
        return self.root.visit(start, end, lowest) if self.root is not None else iter(())

    def split(self, start: int, end: int) -> None:
        """Eager split to 4K, if the parameter is on (facts 8.7): children inherit all but a missing X."""
        for table, index in self.entries(start, end, lowest=2) if self.machine.eager_page_split else ():
            huge = table.entries.get(index)
            if not isinstance(huge, Leaf):
                continue
            child = self.child(table.gfn_of(index), table.level - 1)
            self.fill(child, huge)
            self.put((table, index), child)

    def fill(self, child: Table, huge: Leaf) -> None:
        """A table maps what a huge page does."""
        for part in range(512):
            self.put((child, part), replace(huge, executable=huge.executable or child.level == 1))

    def zap_collapsible(self, slot: Slot) -> None:
        """Remove the tables in whose place a huge page could be, each with a flush."""
        for table, index in self.entries(slot.gfn, slot.end, lowest=2):
            if isinstance(table.entries.get(index), Table) and slot.huge_level(table.gfn_of(index)) >= table.level:
                self.put((table, index), None)
                self.machine.flush()


class ShadowMmu(Mmu):
    """Direct shadow pages: kept in a hash by gfn and level, limited in number; a page outlives the entry that points to it."""

    def child(self, gfn: int, level: int) -> Table:
        """Find a shadow page or make it (facts 5.11); a bucket of the hash has the newest first."""
        collisions = 0
        for page in reversed(self.pages):
            if (page.gfn, page.level) == (gfn, level):
                break
            collisions += page.gfn != gfn and not (page.gfn * GOLDEN ^ gfn * GOLDEN) >> 52 & 0xFFF
        else:
            page = Table(gfn, level)
            self.pages.append(page)
            self.used += 1
            self.counters["mmu_cache_miss"] += 1
        self.counters["max_mmu_page_hash_collisions"] = max(self.counters["max_mmu_page_hash_collisions"], collisions)
        return page

    def zap_oldest(self, count: int) -> None:
        """Recycle pages, the oldest first, but no roots in use."""
        chosen = [page for page in self.pages if not page.users][:count]
        self.counters["mmu_recycled"] += len(chosen)
        self.zap(chosen)

    def zap(self, pages: list[Table]) -> None:
        """Zap pages (facts 5.14): a root in use becomes invalid and stays until it is released. One flush if any became free."""
        for page in pages:
            self.counters["mmu_shadow_zapped"] += 1
            for place in [*((page, index) for index in page.entries), *page.parents]:
                self.put(place, None)
            self.counters["nx_lpage_splits"] -= page.nx_split
            if not page.invalid:
                self.pages.remove(page)
            page.invalid = True
            self.used -= not page.users
        if not all(page.users for page in pages):
            self.machine.flush()

    def zap_all(self) -> None:
        """Every page of the VM."""
        self.zap(list(self.pages))

    def load_roots(self, vcpu: Vcpu) -> None:
        """One root, or with guest paging off and no TDP the four of PAE paging, each for 1 GiB."""
        self.make_available()
        vcpu.roots = [self.child(0, 4)] if self.machine.npt else [self.child(number << 18, 2) for number in range(4)]
        for root in vcpu.roots:
            root.users += 1

    def release_roots(self, vcpu: Vcpu) -> None:
        """Valid roots stay in the hash; invalid ones go with their last user."""
        for root in vcpu.roots:
            root.users -= 1
        self.zap([root for root in vcpu.roots if root.invalid and not root.users])
        vcpu.roots = []

    def prefetch(self, place: Place) -> None:
        """Map the other entries of an aligned group of 8, run by run of free ones, each all or none (truth README section 6)."""
        table, faulting = place
        first = faulting - faulting % 8
        run: list[int] = []
        for index in range(first, first + 9 if table.level == 1 else first):
            if index < first + 8 and index != faulting and not isinstance(table.entries.get(index), Leaf):
                run.append(index)
            elif run:
                slot = self.machine.memory.slot_at(table.gfn_of(run[0]))
                if slot is None or slot.logging or slot.readonly or table.gfn_of(run[-1]) >= slot.end:
                    return
                for free in run:
                    self.put((table, free), self.make_leaf(slot, table.gfn_of(free), 1, table.entries.get(free), prefetch=True))
                run = []

    def entries(self, start: int, end: int) -> Iterator[Place]:
        """Entries of all pages, in a tree or not, that overlap a range."""
        for page in self.pages:
            for index in page.entries if page.gfn < end and page.gfn + span(page.level + 1) > start else ():
                if page.gfn_of(index) < end and page.gfn_of(index) + span(page.level) > start:
                    yield page, index

    def zap_collapsible(self, slot: Slot) -> None:
        """Remove the leafs below 1G whose table could be a huge page; one flush."""
        places = [place for place, _ in self.leafs(slot.gfn, slot.end) if place[0].level < min(3, slot.huge_level(place[0].gfn))]
        for place in places:
            self.put(place, None)
        if places:
            self.machine.flush()
