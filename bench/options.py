"""The command line of `python -m bench`: what can be asked, and what it comes to."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bench.prices import COSTS, Prices

ROUNDS, QUICK_ROUNDS, RIGOROUS_ROUNDS = 7, 3, 25
QUICK_RECORDS = 75_000  # the Linux boot of the repository touches its first device at record 53,191
MIN_SPEED = 5.0
MOST_NANOSECONDS = 1e12

DESCRIPTION = """\
Check every cell against the reference, time it in interleaved rounds, print
tables, keep the files and write report.html beside them. A cell is one strategy
on one workload: experiment/workload/strategy. Without options: the experiments
that take a minute together, on a recorded Linux boot.
"""
EPILOG = """\
exit status:
  0  done; with --against: nothing is slower beyond noise, no counter has changed
  1  a cell disagrees with the reference, or a worker failed; with --against:
     something is slower, or a counter has changed
  2  bad input: an unknown name or value, a file that cannot be read or written

examples:
  python -m bench                               the main job
  python -m bench --only fast-page-fault        an experiment that is not in it
  python -m bench --trace my.npz                your own recording: every
                                                experiment that it can answer
  python -m bench --report                      report.html from stored files
  python -m bench --against results/older       measure, then compare: for CI
  python -m bench --against older newer         compare two folders of files
  python -m bench compare mmio-cache --vary slots=1,8,64,512
                                                one question
"""
COMPARE = """\
One question: some strategies of one experiment, with parameters of the workload
varied, measured in interleaved rounds and printed as a table, JSON or CSV.
Nothing is stored. A ratio is to the experiment's plain strategy, or to the first
one named where that is left out. Projected times are counts times the costs
assumed, no measurements.
"""
COMPARE_EPILOG = """\
exit status: 0 done; 1 a check failed; 2 bad input

examples:
  python -m bench compare mmio-cache --strategies gva-only,generation
  python -m bench compare mmio-cache --vary slots=1,8,64,512 --csv
  python -m bench compare fast-page-fault --vary pages=4096,65536 --json
"""
AGAINST = (
    "measure, then compare with the files of an older folder; with two folders, compare those and measure nothing. What decides is "
    "a ratio to the plain strategy, formed within each run, that changed by pyperf's t-test and by at least --min-speed, and any "
    "counter that changed; absolute times of two runs stand beside and decide nothing"
)


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


class UsageError(ValueError):
    """A command line that asks for what there is not; one line that names what there is."""


@dataclass(frozen=True)
class Options:
    """What the command line of the main job comes to; None where nothing was named."""

    trace: Path | None
    records: int | None
    rounds: int
    output: Path | None
    only: str | None
    list_cells: bool
    report: Path | None
    report_only: bool
    against: tuple[Path, ...]
    min_speed: float
    prices: Prices
    priced: bool


@dataclass(frozen=True)
class Question:
    """What the command line of `compare` comes to."""

    experiment: str
    trace: Path | None
    strategies: tuple[str, ...]
    workloads: tuple[str, ...]
    vary: tuple[tuple[str, tuple[int, ...]], ...]
    rounds: int | None
    form: str
    prices: Prices


def parser() -> argparse.ArgumentParser:
    """The parser of both."""
    raw = argparse.RawDescriptionHelpFormatter
    main = Parser(prog="python -m bench", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    main.add_argument("--list", action="store_true", help="list the cells and stop")
    main.add_argument("--only", metavar="PATTERN", help="only cells whose name matches: a shell pattern, or a part of the name")
    effort = main.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help=f"mmio-cache only, {QUICK_RECORDS:,} records, {QUICK_ROUNDS} rounds")
    effort.add_argument("--rigorous", action="store_true", help=f"{RIGOROUS_ROUNDS} rounds instead of {ROUNDS}")
    add_trace(main)
    main.add_argument("--output", type=Path, metavar="DIR", help="folder for the result files (default: results/local)")
    main.add_argument(
        "--report", nargs="?", type=Path, const=True, metavar="DIR",
        help="measure nothing: write report.html and figures/ from the files stored in DIR (default: results/local, or the newest "
        "folder of the repository where there is none)",
    )  # fmt: skip
    main.add_argument("--against", nargs="+", type=Path, metavar=("OLDER", "NEWER"), help=AGAINST)
    main.add_argument(
        "--min-speed", type=percentage, default=MIN_SPEED, metavar="PERCENT",
        help=f"with --against: a smaller change is none, as with pyperf's option of that name (default: {MIN_SPEED:g})",
    )  # fmt: skip
    add_costs(main)
    compare = main.add_subparsers(dest="command", metavar="compare", title="one question", help="see: compare --help").add_parser(
        "compare", description=COMPARE, formatter_class=raw, epilog=COMPARE_EPILOG
    )
    compare.add_argument("experiment", metavar="EXPERIMENT", help="its name; an unknown one prints all")
    add_trace(compare)
    compare.add_argument("--strategies", metavar="A,B,...", type=names, default=(), help="only these, in this order (default: all)")
    compare.add_argument(
        "--workloads", metavar="A,B,...", type=names, default=(),
        help="only these (default: the ones that are timed and have the parameters varied)",
    )  # fmt: skip
    compare.add_argument(
        "--vary", metavar="NAME=V,V,...", action="append", type=variation, default=[],
        help="values of a parameter of the workload; may be given again for another parameter: every combination is measured. "
        "An unknown name prints those that the experiment has, with their meaning",
    )  # fmt: skip
    compare.add_argument(
        "--rounds", type=positive, metavar="N", help=f"interleaved rounds (default: {ROUNDS}, or what the experiment needs)"
    )
    form = compare.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", default="table", help="JSON, all counters in it")
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="CSV, a column for each counter")
    add_costs(compare)
    return main


def add_trace(to: argparse.ArgumentParser) -> None:
    """The option for a recording."""
    text = "a replay file (docs/replay-format.md) instead of the bundled Linux boot; what it cannot answer is named, and why"
    to.add_argument("--trace", type=Path, metavar="FILE", help=text)


def add_costs(to: argparse.ArgumentParser) -> None:
    """The options for the costs that projections assume."""
    group = to.add_argument_group("projections", "counts times costs, in a table beside the measured times; costs are assumptions")
    for cost in COSTS:
        text = f"{cost.paid_for} (default: {cost.default:g}; {cost.source})".replace("%", "%%")
        group.add_argument(f"--{cost.name}-cost", type=nanoseconds, metavar="NS", help=text)


def nanoseconds(text: str) -> float:
    """A cost."""
    return number(text, 0, MOST_NANOSECONDS, "nanoseconds, 0 or more")


def percentage(text: str) -> float:
    """A share of a hundred."""
    return number(text, 0, 1e6, "a percentage, 0 or more")


def number(text: str, least: float, most: float, expected: str) -> float:
    """A number in a range."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return value


