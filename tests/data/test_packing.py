from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from speech_files import write_corpus, write_shards

from speechllm.data.cleaning import CleanSettings
from speechllm.data.index import index_path, open_corpus
from speechllm.data.manifest import Manifest
from speechllm.data.packing import PackReport, pack
from speechllm.data.prepare import PrepareSettings
from speechllm.data.sources.read import read_sources
from speechllm.data.sources.spec import SourceOptions
from speechllm.data.store import Store
from speechllm.data.surveying import PackSettings
from speechllm.errors import DataError

SMALL = PackSettings(shard_bytes=60_000)


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def read(path: Path) -> Manifest:
    return read_sources([f"jsonl:{path}"], SourceOptions())


def run(
    manifest: Manifest | Path, out: Path, settings: PackSettings = SMALL, **options: Any
) -> PackReport:
    manifest = manifest if isinstance(manifest, Manifest) else read(manifest)
    defaults = {"num_workers": 1, "overwrite": False, "progress": quiet}
    return pack(manifest, str(out), settings, **{**defaults, **options})


def tars(report: PackReport) -> list[str]:
    return [shard.shard for shard in report.shards]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = write_corpus(tmp_path_factory.mktemp("corpus"), 24, seconds=(0.1, 0.6))
    return read(path)


def test_a_manifest_becomes_shards(manifest: Manifest, tmp_path: Path) -> None:
    report = run(manifest, tmp_path / "out")
    assert len(report.shards) > 3
    assert (report.utterances, report.kept, report.encoded, report.dropped) == (24, 24, 0, [])
    corpus = open_corpus([str(tmp_path / "out")])
    assert corpus.shards == tars(report)
    assert report.seconds == pytest.approx(corpus.durations.sum())
    assert report.bytes == sum(os.path.getsize(tar) for tar in tars(report))
    for shard in report.shards:
        assert shard.sha256 == hashlib.sha256(Path(shard.shard).read_bytes()).hexdigest()
    for name, counts in report.histograms().items():
        assert sum(counts) == 24, name
    store = Store(corpus)
    lines = {json.loads(manifest.line(i))["id"]: json.loads(manifest.line(i)) for i in range(24)}
    read = [store.read(i) for i in range(24)]
    assert sorted(one.key for one in read) == sorted(lines)
    assert [one.key for one in read] != sorted(lines)
    for i, one in enumerate(read):
        assert one.text == lines[one.key]["text"]
        assert len(one.text) == corpus.text_lengths[i]
        assert one.duration == corpus.durations[i]
        source = Path(manifest.directory) / lines[one.key]["audio"]["file"]
        assert store.read_raw(corpus.location(i))[0] == source.read_bytes()


