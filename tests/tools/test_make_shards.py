from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import pytest
import soundfile
import webdataset
from make_shards import main
from speech_files import tone, write_corpus

from speechllm.data.audio import decode_audio
from speechllm.data.index import open_corpus
from speechllm.data.store import Store
from speechllm.errors import DataError, UserError

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"


def test_shards_a_report_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_corpus(
        tmp_path / "in", 12, seconds=(0.1, 0.4), rate=44100, channels=2, extension="wav"
    )
    with open(manifest, "a") as file:
        file.write(json.dumps({"id": "lost", "audio": "lost.wav", "text": "x"}) + "\n")
    out = tmp_path / "out [1]"
    options = ["--shard-size", "50kB", "--num-workers", "2", "--seed", "3"]
    assert main([str(manifest), "--out", str(out), *options]) == 0
    report = json.loads((out / "report.json").read_text())
    corpus = open_corpus([str(out)])
    assert report["utterances"] == len(corpus) == 12
    assert report["shards"] == len(corpus.shards) > 1
    assert report["hours"] == pytest.approx(corpus.durations.sum() / 3600)
    assert report["settings"]["seed"] == 3
    assert report["encoded"] == 12
    assert report["sample_rates"] == {"16000": 12}
    assert report["dropped"] == {"missing": 1}
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [(one["line"], one["id"], one["reason"]) for one in dropped] == [(13, "lost", "missing")]
    shown = capsys.readouterr().out
    assert "dropped: missing" in shown
    assert str(out / "dropped.jsonl") in shown
    assert str(out / "report.html") in shown
    assert Store(corpus).read(0).fields["source"].startswith("audio/")


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_corpus(tmp_path / "in", 5, seconds=(0.1, 0.3))
    options = ["--dry-run", "--max-seconds", "0.2", "--num-workers", "1"]
    assert main([str(manifest), "--out", str(tmp_path / "out"), *options]) == 0
    assert not (tmp_path / "out").exists()
    assert "dropped: too long" in capsys.readouterr().out


def test_sources_are_kept_or_encoded_as_told(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "in", 3, seconds=(0.1, 0.2), rate=8000, extension="wav")
    kinds = {}
    for option in ("--keep", "--reencode"):
        out = tmp_path / option
        assert main([str(manifest), "--out", str(out), option, "--num-workers", "1"]) == 0
        corpus = open_corpus([str(out)])
        kinds[option] = {corpus.location(i).audio_ext for i in range(3)}
    assert kinds == {"--keep": {"wav"}, "--reencode": {"flac"}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shard-size", "huge"],
        ["--seed", "-1"],
        ["--seed", "x"],
        ["--keep", "--reencode"],
        ["--num-workers", "two"],
        ["--codec", "mp3"],
        ["--bitrate", "5k"],
        ["--bitrate", "fast"],
        ["--max-silence", "1.5"],
        ["--min-seconds", "-1"],
        ["--max-chars-per-second", "nan"],
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["m.jsonl", "--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_users_error_has_no_traceback(tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "a", "audio": "a.flac", "text": "x"}\nbroken\n')
    result = subprocess.run(
        [sys.executable, str(TOOL), str(manifest), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {manifest}:2: not JSON")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--normalise", "lower"], "no normaliser 'lower'; there are nfc, "),
        (["--drop-text", "("], "is no regular expression"),
        (["--min-seconds", "3", "--max-seconds", "2"], "--max-seconds 2 is less than"),
    ],
)
def test_wrong_cleaning_is_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        main(["m.jsonl", "--out", str(tmp_path), *arguments])


def dirty_corpus(directory: Path) -> Path:
    """24 utterances, of which some are to be dropped: by line 1 to 7."""
    manifest = write_corpus(directory, 24, seconds=(0.3, 0.6), extension="wav")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    audio = directory / "audio"
    soundfile.write(audio / "train-00000.wav", np.zeros(8000, np.int16), 16000)
    loud = np.clip(tone(0.5).astype(np.int32) * 8, -32768, 32767).astype(np.int16)
    soundfile.write(audio / "train-00001.wav", loud, 16000)
    lines[2]["text"] = "IGNORE_TIME_SEGMENT_IN_SCORING"
    lines[3]["text"] = "[noise]"
    lines[4]["text"] = "far too many words for so short a sound " * 20
    shutil.copy(audio / "train-00010.wav", audio / "train-00015.wav")
    lines[6]["end"] = 0.1
    lines[8]["text"] = "Hello, <unk> World!"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


CLEANING = ["--min-seconds", "0.2", "--max-silence", "0.9", "--max-clipping", "0.2"]
CLEANING += ["--drop-text", "^IGNORE", "--normalise", "strip-brackets,strip-punctuation,lowercase"]
CLEANING += ["--max-chars-per-second", "250", "--drop-duplicate-audio"]


