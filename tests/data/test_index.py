from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import fsspec
import pyarrow as pa
import pytest
from speech_files import make_sample, write_shards
from worker_copy import worker_bytes, worker_copy

from speechllm.data import index as index_module
from speechllm.data.index import SCHEMA, Location, index_path, open_corpus, open_index
from speechllm.data.shards import write_shard
from speechllm.errors import DataError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", 7, num_shards=3, seconds=(0.1, 0.3))


def test_a_corpus_numbers_utterances_over_its_shards(directory: Path) -> None:
    corpus = open_corpus([str(directory)])
    assert [Path(tar).name for tar in corpus.shards] == [f"train-00000{i}.tar" for i in range(3)]
    assert corpus.shard_sizes.tolist() == [3, 3, 1]
    assert corpus.shard_sizes.dtype == np.int64
    assert len(corpus) == 7
    assert [corpus.key(i) for i in range(7)] == [f"utt-{i:05d}" for i in range(7)]
    assert corpus.durations.shape == corpus.text_lengths.shape == (7,)
    assert (corpus.durations.dtype, corpus.text_lengths.dtype) == (np.float64, np.int32)
    place = corpus.location(6)
    assert place.shard == corpus.shards[2]
    data = Path(place.shard).read_bytes()
    assert data[place.audio_offset :].startswith(b"fLaC")
    meta = data[place.meta_offset : place.meta_offset + place.meta_size]
    assert meta.startswith(b"{")
    assert meta.endswith(b"}")
    for number in (-1, 7):
        with pytest.raises(IndexError):
            corpus.key(number)


def test_a_location_is_the_head_of_the_schema() -> None:
    assert tuple(SCHEMA.names[: len(Location._fields) - 1]) == Location._fields[1:]


def test_the_order_of_patterns_does_not_matter(directory: Path) -> None:
    whole = open_corpus([str(directory)])
    tars = [str(directory / f"train-00000{i}.tar") for i in (2, 0, 1, 0)]
    again = open_corpus([*tars, f"{directory}/*-{{000001..000002}}.tar"])
    assert again.shards == whole.shards
    assert again.fingerprint == whole.fingerprint


def test_the_fingerprint_follows_the_data_and_not_the_place(
    directory: Path, tmp_path: Path
) -> None:
    before = open_corpus([str(directory)]).fingerprint
    shutil.copytree(directory, tmp_path / "moved")
    assert open_corpus([str(tmp_path / "moved")]).fingerprint == before
    os.remove(tmp_path / "moved" / "train-000002.tar")
    assert open_corpus([str(tmp_path / "moved")]).fingerprint != before
    other = write_shards(tmp_path / "other", 7, num_shards=3, seed=1, seconds=(0.1, 0.3))
    assert open_corpus([str(other)]).fingerprint != before


def test_empty_shards_are_fine(tmp_path: Path) -> None:
    write_shards(tmp_path, 2, num_shards=4, seconds=(0.1, 0.2))
    corpus = open_corpus([str(tmp_path)])
    assert corpus.shard_sizes.tolist() == [1, 1, 0, 0]
    assert corpus.key(1) == "utt-00001"
    only_empty = open_corpus([str(tmp_path / "train-000003.tar")])
    assert len(only_empty) == 0
    assert only_empty.durations.shape == (0,)
    assert only_empty.fingerprint


def test_an_empty_shard_between_full_ones_is_stepped_over(tmp_path: Path) -> None:
    write_shard(str(tmp_path / "a.tar"), [make_sample("a", "x", 0.1)])
    write_shard(str(tmp_path / "b.tar"), [])
    write_shard(str(tmp_path / "c.tar"), [make_sample("c", "x", 0.1)])
    corpus = open_corpus([str(tmp_path)])
    assert corpus.location(1).shard.endswith("c.tar")


def test_a_corpus_pickles_small_and_holds_no_files_open(directory: Path) -> None:
    open_files = len(os.listdir("/proc/self/fd"))
    corpus = open_corpus([str(directory)])
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert worker_bytes(corpus) < 200 * len(corpus.shards)
    again = worker_copy(corpus)
    assert again.fingerprint == corpus.fingerprint
    assert again.location(5) == corpus.location(5)


def test_no_shards_is_an_error(tmp_path: Path) -> None:
    for pattern in (str(tmp_path), f"{tmp_path}/*.tar"):
        with pytest.raises(DataError, match=r"no \*.tar shards there; .*make_shards"):
            open_corpus([pattern])
    with pytest.raises(DataError, match=r"nowhere.tar: no such shard"):
        open_corpus([str(tmp_path / "nowhere.tar")])
    with pytest.raises(DataError, match="no shards given"):
        open_corpus([])


