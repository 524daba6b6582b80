"""Columns too long for memory: appended to files without names, read back in pieces, streamed into an `.npz`."""

from __future__ import annotations

import itertools
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from fastmmu.trace.npz import TraceError

PIECE = 1 << 20  # rows
SAMPLE = 1 << 15  # bytes of a column that are tried


class Spool:
    """Columns of one length in files that vanish with this process, however it ends."""

    def __init__(self, folder: Path, dtypes: dict[str, str]) -> None:
        self.dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._files: dict[str, IO[bytes]] = {name: tempfile.TemporaryFile(dir=folder) for name in dtypes}  # noqa: SIM115
        self.length = 0

    def close(self) -> None:
        """Give the files back."""
        for file in self._files.values():
            file.close()

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows at the end; `columns` has all of them, of one length."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(columns[name], self.dtypes[name]).data)
            added = len(columns[name])
        self.length += added

    def put(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Replace single values of earlier rows."""
        file, dtype = self._files[name], self.dtypes[name]
        file.flush()
        for row, value in zip(rows.tolist(), values.astype(dtype), strict=True):
            os.pwrite(file.fileno(), value.tobytes(), row * dtype.itemsize)

    def pieces(self, names: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
        """All rows of some columns in order, a piece at a time."""
        names = tuple(names)
        for name in names:
            self._files[name].flush()
        for start in range(0, self.length, PIECE):
            count = min(PIECE, self.length - start)
            piece = {}
            for name in names:
                file, dtype = self._files[name], self.dtypes[name]
                data = os.pread(file.fileno(), count * dtype.itemsize, start * dtype.itemsize)
                piece[name] = np.frombuffer(data, dtype)
            yield piece


class NpzWriter:
    """An `.npz` that is written column by column. A column is compressed, at the fastest level, where its beginning shrinks to an
    eighth: what does not takes many times as long.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file, "w")

    def _member(self, name: str, begin: bytes) -> IO[bytes]:
        member = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
        if 8 * len(zlib.compress(begin, 1)) < len(begin):
            member.compress_type, member._compresslevel = zipfile.ZIP_DEFLATED, 1  # type: ignore[attr-defined]
        return self._zip.open(member, "w", force_zip64=True)

    def array(self, name: str, array: np.ndarray) -> None:
        """A whole array."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        with self._member(name, array.tobytes()[:SAMPLE]) as member:
            np.lib.format.write_array(member, array, allow_pickle=False)

    def column(self, name: str, dtype: str, length: int, parts: Iterable[np.ndarray]) -> None:
        """A column of `length` values that come in parts."""
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
        pieces = (np.ascontiguousarray(part, dtype) for part in parts)
        first = next(pieces, np.zeros(0, dtype))
        with self._member(name, first.tobytes()[:SAMPLE]) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for piece in itertools.chain([first], pieces):
                member.write(piece.data)

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends well, and is gone when it does not.

    Raises:
        TraceError: the folder cannot be written to, or is full.
    """
    try:
        file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)  # noqa: SIM115
        temporary = Path(file.name)
        try:
            with file:
                yield file  # type: ignore[misc]
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output(path: Path, source: Path | None) -> None:
    """Complain about an output before hours of work.

    Raises:
        TraceError: it is a folder, in none, or the input itself.
    """
    if path.is_dir():
        raise TraceError(f"{path}: is a directory, expected the name of an .npz file")
    if not path.parent.is_dir():
        raise TraceError(f"{path}: no such folder, expected an existing one")
    if not os.access(path.parent, os.W_OK):
        raise TraceError(f"{path}: cannot be written: permission denied")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise TraceError(f"{path}: is the input, expected another file")
