"""The exit qualification on three floors: the rules of facts 2.2 to 2.4, and every order of accesses against the reference."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import ROOT
from sizes import sized

from bench import ept_qualification
from bench.experiment import Cell, Checked, CheckError, Context
from bench.results import count_benchmarks, counter_metadata
from fastmmu.__main__ import main
from fastmmu.bits import EPT, EPT_SPTE
from fastmmu.ept import MISCONFIGURATION, walk_ept
from fastmmu.floors import ACT, MOST_STATES, NEVER, Act, Floor, Tally, run_acts
from fastmmu.machine_state import VmWord
from fastmmu.memory import find_slot
from fastmmu.qualification import (
    ACTS,
    POLICIES,
    STRATEGIES,
    Watched,
    entries02,
    entries12,
    make_house,
    make_seen,
    mmio_generation_of,
    watch,
)  # fmt: skip
from fastmmu.reference.qualification import BIT
from fastmmu.reference.qualification import House as Reference
from fastmmu.state import NO_SLOT, TRAIL_LENGTH

LETTERS = {"read": "R", "write": "W", "fetch": "X"}
ACCESSES = tuple(LETTERS)
OTHERS = tuple(set(ACTS) - set(ACCESSES) - {"memslots"})
CASES = list(itertools.product(STRATEGIES, POLICIES, (True, False)))
OLD, NEW = STRATEGIES
EXACT, WITH_WRITE = POLICIES
LENGTH = 4
CONTEXT = Context(ROOT, None)


def orders(length: int, acts: tuple[str, ...] = ACCESSES) -> list[tuple[str, ...]]:
    """All sequences of 1 to `length` acts."""
    return [order for n in range(1, length + 1) for order in itertools.product(acts, repeat=n)]


def events(watched: Watched, *names: str) -> int:
    return sum(step.event in names for step in watched.steps)


# --- facts 2.4, what a model test should assert ------------------------------------------------------------------------------


def test_the_old_code_never_completes_a_write_after_a_read() -> None:
    old = watch(["read", "write"], strategy=OLD, l1=EXACT)
    assert not old.completes and old.counters["never_completed"] == 1
    begin, end = old.loop
    again = [step.event for step in old.steps[begin - 1 : end]]
    assert again == ["misconfiguration", "emulator_walk", "injected", "unchanged"]
    before, after = old.steps[begin - 2], old.steps[end - 1]
    assert (before.rights, before.generation, before.saved) == (after.rights, after.generation, after.saved) == ("R--", 0, 0x181)
    assert [step.qualification for step in old.steps if step.event == "injected"] == [0x181, 0x189]  # a read, though R is there


def test_the_old_code_completes_where_l1_grants_writes_with_reads() -> None:
    old = watch(["read", "write"], strategy=OLD, l1=WITH_WRITE)
    assert old.completes
    assert (old.counters["injected"], old.counters["grants"], old.counters["unchanged"]) == (1, 1, 0)
    assert old.steps[-1].rights == "RW-"


@pytest.mark.parametrize("l1", POLICIES)
def test_the_new_code_completes_in_both(l1: str) -> None:
    assert watch(["read", "write"], strategy=NEW, l1=l1).completes


def test_the_new_code_injects_once_for_the_write() -> None:
    """And the next try is a violation, because L1's write to its table has dropped the MMIO spte."""
    new = watch(["read", "write"], strategy=NEW, l1=EXACT)
    first = next(step.number for step in new.steps if step.event == "completed")
    write = new.steps[first:]
    assert [step.event for step in write] == [
        "misconfiguration", "emulator_walk", "injected", "granted", "violation", "fault_walk", "mmio_spte", "emulator_walk", "completed",
    ]  # fmt: skip
    assert write[2].qualification == 0x18B  # read and write: the emulator's walk adds read; 5:3 have the R of EPT12


@pytest.mark.parametrize("l1", POLICIES)
def test_the_old_code_completes_where_the_first_access_is_a_write(l1: str) -> None:
    old = watch(["write", "read", "write"], strategy=OLD, l1=l1)
    assert old.completes and old.counters["injected"] == 1
    assert [step.rights for step in old.steps if step.event == "granted"] == ["RW-"]


