"""The mmio-cache experiment: what each strategy delivers on the small workloads, rule by rule, and against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from sizes import sized

from bench.mmio_cache import check_workload
from bench.workloads import (
    DEVICE_A,
    DEVICE_B,
    GVA,
    LEAF_FLAGS,
    READ,
    REPEATS,
    SMALL_WORKLOADS,
    USER,
    WRITE,
    Tables,
)
from fastmmu._jit import JIT
from fastmmu.bits import GENERATION_UPDATING, GPTE64
from fastmmu.events import EventList
from fastmmu.state import Stat
from fastmmu.strategy import MMIO_CACHE
from fastmmu.vm import Vm, Workload

STRATEGIES = [strategy.name for strategy in MMIO_CACHE.strategies]


def counters(workload: Workload, strategy: str) -> dict[str, int]:
    """Counters, after the reference came to the same."""
    found = check_workload(workload, strategy).counters
    misses = sum(value for name, value in found.items() if name.startswith("miss_"))
    assert found["hits"] + found["device_walks"] == found["device_accesses"]
    assert strategy == "none" or misses == found["device_walks"]
    return found


@pytest.mark.parametrize("make", SMALL_WORKLOADS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_small_workloads_show_what_they_are_for(make, strategy: str) -> None:
    workload = make()
    found = counters(workload, strategy)
    wrong_for = {"remap-invlpg": ("gva-only", "gva+cr3"), "two-address-spaces": ("gva-only",)}.get(workload.name, ())
    assert (found["wrong"] > 0) == (strategy in wrong_for)
    stale_for = ("gva-only", "gva+cr3", "generation") if workload.name == "remap-no-invlpg" else ()
    assert (found["stale_legal"] > 0) == (strategy in stale_for)
    assert found["granted_to_user"] == 0
    denied = workload.name == "kernel-only-page" and strategy != "none"
    assert (found["miss_permission"] > 0) == denied
    assert (found["miss_generation"] > 0) == (workload.name == "memslot-update" and strategy == "generation")
    assert (found["faults"] > 0) == (workload.name == "kernel-only-page")


def one_page(events: EventList, flags: int = LEAF_FLAGS, gva: int = GVA) -> tuple[Workload, int]:
    tables = Tables()
    root = tables.page()
    leaf = tables.map(root, gva, DEVICE_A, flags)
    return tables.workload("test", "", root, events), leaf


def test_a_memslot_update_in_progress_never_hits_and_caches_nothing() -> None:
    """Facts 13, S8."""
    updating = int(GENERATION_UPDATING) | 1
    events = EventList().device(GVA, READ).generation(updating).device(GVA, READ).device(GVA, READ).generation(2).device(GVA, READ)
    found = counters(one_page(events)[0], "generation")
    assert found["hits"] == 0 and found["miss_generation"] == 3


def test_page_zero_never_hits() -> None:
    """Facts 13, S7."""
    events = EventList().device(0x10, READ).device(0x10, READ)
    assert counters(one_page(events, gva=0)[0], "generation")["hits"] == 0


def test_invlpg_of_another_page_clears_nothing() -> None:
    events = EventList().device(GVA, READ).invlpg(GVA + 4096).device(GVA, READ).invlpg(GVA + 4095).device(GVA, READ)
    found = counters(one_page(events)[0], "generation")
    assert (found["hits"], found["clears"], found["miss_cleared"]) == (1, 1, 1)


def test_a_load_of_the_same_cr3_clears() -> None:
    tables = Tables()
    root = tables.page()
    tables.map(root, GVA, DEVICE_A)
    events = EventList().device(GVA, READ).cr3(root).device(GVA, READ)
    found = counters(tables.workload("test", "", root, events), "generation")
    assert (found["hits"], found["clears"]) == (0, 1)
    assert counters(tables.workload("test", "", root, events), "gva+cr3")["hits"] == 1


def test_a_write_to_a_clean_page_is_denied_by_the_cache_and_sets_d() -> None:
    clean = LEAF_FLAGS & ~int(GPTE64.D)
    events = EventList().device(GVA, READ).device(GVA, WRITE).device(GVA, WRITE)
    workload, leaf = one_page(events, clean)
    found = counters(workload, "generation")
    assert (found["miss_permission"], found["hits"]) == (1, 1)
    assert check_workload(workload, "generation").tables[leaf] & int(GPTE64.D)


def test_an_answer_that_was_true_since_the_flush_is_stale_not_wrong() -> None:
    """Change there and back: A, B, flush, A, C: the cached A was the tables' after the flush."""
    workload, leaf = one_page(EventList())
    there, back = DEVICE_B | LEAF_FLAGS, DEVICE_A | LEAF_FLAGS
    events = EventList().device(GVA, READ).store(leaf, there).invlpg(GVA).store(leaf, back).store(leaf, there).device(GVA, READ)
    workload = Workload("test", workload.cpu, workload.slots, workload.tables, events.array())
    found = counters(workload, "gva-only")
    assert (found["stale_legal"], found["wrong"]) == (1, 0)
    events.invlpg(GVA).device(GVA, READ)
    workload = Workload("test", workload.cpu, workload.slots, workload.tables, events.array())
    assert counters(workload, "gva-only")["wrong"] == 1


