"""The simulation of vCPUs that contend for the mmu lock."""

from __future__ import annotations

from itertools import pairwise

import pytest

from bench import lock_scaling
from bench.lock_scaling import FAULTS, FITTED, PAGES, Costs, fit, published, series, simulate, simulate_split
from fastmmu._jit import JIT


def test_one_vcpu_never_waits() -> None:
    alone = simulate(1, Costs(100.0, 1000.0, 50.0), 20_000) / 20_000
    assert alone == pytest.approx(1100, rel=0.03)


def test_a_lock_that_is_always_wanted_is_the_limit() -> None:
    """Without time outside it, N vCPUs take N times as long, and each hand-over its cost."""
    assert simulate(8, Costs(100.0, 0.0, 0.0), 100) == pytest.approx(8 * 100 * 100)
    each, once = (simulate(8, Costs(100.0, 0.0, 10.0, each=each), 1000) / 8000 for each in (True, False))
    assert each == pytest.approx(100 + 7 * 10, rel=0.01)
    assert once == pytest.approx(100 + 10, rel=0.01)


def test_a_lock_for_reading_is_handed_over_too() -> None:
    assert simulate(1, Costs(0.0, 0.0, 10.0, shared=True), 100) == pytest.approx(1000)


def test_more_vcpus_are_never_faster() -> None:
    times = [simulate(vcpus, Costs(150.0, 1000.0, 90.0)) for vcpus in (1, 2, 4, 8, 16, 32)]
    assert all(after >= before * 0.97 for before, after in pairwise(times))


@pytest.mark.parametrize("each", [True, False])
def test_the_fitted_rows_are_met(each: bool) -> None:
    for name, rows in series().items():
        shared = rows[0].lock == "read"
        few, many = (next(row.seconds for row in rows if row.vcpus == count) / PAGES * 1e9 for count in FITTED)
        costs = fit(Costs(0.0 if shared else 150.0, 150.0 if shared else 0.0, 0.0, each, shared), few, many)
        for count, wanted in zip(FITTED, (few, many), strict=True):
            assert simulate(count, costs) / FAULTS == pytest.approx(wanted, rel=0.05), name


def test_published_rows() -> None:
    """As they stand in the facts (sections 11.3 to 11.5): spot checks, and no row twice."""
    rows = {(row.source, row.writes, row.vcpus): row.seconds for row in published()}
    assert len(rows) == len(published())
    assert rows["v3 tdp_mmu=N ept=Y", 100, 64] == 17.907075277
    assert rows["v6 tdp_mmu=Y in L2", 5, 16] == 4.258323166
    assert rows["split on fault TDP MMU before", 100, 96] == 2.681123208
    split = {(row.source, row.writes, row.vcpus): row.split_seconds for row in published()}
    assert split["v3 tdp_mmu=N ept=N", 5, 64] == 0.984948363
    assert split["v6 tdp_mmu=Y in L2", 50, 8] == 0.525316794
    assert {row.map for row in published() if "ept=Y" in row.source or "TDP" in row.source} == {"direct"}


def test_split_pages_fault_where_they_are_written_through_a_shadow() -> None:
    """Nothing of a direct map, every write of an indirect one; then few writes cost little, and all of them as much as before."""
    rows = {(row.source, row.writes): row for row in published()}
    costs, read, write = Costs(100.0, 1000.0, 50.0), 20.0, 200.0
    direct = rows["v3 tdp_mmu=N ept=Y", 5]
    assert simulate_split(64, direct, costs, read, write) == pytest.approx(PAGES * (0.05 * write + 0.95 * read))
    few, all_of_them = (simulate_split(8, rows["v6 tdp_mmu=Y in L2", writes], costs, read, write) for writes in (5, 100))
    assert all_of_them == pytest.approx(simulate(8, costs) / FAULTS * PAGES)
    assert few < all_of_them / 8


@pytest.mark.skipif(not JIT, reason="300,000 faults")
def test_a_fault_is_measured() -> None:
    assert 10 < lock_scaling.measured("legacy") < 1e6