def test_a_misconfiguration_leaves_what_is_kept() -> None:
    for strategy in STRATEGIES:
        for step in watch(["read", "write"], strategy=strategy).steps:
            if step.event == "misconfiguration":
                assert step.saved == 0x181


# --- exactly the combinations that the old code loops on ------------------------------------------------------------------


def literal(order: tuple[str, ...], l1: str, *, stale: bool) -> int:
    """The state machine of facts 2.4, word by word, for reads and writes: the number of accesses that complete."""
    e12, e02, saved = set(), False, set()
    for number, a in enumerate(LETTERS[name] for name in order):
        for _ in range(20):
            if not e02:
                saved, wanted = {a}, {a}
            else:
                wanted = {a, "R"}
            if wanted <= e12:
                e02 = True
                break
            seen = saved if stale else wanted
            new = e12 | seen | ({"R"} if "W" in seen else set())
            if l1 == WITH_WRITE and "R" in new:
                new.add("W")
            if new != e12:
                e12, e02 = new, False
        else:
            return number
    return len(order)


@pytest.mark.parametrize("l1", POLICIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reads_and_writes_come_out_as_in_the_state_machine(strategy: str, l1: str) -> None:
    for order in orders(sized(6, 4), ("read", "write")):
        watched = watch(order, strategy=strategy, l1=l1)
        assert watched.counters["completed"] == literal(order, l1, stale=strategy == OLD), order
        assert watched.completes == (watched.counters["completed"] == len(order))


def loops(order: tuple[str, ...], l1: str, execute_only: bool) -> bool:
    """The rule of facts 2.4 in closed form. The first access decides what is kept, and with it what L1 ever grants; any access that needs
    more, R included because the emulator asks, is told in the first one's words for ever."""
    first = LETTERS[order[0]]
    granted = {first}
    if first == "W" or (first == "X" and not execute_only):
        granted.add("R")
    if l1 == WITH_WRITE and "R" in granted:
        granted.add("W")
    return any({LETTERS[name], "R"} - granted for name in order)


@pytest.mark.parametrize("execute_only", [True, False])
@pytest.mark.parametrize("l1", POLICIES)
def test_stale_loops_exactly_where_the_rule_says_and_derived_nowhere(l1: str, execute_only: bool) -> None:
    every = orders(LENGTH)
    stale = {order for order in every if not watch(order, strategy=OLD, l1=l1, execute_only=execute_only).completes}
    assert stale == {order for order in every if loops(order, l1, execute_only)}
    assert 0 < len(stale) < len(every)
    assert not [order for order in every if not watch(order, strategy=NEW, l1=l1, execute_only=execute_only).completes]


def test_pairs_that_loop() -> None:
    """The same for two accesses, written out."""
    found = {
        (l1, only): {
            f"{a} {b}" for a, b in itertools.product(ACCESSES, repeat=2) if not watch([a, b], l1=l1, execute_only=only).completes
        }
        for l1 in POLICIES
        for only in (False, True)
    }
    fetch_first = {"fetch read", "fetch write", "fetch fetch"}
    assert found == {
        (EXACT, False): {"read write", "read fetch", "write fetch", "fetch write"},
        (EXACT, True): {"read write", "read fetch", "write fetch"} | fetch_first,
        (WITH_WRITE, False): {"read fetch", "write fetch"},
        (WITH_WRITE, True): {"read fetch", "write fetch"} | fetch_first,
    }


def test_a_violation_at_another_page_may_end_a_loop_but_begins_none() -> None:
    """What L0 keeps belongs to the vCPU, not to the page."""
    assert watch(["read", "other-write", "write"]).completes
    assert not watch(["read", "other-write", "other-read", "write"]).completes
    for l1, only in itertools.product(POLICIES, (True, False)):
        for order in orders(3):
            if loops(order, l1, only):
                continue
            for at, other in itertools.product(range(len(order) + 1), OTHERS):
                assert watch([*order[:at], other, *order[at:]], l1=l1, execute_only=only).completes


@pytest.mark.parametrize("l1", POLICIES)
def test_where_the_state_recurs_nothing_else_has_changed(l1: str) -> None:
    """One more turn leaves every word of both memories, and everything else, as it was: so would any number of turns."""
    found = 0
    for order in orders(3):
        watched = watch(order, l1=l1)
        if watched.completes:
            continue
        found += 1
        house, seen, answer = make_house(OLD, l1), make_seen(), np.zeros(1, np.uint64)
        rows = np.zeros(len(order), ACT)
        rows["value"] = [ACTS[name][1] for name in order]
        for at in range(watched.counters["accesses"]):
            run_acts(house, None, None, seen, rows[at : at + 1], answer)
        assert answer[0] & NEVER
        state = [words.copy() for words in (house.l1.words, house.l0.words, house.floor, house.word)]
        run_acts(house, None, None, seen, rows[at : at + 1], answer)
        turn = [step.event for step in watched.steps[watched.loop[0] - 1 : watched.loop[1]]]
        assert answer[0] == 2 * sum(event in ("violation", "misconfiguration") for event in turn) + 1
        for before, now in zip(state, (house.l1.words, house.l0.words, house.floor, house.word), strict=True):
            np.testing.assert_array_equal(before, now)
    assert found > 10


def test_a_loop_may_begin_after_the_first_try() -> None:
    """A fetch where L1 may grant X alone: the violation leaves an MMIO spte behind, and only the misconfigurations come again."""
    one = watch("fetch")
    assert one.loop == (11, 14) and one.steps[10].event == "misconfiguration"
    assert one.counters["violations"] == 2


# --- rules -------------------------------------------------------------------------------------------------------------------


def test_bits_8_and_7_are_preserved_in_both() -> None:
    """Even where they are another page's: that was put right later (facts 2.3)."""
    for strategy, told in ((OLD, 0x1), (NEW, 0x3)):
        watched = watch(["read", "other-walk", "write"], strategy=strategy)
        injected = [step.qualification for step in watched.steps if step.event == "injected"]
        assert injected[1] == 0x088 | told


def test_an_old_mmio_spte_takes_the_slow_path_which_knows_no_access() -> None:
    new = watch(["read", "memslots", "write"], strategy=NEW, generation=0x12345)
    at = next(step.number for step in new.steps if step.event == "memslots")
    assert [step.event for step in new.steps[at : at + 6]] == [
        "misconfiguration", "old_generation", "fault_walk", "mmio_spte", "emulator_walk", "injected",
    ]  # fmt: skip
    assert new.steps[at].generation == 0x12345 and new.steps[at + 3].generation == 0x12346
    assert "any access" in new.steps[at + 2].text
    assert new.completes
    assert not watch(["read", "memslots", "write"], strategy=OLD).completes


def test_the_generation_comes_round() -> None:
    last = (1 << 19) - 1
    new = watch(["read", "memslots", "read"], strategy=NEW, generation=last)
    assert events(new, "old_generation") == 0 and events(new, "misconfiguration") == 0
    assert new.steps[-1].generation == 0
    one = watch(["read", "memslots", "read"], strategy=NEW, generation=last - 1)
    assert events(one, "old_generation") == 1 and one.steps[-1].generation == last


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("rights", "execute_only"), [("W", True), ("WX", True), ("X", False)])
def test_a_misconfigured_entry_of_l1_is_told_as_that(strategy: str, rights: str, execute_only: bool) -> None:
    one = watch("read", strategy=strategy, rights=rights, execute_only=execute_only)
    assert not one.completes
    assert one.counters["injected"] == 0 and one.counters["injected_misconfigurations"] == 2  # what is kept changes once
    assert all(step.qualification == 0 for step in one.steps if step.event == "injected_misconfiguration")


