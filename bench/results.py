"""Result files: whole pyperf suites, one per experiment, counters as metadata, nothing that names the machine or its paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyperf

PRIVATE_METADATA = frozenset({
    "boot_time", "command", "hostname", "platform", "python_cflags", "python_config_args", "python_executable", "uptime",
})  # fmt: skip
COUNTER_PREFIX = "fastmmu_"


class ResultError(ValueError):
    """A result file that cannot be read or written; one line."""


def public_run(run: pyperf.Run, extra: dict[str, int | str]) -> pyperf.Run:
    """The run with counters added and private metadata left out."""
    kept = {name: value for name, value in run.get_metadata().items() if name not in PRIVATE_METADATA}
    return pyperf.Run(run.values, warmups=run.warmups, metadata={**kept, **extra}, collect_metadata=False)


def count_run(name: str, value: int, extra: dict[str, int | str]) -> pyperf.Run:
    """A count as a run of one value."""
    return pyperf.Run([value], metadata={"name": name, "unit": "integer", **extra}, collect_metadata=False)


def counter_metadata(counters: dict[str, int]) -> dict[str, int | str]:
    """Counters, zeros included, under the project's prefix."""
    return {COUNTER_PREFIX + name: value for name, value in counters.items()}


def count_benchmarks(cell: str, counts: dict[str, int], metadata: dict[str, int | str]) -> list[pyperf.Benchmark]:
    """Benchmarks of unit integer for the counts above zero, lower being better: pyperf accepts no others."""
    return [pyperf.Benchmark([count_run(f"{cell}/{name}", value, metadata)]) for name, value in counts.items() if value > 0]


def per_million(part: int, whole: int) -> int:
    """Rounded up, so that a count above zero stays above zero."""
    return -(-part * 1_000_000 // whole) if whole else 0


def probe_folder(folder: Path) -> None:
    """Find out before an hour of work whether results can be written.

    Raises:
        ResultError: they cannot.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ResultError(f"{folder}: results cannot be written: {existing} is no folder, or not ours to write in")


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write text files by their names below a folder: each beside its place first, then renamed; the last one last.

    Raises:
        ResultError: the folder cannot be written.
    """
    pending: list[tuple[Path, Path]] = []
    try:
        for name, text in texts.items():
            final = folder / name
            final.parent.mkdir(parents=True, exist_ok=True)
            beside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
            pending.append((beside, final))
            beside.write_text(text, encoding="utf-8")
        for beside, final in pending:
            beside.replace(final)
    except OSError as error:
        raise ResultError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        for beside, _ in pending:
            beside.unlink(missing_ok=True)


def write_suites(folder: Path, suites: dict[str, list[pyperf.Benchmark]]) -> list[Path]:
    """Write `<experiment>.json` files: each beside its place first, then renamed, so that no half file is ever seen.

    Raises:
        ResultError: the folder cannot be written.
    """
    written = []
    pending: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for experiment, benchmarks in suites.items():
            final = folder / f"{experiment}.json"
            beside = folder / f".{experiment}.{os.getpid()}.tmp"
            pending.append((beside, final))
            with beside.open("w", encoding="utf-8") as file:
                pyperf.BenchmarkSuite(benchmarks).dump(file)
        for beside, final in pending:
            beside.replace(final)
            written.append(final)
    except OSError as error:
        raise ResultError(f"{folder}: results cannot be written: {error.strerror or error}") from None
    finally:
        for beside, _ in pending:
            beside.unlink(missing_ok=True)
    return written


def load_suite(path: Path) -> dict[str, pyperf.Benchmark]:
    """Benchmarks of one result file by name.

    Raises:
        ResultError: not a pyperf suite.
    """
    try:
        suite = pyperf.BenchmarkSuite.load(str(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ResultError(f"{path}: not a pyperf result file: {error}") from None
    found = {benchmark.get_name(): benchmark for benchmark in suite.get_benchmarks()}
    for name in found:
        if name.count("/") < 3 or not name.startswith(f"{path.stem}/"):
            raise ResultError(f"{path}: benchmark {name!r}, expected {path.stem}/workload/strategy/metric")
    return found


@contextmanager
def making_sense_of(path: Path) -> Iterator[None]:
    """A stored file may be one of pyperf's and still lack what the tables of its experiment need.

    Raises:
        ResultError: it does.
    """
    try:
        yield
    except ResultError:
        raise
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise ResultError(f"{path}: not a whole result file of python -m bench ({type(error).__name__}: {error})") from None


def counters_of(benchmark: pyperf.Benchmark) -> dict[str, int]:
    """The counters that a benchmark carries."""
    metadata = benchmark.get_metadata()
    return {name.removeprefix(COUNTER_PREFIX): value for name, value in metadata.items() if name.startswith(COUNTER_PREFIX)}
