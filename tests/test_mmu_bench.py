"""The experiments on KVM's MMU: what their cells check, and that a timed run comes to what was checked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench import cached_access, fast_faults, faults, mmio_mmu, mmu_cost, shadow_caches, shadow_faults, shadow_memory
from bench.experiment import Cell, Context
from bench.workloads import BUNDLED_TRACE
from fastmmu._jit import JIT

HUGE_PAGES = 8
pytestmark = pytest.mark.skipif(not JIT, reason="whole guests: compiled code only")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(faults, "SIZES", {"4k": (1 << 24, 1, 1 << 12), "2m": (1 << 26, 2, 1 << 21)})
    monkeypatch.setattr(shadow_faults, "SIZE", 1 << 24)
    monkeypatch.setattr(fast_faults, "SIZE", 1 << 24)
    monkeypatch.setattr(fast_faults, "RESUME_SIZE", 1 << 24)
    monkeypatch.setattr(shadow_memory, "SIZES", {"16-mib": 1 << 24})
    monkeypatch.setattr(cached_access, "SIZE", HUGE_PAGES << 21)
    monkeypatch.setattr(cached_access, "LARGE", HUGE_PAGES << 22)
    monkeypatch.setattr(cached_access, "SPLIT_SIZE", 1 << 30)
    for cached in (fast_faults.guest, cached_access.guest):
        cached.cache_clear()
    yield
    for cached in (fast_faults.guest, cached_access.guest):
        cached.cache_clear()


def test_names_of_cells() -> None:
    for name in ("faults/tdp/4k/first-touch", "mmu/linux-boot/tdp"):
        assert Cell.named(name).name == name


@pytest.mark.parametrize("mmu", faults.MMUS)
@pytest.mark.parametrize("size", ["4k", "2m"])
@pytest.mark.parametrize("case", [faults.WALK, *faults.CASES])
def test_each_fault_is_one(small: None, mmu: str, size: str, case: str) -> None:
    cell = Cell(faults.NAME, f"{mmu}/{size}", case)
    checked = faults.check(Context(BUNDLED_TRACE, None), cell)
    timed = faults.timed(Context(BUNDLED_TRACE, None), cell)
    for _ in range(2):
        timed.run(1)
        assert timed.digest() == checked.expected == timed.accesses
    if case == "after-unmap" and size == "4k":
        assert checked.counters["pages_4k"] == checked.counters["pf_taken"]  # one page a fault, neighbours or not
    if case == "write-protect":
        assert checked.counters["pf_fast"] == (checked.expected if size == "4k" else 0)


def test_each_write_protection_fault_is_fixed_where_it_should_be(small: None) -> None:
    """The experiment's cells: exchanges of the same words, with the lock and without, one thread and more, and a stream that logs."""
    context = Context(BUNDLED_TRACE, 120_000)
    for cell in fast_faults.cells(context):
        checked = fast_faults.check(context, cell)
        timed = fast_faults.timed(context, cell)
        timed.run(1)
        assert timed.digest() == checked.expected
        assert (checked.counters["pf_fast"] > 0) == cell.strategy.startswith(fast_faults.FAST)
        if not fast_faults.is_trace(cell) and cell.strategy.startswith(fast_faults.LOCKED):
            assert checked.counters["lock_taken"] - checked.counters["accesses"] in (0, 1)  # and once where threads have ended
            assert checked.counters["lock_held"] > 0