def test_the_house() -> None:
    """The device lies in no memslot, L0's entry is an MMIO spte of the device's frame, and the processor takes it as misconfigured."""
    house = make_house(NEW, EXACT, pages=600)
    acts, answers = np.zeros(2, ACT), np.zeros(2, np.uint64)
    acts["value"], acts["gfn"] = BIT["R"], (0, 599)
    run_acts(house, None, None, make_seen(), acts, answers)
    assert not (answers & NEVER).any()
    assert np.flatnonzero(entries12(house)).tolist() == np.flatnonzero(entries02(house)).tolist() == [0, 599]
    for gfn in (0, 599):
        entry, spte = entries12(house)[gfn], entries02(house)[gfn]
        device = entry & EPT.ADDR
        assert device == house.device + (np.uint64(gfn) << np.uint64(12)) and find_slot(house.l1.slots, device) == NO_SLOT
        assert spte & EPT_SPTE.ADDR == device
        assert spte & EPT_SPTE.MMIO_MASK == EPT_SPTE.MMIO
        trail = np.zeros(TRAIL_LENGTH, np.uint64)
        for access in BIT.values():
            walk = walk_ept(house.l0, house.ept02, trail, None, np.uint64(gfn << 12), np.uint64(access), False, False)
            assert walk.reason == MISCONFIGURATION


