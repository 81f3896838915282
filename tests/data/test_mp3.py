"""MP3 of variable bit rate without a frame that tells its length."""

import io
from pathlib import Path

import numpy as np

import pytest
import soundfile

from speechllm.data.audio import decode_audio, load_audio, probe, probe_file
from speechllm.data.mp3 import with_length

SECONDS = 8.0
# Of 257 bytes, the first of which look like a frame.
TAG = b"ID3\x04\0\0\0\0\x02\x01" + b"\xff\xf3\x98\xc4" + bytes(253)


def mp3(rate: int, channels: int, mode: str) -> bytes:
    """Two loud seconds of noise, then a quiet tone."""
    noise = np.random.default_rng(0).uniform(-0.6, 0.6, (2 * rate, channels))
    times = np.arange(int((SECONDS - 2) * rate))[:, None] / rate
    tone = np.repeat(0.05 * np.sin(2 * np.pi * 300 * times), channels, axis=1)
    buffer = io.BytesIO()
    with soundfile.SoundFile(
        buffer, "w", rate, channels, "MPEG_LAYER_III", format="MP3",
        bitrate_mode=mode, compression_level=0.5,
    ) as sound:  # fmt: skip
        sound.write(np.concatenate([noise, tone]))
    return buffer.getvalue()


def without_first_frame(data: bytes) -> bytes:
    assert b"Xing" in data[:60] or b"Info" in data[:60]
    return data[data.index(data[:2], 2) :]


@pytest.mark.parametrize("tag", [b"", TAG])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [11025, 16000, 44100])
def test_all_of_a_file_that_does_not_tell_its_length_is_read(
    rate: int, channels: int, tag: bytes, tmp_path: Path
) -> None:
    whole = mp3(rate, channels, "VARIABLE")
    bare = tag + without_first_frame(whole)
    file = tmp_path / "a.mp3"
    file.write_bytes(bare)

    decoded, wanted = decode_audio(bare, "mp3"), decode_audio(whole, "mp3")
    np.testing.assert_array_equal(load_audio(str(file)), decoded)
    assert probe_file(str(file)) == probe(bare, "mp3")
    assert round(probe(bare, "mp3").duration * 16000) == len(decoded)
    # No frame tells either what the encoder put in front and behind: up to three frames.
    assert 0 <= len(decoded) - len(wanted) <= 3 * 1152 * 16000 / rate
    delay = int(np.argmax(np.correlate(decoded[:8000] / 1.0, wanted[2000:4000] / 1.0))) - 2000
    difference = decoded[delay : delay + len(wanted)] - wanted.astype(int)
    assert np.abs(difference).mean() < 0.1 * np.abs(wanted.astype(int)).mean()


def test_a_number_of_frames_that_was_never_filled_in_is_none() -> None:
    whole = mp3(16000, 1, "VARIABLE")
    count = whole.index(b"Xing") + 8
    unfinished = whole[:count] + bytes(4) + whole[count + 4 :]
    assert len(decode_audio(unfinished, "mp3")) >= len(decode_audio(whole, "mp3"))


def test_what_tells_its_length_is_left_alone() -> None:
    whole, constant = mp3(16000, 1, "VARIABLE"), mp3(16000, 1, "CONSTANT")
    for data in (whole, constant, without_first_frame(constant), b"", b"ID3", b"\xff" * 5000):
        assert with_length(data) is None


def test_damage_between_frames_is_passed_over() -> None:
    bare = without_first_frame(mp3(16000, 1, "VARIABLE"))
    second = bare.index(bare[:2], 2)
    mended = with_length(bare[:second] + b"\xff\0damage\xff\xfb" + bare[second:])
    assert mended is not None
    whole = with_length(bare)
    assert whole is not None
    assert mended[: len(whole) - len(bare)] == whole[: len(whole) - len(bare)]
