"""An utterance of a source -> what goes into a shard, or the reason why it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from speechllm.data.audio import AUDIO_EXTENSIONS, KEPT_EXTENSIONS, decode_audio, probe
from speechllm.data.cleaning import (
    AudioStatistics,
    CleanSettings,
    audio_hash,
    audio_statistics,
    check_length,
    check_pace,
    check_sound,
    clean_text,
)
from speechllm.data.encoding import Encoding, encode
from speechllm.data.histograms import Measured, measured
from speechllm.data.reference import (
    audio_extension,
    load_samples,
    probe_audio,
    read_audio,
    stored_bytes,
)
from speechllm.data.shards import Sample, encode_metadata, member_bytes, safe_key
from speechllm.data.sources.utterance import (
    Access,
    AudioRef,
    SourceUtterance,
    decode_line,
    source_name,
)
from speechllm.errors import DataError
from speechllm.types import SAMPLE_RATE

Mode = Literal["auto", "keep", "reencode"]

# Reasons for which the storage may be to blame, so that they may be gone another time.
ABSENT = frozenset({"missing", "unreadable"})


@dataclass(frozen=True)
class PrepareSettings:
    """How audio enters the shards, and which.

    mode: `auto` keeps FLAC, Opus, Ogg and MP3 files as they are; `keep` keeps every file that can
    be decoded; `reencode` encodes all. What is cut out of a longer file (start, end, channel) is
    encoded in any case. What is encoded is 16 kHz and mono.
    """

    mode: Mode = "auto"
    encoding: Encoding = field(default_factory=Encoding)
    clean: CleanSettings = field(default_factory=CleanSettings)

    def by_name(self) -> dict[str, Any]:
        values = {"mode": self.mode, **asdict(self.encoding), **asdict(self.clean)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


@dataclass(frozen=True)
class Lines:
    """Lines of one manifest: (number, bytes)."""

    access: Access
    lines: Sequence[tuple[int, bytes]]

    def utterances(self) -> Iterator[tuple[int, SourceUtterance]]:
        for number, line in self.lines:
            yield number, decode_line(line)


@dataclass(frozen=True)
class Dropped:
    """A line that goes into no shard. reason: one of few; detail: what exactly."""

    line: int
    id: str
    reason: str
    detail: str


class Prepared(NamedTuple):
    """is_kept: whether the audio is, byte for byte, what the source holds."""

    sample: Sample
    measured: Measured
    is_kept: bool


class Survey(NamedTuple):
    """What can be told beforehand: bytes that each line will take of a shard (int64 [U], 0 where it
    will be dropped), seconds (float64 [U]), hashes of the samples (uint64 [U, 2], 0 unless
    duplicates are wanted), and the lines that will be dropped."""

    sizes: np.ndarray
    seconds: np.ndarray
    hashes: np.ndarray
    dropped: list[Dropped]


class _Heard(NamedTuple):
    """samples: int16 [N]. kept: the bytes of the source, where they go into the shard."""

    samples: np.ndarray
    kept: tuple[bytes, str] | None
    sound: AudioStatistics


def is_kept(utterance: SourceUtterance, settings: PrepareSettings) -> bool:
    """Whether the audio file goes into the shard byte for byte."""
    if utterance.is_cut or settings.mode == "reencode":
        return False
    return settings.mode == "keep" or audio_extension(utterance.audio) in KEPT_EXTENSIONS


def prepare(utterance: SourceUtterance, access: Access, settings: PrepareSettings) -> Prepared:
    """Read and check one utterance, and encode it where it is not kept.

    All audio is decoded from end to end, also where its bytes are kept. Raises DataError of the
    form `REASON: detail` for what must be dropped.
    """
    metadata = _metadata(utterance, settings.clean)
    heard = _hear(utterance, metadata["text"], access, settings)
    if heard.kept is not None:
        audio, extension = heard.kept
        rate = probe(audio, extension).sample_rate
    else:
        audio, extension = encode(heard.samples, settings.encoding), settings.encoding.codec
        rate = SAMPLE_RATE
    seconds = len(heard.samples) / SAMPLE_RATE
    sample = Sample(safe_key(utterance.id), audio, extension, metadata, seconds, rate)
    found = measured(metadata["text"], seconds, heard.sound)
    return Prepared(sample, found, heard.kept is not None)


def survey(lines: Lines, settings: PrepareSettings) -> Survey:
    """Look at headers only, once per audio file, and only where the source told no length; where
    duplicates are wanted, decode everything."""
    sizes = np.zeros(len(lines.lines), np.int64)
    seconds = np.zeros(len(lines.lines))
    hashes = np.zeros((len(lines.lines), 2), np.uint64)
    dropped = []
    lengths: dict[tuple[int, AudioRef], float] = {}
    for i, (number, utterance) in enumerate(lines.utterances()):
        try:
            metadata = _metadata(utterance, settings.clean)
            if settings.clean.drop_duplicate_audio:
                heard = _hear(utterance, metadata["text"], lines.access, settings)
                length = len(heard.samples) / SAMPLE_RATE
                hashes[i] = audio_hash(heard.samples)
            else:
                length = _estimated_length(utterance, lines.access, lengths)
                check_length(length, settings.clean)
                check_pace(metadata["text"], length, settings.clean)
            audio = settings.encoding.bytes_per_second * length
            if is_kept(utterance, settings):
                audio = stored_bytes(utterance, lines.access) or audio
        except DataError as error:
            dropped.append(dropping(number, utterance, error))
            continue
        except OSError as error:
            kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            dropped.append(dropping(number, utterance, DataError(f"{kind}: {error}")))
            continue
        sizes[i] = member_bytes(int(audio)) + member_bytes(len(encode_metadata(metadata)))
        seconds[i] = length
    return Survey(sizes, seconds, hashes, dropped)


def dropping(line: int, utterance: SourceUtterance, error: DataError) -> Dropped:
    """`REASON: detail` as a record."""
    reason, _, detail = str(error).partition(": ")
    return Dropped(line, utterance.id, reason, detail)


def _hear(
    utterance: SourceUtterance, text: str, access: Access, settings: PrepareSettings
) -> _Heard:
    """Read and decode, and check what was decoded."""
    kept = None
    if is_kept(utterance, settings):
        kept = read_audio(utterance, access)
        samples = decode_audio(*kept)
        if kept[1] not in AUDIO_EXTENSIONS:  # readers of shards would not take it for audio
            kept = None
    else:
        samples = load_samples(utterance, access)
    seconds = len(samples) / SAMPLE_RATE
    check_length(seconds, settings.clean)
    check_pace(text, seconds, settings.clean)
    sound = audio_statistics(samples)
    check_sound(sound, settings.clean)
    return _Heard(samples, kept, sound)


def _metadata(utterance: SourceUtterance, clean: CleanSettings) -> dict[str, Any]:
    """The JSON of the shard; `source` is the audio as the corpus names it."""
    text = clean_text(utterance.text, clean)
    source = source_name(utterance.audio)
    metadata: dict[str, Any] = {"id": utterance.id, "text": text, "source": source}
    for name in ("start", "end", "channel"):
        value = getattr(utterance, name)
        if value is not None:
            metadata[name] = value
    metadata.update(utterance.fields)
    try:
        encode_metadata(metadata)
    except UnicodeEncodeError as error:
        raise DataError(f"not Unicode: {error.reason}") from error
    return metadata


def _estimated_length(
    utterance: SourceUtterance, access: Access, lengths: dict[tuple[int, AudioRef], float]
) -> float:
    """Seconds of the utterance's part; a wrong part is refused when it is read.

    lengths: of whole files seen before. Raises AudioError, and OSError where the length needs no
    look at the file, but the file is not there.
    """
    whole = utterance.seconds
    file = (utterance.root, utterance.audio)
    if whole is not None:
        if file not in lengths:
            stored_bytes(utterance, access)
            lengths[file] = whole
    elif file in lengths:
        whole = lengths[file]
    else:
        whole = lengths[file] = probe_audio(utterance, access).duration
    end = whole if utterance.end is None else min(utterance.end, whole)
    return max(0.0, end - (utterance.start or 0.0))
