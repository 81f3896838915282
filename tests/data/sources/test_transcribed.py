from __future__ import annotations

from pathlib import Path

import numpy as np

import pytest
import soundfile
from source_files import Corpus, write_lines, write_tone
from speech_files import tone

from speechllm.data.sources.utterance import CommandAudio
from speechllm.errors import AudioError, DataError

TDF_HEADER = (
    "file;unicode\tchannel;int\tstart;float\tend;float\tspeaker;unicode\tspeakerType;unicode\t"
    "speakerDialect;unicode\ttranscript;unicode\tsection;int\tturn;int\tsegment;int\t"
    "sectionType;unicode\tsuType;unicode"
)


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Two telephone calls of two sides at 8 kHz, one in mu-law."""
    (tmp_path / "audio/000").mkdir(parents=True)
    for i, subtype in ((1, "PCM_16"), (2, "ULAW")):
        both = np.stack([tone(2.0, seed=10 * i + side, rate=8000) for side in range(2)], axis=1)
        path = tmp_path / f"audio/000/fe_03_0000{i}.sph"
        soundfile.write(path, both, 8000, format="NIST", subtype=subtype)
    return tmp_path


def expected(calls: Path, call: int, side: int, start: float, end: float) -> np.ndarray:
    """Cut before resampling, as a file of its own."""
    data, rate = soundfile.read(calls / f"audio/000/fe_03_0000{call}.sph", dtype="int16")
    part = calls / "part.wav"
    soundfile.write(part, data[round(start * rate) : round(end * rate), side], rate)
    path = write_lines(calls / "part.jsonl", [{"id": "p", "audio": "part.wav", "text": "t"}])
    return Corpus(f"jsonl:{path}").samples("p")


def test_recordings_may_lie_behind_links(calls: Path) -> None:
    (calls / "audio/000").rename(calls / "disk2")
    (calls / "audio/000").symlink_to(calls / "disk2")
    path = write_lines(calls / "fe_03_00001.txt", ["0.25 1.00 A: and i"])
    corpus = Corpus(f"fisher:{path},audio={calls}/audio")
    assert [len(corpus.samples(name)) for name in corpus.utterances] == [12000]


def test_fisher_transcripts(calls: Path) -> None:
    write_lines(
        calls / "trans/000/fe_03_00001.txt",
        [
            "# fe_03_00001.sph",
            "# Transcribed at the LDC",
            "",
            "0.25 1.00 A: and i (( think ))",
            "0.5 1.50 B:  [laughter] yes",
        ],
    )
    write_lines(calls / "trans/000/fe_03_00002.txt", ["1.00 2.00 B: no"])
    corpus = Corpus(f"fisher:{calls}/trans,audio={calls}/audio")
    assert corpus.texts == {
        "fe_03_00001-A-0000250-0001000": "and i (( think ))",
        "fe_03_00001-B-0000500-0001500": "[laughter] yes",
        "fe_03_00002-B-0001000-0002000": "no",
    }
    assert corpus["fe_03_00002-B-0001000-0002000"].fields == {"speaker": "fe_03_00002-B"}
    for name, call, side, start, end in (
        ("fe_03_00001-A-0000250-0001000", 1, 0, 0.25, 1.0),
        ("fe_03_00002-B-0001000-0002000", 2, 1, 1.0, 2.0),
    ):
        np.testing.assert_array_equal(corpus.samples(name), expected(calls, call, side, start, end))


def test_tdf(calls: Path) -> None:
    said = 'sí <foreign lang="English"> ok'
    row = f"fe_03_00001.sph\t{{}}\t0.25\t1.0\tana\tfemale\tnative\t{said}\t0\t0\t0\t\tstatement"
    lines = [TDF_HEADER, ";;MM sectionTypes\t[None, None]", row.format(0), row.format(1)]
    path = write_lines(calls / "fe_03_00001.tdf", lines)
    corpus = Corpus(f"tdf:{path},audio={calls}/audio")
    one = corpus["fe_03_00001-B-0000250-0001000"]
    assert (one.channel, one.start, one.end) == (1, 0.25, 1.0)
    assert one.fields == {"speaker": "ana", "gender": "f", "dialect": "native"}
    assert one.text == said
    np.testing.assert_array_equal(corpus.samples(one.id), expected(calls, 1, 1, 0.25, 1.0))


def test_stm(calls: Path) -> None:
    path = write_lines(
        calls / "all.stm",
        [
            ";; a comment",
            "fe_03_00001 A s1 0.25 1.0 <o,f0,female> hello { uh / um / @ } there { @ / x }",
            "fe_03_00001 B s2 0.00 0.5 ignore_time_segment_in_scoring",
            "fe_03_00002 2 s3 1.0 1.5 <> numbered",
            "fe_03_00002 1 s4 1.0 1.5",
        ],
    )
    corpus = Corpus(f"stm:{path},audio={calls}/audio")
    assert list(corpus.texts.values()) == ["hello uh there", None, "numbered", None]
    one = corpus["fe_03_00001-A-0000250-0001000"]
    assert one.fields == {"speaker": "s1", "labels": "o,f0,female", "gender": "f"}
    two = corpus["fe_03_00002-2-0001000-0001500"]
    assert (two.channel, two.fields) == (1, {"speaker": "s3"})
    np.testing.assert_array_equal(corpus.samples(two.id), expected(calls, 2, 1, 1.0, 1.5))
    by_line = Corpus(f"stm:{path},audio={calls}/audio,ids=line")
    assert list(by_line.utterances) == [f"all-{number:06d}" for number in range(2, 6)]


def test_a_mono_file_of_one_speaker(calls: Path) -> None:
    write_tone(calls / "audio/talk.wav", 1.0, seed=3)
    path = write_lines(calls / "talk.stm", ["talk 1 t 0.5 1.0 hi", "talk 1 t 0.5 1.2 late"])
    corpus = Corpus(f"stm:{path},audio={calls}/audio")
    np.testing.assert_array_equal(
        corpus.samples("talk-1-0000500-0001000"), tone(1.0, seed=3)[8000:]
    )
    with pytest.raises(AudioError, match=r"bad segment: start 0.5, end 1.2"):
        corpus.samples("talk-1-0000500-0001200")


def test_sphere_files_compressed_with_shorten(calls: Path) -> None:
    sphere = calls / "audio/000/fe_03_00001.sph"
    coding = b"sample_coding -s26 pcm,embedded-shorten-v2.00\n"
    header = b"NIST_1A\n   1024\nsample_count -i 9\n" + coding + b"end_head\n"
    sphere.write_bytes(header.ljust(1024) + b"ajkg\x02")
    path = write_lines(calls / "a.stm", ["fe_03_00001 A s 0.5 1.0 x"])
    spec = f"stm:{path},audio={calls}/audio"
    with pytest.raises(AudioError, match=r"unsupported: .*shorten; .*sph2pipe.*--allow-commands"):
        Corpus(spec).samples("fe_03_00001-A-0000500-0001000")
    write_tone(calls / "converted.wav", 2.0, seed=4)
    command = f"{spec},command=test -f {{}} && cat {calls}/converted.wav"
    with pytest.raises(DataError, match="needs --allow-commands"):
        Corpus(command)
    corpus = Corpus(command, allow_commands=True)
    one = corpus["fe_03_00001-A-0000500-0001000"]
    assert one.audio == CommandAudio(f"test -f {sphere} && cat {calls}/converted.wav")
    np.testing.assert_array_equal(corpus.samples(one.id), tone(2.0, seed=4)[8000:16000])
    with pytest.raises(DataError, match=r"command= must hold \{\}"):
        Corpus(f"{spec},command=cat", allow_commands=True)


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("stm", "fe_03_00001 A s 0.5", "4 words; a line of STM reads"),
        ("stm", "fe_03_00001 C s 0.5 1.0 x", "channel 'C': give A, B or a number from 1"),
        ("stm", "fe_03_00001 0 s 0.5 1.0 x", "channel '0'"),
        ("stm", "fe_03_00001 A s 0.5 end x", "`end` must be a number of seconds"),
        ("stm", "fe_09 A s 0.5 1.0 x", "recording 'fe_09': none below"),
        ("tdf", "fe_03_00001.sph\t0\t0.5", "3 cells; a line of TDF"),
        ("tdf", "file;unicode\tchannel;int\tstart;float", "the header has no column `end`"),
        ("fisher", "0.5 1.0 hello", "a line of Fisher reads START END A: TEXT"),
    ],
)
def test_what_is_wrong_is_named(calls: Path, kind: str, line: str, message: str) -> None:
    path = write_lines(calls / f"fe_03_00001.{kind}", [line])
    with pytest.raises(DataError, match=rf"fe_03_00001\.{kind}:1: .*{message}"):
        Corpus(f"{kind}:{path},audio={calls}/audio")


def test_where_the_recordings_are(calls: Path) -> None:
    path = write_lines(calls / "a.stm", ["fe_03_00001 A s 0.5 1.0 x"])
    with pytest.raises(DataError, match=r"say where the recordings are: .*audio=DIR"):
        Corpus(f"stm:{path}")
    with pytest.raises(DataError, match="no such directory; audio=DIR"):
        Corpus(f"stm:{path},audio={calls}/nowhere")
    write_tone(calls / "audio/fe_03_00001.wav", 1.0)
    with pytest.raises(DataError, match=r"a\.stm:1: recording 'fe_03_00001': 2 of that name"):
        Corpus(f"stm:{path},audio={calls}/audio")
    with pytest.raises(DataError, match="no such file or directory"):
        Corpus(f"stm:{calls}/b.stm,audio={calls}/audio")
    with pytest.raises(DataError, match=r"no \*\.tdf below it"):
        Corpus(f"tdf:{calls},audio={calls}/audio")
