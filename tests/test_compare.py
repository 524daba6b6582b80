"""One question asked on the command line: which cells it comes to, in which order they run, and what is printed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyperf
import pytest
from conftest import ROOT
from test_replay_file import meta, save, small_columns

from bench import __main__ as command
from bench import access_checks, ept_qualification, fast_faults, mmio_cache, rounds, run
from bench.compare import chosen_cells, experiment_named
from bench.experiment import Cell, Context
from bench.options import Options, Question, UsageError, parse
from bench.prices import Prices
from bench.registry import EXPERIMENTS
from bench.rounds import Plan, worker_command
from bench.suite import FEWEST_RECORDS, Suite
from bench.workloads import BUNDLED_TRACE, trace_workload
from fastmmu._jit import JIT
from fastmmu.events import Op

compiled_only = pytest.mark.skipif(not JIT, reason="a whole recording: compiled code only")
TIMES = {"stale": 3e-9, "derived": 2e-9}
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """The command in this process: status, output, errors."""
    monkeypatch.setattr(command, "install", lambda: None)

    def called(*arguments: str) -> tuple[int, str, str]:
        try:
            status = command.main(list(arguments))
        except SystemExit as ended:
            status = int(ended.code or 0)
        told = capsys.readouterr()
        return status, told.out, told.err

    return called


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the cells in the order in which workers ran; each takes as long as its strategy says, and no worker is started."""
    ran: list[str] = []

    def worker(plan: Plan, *_: object) -> pyperf.Run:
        ran.append(plan.cell.name)
        value = TIMES[plan.cell.strategy] * (1 + 0.01 * (len(ran) % 3))
        return pyperf.Run([value], metadata={"name": f"{plan.cell.name}/time", "unit": "second"}, collect_metadata=False)

    monkeypatch.setattr(rounds, "run_worker", worker)
    monkeypatch.setattr("bench.suite.compiling", lambda cells, context: nullcontext())
    return ran


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """The first records of the bundled trace, none of which is of a device."""
    return save(tmp_path / "short.npz", meta(small_columns(), name="short"))


def question(experiment: str, **parts: object) -> Question:
    asked = parse(["compare", experiment])
    assert isinstance(asked, Question)
    return replace(asked, **parts)


ASKED = ("compare", "ept-qualification", "--workloads", "write-with-read/data", "--vary", "length=1,2", "--vary", "copies=2,3",
         "--rounds", "2")  # fmt: skip


def test_every_combination_runs_in_interleaved_rounds(bench: Bench, order: list[str]) -> None:
    status, out, err = bench(*ASKED, "--json")
    assert status == 0, err
    cells = [f"ept-qualification/write-with-read/data@copies={copies}@length={length}/{strategy}"
             for length in (1, 2) for copies in (2, 3) for strategy in TIMES]  # fmt: skip
    assert order == cells * 2
    told = json.loads(out)
    assert [(row["length"], row["copies"], row["strategy"]) for row in told["rows"]] == [
        (length, copies, strategy) for length in (1, 2) for copies in (2, 3) for strategy in TIMES
    ]
    for row in told["rows"]:
        assert row["counters"]["accesses"] == 2 ** row["length"] * row["length"] * row["copies"]
        assert row["ratio_of"] == "speed-up over stale" and row["ratio"]["rounds"] == 2
        assert row["measured_ns"] == pytest.approx(TIMES[row["strategy"]] * 1e9, rel=0.03)
        exits = row["counters"]["violations"] + row["counters"]["misconfigurations"]
        assert row["projected_ns"] == pytest.approx(1000 * exits / row["counters"]["accesses"])
    assert {row["ratio"]["median"] for row in told["rows"] if row["strategy"] == "stale"} == {1.0}
    assert all(1.4 < row["ratio"]["median"] < 1.6 for row in told["rows"] if row["strategy"] == "derived")
    assert told["projection_assumes"] == {"exit_ns": 1000.0, "flush_ns": 2000.0, "lock_ns": 100.0}


def test_the_first_named_strategy_stands_in_for_the_plain_one(bench: Bench, order: list[str]) -> None:
    status, out, _ = bench(*ASKED, "--strategies", "derived", "--csv", "--exit-cost", "0")
    assert status == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 4 and {row["ratio_of"] for row in rows} == {"speed-up over derived"}
    assert {row["ratio"] for row in rows} == {"1.0"} and {row["projected_ns"] for row in rows} == {"0.0"}
    assert {"length", "copies", "violations", "never_completed"} <= set(rows[0])


