"""The benchmark harness: order of rounds, ratios, result files, the command, and what an interruption leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyperf
import pytest
from conftest import ROOT
from test_replay_file import meta, save, small_columns

from bench import interrupts, rounds
from bench.experiment import Cell, CheckError, Context, Timed
from bench.mmio_cache import check_workload
from bench.prices import Prices
from bench.report import committed_folders, summary_text, tables_of, with_readme_block, write_report
from bench.results import PRIVATE_METADATA, ResultError, load_suite, per_million, public_run, write_suites
from bench.rounds import Plan, WorkerError, calibrate, measure
from bench.suite import matches
from bench.tables import ratio_text
from bench.workloads import BUNDLED_TRACE, TAKEN, TAKEN_END, remap_invlpg, trace_workload
from fastmmu._jit import JIT

compiled_only = pytest.mark.skipif(not JIT, reason="pyperf's workers run compiled code whatever this process does")


def bench(*arguments: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)


def fake_run(value: float, **metadata: object) -> pyperf.Run:
    return pyperf.Run([value], metadata={"name": "a/b/c/time", "unit": "second", **metadata}, collect_metadata=False)


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def worker(plan: Plan, *_: object) -> pyperf.Run:
        order.append(plan.cell.strategy)
        return fake_run(len(order))

    monkeypatch.setattr(rounds, "run_worker", worker)
    plans = [Plan(Cell("e", "w", name), 1, 0) for name in ("a", "b", "c")]
    runs = measure(plans, 3, Context(Path("x"), None), lambda: None)
    assert order == ["a", "b", "c"] * 3
    assert [run.values for run in runs[plans[1].cell]] == [(2.0,), (5.0,), (8.0,)]


def test_loops_are_calibrated_from_the_best_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 0.0, 0.004, 0.0, 0.002, 0.0, 0.003])
    monkeypatch.setattr("bench.experiment.time.perf_counter", lambda: next(clock))
    calls: list[str] = []
    work = Timed(lambda: calls.append("once"), lambda: calls.append("reset"), lambda: 42, 7)
    plan = calibrate(Cell("e", "w", "s"), work)
    assert (plan.loops, plan.digest) == (10, 42)
    assert calls == ["reset", "once"] * 4, "preparation comes before each run and outside the clock"


def test_ratios_are_formed_within_a_round() -> None:
    assert ratio_text([4.0, 8.0, 40.0], [2.0, 4.0, 20.0], cost=False) == "2.00 [2.00, 2.00]"
    assert ratio_text([4.0, 8.0, 40.0], [2.0, 4.0, 20.0], cost=True) == "0.50 [0.50, 0.50]"
    assert ratio_text([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], cost=False).startswith("unstable [1.75, 3.25]")


def test_per_million_keeps_what_is_not_zero() -> None:
    assert [per_million(*pair) for pair in ((0, 9), (1, 3_000_000), (1, 2), (0, 0))] == [0, 1, 500_000, 0]


def test_patterns_select_cells() -> None:
    name = "mmio-cache/linux-boot/generation"
    assert all(matches(name, pattern) for pattern in (None, "mmio-cache", "*/generation", "linux-boot/gen", name))
    assert not any(matches(name, pattern) for pattern in ("replay", "*/none", "gva"))


def test_a_disagreement_with_the_reference_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmmu.reference.replay import Generation

    monkeypatch.setattr(Generation, "clear", lambda self: False)
    with pytest.raises(CheckError, match="mmio-cache/remap-invlpg/generation: counters differ from the reference"):
        check_workload(remap_invlpg(), "generation")


def test_result_files_name_neither_machine_nor_paths(tmp_path: Path) -> None:
    private = dict.fromkeys(PRIVATE_METADATA - {"boot_time", "uptime", "command"}, "secret-machine")
    run = public_run(fake_run(1.0, **private), {"fastmmu_hits": 0})
    write_suites(tmp_path, {"a": [pyperf.Benchmark([run])]})
    assert "secret-machine" not in (tmp_path / "a.json").read_text()
    assert load_suite(tmp_path / "a.json")["a/b/c/time"].get_metadata()["fastmmu_hits"] == 0
    for path in [path for folder in committed_folders(ROOT / "results") for path in folder.glob("*.json")]:
        text = path.read_text()
        assert not any(f'"{name}"' in text for name in PRIVATE_METADATA), path


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suites = {"a": [pyperf.Benchmark([fake_run(1.0)])], "b": [pyperf.Benchmark([fake_run(2.0)])]}
    write_suites(tmp_path, suites)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    dumped: list[int] = []
    honest = pyperf.BenchmarkSuite.dump

    def failing(self: pyperf.BenchmarkSuite, file: object) -> None:
        dumped.append(1)
        if len(dumped) == 2:
            raise OSError(28, "No space left on device")
        honest(self, file)

    monkeypatch.setattr(pyperf.BenchmarkSuite, "dump", failing)
    with pytest.raises(ResultError, match="cannot be written: No space left"):
        write_suites(tmp_path, suites)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot be written"):
        write_suites(tmp_path / "file" / "below", suites)


def test_damaged_result_files_are_refused(tmp_path: Path) -> None:
    for text in ("", "{}", '{"version": "1.0"', "[1]"):
        (tmp_path / "mmio-cache.json").write_text(text)
        with pytest.raises(ResultError, match="not a pyperf result file"):
            tables_of(tmp_path)
    path = tmp_path / "mmio-cache.json"
    for name, said in (("a", "expected mmio-cache/workload/strategy/metric"), ("mmio-cache/a/b/time", "not a whole result file")):
        pyperf.Benchmark([pyperf.Run([1.0], metadata={"name": name}, collect_metadata=False)]).dump(str(path), replace=True)
        with pytest.raises(ResultError, match=said):
            tables_of(tmp_path)
        with pytest.raises(ResultError, match=said):
            write_report(tmp_path, Prices())


def test_summary_and_readme_are_generated_from_the_files() -> None:
    results = ROOT / "results"
    assert committed_folders(results), "results of a run are in the repository"
    assert (results / "SUMMARY.md").read_text() == summary_text(results)
    readme = (ROOT / "README.md").read_text()
    assert readme == with_readme_block(readme, results)


def test_list_and_unknown_names() -> None:
    listed = bench("--list")
    assert listed.returncode == 0
    names = listed.stdout.split()
    assert "mmio-cache/linux-boot/generation" in names and "replay/linux-boot/walk" in names and "walk/256gib/many" in names
    unknown = bench("--only", "nothing-like-this")
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1
    assert bench("--trace", "/does/not/exist.npz").stderr == "error: /does/not/exist.npz: No such file; expected an .npz file\n"


@compiled_only
def test_a_quick_run_writes_suites_that_pyperf_reads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = bench("--quick", "--only", "/linux-boot/", "--output", str(out))
    assert run.returncode == 0, run.stderr
    assert "speed-up over none" in run.stdout
    run = bench("--quick", "--only", "replay", "--output", str(out))
    assert run.returncode == 0 and "cost over the bare walk" in run.stdout, run.stderr
    assert sorted(path.name for path in out.iterdir()) == ["figures", "mmio-cache.json", "replay.json", "report.html"]
    suite = load_suite(out / "mmio-cache.json")
    timed = suite["mmio-cache/linux-boot/generation/time"]
    metadata = timed.get_metadata()
    assert timed.get_nrun() == 3
    devices = int(np.load(BUNDLED_TRACE)["io"][:75_000].sum())
    assert metadata["inner_loops"] == metadata["fastmmu_device_accesses"] == devices
    assert metadata["fastmmu_wrong"] == 0
    count = suite["mmio-cache/linux-boot/none/guest_walks_per_million"]
    assert (count.get_unit(), count.get_values()) == ("integer", (1_000_000,))
    shown = subprocess.run(
        [sys.executable, "-m", "pyperf", "compare_to", str(out / "mmio-cache.json"), str(out / "mmio-cache.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    text = "".join(path.read_text() for path in out.rglob("*.*"))
    assert str(tmp_path) not in text and sys.prefix not in text and os.uname().nodename not in text


@compiled_only
def test_the_trace_is_checked_whatever_is_timed_on_it(tmp_path: Path) -> None:
    with np.load(BUNDLED_TRACE) as archive:
        columns = {name: archive[name] for name in archive.files}
    columns["gpa"] = columns["gpa"].copy()
    columns["gpa"][7] ^= np.uint64(0x1000)
    np.savez(tmp_path / "wrong.npz", **columns)
    run = bench("--quick", "--only", "replay", "--trace", str(tmp_path / "wrong.npz"), "--output", str(tmp_path / "out"))
    assert run.returncode == 2 and "column gpa, record 7: " in run.stderr and run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@compiled_only
def test_a_timed_run_that_delivers_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from bench import suite
    from bench.registry import EXPERIMENTS

    cell = Cell("replay", "linux-boot", "walk")
    one = suite.Suite(Context(BUNDLED_TRACE, 1_000), [cell], Console(quiet=True))
    one.checked[cell] = EXPERIMENTS["replay"].check(one.context, cell)
    assert one.plan(cell).digest == one.checked[cell].expected
    monkeypatch.setattr("bench.suite.calibrate", lambda cell, work: Plan(cell, 1, 12345))
    with pytest.raises(CheckError, match="came to digest 0x3039"):
        one.plan(cell)


@compiled_only
@pytest.mark.parametrize("peer", ["c", "bound", "scalar", "many", "unicorn", "volatility3"])
def test_every_peer_of_the_walk_comes_to_the_same(peer: str) -> None:
    from bench import walk_speed

    cell, context = Cell("walk", "1gib", peer), Context(BUNDLED_TRACE, None)
    if reason := walk_speed.why_not(context, cell):
        pytest.skip(reason)
    expected = walk_speed.expected(walk_speed.guest("1gib"), peer)
    work = walk_speed.timed(context, cell)
    work.run(1)
    assert work.digest() == expected


@compiled_only
@pytest.mark.parametrize("peer", ["walk", "walk-many", "c", "scalar", "npt", "many"])
def test_every_peer_of_the_nested_walk_comes_to_the_same(peer: str) -> None:
    from bench import nested_walk

    cell, context = Cell("nested-walk", "hot", peer), Context(BUNDLED_TRACE, None)
    if reason := nested_walk.why_not(context, cell):
        pytest.skip(reason)
    checked = nested_walk.check(context, cell)
    work = nested_walk.timed(context, cell)
    work.run(1)
    assert work.digest() == checked.expected


@compiled_only
def test_the_nested_caches_read_less_and_come_to_the_same() -> None:
    from bench import nested_caches

    context, reads = Context(BUNDLED_TRACE, 20_000), {}
    for strategy in ("none", "both"):
        cell = Cell("nested-caches", context.workload.name, strategy)
        checked = nested_caches.check(context, cell)
        work = nested_caches.timed(context, cell)
        work.run(1)
        assert work.digest() == checked.expected
        reads[strategy] = checked.counters["guest_reads"] + checked.counters["host_reads"]
    assert 3 * reads["both"] < reads["none"]


def test_output_that_cannot_be_written_is_found_out_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        run = bench("--quick", "--output", str(output), timeout=10)
        assert run.returncode == 2 and "cannot be written" in run.stderr and run.stderr.count("\n") == 1


@compiled_only
def test_a_worker_that_comes_to_another_digest_is_an_error(tmp_path: Path) -> None:
    plan = Plan(Cell("mmio-cache", "linux-boot", "none"), 1, 12345)
    with pytest.raises(WorkerError, match="came to digest"):
        rounds.run_worker(plan, Context(BUNDLED_TRACE, 60_000), tmp_path)


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


@compiled_only
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_result_and_no_worker(tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench", "--rigorous", "--only", "mmio-cache/linux-boot/none", "--output", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers: list[int] = []
    deadline = time.monotonic() + 120
    while not workers and process.poll() is None and time.monotonic() < deadline:
        workers = children_of(process.pid)
        time.sleep(0.01)
    assert workers, process.communicate()
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else 143)
    assert "Traceback" not in errors
    assert not out.exists()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_a_signal_while_a_worker_starts_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    honest = subprocess.Popen

    def starting(command: list[str], **options: object) -> subprocess.Popen[str]:
        started.append(honest(command, **options))
        signal.raise_signal(signal.SIGTERM)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", starting)
    before = {which: signal.getsignal(which) for which in interrupts.SIGNALS}
    interrupts.install()
    try:
        with pytest.raises(interrupts.Interrupted, match="SIGTERM"), rounds.child(["sleep", "60"]):
            pytest.fail("the signal is lost")
    finally:
        interrupts._pending.clear()
        for which, handler in before.items():
            signal.signal(which, handler)
    assert started[0].returncode == -signal.SIGKILL


def test_trace_names_are_made_fit_for_cells(tmp_path: Path) -> None:
    assert trace_workload(BUNDLED_TRACE, 10).name == "linux-boot"
    for name, fit in (("remap-invlpg", "trace-remap-invlpg"), ("data", "trace-data"), ("a-warm", "a-warm-trace"), ("a/b@c=1", "a-b-c-1")):
        assert trace_workload(save(tmp_path / "x.npz", meta(small_columns(), name=name))).name == fit


def test_no_trace_has_the_name_of_a_workload() -> None:
    """Where cells of a trace stand beside those of workloads that an experiment builds."""
    from bench import access_checks, ept_qualification, mmu_cost

    assert {*access_checks.MATRIX, *access_checks.SNAPSHOT_NAMES} <= TAKEN
    assert {workload.split("/")[1] for workload in ept_qualification.WORKLOADS} <= TAKEN
    assert mmu_cost.WARM == TAKEN_END
