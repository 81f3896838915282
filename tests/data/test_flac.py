"""miniaudio's samples are those of libsndfile, and what it refuses is left to libsndfile."""

import io
from collections.abc import Callable

import numpy as np

import pytest
import soundfile
from speech_files import tone

from speechllm.data import audio, flac
from speechllm.data.audio import decode_audio, decode_with_rate, encode_flac
from speechllm.data.flac import decode_flac
from speechllm.errors import AudioError

needs_miniaudio = pytest.mark.skipif(flac.lib is None, reason="miniaudio is not installed")


def encoded(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype=subtype)
    return buffer.getvalue()


def outcome(read: Callable[..., tuple[np.ndarray, int]], data: bytes) -> object:
    try:
        samples, rate = read(data, "flac")
        return samples.tolist(), rate
    except AudioError as error:
        return str(error)


@needs_miniaudio
def test_samples_of_any_height_come_back_with_all_channels() -> None:
    random = np.random.default_rng(0)
    samples = random.integers(-32768, 32768, (20_001, 3)).astype(np.int16)
    samples[:6000] >>= 12  # quiet, so that it is predicted and not stored as it is
    found = decode_flac(encoded(samples, 22_050))
    assert found is not None
    assert found[1] == 22_050
    assert found[0].dtype == np.int16
    np.testing.assert_array_equal(found[0], samples)


@needs_miniaudio
@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_whatever_is_made_of_them_is_the_same(
    rate: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    voices = np.stack([tone(0.3, seed=seed, rate=rate) for seed in range(channels)], axis=1)
    data = encoded(voices, rate)
    ours = decode_with_rate(data, "flac")
    last = decode_audio(data, "flac", channel=channels - 1)
    monkeypatch.setattr(audio, "decode_flac", lambda data: None)
    theirs = decode_with_rate(data, "flac")
    assert ours[1] == theirs[1] == rate
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(last, decode_audio(data, "flac", channel=channels - 1))


def test_other_widths_other_formats_and_nothing_are_left_to_libsndfile() -> None:
    wide = encoded(tone(0.1).astype(np.float32) / 32768, subtype="PCM_24")
    unknown = bytearray(encode_flac(tone(0.1)))
    unknown[21] &= 0xF0
    unknown[22:26] = bytes(4)
    empty = encoded(np.zeros(0, np.int16))
    for data in (wide, bytes(unknown), empty, b"", b"fLaC", b"RIFF" + bytes(100)):
        assert decode_flac(data) is None


def test_damage_is_what_libsndfile_says_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever bytes are changed or missing: the right samples, or the same error."""
    samples = tone(1.5)
    whole = encode_flac(samples)
    random = np.random.default_rng(1)
    damaged = [whole[: int(cut)] for cut in random.integers(0, len(whole), 12)]
    for place in random.integers(0, len(whole), 60).tolist():
        damaged.append(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
    ours = [outcome(decode_with_rate, data) for data in damaged]
    monkeypatch.setattr(audio, "decode_flac", lambda data: None)
    theirs = [outcome(decode_with_rate, data) for data in damaged]
    right = (samples.tolist(), 16_000)
    assert all(a in (b, right) for a, b in zip(ours, theirs, strict=True))
    assert sum(isinstance(one, str) for one in ours) > 50
