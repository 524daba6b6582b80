"""Tables of the cached-access experiment: split and first pass, the mail's claims with what was counted, the splitting alone."""

from __future__ import annotations

import statistics

import pyperf

from bench.experiment import Cell, Over
from bench.results import counters_of
from bench.tables import Table, by_workload, counts, ratio_text, round_values

NAME = "cached-access"
LAZY, CACHED, PROPAGATE, MEMCPY = "lazy", "cached", "propagate", "memcpy"
NX_ON, NX_OFF = "nx-on", "nx-off"
PERIOD = 50_000  # records of a trace between two changes of logging
GIB = 1 << 30
GAUGES = ("pages_4k", "pages_2m", "pages_1g")
PASS_COUNTERS = ("pf_taken", "splits", "split_reads", "remote_tlb_flush_requests", "mmu_cache_miss", "orphans", *GAUGES)
Found = dict[str, dict[str, dict[str, pyperf.Benchmark]]]


def over(cell: Cell) -> Over:
    """The copy where only the splitting counts, else no eager splitting."""
    return Over(MEMCPY, cost=True, called="the copy") if cell.workload.startswith("split-") else Over(LAZY)


def tables(suite: dict[str, pyperf.Benchmark]) -> list[Table]:
    """The first pass after logging began; what the mail claims; the splitting alone; the trace. Told apart by what was counted."""
    found = by_workload(suite)
    splits = {name: one for name, one in found.items() if name.startswith("split-")}
    passes = {name: one for name, one in found.items() if "log_on_us" in next(iter(counted(one).values()))}
    traces = {name: one for name, one in found.items() if name not in passes and name not in splits}
    made = [pass_table(passes), claims_table(passes), split_table(splits), trace_table(traces)]
    return [table for table in made if table.rows]


def times_of(strategies: dict[str, dict[str, pyperf.Benchmark]]) -> dict[str, list[float]]:
    """Seconds an access of each round, by strategy."""
    return {strategy: round_values(metrics["time"]) for strategy, metrics in strategies.items() if "time" in metrics}


def counted(strategies: dict[str, dict[str, pyperf.Benchmark]]) -> dict[str, dict[str, int]]:
    """Counters by strategy."""
    return {strategy: counters_of(next(iter(metrics.values()))) for strategy, metrics in strategies.items()}


def pass_table(found: Found) -> Table:
    """Split and first pass together, against lazy."""
    rows = []
    for workload, strategies in found.items():
        times, counters = times_of(strategies), counted(strategies)
        for strategy, own in times.items():
            one = counters[strategy]
            ratio = ratio_text(times[LAZY], own, cost=False) if LAZY in times else "-"
            extra = f"{one['pf_taken'] - counters[CACHED]['pf_taken']:+,}" if CACHED in counters else "-"
            total = f"{statistics.median(own) * one['accesses'] * 1e3:.2f}"
            parts = [spread(one, name) for name in ("log_on", "pass", "faults")]
            rows.append((f"{workload} / {strategy}", ratio, total, *parts, extra, *counts(one, *PASS_COUNTERS)))
    head = (
        "workload / rights from", f"speed-up over {LAZY}", "ms", "log on", "pass", "in faults", "faults more than cached",
        "pf_taken", "splits", "guest reads", "flushes", "mmu_cache_miss", "without parent", "pages_4k more", "pages_2m", "pages_1g",
    )  # fmt: skip
    note = (
        "Shadow paging of an ordinary guest by the policy of the patches' first versions, 1 GiB in 2 MiB pages if nothing else is "
        "said. Timed: logging begins, then each 4 KiB page is accessed once, in order, with TLB, walks and KVM's part of each "
        "fault; of accesses that are no writes one in eight is a fetch, where the guest grants it. `log on`, `pass` and the "
        "time of it in faults (a pass without any taken away) are ms of the run that was counted, median [lowest, highest]. Gauges "
        "of pages are changes. `without parent`: shadow pages that stay, counted against the limit, though nothing leads there."
    )
    return Table("huge pages split when dirty logging begins", head, rows, note)


