"""`fastmmu validate` and `fastmmu replay` as a user meets them: status, table, JSON, one line for each mistake."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenarios import NAMED
from sizes import sized

from fastmmu import commands, load_replay
from fastmmu.__main__ import main
from fastmmu.reference.scenario import run_scenario
from fastmmu.trace import scenario

EXCERPT = "bench/traces/excerpt-replay-linux-boot-long.npz"
ROOT = Path(__file__).resolve().parent.parent
RECORDS = str(sized(350_000, 1500))


def expected(document: dict[str, Any]) -> dict[str, Any]:
    """The document with what the reference counts as what KVM counted."""
    document = copy.deepcopy(document)
    for step, result in zip(document["steps"], run_scenario(document), strict=True):
        expect = step.setdefault("expect", {})
        if step["do"] not in ("memory", "host_read", "create_vcpu"):
            expect["delta"], expect["abs"] = result.delta, result.abs
        if step["do"] == "guest":
            expect["mmio"] = [[kind, hex(gpa), size, hex(data)] for kind, gpa, size, data in result.mmio]
            expect["guest_pf"] = [
                {"op": op, "err": hex(code), "cr2": hex(cr2), "cpl": step["cpl"]} for op, code, cr2 in result.guest_pf
            ]
    return document


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return expected(NAMED["two_vcpus-tdp"]())


def write(path: Path, document: Any) -> str:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(path)


def test_equal_is_zero(tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    assert main(["validate", "--audit", write(tmp_path / "one.json", document)]) == 0
    assert "one" in capsys.readouterr().out


def test_a_difference_is_one_and_told(tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    wrong = copy.deepcopy(document)
    number = next(i for i, step in enumerate(wrong["steps"]) if step["do"] == "guest")
    counted = wrong["steps"][number]["expect"]["delta"]["pf_taken"]
    wrong["steps"][number]["expect"]["delta"]["pf_taken"] = counted + 1
    path = write(tmp_path / "wrong.json", wrong)
    assert main(["validate", path]) == 1
    assert f"wrong, step {number}, pf_taken: KVM {counted + 1}, ours {counted}" in capsys.readouterr().out
    assert main(["validate", "--json", path]) == 1
    (told,) = json.loads(capsys.readouterr().out)
    assert told["scenario"] == "wrong"
    assert told["steps"] == len(wrong["steps"])
    assert told["compared"] > 100
    assert told["differ"] == [{"step": number, "what": "pf_taken", "kvm": counted + 1, "ours": counted}]


def test_what_is_not_built_is_three(tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    nested = copy.deepcopy(document)
    nested["steps"].append({"do": "param", "name": "mmio_caching", "value": "Y"})
    paths = [write(tmp_path / "nested.json", nested), write(tmp_path / "good.json", document)]
    assert main(["validate", *paths]) == 3
    told = capsys.readouterr()
    assert "needs parameter mmio_caching changed at run time, which is not built yet" in told.err
    assert "good" in told.out
    assert main(["validate", *paths, str(tmp_path / "none.json")]) == 2


def guest_step(document: dict[str, Any]) -> dict[str, Any]:
    return next(step for step in document["steps"] if step["do"] == "guest")


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an unknown step": (lambda d: guest_step(d).update(do="dance"), "'dance', expected a step"),
    "an unknown field": (lambda d: guest_step(d).update(colour=1), "'colour', expected a field of the format"),
    "an unknown counter": (lambda d: guest_step(d)["expect"]["delta"].update(pf_foo=1), "'pf_foo', expected a counter of KVM"),
    "an unknown op": (lambda d: guest_step(d)["ops"].append(["JMP", "0x1"]), "expected an op"),
    "a number that is none": (lambda d: d["steps"][0].update(gpa="zz"), "'zz', expected a hexadecimal string"),
    "another format": (lambda d: d.update(format="kvm-truth/9"), "expected one of kvm-truth/1"),
    "a missing member": (lambda d: d.pop("cpu"), "'cpu', expected this field"),
    "an address that is not canonical": (
        lambda d: guest_step(d)["ops"].append(["R8", "0x800000000000", None]),
        "a canonical address",
    ),
    "a loop without end": (lambda d: guest_step(d)["ops"].append(["LOOPR", "0x0", "0x1000", 4_000_000_000]), "iterations"),
    "words outside memory": (lambda d: d["memory"].append({"gpa": "0xffffff000", "count": 5, "value": "0x1"}), "expected memory"),
    "a memslot twice": (lambda d: d["steps"].insert(1, copy.deepcopy(d["steps"][0])), "taken or overlaps another"),
    "a memslot too large": (lambda d: d["steps"][0].update(size="0xfffffffff000"), "error: "),
    "a dirty log that is not kept": (lambda d: d["steps"].append({"do": "dirty_get", "slot": 0, "pages": 64}), "logs dirty pages"),
    "a limit that KVM refuses": (lambda d: d["steps"].append({"do": "set_nr_mmu_pages", "n": 3}), "at least 64"),
    "a processor that is none": (lambda d: d["cpu"]["cpuid"].update(maxphyaddr=99), "maxphyaddr: 99"),
    "too many vCPUs": (lambda d: guest_step(d).update(vcpu=70_000), "vcpus"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_two_and_one_line(tmp_path: Path, document: dict[str, Any], capsys: pytest.CaptureFixture, name: str) -> None:
    bad = copy.deepcopy(document)
    change, told = MISTAKES[name]
    change(bad)
    assert main(["validate", write(tmp_path / "bad.json", bad)]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert "bad" in err


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "3", '{"format": "kvm-truth/1"}', "[" * 5000])
def test_files_that_are_no_scenario(tmp_path: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    assert main(["validate", write(tmp_path / "bad.json", text)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'bad.json'}: ")


def test_paths_that_are_no_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert main(["validate", str(path)]) == 2
        assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [[], ["--mmu", "legacy"], ["--mmu", "shadow"], ["--ept", "--host-page", "2m", "--nx-huge-pages"], ["--tlb", "1x1"]],
)
def test_a_recorded_stream_translates(capsys: pytest.CaptureFixture, options: list[str]) -> None:
    """Every record of a real boot goes where it went, whatever stands between."""
    assert main(["replay", str(ROOT / EXCERPT), "--records", RECORDS, "--audit", "--json", *options]) == 0
    counters = json.loads(capsys.readouterr().out)["counters"]
    assert counters["pf_taken"] == counters["pf_fixed"] + counters.get("pf_emulate", 0)
    assert counters["exits_no_irq"] >= counters["pf_taken"]


@pytest.mark.parametrize("stream", ["fork-exec", "kv-store", "linux-boot", "thp-split"])
@pytest.mark.parametrize("mmu", ["tdp", "legacy", "shadow"])
def test_the_real_streams_translate(shared: Path, capsys: pytest.CaptureFixture, stream: str, mmu: str) -> None:
    path = shared / "data" / "replay" / f"{stream}-long.npz"
    assert main(["replay", str(path), "--mmu", mmu, "--records", str(sized(1 << 30, 500))]) == 0
    assert "pf_taken" in capsys.readouterr().out


def test_a_record_that_went_elsewhere_is_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with np.load(ROOT / EXCERPT) as columns:
        changed = {name: columns[name] for name in columns.files}
    record = int(np.flatnonzero(changed["io"] == 0)[100])
    changed["gpa"] = changed["gpa"].copy()
    changed["gpa"][record] ^= np.uint64(8)
    path = tmp_path / "changed.npz"
    np.savez(path, **changed)
    assert main(["replay", str(path), "--records", "1000"]) == 1
    assert f"column gpa, record {record}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [["--tlb", "3x1"], ["--tlb", "x"], ["--tlb", "+4x1"], ["--tlb", "1_6x4"], ["--records", "1_0"], ["--records", "0"], ["--mmu", "nested"], ["--host-page", "8k"]]
)
def test_nonsense_on_the_command_line(capsys: pytest.CaptureFixture, options: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["replay", str(ROOT / EXCERPT), *options])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


CHOICES = (
    ([], ["--mmu", "tdp"], ["--mmu", "legacy"], ["--mmu", "shadow"]),
    ([], ["--ept"]),
    ([], ["--nx-huge-pages"]),
    ([], ["--host-page", "2m"], ["--host-page", "1g"]),
    ([], ["--tlb", "1x1"]),
)


def test_options_that_do_not_go_together_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Every combination is either replayed or refused: no error of `Kvm` gets out."""
    one = load_replay(ROOT / EXCERPT, records=1)
    monkeypatch.setattr(commands, "load_replay", lambda *_: one)
    for parts in itertools.product(*CHOICES):
        options = [word for part in parts for word in part]
        status = main(["replay", EXCERPT, "--json", *options])
        told = capsys.readouterr()
        if "--ept" in options and "shadow" in options:
            assert (status, told.out, told.err) == (2, "", "error: --ept: expected --mmu tdp or legacy\n"), options
        else:
            assert (status, told.err) == (0, ""), options


def test_the_docs_of_scenario_files_name_all_that_is_read() -> None:
    page = (ROOT / "docs" / "scenario-format.md").read_text()
    lines = {line.split("`")[1]: set(re.findall(r"`(\w+)`", line)) for line in page.splitlines() if line.startswith("| `")}
    named = set(re.findall(r"`(\w+)`", page))
    assert set().union(*scenario.CONFIG) <= lines["config"]
    for kind, (needed, _, expect) in scenario.STEPS.items():
        inherited = set(scenario.GUEST) if kind == "nested_guest" else set()
        assert set(needed) - inherited <= lines[kind], kind
        assert set(expect) <= named, kind
    for op in scenario.OPS:
        assert re.search(rf"^\| `\[.*\b{op}\b", page, re.MULTILINE), op
