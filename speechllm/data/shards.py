"""Writing one shard: a deterministic tar and its index, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import Any, NamedTuple
from urllib.parse import quote

from speechllm.data.index import index_path, write_index
from speechllm.data.members import AudioMember, MetadataMember, Row
from speechllm.errors import DataError

_JSON = json.JSONEncoder(ensure_ascii=False)
_PLAIN = re.compile(r"[A-Za-z0-9_~-]+")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Sample:
    """What one utterance of a shard is written from.

    key: see `safe_key`. audio: the bytes of a file of that extension, `duration` seconds long,
    `sample_rate` Hz. metadata: JSON values, with at least `text`.
    """

    key: str
    audio: bytes
    extension: str
    metadata: dict[str, Any]
    duration: float
    sample_rate: int


class Written(NamedTuple):
    """The tar's bytes, how many and their hash."""

    size: int
    sha256: str


def safe_key(utterance_id: str) -> str:
    """An id as a key: ASCII without dots (WebDataset cuts there), slashes and white space.

    Anything else than letters, digits, `_`, `-` and `~` becomes %XX by its UTF-8 bytes, so that
    different ids never meet and `urllib.parse.unquote` gives the id back.

    >>> safe_key("a/b c.1")
    'a%2Fb%20c%2E1'
    """
    if _PLAIN.fullmatch(utterance_id):
        return utterance_id
    return quote(utterance_id, safe="").replace(".", "%2E")


def encode_metadata(metadata: dict[str, Any]) -> bytes:
    """JSON in UTF-8. Raises UnicodeEncodeError for half surrogate pairs (`"\\ud800"`)."""
    return _JSON.encode(metadata).encode()


def member_bytes(size: int) -> int:
    """What a member of so many bytes takes of a tar: its header, and its data in whole blocks."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def write_shard(tar: str, samples: Iterable[Sample]) -> Written:
    """Write `tar` and its index from samples with distinct keys.

    The bytes depend on the samples alone. Both files are written aside and synced; the index gets
    its name first, so that a tar of that name is always whole and has an index. Raises DataError
    where they cannot be written (the disk is full, ...); nothing is left of them then.
    """
    index, aside = index_path(tar), f"{tar}.tmp-{os.getpid()}"
    rows: list[Row] = []
    keys: set[str] = set()
    try:
        with _open_aside(aside, tar) as file:
            archive = _TarWriter(file, tar)
            for sample in samples:
                assert sample.key not in keys, f"{tar}: {sample.key} is there already"
                keys.add(sample.key)
                rows.append(_add_sample(archive, sample))
            archive.finish()
            with writing(index):
                write_index(
                    index,
                    rows,
                    archive.size,
                    lambda at, length: os.pread(file.fileno(), length, at),
                )
        with writing(tar):
            os.replace(aside, tar)
    finally:
        for leftover in (aside, f"{index}.tmp-{os.getpid()}"):
            if os.path.exists(leftover):
                os.remove(leftover)
    return Written(archive.size, archive.sha256())


def parse_size(text: str) -> int:
    """`256MB` -> 256,000,000; `1GiB` -> 2**30; a bare number is bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no size; write e.g. 256MB or 1GiB")
    return max(1, int(float(match[1]) * _UNITS[match[2] or ""]))


def tar_header(name: str, size: int) -> bytes:
    """What stands before a member's data; nothing in it tells of time or user."""
    short = name.encode()
    if len(short) > tarfile.LENGTH_NAME or not name.isascii() or size >= 8**11:
        return _tarfile_header(name, size)
    # tarfile takes 45 us for each, 4 % of decoding an utterance; only these fields differ.
    length = b"%011o" % size
    checksum = _EMPTY_HEADER_SUM + sum(short) + sum(length) - 11 * 0x30
    return b"".join(
        (
            short.ljust(tarfile.LENGTH_NAME, b"\0"),
            _EMPTY_HEADER[100:124],
            length,
            _EMPTY_HEADER[135:148],
            b"%06o\0" % checksum,
            _EMPTY_HEADER[155:],
        )
    )


def _tarfile_header(name: str, size: int) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = size
    header.mode = 0o644
    return header.tobuf(tarfile.PAX_FORMAT)


_EMPTY_HEADER = _tarfile_header("", 0)
_EMPTY_HEADER_SUM = int(_EMPTY_HEADER[148:154], 8)


class _TarWriter:
    """A tar of plain files whose headers tell nothing of time or user, hashed as it is written."""

    def __init__(self, file: FileIO, tar: str) -> None:
        self.size = 0
        self._file = file
        self._tar = tar
        self._hash = hashlib.sha256()

    def add(self, members: Sequence[tuple[str, bytes]]) -> list[int]:
        """Append members, by name and data; the offsets of their data."""
        pieces: list[bytes] = []
        offsets = []
        end = self.size
        for name, data in members:
            header = tar_header(name, len(data))
            offsets.append(end + len(header))
            padding = bytes(-len(data) % tarfile.BLOCKSIZE)
            pieces += (header, data, padding)
            end = offsets[-1] + len(data) + len(padding)
        self._write(pieces)
        return offsets

    def finish(self) -> None:
        """Two empty blocks end a tar, and it is filled up to whole records."""
        end = self.size + 2 * tarfile.BLOCKSIZE
        self._write([bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE)])
        with writing(self._tar):
            os.fsync(self._file.fileno())

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def _write(self, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            self._hash.update(piece)
            self.size += len(piece)
        with writing(self._tar):
            write_fully(self._file, pieces)


def _open_aside(aside: str, tar: str) -> FileIO:
    """Unbuffered: closing a buffer that a full disk has not taken would fail a second time."""
    with writing(tar):
        return open(aside, "w+b", buffering=0)


def write_fully(file: FileIO, pieces: Sequence[bytes]) -> None:
    """In one call where that is enough: a file may take a part only, e.g. on a disk that gets full.
    Raises OSError."""
    written = os.writev(file.fileno(), pieces)
    if written < sum(map(len, pieces)):
        rest = memoryview(b"".join(pieces))[written:]
        while rest:
            rest = rest[file.write(rest) :]


@contextmanager
def writing(path: str) -> Iterator[None]:
    """What goes wrong here is the target's fault, not that of a source: DataError says so."""
    try:
        yield
    except (OSError, DataError) as error:
        reason = error.__cause__ if isinstance(error, DataError) else error
        detail = reason.strerror if isinstance(reason, OSError) else None
        raise DataError(
            f"{path}: cannot be written ({detail or error}); make room or choose another place, "
            "then run the same command again: finished shards are kept"
        ) from error


def _add_sample(archive: _TarWriter, sample: Sample) -> Row:
    audio_name, text_name = f"{sample.key}.{sample.extension}", f"{sample.key}.json"
    metadata = encode_metadata(sample.metadata)
    members = [(audio_name, sample.audio), (text_name, metadata)]
    audio_offset, text_offset = archive.add(members)
    return Row(
        sample.key,
        AudioMember(
            audio_name, audio_offset, len(sample.audio), sample.duration, sample.sample_rate
        ),
        MetadataMember(text_name, text_offset, len(metadata), len(sample.metadata["text"].strip())),
    )
