from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import pytest
import soundfile
from source_files import Corpus, write_lines, write_tone
from speech_files import tone

from speechllm.data.sources.utterance import CommandAudio, FileAudio, SliceAudio
from speechllm.errors import AudioError, DataError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """data/train with two recordings of two seconds, the second a stereo sphere file."""
    write_tone(tmp_path / "audio/r1.wav", 2.0, seed=1)
    both = np.stack([tone(2.0, seed=2), tone(2.0, seed=3)], axis=1)
    soundfile.write(tmp_path / "audio/r2.sph", both, 16000, format="NIST", subtype="PCM_16")
    data = tmp_path / "data/train"
    write_lines(data / "wav.scp", [f"r1 {tmp_path}/audio/r1.wav", "r2 audio/r2.sph"])
    write_lines(
        data / "segments", ["s1-r1-0 r1 0.25 0.75", "s1-r1-1 r1 1.0 -1", "s2-r2-0 r2 0.5 1.5 B"]
    )
    write_lines(data / "text", ["s2-r2-0 C  ž d", "s1-r1-0 a b", "s1-r1-1\tb"])
    write_lines(data / "utt2spk", ["s1-r1-0 s1", "s1-r1-1 s1", "s2-r2-0 s2"])
    write_lines(data / "spk2gender", ["s1 f", "s2 m"])
    return data


def test_segments_of_recordings(data: Path) -> None:
    corpus = Corpus(f"kaldi:{data},root={data.parents[1]}")
    assert corpus.texts == {"s1-r1-0": "a b", "s1-r1-1": "b", "s2-r2-0": "C  ž d"}
    assert corpus["s1-r1-0"].fields == {"speaker": "s1", "gender": "f"}
    assert corpus["s2-r2-0"].fields == {"speaker": "s2", "gender": "m"}
    assert corpus.manifest.name == "train"
    np.testing.assert_array_equal(corpus.samples("s1-r1-0"), tone(2.0, seed=1)[4000:12000])
    np.testing.assert_array_equal(corpus.samples("s1-r1-1"), tone(2.0, seed=1)[16000:])
    np.testing.assert_array_equal(corpus.samples("s2-r2-0"), tone(2.0, seed=3)[8000:24000])


def test_whole_recordings_and_further_files(data: Path) -> None:
    os.remove(data / "segments")
    for name in ("utt2spk", "spk2gender"):
        os.remove(data / name)
    write_lines(data / "text.en", ["r1 hello", "r2 world"])
    write_lines(data / "text", ["r1 ahoj", "r2"])
    write_lines(data / "utt2lang", ["r1 cs", "r2 cs"])
    spec = f"kaldi:{data},root={data.parents[1]},field.translation=text.en,set.task=st"
    corpus = Corpus(spec)
    assert corpus.texts == {"r1": "ahoj", "r2": None}
    assert corpus["r1"].fields == {"translation": "hello", "lang": "cs", "task": "st"}
    assert not corpus["r1"].is_cut
    np.testing.assert_array_equal(corpus.samples("r1"), tone(2.0, seed=1))
    assert Corpus(spec + ",text=text.en").texts == {"r1": "hello", "r2": "world"}


def test_relative_paths_start_at_the_working_directory(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parents[1])
    assert len(Corpus(f"kaldi:{data}").samples("s2-r2-0")) == 16000


def test_an_archive_holds_whole_wav_files(data: Path) -> None:
    ark, offsets = bytearray(), {}
    for seed in (4, 5):
        write_tone(data / "x.wav", 0.5, seed=seed)
        ark += f"r{seed} ".encode()
        offsets[f"r{seed}"] = len(ark)
        ark += (data / "x.wav").read_bytes()
    (data / "wav.ark").write_bytes(ark)
    os.remove(data / "segments")
    lines = [f"{name} {data}/wav.ark:{at}" for name, at in offsets.items()]
    write_lines(data / "wav.scp", [*lines, f"bad {data}/wav.ark:7", f"end {data}/wav.ark:999999"])
    write_lines(data / "text", ["r4 four", "r5 five", "bad x", "end x"])
    corpus = Corpus(f"kaldi:{data}")
    assert corpus["r5"].audio == SliceAudio(f"{data}/wav.ark", offsets["r5"], None, "")
    for seed in (4, 5):
        np.testing.assert_array_equal(corpus.samples(f"r{seed}"), tone(0.5, seed=seed))
    with pytest.raises(AudioError, match=r"undecodable: .*wav\.ark at byte 7: no RIFF header"):
        corpus.samples("bad")
    with pytest.raises(AudioError, match=r"undecodable: .*the file ends there"):
        corpus.samples("end")
    (data / "wav.ark").write_bytes(ark[:-100])
    with pytest.raises(AudioError, match=r"undecodable: .* of 16044 bytes, the file is cut off"):
        corpus.samples("r5")


