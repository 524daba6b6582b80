"""`fastmmu trace import` of memory images: core files and raw images become snapshots that translate as the memory does."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from traces import core_file

from fastmmu import Cpu, GuestMemory, translate_many
from fastmmu.__main__ import main
from fastmmu.trace import load_snapshot

PG, PAE, PSE, LA57 = 0x80010001, 0x20, 0x10, 0x1000
LONG = 0xD00
ROOT = 0x5000


def table(entries: dict[int, int], width: int = 8) -> bytes:
    words = np.zeros(4096 // width, np.uint64 if width == 8 else np.uint32)
    for index, entry in entries.items():
        words[index] = entry
    return words.tobytes()


def long_mode(levels: int) -> tuple[dict[int, bytes], Cpu]:
    """Small tables under 4- or 5-level paging: 4 KiB, 2 MiB and 1 GiB pages, a table that points to itself, one that is nowhere."""
    pages = {
        5: table({0: 0x6003, 256: 0x9003, 510: ROOT | 3, 511: 0xABCD0003}),
        6: table({0: 0x7007, 1: 0x40000083}),
        7: table({0: 0x8007, 1: 0x400083, 2: 0x8006}),
        8: table({1: 0x1234067, 2: 1 << 63 | 0x2000065}),
        9: table({}),
        0x55: table({0: 0xFFFFF003}),  # reached by nothing
    }
    if levels == 5:
        pages[4] = table({0: ROOT | 3, 511: ROOT | 3})
    root = ROOT if levels == 4 else 0x4000
    return pages, Cpu(cr0=PG, cr3=root, cr4=PAE | (LA57 if levels == 5 else 0), efer=LONG, maxphyaddr=40)


def pae(*, nx: bool) -> tuple[dict[int, bytes], Cpu]:
    """PAE paging: four entries, not at the beginning of their page."""
    pages = {
        5: table({5: 0x6001, 7: 0x7001, 20: 0x55001}),
        6: table({0: 0x8003, 1: 0x400083}),
        7: table({511: 0x8003}),
        8: table({3: 0x1234067 | (1 << 63 if nx else 0)}),
        0x55: table({}),
    }
    return pages, Cpu(cr0=PG, cr3=ROOT | 0x20, cr4=PAE, efer=0x800 if nx else 0, maxphyaddr=40)


def two_level() -> tuple[dict[int, bytes], Cpu]:
    """2-level paging with a 4 MiB page."""
    pages = {5: table({0: 0x6007, 1: 0x800087, 1023: ROOT | 3}, 4), 6: table({5: 0x1234067, 1023: 0x77067}, 4)}
    return pages, Cpu(cr0=PG, cr3=ROOT, cr4=PSE, efer=0, maxphyaddr=40)


GUESTS = {
    "4-level": lambda: long_mode(4),
    "5-level": lambda: long_mode(5),
    "pae": lambda: pae(nx=False),
    "pae-nx": lambda: pae(nx=True),
    "2-level": two_level,
}
GVAS = [0x1000, 0x1FFF, 0x2008, 0x3000, 0x20_0000, 0x3F_FFFF, 0x40_0000, 0x4000_0000, 0x5000, 0x3FFFFF, 0x4000_3000, 0xC000_3123,
        0xFFFF_FF7F_BFDF_E000, 0xFFFF_FF00_0000_0000, 0xFFFF_8000_0000_0000, 0xFFC0_0014, 0xFFE0_0000, 0xFFFF_F000, 0xFF00_0000_0000_1000]  # fmt: skip


def memory_of(pages: dict[int, bytes]) -> GuestMemory:
    memory = GuestMemory(1 << 20)
    for frame, page in pages.items():
        memory.words[frame * 512 : frame * 512 + 512] = np.frombuffer(page, np.uint64)
    return memory


def check_snapshot(path: Path, pages: dict[int, bytes], cpu: Cpu) -> None:
    """The snapshot has the registers, no page that no walk needs, and translates as the memory itself does."""
    snapshot = load_snapshot(path)
    assert snapshot.cpu == cpu
    with np.load(path) as columns:
        assert set(columns["gfn"].tolist()) == set(pages) - {0x55}
    for access in (0, 2, 4, 6, 16):  # on fresh memory each, because a walk sets A and D
        mine, theirs = (translate_many(one, cpu, GVAS, access) for one in (load_snapshot(path).memory, memory_of(pages)))
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert access or mine.ok.any()


def run(tmp_path: Path, content: bytes, *options: str) -> Path:
    path, output = tmp_path / "image", tmp_path / "out.npz"
    path.write_bytes(content)
    assert main(["trace", "import", str(path), str(output), *options]) == 0
    return output


@pytest.mark.parametrize("name", GUESTS)
@pytest.mark.parametrize("bits", [64, 32])
def test_core_files_of_every_paging_mode(tmp_path: Path, name: str, bits: int) -> None:
    pages, cpu = GUESTS[name]()
    machine = 62 if "level" in name and name != "2-level" else 3
    content = core_file(pages, [(cpu.cr0, cpu.cr3, cpu.cr4)], bits=bits, machine=machine)
    check_snapshot(run(tmp_path, content), pages, cpu)


def test_gzip_is_undone_and_nothing_left(tmp_path: Path) -> None:
    pages, cpu = long_mode(4)
    check_snapshot(run(tmp_path, gzip.compress(core_file(pages, [(cpu.cr0, cpu.cr3, cpu.cr4)]))), pages, cpu)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["image", "out.npz"]


def test_all_cpus_and_the_overrides(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pages, cpu = long_mode(4)
    pages[0x20] = table({1: 0x6003})
    content = core_file(pages, [(cpu.cr0, ROOT, cpu.cr4), (cpu.cr0, 0x20018, cpu.cr4), (cpu.cr0, ROOT, cpu.cr4)])
    path = run(tmp_path, content)
    assert load_snapshot(path).cr3s == (ROOT, 0x20018)
    capsys.readouterr()
    assert main(["translate", str(path), "8000001000", "--cr3", "20018"]) == 0
    assert "gpa 0x1234000" in capsys.readouterr().out
    path = run(tmp_path, content, "--cr3", "20000", "--efer", "500", "--cr0", "80000001")
    snapshot = load_snapshot(path)
    assert snapshot.cr3s == (0x20000, ROOT, 0x20018)
    assert (snapshot.cpu.efer, snapshot.cpu.cr0) == (0x500, 0x80000001)


def vmcoreinfo(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<III", 11, len(data), 0) + b"VMCOREINFO\0\0" + data + bytes(-len(data) % 4)


def test_kdump_core_files_have_the_kernels_root(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pages, cpu = long_mode(4)
    prstatus = struct.pack("<III", 5, 8, 1) + b"CORE\0\0\0\0" + bytes(8)
    text = "OSRELEASE=6.1.0\nSYMBOL(swapper_pg_dir)=ffffffff81005000\nNUMBER(phys_base)=-16777216\nNUMBER(pgtable_l5_enabled)=0\n"
    with pytest.raises(AssertionError):
        run(tmp_path, core_file(pages, [], notes=prstatus))
    assert "no CPU state and no vmcoreinfo, expected --cr3" in capsys.readouterr().err
    check_snapshot(run(tmp_path, core_file(pages, [], notes=prstatus + vmcoreinfo(text))), pages, cpu)
    check_snapshot(run(tmp_path, core_file(pages, [], notes=prstatus), "--cr3", "5000"), pages, cpu)


def test_memory_told_twice_and_pages_in_two_segments(tmp_path: Path) -> None:
    """As `dump-guest-memory -p` does it: segments overlap, and begin and end anywhere."""
    pages, cpu = long_mode(4)
    content = bytearray(core_file(pages, [(cpu.cr0, cpu.cr3, cpu.cr4)]))
    whole = b"".join(pages.get(frame, bytes(4096)) for frame in range(10))
    segments = [(0x5000, 0x5800 - 0x5000), (0x5800, 0x9800 - 0x5800), (0x5000, 0x100), (0x4000, 0x1800), (0x9000, 0x1000)]
    note = core_file({}, [(cpu.cr0, cpu.cr3, cpu.cr4)])
    size = len(note) - 64 - 56
    head, count = bytearray(content[:64]), 1 + len(segments)
    struct.pack_into("<H", head, 56, count)
    offset = 64 + 56 * count
    programs = struct.pack("<IIQQQQQQ", 4, 0, offset, 0, 0, size, size, 0)
    body = note[-size:]
    for gpa, length in segments:
        programs += struct.pack("<IIQQQQQQ", 1, 0, offset + len(body), 0, gpa, length, length, 0)
        body += whole[gpa : gpa + length]
    check_snapshot(run(tmp_path, bytes(head) + programs + body), pages, cpu)


def test_program_headers_beyond_the_16_bits_of_their_number(tmp_path: Path) -> None:
    pages, cpu = long_mode(4)
    content = bytearray(core_file(pages, [(cpu.cr0, cpu.cr3, cpu.cr4)]))
    (count,) = struct.unpack_from("<H", content, 56)
    struct.pack_into("<H", content, 56, 0xFFFF)
    struct.pack_into("<Q", content, 40, len(content))
    check_snapshot(run(tmp_path, bytes(content) + struct.pack("<IIQQQQIIQQ", *[0] * 7, count, 0, 0)), pages, cpu)


@pytest.mark.parametrize("name", ["4-level", "5-level", "2-level", "pae"])
def test_raw_images(tmp_path: Path, name: str) -> None:
    pages, cpu = GUESTS[name]()
    content = b"".join(pages.get(frame, bytes(4096)) for frame in range(0x56))
    registers = ["--cr3", hex(cpu.cr3)]
    if name != "4-level":
        registers += ["--cr4", hex(cpu.cr4), "--efer", hex(cpu.efer)]
    check_snapshot(run(tmp_path, content, *registers, *(["--format", "raw"] if name == "pae" else [])), pages, cpu)


def test_the_hole_of_a_raw_image(tmp_path: Path) -> None:
    """What follows the hole's start in the file lies from its end on."""
    pages, _ = long_mode(4)
    moved = {frame if frame < 7 else frame + 0x100: page for frame, page in pages.items()}
    moved[6] = table({0: 0x107007})
    moved[0x107] = table({0: 0x108007})
    moved[5] = table({0: 0x6003})
    content = b"".join(moved.get(frame if frame < 7 else frame + 0x100, bytes(4096)) for frame in range(12))
    output = run(tmp_path, content, "--cr3", "5000", "--hole", "7000:107000")
    snapshot = load_snapshot(output)
    assert translate_many(snapshot.memory, snapshot.cpu, [0x1234]).ok.tolist() == [True]
    with np.load(output) as columns:
        assert columns["gfn"].tolist() == [5, 6, 0x107, 0x108]


