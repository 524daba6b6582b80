"""The decorator: bounds-checked builds, the cache directory, atomics."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmmu import _jit
from fastmmu._jit import JIT, cmpxchg, exchange, fetch_and, fetch_or, fetch_sub, kernel, load, prefetch

compiled_only = pytest.mark.skipif(not JIT, reason="needs compiled code")
PACKAGE = Path(_jit.__file__).parent

BEYOND = """
import numpy as np
from fastmmu.mmio import covers
print(covers(np.zeros(0, np.uint64), np.uint64(1 << 20)))
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=PACKAGE.parent, capture_output=True, text=True, check=False, timeout=120
    )


def digest_with(**environment: str) -> str:
    result = python("from fastmmu import _jit; print(_jit.source_digest())", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@compiled_only
def test_bounds_checked_build_is_not_the_plain_one(tmp_path: Path) -> None:
    plain = python(BEYOND, XDG_CACHE_HOME=str(tmp_path))
    assert plain.returncode == 0, plain.stderr  # reads past the end, unseen: that is why everything is validated first
    checked = python(BEYOND, XDG_CACHE_HOME=str(tmp_path), NUMBA_BOUNDSCHECK="1")
    assert checked.returncode != 0
    assert "IndexError" in checked.stderr
    assert python(BEYOND, XDG_CACHE_HOME=str(tmp_path)).returncode == 0  # the checked build did not poison the plain one
    assert len(list((tmp_path / "fastmmu").iterdir())) == 2


@pytest.mark.parametrize("setting", ["NUMBA_BOUNDSCHECK=1", "NUMBA_OPT=1", "NUMBA_CPU_NAME=generic", "NUMBA_LOOP_VECTORIZE=0"])
def test_settings_that_change_code_change_the_digest(setting: str) -> None:
    name, value = setting.split("=")
    assert digest_with() != digest_with(**{name: value})


def test_settings_that_change_no_code_keep_the_digest() -> None:
    assert digest_with() == digest_with(NUMBA_NUM_THREADS="1", NUMBA_WARNINGS="1")


def test_digest_follows_the_sources(tmp_path: Path) -> None:
    copy = tmp_path / "fastmmu"
    copy.mkdir()
    for source in PACKAGE.glob("*.py"):
        (copy / source.name).write_bytes(source.read_bytes())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from fastmmu import _jit; print(_jit.source_digest())"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    digests = []
    for line in ("", "# one more line\n"):
        with (copy / "bits.py").open("a") as file:
            file.write(line)
        (copy / "__init__.py").write_text("")
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        digests.append(run.stdout)
    assert digests[0] != digests[1]


def test_old_digests_are_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for age in range(10):
        old = tmp_path / "fastmmu" / f"old{age}"
        old.mkdir(parents=True)
        os.utime(old, (1000 - age, 1000 - age))
    kept = _jit.cache_directory()
    assert kept is not None
    names = {path.name for path in (tmp_path / "fastmmu").iterdir()}
    assert names == {kept.name, *(f"old{age}" for age in range(_jit.KEPT_DIGESTS - 1))}


def test_cache_falls_back_where_home_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = _jit.cache_directory()
    assert path is not None and path.parent.parent == tmp_path
    monkeypatch.setattr("tempfile.tempdir", str(blocked))
    assert _jit.cache_directory() is None


@compiled_only
def test_users_own_cache_setting_is_untouched() -> None:
    from numba import config

    before = config.CACHE_DIR

    @kernel
    def nothing():
        return 0

    assert before == config.CACHE_DIR
    assert nothing() == 0


@pytest.mark.parametrize("dtype", [np.uint64, np.uint32])
def test_atomics_return_what_they_saw(dtype: type) -> None:
    @kernel
    def use(array, five, six):
        prefetch(array, 0)
        seen = cmpxchg(array, 0, five, six)
        refused = cmpxchg(array, 0, five, five)
        bits = fetch_or(array, 1, five)
        kept = fetch_and(array, 2, six)
        old = exchange(array, 3, six)
        return seen, refused, bits, kept, old, load(array, 0)

    array = np.array([5, 8, 7, 9], dtype)
    assert tuple(int(x) for x in use(array, dtype(5), dtype(6))) == (5, 6, 8, 7, 9, 6)
    assert array.tolist() == [6, 13, 6, 6]


@kernel
def _count_up(array, times):
    one = np.uint64(1)
    for _ in range(times):
        while True:
            old = load(array, 0)
            if cmpxchg(array, 0, old, old + one) == old:
                break


@kernel
def _count_down(array, times):
    one = np.uint64(1)
    for _ in range(times):
        fetch_sub(array, 0, one)


@pytest.mark.parametrize("count", [_count_up, _count_down])
def test_atomics_are_atomic_between_threads(count: Callable[[np.ndarray, int], None]) -> None:
    times = 300_000 if JIT else 20_000
    array, interval = np.full(1, 2 * times, np.uint64), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=count, args=(array, times)) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert array[0] == (0 if count is _count_down else 4 * times)
