"""Replay files: what is refused, in one line that names file, column, record and what was expected; and mutations at random."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from sizes import sized

from bench.workloads import BUNDLED_TRACE
from fastmmu import ReplayError, TraceError, Vm, load_replay
from fastmmu.__main__ import main
from fastmmu.bits import GPTE64
from fastmmu.strategy import MMIO_CACHE

BUNDLED_SNAPSHOT = ROOT / "bench" / "traces" / "snapshot-linux-boot.npz"
RECORDS = 1_500
Columns = dict[str, np.ndarray]


def small_columns() -> Columns:
    """The first records of the bundled trace as a file of their own."""
    with np.load(BUNDLED_TRACE) as archive:
        columns = {name: archive[name] for name in archive.files}
    for name in ("gva", "gpa", "kind", "io", "count", "level", "prot", "size"):
        columns[name] = columns[name][:RECORDS]
    for prefix, key in (("pt_", "pt_record"), ("event_", "event_record")):
        kept = columns[key] < RECORDS
        for name in [name for name in columns if name.startswith(prefix)]:
            columns[name] = columns[name][kept]
    return columns


@pytest.fixture(scope="module")
def columns() -> Columns:
    return small_columns()


def save(path: Path, columns: Columns) -> Path:
    np.savez(path, **columns)
    return path


def changed(columns: Columns, name: str, change: Callable[[np.ndarray], object]) -> Columns:
    copy = columns[name].copy()
    result = change(copy)
    return {**columns, name: copy if result is None else np.asarray(result)}


def meta(columns: Columns, **changes: object) -> Columns:
    return {**columns, "meta": np.array(json.dumps({**json.loads(str(columns["meta"])), **changes}))}


def setter(row: object, value: object) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[row] = value

    return change


def point_root_at(columns: Columns, target: int) -> Columns:
    words = columns["start_words"].copy()
    table = int(np.flatnonzero(columns["start_level"] == 4)[0])
    words[table, 511] = target | 0x67
    return {**columns, "start_words": words}


def root_gpa(columns: Columns) -> int:
    return int(columns["start_gfn"][np.flatnonzero(columns["start_level"] == 4)[0]]) << 12


BAD = {
    "missing column": (lambda c: {k: v for k, v in c.items() if k != "prot"}, "column prot is missing"),
    "no meta": (lambda c: {k: v for k, v in c.items() if k != "meta"}, "column meta is missing"),
    "dtype": (lambda c: {**c, "gva": c["gva"].astype(np.float64)}, "column gva: dtype float64, expected uint64"),
    "length": (lambda c: {**c, "kind": c["kind"][:-1]}, "column kind: length 1499, expected 1500"),
    "shape": (lambda c: {**c, "gpa": c["gpa"].reshape(2, -1)}, "column gpa: shape"),
    "start_words shape": (lambda c: {**c, "start_words": c["start_words"][:, :9]}, "column start_words: uint64 of shape"),
    "kind": (lambda c: changed(c, "kind", setter(5, 3)), "column kind, record 5: 3, expected 0 read"),
    "io": (lambda c: changed(c, "io", setter(6, 2)), "column io, record 6"),
    "prot": (lambda c: changed(c, "prot", setter(6, 99)), "column prot, record 6"),
    "level": (lambda c: changed(c, "level", setter(6, 0)), "column level, record 6"),
    "not canonical": (
        lambda c: changed(c, "gva", setter(7, 1 << 47)),
        "column gva, record 7: 0x800000000000, expected a canonical",
    ),
    "outside everything": (
        lambda c: changed(c, "gpa", setter(8, 0xA0000000)),
        "column gpa, record 8: 0xa0000000, expected an address in a memslot or device range",
    ),
    "device not in a range": (lambda c: changed(c, "io", setter(9, 1)), "record 9: .* in a device range, because io is 1"),
    "memory in a device range": (lambda c: changed(c, "gpa", setter(9, 0xFED00010)), "record 9: .* in a memslot, because io is 0"),
    "cr3 event": (lambda c: cr3_event(c), "column event_cr3, record 0: .*outside memory"),
    "cr3 start": (lambda c: meta(c, cr3_start=0xFED00000), "cr3_start 0xfed00000 lies outside memory"),
    "event type": (lambda c: changed(c, "event_type", setter(0, 9)), "column event_type, record 0: 9"),
    "event order": (lambda c: changed(c, "event_record", setter(0, 1499)), "column event_record, record 1: .*ascending"),
    "event beyond": (lambda c: changed(c, "event_record", setter(-1, 1501)), "column event_record, record .*at most 1500"),
    "store order": (lambda c: changed(c, "pt_record", setter(0, 1499)), "column pt_record, record 1: .*ascending"),
    "store address": (lambda c: changed(c, "pt_gpa", setter(2, 4097)), "column pt_gpa, record 2: .*multiple of 8"),
    "store to a device": (lambda c: changed(c, "pt_gpa", setter(2, 0xFED00000)), "column pt_gpa, record 2: .*in RAM"),
    "store flag": (lambda c: changed(c, "pt_flag", setter(2, 7)), "column pt_flag, record 2"),
    "table outside": (lambda c: changed(c, "start_gfn", setter(1, 0xFED00)), "column start_gfn, record 1: .*in RAM"),
    "table far outside": (lambda c: changed(c, "start_gfn", setter(1, 1 << 63)), "column start_gfn, record 1: .*frame number"),
    "table twice": (lambda c: changed(c, "start_gfn", setter(1, c["start_gfn"][0])), "column start_gfn, record 1: .*once"),
    "table level": (lambda c: changed(c, "start_level", setter(0, 5)), "column start_level, record 0"),
    "table at itself": (
        lambda c: point_root_at(c, root_gpa(c)),
        "entry 511: points to .*, the table itself; expected a table of level 3",
    ),
    "table at a device": (lambda c: point_root_at(c, 0xFED00000), "entry 511: .*in device range hpet"),
    "table beyond the end": (lambda c: point_root_at(c, 1 << 45), "entry 511: .*outside every slot"),
    "meta not JSON": (lambda c: {**c, "meta": np.array("{")}, "column meta: not JSON"),
    "meta a list": (lambda c: {**c, "meta": np.array("[1]")}, "column meta: expected a JSON object"),
    "meta bytes": (lambda c: {**c, "meta": np.zeros(3)}, "column meta: dtype float64"),
    "no memslots": (lambda c: meta(c, memslots=[]), "column meta: memslots"),
    "memslots nonsense": (lambda c: meta(c, memslots=[[0, "x", "ram"]]), "column meta: memslots holds"),
    "memslots overlap": (lambda c: meta(c, memslots=[[0, 8192, "ram"], [4096, 12288, "ram"]]), "overlap"),
    "memslots kind": (lambda c: meta(c, memslots=[[0, 8192, "tape"]]), "'ram' | 'rom'"),
    "device range": (lambda c: meta(c, mmio_ranges=[[9, 1, "x"]]), "column meta: mmio_ranges holds"),
    "device over memory": (
        lambda c: meta(c, mmio_ranges=[[0, 1 << 20, "all"]]),
        "column meta: mmio_ranges: all .* overlaps memslot",
    ),
    "memory beyond reason": (
        lambda c: meta(c, memslots=[[0, 1 << 51, "ram"]], mmio_ranges=[]),
        "column meta: memslots: cannot reserve",
    ),
    "no record": (
        lambda c: {**c, **{n: c[n][:0] for n in ("gva", "gpa", "kind", "io", "count", "level", "prot", "size")}},
        "no record",
    ),
    "size": (lambda c: changed(c, "size", setter(3, 255)), "column size, record 3"),
    "count": (lambda c: changed(c, "count", setter(3, 0)), "column count, record 3: 0, expected at least 1"),
    "store level": (lambda c: changed(c, "pt_level", setter(3, 9)), "column pt_level, record 3"),
    "store of a bad pointer": (
        lambda c: store_pointer(c, 0xFED00000),
        "column pt_value, record 0: points to 0xfed00000, in device range hpet",
    ),
    "store of a pointer to itself": (
        lambda c: store_pointer(c, int(c["pt_gpa"][0])),
        "column pt_value, record 0: .*the table itself",
    ),
    "levels": (lambda c: meta(c, paging_levels=3), "paging_levels is 3, expected 4 or 5"),
    "cr3 text": (lambda c: meta(c, cr3_start="0x1000"), "cr3_start is '0x1000', expected"),
}


def store_pointer(columns: Columns, target: int) -> Columns:
    return changed(changed(columns, "pt_level", setter(0, 4)), "pt_value", setter(0, target & ~0xFFF | 0x67))


def cr3_event(columns: Columns) -> Columns:
    return changed(changed(columns, "event_type", setter(0, 1)), "event_cr3", setter(0, 0xFED00000))


@pytest.mark.parametrize("name", BAD)
def test_bad_columns_are_named(name: str, columns: Columns, tmp_path: Path) -> None:
    spoil, expected = BAD[name]
    path = save(tmp_path / "bad.npz", spoil(columns))
    with pytest.raises(TraceError, match=expected.replace("|", r"\|")) as caught:
        load_replay(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_the_unspoiled_file_loads(columns: Columns, tmp_path: Path) -> None:
    workload = load_replay(save(tmp_path / "good.npz", columns))
    Vm(workload, MMIO_CACHE.strategies[0]).check()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"not a zip at all", b"\x93NUMPY\x01\x00"], ids=["empty", "cut", "text", "npy"]
)
def test_files_of_another_kind(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"not an \.npz file"):
        load_replay(path)


def test_missing_file_directory_and_pickle(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        load_replay(tmp_path / "none.npz")
    with pytest.raises(TraceError, match="no regular file"):
        load_replay(tmp_path)
    save(tmp_path / "pickle.npz", {**small_columns(), "gva": np.array([object()], object)})
    with pytest.raises(TraceError, match="column gva: cannot be read"):
        load_replay(tmp_path / "pickle.npz")


def test_a_file_of_the_other_kind_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """And one that lacks a column of its own kind still says which."""
    replay_is = "is a replay file, expected a snapshot (docs/snapshot-format.md)"
    snapshot_is = "is a snapshot, expected a replay file (docs/replay-format.md)"
    for arguments, file, told in (
        (["translate", str(BUNDLED_TRACE), "0"], BUNDLED_TRACE, replay_is),
        (["replay", str(BUNDLED_SNAPSHOT)], BUNDLED_SNAPSHOT, snapshot_is),
        (["trace", "import", str(BUNDLED_SNAPSHOT), str(tmp_path / "out.npz")], BUNDLED_SNAPSHOT, snapshot_is),
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"error: {file}: {told}\n"
    records = save(tmp_path / "records.npz", {"gva": np.zeros(1, np.uint64)})
    assert main(["replay", str(records)]) == 2
    assert capsys.readouterr().err.endswith("records.npz: column meta is missing\n")


def test_truncated_anywhere(columns: Columns, tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.npz", columns).read_bytes()
    for part in np.linspace(0, len(whole) - 1, 12, dtype=int):
        (tmp_path / "cut.npz").write_bytes(whole[:part])
        with pytest.raises(TraceError):
            load_replay(tmp_path / "cut.npz")


def test_the_command_says_one_line_and_leaves_nothing(columns: Columns, tmp_path: Path) -> None:
    path = save(tmp_path / "bad.npz", BAD["outside everything"][0](columns))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench", "--trace", str(path), "--output", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and run.stderr.startswith(f"error: {path}: column gpa, record 8")
    assert not out.exists()


def mutated_bytes(rng: np.random.Generator, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(int(rng.integers(1, 20))):
        data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
    return bytes(data)


def mutated_columns(rng: np.random.Generator, columns: Columns) -> Columns:
    """A few values of any column replaced: by random ones, by edges, by other values of the column."""
    result = dict(columns)
    for _ in range(int(rng.integers(1, 4))):
        name = str(rng.choice([name for name in columns if name != "meta"]))
        column = result[name].copy()
        flat = column.reshape(-1)
        if not len(flat):
            continue
        for _ in range(int(rng.integers(1, 5))):
            limit = int(np.iinfo(column.dtype).max)
            edges = (0, 1, limit, limit - 4095, 1 << 12, int(flat[rng.integers(0, len(flat))]))
            value = edges[rng.integers(0, len(edges))]
            if rng.random() < 0.5:
                value = int(rng.integers(0, limit, endpoint=True, dtype=np.uint64))
            flat[int(rng.integers(0, len(flat)))] = value & limit
        result[name] = column
    return result


def survives(path: Path) -> str:
    """Load and replay: a workload, or an error of ours."""
    try:
        workload = load_replay(path)
        Vm(workload, MMIO_CACHE.strategies[-1]).check()
    except TraceError:
        return "refused"
    except ReplayError:
        return "differs"
    return "fine"


def fuzz(rng: np.random.Generator, columns: Columns, folder: Path, times: int) -> dict[str, int]:
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    outcomes: dict[str, int] = {}
    for number in range(times):
        path = folder / "mutant.npz"
        if number % 4 == 0:
            path.write_bytes(mutated_bytes(rng, buffer.getvalue()))
        else:
            save(path, mutated_columns(rng, columns))
        outcome = survives(path)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def test_mutated_files_never_crash(seed: int, columns: Columns, tmp_path: Path) -> None:
    outcomes = fuzz(np.random.default_rng(seed), columns, tmp_path, sized(150, 40))
    assert outcomes["refused"] > 10


@pytest.mark.long
def test_thousands_of_mutated_files_never_crash(seed: int, columns: Columns, tmp_path: Path) -> None:
    outcomes = fuzz(np.random.default_rng(seed), columns, tmp_path, sized(2_500, 200))
    print(f"fuzz of replay files, seed {seed}: {outcomes}")
    assert set(outcomes) == {"refused", "differs", "fine"}


def test_random_table_contents_never_crash(seed: int, columns: Columns, tmp_path: Path) -> None:
    """Pages full of random words behind valid start tables: walks go anywhere, and never outside the slots."""
    rng = np.random.default_rng(seed)
    workload = load_replay(save(tmp_path / "file.npz", columns))
    for _ in range(sized(40, 5)):
        tables = {
            gfn: np.where(rng.random(512) < 0.5, words, rng.integers(0, 1 << 63, 512, dtype=np.uint64) | GPTE64.P)
            for gfn, words in workload.tables.items()
        }
        vm = Vm(type(workload)("random", workload.cpu, workload.slots, tables, workload.events), MMIO_CACHE.strategies[-1])
        vm.run()
        with pytest.raises(ReplayError):
            vm.check()