def spread(counters: dict[str, int], name: str) -> str:
    """A time of the counted run, ms: the median, and where there were more [lowest, highest]."""
    median, low, high = (counters[f"{name}_us{end}"] / 1e3 for end in ("", "_low", "_high"))
    return f"{median:.2f}" if low == high else f"{median:.2f} [{low:.2f}, {high:.2f}]"


def claims_table(found: Found) -> Table:
    """What the mail says of access caching and of the alternative, with what was counted."""
    rows = []
    for workload, strategies in found.items():
        counters = counted(strategies)
        if CACHED not in counters or PROPAGATE not in counters or not workload.endswith(NX_ON):
            continue
        cached, other = counters[CACHED], counters[PROPAGATE]
        regions = max(other["splits"], 1)
        rows.append((
            workload,
            f"{cached['translations'] >> 10:,}",
            f"{cached['split_caches']:,}",
            f"{other['pf_taken'] - cached['pf_taken']:+,}",
            f"{other['mmu_cache_miss'] - cached['mmu_cache_miss']:+,}",
            f"{other['orphans'] - cached['orphans']:+,}",
            f"{(other['remote_tlb_flush_requests'] - cached['remote_tlb_flush_requests']) / regions:+.2f}",
        ))  # fmt: skip
    head = (
        "workload", "KiB of translations", "bytes of split caches",
        "faults", "shadow pages made", "without parent", "flushes per page split",
    )  # fmt: skip
    note = (
        '"Requires no additional memory": access lies in the low bits of the words that held a gfn alone, and translations are '
        "as many KiB without it; splitting needs its caches, filled, once a VM. The last four columns are what propagating the "
        'huge spte\'s rights costs more than caching the guest\'s: "extra faults", and new shadow pages where existing ones '
        "could be used."
    )
    return Table("the mail's claims under NX huge pages, propagate against cached", head, rows, note)


def split_table(found: Found) -> Table:
    """The splitting alone against a copy."""
    rows = []
    for workload, strategies in found.items():
        times, counters = times_of(strategies), counted(strategies)
        for strategy, own in times.items():
            one = counters[strategy]
            copy = ratio_text(times[MEMCPY], own, cost=True) if MEMCPY in times else "-"
            other = ratio_text(times[PROPAGATE], own, cost=True) if PROPAGATE in times and strategy != MEMCPY else "-"
            rate = f"{one['size'] / GIB / (statistics.median(own) * one['accesses']):,.0f}"
            rows.append((f"{workload} / {strategy}", copy, other, f"{statistics.median(own) * 1e9:.0f}", rate))
    head = ("pages / rights from", "cost over the copy", "cost over propagate", "ns per split", "GiB of guest memory a second")
    note = (
        "16 GiB of a guest's huge pages, one thread. `memcpy` copies as many bytes as a split writes: 512 sptes, as many words of "
        "the reverse map, the page header."
    )
    return Table("splitting huge pages", head, rows, note)


def trace_table(found: Found) -> Table:
    """The recorded stream."""
    rows = []
    for workload, strategies in found.items():
        times, counters = times_of(strategies), counted(strategies)
        for strategy, own in times.items():
            ratio = ratio_text(times[LAZY], own, cost=False) if LAZY in times else "-"
            shown = counts(counters[strategy], "pf_taken", "splits", "remote_tlb_flush_requests", "mmu_cache_miss", "orphans")
            rows.append((f"{workload} / {strategy}", ratio, f"{statistics.median(own) * 1e9:.2f}", *shown))
    counted_as = ("pf_taken", "splits", "flushes", "mmu_cache_miss", "without parent")
    head = ("trace / rights from", f"speed-up over {LAZY}", "ns per record", *counted_as)
    note = f"Shadow paging, 2 MiB host pages; logging goes on or off every {PERIOD:,} records, the log collected before it ends."
    return Table("a recorded stream under migration after migration", head, rows, note)