def test_pipes_need_permission(data: Path) -> None:
    os.remove(data / "segments")
    write_lines(data / "wav.scp", [f"r1 sox {data}/../../audio/r1.wav -t wav - |"])
    write_lines(data / "text", ["r1 a"])
    with pytest.raises(DataError, match=r"wav\.scp:1: a pipe \(sox .*--allow-commands"):
        Corpus(f"kaldi:{data}")
    write_lines(data / "wav.scp", ["r1 cat audio/r1.wav | cat |"])
    corpus = Corpus(f"kaldi:{data},root={data.parents[1]}", allow_commands=True)
    assert corpus["r1"].audio == CommandAudio("cat audio/r1.wav | cat")
    np.testing.assert_array_equal(corpus.samples("r1"), tone(2.0, seed=1))


def test_a_pipe_that_only_decodes_a_file_needs_none(data: Path) -> None:
    audio = data.parents[1] / "audio"
    write_tone(audio / "r1.flac", 2.0, seed=1)
    write_lines(
        data / "wav.scp",
        [f"r1 flac -c -d -s {audio}/r1.flac |", f"r2 sph2pipe -f wav -p -c 2 {audio}/r2.sph |"],
    )
    corpus = Corpus(f"kaldi:{data}")
    assert corpus["s1-r1-0"].audio == FileAudio(f"{audio}/r1.flac")
    np.testing.assert_array_equal(corpus.samples("s1-r1-0"), tone(2.0, seed=1)[4000:12000])
    write_lines(data / "segments", ["s2-r2-0 r2 0.5 1.5"])
    write_lines(data / "text", ["s2-r2-0 c"])
    corpus = Corpus(f"kaldi:{data}")
    np.testing.assert_array_equal(corpus.samples("s2-r2-0"), tone(2.0, seed=3)[8000:24000])


def test_lengths_that_files_tell(data: Path) -> None:
    write_lines(data / "reco2dur", ["r1 2.00"])
    write_lines(data / "utt2dur", ["s1-r1-0 0.5"])
    corpus = Corpus(f"kaldi:{data}")
    assert [one.seconds for one in corpus.utterances.values()] == [2.0, 2.0, None]


def test_the_length_of_a_segment_is_not_that_of_a_recording_of_its_name(data: Path) -> None:
    write_lines(data / "segments", ["r1 r1 1.25 1.75"])
    write_lines(data / "text", ["r1 a"])
    write_lines(data / "utt2dur", ["r1 0.5"])
    assert Corpus(f"kaldi:{data}")["r1"].seconds is None
    os.remove(data / "segments")
    write_lines(data / "utt2dur", ["r1 2.0"])
    assert Corpus(f"kaldi:{data}")["r1"].seconds == 2.0


def test_a_segment_beyond_the_end_is_told(data: Path) -> None:
    write_lines(data / "segments", ["u r1 1.5 2.6"])
    write_lines(data / "text", ["u x"])
    with pytest.raises(AudioError, match=r"bad segment: start 1.5, end 2.6 of .* 2.000 seconds"):
        Corpus(f"kaldi:{data}").samples("u")


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("text", ["zz x", "s1-r1-0 a"], r"text:1: utterance 'zz' is not in .*segments \(1 such"),
        ("text", ["s1-r1-0 a", "s1-r1-0 b"], r"text: 's1-r1-0' is on line 1 and on line 2"),
        ("segments", ["s1-r1-0 r9 0 1"], r"segments:1: recording 'r9' is not in .*wav\.scp"),
        ("segments", ["s1-r1-0 r1 0"], r"segments:1: 3 words; a line reads UTTERANCE"),
        ("segments", ["s1-r1-0 r1 x 1"], r"segments:1: `start` must be a number"),
        ("segments", ["s1-r1-0 r1 0 1 C"], r"segments:1: `channel` must be 0, 1"),
        (
            "segments",
            [f"{name} r1 0 1" for name in ("s1-r1-0", "s1-r1-1", "s2-r2-0", "s1-r1-0")],
            r"segments: id 's1-r1-0' is on line 1 and on line 4",
        ),
        ("segments", [], r"segments: no lines"),
        ("wav.scp", ["r1"], r"wav\.scp:1: a line reads RECORDING PATH"),
        ("wav.scp", ["r1 a", "r1 b"], r"wav\.scp:2: recording 'r1' is on an earlier line"),
        ("wav.scp", ["r1 x.ark:7[0:9]"], r"wav\.scp:1: .*ranges of rows"),
        ("spk2gender", ["s1"], r"spk2gender:1: 1 words; a line reads SPEAKER GENDER"),
    ],
)
def test_what_is_wrong_is_named(data: Path, file: str, lines: list[str], message: str) -> None:
    write_lines(data / file, lines)
    with pytest.raises(DataError, match=message):
        Corpus(f"kaldi:{data}")


def test_unknown_utterances_in_text_may_be_ignored(data: Path) -> None:
    write_lines(data / "text", ["zz x", "s1-r1-0 a"])
    corpus = Corpus(f"kaldi:{data},unknown=ignore")
    assert corpus.texts == {"s1-r1-0": "a", "s1-r1-1": None, "s2-r2-0": None}


def test_what_is_no_data_directory(data: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        Corpus(f"kaldi:{data}/nowhere")
    os.remove(data / "text")
    with pytest.raises(DataError, match=r"has no text; .*text=FILE"):
        Corpus(f"kaldi:{data}")