def test_a_dirty_corpus_is_cleaned_and_every_drop_is_told(tmp_path: Path) -> None:
    manifest = dirty_corpus(tmp_path / "in")
    command = [str(manifest), "--shard-size", "40kB", *CLEANING]
    for workers in ("1", "2", "4"):
        assert main([*command, "--out", str(tmp_path / workers), "--num-workers", workers]) == 0
    tasks = tmp_path / "tasks"
    command += ["--out", str(tasks), "--num-workers", "1"]
    assert main([*command, "--plan-only"]) == 0
    assert [path.name for path in tasks.iterdir()] == ["shards.jsonl"]
    for task in ("3", "1", "2"):
        assert main([*command, "--task", task, "--num-tasks", "3"]) == 0
    assert main([*command, "--check-complete"]) == 0
    whole = files_of(tmp_path / "1")
    assert sum(name.endswith(".tar") for name in whole) > 3
    for other in ("2", "4", "tasks"):
        assert files_of(tmp_path / other) == whole
    dropped = [json.loads(line) for line in whole["dropped.jsonl"].splitlines()]
    assert [(one["line"], one["reason"]) for one in dropped] == [
        (1, "silent"),
        (2, "clipped"),
        (3, "unwanted text"),
        (4, "no text"),
        (5, "too many characters per second"),
        (7, "too short"),
        (16, "duplicate audio"),
    ]
    assert dropped[-1]["detail"] == "the samples are those of utt-00010"
    report = json.loads(whole["report.json"])
    assert report["utterances"] == 17
    assert sum(report["dropped"].values()) == 7
    store = Store(open_corpus([str(tasks)]))
    texts = {one.key: one.text for one in map(store.read, range(17))}
    assert texts["utt-00008"] == "hello world"


def test_opus_shards_are_the_same_every_time_and_read_by_all(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "in", 6, seconds=(0.3, 0.6))
    for name, workers in (("one", "1"), ("two", "2")):
        options = ["--codec", "opus", "--bitrate", "32k", "--shard-size", "3kB"]
        command = [str(manifest), "--out", str(tmp_path / name), "--num-workers", workers]
        assert main([*command, *options]) == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    corpus = open_corpus([str(tmp_path / "one")])
    assert len(corpus.shards) > 1
    ours = [Store(corpus).read(i) for i in range(6)]
    theirs = list(webdataset.WebDataset(corpus.shards, shardshuffle=False))
    assert [one["__key__"] for one in theirs] == [one.key for one in ours]
    for one, other in zip(ours, theirs, strict=True):
        assert one.duration == corpus.durations[ours.index(one)]
        np.testing.assert_array_equal(decode_audio(other["opus"], "opus"), one.samples)
        assert json.loads(other["json"])["text"] == one.text
    listed = subprocess.run(["tar", "-tf", corpus.shards[0]], capture_output=True, text=True)
    assert listed.stdout.split()[:2] == [f"{ours[0].key}.opus", f"{ours[0].key}.json"]


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("tasks", [2, 3, 9])
def test_tasks_make_the_files_that_one_process_makes(
    tmp_path: Path, tasks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_corpus(tmp_path / "in", 20, seconds=(0.1, 0.3))
    with open(manifest, "a") as file:
        file.write(json.dumps({"id": "lost", "audio": "lost.wav", "text": "x"}) + "\n")
    same = ["--shard-size", "12kB", "--num-workers", "1", "--seed", "5"]
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert main([str(manifest), "--out", str(whole), *same]) == 0
    command = [str(manifest), "--out", str(shared), *same]
    order = [*range(2, tasks + 1), 1]
    for task in order[:-1]:
        assert main([*command, "--task", str(task), "--num-tasks", str(tasks)]) == 0
    with pytest.raises(DataError, match=r"missing .*-000000\.tar"):
        main([*command, "--check-complete"])
    assert main([*command, "--task", "1", "--num-tasks", str(tasks)]) == 0
    capsys.readouterr()
    for _ in range(2):
        assert main([*command, "--check-complete"]) == 0
    assert "dropped: missing" in capsys.readouterr().out
    assert files_of(shared) == files_of(whole)
    assert len(list(whole.glob("*.tar"))) > 3


def test_a_task_goes_on_with_what_is_there_and_leaves_others_alone(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "in", 12, seconds=(0.1, 0.3))
    out = tmp_path / "out"
    command = [str(manifest), "--out", str(out), "--shard-size", "12kB", "--num-workers", "1"]
    assert main([*command, "--task", "1", "--num-tasks", "2"]) == 0
    first = sorted(out.glob("*.tar"))
    times = [tar.stat().st_mtime_ns for tar in first]
    being_written = out / f"{first[0].name.replace('000000', '000001')}.tmp-77"
    own_leftover = out / f"{first[0].name}.tmp-78"
    for file in (being_written, own_leftover):
        file.write_bytes(b"half")
    assert main([*command, "--task", "1", "--num-tasks", "2"]) == 0
    assert [tar.stat().st_mtime_ns for tar in first] == times
    assert being_written.exists()
    assert not own_leftover.exists()
    being_written.unlink()
    assert main(command) == 0  # without --task: makes what is left, and all is one again
    assert not list(out.glob("shards-*"))
    assert len(open_corpus([str(out)])) == 12


def test_tasks_with_other_settings_are_refused(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path / "in", 8, seconds=(0.1, 0.2))
    command = [str(manifest), "--out", str(tmp_path / "out"), "--num-workers", "1"]
    with pytest.raises(DataError, match="no task has made any shards"):
        main([*command, "--check-complete"])
    assert main([*command, "--task", "1", "--num-tasks", "2"]) == 0
    with pytest.raises(DataError, match="made with seed 0, not 1"):
        main([*command, "--task", "2", "--num-tasks", "2", "--seed", "1"])
    with pytest.raises(DataError, match="made with seed 0, not 1"):
        main([*command, "--check-complete", "--seed", "1"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "1"], "belong together"),
        (["--num-tasks", "2"], "belong together"),
        (["--task", "3", "--num-tasks", "2"], "numbered 1 to 2"),
        (["--task", "1", "--num-tasks", "2", "--overwrite"], "--overwrite"),
    ],
)
def test_wrong_tasks_are_refused(tmp_path: Path, arguments: list[str], said: str) -> None:
    manifest = write_corpus(tmp_path / "in", 2, seconds=(0.1, 0.2))
    with pytest.raises(UserError, match=said):
        main([str(manifest), "--out", str(tmp_path / "out"), *arguments])
