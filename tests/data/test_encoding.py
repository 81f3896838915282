from __future__ import annotations

import io

import numpy as np

import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from speech_files import tone

from speechllm.data.audio import decode_audio, probe
from speechllm.data.encoding import (
    Encoding,
    encode,
    encode_opus,
    ogg_checksum,
    with_serial_number,
)


@pytest.mark.parametrize("samples", [1, 159, 16_000, 40_001])
def test_opus_keeps_the_length_and_is_the_same_every_time(samples: int) -> None:
    audio = tone(3.0)[:samples]
    first = encode_opus(audio, 24_000)
    assert first == encode_opus(audio, 24_000)
    assert probe(first, "opus").sample_rate == 16_000
    decoded = decode_audio(first, "opus")
    assert decoded.shape == audio.shape
    assert probe(first, "opus").duration == samples / 16_000


def test_opus_sounds_like_what_was_encoded() -> None:
    audio = tone(2.0).astype(np.float64)
    decoded = decode_audio(encode_opus(tone(2.0), 64_000), "opus").astype(np.float64)
    error = np.sqrt(np.mean((decoded - audio) ** 2) / np.mean(audio**2))
    assert error < 0.15


@pytest.mark.parametrize("bitrate", [12_000, 24_000, 64_000])
def test_the_bitrate_is_about_what_was_asked_for(bitrate: int) -> None:
    noise = np.random.default_rng(0).integers(-8000, 8000, 64_000).astype(np.int16)
    size = len(encode_opus(noise, bitrate))
    assert size * 8 / 4.0 == pytest.approx(bitrate, rel=0.25)


def test_another_serial_number_leaves_a_whole_file() -> None:
    ours = encode_opus(tone(1.0), 24_000)
    other = with_serial_number(ours, b"\x07\x00\x00\x80")
    assert other != ours
    assert len(other) == len(ours)
    np.testing.assert_array_equal(decode_audio(other, "opus"), decode_audio(ours, "opus"))
    assert with_serial_number(other, b"\x01\0\0\0") == ours


def test_libsndfile_refuses_a_page_with_a_wrong_checksum() -> None:
    """Which shows that the checksums made here are the right ones."""
    ours = bytearray(encode_opus(tone(1.0), 24_000))
    ours[22] ^= 1
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.SoundFile(io.BytesIO(bytes(ours)))


def slow_checksum(page: bytes) -> int:
    """RFC 3533, appendix: bit by bit."""
    register = 0
    for byte in page:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1) ^ (0x104C11DB7 if register >> 31 else 0)
    return register


@given(st.binary(max_size=80))
def test_the_checksum_is_that_of_the_standard(page: bytes) -> None:
    assert ogg_checksum(page) == slow_checksum(page)


def test_flac_loses_nothing() -> None:
    audio = tone(0.3)
    np.testing.assert_array_equal(decode_audio(encode(audio, Encoding()), "flac"), audio)
    assert encode(audio, Encoding("opus", 32_000)) == encode_opus(audio, 32_000)
