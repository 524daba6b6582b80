"""What the `fastmmu` command does: one function for each subcommand, which returns the exit status."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastmmu._jit import JIT
from fastmmu.audit_state import AuditError
from fastmmu.explain import explain
from fastmmu.kvm import Kvm
from fastmmu.machine import MachineError, NotBuilt
from fastmmu.qualification import watch
from fastmmu.races import RACES
from fastmmu.stream import machine_for, replay_stream
from fastmmu.trace import TraceError, load_replay, load_snapshot
from fastmmu.trace.scenario import load_scenario
from fastmmu.translate import FETCH, USER, WRITE, translate_many
from fastmmu.validate import Validation, validate
from fastmmu.vm import ReplayError

EQUAL, DIFFERS, UNREADABLE, NOT_BUILT = 0, 1, 2, 3
SHOWN_DIFFERENCES = 20
HOST_LEVELS = {"4k": 1, "2m": 2, "1g": 3}


def complain(message: object) -> None:
    """One line on the standard error output."""
    print(f"error: {message}", file=sys.stderr)


def console() -> Console:
    """Where progress goes: the standard error output."""
    return Console(stderr=True, highlight=False)


def tell_compiling(wanted: bool = True) -> None:
    """Say once why nothing seems to happen: the kernels of this build are not in the cache."""
    if not wanted or not JIT or not sys.stderr.isatty():
        return
    from fastmmu.drive import drive

    if not drive.stats.cache_path or not list(Path(drive.stats.cache_path).glob("drive.drive-*.nbi")):
        console().print("compiling the MMU's kernels, once for this build: under a minute")


def races_command(args: argparse.Namespace) -> int:
    """`fastmmu races`: itself without the JIT, where functions can be stopped at each shared word; exit status 1 where a program
    did not come out as it should."""
    unknown = sorted(set(args.names) - set(RACES))
    if unknown:
        complain(f"races: {unknown[0]!r}, expected one of {', '.join(RACES)}")
        return UNREADABLE
    if JIT:
        environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
        return subprocess.run([sys.executable, "-m", "fastmmu", "races", *args.names], env=environment, check=False).returncode
    from fastmmu.races.report import explore_all

    return EQUAL if explore_all(args.names or RACES, lambda line: print(line, flush=True)) else DIFFERS


def translate_command(args: argparse.Namespace) -> int:
    """`fastmmu translate`: one line for each address; exit status 1 when one faults."""
    snapshot = load_snapshot(args.snapshot, cr3=args.cr3, maxphyaddr=args.maxphyaddr)
    access = WRITE * args.write | USER * args.user | FETCH * args.fetch
    told = [explain(snapshot.memory, snapshot.cpu, gva, access) for gva in args.gvas]
    answers = translate_many(snapshot.memory, snapshot.cpu, args.gvas, access)
    for gva, text in zip(args.gvas, told, strict=True):
        print(text if args.explain else f"{gva:#x}: {text.rsplit('=> ', 1)[1]}")
    return EQUAL if answers.ok.all() else DIFFERS


def qualification_command(args: argparse.Namespace) -> int:
    """`fastmmu qualification`: numbered steps, and the loop; exit status 1 when an access never completes."""
    try:
        watched = watch(args.acts, strategy=args.strategy, l1=args.l1, execute_only=not args.no_execute_only)
    except ValueError as error:
        complain(error)
        return UNREADABLE
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
            statuses.add(UNREADABLE)
        else:
            outcomes.append(outcome)
            statuses.add(DIFFERS if outcome.differ else EQUAL)
    if args.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    else:
        print_validations(outcomes)
    return next(status for status in (UNREADABLE, DIFFERS, NOT_BUILT, EQUAL) if status in statuses)


def print_validations(outcomes: list[Validation]) -> None:
    """The table, and under it each value that differs."""
    sets, ways = Kvm().tlb
    table = Table(
        "scenario", "steps", "values compared", "differ", caption=f"TLB of {sets} sets by {ways} ways, emptied at each exit"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    out = Console(highlight=False)
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
    workload = load_replay(args.file, args.records)
    kvm = Kvm(tdp=args.mmu != "shadow", tdp_mmu=args.mmu == "tdp", nx_huge_pages=args.nx_huge_pages, ept=args.ept, tlb=args.tlb)
    machine = machine_for(workload, kvm, host_level=HOST_LEVELS[args.host_page])
    tell_compiling()
    done = TextColumn("{task.completed:,}/{task.total:,}")
    columns = (TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("events", total=len(workload.events))
        try:
            replay_stream(workload, machine, audited=args.audit, progress=lambda done: bar.update(task, completed=done))
        except (ReplayError, MachineError, AuditError) as error:
            complain(f"{args.file}: {error}")
            return DIFFERS
    counters = {name: value for name, value in machine.counters().items() if value}
    if args.json:
        how = {name: getattr(args, name) for name in ("mmu", "host_page", "tlb", "ept", "nx_huge_pages", "records")}
        print(json.dumps({"stream": workload.name, **how, "counters": counters}))
        return EQUAL
    sets, ways = args.tlb
    more = ", EPT" * args.ept + ", NX huge pages" * args.nx_huge_pages
    title = f"{workload.name}: {args.mmu}{more}, {args.host_page.upper()} host pages, TLB of {sets} sets by {ways} ways"
    table = Table("counter", "value", title=title)
    table.columns[1].justify = "right"
    for name, value in counters.items():
        table.add_row(name, f"{value:,}")
    Console(highlight=False).print(table)
    return EQUAL
