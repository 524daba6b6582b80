"""What the commands on machines do: one function for each, which returns the exit status.

What a command needs is imported in it, so that none waits for what others need.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastmmu._jit import JIT
from fastmmu.command_line import HOST_PAGES
from fastmmu.interrupts import end_at_once, restart
from fastmmu.output import BAD_INPUT, complain, progress_console, result_console
from fastmmu.races import RACES
from fastmmu.trace import TraceError, load_replay

if TYPE_CHECKING:
    from fastmmu.validate import Validation

EQUAL, DIFFERS, NOT_BUILT = 0, 1, 3
SHOWN_DIFFERENCES = 20


def tell_compiling(wanted: bool = True) -> None:
    """Say once why nothing seems to happen: the kernels of this build are not in the cache."""
    if not wanted or not JIT or not sys.stderr.isatty():
        return
    from fastmmu.drive import drive

    if not drive.stats.cache_path or not list(Path(drive.stats.cache_path).glob("drive.drive-*.nbi")):
        progress_console().print("compiling the MMU's kernels, once for this build: under a minute")


def races_command(args: argparse.Namespace) -> int:
    """`fastmmu races`: itself without the JIT, where functions can be stopped at each shared word; exit status 1 where a program
    did not come out as it should."""
    unknown = sorted(set(args.names) - set(RACES))
    if unknown:
        complain(f"races: {unknown[0]!r}, expected one of {', '.join(RACES)}")
        return BAD_INPUT
    if JIT:
        restart([sys.executable, "-m", "fastmmu", "races", *args.names], {**os.environ, "NUMBA_DISABLE_JIT": "1"})
    from fastmmu.races.report import explore_all

    signal.signal(signal.SIGINT, end_at_once)
    return EQUAL if explore_all(args.names or RACES, lambda line: print(line, flush=True)) else DIFFERS


def qualification_command(args: argparse.Namespace) -> int:
    """`fastmmu qualification`: numbered steps, and the loop; exit status 1 when an access never completes."""
    from fastmmu.qualification import watch

    try:
        watched = watch(args.acts, strategy=args.strategy, l1=args.l1, execute_only=not args.no_execute_only)
    except ValueError as error:
        complain(error)
        return BAD_INPUT
    if args.json:
        print(json.dumps({**asdict(watched), "completes": watched.completes}))
    else:
        for step in watched.steps:
            print(f"{step.number:4}  {step.text}")
        counted = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in watched.counters.items() if value)
        print(counted)
        if watched.loop:
            print(f"steps {watched.loop[0]} to {watched.loop[1]} come again for ever")
    return EQUAL if watched.completes else DIFFERS


def validate_command(args: argparse.Namespace) -> int:
    """`fastmmu validate`: a table of scenarios and the values that differ; see EQUAL and its neighbours for the status."""
    from fastmmu.machine import NotBuilt
    from fastmmu.trace.scenario import load_scenario
    from fastmmu.validate import validate

    outcomes: list[Validation] = []
    statuses = {EQUAL}
    tell_compiling()
    for path in args.files:
        try:
            outcome = validate(load_scenario(path), audited=args.audit)
        except NotBuilt as error:
            complain(f"{path}: needs {error}, which is not built yet")
            statuses.add(NOT_BUILT)
        except (TraceError, MemoryError) as error:
            complain(error if isinstance(error, TraceError) else f"{path}: {error}")
            statuses.add(BAD_INPUT)
        else:
            outcomes.append(outcome)
            statuses.add(DIFFERS if outcome.differ else EQUAL)
    if args.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    else:
        print_validations(outcomes)
    return next(status for status in (BAD_INPUT, DIFFERS, NOT_BUILT, EQUAL) if status in statuses)


def print_validations(outcomes: list[Validation]) -> None:
    """The table, and under it each value that differs."""
    from rich.table import Table

    from fastmmu.kvm import Kvm

    sets, ways = Kvm().tlb
    table = Table(
        "scenario", "steps", "values compared", "differ", caption=f"TLB of {sets} sets by {ways} ways, emptied at each exit"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    out = result_console()
    for outcome in outcomes:
        table.add_row(outcome.scenario, str(outcome.steps), f"{outcome.compared:,}", str(len(outcome.differ)))
    if outcomes:
        out.print(table)
    for outcome in outcomes:
        for one in outcome.differ[:SHOWN_DIFFERENCES]:
            line = f"{outcome.scenario}, step {one.step}, {one.what}: KVM {one.kvm}, ours {one.ours}"
            out.print(line, markup=False, soft_wrap=True)
        if len(outcome.differ) > SHOWN_DIFFERENCES:
            out.print(f"{outcome.scenario}: {len(outcome.differ) - SHOWN_DIFFERENCES} more")


def replay_command(args: argparse.Namespace) -> int:
    """`fastmmu replay`: a recorded stream through the MMU; exit status 1 at the first record that goes elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from fastmmu.audit_state import AuditError
    from fastmmu.kvm import Kvm
    from fastmmu.machine import MachineError
    from fastmmu.stream import machine_for, replay_stream
    from fastmmu.vm import ReplayError

    if args.ept and args.mmu == "shadow":
        complain("--ept: expected --mmu tdp or legacy")
        return BAD_INPUT
    workload = load_replay(args.file, args.records)
    kvm = Kvm(tdp=args.mmu != "shadow", tdp_mmu=args.mmu == "tdp", nx_huge_pages=args.nx_huge_pages, ept=args.ept, tlb=args.tlb)
    machine = machine_for(workload, kvm, host_level=1 + HOST_PAGES.index(args.host_page))
    tell_compiling()
    done = TextColumn("{task.completed:,}/{task.total:,}")
    columns = (TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=progress_console(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("events", total=len(workload.events))
        try:
            replay_stream(workload, machine, audited=args.audit, progress=lambda done: bar.update(task, completed=done))
        except (ReplayError, MachineError, AuditError) as error:
            complain(f"{args.file}: {error}")
            return DIFFERS
    print_counters(args, workload.name, {name: value for name, value in machine.counters().items() if value})
    return EQUAL


def print_counters(args: argparse.Namespace, stream: str, counters: dict[str, int]) -> None:
    """What a replay counted, zeros left out."""
    from rich.table import Table

    if args.json:
        how = {name: getattr(args, name) for name in ("mmu", "host_page", "tlb", "ept", "nx_huge_pages", "records")}
        print(json.dumps({"stream": stream, **how, "counters": counters}))
        return
    sets, ways = args.tlb
    more = ", EPT" * args.ept + ", NX huge pages" * args.nx_huge_pages
    title = f"{stream}: {args.mmu}{more}, {args.host_page.upper()} host pages, TLB of {sets} sets by {ways} ways"
    table = Table("counter", "value", title=title)
    table.columns[1].justify = "right"
    for name, value in counters.items():
        table.add_row(name, f"{value:,}")
    result_console().print(table)
