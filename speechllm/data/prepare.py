"""A manifest's line -> what goes into a shard, or the reason why it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from speechllm.data.audio import (
    KEPT_EXTENSIONS,
    AudioInfo,
    decode_audio,
    encode_flac,
    extension_of,
    load_audio,
    probe,
    probe_file,
    read_source,
)
from speechllm.data.files import file_size
from speechllm.data.manifest import Entry, parse_line, source_path
from speechllm.data.shards import Sample, encode_metadata, member_bytes, safe_key
from speechllm.errors import DataError
from speechllm.types import SAMPLE_RATE

# FLAC of speech at 16 kHz and 16 bits takes 0.45-0.6 of the bytes of the samples.
_FLAC_BYTES_PER_SECOND = 0.55 * 2 * SAMPLE_RATE


@dataclass(frozen=True)
class AudioSettings:
    """How audio enters the shards.

    mode: `auto` keeps FLAC, Opus, Ogg and MP3 files as they are; `keep` keeps every file that can
    be decoded; `reencode` makes 16 kHz mono FLAC of all. What is cut out of a longer file (start,
    end, channel) is re-encoded in any case. What is shorter than min_seconds or longer than
    max_seconds is dropped.
    """

    mode: Literal["auto", "keep", "reencode"] = "auto"
    min_seconds: float = 0.0
    max_seconds: float | None = None


@dataclass(frozen=True)
class Lines:
    """Lines of one manifest: (number, bytes). directory: what audio paths are relative to."""

    directory: str
    lines: Sequence[tuple[int, bytes]]

    def entries(self) -> Iterator[tuple[int, Entry]]:
        for number, line in self.lines:
            yield number, parse_line(line, f"line {number}")


@dataclass(frozen=True)
class Dropped:
    """A line that goes into no shard. reason: one of few; detail: what exactly."""

    line: int
    id: str
    reason: str
    detail: str


class Survey(NamedTuple):
    """What headers tell beforehand: bytes that each line will take of a shard (int64 [U], 0 where
    it will be dropped), seconds (float64 [U]), and the lines that will be dropped."""

    sizes: np.ndarray
    seconds: np.ndarray
    dropped: list[Dropped]


def is_kept(entry: Entry, settings: AudioSettings) -> bool:
    """Whether the audio file goes into the shard byte for byte."""
    if entry.is_cut or settings.mode == "reencode":
        return False
    return settings.mode == "keep" or extension_of(entry.audio) in KEPT_EXTENSIONS


def prepare(entry: Entry, directory: str, settings: AudioSettings) -> Sample:
    """Read and check one utterance, and encode it where it is not kept.

    All audio is decoded from end to end, also where its bytes are kept. Raises DataError of the
    form `REASON: detail` for what must be dropped.
    """
    metadata = _metadata(entry)
    path = source_path(directory, entry.audio)
    if is_kept(entry, settings):
        audio, extension = read_source(path), extension_of(path)
        samples = decode_audio(audio, extension)
        rate = probe(audio, extension).sample_rate
        _check_length(len(samples) / SAMPLE_RATE, settings)
    else:
        samples = load_audio(path, start=entry.start, end=entry.end, channel=entry.channel)
        _check_length(len(samples) / SAMPLE_RATE, settings)
        audio, extension, rate = encode_flac(samples), "flac", SAMPLE_RATE
    seconds = len(samples) / SAMPLE_RATE
    return Sample(safe_key(entry.id), audio, extension, metadata, seconds, rate)


def survey(lines: Lines, settings: AudioSettings) -> Survey:
    """Look at headers only, once per audio file."""
    sizes = np.zeros(len(lines.lines), np.int64)
    seconds = np.zeros(len(lines.lines))
    dropped = []
    probed: dict[str, AudioInfo] = {}
    for i, (number, entry) in enumerate(lines.entries()):
        try:
            metadata = encode_metadata(_metadata(entry))
            path = source_path(lines.directory, entry.audio)
            if path not in probed:
                probed[path] = probe_file(path)
            length = _length(entry, probed[path])
            _check_length(length, settings)
            audio = _FLAC_BYTES_PER_SECOND * length
            if is_kept(entry, settings):
                audio = file_size(path) or audio
        except DataError as error:
            dropped.append(dropping(number, entry, error))
            continue
        sizes[i] = member_bytes(int(audio)) + member_bytes(len(metadata))
        seconds[i] = length
    return Survey(sizes, seconds, dropped)


def dropping(line: int, entry: Entry, error: DataError) -> Dropped:
    """`REASON: detail` as a record."""
    reason, _, detail = str(error).partition(": ")
    return Dropped(line, entry.id, reason, detail)


def _metadata(entry: Entry) -> dict[str, Any]:
    """The JSON of the shard; `source` is the audio path as the manifest gives it."""
    if entry.text is None:
        raise DataError("no text: missing or empty")
    metadata: dict[str, Any] = {"id": entry.id, "text": entry.text, "source": entry.audio}
    for name in ("start", "end", "channel"):
        value = getattr(entry, name)
        if value is not None:
            metadata[name] = value
    metadata.update(entry.fields)
    try:
        encode_metadata(metadata)
    except UnicodeEncodeError as error:
        raise DataError(f"not Unicode: {error.reason}") from error
    return metadata


def _length(entry: Entry, info: AudioInfo) -> float:
    """Seconds of the part that the entry wants; a wrong part is refused when it is read."""
    end = info.duration if entry.end is None else min(entry.end, info.duration)
    return max(0.0, end - (entry.start or 0.0))


def _check_length(seconds: float, settings: AudioSettings) -> None:
    if seconds < settings.min_seconds:
        raise DataError(f"too short: {seconds:.3f} s, under {settings.min_seconds:g} s")
    if settings.max_seconds is not None and seconds > settings.max_seconds:
        raise DataError(f"too long: {seconds:.3f} s, over {settings.max_seconds:g} s")
