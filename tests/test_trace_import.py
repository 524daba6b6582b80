"""`fastmmu trace import` of traces: what becomes a record, what tables are built, what is refused, what is left behind."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sizes import sized
from traces import FAULT, MMIO, accesses, check_tables, imported, meta

from bench import import_speed
from bench.experiment import CheckError, Context
from fastmmu import Vm, load_replay
from fastmmu.__main__ import main
from fastmmu.importers import collect, source
from fastmmu.strategy import MMIO_CACHE

LACKEY = "==1== Lackey\nI  04000ffc,4\nI  04001000,3\n L 1ffefff000,8\n S 1ffefff008,8\n M 1ffefff010,4\nI  04001003,2\n"


def replays(path: Path) -> None:
    """The reader takes it, and every record translates as recorded."""
    outcome = Vm(load_replay(path), MMIO_CACHE.strategies[-1]).check()
    assert outcome.counters["faults"] == 0


def test_lackey_lines_become_records(tmp_path: Path) -> None:
    columns = imported(tmp_path, LACKEY, "--merge", "none")
    assert accesses(columns) == [
        (0x4000FFC, 2, 1), (0x4001000, 2, 1), (0x1FFEFFF000, 0, 1), (0x1FFEFFF008, 1, 1), (0x1FFEFFF010, 1, 1), (0x4001003, 2, 1),
    ]  # fmt: skip
    assert columns["size"].tolist() == [0, 0, 3, 3, 2, 0]
    assert columns["gpa"].tolist() == [0x100FFC, 0x101000, 0x102000, 0x102008, 0x102010, 0x101003]  # in order of first touch
    assert columns["prot"].tolist() == [1, 1, 7, 7, 7, 1]  # text is read-only, data is not executable
    assert meta(columns)["memslots"] == [[0, 0x103000 + 0x1000 * 6, "ram"]]  # a root, one table of level 3, two branches below
    assert columns["pt_level"].tolist() == [4, 3, 2, 1, 1, 3, 2, 1]  # a table is linked before what it leads to
    check_tables(columns)
    replays(tmp_path / "out.npz")


def test_an_access_over_two_pages_is_two(tmp_path: Path) -> None:
    columns = imported(tmp_path, " S 00000ffc,16\n L 7ffffffffffc,4\nI  00001ffe,5\n", "--merge", "none")
    assert accesses(columns) == [(0xFFC, 1, 1), (0x1000, 1, 1), (0x7FFFFFFFFFFC, 0, 1), (0x1FFE, 2, 1), (0x2000, 2, 1)]
    assert columns["size"].tolist() == [2, 3, 2, 0, 0]  # 4 and 12 bytes: no record is larger than its part
    check_tables(columns)


def test_consecutive_accesses_are_one_record(tmp_path: Path) -> None:
    lines = [
        "I  1000,4",
        " L 5000,8",
        "I  1004,4",
        " L 5008,8",
        " L 6000,8",
        " L 5010,8",
        " S 5000,8",
        " S 5000,8",
        "I  2000,4",
        " S 5000,8",
    ]
    columns = imported(tmp_path, "\n".join(lines) + "\n")
    assert accesses(columns) == [
        (0x1000, 2, 2), (0x5000, 0, 2), (0x6000, 0, 1), (0x5010, 0, 1), (0x5000, 1, 2), (0x2000, 2, 1), (0x5000, 1, 1),
    ]  # fmt: skip


def test_the_second_page_of_an_access_is_where_it_is_mapped(tmp_path: Path) -> None:
    columns = imported(tmp_path, "gva,kind,gpa,size\n0x2000,r,0x9000,1\n0x1ffc,w,0x5ffc,8\n0x3ffc,w,0x7ffc,8\n")
    assert columns["gva"].tolist() == [0x2000, 0x1FFC, 0x2000, 0x3FFC, 0x4000]
    assert columns["gpa"].tolist()[:4] == [0x9000, 0x5FFC, 0x9000, 0x7FFC]
    assert columns["gpa"][4] >= 0x10000  # nowhere told: a frame above those that are
    check_tables(columns)


def tlb_model(lines: list[tuple[int, int]]) -> list[list[int]]:
    """The TLB rule in plain Python: 16 sets by 4 ways for each kind, first in first out, emptied where a page is mapped."""
    records: list[list[int]] = []
    sets: dict[tuple[int, int], list[tuple[int, int]]] = {}
    mapped = set()
    for kind, gva in lines:
        page = gva >> 12
        ways = sets.setdefault((kind, page % 16), [])
        held = [record for of, record in ways if of == page]
        if held:
            records[held[0]][2] += 1
            continue
        if page not in mapped:
            mapped.add(page)
            sets.clear()
            ways = sets.setdefault((kind, page % 16), [])
        ways.append((page, len(records)))
        del ways[:-4]
        records.append([gva, kind, 1])
    return records


def consecutive_model(lines: list[tuple[int, int]]) -> list[list[int]]:
    """The other rule."""
    records: list[list[int]] = []
    code, data = None, None
    for kind, gva in lines:
        page = gva >> 12
        if kind == 2:
            if code and code[0] == page:
                code[1][2] += 1
                continue
            records.append([gva, kind, 1])
            code, data = (page, records[-1]), None
        elif data and data[:2] == (page, kind):
            data[2][2] += 1
        else:
            records.append([gva, kind, 1])
            data = (page, kind, records[-1])
    return records


@pytest.mark.parametrize(("rule", "model"), [("tlb", tlb_model), ("consecutive", consecutive_model)])
def test_the_rules_against_plain_python(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, rule: str, model: object
) -> None:
    """Random accesses in many small chunks, so that counts of records of earlier chunks grow, and mappings need more room."""
    monkeypatch.setattr(source, "CHUNK", 256)
    monkeypatch.setattr(source, "HEAD", 64)
    monkeypatch.setattr(collect, "FIRST_ROOM", 4)
    rng = random.Random(seed)
    pages = [rng.randrange(1 << 35) for _ in range(120)]
    lines = [
        (rng.randrange(3), rng.choice(pages[: rng.choice((3, 30, 120))]) << 12 | 8 * rng.randrange(500))
        for _ in range(sized(4000, 800))
    ]
    text = "".join(f"{('  L', '  S', 'I  ')[kind]} {gva:x},1\n" for kind, gva in lines)
    columns = imported(tmp_path, text, "--merge", rule)
    assert [list(one) for one in accesses(columns)] == model(lines)  # type: ignore[operator]
    assert columns["count"].sum() == len(lines)
    check_tables(columns)
    touched = list(dict.fromkeys(gva >> 12 for _, gva in lines))
    by_page = dict(zip((columns["gva"] >> np.uint64(12)).tolist(), (columns["gpa"] >> np.uint64(12)).tolist(), strict=True))
    assert [by_page[page] for page in touched] == list(range(0x100, 0x100 + len(touched)))


def test_counts_that_overflow_begin_a_new_record(tmp_path: Path) -> None:
    columns = imported(tmp_path, "gva,kind,count\n0x1000,r,0xffffffff\n0x1000,r,1\n0x1008,r,0xfffffffe\n0x1000,r,1\n")
    assert columns["count"].tolist() == [0xFFFFFFFF, 0xFFFFFFFF, 1]


def test_five_levels_where_addresses_need_them(tmp_path: Path) -> None:
    columns = imported(tmp_path, " L 00ffffffffffffff,1\n L ff00000000000000,1\n L ffffffffffffffff,1\n")
    assert meta(columns)["paging_levels"] == 5
    check_tables(columns)
    replays(tmp_path / "out.npz")


def sweep(pages: list[int]) -> str:
    return "".join(f" S {page << 12:x},8\n" for page in pages)


def test_large_pages_where_two_mebibytes_are_touched(tmp_path: Path, seed: int) -> None:
    whole, holey = list(range(0x400, 0x600)), list(range(0x800, 0x9FF))
    pages = whole + holey
    random.Random(seed).shuffle(pages)
    columns = imported(tmp_path, sweep([0x10, *pages]), "--pages", "2m")
    level = dict(zip((columns["gva"] >> np.uint64(12)).tolist(), columns["level"].tolist(), strict=True))
    assert {page for page, one in level.items() if one == 2} == set(whole)
    check_tables(columns)
    replays(tmp_path / "out.npz")
    leaf = columns["pt_value"][(columns["pt_level"] == 2) & (columns["pt_value"] & np.uint64(0x80) != 0)]
    assert len(leaf) == 1 and int(leaf[0]) & 0x1FF000 == 0
    assert meta(columns)["import"]["large_pages"] == 1
    columns = imported(tmp_path, sweep(pages), "--pages", "2m", "--max-ptes-none", "1")
    assert (columns["level"] == 2).all()
    assert (imported(tmp_path, sweep(pages))["level"] == 1).all()


def test_a_large_page_needs_contiguous_frames_and_no_device(tmp_path: Path) -> None:
    def rows(gva: int, gpa: int, change: dict[int, str]) -> str:
        plain = [f"{gva + i << 12},w,{gpa + i << 12},0" for i in range(512)]
        return "\n".join(change.get(i, line) for i, line in enumerate(plain)) + "\n"

    head = "gva,kind,gpa,io\n"
    assert (imported(tmp_path, head + rows(0x400, 0x800, {}), "--pages", "2m")["level"] == 2).all()
    assert (imported(tmp_path, head + rows(0x400, 0x801, {}), "--pages", "2m")["level"] == 1).all()
    for line in (f"{0x405 << 12},w,{0x1000 << 12},0", f"{0x405 << 12},w,{0x805 << 12},1"):
        columns = imported(tmp_path, head + rows(0x400, 0x800, {5: line}), "--pages", "2m")
        assert (columns["level"] == 1).all()
        check_tables(columns)


def test_pages_that_move_are_remapped_and_flushed(tmp_path: Path) -> None:
    columns = imported(tmp_path, "gva,kind,gpa\n0x1000,r,0x5000\n0x1008,r,0x5008\n0x1000,w,0x9000\n0x1000,r,\n0x1000,r,0x5000\n")
    assert columns["gpa"].tolist() == [0x5000, 0x9000, 0x9000, 0x5000]
    assert columns["event_record"].tolist() == [1, 3]
    assert columns["event_type"].tolist() == [2, 2]
    check_tables(columns)
    replays(tmp_path / "out.npz")


def test_csv_columns_in_any_order_and_devices(tmp_path: Path) -> None:
    text = "# made by hand\n\nKind, count,gva,io\r\nx,3,4096,0\r\n1,1,0xffff888000000008,1\r\nR,2,0x2000,\r\n"
    columns = imported(tmp_path, text)
    assert accesses(columns) == [(4096, 2, 3), (0xFFFF888000000008, 1, 1), (0x2000, 0, 2)]
    assert columns["io"].tolist() == [0, 1, 0]
    assert (columns["prot"] & 1).tolist() == [1, 0, 1]  # the upper half is the kernel's
    (device,) = meta(columns)["mmio_ranges"]
    assert device[0] <= int(columns["gpa"][1]) < device[1]
    check_tables(columns)
    replays(tmp_path / "out.npz")


NPT = [FAULT.format(0x107000, 0x200000006), FAULT.format(0xD0000010, 0x100000004), MMIO.format("unsatisfied-read", 8, 0xD0000010),
       "kvm_userspace_exit: reason KVM_EXIT_MMIO (6)", MMIO.format("read", 8, 0xD0000010),
       FAULT.format(0x4000, 0x100000014), MMIO.format("write", 4, 0xFEE000B0)]  # fmt: skip
SHADOW = ["# npt0.C.01-x (9 of 9 lines)", FAULT.format(0x8000000000, 0x6), "kvm_mmu_spte_requested: gfn 40000 pfn 1 level 1",
          FAULT.format(0x8000001008, 0x0), "kvm_mmu_pagetable_walk: addr 8000001008 pferr 0 ",
          "kvm_mmu_paging_element: pte 107027 level 4", "kvm_mmu_paging_element: pte 40001067 level 1",
          FAULT.format(0x10000000010, 0x8), "vcpu_match_mmio: gva 0x10000000010 gpa 0xd0000010 Read GVA",
          MMIO.format("read", 8, 0xD0000010), FAULT.format(0x9000000000, 0x2), "kvm_inj_exception: #PF (0x2)",
          FAULT.format(0x8000001010, 0x2)]  # fmt: skip


def test_faults_by_gpa_are_identity_mapped(tmp_path: Path) -> None:
    columns = imported(tmp_path, "\n".join(NPT) + "\n")
    assert accesses(columns) == [(0x107000, 1, 1), (0xD0000010, 0, 1), (0x4000, 2, 1), (0xFEE000B0, 1, 1)]
    assert columns["gpa"].tolist() == columns["gva"].tolist()
    assert columns["io"].tolist() == [0, 1, 0, 1]
    assert columns["size"].tolist() == [0, 3, 0, 2]
    assert [one[:2] for one in meta(columns)["mmio_ranges"]] == [[0xD0000000, 0xD0001000], [0xFEE00000, 0xFEE01000]]
    check_tables(columns)
    replays(tmp_path / "out.npz")


def test_faults_by_gva_go_where_the_trace_says(tmp_path: Path) -> None:
    columns = imported(tmp_path, "\n".join(SHADOW) + "\n", "--merge", "none")
    assert accesses(columns) == [(0x8000000000, 1, 1), (0x8000001008, 0, 1), (0x10000000010, 0, 1), (0x8000001010, 1, 1)]
    assert columns["gpa"].tolist() == [0x40000000, 0x40001008, 0xD0000010, 0x40001010]
    assert meta(columns)["import"]["skipped"]["kvm_page_fault that the guest got as its own"] == 1
    check_tables(columns)
    assert imported(tmp_path, "\n".join(SHADOW[1:]) + "\n")["gpa"].tolist()[:2] == [0x40000000, 0x40001008]  # told by the codes


def test_a_device_page_is_one_from_the_beginning(tmp_path: Path) -> None:
    """Also for the accesses to it that the trace does not call so, by another gva."""
    lines = ["# npt0", FAULT.format(0x7000000000, 0x2), "kvm_mmu_spte_requested: gfn d0000 pfn 1 level 1",
             FAULT.format(0x10000000010, 0x8), MMIO.format("write", 4, 0xD0000010)]  # fmt: skip
    columns = imported(tmp_path, "\n".join(lines) + "\n")
    assert columns["gpa"].tolist() == [0xD0000000, 0xD0000010]
    assert columns["io"].tolist() == [1, 1]
    replays(tmp_path / "out.npz")


def test_the_address_can_be_told(tmp_path: Path) -> None:
    line = FAULT.format(0x8000, 0x6) + "\n"
    assert imported(tmp_path, line, "--address", "gpa")["gpa"].tolist() == [0x8000]
    assert imported(tmp_path, line, "--address", "gva")["gpa"].tolist() == [0x100000]
    assert imported(tmp_path, line)["prot"].tolist() == [7]
    ept = "kvm_page_fault: address 5000 error_code 181\nkvm_page_fault: rip 0x1 address 0x6000 error_code 0x182\n"
    assert accesses(imported(tmp_path, ept + FAULT.format(0x7000, 0x184) + "\n")) == [
        (0x5000, 0, 1),
        (0x6000, 1, 1),
        (0x7000, 2, 1),
    ]


PREFIXES = {
    "perf": " CPU 0/KVM  4711 [003]   961.000{n:03d}: kvm:{line}",
    "perf-tid": "qemu-system-x86 4711/4714 [003] 961.000{n:03d}:          1     kvm:{line}",
    "trace-cmd": "   CPU 0/KVM-4711  [003]   961.000{n:03d}: {line}",
    "ftrace": "   CPU 0/KVM-4711    [003] d..1.   961.000{n:03d}: {line}",
    "tgid": " qemu-system-x86-4711    ( 4700) [003] d... 961.000{n:03d}: {line}",
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("lines", [NPT, SHADOW])
def test_prefixes_of_tools_change_nothing(tmp_path: Path, prefix: str, lines: list[str]) -> None:
    plain = imported(tmp_path, "\n".join(lines) + "\n")
    text = [line if line[0] == "#" else PREFIXES[prefix].format(n=n, line=line) for n, line in enumerate(lines)]
    told = imported(tmp_path, "\n".join(["# tracer: nop", "cpus=4", *text, "", "\tffffffff81234567 kvm_x+0x1 ([kvm])"]) + "\n")
    for name in plain.keys() - {"meta"}:
        assert np.array_equal(plain[name], told[name]), name


def test_vcpus_do_not_mix(tmp_path: Path) -> None:
    """Two tasks at once: each device access belongs to the fault of its own."""
    lines = [(1, FAULT.format(0x10000000010, 0x8)), (2, FAULT.format(0x20000000020, 0x8)), (1, MMIO.format("write", 4, 0xD0000010)),
             (2, MMIO.format("write", 8, 0xE0000020))]  # fmt: skip
    text = "".join(f" CPU {pid}/KVM  {pid} [00{pid}] 1.0: kvm:{line}\n" for pid, line in lines)
    columns = imported(tmp_path, text)
    pairs = dict(zip(columns["gva"].tolist(), columns["gpa"].tolist(), strict=True))
    assert pairs == {0x10000000010: 0xD0000010, 0x20000000020: 0xE0000020}


def save(path: Path, columns: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    return buffer.getvalue()


def bare_columns() -> dict[str, np.ndarray]:
    """Records without tables: two pages, one of which moves, a device, flushes."""
    gva, gpa = [0x400008, 0x401000, 0x400010, 0x400018, 0xFFFF888000000FFC], [0x5008, 0x6000, 0x5010, 0x7018, 0xFED00FFC]
    return {
        "gva": np.array(gva, np.uint64), "gpa": np.array(gpa, np.uint64), "kind": np.array([0, 1, 2, 0, 1], np.uint8),
        "io": np.array([0, 0, 0, 0, 1], np.uint8), "count": np.array([5, 1, 1, 9, 1], np.uint32), "level": np.full(5, 2, np.uint8),
        "prot": np.array([3, 3, 3, 5, 6], np.uint8), "size": np.array([3, 3, 0, 0, 3], np.uint8),
        "event_record": np.array([1, 4], np.uint32), "event_type": np.array([1, 3], np.uint16), "event_cr3": np.zeros(2, np.uint64),
    }  # fmt: skip


def test_records_without_tables_get_tables(tmp_path: Path) -> None:
    given = bare_columns()
    columns = imported(tmp_path, save(tmp_path, given), name="in.npz")
    for name in ("gva", "gpa", "kind", "io", "count"):
        assert np.array_equal(columns[name], given[name])
    assert columns["prot"].tolist() == [3, 3, 3, 5, 6]  # as recorded
    assert columns["event_record"].tolist() == [1, 3, 4]
    assert columns["event_type"].tolist() == [1, 2, 3]
    check_tables(columns)
    replays(tmp_path / "out.npz")
    ranges = {"memslots": [[0, 0x10000, "ram"]], "mmio_ranges": [[0xFED00000, 0xFED01000, "hpet"]]}
    columns = imported(tmp_path, save(tmp_path, {**given, "meta": np.array(json.dumps(ranges))}), name="in.npz")
    assert meta(columns)["mmio_ranges"] == ranges["mmio_ranges"]
    assert meta(columns)["memslots"][0] == ranges["memslots"][0]
    replays(tmp_path / "out.npz")


def test_replay_files_are_rewritten(tmp_path: Path) -> None:
    imported(tmp_path, LACKEY)
    first = (tmp_path / "out.npz").read_bytes()
    again = imported(tmp_path, first, name="again.npz")
    with np.load(io.BytesIO(first)) as columns:
        assert columns.files and all(np.array_equal(columns[name], again[name]) for name in columns.files)


@pytest.mark.parametrize("content", [LACKEY, "\n".join(NPT) + "\n", "gva,kind\n1,r\n"])
def test_gzip_and_the_standard_input_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    plain = imported(tmp_path, content)
    half = len(content) // 2
    packed = gzip.compress(content[:half].encode()) + gzip.compress(content[half:].encode())
    zipped = imported(tmp_path, packed, name="in.gz")
    pipe_out = tmp_path / "piped.npz"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "fastmmu", "trace", "import", "-", str(pipe_out)]
    if content == LACKEY:  # one process is enough
        run = subprocess.run(command, input=packed, capture_output=True, env=environment, check=False, timeout=120)
        assert run.returncode == 0, run.stderr
        assert b"\x1b" not in run.stdout + run.stderr
        with np.load(pipe_out) as piped:
            assert np.array_equal(piped["gpa"], plain["gpa"])
    for name in plain.keys() - {"meta"}:
        assert np.array_equal(plain[name], zipped[name]), name


MISTAKES = {
    "kind": ("I  1000,4\n X 1000,4\n", "2: ' X 1000,4', expected a lackey record"),
    "address": ("I  1000,4\n\n L zz,4\n", "3: ' L zz,4', expected a canonical address"),
    "not canonical": (" L 0100000000000000,4\n", "1: ' L 0100000000000000,4', expected a canonical"),
    "over the end": (" L ffffffffffffffff,2\n", "1: .*expected a canonical"),
    "long address": (" L 00000000000000001,2\n", "1: .*expected a canonical"),
    "size": ("==1== x\nI  1000,0\n", "2: 'I  1000,0', expected a size"),
    "large size": ("I  1000,4097\n", "1: 'I  1000,4097', expected a size"),
    "no size": ("I  1000\n", "1: 'I  1000', expected a canonical address in hexadecimal without 0x, and a comma"),
    "more": ("I  1000,4 x\n", "1: 'I  1000,4 x', expected nothing"),
    "cut": ("I  1000,4\n L 10", "2: ' L 10', expected"),
    "no record": ("==1== nothing\n", " no record, expected at least one"),
    "fault": (
        "kvm_page_fault: vcpu 0 rip 0x1 address 0xg error_code 0x1\n",
        "1: 'kvm_page_fault.*expected kvm_page_fault: address",
    ),
    "fault beyond": (FAULT.format(1 << 40, 1 << 32) + "\n", "1: .*or a gpa below 0x10000000000"),
    "mmio": ("kvm_exit: x\nkvm_mmio: mmio fetch len 4 gpa 0x1 val 0x0\n", "2: 'kvm_mmio.*expected kvm_mmio: mmio read"),
    "no tracepoint": ("kvm_exit: x\nhello world\n", "2: 'hello world', expected a tracepoint"),
    "long line": ("kvm_exit: " + "x" * 3000 + "\n", "1: .*expected a line of at most 2,000 bytes"),
    "csv header": ("gva,kind\n" * 2, "2: 'gva,kind', expected a kind"),
    "csv fields": ("gva,kind\n1,r,2\n", "2: '1,r,2', expected 2 fields: gva,kind"),
    "csv kind": ("gva,kind\n1,q\n", "2: '1,q', expected a kind: r, w or x"),
    "csv number": ("gva,kind\n0xx,r\n", "2: '0xx,r', expected gva: a number"),
    "csv empty": ("gva,kind\n,r\n", "2: ',r', expected gva: a number"),
    "csv canonical": ("gva,kind\n0x100000000000000,r\n", "2: .*expected a canonical gva"),
    "csv offset": ("gva,kind,gpa\n0x1008,r,0x2000\n", "2: .*same offset"),
    "csv gpa": ("gva,kind,gpa\n0x1008,r,0x10000000000\n", "2: .*gpa: a number from 0x0 to 0xffffffffff"),
    "csv count": ("gva,kind,count\n1,r,0\n", "2: .*count: a number from 1 to"),
    "csv io": ("gva,kind,gpa,io\n0,r,0x1000,0\n0,w,0x1000,1\n", "3: .*expected io 0 for this page, as in line 2"),
    "nothing": ("", " is of no format that can be told"),
    "unknown": ("hello\n", " is of no format that can be told by its content, expected one of lackey"),
    "binary": (b"I  1000,4\n\0\n", " is of no format"),
    "gzip": (gzip.compress(LACKEY.encode())[:-20], " damaged gzip data"),
    "npz": (b"PK\x03\x04" + bytes(200), " not an .npz file, or a damaged one"),
    "option": (LACKEY, " --hole is for raw, this is lackey", "--hole", "1000:2000"),
    "option of images": (LACKEY, " --cr3 is for elf, raw, this is lackey", "--cr3", "1000"),
    "option of options": (LACKEY, " --max-ptes-none is for --pages 2m", "--max-ptes-none", "3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_two(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    content, expected, *options = MISTAKES[name]
    path = tmp_path / "in.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (tmp_path / "out.npz").write_bytes(b"old")
    assert main(["trace", "import", *options, str(path), str(tmp_path / "out.npz")]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert re.match(re.escape(f"error: {path}:") + expected, told.err), told.err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in.txt", "out.npz"]
    assert (tmp_path / "out.npz").read_bytes() == b"old"


def test_paths_that_are_no_use(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = tmp_path / "in.txt"
    good.write_text(LACKEY)
    for pair, expected in (
        ((tmp_path / "none", tmp_path / "o.npz"), "none: no such file"),
        ((tmp_path, tmp_path / "o.npz"), "is a directory"),
        ((good, tmp_path), "is a directory, expected the name"),
        ((good, tmp_path / "no" / "o.npz"), "no such folder"),
        ((good, good), "is the input"),
    ):
        assert main(["trace", "import", *map(str, pair)]) == 2
        told = capsys.readouterr().err
        assert expected in told and told.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["in.txt"]


def test_the_summary_as_json_and_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "in.txt"
    path.write_text(LACKEY)
    assert main(["trace", "import", "--json", str(path), str(tmp_path / "o.npz")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: told[name] for name in ("format", "lines", "records", "accesses", "pages", "tables")} == {
        "format": "lackey", "lines": 7, "records": 4, "accesses": 6, "pages": 3, "tables": 6,
    }  # fmt: skip
    assert told["skipped"] == {"messages of valgrind": 1}
    assert main(["trace", "import", str(path), str(tmp_path / "o.npz")]) == 0
    told = capsys.readouterr().out
    assert "page tables are built, not recorded: 4 levels, first touch, 4 KiB pages" in told
    assert "skipped: messages of valgrind" in told


def test_control_c_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "fastmmu", "trace", "import", "--format", "lackey", "-", str(tmp_path / "o.npz")]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert run.stdin and run.stderr
    run.stdin.write(LACKEY.encode() * 2_000)  # more than a pipe holds: when this returns, reading has begun
    run.stdin.flush()
    time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=120)
    assert run.returncode == 130
    assert told == b"error: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--merge", "tlb"], ["--pages", "2m", "--max-ptes-none", "511"]])
@pytest.mark.parametrize(
    "name", ["lackey-sort-200k.txt.gz", "kvm-tracepoints.txt.gz", "excerpt-mmio.npz", "excerpt-replay-fork-exec-long.npz"]
)
def test_the_samples(shared: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    sample, output = shared / "data" / "samples" / name, tmp_path / "out.npz"
    if (".npz" in name and "tlb" in options) or ("replay" in name and options) or sized(0, 1):
        pytest.skip("not an option of this format, or an hour in the interpreter")
    assert main(["trace", "import", *options, str(sample), str(output)]) == 0
    replays(output)


def test_the_import_speed_cells_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_speed, "LINES", 3_000)
    import_speed.text.cache_clear()
    context = Context(Path("none"), None)
    for cell in import_speed.cells(context):
        checked = import_speed.check(context, cell)
        timed = import_speed.timed(context, cell)
        timed.once()
        assert checked.counters["lines"] == timed.accesses == timed.digest() == checked.expected == 3_000
    monkeypatch.setattr(import_speed, "loop", lambda path: (0, 2_999))
    with pytest.raises(CheckError, match="the loop read 2999"):
        import_speed.check(context, cell)
    import_speed.text.cache_clear()
