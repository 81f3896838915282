import io
from pathlib import Path

import numpy as np

import pytest
import soundfile
from speech_files import tone

from speechllm.data import audio
from speechllm.data.audio import decode_audio, decode_with_rate, load_audio, probe_file
from speechllm.data.wav import decode_wav
from speechllm.errors import AudioError


def encoded(samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize("rate", [16_000, 22_050])
@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_those_of_libsndfile(
    rate: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    voices = np.stack([tone(0.1, seed=seed, rate=rate) for seed in range(channels)], axis=1)
    data = encoded(voices, rate)
    found = decode_wav(data)
    assert found is not None
    np.testing.assert_array_equal(found[0], voices)
    assert found[0].flags.writeable
    ours = decode_with_rate(data, "wav")
    last = decode_audio(data, "wav", channel=channels - 1)
    monkeypatch.setattr(audio, "decode_wav", lambda data: None)
    np.testing.assert_array_equal(ours[0], decode_with_rate(data, "wav")[0])
    np.testing.assert_array_equal(last, decode_audio(data, "wav", channel=channels - 1))
    assert ours[1] == rate


def test_everything_else_is_left_to_libsndfile() -> None:
    whole = encoded(tone(0.05))
    others = [b"", whole[:44], whole[:-1], whole[:-2], whole + b"\0\0", encoded(np.zeros(0, "i2"))]
    others += [encoded(tone(0.05).astype(np.float32) / 32768, subtype="PCM_24")]
    assert all(decode_wav(data) is None for data in others)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_copy_that_was_cut_short_is_refused(subtype: str, tmp_path: Path) -> None:
    whole = encoded(tone(2.0).astype(np.float32) / 32768, subtype=subtype)
    file = tmp_path / "a.wav"
    file.write_bytes(whole[: len(whole) // 2])
    missing = f"{len(whole) - len(whole) // 2:,} bytes"
    for read in (probe_file, load_audio, lambda path: load_audio(path, start=0.1, end=0.2)):
        with pytest.raises(AudioError, match=rf"^undecodable: cut short, {missing}"):
            read(str(file))
    with pytest.raises(AudioError, match=r"^undecodable: cut short"):
        decode_audio(file.read_bytes(), "wav")


@pytest.mark.parametrize("length", [0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_what_was_written_into_a_pipe_is_as_long_as_it_is(length: int) -> None:
    whole = encoded(tone(0.5))
    piped = whole[:40] + length.to_bytes(4, "little") + whole[44:]
    assert len(decode_audio(piped, "wav")) == 8000
    counts_its_header = whole[:40] + (16_000 + 44).to_bytes(4, "little") + whole[44:]
    assert len(decode_audio(counts_its_header, "wav")) == 8000


def test_every_byte_of_the_header_counts() -> None:
    """A changed header is refused, or says the same to libsndfile."""
    whole = encoded(np.stack([tone(0.01), tone(0.01, seed=2)], axis=1))
    for place in range(44):
        for change in (0x01, 0x02, 0x10, 0x80, 0xFF):
            data = whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :]
            found = decode_wav(data)
            if found is not None:
                samples, rate = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
                np.testing.assert_array_equal(found[0], samples)
                assert found[1] == rate
