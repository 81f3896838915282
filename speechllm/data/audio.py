"""Audio of any kind that libsndfile reads -> int16 mono at 16 kHz; FLAC and plain WAV without it.

Every AudioError raised here reads `KIND: what exactly`, where KIND is one of a few fixed words
(`missing`, `unreadable`, `undecodable`, `unsupported`, `empty`, `not finite`, `bad segment`,
`no such channel`), so that a report can count by kind.
"""

from __future__ import annotations

import io
import mmap
import os
import stat
from contextlib import nullcontext
from typing import NamedTuple, TypeVar

import numpy as np

import soundfile
import soxr

from speechllm.data.files import local_path, read_bytes
from speechllm.data.flac import decode_flac
from speechllm.data.mp3 import with_length
from speechllm.data.wav import decode_wav, missing_bytes
from speechllm.errors import AudioError, DataError
from speechllm.types import SAMPLE_RATE

KEPT_EXTENSIONS = frozenset({"flac", "opus", "ogg", "mp3"})
UNSUPPORTED_EXTENSIONS = frozenset({"m4a", "mp4", "aac", "wma", "amr", "webm", "mka"})
HEADERLESS_EXTENSIONS = frozenset({"raw", "pcm"})
AUDIO_EXTENSIONS = (
    KEPT_EXTENSIONS
    | UNSUPPORTED_EXTENSIONS
    | {"wav", "oga", "aif", "aiff", "au", "snd", "sph", "w64", "rf64", "caf"}
)
# A segment may end this much after the audio does: transcripts round to hundredths.
_END_SLACK_SECONDS = 0.1
# The length of a damaged file, or of one without a Xing frame at a constant rate, is an estimate.
_MP3_LENGTH_SLACK = 0.1
_UNKNOWN_FRAMES = 1 << 40
_BLOCK = 1 << 18

Count = TypeVar("Count", int, np.ndarray)


class AudioInfo(NamedTuple):
    """duration: seconds, of what `decode_audio` gives. sample_rate: Hz, of the file."""

    duration: float
    sample_rate: int
    channels: int


def decode_audio(
    data: bytes,
    extension: str,
    *,
    start: float | None = None,
    end: float | None = None,
    channel: int | None = None,
) -> np.ndarray:
    """The bytes of an audio file -> int16 [N], mono, 16 kHz.

    start, end: seconds. channel: from 0; without it the channels are averaged. Other rates are
    resampled with soxr (HQ). Raises AudioError: see the module's docstring.
    """
    return _decode(data, extension, start, end, channel)[0]


def decode_with_rate(data: bytes, extension: str) -> tuple[np.ndarray, int]:
    """`decode_audio` of the whole file, and the rate of the file in Hz."""
    return _decode(data, extension, None, None, None)


def load_audio(
    path: str,
    *,
    start: float | None = None,
    end: float | None = None,
    channel: int | None = None,
) -> np.ndarray:
    """`decode_audio` of a file or url. Of a local file only the segment is read."""
    extension = extension_of(path)
    local = local_path(path)
    is_whole = start is None and end is None
    if local is None or (is_whole and extension in ("flac", "wav")):
        return _decode(read_source(path), extension, start, end, channel)[0]
    require_file(local)
    return _decode(local, extension, start, end, channel)[0]


def probe(data: bytes, extension: str) -> AudioInfo:
    """Length, rate and channels from the header where it tells them. Raises AudioError."""
    return _probe(io.BytesIO(data), extension)


def probe_file(path: str) -> AudioInfo:
    """`probe` of a file or url."""
    local = local_path(path)
    if local is None:
        return _probe(io.BytesIO(read_source(path)), extension_of(path))
    require_file(local)
    return _probe(local, extension_of(path))


def encode_flac(samples: np.ndarray) -> bytes:
    """int16 [N] at 16 kHz -> the bytes of a FLAC file, the same for the same samples."""
    assert samples.dtype == np.int16
    assert samples.ndim == 1
    buffer = io.BytesIO()
    with _Stream(buffer, "w", SAMPLE_RATE, 1, "PCM_16", format="FLAC") as sound:
        sound.buffer_write(np.ascontiguousarray(samples).data, "int16")
    return buffer.getvalue()