def test_the_table_pipes(bench: Bench, order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    patient = replace(EXPERIMENTS["ept-qualification"], rounds=20)
    monkeypatch.setitem(EXPERIMENTS, patient.name, patient)
    status, out, _ = bench(*ASKED)
    assert len(order) == 2 * 8, "the rounds that are asked for, whatever the experiment likes best"
    assert status == 0 and "\x1b" not in out and "speed-up over stale" in out and "no measurement" in out
    assert sum("write-with-read/data / " in line for line in out.splitlines()) == 8


@pytest.mark.parametrize(("arguments", "said"), [
    (["nope"], "experiment 'nope': there is none; there are: mmio-cache, access-checks"),
    (["mmio-cache", "--strategies", "none,nope"], "--strategies 'nope': there is none; there are: none, gva-only"),
    (["mmio-cache", "--workloads", "nope"], "--workloads 'nope': there is none; there are: linux-boot, remap-invlpg"),
    (["mmio-cache", "--vary", "nope=1"], "has no parameter 'nope'; it has: slots: memslots"),
    (["lock-scaling", "--vary", "slots=1"], "lock-scaling has no parameters that can be varied"),
    (["mmio-cache", "--vary", "slots=0"], "slots=0, expected 1 to 32,764"),
    (["mmio-cache", "--vary", "slots"], "expected a parameter and whole numbers"),
    (["mmio-cache", "--vary", "slots=-1"], "expected a parameter and whole numbers"),
    (["mmio-cache", "--vary", "slots=1", "--vary", "slots=2"], "a parameter twice"),
    (["mmio-cache", "--workloads", "remap-invlpg", "--vary", "slots=2"], "no workload that is asked for has all"),
    (["mmio-cache", "--rounds", "0"], "expected 1 to 1000"),
    (["mmio-cache", "--strategies", ","], "expected names with commas"),
    (["mmio-cache", "--lock-cost", "nan"], "expected nanoseconds"),
    (["mmio-cache", "--trace", "/does/not/exist"], "No such file"),
    ([], "required: EXPERIMENT"),
])  # fmt: skip
def test_what_there_is_not_is_named_in_one_line(bench: Bench, arguments: list[str], said: str) -> None:
    status, out, err = bench("compare", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err and err.startswith("error: ")


@pytest.mark.parametrize(("arguments", "said"), [
    (["--only", " "], "an empty pattern"),
    (["--against", "a", "b", "c"], "3 folders"),
    (["--report", "/does/not/exist"], "no result files in it"),
    (["--report", str(BUNDLED_TRACE)], "is no folder, expected one with result files"),
    (["--report", "a", "--output", "b"], "without --output"),
    (["--report", "a", "--against", "b", "c"], "name the older one only"),
    (["--exit-cost", "-1"], "expected nanoseconds"),
    (["--min-speed", "x"], "expected a percentage"),
    (["--quick", "--rigorous"], "not allowed with"),
    (["--nonsense"], "unrecognized arguments"),
])  # fmt: skip
def test_the_main_job_complains_in_one_line(bench: Bench, arguments: list[str], said: str) -> None:
    status, out, err = bench(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err


def test_names_of_cells_hold_their_parameters() -> None:
    cell = Cell("e", "a/b", "s").having("slots", 8).having("records", 5)
    assert cell.name == "e/a/b@records=5@slots=8/s" and Cell.named(cell.name) == cell
    assert cell.having("slots", 9).value("slots", 1) == 9 and cell.value("nope", 3) == 3
    assert "," not in cell.name, "names of cells are given to a worker with commas between them"
    command_line = worker_command(cell, Context(Path("x"), 7))
    assert command_line[command_line.index("--cell") + 1] == cell.name


def test_a_context_has_as_many_records_as_the_cell_says() -> None:
    context = Context(BUNDLED_TRACE, None)
    cell = Cell("mmio-cache", "linux-boot", "none")
    assert context.of(cell) is context and context.of(cell.having("slots", 2)) is context
    cut = context.of(cell.having("records", 300))
    assert cut is context.of(cell.having("records", 300).having("slots", 2))
    assert len(cut.workload.events) == len(trace_workload(BUNDLED_TRACE, 300).events)


def test_the_default_workloads_are_those_that_are_timed() -> None:
    context = Context(BUNDLED_TRACE, None)
    one = experiment_named("mmio-cache")
    names = [cell.name for cell in chosen_cells(one, context, question("mmio-cache", vary=(("slots", (1, 8)),)))]
    assert names == [f"mmio-cache/linux-boot@slots={n}/{name}" for n in (1, 8) for name in ("none", "gva-only", "gva+cr3", "generation")]
    assert {cell.workload for cell in chosen_cells(one, context, question("mmio-cache"))} == {"linux-boot"}
    swapped = question("mmio-cache", strategies=("generation", "none"))
    assert [cell.strategy for cell in chosen_cells(one, context, swapped)] == ["generation", "none"]
    vcpus = chosen_cells(EXPERIMENTS["fast-page-fault"], context, question("fast-page-fault", vary=(("vcpus", (3, 8)),)))
    assert {cell.workload for cell in vcpus} == {f"{mmu}/resume-{n}" for mmu in ("tdp", "legacy") for n in (3, 8)}
    assert {fast_faults.threads_of(cell) for cell in vcpus} == {3, 8}


def test_memory_in_parts_is_the_same_memory() -> None:
    slots = [(0, 0x9000, "ram"), (0x9000, 0xA000, "rom"), (0x10_0000, 0x12_3000, "ram"), (0xF000_0000, 0xF000_1000, "device")]
    parts = mmio_cache.divided(slots, 8)
    pieces = sorted(slot for slot in parts if slot[0] >= 0x10_0000 and slot[2] == "ram")
    assert len(pieces) == 7 + (0x23 % 5 > 0) and all(low % 4096 == 0 for low, _, _ in pieces)
    assert pieces[0][0] == 0x10_0000 and pieces[-1][1] == 0x12_3000
    assert all(before[1] == after[0] for before, after in pairwise(pieces))
    assert [slot for slot in parts if slot not in pieces] == [slots[0], slots[1], slots[3]]


@compiled_only
def test_memslots_change_no_count() -> None:
    context = Context(BUNDLED_TRACE, 54_000)
    cell = Cell("mmio-cache", "linux-boot", "generation")
    whole, parts = (mmio_cache.check(context, one) for one in (cell, cell.having("slots", 64)))
    assert whole.counters == parts.counters and whole.expected == parts.expected
    work = mmio_cache.timed(context, cell.having("slots", 64))
    work.run(1)
    assert work.digest() == parts.expected
    assert len(mmio_cache.workload_of(context, cell.having("slots", 64)).slots) > 64


def options(trace: Path, **parts: object) -> Options:
    asked = parse(["--trace", str(trace)])
    assert isinstance(asked, Options)
    return replace(asked, **parts)


def test_a_trace_answers_what_it_can_and_the_rest_is_named(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = Context(short, None, own=True)
    cells = run.traced_cells(options(short), context)
    told = dict(line.split(f": not answered by {short}: ") for line in capsys.readouterr().err.splitlines())
    assert {cell.experiment for cell in cells}.isdisjoint(told)
    assert {cell.experiment for cell in cells} | set(told) == set(EXPERIMENTS)
    assert told["mmio-cache"] == told["ept-qualification"] == told["mmio-mmu"] == "it has no device accesses"
    assert told["walk"] == run.NO_TRACE
    assert all(any(part.startswith("short") for part in cell.workload.split("/")) for cell in cells)
    assert {"access-checks", "replay", "fast-page-fault", "mmu", "shadow-caches"} <= {cell.experiment for cell in cells}
    only = run.traced_cells(options(short, only="replay"), context)
    assert {cell.experiment for cell in only} == {"replay"} and not capsys.readouterr().err
    with pytest.raises(UsageError, match="can be answered by it"):
        run.traced_cells(options(short, only="walk"), context)


def test_what_no_trace_is_needed_for_is_not_run_with_it(bench: Bench, short: Path) -> None:
    status, out, err = bench("--trace", str(short), "--only", "mmio-cache", "--list")
    assert (status, out) == (2, "") and f"mmio-cache: not answered by {short}: it has no device accesses\n" in err
    status, out, _ = bench("--trace", str(short), "--only", "replay", "--list")
    assert (status, out.split()) == (0, ["replay/short/walk", "replay/short/replay"])
    for name, reason in (("mmio-cache", "it has no device accesses"), ("walk", "no recording enters it")):
        status, _, err = bench("compare", name, "--trace", str(short))
        assert status == 2 and reason in err and err.count("\n") == 1


def test_the_main_job_is_what_it_was() -> None:
    """What runs without options, and its cost, do not grow with what can be asked."""
    asked = parse([])
    assert isinstance(asked, Options)
    cells = run.cells_named(asked, Context(BUNDLED_TRACE, None))
    assert {cell.experiment for cell in cells if not EXPERIMENTS[cell.experiment].by_default} == set()
    assert {"mmio-cache", "access-checks", "replay", "ept-qualification"} <= {cell.experiment for cell in cells}
    assert len([cell for cell in cells if cell.experiment == "mmio-cache"]) == 24
    assert not [cell for cell in cells if cell.parameters]
    quick = run.cells_named(replace(asked, records=75_000), Context(BUNDLED_TRACE, 75_000))
    assert {cell.experiment for cell in quick} == {"mmio-cache"}


def test_a_short_trace_is_counted_not_timed(short: Path) -> None:
    from rich.console import Console

    context = Context(short, None, own=True)
    suite = Suite(context, access_checks.traced(context), Console(quiet=True))
    assert set(suite.reasons.values()) == {f"1,500 records, fewer than {FEWEST_RECORDS:,}"}
    suite.cells = suite.cells[:1]
    suite.checked[suite.cells[0]] = suite.checked_cell(suite.cells[0])
    counters = suite.checked[suite.cells[0]].counters
    assert counters["accesses"] > 100 and counters["exits"] >= counters["accesses"]
    names = {benchmark.get_name() for benchmark in suite.benchmarks()["access-checks"]}
    assert "access-checks/short/after-walk/exits" in names


@compiled_only
def test_a_traces_device_accesses_as_those_of_a_nested_guest() -> None:
    context = Context(BUNDLED_TRACE, 54_000, own=True)
    rows = ept_qualification.traced_accesses(context)
    events = context.workload.events[context.workload.events["op"] == Op.DEVICE]
    assert len(rows) == len(events) > 100
    assert np.array_equal(rows["value"] == ept_qualification.WRITE, events["access"] & 2 != 0)
    pages = dict(zip((events["value"] >> np.uint64(12)).tolist(), rows["gfn"].tolist(), strict=True))
    assert sorted(pages.values()) == list(range(len(pages)))
    for cell in ept_qualification.traced(context):
        checked = ept_qualification.check(context, cell)
        assert checked.counters["accesses"] == len(rows)
        assert (checked.counters["never_completed"] > 0) == (cell.workload.startswith("exact/") and cell.strategy == "stale")


def test_only_the_first_pages_are_accessed() -> None:
    context, cell = Context(BUNDLED_TRACE, None), Cell("access-checks", "matrix-wp1", "once")
    case = access_checks.case_of(context, cell.having("pages", 3))
    assert len(case.gvas) == 12 and np.array_equal(case.gvas, access_checks.case_of(context, cell).gvas[:12])
    assert access_checks.check(context, cell.having("pages", 3)).counters["accesses"] == 12


def test_prices_come_from_the_command_line() -> None:
    asked = parse(["--flush-cost", "7"])
    assert isinstance(asked, Options) and asked.priced and asked.prices == Prices(flush=7.0)
    plain = parse([])
    assert isinstance(plain, Options) and not plain.priced and plain.prices == Prices()


def rows_of_docs(head: str) -> dict[str, str]:
    """The rows of the table of docs/bench.md that begins with that line, by experiment: what stands behind its name."""
    table = (ROOT / "docs" / "bench.md").read_text().split(f"{head}\n", 1)[1].split("\n\n", 1)[0]
    rows = [line.strip("| ").split(" | ", 1) for line in table.splitlines()[1:]]
    return {name: rest for names, rest in rows for name in re.findall("`(.*?)`", names)}


def test_the_docs_know_what_answers_a_trace_and_what_varies() -> None:
    traced = rows_of_docs("| experiment | what it does with a trace | cannot answer |")
    assert set(traced) == {name for name, one in EXPERIMENTS.items() if one.traced is not None}
    varied = rows_of_docs("| experiment | parameters |")
    told = {name: set(re.findall("`(.*?)`", rest)) for name, rest in varied.items()}
    assert told == {name: {one.name for one in found.parameters} for name, found in EXPERIMENTS.items() if found.parameters}
