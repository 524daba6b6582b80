"""House rules, as programs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "fastmmu"
SOURCES = sorted(PACKAGE.rglob("*.py"))
REFERENCE = ("walk", "tables", "processor", "mmu", "guest_tables", "shadow_pages", "shadow", "split", "kvm", "ept", "nested")
ALL_SOURCES = SOURCES + sorted((ROOT / "bench").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_one_module_imports_numba() -> None:
    assert [path.name for path in SOURCES if any(name.split(".")[0] == "numba" for name in imports(path))] == ["_jit.py"]


def test_the_reference_shares_only_layouts() -> None:
    allowed = {"fastmmu.bits", "fastmmu.paging", *(f"fastmmu.reference.{name}" for name in REFERENCE)}
    for path in (PACKAGE / "reference").glob("*.py"):
        ours = {name for name in imports(path) if name.split(".")[0] == "fastmmu"}
        assert ours <= allowed, path
        assert not {"numpy"} & imports(path), path


def test_nothing_but_tests_and_bench_needs_the_reference() -> None:
    users = [path for path in SOURCES if "reference" not in path.parts and any("reference" in name for name in imports(path))]
    assert not users


def test_the_package_does_not_import_bench() -> None:
    assert not [path for path in SOURCES if any(name.split(".")[0] == "bench" for name in imports(path))]


def test_masks_are_declared_in_one_place() -> None:
    """Kernels name bits; shifts of one and page masks by hand stand in `bits` and `paging` (and in the reference, on purpose)."""
    allowed = {"bits.py", "paging.py"}
    kernels = [
        p for p in SOURCES if p.name not in allowed and "reference" not in p.parts and re.search("@(kernel|inner)", p.read_text())
    ]
    for path in kernels:
        assert not re.search(r"\b1 << |0x[0-9a-fA-F]*f000\b|& 511\b|0xFFF\b", path.read_text()), path


def test_modules_stay_short() -> None:
    assert not {path.name: n for path in ALL_SOURCES if (n := len(path.read_text().splitlines())) > 450}


def test_no_unfinished_marks() -> None:
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error")))
    assert not [path for path in ALL_SOURCES if marks.search(path.read_text())]


def test_ruff_is_clean() -> None:
    result = subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
