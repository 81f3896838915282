"""MP3 files that do not tell their length, as encoders leave them that write to a pipe.

mpg123, inside libsndfile, then guesses it from the first frames' bit rate: where the bit rate
varies, 20 s that begin loud were read as 3.9 s. A first frame that tells it is the remedy.

Frame header: ISO/IEC 11172-3, 2.4.1.3, and 13818-3 for the lower rates. `Xing` frame: as LAME and
ffmpeg write it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

_MPEG1_KBITS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2_KBITS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = (44100, 48000, 32000)
_RATE_DIVISOR = {3: 1, 2: 2, 0: 4}  # by the version bits: MPEG-1, 2, 2.5
_LAYER_3, _MONO = 1, 3
_BIT_RATE_AND_PADDING, _NO_CHECKSUM = 0xF200, 0x10000
_SAME_STREAM = 0xFFFE0C00  # sync, version, layer and sampling rate
_XING_BYTES = 12  # its name, flags and the number of frames


class _Frame(NamedTuple):
    header: int
    at: int
    size: int

    @property
    def bit_rate(self) -> int:
        return self.header >> 12 & 15

    @property
    def side_end(self) -> int:
        """Where the side information ends, from the frame's start."""
        is_mpeg1, is_mono = self.header >> 19 & 3 == 3, self.header >> 6 & 3 == _MONO
        return 4 + {(1, 1): 17, (1, 0): 32, (0, 1): 9, (0, 0): 17}[is_mpeg1, is_mono]


def with_length(data: bytes | mmap.mmap) -> bytes | None:
    """The MP3 file with a `Xing` frame in front that tells how many frames follow.

    None where nothing is to be mended: it has such a frame, its bit rate is constant, or it is no
    MPEG layer III.
    """
    start = _tags_end(data)
    frames = _frames(data, start)
    first = next(frames, None)
    if first is None or _tells_length(data, first):
        return None
    count, varies = 1, False
    for frame in frames:
        count += 1
        varies = varies or frame.bit_rate != first.bit_rate
    return _xing_frame(first.header, count) + data[first.at :] if varies else None


def _tags_end(data: bytes | mmap.mmap) -> int:
    """Behind the ID3v2 tags (id3.org, 2.4.0, 3.1: sizes of 7 bits a byte)."""
    at = 0
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 127
        at += 10 + size
    return at


def _frames(data: bytes | mmap.mmap, start: int) -> Iterator[_Frame]:
    """All whole frames of the first one's stream; what lies between them is passed over."""
    like, at = None, start
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            return
        frame = _frame_at(data, at)
        if frame is None or (like is not None and (frame.header ^ like) & _SAME_STREAM):
            at += 1
        elif at + frame.size > len(data):
            return
        else:
            like = frame.header
            yield frame
            at += frame.size


def _frame_at(data: bytes | mmap.mmap, at: int) -> _Frame | None:
    header = int.from_bytes(data[at : at + 4], "big")
    version, rate, kbits = header >> 19 & 3, header >> 10 & 3, header >> 12 & 15
    if header >> 21 != 0x7FF or version == 1 or header >> 17 & 3 != _LAYER_3:
        return None
    if rate == len(_RATES) or kbits not in range(1, len(_MPEG1_KBITS)):
        return None
    return _Frame(header, at, _size(header))


def _size(header: int) -> int:
    version, padding = header >> 19 & 3, header >> 9 & 1
    kbits, eighths = (_MPEG1_KBITS, 144) if version == 3 else (_MPEG2_KBITS, 72)
    rate = _RATES[header >> 10 & 3] // _RATE_DIVISOR[version]
    return eighths * 1000 * kbits[header >> 12 & 15] // rate + padding


def _tells_length(data: bytes | mmap.mmap, frame: _Frame) -> bool:
    checksum = 0 if frame.header & _NO_CHECKSUM else 2
    tag = frame.at + frame.side_end
    found = [data[tag + more : tag + more + _XING_BYTES] for more in {0, checksum}]
    # An encoder that was killed has not come back to fill in the number, which is 0 then.
    return any(
        f[:4] in (b"Xing", b"Info") and f[7] & 1 and any(f[8:])
        for f in found
        if len(f) == _XING_BYTES
    )


def _xing_frame(header: int, count: int) -> bytes:
    """Of the stream that `header` is of, without a checksum."""
    bare = header & ~_BIT_RATE_AND_PADDING | _NO_CHECKSUM
    choices = [bare | index << 12 for index in range(1, len(_MPEG1_KBITS))]
    frames = [_Frame(choice, 0, _size(choice)) for choice in choices]
    frame = next(f for f in frames if f.size >= f.side_end + _XING_BYTES)
    words = b"Xing" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    side = frame.header.to_bytes(4, "big").ljust(frame.side_end, b"\0")
    return (side + words).ljust(frame.size, b"\0")
