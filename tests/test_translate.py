"""The public translation API: against the reference, against QEMU's own answers, and against nonsense."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from machines import ACCESSES, PAGES, random_gva, random_machine
from sizes import sized

import fastmmu
from fastmmu.__main__ import main
from fastmmu.paging import Mode
from fastmmu.reference.walk import Walker
from fastmmu.trace import TraceError, load_snapshot

LONG = {"cr0": 0x8001_0001, "cr3": 0x1000, "cr4": 0x20, "efer": 0xD00}
MODES = [Mode.TWO_LEVEL, Mode.PAE, Mode.LONG4, Mode.LONG5]
SNAPSHOTS = ("linux-boot", "fork-exec", "kv-store-la57", "i386-pae", "i386-2level")


def columns(many: fastmmu.Translations) -> list[tuple]:
    """Rows of ints; rights count only where the translation succeeded."""
    rows = zip(*(column.tolist() for column in many), strict=True)
    return [(ok, gpa, level, access if ok else 0, pferr) for ok, gpa, level, access, pferr in rows]


@pytest.mark.parametrize("mode", MODES, ids=[mode.name for mode in MODES])
@pytest.mark.parametrize("one_access", [True, False], ids=["one access", "an access each"])
def test_translate_many_is_the_reference(seed: int, mode: Mode, one_access: bool) -> None:
    """Whole blocks and a rest; plain walks beside odd ones; memory compared at the end."""
    rng = np.random.default_rng([seed, mode, one_access])
    for _ in range(sized(12, 2)):
        machine = random_machine(rng, mode)
        walker = Walker(machine.reference, machine.cpu)
        length = sized(1500, 300)
        gvas = np.array([random_gva(rng, mode) for _ in range(length)], np.uint64)
        for _ in range(sized(6, 1)):
            access = int(rng.choice(ACCESSES)) if one_access else rng.choice(np.array(ACCESSES, np.uint64), length)
            ours = columns(fastmmu.translate_many(machine.memory, machine.cpu, gvas, access))
            accesses = [access] * length if one_access else access.tolist()
            for gva, kind, row in zip(gvas.tolist(), accesses, ours, strict=True):
                found = walker.walk(machine.cpu.cr3, gva, kind)
                expected = (found.ok, found.gpa, found.level, found.access, found.pferr)
                assert row == expected, fastmmu.explain(machine.memory, machine.cpu, gva, kind)
            assert not machine.differences(), machine.cpu


@pytest.mark.parametrize("mode", MODES, ids=[mode.name for mode in MODES])
def test_explain_says_what_translate_does_and_changes_nothing(seed: int, mode: Mode) -> None:
    rng = np.random.default_rng([seed, mode])
    for _ in range(sized(10, 3)):
        machine = random_machine(rng, mode)
        for _ in range(100):
            gva, access = random_gva(rng, mode), int(rng.choice(ACCESSES))
            before = machine.memory.words.copy()
            text = fastmmu.explain(machine.memory, machine.cpu, gva, access)
            assert np.array_equal(before, machine.memory.words)
            answer = fastmmu.translate(machine.memory, machine.cpu, gva, access)
            last = text.splitlines()[-1]
            if answer.ok:
                assert last.startswith(f"=> gpa {answer.gpa:#x}, "), text
            else:
                assert last.startswith(f"=> page fault, error code {answer.pferr:#x} ("), text


def test_a_denial_names_the_deciding_bit() -> None:
    ram = fastmmu.GuestMemory(1 << 20)
    cpu = fastmmu.Cpu(**{**LONG, "cr4": 0x40_0020}, pkru=0b1000)
    for gpa, entry in ((0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0x4065), (0x4000, 0x5067), (0x4008, 0x0800_0000_0000_5067)):
        ram.words[gpa >> 3] = entry
    said = {
        (0, fastmmu.WRITE): "PDE does not grant writing (W), and CR0.WP is set",
        (0, fastmmu.WRITE | fastmmu.USER): "PDE does not grant writing (W)",
        (0x2000, 0): "PTE is not present (P)",
        (0x1000, fastmmu.WRITE): "PDE does not grant writing (W), and CR0.WP is set; protection key 1: PKRU disables writes (WD)",
    }
    for (gva, access), why in said.items():
        assert fastmmu.explain(ram, cpu, gva, access).endswith(f": {why}")
    ram.words[0x2000 >> 3] |= 1 << 51
    assert "PDPTE sets reserved bits: 51" in fastmmu.explain(ram, cpu, 0)
    ram.words[0x1000 >> 3] = 0x40_0000 | 0x67
    assert "lies outside every memory slot" in fastmmu.explain(ram, cpu, 0)
    assert "general protection" in fastmmu.explain(ram, cpu, 1 << 47)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_qemus_own_translations(shared: Path, name: str) -> None:
    """`info tlb` as reads, with USER where the leaf has U (these guests run with SMAP on); `info mem` also as writes."""
    path = shared / "data" / "snapshots" / f"{name}.npz"
    snapshot = load_snapshot(path)
    with np.load(path) as rows:
        stride = sized(1, 20)
        gvas, gpas, flags = (rows[column][::stride] for column in ("tlb_gva", "tlb_gpa", "tlb_flags"))
        ranges = zip(*(rows[column].tolist() for column in ("mem_start", "mem_end", "mem_prot")), strict=True)
    user = np.where(flags & 4, np.uint64(fastmmu.USER), np.uint64(0))
    answers = fastmmu.translate_many(snapshot.memory, snapshot.cpu, gvas.astype(np.uint64), user)
    assert answers.ok.all()
    assert np.array_equal(answers.gpa, gpas)
    for start, end, prot in list(ranges)[::stride]:
        pages = np.arange(start >> 12, end - 1 + 4096 >> 12, sized(1, 50), dtype=np.uint64) << np.uint64(12)
        who = fastmmu.USER if prot & 1 else 0
        assert fastmmu.translate_many(snapshot.memory, snapshot.cpu, pages, who).ok.all()
        writes = fastmmu.translate_many(snapshot.memory, snapshot.cpu, pages, who | fastmmu.WRITE)
        assert (writes.ok == bool(prot & 2)).all()
        if not prot & 2:
            assert (writes.pferr == (fastmmu.WRITE | who | 1)).all()


def test_paging_off() -> None:
    cpu = fastmmu.Cpu(**{**LONG, "cr0": 0x11})
    assert fastmmu.translate(fastmmu.GuestMemory(4096), cpu, 0x12345678, fastmmu.WRITE) == (True, 0x12345678, 0, 7, 0)


@pytest.mark.parametrize(("cr4", "width", "sign_extends"), [(0x20, 48, True), (0x1020, 57, True)])
def test_non_canonical_addresses_are_no_page_faults(cr4: int, width: int, sign_extends: bool) -> None:
    ram, cpu = fastmmu.GuestMemory(1 << 16), fastmmu.Cpu(**{**LONG, "cr4": cr4})
    half = 1 << (width - 1)
    good, bad = [0, half - 1, (1 << 64) - half, (1 << 64) - 1], [half, (1 << 64) - half - 1, 1 << 63]
    many = fastmmu.translate_many(ram, cpu, good * 100 + bad * 100, fastmmu.WRITE)
    assert not many.ok.any()
    assert (many.level[:400] > 0).all() and (many.pferr[:400] == fastmmu.WRITE).all()
    assert (many.level[400:] == 0).all() and (many.pferr[400:] == 0).all() and (many.gpa == 0).all()
    for table in range(0x1000, 0x1000 * (5 if cr4 == 0x20 else 6), 0x1000):  # now address 0 is mapped, by a plain walk
        ram.words[table >> 3] = table + 0x1000 | 0x67
    alias = 1 << width  # differs from address 0 in ignored bits only
    assert fastmmu.translate(ram, cpu, 0).ok and fastmmu.translate(ram, cpu, alias) == (False, 0, 0, 0, 0)
    assert fastmmu.translate_many(ram, cpu, [0, alias] * 300).ok.tolist() == [True, False] * 300


def test_addresses_wider_than_32_bits_outside_long_mode() -> None:
    ram = fastmmu.GuestMemory(1 << 16)
    for cr4 in (0, 0x20):
        cpu = fastmmu.Cpu(**{**LONG, "cr4": cr4, "efer": 0})
        assert fastmmu.translate(ram, cpu, 1 << 32) == (False, 0, 0, 0, 0)


def test_pdptes_are_loaded_with_cr3() -> None:
    """Facts 1.7: the load fails on reserved bits of a present PDPTE; absent ones hold anything; a walk tests only presence."""
    ram, cpu = fastmmu.GuestMemory(1 << 16), fastmmu.Cpu(**{**LONG, "cr3": 0x1020, "efer": 0}, maxphyaddr=40)
    ram.words[0x1020 >> 3 : 0x1040 >> 3] = [0x2001, 0xFFFF_FFFF_FFFF_FFFE, 0x3001, 0]
    ram.words[0x2000 >> 3] = 0xE7 | 1 << 21
    assert fastmmu.translate(ram, cpu, 0x1234, fastmmu.USER)[:3] == (True, 0x20_1234, 2)
    assert fastmmu.translate(ram, cpu, 0x4000_0000, fastmmu.WRITE) == (False, 0, 3, 0, fastmmu.WRITE)
    for bad in (1, 2, 6, 7, 8, 40, 51, 52, 62, 63):
        ram.words[0x1030 >> 3] = 0x3001 | 1 << bad
        with pytest.raises(fastmmu.GeneralProtection, match="PDPTE 2, .*reserved"):
            fastmmu.translate(ram, cpu, 0)
        assert "=> general protection (#GP): CR3" in fastmmu.explain(ram, cpu, 0)
    outside = fastmmu.Cpu(**{**LONG, "cr3": 0x10_0000, "efer": 0})
    assert fastmmu.translate(ram, outside, 0, fastmmu.USER) == (False, 0, 3, 0, fastmmu.USER)


def test_pse36_and_the_ignored_bit_7() -> None:
    ram = fastmmu.GuestMemory(1 << 16)
    ram.words[0x1000 >> 3] = (0x40_0000 | 0xE7 | 0b1011 << 13) << 32 | 0x2067 | 0x80
    pse, plain = (fastmmu.Cpu(**{**LONG, "cr4": cr4, "efer": 0}) for cr4 in (0x10, 0))
    assert fastmmu.translate(ram, pse, 0x40_0123)[:3] == (True, 0xB_0040_0123, 2)
    ram.words[0x2000 >> 3] = 0x5067
    assert fastmmu.translate(ram, plain, 0x123)[:3] == (True, 0x5123, 1)
    ram.words[0x1000 >> 3] |= 1 << (32 + 17)
    assert fastmmu.translate(ram, pse, 0x40_0123).pferr == 9


def test_half_words_are_exchanged_alone() -> None:
    """4-byte entries: A of one does not touch its neighbour in the same word."""
    ram = fastmmu.GuestMemory(1 << 16)
    cpu = fastmmu.Cpu(**{**LONG, "cr4": 0, "efer": 0})
    ram.words[0x1000 >> 3] = 0x3007 << 32 | 0x2007
    ram.words[0x3000 >> 3] = 0x5007 << 32
    assert fastmmu.translate(ram, cpu, 0x40_1000, fastmmu.WRITE).gpa == 0x5000
    assert int(ram.words[0x1000 >> 3]) == 0x3027 << 32 | 0x2007
    assert int(ram.words[0x3000 >> 3]) == 0x5067 << 32


@pytest.mark.parametrize("bad", [1.5, -1, 1 << 64, "x", None, True, [1], np.timedelta64(5, "s"), np.float64(1), np.bool_(True)])
def test_bad_addresses(bad: object) -> None:
    ram, cpu = fastmmu.GuestMemory(4096), fastmmu.Cpu(**LONG)
    for function in (fastmmu.translate, fastmmu.explain):
        with pytest.raises(ValueError, match="gva"):
            function(ram, cpu, bad)
    with pytest.raises(ValueError, match="gva"):
        fastmmu.translate_many(ram, cpu, [bad])


@pytest.mark.parametrize("bad", [1, 8, 32, -2, 1 << 49, "w", None, 2.0, True])
def test_bad_accesses(bad: object) -> None:
    ram, cpu = fastmmu.GuestMemory(4096), fastmmu.Cpu(**LONG)
    for call in (fastmmu.translate, fastmmu.explain):
        with pytest.raises(ValueError, match="access"):
            call(ram, cpu, 0, bad)
    for given in (bad, [bad]):
        with pytest.raises(ValueError, match="access"):
            fastmmu.translate_many(ram, cpu, [0], given)


@pytest.mark.parametrize(
    ("gvas", "access"),
    [(np.zeros(2), 0), (np.zeros((2, 2), np.uint64), 0), (5, 0), (np.array([-1]), 0), ([1, 2], [0]), ([1], [0, 0]), (None, 0)],
)
def test_bad_columns(gvas: object, access: object) -> None:
    with pytest.raises(ValueError):
        fastmmu.translate_many(fastmmu.GuestMemory(4096), fastmmu.Cpu(**LONG), gvas, access)


def test_columns_of_any_integer_dtype_and_none_at_all() -> None:
    ram, cpu = fastmmu.GuestMemory(1 << 16), fastmmu.Cpu(**LONG)
    for gvas in ([0, 1 << 63, 5], np.array([0, 9], np.int32), np.arange(6, dtype=np.uint64)[::2], (1, 2), range(3)):
        many = fastmmu.translate_many(ram, cpu, gvas, [0] * len(gvas))
        assert [column.dtype for column in many] == [np.bool_, np.uint64, np.uint8, np.uint8, np.uint32]
        assert all(len(column) == len(gvas) for column in many)
    assert all(len(column) == 0 for column in fastmmu.translate_many(ram, cpu, []))
    for bad in ((cpu, ram), (None, cpu), (ram, None)):
        with pytest.raises(ValueError, match="expected a GuestMemory and a Cpu"):
            fastmmu.translate(*bad, 0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_numpy_integers_are_integers(dtype: type) -> None:
    """In every register and feature, in every mode; the answer is that of plain ints."""
    ram = fastmmu.GuestMemory(np.int64(1 << 16))
    ram.words[0x1000 >> 3] = 1 << 45 | 0x2067
    for efer, cr4 in ((0xD00, 0x20), (0, 0x20), (0, 0)):
        for width in (36, 45, 52):
            registers = {**LONG, "efer": efer, "cr4": cr4}
            cpu = fastmmu.Cpu(
                **{name: np.uint64(value) for name, value in registers.items()}, maxphyaddr=dtype(width), amd=dtype(1)
            )
            assert cpu == fastmmu.Cpu(**registers, maxphyaddr=width, amd=True) and type(cpu.maxphyaddr) is int
            outcomes = []
            for one in (cpu, fastmmu.Cpu(**registers, maxphyaddr=width, amd=True)):
                try:
                    outcomes.append(
                        (fastmmu.translate(ram, one, dtype(0), dtype(2)), fastmmu.explain(ram, one, dtype(0), dtype(2)))
                    )
                except fastmmu.GeneralProtection as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1]
    assert fastmmu.translate_many(ram, cpu, np.zeros(3, dtype), np.array(2, dtype)).pferr.tolist() == [2, 2, 2]


@pytest.mark.parametrize("field", ["amd", "page_1g"])
@pytest.mark.parametrize("bad", ["no", 2, None, [], np.zeros(2)])
def test_bad_features(field: str, bad: object) -> None:
    with pytest.raises(ValueError, match=field):
        fastmmu.Cpu(**LONG, **{field: bad})


def test_words_cannot_be_replaced() -> None:
    ram = fastmmu.GuestMemory(4096)
    with pytest.raises(ValueError, match="write into it"):
        ram.words = np.zeros(512, np.uint64)
    ram.words |= np.uint64(5)
    assert int(ram.words[7]) == 5


def test_cpu_is_immutable_and_keyword_only() -> None:
    cpu = fastmmu.Cpu(**LONG)
    with pytest.raises(AttributeError):
        cpu.cr3 = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        fastmmu.Cpu(0, 0, 0, 0)  # type: ignore[misc]


def test_threads_translate_on_the_same_memory(seed: int) -> None:
    """Two threads over one machine come to what one comes to, and leave the same tables."""
    rng = np.random.default_rng(seed)
    machine, alone = random_machine(rng, Mode.LONG4), fastmmu.GuestMemory(PAGES << 12)
    alone.words[:] = machine.memory.words
    alone.slots = machine.memory.slots
    gvas = np.array([random_gva(rng, Mode.LONG4) for _ in range(sized(4000, 200))], np.uint64)
    results: dict[int, list[fastmmu.Translations]] = {0: [], 1: []}

    def work(number: int) -> None:
        for _ in range(sized(20, 2)):
            results[number].append(fastmmu.translate_many(machine.memory, machine.cpu, gvas, fastmmu.WRITE))

    threads = [threading.Thread(target=work, args=(number,)) for number in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = columns(fastmmu.translate_many(alone, machine.cpu, gvas, fastmmu.WRITE))
    assert all(columns(many) == expected for many in results[0] + results[1])
    assert np.array_equal(machine.memory.words, alone.words)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "fastmmu", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def small_snapshot(path: Path, **changes: object) -> Path:
    words = np.zeros((4, 512), np.uint64)
    for row, target in enumerate((0x2067, 0x3067, 0x4067, 0x5025)):
        words[row, 0] = target
    columns = {"gfn": np.arange(1, 5, dtype=np.uint64), "words": words, "level": np.array([4, 3, 2, 1], np.uint8)}
    registers = {
        "cr3": np.array([0x1000], np.uint64),
        "cr0": np.uint64(0x8001_0001),
        "cr4": np.uint64(0x20),
        "efer": np.uint64(0xD01),
    }
    np.savez(path, **{name: value for name, value in {**columns, **registers, **changes}.items() if value is not None})
    return path


def test_the_translate_command(tmp_path: Path) -> None:
    path = small_snapshot(tmp_path / "s.npz")
    read = command("translate", path, "0x123", "--user")
    assert (read.returncode, read.stdout) == (
        0,
        "0x123: gpa 0x5123, in a 4 KiB page; entries grant read, fetch; user and supervisor\n",
    )
    write = command("translate", path, "123", "1000", "--write")
    assert write.returncode == 1 and "CR0.WP is set" in write.stdout and "not present" in write.stdout
    assert command("translate", path, "123", "--explain", "--fetch").stdout.count("\n") == 6
    assert command("translate", path, "123", "--cr3", "2000").returncode == 1


def test_the_translate_command_on_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = small_snapshot(tmp_path / "good.npz")
    cases = [
        (("translate", tmp_path / "none.npz", "0"), "No such file"),
        (("translate", good, "zz"), "is no address"),
        (("translate", good, "1" * 17), "is no address"),
        (("translate", good), "GVA"),
        (("translate", good, "0", "--cr3", "ff0000000"), "is no page of the snapshot"),
        *((("translate", good, text), f"{text!r} is no address") for text in ("1_0", "+401000", " 401000", "401000 ", "0x", "٤")),
        (("translate", good, "0", "--cr3", "1_000"), "argument --cr3: '1_000' is no address"),
        *(
            (("translate", good, "0", "--maxphyaddr", text), f"argument --maxphyaddr: {text!r}, expected a number of bits from 36 to")
            for text in ("99", "35", "x", "4_0")
        ),
        (("walk", good), "invalid choice"),
        (("translate", small_snapshot(tmp_path / "a.npz", gfn=np.zeros(4)), "0"), "column gfn"),
        (("translate", small_snapshot(tmp_path / "b.npz", gfn=np.full(4, 1 << 60, np.uint64)), "0"), "column gfn, record 0"),
        (("translate", small_snapshot(tmp_path / "c.npz", words=np.zeros((3, 512), np.uint64)), "0"), "column words"),
        (("translate", small_snapshot(tmp_path / "d.npz", cr0=None), "0"), "column cr0 is missing"),
        (("translate", small_snapshot(tmp_path / "e.npz", cr4=np.zeros(2, np.uint64)), "0"), "column cr4"),
        (("translate", small_snapshot(tmp_path / "f.npz", cr4=np.uint64(0)), "0"), "registers: cr4"),
        (
            ("translate", small_snapshot(tmp_path / "g.npz", gfn=np.array([1, 2, 3, 1], np.uint64)), "0"),
            "column gfn, record 3: 0x1, expected each",
        ),
        (
            ("translate", small_snapshot(tmp_path / "h.npz", gfn=np.array([1, 2, 3, 1 << 39], np.uint64)), "0"),
            "h.npz: column gfn: cannot reserve",
        ),
        (("translate", small_snapshot(tmp_path / "i.npz", efer=np.uint64(0)), "0"), "i.npz: CR3 0x1000 cannot be loaded"),
        (("translate", good, "0", "--cr3", "5000"), "is no page of the snapshot"),
    ]
    for arguments, expected in cases:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code
        told = capsys.readouterr()
        assert (status, told.out) == (2, ""), arguments
        assert expected in told.err and told.err.count("\n") == 1 and told.err.startswith("error: "), told.err
    with pytest.raises(TraceError):
        load_snapshot(tmp_path / "none.npz")
