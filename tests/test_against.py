"""One folder of results against another: what is called a change, what is not, and the exit status."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyperf
import pytest
from conftest import ROOT

from bench import __main__ as command
from bench.against import FEWEST_ROUNDS, Comparison, compare_folders
from bench.report import headline_folder
from bench.results import COUNTER_PREFIX, ResultError, load_suite, write_suites

STORED = headline_folder(ROOT / "results")
MIN_SPEED = 5.0
Change = Callable[[str, list[tuple[float, ...]], dict[str, object]], tuple[list[tuple[float, ...]], dict[str, object]]]


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A folder with the stored files of three experiments."""
    folder = tmp_path / "older"
    folder.mkdir()
    for name in ("mmio-cache", "replay", "lock-scaling"):
        shutil.copy(STORED / f"{name}.json", folder)
    return folder


def newer(older: Path, change: Change) -> Path:
    """The same files with values or metadata changed, benchmark by benchmark."""
    suites: dict[str, list[pyperf.Benchmark]] = {}
    for path in older.glob("*.json"):
        for name, benchmark in load_suite(path).items():
            runs = benchmark.get_runs()
            values, metadata = change(name, [run.values for run in runs], dict(runs[0].get_metadata()))
            made = [pyperf.Run(one, metadata=metadata, collect_metadata=False) for one in values]
            suites.setdefault(path.stem, []).append(pyperf.Benchmark(made))
    folder = older.with_name("newer")
    write_suites(folder, suites)
    return folder


def times_by(factor: float, *cells: str) -> Change:
    """The times of some cells, longer or shorter by a factor; of all where none is named."""

    def change(name: str, values: list[tuple[float, ...]], metadata: dict[str, object]):
        hit = name.endswith("/time") and (not cells or name.rsplit("/", 1)[0] in cells)
        return [tuple(value * factor for value in one) if hit else one for one in values], metadata

    return change


def compared(older: Path, change: Change, min_speed: float = MIN_SPEED) -> Comparison:
    return compare_folders(older, newer(older, change), min_speed)


def test_nothing_changed(older: Path) -> None:
    outcome = compare_folders(older, older, MIN_SPEED)
    assert (outcome.status, outcome.slower, outcome.faster) == (0, 0, 0)
    assert not outcome.tables() and not outcome.left and not outcome.new and not outcome.machine
    assert outcome.compared == 4, "three cached strategies and the replay"
    assert len(outcome.words()) == 1


def test_one_strategy_that_is_slower_is_told(older: Path) -> None:
    outcome = compared(older, times_by(1.3, "mmio-cache/linux-boot/generation"))
    assert (outcome.status, outcome.slower, outcome.faster) == (1, 1, 0)
    ((name, old, new, change, _, before, after),) = outcome.ratios
    assert name == "mmio-cache/linux-boot/generation" and change == "1.30x slower"
    assert old.startswith("2.83") and new.startswith("2.18") and float(after) == pytest.approx(1.3 * float(before), abs=0.01)


def test_a_cost_that_grows_is_slower_too(older: Path) -> None:
    """The replay's ratio is a cost: there a larger one is worse."""
    outcome = compared(older, times_by(1.3, "replay/linux-boot/replay"))
    assert (outcome.slower, outcome.ratios[0][3]) == (1, "1.30x slower")


def test_faster_is_no_failure(older: Path) -> None:
    outcome = compared(older, times_by(0.7, "mmio-cache/linux-boot/generation"))
    assert (outcome.status, outcome.faster) == (0, 1) and outcome.ratios[0][3] == "1.43x faster"


def test_a_plain_strategy_that_is_slower_makes_the_others_faster(older: Path) -> None:
    outcome = compared(older, times_by(1.5, "mmio-cache/linux-boot/none"))
    assert (outcome.slower, outcome.faster) == (0, 3)


def test_another_machine_changes_no_ratio(older: Path) -> None:
    outcome = compared(older, times_by(2.0))
    assert outcome.status == 0 and not outcome.ratios


def test_small_changes_are_none(older: Path) -> None:
    change = times_by(1.04, "mmio-cache/linux-boot/generation")
    assert compared(older, change).status == 0
    assert compared(older, change, min_speed=0.0).status == 1


def test_noise_is_no_change(older: Path) -> None:
    """The mean is slower by far, but in two rounds only."""

    def noisy(name: str, values: list[tuple[float, ...]], metadata: dict[str, object]):
        if name != "mmio-cache/linux-boot/generation/time":
            return values, metadata
        return [tuple(value * (2.5 if number < 2 else 1) for value in one) for number, one in enumerate(values)], metadata

    outcome = compared(older, noisy)
    assert (outcome.status, outcome.compared) == (0, 4)


