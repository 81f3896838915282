"""An utterance of a source -> what goes into a shard, or the reason why it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from speechllm.data.audio import (
    AUDIO_EXTENSIONS,
    KEPT_EXTENSIONS,
    decode_with_rate,
    require_file,
)
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
from speechllm.data.files import local_path
from speechllm.data.histograms import Measured, measured
from speechllm.data.reference import (
    audio_extension,
    full_path,
    load_samples,
    probe_audio,
    read_audio,
    stored_bytes,
)
from speechllm.data.shards import Sample, encode_metadata, member_bytes, safe_key
from speechllm.data.sources.utterance import (
    Access,
    AudioRef,
    FileAudio,
    SourceUtterance,
    decode_line,
    source_name,
)
from speechllm.errors import DataError
from speechllm.types import SAMPLE_RATE

_DECODED_AT_ONCE = 256
_LEAST_BYTES_PER_SECOND = 500

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
        """Decodes many at a time: between audio each would take four times as long."""
        for first in range(0, len(self.lines), _DECODED_AT_ONCE):
            part = self.lines[first : first + _DECODED_AT_ONCE]
            yield from [(number, decode_line(line)) for number, line in part]


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


class _File(NamedTuple):
    """What goes into the shard. sample_rate: Hz."""

    audio: bytes
    extension: str
    sample_rate: int


class _Heard(NamedTuple):
    """samples: int16 [N]. kept: the source's own bytes, where they go into the shard."""

    samples: np.ndarray
    kept: _File | None
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
    file = heard.kept
    if file is None:
        encoding = settings.encoding
        file = _File(encode(heard.samples, encoding), encoding.codec, SAMPLE_RATE)
    seconds = len(heard.samples) / SAMPLE_RATE
    sample = Sample(
        safe_key(utterance.id), file.audio, file.extension, metadata, seconds, file.sample_rate
    )
    found = measured(metadata["text"], seconds, heard.sound)
    return Prepared(sample, found, heard.kept is not None)


def survey(lines: Lines, settings: PrepareSettings, *, lengths: bool = False) -> Survey:
    """A look at what makes up the sizes, which decodes nothing unless duplicates are wanted.

    Headers are read, once per file, only where a length is needed (to drop by, or because
    `lengths` of all are asked for) and the source tells none. Else a length is guessed from the
    size of the file, as that of others of its kind: the order is shuffled, so that shards of like
    guesses are of like size whatever a single one is worth.
    """
    sizes = np.zeros(len(lines.lines), np.int64)
    seconds = np.zeros(len(lines.lines))
    hashes = np.zeros((len(lines.lines), 2), np.uint64)
    dropped = []
    probed: dict[tuple[int, AudioRef], float] = {}
    seconds_per_byte: dict[str, float] = {}
    lengths = lengths or settings.clean.needs_lengths
    for i, (number, utterance) in enumerate(lines.utterances()):
        try:
            text = clean_text(utterance.text, settings.clean)
            kept = is_kept(utterance, settings)
            size = _stored_bytes(utterance, lines.access)
            if settings.clean.drop_duplicate_audio:
                heard = _hear(utterance, text, lines.access, settings)
                seconds[i] = len(heard.samples) / SAMPLE_RATE
                hashes[i] = audio_hash(heard.samples)
            elif lengths or not kept or size is None:
                length = _length(
                    utterance, lines.access, size, probed, None if lengths else seconds_per_byte
                )
                check_length(length, settings.clean)
                check_pace(text, length, settings.clean)
                seconds[i] = length
            if not kept or size is None:
                size = int(settings.encoding.bytes_per_second * seconds[i])
        except DataError as error:
            dropped.append(dropping(number, utterance, error))
            continue
        except OSError as error:
            dropped.append(dropping(number, utterance, DataError(f"unreadable: {error}")))
            continue
        # The metadata are about as long as the line that they are made from.
        sizes[i] = member_bytes(size) + member_bytes(len(lines.lines[i][1]))
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
        audio, extension = read_audio(utterance, access)
        samples, rate = decode_with_rate(audio, extension)
        if extension in AUDIO_EXTENSIONS:  # else readers of shards would not take it for audio
            kept = _File(audio, extension, rate)
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


def _stored_bytes(utterance: SourceUtterance, access: Access) -> int | None:
    """Size of the whole audio file where that costs no reading. Raises AudioError `missing` or
    `unreadable` for a file, and OSError."""
    if isinstance(utterance.audio, FileAudio):
        path = local_path(full_path(utterance.audio.path, utterance, access))
        if path is not None:
            return require_file(path)
    return stored_bytes(utterance, access)


def _length(
    utterance: SourceUtterance,
    access: Access,
    size: int | None,
    probed: dict[tuple[int, AudioRef], float],
    seconds_per_byte: dict[str, float] | None,
) -> float:
    """Seconds of the utterance's part; a wrong part is refused when it is read.

    size: of the file. probed: lengths of files seen before. seconds_per_byte: by kind of file, of
    the first one probed; None where nothing is to be guessed. Raises AudioError.
    """
    start, end, whole = utterance.start or 0.0, utterance.end, utterance.seconds
    if end is not None:
        # Some corpora write 99999 for the end of the file.
        most = size / _LEAST_BYTES_PER_SECOND if whole is None and size is not None else whole
        return max(0.0, (end if most is None else min(end, most)) - start)
    kind = audio_extension(utterance.audio)
    if whole is None and size is not None and seconds_per_byte and kind in seconds_per_byte:
        whole = size * seconds_per_byte[kind]
    if whole is None:
        file = (utterance.root, utterance.audio)
        if file not in probed:
            probed[file] = probe_audio(utterance, access).duration
        whole = probed[file]
        if size and kind and seconds_per_byte is not None:
            seconds_per_byte[kind] = whole / size
    return max(0.0, whole - start)