def test_the_number_of_workers_changes_no_byte(manifest: Manifest, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        run(manifest, tmp_path / str(workers), num_workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_another_seed_makes_other_shards(manifest: Manifest, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(manifest, tmp_path / str(seed), PackSettings(60_000, seed))
    keys = []
    for seed in (0, 1):
        corpus = open_corpus([str(tmp_path / str(seed))])
        keys.append([corpus.key(i) for i in range(len(corpus))])
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])


def _packs_and_is_killed(manifest: Manifest, out: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what == "Writing shards" and done > 8:
            os.kill(os.getpid(), signal.SIGKILL)

    run(manifest, out, num_workers=2, progress=progress)


def test_a_killed_run_goes_on_where_it_was(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path / "whole")
    out = tmp_path / "killed"
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_packs_and_is_killed, args=(manifest, out))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with open(out / "shards.jsonl") as journal:
        finished = [json.loads(line)["shard"] for line in list(journal)[1:]]
    assert 0 < len(finished) < len(open_corpus([str(tmp_path / "whole")]).shards)
    # What a kill in the middle of a shard and of a line of the journal leaves.
    (out / "train-000009.tar.tmp-123").write_bytes(b"half")
    with open(out / "shards.jsonl", "a") as journal:
        journal.write('{"shard": "train-0000')
    before = {name: (out / name).stat().st_mtime_ns for name in finished}
    report = run(manifest, out)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == before
    assert contents(out) == contents(tmp_path / "whole")
    assert report.utterances == 24


def test_a_second_run_does_nothing(manifest: Manifest, tmp_path: Path) -> None:
    first = run(manifest, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("train-*")}
    assert run(manifest, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("train-*")} == before


def test_a_damaged_or_missing_shard_is_made_again(manifest: Manifest, tmp_path: Path) -> None:
    first = run(manifest, tmp_path)
    whole = contents(tmp_path)
    os.truncate(tars(first)[0], 1024)
    os.remove(index_path(tars(first)[1]))
    assert run(manifest, tmp_path) == first
    assert contents(tmp_path) == whole


def test_other_settings_need_overwrite(manifest: Manifest, tmp_path: Path) -> None:
    run(manifest, tmp_path)
    other = PackSettings(10**6, prepare=PrepareSettings(clean=CleanSettings(max_seconds=0.3)))
    for settings, name in ((PackSettings(60_000, 1), "seed"), (other, "shard_bytes")):
        with pytest.raises(DataError, match=f"made with {name} .*--overwrite"):
            run(manifest, tmp_path, settings)
    report = run(manifest, tmp_path, other, overwrite=True)
    assert 0 < report.utterances < 24
    assert report.drops_by_reason() == {"too long": 24 - report.utterances}
    assert open_corpus([str(tmp_path)]).shards == tars(report)


def test_another_manifest_needs_overwrite(manifest: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(manifest, out)
    path = write_corpus(tmp_path / "other", 3, seconds=(0.1, 0.2), name="other")
    with pytest.raises(DataError, match=r"another manifest; .*--overwrite"):
        run(path, out)
    run(path, out, overwrite=True)
    assert len(open_corpus([str(out)])) == 3


def test_a_wrong_manifest_with_overwrite_deletes_nothing(
    manifest: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(manifest, out)
    whole = contents(out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "audio": "nowhere.wav", "text": "x"}\n')
    with pytest.raises(DataError, match="no utterance is left"):
        run(bad, out, overwrite=True)
    assert contents(out) == whole


def test_foreign_shards_are_never_touched(manifest: Manifest, tmp_path: Path) -> None:
    write_shards(tmp_path, 2, seconds=(0.1, 0.2))
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(DataError, match="tars that make_shards did not write"):
            run(manifest, tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="must be a directory"):
        run(manifest, tmp_path / "file")


@pytest.mark.parametrize("content", ["", "no json\n", "[]\n", '{"a": 1}\n'])
def test_a_damaged_journal_is_refused(manifest: Manifest, tmp_path: Path, content: str) -> None:
    (tmp_path / "shards.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"shards\.jsonl: not what make_shards writes"):
        run(manifest, tmp_path)


def test_drops_are_counted_and_named(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus", 6, seconds=(0.1, 0.3))
    lines = path.read_text().splitlines()
    (path.parent / "audio/train-00001.flac").unlink()
    broken = path.parent / "audio/train-00002.flac"
    broken.write_bytes(broken.read_bytes()[:3000])
    lines[3] = json.dumps({**json.loads(lines[3]), "text": " "})
    path.write_text("\n".join(lines))
    report = run(path, tmp_path / "out", num_workers=2)
    assert report.utterances == 3
    assert [(one.line, one.id, one.reason) for one in report.dropped] == [
        (2, "utt-00001", "missing"),
        (3, "utt-00002", "undecodable"),
        (4, "utt-00003", "no text"),
    ]
    assert len(open_corpus([str(tmp_path / "out")])) == 3
    # A later run knows what the first dropped.
    assert run(path, tmp_path / "out") == report


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus", 3, seconds=(0.1, 0.2))
    moved = tmp_path / "moved.jsonl"
    moved.write_text(path.read_text())
    with pytest.raises(
        DataError, match=rf"missing \(3\).*relative audio paths start at {tmp_path}"
    ):
        run(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for audio in (path.parent / "audio").iterdir():
        audio.write_bytes(audio.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"undecodable \(3\)"):
        run(path, tmp_path / "out")
