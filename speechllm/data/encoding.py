"""int16 samples at 16 kHz -> the bytes of a file, the same for the same samples."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

import soundfile

from speechllm.data.audio import encode_flac
from speechllm.types import SAMPLE_RATE

Codec = Literal["flac", "opus"]

# What libsndfile lets one choose for each channel, by its compression level from 1 down to 0.
MIN_OPUS_BITRATE, MAX_OPUS_BITRATE = 6_000, 256_000
# FLAC of speech at 16 kHz and 16 bits takes 0.45-0.6 of the bytes of the samples.
_FLAC_BYTES_PER_SECOND = 0.55 * 2 * SAMPLE_RATE
# Of an Ogg page (RFC 3533): the header up to the segment table, and where serial number and
# checksum stand in it.
_PAGE_HEADER, _SERIAL, _CHECKSUM = 27, slice(14, 18), slice(22, 26)
_SERIAL_NUMBER = struct.pack("<I", 1)
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Encoding:
    """bitrate: bits a second that Opus aims at; FLAC loses nothing and takes what it takes."""

    codec: Codec = "flac"
    bitrate: int = 24_000

    @property
    def bytes_per_second(self) -> float:
        """About what speech takes."""
        return self.bitrate / 8 if self.codec == "opus" else _FLAC_BYTES_PER_SECOND


def encode(samples: np.ndarray, encoding: Encoding) -> bytes:
    """int16 [N] at 16 kHz -> a file whose extension is the codec's name."""
    if encoding.codec == "flac":
        return encode_flac(samples)
    return encode_opus(samples, encoding.bitrate)


def encode_opus(samples: np.ndarray, bitrate: int) -> bytes:
    """int16 [N] at 16 kHz -> Ogg Opus of about so many bits a second, N samples long again.

    libsndfile draws the stream's serial number from the clock; here it is always 1.
    """
    assert samples.dtype == np.int16
    assert samples.ndim == 1
    assert MIN_OPUS_BITRATE <= bitrate <= MAX_OPUS_BITRATE
    level = 1 - (bitrate - MIN_OPUS_BITRATE) / (MAX_OPUS_BITRATE - MIN_OPUS_BITRATE)
    buffer = io.BytesIO()
    soundfile.write(
        buffer, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level
    )
    return with_serial_number(buffer.getvalue(), _SERIAL_NUMBER)


def with_serial_number(ogg: bytes, serial: bytes) -> bytes:
    """An Ogg file of one stream under another serial number (4 bytes)."""
    pages = []
    first = 0
    while first < len(ogg):
        header = bytearray(ogg[first : first + _PAGE_HEADER])
        assert header[:4] == b"OggS"
        lacing = ogg[first + _PAGE_HEADER : first + _PAGE_HEADER + header[26]]
        last = first + _PAGE_HEADER + len(lacing) + sum(lacing)
        header[_SERIAL] = serial
        header[_CHECKSUM] = bytes(4)
        page = bytes(header) + ogg[first + _PAGE_HEADER : last]
        header[_CHECKSUM] = struct.pack("<I", ogg_checksum(page))
        pages.append(bytes(header) + page[_PAGE_HEADER:])
        first = last
    return b"".join(pages)


def ogg_checksum(page: bytes) -> int:
    """RFC 3533's CRC: zlib's polynomial from the other end of each byte, starting at 0, not
    inverted. With all bits reversed it is zlib's own, which runs in C."""
    backwards = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{backwards:032b}"[::-1], 2)
