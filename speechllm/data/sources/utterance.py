"""What every corpus becomes: utterances of one type, each with a reference to its audio."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FileAudio:
    """A whole file: a path, absolute or relative to the source's root, or a url."""

    path: str


@dataclass(frozen=True)
class SliceAudio:
    """The bytes of an audio file inside another file. size: None in an archive of Kaldi's, where a
    header tells it. extension: what the bytes are, without the dot; empty where they tell."""

    path: str
    offset: int
    size: int | None
    extension: str


@dataclass(frozen=True)
class CommandAudio:
    """What a shell command writes to its standard output: a whole audio file."""

    command: str


@dataclass(frozen=True)
class RowAudio:
    """The bytes in one row of an Arrow file (stream or file format). column: a binary column, or a
    struct with a binary field `bytes`. row: from 0, within the file."""

    path: str
    row: int
    column: str
    extension: str


# Kept, because json.dumps makes a new one for every call that has options.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

AudioRef = FileAudio | SliceAudio | CommandAudio | RowAudio


@dataclass(frozen=True)
class SourceUtterance:
    """One utterance of a corpus.

    text: None (or empty) where the corpus has none. start, end: seconds of the audio. channel:
    from 0. fields: whatever else the corpus tells (speaker, lang, task, ...). seconds: length of
    the whole audio where the corpus tells it, for estimates alone. root: number of the root (see
    `Access`) that relative paths start at.
    """

    id: str
    audio: AudioRef
    text: str | None
    start: float | None = None
    end: float | None = None
    channel: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    root: int = 0

    @property
    def is_cut(self) -> bool:
        """Whether the utterance is a part of its audio."""
        return not (self.start is None and self.end is None and self.channel is None)


@dataclass(frozen=True)
class Access:
    """What opening an audio needs besides its reference.

    roots: directories or urls, one a source. command_timeout: seconds. command_cache: a local
    directory that keeps what commands wrote, so that each runs once; None runs them every time.
    """

    roots: tuple[str, ...]
    command_timeout: float = 600.0
    command_cache: str | None = None


@dataclass(frozen=True)
class Source:
    """A corpus that was opened.

    label: what messages call it, followed by `:NUMBER`. name: of shards made from it. utterances:
    with the line that each stands on, or its number where lines mean nothing.
    """

    label: str
    name: str
    root: str
    utterances: Iterator[tuple[int, SourceUtterance]]


def source_name(audio: AudioRef) -> str:
    """What the `source` of an utterance's metadata says: the audio as the corpus names it."""
    match audio:
        case FileAudio(path):
            return path
        case SliceAudio(path, offset):
            return f"{path}:{offset}"
        case CommandAudio(command):
            return f"{command} |"
        case RowAudio(path, row):
            return f"{path}:{row}"


def encode_line(utterance: SourceUtterance, root: int) -> bytes:
    """The one line of JSON that stands for an utterance of the root'th source."""
    values: dict[str, Any] = {"id": utterance.id, "audio": _encode_audio(utterance.audio)}
    if root:
        values["root"] = root
    if text := (utterance.text or "").strip():
        values["text"] = text
    for name in ("start", "end", "channel", "seconds"):
        value = getattr(utterance, name)
        if value is not None:
            values[name] = value
    if utterance.fields:
        values["fields"] = utterance.fields
    try:
        return _ENCODER.encode(values).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which is told when the line is used
        return json.dumps(values, separators=(",", ":")).encode()


def decode_line(line: bytes) -> SourceUtterance:
    """What `encode_line` has written; the text is stripped, and None where it was empty."""
    values = json.loads(line)
    return SourceUtterance(
        id=values["id"],
        audio=_decode_audio(values["audio"]),
        text=values.get("text"),
        start=values.get("start"),
        end=values.get("end"),
        channel=values.get("channel"),
        fields=values.get("fields", {}),
        seconds=values.get("seconds"),
        root=values.get("root", 0),
    )


def _encode_audio(audio: AudioRef) -> dict[str, Any]:
    match audio:
        case FileAudio(path):
            return {"file": path}
        case SliceAudio(path, offset, size, extension):
            return {"slice": [path, offset, size, extension]}
        case CommandAudio(command):
            return {"command": command}
        case RowAudio(path, row, column, extension):
            return {"row": [path, row, column, extension]}


def _decode_audio(values: dict[str, Any]) -> AudioRef:
    ((kind, value),) = values.items()
    match kind:
        case "file":
            return FileAudio(value)
        case "slice":
            return SliceAudio(*value)
        case "command":
            return CommandAudio(value)
        case "row":
            return RowAudio(*value)
    raise AssertionError(kind)
