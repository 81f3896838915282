"""Making the index of a tar that any tool has written, in one pass over its bytes."""

from __future__ import annotations

import posixpath
import tarfile
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from speechllm.data.audio import AUDIO_EXTENSIONS, probe
from speechllm.data.files import open_binary
from speechllm.data.index import index_path, write_index
from speechllm.data.members import (
    METADATA_EXTENSIONS,
    AudioMember,
    MetadataMember,
    Row,
    clean_name,
    extension,
    pair,
    parse_metadata,
)
from speechllm.data.remote import is_http
from speechllm.errors import AudioError, DataError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = tarfile.BLOCKSIZE
# GNU tar pads with zeros to a multiple of its blocking factor, at most about this much.
_TAIL = 1 << 20


@dataclass(frozen=True)
class IndexReport:
    """What building one index found. skipped: member names by the reason why they are no rows."""

    tar: str
    utterances: int
    seconds: float
    skipped: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class _Scan:
    audios: list[AudioMember] = field(default_factory=list)
    metadata: list[MetadataMember] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def build_index(tar: str) -> IndexReport:
    """Scan a tar and write its index beside it.

    Every audio member with a partner that holds its text becomes a row; whatever else there is,
    directories excepted, is in the report. Raises DataError for a tar that is missing, truncated,
    compressed, not a tar, or on an http server.
    """
    path = index_path(tar)
    if is_http(tar):  # before all of it is fetched
        raise DataError(
            f"{path}: cannot be written over http; index a copy of the tar, and put the index "
            "beside it on the server"
        )
    try:
        with open_binary(tar) as file:
            rows, skipped = scan_tar(tar, file)
            size = file.seek(0, 2)

            def read_at(offset: int, length: int) -> bytes:
                file.seek(offset)
                return file.read(length)

            write_index(path, rows, size, read_at)
    except OSError as error:
        raise DataError(f"{tar}: cannot be read ({error})") from error
    seconds = sum(row.audio.duration for row in rows)
    return IndexReport(tar, len(rows), seconds, skipped)


def scan_tar(tar: str, file: Any) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows of an open tar, and the members that are none, by reason. Raises DataError."""
    _refuse_compressed(tar, file)
    scan = _Scan()
    end = 0
    try:
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace"
        ) as archive:
            for member in archive:
                _take(scan, member, file)
                end = archive.offset
    except tarfile.TarError as error:
        if file.seek(0, 2) == 0:
            raise DataError(f"{tar}: empty file, not a tar; make it again") from error
        raise DataError(
            f"{tar}: truncated or not a tar ({error}); copy it again or make it again"
        ) from error
    _check_end(tar, file, end)
    rows, left_over = pair(scan.audios, scan.metadata)
    paired = {row.key for row in rows}
    skipped: dict[str, list[str]] = {}
    for reason, names in scan.skipped.items():
        # What stands beside a whole utterance (`KEY.cls`, a `KEY.json` without text next to a
        # `KEY.txt`) is no loss.
        if lost := [name for name in names if _stem(name) not in paired]:
            skipped[reason] = lost
    known = {_stem(name) for names in skipped.values() for name in names}
    for reason, names in left_over.items():
        # A partner that was itself skipped is named once, with the true reason.
        if lost := [name for name in names if _stem(name) not in known]:
            skipped[reason] = lost
    return rows, skipped


def _take(scan: _Scan, member: tarfile.TarInfo, file: Any) -> None:
    if member.isdir():
        return
    name = clean_name(member.name)
    kind = extension(name)
    if posixpath.basename(name).startswith("."):
        scan.skipped["hidden file"].append(name)
    elif not member.isreg() or member.issparse():
        scan.skipped["link, sparse or special file"].append(name)
    elif kind in AUDIO_EXTENSIONS:
        try:
            info = probe(_data(member, file), kind)
        except AudioError as error:
            scan.skipped[f"audio {error}"].append(name)
            return
        scan.audios.append(
            AudioMember(name, member.offset_data, member.size, info.duration, info.sample_rate)
        )
    elif kind in METADATA_EXTENSIONS:
        try:
            text, _ = parse_metadata(_data(member, file), kind)
        except DataError as error:
            scan.skipped[str(error).split(" (")[0]].append(name)
            return
        scan.metadata.append(MetadataMember(name, member.offset_data, member.size, len(text)))
    else:
        scan.skipped["neither audio nor text"].append(name)


def _data(member: tarfile.TarInfo, file: Any) -> bytes:
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name}: {len(data)} of {member.size} bytes")
    return data


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _refuse_compressed(tar: str, file: Any) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{tar}: compressed with {kind}, and samples cannot be read at random from such a "
                "file; decompress it first"
            )


def _check_end(tar: str, file: Any, end: int) -> None:
    """tarfile takes a cut between two members, or a broken header, quietly for the end."""
    file.seek(end)
    marker = file.read(_BLOCK)
    if len(marker) < _BLOCK:
        raise DataError(
            f"{tar}: truncated (no end-of-archive mark after byte {end}); copy it again"
        )
    if marker.strip(b"\0"):
        raise DataError(f"{tar}: damaged header at byte {end}; copy it again or make it again")
    if file.read(_TAIL).strip(b"\0"):
        raise DataError(
            f"{tar}: more data after the end-of-archive mark at byte {end}, which readers do not "
            "see (tars joined by cat?); join them with `tar --concatenate` instead"
        )
