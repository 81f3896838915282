"""Builds that something happens to: whatever is finished stays, and the same command goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from speech_files import write_corpus

from speechllm.data.index import open_corpus
from speechllm.data.packing import PackReport, pack
from speechllm.data.sources.read import read_sources
from speechllm.data.sources.spec import SourceOptions
from speechllm.data.surveying import PackSettings, Progress
from speechllm.errors import DataError, UserError

SMALL = PackSettings(shard_bytes=12_000)  # some 15 shards


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def run(path: Path, out: Path, progress: Progress = quiet, **options: Any) -> PackReport:
    manifest = read_sources([f"jsonl:{path}"], SourceOptions())
    defaults = {"num_workers": 1, "overwrite": False, "progress": progress}
    return pack(manifest, str(out), SMALL, **{**defaults, **options})


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 24, seconds=(0.1, 0.6))


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    run(corpus, out)
    return contents(out)


def finished(out: Path) -> list[Path]:
    """Shards that the journal tells of; they are whole."""
    text = (out / "shards.jsonl").read_text()
    lines = [line for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")]
    tars = [out / json.loads(line)["shard"] for line in lines]
    assert all(len(open_corpus([str(tar)])) for tar in tars)
    return tars


def children() -> list[int]:
    own = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


def test_a_killed_worker_leaves_whole_shards(
    corpus: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    before = set(children())

    def kill_one(what: str, done: int, total: int) -> None:
        if what == "Writing shards" and done > 4 and (workers := set(children()) - before):
            os.kill(min(workers), signal.SIGKILL)

    with pytest.raises(UserError, match=r"a worker process was killed .*run the same command"):
        run(corpus, tmp_path, kill_one, num_workers=2)
    kept = finished(tmp_path)
    times = {tar: tar.stat().st_mtime_ns for tar in kept}
    assert 0 < len(kept) < sum(name.endswith(".tar") for name in whole)
    run(corpus, tmp_path, num_workers=2)
    assert {tar: tar.stat().st_mtime_ns for tar in kept} == times
    assert contents(tmp_path) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """150 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=152k", "none", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("cannot mount a tmpfs here: needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk_leaves_whole_shards(
    corpus: Path, small_disk: Path, whole: dict[str, bytes], num_workers: int
) -> None:
    out = small_disk / "out"
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)") as error:
        run(corpus, out, num_workers=num_workers)
    assert "make room" in str(error.value)
    assert len(finished(out)) > 0
    assert not list(out.glob("*.tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    run(corpus, out, num_workers=num_workers)
    assert contents(out) == whole


def test_storage_that_goes_away_stops_the_build(tmp_path: Path, whole: dict[str, bytes]) -> None:
    path = write_corpus(tmp_path / "corpus", 24, seconds=(0.1, 0.6))
    audio, away = path.parent / "audio", path.parent / "away"

    def leave(what: str, done: int, total: int) -> None:
        if what == "Writing shards" and 6 < done < total and audio.exists():
            audio.rename(away)

    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"missing: .* it was there when the shards were planned"):
        run(path, out, leave)
    kept = len(finished(out))
    assert kept > 0
    with pytest.raises(DataError, match="is the storage away"):
        run(path, out, num_workers=2)
    away.rename(audio)
    run(path, out, num_workers=2)
    assert contents(out) == whole


def test_what_has_gone_for_good_can_be_left_out(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus", 24, seconds=(0.1, 0.6))
    audio = path.parent / "audio"

    def lose(what: str, done: int, total: int) -> None:
        if what == "Looking at the audio" and done == total:
            (audio / "train-00003.flac").unlink()
            # A directory in place of a file: unreadable, also for root.
            (audio / "train-00004.flac").unlink()
            (audio / "train-00004.flac").mkdir()

    out = tmp_path / "out"
    with pytest.raises(DataError, match="--drop-unreadable"):
        run(path, out, lose)
    report = run(path, out, drop_unreadable=True)
    assert [(one.id, one.reason) for one in report.dropped] == [
        ("utt-00003", "missing"),
        ("utt-00004", "unreadable"),
    ]
    assert report.utterances == 22


def test_a_source_that_was_cut_off_is_dropped_and_the_rest_is_made(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus", 6, seconds=(0.3, 0.6))
    for i, size in ((1, 60), (2, 4000)):  # within the header, within the audio
        os.truncate(path.parent / f"audio/train-{i:05d}.flac", size)
    report = run(path, tmp_path / "out", num_workers=2)
    assert [(one.id, one.reason) for one in report.dropped] == [
        ("utt-00001", "undecodable"),
        ("utt-00002", "undecodable"),
    ]
    assert len(open_corpus([str(tmp_path / "out")])) == report.utterances == 4