def test_counters_that_changed_are_named(older: Path) -> None:
    def changed(name: str, values: list[tuple[float, ...]], metadata: dict[str, object]):
        if name.startswith("mmio-cache/remap-invlpg/generation/"):
            metadata[COUNTER_PREFIX + "hits"] = 98
        if name.startswith("lock-scaling/"):  # those are measured, but for the published ones
            metadata |= {key: 7 for key in metadata if key.startswith((f"{COUNTER_PREFIX}simulated", f"{COUNTER_PREFIX}outside"))}
        return values, metadata

    outcome = compared(older, changed)
    assert outcome.status == 1 and not outcome.slower
    assert outcome.counters == [("mmio-cache/remap-invlpg/generation / hits", "100", "98")]


def test_a_digest_is_compared_too(older: Path) -> None:
    def changed(name: str, values: list[tuple[float, ...]], metadata: dict[str, object]):
        return values, metadata | ({"digest": "0"} if name == "mmio-cache/linux-boot/none/guest_walks_per_million" else {})

    outcome = compared(older, changed)
    assert outcome.status == 1 and outcome.counters[0][0].startswith("mmio-cache/linux-boot/none / digest")


def test_cells_of_one_folder_alone_are_named_and_decide_nothing(older: Path) -> None:
    folder = older.with_name("part")
    shutil.copytree(older, folder)
    (folder / "replay.json").unlink()
    outcome = compare_folders(older, folder, MIN_SPEED)
    assert outcome.status == 0 and outcome.left == ["replay/linux-boot/walk", "replay/linux-boot/replay"]
    assert any("only in the older folder: 2 cells (replay/linux-boot/walk" in line for line in outcome.words())
    assert compare_folders(older, folder, MIN_SPEED, ["mmio-cache"]).left == []
    for path in older.glob("[ml]*.json"):
        path.unlink()
    with pytest.raises(ResultError, match="nothing to compare"):
        compare_folders(older, folder, MIN_SPEED)


def test_machines_that_differ_are_told(older: Path) -> None:
    def moved(name: str, values: list[tuple[float, ...]], metadata: dict[str, object]):
        return values, metadata | ({"cpu_model_name": "Other"} if "cpu_model_name" in metadata else {})

    outcome = compared(older, moved)
    assert outcome.status == 0
    assert outcome.words()[0] == "cpu model name: AMD EPYC there, Other here: absolute times are not comparable"


def test_few_rounds_decide_nothing(older: Path) -> None:
    slow = times_by(3.0, "mmio-cache/linux-boot/generation")

    def short(name: str, values: list[tuple[float, ...]], metadata: dict[str, object]):
        values, metadata = slow(name, values, metadata)
        return values[: FEWEST_ROUNDS - 1], metadata

    outcome = compared(older, short)
    assert (outcome.status, outcome.compared, outcome.undecided) == (0, 0, 4)


@pytest.mark.parametrize(("change", "status"), [(times_by(1.0), 0), (times_by(1.3, "mmio-cache/linux-boot/generation"), 1)])
def test_the_command_says_what_changed(
    older: Path, change: Change, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "install", lambda: None)
    assert command.main(["--against", str(older), str(newer(older, change))]) == status
    told = capsys.readouterr()
    assert not told.err and f"{status} slower, 0 faster beyond noise; 0 counters changed" in told.out
    assert ("1.30x slower" in told.out) == bool(status)


def test_stored_files_are_reported_and_compared_with_costs(
    older: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "install", lambda: None)
    folder = newer(older, times_by(1.3, "mmio-cache/linux-boot/generation"))
    assert command.main(["--report", str(folder), "--against", str(older), "--exit-cost", "0"]) == 1
    told = capsys.readouterr()
    assert not told.err and "projection, mmio-cache" in told.out and "exit cost 0 ns" in told.out and "1.30x slower" in told.out
    assert (folder / "report.html").exists() and not (older / "report.html").exists()


def test_the_command_refuses_what_it_cannot_read(
    older: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "install", lambda: None)
    (older.with_name("damaged")).mkdir()
    (older.with_name("damaged") / "mmio-cache.json").write_text('{"version": "1.0"')
    for folder, said in (("nowhere", "no such folder"), ("damaged", "not a pyperf result file")):
        assert command.main(["--against", str(older), str(older.with_name(folder))]) == 2
        assert command.main(["--against", str(older.with_name(folder))]) == 2, "before anything is measured"
        told = capsys.readouterr()
        assert told.err.count("\n") == 2 and said in told.err and not told.out