def positive(text: str) -> int:
    """A number of rounds."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 1 to 1000")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}, expected names with commas between them")
    return found


def variation(text: str) -> tuple[str, tuple[int, ...]]:
    """A parameter and its values."""
    name, _, values = text.partition("=")
    parts = [part.strip().replace("_", "") for part in values.split(",")]
    if not name.strip() or not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a parameter and whole numbers: slots=1,8,64")
    return name.strip(), tuple(dict.fromkeys(int(part) for part in parts))


def parse(arguments: list[str] | None = None) -> Options | Question:
    """The command line, checked as far as it can be without the experiments.

    Raises:
        UsageError: options that do not go together.
    """
    args = parser().parse_args(arguments)
    given = {cost.name: value for cost in COSTS if (value := getattr(args, f"{cost.name}_cost")) is not None}
    prices = Prices(**given)
    if args.command == "compare":
        vary = dict(args.vary)
        if len(vary) < len(args.vary):
            raise UsageError("--vary: a parameter twice; give all its values at once: slots=1,8,64")
        return Question(
            args.experiment, args.trace, args.strategies, args.workloads, tuple(vary.items()), args.rounds, args.form, prices
        )
    if args.only is not None and not args.only.strip():
        raise UsageError("--only: an empty pattern, expected a part of a cell's name; --list shows them")
    against = tuple(args.against or ())
    if len(against) > 2:
        raise UsageError(f"--against: {len(against)} folders, expected an older one, or an older and a newer one")
    if args.report is not None and len(against) == 2:
        raise UsageError("--report and --against: the newer folder is that of the report; name the older one only")
    if args.report is not None and args.output is not None:
        raise UsageError("--report writes beside the files that it reads: name their folder behind it, without --output")
    return Options(
        trace=args.trace,
        records=QUICK_RECORDS if args.quick else None,
        rounds=QUICK_ROUNDS if args.quick else RIGOROUS_ROUNDS if args.rigorous else ROUNDS,
        output=args.output,
        only=args.only,
        list_cells=args.list,
        report=args.report if isinstance(args.report, Path) else None,
        report_only=args.report is not None,
        against=against,
        min_speed=args.min_speed,
        prices=prices,
        priced=bool(given),
    )
