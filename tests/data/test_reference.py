from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

import pyarrow as pa
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import write_tone
from speech_files import tone

from speechllm.data.audio import encode_flac, resampled_length
from speechllm.data.reference import (
    audio_extension,
    load_samples,
    probe_audio,
    read_audio,
    sniff,
    stored_bytes,
)
from speechllm.data.sources.utterance import (
    Access,
    AudioRef,
    CommandAudio,
    FileAudio,
    RowAudio,
    SliceAudio,
    SourceUtterance,
)
from speechllm.errors import AudioError


def utterance(audio: AudioRef, *span: float | int | None, root: int = 0) -> SourceUtterance:
    start, end, channel = (*span, None, None, None)[:3]
    return SourceUtterance("u", audio, "t", start, end, channel, root=root)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same second of audio as every kind of reference; at 8 kHz beside it."""
    folder = tmp_path_factory.mktemp("files")
    write_tone(folder / "a.wav", 1.0)
    write_tone(folder / "slow.wav", 1.0, rate=8000)
    wav = (folder / "a.wav").read_bytes()
    (folder / "x.ark").write_bytes(b"utt " + wav + b"other " + wav)
    flac = encode_flac(tone(1.0))
    length = len(flac).to_bytes(2, "little")
    (folder / "y.ark").write_bytes(b"utt AUDIO\x02" + length + flac + b"more")
    cells = [{"bytes": None, "path": "lost"}, {"bytes": wav, "path": None}]
    table = pa.table({"audio": cells, "raw": [b"", flac]})
    with pa.ipc.new_stream(str(folder / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_file(str(folder / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder


REFERENCES = {
    "file": (FileAudio("a.wav"), "wav"),
    "ark": (SliceAudio("x.ark", 4, None, ""), ""),
    "ark of kaldiio": (SliceAudio("y.ark", 4, None, ""), ""),
    "sized slice": (SliceAudio("x.ark", 4 + 32044 + 6, 32044, "wav"), "wav"),
    "command": (CommandAudio("cat a.wav"), ""),
    "row": (RowAudio("x.arrow", 1, "audio", "wav"), "wav"),
    "row without extension": (RowAudio("file.arrow", 1, "raw", ""), ""),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_every_reference_gives_the_same_samples(files: Path, name: str) -> None:
    audio, extension = REFERENCES[name]
    access = Access(("/nowhere", str(files)))
    one = utterance(audio, root=1)
    np.testing.assert_array_equal(load_samples(one, access), tone(1.0))
    part = utterance(audio, 0.25, 0.5, 0, root=1)
    np.testing.assert_array_equal(load_samples(part, access), tone(1.0)[4000:8000])
    assert probe_audio(one, access) == (1.0, 16000, 1)
    data, kind = read_audio(one, access)
    assert kind == ("flac" if name in ("row without extension", "ark of kaldiio") else "wav")
    assert audio_extension(audio) == extension
    assert sniff(data) == kind
    size = stored_bytes(one, access)
    assert size in (None, len(data))
    assert (size is None) == (name not in ("file", "sized slice"))


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    rate=st.sampled_from([16000, 8000, 44100]),
    kind=st.sampled_from(["wav", "flac", "ark"]),
    channels=st.integers(1, 2),
)
def test_cuts_are_those_of_soundfile(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    rate: int,
    kind: str,
    channels: int,
) -> None:
    """At 16 kHz to the sample; at other rates the same frames are resampled."""
    folder = tmp_path_factory.getbasetemp() / f"cuts-{rate}-{channels}"
    frames = round(0.3 * rate)
    if not folder.exists():
        folder.mkdir()
        samples = np.stack([tone(0.3, seed=i, rate=rate) for i in range(channels)], axis=1)
        for extension in ("wav", "flac"):
            soundfile.write(folder / f"a.{extension}", samples, rate)
        (folder / "a.ark").write_bytes(b"u " + (folder / "a.wav").read_bytes())
    first = data.draw(st.integers(0, frames - 2))
    last = data.draw(st.integers(first + 2, frames))
    channel = data.draw(st.integers(0, channels - 1))
    audio = SliceAudio("a.ark", 2, None, "wav") if kind == "ark" else FileAudio(f"a.{kind}")
    one = utterance(audio, first / rate, last / rate, channel)
    found = load_samples(one, Access((str(folder),)))
    wanted, _ = soundfile.read(
        folder / ("a.flac" if kind == "flac" else "a.wav"),
        start=first,
        stop=last,
        dtype="int16",
        always_2d=True,
    )
    if rate == 16000:
        np.testing.assert_array_equal(found, wanted[:, channel])
        return
    assert len(found) == resampled_length(last - first, rate)
    soundfile.write(folder / "part.wav", wanted[:, channel], rate)
    np.testing.assert_array_equal(
        found, load_samples(utterance(FileAudio("part.wav")), Access((str(folder),)))
    )


def test_of_a_slice_only_its_bytes_are_read(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        reads.append((offset, length))
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    access = Access((str(files),))
    read_audio(utterance(SliceAudio("x.ark", 4, None, "wav")), access)
    read_audio(utterance(SliceAudio("x.ark", 4, 32044, "wav")), access)
    assert reads == [(4, 14), (4, 32044), (4, 32044)]


def test_a_wav_of_unknown_length_as_programs_write_it_into_pipes(files: Path) -> None:
    wav = bytearray((files / "a.wav").read_bytes())
    for size in (0xFFFFFFFF, 0x7FFFFFFF, 0):
        data_size = size - 36 if size > 36 else size
        wav[4:8], wav[40:44] = struct.pack("<I", size), struct.pack("<I", data_size)
        (files / "stream.wav").write_bytes(wav)
        command = utterance(CommandAudio(f"cat stream.wav; : {size}"))
        np.testing.assert_array_equal(load_samples(command, Access((str(files),))), tone(1.0))
        with pytest.raises(AudioError, match="RIFF header does not tell the length"):
            read_audio(utterance(SliceAudio("stream.wav", 0, None, "wav")), Access((str(files),)))


def test_a_command_runs_once_for_all_segments_with_a_cache(files: Path, tmp_path: Path) -> None:
    access = Access((str(files),), command_cache=str(tmp_path / "cache"))
    audio = CommandAudio(f"echo x >> {tmp_path}/runs; cat a.wav")
    for first in (0, 4000, 8000):
        one = utterance(audio, first / 16000, first / 16000 + 0.1)
        np.testing.assert_array_equal(load_samples(one, access), tone(1.0)[first : first + 1600])
    assert (tmp_path / "runs").read_text() == "x\n"


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (FileAudio("lost.wav"), r"missing: .*lost\.wav"),
        (SliceAudio("lost.ark", 0, None, "wav"), r"missing: .*lost\.ark"),
        (SliceAudio("x.ark", 0, None, "wav"), "undecodable: .*no RIFF header"),
        (SliceAudio("x.ark", 4, 10**6, "wav"), "undecodable: .* of 1000000 bytes, the file is cut"),
        (RowAudio("x.arrow", 2, "audio", "wav"), "undecodable: .*has no row 2"),
        (RowAudio("x.arrow", 0, "audio", "wav"), "missing: .*row 0 holds no bytes"),
        (RowAudio("lost.arrow", 0, "audio", "wav"), r"missing: .*lost\.arrow"),
        (RowAudio("a.wav", 0, "audio", "wav"), "unreadable: .*no whole Arrow file"),
        (CommandAudio("false"), "command failed: exit code 1: false"),
        (CommandAudio("echo no audio"), "undecodable: "),
    ],
)
def test_what_cannot_be_opened_says_why(files: Path, audio: AudioRef, message: str) -> None:
    with pytest.raises(AudioError, match=f"^{message}"):
        load_samples(utterance(audio), Access((str(files),)))


@pytest.mark.parametrize(
    ("start", "extension"),
    [
        (b"fLaC", "flac"),
        (b"ID3\x03", "mp3"),
        (b"\xff\xfb\x90", "mp3"),
        (b"OggS" + bytes(24) + b"OpusHead", "opus"),
        (b"OggS" + bytes(24) + b"\x01vorbis", "ogg"),
        (b"NIST_1A\n   1024", "sph"),
        (b"\0\0\0\x20ftypM4A ", "m4a"),
        (b"\x1a\x45\xdf\xa3", "webm"),
        (b"\xff\x00", ""),
        (b"", ""),
    ],
)
def test_bytes_tell_their_kind(start: bytes, extension: str) -> None:
    assert sniff(start) == extension