def test_a_missing_index_is_an_error_with_the_command(directory: Path) -> None:
    tar = directory / "train-000001.tar"
    os.remove(index_path(str(tar)))
    with pytest.raises(DataError, match=f"index_shards.py {tar}"):
        open_corpus([str(directory)])


def test_all_bad_shards_are_counted(directory: Path) -> None:
    for path in directory.glob("*.index.arrow"):
        path.unlink()
    with pytest.raises(DataError, match=r"train-000000.tar: has no index .* 2 more shards"):
        open_corpus([str(directory)])


def test_a_truncated_tar_is_refused(directory: Path) -> None:
    tar = directory / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])
    with pytest.raises(DataError, match=r"train-000001.tar: .* truncated or still being copied"):
        open_corpus([str(directory)])


def test_a_longer_tar_is_stale(directory: Path) -> None:
    tar = directory / "train-000001.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"train-000001.tar: its index is stale"):
        open_corpus([str(directory)])


def test_a_tar_of_the_same_size_with_other_members_is_stale(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.tar", "b.tar")]
    for path, key in zip(paths, ("one", "two"), strict=True):
        write_shard(path, [make_sample(key, "x", 0.2)])
    shutil.copy(paths[1], paths[0])
    assert os.path.getsize(paths[0]) == open_index(paths[1]).tar_size
    with pytest.raises(DataError, match=r"a.tar: its index is stale, .*index_shards.py"):
        open_index(paths[0])


@pytest.mark.parametrize("damage", [b"", b"ARROW1", b"x" * 500])
def test_a_damaged_index_is_refused(directory: Path, damage: bytes) -> None:
    (directory / "train-000000.index.arrow").write_bytes(damage)
    with pytest.raises(DataError, match=r"train-000000.index.arrow: not a readable index"):
        open_corpus([str(directory)])


def test_an_index_of_another_version_is_refused(directory: Path) -> None:
    path = str(directory / "train-000000.index.arrow")
    batch = open_index(str(directory / "train-000000.tar")).rows
    for schema in (SCHEMA, SCHEMA.with_metadata({"version": "0"})):
        with pa.ipc.new_file(path, schema) as writer:
            writer.write_batch(batch)
        with pytest.raises(DataError, match="not an index of version 1; build it with"):
            open_corpus([str(directory)])


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x"])
def test_names_that_are_no_tar_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"plain `\.tar` files"):
        open_corpus([str(tmp_path / name)])


def test_shards_behind_urls(directory: Path) -> None:
    for path in directory.iterdir():
        with fsspec.open(f"memory://index/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    local, remote = open_corpus([str(directory)]), open_corpus(["memory://index"])
    assert remote.fingerprint == local.fingerprint
    assert remote.location(3)[1:] == local.location(3)[1:]
    with fsspec.open("memory://index/train-000000.tar", "wb") as file:
        file.write(bytes(10240))
    with pytest.raises(DataError, match="truncated"):
        open_corpus(["memory://index"])
    by_file_url = open_corpus([f"file://{directory}"])
    assert by_file_url.fingerprint == local.fingerprint


def test_few_indexes_are_open_at_a_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_OPEN_INDEXES", 1)
    corpus = open_corpus([str(directory)])
    for number in [0, 6, 3, 0]:
        assert corpus.key(number) == f"utt-{number:05d}"
        assert len(corpus._opened) == 1
    assert len(corpus.column("audio_ext")) == 7


def test_a_shard_made_anew_in_use_is_refused(directory: Path) -> None:
    corpus = open_corpus([str(directory)])
    write_shards(directory, 4, num_shards=1, seconds=(0.1, 0.2))
    with pytest.raises(DataError, match="made anew while in use"):
        corpus.location(0)


def test_a_large_corpus_is_summed_up_once_on_a_node(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = open_corpus([str(directory)])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(index_module, "SHARED_UTTERANCES", 1)
    opened = []
    usual = index_module.open_index

    def watched(tar: str, *args: Any, **options: Any) -> index_module.ShardIndex:
        opened.append(tar)
        return usual(tar, *args, **options)

    monkeypatch.setattr(index_module, "open_index", watched)
    for _ in range(2):
        shared = open_corpus([str(directory)])
        assert shared.fingerprint == own.fingerprint
        assert shared.durations.tolist() == own.durations.tolist()
        assert shared.text_lengths.tolist() == own.text_lengths.tolist()
        assert shared.shard_sizes.tolist() == own.shard_sizes.tolist()
    assert len(opened) == 3
    assert shared.location(5)[1:] == own.location(5)[1:]
    write_shards(directory, 7, num_shards=3, seed=5, seconds=(0.1, 0.3))
    assert open_corpus([str(directory)]).fingerprint != own.fingerprint
    tar = directory / "train-000001.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(DataError, match="its index is stale"):
        open_corpus([str(directory)])