def test_rights_that_were_taken_away_and_flushed_count_as_granted_to_the_user() -> None:
    workload, leaf = one_page(EventList(), LEAF_FLAGS | USER)
    events = EventList().device(GVA, READ | USER).store(leaf, DEVICE_A | LEAF_FLAGS).invlpg(GVA).device(GVA, READ | USER)
    workload = Workload("test", workload.cpu, workload.slots, workload.tables, events.array())
    assert counters(workload, "gva-only")["granted_to_user"] == 1
    found = counters(workload, "generation")
    assert (found["granted_to_user"], found["faults"]) == (0, 1)


def random_stream(rng: np.random.Generator) -> Workload:
    """Device accesses, remaps, flushes, address spaces and memslot updates, in any order."""
    tables = Tables()
    roots = [tables.page(), tables.page()]
    gvas = [GVA, GVA + 4096, GVA + (1 << 30)]
    leaves = [tables.map(root, gva, DEVICE_A, LEAF_FLAGS | USER) for root in roots for gva in gvas]
    events = EventList()
    for step in range(sized(3000, 400)):
        what = rng.random()
        gva = int(rng.choice(gvas))
        if what < 0.55:
            events.device(gva + int(rng.integers(0, 4096)), int(rng.choice([READ, WRITE, USER, WRITE | USER, 0x10])))
        elif what < 0.65:
            events.access(gva, READ)
        elif what < 0.8:
            flags = int(rng.choice([LEAF_FLAGS, LEAF_FLAGS | USER, LEAF_FLAGS & ~2, LEAF_FLAGS & ~0x60, LEAF_FLAGS & ~1]))
            events.store(int(rng.choice(leaves)), int(rng.choice([DEVICE_A, DEVICE_B, 0x5000])) | flags)
        elif what < 0.86:
            events.cr3(int(rng.choice(roots)))
        elif what < 0.94:
            events.invlpg(gva + int(rng.integers(0, 4096)))
        elif what < 0.96:
            events.flush()
        else:
            events.generation(step | (int(GENERATION_UPDATING) if rng.random() < 0.3 else 0))
    return tables.workload("random", "", roots[0], events)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_streams_agree_with_the_reference(seed: int, strategy: str) -> None:
    rng = np.random.default_rng(seed)
    total: dict[str, int] = {}
    for _ in range(sized(20, 2)):
        for name, value in counters(random_stream(rng), strategy).items():
            total[name] = total.get(name, 0) + value
    assert total["wrong"] == 0 or strategy in ("gva-only", "gva+cr3")
    if strategy == "generation" and JIT:
        never = {"wrong", "granted_to_user"}
        assert {name for name, value in total.items() if not value} <= never, "every other counter is exercised"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_uncounted_replays_deliver_the_same(strategy: str) -> None:
    workload = random_stream(np.random.default_rng(7))
    vm = Vm(workload, MMIO_CACHE.strategy(strategy))
    outcome = vm.check()
    vm.reset()
    vm.run()
    assert {"all": int(vm.digest[0]), "device": int(vm.digest[1])} == outcome.digests
    assert vm.tables() == outcome.tables
    vm.reset()
    vm.run(workload.device_events)
    assert int(vm.digest[1]) == outcome.digests["device"]


def test_every_counter_is_an_int_by_name() -> None:
    found = counters(SMALL_WORKLOADS[0](), "generation")
    assert set(found) == {stat.name.lower() for stat in Stat}
    assert found["device_accesses"] == found["records"] == 2 * REPEATS + 1


def test_a_denied_access_between_is_no_flush() -> None:
    """The fault that a denied access raises is not the guest's demand to forget: what follows is stale, not wrong."""
    workload, leaf = one_page(EventList())
    events = EventList().device(GVA, READ).store(leaf, DEVICE_B | LEAF_FLAGS).device(GVA, READ | USER).device(GVA, READ)
    workload = Workload("test", workload.cpu, workload.slots, workload.tables, events.array())
    assert (counters(workload, "gva-only")["stale_legal"], counters(workload, "gva-only")["wrong"]) == (1, 0)
    assert counters(workload, "generation")["clears"] == 1


def test_a_permission_fault_of_a_memory_access_clears_too() -> None:
    """Facts 4.5: whatever access the injected fault is for."""
    events = EventList().device(GVA, READ).access(GVA, READ | USER).device(GVA, READ)
    assert counters(one_page(events)[0], "generation")["miss_cleared"] == 1
    assert counters(one_page(events)[0], "gva-only")["hits"] == 1


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_a_fetch_is_never_answered_by_the_cache(strategy: str) -> None:
    events = EventList().device(GVA, READ).device(GVA, 0x10)
    found = counters(one_page(events)[0], strategy)
    assert (found["hits"], found["miss_permission"], found["faults"]) == (0, 1, 1)


@pytest.mark.parametrize("address", [1 << 50, 0x9999_0000, 0x100_0004])
def test_stores_outside_the_tables_are_refused(address: int) -> None:
    workload, _ = one_page(EventList().store(address, 7))
    with pytest.raises(ValueError, match="store to"):
        Vm(workload, MMIO_CACHE.strategies[0])


def test_tables_outside_memory_are_refused() -> None:
    workload, _ = one_page(EventList().device(GVA, READ))
    for tables in ({1 << 40: np.zeros(512, np.uint64)}, {-1: np.zeros(512, np.uint64)}, {0x100: np.zeros(5, np.uint64)}):
        with pytest.raises(ValueError, match="table at gfn"):
            Vm(Workload("x", workload.cpu, workload.slots, tables, workload.events), MMIO_CACHE.strategies[0])
    with pytest.raises(ValueError, match="expected EVENT rows"):
        Vm(Workload("x", workload.cpu, workload.slots, workload.tables, np.zeros(3)), MMIO_CACHE.strategies[0])
