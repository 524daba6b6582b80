"""The text of `valgrind --tool=lackey --trace-mem=yes`: one access a line, parsed by a kernel.

A line is `I  04016d80,3`: the kind (I fetch, L load, S store, M modify), the address in hexadecimal, the size in bytes. Lines of
valgrind itself (`==pid==`, `--pid--`, `**pid**`), of superblocks (`SB`), and empty ones are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from fastmmu._jit import inner, kernel
from fastmmu.bits import ONE, PAGE_SIZE, ZERO, field
from fastmmu.importers.rows import FETCH, FLAG, READ, WRITE, Rows, make_rows
from fastmmu.importers.source import Source

NEWLINE, RETURN, SPACE, COMMA = (np.uint8(ord(letter)) for letter in "\n\r ,")
LETTER_S, LETTER_B = np.uint8(ord("S")), np.uint8(ord("B"))
DIGIT_0, DIGIT_9 = np.uint8(ord("0")), np.uint8(ord("9"))
NO_DIGIT, NO_KIND = 16, 255
MARKS = tuple(np.uint8(ord(letter)) for letter in "=-*")


def table_of(values: dict[str, int], default: int) -> np.ndarray:
    """A value for each byte: looked up, because branches on what a byte is are taken at random."""
    table = np.full(256, default, np.uint8)
    for letters, value in values.items():
        table[[ord(letter) for letter in letters]] = value
    return table


DIGITS = table_of({f"{value:x}{value:X}": value for value in range(16)}, NO_DIGIT)
KINDS = table_of({"I": FETCH, "L": READ, "SM": WRITE}, NO_KIND)
TEN = np.uint64(10)
NIBBLE = np.uint64(4)
HIGHEST = np.uint64(56)  # bits 63:56 of an address are equal under five levels of tables
HIGH_ONES = field(7, 0)
LARGEST = np.uint64(PAGE_SIZE)
SHORTEST = 6  # bytes of a line: I 0,1 and the newline


class Line(IntEnum):
    """What a chunk's parser came to, and its counters."""

    ROWS = 0
    MESSAGES = 1
    SUPERBLOCKS = 2
    BLANK = 3
    AT = 4  # where the line in question begins
    LINE = 5  # its number in the chunk, from 0


class Wrong(IntEnum):
    """What is wrong with a line."""

    NOTHING = 0
    KIND = 1
    ADDRESS = 2
    SIZE = 3
    END = 4


EXPECTED = {
    Wrong.KIND: "a lackey record: I, L, S or M, an address in hexadecimal, a comma, a size",
    Wrong.ADDRESS: "a canonical address in hexadecimal without 0x, and a comma",
    Wrong.SIZE: f"a size of 1 to {PAGE_SIZE} bytes after the comma",
    Wrong.END: "nothing after the size",
}


@inner(inline=True)
def canonical(gva):
    """Whether an address can be one under five levels of tables."""
    top = gva >> HIGHEST
    return top == ZERO or (top ^ HIGH_ONES) == ZERO


@inner(inline=True)
def skipped_as(text, at):
    """The counter of a line that is skipped, or ROWS for one that must be a record."""
    byte = text[at]
    if byte == NEWLINE or (byte == RETURN and text[at + 1] == NEWLINE):
        return Line.BLANK
    if byte == LETTER_S and text[at + 1] == LETTER_B:
        return Line.SUPERBLOCKS
    if (byte == MARKS[0] or byte == MARKS[1] or byte == MARKS[2]) and text[at + 1] == byte:
        return Line.MESSAGES
    return Line.ROWS


@inner(inline=True)
def parse_record(text, at, rows, row):
    """One record that begins at its letter, into row `row`: (what is wrong, where the next line begins)."""
    kind = KINDS[text[at]]
    if kind == NO_KIND or text[at + 1] != SPACE:
        return Wrong.KIND, at
    at += 2
    while text[at] == SPACE:
        at += 1
    return parse_access(text, at, kind, rows, row)


