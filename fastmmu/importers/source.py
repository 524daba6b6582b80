"""The input of an import: a file or the standard input, with gzip undone, in chunks of whole lines or as mapped memory."""

from __future__ import annotations

import gzip
import io
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

from fastmmu.trace.npz import TraceError, first_line

STANDARD_INPUT = "-"
CHUNK = 4 << 20
LONGEST_LINE = 1 << 20
HEAD = 1 << 16
SHOWN = 60


class Source:
    """One input, read once from its beginning to its end.

    Attributes:
        name: as messages show it.
        line: number of the first line of the chunk that `chunks` gives.
        total: bytes of the file, 0 where that is not known.
    """

    def __init__(self, path: str | Path, progress: Callable[[int], object] | None = None) -> None:
        piped = str(path) == STANDARD_INPUT
        self.path, self.name = Path(path), "<stdin>" if piped else str(path)
        self.line, self.total, self.done = 1, 0, 0
        self._named = not piped
        self._copy: IO[bytes] | None = None
        self._progress = progress or (lambda done: None)
        try:
            if not piped and self.path.is_dir():
                self.fail("is a directory, expected a file")
            self._raw: io.RawIOBase = io.FileIO(0 if piped else str(path), closefd=not piped)
            status = os.fstat(self._raw.fileno())
        except FileNotFoundError:
            self.fail("no such file")
        except OSError as error:
            self.fail(f"cannot be read: {error.strerror}")
        self.regular = os.path.isfile(f"/proc/self/fd/{self._raw.fileno()}")
        self.total = status.st_size if self.regular else 0
        self._counted = io.BufferedReader(_Counted(self._raw, self._advance), 1 << 18)
        self.zipped = self._counted.peek(2)[:2] == b"\x1f\x8b"
        self._stream = io.BufferedReader(gzip.GzipFile(fileobj=self._counted), 1 << 18) if self.zipped else self._counted
        self._kept = b""

    def look(self) -> bytes:
        """The first bytes, which `read` will give again."""
        self._kept = self._read(HEAD)
        return self._kept

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        for one in (self._stream, self._counted, self._raw, self._copy):
            if one is not None:
                one.close()

    def _advance(self, count: int) -> None:
        self.done += count
        self._progress(self.done)

    def _read(self, count: int) -> bytes:
        try:
            return self._stream.read(count)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            self.fail(f"damaged gzip data after byte {self.done} ({first_line(error)}), expected a whole gzip file")
        except OSError as error:
            self.fail(f"cannot be read: {error.strerror or first_line(error)}")

    def read(self) -> bytes:
        """The next bytes; none at the end."""
        kept, self._kept = self._kept, b""
        return kept or self._read(CHUNK)

    def chunks(self) -> Iterator[bytes]:
        """The text in pieces of whole lines, each of which ends in a newline. Who takes them adds their number to `line`.

        Raises:
            TraceError: a line is longer than any of a trace.
        """
        rest = b""
        while data := self.read():
            end = data.rfind(b"\n") + 1
            if end:
                chunk = rest + data[:end]
                yield chunk
                rest = data[end:]
            else:
                rest += data
            if len(rest) > LONGEST_LINE:
                self.fail_line(self.line, rest, f"a line of at most {LONGEST_LINE:,} bytes")
        if rest:
            yield rest + b"\n"

    def _file(self, folder: Path) -> int:
        """Descriptor of the input as a regular file: itself, or its unpacked copy, which has no name, in `folder`."""
        if not self.zipped and self.regular:
            return self._raw.fileno()
        if self._copy is None:
            self._copy = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            while data := self.read():
                self._copy.write(data)
            self._copy.flush()
        return self._copy.fileno()

    def file_path(self, folder: Path) -> Path:
        """A path under which the input, or its unpacked copy, can be opened while this object lives."""
        return self.path if not self.zipped and self.regular and self._named else Path(f"/proc/self/fd/{self._file(folder)}")

    def mapped(self, folder: Path) -> mmap.mmap:
        """The whole input as read-only memory.

        Raises:
            TraceError: there is nothing to map.
        """
        descriptor = self._file(folder)
        if not os.fstat(descriptor).st_size:
            self.fail("is empty, expected a memory image")
        try:
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            self.fail(f"cannot be mapped: {first_line(error)}")

    def fail(self, message: str) -> NoReturn:
        """Complain about the input.

        Raises:
            TraceError: always.
        """
        raise TraceError(f"{self.name}: {message}")

    def fail_line(self, line: int, text: bytes, expected: str) -> NoReturn:
        """Complain about one line.

        Raises:
            TraceError: always.
        """
        shown = text.rstrip(b"\r\n")
        more = "..." * (len(shown) > SHOWN)
        shown_text = repr(shown[:SHOWN].decode("utf-8", "backslashreplace"))
        raise TraceError(f"{self.name}:{line}: {shown_text}{more}, expected {expected}")


class _Counted(io.RawIOBase):
    """A file that tells how many bytes were read of it."""

    def __init__(self, raw: io.RawIOBase, tell: Callable[[int], None]) -> None:
        self._raw, self._tell = raw, tell

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int | None:
        count = self._raw.readinto(buffer)  # type: ignore[arg-type]
        self._tell(count or 0)
        return count
