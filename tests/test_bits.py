"""The second statement of every layout, copied by hand: from the manual (SDM volume 3, figures 4-4 and 4-11, tables 4-20, 25-9, 28-7 and 29-1 to 29-7),
those of KVM's own bits from facts 3.1 and 5.11."""

from __future__ import annotations

import numpy as np
import pytest

from fastmmu.bits import (
    ACC,
    CR0,
    CR3,
    CR4,
    EFER,
    EPT,
    EPT_SPTE,
    EPTP,
    GPTE32,
    GPTE64,
    MMIO_SPTE,
    NPT_SPTE,
    PFERR,
    QUALIFICATION,
    RFLAGS,
    ROLE,
)

LAYOUTS = {
    "gpte64": (GPTE64, {
        "P": 0x1, "W": 0x2, "U": 0x4, "PWT": 0x8, "PCD": 0x10, "A": 0x20, "D": 0x40, "PS": 0x80, "G": 0x100, "PAT_LARGE": 0x1000,
        "ADDR": 0x000F_FFFF_FFFF_F000, "KEY": 0x7800_0000_0000_0000, "NX": 0x8000_0000_0000_0000,
    }),
    "gpte32": (GPTE32, {
        "P": 0x1, "W": 0x2, "U": 0x4, "PWT": 0x8, "PCD": 0x10, "A": 0x20, "D": 0x40, "PS": 0x80, "G": 0x100,
        "ADDR": 0xFFFF_F000, "ADDR_4M": 0xFFC0_0000, "PSE36": 0x1_E000,
    }),
    "pferr": (PFERR, {"P": 1, "W": 2, "U": 4, "RSVD": 8, "F": 0x10, "PK": 0x20, "GUEST_FINAL": 0x1_0000_0000,
                      "GUEST_PAGE": 0x2_0000_0000, "IMPLICIT": 0x1_0000_0000_0000}),
    "acc": (ACC, {"X": 1, "W": 2, "U": 4, "ALL": 7}),
    "cr0": (CR0, {"PE": 1, "MP": 2, "TS": 8, "WP": 0x1_0000, "PG": 0x8000_0000}),
    "cr3": (CR3, {"PCID": 0xFFF, "NO_FLUSH": 0x8000_0000_0000_0000}),
    "cr4": (CR4, {"PSE": 0x10, "PAE": 0x20, "PGE": 0x80, "LA57": 0x1000, "PCIDE": 0x2_0000, "SMEP": 0x10_0000, "SMAP": 0x20_0000,
                  "PKE": 0x40_0000, "PKS": 0x100_0000}),
    "efer": (EFER, {"LME": 0x100, "LMA": 0x400, "NX": 0x800}),
    "rflags": (RFLAGS, {"AC": 0x4_0000}),
    "npt_spte": (NPT_SPTE, {
        "P": 1, "W": 2, "U": 4, "A": 0x20, "D": 0x40, "PS": 0x80, "HOST_WRITABLE": 0x200, "MMU_WRITABLE": 0x400, "MMU_PRESENT": 0x800,
        "ADDR": 0x000F_FFFF_FFFF_F000, "AD_DISABLED": 0x10_0000_0000_0000, "NX": 0x8000_0000_0000_0000, "MMIO": 0x8_0000_0000_0001,
    }),
    "ept_spte": (EPT_SPTE, {
        "R": 1, "W": 2, "X": 4, "WRITE_BACK": 0x30, "PS": 0x80, "A": 0x100, "D": 0x200, "MMU_PRESENT": 0x800,
        "ADDR": 0x000F_FFFF_FFFF_F000, "AD_DISABLED": 0x10_0000_0000_0000, "HOST_WRITABLE": 0x200_0000_0000_0000,
        "MMU_WRITABLE": 0x400_0000_0000_0000, "SAVED": (1 << 54) | (1 << 56), "SUPPRESS_VE": 0x8000_0000_0000_0000, "MMIO": 6, "MMIO_MASK": 0x8000_0000_0000_0007,
    }),
    "eptp": (EPTP, {"TYPE": 7, "LENGTH": 0x38, "AD": 0x40, "ADDR": 0x000F_FFFF_FFFF_F000}),
    "ept": (EPT, {
        "R": 1, "W": 2, "X": 4, "TYPE": 0x38, "IGNORE_PAT": 0x40, "PS": 0x80, "A": 0x100, "D": 0x200, "USER_X": 0x400,
        "ADDR": 0x000F_FFFF_FFFF_F000,
    }),
    "qualification": (QUALIFICATION, {"R": 1, "W": 2, "X": 4, "RIGHTS": 0x38, "USER_X": 0x40, "LINEAR": 0x80, "FINAL": 0x100, "NMI": 0x1000}),
    "mmio_spte": (MMIO_SPTE, {"GENERATION_LOW": 0x7F8, "GENERATION_HIGH": 0x7FF0_0000_0000_0000, "GENERATION": 0x7_FFFF}),
    "role": (ROLE, {"LEVEL": 0xF, "FOUR_BYTE_GPTE": 0x10, "QUADRANT": 0x60, "DIRECT": 0x80, "ACCESS": 0x700, "INVALID": 0x800,
                    "EFER_NX": 0x1000, "CR0_WP": 0x2000, "SMEP_ANDNOT_WP": 0x4000, "SMAP_ANDNOT_WP": 0x8000, "AD_DISABLED": 0x1_0000, "GUEST_MODE": 0x2_0000}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_the_manuals(name: str) -> None:
    layout, by_hand = LAYOUTS[name]
    assert {field: int(mask) for field, mask in layout._asdict().items()} == by_hand
    assert all(type(mask) is np.uint64 for mask in layout)


@pytest.mark.parametrize("name", ["gpte64", "pferr", "cr0", "cr4", "efer", "eptp", "ept", "qualification"])
def test_fields_do_not_overlap(name: str) -> None:
    layout, _ = LAYOUTS[name]
    fields = layout._asdict()
    fields.pop("PAT_LARGE", None)  # shares the lowest address bit, by design
    assert sum(int(mask) for mask in fields.values()) == int(np.bitwise_or.reduce(list(fields.values())))
