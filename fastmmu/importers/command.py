"""What `fastmmu trace import` does."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from fastmmu.bits import CR0, CR4
from fastmmu.importers.build import NOTHING_MORE, Extra, Report, write_replay
from fastmmu.importers.collect import Collector
from fastmmu.importers.csv_text import CsvReader
from fastmmu.importers.elf import ElfReader
from fastmmu.importers.guess import guess_format
from fastmmu.importers.image import Image, Registers, raw_segments, write_snapshot
from fastmmu.importers.lackey import read_lackey, warm_lackey
from fastmmu.importers.npz import has_tables, read_npz, rewrite
from fastmmu.importers.options import FOR_FORMATS, FORMATS, IMAGES
from fastmmu.importers.rows import Rule
from fastmmu.importers.source import STANDARD_INPUT, Source
from fastmmu.importers.spool import check_output, replaced
from fastmmu.importers.tracepoints import AUTO, Tracepoints
from fastmmu.trace.npz import TraceError

INTERRUPTED = 128 + signal.SIGINT
LONG_MODE = (int(CR0.PE | CR0.WP | CR0.PG), int(CR4.PAE))


def import_command(args: argparse.Namespace) -> int:
    """Run it: 0, or INTERRUPTED after one line.

    Raises:
        TraceError: one line, for exit status 2.
    """
    try:
        with ended_by(signal.SIGTERM, signal.SIGHUP):
            report = import_file(args)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        raise TraceError(f"{args.output}: cannot be written: {error.strerror or error}") from None
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        print_report(report)
    return 0


@contextmanager
def ended_by(*signals: int) -> Iterator[None]:
    """Let signals end the process with its files cleaned up."""
    before = {one: signal.signal(one, lambda number, frame: sys.exit(128 + number)) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def compiling() -> Iterator[None]:
    """Hold Ctrl-C back while something compiles: an exception vanishes in the compiler's callbacks."""
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt


