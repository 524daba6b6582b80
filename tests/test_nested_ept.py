"""Nested guests of a hypervisor with EPT, against two walks of the reference put together; rules of their own; the audit after each step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from test_nested_guest import NPT, PAGE_SIZE, Nested, play

from fastmmu.audit import audit
from fastmmu.bits import EPT, EPTP
from fastmmu.events import Op
from fastmmu.kvm import Kvm
from fastmmu.reference.ept import Caps, EptWalker
from fastmmu.reference.nested import EptDimension
from fastmmu.reference.walk import Memory

R, W, X, A, D = (int(getattr(EPT, name)) for name in ("R", "W", "X", "A", "D"))
RWX, FLAGS, WRITE_BACK = R | W | X, A | D, 6 << 3
EPTP_OF = NPT | 6 | 3 << 3
VIOLATION, MISCONFIGURATION = 48, 49
COMMON = {"nested": True, "ept": True, "eager_page_split": False}


class NestedEpt(Nested):
    """The same with EPT12, whose EPTP enables A and D."""

    pointer, leaf_rights, flags = RWX | A, RWX | WRITE_BACK | FLAGS, FLAGS
    tables = EPTP_OF | int(EPTP.AD)

    def dimension(self, memory: Memory) -> EptDimension:
        return EptDimension(EptWalker(memory, self.tables, Caps(40, False, True, True, True)))

    @staticmethod
    def random_entry(rng: np.random.Generator, page: int) -> int:
        entry = page * PAGE_SIZE
        for bit, probability in ((R, 0.92), (W, 0.75), (X, 0.8), (A, 0.6), (D, 0.5)):
            entry |= bit if rng.random() < probability else 0
        entry |= WRITE_BACK if rng.random() < 0.96 else int(rng.integers(8)) << 3
        return entry | (1 << 45 if rng.random() < 0.03 else 0)  # a reserved bit

    def enter(self) -> None:
        if not self.inside and self.stale:  # what EPT12 said before may be remembered till then
            self.run(Op.INVEPT, value=0 if self.machine.counters()["nested_run"] % 2 else self.tables)
            self.stale = False
        super().enter()


class NestedPlainEpt(NestedEpt):
    """An EPTP without A and D: both bits of entries mean nothing."""

    tables = EPTP_OF


KINDS = {
    "tdp-mmu": (NestedEpt, Kvm(**COMMON)),
    "shadow": (NestedEpt, Kvm(**COMMON, tdp_mmu=False)),
    "tdp-mmu, no A and D": (NestedPlainEpt, Kvm(**COMMON, ad=False)),
    "shadow, no A and D": (NestedPlainEpt, Kvm(**COMMON, tdp_mmu=False, ad=False)),
}


@pytest.fixture(params=list(KINDS))
def nested(request: pytest.FixtureRequest) -> Iterator[NestedEpt]:
    kind, kvm = KINDS[request.param]
    one = kind(kvm)
    yield one
    audit(one.machine)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("part", range(3))
def test_every_access_as_two_walks_say(seed: int, kind: str, part: int) -> None:
    play(np.random.default_rng([seed, part]), *KINDS[kind], 150)


@pytest.mark.long
@pytest.mark.parametrize("kind", list(KINDS))
def test_many_accesses_as_two_walks_say(seed: int, kind: str) -> None:
    for part in range(100):
        play(np.random.default_rng([seed, 1000 + part]), *KINDS[kind], 600)