def test_rights_of_split_pages_cost_what_the_facts_say(small: None) -> None:
    """Facts 8.4, 8.5: without NX huge pages all strategies coincide; with them propagated rights cost a table, a flush and new faults
    for each huge page that is touched again, where the guest may execute it."""
    context, found = Context(BUNDLED_TRACE, 60_000), {}
    for cell in cached_access.cells(context):
        if "-1g-" in cell.workload or (cell.workload == "split-1g" and cell.strategy != "cached"):
            continue  # seconds each
        checked = cached_access.check(context, cell)
        timed = cached_access.timed(context, cell)
        timed.run(1)
        assert timed.digest() == checked.expected
        found[cell.workload, cell.strategy] = checked.counters
    names = ("pf_taken", "splits", "remote_tlb_flush_requests", "mmu_cache_miss", "orphans", "pages_4k")
    for workload, work in cached_access.workloads().items():
        if work.level == 3:
            continue
        lazy, cached, walked, propagated = (
            found[workload, name] for name in (cached_access.LAZY, "cached", "guest-walk", "propagate")
        )
        assert lazy["splits"] == lazy["split_reads"] == cached["split_reads"] == cached["orphans"] == 0
        assert walked["split_reads"] == walked["splits"] == cached["splits"]
        assert [walked[name] for name in names] == [cached[name] for name in names]
        same = [propagated[name] for name in names] == [cached[name] for name in names]
        assert same == (not work.nx or all(rights in ("rw", "nx") for rights in work.windows[0])), workload
        assert cached["pf_taken"] <= propagated["pf_taken"]
    executed = found["rwx-nx-on", "propagate"]
    assert executed["orphans"] == HUGE_PAGES and executed["mmu_cache_miss"] == 2 * HUGE_PAGES
    assert executed["remote_tlb_flush_requests"] == found["rwx-nx-on", "cached"]["remote_tlb_flush_requests"] + HUGE_PAGES
    few = {strategy: found["rwx-5-nx-on", strategy]["pf_taken"] for strategy in cached_access.STRATEGIES}
    assert few["cached"] < 512 * HUGE_PAGES / 10 < few["propagate"] and few["lazy"] > 512 * HUGE_PAGES / 2
    assert not found[f"{context.workload.name}-nx-on", cached_access.LAZY]["splits"]
    assert found[f"{context.workload.name}-nx-on", "cached"]["splits"]


def test_warm_streams_cause_no_exit() -> None:
    context = Context(BUNDLED_TRACE, 20_000)
    for cell in mmu_cost.cells(context):
        counters = mmu_cost.check(context, cell).counters
        if cell.workload.endswith(mmu_cost.WARM) and cell.strategy in mmu_cost.KVMS:
            assert counters["exits_no_irq"] == 0
            assert counters["tlb_hits"] + counters["tlb_misses"] == counters["accesses"]
    mmu_cost.timed(context, Cell(mmu_cost.NAME, context.workload.name + mmu_cost.WARM, "tdp")).run(1)


@pytest.mark.parametrize("workload", shadow_faults.WORKLOADS)
@pytest.mark.parametrize("case", [shadow_faults.WALK, *shadow_faults.CASES])
def test_each_shadow_fault_is_one(small: None, workload: str, case: str) -> None:
    cell = Cell(shadow_faults.NAME, workload, case)
    checked = shadow_faults.check(Context(BUNDLED_TRACE, None), cell)
    timed = shadow_faults.timed(Context(BUNDLED_TRACE, None), cell)
    for _ in range(2):
        timed.run(1)
        assert timed.digest() == checked.expected
    assert (checked.counters.get("mmu_cache_miss", 0) > 0) == (case == "first-touch")


def test_bytes_for_a_shadowed_page(small: None) -> None:
    checked = shadow_memory.check(Context(BUNDLED_TRACE, None), Cell(shadow_memory.NAME, "16-mib", shadow_memory.STRATEGY))
    assert 24 < checked.counters["total"] / checked.counters["pages"] < 33  # 24 in the leaves; tables weigh more in a small guest


def test_what_shadow_paging_remembers_is_seen_in_its_counters() -> None:
    context = Context(BUNDLED_TRACE, 150_000)
    found = {
        cell.workload.split("/")[-1] + " " + cell.strategy: shadow_caches.check(context, cell)
        for cell in shadow_caches.cells(context)
    }
    counters = {name: checked.counters for name, checked in found.items()}
    assert counters["cached-roots on"] == counters["last-slot on"] == counters["last-slot off"] == counters["shadowed-access off"]
    assert (
        counters["shadowed-access on"]["remote_tlb_flush_requests"] < counters["shadowed-access off"]["remote_tlb_flush_requests"]
    )
    cell = shadow_caches.cells(context)[0]
    timed = shadow_caches.timed(context, cell)
    timed.run(1)
    assert timed.digest() == found["cached-roots off"].expected


def test_what_remembering_devices_saves() -> None:
    """With MMIO sptes a device page is a slow fault once; without, each access is."""
    context = Context(BUNDLED_TRACE, 80_000)
    npt, ept = ([mmio_mmu.check(context, Cell(mmio_mmu.NAME, f"x{form}", name)).counters for name in mmio_mmu.KVMS] for form in ("", mmio_mmu.EPT))
    assert [one["pf_taken"] for one in npt] == [one["pf_taken"] for one in ept]  # misconfigurations say as much as reserved bits
    slow = dict(zip(mmio_mmu.KVMS, (one["pf_taken"] for one in npt), strict=True))
    assert slow["none"] == slow["info"] > slow["spte"] == slow["spte+info"]
    assert mmio_mmu.accesses(context) <= slow["none"]
