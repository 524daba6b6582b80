"""Interleaved rounds: round r runs one pyperf worker of every cell, so that cells of one round share the machine's mood.

A ratio is formed within a round, its interval over rounds. Workers are pyperf's own; loops are calibrated once, before.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyperf

from bench.experiment import Cell, Context, Timed
from bench.interrupts import checkpoint, held

VALUE_SECONDS = 0.02
"""What one value should last: a few hundred runs of the device stream, far above the clock's resolution."""
VALUES, WARMUPS = 3, 1
WORKER_TIMEOUT = 120


class WorkerError(Exception):
    """A worker failed; the message is its last line."""


@dataclass(frozen=True)
class Plan:
    """A cell ready for its workers: how many loops make a value, and the digest they must come to."""

    cell: Cell
    loops: int
    digest: int


def calibrate(cell: Cell, work: Timed) -> Plan:
    """Run the work in this process: a warm-up that also compiles, then the best of three decides the loops."""
    work.run(1)
    digest = work.digest()
    seconds = min(work.run(1) for _ in range(3))
    return Plan(cell, max(1, math.ceil(VALUE_SECONDS / seconds)), digest)


def worker_command(cell: Cell, context: Context) -> list[str]:
    """Command line of a worker for `cell`, without the options of the measurement."""
    command = [sys.executable, "-m", "bench", "--worker", "--quiet", "--parent", str(os.getpid())]
    command += ["--cell", cell.name, "--trace", str(context.trace)]
    return command if context.records is None else [*command, "--records", str(context.records)]


@contextmanager
def child(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A child process that does not outlive the block, whatever ends it."""
    with held():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            checkpoint()
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def compiling(cells: list[Cell], context: Context) -> Iterator[None]:
    """Compile what the timed cells need into the cache, on the second core, while the block runs; waits for it at the end.

    Where nothing can be cached, or a cell fails, nothing is lost: the cell compiles, or fails, again when it is its turn.
    """
    if not cells:
        yield
        return
    names = ",".join(cell.name for cell in cells)
    with child([*worker_command(cells[0], context), "--compile-only", names]) as process:
        yield
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=WORKER_TIMEOUT)


def run_worker(plan: Plan, context: Context, folder: Path) -> pyperf.Run:
    """One worker process for one cell; it is killed if this process is interrupted.

    Raises:
        WorkerError: it failed, or came to another digest.
    """
    output = folder / "run.json"
    output.unlink(missing_ok=True)
    command = [
        *worker_command(plan.cell, context),
        "--digest", str(plan.digest), "--output", str(output),
        "--loops", str(plan.loops), "--values", str(VALUES), "--warmups", str(WARMUPS),
    ]  # fmt: skip
    with child(command) as process:
        try:
            printed, errors = process.communicate(timeout=WORKER_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise WorkerError(f"{plan.cell.name}: a worker did not end within {WORKER_TIMEOUT} s") from None
    if process.returncode:
        lines = (errors or printed).strip().splitlines() or [f"exit status {process.returncode}"]
        raise WorkerError(f"{plan.cell.name}: worker failed: {lines[-1]}")
    return pyperf.Benchmark.load(str(output)).get_runs()[0]


def measure(plans: list[Plan], rounds: int, context: Context, advance: Callable[[], None]) -> dict[Cell, list[pyperf.Run]]:
    """All rounds; runs by cell, one a round, in the order of the rounds.

    Raises:
        WorkerError: a worker failed.
    """
    runs: dict[Cell, list[pyperf.Run]] = {plan.cell: [] for plan in plans}
    with tempfile.TemporaryDirectory(prefix="fastmmu-bench-") as folder:
        for _ in range(rounds):
            for plan in plans:
                checkpoint()
                runs[plan.cell].append(run_worker(plan, context, Path(folder)))
                advance()
    return runs
