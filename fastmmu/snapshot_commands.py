"""What the commands on snapshots do: one function for each, which returns the exit status."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastmmu.address_space import FETCH as MAY_FETCH
from fastmmu.address_space import GLOBAL, LEAF_LEVELS, Regions, regions
from fastmmu.address_space import USER as MAY_USER
from fastmmu.address_space import WRITE as MAY_WRITE
from fastmmu.explain import MODE_NAMES, MODES, Explanation, explain_walk, page_bytes, size_text
from fastmmu.output import result_console
from fastmmu.paging import Mode
from fastmmu.processor import mmu_of
from fastmmu.trace import Snapshot, load_snapshot
from fastmmu.translate import FETCH, USER, WRITE

if TYPE_CHECKING:
    from rich.tree import Tree

DONE, FAULTS = 0, 1


def snapshot_of(args: argparse.Namespace) -> Snapshot:
    """The snapshot that the command line names."""
    return load_snapshot(args.snapshot, cr3=args.cr3, maxphyaddr=args.maxphyaddr)


def walks_of(args: argparse.Namespace) -> list[Explanation]:
    """The walks that the command line asks for.

    Raises:
        TraceError: see `load_snapshot`. GeneralProtection: CR3 cannot be loaded, which is no fault of an address.
    """
    snapshot = snapshot_of(args)
    mmu_of(snapshot.memory, snapshot.cpu)
    access = WRITE * args.write | USER * args.user | FETCH * args.fetch
    return [explain_walk(snapshot.memory, snapshot.cpu, gva, access) for gva in args.gvas]


def status_of(walks: list[Explanation]) -> int:
    """Whether all of them end at an address."""
    return FAULTS if any(walk.gpa is None for walk in walks) else DONE


def translate_command(args: argparse.Namespace) -> int:
    """`fastmmu translate`: one line for each address; exit status 1 when one faults."""
    walks = walks_of(args)
    if args.explain:
        print_trees(walks)
    else:
        for gva, walk in zip(args.gvas, walks, strict=True):
            print(f"{gva:#x}: {walk.answer}")
    return status_of(walks)


def explain_command(args: argparse.Namespace) -> int:
    """`fastmmu explain`: a tree for each address; exit status 1 when one faults."""
    walks = walks_of(args)
    if args.json:
        print(json.dumps([as_json(gva, walk) for gva, walk in zip(args.gvas, walks, strict=True)]))
    else:
        print_trees(walks)
    return status_of(walks)


def as_json(gva: int, walk: Explanation) -> dict[str, Any]:
    """A walk for programs: addresses and entries as hexadecimal strings, which no reader of JSON rounds."""
    steps = [asdict(step) | {name: hex_or_none(getattr(step, name)) for name in ("address", "value")} for step in walk.steps]
    answer = {"gpa": hex_or_none(walk.gpa), "page": walk.page, "pferr": hex_or_none(walk.pferr), "answer": walk.answer}
    return {"gva": hex(gva), "question": walk.question, "steps": steps, "ok": walk.gpa is not None, **answer}


def hex_or_none(value: int | None) -> str | None:
    """A number as a hexadecimal string."""
    return None if value is None else hex(value)


def print_trees(walks: list[Explanation]) -> None:
    """The walks as trees."""
    out = result_console()
    for walk in walks:
        out.print(walk_tree(walk))


def walk_tree(walk: Explanation) -> Tree:
    """A walk as a tree: each entry below the one that points to its table. Colours only repeat what the words say."""
    from rich.text import Text
    from rich.tree import Tree

    tree = branch = Tree(Text(walk.question, "bold"))
    for step in walk.steps:
        label = Text(str(step), "" if step.rights else "red")
        label.highlight_regex(r"\(.*\)$", "cyan")
        if step.rights:
            label.append(" ").append(step.rights, "green")
        if step.decides:
            label.append(f" <- {step.decides}", "bold red")
        branch = branch.add(label)
    branch.add(Text(f"=> {walk.answer}", "bold red" if walk.gpa is None else "bold green"))
    return tree


# --- regions


def map_command(args: argparse.Namespace) -> int:
    """`fastmmu map`: a line for each region."""
    snapshot = snapshot_of(args)
    found = regions(snapshot.memory, snapshot.cpu, by_gpa=args.gpa)
    if args.user:
        found = found.of(found.rights & MAY_USER != 0)
    rows = rows_of(found, snapshot.cpu.mode, args.gpa)
    if args.json:
        head = {"mode": MODE_NAMES[snapshot.cpu.mode], "cr3": hex(snapshot.cpu.cr3), "cr3s": [hex(cr3) for cr3 in snapshot.cr3s]}
        print(json.dumps({**head, "regions": [as_hexadecimal(row) for row in rows]}))
    elif args.csv:
        print_csv(rows, size_names(snapshot.cpu.mode), args.gpa)
    else:
        print_map(snapshot, found, list(rows))
    return DONE


def size_names(mode: Mode) -> tuple[str, ...]:
    """Names of the page sizes of a mode by level: 4K, 2M, 1G."""
    if mode == Mode.NONE:
        return ()
    levels = LEAF_LEVELS if mode in (Mode.LONG4, Mode.LONG5) else LEAF_LEVELS - 1
    sizes = (size_text(page_bytes(MODES[mode], level + 1)) for level in range(levels))
    return tuple(size.replace(" ", "").removesuffix("iB") for size in sizes)


def rights_text(rights: int) -> str:
    """Rights in the form urwxg, a dash for what is missing."""
    flags = ((MAY_USER, "u"), (None, "r"), (MAY_WRITE, "w"), (MAY_FETCH, "x"), (GLOBAL, "g"))
    return "".join(letter if flag is None or rights & int(flag) else "-" for flag, letter in flags)


def rows_of(found: Regions, mode: Mode, with_gpa: bool) -> Iterator[dict[str, Any]]:
    """The regions as rows of Python objects; `end` is the first address behind one."""
    names = size_names(mode)
    for start, size, rights, gpa, pages in zip(*(column.tolist() for column in found), strict=True):
        row: dict[str, Any] = {"start": start, "end": start + size, "size": size, "rights": rights_text(rights)}
        if with_gpa:
            row["gpa"] = gpa
        row["pages"] = {name: count for name, count in zip(names, pages, strict=False) if count}
        yield row


def as_hexadecimal(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its addresses as hexadecimal strings."""
    return {name: hex(value) if name in ("start", "end", "gpa") else value for name, value in row.items()}


