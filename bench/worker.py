"""One pyperf worker: times one cell in a process of its own. Called by `rounds.py` as `python -m bench --worker ...`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

import pyperf

from bench.experiment import Cell, Context
from bench.registry import EXPERIMENTS

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends, however that ends; stop at once if it has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the benchmark has gone")


def main() -> None:
    """Time the cell that the command line names; the digest of its result must be the one given."""
    runner = pyperf.Runner(program_args=("-m", "bench"))
    runner.argparser.add_argument("--cell", required=True)
    runner.argparser.add_argument("--trace", required=True, type=Path)
    runner.argparser.add_argument("--records", type=int)
    runner.argparser.add_argument("--digest", type=int)
    runner.argparser.add_argument("--parent", required=True, type=int)
    runner.argparser.add_argument("--compile-only", metavar="CELLS")
    if any(argument == "--compile-only" for argument in sys.argv):
        args = runner.argparser.parse_args()
        die_with(args.parent)
        context = Context(args.trace, args.records)
        for name in args.compile_only.split(","):
            cell = Cell.named(name)
            EXPERIMENTS[cell.experiment].timed(context.of(cell), cell).run(1)
        return
    args = runner.parse_args()
    die_with(args.parent)
    cell = Cell.named(args.cell)
    work = EXPERIMENTS[cell.experiment].timed(Context(args.trace, args.records).of(cell), cell)
    runner.bench_time_func(f"{cell.name}/time", work.run, inner_loops=work.accesses)
    if work.digest() != args.digest:
        sys.exit(f"{cell.name}: a timed run came to digest {work.digest():#x}, expected {args.digest:#x}")
