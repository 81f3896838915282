"""Reading JSONL manifests: one utterance a line, checked before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fsspec

from speechllm.data.files import local_path
from speechllm.errors import DataError

_OWN_FIELDS = frozenset({"id", "audio", "text", "start", "end", "channel"})
_REMEDY = 'a line reads {"id": "...", "audio": "path", "text": "..."}'


@dataclass(frozen=True)
class Entry:
    """One line. text: stripped, or None where it is missing or empty. start, end: seconds of the
    audio. channel: from 0. fields: everything else that the line holds.
    """

    id: str
    audio: str
    text: str | None
    start: float | None = None
    end: float | None = None
    channel: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def is_cut(self) -> bool:
        """Whether the utterance is a part of its audio file."""
        return not (self.start is None and self.end is None and self.channel is None)


@dataclass(frozen=True)
class Manifest:
    """A manifest whose every line was found good.

    line_numbers: int64 [U], from 1. bounds: int64 [U, 2], the lines' byte ranges in `content`.
    sha256: of the content.
    """

    path: str
    content: bytes
    ids: list[str]
    line_numbers: np.ndarray
    bounds: np.ndarray
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def name(self) -> str:
        """The file's name without its extensions: `a/train.jsonl.gz` -> `train`."""
        base = self.path.rsplit("/", 1)[-1]
        for extension in (".gz", ".bz2", ".xz", ".zst", ".jsonl", ".json"):
            base = base.removesuffix(extension)
        return base

    @property
    def directory(self) -> str:
        """What relative audio paths are relative to."""
        if local_path(self.path) is not None:
            return os.path.dirname(os.path.abspath(self.path))
        return self.path.rsplit("/", 1)[0]

    def line(self, i: int) -> bytes:
        first, last = self.bounds[i]
        return self.content[first:last]


def read_manifest(path: str) -> Manifest:
    """Read and check a whole manifest (`.gz`, `.bz2`, `.xz` are unpacked; urls work).

    Raises DataError naming file and line for a missing file, a line that is no JSON object, a
    missing or mistyped field, and an id that occurs twice.
    """
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            content: bytes = file.read()
    except (OSError, ValueError, ImportError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    ids: list[str] = []
    numbers: list[int] = []
    bounds: list[tuple[int, int]] = []
    line_of: dict[str, int] = {}
    first = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    number = 0
    while first < len(content):
        number += 1
        last = content.find(b"\n", first)
        last = len(content) if last < 0 else last
        line = content[first:last]
        if line.strip():
            entry = parse_line(line, f"{path}:{number}")
            earlier = line_of.setdefault(entry.id, number)
            if earlier != number:
                raise DataError(
                    f"{path}: id {entry.id!r} is on line {earlier} and on line {number}; "
                    "ids must be unique"
                )
            ids.append(entry.id)
            numbers.append(number)
            bounds.append((first, last))
        first = last + 1
    if not ids:
        raise DataError(f"{path}: no lines; {_REMEDY}")
    sha256 = hashlib.sha256(content).hexdigest()
    shaped = np.array(bounds, dtype=np.int64).reshape(-1, 2)
    return Manifest(path, content, ids, np.array(numbers, dtype=np.int64), shaped, sha256)


def parse_line(line: bytes, where: str) -> Entry:
    """One line. Raises DataError starting with `where`."""
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {_REMEDY}") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: not a JSON object; {_REMEDY}")
    for name in ("id", "audio"):
        value = values.get(name)
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: `{name}` must be a string that is not empty; {_REMEDY}")
    try:
        values["id"].encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: `id` is not Unicode ({error.reason})") from error
    text = values.get("text")
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: `text` must be a string, not {json.dumps(text)[:40]}")
    return Entry(
        id=values["id"],
        audio=values["audio"],
        text=(text or "").strip() or None,
        start=_seconds(values, "start", where),
        end=_seconds(values, "end", where),
        channel=_channel(values, where),
        fields={name: value for name, value in values.items() if name not in _OWN_FIELDS},
    )


def source_path(directory: str, audio: str) -> str:
    """Where a manifest in `directory` finds an audio path or url of its lines."""
    if local_path(audio) is None or os.path.isabs(audio):
        return audio
    if local_path(directory) is None:
        return f"{directory}/{audio}"
    return os.path.join(directory, audio)


def _seconds(values: dict[str, Any], name: str, where: str) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: `{name}` must be a number of seconds, not {value!r}")
    if value < 0:
        raise DataError(f"{where}: `{name}` is negative ({value})")
    return float(value)


def _channel(values: dict[str, Any], where: str) -> int | None:
    value = values.get("channel")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{where}: `channel` must be 0, 1, ..., not {value!r}")
    return value
