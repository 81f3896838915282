"""What the members of a shard mean: their names, their metadata, and which belong together."""

from __future__ import annotations

import json
import posixpath
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from speechllm.errors import DataError

TEXT_EXTENSIONS = ("txt", "text")
METADATA_EXTENSIONS = ("json", *TEXT_EXTENSIONS)


@dataclass(frozen=True)
class AudioMember:
    """offset, size: bytes of the data within the tar. duration: seconds."""

    name: str
    offset: int
    size: int
    duration: float
    sample_rate: int


@dataclass(frozen=True)
class MetadataMember:
    """text_length: characters."""

    name: str
    offset: int
    size: int
    text_length: int


@dataclass(frozen=True)
class Row:
    """One utterance of an index."""

    key: str
    audio: AudioMember
    metadata: MetadataMember

    @property
    def audio_ext(self) -> str:
        return extension(self.audio.name)

    @property
    def metadata_ext(self) -> str:
        return extension(self.metadata.name)


def clean_name(name: str) -> str:
    """`./a/b.flac`, as GNU tar likes to write it, is `a/b.flac`."""
    return posixpath.normpath(name).lstrip("/") if name else name


def extension(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def parse_metadata(data: bytes, ext: str) -> tuple[str, dict[str, Any]]:
    """The text (stripped) and the other fields of a `.json` or a `.txt`.

    Raises DataError, without a file name, where it cannot be read or holds no text.
    """
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the metadata is not UTF-8 ({error.reason})") from error
    if ext in TEXT_EXTENSIONS:
        return content.strip(), {}
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the metadata is not JSON ({error})") from error
    text = fields.pop("text", None) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise DataError("the metadata has no `text`")
    if "\\u" in content:
        _refuse_half_characters(text, fields)
    return text.strip(), fields


def pair(
    audios: Sequence[AudioMember], metadata: Sequence[MetadataMember]
) -> tuple[list[Row], dict[str, list[str]]]:
    """Rows in the order of the audio, and the members left over, by reason.

    The key is the name up to its last dot (`utt.1.flac` belongs to `utt.1.txt`). What finds no
    partner so is tried up to the first dot, which is WebDataset's rule (`7.audio.flac` belongs to
    `7.meta.json`). Of several metadata members `.json` wins over `.txt`; of several audio members
    the first.
    """
    rows: list[Row] = []
    left_over: dict[str, list[str]] = defaultdict(list)
    open_audios, open_metadata = list(audios), list(metadata)
    taken: set[str] = set()
    for key_of in (_up_to_last_dot, _up_to_first_dot):
        candidates: dict[str, list[MetadataMember]] = defaultdict(list)
        for member in open_metadata:
            candidates[key_of(member.name)].append(member)
        unpaired: list[AudioMember] = []
        for audio in open_audios:
            key = key_of(audio.name)
            if key in taken:
                left_over["second audio of one key"].append(audio.name)
            elif key in candidates:
                taken.add(key)
                best = min(
                    candidates[key], key=lambda m: METADATA_EXTENSIONS.index(extension(m.name))
                )
                rows.append(Row(key, audio, best))
            else:
                unpaired.append(audio)
        open_audios = unpaired
        open_metadata = [m for m in open_metadata if key_of(m.name) not in taken]
    if open_audios:
        left_over["audio without metadata"] += [audio.name for audio in open_audios]
    if open_metadata:
        left_over["metadata without audio"] += [member.name for member in open_metadata]
    rows.sort(key=lambda row: row.audio.offset)
    return rows, dict(left_over)


def _refuse_half_characters(text: str, fields: dict[str, Any]) -> None:
    """JSON can hold half of a surrogate pair (`\\ud800`), no tokenizer and no UTF-8 file can."""
    try:
        json.dumps([text, fields], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the metadata is not Unicode ({error.reason})") from error


def _up_to_last_dot(name: str) -> str:
    return posixpath.splitext(name)[0]


def _up_to_first_dot(name: str) -> str:
    directory, base = posixpath.split(name)
    return posixpath.join(directory, base.split(".", 1)[0])