def test_bad_input_is_refused_in_one_line() -> None:
    for wrong, message in (
        (dict(acts=["jump"]), "acts: 'jump', expected one of read, write, fetch, memslots, other-read"),
        (dict(acts=[]), "acts: 0, expected 1 to 1000"),
        (dict(acts=["read"] * 1001), "acts: 1001, expected 1 to 1000"),
        (dict(acts=[7]), "acts: 7, expected one of"),
        (dict(acts="read", strategy="new"), "strategy: 'new', expected one of stale, derived"),
        (dict(acts="read", l1="all"), "l1: 'all', expected one of exact, write-with-read"),
        (dict(acts="read", rights="RQ"), "rights: 'RQ', expected letters of 'RWX'"),
        (dict(acts="read", rights=3), "rights: 3, expected letters of 'RWX'"),
        (dict(acts="read", execute_only=2), "execute_only: 2, expected True or False"),
        (dict(acts="read", generation=-1), "generation: -1, expected an int from 0"),
    ):
        with pytest.raises(ValueError) as error:
            watch(**wrong)
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_steps_are_sentences_with_the_state_after_them() -> None:
    watched = watch(["read", "write"])
    assert [step.number for step in watched.steps] == list(range(1, len(watched.steps) + 1))
    assert watched.steps[0].text == "L2 tries to read; EPT02 is empty: violation, qualification 0x181, which L0 keeps"
    assert watched.steps[-1].text == "the state is as it was before step 10: the write never completes"
    assert all(step.text for step in watched.steps)


# --- against the reference ---------------------------------------------------------------------------------------------------


def compare(strategy: str, l1: str, execute_only: bool, acts: list[tuple[int, str]], generation: int, rights: dict[int, str]) -> int:
    """Run acts, (page, name), on both; returns how many accesses never complete."""
    pages = 1 + max(gfn for gfn, _ in acts)
    house = make_house(strategy, l1, execute_only=execute_only, pages=pages, generation=generation)
    reference = Reference(strategy, l1, execute_only, generation)
    for gfn, letters in rights.items():
        if gfn < pages and letters:
            entries12(house)[gfn] = int(house.device) + (gfn << 12) | sum(BIT[letter] for letter in letters)
            reference.page(gfn).granted = frozenset(letters)
    rows, answers, stat = np.zeros(len(acts), ACT), np.zeros(len(acts), np.uint64), np.zeros(len(Tally), np.uint64)
    for row, (gfn, name) in zip(rows, acts, strict=True):
        row["act"], row["value"] = ACTS[name]
        row["gfn"] = gfn
    run_acts(house, stat, None, make_seen(), rows, answers)
    expected = []
    for gfn, name in acts:
        if name in LETTERS:
            tries, done = reference.access(gfn, LETTERS[name])
            expected.append(2 * tries + (not done))
        else:
            expected.append(0)
            if name == "memslots":
                reference.change_memslots()
            else:
                reference.saved = ACTS[name][1]
    told = f"{strategy}, {l1}, execute only {execute_only}, generation {generation:#x}, rights {rights}, {acts}"
    assert answers.tolist() == expected, told
    assert {one.name.lower(): int(stat[one]) for one in Tally if stat[one]} == {k: n for k, n in reference.counters.items() if n}, told
    assert int(house.floor[Floor.SAVED]) == reference.saved and int(house.word[VmWord.GENERATION]) == reference.generation, told
    for gfn in range(pages):
        page, spte = reference.page(gfn), entries02(house)[gfn]
        granted = {letter for letter, bit in BIT.items() if int(entries12(house)[gfn]) & bit}
        assert granted == page.granted and (mmio_generation_of(spte) if spte else None) == page.spte, told
    assert all(answer >> 1 < MOST_STATES for answer in expected)
    return int((answers & NEVER).sum())


