"""Regions of an address space: QEMU's own lists, the walk, tables that are shared or point to themselves; the commands on snapshots."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from machines import random_gva, random_machine
from test_translate import LONG, small_snapshot

from fastmmu import Cpu, GuestMemory, Regions, load_snapshot, regions
from fastmmu.__main__ import main
from fastmmu.address_space import FETCH, GLOBAL, USER, WRITE, TooManyRegions
from fastmmu.explain import MODE_NAMES, explain_walk
from fastmmu.paging import Mode
from fastmmu.snapshot_commands import rights_text

BUNDLED = [ROOT / "bench" / "traces" / f"snapshot-{name}.npz" for name in ("linux-boot", "fork-exec")]
OTHERS = ("linux-boot", "fork-exec", "kv-store-la57", "i386-pae", "i386-2level")
MODES = [Mode.TWO_LEVEL, Mode.PAE, Mode.LONG4, Mode.LONG5]
FULL = 0x67


def check_against_qemu(path: Path) -> None:
    """`info mem`, whose ranges have equal rights of user and write, and each row of `info tlb`."""
    snapshot = load_snapshot(path)
    with np.load(path) as columns:
        lists = {name: columns[name] for name in ("tlb_gva", "tlb_gpa", "tlb_flags", "mem_start", "mem_end", "mem_prot")}
    found = regions(snapshot.memory, snapshot.cpu, by_gpa=True)
    gva, flags = lists["tlb_gva"].astype(np.uint64), lists["tlb_flags"].astype(np.uint64)
    assert int(found.pages.sum()) == len(gva)
    row = np.searchsorted(found.start, gva, "right") - 1
    inside = gva - found.start[row]
    assert (inside < found.size[row]).all()
    assert np.array_equal(found.gpa[row] + inside, lists["tlb_gpa"].astype(np.uint64))
    rights = found.rights[row]
    assert np.array_equal(rights & GLOBAL != 0, flags & np.uint64(1 << 8) != 0)
    for right, leaf in (
        (WRITE, flags & np.uint64(2) != 0),
        (USER, flags & np.uint64(4) != 0),
        (FETCH, flags >> np.uint64(15) == 0),
    ):
        assert not (rights & right != 0)[~leaf].any()  # the leaf alone grants no less than all entries
    # `info mem` looks at user and write alone
    whole = regions(snapshot.memory, snapshot.cpu)
    assert int(whole.size.sum()) == int(found.size.sum())
    prot = whole.rights & (USER | WRITE)
    first = np.concatenate([[True], (prot[1:] != prot[:-1]) | (whole.start[1:] != whole.start[:-1] + whole.size[:-1])])
    starts, sizes = whole.start[first], np.add.reduceat(whole.size, np.flatnonzero(first))
    if len(lists["mem_start"]):  # QEMU 7.2 prints nothing under 5-level paging
        assert np.array_equal(starts, lists["mem_start"])
        assert np.array_equal(starts + sizes, lists["mem_end"])
        assert np.array_equal(prot[first], lists["mem_prot"])  # the same bits: 1 user, 2 write


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_a_bundled_snapshot_is_as_qemu_lists_it(path: Path) -> None:
    check_against_qemu(path)


@pytest.mark.parametrize("name", OTHERS)
def test_every_snapshot_is_as_qemu_lists_it(shared: Path, name: str) -> None:
    check_against_qemu(shared / "data" / "snapshots" / f"{name}.npz")


@pytest.mark.parametrize("by_gpa", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=[mode.name for mode in MODES])
def test_the_walk_says_the_same(seed: int, mode: Mode, by_gpa: bool) -> None:
    """Random tables, reserved bits and tables outside memory among them: random addresses, and the borders of regions."""
    rng = np.random.default_rng([seed, mode, by_gpa])
    used = np.isin(np.arange(1024 if mode == Mode.TWO_LEVEL else 512), (0, 1, 2, 255, 256, 511, 512, 1023))
    for _ in range(6):
        machine = random_machine(rng, mode)
        words = machine.memory.words.view(np.uint32 if mode == Mode.TWO_LEVEL else np.uint64).reshape(-1, len(used))
        tables = np.arange(len(words)) != machine.cpu.cr3 >> 12 if mode == Mode.PAE else np.ones(len(words), bool)
        words[np.ix_(tables, ~used)] = 0
        before = machine.memory.words.copy()
        found = regions(machine.memory, machine.cpu, by_gpa=by_gpa)
        assert np.array_equal(machine.memory.words, before)
        borders = rng.choice(np.arange(len(found.start)), min(50, len(found.start)), replace=False) if len(found.start) else []
        gvas = [random_gva(rng, mode) for _ in range(100)]
        for number in borders:
            first = int(found.start[number])
            gvas += [first, first + int(found.size[number]) - 1, (first + int(found.size[number])) % (1 << 64)]
        for gva in gvas:
            walk = explain_walk(machine.memory, machine.cpu, gva)
            row = int(np.searchsorted(found.start, np.uint64(gva), "right")) - 1
            mapped = row >= 0 and gva - int(found.start[row]) < int(found.size[row])
            assert mapped == bool(walk.steps and walk.steps[-1].rights), f"{walk}\n{machine.cpu}"
            if mapped:
                assert rights_text(int(found.rights[row]))[:4] == walk.steps[-1].rights, f"{walk}\n{machine.cpu}"
                if by_gpa and walk.gpa is not None:
                    assert walk.gpa == int(found.gpa[row]) + gva - int(found.start[row])


def test_neighbours_merge_but_not_across_the_middle_of_the_address_space() -> None:
    ram = GuestMemory(1 << 20)
    for table in (0x1000, 0x2000, 0x3000, 0x4000):
        ram.words[table >> 3 : (table >> 3) + 512] = 0x1000 + table | FULL
    ram.words[0x4000 >> 3 : 0x5000 >> 3] = np.arange(512, dtype=np.uint64) << np.uint64(12) | np.uint64(FULL)
    found = regions(ram, Cpu(**LONG))
    assert found.start.tolist() == [0, (1 << 64) - (1 << 47)]
    assert found.size.tolist() == [1 << 47] * 2
    assert found.pages.tolist() == [[1 << 35, 0, 0]] * 2


def test_tables_that_point_to_themselves() -> None:
    """Every entry of the root points to the root: 2^36 pages of equal rights are two regions, by gpa they are too many to tell."""
    ram = GuestMemory(1 << 20)
    ram.words[0x1000 >> 3 : 0x2000 >> 3] = 0x1000 | FULL
    found = regions(ram, Cpu(**LONG))
    assert found.pages.sum(0).tolist() == [1 << 36, 0, 0]
    assert len(found.start) == 2
    with pytest.raises(TooManyRegions, match="regions: 512 entries of level 3 point to 1 tables, whose pages do not merge"):
        regions(ram, Cpu(**LONG), by_gpa=True)
    ram.words[0x1000 >> 3 : 0x2000 >> 3 : 2] = 0x1000 | 5
    with pytest.raises(TooManyRegions):
        regions(ram, Cpu(**LONG))


def test_nothing_is_mapped() -> None:
    ram = GuestMemory(1 << 20)
    ram.words[0x1000 >> 3] = 0xFFFF_F000 | FULL  # outside memory
    ram.words[0x1008 >> 3] = 0x2000 | FULL | 0x80  # PS is reserved at level 4
    off = Cpu(cr0=1, cr3=0, cr4=0, efer=0)
    for cpu in (Cpu(**LONG), Cpu(**{**LONG, "cr3": 0x40_0000}), off):
        found = regions(ram, cpu)
        assert isinstance(found, Regions) and not len(found.start) and found.pages.shape == (0, 3)
    with pytest.raises(ValueError, match="expected a GuestMemory and a Cpu"):
        regions(ram.words, off)  # type: ignore[arg-type]


# --- commands


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


@pytest.mark.parametrize(("bit", "option", "one", "two"), [
    (63, "--fetch", "PDPTE forbids fetches (NX)", "PDPTE and PDE forbid fetches (NX)"),
    (2, "--user", "PDPTE does not grant user access (U)", "PDPTE and PDE do not grant user access (U)"),
    (1, "--write", "PDPTE does not grant writing (W)", "PDPTE and PDE do not grant writing (W)"),
])  # fmt: skip
def test_the_verb_agrees(tmp_path: Path, capsys: pytest.CaptureFixture, bit: int, option: str, one: str, two: str) -> None:
    words = np.zeros((4, 512), np.uint64)
    words[:, 0] = 0x2067, 0x3067, 0x4067, 0x5067
    for row, told in ((1, one), (2, two)):
        words[row, 0] ^= np.uint64(1 << bit)
        status, out, _ = run(capsys, "translate", small_snapshot(tmp_path / "s.npz", words=words), "123", option)
        assert status == 1 and f": {told}" in out


def test_a_walk_as_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = np.zeros((4, 512), np.uint64)
    words[0, 0], words[1, 0], words[2, 0], words[3, 0] = 0x2067, 0x3065, 0x4067, 0x50E5  # bit 7 of the last: PAT
    path = small_snapshot(tmp_path / "s.npz", words=words)
    status, out, _ = run(capsys, "explain", path, "123", "--write")
    assert status == 1
    assert out.splitlines() == [
        "supervisor write of gva 0x123, 4-level paging, CR3 0x1000",
        "└── PML4E 0 at 0x1000: 0x2067 (P W U A D) urwx",
        "    └── PDPTE 0 at 0x2000: 0x3065 (P U A D) ur-x <- W is clear",
        "        └── PDE 0 at 0x3000: 0x4067 (P W U A D) ur-x",
        "            └── PTE 0 at 0x4000: 0x50e5 (P U A D PAT) ur-x <- W is clear",
        "                └── => page fault, error code 0x3 (P W): PDPTE and PTE do not grant writing (W), and CR0.WP is set",
    ]
    assert run(capsys, "translate", path, "123", "--write", "--explain") == (status, out, "")
    status, out, _ = run(capsys, "explain", path, "123", "1123", "--json")
    good, fault = json.loads(out)
    assert status == 1
    assert (good["ok"], good["gpa"], good["page"], good["pferr"]) == (True, "0x5123", 4096, None)
    assert (fault["ok"], fault["gpa"], fault["page"], fault["pferr"]) == (False, None, 0, "0x0")
    assert [step["rights"] for step in fault["steps"]] == ["urwx", "ur-x", "ur-x", ""]
    assert fault["steps"][3] == {
        "name": "PTE", "index": 1, "address": "0x4008", "value": "0x0", "bits": [], "rights": "", "decides": "P is clear",
    }  # fmt: skip


DECIDES = {
    "user": ({}, 4, "PDE", {"PDE": 0x4063}, "U is clear"),
    "no execute": ({"efer": 0xD00}, 0x10, "PTE", {"PTE": 0x5067 | 1 << 63}, "NX is set"),
    "reserved": ({}, 0, "PDPTE", {"PDPTE": 0x3067 | 1 << 51}, "sets reserved bits: 51"),
    "smep": ({"cr4": 0x10_0020}, 0x10, "PTE", {}, "U is set, in this entry and all above"),
    "smap": ({"cr4": 0x20_0020}, 0, "PTE", {}, "U is set, in this entry and all above"),
    "key": ({"cr4": 0x40_0020, "pkru": 4}, 4, "PTE", {"PTE": 0x5067 | 1 << 59}, "its protection key"),
    "key and right": ({"cr4": 0x40_0020, "pkru": 4}, 6, "PTE", {"PTE": 0x5065 | 1 << 59}, "W is clear; its protection key"),
}


@pytest.mark.parametrize("name", DECIDES)
def test_the_entry_that_decides(name: str) -> None:
    registers, access, entry, words, why = DECIDES[name]
    ram = GuestMemory(1 << 20)
    for number, place in enumerate(("PML4E", "PDPTE", "PDE", "PTE")):
        ram.words[(0x1000 + 0x1000 * number) >> 3] = words.get(place, 0x2067 + 0x1000 * number)
    walk = explain_walk(ram, Cpu(**{**LONG, **registers}, maxphyaddr=40), 0, access)
    assert {step.name: step.decides for step in walk.steps if step.decides} == {entry: why}, walk


def test_a_pdpte_decides() -> None:
    walk = explain_walk(GuestMemory(1 << 20), Cpu(cr0=0x8000_0001, cr3=0x1000, cr4=0x20, efer=0), 1 << 31)
    assert [str(step) for step in walk.steps] == ["PDPTE register 2: 0x0"]
    assert walk.steps[0].decides == "P is clear"


def test_colour_says_nothing_that_words_do_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = ("explain", BUNDLED[0], "ffffffff81000000", "400000", "--write")
    plain = run(capsys, *arguments)
    assert "\x1b" not in plain[1] and max(map(len, plain[1].splitlines())) > 80  # not folded where nobody looks
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    status, coloured, _ = run(capsys, *arguments)
    assert coloured.count("\x1b[") > 10
    assert (status, re.sub(r"\x1b\[[0-9;]*m", "", coloured)) == plain[:2]


def test_the_map_in_three_forms(capsys: pytest.CaptureFixture) -> None:
    status, text, _ = run(capsys, "map", BUNDLED[0])
    lines = text.splitlines()
    assert status == 0
    assert lines[0] == "4-level paging, CR3 0x5582000 (others: 0x3c58000, 0x2a10000)"
    assert lines[1] == "regions: 113, bytes: 1111660 KiB, pages: 8,603 of 4K, 526 of 2M"
    assert lines[2].split() == ["start", "end", "size", "rights", "pages"]
    assert lines[3].split() == ["0000000000400000", "0000000000401000", "4", "KiB", "ur---", "1", "of", "4K"]
    assert len(lines) == 3 + 113
    told = json.loads(run(capsys, "map", BUNDLED[0], "--json")[1])
    assert (told["mode"], told["cr3"]) == (MODE_NAMES[Mode.LONG4], "0x5582000")
    assert told["regions"][1] == {"start": "0x401000", "end": "0x47f000", "size": 0x7E000, "rights": "ur-x-", "pages": {"4K": 126}}
    rows = list(csv.DictReader(io.StringIO(run(capsys, "map", BUNDLED[0], "--csv", "--gpa")[1])))
    assert rows[1] == {
        "start": "0x401000", "end": "0x409000", "size": "32768", "rights": "ur-x-", "gpa": "0x3838000",
        "pages_4k": "8", "pages_2m": "0", "pages_1g": "0",
    }  # fmt: skip
    user = json.loads(run(capsys, "map", BUNDLED[0], "--json", "--user")[1])["regions"]
    assert user == [row for row in told["regions"] if row["rights"].startswith("u")] and 0 < len(user) < 113
    other = json.loads(run(capsys, "map", BUNDLED[0], "--json", "--cr3", "2a10000")[1])
    assert other["cr3"] == "0x2a10000" and other["regions"] != told["regions"]


def test_what_the_map_cannot_tell(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loop = small_snapshot(tmp_path / "loop.npz", words=np.full((4, 512), 0x1067, np.uint64))
    assert run(capsys, "map", loop)[0] == 0
    status, out, err = run(capsys, "map", loop, "--gpa")
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {loop}: more than 4,194,304 regions")
    off = small_snapshot(tmp_path / "off.npz", cr0=np.uint64(1))
    assert run(capsys, "map", off) == (0, "paging is off: every address is its own gpa\n", "")
    assert json.loads(run(capsys, "map", off, "--json")[1])["regions"] == []
    assert run(capsys, "map", off, "--csv")[1] == "start,end,size,rights\n"
    empty = small_snapshot(tmp_path / "empty.npz", words=np.zeros((4, 512), np.uint64))
    assert "regions: 0, bytes: 0 B, pages: none" in run(capsys, "map", empty)[1]
    pae = small_snapshot(tmp_path / "pae.npz", efer=np.uint64(0))
    for command in ("map", "explain"):
        status, out, err = run(capsys, command, pae, *(["0"] if command == "explain" else []))
        assert (status, out, err.count("\n")) == (2, "", 1) and "pae.npz: CR3 0x1000 cannot be loaded" in err
    for command in (("map", loop, "--cr3", "999000"), ("map", tmp_path)):
        status, out, err = run(capsys, *command)
        assert (status, out, err.count("\n")) == (2, "", 1)
