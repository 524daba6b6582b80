"""Shadow pages of KVM without nested paging, as in Linux 6.1: the hash, what they protect, unsync, zapping, rmap lists.

Facts 5.7, 5.10 to 5.14, 6.4, 7, 9; how 6.1 differs is in the truth README, section 6.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastmmu.reference.guest_tables import ACC_ALL
from fastmmu.reference.mmu import GOLDEN, Mmu, Place
from fastmmu.reference.processor import Vcpu
from fastmmu.reference.tables import Leaf, Slot, Table, span

BATCH = 16  # pages that one walk over unsync pages collects
RMAP_LIMIT = 1000  # a longer list is zapped


@dataclass(frozen=True)
class Role:
    """What tells shadow pages of a gfn apart (facts 5.11); what is constant without nested paging is left out."""

    level: int
    direct: bool = False
    access: int = ACC_ALL
    quadrant: int = 0
    half: bool = False  # the guest's entries have 4 bytes
    cr0_wp: bool = False
    smep_andnot_wp: bool = False
    smap_andnot_wp: bool = False


@dataclass(eq=False)
class ShadowPage(Table):
    """One shadow page; `gfn` is the guest table's, or of a direct page the first that it maps."""

    role: Role = Role(1)
    unsync: bool = False
    unsync_children: set[int] = field(default_factory=set)  # entries under which there may be unsync pages
    writes: int = 0  # since it was last used: a table written often is given up


class Batch:
    """Up to 16 pages on the way to unsync pages below `top`, as KVM collects them."""

    def __init__(self, top: ShadowPage) -> None:
        self.pages: list[tuple[ShadowPage, int]] = [(top, -1)]
        self.found = bool(top.unsync_children) and self.visit(top) != 0

    def add(self, page: ShadowPage, index: int) -> bool:
        """One more; False if there is no more room."""
        if not (page.unsync and any(page is other for other, _ in self.pages)):
            self.pages.append((page, index))
        return len(self.pages) < BATCH

    def visit(self, page: ShadowPage) -> int:
        """Unsync pages below `page`, or -1 if the batch is full; marks that are out of date go."""
        count = 0
        for index in sorted(page.unsync_children):
            child = page.entries.get(index)
            if isinstance(child, ShadowPage) and child.unsync_children:
                if not self.add(child, index):
                    return -1
                below = self.visit(child)
                if below < 0:
                    return -1
                if not below:
                    page.unsync_children.discard(index)
                count += below
            elif isinstance(child, ShadowPage) and child.unsync:
                count += 1
                if not self.add(child, index):
                    return -1
            else:
                page.unsync_children.discard(index)
        return count

    def leafs(self) -> Iterator[tuple[ShadowPage, list[Place]]]:
        """The 4K tables among the pages, each with the entries that lead to it, from below."""
        parents: dict[int, ShadowPage] = {}
        indexes: dict[int, int] = {}
        for page, index in self.pages:
            indexes[page.level] = index
            if page.level > 1:
                parents[page.level - 1] = page
            else:
                yield page, [(parents[level], indexes[level]) for level in sorted(parents)]


def clear_marks(way: list[Place]) -> None:
    """An unsync page is none any more: so for its parents, up to the first with others."""
    for parent, index in way:
        parent.unsync_children.discard(index)
        if parent.unsync_children:
            return


def takes_away(old: object, new: Leaf) -> bool:
    """Whether a change of a leaf needs a flush (facts 6.4)."""
    if not isinstance(old, Leaf):
        return False
    return (old.mmu_writable and not new.writable) or (old.accessed and not new.accessed) or (old.dirty and not new.dirty)


