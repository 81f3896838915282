"""Opening the audio that a source refers to, in any process.

Every AudioError raised here reads `KIND: what exactly`, as in `speechllm.data.audio`, with one kind
more: `command failed`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

import pyarrow as pa

from speechllm.data.audio import (
    AudioInfo,
    decode_audio,
    extension_of,
    load_audio,
    probe,
    probe_file,
    read_source,
)
from speechllm.data.command import cached_output, run_command
from speechllm.data.files import file_size, local_path, open_binary
from speechllm.data.sources.utterance import (
    Access,
    AudioRef,
    CommandAudio,
    FileAudio,
    RowAudio,
    SliceAudio,
    SourceUtterance,
)
from speechllm.errors import AudioError, DataError

_SPHERE_HEADER = 1024
_ARK_HEADER = 14  # RIFF, size, WAVE; or AUDIO, 1 byte, at most 8 bytes
# What programs write into a RIFF header when they do not know the size yet.
_LARGEST_RIFF = 0x7FFF0000
_OPEN_TABLES = 8


def audio_extension(audio: AudioRef) -> str:
    """What kind of file the audio is; empty where only its bytes tell."""
    match audio:
        case FileAudio(path):
            return extension_of(path)
        case SliceAudio() | RowAudio():
            return audio.extension
        case CommandAudio():
            return ""


def load_samples(utterance: SourceUtterance, access: Access) -> np.ndarray:
    """int16 [N], mono, 16 kHz: the part of the audio that is the utterance. Raises AudioError."""
    start, end, channel = utterance.start, utterance.end, utterance.channel
    path = _file_of(utterance, access)
    if path is not None:
        with _explaining_shorten(path):
            return load_audio(path, start=start, end=end, channel=channel)
    data, extension = read_audio(utterance, access)
    return decode_audio(data, extension, start=start, end=end, channel=channel)


def probe_audio(utterance: SourceUtterance, access: Access) -> AudioInfo:
    """Length, rate and channels of the whole audio. Raises AudioError."""
    path = _file_of(utterance, access)
    if path is not None:
        with _explaining_shorten(path):
            return probe_file(path)
    return probe(*read_audio(utterance, access))


def read_audio(utterance: SourceUtterance, access: Access) -> tuple[bytes, str]:
    """The bytes of the whole audio file, and its extension. Raises AudioError."""
    path = _file_of(utterance, access)
    if path is not None:
        data = read_source(path)
        if _is_shortened(data[:_SPHERE_HEADER]):
            raise _shortened(path)
        return data, extension_of(path)
    match utterance.audio:
        case SliceAudio(path, offset, size, extension):
            full = full_path(path, utterance, access)
            data = _read_slice(full, offset, size)
            return data, extension or sniff(data)
        case RowAudio(path, row, column, extension):
            data = _read_row(full_path(path, utterance, access), row, column)
            return data, extension or sniff(data)
        case CommandAudio(command):
            data = _last_output(command, access.command_timeout, _directory(utterance, access))
            return data, sniff(data)
    raise AssertionError(utterance.audio)


def stored_bytes(utterance: SourceUtterance, access: Access) -> int | None:
    """Size of the whole audio file where that costs no reading. Raises OSError, and AudioError
    `unreadable` where a server fails."""
    match utterance.audio:
        case FileAudio(path):
            full = full_path(path, utterance, access)
            try:
                return file_size(full)
            except DataError as error:
                raise AudioError(f"unreadable: {full} ({error})") from error
        case SliceAudio(_, _, size):
            return size
    return None


def full_path(path: str, utterance: SourceUtterance, access: Access) -> str:
    """Where a path or url of the utterance is found."""
    if local_path(path) is None or os.path.isabs(path) or path.startswith("file://"):
        return path
    root = access.roots[utterance.root]
    if local_path(root) is None:
        return f"{root.rstrip('/')}/{path}"
    return os.path.join(root, path)


def sniff(data: bytes) -> str:
    """The extension that fits the first bytes of a file; empty where they tell nothing."""
    start = bytes(data[:64])
    if start.startswith((b"RIFF", b"RIFX")):
        return "wav"
    if start.startswith(b"OggS"):
        return "opus" if b"OpusHead" in start else "ogg"
    if start.startswith(b"ID3") or (start[:1] == b"\xff" and start[1:2] >= b"\xe0"):
        return "mp3"
    if start[4:8] == b"ftyp":
        return "m4a"
    magics = {b"fLaC": "flac", b"NIST_1A": "sph", b".snd": "au", b"FORM": "aiff", b"RF64": "rf64"}
    for magic, extension in magics.items():
        if start.startswith(magic):
            return extension
    return "webm" if start.startswith(b"\x1a\x45\xdf\xa3") else ""


def _file_of(utterance: SourceUtterance, access: Access) -> str | None:
    """The path or url of an audio that is a file of its own."""
    match utterance.audio:
        case FileAudio(path):
            return full_path(path, utterance, access)
        case CommandAudio(command) if access.command_cache is not None:
            directory = _directory(utterance, access)
            timeout, cache = access.command_timeout, access.command_cache
            return cached_output(command, timeout, cache, directory)
    return None


def _directory(utterance: SourceUtterance, access: Access) -> str | None:
    """Where commands of the source run: relative paths in them start at its root, too."""
    return local_path(access.roots[utterance.root])


# The utterances of a recording follow each other when their lengths are estimated.
@lru_cache(maxsize=1)
def _last_output(command: str, timeout: float, directory: str | None) -> bytes:
    return run_command(command, timeout, directory)


@contextmanager
def _explaining_shorten(path: str) -> Iterator[None]:
    """libsndfile reads sphere files, but not what LDC compressed with shorten, and does not say."""
    try:
        yield
    except AudioError:
        local = local_path(path)
        if local is not None and os.path.isfile(local):
            with open(local, "rb") as file:
                if _is_shortened(file.read(_SPHERE_HEADER)):
                    raise _shortened(path) from None
        raise


def _is_shortened(header: bytes) -> bool:
    return header.startswith(b"NIST_1A") and b"shorten" in header


def _shortened(path: str) -> AudioError:
    return AudioError(
        f"unsupported: {path} is a sphere file compressed with shorten; convert it first with "
        "LDC's sph2pipe (sph2pipe -f wav IN.sph OUT.wav), or let it be run with --allow-commands"
    )


def _read_slice(path: str, offset: int, size: int | None) -> bytes:
    local = local_path(path)
    try:
        if local is None:
            with open_binary(path) as file:

                def read(length: int) -> bytes:
                    file.seek(offset)
                    data: bytes = file.read(length)
                    return data

                return _whole(path, offset, size, read)
        descriptor = os.open(local, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _whole(path, offset, size, lambda length: os.pread(descriptor, length, offset))
        finally:
            os.close(descriptor)
    except AudioError:
        raise
    except FileNotFoundError as error:
        raise AudioError(f"missing: {path}") from error
    except (OSError, DataError) as error:
        raise AudioError(f"unreadable: {path} ({error})") from error


def _whole(path: str, offset: int, size: int | None, read: Callable[[int], bytes]) -> bytes:
    """read(n): n bytes from the offset, fewer where the file ends."""
    where = f"{path} at byte {offset}"
    skipped = 0
    if size is None:
        skipped, size = _told_size(read(_ARK_HEADER), where)
    data = read(skipped + size)[skipped:]
    if len(data) != size:
        raise AudioError(f"undecodable: {where}: {len(data)} of {size} bytes, the file is cut off")
    return data


def _told_size(header: bytes, where: str) -> tuple[int, int]:
    """Bytes before the audio file that starts here, and its size: a wav file tells it itself, for
    others kaldiio writes `AUDIO`, the number of bytes of a number, and that number."""
    if len(header) < _ARK_HEADER:
        raise AudioError(f"undecodable: {where}: the file ends there")
    if header.startswith(b"AUDIO"):
        end = 6 + header[5]
        return end, int.from_bytes(header[6:end], "little")
    if header[:4] != b"RIFF" or header[8:12] != b"WAVE":
        raise AudioError(f"undecodable: {where}: no RIFF header, so no wav file starts there")
    size = 8 + struct.unpack("<I", header[4:8])[0]
    if size == 8 or size >= _LARGEST_RIFF:
        raise AudioError(f"undecodable: {where}: the RIFF header does not tell the length")
    return 0, size


def _read_row(path: str, row: int, column: str) -> bytes:
    cells = open_table(path).column(column)
    if row >= len(cells):
        raise AudioError(f"undecodable: {path}: has no row {row}; its rows have changed")
    cell = cells[row]
    value = cell["bytes"] if pa.types.is_struct(cells.type) else cell
    if not value.is_valid:
        raise AudioError(f"missing: {path}: row {row} holds no bytes of audio")
    return value.as_buffer().to_pybytes()


@lru_cache(maxsize=_OPEN_TABLES)
def open_table(path: str) -> Any:
    """A local Arrow file, memory-mapped, as a pyarrow.Table. Raises AudioError."""
    try:
        try:
            return pa.ipc.open_stream(pa.memory_map(path)).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(pa.memory_map(path)).read_all()
    except FileNotFoundError as error:
        raise AudioError(f"missing: {path}") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise AudioError(f"unreadable: {path} is no whole Arrow file ({error})") from error
