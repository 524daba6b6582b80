"""The shadow-memory experiment: how many bytes does shadowing a guest cost, for each 4 KiB page that it maps?"""

from __future__ import annotations

import pyperf

from bench.experiment import Cell, Checked, CheckError, Context, Description, Experiment, Timed
from bench.results import counters_of
from bench.shadow_guest import ShadowGuest
from bench.tables import Table, by_workload
from fastmmu.machine_state import SHADOW_PAGE, VmWord
from fastmmu.rmap import DESC_WORDS

NAME = "shadow-memory"
GIB = 1 << 30
SIZES = {"1-gib": GIB, "64-gib": 64 * GIB}
STRATEGY = "shadowed"
WORD = 8


def cells(context: Context) -> list[Cell]:
    """One for each size of guest."""
    return [Cell(NAME, size, STRATEGY) for size in SIZES]


def check(context: Context, cell: Cell) -> Checked:
    """Shadow every page of the guest, and add up what holds it.

    Raises:
        CheckError: a page is not mapped.
    """
    guest = ShadowGuest(SIZES[cell.workload], prefetch=True)
    guest.fault(guest.gvas)
    machine, pages = guest.machine, guest.pages
    mapped = machine.counters()["pages_4k"]
    if mapped != pages:
        raise CheckError(f"{cell.name}: {mapped} pages mapped, expected {pages}")
    word, page = machine.vm.word, machine.vm.page
    used = page[: int(word[VmWord.FRESH_TABLE])]
    tables = int((used["role"] != 0).sum())
    translations = int(((used["role"] != 0) & (used["level"] <= 3)).sum())
    slots = machine.vm.mem.slots
    frames = sum(int(slot["pages"]) for slot in slots if slot["start"] < slot["end"])
    parts = {
        "sptes": tables * 4096,
        "shadowed_translation": translations * 4096,
        "headers": tables * SHADOW_PAGE.itemsize,
        "reverse_map": frames * WORD + (int(word[VmWord.FRESH_DESC]) - int(DESC_WORDS)) * WORD,
        "huge_page_counts": 2 * sum(-(-frames // 512**level) for level in (1, 2)) * WORD,  # and the reverse map of huge pages
    }
    return Checked({**parts, "pages": pages, "total": sum(parts.values())}, 0, counts={"bytes": sum(parts.values())})


def timed(context: Context, cell: Cell) -> Timed:
    """Nothing is timed."""
    raise RuntimeError(f"{cell.name}: {why_not(context, cell)}")


def why_not(context: Context, cell: Cell) -> str:
    """Bytes are counted, not timed."""
    return "bytes are counted, not timed"


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """Bytes by part."""
    rows = []
    for workload, strategies in by_workload(suite).items():
        parts = counters_of(next(iter(strategies[STRATEGY].values())))
        pages, total = parts.pop("pages"), parts.pop("total")
        each = tuple(f"{value / pages:.3f}" for value in parts.values())
        rows.append((workload, f"{total / pages:.3f}", f"{pages:,}", *each))
        names = tuple(parts)
    if not rows:
        return []
    note = (
        "Guest with 4-level paging whose memory is mapped by 4 KiB entries, all of it touched: bytes for each page, by what holds "
        "them. A reverse-map entry of one spte is one word; a page mapped more than once has a descriptor of 128 bytes. Bitmaps "
        "cost memory only while a memslot logs."
    )
    return [Table("memory of shadow paging", ("guest", "bytes per page", "pages", *names), rows, note)]


EXPERIMENT = Experiment(
    NAME,
    cells,
    check,
    timed,
    why_not,
    tables,
    by_default=False,
    description=Description(
        "How many bytes does shadowing a guest cost, for each 4 KiB page that it maps?",
    ),
)
