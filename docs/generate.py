"""Generates docs/bit-layouts.md from fastmmu/bits.py: `python docs/generate.py`. A test says when the page is stale."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

from fastmmu import bits

PAGE = Path(__file__).with_name("bit-layouts.md")
HEAD = """\
# Bit layouts

Generated from `fastmmu/bits.py` by `python docs/generate.py`; do not edit. In code a layout is an instance:
`gpte & GPTE64.NX`. A second statement of every mask, by hand from the manuals, is `tests/test_bits.py`. "facts" are the notes
that the rules of [KVM's model](kvm.md) were written from.
"""


def positions(mask: int) -> str:
    """Bits of a mask as the manuals write them: 51:12, or 51, 0 where they are apart."""
    numbers = [position for position in reversed(range(64)) if mask >> position & 1]
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[0] + pair[1])]
    return ", ".join(f"{run[0]}:{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def comment_of(line: str) -> str:
    """What stands behind a line of code, in a cell of a table."""
    return line.partition("  # ")[2].replace("|", "\\|")


def tables() -> Iterator[str]:
    """The sections of the page, in the order of the source."""
    source = inspect.getsource(bits)
    lines = source.splitlines()
    names = {type(value).__name__: name for name, value in vars(bits).items() if hasattr(value, "_fields") and name.isupper()}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        layout = getattr(bits, names[node.name])
        yield f"## {names[node.name]}\n\n{inspect.cleandoc(ast.get_docstring(node) or '')}\n"
        rows = ["| field | bits | mask | |", "|---|---:|---:|---|"]
        for member in node.body:
            if isinstance(member, ast.AnnAssign):
                mask = int(getattr(layout, member.target.id))  # type: ignore[union-attr]
                rows.append(f"| {member.target.id} | {positions(mask)} | {mask:#x} | {comment_of(lines[member.lineno - 1])} |")
        yield "\n".join(rows) + "\n"
    yield "## Single values\n"
    yield "\n".join(["| name | value | |", "|---|---:|---|", *single_values(ast.parse(source), lines)]) + "\n"


def single_values(tree: ast.Module, lines: list[str]) -> Iterator[str]:
    """Rows for the values that have a name and a comment of their own."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and comment_of(lines[node.lineno - 1]):
            value = getattr(bits, node.targets[0].id)
            shown = f"{int(value):#x}" if isinstance(value, np.uint64) else str(value)
            yield f"| {node.targets[0].id} | {shown} | {comment_of(lines[node.lineno - 1])} |"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *tables()])


if __name__ == "__main__":
    PAGE.write_text(page())
