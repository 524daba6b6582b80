"""KVM without nested paging, as in Linux 6.1: shadows of the guest's tables, and direct maps while guest paging is off.

Facts 1, 5, 9; where 6.1 differs from them it is said. `ShadowPages` has what does not depend on the guest's format.
"""

from __future__ import annotations

from fastmmu.paging import Mode
from fastmmu.reference.guest_tables import ACC_ALL, GuestWalk, access_of, format_of, frame_of, walk_tables
from fastmmu.reference.mmu import EMULATE, FIXED, MMIO_GENERATION, RETRY, SPURIOUS, Place
from fastmmu.reference.processor import GuestFault, NotBuilt, Vcpu
from fastmmu.reference.shadow_pages import Role, ShadowPage, ShadowPages, takes_away
from fastmmu.reference.tables import PAGE, Device, Fault, Leaf, Slot, Table, path, span
from fastmmu.reference.walk import ACC_U, ACC_W, ACC_X, ADDR, PFERR_F, PFERR_P, PFERR_RSVD, PFERR_U, PFERR_W, A, D, P

FLOOD = 3  # writes to an upper table, without a use between them, that give it up
GROUP = 8  # entries that a fault maps together


class ShadowPaging(ShadowPages):
    """The MMU of a VM without nested paging."""

    # --- the guest's tables

    def walk(self, vcpu: Vcpu, gva: int, access: int) -> GuestWalk:
        """KVM's walk; a failing one gives the guest a page fault, and drops the translation that is in the way (facts 1.9)."""
        found = walk_tables(vcpu, gva, access)
        if isinstance(found, GuestWalk):
            return found
        self.counters["pf_guest"] += 1
        if found.pferr & (PFERR_P | PFERR_RSVD) == PFERR_P:
            self.invalidate(vcpu, vcpu.roots, gva)
        raise GuestFault(found.pferr, gva)

    def moved(self, vcpu: Vcpu, walk: GuestWalk, level: int) -> bool:
        """Whether the entry of a level is not what the walk saw."""
        gpa, entry = walk.entries[level]
        return self.machine.memory.read(gpa, format_of(vcpu.walker)[0]) != entry

    # --- page faults

    def page_fault(self, vcpu: Vcpu, address: int, code: int) -> str:
        """A fault with guest paging on (facts 5.4c)."""
        machine, walker = self.machine, vcpu.walker
        walk = self.walk(vcpu, address, code & (PFERR_W | PFERR_U | PFERR_F))
        fault = Fault(walk.gfn, code, machine.memory.slot_at(walk.gfn), walk.level, address, walk.access)
        if machine.write_tracked(fault):
            for page, _ in path(vcpu.roots, address // PAGE):
                page.writes = 0
            return EMULATE
        quirk = not walker.write_protect and not code & PFERR_U
        if (walk.access & ACC_W or quirk) and any(
            walk.gfn // span(walk.level) == table // span(walk.level) for table in walk.tables.values()
        ):
            fault.max_level = 1  # 6.1: a page that holds tables of its own path is mapped by 4K
        if answer := machine.without_memory(vcpu, fault):
            return answer
        if quirk and code & PFERR_W and not fault.access & ACC_W and fault.slot is not None:  # facts 1.8
            fault.access = fault.access & ~ACC_U | ACC_W
            if walker.smep:
                fault.access &= ~ACC_X
        return self.map(vcpu, fault, walk)

    def map(self, vcpu: Vcpu, fault: Fault, walk: GuestWalk | None = None) -> str:
        """Shadow the guest's path, go on with direct pages below a huge page of the guest, set the leaf (facts 5.8)."""
        self.make_available()
        if walk is not None and self.moved(vcpu, walk, max(walk.entries)):
            return RETRY
        nx, goal, requested = self.machine.nx_huge_pages, 0, 1
        disallowed = nx and bool(fault.code & PFERR_F)
        for page, index in path(vcpu.roots, fault.address // PAGE):
            entry = page.entries.get(index)
            if walk is not None:
                page.writes = 0
                if page.level > walk.level:
                    if not self.shadow_table(vcpu, (page, index), walk):
                        return RETRY
                    continue
            if not goal:
                if fault.slot is not None and not fault.slot.logging:
                    requested = fault.slot.huge_level(fault.gfn, fault.max_level, +self.shadowed)
                goal = 1 if disallowed else requested
            if nx and page.level == goal > 1 and isinstance(entry, Table):
                goal -= 1
            if page.level == goal:
                break
            if isinstance(entry, ShadowPage) and walk is not None and entry.role.access != fault.access:
                self.put((page, index), None)  # validate_direct_spte: the guest's huge page was clean, or was written with WP=0
                self.machine.flush()
                entry = None
            first = fault.gfn - fault.gfn % span(page.level)
            if not self.leads_to((page, index), first, fault.access, True):
                child = self.child(vcpu, (page, index), first, fault.access, True)
                self.link((page, index), child)
                if disallowed and walk is not None and requested >= page.level and not child.nx_split:
                    child.nx_split = True  # in 6.1 not for direct maps without TDP
                    self.counters["nx_lpage_splits"] += 1
        first, write = fault.gfn - fault.gfn % span(page.level), bool(fault.code & PFERR_W)
        answer = self.set_leaf((page, index), fault.slot, first, fault.access, write=write)
        if answer != SPURIOUS and page.level == 1:
            if page.role.direct:
                self.prefetch((page, index))
            else:
                self.prefetch_group(vcpu, (page, index))
        return answer

    def shadow_table(self, vcpu: Vcpu, place: Place, walk: GuestWalk) -> bool:
        """Link the shadow of the guest's next table; False if the guest's entry is another one now."""
        child, level = None, place[0].level - 1
        if not self.leads_to(place, walk.tables[level], walk.granted[level], False):
            child = self.child(vcpu, place, walk.tables[level], walk.granted[level], False)
            if child.unsync_children:
                self.sync_children(vcpu, child)
        if self.moved(vcpu, walk, level):
            return False
        if child is not None:
            self.link(place, child)
        return True

    def child(self, vcpu: Vcpu, place: Place, gfn: int, access: int, direct: bool) -> ShadowPage:
        """The shadow page to link at an entry (facts 5.11)."""
        return self.find(vcpu, gfn, self.role_below(place, access, direct))

    def role_below(self, place: Place, access: int, direct: bool) -> Role:
        """The role of a page that an entry points to."""
        page, index = place
        role = page.role
        return Role(
            page.level - 1, direct, access, index & 1 if role.half else role.quadrant,
            role.half, role.cr0_wp, role.smep_andnot_wp, role.smap_andnot_wp,
        )  # fmt: skip

    def leads_to(self, place: Place, gfn: int, access: int, direct: bool) -> bool:
        """Whether an entry points to the page wanted: not where the host changed the guest's entry, and KVM was not told."""
        entry = place[0].entries.get(place[1])
        return isinstance(entry, ShadowPage) and entry.gfn == gfn and entry.role == self.role_below(place, access, direct)

    def link(self, place: Place, child: ShadowPage) -> None:
        """An entry becomes a pointer; a huge page or another table that was there goes."""
        page, index = place
        present = isinstance(page.entries.get(index), (Leaf, Table))
        self.put(place, child)
        if present:
            self.machine.flush()
        if child.unsync or child.unsync_children:
            self.mark_unsync(place)

    def set_leaf(
        self, place: Place, slot: Slot | None, gfn: int, access: int, *, write: bool = False, prefetch: bool = False
    ) -> str:
        """An entry at the goal level (facts 5.10)."""
        page, index = place
        old = page.entries.get(index)
        flush = isinstance(old, Table) or (isinstance(old, Leaf) and (slot is None or old.gfn != gfn))
        if flush:
            self.put(place, None)
            old = None
        if slot is None:
            if flush:  # in 6.1 the MMIO SPTE overwrites a leaf and nobody hears of it; here it is dropped
                self.machine.flush()
            self.counters["pf_mmio_spte_created"] += 1
            self.put(place, Device(gfn, self.machine.generation & MMIO_GENERATION, access & (ACC_W | ACC_U)))
            return EMULATE
        new = self.make_leaf(page, slot, gfn, access, old, prefetch=prefetch, can_unsync=True)
        protected = bool(access & ACC_W) and not slot.readonly and not new.writable
        answer = SPURIOUS if new == old else FIXED
        if flush or takes_away(old, new):
            self.machine.flush()
        self.put(place, new)
        return EMULATE if protected and write else answer

    def make_leaf(
        self, page: ShadowPage, slot: Slot, gfn: int, access: int, old: object, *, prefetch: bool, can_unsync: bool
    ) -> Leaf:
        """Facts 3.3. Where the old entry had its W bit (an MMIO SPTE keeps the access there) nothing is asked and D stays clear."""
        was_writable = old.writable if isinstance(old, Leaf) else isinstance(old, Device) and bool(old.access & ACC_W)
        writable = bool(access & ACC_W) and not slot.readonly
        if writable and not was_writable:
            writable = self.may_write(gfn, can_unsync=can_unsync, prefetch=prefetch)
        if writable:
            self.machine.memory.mark_dirty(gfn)
        executable = bool(access & ACC_X) and not (page.level > 1 and self.machine.nx_huge_pages)
        dirty = writable and not was_writable
        return Leaf(executable, writable, writable, not prefetch, dirty, bool(access & ACC_U), gfn, access)

    # --- the neighbours of a page

    def prefetch(self, place: Place) -> None:
        """In a direct page: the other entries of an aligned group, run by run of free ones, each all or none."""
        page, faulting = place
        first, run = faulting - faulting % GROUP, []
        for index in range(first, first + GROUP + 1):
            if index < first + GROUP and index != faulting and not isinstance(page.entries.get(index), Leaf):
                run.append(index)
            elif run:
                slot = self.machine.memory.slot_at(page.gfn_of(run[0]))
                if slot is None or slot.readonly or page.gfn_of(run[-1]) >= slot.end or (slot.logging and page.role.access & ACC_W):
                    return
                for free in run:
                    self.set_leaf((page, free), slot, page.gfn_of(free), page.role.access, prefetch=True)
                run = []

    def prefetch_group(self, vcpu: Vcpu, place: Place) -> None:
        """In an indirect page: the same by the guest's entries, up to the first that cannot be taken."""
        page, faulting = place
        first = faulting - faulting % GROUP
        gptes = {index: self.gpte(vcpu, page, index) for index in range(first, first + GROUP)}
        for index, gpte in gptes.items():
            if index == faulting or isinstance(page.entries.get(index), Leaf):
                continue
            if not self.prefetch_gpte(vcpu, (page, index), gpte, logged=False):
                return

    def prefetch_gpte(self, vcpu: Vcpu, place: Place, gpte: int, *, logged: bool) -> bool:
        """Map what a guest's entry points to, if the guest used it before; writable in a slot that logs only if `logged`."""
        page, _ = place
        if self.useless(vcpu, gpte):
            self.put(place, None)
            return False
        gfn, access = self.target(vcpu, page, gpte)
        slot = self.machine.memory.slot_at(gfn)
        if slot is None or slot.readonly or (slot.logging and access & ACC_W and not logged):
            return False
        self.set_leaf(place, slot, gfn, access, prefetch=True)
        return True

    def gpte(self, vcpu: Vcpu, page: ShadowPage, index: int) -> int:
        """The guest's entry behind one of a 4K table."""
        size = format_of(vcpu.walker)[0]
        return self.machine.memory.read(page.gfn * PAGE + size * (page.role.quadrant * 512 + index), size)

    def useless(self, vcpu: Vcpu, gpte: int) -> bool:
        """Not present, never used, or reserved."""
        return not gpte & P or not gpte & A or vcpu.walker.reserved(1, gpte)

    def target(self, vcpu: Vcpu, page: ShadowPage, gpte: int) -> tuple[int, int]:
        """Page and access of a 4K entry; without D it is not writable."""
        access = page.role.access & access_of(vcpu.walker, gpte)
        return frame_of(vcpu.walker, gpte, 1) // PAGE, access if gpte & D else access & ~ACC_W

    # --- sync

    def sync_page(self, vcpu: Vcpu, page: ShadowPage) -> bool:
        """Rebuild a 4K table from the guest's (facts 5.12.4): whether that needs a flush. It always can be read: without its slot
        the page would be gone.

        6.1 rebuilds every leaf, also where the access is what it was, as a prefetch does: A is lost, and D if it was writable.
        """
        flush = False
        for index, old in sorted(page.entries.items()):
            gpte = self.gpte(vcpu, page, index)
            gfn, access = self.target(vcpu, page, gpte)
            if self.useless(vcpu, gpte):
                self.put((page, index), None)
                flush = True
            elif isinstance(old, Device):
                same = Device(gfn, self.machine.generation & MMIO_GENERATION, access & (ACC_W | ACC_U))
                self.put((page, index), same if gfn == old.gfn else None)
            elif gfn != old.gfn:
                self.put((page, index), None)
                flush = True
            else:
                slot = self.machine.memory.slot_at(gfn)
                new = self.make_leaf(page, slot, gfn, access, old, prefetch=True, can_unsync=False)
                self.put((page, index), new)
                flush = flush or takes_away(old, new)
        return flush

    def sync_roots(self, vcpu: Vcpu) -> None:
        """Sync all below the current roots; the device page is forgotten (facts 4.5)."""
        if vcpu.shadowing and vcpu.roots:
            self.forget_device(vcpu)
            for root in vcpu.roots:
                if root is not None:
                    self.sync_children(vcpu, root)

    def forget_device(self, vcpu: Vcpu, page: int | None = None) -> None:
        """The gva of the last device page, or of this page, says nothing any more."""
        if vcpu.device is not None and page in (None, vcpu.device.page):
            vcpu.device = type(vcpu.device)(0, vcpu.device.gfn, vcpu.device.access, vcpu.device.generation)

    def invalidate(self, vcpu: Vcpu, roots: list[Table | None], gva: int) -> None:
        """Drop one translation, and fetch it again, if its table is unsync (facts 9.4, as up to 6.3)."""
        self.forget_device(vcpu, gva // PAGE)
        for page, index in path(roots, gva // PAGE) if roots else ():
            entry = page.entries.get(index)
            if page.level == 1 or isinstance(entry, Leaf):
                if page.unsync:
                    self.put((page, index), None)
                    if isinstance(entry, Leaf):
                        self.machine.flush()
                    self.prefetch_gpte(vcpu, (page, index), self.gpte(vcpu, page, index), logged=True)
                return
            if not page.unsync_children:
                return

    def table_written(self, vcpu: Vcpu, gpa: int, size: int) -> None:
        """An emulated write, perhaps to a shadowed table (facts 5.13)."""
        if not +self.shadowed:
            return
        if vcpu.walker.paging and vcpu.walker.pae and size == 4:
            gpa, size = gpa & ~7, 8
        gentry = self.machine.memory.load(gpa, size) if size in (4, 8) else 0
        self.counters["mmu_pte_write"] += 1
        freed: list[ShadowPage] = []
        flush = False
        for page in self.shadows(gpa // PAGE):
            width = 4 if page.role.half else 8
            offset = gpa % PAGE
            odd = (size < 4 or (offset ^ offset + size - 1) & -width) and not (size == 1 and not offset % width)
            page.writes += page.level > 1 and not odd
            if odd or (page.level > 1 and page.writes >= FLOOD):
                self.prepare_zap(page, freed)
                self.counters["mmu_flooded"] += 1
                continue
            for index in self.written(page, offset):
                old = page.entries.get(index)
                self.put((page, index), None)
                self.counters["mmu_pde_zapped"] += bool(gentry) and page.level > 1
                flush = flush or isinstance(old, Leaf | Table)
        if not self.commit_zap(freed) and flush:
            self.machine.flush()

    def written(self, page: ShadowPage, offset: int) -> list[int]:
        """Entries of a shadow page that come from a place in the guest's table."""
        if not page.role.half:
            return [offset // 8]
        number = offset // 4 * (2 if page.level == 2 else 1)  # a 4M entry is two of 2M
        if number // 512 != page.role.quadrant:
            return []
        return [number % 512, number % 512 + 1] if page.level == 2 else [number % 512]

    # --- roots

    def root_role(self, vcpu: Vcpu, level: int = 2, quadrant: int = 0) -> Role:
        """Of the vCPU's mode (facts 5.11)."""
        walker = vcpu.walker
        if not walker.paging:
            return Role(level, direct=True)
        no_wp = not walker.write_protect
        return Role(
            level, False, ACC_ALL, quadrant, not walker.pae, walker.write_protect, walker.smep and no_wp, walker.smap and no_wp
        )

    def load_roots(self, vcpu: Vcpu) -> None:
        """Find or make the roots: one, or four of 1 GiB each; then sync them (facts 9.1)."""
        self.make_available()
        mode, table = vcpu.cpu.mode, frame_of(vcpu.walker, vcpu.cpu.cr3, 1) // PAGE
        if mode in (Mode.LONG4, Mode.LONG5):
            wanted = [(table, self.root_role(vcpu, int(mode)))]
        elif mode == Mode.PAE:
            wanted = [((pdpte & ADDR) // PAGE, self.root_role(vcpu)) if pdpte & P else None for pdpte in vcpu.pdptes]
        elif mode == Mode.TWO_LEVEL:
            wanted = [(table, self.root_role(vcpu, quadrant=number)) for number in range(4)]
        else:
            wanted = [(number << 18, self.root_role(vcpu)) for number in range(4)]
        roots: list[Table | None] = []
        for one in wanted:
            if one is not None and vcpu.shadowing and self.machine.memory.slot_at(one[0]) is None:
                raise NotBuilt("CR3 outside memory: a triple fault")
            roots.append(None if one is None else self.find(vcpu, *one))
            if roots[-1] is not None:
                roots[-1].users += 1
        vcpu.roots, vcpu.root_cr3 = roots, vcpu.cpu.cr3
        self.sync_roots(vcpu)

    def drop(self, roots: list[Table | None]) -> None:
        """A vCPU does not keep these roots any more; those that were zapped go with their last user."""
        freed: list[ShadowPage] = []
        for root in roots:
            if root is not None:
                root.users -= 1
                if root.invalid and not root.users:
                    self.prepare_zap(root, freed)
        self.commit_zap(freed)

    def release_roots(self, vcpu: Vcpu) -> None:
        """The MMU is set up anew: also the roots that were kept go."""
        roots = [kept[1] for kept in vcpu.previous if kept is not None] + vcpu.roots
        vcpu.roots, vcpu.previous = [], [None] * 3
        self.drop(roots)
        self.forget_device(vcpu)

    def release_obsolete(self, vcpu: Vcpu) -> None:
        """Roots that were zapped; the four of PAE paging always."""
        dropped = [kept[1] for kept in vcpu.previous if kept is not None and kept[1].invalid]
        vcpu.previous = [None if kept is None or kept[1].invalid else kept for kept in vcpu.previous]
        if len(vcpu.roots) == 4 or any(root.invalid for root in vcpu.roots):
            dropped, vcpu.roots = dropped + vcpu.roots, []
        self.drop(dropped)

    def new_cr3(self, vcpu: Vcpu, cr3: int) -> None:
        """MOV to CR3 (facts 9.1): look among the roots that were kept."""
        if vcpu.cpu.mode == Mode.PAE:
            pdptes = vcpu.kvm_walker.load_pdptes(cr3)
            if pdptes != vcpu.pdptes:
                self.drop_current(vcpu)
            vcpu.pdptes = pdptes
        if cr3 == vcpu.cpu.cr3:
            return
        if len(vcpu.roots) == 4:
            self.drop_current(vcpu)
        kept = [(vcpu.root_cr3, vcpu.roots[0]) if vcpu.roots else None, *vcpu.previous]
        role = self.root_role(vcpu, int(vcpu.cpu.mode))
        hit = next((i for i, one in enumerate(kept) if one is not None and self.usable(one, cr3, role)), None)
        if hit is None:
            if kept[0] is None:
                return
            oldest = kept.pop()
            vcpu.roots, vcpu.previous = [], kept
            self.drop([oldest[1]] if oldest is not None else [])
            return
        had_current, found = kept[0] is not None, kept.pop(hit)
        vcpu.root_cr3, vcpu.roots = found[0], [found[1]]
        vcpu.previous = kept if had_current else [*kept[1:], None]
        self.forget_device(vcpu)
        found[1].writes = 0

    def usable(self, kept: tuple[int, Table], cr3: int, role: Role) -> bool:
        """Whether a root is the one for a CR3."""
        return kept[0] == cr3 and not kept[1].invalid and kept[1].role == role

    def drop_current(self, vcpu: Vcpu) -> None:
        """Only the current root."""
        roots, vcpu.roots = vcpu.roots, []
        self.drop(roots)
