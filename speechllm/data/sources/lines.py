"""Text files of any size, line by line and by the key that starts each line."""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Iterator

import numpy as np

import fsspec

from speechllm.errors import DataError

_BOM = b"\xef\xbb\xbf"


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
    except (OSError, ValueError, ImportError, EOFError) as error:
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

    Takes the file's bytes and 24 bytes a line; lines may be asked for in any order and often.
    Raises DataError for a file that cannot be read, and for a key that two lines have.
    """

    def __init__(self, path: str, key_of: Callable[[bytes, str], bytes] = first_word) -> None:
        self.path = path
        self._key_of = key_of
        content = io.BytesIO()
        hashes, starts, numbers = array("q"), array("q"), array("q")
        for number, line in numbered_lines(path):
            hashes.append(hash(key_of(line, f"{path}:{number}")))
            starts.append(content.tell())
            numbers.append(number)
            content.write(line)
            content.write(b"\n")
        self._content = content.getvalue()
        order = np.argsort(np.array(hashes, dtype=np.int64), kind="stable")
        self._hashes = np.array(hashes, dtype=np.int64)[order]
        self._starts = np.array(starts, dtype=np.int64)[order]
        self._numbers = np.array(numbers, dtype=np.int64)[order]
        self._used = np.zeros(len(order), dtype=bool)
        self._refuse_repeated()

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, key: bytes) -> tuple[int, bytes] | None:
        """(number, line), or None."""
        wanted = hash(key)
        i = int(np.searchsorted(self._hashes, wanted))
        while i < len(self._hashes) and self._hashes[i] == wanted:
            line = self._line(i)
            if self._key_of(line, self.path) == key:
                self._used[i] = True
                return int(self._numbers[i]), line
            i += 1
        return None

    def unused(self) -> tuple[int, int, str] | None:
        """Of the lines that nobody asked for: how many, the first one's number, and its key."""
        left = np.flatnonzero(~self._used)
        if len(left) == 0:
            return None
        first = left[np.argmin(self._numbers[left])]
        key = self._key_of(self._line(int(first)), self.path)
        return len(left), int(self._numbers[first]), key.decode("utf-8", "replace")

    def _line(self, i: int) -> bytes:
        start = int(self._starts[i])
        return self._content[start : self._content.index(b"\n", start)]

    def _refuse_repeated(self) -> None:
        alike = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        for i in alike[np.argsort(self._numbers[alike])].tolist():
            here, there = (self._key_of(self._line(j), self.path) for j in (i, i + 1))
            if here == there:
                first, second = self._numbers[i], self._numbers[i + 1]
                raise DataError(
                    f"{self.path}: {here.decode('utf-8', 'replace')!r} is on line {first} and on "
                    f"line {second}; keep one of them"
                )
