from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import pytest
import soundfile
from http_files import serve
from hypothesis import given
from hypothesis import strategies as st
from speech_files import tone

from speechllm.data import prepare as prepare_module
from speechllm.data import remote
from speechllm.data.audio import decode_audio, encode_flac
from speechllm.data.cleaning import CleanSettings, audio_hash
from speechllm.data.encoding import Encoding, encode_opus
from speechllm.data.prepare import (
    ABSENT,
    Lines,
    Prepared,
    PrepareSettings,
    is_kept,
    prepare,
    survey,
)
from speechllm.data.sources.utterance import Access, FileAudio, SourceUtterance, encode_line
from speechllm.errors import DataError


def utterance(audio: str, **values: Any) -> SourceUtterance:
    return SourceUtterance(**{"id": "a", "text": "some text", "audio": FileAudio(audio), **values})


def prepared(
    one: SourceUtterance, directory: Path, settings: PrepareSettings | None = None
) -> Prepared:
    return prepare(one, Access((str(directory),)), settings or PrepareSettings())


def cleaning(**values: Any) -> PrepareSettings:
    return PrepareSettings(clean=CleanSettings(**values))


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
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000, np.int16), 16000)
    soundfile.write(tmp_path / "clipped.wav", np.full(16000, 32767, np.int16), 16000)
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    return tmp_path