@pytest.mark.parametrize(("strategy", "l1", "execute_only"), CASES)
def test_every_order_comes_out_as_in_the_reference(strategy: str, l1: str, execute_only: bool) -> None:
    """Each order on a page of its own; and all orders at once, which shows what the pages have in common."""
    every = orders(5)
    apart = [(gfn, name) for gfn, order in enumerate(every) for name in order]
    never = compare(strategy, l1, execute_only, apart, 0, {})
    assert (never > 0) == (strategy == OLD)
    woven = [(gfn, order[turn]) for turn in range(5) for gfn, order in enumerate(every) if turn < len(order)]
    assert compare(strategy, l1, execute_only, woven, 7, {}) < (never or 1)  # a violation at another page often saves the day


@pytest.mark.parametrize(("strategy", "l1", "execute_only"), CASES)
def test_what_is_told_is_what_the_reference_tells(strategy: str, l1: str, execute_only: bool) -> None:
    for order in orders(4, (*ACCESSES, "memslots")):
        watched, reference = watch(order, strategy=strategy, l1=l1, execute_only=execute_only), Reference(strategy, l1, execute_only)
        for name in order:
            if name == "memslots":
                reference.change_memslots()
            elif not reference.access(0, LETTERS[name])[1]:
                break
        injected = [step.qualification for step in watched.steps if step.event.startswith("injected")]
        assert injected == reference.injected, order


def random_runs(seed: int, runs: int, length: int) -> int:
    rng = np.random.default_rng(seed)
    never = 0
    for _ in range(runs):
        strategy, l1, execute_only = CASES[rng.integers(len(CASES))]
        pages = int(rng.integers(1, 6))
        names = rng.choice(list(ACTS), length, p=[0.22, 0.22, 0.22, 0.14, *(0.2 / len(OTHERS),) * len(OTHERS)])
        acts = [(int(rng.integers(pages)), str(name)) for name in names]
        rights = {gfn: "".join(letter for letter in "RWX" if rng.random() < 0.2) for gfn in range(pages)}
        never += compare(strategy, l1, execute_only, acts, int(rng.choice([0, 255, (1 << 19) - 2, (1 << 60) + 5])), rights)
    return never


def test_random_acts_come_out_as_in_the_reference(seed: int) -> None:
    assert random_runs(seed, sized(400, 300), 40) > 0


@pytest.mark.long
def test_many_random_acts_come_out_as_in_the_reference(seed: int) -> None:
    never = random_runs(seed, sized(20_000, 500), 60)
    print(f"seed {seed}: {never:,} accesses that never complete")


def test_a_wrong_act_is_none() -> None:
    """Every kind of act has a name."""
    assert {act for act, _ in ACTS.values()} == set(Act)


# --- the experiment ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked() -> Iterator[dict[str, Checked]]:
    """Every cell, small; counters, tries and tables are already compared with the reference's."""
    copies, ept_qualification.COPIES = ept_qualification.COPIES, 2
    yield {cell.name: ept_qualification.check(CONTEXT, cell) for cell in ept_qualification.cells(CONTEXT)}
    ept_qualification.COPIES = copies


def test_every_order_of_the_experiment_is_there() -> None:
    for orders_of, kinds in (("data", 2), ("all", 3), ("woven", 3)):
        rows = ept_qualification.accesses_of(orders_of, 2)
        by_page: dict[int, tuple[int, ...]] = {}
        for gfn, value in zip(rows["gfn"].tolist(), rows["value"].tolist(), strict=True):
            by_page[gfn] = (*by_page.get(gfn, ()), value)
        assert sorted(by_page.values()) == sorted(2 * list(itertools.product((1, 2, 4)[:kinds], repeat=4)))


