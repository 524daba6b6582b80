"""The access-checks experiment: the three walks against their plain-Python versions, and what each gets wrong."""

from __future__ import annotations

import pytest
from conftest import ROOT
from sizes import sized

from bench import access_checks
from bench.experiment import Cell, Checked, Context
from fastmmu.strategy import ACCESS_CHECKS

CONTEXT = Context(ROOT, None)
WORKLOADS = ("matrix-wp1", "matrix-wp0", "snapshot-linux-boot", "snapshot-fork-exec")
STRATEGIES = [strategy.name for strategy in ACCESS_CHECKS.strategies]


@pytest.fixture(scope="module")
def checked() -> dict[tuple[str, str], Checked]:
    """Every cell, its counters and tables already compared with the reference's."""
    workloads = WORKLOADS[: sized(4, 1)]
    return {
        (workload, strategy): access_checks.check(CONTEXT, Cell(ACCESS_CHECKS.name, workload, strategy))
        for workload in workloads
        for strategy in STRATEGIES
    }


def test_todays_walk_gets_nothing_wrong(checked: dict[tuple[str, str], Checked]) -> None:
    for (_, strategy), one in checked.items():
        if strategy == "once":
            wrong = ("wrong_codes", "wrong_outcomes", "refaults", "endless", "accessed_by_failing")
            assert not any(one.counters[name] for name in wrong)
            assert one.counters["exits"] == one.counters["walks"] == one.counters["accesses"]


def test_the_patch_ends_refaults_but_sees_upper_levels_first(checked: dict[tuple[str, str], Checked]) -> None:
    for (workload, strategy), one in checked.items():
        if strategy == "per-level":
            assert not one.counters["refaults"] and not one.counters["wrong_outcomes"]
            assert (one.counters["wrong_codes"] > 0) == workload.startswith("matrix")


def test_before_the_patch_denied_accesses_fault_twice_and_leave_accessed_bits(checked: dict[tuple[str, str], Checked]) -> None:
    for (workload, strategy), one in checked.items():
        if strategy == "after-walk":
            counters = one.counters
            assert counters["refaults"] > 0 and counters["exits"] == counters["accesses"] + counters["refaults"]
            assert counters["accessed_by_failing"] > 0
            assert (counters["endless"] > 0) == workload.startswith("matrix")
        assert one.counters["accesses"] == checked[workload, "once"].counters["accesses"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_timed_runs_answer_as_checked_ones(checked: dict[tuple[str, str], Checked], strategy: str) -> None:
    work = access_checks.timed(CONTEXT, Cell(ACCESS_CHECKS.name, "matrix-wp1", strategy))
    work.run(2)
    assert work.digest() == checked["matrix-wp1", strategy].expected
