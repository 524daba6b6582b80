"""Strategies and experiments: the registry that benchmarks and tests iterate over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastmmu.nested_caches import make_nested_caches
from fastmmu.state import Mmio, MmioInfo, NestedCaches


@dataclass(frozen=True)
class Strategy:
    """One way to do the work: a name, a sentence, and the cache it uses (None: no trace of a cache in the compiled code)."""

    name: str
    summary: str
    make_cache: Callable[[], MmioInfo | NestedCaches | None] = lambda: None


@dataclass(frozen=True)
class Experiment:
    """A question from the sources, with its strategies side by side, the plain one first."""

    name: str
    question: str
    source: str
    strategies: tuple[Strategy, ...]

    def strategy(self, name: str) -> Strategy:
        """The strategy of that name.

        Raises:
            KeyError: there is none.
        """
        return {strategy.name: strategy for strategy in self.strategies}[name]


def _mmio_info(*, cr3: bool = False, generation: bool = False) -> MmioInfo:
    return MmioInfo(
        entry=np.zeros(len(Mmio), np.uint64),
        cr3=np.zeros(1, np.uint64) if cr3 else None,
        generation=np.zeros(1, np.uint64) if generation else None,
    )


MMIO_CACHE = Experiment(
    name="mmio-cache",
    question="What is it worth to remember the translation of the last device access, and is it still correct?",
    source="[PATCH 04/15] KVM: MMU: cache mmio info on page fault path, review of 2011-06-08",
    strategies=(
        Strategy("none", "every device access walks the guest's tables"),
        Strategy("gva-only", "the patch as posted: same page, access check, never cleared", _mmio_info),
        Strategy("gva+cr3", "as the review asked: CR3 compared too", lambda: _mmio_info(cr3=True)),
        Strategy(
            "generation", "KVM of today: memslot generation, cleared by INVLPG and CR3 loads", lambda: _mmio_info(generation=True)
        ),
    ),
)

ACCESS_CHECKS = Experiment(
    name="access-checks",
    question="What is it worth to check a guest mapping's permission in the walk?",
    source="[PATCH 3/5] KVM: MMU: Perform access checks in walk_addr(), 2007-01-23",
    strategies=(
        Strategy("after-walk", "before the patch: A set on the way down, the caller checks the leaf, if at all"),
        Strategy("per-level", "the patch: each level checked, then its A set"),
        Strategy("once", "today: one check with the rights of all levels, then all A bits"),
    ),
)

NESTED_CACHES = Experiment(
    name="nested-caches",
    question="What are the processor's own caches worth in a walk of two dimensions?",
    source="SDM volume 3, 4.10.3 and 29.4; APM volume 2, 15.25.8",
    strategies=(
        Strategy("none", "every walk reads all tables of both dimensions", lambda: make_nested_caches(False, False)),
        Strategy("structures", "walks begin at the lowest guest's table known", lambda: make_nested_caches(True, False)),
        Strategy("pages", "pages of the second dimension are known", lambda: make_nested_caches(False, True)),
        Strategy("both", "both", lambda: make_nested_caches(True, True)),
    ),
)

EPT_QUALIFICATION = Experiment(
    name="ept-qualification",
    question="What must a hypervisor tell a nested one of an EPT violation?",
    source="[PATCH] X86/KVM: Update the exit_qualification access bits while walking an address, review of 2018-03-04",
    strategies=(
        Strategy("stale", "before the patch: the access bits of the last violation, though this exit may be a misconfiguration"),
        Strategy("derived", "the patch: the access bits of the walk that failed; bits 8:7 as kept"),
    ),
)

EXPERIMENTS = (MMIO_CACHE, ACCESS_CHECKS, NESTED_CACHES, EPT_QUALIFICATION)