@inner(inline=True)
def parse_access(text, at, kind, rows, row):
    """The rest of a record from its address on: as `parse_record`."""
    gva, begin = ZERO, at
    digit = DIGITS[text[at]]
    while digit != NO_DIGIT:
        gva = gva << NIBBLE | np.uint64(digit)
        at += 1
        digit = DIGITS[text[at]]
    if at == begin or at - begin > 16 or text[at] != COMMA:
        return Wrong.ADDRESS, at
    at += 1
    size, begin = ZERO, at
    while text[at] >= DIGIT_0 and text[at] <= DIGIT_9 and at - begin < 5:
        size = size * TEN + np.uint64(text[at] - DIGIT_0)
        at += 1
    if size == ZERO or size > LARGEST:
        return Wrong.SIZE, at
    if gva > ~(size - ONE) or not canonical(gva) or not canonical(gva + (size - ONE)):
        return Wrong.ADDRESS, at
    if text[at] == RETURN:
        at += 1
    if text[at] != NEWLINE:
        return Wrong.END, at
    rows.gva[row], rows.size[row], rows.kind[row] = gva, np.uint16(size), kind
    return Wrong.NOTHING, at + 1


@inner(inline=True)
def usual_kind(text, at):
    """The kind of a line as lackey prints it, `I  ` or ` L `, whose address begins at its fourth byte; NO_KIND for any other."""
    if at + 3 >= len(text):
        return np.uint8(NO_KIND)
    first, second = text[at], text[at + 1]
    kind = KINDS[first] & KINDS[second]  # one of the two is a space, with all bits set
    usual = (first == SPACE) ^ (second == SPACE) and text[at + 2] == SPACE and text[at + 3] != SPACE
    return kind if usual else np.uint8(NO_KIND)


@kernel
def parse_lackey(text, rows, told):
    """Parse whole lines into rows; `told` is int64[len(Line)]. Returns what is wrong with the line at told[AT], a `Wrong`."""
    at, row = 0, 0
    told[Line.LINE] = 0
    while at < len(text):
        told[Line.AT] = at
        kind = usual_kind(text, at)
        if kind != NO_KIND:
            wrong, at = parse_access(text, at + 3, kind, rows, row)
            if wrong != Wrong.NOTHING:
                return wrong
            row += 1
            told[Line.LINE] += 1
            continue
        while text[at] == SPACE:  # the newline at the end of the text stops every search
            at += 1
        which = skipped_as(text, at)
        if which == Line.ROWS:
            wrong, at = parse_record(text, at, rows, row)
            if wrong != Wrong.NOTHING:
                return wrong
            row += 1
        else:
            told[which] += 1
            while text[at] != NEWLINE:
                at += 1
            at += 1
        told[Line.LINE] += 1
    told[Line.ROWS] = row
    return Wrong.NOTHING


def read_lackey(source: Source, take: Callable[[Rows, int], object], skipped: dict[str, int]) -> None:
    """Parse the text and hand it on in blocks: `take(rows, how many)`. `skipped` counts the lines that are no records.

    Raises:
        TraceError: FILE:LINE: what was expected.
    """
    rows = make_rows(0)
    told = np.zeros(len(Line), np.int64)
    for chunk in source.chunks():
        if len(rows.gva) < len(chunk) // SHORTEST + 1:
            rows = make_rows(len(chunk) // SHORTEST + 1, int(FLAG.USER))
        wrong = Wrong(parse_lackey(np.frombuffer(chunk, np.uint8), rows, told))
        if wrong:
            line = chunk[told[Line.AT] : chunk.index(b"\n", told[Line.AT])]
            source.fail_line(source.line + int(told[Line.LINE]), line, EXPECTED[wrong])
        take(rows, int(told[Line.ROWS]))
        source.line += int(told[Line.LINE])
    names = {Line.MESSAGES: "messages of valgrind", Line.SUPERBLOCKS: "superblocks", Line.BLANK: "blank lines"}
    skipped.update({name: int(told[which]) for which, name in names.items() if told[which]})


def warm_lackey() -> None:
    """Compile, or load, the parser."""
    parse_lackey(np.frombuffer(b"", np.uint8), make_rows(0), np.zeros(len(Line), np.int64))