class ShadowPages(Mmu):
    """All shadow pages of a VM, indirect and direct ones, and the lists of leafs that map a page."""

    def __init__(self, machine: Any) -> None:
        super().__init__(machine)
        self.rmap: dict[tuple[int, int], list[Place]] = {}  # by level and gfn
        self.write_tracked: Counter[int] = Counter()  # gfns of shadowed upper tables
        self.shadowed: Counter[int] = Counter()  # of all shadowed tables

    def put(self, place: Place, new: Any) -> None:
        """Also keeps the rmap lists; one that gets too long is zapped (facts 5.14)."""
        table, index = place
        old = table.entries.get(index)
        super().put(place, new)
        if isinstance(old, Leaf) and not (isinstance(new, Leaf) and new.gfn == old.gfn):
            self.rmap[table.level, old.gfn].remove(place)
        elif isinstance(old, Leaf):
            return
        if isinstance(new, Leaf):
            mapped = self.rmap.setdefault((table.level, new.gfn), [])
            before = len(mapped)
            mapped.append(place)
            self.counters["max_mmu_rmap_size"] = max(self.counters["max_mmu_rmap_size"], before)
            if before > RMAP_LIMIT:
                for one in list(mapped):
                    self.put(one, None)
                self.machine.flush()

    def shadows(self, gfn: int) -> list[ShadowPage]:
        """Shadows of a guest table, the newest first."""
        return [page for page in reversed(self.pages) if page.gfn == gfn and not page.role.direct] if self.shadowed[gfn] else []

    def tracked(self, gfn: int) -> bool:
        """Whether an upper table of the guest is in this page: it never becomes unsync."""
        return self.write_tracked[gfn] > 0

    # --- the hash

    def find(self, vcpu: Vcpu, gfn: int, role: Role) -> ShadowPage:
        """Find a shadow page or make it (facts 5.11)."""
        collisions, freed, found = 0, [], None
        for page in list(reversed(self.pages)):
            if page.gfn != gfn:
                collisions += not (page.gfn * GOLDEN ^ gfn * GOLDEN) >> 52 & 0xFFF
            elif page.role != role:
                if role.level > 1 and page.unsync:
                    self.prepare_zap(page, freed)
            else:
                found = page
                break
        if found is not None and not role.direct:
            if found.unsync and self.sync_page(vcpu, found):  # it stays unsync, and its gfn writable
                self.machine.flush()
            found.writes = 0
        self.counters["mmu_cache_miss"] += found is None
        self.commit_zap(freed)
        self.counters["max_mmu_page_hash_collisions"] = max(self.counters["max_mmu_page_hash_collisions"], collisions)
        return found if found is not None else self.make(gfn, role)

    def make(self, gfn: int, role: Role) -> ShadowPage:
        """A new one: the guest's table is write-protected, and in no huge page."""
        page = ShadowPage(gfn, role.level, role=role)
        self.pages.append(page)
        self.used += 1
        if not role.direct:
            self.shadowed[gfn] += 1
            self.write_tracked[gfn] += role.level > 1
            if self.protect_table(gfn):
                self.machine.flush()
        return page

    def protect_table(self, gfn: int) -> bool:
        """Take W and MMU_WRITABLE from all leafs of all sizes whose list a page is on; whether that needs a flush."""
        flush = False
        for level in (1, 2, 3):
            for table, index in self.rmap.get((level, gfn - gfn % span(level)), ()):
                leaf = table.entries[index]
                flush = flush or leaf.mmu_writable
                leaf.writable = leaf.mmu_writable = False
        return flush

    def sync_page(self, vcpu: Vcpu, page: ShadowPage) -> bool:
        """Rebuild a page from the guest's table; whether that needs a flush."""
        raise TypeError("a subclass has it")

    # --- unsync

    def may_write(self, gfn: int, *, can_unsync: bool, prefetch: bool) -> bool:
        """Whether a leaf of a page may become writable; leaf tables that are shadowed there become unsync (facts 5.12)."""
        if self.tracked(gfn):
            return False
        for page in self.shadows(gfn):
            if not can_unsync:
                return False
            if page.unsync:
                continue
            if prefetch:
                return False
            page.unsync = True
            self.counters["mmu_unsync"] += 1
            for parent in page.parents:
                self.mark_unsync(parent)
        return True

    def mark_unsync(self, place: Place) -> None:
        """Below this entry something is unsync; parents hear it once."""
        page, index = place
        if index in page.unsync_children:
            return
        page.unsync_children.add(index)
        if len(page.unsync_children) == 1:
            for parent in page.parents:
                self.mark_unsync(parent)

    def end_unsync(self, page: ShadowPage) -> None:
        """A page is not unsync any more."""
        page.unsync = False
        self.counters["mmu_unsync"] -= 1

    def sync_children(self, vcpu: Vcpu, top: ShadowPage) -> None:
        """Sync all below a page, batch by batch (facts 5.12)."""
        flush = False
        while (batch := Batch(top)).found:
            if any([self.protect_table(page.gfn) for page, _ in batch.leafs()]):
                self.machine.flush()
                flush = False
            for page, way in batch.leafs():
                self.end_unsync(page)
                flush = self.sync_page(vcpu, page) or flush
                clear_marks(way)
        if flush:
            self.machine.flush()

    # --- zapping

    def prepare_zap(self, page: ShadowPage, freed: list[ShadowPage]) -> int:
        """Take a page out of everything (facts 5.14): unsync pages below it go first. How many pages that were."""
        self.counters["mmu_shadow_zapped"] += 1
        zapped = 0
        while page.level > 1 and (batch := Batch(page)).found:
            for child, way in batch.leafs():
                self.prepare_zap(child, freed)
                clear_marks(way)
                zapped += 1
        for place in [*((page, index) for index in page.entries), *page.parents]:
            self.put(place, None)
        if not page.invalid:
            self.pages.remove(page)
            if not page.role.direct:
                self.shadowed[page.gfn] -= 1
                self.write_tracked[page.gfn] -= page.level > 1
        if page.unsync:
            self.end_unsync(page)
        if not page.users:
            zapped += 1
            self.used -= 1
            freed.append(page)
        elif not page.invalid:
            for vcpu in self.machine.vcpus.values():
                vcpu.free_roots_requested = True
        self.counters["nx_lpage_splits"] -= page.nx_split
        page.nx_split, page.invalid = False, True
        return zapped

    def commit_zap(self, freed: list[ShadowPage]) -> bool:
        """Pages are freed after a flush; whether there were any."""
        if freed:
            self.machine.flush()
        return bool(freed)

    def zap_oldest(self, count: int) -> None:
        """Recycle pages, the oldest first, but no roots in use; those zapped with another count (facts 5.7)."""
        freed: list[ShadowPage] = []
        total = 0
        while total < count and (page := next((page for page in self.pages if not page.users), None)) is not None:
            total += self.prepare_zap(page, freed)
        self.counters["mmu_recycled"] += total
        self.commit_zap(freed)

    def zap_all(self) -> None:
        """Every page of the VM."""
        freed: list[ShadowPage] = []
        while self.pages:
            self.prepare_zap(self.pages[0], freed)
        self.commit_zap(freed)

    # --- dirty logging, and the host's memory

    def leafs(self, start: int, end: int) -> Iterator[tuple[Place, Leaf]]:
        """All leafs on the lists of some pages, of all sizes."""
        for (level, gfn), places in list(self.rmap.items()):
            for table, index in list(places) if gfn < end and gfn + span(level) > start else ():
                leaf = table.entries.get(index)
                if isinstance(leaf, Leaf):
                    yield (table, index), leaf

    def write_protect(self, start: int, end: int, only: set[int] | None = None) -> None:
        """Clear W, not MMU_WRITABLE."""
        for (table, _), leaf in self.leafs(start, end):
            if only is None or (table.level == 1 and leaf.gfn in only):
                leaf.writable = False

    def zap_collapsible(self, slot: Slot) -> None:
        """Remove leafs of direct pages that a huge page could replace; one flush. The others follow the guest's tables."""
        places = []
        for (page, index), _ in self.leafs(slot.gfn, slot.end):
            if page.role.direct and page.level < slot.huge_level(page.gfn, forbidden=+self.shadowed):
                places.append((page, index))
        for place in places:
            self.put(place, None)
        if places:
            self.machine.flush()
