"""Eager splitting of huge pages in the shadow MMU of ordinary guests, as the first versions of the 2022 patches had it (facts 8).

From the facts, in plain objects. `strategy` says where the guest's rights to a huge page come from: "cached" where it was mapped,
"guest-walk" from the guest's entry now, "propagate" from the huge entry itself (facts 8.3, 8.6, 8.5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastmmu.reference.mmu import MIN_FREE, Place, ShadowMmu
from fastmmu.reference.shadow import ShadowPaging
from fastmmu.reference.tables import PAGE, Leaf, span
from fastmmu.reference.walk import ACC_U, ACC_W, ACC_X, NX, D, U, W


def split_range(mmu: Any, start: int, end: int) -> None:
    """1 GiB pages first, then 2 MiB ones; the frame that `start` lies in is looked at in any case, as KVM's iterator does."""
    for level in (3, 2):
        gfn = start - start % span(level)
        while True:
            split_frame(mmu, level, gfn)
            gfn += span(level)
            if gfn >= end:
                break


def split_frame(mmu: Any, level: int, gfn: int) -> None:
    """Every huge entry that maps one frame, as far as shadow pages are left."""
    while places := huge_places(mmu, level, gfn):
        if mmu.used + MIN_FREE >= mmu.machine.nr_mmu_pages:
            return
        if isinstance(mmu, ShadowPaging):
            split_shadowed(mmu, places[0])
        else:
            page, index = places[0]
            replace_by(mmu, places[0], mmu.child(page.gfn_of(index), level - 1), True)


def huge_places(mmu: Any, level: int, gfn: int) -> list[Place]:
    """Where a frame is mapped at a level."""
    if isinstance(mmu, ShadowPaging):
        return mmu.rmap.get((level, gfn), [])
    found = mmu.entries(gfn, gfn + 1)
    return [(page, index) for page, index in found if page.level == level and isinstance(page.entries.get(index), Leaf)]


def split_shadowed(mmu: ShadowPaging, place: Place) -> None:
    """One huge entry of shadow paging: the table's role holds the guest's access, by which later faults find it."""
    page, index = place
    leaf = page.entries[index]
    access = access_by_strategy(mmu, place, leaf)
    child = mmu.find(mmu.machine.vcpus[0], leaf.gfn, mmu.role_below(place, access, True))
    replace_by(mmu, place, child, bool(access & ACC_X))


def replace_by(mmu: Any, place: Place, child: Any, executes: bool) -> None:
    """A table in the place of a huge entry: what it holds already stays, the rest maps what the huge entry did (facts 8.2). At
    4 KiB a page may be executed that only NX huge pages forbade."""
    page, index = place
    huge, lacks = page.entries[index], False
    for part in range(512):
        there = child.entries.get(part)
        if isinstance(there, Leaf):
            continue
        if there is not None and hasattr(there, "entries"):
            lacks = True  # a table, which may map less
            continue
        executable = huge.executable or (child.level == 1 and executes and mmu.machine.nx_huge_pages)
        gfn = None if huge.gfn is None else child.gfn_of(part)
        mmu.put((child, part), replace(huge, executable=executable, gfn=gfn))
    mmu.put(place, None)
    if lacks:
        mmu.machine.flush()
    mmu.put(place, child)


def access_by_strategy(mmu: ShadowPaging, place: Place, leaf: Leaf) -> int:
    """The guest's rights to a huge page."""
    page, _ = place
    strategy = mmu.machine.split_access
    if strategy == "propagate":
        return ACC_X * leaf.executable | ACC_W * leaf.mmu_writable | ACC_U * leaf.user
    if page.role.direct:
        return page.role.access
    return leaf.granted if strategy == "cached" else by_guest_entry(mmu, place, leaf)


def by_guest_entry(mmu: ShadowPaging, place: Place, leaf: Leaf) -> int:
    """What the guest's entry grants now, together with the tables above it; nobody's fault is being handled, so that the guest's
    registers are those that the page's role remembers."""
    page, index = place
    size = 4 if page.role.half else 8
    number = page.role.quadrant * 256 + index // 2 if page.role.half else index
    entry = mmu.machine.memory.read(page.gfn * PAGE + size * number, size)
    access = (ACC_W if entry & W and entry & D else 0) | (ACC_U if entry & U else 0) | (0 if size == 8 and entry & NX else ACC_X)
    access &= page.role.access
    if leaf.mmu_writable and not access & ACC_W and not page.role.cr0_wp:  # a supervisor's write without CR0.WP, facts 1.8
        access = (access | ACC_W) & ~ACC_U
        if page.role.smep_andnot_wp:
            access &= ~ACC_X
    return access


def applies(mmu: Any) -> bool:
    """Whether this policy is on: the parameter, and the guests it is for."""
    return mmu.machine.eager_page_split and mmu.machine.split_shadow_pages and isinstance(mmu, (ShadowMmu, ShadowPaging))
