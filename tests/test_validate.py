"""Scenario files of a real KVM: everything that it counted, delivered and changed must come out of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from fastmmu.bits import PFERR
from fastmmu.machine import NotBuilt
from fastmmu.trace.scenario import load_scenario
from fastmmu.validate import Replay, validate

BUILT = (
    "npt1.A512", "npt1.A512log", "npt1.B", "npt1.Binit", "npt1.C", "npt1.E", "npt1-tdpN.A512", "npt1-tdpN.B", "npt1-eagerN.B",
    "npt1-nxforce.Bexec", "npt0.A512", "npt0.A512noAD", "npt0.A512np", "npt0.A512rA", "npt0.B", "npt0.Binit", "npt0-eagerN.B",
    "npt0-nxforce.Bexec", "npt0.C", "npt0-nommiocache.C", "npt0.E", "npt0.G", "npt0.D-cpl0_wp0_exec", "npt0.D-cpl0_wp0_read",
    "npt0.D-cpl0_wp0_write", "npt0.D-cpl0_wp1_exec", "npt0.D-cpl0_wp1_read", "npt0.D-cpl0_wp1_write", "npt0.D-cpl3_exec",
    "npt0.D-cpl3_read", "npt0.D-cpl3_write", "npt1.F", "npt1.Falias", "npt1-eagerN.F", "npt1-tdpN.F",
)  # fmt: skip


@pytest.fixture(scope="module")
def truth(shared: Path) -> Path:
    return shared / "kvm" / "truth"


@pytest.mark.parametrize("name", BUILT)
def test_a_real_kvm_counted_the_same(truth: Path, name: str) -> None:
    outcome = validate(load_scenario(truth / f"{name}.json"), audited=True)
    assert outcome.compared > 220
    assert not outcome.differ


@pytest.mark.parametrize("name", BUILT)
def test_faults_come_in_the_recorded_order(truth: Path, name: str) -> None:
    """`info.faults` is not required, but it was recorded: address and error code of each fault, in order.

    Of a fetch only the page: where in its page of code the guest was is not in the file.
    """
    document = json.loads((truth / f"{name}.json").read_text())
    replay = Replay(load_scenario(truth / f"{name}.json"))
    for step, raw in zip(replay.scenario.steps, document["steps"], strict=True):
        seen = replay.run_step(step)
        if "faults" in raw.get("info", {}):
            runs = [(int(a, 16), int(s, 16), n, int(code, 16)) for a, s, n, code in raw["info"]["faults"]]
            expected = [(a + i * s, code) for a, s, n, code in runs for i in range(n)]
            assert [page_of_fetch(*one) for one in seen.faults] == [page_of_fetch(*one) for one in expected]


def page_of_fetch(address: int, code: int) -> tuple[int, int]:
    return (address & ~0xFFF if code & int(PFERR.F) else address), code


def test_the_example_that_is_shipped() -> None:
    (path,) = (ROOT / "examples").glob("*.json")
    outcome = validate(load_scenario(path), audited=True)
    assert outcome.compared > 1000
    assert not outcome.differ


def test_every_file_is_named_here(truth: Path) -> None:
    assert sorted(BUILT) == sorted(path.name.removesuffix(".json") for path in truth.glob("*.json"))


def test_what_is_not_built_is_named(tmp_path: Path) -> None:
    (path,) = (ROOT / "examples").glob("*.json")
    document = json.loads(path.read_text())
    document["steps"].append({"do": "param", "name": "mmio_caching", "value": "N"})
    (tmp_path / "changed.json").write_text(json.dumps(document))
    with pytest.raises(NotBuilt, match="mmio_caching"):
        validate(load_scenario(tmp_path / "changed.json"))
