"""Writing one shard: a deterministic tar and its index, whole or not at all."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from speechllm.data.index import index_path, write_index
from speechllm.data.members import AudioMember, MetadataMember, Row

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


def safe_key(utterance_id: str) -> str:
    """An id as a key: ASCII without dots (WebDataset cuts there), slashes and white space.

    Anything else than letters, digits, `_`, `-` and `~` becomes %XX by its UTF-8 bytes, so that
    different ids never meet and `urllib.parse.unquote` gives the id back.

    >>> safe_key("a/b c.1")
    'a%2Fb%20c%2E1'
    """
    return quote(utterance_id, safe="").replace(".", "%2E")


def encode_metadata(metadata: dict[str, Any]) -> bytes:
    """JSON in UTF-8. Raises UnicodeEncodeError for half surrogate pairs (`"\\ud800"`)."""
    return json.dumps(metadata, ensure_ascii=False).encode()


def member_bytes(size: int) -> int:
    """What a member of so many bytes takes of a tar: its header, and its data in whole blocks."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def write_shard(tar: str, samples: Iterable[Sample]) -> int:
    """Write `tar` and its index from samples with distinct keys, and return the tar's bytes.

    The bytes depend on the samples alone. Both files are written aside and synced; the index gets
    its name first, so that a tar of that name is always whole and has an index.
    """
    aside = f"{tar}.tmp-{os.getpid()}"
    rows: list[Row] = []
    keys: set[str] = set()
    try:
        with open(aside, "w+b") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for sample in samples:
                    assert sample.key not in keys, f"{tar}: {sample.key} is there already"
                    keys.add(sample.key)
                    rows.append(_add_sample(archive, sample))
            file.flush()
            os.fsync(file.fileno())
            size = file.seek(0, os.SEEK_END)
            write_index(
                index_path(tar), rows, size, lambda at, length: os.pread(file.fileno(), length, at)
            )
        os.replace(aside, tar)
    finally:
        if os.path.exists(aside):
            os.remove(aside)
    return size


def parse_size(text: str) -> int:
    """`256MB` -> 256,000,000; `1GiB` -> 2**30; a bare number is bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B?\s*", text.upper())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is no size; write e.g. 256MB or 1GiB")
    return max(1, int(float(match[1]) * _UNITS[match[2] or ""]))


def _add_sample(archive: tarfile.TarFile, sample: Sample) -> Row:
    audio_name, text_name = f"{sample.key}.{sample.extension}", f"{sample.key}.json"
    metadata = encode_metadata(sample.metadata)
    audio = AudioMember(
        audio_name,
        _add_member(archive, audio_name, sample.audio),
        len(sample.audio),
        sample.duration,
        sample.sample_rate,
    )
    text = MetadataMember(
        text_name,
        _add_member(archive, text_name, metadata),
        len(metadata),
        len(sample.metadata["text"].strip()),
    )
    return Row(sample.key, audio, text)


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member whose header tells nothing of time or user; the offset of its data."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    header.mode = 0o644
    archive.addfile(header, io.BytesIO(data))
    return archive.offset - member_bytes(len(data)) + tarfile.BLOCKSIZE