def resampled_length(frames: Count, rate: Count) -> Count:
    """Samples at 16 kHz that soxr makes of so many frames: rounded, halves upwards."""
    return (2 * frames * SAMPLE_RATE + rate) // (2 * rate)


def extension_of(path: str) -> str:
    """`a/B.FLAC` -> `flac`."""
    return os.path.splitext(path)[1][1:].lower()


def read_source(path: str) -> bytes:
    """The bytes of an audio file or url. Raises AudioError `missing` or `unreadable`."""
    local = local_path(path)
    if local is not None:
        require_file(local)
    try:
        return read_bytes(path)
    except FileNotFoundError as error:
        raise AudioError(f"missing: {path}") from error
    except (OSError, DataError) as error:
        raise AudioError(f"unreadable: {path} ({error})") from error


def require_file(path: str) -> int:
    """Its bytes. Raises AudioError `missing` or `unreadable`.

    soundfile tells a missing, a forbidden and a broken file apart only by libsndfile's words.
    """
    try:
        about = os.stat(path)
    except (OSError, ValueError) as error:
        raise AudioError(f"missing: {path}") from error
    if not stat.S_ISREG(about.st_mode) or not os.access(path, os.R_OK):
        raise AudioError(f"unreadable: {path} (not a file that may be read)")
    return about.st_size


class _Stream(soundfile.SoundFile):
    """Read or written from the front to the end. soundfile seeks after every read of a file that it
    takes for seekable, to where it is anyway: that takes 5 % of decoding FLAC, and fails at the end
    of a file of unknown length (FLAC written to a pipe)."""

    def seekable(self) -> bool:
        return False


def _open(source: str | io.BytesIO, extension: str) -> soundfile.SoundFile:
    if extension in HEADERLESS_EXTENSIONS:
        raise AudioError(
            f"unsupported: .{extension} has no header that tells its rate; convert it first, e.g. "
            f"sox -t raw -r 16000 -e signed -b 16 -c 1 IN.{extension} OUT.flac"
        )
    try:
        sound = _Stream(source)
        if sound.format in ("WAV", "WAVEX"):
            _refuse_cut_wav(source)
        mended = _mended_mp3(source) if sound.format == "MP3" else None
        return sound if mended is None else _Stream(io.BytesIO(mended))
    except soundfile.SoundFileError as error:
        if extension in UNSUPPORTED_EXTENSIONS:
            raise AudioError(
                f"unsupported: libsndfile cannot read .{extension}; convert it first, e.g. "
                f"ffmpeg -i IN.{extension} -ac 1 -ar 16000 OUT.flac"
            ) from error
        raise AudioError(f"undecodable: {_reason(error)}") from error


def _refuse_cut_wav(source: str | io.BytesIO) -> None:
    with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
        at = file.tell()
        missing = missing_bytes(file)
        file.seek(at)
    if missing:
        raise AudioError(
            f"undecodable: cut short, {missing:,} bytes of the samples that its header tells of "
            "are missing; copy it anew"
        )


def _mended_mp3(source: str | io.BytesIO) -> bytes | None:
    if isinstance(source, io.BytesIO):
        return with_length(source.getvalue())
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return with_length(data)


def _reason(error: soundfile.SoundFileError) -> str:
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    return text.removeprefix("Error : ").rstrip(".")


def _probe(source: str | io.BytesIO, extension: str) -> AudioInfo:
    with _open(source, extension) as sound:
        frames, rate, channels = sound.frames, sound.samplerate, sound.channels
        if frames >= _UNKNOWN_FRAMES:
            frames = len(_read_to_end(sound, "int16"))
    decoded = resampled_length(frames, rate)
    if decoded == 0:
        raise AudioError("empty: no samples")
    return AudioInfo(decoded / SAMPLE_RATE, rate, channels)


