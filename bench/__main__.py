"""`python -m bench`: check every cell against the reference, time it in interleaved rounds, print one table, keep the files."""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.interrupts import Interrupted, install

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, QUICK_ROUNDS, RIGOROUS_ROUNDS = 7, 3, 25
QUICK_RECORDS = 75_000  # the Linux boot of the repository touches its first device at record 53,191
COMMITTED_NAME = re.compile(r"\d{4}-\d{2}-\d{2}-")  # of a results folder that SUMMARY.md and README.md are made from
USAGE_ERROR, CHECK_FAILED, BAD_INPUT = 2, 1, 2


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    parser.add_argument("--only", metavar="PATTERN", help="only cells whose name matches: a shell pattern, or a part of the name")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help=f"mmio-cache only, {QUICK_RECORDS:,} records, {QUICK_ROUNDS} rounds")
    effort.add_argument("--rigorous", action="store_true", help=f"{RIGOROUS_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a replay file instead of the bundled Linux boot")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the result files (default: results/local)")
    return parser.parse_args(arguments)


def matches(name: str, pattern: str | None) -> bool:
    """Whether a cell's name is asked for."""
    return pattern is None or pattern in name or fnmatch.fnmatch(name, pattern) or pattern.startswith(f"{name}/")


@dataclass(frozen=True)
class Options:
    """What the command line comes to."""

    trace: Path
    records: int | None
    rounds: int
    output: Path
    only: str | None
    list_cells: bool


def options_of(args: argparse.Namespace) -> Options:
    """Defaults filled in."""
    from bench.workloads import BUNDLED_TRACE

    return Options(
        trace=args.trace or BUNDLED_TRACE,
        records=QUICK_RECORDS if args.quick else None,
        rounds=QUICK_ROUNDS if args.quick else RIGOROUS_ROUNDS if args.rigorous else ROUNDS,
        output=args.output or ROOT / "results" / "local",
        only=args.only,
        list_cells=args.list,
    )


def run(options: Options) -> int:
    """The whole job; returns the exit status."""
    from rich.console import Console

    from bench.experiment import Context
    from bench.registry import EXPERIMENTS
    from bench.results import probe_folder
    from bench.suite import Suite

    context = Context(options.trace, options.records)
    quick = options.records is not None
    wanted = [
        one
        for one in EXPERIMENTS.values()
        if options.list_cells or (options.only or "").startswith(one.name) or (one.by_default and (one.quick or not quick))
    ]
    cells = [cell for one in wanted for cell in one.cells(context)]
    chosen = [cell for cell in cells if matches(cell.name, options.only)]
    if not chosen:
        print(f"--only {options.only}: no cell of that name; --list shows them", file=sys.stderr)
        return USAGE_ERROR
    if options.list_cells:
        for cell in chosen:
            print(cell.name + ("" if EXPERIMENTS[cell.experiment].by_default else "  (only when named with --only)"))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 140)
    probe_folder(options.output)
    suite = Suite(context, chosen, console)
    suite.check()
    suite.measure(options.rounds)
    suite.write(options.output)
    suite.show(options.output)
    folder = options.output.resolve()
    if folder.parent == ROOT / "results" and COMMITTED_NAME.match(folder.name) and options.records is None:
        from bench.report import regenerate

        regenerate(ROOT)
        console.print("results/SUMMARY.md and the tables of README.md regenerated")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point: errors become one line and an exit status."""
    try:
        install()
        args = parse(arguments)
        from bench.experiment import CheckError
        from bench.results import ResultError
        from bench.rounds import WorkerError
        from fastmmu import ReplayError, TraceError

        try:
            return run(options_of(args))
        except ReplayError as error:
            message, status = f"{options_of(args).trace}: {error}", BAD_INPUT
        except (TraceError, ResultError, MemoryError) as error:
            message, status = str(error), BAD_INPUT
        except (CheckError, WorkerError) as error:
            message, status = str(error), CHECK_FAILED
        except OSError as error:
            message, status = f"{error.filename or 'output'}: {error.strerror or error}", BAD_INPUT
    except Interrupted as error:
        message, status = f"interrupted ({error})", error.status
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    if "--worker" in sys.argv[1:]:
        from bench.worker import main as worker

        worker()
    else:
        sys.exit(main())
