from __future__ import annotations

import io
from pathlib import Path

import numpy as np

import fsspec
import pytest
import soundfile
from speech_files import tone

from speechllm.data.audio import decode_audio, encode_flac, load_audio, probe, probe_file
from speechllm.errors import AudioError


def encode(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def open_ended_flac(samples: np.ndarray) -> bytes:
    """FLAC as an encoder writes it into a pipe: STREAMINFO's number of samples is 0 (unknown)."""
    data = bytearray(encode_flac(samples))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


def test_16_khz_mono_flac_comes_back_bit_for_bit() -> None:
    samples = tone(1.3)
    decoded = decode_audio(encode_flac(samples), "flac")
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, samples)


def test_encoding_gives_the_same_bytes_again() -> None:
    assert encode_flac(tone(0.5)) == encode_flac(tone(0.5))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000])
def test_any_rate_is_resampled_and_probed_to_the_sample(rate: int) -> None:
    time = np.arange(rate + 7) / rate
    wave = 0.5 * np.sin(2 * np.pi * 440 * time)
    data = encode(wave, rate, "WAV", "PCM_16")
    decoded = decode_audio(data, "wav")
    info = probe(data, "wav")
    assert info.sample_rate == rate
    assert round(info.duration * 16000) == len(decoded)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(decoded)) / 16000)
    middle = slice(1000, -1000)
    assert np.abs(decoded[middle] / 32768 - expected[middle]).max() < 2e-3


def test_channels_are_averaged_or_picked() -> None:
    left, right = tone(0.4, seed=1), tone(0.4, seed=2)
    data = encode(np.stack([left, right], axis=1), 16000, "WAV", "PCM_16")
    np.testing.assert_array_equal(decode_audio(data, "wav", channel=1), right)
    mixed = decode_audio(data, "wav").astype(int)
    assert np.abs(2 * mixed - (left.astype(int) + right)).max() <= 1
    assert probe(data, "wav").channels == 2
    with pytest.raises(AudioError, match="no such channel: 2 of 2"):
        decode_audio(data, "wav", channel=2)


def test_averaging_loud_channels_does_not_wrap() -> None:
    loud = np.full((1600, 2), 32000, np.int16)
    np.testing.assert_array_equal(decode_audio(encode(loud, 16000, "WAV"), "wav"), loud[:, 0])


def test_float_samples_are_scaled_and_clipped() -> None:
    data = encode(np.array([0.0, 0.5, -0.5, 2.0, -2.0], np.float32), 16000, "WAV", "FLOAT")
    assert decode_audio(data, "wav").tolist() == [0, 16384, -16384, 32767, -32768]


@pytest.mark.parametrize(
    ("kind", "subtype", "extension"),
    [
        ("OGG", "VORBIS", "ogg"),
        ("OGG", "OPUS", "opus"),
        ("MP3", None, "mp3"),
        ("AIFF", None, "aiff"),
    ],
)
def test_other_formats(kind: str, subtype: str | None, extension: str) -> None:
    samples = tone(1.0, rate=24000)
    data = encode(samples, 24000, kind, subtype)
    decoded = decode_audio(data, extension)
    assert round(probe(data, extension).duration * 16000) == len(decoded) == 16000
    assert np.abs(decoded).max() > 5000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    wave = np.zeros(1000, np.float32)
    wave[500] = value
    with pytest.raises(AudioError, match=r"^not finite: "):
        decode_audio(encode(wave, 16000, "WAV", "FLOAT"), "wav")


def test_no_samples_are_refused() -> None:
    data = encode(np.zeros(0, np.int16), 16000, "WAV")
    for read in (decode_audio, probe):
        with pytest.raises(AudioError, match=r"^empty: "):
            read(data, "wav")


@pytest.mark.parametrize("data", [b"", b"no audio at all" * 50, bytes(5000)])
def test_what_is_no_audio_is_refused(data: bytes) -> None:
    for read in (decode_audio, probe):
        with pytest.raises(AudioError, match=r"^undecodable: "):
            read(data, "flac")


@pytest.mark.parametrize(("kind", "extension"), [("FLAC", "flac"), ("MP3", "mp3"), ("WAV", "wav")])
def test_half_a_file_is_refused(kind: str, extension: str) -> None:
    data = encode(tone(2.0), 16000, kind)
    with pytest.raises(AudioError, match=r"^undecodable: "):
        decode_audio(data[: len(data) // 2], extension)


def test_damage_within_a_flac_is_refused() -> None:
    data = bytearray(encode_flac(tone(2.0)))
    middle = len(data) // 2
    data[middle : middle + 300] = bytes(300)
    with pytest.raises(AudioError, match=r"^undecodable: "):
        decode_audio(bytes(data), "flac")


def test_m4a_is_refused_with_the_way_to_convert_it() -> None:
    with pytest.raises(AudioError, match=r"^unsupported: .*\.m4a; .*ffmpeg"):
        decode_audio(b"\0\0\0\x20ftypM4A " + bytes(100), "m4a")


def test_headerless_audio_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(1000))
    with pytest.raises(AudioError, match=r"^unsupported: "):
        load_audio(str(path))


def test_flac_of_unknown_length() -> None:
    samples = tone(2.5)
    data = open_ended_flac(samples)
    np.testing.assert_array_equal(decode_audio(data, "flac"), samples)
    assert probe(data, "flac").duration == 2.5
    np.testing.assert_array_equal(
        decode_audio(data, "flac", start=0.5, end=1.0), samples[8000:16000]
    )


def test_segments_are_cut_to_the_sample(tmp_path: Path) -> None:
    samples = tone(2.0)
    path = tmp_path / "a.flac"
    path.write_bytes(encode_flac(samples))
    part = load_audio(str(path), start=0.25, end=1.5)
    np.testing.assert_array_equal(part, samples[4000:24000])
    np.testing.assert_array_equal(load_audio(str(path), start=1.0), samples[16000:])
    np.testing.assert_array_equal(load_audio(str(path), end=2.05), samples)
    assert probe_file(str(path)).duration == 2.0


@pytest.mark.parametrize(
    ("start", "end"), [(2.0, None), (0.5, 0.5), (1.0, 0.5), (0.0, 2.2), (-1, 1)]
)
def test_segments_outside_the_audio_are_refused(start: float, end: float | None) -> None:
    with pytest.raises(AudioError, match=r"^bad segment: "):
        decode_audio(encode_flac(tone(2.0)), "flac", start=start, end=end)


def test_missing_and_unreadable_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"^missing: .*nowhere.flac"):
        load_audio(str(tmp_path / "nowhere.flac"))
    with pytest.raises(AudioError, match=r"^unreadable: "):
        load_audio(str(tmp_path))


def test_audio_behind_a_url() -> None:
    samples = tone(0.3)
    with fsspec.open("memory://audio/a.flac", "wb") as file:
        file.write(encode_flac(samples))
    np.testing.assert_array_equal(load_audio("memory://audio/a.flac"), samples)
    with pytest.raises(AudioError, match=r"^missing: "):
        load_audio("memory://audio/b.flac")
    with pytest.raises(AudioError, match=r"^unreadable: nosuch://"):
        load_audio("nosuch://audio/b.flac")
