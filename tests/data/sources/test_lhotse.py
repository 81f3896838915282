from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import pytest
import soundfile
from source_files import Corpus, write_lines, write_tone
from speech_files import tone

from speechllm.data.sources.utterance import CommandAudio, FileAudio
from speechllm.errors import DataError


def recording(path: Path, seconds: float = 2.0, **values: Any) -> dict[str, Any]:
    whole = {
        "id": "rec",
        "sources": [{"type": "file", "channels": [0], "source": str(path)}],
        "sampling_rate": 16000,
        "num_samples": round(16000 * seconds),
        "duration": seconds,
        "channel_ids": [0],
    }
    return {**whole, **values}


def supervision(start: float, duration: float, **values: Any) -> dict[str, Any]:
    whole = {
        "id": "sup",
        "recording_id": "rec",
        "start": start,
        "duration": duration,
        "channel": 0,
        "text": "a b",
        "language": "English",
        "speaker": "s1",
        "gender": "F",
        "custom": {"task": "asr", "codes": {"array": {"storage_path": "x"}}},
    }
    return {**whole, **values}


def cut(rec: dict[str, Any], *supervisions: dict[str, Any], **values: Any) -> dict[str, Any]:
    whole = {
        "id": "cut",
        "start": 0,
        "duration": rec["duration"],
        "channel": 0,
        "supervisions": list(supervisions),
        "recording": rec,
        "type": "MonoCut",
    }
    return {**whole, **values}


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    write_tone(tmp_path / "rec.flac", 2.0, seed=1)
    return tmp_path / "rec.flac"


def test_a_cut_of_a_whole_recording_keeps_its_file(audio: Path) -> None:
    path = write_lines(audio.parent / "cuts.jsonl.gz", [cut(recording(audio), supervision(0, 2.0))])
    corpus = Corpus(f"lhotse:{path}")
    assert not corpus["sup"].is_cut
    assert corpus["sup"].text == "a b"
    fields = {"speaker": "s1", "lang": "English", "gender": "F", "task": "asr"}
    assert corpus["sup"].fields == fields
    assert corpus["sup"].seconds == 2.0
    assert corpus.manifest.name == "cuts"
    np.testing.assert_array_equal(corpus.samples("sup"), tone(2.0, seed=1))


def test_every_supervision_of_a_cut_is_an_utterance(audio: Path) -> None:
    supervisions = [
        supervision(-0.25, 0.5, id="s0"),
        supervision(0.5, 0.25, id="s1", custom=None, speaker=None),
    ]
    window = cut(recording(audio), *supervisions, start=1.0, duration=1.0, custom={"noise": "low"})
    path = write_lines(audio.parent / "cuts.jsonl", [window])
    corpus = Corpus(f"lhotse:{path}")
    np.testing.assert_array_equal(corpus.samples("s0"), tone(2.0, seed=1)[12000:20000])
    np.testing.assert_array_equal(corpus.samples("s1"), tone(2.0, seed=1)[24000:28000])
    assert corpus["s1"].fields == {"noise": "low", "lang": "English", "gender": "F"}
    assert list(Corpus(f"lhotse:{path},ids=cut").utterances) == ["cut-0", "cut-1"]
    alone = write_lines(audio.parent / "one.jsonl", [cut(recording(audio), supervisions[1])])
    assert list(Corpus(f"lhotse:{alone},ids=cut").utterances) == ["cut"]


def test_recordings_and_supervisions_in_any_order(audio: Path) -> None:
    write_tone(audio.parent / "b.flac", 1.0, seed=2)
    recordings = [recording(audio), recording(Path("b.flac"), 1.0, id="other")]
    path = write_lines(audio.parent / "recordings.jsonl.gz", recordings)
    supervisions = [
        supervision(0.5, 0.5, id="x", recording_id="other"),
        supervision(0.5, 1.0, id="y"),
        supervision(0.0, 0.5, id="z", recording_id="other", text=None),
    ]
    others = write_lines(audio.parent / "supervisions.jsonl.gz", supervisions)
    corpus = Corpus(f"lhotse:{path},supervisions={others},root={audio.parent}")
    assert corpus.texts == {"x": "a b", "y": "a b", "z": None}
    np.testing.assert_array_equal(corpus.samples("x"), tone(1.0, seed=2)[8000:])
    np.testing.assert_array_equal(corpus.samples("y"), tone(2.0, seed=1)[8000:24000])
    write_lines(others, [supervision(0, 1, recording_id="lost")])
    with pytest.raises(DataError, match=r"supervisions\.jsonl\.gz:1: recording 'lost' is not in"):
        Corpus(f"lhotse:{path},supervisions={others}")


