"""Rows on their way from a parser to records, and what the tables will have to map: tuples of arrays that kernels take."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from fastmmu.bits import bit, field

READ, WRITE, FETCH = range(3)
UNKNOWN = field(63, 0)
"""A guest physical address that the input does not tell; a slot that holds no record."""


class Flag(NamedTuple):
    """What is known of an access, and, of all accesses together, of a mapping."""

    USER: np.uint64 = bit(0)
    WRITE: np.uint64 = bit(1)
    FETCH: np.uint64 = bit(2)
    DEVICE: np.uint64 = bit(3)


FLAG = Flag()


class Rows(NamedTuple):
    """Accesses as an input tells them, one row each."""

    gva: np.ndarray  # uint64, byte address
    gpa: np.ndarray  # uint64, byte address or UNKNOWN
    size: np.ndarray  # uint16, bytes, 1 to 4096
    count: np.ndarray  # uint32, accesses that the row stands for
    kind: np.ndarray  # uint8
    flags: np.ndarray  # uint8, Flag bits


def make_rows(length: int, flags: int = 0) -> Rows:
    """Rows of one access of one byte each, their guest physical addresses unknown."""
    return Rows(
        np.zeros(length, np.uint64),
        np.full(length, UNKNOWN, np.uint64),
        np.ones(length, np.uint16),
        np.ones(length, np.uint32),
        np.zeros(length, np.uint8),
        np.full(length, flags, np.uint8),
    )


class Mappings(NamedTuple):
    """What the page tables must map, in order of first touch: a page that moves to another frame is a mapping of its own then."""

    gva: np.ndarray  # uint64, page number
    gpa: np.ndarray  # uint64, page number or UNKNOWN
    first: np.ndarray  # uint64, the record that touches it first
    before: np.ndarray  # uint32, 1 + the mapping of the same page that it replaces, or 0
    flags: np.ndarray  # uint8, Flag bits of all its accesses
    table: np.ndarray  # uint32, a hash table by gva: 1 + the newest mapping, or 0; a power of two, less than half full
    used: np.ndarray  # uint64[1]


class Slots(NamedTuple):
    """Records that may absorb further accesses. One each for fetches and data, or sets by ways for each kind."""

    key: np.ndarray  # uint64: page, user, kind; UNKNOWN where empty
    gpa: np.ndarray  # uint64, page number or UNKNOWN
    record: np.ndarray  # uint64
    total: np.ndarray  # uint64, accesses so far
    turn: np.ndarray  # uint64 by set: the way that is replaced next


class Records(NamedTuple):
    """Records made of one block of rows, and totals of records of earlier blocks that have grown since."""

    gva: np.ndarray  # uint64
    kind: np.ndarray  # uint8
    size: np.ndarray  # uint8, log2 of the bytes
    count: np.ndarray  # uint32
    mapping: np.ndarray  # uint32
    late_record: np.ndarray  # uint64
    late_total: np.ndarray  # uint64
    made: np.ndarray  # uint64[len(Made)]


class Made(IntEnum):
    """How far a block has come."""

    RECORDS = 0
    LATE = 1
    ACCESSES = 2  # of all blocks
    WIDE = 3  # 1: an address needs five levels of page tables


class Rule(IntEnum):
    """Which accesses become one record."""

    NONE = 0
    CONSECUTIVE = 1
    TLB = 2


SETS, WAYS, KINDS = 16, 4, 3
MOST = (1 << 32) - 1
"""The largest `count`, and the largest number of records."""
