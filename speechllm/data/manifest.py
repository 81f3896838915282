"""The utterances of one or more sources in a canonical form that shards are planned from.

A manifest is lines of JSON in one block of bytes, with arrays that say where each begins, because
a Python object for each of some million utterances takes gigabytes.
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from speechllm.data.sources.utterance import Access, SourceUtterance, encode_line
from speechllm.errors import DataError


class Ids(Sequence[str]):
    """Ids end to end in UTF-8. 5 M ids of 25 characters take 165 MB, as strings 375 MB."""

    def __init__(self, content: bytes, ends: np.ndarray) -> None:
        self._content = content
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"id {i} of {len(self)}")
        i %= len(self)
        first = int(self._ends[i - 1]) if i else 0
        return self._content[first : int(self._ends[i])].decode()

    def __iter__(self) -> Iterator[str]:
        first = 0
        for last in self._ends:
            yield self._content[first:last].decode()
            first = last


@dataclass(frozen=True)
class Manifest:
    """Utterances with distinct ids.

    path: what messages call it. name: of shards made from it. access: how its audio is opened.
    content: one line an utterance, see `encode_line`. line_numbers: int64 [U], the place within its
    source. bounds: int64 [U, 2], the lines' byte ranges in `content`. sha256: of the content, in
    which relative paths stay relative, so that a corpus that was merely moved keeps it.
    """

    path: str
    name: str
    access: Access
    content: bytes
    ids: Ids
    line_numbers: np.ndarray
    bounds: np.ndarray
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def directory(self) -> str:
        """What relative audio paths are relative to, for messages."""
        return ", ".join(dict.fromkeys(self.access.roots))

    def line(self, i: int) -> bytes:
        first, last = self.bounds[i]
        return self.content[first:last]


class ManifestBuilder:
    """Collects the utterances of sources one after another."""

    def __init__(self) -> None:
        self._content = io.BytesIO()
        self._ids = io.BytesIO()
        self._id_ends, self._ends = array("q"), array("q")
        self._hashes, self._numbers = array("q"), array("q")
        self._labels: list[str] = []
        self._roots: list[str] = []
        self._firsts: list[int] = []  # number of the first utterance of each source

    def begin(self, label: str, root: str) -> None:
        """What is added from now on is of this source."""
        self._labels.append(label)
        self._roots.append(root)
        self._firsts.append(len(self._ends))

    def add(self, number: int, utterance: SourceUtterance) -> None:
        """Raises DataError for an id that is empty or not Unicode."""
        if not utterance.id:
            raise DataError(f"{self._labels[-1]}:{number}: an empty id")
        try:
            self._ids.write(utterance.id.encode())
        except UnicodeEncodeError as error:
            where = f"{self._labels[-1]}:{number}"
            raise DataError(f"{where}: `id` is not Unicode ({error.reason})") from error
        self._id_ends.append(self._ids.tell())
        self._hashes.append(hash(utterance.id))
        self._numbers.append(number)
        self._content.write(encode_line(utterance, len(self._roots) - 1))
        self._content.write(b"\n")
        self._ends.append(self._content.tell())

    def finish(self, name: str, access: Access) -> Manifest:
        """`access` gets the roots of the sources. Raises DataError for ids that occur twice."""
        ids = Ids(self._ids.getvalue(), np.array(self._id_ends, dtype=np.int64))
        self._refuse_repeated(ids)
        content = self._content.getvalue()
        ends = np.array(self._ends, dtype=np.int64)
        bounds = np.empty((len(ends), 2), np.int64)
        bounds[1:, 0] = ends[:-1]
        bounds[:1, 0] = 0
        bounds[:, 1] = ends - 1
        return Manifest(
            path=", ".join(dict.fromkeys(self._labels)),
            name=name,
            access=Access(tuple(self._roots), access.command_timeout, access.command_cache),
            content=content,
            ids=ids,
            line_numbers=np.array(self._numbers, dtype=np.int64),
            bounds=bounds,
            sha256=hashlib.sha256(content).hexdigest(),
        )

    def _refuse_repeated(self, ids: Ids) -> None:
        hashes = np.array(self._hashes, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        alike = np.flatnonzero(ordered[1:] == ordered[:-1])
        pairs = sorted(zip(order[alike].tolist(), order[alike + 1].tolist(), strict=True))
        for one, other in pairs:
            if ids[one] == ids[other]:
                raise self._repeated(ids[one], one, other)

    def _repeated(self, name: str, one: int, other: int) -> DataError:
        first, second = (int(np.searchsorted(self._firsts, i, "right")) - 1 for i in (one, other))
        lines = self._numbers[one], self._numbers[other]
        if first == second:
            return DataError(
                f"{self._labels[first]}: id {name!r} is on line {lines[0]} and on line {lines[1]}; "
                "ids must be unique"
            )
        return DataError(
            f"id {name!r} is both in {self._labels[first]}:{lines[0]} and in "
            f"{self._labels[second]}:{lines[1]}; give one of the sources a prefix, e.g. "
            f"{self._labels[second]},prefix=b-"
        )
