"""Text files of any size, line by line and by the key that starts each line."""

from __future__ import annotations

import io
import lzma
import zlib
from array import array
from collections.abc import Callable, Iterator

import numpy as np

import fsspec

from speechllm.errors import DataError

_BOM = b"\xef\xbb\xbf"
# The last two are what damaged archives raise, and are no OSErrors.
_UNREADABLE = (OSError, ValueError, ImportError, EOFError, zlib.error, lzma.LZMAError)


def numbered_lines(path: str, *, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of all lines; of blank ones only on request.

    `.gz`, `.bz2` and `.xz` are unpacked; urls work. Raises DataError where the file cannot be read.
    """
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip(b"\r\n")
                if number == 1:
                    line = line.removeprefix(_BOM)
                if blank or line.strip():
                    yield number, line
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def decoded(line: bytes, where: str) -> str:
    """Raises DataError, starting with `where`, for what is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file first, "
            "e.g. iconv -f latin1 -t utf-8"
        ) from error


def first_word(line: bytes, where: str) -> bytes:
    """The key of a line of most text formats."""
    return line.split(None, 1)[0]


class KeyedLines:
    """The lines of a file by their keys, without a Python object a line.

    Takes the file's bytes and 33 bytes a line; lines may be asked for in any order and often, and
    fastest in that of the file. Raises DataError for a file that cannot be read, and for a key that
    two lines have.
    """

    def __init__(self, path: str, key_of: Callable[[bytes, str], bytes] = first_word) -> None:
        self.path = path
        self._key_of = key_of
        content = io.BytesIO()
        hashes, self._starts, self._numbers = array("q"), array("q"), array("q")
        for number, line in numbered_lines(path):
            hashes.append(hash(key_of(line, f"{path}:{number}")))
            self._starts.append(content.tell())
            self._numbers.append(number)
            content.write(line)
            content.write(b"\n")
        self._content = content.getvalue()
        unsorted = np.frombuffer(hashes, dtype=np.int64) if hashes else np.zeros(0, np.int64)
        self._order = np.argsort(unsorted, kind="stable")
        self._hashes = unsorted[self._order]
        self._used = bytearray(len(hashes))
        self._next = 0  # the line after the one that was found last
        self._refuse_repeated()

    def __len__(self) -> int:
        return len(self._starts)

    def get(self, key: bytes) -> tuple[int, bytes] | None:
        """(number, line), or None."""
        if self._next < len(self):
            line = self._line(self._next)
            if self._key_of(line, self.path) == key:
                return self._found(self._next, line)
        wanted = hash(key)
        for at in range(int(self._hashes.searchsorted(wanted)), len(self)):
            if self._hashes[at] != wanted:
                break
            i = int(self._order[at])
            line = self._line(i)
            if self._key_of(line, self.path) == key:
                return self._found(i, line)
        return None

    def unused(self) -> tuple[int, int, str] | None:
        """Of the lines that nobody asked for: how many, the first one's number, and its key."""
        first = self._used.find(0)
        if first < 0:
            return None
        key = self._key_of(self._line(first), self.path)
        return self._used.count(0), self._numbers[first], key.decode("utf-8", "replace")

    def _found(self, i: int, line: bytes) -> tuple[int, bytes]:
        self._used[i] = 1
        self._next = i + 1
        return self._numbers[i], line

    def _line(self, i: int) -> bytes:
        start = self._starts[i]
        return self._content[start : self._content.index(b"\n", start)]

    def _refuse_repeated(self) -> None:
        alike = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        pairs = zip(self._order[alike].tolist(), self._order[alike + 1].tolist(), strict=True)
        for i, j in sorted(pairs):
            here, there = (self._key_of(self._line(k), self.path) for k in (i, j))
            if here == there:
                raise DataError(
                    f"{self.path}: {here.decode('utf-8', 'replace')!r} is on line "
                    f"{self._numbers[i]} and on line {self._numbers[j]}; keep one of them"
                )