def print_csv(rows: Iterator[dict[str, Any]], names: tuple[str, ...], with_gpa: bool) -> None:
    """The regions as CSV, the pages of each size in a column of their own."""
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["start", "end", "size", "rights", *(["gpa"] if with_gpa else []), *(f"pages_{name.lower()}" for name in names)])
    for row in rows:
        pages = as_hexadecimal(row)
        counts = pages.pop("pages")
        out.writerow([*pages.values(), *(counts.get(name, 0) for name in names)])


def print_map(snapshot: Snapshot, found: Regions, rows: list[dict[str, Any]]) -> None:
    """The regions as aligned lines, below a line that sums them up."""
    mode = snapshot.cpu.mode
    if mode == Mode.NONE:
        print("paging is off: every address is its own gpa")
        return
    total = dict(zip(size_names(mode), found.pages.sum(0).tolist(), strict=False))
    others = ", ".join(hex(cr3) for cr3 in snapshot.cr3s if cr3 != snapshot.cpu.cr3)
    print(f"{MODE_NAMES[mode]}, CR3 {snapshot.cpu.cr3:#x}" + (f" (others: {others})" if others else ""))
    print(f"regions: {len(rows):,}, bytes: {size_text(int(found.size.sum()))}, pages: {pages_text(total) or 'none'}")
    width = 8 if mode in (Mode.TWO_LEVEL, Mode.PAE) else 16
    with_gpa = bool(rows) and "gpa" in rows[0]
    print(f"{'start':{width}} {'end':{width}} {'gpa ' + ' ' * 9 if with_gpa else ''}{'size':>11} rights pages")
    for row in rows:
        gpa = f"{row['gpa']:012x} " if with_gpa else ""
        size, pages = size_text(row["size"]), pages_text(row["pages"])
        print(f"{row['start']:0{width}x} {row['end']:0{width}x} {gpa}{size:>11} {row['rights']:6} {pages}")


def pages_text(pages: dict[str, int]) -> str:
    """Pages by size: 12 of 4K, 3 of 2M."""
    return ", ".join(f"{count:,} of {name}" for name, count in pages.items() if count)
