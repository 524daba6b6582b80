"""Fixtures: one seed for the whole run, printed; the shared data, or one message that it is absent."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `bench` is not installed; it runs from the checkout
SHARED = ROOT.parent / "shared"
CHECKED = os.environ.get("NUMBA_BOUNDSCHECK") == "1"
JIT = os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"
MACHINE = [f"test_{name}.py" for name in (
    "kvm_rules", "validate", "scenarios", "shadow_rules", "streams", "fast_fault", "threads", "commands", "mmu_bench", "lock_scaling", "examples",
)]  # fmt: skip
NESTED_GUESTS = ("test_nested_guest.py", "test_nested_ept.py")
NESTED_FILES = ("npt1.F]", "npt1.Falias]", "npt1-eagerN.F]", "npt1-tdpN.F]")
HARNESS = (
    "test_bench.py", "test_mmu_bench.py", "test_lock_scaling.py", "test_mutations.py", "test_report.py", "test_against.py",
    "test_compare.py",
)  # fmt: skip
NO_KERNELS = ("test_address_space.py", "test_command_line.py", "test_startup.py")
SEED = int(os.environ.setdefault("FASTMMU_SEED", str(random.SystemRandom().randrange(1 << 32))))  # workers inherit it


def of_nested_guests(item: pytest.Item) -> bool:
    """Whether a test runs a machine with nested guests."""
    return item.path.name in NESTED_GUESTS or item.name.endswith(NESTED_FILES)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In front what needs the machine's kernels: of two workers that take a half each, one compiles them, and the other finds them on
    the disk when it gets there. What is compiled for nested guests alone is compiled once, with bounds checked; the harness of the
    benchmarks is tested without.
    """
    nested = [item for item in items if of_nested_guests(item)]
    machine = sorted(
        (item for item in items if item.path.name in MACHINE and item not in nested), key=lambda item: MACHINE.index(item.path.name)
    )
    others = [item for item in items if item.path.name not in MACHINE and item not in nested]
    half = len(items) // 2
    items[:] = machine[:half] + others + nested + machine[half:]
    for item in items:
        if of_nested_guests(item) and JIT and not CHECKED and not item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="in the interpreter, and compiled with bounds checked"))
        if CHECKED and item.path.name in HARNESS + NO_KERNELS:
            item.add_marker(pytest.mark.skip(reason="no kernel of its own: run without bounds checked"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"fastmmu seed: {SEED} (FASTMMU_SEED={SEED} repeats this run)")


@pytest.fixture
def seed() -> int:
    return SEED


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED
