"""The C loop, compiled by the system's gcc when it is first needed."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastmmu._jit import CACHE_DIRECTORY

SOURCE = Path(__file__).parent / "walk.c"
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("gcc") is not None


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled loops, kept beside the compiled kernels."""
    folder = CACHE_DIRECTORY or Path(tempfile.mkdtemp(prefix="fastmmu-c-"))
    target = folder / f"walk-{hashlib.blake2b(SOURCE.read_bytes(), digest_size=6).hexdigest()}.so"
    if not target.exists():
        beside = target.with_suffix(f".{hash(target)}.tmp")
        subprocess.run(["gcc", *FLAGS, str(SOURCE), "-o", str(beside)], check=True, capture_output=True)
        beside.replace(target)
    return ctypes.CDLL(str(target))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """Address of an array's data."""
    return ctypes.c_void_p(array.ctypes.data)


def walk_all(words: np.ndarray, size: int, cr3: int, reserved: int, access: int, gvas: np.ndarray, gpas: np.ndarray) -> None:
    """Walk all `gvas` (uint64) into `gpas`."""
    numbers = (ctypes.c_uint64(value) for value in (size, cr3, reserved, access))
    library().walk_all(pointer(words), *numbers, pointer(gvas), ctypes.c_size_t(len(gvas)), pointer(gpas))


def walk_nested(
    words: np.ndarray, size: int, cr3: int, eptp: int, reserved: int, access: int, gvas: np.ndarray, hpas: np.ndarray
) -> None:
    """Walk all `gvas` (uint64) in two dimensions into `hpas`."""
    numbers = (ctypes.c_uint64(value) for value in (size, cr3, eptp, reserved, access))
    library().walk_nested(pointer(words), *numbers, pointer(gvas), ctypes.c_size_t(len(gvas)), pointer(hpas))


def read_all(words: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
    """Read words[index] (uint64) into `values`."""
    library().read_all(pointer(words), pointer(index), ctypes.c_size_t(len(index)), pointer(values))
