"""The compiled model and the plain reference over scenarios that no file holds: every step must come out the same."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarios import DIFFERENT, NAMED, NEITHER, SHADOW, Document, random_scenario
from shadow_scenarios import SHADOW_NAMED, random_shadow_scenario
from sizes import sized

from fastmmu.audit import audit
from fastmmu.audit_state import AuditError
from fastmmu.machine import MachineError
from fastmmu.machine import NotBuilt as CompiledNotBuilt
from fastmmu.machine_state import VmWord
from fastmmu.reference.processor import PFERR_F, TRUTH_HARDWARE, GuestFault, NotBuilt, Operand, Outcome, Vcpu
from fastmmu.reference.scenario import Scenario as Reference
from fastmmu.reference.scenario import StepResult, run_scenario
from fastmmu.trace.scenario import Scenario, load_scenario
from fastmmu.validate import NAMES, NOT_EXACT, TABLE_AREAS, Replay, Seen, table_words

SHADOW_KINDS: set[str] = set()
REFETCHED = ("recycled-tdp_n", "recycled_first_page")
LOADS = ("R8", "R4", "CMPX")


def compiled_step(replay: Replay, step: dict[str, Any]) -> dict[str, Any]:
    """One step of the compiled model, every value under its name."""
    machine = replay.machine
    if step["do"] == "guest" and not replay.started:
        replay.write_runs(replay.scenario.memory)
        replay.started = True
    before, tables = machine.counters(), table_words(machine.memory.words)
    seen: Seen = replay.run_step(step)
    audit(machine, guest_tables=not replay.host_wrote)
    after = machine.counters()
    values: dict[str, Any] = {
        f"delta of {name}": after[name] - before[name] for name in NAMES if name not in NOT_EXACT.get(step["do"], ())
    }
    values |= {f"{name} in all": after[name] for name in NAMES if name.startswith(("pages_", "max_", "mmu_unsync", "nx_"))}
    values["device accesses"] = [(kind, gpa, size, data & (1 << 8 * size) - 1) for kind, gpa, size, data in seen.mmio]
    values["guest #PFs"] = [fault[:3] for fault in seen.guest_pf]
    values["loads"] = [value for op, value in sorted(seen.results.items()) if step["ops"][op][0] in LOADS]
    values["faults"] = seen.faults
    values["table words"] = {}
    for (start, end), old in zip(TABLE_AREAS, tables, strict=True):
        new = machine.memory.words[start // 8 : end // 8]
        values["table words"] |= (
            {start + 8 * int(i): int(new[i]) for i in np.flatnonzero(new != old)} if step["do"] == "guest" else {}
        )
    if step["do"] == "dirty_get":
        values["dirty pages"] = np.flatnonzero(machine.report(step["slot"])).tolist()
    if step["do"] == "host_read":
        values["word"] = int(machine.memory.words[step["gpa"] // 8])
    values["nr_mmu_pages"] = int(machine.vm.word[VmWord.MAX_PAGES])
    return values


def reference_step(reference: Reference, step: dict[str, Any]) -> dict[str, Any]:
    """The same of the reference."""
    result: StepResult = reference.step(step)
    values: dict[str, Any] = {
        f"delta of {name}": result.delta.get(name, 0) for name in NAMES if name not in NOT_EXACT.get(step["do"], ())
    }
    values |= {f"{name} in all": value for name, value in result.abs.items()}
    values["device accesses"] = [(kind, gpa, size, data & (1 << 8 * size) - 1) for kind, gpa, size, data in result.mmio]
    values["guest #PFs"], values["loads"] = result.guest_pf, result.loads
    values["faults"], values["table words"] = result.faults, result.table_words
    if step["do"] == "dirty_get":
        values["dirty pages"] = sorted(result.bitmap or ())
    if step["do"] == "host_read":
        values["word"] = result.value
    values["nr_mmu_pages"] = reference.machine.nr_mmu_pages if result.nr_mmu_pages is None else result.nr_mmu_pages
    return values


def attempt(function: Any, *arguments: Any) -> Any:
    """What a step gives, or that it cannot be done: (values, error)."""
    try:
        return function(*arguments), ""
    except AuditError as error:
        return None, f"audit: {error}"
    except (ValueError, MachineError, RuntimeError) as error:
        return None, f"{type(error).__name__}: {error}"


def brief(value: Any) -> str:
    """A value, not longer than a line or two."""
    return text if len(text := str(value)) < 300 else text[:300] + "..."


def shown(name: str, ours: Any, theirs: Any) -> str:
    """Where two answers part."""
    if isinstance(ours, list) and isinstance(theirs, list):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        return f"{name}, {len(ours)} and {len(theirs)}, from number {at} on: compiled {brief(ours[at:])}, reference {brief(theirs[at:])}"
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        pairs = [f"{key:#x}: compiled {ours.get(key)}, reference {theirs.get(key)}" for key in keys[:4]]
        return f"{name}: " + "; ".join(pairs)
    return f"{name}: compiled {ours}, reference {theirs}"


class Refetching(Vcpu):
    """The reference's processor, but after a fault that exits it fetches the instruction again before it repeats the access.

    So does a processor, and the compiled model. It shows only where handling the fault unmapped the code: when shadow pages are
    recycled.
    """

    fetched: tuple[int, int] | None = None
    restarts = False

    def access(self, gva: int, access: int, size: int, operand: Operand = None) -> Outcome:
        self.restarts = False
        if access & PFERR_F:
            self.fetched = gva, access
        outcome = super().access(gva, access, size, operand)
        if access & PFERR_F and outcome.pferr is not None and self.shadowing:
            self.fetched = None  # KVM would give the guest this fault again, in the middle of its delivery
        return outcome

    def exit(self) -> None:
        super().exit()
        self.restarts = True

    def translate(self, gva: int, access: int) -> int:
        if self.restarts and self.fetched is not None:
            with contextlib.suppress(GuestFault):
                super().translate(*self.fetched)
        self.restarts = False
        return super().translate(gva, access)


@dataclass
class Comparison:
    """A document on both: values compared, what differed in the first step in which anything did, pages recycled up to there."""

    compared: int = 0
    found: list[str] = field(default_factory=list)
    recycled: int = 0
    steps: int = 0


def compare(document: Document, folder: Path, processor: type[Vcpu] = Vcpu) -> Comparison:
    """Replay a document on both, up to its end, or to a step that both refuse."""
    path = folder / "scenario.json"
    path.write_text(json.dumps(document))
    scenario = load_scenario(path)
    replay, reference, outcome = Replay(scenario), Reference(document, TRUTH_HARDWARE), Comparison()
    for number, (step, raw) in enumerate(zip(scenario.steps, document["steps"], strict=True)):
        for vcpu in reference.machine.vcpus.values():
            vcpu.__class__ = processor
        ours, our_error = attempt(compiled_step, replay, step)
        theirs, their_error = attempt(reference_step, reference, raw)
        where = f"step {number} ({step['do']})"
        outcome.steps += 1
        outcome.recycled = reference.machine.counters["mmu_recycled"]
        if ours is None or theirs is None:
            if bool(our_error) != bool(their_error) or our_error.startswith("audit"):
                outcome.found.append(f"{where}: compiled {our_error or 'did it'}, reference {their_error or 'did it'}")
            break
        assert ours.keys() == theirs.keys()
        outcome.compared += len(ours)
        outcome.found += [f"{where}: {shown(name, ours[name], theirs[name])}" for name in ours if ours[name] != theirs[name]]
        if outcome.found:
            break
    return outcome


@pytest.mark.parametrize("name", [*NAMED, *SHADOW_NAMED])
def test_named_variants_come_out_the_same(tmp_path: Path, name: str) -> None:
    if name in SHADOW_NAMED and SHADOW in SHADOW_KINDS:
        pytest.skip("the compiled model has no shadow paging")
    outcome = compare((NAMED | SHADOW_NAMED)[name](), tmp_path, Refetching if name in REFETCHED else Vcpu)
    assert not outcome.found, f"{name}: " + "\n".join(outcome.found)
    assert outcome.compared > 100


@pytest.mark.parametrize("name", REFETCHED)
def test_the_second_fetch_is_what_differs(tmp_path: Path, name: str) -> None:
    """These variants need the reference to fetch again; without, they differ, after shadow pages were recycled."""
    outcome = compare((NAMED | SHADOW_NAMED)[name](), tmp_path)
    assert outcome.found
    assert outcome.recycled


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xfail(reason=reason, strict=True)) for name, (_, reason) in DIFFERENT.items()]
)
def test_known_differences(tmp_path: Path, name: str) -> None:
    outcome = compare(DIFFERENT[name][0](), tmp_path)
    assert not outcome.found, f"{name}: " + "\n".join(outcome.found)


def run_compiled(scenario: Scenario) -> None:
    """All steps on the compiled model."""
    replay = Replay(scenario)
    for step in scenario.steps:
        replay.run_step(step)


@pytest.mark.parametrize("name", NEITHER)
def test_both_refuse(tmp_path: Path, name: str) -> None:
    document = NEITHER[name]()
    path = tmp_path / "scenario.json"
    path.write_text(json.dumps(document))
    with pytest.raises((CompiledNotBuilt, MachineError)):
        run_compiled(load_scenario(path))
    with pytest.raises(NotBuilt):
        run_scenario(document)


def check_random(seed: int, count: int, folder: Path, make: Callable[[random.Random], Document] = random_scenario) -> None:
    """Random documents; those in which shadow pages were recycled may need the reference to fetch again."""
    values = steps = refetched = 0
    for number in range(seed, seed + count):
        document = make(random.Random(number))
        outcome = compare(document, folder)
        if outcome.found and outcome.recycled:
            refetched += 1
            outcome = compare(document, folder, Refetching)
        values, steps = values + outcome.compared, steps + outcome.steps
        kind = {name: value for name, value in document["config"].items() if name != "nested"}
        assert not outcome.found, f"{make.__name__}(random.Random({number})), {kind}: " + "\n".join(outcome.found)
    print(f"{count} scenarios, {steps} steps, {values} values compared; {refetched} needed the second fetch")


def test_random_scenarios_come_out_the_same(seed: int, tmp_path: Path) -> None:
    check_random(seed, sized(40, 12), tmp_path)


@pytest.mark.skipif(SHADOW in SHADOW_KINDS, reason="the compiled model has no shadow paging")
def test_random_shadow_scenarios_come_out_the_same(seed: int, tmp_path: Path) -> None:
    check_random(seed, sized(40, 12), tmp_path, random_shadow_scenario)


@pytest.mark.long
def test_many_random_scenarios_come_out_the_same(seed: int, tmp_path: Path) -> None:
    check_random(seed + 1_000_000, sized(1000, 40), tmp_path)


@pytest.mark.long
def test_many_random_shadow_scenarios_come_out_the_same(seed: int, tmp_path: Path) -> None:
    check_random(seed + 1_000_000, sized(1000, 40), tmp_path, random_shadow_scenario)
