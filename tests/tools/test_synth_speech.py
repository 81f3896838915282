"""The synthesised corpus: the same to the byte each time, and splits that share nothing."""

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np

import pytest
import soundfile
import speech_engines
import synth_speech
from espeak import Espeak, Voice
from speech_grammar import LONGEST, sentence, vocabulary
from speech_voices import TEST_VARIANTS, TRAIN_VARIANTS, Speech, speakers
from synth_speech import main, plan, split_sizes, trim

from speechllm.errors import UserError

SPLITS = ("train", "validation", "test")


def lines(directory: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"{split}.jsonl").read_text().splitlines()]


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("speech") / "corpus"
    # 220 utterances are three chunks, the last one short.
    assert main(["--out", str(directory), "--count", "220", "--num-workers", "1"]) == 0
    return directory


def test_same_bytes_for_any_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "again"), "--count", "220", "--num-workers", "3"]
    assert main(arguments) == 0
    first = digests(corpus)
    assert len(first) == 220 + len(SPLITS) + 1
    assert digests(tmp_path / "again") == first
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_manifests_and_audio(corpus: Path) -> None:
    seconds = []
    for split in SPLITS:
        entries = lines(corpus, split)
        assert len(entries) == split_sizes(220)[split]
        assert len({entry["id"] for entry in entries}) == len(entries)
        for entry in entries:
            info = soundfile.info(corpus / entry["audio"])
            assert (info.samplerate, info.channels) == (16_000, 1)
            assert (info.format, info.subtype) == ("FLAC", "PCM_16")
            assert entry["duration"] == pytest.approx(info.duration, abs=1e-4)
            assert re.fullmatch(r"[a-z]+( [a-z]+)*", entry["text"])
            seconds.append(info.duration)
    assert 1.5 < float(np.mean(seconds)) < 3.5
    assert max(seconds) < 8


def test_speech_fills_the_file_and_is_not_silent(corpus: Path) -> None:
    for entry in lines(corpus, "test"):
        samples, rate = soundfile.read(corpus / entry["audio"])
        loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
        assert np.abs(samples).max() > 0.02
        assert loud[0] / rate < 0.2
        assert (len(samples) - loud[-1]) / rate < 0.2


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_share_neither_sentences_nor_voices(seed: int) -> None:
    items = plan(3000, seed)
    texts = [item.text for item in items]
    assert len(set(texts)) == len(texts) == 3000
    variants = {
        split: {item.speech.speaker.split("+")[1] for item in items if item.split == split}
        for split in SPLITS
    }
    assert not variants["test"] & (variants["train"] | variants["validation"])
    assert len(variants["train"]) >= 30
    assert len(variants["test"]) == len(TEST_VARIANTS.split())
    words = {
        split: {word for item in items if item.split == split for word in item.text.split()}
        for split in SPLITS
    }
    assert words["test"] <= words["train"]
    assert words["train"] == vocabulary()


def test_a_plan_depends_on_its_arguments_alone() -> None:
    random.seed(1)
    first = plan(100, 3)
    random.seed(2)
    assert plan(100, 3) == first
    assert {item.text for item in plan(100, 4)} != {item.text for item in first}


def test_vocabulary_and_sentences() -> None:
    assert 160 <= len(vocabulary()) <= 300
    draw = random.Random(0)
    for _ in range(500):
        words = sentence(draw).split()
        assert 3 <= len(words) <= LONGEST
        assert set(words) <= vocabulary()


@pytest.mark.parametrize(
    ("count", "test", "validation"),
    [(10, 2, 1), (100, 20, 10), (1000, 150, 60), (4000, 150, 120), (8000, 150, 200)],
)
def test_split_sizes(count: int, test: int, validation: int) -> None:
    sizes = split_sizes(count)
    assert sizes == {"train": count - test - validation, "validation": validation, "test": test}


def test_every_voice_exists_and_speaks() -> None:
    espeak = Espeak()
    for name in sorted({*speakers("train"), *speakers("test")}):
        samples = espeak.speak("yes", Voice(name, rate=190))
        assert np.abs(samples.astype(int)).max() > 500, name
    assert not set(TEST_VARIANTS.split()) & set(TRAIN_VARIANTS.split())


@pytest.mark.parametrize("name", ["en-us+nobody", "nowhere"])
def test_an_unknown_voice_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"no voice '{name}'")):
        Espeak().speak("yes", Voice(name))


