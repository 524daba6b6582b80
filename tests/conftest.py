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
SEED = int(os.environ.setdefault("FASTMMU_SEED", str(random.SystemRandom().randrange(1 << 32))))  # workers inherit it


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
