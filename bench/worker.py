"""One pyperf worker: times one cell in a process of its own. Called by `rounds.py` as `python -m bench --worker ...`."""

from __future__ import annotations

import sys
from pathlib import Path

import pyperf

from bench.cells import Cell, timed
from bench.workloads import trace_workload


def main() -> None:
    """Time the cell that the command line names; the digest of its result must be the one given."""
    runner = pyperf.Runner(program_args=("-m", "bench"))
    runner.argparser.add_argument("--cell", required=True)
    runner.argparser.add_argument("--trace", required=True, type=Path)
    runner.argparser.add_argument("--records", type=int)
    runner.argparser.add_argument("--digest", required=True, type=int)
    args = runner.parse_args()
    cell = Cell(*args.cell.split("/"))
    work = timed(trace_workload(args.trace, args.records), cell)
    runner.bench_time_func(f"{cell.name}/time", work.run, inner_loops=work.accesses)
    if work.digest() != args.digest:
        sys.exit(f"{cell.name}: a timed run came to digest {work.digest():#x}, expected {args.digest:#x}")
