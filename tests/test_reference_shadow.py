"""The reference's shadow paging: against the recorded files, by its own invariants, and the guest's other formats."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from shadow_scenarios import SHADOW_NAMED, Document, random_shadow_scenario
from sizes import sized

from fastmmu.reference.kvm import Machine
from fastmmu.reference.processor import TRUTH_HARDWARE, NotBuilt
from fastmmu.reference.scenario import INEXACT, Scenario, StepResult, bitmap_pages, expand, number
from fastmmu.reference.tables import Leaf, Slot, Table
from fastmmu.reference.walk import PFERR_F, PFERR_U, PFERR_W

FILES = 21  # recorded without nested paging


def expected(step: dict[str, Any]) -> dict[str, Any]:
    """What a recorded step demands, and the list of faults that is recorded with it."""
    expect = step.get("expect", {})
    values: dict[str, Any] = {name: expect[name] for name in ("nr_mmu_pages", "count") if name in expect}
    if "delta" in expect:
        inexact = ("remote_tlb_flush_requests",) if step["do"] in INEXACT else ()
        values["delta"] = {name: value for name, value in expect["delta"].items() if name not in inexact}
    values |= {f"{name} in all": value for name, value in expect.get("abs", {}).items()}
    if "mmio" in expect:
        values["mmio"] = [(kind, number(gpa), size, number(data)) for kind, gpa, size, data in expect["mmio"]]
    if "guest_pf" in expect:
        values["guest_pf"] = [(fault["op"], number(fault["err"]), number(fault["cr2"])) for fault in expect["guest_pf"]]
    if "table_words" in expect:
        values["table_words"] = dict(expand(expect["table_words"]))
    if "bitmap" in expect:
        values["bitmap"] = bitmap_pages(expect["bitmap"])
    if "value" in expect:
        values["value"] = number(expect["value"])
    if step["do"] == "guest":
        values["loads"] = [op[-1] and number(op[-1]) for op in step["ops"] if op[0] in ("R8", "R4", "CMPX")]
        runs = step.get("info", {}).get("faults", [])
        values["faults"] = [
            (number(at) + i * number(stride), number(code)) for at, stride, count, code in runs for i in range(count)
        ]
        values["faults"] = [in_code(*fault) for fault in values["faults"]]
    return values


def in_code(address: int, code: int) -> tuple[int, int]:
    """Inside the page of code the model knows no addresses."""
    return (address & ~0xFFF if address >> 12 == 4 else address), code


def came_out(result: StepResult, wanted: dict[str, Any]) -> dict[str, Any]:
    """The same of the reference."""
    values: dict[str, Any] = {name: getattr(result, name) for name in wanted if hasattr(result, name)}
    values |= {f"{name} in all": value for name, value in result.abs.items() if f"{name} in all" in wanted}
    if "delta" in wanted:
        values["delta"] = result.delta
    if "count" in wanted:
        values["count"] = len(result.bitmap)
    if "faults" in wanted:
        values["faults"] = [in_code(*fault) for fault in result.faults]
    return values


def size_of(value: Any) -> int:
    """How many values are in it."""
    return len(value) if isinstance(value, dict | list | set) else 1


def test_recorded_files(shared: Path) -> None:
    files = sorted((shared / "kvm" / "truth").glob("npt0*.json"))
    assert len(files) == FILES
    compared = 0
    for path in files:
        document = json.loads(path.read_text())
        scenario = Scenario(document, TRUTH_HARDWARE)
        for index, step in enumerate(document["steps"]):
            wanted = expected(step)
            ours = came_out(scenario.step(step), wanted)
            check_invariants(scenario.machine)
            assert ours == wanted, f"{path.name}, step {index} ({step['do']} {step.get('name', '')})"
            compared += sum(size_of(value) for value in wanted.values())
    print(f"{compared} values compared")


class WritableTable(AssertionError):
    """A page with a synced table is writable.

    So it can be in 6.1, and in the model: a leaf that takes the place of an MMIO SPTE with its W bit set asks nobody.
    """


def check_invariants(machine: Machine) -> None:
    """Gauges, rmap lists, marks and write protection are what the tables say."""
    mmu, counters = machine.mmu, machine.counters
    leafs: Counter[int] = Counter()
    unsync, shadowed = 0, Counter()
    for page in mmu.pages:
        assert not page.invalid
        unsync += page.unsync
        shadowed[page.gfn] += not page.role.direct
        for index, entry in page.entries.items():
            if isinstance(entry, Leaf):
                leafs[page.level] += 1
                assert (page, index) in mmu.rmap[page.level, entry.gfn]
                assert entry.mmu_writable or not entry.writable
                if entry.mmu_writable and not all(shadow.unsync for shadow in mmu.shadows(entry.gfn)):
                    raise WritableTable(hex(entry.gfn))
            elif isinstance(entry, Table):
                assert (page, index) in entry.parents
                assert index in page.unsync_children or not (entry.unsync or entry.unsync_children)
    assert sum(map(len, mmu.rmap.values())) == leafs.total()
    assert [counters[name] for name in ("pages_4k", "pages_2m", "pages_1g")] == [leafs[level] for level in (1, 2, 3)]
    assert counters["mmu_unsync"] == unsync
    assert +shadowed == +mmu.shadowed
    assert mmu.used >= len(mmu.pages)


def run(document: Document) -> Counter[str]:
    """All steps; counters as gauges at their highest."""
    scenario = Scenario(document, TRUTH_HARDWARE)
    seen: Counter[str] = Counter()
    for step in document["steps"]:
        scenario.step(step)
        check_invariants(scenario.machine)
        seen |= scenario.machine.counters
    return seen


@pytest.mark.parametrize("name", SHADOW_NAMED)
def test_named_scenarios_keep_the_invariants(name: str) -> None:
    assert run(SHADOW_NAMED[name]())["pf_fixed"]


def test_the_scenarios_touch_every_counter(seed: int) -> None:
    seen: Counter[str] = Counter()
    for make in SHADOW_NAMED.values():
        seen |= run(make())
    touched = {name for name, value in seen.items() if value}
    wanted = {
        "mmu_unsync",
        "mmu_flooded",
        "mmu_pte_write",
        "mmu_pde_zapped",
        "mmu_recycled",
        "mmu_shadow_zapped",
        "invlpg",
        "pf_guest",
    }
    wanted |= {"pf_spurious", "pf_emulate", "nx_lpage_splits", "pages_2m", "pages_1g", "tlb_flush", "pf_mmio_spte_created"}
    assert wanted <= touched
    assert seen["max_mmu_rmap_size"] > 1000


def test_random_scenarios_keep_the_invariants(seed: int) -> None:
    count, ended = sized(60, 20), 0
    for start in range(seed, seed + count):
        try:
            run(random_shadow_scenario(random.Random(start)))
        except (NotBuilt, WritableTable):  # code in a device, or as that class says
            ended += 1
    assert ended <= count // 5


# --- formats that no document has ------------------------------------------------------------------------------------------

PAE, TWO_LEVEL = {"cr4": 0x20, "efer": 0x800}, {"cr4": 0x10, "efer": 0}


def small_guest(registers: dict[str, int], cr3: int) -> Machine:
    """16 MiB of memory, a vCPU with paging on."""
    machine = Machine(npt=False, hardware=TRUTH_HARDWARE)
    machine.create_slot(0, Slot(0, 4096))
    machine.memory.words.clear()
    machine.mode(0, 0, cr0=0x80010031, cr3=cr3, **registers)
    return machine


def write(machine: Machine, gpa: int, size: int, value: int) -> None:
    """Guest memory, before a vCPU runs."""
    machine.memory.write(gpa, size, value)


def counted(machine: Machine, *accesses: tuple[Any, ...]) -> dict[str, int]:
    """Counters that some accesses (gva, access, size, operand) change."""
    before = Counter(machine.counters)
    for gva, access, *rest in accesses:
        outcome = machine.vcpus[0].access(gva, access, *(rest or (4,)))
        if len(rest) == 2 and not outcome.stored:
            for gpa, length, _ in outcome.pieces:
                machine.memory.store(gpa, length, rest[1])
    check_invariants(machine)
    return {name: value - before[name] for name, value in machine.counters.items() if value != before[name]}


def test_two_level_tables_have_quadrants() -> None:
    """Four roots, of which each shadows a quarter of the directory; a table of 1024 entries has two shadows (facts 5.11, S24)."""
    machine = small_guest(TWO_LEVEL, 0x1000)
    write(machine, 0x1000, 4, 0x2027)
    write(machine, 0x1004, 4, 0x400000 | 0xE7)
    for i in range(1024):
        write(machine, 0x2000 + 4 * i, 4, i << 12 | 0x67)
    assert counted(machine, (0x5000, 0))["mmu_cache_miss"] == 5
    assert counted(machine, (0x205000, 0))["mmu_cache_miss"] == 1  # the other half of the table
    assert counted(machine, (0x600000, PFERR_W), (0x400000, PFERR_W))["mmu_cache_miss"] == 2  # 4M are two direct tables
    changed = counted(machine, (0x1000, PFERR_W, 4, 0x2027), (0x5000, 0))
    assert (changed["mmu_pte_write"], changed["mmu_pde_zapped"]) == (1, 4 * 2 // 4)
    assert machine.vcpus[0].access(0x205000, 0, 4).pieces == [(0x205000, 4, False)]
    assert counted(machine, (0x2014, PFERR_W, 4, 0x9067))["mmu_unsync"] == 2
    machine.write_control(machine.vcpus[0], cr3=0x1000)
    assert counted(machine, (0x5000, 0))["mmu_unsync"] == -2
    assert machine.vcpus[0].access(0x5000, 0, 4).pieces == [(0x9000, 4, False)]


def test_pae_roots_come_from_the_registers() -> None:
    """A PDPTE that changes in memory counts from the next load of CR3 on (facts 1.7)."""
    machine = small_guest(PAE, 0x1020)
    for i, pdpt in enumerate((0x1020, 0x1040)):
        write(machine, pdpt, 8, 0x2000 + i * 0x10000 | 1)
        write(machine, 0x2000 + i * 0x10000, 8, 0x3000 + i * 0x10000 | 0x27)
        for page in range(64):
            write(machine, 0x3000 + i * 0x10000 + 8 * page, 8, page + i << 12 | 0x67)
    machine.mode(0, 0, cr0=0x80010031, cr3=0, **PAE)
    machine.mode(0, 0, cr0=0x80010031, cr3=0x1020, **PAE)
    assert counted(machine, (0x5000, 0))["mmu_cache_miss"] == 2
    assert machine.vcpus[0].access(0x40000000, 0, 4).pferr == 0
    machine.write_control(machine.vcpus[0], cr3=0x1040)
    assert counted(machine, (0x5000, PFERR_W))["mmu_cache_miss"] == 2
    assert machine.vcpus[0].access(0x5000, PFERR_U | PFERR_F, 1).pieces == [(0x6000, 1, False)]
    machine.write_control(machine.vcpus[0], cr3=0x1020)
    assert "mmu_cache_miss" not in counted(machine, (0x5000, 0))  # its pages are still in the hash
    assert machine.vcpus[0].previous == [None] * 3