def broken(at: int, value: bytes) -> bytes:
    pages, cpu = long_mode(4)
    content = bytearray(core_file(pages, [(cpu.cr0, cpu.cr3, cpu.cr4)]))
    content[at : at + len(value)] = value
    return bytes(content)


HEADERS = 7
NOTE_AT = 64 + 56 * HEADERS
MISTAKES = {
    "a program": (broken(16, b"\2"), [], "ELF header: type 2, machine 62, expected a core file (4)"),
    "another machine": (broken(18, b"\xb7"), [], "ELF header: type 4, machine 183"),
    "big endian": (broken(5, b"\2"), [], "ELF header: class 2, data encoding 2, expected"),
    "no class": (broken(4, b"\3"), [], "ELF header: class 3"),
    "header size": (broken(54, b"\x20"), [], "ELF header: program headers of 32 bytes, expected 56"),
    "no headers": (broken(56, b"\0"), [], "ELF header: 0 program headers, expected 1 to"),
    "headers beyond": (broken(32, b"\xff\xff\xff"), [], "program header 0: bytes 0xffffff to"),
    "segment beyond": (broken(64 + 56 + 32 + 5, b"\x01"), [], "program header 1: bytes"),
    "physical address": (broken(64 + 56 + 24 + 7, b"\x01"), [], "program header 1: physical address 0x1000000000"),
    "note": (broken(NOTE_AT + 4, b"\xff\xff"), [], "program header 0, note 0: ends at"),
    "short note": (broken(NOTE_AT + 4, b"\x10\0"), [], "program header 0, note 0: 16 bytes, expected a CPU state"),
    "version": (broken(NOTE_AT + 20, b"\x07"), [], "program header 0, note 0: a CPU state of version 7, expected 1"),
    "cut": (broken(0, b"")[:40], ["--format", "elf"], "ELF header: bytes 0x0 to 0x40"),
    "not elf": (b"hello", ["--format", "elf"], "ELF header: begins with b'hell', expected"),
    "empty": (b"", ["--format", "elf"], "is empty"),
    "kdump": (b"KDUMP   " + bytes(100), [], "a kdump-compressed file, expected ELF"),
    "flat": (b"makedumpfile" + bytes(100), [], "a flattened kdump file, expected ELF"),
    "root": (broken(0, b""), ["--cr3", "77000"], "cr3 0x77000: its page is not in the image, expected a page-table root"),
    "paging off": (broken(0, b""), ["--cr0", "1"], "cr0 is 0x1: paging is off"),
    "registers": (broken(0, b""), ["--cr4", "0"], "registers: cr4=0x0 efer=0xd00: expected CR4.PAE"),
    "no cr3": (bytes(8192), ["--format", "raw"], "a raw image, expected --cr3"),
    "pages of an image": (broken(0, b""), ["--pages", "2m"], "--pages is for lackey, tracepoints, csv, npz, this is elf"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_two(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    content, options, expected = MISTAKES[name]
    path = tmp_path / "image"
    path.write_bytes(content)
    assert main(["trace", "import", *options, str(path), str(tmp_path / "out.npz")]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith(f"error: {path}: {expected}"), told.err
    assert [one.name for one in tmp_path.iterdir()] == ["image"]


@pytest.mark.parametrize("hole", ["1000", "2000:1000", "1001:2000", "x:y"])
def test_holes_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture, hole: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["trace", "import", "--hole", hole, "x", "y"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "paging", "tables", "absent"),
    [("4-level", "4-level", 5, 1), ("5-level", "5-level", 6, 1), ("pae", "PAE", 4, 0), ("2-level", "2-level", 2, 0)],
)
def test_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, paging: str, tables: int, absent: int) -> None:
    pages, cpu = GUESTS[name]()
    content = core_file(pages, [(cpu.cr0, cpu.cr3, cpu.cr4)], machine=3 if name in ("pae", "2-level") else 62)
    run(tmp_path, content, "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["tables"], told["details"]["absent_table_pages"], told["details"]["paging"]) == (tables, absent, paging)
    if name == "2-level":  # without CR4.PSE the large page's entry points to a table
        run(tmp_path, content, "--json", "--cr4", "0")
        assert json.loads(capsys.readouterr().out)["details"]["absent_table_pages"] == 1


@pytest.mark.parametrize("name", ["linux-boot", "fork-exec", "kv-store-la57", "i386-pae", "i386-2level"])
def test_images_of_real_guests(shared: Path, tmp_path: Path, name: str) -> None:
    """Each snapshot as a core file, and back: every address that QEMU listed translates alike."""
    path = shared / "data" / "snapshots" / f"{name}.npz"
    with np.load(path) as columns:
        words = np.ascontiguousarray(columns["words"]).view(np.uint64).reshape(-1, 512)
        pages = {int(gfn): page.tobytes() for gfn, page in zip(columns["gfn"], words, strict=True)}
        gvas, efer = columns["tlb_gva"].astype(np.uint64)[::50], int(columns["efer"])
        registers = tuple(int(columns[one].reshape(-1)[0]) for one in ("cr0", "cr3", "cr4"))
    output = run(tmp_path, core_file(pages, [registers], machine=62 if efer & 0x400 else 3))  # type: ignore[list-item]
    mine, theirs = load_snapshot(output), load_snapshot(path)
    answers = [translate_many(one.memory, one.cpu, gvas) for one in (mine, theirs)]
    assert answers[0].ok.any() and all(np.array_equal(a, b) for a, b in zip(*answers, strict=True))
