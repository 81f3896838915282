"""WAV: whether it is whole; and 16-bit WAV with the plain header of 44 bytes that libsndfile, sox
and Kaldi write, quickly.

For 9 s: 0.03 ms beside reading the file; by libsndfile, which reads a header field by field, 0.09.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

import numpy as np

_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
_RIFF, _CHUNK = struct.Struct("<4sI4s"), struct.Struct("<4sI")
_BITS = 16
# What programs that write into a pipe put for a length that they do not know: 0 or, for most, more.
_UNKNOWN_BYTES = 0x7FFF_0000
_SLACK_BYTES = 4096  # headers are found that count themselves in


def decode_wav(data: bytes) -> tuple[np.ndarray, int] | None:
    """The bytes of a WAV file -> int16 [N, channels], and its rate in Hz.

    None for any other file, for no samples, and where the header is not consistent in itself and
    with the length of the file: that is for libsndfile to judge.
    """
    if len(data) <= _HEADER.size:
        return None
    riff, size, wave, fmt, fmt_size, kind, channels, rate, *rates, bits, name, length = (
        _HEADER.unpack_from(data)
    )
    if (riff, wave, fmt, name) != (b"RIFF", b"WAVE", b"fmt ", b"data"):
        return None
    if (size, length) != (len(data) - 8, len(data) - _HEADER.size):
        return None
    frame = channels * _BITS // 8
    if (fmt_size, kind, bits, *rates) != (16, 1, _BITS, rate * frame, frame):
        return None
    if not rate or not channels or length % frame:
        return None
    samples = np.frombuffer(data, "<i2", offset=_HEADER.size).astype(np.int16)  # a copy, writable
    return samples.reshape(-1, channels), rate


def missing_bytes(file: BinaryIO) -> int:
    """How much of the samples that the header of a WAV file tells of is not there; 0 where it tells
    no length, and for any other file.

    libsndfile takes what there is for the whole: a copy that was cut short reads without an error.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    riff, _, wave = _RIFF.unpack(file.read(_RIFF.size).ljust(_RIFF.size))
    if (riff, wave) != (b"RIFF", b"WAVE"):
        return 0
    while len(head := file.read(_CHUNK.size)) == _CHUNK.size:
        name, size = _CHUNK.unpack(head)
        if name == b"data":
            missing = file.tell() + size - length
            return missing if size < _UNKNOWN_BYTES and missing > _SLACK_BYTES else 0
        file.seek(size + size % 2, os.SEEK_CUR)
    return 0
