"""Guest memory: sparse, and bounded by its slots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastmmu import GuestMemory
from fastmmu.memory import find_slot
from fastmmu.state import NO_SLOT


def resident_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_a_256_gib_guest_costs_only_the_pages_it_touches() -> None:
    before = resident_kib()
    ram = GuestMemory(256 << 30)
    ram.words[:: 1 << 30] = 7  # 32 words, 8 GiB apart
    assert ram.words.size == (256 << 30) // 8 and ram.words.dtype == np.uint64
    assert int(ram.words[1 << 30]) == 7 and int(ram.words[1]) == 0
    assert resident_kib() - before < 4096


@pytest.mark.parametrize("size", [0, -4096, 4095, 4097, 1.5, "4096", 1 << 60])
def test_bad_sizes(size: object) -> None:
    with pytest.raises((ValueError, MemoryError), match="guest memory"):
        GuestMemory(size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([(0, 0x1000, "disk")], "expected"),
        ([(0, 0x1000)], "expected"),
        (None, "expected a list"),
        (5, "expected a list"),
        ([(0, float("inf"), "device")], "expected ints"),
        ([(0.5, 4096, "ram")], "expected ints"),
        ([("4096", "8192", "ram")], "expected ints"),
        ([(False, 4096, "ram")], "expected ints"),
        ([0], "expected"),
        ([(0x1000, 0x1000, "ram")], "start < end"),
        ([(-4096, 0x1000, "ram")], "start < end"),
        ([(0, 0x1001, "ram")], "multiples"),
        ([(0, 0x20_0000, "ram")], "beyond"),
        ([(0, 0x2000, "ram"), (0x1000, 0x3000, "rom")], "overlap"),
        ([(0, 0x2000, "ram"), (0x1800, 0x1810, "device")], "overlap"),
    ],
)
def test_bad_slots(slots: list, message: str) -> None:
    ram = GuestMemory(0x10_0000)
    with pytest.raises(ValueError, match=message):
        ram.slots = slots
    assert ram.slots == [(0, 0x10_0000, "ram")]


def test_find_slot_is_exact_at_the_edges() -> None:
    ram = GuestMemory(0x10_0000)
    ram.slots = [(0x1000, 0x3000, "ram"), (0x5000, 0x6000, "rom"), (0x8000, 0xF000, "ram"), (0x20_0000, 0x20_0100, "device")]
    for gpa in (0, 0xFFF, 0x1000, 0x2FFF, 0x3000, 0x4FFF, 0x5000, 0x5FFF, 0x6000, 0x8000, 0xEFFF, 0xF000, 0x20_0000, 1 << 63):
        expected = any(start <= gpa < end for start, end, kind in ram.slots if kind != "device")
        assert (find_slot(ram.state.slots, np.uint64(gpa)) != NO_SLOT) == expected, hex(gpa)


def test_no_slot_at_all() -> None:
    ram = GuestMemory(0x1000)
    ram.slots = []
    assert find_slot(ram.state.slots, np.uint64(0)) == NO_SLOT
