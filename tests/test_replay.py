"""Replay of real streams: every record as QEMU recorded it, every counter as the reference counts it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sizes import sized

from bench.mmio_cache import check_workload
from bench.workloads import BUNDLED_TRACE, trace_workload
from fastmmu import ReplayError, Vm, load_replay
from fastmmu._jit import JIT
from fastmmu.bits import GPTE64
from fastmmu.events import Op
from fastmmu.replay import replay
from fastmmu.strategy import MMIO_CACHE
from fastmmu.vm import Workload

STRATEGIES = [strategy.name for strategy in MMIO_CACHE.strategies]
SAMPLES = ("linux-boot", "fork-exec", "thp-split")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_bundled_boot_replays_as_recorded(strategy: str) -> None:
    records = sized(350_000, 100_000)
    counters = check_workload(trace_workload(BUNDLED_TRACE, records), strategy).counters
    assert counters["records"] == records
    assert counters["device_accesses"] == np.load(BUNDLED_TRACE)["io"][:records].sum()
    assert counters["wrong"] == counters["stale_legal"] == counters["faults"] == 0


@pytest.mark.parametrize("sample", SAMPLES)
def test_samples_replay_as_recorded(shared: Path, sample: str) -> None:
    path = shared / "data" / "samples" / f"excerpt-replay-{sample}-long.npz"
    counters = check_workload(trace_workload(path, sized(1 << 30, 10_000)), "generation").counters
    assert counters["wrong"] == counters["faults"] == 0


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["linux-boot-long", "fork-exec-long", "thp-split-long", "kv-store-long"])
def test_whole_streams_replay_as_recorded(shared: Path, name: str, strategy: str) -> None:
    if not JIT:
        pytest.skip("millions of records need compiled code")
    counters = check_workload(trace_workload(shared / "data" / "replay" / f"{name}.npz"), strategy).counters
    assert counters["wrong"] == counters["faults"] == 0


def test_records_are_also_mapped_at_the_recorded_level() -> None:
    """The kernels compare addresses; here the sizes of the mappings, against the recorded column."""
    from fastmmu.walk import walk_gva

    workload = load_replay(BUNDLED_TRACE, 2_000)
    levels = np.load(BUNDLED_TRACE)["level"]
    vm = Vm(workload, MMIO_CACHE.strategies[0])
    state = vm.state
    for event in workload.events:
        if event["op"] in (Op.ACCESS, Op.DEVICE):
            walk = walk_gva(state.mem, state.mmu, state.trail, event["address"], np.uint64(event["access"]))
            assert int(walk.level) == levels[event["record"]]
        else:
            vm.run(np.array([event], workload.events.dtype))


def spoiled(workload: Workload, **changes: object) -> Workload:
    events = workload.events.copy()
    row = int(np.flatnonzero(events["op"] == Op.ACCESS)[1000])
    for field, value in changes.items():
        events[field][row] = value
    return Workload(workload.name, workload.cpu, workload.slots, workload.tables, events)


def test_a_record_that_differs_is_reported_with_its_walk() -> None:
    workload = load_replay(BUNDLED_TRACE, 2_000)
    with pytest.raises(ReplayError) as caught:
        Vm(spoiled(workload, value=0x1234), MMIO_CACHE.strategies[0]).check()
    message = str(caught.value)
    assert "record 1000: " in message and "expected gpa 0x1234" in message and "translates to gpa 0x" in message
    assert "PML4E 468 at" in message and "\n" not in message


def test_the_check_can_fail_for_every_strategy() -> None:
    """A trace whose tables lack one store is noticed, whoever replays it."""
    workload = load_replay(BUNDLED_TRACE, 60_000)
    stores = np.flatnonzero(workload.events["op"] == Op.STORE)
    events = np.delete(workload.events, stores[: len(stores) // 2])
    for strategy in MMIO_CACHE.strategies:
        with pytest.raises(ReplayError, match="is not present"):
            Vm(Workload("x", workload.cpu, workload.slots, workload.tables, events), strategy).check()


def test_a_fault_is_described_by_its_bit() -> None:
    workload = load_replay(BUNDLED_TRACE, 2_000)
    tables = {gfn: words & ~GPTE64.U for gfn, words in workload.tables.items()}
    changed = Workload("x", workload.cpu, workload.slots, tables, spoiled(workload, access=4).events)
    with pytest.raises(ReplayError, match=r"do not grant user access \(U\)"):
        Vm(changed, MMIO_CACHE.strategies[0]).check()


@pytest.mark.skipif(not JIT, reason="inspects compiled code")
def test_the_compiled_replay_counts_no_references() -> None:
    """`_nrt=False` is a private option of Numba: this test says so when it is gone."""
    from numba import njit

    fresh = njit(nogil=True, error_model="numpy", _nrt=False)(replay.py_func)
    workload = load_replay(BUNDLED_TRACE, 100)
    for strategy in MMIO_CACHE.strategies[::3]:
        vm = Vm(workload, strategy)
        fresh(vm.cache, vm.state, None, None, vm.digest, workload.events)
    texts = fresh.inspect_llvm()
    assert len(texts) == 2
    for text in texts.values():
        assert "walk" in text and "NRT_incref" not in text
    control = njit(nogil=True)(lambda array: (array, array))
    control(np.zeros(1))
    assert "NRT_incref" in next(iter(control.inspect_llvm().values())), "the search would find one"