@pytest.mark.parametrize(
    ("audio", "values", "mode", "kept"),
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
def test_what_is_kept(audio: str, values: dict[str, Any], mode: Any, kept: bool) -> None:
    assert is_kept(utterance(audio, **values), PrepareSettings(mode)) is kept


@pytest.mark.parametrize(
    ("audio", "rate"), [("a.flac", 16000), ("wide.flac", 48000), ("a.mp3", 16000)]
)
def test_kept_audio_is_kept_byte_for_byte(sources: Path, audio: str, rate: int) -> None:
    found = prepared(utterance(audio), sources)
    assert found.is_kept
    assert found.sample.audio == (sources / audio).read_bytes()
    assert (found.sample.extension, found.sample.sample_rate) == (audio.split(".")[1], rate)
    assert found.sample.duration == 1.0


def test_other_audio_becomes_flac(sources: Path) -> None:
    found = prepared(utterance("a.wav", channel=1), sources)
    assert not found.is_kept
    assert found.sample.extension == "flac"
    assert found.sample.audio == encode_flac(tone(1.0, seed=1))
    assert found.sample.sample_rate == 16000


def test_what_has_no_name_for_its_kind_is_encoded(sources: Path) -> None:
    (sources / "bare").write_bytes((sources / "a.flac").read_bytes())
    found = prepared(utterance("bare"), sources, PrepareSettings("keep"))
    assert not found.is_kept
    assert found.sample.audio == encode_flac(tone(1.0))


def test_or_opus(sources: Path) -> None:
    settings = PrepareSettings("reencode", Encoding("opus", 32_000))
    sample = prepared(utterance("a.flac", end=0.5), sources, settings).sample
    assert (sample.extension, sample.sample_rate, sample.duration) == ("opus", 16000, 0.5)
    assert sample.audio == encode_opus(tone(1.0)[:8000], 32_000)


@given(first=st.integers(0, 15_900), length=st.integers(1, 16_000))
def test_segments_are_cut_to_the_sample(first: int, length: int) -> None:
    """Against soundfile's own frames, through times as a corpus would give them."""
    last = min(first + length, 16_000)
    with tempfile.TemporaryDirectory() as directory:
        soundfile.write(f"{directory}/a.wav", tone(1.0), 16000)
        one = utterance("a.wav", start=first / 16000, end=last / 16000)
        sample = prepared(one, Path(directory)).sample
        expected, _ = soundfile.read(f"{directory}/a.wav", start=first, stop=last, dtype="int16")
    np.testing.assert_array_equal(decode_audio(sample.audio, "flac"), expected)
    assert sample.duration == (last - first) / 16000


def test_metadata_keep_what_the_line_held(sources: Path) -> None:
    fields = {"speaker": "s", "extra": {"deep": [1]}}
    one = utterance("a.flac", id="x.y", text="žluť", start=0.25, fields=fields)
    sample = prepared(one, sources).sample
    assert sample.key == "x%2Ey"
    assert sample.metadata == {
        "id": "x.y",
        "text": "žluť",
        "source": "a.flac",
        "start": 0.25,
        "speaker": "s",
        "extra": {"deep": [1]},
    }
    own_source = prepared(utterance("a.flac", fields={"source": "corpus"}), sources).sample
    assert own_source.metadata["source"] == "corpus"


def test_texts_are_normalised(sources: Path) -> None:
    settings = cleaning(normalise=("strip-punctuation", "lowercase"))
    found = prepared(utterance("a.flac", text="So, yes!"), sources, settings)
    assert found.sample.metadata["text"] == "so yes"
    assert found.measured[:3] == (1.0, 6, 6.0)


@pytest.mark.parametrize(
    ("audio", "values", "settings", "reason"),
    [
        ("a.flac", {"text": None}, {}, "no text"),
        ("a.flac", {"text": "\ud800"}, {}, "not Unicode"),
        ("nowhere.flac", {}, {}, "missing"),
        ("broken.flac", {}, {}, "undecodable"),
        ("none.wav", {}, {}, "undecodable"),
        ("nan.wav", {}, {}, "not finite"),
        ("a.flac", {"start": 5}, {}, "bad segment"),
        ("a.wav", {"channel": 2}, {}, "no such channel"),
        ("a.flac", {"end": 0.2}, {"min_seconds": 0.3}, "too short"),
        ("a.flac", {"end": 0.9}, {"max_seconds": 0.8}, "too long"),
        ("a.flac", {}, {"drop_text": ("some",)}, "unwanted text"),
        ("a.flac", {}, {"max_chars_per_second": 8.0}, "too many characters per second"),
        ("a.flac", {}, {"min_chars_per_second": 10.0}, "too few characters per second"),
        ("silent.wav", {}, {"max_silence": 0.9}, "silent"),
        ("clipped.wav", {}, {"max_clipping": 0.2}, "clipped"),
    ],
)
def test_what_cannot_be_used_says_why(
    sources: Path, audio: str, values: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=f"^{reason}: "):
        prepared(utterance(audio, **values), sources, cleaning(**settings))


def lines_of(directory: Path, utterances: list[SourceUtterance]) -> Lines:
    lines = [(number, encode_line(one, 0)) for number, one in enumerate(utterances, 1)]
    return Lines(Access((str(directory),)), lines)


def test_a_survey_foretells_sizes_lengths_and_drops(sources: Path) -> None:
    utterances = [
        utterance("a.flac", id="1"),
        utterance("nowhere.flac", id="2"),
        utterance("a.wav", id="3", start=0.25, end=1.0),
        utterance("a.flac", id="4", text=None),
        utterance("a.wav", id="5"),
        utterance("gone.flac", id="6", seconds=0.5),
    ]
    found = survey(lines_of(sources, utterances), cleaning(max_seconds=0.9))
    assert [(one.line, one.id, one.reason) for one in found.dropped] == [
        (1, "1", "too long"),
        (2, "2", "missing"),
        (4, "4", "no text"),
        (5, "5", "too long"),
        (6, "6", "missing"),
    ]
    assert found.seconds.tolist() == [0, 0, 0.75, 0, 0, 0]
    assert (found.sizes > 0).tolist() == [False, False, True, False, False, False]
    assert not found.hashes.any()
    whole = survey(lines_of(sources, utterances[:1]), PrepareSettings())
    audio = (sources / "a.flac").stat().st_size
    assert audio + 1024 < whole.sizes[0] < audio + 3 * 512 + 1024


def test_a_server_that_fails_is_told_as_when_shards_are_made(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    with serve(sources) as server:
        server.fault = lambda path, times: "status 503"
        one = utterance(f"{server.url}/a.flac")
        (drop,) = survey(lines_of(sources, [one]), PrepareSettings()).dropped
        with pytest.raises(DataError) as error:
            prepared(one, sources)
    assert f"{drop.reason}: {drop.detail}" == str(error.value)
    assert drop.reason in ABSENT


def test_lengths_are_guessed_where_nothing_depends_on_them(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("b", 2.0), ("c", 4.0)):
        soundfile.write(sources / f"{name}.wav", tone(seconds), 16000)
    utterances = [
        utterance("b.wav"),
        utterance("c.wav"),
        utterance("wide.flac"),
        utterance("c.wav", start=0.5, end=2.0),
    ]
    looked_at = []
    probe = prepare_module.probe_audio
    monkeypatch.setattr(
        prepare_module, "probe_audio", lambda *a: (looked_at.append(a[0].audio.path), probe(*a))[1]
    )
    lines = lines_of(sources, utterances)
    guessed = survey(lines, PrepareSettings("reencode"))
    assert looked_at == ["b.wav", "wide.flac"]
    assert guessed.seconds == pytest.approx([2.0, 4.0, 1.0, 1.5], rel=0.01)
    assert survey(lines, PrepareSettings("reencode"), lengths=True).seconds.tolist() == [
        2,
        4,
        1,
        1.5,
    ]
    assert looked_at[2:] == ["b.wav", "c.wav", "wide.flac"]


def test_an_end_behind_the_end_is_not_believed(sources: Path) -> None:
    told = utterance("a.wav", start=0.5, end=99_999.0, seconds=1.0)
    untold = utterance("a.wav", start=0.5, end=99_999.0)
    found = survey(lines_of(sources, [told, untold]), PrepareSettings())
    assert found.seconds[0] == 0.5
    assert found.seconds[1] < 200


def test_a_survey_for_duplicates_hears_everything(sources: Path) -> None:
    utterances = [utterance("a.flac"), utterance("broken.flac"), utterance("silent.wav")]
    settings = cleaning(drop_duplicate_audio=True, max_silence=0.5)
    found = survey(lines_of(sources, utterances), settings)
    assert [one.reason for one in found.dropped] == ["undecodable", "silent"]
    assert tuple(found.hashes[0].tolist()) == audio_hash(tone(1.0))
    assert not found.hashes[1:].any()


def test_opus_is_foretold_by_its_bitrate(sources: Path) -> None:
    settings = PrepareSettings("reencode", Encoding("opus", 24_000))
    found = survey(lines_of(sources, [utterance("a.flac")]), settings)
    assert 3000 + 1024 <= found.sizes[0] <= 3000 + 1024 + 2 * 512
