from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import pytest
import soundfile
from speech_files import tone

from speechllm.data.audio import decode_audio, encode_flac
from speechllm.data.manifest import Entry, parse_line
from speechllm.data.prepare import AudioSettings, Lines, is_kept, prepare, survey
from speechllm.errors import DataError


def entry(audio: str, **fields: Any) -> Entry:
    values = {"id": "a", "audio": audio, "text": "some text", **fields}
    return parse_line(json.dumps(values).encode(), "line 1")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.flac", tone(1.0), 16000)
    soundfile.write(tmp_path / "wide.flac", tone(1.0, rate=48000), 48000)
    soundfile.write(tmp_path / "a.opus", tone(1.0, rate=48000), 48000, format="OGG", subtype="OPUS")
    soundfile.write(tmp_path / "a.mp3", tone(1.0), 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([tone(1.0), tone(1.0, seed=1)], axis=1), 16000)
    (tmp_path / "broken.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:8000])
    (tmp_path / "none.wav").write_bytes(b"")
    nan = np.zeros(1000, np.float32)
    nan[3] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    return tmp_path


@pytest.mark.parametrize(
    ("audio", "fields", "mode", "kept"),
    [
        ("a.flac", {}, "auto", True),
        ("a.OPUS", {}, "auto", True),
        ("a.wav", {}, "auto", False),
        ("a.wav", {}, "keep", True),
        ("a.flac", {}, "reencode", False),
        ("a.flac", {"start": 0.0}, "auto", False),
        ("a.flac", {"end": 0.5}, "keep", False),
        ("a.flac", {"channel": 0}, "keep", False),
    ],
)
def test_what_is_kept(audio: str, fields: dict[str, Any], mode: Any, kept: bool) -> None:
    assert is_kept(entry(audio, **fields), AudioSettings(mode)) is kept


@pytest.mark.parametrize(
    ("audio", "rate"), [("a.flac", 16000), ("wide.flac", 48000), ("a.mp3", 16000)]
)
def test_kept_audio_is_kept_byte_for_byte(sources: Path, audio: str, rate: int) -> None:
    sample = prepare(entry(audio), str(sources), AudioSettings())
    assert sample.audio == (sources / audio).read_bytes()
    assert (sample.extension, sample.sample_rate) == (audio.split(".")[1], rate)
    assert sample.duration == 1.0


def test_other_audio_becomes_flac(sources: Path) -> None:
    sample = prepare(entry("a.wav", channel=1), str(sources), AudioSettings())
    assert sample.extension == "flac"
    assert sample.audio == encode_flac(tone(1.0, seed=1))
    assert sample.sample_rate == 16000


def test_a_segment_is_cut_out(sources: Path) -> None:
    sample = prepare(entry("a.flac", start=0.25, end=0.75), str(sources), AudioSettings())
    np.testing.assert_array_equal(decode_audio(sample.audio, "flac"), tone(1.0)[4000:12000])
    assert sample.duration == 0.5
    assert sample.metadata["start"] == 0.25


def test_metadata_keep_what_the_line_held(sources: Path) -> None:
    line = entry("a.flac", id="x.y", speaker="s", extra={"deep": [1]}, text=" žluť ")
    sample = prepare(line, str(sources), AudioSettings())
    assert sample.key == "x%2Ey"
    assert sample.metadata == {
        "id": "x.y",
        "text": "žluť",
        "source": "a.flac",
        "speaker": "s",
        "extra": {"deep": [1]},
    }
    own_source = prepare(entry("a.flac", source="corpus"), str(sources), AudioSettings())
    assert own_source.metadata["source"] == "corpus"


@pytest.mark.parametrize(
    ("audio", "fields", "reason"),
    [
        ("a.flac", {"text": ""}, "no text"),
        ("a.flac", {"text": "\ud800"}, "not Unicode"),
        ("nowhere.flac", {}, "missing"),
        ("broken.flac", {}, "undecodable"),
        ("none.wav", {}, "undecodable"),
        ("nan.wav", {}, "not finite"),
        ("a.flac", {"start": 5}, "bad segment"),
        ("a.wav", {"channel": 2}, "no such channel"),
        ("a.flac", {"end": 0.2}, "too short"),
        ("a.flac", {"end": 0.9}, "too long"),
    ],
)
def test_what_cannot_be_used_says_why(
    sources: Path, audio: str, fields: dict[str, Any], reason: str
) -> None:
    settings = AudioSettings(min_seconds=0.3, max_seconds=0.8 if "end" in fields else None)
    with pytest.raises(DataError, match=f"^{reason}: "):
        prepare(entry(audio, **fields), str(sources), settings)


def test_a_survey_foretells_sizes_lengths_and_drops(sources: Path) -> None:
    values = [
        {"id": "1", "audio": "a.flac", "text": "x"},
        {"id": "2", "audio": "nowhere.flac", "text": "x"},
        {"id": "3", "audio": "a.wav", "text": "x", "start": 0.25, "end": 9},
        {"id": "4", "audio": "a.flac", "text": ""},
        {"id": "5", "audio": "a.wav", "text": "x"},
    ]
    lines = [(number, json.dumps(value).encode()) for number, value in enumerate(values, 1)]
    found = survey(Lines(str(sources), lines), AudioSettings(max_seconds=0.9))
    assert [(one.line, one.id, one.reason) for one in found.dropped] == [
        (1, "1", "too long"),
        (2, "2", "missing"),
        (4, "4", "no text"),
        (5, "5", "too long"),
    ]
    assert found.seconds.tolist() == [0, 0, 0.75, 0, 0]
    assert (found.sizes > 0).tolist() == [False, False, True, False, False]
    whole = survey(Lines(str(sources), lines[:1]), AudioSettings())
    audio = (sources / "a.flac").stat().st_size
    assert audio + 1024 < whole.sizes[0] < audio + 3 * 512 + 1024