def test_rate_and_pitch_are_heard() -> None:
    espeak = Espeak()
    slow = espeak.speak("turn on the kitchen lamp", Voice("en-us", rate=120))
    fast = espeak.speak("turn on the kitchen lamp", Voice("en-us", rate=200))
    assert len(slow) > 1.3 * len(fast)
    low, high = (espeak.speak("one two three", Voice("en-us", pitch=p)) for p in (10, 90))
    # The pitch is where the autocorrelation of a voiced stretch peaks, 60 to 400 Hz.
    periods = []
    for samples in (low, high):
        voiced = samples[4000:8000].astype(float)
        correlation = np.correlate(voiced, voiced, "full")[len(voiced) :]
        shortest = espeak.sample_rate // 400
        periods.append(shortest + int(np.argmax(correlation[shortest : espeak.sample_rate // 60])))
    assert periods[0] > 1.2 * periods[1]


def test_trim_keeps_a_tenth_of_a_second_and_adds_none() -> None:
    speech = np.full(500, 0.5)
    samples = np.concatenate([np.zeros(3000), speech, np.full(2000, 0.001)])
    assert len(trim(samples, 10_000)) == 1000 + 500 + 1000
    assert len(trim(np.concatenate([np.zeros(200), speech]), 10_000)) == 700


def test_second_call_reuses_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(items: list, directory: Path, *_: object) -> list[float]:
        directory.mkdir()
        for split in SPLITS:
            chosen = [item for item in items if item.split == split]
            texts = [json.dumps({"duration": 1.0, "text": item.text}) + "\n" for item in chosen]
            (directory / f"{split}.jsonl").write_text("".join(texts))
        return [1.0] * len(items)

    monkeypatch.setattr(synth_speech, "write_corpus", write)
    out = tmp_path / "speech"
    base = ["--out", str(out), "--count"]
    assert main([*base, "20"]) == 0
    before = (out / "train.jsonl").stat().st_mtime_ns
    assert main([*base, "20"]) == 0
    assert "this corpus already" in capsys.readouterr().err
    assert (out / "train.jsonl").stat().st_mtime_ns == before
    assert main([*base, "30"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*base, "20", "--seed", "7"]) == 2
    assert main([*base, "30", "--overwrite"]) == 0
    assert sum(len(lines(out, split)) for split in SPLITS) == 30
    (out / "settings.json").unlink()
    assert main([*base, "30", "--overwrite"]) == 2
    assert "not made by this tool" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["speech"]


def test_a_failure_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("no such voice")

    monkeypatch.setattr(synth_speech, "write_corpus", fail)
    assert main(["--out", str(tmp_path / "speech"), "--count", "20"]) == 2
    assert "no such voice" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "9"], "too small"),
        (["--count", "20", "--num-workers", "0"], "must be 1 or more"),
    ],
)
def test_bad_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--out", str(tmp_path / "speech"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_more_than_the_grammar_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth_speech, "sentence", lambda draw: f"number {draw.randrange(12)}")
    assert len(plan(10, 0)) == 10
    with pytest.raises(UserError, match="it found 12 sentences"):
        plan(20, 0)


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "speech"), "--count", "50", "--dry-run"]) == 0
    assert re.search(r"train +35 utterances", capsys.readouterr().out)
    assert not any(tmp_path.iterdir())


FLITE = """#!/bin/sh
if [ "$1" = "-lv" ]; then echo "Voices available: kal awb_time kal16 awb"; exit 0; fi
while [ $# -gt 0 ]; do [ "$1" = "-o" ] && cp "{wav}" "$2"; shift; done
"""


def test_programs_speak_in_the_training_split_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wav = tmp_path / "said.wav"
    soundfile.write(wav, np.full(800, 1234, np.int16), 8000, subtype="PCM_16")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert speech_engines.program_speakers() == ()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin" / "flite").write_text(FLITE.format(wav=wav))
    (tmp_path / "bin" / "flite").chmod(0o755)
    found = speech_engines.program_speakers()
    flite = tuple(name for name in found if name.startswith("flite"))
    assert set(flite) == {"flite:kal16", "flite:awb"}
    items = plan(2000, 0, flite)
    heard = {
        split: {item.speech.speaker for item in items if item.split == split} for split in SPLITS
    }
    assert {"flite:kal16", "flite:awb"} <= heard["train"]
    assert not any("flite" in name for name in heard["validation"] | heard["test"])
    samples, rate = speech_engines.speak("hello", Speech("flite:awb", 170, 50, 50))
    assert (rate, len(samples), samples.dtype) == (8000, 800, np.int16)
    assert (samples == 1234).all()
    (tmp_path / "bin" / "flite").write_text("#!/bin/sh\necho broken >&2; exit 3\n")
    with pytest.raises(UserError, match=r"flite failed \(broken\)"):
        speech_engines.speak("hello", Speech("flite:awb", 170, 50, 50))
