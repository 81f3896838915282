"""Existing WebDataset tars: shards to merge, to filter, or to cut anew."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from speechllm.data.files import list_tars, local_path, open_binary
from speechllm.data.index import index_path, open_index
from speechllm.data.members import parse_metadata
from speechllm.data.scan import scan_tar
from speechllm.data.sources import values
from speechllm.data.sources.spec import Spec, name_of
from speechllm.data.sources.utterance import SliceAudio, Source, SourceUtterance
from speechllm.errors import DataError
from speechllm.log import logger


def open_tars(spec: Spec) -> Source:
    """`tar:PATTERN`: a directory, a glob, a {000..123} range, a tar or a url.

    Members are found by the index beside a tar, else by a scan. The metadata's fields are kept, the
    id among them is the utterance's (ids=key takes the members' names, ids=shard SHARD/KEY, for
    tars that use the same names). Raises DataError naming the tar, also while it is read.
    """
    spec.accept(("ids",))
    tars = sorted(list_tars(spec.path))
    if not tars:
        raise DataError(f"{spec.path}: no *.tar there; give a directory that holds them or a glob")
    ids = spec.choice("ids", "field", "key", "shard")
    roots = {values.directory_of(tar) for tar in tars if local_path(tar) is not None}
    root = os.path.commonpath(roots) if roots else values.directory_of(tars[0])
    return Source(spec.path, name_of(spec.path), root, _utterances(tars, ids, root))


class _Member(NamedTuple):
    """One utterance of a tar. audio, text: offset, size, extension."""

    key: str
    audio: tuple[int, int, str]
    text: tuple[int, int, str]
    seconds: float


def _utterances(tars: list[str], ids: str, root: str) -> Iterator[tuple[int, SourceUtterance]]:
    number = 0
    for tar in tars:
        local = local_path(tar)
        path = tar if local is None else os.path.relpath(local, root)
        try:
            with open_binary(tar) as file:
                for member in _members(tar, file):
                    number += 1
                    text, fields = _metadata(tar, file, member)
                    name = _id_of(member.key, fields, ids, tar)
                    fields.pop("id", None)
                    offset, size, extension = member.audio
                    audio = SliceAudio(path, offset, size, extension)
                    yield (
                        number,
                        SourceUtterance(name, audio, text, fields=fields, seconds=member.seconds),
                    )
        except OSError as error:
            raise DataError(f"{tar}: cannot be read ({error})") from error
    if number == 0:
        raise DataError(f"{tars[0]}: no utterances in {len(tars)} tars")


def _members(tar: str, file: Any) -> Iterator[_Member]:
    if _has_index(tar):
        rows = open_index(tar).rows
        for row in rows.to_pylist():
            yield _Member(
                row["key"],
                (row["audio_offset"], row["audio_size"], row["audio_ext"]),
                (row["meta_offset"], row["meta_size"], row["meta_ext"]),
                row["duration"],
            )
        return
    found, skipped = scan_tar(tar, file)
    if skipped:
        counts = Counter({reason: len(names) for reason, names in skipped.items()})
        listed = ", ".join(f"{reason} ({count})" for reason, count in counts.most_common())
        first = next(iter(skipped.values()))[0]
        logger.warning("%s: members that are no utterances: %s; e.g. %s", tar, listed, first)
    for one in found:
        yield _Member(
            one.key,
            (one.audio.offset, one.audio.size, one.audio_ext),
            (one.metadata.offset, one.metadata.size, one.metadata_ext),
            one.audio.duration,
        )


def _has_index(tar: str) -> bool:
    try:
        with open_binary(index_path(tar)):
            return True
    except OSError:
        return False


def _metadata(tar: str, file: Any, member: _Member) -> tuple[str, dict[str, Any]]:
    offset, size, extension = member.text
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise DataError(f"{tar}: {member.key}: {len(data)} of {size} bytes; copy the tar again")
    try:
        return parse_metadata(data, extension)
    except DataError as error:
        raise DataError(f"{tar}: {member.key}: {error}") from error


def _id_of(key: str, fields: dict[str, Any], ids: str, tar: str) -> str:
    if ids == "shard":
        return f"{name_of(tar)}/{unquote(key)}"
    if ids == "field" and isinstance(fields.get("id"), str) and fields["id"]:
        return str(fields["id"])
    return unquote(key)
