"""The costs that projections assume, each with its source; the command line reads them before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """One cost in nanoseconds: what it is paid for, and whose figure the default is."""

    name: str
    default: float
    paid_for: str
    source: str


COSTS = (
    Cost(
        "exit",
        1000.0,
        "an exit of the guest and the entry after it",
        "of the order of the 2,528 cycles that a way to user space and back takes in a mail to the Linux kernel list about SVM, "
        "December 2020 (lkml.iu.edu/hypermail/linux/kernel/2012.2/00527.html): 1 µs at 2.5 GHz",
    ),
    Cost(
        "flush",
        2000.0,
        "a flush that all vCPUs must answer",
        "the low end of the “microseconds” of a TLB shootdown in N. Amit, Optimizing the TLB Shootdown Algorithm with Page Access "
        "Tracking, USENIX ATC 2017",
    ),
    Cost(
        "lock",
        100.0,
        "a fault that takes the mmu lock, beyond what an uncontended lock costs, which is measured",
        "of the order of the hand-over that the lock-scaling experiment fits to times published with eager page splitting, 2022",
    ),
)


@dataclass(frozen=True)
class Prices:
    """Nanoseconds for each exit, remote flush, and fault under the mmu lock."""

    exit: float = COSTS[0].default
    flush: float = COSTS[1].default
    lock: float = COSTS[2].default

    @property
    def words(self) -> list[str]:
        """Each cost in a sentence, with its source where the reader named none."""
        said = []
        for cost in COSTS:
            value = getattr(self, cost.name)
            source = f"the default, {cost.source}" if value == cost.default else f"as given; the default is {cost.default:g} ns"
            said.append(f"{cost.name} cost {value:g} ns: {cost.paid_for}; {source}.")
        return said