def _decode(
    source: str | bytes,
    extension: str,
    start: float | None,
    end: float | None,
    channel: int | None,
) -> tuple[np.ndarray, int]:
    """int16 [N] at 16 kHz, and the rate of the file.

    source: its path or its bytes.
    """
    is_whole = start is None and end is None
    if isinstance(source, bytes) and is_whole:
        found = decode_flac(source) or decode_wav(source)
        if found is not None:
            samples, rate = found
            _check_channel(channel, samples.shape[1])
            return _converted(samples, rate, channel), rate
    with _open(io.BytesIO(source) if isinstance(source, bytes) else source, extension) as sound:
        rate = sound.samplerate
        _check_channel(channel, sound.channels)
        exact = sound.subtype == "PCM_16" and rate == SAMPLE_RATE
        dtype = "int16" if exact else "float32"
        if sound.frames >= _UNKNOWN_FRAMES:
            samples = _read_to_end(sound, dtype)
            first, last = _segment(len(samples), rate, start, end)
            samples = samples[first:last]
        else:
            first, last = _segment(sound.frames, rate, start, end)
            samples = _read(sound, first, last, dtype)
    return _converted(samples, rate, channel), rate


def _check_channel(channel: int | None, channels: int) -> None:
    if channel is not None and not 0 <= channel < channels:
        raise AudioError(f"no such channel: {channel} of {channels} (channels are counted from 0)")


def _converted(samples: np.ndarray, rate: int, channel: int | None) -> np.ndarray:
    """[N, channels] of int16, or of float32 in [-1, 1), at any rate -> int16 [N'] at 16 kHz."""
    exact = samples.dtype == np.int16 and rate == SAMPLE_RATE
    if samples.dtype == np.int16 and not exact:
        samples = samples.astype(np.float32) / np.float32(32768)
    if len(samples) == 0:
        raise AudioError("empty: no samples")
    if not exact and not np.isfinite(samples).all():
        raise AudioError("not finite: NaN or infinite samples")
    if channel is not None:
        samples = samples[:, channel]
    elif samples.shape[1] > 1:
        samples = samples.mean(axis=1, dtype=np.float32)
        samples = np.rint(samples).astype(np.int16) if exact else samples
    else:
        samples = samples[:, 0]
    if exact:
        return np.ascontiguousarray(samples)
    if rate != SAMPLE_RATE:
        samples = soxr.resample(np.ascontiguousarray(samples), rate, SAMPLE_RATE, quality="HQ")
        if len(samples) == 0:
            raise AudioError("empty: no samples are left at 16 kHz")
    return _to_int16(samples)


def _segment(frames: int, rate: int, start: float | None, end: float | None) -> tuple[int, int]:
    """The first frame and the frame after the last."""
    first = 0 if start is None else round(start * rate)
    last = frames if end is None else round(end * rate)
    if first < 0 or (end is not None and last <= first):
        raise AudioError(f"bad segment: start {start}, end {end}")
    if (start is not None and first >= frames) or last > frames + _END_SLACK_SECONDS * rate:
        raise AudioError(
            f"bad segment: start {start}, end {end} of an audio of {frames / rate:.3f} seconds"
        )
    return first, min(last, frames)


def _read(sound: soundfile.SoundFile, first: int, last: int, dtype: str) -> np.ndarray:
    """[last - first, channels]"""
    try:
        if first:
            sound.seek(first)
        samples = sound.read(last - first, dtype=dtype, always_2d=True)
    except soundfile.SoundFileError as error:
        raise AudioError(f"undecodable: {_reason(error)}") from error
    slack = int(_MP3_LENGTH_SLACK * (last - first)) if sound.format == "MP3" else 0
    if len(samples) < last - first - slack:
        raise AudioError(f"undecodable: ends after {len(samples)} of {last - first} samples")
    return samples


def _read_to_end(sound: soundfile.SoundFile, dtype: str) -> np.ndarray:
    """[N, channels] of a file whose header does not tell its length."""
    blocks = []
    try:
        while len(block := sound.read(_BLOCK, dtype=dtype, always_2d=True)):
            blocks.append(block)
    except soundfile.SoundFileError as error:
        raise AudioError(f"undecodable: {_reason(error)}") from error
    return np.concatenate(blocks) if blocks else np.zeros((0, sound.channels), dtype)


def _to_int16(samples: np.ndarray) -> np.ndarray:
    """float in [-1, 1) -> int16; louder samples are clipped. Exact for what was 16 bits."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
