"""One folder of results against an older one: what changed beyond noise, by pyperf's own statistics, and which counters changed.

Ratios are formed within a run, so they may be compared across runs; absolute times may not, and decide nothing. pyperf has no
public interface to its comparison: `pyperf._compare` is what its command `compare_to` runs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pyperf
from pyperf._compare import CompareData, CompareResult

from bench.experiment import Experiment
from bench.ratios import Related, cells_of, related
from bench.registry import EXPERIMENTS
from bench.results import ResultError, load_suite, making_sense_of
from bench.tables import Table, nanoseconds, ratio_of

MACHINE = ("cpu_model_name", "cpu_count", "cpu_config", "python_version", "python_compiler", "aslr")
FEWEST_ROUNDS = 3  # a t-test of fewer says nothing
GONE = "-"


@dataclass
class Comparison:
    """What came out: rows of cells, and how many of them decide."""

    ratios: list[tuple[str, ...]] = field(default_factory=list)
    counters: list[tuple[str, ...]] = field(default_factory=list)
    compared: int = 0
    slower: int = 0
    faster: int = 0
    undecided: int = 0  # with too few rounds
    cells: int = 0
    left: list[str] = field(default_factory=list)  # cells that only the older folder has
    new: list[str] = field(default_factory=list)
    machine: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """Exit status: 1 if something is slower beyond noise, or a counter has changed."""
        return int(bool(self.slower or self.counters))

    def tables(self) -> list[Table]:
        """Those that have rows."""
        head = ("cell", "ratio, older", "ratio, newer", "change", "t", "ns, older", "ns, newer")
        note = "A ratio is to the plain strategy of the same run. Absolute times of two runs stand beside and decide nothing."
        made = [
            Table("changed beyond noise", head, self.ratios, note),
            Table("counters that changed", ("cell / counter", "older", "newer"), self.counters),
        ]
        return [table for table in made if table.rows]

    def words(self) -> list[str]:
        """A summary, and what to bear in mind."""
        said = [f"{name}: {old} there, {new} here: absolute times are not comparable" for name, (old, new) in self.machine.items()]
        for names, where in ((self.left, "older"), (self.new, "newer")):
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                said.append(f"only in the {where} folder: {len(names)} cells ({shown})")
        if self.undecided:
            said.append(f"{self.undecided} ratios of fewer than {FEWEST_ROUNDS} rounds: not decided")
        said.append(
            f"{self.cells} cells in both, {self.compared} ratios compared: {self.slower} slower, {self.faster} faster beyond "
            f"noise; {len(self.counters)} counters changed"
        )
        return said


def compare_folders(older: Path, newer: Path, min_speed: float, experiments: Collection[str] | None = None) -> Comparison:
    """The files of two folders, of all experiments or of some.

    Raises:
        ResultError: a folder or file cannot be read, or nothing is in both.
    """
    outcome = Comparison()
    suites = [stored_suites(folder) for folder in (older, newer)]
    for name, experiment in EXPERIMENTS.items():
        if experiments is None or name in experiments:
            with making_sense_of(newer / f"{name}.json"):
                compare_suites(experiment, suites[0].get(name, {}), suites[1].get(name, {}), min_speed, outcome)
    if not outcome.cells:
        raise ResultError(f"{newer}: no cell in it is in {older} too: nothing to compare")
    return outcome


def stored_suites(folder: Path) -> dict[str, dict[str, pyperf.Benchmark]]:
    """The suites of a folder by experiment.

    Raises:
        ResultError: no such folder, no result file in it, or a damaged one.
    """
    if not folder.is_dir():
        raise ResultError(f"{folder}: no such folder; expected one with result files of python -m bench")
    found = {name: load_suite(path) for name in EXPERIMENTS if (path := folder / f"{name}.json").exists()}
    if not found:
        raise ResultError(f"{folder}: no result file in it; expected those that python -m bench writes, mmio-cache.json and others")
    return found


Suite = dict[str, pyperf.Benchmark]


def compare_suites(experiment: Experiment, older: Suite, newer: Suite, min_speed: float, outcome: Comparison) -> None:
    """One experiment."""
    rows = [{row.cell.name: row for row in related(experiment, suite)} for suite in (older, newer)]
    outcome.left += [name for name in rows[0] if name not in rows[1]]
    outcome.new += [name for name in rows[1] if name not in rows[0]]
    digests = [{cell.name: digest_of(metrics) for cell, metrics in cells_of(suite).items()} for suite in (older, newer)]
    for name, new in rows[1].items():
        old = rows[0].get(name)
        if old is None:
            continue
        outcome.cells += 1
        compare_counters(experiment, name, old.counters, new.counters, outcome)
        if digests[0][name] != digests[1][name] and GONE not in (digests[0][name], digests[1][name]):
            outcome.counters.append((f"{name} / digest of what was delivered", digests[0][name], digests[1][name]))
        compare_ratios(name, old, new, min_speed, outcome)
    compare_machines(older, newer, outcome)


def digest_of(metrics: dict[str, pyperf.Benchmark]) -> str:
    """The digest that a cell's benchmarks carry."""
    return str(next(iter(metrics.values())).get_metadata().get("digest", GONE))


def compare_counters(experiment: Experiment, name: str, old: dict[str, int], new: dict[str, int], outcome: Comparison) -> None:
    """Counters that both have, exactly; those that are measurements are left out."""
    for counter, value in new.items():
        if counter in old and old[counter] != value and not any(fnmatch(counter, pattern) for pattern in experiment.measured):
            outcome.counters.append((f"{name} / {counter}", f"{old[counter]:,}", f"{value:,}"))


def compare_ratios(name: str, old: Related, new: Related, min_speed: float, outcome: Comparison) -> None:
    """The time in relation to the plain cell's, a value for each round."""
    if new.is_plain or not (old.times and new.times and old.plain and new.plain) or new.over is None or new.over != old.over:
        return
    if min(len(old.times), len(new.times)) < FEWEST_ROUNDS:
        outcome.undecided += 1
        return
    outcome.compared += 1
    found = CompareResult(*(CompareData(name, relative_time(name, row)) for row in (old, new)), min_speed)
    if not found.significant:
        return
    change = found.norm_mean
    outcome.slower += change > 1
    outcome.faster += change < 1
    said = f"{change:.2f}x slower" if change > 1 else f"{1 / change:.2f}x faster"
    texts = (ratio_of(row.plain or [], row.times or [], cost=new.over.cost).text for row in (old, new))
    score = "-" if found.t_score is None else f"{found.t_score:.1f}"
    outcome.ratios.append((name, *texts, said, score, nanoseconds(old.times), nanoseconds(new.times)))


def relative_time(name: str, row: Related) -> pyperf.Benchmark:
    """Own time over plain time, a run for each round."""
    pairs = zip(row.times or [], row.plain or [], strict=True)
    told = {"name": name, "unit": "second"}
    return pyperf.Benchmark([pyperf.Run([own / plain], metadata=told, collect_metadata=False) for own, plain in pairs])


def compare_machines(older: Suite, newer: Suite, outcome: Comparison) -> None:
    """What the files say of the machines."""
    timed = [next((one for one in suite.values() if one.get_unit() == "second"), None) for suite in (older, newer)]
    if timed[0] is None or timed[1] is None:
        return
    old, new = (one.get_metadata() for one in timed if one is not None)
    for name in MACHINE:
        if name in old and name in new and old[name] != new[name]:
            outcome.machine[name.replace("_", " ")] = (str(old[name]), str(new[name]))
