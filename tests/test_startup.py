"""The startup experiment: what it runs is what it says, and the ratio is formed within rounds."""

from __future__ import annotations

from pathlib import Path

import pyperf
import pytest

from bench import startup
from bench.experiment import Cell, CheckError, Context

CONTEXT = Context(Path("none"), None)


def test_a_process_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = {name: startup.check(CONTEXT, Cell("startup", "process", name)) for name in ("interpreter", "fastmmu")}
    bare, package = (one.counters["modules"] for one in checked.values())
    assert 0 < package - bare < 30  # importing the package imports nothing heavy
    work = startup.timed(CONTEXT, Cell("startup", "process", "fastmmu"))
    work.run(1)
    assert work.digest() == checked["fastmmu"].expected != checked["interpreter"].expected
    monkeypatch.setitem(startup.CODE, "fastmmu", "raise SystemExit('broken')")
    with pytest.raises(CheckError, match="startup/process/fastmmu: broken"):
        work.run(1)


def test_the_table() -> None:
    def benchmark(name: str, values: list[float]) -> pyperf.Benchmark:
        metadata = {"name": f"startup/process/{name}/time", "unit": "second", "fastmmu_modules": 7}
        return pyperf.Benchmark([pyperf.Run([value], metadata=metadata, collect_metadata=False) for value in values])

    suite = {one.get_name(): one for one in (benchmark("numba", [0.2, 0.4]), benchmark("fastmmu", [0.1, 0.2]))}
    (table,) = startup.tables(suite)
    assert table.rows == [("numba", "1.00 [1.00, 1.00]", "400", "7"), ("fastmmu", "0.50 [0.50, 0.50]", "200", "7")]
    assert startup.tables({"startup/process/fastmmu/time": suite["startup/process/fastmmu/time"]}) == []
