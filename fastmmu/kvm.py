"""How KVM runs a virtual machine: module parameters, hardware, and the spte masks that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmmu.bits import EPT_SPTE, NPT_SPTE
from fastmmu.checks import WORD, checked_flag, checked_int
from fastmmu.machine_state import SplitAccess, VmWord

SPLIT_ACCESS = {one.name.lower().replace("_", "-"): one for one in SplitAccess}


@dataclass(frozen=True, kw_only=True)
class Kvm:
    """How KVM runs a VM: its module parameters, its hardware, and the processor's own properties.

    Attributes:
        tdp: two-dimensional paging; without it the guest's tables are shadowed.
        tdp_mmu: the TDP MMU, else the shadow MMU's direct map.
        ept: sptes and error codes of EPT, else of NPT.
        ad: the processor sets A and D in sptes.
        nx_huge_pages, eager_page_split, mmio_caching: as the parameters of that name.
        mmio_info: the MMIO info cache.
        cached_roots: three roots besides the current one are kept (shadow paging).
        sync_skips_unchanged: a sync leaves an spte alone whose rights, as kept beside its gfn, did not change (since Linux 6.4).
        last_slot: the memslot found last is tried first.
        prefetch: a fault maps neighbours too (shadow pages).
        force_sync_on_reuse: a kept root is synced and flushed when it comes into use again (force_flush_and_sync_on_reuse).
        fast_page_fault: write-protection faults of direct maps are fixed without the mmu lock.
        pml: page-modification logging; needs tdp and ad.
        manual_protect, initially_set: the dirty-log capability.
        split_shadow_pages: eager splitting in the shadow pages of every guest, with or without the TDP MMU, as the first versions
            of the patches had it; what was merged splits those of nested guests beside the TDP MMU (facts 8.1, 8.2).
        split_access: where the guest's rights to a huge page in shadow pages come from when it is split: "cached", kept beside the
            gfn; "guest-walk", its entry read again; "propagate", the huge spte itself (facts 8.3, 8.5, 8.6).
        split_on_fault: the TDP MMU splits a huge page that a fault wants smaller (since Linux 6.2); else it drops it.
        page_1g: huge pages of 1 GiB.
        nested: the guest may be a hypervisor, which has NPT or EPT as `ept` says; needs tdp, without pml.
        next_rip: the processor says where the next instruction is, so that VMRUN is not emulated to step over it.
        host_maxphyaddr: physical-address bits of the host.
        generation: memslot generation at the start.
        tlb: (sets, ways) of each vCPU's TLB of 4 KiB translations; sets a power of two.
        tlb_flushed_on_exit, accessed_while_walking, reserved_without_present: artefacts of an emulated processor.

    Raises:
        ValueError: a combination that no KVM has.

    Example:
        >>> from fastmmu import Kvm
        >>> Kvm(ept=True, nx_huge_pages=True).tdp_mmu
        True
        >>> Kvm(tdp=False)
        Traceback (most recent call last):
        ...
        ValueError: tdp_mmu: True, expected False without tdp
    """

    tdp: bool = True
    tdp_mmu: bool = True
    ept: bool = False
    ad: bool = True
    nx_huge_pages: bool = False
    eager_page_split: bool = True
    mmio_caching: bool = True
    mmio_info: bool = True
    cached_roots: bool = True
    sync_skips_unchanged: bool = False
    last_slot: bool = True
    prefetch: bool = True
    force_sync_on_reuse: bool = False
    fast_page_fault: bool = True
    pml: bool = False
    manual_protect: bool = False
    initially_set: bool = False
    split_shadow_pages: bool = False
    split_access: str = "cached"
    split_on_fault: bool = False
    page_1g: bool = True
    nested: bool = False
    next_rip: bool = True
    host_maxphyaddr: int = 46
    generation: int = 0
    tlb: tuple[int, int] = (256, 4)
    tlb_flushed_on_exit: bool = False
    accessed_while_walking: bool = False
    reserved_without_present: bool = False

    def __post_init__(self) -> None:
        for name in FLAGS:
            object.__setattr__(self, name, checked_flag(getattr(self, name), name))
        checked_int(self.host_maxphyaddr, 36, 51, "host_maxphyaddr", "an int from 36 to 51")
        checked_int(self.generation, 0, WORD >> 1, "generation", "an int from 0 to 2^63 - 1")
        if not isinstance(self.tlb, tuple) or len(self.tlb) != 2:
            raise ValueError(f"tlb: {self.tlb!r}, expected (sets, ways)")
        sets = checked_int(self.tlb[0], 1, 1 << 20, "tlb", "sets that are a power of two, up to 2^20")
        checked_int(self.tlb[1], 1, 64, "tlb", "1 to 64 ways")
        if sets & (sets - 1):
            raise ValueError(f"tlb: {sets} sets, expected a power of two")
        if self.tdp_mmu and not self.tdp:
            raise ValueError("tdp_mmu: True, expected False without tdp")
        if self.ept and not self.tdp:
            raise ValueError("ept: True, expected False without tdp")
        if not self.ad and not self.ept:
            raise ValueError("ad: False, expected True for NPT and shadow paging, whose entries always have A and D")
        if self.pml and not (self.tdp and self.ad):
            raise ValueError("pml: True, expected False without tdp or without ad")
        if self.nested and (not self.tdp or self.pml):
            raise ValueError("nested: True, expected tdp, and no pml")
        if self.split_access not in SPLIT_ACCESS:
            raise ValueError(f"split_access: {self.split_access!r}, expected one of {', '.join(SPLIT_ACCESS)}")
        if self.initially_set and not self.manual_protect:
            raise ValueError("initially_set: True, expected manual_protect with it")


FLAGS = (
    "tdp", "tdp_mmu", "ept", "ad", "nx_huge_pages", "eager_page_split", "mmio_caching", "mmio_info", "cached_roots",
    "sync_skips_unchanged", "last_slot", "prefetch", "force_sync_on_reuse", "fast_page_fault", "pml", "manual_protect",
    "initially_set", "split_shadow_pages", "split_on_fault", "page_1g", "nested", "next_rip",
    "tlb_flushed_on_exit", "accessed_while_walking", "reserved_without_present",
)  # fmt: skip


def set_spte_masks(word: np.ndarray, kvm: Kvm) -> None:
    """The masks of the VM's sptes, as KVM sets them when it is loaded (facts 3.1)."""
    masks = {
        VmWord.MMU_WRITABLE: NPT_SPTE.MMU_WRITABLE,
        VmWord.HOST_WRITABLE: NPT_SPTE.HOST_WRITABLE,
        VmWord.PRESENT: NPT_SPTE.P,
        VmWord.HARDWARE_PRESENT: NPT_SPTE.P,
        VmWord.NO_EXECUTE: NPT_SPTE.NX,
        VmWord.USER: NPT_SPTE.U,
        VmWord.ACCESSED: NPT_SPTE.A,
        VmWord.DIRTY: NPT_SPTE.D,
        VmWord.MMIO_MASK: NPT_SPTE.MMIO,
        VmWord.MMIO_VALUE: NPT_SPTE.MMIO,
        VmWord.MMIO_ACCESS: NPT_SPTE.W | NPT_SPTE.U,
    }
    if kvm.ept:
        ad = np.uint64(kvm.ad)
        masks = {
            VmWord.MMU_WRITABLE: EPT_SPTE.MMU_WRITABLE,
            VmWord.HOST_WRITABLE: EPT_SPTE.HOST_WRITABLE,
            VmWord.PRESENT: EPT_SPTE.SUPPRESS_VE,
            VmWord.HARDWARE_PRESENT: EPT_SPTE.R | EPT_SPTE.W | EPT_SPTE.X,
            VmWord.EXECUTE: EPT_SPTE.X,
            VmWord.USER: EPT_SPTE.R,
            VmWord.ACCESSED: EPT_SPTE.A * ad,
            VmWord.DIRTY: EPT_SPTE.D * ad,
            VmWord.MEMORY_TYPE: EPT_SPTE.WRITE_BACK,
            VmWord.AD_TYPE: EPT_SPTE.AD_DISABLED * (np.uint64(1) - ad),
            VmWord.MMIO_MASK: EPT_SPTE.MMIO_MASK,
            VmWord.MMIO_VALUE: EPT_SPTE.MMIO,
        }
    for which, mask in masks.items():
        word[which] = mask
    present = NPT_SPTE.MMU_PRESENT | word[VmWord.PRESENT] | word[VmWord.ACCESSED]
    if kvm.tdp:
        present |= word[VmWord.USER]  # under shadow paging only user accesses need it
    word[VmWord.USE_READ] = present
    word[VmWord.USE_WRITE] = present | NPT_SPTE.W | word[VmWord.DIRTY]
    word[VmWord.USE_FETCH] = present | word[VmWord.EXECUTE]
    word[VmWord.NOT_FETCH] = word[VmWord.NO_EXECUTE]
    word[VmWord.USE_TABLE] = word[VmWord.USE_READ if kvm.ept and not kvm.ad else VmWord.USE_WRITE]
