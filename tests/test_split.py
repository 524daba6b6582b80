"""Eager splitting: the compiled model against the reference, and its strategies against one another (facts 8)."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from scenarios import DATA, DATA_GPA, PAGE, Document
from sizes import sized
from split_scenarios import SECOND, SPLIT_NAMED, STRATEGIES, odd_words, random_shadow_split, random_split_scenario
from test_scenarios import check_random, compare

from bench import split_latency
from fastmmu._jit import JIT
from fastmmu.audit import audit
from fastmmu.audit_state import AuditError
from fastmmu.bits import CR0, NPT_SPTE, PFERR
from fastmmu.events import EventList, Op
from fastmmu.kvm import Kvm
from fastmmu.lock import is_contended, lock_for_writing, yield_lock
from fastmmu.machine import Machine
from fastmmu.machine_state import STAT_WORDS, Counter, VcpuWord, VmWord
from fastmmu.paging import Cpu
from fastmmu.spte import INDEX_BITS
from fastmmu.trace.scenario import load_scenario
from fastmmu.validate import Replay

LAZY = "lazy"
OFF = Cpu(cr0=int(CR0.PE), cr3=0, cr4=0, efer=0)
ACCESSES = (int(PFERR.W), int(PFERR.F), 0)


@pytest.mark.parametrize("name", SPLIT_NAMED)
def test_named_scenarios_come_out_the_same(tmp_path: Path, name: str) -> None:
    outcome = compare(SPLIT_NAMED[name](), tmp_path)
    assert not outcome.found, f"{name}: " + "\n".join(outcome.found)
    assert outcome.compared > 100


def test_a_clear_over_a_boundary_loses_a_page_as_kvm_does(tmp_path: Path) -> None:
    """`kvm_arch_mmu_enable_log_dirty_pt_masked` rounds both ends of the range up: where the last page is the first of its 2 MiB frame,
    that huge page is neither split nor protected (facts 7.4.1 say it should be)."""
    with pytest.raises(AuditError, match="writable without being logged"):
        replayed(odd_words("cached", 1024), tmp_path)
    replayed(odd_words("cached", 1025), tmp_path)


def test_random_scenarios_come_out_the_same(seed: int, tmp_path: Path) -> None:
    check_random(seed, sized(25, 8), tmp_path, random_split_scenario)


@pytest.mark.long
def test_many_random_scenarios_come_out_the_same(seed: int, tmp_path: Path) -> None:
    check_random(seed + 1_000_000, sized(1000, 40), tmp_path, random_split_scenario)


def test_an_aged_huge_page_is_split_into_aged_pages() -> None:
    """Facts 8.2: the pieces of an access-tracked page are, too; what NX huge pages took of it they get back in its hidden bits."""
    for nx in (False, True):
        machine = Machine(Kvm(ept=True, ad=False, nx_huge_pages=nx), OFF, memory=1 << 22)
        machine.run(EventList().add(Op.SLOT_CREATE, value=machine.prepare_slot(0, 0, 1 << 22, host_level=2)).array())
        machine.run(EventList().add(Op.ACCESS, access=int(PFERR.W), address=0).add(Op.AGE, address=0, value=1 << 21).array())
        machine.run(EventList().add(Op.SLOT_FLAGS, address=0, value=1).array())
        assert machine.counters()["splits"] == 1
        audit(machine)
        before = machine.counters()
        machine.run(EventList().add(Op.ACCESS, access=int(PFERR.F), address=0x5000).add(Op.ACCESS, access=2, address=0x6000).array())
        moved = {name: value - before[name] for name, value in machine.counters().items() if value != before[name]}
        assert moved["pf_fast"] == moved["pf_fixed"] == 2  # each is restored by the fast path, with X and W
        audit(machine)


@pytest.mark.skipif(JIT, reason="functions that only kernels call have no Python entry")
def test_who_waits_for_the_lock_is_let_in() -> None:
    """Between two splits: the lock is dropped after each that took a table, and where somebody waits (facts 8.2)."""
    machine = Machine(Kvm(), OFF, memory=1 << 24)
    word, stat = machine.vm.word, np.zeros(STAT_WORDS, np.int64)
    assert not is_contended(word)
    lock_for_writing(word, stat)
    yield_lock(word, stat, False)
    assert stat[Counter.LOCK_TAKEN] == 2 and word[VmWord.MMU_LOCK] != 0
    word[VmWord.LOCK_WAITERS] += np.uint64(1)
    assert is_contended(word)
    yield_lock(word, stat, False)
    word[VmWord.LOCK_WAITERS] -= np.uint64(1)
    assert stat[Counter.LOCK_TAKEN] == 3 and word[VmWord.MMU_LOCK] != 0


# --- threads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(JIT, reason="the kernel with a vCPU's faults in it takes half a minute to compile, for this alone")
@pytest.mark.parametrize("strategy", split_latency.STRATEGIES)
def test_faults_go_on_while_huge_pages_are_split(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """Two threads: every write is done, nothing is lost, the state holds together."""
    for name, value in (("SIZE", 1 << 24), ("PART", 1 << 22), ("REPEATS", 1), ("BATCH", 20), ("QUIET_FAULTS", 200)):
        monkeypatch.setattr(split_latency, name, value)
    run = split_latency.Threads(strategy)
    assert len(run.quiet()) == 200
    run.splitting()
    assert run.at > 0 and not run.denied
    audit(run.guest.machine)
    assert (run.guest.machine.counters()["splits"] > 0) == (strategy != LAZY)


# --- the four strategies come to the same ----------------------------------------------------------------------------------


def with_strategy(document: Document, strategy: str) -> Document:
    """The same document; `lazy` splits nothing eagerly, whatever parameters its steps set."""
    config = {**document["config"], "eager_page_split": strategy != LAZY, "split_on_fault": False}
    config["split_access"] = "cached" if strategy == LAZY else strategy
    return {**document, "config": config}


def replayed(document: Document, folder: Path) -> Machine:
    """The machine after all steps, audited after each that may split."""
    path = folder / "scenario.json"
    path.write_text(json.dumps(document))
    scenario = load_scenario(path)
    replay = Replay(scenario)
    for step in scenario.steps:
        if step["do"] == "guest" and not replay.started:
            replay.write_runs(scenario.memory)
            replay.started = True
        replay.run_step(step)
        if step["do"] in ("slot", "dirty_clear"):
            audit(replay.machine)
    return replay.machine


def touch_all(machine: Machine, gvas: np.ndarray) -> None:
    """Write, fetch and read each page, twice: what the first round repairs the second one finds."""
    machine.configure()  # a #PF of the guest ends nothing
    events = EventList()
    for access in ACCESSES * 2:
        for gva in gvas.tolist():
            events.add(Op.ACCESS, access=access, address=gva)
    rows = events.array()
    for start in range(0, len(rows), 4096):
        machine.run(rows[start : start + 4096])


def final_rights(machine: Machine, gvas: np.ndarray) -> list[tuple[int, int]]:
    """By page: frame, and the bits of rights, of the spte that maps it; (0, 0) where none does."""
    words, own, found = machine.vm.word, machine.state.own[0], []
    rights = int(NPT_SPTE.W | words[VmWord.MMU_WRITABLE] | words[VmWord.USER] | words[VmWord.EXECUTE] | words[VmWord.NO_EXECUTE])
    for gva in gvas.tolist():
        page, level, table = gva >> 12, int(own[VcpuWord.ROOT_LEVEL]), int(own[VcpuWord.ROOT])
        if level == 2:
            table = int(own[VcpuWord.PAE_ROOT + (page >> 18 & 3)])
        while True:
            spte = int(machine.vm.spt[(table << int(INDEX_BITS)) + (page >> 9 * (level - 1) & 511)])
            frame = (spte & int(NPT_SPTE.ADDR)) >> 12
            if not spte & int(NPT_SPTE.MMU_PRESENT):
                found.append((0, 0))
                break
            if level == 1 or spte & int(NPT_SPTE.PS):
                found.append((frame + (page & (1 << 9 * (level - 1)) - 1), spte & rights))
                break
            table, level = frame, level - 1
    return found


def pages_of(document: Document, each: int) -> np.ndarray:
    """Addresses of both windows: one page in `each`, and the begin and the end of each region."""
    slot = next(step for step in document["steps"] if step["do"] == "slot" and step["slot"] == 1)
    first, count = (int(slot["gpa"], 16) - DATA_GPA) // PAGE, int(slot["size"], 16) // PAGE
    inside = [page for page in range(first, first + count) if page % each == 0 or page % 512 in (0, 511)]
    return np.concatenate([window + np.array(inside) * PAGE for window in (DATA, SECOND)])


def check_strategies(seed: int, count: int, folder: Path, each: int) -> None:
    """Guests, roles and log ranges at random: whatever was split and by whose rights, in the end every page is mapped alike."""
    compared = splits = 0
    for number in itertools.count(seed):
        document = random_shadow_split(random.Random(number))
        gvas, ends = pages_of(document, each), {}
        for strategy in (*STRATEGIES, LAZY):
            machine = replayed(with_strategy(document, strategy), folder)
            split = machine.counters()["splits"]
            if not split and strategy == STRATEGIES[0]:
                break  # nothing to compare
            splits += split
            machine.run(EventList().add(Op.VCPU, value=0).add(Op.EXIT).array())  # whose tables are looked at
            touch_all(machine, gvas)
            audit(machine)
            ends[strategy] = final_rights(machine, gvas)
        for strategy in STRATEGIES if ends else ():
            differ = [hex(int(gva)) for gva, a, b in zip(gvas, ends[LAZY], ends[strategy], strict=True) if a != b]
            assert not differ, f"random_shadow_split(random.Random({number})): {strategy} maps otherwise than lazy: {differ[:3]}"
        compared, count = compared + len(gvas) * bool(ends), count - bool(ends)
        if not count:
            break
    print(f"{compared} pages compared under four strategies, {splits} huge pages split")


def test_strategies_end_alike(seed: int, tmp_path: Path) -> None:
    check_strategies(seed, sized(6, 2), tmp_path, 16)


@pytest.mark.long
def test_strategies_end_alike_in_many_guests(seed: int, tmp_path: Path) -> None:
    check_strategies(seed + 1_000_000, sized(200, 10), tmp_path, 1)