def test_only_stale_cells_have_accesses_that_never_complete(checked: dict[str, Checked]) -> None:
    assert len(checked) == 16
    for name, one in checked.items():
        counters = one.counters
        assert counters["completed"] + counters["never_completed"] == counters["accesses"]
        assert counters["grants"] + counters["unchanged"] == counters["injected"]
        assert (counters["never_completed"] > 0) == (name.endswith("/stale") and "/write-with-read/data" not in name), name
        assert counters["unchanged"] >= counters["never_completed"]


def test_page_by_page_the_rule_counts_them(checked: dict[str, Checked]) -> None:
    """An access is given up, and the next one goes on with what L0 keeps: still the first access's bits."""
    for l1, (workload, kinds) in itertools.product(POLICIES, (("data", ACCESSES[:2]), ("all", ACCESSES))):
        expected = sum(
            loops((order[0], name), l1, execute_only=False) for order in itertools.product(kinds, repeat=4) for name in order
        )
        assert checked[f"ept-qualification/{l1}/{workload}/stale"].counters["never_completed"] == 2 * expected


def test_timed_runs_come_to_what_was_checked(checked: dict[str, Checked]) -> None:
    timed = [cell for cell in ept_qualification.cells(CONTEXT) if not ept_qualification.why_not(CONTEXT, cell)]
    assert [cell.name.partition("/")[2] for cell in timed] == [
        "exact/data/derived", "write-with-read/data/stale", "write-with-read/data/derived",
    ]  # fmt: skip
    for cell in timed:
        assert checked[cell.name].counters["never_completed"] == 0
        work = ept_qualification.timed(CONTEXT, cell)
        work.run(2)
        assert work.digest() == checked[cell.name].expected and work.accesses == checked[cell.name].counters["accesses"]


def test_a_difference_from_the_reference_is_an_error(checked: dict[str, Checked], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reference, "legal", lambda self, rights: "R" in rights)
    with pytest.raises(CheckError, match="ept-qualification/exact/all-execute-only/stale: counters differ from the reference"):
        ept_qualification.check(CONTEXT, Cell("ept-qualification", "exact/all-execute-only", "stale"))


def test_the_table_is_made_from_the_counters(checked: dict[str, Checked]) -> None:
    suite = {}
    for name, one in checked.items():
        for benchmark in count_benchmarks(name, one.counts, counter_metadata(one.counters)):
            suite[benchmark.get_name()] = benchmark
    (table,) = ept_qualification.tables(suite)
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    assert len(rows) == 16 and all(len(row) == len(table.head) for row in table.rows)
    assert rows["exact/data / stale"]["never complete"] == "24" and rows["exact/data / derived"]["never complete"] == "0"
    assert rows["write-with-read/data / derived"]["injected"] == "0.250"


# --- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_shows_the_loop_and_its_end(capsys: pytest.CaptureFixture) -> None:
    assert main(["qualification", "read", "write"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "   1  L2 tries to read; EPT02 is empty: violation, qualification 0x181, which L0 keeps"
    assert lines[-1] == "steps 10 to 13 come again for ever"
    assert main(["qualification", "read", "write", "--strategy", "derived"]) == 0
    assert "come again" not in capsys.readouterr().out
    assert main(["qualification", "read", "write", "--l1", "write-with-read", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["completes"] and told["loop"] is None and told["counters"]["completed"] == 2 and told["steps"][0]["number"] == 1
    assert main(["qualification", "fetch"]) == 1
    assert main(["qualification", "fetch", "--no-execute-only"]) == 0


def test_the_command_refuses_in_one_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["qualification", "jump"]) == 2
    assert capsys.readouterr().err.startswith("error: acts: 'jump', expected one of read, write, fetch")
    for wrong in (["qualification"], ["qualification", "read", "--l1", "all"], ["qualification", "read", "--strategy", "new"]):
        with pytest.raises(SystemExit) as status:
            main(wrong)
        told = capsys.readouterr().err
        assert status.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