def test_channels_of_one_file_and_of_several(audio: Path) -> None:
    folder = audio.parent
    both = np.stack([tone(1.0, seed=5), tone(1.0, seed=6)], axis=1)
    soundfile.write(folder / "both.wav", both, 16000)
    write_tone(folder / "right.wav", 1.0, seed=7)
    one_file = recording(
        folder, 1.0, sources=[{"type": "file", "channels": [0, 1], "source": "both.wav"}]
    )
    two_files = recording(
        folder,
        1.0,
        sources=[
            {"type": "file", "channels": [0], "source": "lost.wav"},
            {"type": "file", "channels": [1], "source": "right.wav"},
        ],
        transforms=[{"name": "Resample", "kwargs": {"sampling_rate": 16000}}],
    )
    cuts = [
        cut(one_file, supervision(0, 1.0, id="a", channel=1)),
        cut(two_files, supervision(0, 1.0, id="b", channel=[1])),
    ]
    path = write_lines(folder / "cuts.jsonl", cuts)
    corpus = Corpus(f"lhotse:{path},root={folder}")
    np.testing.assert_array_equal(corpus.samples("a"), tone(1.0, seed=6))
    np.testing.assert_array_equal(corpus.samples("b"), tone(1.0, seed=7))
    assert corpus["b"].channel is None


def test_urls_and_commands(audio: Path) -> None:
    def source(kind: str, value: str) -> dict[str, Any]:
        return recording(audio, sources=[{"type": kind, "channels": [0], "source": value}])

    path = write_lines(
        audio.parent / "cuts.jsonl",
        [
            cut(source("url", "s3://b/x.flac"), supervision(0, 2.0, id="u")),
            cut(source("command", f"cat {audio} |"), supervision(0, 1.0, id="c")),
        ],
    )
    with pytest.raises(DataError, match=r"cuts\.jsonl:2: .*is a command .*--allow-commands"):
        Corpus(f"lhotse:{path}")
    corpus = Corpus(f"lhotse:{path}", allow_commands=True)
    assert corpus["u"].audio == FileAudio("s3://b/x.flac")
    assert corpus["c"].audio == CommandAudio(f"cat {audio}")
    np.testing.assert_array_equal(corpus.samples("c"), tone(2.0, seed=1)[:16000])


REC = recording(Path("x.flac"))
MEMORY = recording(Path("x"), sources=[{"type": "memory", "channels": [0], "source": "AAAA"}])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (cut(REC, type="MixedCut"), "cut is a MixedCut; only MonoCut"),
        (cut(REC, type="MultiCut"), "cut is a MultiCut; only MonoCut"),
        (cut(REC, supervision(0, 1, channel=[0, 1])), "channel .* of recording rec: .*one channel"),
        (cut(REC, supervision(0, 1, channel=3)), "no source of recording rec has channel 3"),
        (cut(REC, supervision("0", 1)), "`start` of sup must be a number, not '0'"),
        (cut(REC, supervision(0, 1, text=7)), "`text` must be a string, not 7"),
        (cut(REC, supervision(0, 1, id="")), "a supervision without an id"),
        (cut(MEMORY, supervision(0, 1)), "source of type 'memory'"),
        (cut({**REC, "sources": []}, supervision(0, 1)), "has no `sources`"),
        (
            cut({**REC, "transforms": [{"name": "Speed"}]}, supervision(0, 1)),
            "has the transform Speed",
        ),
        (cut(REC, supervision(float("nan"), 1)), "`start` of sup must be a number, not nan"),
        (cut(REC, supervision(0, 10**400)), "`duration` of sup must be a number, not 10"),
        (cut(REC, supervision(0, 1, custom=["x"])), "`custom` of sup must be a JSON object"),
        ({**cut(REC), "supervisions": [None]}, "`supervisions` of cut must be a list of JSON obj"),
        ({**cut(REC), "recording": None}, "cut has no `recording`"),
        (cut({**REC, "sources": [None]}, supervision(0, 1)), "has no `sources`"),
        (cut({**REC, "transforms": 5}, supervision(0, 1)), "has the transform 5"),
        (cut({**REC, "transforms": [["x"]]}, supervision(0, 1)), "has the transform .'x'"),
        (REC, "rec is a recording; give cuts with recordings, or .*supervisions="),
        ({"id": "x", "type": "MonoCut"}, "x has no `recording`"),
        ("[]", "not a JSON object"),
        ("- id: x", "not JSON .* must be JSONL"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, line: dict[str, Any] | str, message: str
) -> None:
    path = write_lines(tmp_path / "cuts.jsonl", [line])
    with pytest.raises(DataError, match=rf"cuts\.jsonl:1: .*{message}"):
        Corpus(f"lhotse:{path}")
