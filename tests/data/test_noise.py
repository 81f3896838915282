from __future__ import annotations

from pathlib import Path

import numpy as np

import pytest
from audio_tars import wav, write_tar
from http_files import serve
from speech_files import tone, write_shards

import speechllm.data.noise
from speechllm.data import remote
from speechllm.data.noise import AudioBank
from speechllm.errors import DataError


def test_any_tar_with_audio_in_the_order_of_names(tmp_path: Path) -> None:
    noises = [tone(0.1 + 0.1 * i, seed=i) for i in range(4)]
    write_tar(
        tmp_path / "b.tar",
        {"./musan/n1.wav": wav(noises[1]), "README.md": b"x", "musan/n0.wav": wav(noises[0])},
    )
    write_tar(tmp_path / "a.tar", {"musan/n3.wav": wav(noises[3]), "musan/.n9.wav": b"hidden"})
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "sub" / "c.tar", {"musan/n2.WAV": wav(noises[2])})
    bank = AudioBank([str(tmp_path), str(tmp_path / "sub" / "*.tar")], "noises")
    assert len(bank) == 4
    for i, which in enumerate((0.0, 0.25, 0.5, 0.9999)):
        assert bank.name(which).lower() == f"musan/n{i}.wav"
        assert (bank.read(which) == noises[i]).all()


def test_shards_of_ours_serve_too_and_other_rates_are_resampled(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 3)
    assert len(AudioBank([str(shards)], "noises")) == 3
    write_tar(tmp_path / "x.tar", {"x.wav": wav(tone(1.0, rate=8_000), rate=8_000)})
    assert len(AudioBank([str(tmp_path / "x.tar")], "noises").read(0.5)) == 16_000


def test_remote_tars_are_read_by_ranges_and_a_failed_attempt_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noises = [tone(0.3, seed=i) for i in range(3)]
    write_tar(tmp_path / "n.tar", {f"{i}.wav": wav(n) for i, n in enumerate(noises)})
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    with serve(tmp_path) as server:
        bank = AudioBank([f"{server.url}/n.tar"], "noises")
        server.requests.clear()
        server.fault = lambda path, times: "short" if times == 2 else ""
        for which, noise in zip((0, 0.4, 0.9), noises, strict=True):
            assert (bank.read(which) == noise).all()
        assert server.times("n.tar") == 5  # what it is, three ranges, one of them again
        assert all(wanted.startswith("bytes=") for _, wanted in server.requests)


def test_a_channel_of_several(tmp_path: Path) -> None:
    two = np.stack([tone(0.2, seed=1), tone(0.2, seed=2)], axis=1)
    tar = str(write_tar(tmp_path / "x.tar", {"x.wav": wav(two)}))
    assert (AudioBank([tar], "rooms", channel=0).read(0) == two[:, 0]).all()
    assert (AudioBank([tar], "rooms").read(0) != two[:, 0]).any()


def test_decoded_audio_is_kept_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = write_tar(tmp_path / "x.tar", {f"{i}.wav": wav(tone(0.1, seed=i)) for i in range(3)})
    monkeypatch.setattr(speechllm.data.noise, "_CACHED_BYTES", 2 * 3_200)
    bank = AudioBank([str(tar)], "noises")
    first = bank.read(0.0)
    bank.read(0.4)
    assert bank.read(0.0) is first
    bank.read(0.7)
    tar.unlink()
    assert bank.read(0.0) is first
    with pytest.raises(DataError, match=r"1\.wav in .*cannot be read"):
        bank.read(0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "noises: .*no \\*.tar there"),
        (lambda path: write_tar(path / "x.tar", {"x.txt": b"x"}), "no audio in"),
        (lambda path: (path / "x.tar").write_bytes(b"\x1f\x8b" + b"x" * 2_000), "compressed"),
    ],
)
def test_banks_without_audio_are_refused(tmp_path: Path, make, message: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        AudioBank([str(tmp_path)], "noises")


def test_broken_audio_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"x.wav": b"no audio"})
    with pytest.raises(DataError, match=r"x\.wav in .*x\.tar: undecodable"):
        AudioBank([str(tar)], "noises").read(0.0)
