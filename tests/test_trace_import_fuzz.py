"""`fastmmu trace import` of damaged input in every format: one line or a good file, never anything else."""

from __future__ import annotations

import gzip
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from sizes import sized
from test_trace_import import LACKEY, NPT, SHADOW, bare_columns, save
from test_trace_import_images import GUESTS
from traces import core_file

from fastmmu import GeneralProtection, Vm, load_replay, translate_many
from fastmmu.__main__ import main
from fastmmu.strategy import MMIO_CACHE
from fastmmu.trace import load_snapshot

CSV = "gva,kind,size,gpa,io,count\n" + "".join(
    f"{hex(0x1000 * i + 8)},{'rwx012'[i]},8,{hex(0x9000 * i + 8)},{i % 2},{i + 1}\n" for i in range(6)
)
EDGES = [b"0", b"-1", b"ffffffffffffffff", b"7fffffffffff", b"1" * 40, b",", b"\n", b"\r\n", b" ", b"\t", b"\0", b"\xff\xfe", b"#", b"=",
         b"0x", b"x", b"nan", b"1e9", b"\"", b"kvm_mmio: ", b"kvm_page_fault: ", b"I  ", b" L ", b"==1== "]  # fmt: skip


def seeds() -> dict[str, tuple[list[bytes], list[str]]]:
    """Good inputs of each format, and the options that they need."""
    cores, raws = [], []
    for name, make in GUESTS.items():
        pages, cpu = make()
        for bits in (64, 32):
            machine = 62 if name in ("4-level", "5-level") else 3
            cores.append(core_file(pages, [(cpu.cr0, cpu.cr3, cpu.cr4)], bits=bits, machine=machine))
        raws.append(b"".join(pages.get(frame, bytes(4096)) for frame in range(10)))
    imported = bare_columns()
    return {
        "lackey": ([LACKEY.encode(), gzip.compress(LACKEY.encode())], []),
        "tracepoints": (["\n".join(lines).encode() + b"\n" for lines in (NPT, SHADOW)] + [PERF], []),
        "csv": ([CSV.encode()], []),
        "npz": ([save(Path(), imported), save(Path(), {name: imported[name] for name in list(imported)[:8]})], []),
        "elf": (cores, []),
        "raw": (raws, ["--cr3", "5000"]),
    }


PERF = "".join(f" CPU 0/KVM  47 [001] 961.0{n:05d}: kvm:{line}\n" for n, line in enumerate(NPT)).encode()
FORMATS = ["lackey", "tracepoints", "csv", "npz", "elf", "raw"]


def mutated(rng: random.Random, data: bytes, *, binary: bool) -> bytes:
    """A few bytes changed, cut, doubled, or replaced by what is at the edge of something; words, where the format is binary."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) or 1) if not binary or rng.random() < 0.5 else rng.randrange(min(len(out) or 1, 800))
        how = rng.randrange(6)
        if how == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            del out[at : at + rng.choice((1, 3, 50, 5000))]
        elif how == 2:
            out[at:at] = out[at : at + rng.choice((1, 20, 100))]
        elif how == 3:
            out[at : at + rng.randrange(4)] = rng.choice(EDGES)
        elif how == 4 and binary:
            word = rng.choice((0, 1, 1 << 31, 1 << 40, 1 << 46, (1 << 63) | 1, (1 << 64) - 1, len(out), 0x1000, 4095))
            out[at & ~7 : (at & ~7) + 8] = word.to_bytes(8, "little")
        elif how == 5 and rng.random() < 0.2:
            del out[at:]
    return bytes(out)


def survives(content: bytes, options: list[str], folder: Path, capsys: pytest.CaptureFixture) -> str:
    """Import it. What is refused is refused in one line, and leaves nothing; what is not can be used."""
    path, output = folder / "in", folder / "out.npz"
    path.write_bytes(content)
    status = main(["trace", "import", *options, str(path), str(output)])
    told = capsys.readouterr()
    if status:
        assert status == 2
        assert told.out == "" and told.err.count("\n") == 1 and told.err.startswith(f"error: {path}:"), told.err
        assert [one.name for one in folder.iterdir()] == ["in"]
        return "refused"
    if "--cr3" in options or "elf" in options:
        snapshot = load_snapshot(output)
        with suppress(GeneralProtection):  # PDPTEs with reserved bits: what `fastmmu translate` says in one line
            translate_many(snapshot.memory, snapshot.cpu, [0, 0x1000, 0x4000_0000, 0xFFFF_FFFF])
    else:
        Vm(load_replay(output), MMIO_CACHE.strategies[-1]).check()
    output.unlink()
    return "fine"


def fuzz(kind: str, seed: int, times: int, folder: Path, capsys: pytest.CaptureFixture) -> dict[str, int]:
    """So many mutants; the format is sometimes told and sometimes guessed."""
    rng = random.Random(seed ^ FORMATS.index(kind))
    contents, needed = seeds()[kind]
    outcomes: dict[str, int] = {"refused": 0, "fine": 0}
    for _ in range(times):
        content = mutated(rng, rng.choice(contents), binary=kind in ("npz", "elf", "raw"))
        options = [*needed, *(["--format", kind] if needed or kind == "elf" or rng.random() < 0.7 else [])]
        if kind in ("lackey", "tracepoints", "csv") and "--format" in options:
            options += rng.choice(([], ["--merge", "tlb"], ["--merge", "none"], ["--pages", "2m", "--max-ptes-none", "511"]))
        try:
            outcomes[survives(content, options, folder, capsys)] += 1
        except BaseException:
            print(f"{kind}, seed {seed}: {content!r} {options}")
            raise
    return outcomes


@pytest.mark.parametrize("kind", FORMATS)
def test_mutants_are_refused_or_good(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture, kind: str) -> None:
    outcomes = fuzz(kind, seed, sized(150, 40), tmp_path, capsys)
    assert outcomes["fine"]
    assert outcomes["refused"] or kind == "raw"  # nearly any bytes are memory


@pytest.mark.long
@pytest.mark.parametrize("kind", FORMATS)
def test_thousands_of_mutants_are_refused_or_good(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture, kind: str) -> None:
    outcomes = fuzz(kind, seed, sized(5_000, 300), tmp_path, capsys)
    assert min(outcomes.values()) > 10


def test_columns_of_other_values(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture) -> None:
    """Records without tables whose values are at the edges of their types."""
    rng = np.random.default_rng(seed)
    outcomes = set()
    for _ in range(sized(100, 30)):
        columns = {name: column.copy() for name, column in bare_columns().items()}
        for name in rng.choice(list(columns), 2):
            top = int(np.iinfo(columns[name].dtype).max)
            columns[name][rng.integers(0, len(columns[name]))] = rng.choice(
                np.array([0, 1, 3, 4096, top, top - 7, 1 << 40 & top], np.uint64)
            )
        outcomes.add(survives(save(tmp_path, columns), [], tmp_path, capsys))
    assert outcomes == {"fine", "refused"}
