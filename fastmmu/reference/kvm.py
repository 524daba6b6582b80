"""A VM of Linux 6.1's KVM: memslots, dirty logs, vCPUs, the begin and the end of a page fault, the emulator, and all counters.

Facts 3 to 9, with the differences of 6.1 that the truth files show. The MMUs are in `mmu` and `shadow`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fastmmu.reference.mmu import EMULATE, FIXED, HUGEST, MMIO_GENERATION, SPURIOUS, ShadowMmu, TdpMmu
from fastmmu.reference.processor import PAGE, Device, Fault, GuestMemory, Hardware, Leaf, Outcome, Slot, Vcpu, path, span
from fastmmu.reference.walk import PFERR_P, PFERR_RSVD, PFERR_W

MIN_LIMIT, PAGES_PER_SHADOW_PAGE = 64, 50  # shadow page limit: truth README section 6, facts 5.7
GENERATION_STEP = 2  # of two address spaces (facts 3.4)


class Machine:
    """A VM: memslots, vCPUs and one MMU. `counters` has all counters and gauges by the names of the truth files."""

    def __init__(
        self, *, npt: bool = True, tdp_mmu: bool = True, eager_page_split: bool = True, nx_huge_pages: bool = False,
        mmio_caching: bool = True, maxphyaddr: int = 40, host_maxphyaddr: int = 40, page_1g: bool = True,
        hardware: Hardware | None = None,
    ) -> None:  # fmt: skip
        self.npt, self.eager_page_split, self.nx_huge_pages, self.mmio_caching = npt, eager_page_split, nx_huge_pages, mmio_caching
        self.maxphyaddr, self.page_1g, self.hardware = maxphyaddr, page_1g, hardware or Hardware()
        self.max_gfn = (1 << (host_maxphyaddr if npt else 52) - 12) - 1
        self.counters: Counter[str] = Counter()
        self.memory = GuestMemory()
        self.manual_protect = 0  # KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 1 manual, 2 initially all set
        self.generation, self.nr_mmu_pages, self.limit_asked = 0, 0, False
        self.mmu: TdpMmu | ShadowMmu = TdpMmu(self) if npt and tdp_mmu else ShadowMmu(self)
        self.vcpus: dict[int, Vcpu] = {0: Vcpu(self)}

    def create_vcpu(self, number: int) -> None:
        """A further vCPU."""
        self.vcpus[number] = Vcpu(self)

    def mode(self, vcpu: int, cpl: int, *, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """KVM_SET_SREGS: a change other than of the privilege level unloads the roots."""
        state = self.vcpus[vcpu]
        old = state.cpu
        state.set_registers(cpl, cr0=cr0, cr3=cr3, cr4=cr4, efer=efer)
        if state.cpu != old:
            self.mmu.release_roots(state)

    def access(self, vcpu: int, gva: int, access: int, size: int = 8) -> Outcome:
        """A guest access; `access` is W, U and F of an error code."""
        return self.vcpus[vcpu].access(gva, access, size)

    def page_fault(self, vcpu: Vcpu, address: int, code: int) -> bool:
        """The fault handler (facts 4.4, 5.2). True: the instruction must be emulated, False: the guest tries again."""
        gfn = address // PAGE
        *_, (table, index) = path(vcpu.roots, gfn)
        entry = table.entries.get(index)
        if code & PFERR_RSVD and isinstance(entry, Device):
            if (vcpu.device == (gfn, self.generation) and gfn) or entry.generation == self.generation & MMIO_GENERATION:
                vcpu.device = (gfn, self.generation)
                return True
        fault = Fault(gfn, code, self.memory.slot_at(gfn), HUGEST if self.npt else 2)
        self.counters["pf_taken"] += 1
        answer = self.fast(fault, table.level, entry) or self.without_memory(vcpu, fault) or self.mmu.map(vcpu, fault)
        self.counters[answer] += 1
        return answer == EMULATE

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
        vcpu.device = (fault.gfn, self.generation)  # facts 4.1
        return None if self.mmio_caching and fault.gfn <= self.max_gfn else EMULATE

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
            self.mmu.split(slot.gfn, slot.end)
            self.mmu.write_protect(slot.gfn, slot.end)
            self.flush()
        else:
            self.mmu.zap_collapsible(slot)

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
                self.mmu.split(gfns[0], gfns[-1])
                self.mmu.protect_huge(gfns[0])
                if -gfns[0] // span(2) != -gfns[-1] // span(2):  # both are rounded up
                    self.mmu.protect_huge(gfns[-1])
            self.mmu.write_protect(gfns[0], gfns[-1] + 1, set(gfns))
        if words:
            self.flush()
