"""A VM of Linux 6.1's KVM: memslots, dirty logs, vCPUs, the begin and the end of a page fault, the emulator, and all counters.

Facts 3 to 9, with the differences of 6.1 that the truth files show. The MMUs are in `mmu` and `shadow`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fastmmu.bits import CR0
from fastmmu.paging import Mode
from fastmmu.reference.guest_tables import GuestWalk, walk_tables
from fastmmu.reference.mmu import EMULATE, FIXED, HUGEST, MMIO_GENERATION, RETRY, SPURIOUS, ShadowMmu, TdpMmu
from fastmmu.reference.processor import (
    EXCHANGE,
    GUEST_PAGE,
    OFFSET,
    GuestFault,
    Hardware,
    NestedFault,
    NotBuilt,
    Operand,
    Outcome,
    Vcpu,
)
from fastmmu.reference.shadow import ShadowPaging
from fastmmu.reference.split import applies, split_range
from fastmmu.reference.tables import PAGE, Device, DeviceInfo, Fault, GuestMemory, Leaf, Slot, lowest, span
from fastmmu.reference.walk import ACC_U, ACC_W, PFERR_F, PFERR_P, PFERR_RSVD, PFERR_W

MIN_LIMIT, PAGES_PER_SHADOW_PAGE = 64, 50  # shadow page limit: truth README section 6, facts 5.7
GENERATION_STEP = 2  # of two address spaces (facts 3.4)


class Machine:
    """A VM: memslots, vCPUs and one MMU. `counters` has all counters and gauges by the names of the truth files."""

    def __init__(
        self, *, npt: bool = True, tdp_mmu: bool = True, eager_page_split: bool = True, nx_huge_pages: bool = False,
        mmio_caching: bool = True, maxphyaddr: int = 40, host_maxphyaddr: int = 40, page_1g: bool = True,
        hardware: Hardware | None = None, split_shadow_pages: bool = False, split_access: str = "cached",
        split_on_fault: bool = False,
    ) -> None:  # fmt: skip
        self.split_shadow_pages, self.split_access, self.split_on_fault = split_shadow_pages, split_access, split_on_fault
        self.npt, self.eager_page_split, self.nx_huge_pages, self.mmio_caching = npt, eager_page_split, nx_huge_pages, mmio_caching
        self.maxphyaddr, self.page_1g, self.hardware = maxphyaddr, page_1g, hardware or Hardware()
        self.max_gfn = (1 << (host_maxphyaddr if npt else 52) - 12) - 1
        self.counters: Counter[str] = Counter()
        self.memory = GuestMemory()
        self.manual_protect = 0  # KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 1 manual, 2 initially all set
        self.generation, self.nr_mmu_pages, self.limit_asked = 0, 0, False
        self.mmu: TdpMmu | ShadowMmu | ShadowPaging = (TdpMmu if tdp_mmu else ShadowMmu)(self) if npt else ShadowPaging(self)
        self.vcpus: dict[int, Vcpu] = {0: Vcpu(self)}

    def create_vcpu(self, number: int) -> None:
        """A further vCPU."""
        self.vcpus[number] = Vcpu(self)

    def mode(self, vcpu: int, cpl: int, *, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """KVM_SET_SREGS: a change other than of the privilege level unloads the roots."""
        state = self.vcpus[vcpu]
        old = state.cpu
        state.set_registers(cpl, cr0=cr0, cr3=cr3, cr4=cr4, efer=efer)
        if not self.npt and state.cpu.mode == Mode.PAE:
            state.pdptes = state.kvm_walker.load_pdptes(cr3)
        if state.cpu != old:
            self.mmu.release_roots(state)

    def write_control(self, vcpu: Vcpu, **registers: int) -> None:
        """MOV to CR0 or CR3, intercepted without nested paging (facts 9.2, 9.3)."""
        self.decode(vcpu)
        old = vcpu.cpu
        if changed := registers.keys() - {"cr0", "cr3"}:
            raise NotBuilt(f"MOV to {changed}")
        new = {name: getattr(old, name) for name in ("cr0", "cr3", "cr4", "efer")} | registers
        if "cr3" in registers:
            self.mmu.new_cr3(vcpu, new["cr3"])
            vcpu.sync_requested = vcpu.flush_current_requested = True
        vcpu.set_registers(vcpu.cpl, **new)
        if (old.cr0 ^ new["cr0"]) & int(CR0.PG):
            raise NotBuilt("the guest switches paging on or off")
        if (old.cr0 ^ new["cr0"]) & int(CR0.WP):
            self.mmu.release_roots(vcpu)

    def invlpg(self, vcpu: Vcpu, gva: int) -> None:
        """INVLPG, intercepted without nested paging (facts 9.4)."""
        self.decode(vcpu)
        self.counters["invlpg"] += 1
        if vcpu.shadowing and vcpu.walker.is_address(gva):
            for roots in (vcpu.roots, *([kept[1]] for kept in vcpu.previous if kept is not None)):
                self.mmu.invalidate(vcpu, roots, gva)

    def access(self, vcpu: int, gva: int, access: int, size: int = 8) -> Outcome:
        """A guest access; `access` is W, U and F of an error code."""
        return self.vcpus[vcpu].access(gva, access, size)

    def page_fault(self, vcpu: Vcpu, address: int, code: int) -> bool:
        """The fault handler (facts 4.4, 5.2). True: the instruction must be emulated, False: the guest tries again.

        Raises:
            GuestFault: the guest gets a page fault instead.
        """
        level, entry = lowest(vcpu.roots, address // PAGE)
        if code & PFERR_RSVD and isinstance(entry, Device) and self.is_device(vcpu, address, entry):
            return True
        self.counters["pf_taken"] += 1
        if vcpu.shadowing:
            answer = self.mmu.page_fault(vcpu, address, code)
        else:
            gfn = address // PAGE
            fault = Fault(gfn, code, self.memory.slot_at(gfn), HUGEST if self.npt else 2, address)
            answer = self.write_tracked(fault) or self.fast(fault, level, entry) or self.without_memory(vcpu, fault)
            answer = answer or self.mmu.map(vcpu, fault)
        if answer != RETRY:
            self.counters[answer] += 1
        return answer == EMULATE

    def is_device(self, vcpu: Vcpu, address: int, entry: Device) -> bool:
        """A fault by an MMIO SPTE that is answered without the handler (facts 4.4)."""
        direct, info = not vcpu.shadowing, vcpu.device
        if info is not None and info.generation == self.generation:
            known, asked = (info.gfn if direct else info.page), address // PAGE
            if known and known == asked:
                return True
        if entry.generation != self.generation & MMIO_GENERATION:
            return False
        vcpu.device = DeviceInfo(0 if direct else address // PAGE, entry.gfn, entry.access, self.generation)
        return True

    def write_tracked(self, fault: Fault) -> str | None:
        """A write to the page of a shadowed upper table (facts 5.4)."""
        if fault.code & (PFERR_P | PFERR_W | PFERR_RSVD) == PFERR_P | PFERR_W and self.mmu.tracked(fault.gfn):
            return EMULATE
        return None

    def fast(self, fault: Fault, level: int, leaf: object) -> str | None:
        """The fast path (facts 6): a write to a present leaf that only has to get its W back."""
        if fault.code & (PFERR_P | PFERR_W | PFERR_RSVD) != PFERR_P | PFERR_W or not isinstance(leaf, Leaf) or fault.slot is None:
            return None
        if not leaf.writable and (not leaf.mmu_writable or (level > 1 and fault.slot.logging)):
            return None
        self.counters["pf_fast"] += 1
        if leaf.writable:
            return SPURIOUS
        leaf.writable = True
        self.memory.mark_dirty(fault.gfn)
        return FIXED

    def without_memory(self, vcpu: Vcpu, fault: Fault) -> str | None:
        """Faults that map nothing: a write to a read-only slot; a device where no MMIO SPTE can be made (facts 4.7)."""
        if fault.slot is not None:
            return EMULATE if fault.code & PFERR_W and fault.slot.readonly else None
        page = 0 if self.npt else fault.address // PAGE
        vcpu.device = DeviceInfo(page, fault.gfn, fault.access & (ACC_W | ACC_U), self.generation)  # facts 4.1
        return None if self.mmio_caching and fault.gfn <= self.max_gfn else EMULATE

    def decode(self, vcpu: Vcpu) -> None:
        """KVM executes an instruction; without nested paging it fetches it by a walk of its own."""
        self.counters["insn_emulation"] += 1
        if vcpu.shadowing:
            self.mmu.walk(vcpu, vcpu.code, PFERR_F | vcpu.user)

    def emulate(self, vcpu: Vcpu, parts: list[tuple[int, int]], access: int, fault: NestedFault, operand: Operand) -> Outcome:
        """KVM executes the instruction: each page for itself (facts 4.3).

        Raises:
            GuestFault: a walk fails. What was stored to a page before is there.
        """
        if access & PFERR_F or fault.code & GUEST_PAGE:
            raise NotBuilt("code or page tables outside writable memory")
        self.decode(vcpu)
        reads = []
        if vcpu.shadowing and operand == EXCHANGE:
            for address, length in parts:
                try:
                    gpa, device = self.locate(vcpu, address, access & ~PFERR_W, fault)
                    reads.append((gpa, length, device))
                except GuestFault as denied:
                    raise GuestFault(denied.code | PFERR_W, denied.address) from None
        pieces, done = [], 0
        for address, length in parts:
            try:
                gpa, device = self.locate(vcpu, address, access, fault, locked=operand == EXCHANGE and len(parts) == 1)
            except GuestFault as denied:
                denied.reads = reads
                raise
            if access & PFERR_W and not device:
                self.memory.mark_dirty(gpa // PAGE)
                if operand is None and self.mmu.tracked(gpa // PAGE):
                    raise NotBuilt("a push to a page table")
                if isinstance(operand, int) and not self.npt:
                    self.memory.store(gpa, length, operand >> 8 * done)
                    self.mmu.table_written(vcpu, gpa, length)
            pieces.append((gpa, length, device))
            done += length
        if any(device for _, _, device in pieces):
            self.counters["mmio_exits"] += 1
        stored = isinstance(operand, int) and not self.npt
        return Outcome(pieces, emulated=True, stored=stored, reads=reads)

    def locate(self, vcpu: Vcpu, address: int, access: int, fault: NestedFault, locked: bool = False) -> tuple[int, bool]:
        """The gpa of an operand, and whether it is a device's: the emulator walks unless it knows (facts 4.3).

        The store of a locked exchange walks first, and goes to memory if that is what the tables say.
        """
        if vcpu.shadowing:
            if locked:
                found = walk_tables(vcpu, address, access)
                if isinstance(found, GuestWalk) and self.memory.kind(found.gpa) == "ram":
                    return found.gpa, False
            info = vcpu.device if vcpu.device is not None and vcpu.device.generation == self.generation else None
            if info is not None and info.page and info.page == address // PAGE:
                if not vcpu.walker.denied(bool(info.access & ACC_U), bool(info.access & ACC_W), True, access):
                    return info.gfn * PAGE | address & OFFSET, True
            gpa = self.mmu.walk(vcpu, address, access).gpa
            if info is not None and info.gfn and info.gfn == gpa // PAGE:
                return gpa, True
        elif address & OFFSET == fault.address & OFFSET:
            gpa = fault.address
        else:
            walk = vcpu.kvm_walker.walk(vcpu.cpu.cr3, address, access)
            if not walk.ok:
                self.counters["pf_guest"] += 1
                raise GuestFault(walk.pferr, address)
            gpa = walk.gpa
        kind = self.memory.kind(gpa)
        return gpa, kind is None or (bool(access & PFERR_W) and kind == "rom")

    def flush(self) -> None:
        """Ask all vCPUs to flush their TLBs before they enter the guest again."""
        self.counters["remote_tlb_flush_requests"] += 1
        for vcpu in self.vcpus.values():
            vcpu.flush_requested = True

    def zap_all(self) -> None:
        """All tables become obsolete (facts 5.14)."""
        for vcpu in self.vcpus.values():
            vcpu.free_roots_requested = True
        self.mmu.zap_all()

    def create_slot(self, number: int, slot: Slot) -> None:
        """KVM_SET_USER_MEMORY_REGION with a new slot."""
        self.memory.memslots[number] = slot
        slot.start_log(self.manual_protect)
        self.slots_changed()

    def delete_slot(self, number: int) -> None:
        """The same with size 0: the slot is made invalid, everything is zapped, the slot goes."""
        self.advance_generation()
        self.zap_all()
        del self.memory.memslots[number]
        self.slots_changed()

    def set_logging(self, number: int, logging: bool) -> None:
        """The same with only the flag for dirty logging changed (facts 7.1)."""
        slot = self.memory.memslots[number]
        if slot.logging == logging:
            return
        slot.logging = logging
        slot.start_log(self.manual_protect)
        self.advance_generation()
        if slot.readonly or (logging and self.manual_protect & 2):
            return
        if logging:
            self.split(slot.gfn, slot.end)
            self.mmu.write_protect(slot.gfn, slot.end)
            self.flush()
        else:
            self.mmu.zap_collapsible(slot)

    def split(self, start: int, end: int) -> None:
        """Eager splitting, where the MMU has it (facts 8.1)."""
        self.mmu.split(start, end)
        if applies(self.mmu):
            split_range(self.mmu, start, end)

    def advance_generation(self) -> None:
        """MMIO SPTEs are stale now; before the same number comes again they must all be gone (facts 3.4)."""
        self.generation += GENERATION_STEP
        if not self.generation & MMIO_GENERATION:
            self.zap_all()

    def slots_changed(self) -> None:
        """A slot came or went; the shadow page limit follows until userspace sets one."""
        self.advance_generation()
        if not self.limit_asked:
            pages = sum(slot.pages for slot in self.memory.memslots.values())
            self.nr_mmu_pages = self.mmu.set_limit(max(MIN_LIMIT, pages // PAGES_PER_SHADOW_PAGE))

    def set_nr_mmu_pages(self, limit: int) -> None:
        """KVM_SET_NR_MMU_PAGES; too small a number is refused."""
        if limit >= MIN_LIMIT:
            self.nr_mmu_pages, self.limit_asked = self.mmu.set_limit(limit), True

    def set_nx_huge_pages(self, enabled: bool) -> None:
        """The module parameter: a change zaps everything."""
        if self.nx_huge_pages != enabled:
            self.nx_huge_pages = enabled
            self.zap_all()

    def unmap(self, gpa: int, size: int) -> None:
        """MMU notifier: the host takes its pages away for a moment."""
        start, end = gpa // PAGE, -(-(gpa + size) // PAGE)
        if any([self.mmu.unmap(max(start, slot.gfn), min(end, slot.end)) for slot in self.memory.memslots.values()]):
            self.flush()

    def dirty_get(self, number: int) -> set[int]:
        """KVM_GET_DIRTY_LOG (facts 7.3)."""
        pages = set(self.memory.memslots[number].dirty)
        if not self.manual_protect:
            self.dirty_clear(number, pages)
        return pages

    def dirty_clear(self, number: int, pages: Iterable[int]) -> None:
        """KVM_CLEAR_DIRTY_LOG of some pages of a slot: those really set are protected, word by word (facts 7.3, 7.4)."""
        for gfns in (words := self.memory.memslots[number].clear_dirty(set(pages))):
            if self.manual_protect & 2:
                self.split(gfns[0], gfns[-1])
                self.mmu.protect_huge(gfns[0])
                if -gfns[0] // span(2) != -gfns[-1] // span(2):  # both are rounded up
                    self.mmu.protect_huge(gfns[-1])
            self.mmu.write_protect(gfns[0], gfns[-1] + 1, set(gfns))
        if words:
            self.flush()