class Bar(Progress):
    """A progress bar of bytes with rate and time left, on the standard error output if that is a terminal."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        console = Console(stderr=True, highlight=False)
        super().__init__(*columns, console=console, transient=True, disable=not sys.stderr.isatty())

    def begin(self, what: str) -> None:
        """A part of the work, with a bar of its own."""
        self.add_task(what, total=None)

    def wrote(self, size: int, total: int) -> None:
        """So many more bytes of the latest part are done."""
        self.update(self.task_ids[-1], total=total, advance=size)


def import_file(args: argparse.Namespace) -> Report:
    """Import one input.

    Raises:
        TraceError: see there.
    """
    piped = args.file == STANDARD_INPUT
    check_output(args.output, None if piped else Path(args.file))
    with Bar() as bar:
        bar.begin("reading")
        with Source(args.file, lambda done: bar.update(0, completed=done)) as source:
            bar.update(0, total=source.total or None)
            head = source.look()
            kind = args.format or guess_format(head) or ("raw" if args.cr3 is not None else "")
            if not kind:
                source.fail(f"is of no format that can be told by its content, expected one of {', '.join(FORMATS)} (--format)")
            check_options(args, kind)
            report = Report(kind, source.name, str(args.output))
            if kind in IMAGES:
                import_image(args, source, report)
            elif kind == "npz":
                import_npz(args, source, report, bar)
            else:
                import_text(args, source, report, bar)
    return report


def check_options(args: argparse.Namespace, kind: str) -> None:
    """Refuse options that would do nothing.

    Raises:
        TraceError: one is given.
    """
    for name, formats in FOR_FORMATS.items():
        if getattr(args, name) is not None and kind not in formats:
            raise TraceError(f"{args.file}: --{name.replace('_', '-')} is for {', '.join(formats)}, this is {kind}")
    if args.max_ptes_none is not None and args.pages != "2m":
        raise TraceError(f"{args.file}: --max-ptes-none is for --pages 2m")


def write(args: argparse.Namespace, collector: Collector, report: Report, bar: Bar, extra: Extra = NOTHING_MORE) -> None:
    """The second pass."""
    bar.begin("writing")
    how = {"large": args.pages == "2m", "absent": args.max_ptes_none or 0, "extra": extra, "progress": bar.wrote}
    with replaced(args.output) as file:
        write_replay(file, collector, report, **how)


def import_text(args: argparse.Namespace, source: Source, report: Report, bar: Bar) -> None:
    """A trace in lines: read, then written."""
    rule = Rule[(args.merge or "consecutive").upper()]
    with closing(Collector(args.output.parent, rule)) as collector:
        with compiling():
            collector.warm()
            warm_lackey()
        if report.format == "lackey":
            read_lackey(source, collector.take, report.skipped)
        elif report.format == "csv":
            table = CsvReader(source, collector.take)
            table.read()
            report.skipped.update(table.skipped)
        else:
            trace = Tracepoints(source, args.address or AUTO, collector.take)
            trace.read()
            report.skipped.update(dict(sorted(trace.skipped.items())))
            report.details.update(dict(sorted(trace.seen.items())))
        report.lines = source.line - 1
        report.notes.append(MERGED[rule])
        write(args, collector, report, bar)


def import_npz(args: argparse.Namespace, source: Source, report: Report, bar: Bar) -> None:
    """A recording: rewritten if it has page tables, else given some."""
    path = source.file_path(args.output.parent)
    with told_as(path, source.name):
        if has_tables(path):
            if args.pages is not None:
                source.fail("has page tables of its own, --pages is for inputs without")
            with replaced(args.output) as file:
                rewrite(path, file, report)
            return
        with closing(Collector(args.output.parent, Rule.NONE)) as collector:
            with compiling():
                collector.warm()
            extra = read_npz(path, collector.take)
            report.notes.append(NPZ_NOTE)
            write(args, collector, report, bar, extra)


MERGED = {
    Rule.NONE: "no accesses were merged",
    Rule.CONSECUTIVE: "consecutive accesses to a page are one record",
    Rule.TLB: "accesses that a TLB of 16 sets by 4 ways holds are one record",
}
NPZ_NOTE = "CR3 loads, if any, load the one root that is built; a page that goes to another frame is remapped, with INVLPG"


@contextmanager
def told_as(path: Path, name: str) -> Iterator[None]:
    """Messages about a copy of the input name the input."""
    try:
        yield
    except TraceError as error:
        raise TraceError(str(error).replace(str(path), name, 1)) from None


def import_image(args: argparse.Namespace, source: Source, report: Report) -> None:
    """A memory image: its page tables as a snapshot."""
    data = memoryview(source.mapped(args.output.parent))
    cr0, cr4 = LONG_MODE
    roots: list[int] = []
    long_mode = True
    if report.format == "elf":
        core = ElfReader(source, data).read()
        segments, long_mode = core.segments, core.long_mode
        if core.cpus:
            cr0, _, cr4 = core.cpus[0]
            roots = list(dict.fromkeys(root for _, root, _ in core.cpus))
            report.notes.append(f"registers of {len(core.cpus)} CPUs from QEMU's notes; CR0 and CR4 of the first")
        elif core.kernel_root is not None:
            roots, cr4 = [core.kernel_root], cr4 | (int(CR4.LA57) if core.la57 else 0)
            report.notes.append("no CPU state; CR3 is the kernel's own root, from vmcoreinfo")
        if args.efer is None:
            report.notes.append("EFER is not in such files: derived from the machine type and bit 63 of entries")
    else:
        segments = raw_segments(len(data), args.hole)
        report.notes.append("byte n of the file is guest physical address n" + (", less the hole" if args.hole else ""))
    if args.cr3 is not None:
        roots = list(dict.fromkeys([args.cr3, *roots]))
    if not roots:
        source.fail("a raw image, expected --cr3" if report.format == "raw" else "no CPU state and no vmcoreinfo, expected --cr3")
    cr0, cr4 = (given if given is not None else value for given, value in ((args.cr0, cr0), (args.cr4, cr4)))
    try:
        with replaced(args.output) as file:
            registers = Registers(cr0, roots, cr4, args.efer)
            report.details.update(write_snapshot(file, Image(data, segments), registers, long_mode))
    except TraceError as error:
        message = str(error)
        raise TraceError(message if message.startswith(str(args.output)) else f"{source.name}: {message}") from None
    report.tables = int(report.details.pop("table_pages"))
    report.built = "page tables are those of the image"


def print_report(report: Report) -> None:
    """The summary as a table."""
    table = Table("imported", "value", title=f"{os.path.basename(report.output)} from {report.format}")
    table.columns[1].justify = "right"
    numbers = {
        "lines": report.lines, "records": report.records, "accesses represented": report.accesses,
        "read records": report.reads, "write records": report.writes, "fetch records": report.fetches,
        "device records": report.device_records, "pages touched": report.pages, "2 MiB pages": report.large_pages,
        "pages remapped": report.remapped, "page-table pages": report.tables,
    }  # fmt: skip
    for name, value in numbers.items():
        if value:
            table.add_row(name, f"{value:,}")
    for name, detail in report.details.items():
        text = ", ".join(detail) if isinstance(detail, list) else f"{detail:,}" if isinstance(detail, int) else str(detail)
        table.add_row(name.replace("_", " "), text)
    for name, value in report.skipped.items():
        table.add_row(f"skipped: {name}", f"{value:,}")
    out = Console(highlight=False)
    out.print(table, markup=False)
    for line in (report.built, *report.notes):
        out.print(line, markup=False, soft_wrap=True)
